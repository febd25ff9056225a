"""`posttrain recipes ...`: what recipes there are, what each sets and why, one's own, and jobs of several commands."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.begin import AsJson, print_json
from posttrain.config.catalog import MEANINGS, Page, find_page, needs, pages, run_command, written_out
from posttrain.errors import InputError

if TYPE_CHECKING:
    from posttrain.config.stages import Stage

Name = Annotated[str, typer.Argument(help="qwen2.5-0.5b, or model/qwen2.5-0.5b with its group.")]

recipes_app = typer.Typer(help="Ready-made models, data, methods, and whole jobs by name.")


@recipes_app.callback(invoke_without_command=True)
def recipes(context: typer.Context, as_json: AsJson = False) -> None:
    """List the recipes, with what each is for and needs."""
    if context.invoked_subcommand:
        return
    if as_json:
        print_json([_told(page) for page in pages()])
        return
    width = shutil.get_terminal_size((120, 24)).columns
    there = pages()
    for group, meaning in MEANINGS.items():
        print(f"{group}: {meaning}")
        for page in there:
            if page.group == group:
                _print_line(page, width)
        print()
    print(
        "posttrain recipes show NAME: what it sets, and why     posttrain recipes copy NAME FILE: a file of one's own"
    )


@recipes_app.command("show")
def show(name: Name, as_json: AsJson = False) -> None:
    """Print what a recipe sets, with the reasons, and where each value comes from."""
    page = find_page(name)
    settings = _settings(page)
    told = _told(page)
    if as_json:
        print_json(told | {"options": settings, "stages": page.about.get("stages", [])})
        return
    print(f"{page.title}: {told['about']}")
    for word in ("needs", "command"):
        if told[word]:
            print(f"  {word}: {told[word]}")
    for key, setting in settings.items():
        origin = "" if setting["origin"] == f"recipe {page.title}" else setting["origin"]
        print(f"  {key}={_shown(setting['value'])}" + (f"  ({origin})" if origin else ""))
        if setting["reason"]:
            print(textwrap.fill(setting["reason"], 110, initial_indent="      ", subsequent_indent="      "))
    for stage in page.about.get("stages", []):
        [(command, options)] = stage.items()
        print(f"  posttrain {command} {shlex.join(options)}")
    print(f"one's own: posttrain recipes copy {page.title} FILE.yaml")


@recipes_app.command("copy")
def copy(name: Name, file: Annotated[Path, typer.Argument(help="The file to write, such as my.yaml.")]) -> None:
    """Write a recipe with its reasons into a file, to start one's own."""
    page = find_page(name)
    if file.suffix not in (".yaml", ".yml"):
        raise InputError(f"{file}: a recipe file's name ends in .yaml, by which it is known on the command line.")
    if file.exists():
        raise InputError(f"{file} is there already. Choose another name, or delete it.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(written_out(page), encoding="utf-8")
    command = run_command(page)
    ours = f"{page.group}={page.name}"
    own = command.replace(ours, str(file)) if ours in command else command.replace(page.name, str(file))
    print(f"{file} is written. Change it, and run it: {own}")


@recipes_app.command("run")
def run(
    name: Annotated[str, typer.Argument(help="A job, or a file like one.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[OPTION=VALUE | sft.OPTION=VALUE]...", help="For each training, or for the commands of one name."
        ),
    ] = None,
    folder: Annotated[str | None, typer.Option("--folder", help="Where the runs lie.")] = None,
    show_only: Annotated[bool, typer.Option("--print", help="Print the commands and stop.")] = False,
) -> None:
    """Run a job's commands in order; each goes on where it was stopped."""
    from posttrain.config.stages import read_stages

    if "RANK" in os.environ:
        raise InputError(
            "`posttrain recipes run` starts processes itself (trainer.n_gpus_per_node); run it without torchrun."
        )
    for stage in read_stages(name, options or [], folder):
        print(f"$ {stage}", flush=True)
        if not show_only:
            _run(stage)


def _run(stage: Stage) -> None:
    code = subprocess.run([sys.executable, "-m", "posttrain", *stage.arguments]).returncode
    if code:
        raise typer.Exit(code if code > 0 else 128 - code)


def _told(page: Page) -> dict[str, Any]:
    return {
        "group": page.group, "name": page.name, "about": page.about["about"], "needs": needs(page),
        "command": run_command(page),
    }  # fmt: skip


def _print_line(page: Page, width: int) -> None:
    """The name, then in a column what it is for, and below it what it needs."""
    name_width = 34
    for name, text in ((page.name, page.about["about"]), ("", needs(page))):
        lines = textwrap.wrap(text, max(width - name_width - 2, 40))
        for first, line in zip([name, *[""] * len(lines)], lines, strict=False):
            print(f"  {first:{name_width}s}{line}")


def _settings(page: Page) -> dict[str, dict[str, Any]]:
    """Option -> value, origin and reason, of those that the recipe and what it builds on set."""
    from posttrain.config.arguments import DEFAULT
    from posttrain.config.compose import compose

    if "stages" in page.about:
        return {}
    resolved = compose([f"{page.group}={page.name}"], page.command)
    values = resolved.config.model_dump(mode="json")
    by_title = {f"recipe {other.title}": other for other in pages()}
    found = {}
    for key, origin in resolved.origins.items():
        if origin == DEFAULT:
            continue
        section, option = key.split(".")
        lines = by_title[origin if origin in by_title else "recipe method/grpo"].lines
        found[key] = {"value": values[section][option], "origin": origin, "reason": lines[key].reason}
    return found


def _shown(value: Any) -> str:
    from posttrain.config.describe import shown

    return shown(value)
