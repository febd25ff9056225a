"""One `key=value`, and what `${...}` in it means where it names another system's option."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from posttrain.config.dialects.tables import Table, row_of

NAMED = re.compile(
    r"\$\{\s*(?:oc\.select:\s*)?(\.*[\w@/-]+(?:\.[\w@/-]+)*)\s*[,}]"
)  # ${key}, ${.key}, ${oc.select:key,default}


@dataclass(frozen=True)
class Setting:
    """One `key=value`, from wherever. `text` is the value before anything in it became a number; `reset` is Hydra's `~key`."""

    key: str
    value: Any
    text: Any
    origin: str
    reset: bool = False


def followed(
    settings: list[Setting], tables: tuple[Table, ...], layers: tuple[Mapping[str, Any], ...], ours: frozenset[str]
) -> list[Setting]:
    """The settings with each `${...}` replaced that names an option which a table knows, by what was given for it. The rest is
    for options of ours, whose values are not known yet. `layers`: what holds where nothing was given, the highest first."""
    wanting = {setting.key for setting in settings if _names_theirs(setting, tables, ours)}
    if not wanting:
        return settings
    from omegaconf import OmegaConf

    values = {key: value for layer in reversed(layers) for key, value in layer.items()}
    values |= {setting.key: setting.value for setting in settings if not setting.reset}
    tree = OmegaConf.create(_nested(values))
    return [_resolved(setting, tree) if setting.key in wanting else setting for setting in settings]


def _names_theirs(setting: Setting, tables: tuple[Table, ...], ours: frozenset[str]) -> bool:
    names = NAMED.findall(str(setting.value)) if setting.value is not None else []
    return any(setting.key not in ours if name.startswith(".") else row_of(tables, name) for name in names)


def _resolved(setting: Setting, tree: Any) -> Setting:
    """The setting as it stands where its `${...}` leads nowhere, which its own option then says."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(tree, setting.key, throw_on_missing=True)
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, RecursionError):
        return setting
    value = value.replace("${", "\\${") if isinstance(value, str) else value
    return replace(setting, value=value, text=value if isinstance(value, list) else str(value))


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    """The tree of dotted keys. A word for a whole section, such as engine=fsdp, gives way to the options below it."""
    tree: dict[str, Any] = {}
    for key in sorted(values, key=lambda key: -key.count(".")):
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node.setdefault(name, values[key])
    return tree
