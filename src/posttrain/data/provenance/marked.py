"""Text that knows where each of its characters came from, through everything that a template does with it.

A `Marked` is a string with a parallel string of the same length, `codes`: one character for each, which says who wrote it
(see `code_of`). Slicing, joining, trimming and replacing treat both alike. What an operation cannot follow becomes LOST, and
what reaches the output as a plain string is LOST too, so that only what was followed all the way counts as known.

A `Marked` also remembers its `source` (`posttrain.data.provenance.trace`), which it tells what a template asks about it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

import numpy as np

from posttrain.data.encoded import Part
from posttrain.data.provenance.trace import Mixed, Source

LOST, TEMPLATE, TOOLS = map(chr, range(3))
_FIRST_MESSAGE = 8
# Characters inside a {% generation %} block carry this bit in their code.
GENERATED = 0x80000
_PARTS = (Part.NAME, Part.TEXT, Part.REASONING, Part.TOOL_CALL)


def code_of(message: int, part: Part) -> str:
    """The code of characters that come from a part of message number `message`."""
    return chr(_FIRST_MESSAGE + message * len(_PARTS) + _PARTS.index(part))


def owner_of(code: int) -> tuple[int, Part]:
    """The message's number (-1: none) and the part behind a code."""
    if code >= _FIRST_MESSAGE:
        message, part = divmod(code - _FIRST_MESSAGE, len(_PARTS))
        return message, _PARTS[part]
    return -1, (Part.UNKNOWN, Part.TEMPLATE, Part.TOOLS)[min(code, 2)]


