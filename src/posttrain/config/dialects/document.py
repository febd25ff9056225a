"""The tables of other systems' options as pages: `python -m posttrain.config.dialects.document docs`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from posttrain.config.describe import options, shown
from posttrain.config.dialects.tables import Row, Table, read_table

PAGES = {
    "verl_sft_options.md": ("verl_sft", "verl's SFT options"),
    "verl_grpo_options.md": ("verl_grpo", "verl's GRPO options"),
    "tutorial_options.md": ("tutorials", "Options as tutorials write them"),
}


def page(name: str) -> str:
    """The page of that name, in Markdown."""
    table, title = PAGES[name]
    return "\n".join(_lines(read_table(table), title)) + "\n"


def _lines(table: Table, title: str) -> Iterator[str]:
    read = [row for row in table.rows.values() if row.becomes]
    ignored = [row for row in table.rows.values() if not row.becomes and _accepts_some(row)]
    refused = [row for row in table.rows.values() if row.refused]
    yield f"# {title}"
    yield ""
    yield (
        f"{len(table.rows)} options: {len(read)} are read as options of posttrain, {len(ignored)} change nothing, {len(refused)} are "
        "refused, all or some of their values. Any other is an error that names the nearest. Rendered from "
        f"`config/dialects/{table.name}.yaml` by `python -m posttrain.config.dialects.document docs`."
    )
    yield from _table("Read", ("option", "becomes"), ((_key(row), _becomes(row)) for row in read))
    yield from _table(
        "Without effect here",
        ("option", "values", "why"),
        ((_key(row), _values(row), row.reason) for row in ignored),
    )
    yield from _table(
        "Refused",
        ("option", "values", "why"),
        ((_key(row), _others(row), row.refused or "") for row in refused),
    )
    for version in table.versions:
        rows = ((f"`{key}`", f"`{shown(value)}`") for key, value in version.defaults.items())
        yield from _table(f"Defaults of {version.name}", ("option", "value where it is not given"), rows)


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    found = list(rows)
    if not found:
        return
    yield from ("", f"## {title}", "", f"| {' | '.join(head)} |", "|" + "---|" * len(head))
    for row in found:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _key(row: Row) -> str:
    return f"`{row.key}`"


def _becomes(row: Row) -> str:
    if row.key in options() and not row.values:
        said = "the same" if row.becomes == (row.key,) else ", ".join(f"`{key}`" for key in row.becomes)
    else:
        said = ", ".join(f"`{key}`" for key in row.becomes)
    values = ", ".join(
        f"`{theirs}`: " + ("not set" if ours is None else f"`{shown(ours)}`")
        for theirs, ours in (row.values or {}).items()
    )
    return f"{said} ({values})" if values else said


def _accepts_some(row: Row) -> bool:
    return row.refused is None or bool(row.accepts)


def _values(row: Row) -> str:
    return "all" if row.accepts is None else ", ".join(f"`{value}`" for value in row.accepts)


def _others(row: Row) -> str:
    return "all" if not row.accepts else "all others"


if __name__ == "__main__":
    for name in PAGES:
        Path(sys.argv[1], name).write_text(page(name), encoding="utf-8")
