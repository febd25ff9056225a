"""Tool calls in what a model wrote, read in the form in which its own chat template writes them (`find_form` finds it)."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from posttrain.data.provenance.messages import reasoning_end

Json = dict[str, Any]
ParametersOf = Callable[[str], Json]  # name of a tool -> JSON schema of its arguments


@dataclass(frozen=True)
class Call:
    """`id` is what the tool's answer refers to; some templates let the model write it."""

    name: str
    arguments: Json
    id: str | None = None


@dataclass(frozen=True)
class Written:
    """An answer of a model: its text, and the calls behind it. `problem` says why what looks like calls cannot be read."""

    text: str
    calls: tuple[Call, ...] = ()
    problem: str = ""


class Unreadable(ValueError):
    """Why what a model wrote is no call."""


class Reader(Protocol):
    """Reads one call at a place in a text. What stands around calls is the form's."""

    def read(self, text: str, at: int, parameters_of: ParametersOf) -> tuple[Call, int]:
        """The call, and where it ends. Raises Unreadable."""


@dataclass(frozen=True)
class CallForm:
    """How a template writes calls: `opener`, a call, `between` and a call as often as need be, `ending`.

    `between` is None where the template takes one call a turn. `gap` is what it writes between text and `opener`, None where it
    takes no text before calls; `head` is what calls begin with where nothing opens them.
    """

    opener: str
    between: str | None
    ending: str
    gap: str | None
    head: str
    reader: Reader

    def read(self, text: str, parameters_of: ParametersOf) -> Written:
        """The text with its calls apart. Calls inside of reasoning are none."""
        begin = reasoning_end(text)
        opener = re.compile(_body(self.opener) + r"\s*").search(text, begin)
        if self.opener.strip() and opener is None:
            return Written(text)
        if not self.opener.strip():
            return self._read_bare(text, begin, parameters_of)
        assert opener
        before = text[: opener.start()].removesuffix(self.gap or "")
        try:
            return Written(before, self._calls(text, opener.end(), parameters_of))
        except Unreadable as error:
            return Written(text, (), str(error))

    def _read_bare(self, text: str, begin: int, parameters_of: ParametersOf) -> Written:
        """Calls that nothing announces are the whole answer."""
        begin += len(text[begin:]) - len(text[begin:].lstrip())
        try:
            return Written(text[:begin].removesuffix(self.gap or ""), self._calls(text, begin, parameters_of))
        except Unreadable as error:
            return Written(text, (), str(error) if text.startswith(self.head, begin) else "")

    def _calls(self, text: str, at: int, parameters_of: ParametersOf) -> tuple[Call, ...]:
        calls = []
        begin: int | None = at
        while begin is not None:
            call, at = self.reader.read(text, begin, parameters_of)
            calls.append(call)
            begin = self._next(text, at)
        if not re.compile(_loose(self.ending)).match(text, at):
            raise Unreadable(f"a call must be followed by {self.ending.strip()!r}")
        return tuple(calls)

    def _next(self, text: str, at: int) -> int | None:
        """Where another call begins, behind one that ends at `at`."""
        found = None if self.between is None else re.compile(_loose(self.between)).match(text, at)
        if found is None or (self.between and self.between.strip()):
            return found and found.end()
        # nothing stands between calls: there is another if something follows that begins like one
        rest = text[found.end() :]
        is_over = not rest or (self.ending.strip() and re.compile(_loose(self.ending)).match(rest))
        return None if is_over or not rest.startswith(self.head[:1]) else found.end()


@dataclass(frozen=True)
class ObjectReader:
    """A call as one JSON object, with the keys under which its parts stand."""

    name_key: str
    arguments_key: str
    id_key: str | None

    def read(self, text: str, at: int, parameters_of: ParametersOf) -> tuple[Call, int]:
        value, end = json_object(text, at)
        name, arguments = value.get(self.name_key), value.get(self.arguments_key)
        if not isinstance(name, str) or not isinstance(arguments, dict):
            expected = f'{{"{self.name_key}": name of the tool, "{self.arguments_key}": object with its arguments}}'
            raise Unreadable(f"a call must be {expected}")
        identity = value.get(self.id_key) if self.id_key else None
        return Call(name, arguments, identity if isinstance(identity, str) else None), end


