"""What stands on the command line and in recipe files: Hydra's override grammar and YAML -> values."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.catalog import ABOUT, RECIPES
from posttrain.config.describe import options, sections
from posttrain.config.values import expand_path, is_template
from posttrain.errors import InputError

# the groups of recipes that are not named after a section: a job is a file that chooses the others
METHOD, JOB = "method", "job"

# where a value can come from, besides `recipe group/name` and `file path`
DEFAULT = "default"
DEFAULT_OF_COMMAND = "default of this command"
DEFAULT_OF_OTHER = "'s default"  # after the name of the system whose options were given
COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Override:
    """`key=value`. `sign` is Hydra's: `~` resets, `+` adds. `text` is the value before anything in it became a number.

    >>> Override("", "model.revision", 120000.0, "12e4")
    """

    sign: str
    key: str
    value: Any
    text: Any


@dataclass(frozen=True)
class Recipe:
    """A YAML file of options: its own keys, the same with every scalar as text, and what it builds on: group -> recipes, by
    whatever names it uses for groups. `about` is no option: what a packaged recipe says of itself."""

    origin: str
    values: dict[str, Any]
    texts: dict[str, Any]
    choices: dict[str, list[str]]
    about: dict[str, Any] = field(default_factory=dict)


CONFIG_NAME = "--config-name"  # what a file builds on that is no group: Hydra's name for a whole file of options


def groups() -> tuple[str, ...]:
    """What recipes can be chosen for, in the order in which they are read: a method may lower what a model suggests."""
    return (*sections(), METHOD, JOB)


def recipes() -> dict[str, list[str]]:
    """The names of the packaged recipes of each group that has some."""
    files = {group: sorted((RECIPES / group).glob("*.yaml")) for group in groups()}
    return {group: [file.stem for file in paths] for group, paths in files.items() if paths}


def packaged_recipe(group: str, name: str) -> Recipe:
    known = recipes().get(group, [])
    if name in known:
        return read_recipe(RECIPES / group / f"{name}.yaml", f"recipe {group}/{name}")
    near = difflib.get_close_matches(name, known, n=3)
    listed = f"nearest: {', '.join(near)} (all: posttrain recipes)" if near else f"{group} has {', '.join(known)}"
    there = listed if known else f"only {', '.join(recipes())} have recipes"
    example = next((option for option in options() if option.startswith(f"{group}.")), None)
    hint = f" An option is set by its whole name, such as {example}=..." if example else ""
    raise InputError(f"{group}={name}: there is no such recipe; {there}.{hint}")


def is_left_over(argument: str) -> bool:
    """Whether it is what a shell makes of a backslash with a blank behind it, or at the end of a script: nothing was meant."""
    return bool(argument) and not argument.strip("\\ \t\r\n")


def parse(argument: str) -> Override | Recipe:
    """The argument as an override, or as the recipe file that it names."""
    key, equals, raw = argument.partition("=")
    path = Path(expand_path(argument))
    if path.suffix in (".yaml", ".yml") and (not equals or "/" in key or path.is_file()):
        return read_recipe(path, f"file {argument}")
    sign = next((sign for sign in ("++", "+", "~") if key.startswith(sign)), "")
    key = key.removeprefix(sign).strip()
    if sign == "~" and equals:
        raise InputError(f"{argument}: `~{key}` resets an option and takes no value; to set it, write {key}={raw}.")
    if sign == "~":
        return Override(sign, key, None, None)
    if not key or not equals:
        raise InputError(f"{argument}: expected option=value, group=recipe or a recipe file (.yaml).{_meant(argument)}")
    value = _parse_value(argument, raw)
    return Override(sign, key, value, _texts(argument, raw, value))


def read_recipe(path: Path, origin: str) -> Recipe:
    """The file's options and its `defaults:`. Raises InputError where it is missing or not such YAML."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(f"{origin}: {reason}; expected a recipe in YAML. Looked in {Path.cwd()}.") from None
    texts, values = _read_yaml(content, origin)
    if not isinstance(values, dict):
        raise InputError(f"{origin}: found no options, expected sections such as `model:` with their options below.")
    about = values.pop(ABOUT, None) or {}
    return Recipe(origin, values, texts, _choices(values.pop("defaults", []), origin), about)


