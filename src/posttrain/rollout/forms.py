"""The form in which a chat template writes tool calls.

No form is listed here. A call whose name and arguments are known is rendered, and where they stand in the text says what the
template writes around them. The form is used only if calls with all kinds of arguments come back as they were.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import RowError
from posttrain.data.provenance.messages import reasoning_end
from posttrain.errors import InputError
from posttrain.records import Conversation
from posttrain.rollout.calls import (
    Call,
    CallForm,
    Json,
    NameReader,
    ObjectReader,
    ParameterReader,
    Reader,
    Unreadable,
    answer_message,
    call_message,
    json_object,
)


def find_form(chat: ChatTokenizer, schemas: Sequence[Json]) -> CallForm:
    """The form of calls in the tokenizer's chat template. Raises InputError where there is none, or none that can be read."""
    try:
        form = _derived(chat, schemas)
        _prove(form, chat, schemas)
        return form
    except (RowError, Unreadable) as error:
        name = chat.tokenizer.name_or_path or "the tokenizer"
        raise InputError(
            f"tools.functions: the chat template of {name} cannot be used with tools: {error}. Take a model whose template knows "
            "tools, or give a template with data.chat_template=FILE.jinja"
        ) from None


_ID = "posttrai{}"  # some templates take ids of nine characters only
_FIRST = Call("tool_first", {"key_first": "value_first", "key_second": "value_second"}, _ID.format(1))
_SECOND = Call("tool_second", {"key_third": "value_third", "key_fourth": "value_fourth"}, _ID.format(2))
_TEXT = "I need a tool."
_ANSWER = "answer {}"


def _derived(chat: ChatTokenizer, schemas: Sequence[Json]) -> CallForm:
    one = _own_text(chat, schemas, [_FIRST])
    begin, end, reader = _place(one, _FIRST)
    opener, ending = one[reasoning_end(one) : begin].lstrip(), one[end:]
    between = _between(chat, schemas)
    if isinstance(reader, ParameterReader):
        reader = replace(reader, after=tuple(mark for mark in (between, ending) if mark))
    gap = _gap(chat, schemas, opener + one[begin:end])
    head = one[begin : one.index(_FIRST.name, begin)]
    return CallForm(opener, between, ending, gap, head, reader)


def _between(chat: ChatTokenizer, schemas: Sequence[Json]) -> str | None:
    try:
        two = _own_text(chat, schemas, [_FIRST, _SECOND])
    except RowError:
        return None
    _, first_end, _ = _place(two, _FIRST)
    second_begin, _, _ = _place(two, _SECOND)
    return two[first_end:second_begin]


def _gap(chat: ChatTokenizer, schemas: Sequence[Json], call: str) -> str | None:
    try:
        own = _own_text(chat, schemas, [_FIRST], _TEXT)
    except RowError:
        return None
    return own.partition(call)[0].partition(_TEXT)[2] if _TEXT in own else None


def _own_text(chat: ChatTokenizer, schemas: Sequence[Json], calls: Sequence[Call], text: str = "") -> str:
    """What a model must write for a turn with these calls, but for the token that ends it. Raises RowError."""
    return _turn(chat, schemas, calls, text)[1]


def _turn(chat: ChatTokenizer, schemas: Sequence[Json], calls: Sequence[Call], text: str = "") -> tuple[str, str, str]:
    """What stands before the turn, the turn, and the token that ends it, as texts."""
    encoded = chat.encode(_conversation(schemas, calls, text))
    turn = next(turn for turn in encoded.turns if turn.message == 1)
    begin, end = encoded.offsets_TC[turn.begin, 0], encoded.offsets_TC[turn.end - 1, 0]
    end_token = encoded.text[slice(*encoded.offsets_TC[turn.end - 1])].strip()
    return encoded.text[:begin], encoded.text[begin:end].partition(end_token)[0], end_token


def _conversation(schemas: Sequence[Json], calls: Sequence[Call], text: str) -> Conversation:
    answers = [answer_message(call, _ANSWER.format(number)) for number, call in enumerate(calls)]
    messages = [{"role": "user", "content": "posttrain"}, call_message(text, calls), *answers]
    return Conversation(messages, list(schemas), weights=(None, 1.0, *(None for _ in answers)))


def _place(text: str, call: Call) -> tuple[int, int, Reader]:
    """Where the call stands in the text, and what reads it."""
    at = text.find(call.name)
    if at < 0:
        raise Unreadable("the template leaves out the names of called tools")
    return _as_object(text, call, at) or _as_name(text, call, at) or _as_parameters(text, call, at)


