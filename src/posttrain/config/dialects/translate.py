"""Settings as someone wrote them, in another system's names too -> settings of our options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import yaml

from posttrain.config.arguments import DEFAULT_OF_OTHER
from posttrain.config.dialects.setting import Setting, followed
from posttrain.config.dialects.tables import Row, Rule, Table, Version, as_written, row_of
from posttrain.errors import InputError


@dataclass
class Translation:
    """`defaults` lie under recipes and `settings` over them. `translated` and `ignored` are what a person is told."""

    settings: list[Setting]
    defaults: list[Setting] = field(default_factory=list)
    translated: list[dict[str, Any]] = field(default_factory=list)
    ignored: list[dict[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def translate(
    settings: list[Setting],
    tables: tuple[Table, ...],
    ours: frozenset[str],
    lower: Mapping[str, Any] = MappingProxyType({}),
    upper: Mapping[str, Any] = MappingProxyType({}),
) -> Translation:
    """The settings with every option that a table knows replaced. `ours` are the names of our own options; `lower` and `upper` are
    the values of recipes that lie under and over another system's defaults."""
    settings = [one for setting in settings for one in _spread(setting, tables)]
    version = _version(tables, _words(settings, ours))
    layers = (upper, version[1].defaults if version else {}, lower)
    settings = followed(settings, tables, layers, ours)
    given = _last(settings)
    kept = [
        (place, setting)
        for place, setting in enumerate(settings)
        if row_of(tables, setting.key) is None or (setting.key in ours and setting.reset)
    ]
    emptied = {setting.key for setting in settings if setting.key in ours and (setting.reset or setting.value is None)}
    work = _Work(tables, given, ours, layers, emptied, version)
    for place, setting in given.values():
        row = row_of(tables, setting.key)
        if row and not row.rule:
            kept += [(place, made) for made in work.one(row, setting)]
    for rule, rows in _rules(tables).items():
        kept += work.together(rule, rows)
    work.result.settings = [setting for _, setting in sorted(kept, key=lambda item: item[0])]
    work.forget_what_was_given_again()
    work.result.defaults += list(work.plain_defaults())
    return work.result


def _spread(setting: Setting, tables: tuple[Table, ...]) -> Iterator[Setting]:
    """A mapping whose keys another system has as options, such as verl's algorithm.filter_groups={enable: true}, as those."""
    below = f"{setting.key}."
    if isinstance(setting.value, dict) and any(key.startswith(below) for table in tables for key in table.rows):
        for name, value in setting.value.items():
            yield from _spread(replace(setting, key=f"{below}{name}", value=value, text=str(value)), tables)
        if setting.value:
            return
    yield setting


def _last(settings: list[Setting]) -> dict[str, tuple[int, Setting]]:
    """Of each option what was given last, with its place."""
    given: dict[str, tuple[int, Setting]] = {}
    for place, setting in enumerate(settings):
        given.pop(setting.key, None)
        if not setting.reset:
            given[setting.key] = place, setting
    return given


def _words(settings: list[Setting], ours: frozenset[str]) -> set[str]:
    """What tells the version: options that are not ours, and options with their values."""
    given = _last(settings)
    return (given.keys() - ours) | {f"{key}={setting.value}" for key, (_, setting) in given.items()}


@dataclass
class _Work:
    tables: tuple[Table, ...]
    given: dict[str, tuple[int, Setting]]
    ours: frozenset[str]
    layers: tuple[Mapping[str, Any], ...]  # values under those that were given: recipes and defaults, the highest first
    emptied: set[str]  # options of ours that were reset or given as null, so that recipes do not count
    version: tuple[str, Version] | None = None  # and the system whose it is
    result: Translation = field(default_factory=lambda: Translation([]))

    @property
    def defaults(self) -> Mapping[str, Any]:
        return self.layers[1]

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
        look_up = _LookUp(self)
        try:
            made = rule(look_up)
        except InputError as error:
            self.result.problems.append(str(error))
            return
        for key, value in made.items():
            if self._is_default(key, value) or not known:
                self.result.defaults += [] if look_up.hands_on(key, value) else [self._default(key, value)]
            elif key in known and _same(self.look_up(key), value):
                yield self.given[key]
            elif not look_up.hands_on(key, value):
                sources = [*known, *({key} & look_up.read & self.given.keys() - set(known))]
                place, last = max((self.given[source] for source in sources), key=lambda item: item[0])
                yield place, replace(last, key=key, value=value, text=str(value))
                self.result.translated.append({"given": ", ".join(sources), "key": key, "value": value})
        yield from (self.given[key] for key in known if key in self.ours - made.keys() and self._is_null(key))
        if not made and known:
            self.result.ignored += [self._without_effect(key) for key in known if key not in self.ours]

    def forget_what_was_given_again(self) -> None:
        """Of two names of an option the later wins; what the other became is not told."""
        last = {setting.key: setting.value for setting in self.result.settings}
        over = [
            told
            for told in self.result.translated
            if told["key"] in last and not _same(last[told["key"]], told["value"])
        ]
        self.result.translated = [told for told in self.result.translated if told not in over]
        self.result.ignored += [{"key": told["given"], "reason": f"{told['key']} is given after it"} for told in over]

    def plain_defaults(self) -> Iterator[Setting]:
        """The version's defaults that no rule reads and nobody gave another value."""
        for key, value in self.defaults.items():
            row = row_of(self.tables, key)
            if key in self.given or (row and row.rule):
                continue
            value = row.values.get(as_written(value), value) if row and row.values else value
            yield self._default(row.our_key(key) if row and row.becomes else key, value)

    def look_up(self, key: str) -> Any:
        """As given, else the version's default."""
        value = _unquoted(self.given[key][1].value) if key in self.given else None
        return self.defaults.get(key) if value is None else value

    def recipe(self, key: str) -> Any:
        """What a recipe says that no default lies over, and that was not reset."""
        upper, defaults, lower = self.layers
        if key in self.emptied or (key in defaults and key not in upper):
            return None
        return upper.get(key, lower.get(key))

    def _is_default(self, key: str, value: Any) -> bool:
        return key not in self.given and key in self.defaults and _same(self.defaults[key], value)

    def _is_null(self, key: str) -> bool:
        return self.given[key][1].value is None

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
        accepted = value == "null" or (row.refused is None if row.accepts is None else value in row.accepts)
        if not accepted:
            self.result.problems.append(f"{_said(setting)} ({setting.origin}): {row.refused}.")
        elif setting.key not in self.ours:
            reason = "null asks for nothing" if value == "null" and row.refused else row.reason
            self.result.ignored.append({"key": setting.key, "reason": reason})
        return accepted

    def _without_effect(self, key: str) -> dict[str, str]:
        row = row_of(self.tables, key)
        assert row
        return {"key": key, "reason": row.reason}


@dataclass
class _LookUp:
    """What a rule asks for values; `read` are the options that it asked about."""

    work: _Work
    read: set[str] = field(default_factory=set)

    def __call__(self, key: str) -> Any:
        self.read.add(key)
        return self.work.look_up(key)

    def in_force(self, key: str) -> Any:
        self.read.add(key)
        is_given = key in self.work.given and self.work.look_up(key) is not None
        recipe = None if is_given else self.work.recipe(key)
        return self.work.look_up(key) if recipe is None else recipe

    def hands_on(self, key: str, value: Any) -> bool:
        """Whether the rule read a recipe's value and leaves it as it is."""
        recipe = self.work.recipe(key)
        return key in self.read and key not in self.work.given and recipe is not None and _same(recipe, value)


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
