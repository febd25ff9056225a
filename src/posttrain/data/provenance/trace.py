"""What a template asks about the contents of messages while it runs, kept so that it can be asked again of other messages.

Every text made from a field of a message has a `Source`. Questions about the text (`'</think>' in content`,
`content | length`) go by it into the conversation's `Trace`, and `answer` answers them for any message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trace:
    """What a template asked about contents while it ran: all that its course can depend on, but for the messages' shapes.

    A question is (path in the message, steps to the text asked about, what was asked, its arguments). `followed` turns
    false where a question cannot be asked again, because the text came from several places. `encoded_again`: arguments of a
    tool call that were JSON text already were written as JSON once more.
    """

    asked: set[tuple[int, Question]] = field(default_factory=set)  # (number of the message, question)
    followed: bool = True
    encoded_again: bool = False

    def begin(self) -> None:
        """Forget what an earlier rendering asked."""
        self.asked, self.followed, self.encoded_again = set(), True, False


Step = tuple[str, tuple[Any, ...], int | None]  # method, arguments, index into its result
Question = tuple[tuple[Any, ...], tuple[Step, ...], str, tuple[Any, ...]]

_TRIMS = ("strip", "lstrip", "rstrip")
_MOST_SOURCES = 16


class Source:
    """A field of a message and the steps by which a text was made from it."""

    __slots__ = ("message", "path", "steps", "trace")

    def __init__(self, trace: Trace, message: int, path: tuple[Any, ...], steps: tuple[Step, ...] = ()):
        self.trace, self.message, self.path, self.steps = trace, message, path, steps

    def then(self, method: str, args: tuple[Any, ...], index: int | None = None) -> Source:
        plain = _plain(args)
        if plain is None:
            return Mixed(self.trace, changed=True)
        return Source(self.trace, self.message, self.path, (*self.steps, (method, plain, index)))

    def ask(self, what: str, args: tuple[Any, ...] = ()) -> None:
        plain = _plain(args)
        if plain is None:
            self.trace.followed = False
        else:
            self.trace.asked.add((self.message, (self.path, self.steps, what, plain)))

    def joined(self) -> None:
        """Note that the text became part of another: whether it was empty decides whose character is the last."""
        self.ask("not empty")


class Mixed(Source):
    """The source of a text from several places, which are `sources`. Once it is `changed`, its emptiness is unknown."""

    __slots__ = ("changed", "sources")

    def __init__(self, trace: Trace, sources: tuple[Source, ...] = (), changed: bool = False):
        super().__init__(trace, -1, ())
        self.sources, self.changed = sources, changed or len(sources) > _MOST_SOURCES

    def then(self, method: str, args: tuple[Any, ...], index: int | None = None) -> Source:
        if method in _TRIMS and not self.changed:  # what is left of the whole is empty if what is left of each part is
            return Mixed(self.trace, tuple(source.then(method, args) for source in self.sources))
        return Mixed(self.trace, changed=True)

    def ask(self, what: str, args: tuple[Any, ...] = ()) -> None:
        self.trace.followed = False

    def joined(self) -> None:
        if self.changed:
            self.trace.followed = False
        for source in self.sources:
            source.joined()


def answer(value: Any, question: Question) -> Any:
    """What a message says to a question that was asked of another; None where it lacks the field."""
    path, steps, what, args = question
    try:
        for key in path:
            value = value[key]
        for method, step_args, index in steps:
            value = _STEPS[method](value, *step_args) if method in _STEPS else getattr(value, method)(*step_args)
            value = value if index is None else value[index]
        return _ANSWERS[what](value, *args) if what in _ANSWERS else getattr(value, what)(*args)
    except (LookupError, TypeError, AttributeError, ValueError):
        return None


def _shape(value: Any) -> Any:
    """What an object or list holds, but for its texts: keys, types, numbers."""
    if isinstance(value, dict):
        return tuple((key, _shape(item)) for key, item in value.items())
    if isinstance(value, list):
        return tuple(_shape(item) for item in value)
    return (type(value).__name__, value) if isinstance(value, int | float) else type(value).__name__


def _as_json(value: Any, ensure_ascii: bool, indent: int | None, separators: Any, sort_keys: bool) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


_STEPS: dict[str, Callable[..., Any]] = {"slice": lambda value, *bounds: value[slice(*bounds)], "json": _as_json}
_ANSWERS: dict[str, Callable[..., Any]] = {
    "not empty": lambda value: value != "",
    "reaches": lambda value, index: -len(value) <= index < len(value),
    "is in": lambda value, text: value in text,
    "parts": lambda value, method, args: len(getattr(value, method)(*args)),
    "keys": _shape,
}


def _plain(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Arguments as plain values that can be kept; None where one comes from a message."""
    plain = []
    for arg in args:
        if isinstance(arg, str):
            if getattr(arg, "_source", None) is not None:
                return None
            arg = str.__str__(arg)
        elif isinstance(arg, tuple | list):
            inner = _plain(tuple(arg))
            if inner is None:
                return None
            arg = inner
        elif not isinstance(arg, int | float | bool | type(None)):
            return None
        plain.append(arg)
    return tuple(plain)
