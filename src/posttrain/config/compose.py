"""Arguments and recipe files -> the options of a run, checked, each with where it came from.

Later wins: the schema's defaults, those of another system whose options are given, the recipes that a file names under
`defaults:` or the command line chooses, the file's own keys, values on the command line. Every problem is collected, so that one
message names them all.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import filterfalse
from types import NoneType
from typing import TYPE_CHECKING, Any, cast

from pydantic import ValidationError

from posttrain.config.arguments import (
    COMMAND_LINE,
    CONFIG_NAME,
    DEFAULT,
    DEFAULT_OF_COMMAND,
    JOB,
    METHOD,
    Override,
    Recipe,
    groups,
    is_left_over,
    packaged_recipe,
    parse,
    recipes,
    wrong_choice,
)
from posttrain.config.describe import (
    default_of,
    describe_resolved,
    is_free,
    options,
    sections,
    shown,
    type_name,
    types_of,
)
from posttrain.config.dialects.tables import OF_COMMAND, as_written, row_of, tables_of
from posttrain.config.dialects.translate import Setting, Translation, translate
from posttrain.config.ignored import options_without_effect
from posttrain.config.schema import Config
from posttrain.errors import InputError

if TYPE_CHECKING:
    from rich.console import RenderableType


# two options that say the same: the one from further up replaces the other
WARMUP, WARMUP_RATIO = "optim.lr_warmup_steps", "optim.lr_warmup_steps_ratio"
ALTERNATIVES = {WARMUP: WARMUP_RATIO, WARMUP_RATIO: WARMUP}


@dataclass(frozen=True)
class Resolved:
    """The options of a run. `origins` says of each where it was set last; `ignored` names those without effect; `translated`
    those that were given by another name, each as {given, key, value}."""

    config: Config
    origins: dict[str, str]
    ignored: list[dict[str, str]]
    translated: list[dict[str, Any]]

    def as_yaml(self) -> str:
        """Every option as a recipe file that gives this config again."""
        from omegaconf import OmegaConf

        return OmegaConf.to_yaml(OmegaConf.create(_escaped(self.config.model_dump(mode="json"))))

    def as_json(self) -> str:
        values = self.config.model_dump(mode="json")
        told = {key: {"value": _at(values, key), "origin": origin} for key, origin in self.origins.items()}
        return json.dumps(
            {"options": told, "translated": self.translated, "ignored": self.ignored}, indent=2, ensure_ascii=False
        )

    def __rich__(self) -> RenderableType:
        return describe_resolved(self)


def compose(arguments: list[str], command: str | None = None) -> Resolved:
    """The options that the arguments ask for, in `posttrain sft`, `posttrain grpo`, which begins with the recipe method=grpo, or any
    other command. Raises InputError with every problem that there is."""
    draft = _Draft(command)
    files: list[Recipe] = []
    choices: list[Override] = []
    in_files: list[Setting] = []
    on_line: list[Setting] = []
    for argument in filterfalse(is_left_over, arguments):
        with draft.collecting():
            match parse(argument):
                case Recipe() as file:
                    file, theirs = _own_choices(file, command)
                    files.append(file)
                    in_files += [*theirs, *_settings(file)]
                case Override(value=value) as given if not isinstance(value, dict) and _is_choice(given, command):
                    choices.append(given)
                case Override() as given:
                    on_line += _settings_of(given)
    jobs: list[Recipe] = []
    for name in _chosen(files, choices).get(JOB, []):
        with draft.collecting():
            jobs.append(_job(name, command))
    chosen = _chosen(jobs + files, choices) | {JOB: []}
    in_files = [setting for job in jobs for setting in _settings(job)] + in_files
    first = METHOD if command == "grpo" else groups()[0]  # the rates of models and data sets are for imitation
    lower: list[Setting] = []
    upper: list[Setting] = []
    for group in groups():
        if group == first:
            lower, upper = [*upper, *_beginning(command)], []
        for name in chosen.get(group, []):
            with draft.collecting():
                upper += _settings(packaged_recipe(group, name))
    found = translate(in_files + on_line, tables_of(command), frozenset(options()), _values(lower), _values(upper))
    draft.problems += found.problems
    draft.put_all([*lower, *found.defaults, *upper, *found.settings])
    return draft.resolved(found)


def _beginning(command: str | None) -> list[Setting]:
    """What the command sets by itself."""
    if command != "grpo":
        return []
    return _settings(replace(packaged_recipe(METHOD, "grpo"), origin=DEFAULT_OF_COMMAND))


def _job(name: str, command: str | None) -> Recipe:
    """The job as a recipe file. Raises InputError where it is for another command."""
    job = packaged_recipe(JOB, name)
    if "stages" in job.about:
        raise InputError(f"job={name}: it is several commands, which `posttrain recipes run {name}` runs in order.")
    if command in ("sft", "grpo") and job.about.get("command", command) != command:
        raise InputError(f"job={name}: run it by `posttrain {job.about['command']} job={name}`.")
    return job


def _is_choice(given: Override, command: str | None) -> bool:
    """Whether it chooses recipes of ours: `model=gemma2-2b`, not another system's `engine=fsdp`."""
    if given.key not in groups():
        return False
    names = given.text if isinstance(given.text, list) else [given.text]
    own, row = recipes().get(given.key), row_of(tables_of(command), given.key)
    is_theirs = row and (not own or all(as_written(name) in (row.accepts or ()) for name in names))
    return not is_theirs