def _as_object(text: str, call: Call, at: int) -> tuple[int, int, Reader] | None:
    for begin in (found.start() for found in reversed(list(re.finditer("{", text[:at])))):
        try:
            value, end = json_object(text, begin)
        except Unreadable:
            continue
        keys = [next((key for key, item in value.items() if item == part), None) for part in _parts(call)]
        if keys[0] and keys[1]:
            return begin, end, ObjectReader(keys[0], keys[1], keys[2])
    return None


def _parts(call: Call) -> tuple[str, Json, str | None]:
    return call.name, call.arguments, call.id


def _as_name(text: str, call: Call, at: int) -> tuple[int, int, Reader] | None:
    name_end = at + len(call.name)
    brace = text.find("{", name_end)
    try:
        arguments, end = json_object(text, brace)
    except Unreadable:
        return None
    separator, identity, id_end = text[name_end:brace].partition(call.id or "\0")
    if arguments != call.arguments or not separator.strip() or (identity and not id_end.strip()):
        return None
    return at, end, NameReader(separator, id_end if identity else None)


def _as_parameters(text: str, call: Call, at: int) -> tuple[int, int, Reader]:
    places = [at + len(call.name)]
    for leaf in (leaf for item in call.arguments.items() for leaf in item):
        begin = text.find(leaf, places[-1])
        if begin < 0:
            raise Unreadable(f"the template writes arguments of tool calls in a form that is not known: {text[at:]!r}")
        places += [begin, begin + len(leaf)]
    first, separator, middle, other = (text[a:b] for a, b in zip(places[0:-1:2], places[1::2], strict=True))
    same = next((n for n in range(min(len(first), len(middle)), 0, -1) if first[-n:] == middle[-n:]), 0)
    closer = middle[: len(middle) - same]
    if separator != other or not closer or not same or not text.startswith(closer, places[-1]):
        raise Unreadable(f"the template writes arguments of tool calls in a form that is not known: {text[at:]!r}")
    reader = ParameterReader(first[: len(first) - same], first[len(first) - same :], separator, closer, ())
    return at, places[-1] + len(closer), reader


_KINDS: dict[str, Any] = {
    "text": "string", "number": "number", "flag": "boolean", "items": "array", "object": "object", "nothing": "null",
}  # fmt: skip
_PARAMETERS = {"type": "object", "properties": {key: {"type": kind} for key, kind in _KINDS.items()}}
_PROBES: dict[str, list[Json]] = {
    "one argument": [{"text": "3 + 4"}],
    "no arguments": [{}],
    "a number as text": [{"text": "7"}],
    "quotes, lines and backslashes": [{"text": 'say "hi" \\ it\'s\n\n  two {lines} [1] <b>&amp;</b> `x`\n'}],
    "other scripts": [{"text": "Grüße 小明 👍🏽"}],
    "all types": [{"number": -2.5, "flag": True, "items": [1, "a", {"b": None}], "object": {"c": {"d": [False]}}, "text": ""}],
    "nothing": [{"nothing": None, "number": 7}],
    "two calls": [{"text": "first"}, {"text": "second", "number": 2}],
    "three calls": [{}, {"text": "b"}, {"number": 3}],
}  # fmt: skip


def _prove(form: CallForm, chat: ChatTokenizer, schemas: Sequence[Json]) -> None:
    before, _, end_token = _turn(chat, schemas, [_FIRST])
    for name, arguments in _PROBES.items():
        if len(arguments) > 1 and form.between is None:
            continue
        calls = [Call(f"tool_{n}", each, _ID.format(n)) for n, each in enumerate(arguments)]
        for text in ("", _TEXT) if form.gap is not None else ("",):
            rendered = chat.prompt(_conversation(schemas, calls, text)).text
            own = rendered.removeprefix(before).partition(end_token)[0]
            if any(_ANSWER.format(number) not in rendered for number in range(len(calls))):
                raise Unreadable("the template leaves out what tools answer")
            found = form.read(own, lambda tool: _PARAMETERS)
            same = [(call.name, call.arguments) for call in found.calls] == [(c.name, c.arguments) for c in calls]
            if not same or own == rendered or not found.text.strip().endswith(text):
                raise Unreadable(f"its calls cannot be read back ({name}): {own!r} {found.problem}".rstrip())
