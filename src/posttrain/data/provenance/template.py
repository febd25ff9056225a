"""A chat template that renders text with the origin of every character.

It is compiled by transformers' own environment, so that it writes what `apply_chat_template` writes; only what would lose
origins is exchanged: the constants of the template, the joining of pieces, and a handful of filters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, wraps
from typing import Any

import jinja2
import numpy as np
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension
from jinja2.filters import make_attrgetter

from posttrain.data.encoded import Part
from posttrain.data.provenance.marked import (
    GENERATED,
    LOST,
    TEMPLATE,
    Marked,
    MarkedDict,
    codes_of,
    derived,
    join,
    literal,
    marked,
    owner_of,
    uniform,
)
from posttrain.data.provenance.trace import Mixed, Source

Run = tuple[int, int, int, Part]  # start, end, message (-1: the tools), part


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and one code for each character."""

    text: str
    codes: str

    @cached_property
    def code_array(self) -> np.ndarray:
        """The codes as numbers, uint32."""
        return np.frombuffer(self.codes.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)

    @cached_property
    def runs(self) -> list[Run]:
        """Stretches of content in order. Text of the template, roles, names and what was lost are none."""
        if not self.codes:
            return []
        codes = self.code_array & ~np.uint32(GENERATED)
        starts = np.concatenate([[0], np.flatnonzero(codes[1:] != codes[:-1]) + 1])
        ends = [*starts[1:].tolist(), len(codes)]
        pieces = zip(starts.tolist(), ends, codes[starts].tolist(), strict=True)
        runs = [(start, end, *owner_of(code)) for start, end, code in pieces]
        return [run for run in runs if run[3] not in (Part.TEMPLATE, Part.NAME, Part.UNKNOWN)]

    @property
    def tail(self) -> tuple[str, int]:
        """What follows the last content, and the message that this content is from (-1: the tools, or there is none)."""
        return (self.text[self.runs[-1][1] :], self.runs[-1][2]) if self.runs else (self.text, -1)


class MarkedTemplate:
    """A chat template whose output carries origins.

    `today` is the day that the template may print. Rendering raises what the template raises (jinja2's TemplateError), and
    what Python raises where it does something that its messages do not allow.
    """

    def __init__(self, source: str, today: date):
        from transformers.utils.chat_template_utils import _compile_jinja_template

        theirs = _compile_jinja_template(source).environment
        plain = theirs.overlay()
        plain.globals = {**theirs.globals, "strftime_now": today.strftime}
        self._plain = plain.from_string(source)
        environment = theirs.overlay()
        environment.extensions = dict(theirs.extensions)
        unseen = {name: _noticing(function) for name, function in theirs.filters.items() if name not in _ASKING_FILTERS}
        environment.filters = {**theirs.filters, **unseen, **_FILTERS}
        tests = {name: _noticing(function) for name, function in theirs.tests.items() if name not in _ASKING_TESTS}
        environment.tests = {**theirs.tests, **tests}
        environment.globals = {
            **theirs.globals,
            "strftime_now": lambda form: literal(today.strftime(str.__str__(form))),
        }
        environment.code_generator_class = _KeepingConstants
        environment.concat = _concat
        environment.cache = None
        environment.wrap_str_format = lambda value: _following_format(theirs.wrap_str_format(value), value)
        for name, extension in theirs.extensions.items():
            if "generation" in extension.tags:
                del environment.extensions[name]
        environment.extensions[_Generation.identifier] = _Generation(environment)
        self.constants: list[Marked] = []
        environment.posttrain_constants = self.constants
        namespace: dict[str, Any] = {"environment": environment, "__file__": "<chat template>"}
        exec(environment.compile(source, filename="<chat template>"), namespace)
        namespace |= {"constants": self.constants, "written": written, "str_join": _str_join}
        self._template = environment.template_class._from_namespace(environment, namespace, environment.globals)

    def render(self, **variables: Any) -> Rendered:
        """The rendering of messages that are marked already (`posttrain.data.provenance.messages`)."""
        output = self._template.render(**variables)
        return Rendered(str.__str__(output), codes_of(output))

    def render_plain(self, **variables: Any) -> str:
        """The rendering of unmarked messages by transformers' own environment, on the same day."""
        return self._plain.render(**variables)


