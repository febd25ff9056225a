"""What commands share: options in force, what must be given, the processes that do the work, and printing."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain.errors import InputError

if TYPE_CHECKING:
    from posttrain.config.compose import Resolved

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OPTION=VALUE | RECIPE.yaml]...", help="Options in Hydra's grammar, and recipe files."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "--model_path", "--checkpoint", help="A model folder, a run folder, or a hub name."),
]


DataPath = Annotated[str | None, typer.Option("--data_path", help="Short for data.train_files=.")]
OutputDir = Annotated[str | None, typer.Option("--output_dir", help="Short for trainer.default_local_dir=.")]
PrintConfig = Annotated[bool, typer.Option("--print_config", help="Print the resolved options and stop.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print machine-readable output.")]
DumpGradients = Annotated[
    str | None, typer.Option("--dump_gradients", help="Write the first update's gradients there and stop.")
]
ConfigPath = Annotated[str | None, typer.Option("--config-path", "-cp", help="Folder of --config-name.", hidden=True)]
ConfigName = Annotated[
    str | None, typer.Option("--config-name", "-cn", help="As Hydra has it: a file of options.", hidden=True)
]
Help = Annotated[bool, typer.Option("--help", is_eager=True, help="Show this and every option.")]
# of a run's saved options, those that say where and how it trained, not what it made
OF_TRAINING = (
    "trainer.nnodes", "trainer.rdzv_endpoint", "trainer.max_restarts", "rollout.name", "rollout.n", "rollout.temperature",
    "rollout.top_p", "rollout.top_k", "model.lora_adapter_path",
)  # fmt: skip


def is_main() -> bool:
    """Whether this process speaks for all: of workers the first, of Slurm's tasks the first."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def resolve(
    options: list[str] | None, given: dict[str, str | None], model: str | None, command: str | None = None
) -> Resolved:
    """The options in force in the command: those of the run that `model` lies in, then the command line's, then the
    flags'."""
    from posttrain.config.compose import compose
    from posttrain.run.folder import find_run

    run = find_run(model) if model else None
    saved = [str(run / "config.yaml")] if run else []
    flags = [f"{key}={_quoted(value)}" for key, value in given.items() if value is not None]
    if run:  # its export holds weights, tokenizer and template, whatever it began from
        flags += ["~model.random_weights", "~model.override_config", "~model.tokenizer_path", "~model.revision"]
        flags += ["~data.chat_template", "~model.lora_rank", "~model.load_in_4bit"]
    here = [f"~{option}" for option in OF_TRAINING] if run else []
    return compose([*saved, *here, *(options or []), *flags], command)


def of_hydra(config_path: str | None, config_name: str | None) -> list[str]:
    """Hydra's two flags as an argument: the file that they name, or the name of another system's own."""
    from posttrain.config.arguments import CONFIG_NAME

    if config_name is None:
        return []
    name = config_name.removesuffix(".yaml")
    file = Path(config_path or "", f"{name}.yaml")
    return [str(file)] if file.exists() else [f"{CONFIG_NAME}={name}"]


def _quoted(value: str) -> str:
    """The flag's value in Hydra's grammar; a template stands as it is."""
    from posttrain.config.values import is_template

    return value if is_template(value) else repr(value)


def dated(resolved: Resolved) -> Resolved:
    """With the day that templates print: the one given, else that of the run which goes on here, else today."""
    import datetime
    from dataclasses import replace

    import yaml

    config = resolved.config
    if config.data.date:
        return resolved
    saved = Path(config.trainer.default_local_dir) / "config.yaml"
    began = yaml.safe_load(saved.read_text()).get("data", {}).get("date") if saved.exists() else None
    data = config.data.model_copy(update={"date": began or datetime.date.today().isoformat()})
    return replace(resolved, config=config.model_copy(update={"data": data}))


def check_needed(resolved: Resolved, command: str, needs_val: bool) -> None:
    """Raise InputError where something that a run needs is not named, or is not there."""
    from posttrain.data.sources import find_sources
    from posttrain.models.load import find_model

    config = resolved.config
    missing = [
        option
        for option, value in (
            ("model.path", config.model.path),
            ("data.train_files", config.data.train_files),
            ("data.val_files", config.data.val_files or not needs_val),
        )
        if not value
    ]
    if missing:
        recipes = dict.fromkeys(f"{option.partition('.')[0]}=NAME" for option in missing)
        raise InputError(
            f"Missing: {', '.join(f'{option}=...' for option in missing)}. Recipes bring them: {', '.join(recipes)}, or job=NAME, as `posttrain recipes` lists them; "
            f"`posttrain {command} --help` explains each option."
        )
    find_model(config.model.path)
    find_sources(config.data.train_files, "data.train_files")
    if config.data.val_files:
        find_sources(config.data.val_files, "data.val_files")


def hand_to_processes(resolved: Resolved) -> bool:
    """Start as many processes as the options ask for; True where they have done the work."""
    from posttrain.launch.plan import Workers, plan_launch

    plan = plan_launch(resolved.config.trainer, os.environ, at_terminal=sys.stdin is not None and sys.stdin.isatty())
    if not isinstance(plan, Workers):
        os.environ.update(plan)
        return False
    level = os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch dumps its stack when another node ends
    from posttrain.launch.agent import run_workers

    if level == "ERROR":
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # it is read at the import; workers may warn
    code = run_workers(plan, sys.argv[1:])
    if code:
        raise typer.Exit(code)
    return True


def home_of(resolved: Resolved) -> Path:
    """The run folder that the model belongs to, or the current folder."""
    from posttrain.run.folder import find_run

    return find_run(resolved.config.model.path or "") or Path()


def say_resolved(resolved: Resolved, given_here: bool = False) -> None:
    """Say what was read of another system's options, and which have no effect: all, or those given on the command line, where the
    rest may be a run's that is read."""
    from posttrain.config.arguments import COMMAND_LINE
    from posttrain.config.describe import translations

    if not is_main():
        return
    if told := translations(resolved):
        print("\n  ".join(["read as options of posttrain (docs/dialects.md):", *told]), file=sys.stderr)
    for ignored in resolved.ignored:
        if not given_here or resolved.origins.get(ignored["key"], COMMAND_LINE) == COMMAND_LINE:
            print(f"no effect in this run: {ignored['key']}: {ignored['reason']}", file=sys.stderr)


def print_json(value: object, indent: int | None = 2) -> None:
    import json

    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)
