"""The tables of other systems' options: a YAML file each, with rules in the module of the same name where a value needs more
than another name. docs/dialects.md describes their form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import yaml

FOLDER = Path(__file__).parent
OF_COMMAND = {
    "sft": ("verl_sft", "tutorials"),
    "grpo": ("verl_grpo", "tutorials"),
    None: ("verl_sft", "verl_grpo", "tutorials"),
}


class Lookup(Protocol):
    """What a rule asks for the value of an option, of ours too."""

    def __call__(self, key: str, /) -> Any:
        """As given, else the version's default, else None."""

    def in_force(self, key: str, /) -> Any:
        """The same, and what packaged recipes say: for a value that another one is counted from."""


Rule = Callable[[Lookup], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """What becomes of one option, with `.*` at its end of all below, with `*.` before it of that name anywhere. `becomes` names options of ours; `rule` computes them.
    Without either, values in `accepts`, or any where it is None, change nothing for the reason `ignored`; others are `refused`."""

    key: str
    becomes: tuple[str, ...] = ()
    values: dict[str, Any] | None = None
    rule: Rule | None = None
    accepts: tuple[str, ...] | None = None
    ignored: str | None = None
    refused: str | None = None

    @property
    def reason(self) -> str:
        """Why an accepted value changes nothing."""
        return self.ignored or "it asks for what posttrain does"

    def our_key(self, key: str) -> str:
        """The option that `key`, which this row is about, becomes."""
        (ours,) = self.becomes
        return ours.removesuffix(".*") + key.removeprefix(self.key.removesuffix(".*")) if ours.endswith(".*") else ours


@dataclass(frozen=True)
class Version:
    """One release line of a system: the options that only it has, and its defaults that differ from ours and change results."""

    name: str
    known_by: tuple[str, ...]
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Table:
    name: str
    rows: dict[str, Row]
    versions: tuple[Version, ...]

    @property
    def system(self) -> str:
        """Whose options they are."""
        return self.name.partition("_")[0]

    def row(self, key: str) -> Row | None:
        """The row about the key: its own, else the one about its name in any section, else about the nearest section it lies in."""
        parts = key.split(".")
        sections = (".".join(parts[:end]) + ".*" for end in range(len(parts), 0, -1))
        return next((self.rows[known] for known in (key, f"*.{parts[-1]}", *sections) if known in self.rows), None)


def row_of(tables: tuple[Table, ...], key: str) -> Row | None:
    return next((row for table in tables if (row := table.row(key))), None)


@cache
def tables_of(command: str | None) -> tuple[Table, ...]:
    """Those that hold in a command: sft, grpo or, None, any other, which trains nothing, so that nobody's defaults count."""
    found = tuple(read_table(name) for name in OF_COMMAND[command])
    return found if command else tuple(replace(table, versions=()) for table in found)


@cache
def read_table(name: str) -> Table:
    content = yaml.load((FOLDER / f"{name}.yaml").read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    rules = import_module(f"{__package__}.{name}") if (FOLDER / f"{name}.py").exists() else None
    versions = content.get("versions") or {}
    return Table(
        name,
        {key: _row(key, row, rules) for key, row in content["options"].items()},
        tuple(Version(v, tuple(known["known_by"]), known.get("defaults") or {}) for v, known in versions.items()),
    )


def as_written(value: Any) -> str:
    """The value in one form for comparison, however it was written: True and true, -1 and '-1', null and None."""
    return "null" if value is None else str(value).lower()


def _row(key: str, row: Any, rules: Any) -> Row:
    if isinstance(row, str):
        return Row(key, (row,))
    becomes, accepts, values = row.get("becomes") or [], row.get("accepts"), row.get("values")
    if unknown := set(row) - {"becomes", "values", "by", "accepts", "ignored", "refused"}:
        raise ValueError(f"{key}: {', '.join(sorted(unknown))}")
    return Row(
        key,
        (becomes,) if isinstance(becomes, str) else tuple(becomes),
        None if values is None else {as_written(given): ours for given, ours in values.items()},
        getattr(rules, row["by"]) if "by" in row else None,
        None if accepts is None else tuple(map(as_written, accepts)),
        row.get("ignored"),
        row.get("refused"),
    )