def written(value: Any) -> str:
    """What the template writes for a value: texts as they are, numbers as the template's own text."""
    if type(value) is Marked:
        return value
    if value is None or isinstance(value, int | float | jinja2.Undefined):
        return literal(str(value))
    text = str(getattr(value, "_raw", value))
    if type(text) is Marked:
        return text
    code, source = uniform(value), _any_source(value)
    return marked(text, code and code * len(text), None if source is None else Mixed(source.trace, changed=True))


class _KeepingConstants(CodeGenerator):
    """Compiles constants of the template to marked texts, and output to pieces that keep their marks."""

    def _constant(self, text: str) -> str:
        constants = self.environment.posttrain_constants  # type: ignore[attr-defined]
        constants.append(literal(text))
        return f"constants[{len(constants) - 1}]"

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        value = node.as_const(frame.eval_ctx)
        if type(value) is str:
            self.write(self._constant(value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Any) -> None:
        self.write(self._constant(node.data))

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return self._constant("".join(str(value) for value in group))

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write("written(")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Const) and type(node.arg.value) is str:  # keys are looked up, never written
            self.write("environment.getitem(")
            self.visit(node.node, frame)
            self.write(f", {node.arg.value!r})")
        else:
            super().visit_Getitem(node, frame)


class _Generation(Extension):
    """`{% generation %}` blocks: their characters get the GENERATED bit."""

    tags = {"generation"}  # noqa: RUF012 (an attribute of jinja2's class)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        text = written(caller())
        codes = "".join(chr(ord(code) | GENERATED) for code in codes_of(text))
        return marked(str.__str__(text), codes, getattr(text, "_source", None))


def _following_format(safe: Any, method: Any) -> Any:
    """The sandbox's str.format, whose result is the template's own where all that went in is."""
    if safe is None:
        return None
    return lambda *args, **kwargs: derived(safe(*args, **kwargs), method.__self__, *args, *kwargs.values())


def _concat(pieces: Iterable[str]) -> Marked:
    return join("", pieces)


def _str_join(items: Iterable[Any]) -> Marked:
    return join("", [written(item) for item in items])