def _own_choices(file: Recipe, command: str | None) -> tuple[Recipe, list[Setting]]:
    """The file with choices of our recipes alone, and what else it builds on as settings of another system."""
    asked = [Override("", group, names, names) for group, names in file.choices.items()]
    own = {choice.key: choice.value for choice in asked if _is_choice(choice, command)}
    theirs = [Setting(c.key, name, name, file.origin) for c in asked if c.key not in own for name in c.value]
    for setting in theirs:
        if row_of(tables_of(command), setting.key) is None:
            entry = setting.value if setting.key == CONFIG_NAME else {setting.key: setting.value}
            raise wrong_choice(file.origin, entry)
    return replace(file, choices=own), theirs


def _chosen(files: list[Recipe], choices: list[Override]) -> dict[str, list[str]]:
    """Group -> recipes: a later choice replaces an earlier one, `+method=` adds to it, `~method` and null drop it."""
    chosen: dict[str, list[str]] = {}
    for file in files:
        chosen |= file.choices
    for choice in choices:
        names = choice.text if isinstance(choice.text, list) else [choice.text] * (choice.value is not None)
        chosen[choice.key] = [*(chosen.get(choice.key, []) if choice.sign == "+" else []), *names]
    return chosen


def _settings(recipe: Recipe) -> list[Setting]:
    texts = dict(_flat(recipe.texts))
    return [Setting(key, value, texts.get(key, str(value)), recipe.origin) for key, value in _flat(recipe.values)]


def _values(settings: list[Setting]) -> dict[str, Any]:
    return {setting.key: setting.value for setting in settings}


def _settings_of(given: Override) -> list[Setting]:
    if isinstance(given.value, dict):
        return [Setting(key, value, str(value), COMMAND_LINE) for key, value in _flat({given.key: given.value})]
    return [Setting(given.key, given.value, given.text, COMMAND_LINE, reset=given.sign == "~")]


@dataclass
class _Draft:
    """Values by dotted key as they come in, those inside free mappings too, and what is wrong with them."""

    command: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=lambda: dict.fromkeys(options(), DEFAULT))
    problems: list[str] = field(default_factory=list)
    nulls: set[str] = field(default_factory=set)  # options given as null that are never null

    @contextmanager
    def collecting(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))

    def put_all(self, settings: list[Setting]) -> None:
        for setting in settings:
            self.put(setting)

    def put(self, setting: Setting) -> None:
        key, option = setting.key, _option_of(setting.key)
        if option is None:
            self.problems.append(_unknown(key, setting.origin, self.command))
            return
        self._forget(key)
        self.nulls.discard(key)
        is_null = setting.value is None and key == option and NoneType not in types_of(option)
        if is_null and not setting.reset and default_of(option):
            self.nulls.add(key)
        if not setting.reset and not is_null:
            self.values[key] = _as_asked(option, setting.value, setting.text)
            self.origins[option] = setting.origin
            self._replace_alternative(setting)
        elif not any(_is_within(known, option) for known in self.values):
            self.origins[option] = DEFAULT

    def resolved(self, found: Translation) -> Resolved:
        tree = self._interpolated()
        try:
            config = Config.model_validate(tree)
        except ValidationError as error:
            self.problems += _wrong_values(error, self.origins)
        if self.problems:
            raise InputError("\n".join(self.problems))
        without_effect = options_without_effect(config, self.origins, self.command)
        nulls = [
            {"key": key, "reason": f"null leaves it at its default, {shown(default_of(key))}"}
            for key in sorted(self.nulls)
        ]
        return Resolved(config, self.origins, found.ignored + nulls + without_effect, found.translated)

    def _forget(self, key: str) -> None:
        """Drop what `key` replaces: itself, what is inside it, what it would be inside of."""
        self.values = {k: v for k, v in self.values.items() if not (_is_within(k, key) or _is_within(key, k))}

    def _replace_alternative(self, setting: Setting) -> None:
        other = ALTERNATIVES.get(setting.key)
        if setting.value is not None and other in self.values and self.origins[other] != setting.origin:
            del self.values[other]
            self.origins[other] = DEFAULT

    def _interpolated(self) -> dict[str, Any]:
        """The whole tree with every `${...}` replaced; where one cannot be, the option keeps its default."""
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        def resolve(tree: Any, key: str, _value: Any) -> None:
            found = OmegaConf.select(tree, key)
            if OmegaConf.is_config(found):
                OmegaConf.to_container(found, resolve=True)

        tree = OmegaConf.create(Config().model_dump())
        for step in (OmegaConf.update, resolve):  # all are set before the first is resolved: it may name a later one
            for key, value in self.values.items():
                try:
                    step(tree, key, value)
                except OmegaConfBaseException as error:
                    option = _option_of(key) or key
                    self.problems.append(_unresolved(key, value, self.origins[option], error))
                    OmegaConf.update(tree, option, default_of(option))
        return _with_text(cast(dict[str, Any], OmegaConf.to_container(tree, resolve=True)))


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) down to the options, and further inside free mappings. Empty sections say nothing."""
    for name, value in tree.items():
        key = f"{prefix}{name}"
        is_value = key in options() and not is_free(key)
        if isinstance(value, dict) and value and not is_value:
            yield from _flat(value, f"{key}.")
        elif not (key in sections() and value in (None, {})):
            yield key, value


def _option_of(key: str) -> str | None:
    """The option that the key sets: itself, or the free mapping that it is inside of."""
    free = (option for option in options() if is_free(option) and _is_within(key, option))
    return key if key in options() else next(free, None)


def _is_within(key: str, other: str) -> bool:
    return key == other or key.startswith(f"{other}.")


def _as_asked(option: str, value: Any, text: Any) -> Any:
    """The value, or its text where that is asked for: for text options a commit 12e4 is no float, and `true` no int."""
    if is_free(option):
        return value
    if isinstance(value, list):
        texts = text if isinstance(text, list) else map(str, value)
        return [_as_asked(option, item, item_text) for item, item_text in zip(value, texts, strict=True)]
    if not isinstance(value, bool | int | float):
        return value
    fitting = {bool} if isinstance(value, bool) else {int, float}
    return value if types_of(option) & fitting else text


def _with_text(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with numbers that `${...}` brought into text options as text."""
    for key in options():
        section, option = key.split(".")
        tree[section][option] = _as_asked(key, tree[section][option], str(tree[section][option]))
    return tree


