"""Options as a person reads them: names, types, values, sentences; tables for `--help` and `--print_config`."""

from __future__ import annotations

from functools import cache
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from posttrain.config.schema import Config, Section

if TYPE_CHECKING:
    from rich.console import RenderableType

    from posttrain.config.compose import Resolved


@cache
def sections() -> dict[str, type[Section]]:
    return {name: type(section) for name, section in Config()}


@cache
def options() -> dict[str, FieldInfo]:
    """Every option by its dotted name, in the schema's order."""
    return {
        f"{name}.{option}": field
        for name, section in sections().items()
        for option, field in section.model_fields.items()
    }


def default_of(option: str) -> Any:
    return options()[option].get_default(call_default_factory=True)


@cache
def types_of(option: str) -> frozenset[type]:
    """The plain types that its values or their items may have: {int, NoneType} for `PositiveInt | None`."""
    return frozenset(_plain_types(options()[option].annotation))


def is_free(option: str) -> bool:
    """Whether it is a mapping whose keys nobody knows beforehand, such as model.override_config."""
    return dict in types_of(option)


def type_name(annotation: Any, limits: tuple[Any, ...] = ()) -> str:
    """How a person says it: `int > 0`, `error | drop`, `list of text`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is None:
        names = {int: "int", float: "float", str: "text", bool: "true | false", NoneType: "null"}
        return names[annotation] + _limits(limits)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin is Annotated:
        return type_name(parts[0], parts[1:])
    if origin is dict:
        return "mapping such as {name: value}"
    if origin is list:
        return f"list of {type_name(parts[0])}"
    if origin is tuple:
        return f"list of {len(parts)}, each {' or '.join(dict.fromkeys(map(type_name, parts)))}"
    return " | ".join(map(type_name, parts))


def shown(value: Any) -> str:
    """The value as one would write it on the command line or in a recipe."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case list() | tuple():
            return f"[{', '.join(shown(item) for item in value)}]"
        case dict():
            return "{" + ", ".join(f"{name}: {shown(item)}" for name, item in value.items()) + "}"
        case _:
            return str(value) or "''"


def describe_options(defaults: Config) -> RenderableType:
    """Every option with its type, its value in `defaults` and its sentence, under its section."""
    from rich.console import Group
    from rich.padding import Padding
    from rich.text import Text

    lines: list[RenderableType] = []
    for name, section in sections().items():
        lines.append(Text.assemble("\n", (name, "bold"), f"  {section.__doc__}"))
        for option, field in section.model_fields.items():
            default = shown(getattr(getattr(defaults, name), option))
            kind = type_name(field.annotation, tuple(field.metadata))
            lines.append(Text.assemble((f"  {name}.{option}", "cyan"), f" = {default}  ", (kind, "dim")))
            lines.append(Padding(Text(" ".join((field.description or "").split())), (0, 0, 0, 6)))
    return Group(*lines)


def describe_resolved(resolved: Resolved) -> RenderableType:
    """Every option with its value and where that came from, a line each; then those that have no effect, with the reason."""
    from rich.console import Group
    from rich.text import Text

    lines: list[RenderableType] = []
    for name in sections():
        lines.append(Text(name, "bold"))
        for option, value in getattr(resolved.config, name):
            origin = resolved.origins[f"{name}.{option}"]
            style = "dim" if origin == "default" else "cyan"
            lines.append(Text.assemble((f"  {name}.{option}={shown(value)}", style), (f"  ({origin})", "dim")))
    notes = [Text(f"{note['key']} has no effect: {note['reason']}", "yellow") for note in resolved.ignored]
    return Group(*lines, *(Text(line, "cyan") for line in translations(resolved)), *notes)


def translations(resolved: Resolved) -> list[str]:
    """What was read of another system's options, a line each, and which of its defaults hold."""
    from posttrain.config.arguments import DEFAULT_OF_OTHER

    lines = [f"{note['given']} -> {note['key']}={shown(note['value'])}" for note in resolved.translated]
    kept = [key for key, origin in resolved.origins.items() if origin.endswith(DEFAULT_OF_OTHER)]
    values = resolved.config.model_dump()
    for origin in dict.fromkeys(resolved.origins[key] for key in kept):
        held = (key.split(".") for key in kept if resolved.origins[key] == origin)
        told = ", ".join(f"{section}.{option}={shown(values[section][option])}" for section, option in held)
        lines.append(f"{origin} kept: {told}")
    return lines


def _plain_types(annotation: Any) -> set[type]:
    origin = get_origin(annotation)
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    if origin is Annotated:
        return _plain_types(get_args(annotation)[0])
    if origin in (None, dict):
        return {origin or annotation}
    return set().union(*(_plain_types(part) for part in get_args(annotation)))


def _limits(metadata: tuple[Any, ...]) -> str:
    """` >= 0, <= 1` from pydantic's constraints; a nested Field keeps them one level deeper."""
    limits = [limit for item in metadata for limit in getattr(item, "metadata", [item])]
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [(sign, getattr(limit, name)) for limit in limits for name, sign in signs.items() if hasattr(limit, name)]
    return ",".join(f" {sign} {bound:g}" for sign, bound in bounds)