def _parse_value(argument: str, raw: str) -> Any:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if raw.lstrip().startswith(("{%", "{{", "{#")):
        return _as_it_stands(raw)
    try:
        parsed = OverridesParser.create().parse_override(f"value={raw}")
    except HydraException:
        return _parse_what_hydra_rejects(argument, raw)
    if parsed.is_sweep_override():
        raise InputError(
            f"{argument}: this is a sweep over several runs, and posttrain does one at a time. Write a list as [a,b], "
            "and text with commas in quotes."
        )
    value = parsed.value()
    return _as_it_stands(value) if isinstance(value, str) and is_template(value) else value


def _as_it_stands(template: str) -> str:
    """A Jinja template as text of which nothing is an interpolation."""
    return template.replace("${", "\\${")


def _parse_what_hydra_rejects(argument: str, raw: str) -> Any:
    """Plain text that its grammar has no place for, such as ~/x and é, alone or in a list or mapping, and templates."""
    if is_template(raw):
        return _as_it_stands(raw)
    raw = raw.strip()
    if not raw.startswith(("[", "{", "'", '"')):
        return raw
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = None if raw[0] in "'\"" else _load_yaml(raw)
    except (yaml.YAMLError, OmegaConfBaseException):
        value = None
    if value is None or (isinstance(value, dict) and None in value.values()):
        raise InputError(
            f"{argument}: this list, mapping or quoted text is not complete; expected [a, b], {{name: value}} or "
            "'text'. The shell takes quotes and splits at spaces, so put the whole argument in quotes too."
        )
    return value


def _texts(argument: str, raw: str, value: Any) -> Any:
    """The value with numbers and switches as they were written."""
    if isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value)):
        return value
    if not isinstance(value, list):
        return raw.strip()
    try:
        texts = yaml.load(raw, yaml.BaseLoader)
    except yaml.YAMLError:
        texts = []
    if len(texts) != len(value):
        raise InputError(f"{argument}: cannot tell text from numbers in this list; put its items in quotes.")
    return texts


def _read_yaml(content: str, origin: str) -> tuple[Any, Any]:
    """The content with scalars as text, and with scalars as what YAML makes of them."""
    from omegaconf.errors import OmegaConfBaseException

    try:
        texts = yaml.load(content, yaml.BaseLoader) or {}
        return texts, _load_yaml(content) if isinstance(texts, dict) else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise InputError(f"{origin} line {line} is not YAML: {error.problem}.") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{origin} is not YAML: {str(error).splitlines()[0]}.") from None


def _load_yaml(content: str) -> Any:
    """Like Hydra's files: unlike in YAML 1.1, 1e-5 is a number, and a key that stands twice is an error."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.create(content))


def _choices(defaults: Any, origin: str) -> dict[str, list[str]]:
    """Hydra's `defaults:` list -> group -> names of recipes."""
    choices: dict[str, list[str]] = {}
    for place, entry in enumerate(defaults if isinstance(defaults, list) else [defaults]):
        match entry:
            case "_self_" if place == len(defaults) - 1:
                continue  # a file's own keys come after its defaults anyway
            case dict() if len(entry) == 1:
                [(group, names)] = entry.items()
                choices.setdefault(group, []).extend(map(str, names if isinstance(names, list) else [names]))
            case str() if entry != "_self_":
                choices.setdefault(CONFIG_NAME, []).append(entry)
            case _:
                raise wrong_choice(origin, entry)
    return choices


def wrong_choice(origin: str, entry: object) -> InputError:
    return InputError(
        f"{origin}: found {entry!r} under `defaults:`, expected entries such as `- model: qwen2.5-0.5b`, of the groups "
        f"{', '.join(recipes())}; `_self_` only as the last."
    )


def _meant(word: str) -> str:
    if Path(expand_path(word)).exists():
        return f" A file of rows is data.train_files={word}; `posttrain data` takes --files {word} too."
    names = {name: f"{group}={name}" for group, known in recipes().items() for name in known}
    near = difflib.get_close_matches(word, names, n=1)
    return f" Did you mean {names[near[0]]}?" if near else ""