def _at(tree: dict[str, Any], key: str) -> Any:
    section, option = key.split(".")
    return tree[section][option]


def _escaped(value: Any) -> Any:
    """The value with `${` kept from being read as an interpolation."""
    if isinstance(value, dict):
        return {name: _escaped(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value


def _unknown(key: str, origin: str, command: str | None) -> str:
    section = key.partition(".")[0]
    if key in groups():
        return f"{key} ({origin}): expected options below it; a recipe is chosen by `- {key}: name` under `defaults:`."
    near = _nearest(key, command)
    hint = f" Nearest: {', '.join(near)}." if near else f" `posttrain {command or 'sft'} --help` lists them."
    others = [name for name in OF_COMMAND if name and command and row_of(tables_of(name), key)]
    if others:
        return f"{key} ({origin}): it is an option of `posttrain {others[0]}`, without a meaning here. Leave it out."
    if "." not in key or section in sections() or any(row.startswith(f"{section}.") for row in _theirs(command)):
        return f"{key} ({origin}): there is no such option.{hint}"
    return f"{key} ({origin}): there is no section '{section}', only {', '.join(sections())}.{hint}"


def _nearest(key: str, command: str | None) -> list[str]:
    """The options that are written alike, or whose sentence says the same words; another system's where the section is theirs."""
    name = key.rpartition(".")[2]
    said = re.compile(rf"\b{re.escape(name.replace('_', ' '))}\b")

    def likeness(option: str) -> float:
        if option in options() and said.search(options()[option].description or ""):
            return 1.0
        pairs = ((key, option), (name, option.rpartition(".")[2]))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    ours = [option for option in sorted(options(), key=likeness, reverse=True)[:3] if likeness(option) > 0.6]
    close = difflib.get_close_matches(key, _theirs(command), n=2, cutoff=0.8)
    return ours or close if key.partition(".")[0] in sections() else close or ours


def _theirs(command: str | None) -> list[str]:
    """The options of other systems that the command knows by names of their own."""
    return [option for table in tables_of(command) for option in table.rows if option not in options()]


def _unresolved(key: str, value: Any, origin: str, error: Exception) -> str:
    return (
        f"{key}: found {shown(value)} ({origin}), and {str(error).splitlines()[0]}. "
        "${section.option} means an option, ${oc.env:NAME} a variable of the environment; \\${ is taken as it stands."
    )


def _wrong_values(error: ValidationError, origins: dict[str, str]) -> list[str]:
    """One line for each option that is wrong, and for each rule between options that is broken."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"][:2]))
        own_words = problem["msg"].removeprefix("Value error, ") if problem["type"] == "value_error" else None
        if key not in options():
            lines[key] = f"{key}: {own_words or problem['msg']}."
            continue
        option = options()[key]
        found = repr(problem["input"]) if isinstance(problem["input"], str) else shown(problem["input"])
        expected = own_words or f"expected {type_name(option.annotation, tuple(option.metadata))}"
        lines.setdefault(key, f"{key}: found {found} ({origins[key]}), {expected}.")
    return list(lines.values())