def code_parts(codes_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Messages (int32, -1: none) and parts (uint8) of an array of codes, whatever their GENERATED bit."""
    codes_T = (codes_T & ~np.uint32(GENERATED)).astype(np.int32)
    own_T = codes_T - _FIRST_MESSAGE
    messages_T = np.where(own_T >= 0, own_T // len(_PARTS), -1).astype(np.int32)
    of_template = np.array([Part.UNKNOWN, Part.TEMPLATE, Part.TOOLS], dtype=np.uint8)[np.minimum(codes_T, 2)]
    of_message = np.array(_PARTS, dtype=np.uint8)[own_T % len(_PARTS)]
    return messages_T, np.where(own_T >= 0, of_message, of_template)


class Marked(str):
    """A string whose characters are known. Made by `marked`; built from a plain string it is all LOST.

    `source` is None where the text is the same for all conversations of the same shape: the template's own.
    """

    __slots__ = ("_codes", "_source")  # templates can reach no name that begins with an underscore
    _codes: str
    _source: Source | None

    def __new__(cls, text: object = "") -> Marked:
        return marked(str.__str__(text) if isinstance(text, str) else str(text), None, None)

    def __str__(self) -> str:
        return self

    def __reduce__(self) -> Any:
        return (str, (str.__str__(self),))

    # --- from text to text

    def __add__(self, other: str) -> str:
        return _joined(self, other) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return _joined(other, self) if isinstance(other, str) else NotImplemented

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            text, args = str.__getitem__(self, key), (key.start, key.stop, key.step)
            return marked(text, self._codes[key], self._then("slice", args))
        self._ask("reaches", (key,))
        return marked(str.__getitem__(self, key), self._codes[key], self._then("__getitem__", (key,)))

    def __iter__(self) -> Iterator[str]:
        self._ask("__len__")
        for i in range(str.__len__(self)):
            yield self[i]

    def __mul__(self, count: SupportsIndex) -> str:
        return marked(str.__mul__(self, count), self._codes * count.__index__(), self._then("__mul__", (count,)))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> str:
        return derived(str.__mod__(self, values), self, *(values if isinstance(values, tuple) else (values,)))

    def __rmod__(self, other: str) -> str:
        return derived(str.__mod__(str.__str__(other), self), self, other)

    def __format__(self, spec: str) -> str:
        return derived(str.__format__(self, spec), self)

    def strip(self, chars: str | None = None) -> str:
        return self._trimmed("strip", str.lstrip(self, chars), str.strip(self, chars), chars)

    def lstrip(self, chars: str | None = None) -> str:
        text = str.lstrip(self, chars)
        return self._trimmed("lstrip", text, text, chars)

    def rstrip(self, chars: str | None = None) -> str:
        return self._trimmed("rstrip", self, str.rstrip(self, chars), chars)

    def removeprefix(self, prefix: str) -> str:
        begin = len(prefix) if str.startswith(self, prefix) else 0
        return self._cut(begin, None, "removeprefix", (prefix,))

    def removesuffix(self, suffix: str) -> str:
        end = -len(suffix) if suffix and str.endswith(self, suffix) else None
        return self._cut(0, end, "removesuffix", (suffix,))

    def replace(self, old: str, new: str, count: SupportsIndex = -1) -> str:
        """Replaced text is the replacement's; everything around it stays its owner's."""
        text, source = str.replace(self, old, new, count), self._then("replace", (old, new, count))
        if str.__eq__(text, self):
            return marked(text, self._codes, source)
        if not str.__len__(old):
            return marked(text, None, source)
        pieces, codes, start = str.split(self, old, count), [], 0
        for piece in pieces:
            codes.append(self._codes[start : start + len(piece)])
            start += len(piece) + str.__len__(old)
        return marked(text, codes_of(new).join(codes), source)

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts("split", (sep, maxsplit), str.split(self, sep, maxsplit))

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts("rsplit", (sep, maxsplit), str.rsplit(self, sep, maxsplit))

    def splitlines(self, keepends: bool = False) -> list[str]:
        return self._parts("splitlines", (keepends,), str.splitlines(self, keepends))

    def partition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._parts("partition", (sep,), list(str.partition(self, sep))))  # type: ignore[return-value]

    def rpartition(self, sep: str) -> tuple[str, str, str]:
        return tuple(self._parts("rpartition", (sep,), list(str.rpartition(self, sep))))  # type: ignore[return-value]

    def join(self, items: Iterable[str]) -> str:
        return join(self, items)

    def _trimmed(self, method: str, left: str, text: str, chars: str | None) -> str:
        begin = str.__len__(self) - len(left) if method != "rstrip" else 0
        return marked(text, self._codes[begin : begin + len(text)], self._then(method, (chars,)))

    def _cut(self, begin: int, end: int | None, method: str, args: tuple[Any, ...]) -> str:
        return marked(str.__getitem__(self, slice(begin, end)), self._codes[begin:end], self._then(method, args))

    def _parts(self, method: str, args: tuple[Any, ...], parts: list[str]) -> list[str]:
        """Parts in their order, each at its place: the separator, or white space, lies between them."""
        self._ask("parts", (method, args))
        separator = str.__len__(args[0]) if method in ("split", "rsplit") and args[0] is not None else 0
        exact = bool(separator) or method in ("partition", "rpartition")
        spots, position = [], 0
        for part in parts:
            begin = position if exact else str.find(self, part, position)  # else white space lies between them
            spots.append(begin)
            position = begin + len(part) + separator
        return [
            marked(part, self._codes[begin : begin + len(part)], self._then(method, args, index))
            for index, (part, begin) in enumerate(zip(parts, spots, strict=True))
        ]

    def _then(self, method: str, args: tuple[Any, ...], index: int | None = None) -> Source | None:
        if self._source is not None:
            return self._source.then(method, args, index)
        return _mixed(*args)

    # --- questions

    def _ask(self, what: str, args: tuple[Any, ...] = ()) -> None:
        if self._source is not None:
            self._source.ask(what, args)
        elif (source := _mixed(*args)) is not None:
            source.trace.followed = False

    def __hash__(self) -> int:
        if self._source is not None:  # it is looked up in something, and what it equals there is not seen
            self._source.trace.followed = False
        return str.__hash__(self)

    def encode(self, *args: Any, **kwargs: Any) -> bytes:
        if self._source is not None:
            self._source.trace.followed = False
        return str.encode(self, *args, **kwargs)

    def __bool__(self) -> bool:
        if self._source is not None and not (
            TEMPLATE in self._codes and isinstance(self._source, Mixed) and not self._source.changed
        ):
            self._source.ask("not empty")
        return str.__len__(self) > 0

    def __eq__(self, other: object) -> bool:
        return self._compared("__eq__", other)

    def __ne__(self, other: object) -> bool:
        return not self._compared("__eq__", other)

    def __contains__(self, part: str) -> bool:  # type: ignore[override]
        if self._source is None and isinstance(part, Marked) and part._source is not None:
            part._source.ask("is in", (self,))
        else:
            self._ask("__contains__", (part,))
        return str.__contains__(self, part)

    def _compared(self, what: str, other: object) -> bool:
        if isinstance(other, str):
            if self._source is None and isinstance(other, Marked) and other._source is not None:
                other._source.ask(what, (self,))
            else:
                self._ask(what, (other,))
        return str.__eq__(self, other) is True


def _asking(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def asked(self: Marked, *args: Any) -> Any:
        self._ask(name, args)
        return method(self, *args)

    asked.__name__ = name
    return asked


def _recasing(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def recased(self: Marked, *args: Any) -> str:
        text = method(self, *args)
        same = len(text) == str.__len__(self) and name in _IN_PLACE
        return marked(text, self._codes, self._then(name, args)) if same else derived(text, self, *args)

    recased.__name__ = name  # by which the sandbox knows `format`
    return recased


_QUESTIONS = (
    "__len__", "__lt__", "__le__", "__gt__", "__ge__", "startswith", "endswith", "find", "rfind", "index", "rindex", "count",
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace",
    "istitle", "isupper",
)  # fmt: skip
# Where the length stays, these have changed letters in their places.
_IN_PLACE = ("lower", "upper", "capitalize", "swapcase", "title")
_CHANGES = (
    *_IN_PLACE,
    "casefold",
    "center",
    "ljust",
    "rjust",
    "zfill",
    "expandtabs",
    "translate",
    "format",
    "format_map",
)
for _name in _QUESTIONS:
    setattr(Marked, _name, _asking(_name))
for _name in _CHANGES:
    setattr(Marked, _name, _recasing(_name))


def marked(text: str, codes: str | None, source: Source | None) -> Marked:
    """`text` with `codes`; all LOST without them."""
    made = str.__new__(Marked, text)
    made._codes = LOST * str.__len__(made) if codes is None else codes
    made._source = source
    return made


def derived(text: str, *inputs: Any) -> Marked:
    """A text made of others in a way that is not followed: LOST, unless all of them are the template's own."""
    texts = [text for text in inputs if isinstance(text, str)]
    own = all(type(t) is Marked and t._source is None and t._codes == TEMPLATE * len(t._codes) for t in texts)
    if own and all(isinstance(value, str | int | float | type(None)) for value in inputs):
        return literal(str.__str__(text))
    return marked(str.__str__(text), None, _mixed(*inputs))


def literal(text: str) -> Marked:
    """A text of the template's own."""
    return marked(text, TEMPLATE * len(text), None)


def codes_of(text: str) -> str:
    return text._codes if type(text) is Marked else LOST * len(text)


def join(separator: str, items: Iterable[str]) -> Marked:
    """`separator.join(items)`, with every character's origin."""
    texts = list(items)
    codes = codes_of(separator).join([codes_of(text) for text in texts])
    return marked(str.join(separator, texts), codes, _joint_source([separator, *texts]))


def uniform(value: Any) -> str | None:
    """The one code of all text in a value, if there is one."""
    if type(value) is Marked:
        first = value._codes[:1]
        return first if first and value._codes == first * len(value._codes) else None
    return getattr(value, "_code", None)


class MarkedDict(dict[str, Any]):
    """An object of a message, all of whose text has the one `code`. Asking for its keys is a question about it."""

    __slots__ = ("_code", "_raw", "_source")
    _code: str | None
    _raw: dict[str, Any]  # the object as it was given
    _source: Source | None

    def _ask(self) -> None:
        if self._source is not None:
            self._source.ask("keys")

    def __iter__(self) -> Iterator[str]:
        self._ask()
        return super().__iter__()

    def __len__(self) -> int:
        self._ask()
        return super().__len__()

    def __bool__(self) -> bool:
        return len(self) > 0

    def __contains__(self, key: object) -> bool:
        self._ask()
        return super().__contains__(key)

    def __eq__(self, other: object) -> bool:
        if self._source is not None:
            self._source.trace.followed = False
        return super().__eq__(other)

    __hash__ = None

    def keys(self) -> Any:
        self._ask()
        return super().keys()

    def items(self) -> Any:
        self._ask()
        return super().items()

    def values(self) -> Any:
        self._ask()
        return super().values()

    def get(self, key: str, default: Any = None) -> Any:
        self._ask()
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self._ask()
        return super().__getitem__(key)


def _joined(left: str, right: str) -> Marked:
    return marked(str.__add__(left, right), codes_of(left) + codes_of(right), _joint_source((left, right)))


def _joint_source(texts: Iterable[str]) -> Source | None:
    """The source of texts in a row: the only one's that is not empty by itself, or several."""
    texts = [text for text in texts if str.__len__(text) or getattr(text, "_source", None) is not None]
    sources = [text._source for text in texts if type(text) is Marked and text._source is not None]
    for source in sources:
        source.joined()
    if len(texts) == 1 or not sources:
        return sources[0] if sources else None
    flat = tuple(part for s in sources for part in (s.sources if isinstance(s, Mixed) and not s.changed else (s,)))
    return Mixed(sources[0].trace, flat, any(isinstance(s, Mixed) and s.changed for s in sources))


def _mixed(*values: Any) -> Source | None:
    for value in values:
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Marked) and item._source is not None:
                return Mixed(item._source.trace, changed=True)
    return None