@jinja2.pass_environment
def _filter_join(environment: Any, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = map(make_attrgetter(environment, attribute), value)
    return join(d if type(d) is Marked else literal(d), [written(item) for item in value])


def _filter_escape(value: Any) -> str:
    """HTML's escapes, each owned by whoever owns the character."""
    import markupsafe

    text = written(value)
    escaped = [str(markupsafe.escape(str.__str__(str.__getitem__(text, i)))) for i in range(str.__len__(text))]
    codes = "".join(code * len(piece) for code, piece in zip(codes_of(text), escaped, strict=True))
    source = _any_source(text)
    return marked("".join(escaped), codes, None if source is None else Mixed(source.trace, changed=True))


def _filter_indent(s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """As jinja2's, keeping origins."""
    indention = literal(" " * width if isinstance(width, int) else width)
    lines = [line for line in (written(s) + literal("\n")).splitlines()]
    head, rest = lines[0], lines[1:]
    indented = [indention + line if blank or str.__len__(line) else line for line in rest]
    text = join(literal("\n"), [head, *indented])
    return indention + text if first else text


def _filter_tojson(
    x: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as transformers' filter writes it, owned by whoever owns what is written."""
    item, colon = separators or (", " if indent is None else ",", ": ")
    style = _Json(ensure_ascii, None if indent is None else " " * indent, str(item), str(colon), sort_keys)
    pieces = list(style.pieces(x, 0))
    source = _source_of_json(x, (ensure_ascii, indent, separators, sort_keys))
    return marked("".join(text for text, _ in pieces), "".join(code for _, code in pieces), source)


@dataclass(frozen=True)
class _Json:
    ensure_ascii: bool
    indent: str | None
    item: str
    colon: str
    sort_keys: bool

    def pieces(self, value: Any, depth: int) -> Iterator[tuple[str, str]]:
        """Texts with their codes."""
        code = uniform(value)
        if code is not None:
            text = self._dumped(getattr(value, "_raw", value), depth)
            yield text, code * len(text)
        elif type(value) is Marked:
            yield from self._string(value)
        elif isinstance(value, dict):
            items = sorted(value.items()) if self.sort_keys else list(value.items())
            yield from self._block(
                "{", "}", [[*self._key(k), *_own(self.colon), *self.pieces(v, depth + 1)] for k, v in items], depth
            )
        elif isinstance(value, list | tuple):
            yield from self._block("[", "]", [list(self.pieces(v, depth + 1)) for v in value], depth)
        else:
            text = self._dumped(value, depth)
            yield text, (LOST if isinstance(value, str) else TEMPLATE) * len(text)

    def _key(self, key: Any) -> Iterator[tuple[str, str]]:
        if isinstance(key, str):
            yield from self.pieces(key, 0)
        else:
            text = json.dumps(json.dumps(key))
            yield text, TEMPLATE * len(text)

    def _string(self, value: Marked) -> Iterator[tuple[str, str]]:
        yield from _own('"')
        for i in range(str.__len__(value)):
            text = json.dumps(str.__getitem__(value, i), ensure_ascii=self.ensure_ascii)[1:-1]
            yield text, value._codes[i] * len(text)
        yield from _own('"')

    def _block(self, begin: str, end: str, items: list[list[tuple[str, str]]], depth: int) -> Iterator[tuple[str, str]]:
        if not items:
            yield from _own(begin + end)
            return
        line = "" if self.indent is None else "\n" + self.indent * (depth + 1)
        yield from _own(begin + line)
        for number, item in enumerate(items):
            if number:
                yield from _own(self.item + line)
            yield from item
        yield from _own(("" if self.indent is None else "\n" + self.indent * depth) + end)

    def _dumped(self, value: Any, depth: int) -> str:
        if type(value) is Marked:
            value = str.__str__(value)
        text = json.dumps(
            value,
            ensure_ascii=self.ensure_ascii,
            indent=None if self.indent is None else len(self.indent),
            separators=(self.item, self.colon),
            sort_keys=self.sort_keys,
        )
        # newlines inside of texts are escaped, so that each one begins a line of the layout
        return text if self.indent is None else text.replace("\n", "\n" + self.indent * depth)


def _own(text: str) -> Iterator[tuple[str, str]]:
    yield text, TEMPLATE * len(text)


def _source_of_json(value: Any, style: tuple[Any, ...]) -> Source | None:
    if type(value) is Marked and value._source is not None and value._source.path[-1:] == ("arguments",):
        value._source.trace.encoded_again = True
    if type(value) is Marked or type(value) is MarkedDict:
        return None if value._source is None else value._source.then("json", style)
    found = _any_source(value)
    return None if found is None else Mixed(found.trace)


def _any_source(value: Any) -> Source | None:
    if type(value) is Marked or type(value) is MarkedDict:
        return value._source
    items = [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ()
    return next((source for source in map(_any_source, items) if source is not None), None)


def _noticing(function: Any) -> Any:
    """A filter or test that reads a text unseen: what a template does from then on cannot be asked again."""

    @wraps(function)
    def noticed(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            source = _any_source(value)
            if source is not None:
                source.trace.followed = False
        return function(*args, **kwargs)

    return noticed


# These use a text's own methods, which ask, or only look at what kind of value it is.
_ASKING_FILTERS = (
    "capitalize", "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "lower", "map", "max",
    "min", "reject", "rejectattr", "replace", "reverse", "select", "selectattr", "sort", "trim", "upper",
)  # fmt: skip
_ASKING_TESTS = (
    "!=", "<", "<=", "==", ">", ">=", "boolean", "callable", "defined", "eq", "equalto", "false", "filter", "float", "ge",
    "greaterthan", "gt", "integer", "iterable", "le", "lessthan", "lt", "mapping", "ne", "none", "number", "sameas",
    "sequence", "string", "test", "true", "undefined", "in",
)  # fmt: skip
_FILTERS = {
    "join": _filter_join,
    "escape": _filter_escape,
    "e": _filter_escape,
    "forceescape": _filter_escape,
    "indent": _filter_indent,
    "safe": written,
    "string": written,
    "tojson": _filter_tojson,
}