@dataclass(frozen=True)
class NameReader:
    """A call as its name, `separator`, and a JSON object with the arguments. Where there is an `id_end`, its id stands before
    that."""

    separator: str
    id_end: str | None

    def read(self, text: str, at: int, parameters_of: ParametersOf) -> tuple[Call, int]:
        behind_name = _found(re.compile(_loose(self.separator)), text, at, "the name of a tool")
        begin, identity = behind_name.end(), None
        if self.id_end is not None:
            behind_id = _found(re.compile(_loose(self.id_end)), text, begin, "the id of a call")
            begin, identity = behind_id.end(), text[begin : behind_id.start()]
        arguments, end = json_object(text, begin)
        return Call(text[at : behind_name.start()].strip(), arguments, identity), end


@dataclass(frozen=True)
class ParameterReader:
    """A call as its name, `head`, and for each argument `opener`, its name, `separator`, its value, `closer`; `after` are the
    texts that may stand behind the last. Values are texts, read by their types."""

    head: str
    opener: str
    separator: str
    closer: str
    after: tuple[str, ...]

    def read(self, text: str, at: int, parameters_of: ParametersOf) -> tuple[Call, int]:
        follows = (self.opener, *self.after)
        behind_name = re.compile("|".join(f"{_loose(self.head)}(?={_loose(mark)})" for mark in follows))
        behind_value = re.compile("|".join(f"{_exact(self.closer)}(?={_loose(mark)})" for mark in follows))
        name_end = _found(behind_name, text, at, "the name of a tool")
        name, at = text[at : name_end.start()].strip(), name_end.end()
        types = parameters_of(name).get("properties", {})
        arguments: Json = {}
        while opener := re.compile(_loose(self.opener)).match(text, at):
            key_end = _found(re.compile(_exact(self.separator)), text, opener.end(), "the name of an argument")
            key = text[opener.end() : key_end.start()].strip()
            value_end = _found(behind_value, text, key_end.end(), f"the value of {key!r}")
            arguments[key] = _typed(text[key_end.end() : value_end.start()], types.get(key, {}))
            at = value_end.end()
        return Call(name, arguments), at


def call_message(text: str, calls: Sequence[Call]) -> Json:
    """The assistant's message with calls, as chat templates take it."""
    listed = [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in calls
    ]
    return {"role": "assistant", "content": text or None, "tool_calls": listed}


def answer_message(call: Call, text: str) -> Json:
    """The message with a tool's answer to a call; one without a name could not be read."""
    named = {"name": call.name} if call.name else {}
    return {"role": "tool", **named, "tool_call_id": call.id, "content": text}


_DECODER = json.JSONDecoder()


def json_object(text: str, at: int) -> tuple[Json, int]:
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        raise Unreadable(f"this is not valid JSON: {error.msg} at character {error.pos - at}") from None
    except (ValueError, RecursionError, IndexError):
        raise Unreadable("this is not valid JSON") from None
    if not isinstance(value, dict):
        raise Unreadable("a JSON object was expected")
    return value, end


def _typed(text: str, schema: Json) -> Any:
    """A value that stands there as text; as text where the tool takes text, or it cannot be read as anything else."""
    if schema.get("type", "string") == "string":
        return text
    for read in (json.loads, ast.literal_eval):  # templates write JSON's true or Python's True
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def _found(pattern: re.Pattern[str], text: str, at: int, what: str) -> re.Match[str]:
    found = pattern.search(text, at)
    if found is None:
        raise Unreadable(f"what ends {what} is missing")
    return found


def _loose(mark: str) -> str:
    """A pattern for what the template writes, with any white space where it has some and around it."""
    return rf"\s*{_body(mark)}\s*"


def _body(mark: str) -> str:
    return r"\s*".join(map(re.escape, mark.split()))


def _exact(mark: str) -> str:
    """As `_loose`, but white space around it, which may be a value's own, is taken only as the template writes it."""
    lead, trail = mark[: len(mark) - len(mark.lstrip())], mark[len(mark.rstrip()) :]
    return rf"(?:{re.escape(lead)})?{_body(mark)}(?:{re.escape(trail)})?"
