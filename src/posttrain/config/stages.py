"""A job of several commands: `stages` of a recipe file -> the commands in order, each on the model of the one before.

    recipe:
      folder: checkpoints/mine
      stages:
        - sft: [model=qwen2.5-0.5b, data=gsm8k]
        - grpo: [data=gsm8k]
        - evaluate: []

Training writes into a folder of its own below `folder`, named after the command. What follows begins with that run's model.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.arguments import read_recipe
from posttrain.config.catalog import Page, find_page
from posttrain.config.describe import sections
from posttrain.errors import InputError

TRAINING = ("sft", "grpo")
JUDGING = ("evaluate", "generate")
# what the first model was made from, which an export no longer needs
OF_FIRST_MODEL = ("random_weights", "override_config", "tokenizer_path", "revision")


@dataclass(frozen=True)
class Stage:
    """A command of posttrain with its arguments."""

    arguments: list[str]

    def __str__(self) -> str:
        return shlex.join(["posttrain", *self.arguments])


def read_stages(name: str, given: list[str], folder: str | None = None) -> list[Stage]:
    """The commands of the job, or of the file. `given` options go to every training, `sft.optim.lr=...` to the command before
    the dot. Raises InputError where it cannot be run so."""
    page = None if name.endswith((".yaml", ".yml")) else find_page(name)
    about = page.about if page else read_recipe(Path(name), f"file {name}").about
    if "stages" not in about:
        return [_alone(page, name, given, folder)]
    asked = [_checked(name, stage) for stage in about["stages"]]
    commands = {command for command, _ in asked}
    everywhere = [option for option in given if _meant(option) is None]
    if unused := [option for option in given if _meant(option) not in (None, *commands)]:
        raise InputError(f"{unused[0]}: {name} has no such stage, only {', '.join(sorted(commands))}.")
    home = Path(folder or about["folder"])
    stages, model = [], None
    for command, own in asked:
        arguments = [command, *own, *(everywhere if command in TRAINING else [])]
        arguments += [option.partition(".")[2] for option in given if _meant(option) == command]
        if model and command in TRAINING:
            arguments += [f"model.path={model}", *(f"~model.{option}" for option in OF_FIRST_MODEL)]
        elif model:
            arguments += ["--model", str(model)]
        if command in TRAINING:
            model = home / command
            arguments.append(f"trainer.default_local_dir={model}")
        stages.append(Stage(arguments))
    return stages


def _alone(page: Page | None, name: str, given: list[str], folder: str | None) -> Stage:
    if page and page.group != "job":
        raise InputError(f"{page.title} is no job. `posttrain recipes show {page.name}` says how to use it.")
    which = f"job={page.name}" if page else name
    where = [f"trainer.default_local_dir={folder}"] if folder else []
    return Stage([page.command if page else "sft", which, *given, *where])


def _checked(name: str, stage: Any) -> tuple[str, list[str]]:
    match stage:
        case dict() if len(stage) == 1 and set(stage) <= {*TRAINING, *JUDGING}:
            [(command, options)] = stage.items()
            return command, [str(option) for option in options or []]
    raise InputError(
        f"{name}: found the stage {stage!r}, expected one of {', '.join((*TRAINING, *JUDGING))} with a list of options."
    )


def _meant(option: str) -> str | None:
    """The command that the option is for alone; None: no section of options is called so."""
    word = option.partition("=")[0].partition(".")[0]
    return None if word.lstrip("+~") in sections() or "." not in option.partition("=")[0] else word
