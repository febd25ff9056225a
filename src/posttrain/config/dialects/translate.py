"""Settings as someone wrote them, in another system's names too -> settings of our options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from posttrain.config.arguments import DEFAULT_OF_OTHER
from posttrain.config.dialects.tables import Row, Rule, Table, Version, as_written, row_of
from posttrain.errors import InputError


@dataclass(frozen=True)
class Setting:
    """One `key=value`, from wherever. `text` is the value before anything in it became a number; `reset` is Hydra's `~key`."""

    key: str
    value: Any
    text: Any
    origin: str
    reset: bool = False


@dataclass
class Translation:
    """`defaults` lie under recipes and `settings` over them. `translated` and `ignored` are what a person is told."""

    settings: list[Setting]
    defaults: list[Setting] = field(default_factory=list)
    translated: list[dict[str, Any]] = field(default_factory=list)
    ignored: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translate(settings: list[Setting], tables: tuple[Table, ...], ours: frozenset[str]) -> Translation:
    """The settings with every option that a table knows replaced. `ours` are the names of our own options."""
    given: dict[str, tuple[int, Setting]] = {}
    kept: list[tuple[int, Setting]] = []
    for place, setting in enumerate(settings):
        row = row_of(tables, setting.key)
        if row is None or (setting.key in ours and setting.reset):
            kept.append((place, setting))
        given.pop(setting.key, None)  # the last wins
        if not setting.reset:
            given[setting.key] = place, setting
    words = (given.keys() - ours) | {f"{key}={setting.value}" for key, (_, setting) in given.items()}
    work = _Work(tables, given, ours, _version(tables, words))
    for place, setting in given.values():
        row = row_of(tables, setting.key)
        if row and not row.rule:
            kept += [(place, made) for made in work.one(row, setting)]
    for rule, rows in _rules(tables).items():
        kept += work.together(rule, rows)
    work.result.settings = [setting for _, setting in sorted(kept, key=lambda item: item[0])]
    work.result.defaults += list(work.plain_defaults())
    return work.result


@dataclass
class _Work:
    tables: tuple[Table, ...]
    given: dict[str, tuple[int, Setting]]
    ours: frozenset[str]
    version: tuple[str, Version] | None = None  # and the system whose it is
    result: Translation = field(default_factory=lambda: Translation([]))

    @property
    def defaults(self) -> dict[str, Any]:
        return self.version[1].defaults if self.version else {}

    def one(self, row: Row, setting: Setting) -> Iterator[Setting]:
        """What a row without a rule makes of the setting: at most one."""
        key, value = setting.key, _unquoted(setting.value)
        if not row.becomes:
            if self._is_accepted(row, setting) and key in self.ours:
                yield setting
        elif row.values is not None and as_written(value) in row.values:
            ours = row.values[as_written(value)]
            if ours is not None:
                yield self._told(key, replace(setting, key=row.our_key(key), value=ours, text=str(ours)))
        elif value is not None or key in self.ours:
            yield self._told(key, replace(setting, key=row.our_key(key)))

    def together(self, rule: Rule, rows: list[str]) -> Iterator[tuple[int, Setting]]:
        """What a rule makes of all options that it reads, at the place of the last that was given."""
        known = [key for key in rows if key in self.given]
        if not known and not any(key in self.defaults for key in rows):
            return
        try:
            made = rule(self._look_up)
        except InputError as error:
            self.result.problems.append(str(error))
            return
        if not known:
            self.result.defaults += [self._default(key, value) for key, value in made.items()]
            return
        place, last = max((self.given[key] for key in known), key=lambda item: item[0])
        named = ", ".join(known)
        for key, value in made.items():
            if key not in self.given and key in self.defaults and _same(self.defaults[key], value):
                self.result.defaults.append(self._default(key, value))
            elif key in known and _same(self._look_up(key), value):
                yield self.given[key]
            else:
                yield place, replace(last, key=key, value=value, text=str(value))
                self.result.translated.append({"given": named, "key": key, "value": value})
        yield from (self.given[key] for key in known if key in self.ours - made.keys() and self._is_null(key))
        if not made:
            self.result.ignored += [self._without_effect(key) for key in known if key not in self.ours]

    def plain_defaults(self) -> Iterator[Setting]:
        """The version's defaults that no rule reads and nobody gave another value."""
        for key, value in self.defaults.items():
            row = row_of(self.tables, key)
            if key in self.given or (row and row.rule):
                continue
            value = row.values.get(as_written(value), value) if row and row.values else value
            yield self._default(row.our_key(key) if row and row.becomes else key, value)

    def _is_null(self, key: str) -> bool:
        return self.given[key][1].value is None

    def _look_up(self, key: str) -> Any:
        value = _unquoted(self.given[key][1].value) if key in self.given else None
        return self.defaults.get(key) if value is None else value

    def _default(self, key: str, value: Any) -> Setting:
        assert self.version
        return Setting(key, value, str(value), f"{self.version[0]}{DEFAULT_OF_OTHER}")

    def _told(self, key: str, made: Setting) -> Setting:
        if key not in self.ours:
            self.result.translated.append({"given": key, "key": made.key, "value": made.value})
        return made

    def _is_accepted(self, row: Row, setting: Setting) -> bool:
        """Whether posttrain can do without it; says so either way."""
        value = as_written(_unquoted(setting.value))
        accepted = (row.refused is None or value == "null") if row.accepts is None else value in row.accepts
        if not accepted:
            self.result.problems.append(f"{_said(setting)} ({setting.origin}): {row.refused}.")
        elif setting.key not in self.ours:
            self.result.ignored.append(self._without_effect(setting.key))
        return accepted

    def _without_effect(self, key: str) -> dict[str, str]:
        row = row_of(self.tables, key)
        assert row
        return {"key": key, "reason": row.reason}


def _version(tables: tuple[Table, ...], given: set[str]) -> tuple[str, Version] | None:
    """The version most of whose own options, or options with their values, were given, and its system; None where none was."""
    found = [
        (sum(_is_known(version, key) for key in given), table.system, version)
        for table in tables
        for version in table.versions
    ]
    most, system, version = max(found, key=lambda item: item[0], default=(0, "", None))
    return (system, version) if most and version else None


def _is_known(version: Version, key: str) -> bool:
    return any(
        key == known or (known.endswith(".*") and "=" not in key and f"{key}.".startswith(known.removesuffix("*")))
        for known in version.known_by
    )


def _rules(tables: tuple[Table, ...]) -> dict[Rule, list[str]]:
    """Each rule with the options that it reads, in the tables' order; of two rows about an option the first table's holds."""
    rules: dict[Rule, list[str]] = {}
    for key in dict.fromkeys(key for table in tables for key in table.rows):
        row = row_of(tables, key)
        if row and row.rule:
            rules.setdefault(row.rule, []).append(key)
    return rules


def _unquoted(value: Any) -> Any:
    """A list that was written with the shell's quotes left around it as the list."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def _same(given: Any, made: Any) -> bool:
    """Whether both mean the same; one value stands for a list of it."""
    alone = isinstance(made, list) and len(made) == 1 and not isinstance(given, list)
    return as_written(given) == as_written(made[0] if alone else made)


def _said(setting: Setting) -> str:
    """The setting as one wrote it, long texts cut."""
    from posttrain.config.describe import shown

    text = setting.text if isinstance(setting.text, str) else shown(setting.value)
    return f"{setting.key}={text if len(text) <= 60 else f'{text[:57]}...'}"
