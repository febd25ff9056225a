"""`posttrain data ...`: preparing rows, and looking at them as they will be trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from posttrain.cli.begin import Overrides, print_json, resolve
from posttrain.errors import InputError
from posttrain.wording import counted

if TYPE_CHECKING:
    from posttrain.config.schema import Config
    from posttrain.data.audit.chunk import Checks
    from posttrain.data.sources import Source


def _path(text: str) -> Path:
    from posttrain.config.values import expand_path

    return Path(expand_path(text))


Files = Annotated[list[str] | None, typer.Option("--files", help="Rows to check; or data.train_files=.")]
ValFiles = Annotated[
    list[str] | None, typer.Option("--val_files", help="Rows that must not be among them; or data.val_files=.")
]
Tokenizer = Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder or hub name; or model.path=.")]
ChatTemplate = Annotated[
    str | None, typer.Option("--chat_template", help="A chat template, as a file or as Jinja text.")
]

data_app = typer.Typer(help="Prepare data, and look at it as it will be trained.", no_args_is_help=True)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(
            help="gsm8k, gsm8k_multiturn_sft, multiturn, retool, hellaswag, math, geo3k, shapes, or chat for your own."
        ),
    ],
    local_save_dir: Annotated[str, typer.Option("--local_save_dir", help="Where train.parquet and test.parquet go.")],
    local_dataset_path: Annotated[
        str | None, typer.Option("--local_dataset_path", help="Folder or file with the data; not given: the hub.")
    ] = None,
    hdfs_dir: Annotated[
        str | None,
        typer.Option("--hdfs_dir", help="Folder or URL (hdfs://, s3://, ...) that gets copies of the files."),
    ] = None,
    difficulty: Annotated[
        str | None,
        typer.Option("--difficulty", help="Of shapes: easy (one circle, its colour) or hard. Not given: easy."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", help="Of shapes: how many to train on. Not given: 4000.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Of shapes: what they are drawn from. Not given: 0.")
    ] = None,
) -> None:
    """Turn a data set into parquet files for training and evaluation."""
    from posttrain.data.prepare import PREPARE

    if name not in PREPARE:
        raise InputError(f"There is no preparation for '{name}'; there is {', '.join(PREPARE)}.")
    drawing = {"difficulty": difficulty, "rows": rows, "seed": seed}
    drawing = {option: value for option, value in drawing.items() if value is not None}
    if drawing and name != "shapes":
        raise InputError(
            f"--{next(iter(drawing))} is for shapes, which are drawn; {name} is taken as it is. Leave it out."
        )
    summary = PREPARE[name](local_dataset_path, local_save_dir, hdfs_dir, **drawing)
    for note in summary.pop("notes"):
        print(note)
    for split, made in summary.items():
        print(f"{split}: {counted(made['rows'], 'row')} from {', '.join(made['sources'])} -> {made['file']}")


@data_app.command("show")
def data_show(
    options: Overrides = None,
    files: Annotated[list[str] | None, typer.Option("--files", help="Rows to show; or data.train_files=.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder or hub name.")] = None,
    chat_template: Annotated[
        str | None, typer.Option("--chat_template", help="A chat template, as a file or as Jinja text.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="How many; not given: 3, 20 with --html, all with --step and --json.")
    ] = None,
    step: Annotated[
        int | None, typer.Option(min=0, help="Show the batch of this step, from 0, as it is packed.")
    ] = None,
    html: Annotated[str | None, typer.Option("--html", help="Write one self-contained page there.")] = None,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a sample: whole, with `truncated` telling what would be cut."),
    ] = False,
) -> None:
    """Show rows as they will be trained, after truncation and packing, token by token. Needs no model weights."""
    if html and as_json:
        raise InputError("--html and --json: give one of them.")
    given = [f"data.train_files={list(files)!r}"] if files else []
    flags = {"model.tokenizer_path": tokenizer, "data.chat_template": chat_template}
    resolved = resolve([*(options or []), *given], flags, None)
    from posttrain.data.show.page import Group, write_page
    from posttrain.data.show.terminal import json_lines, print_groups
    from posttrain.loops.showing import Showing

    showing = Showing(resolved)
    if step is None:
        count = rows or (None if as_json else 20 if html else 3)
        groups = [Group(showing.first_rows(count))]
    else:
        groups = showing.step(step, rows)
    if as_json:
        for told in json_lines(groups):
            print_json(told, indent=None)
    elif html:
        print(write_page(html, showing.summary(step), groups))
    else:
        print_groups(groups)


@data_app.command("check")
def data_check(
    options: Overrides = None,
    files: Files = None,
    val_files: ValFiles = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    output: Annotated[
        Path | None, typer.Option(parser=_path, help="Folder for report.json and findings.jsonl.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Check every row before training: what cannot be used, is there twice, leaks, is cut, or could be wrong."""
    config = _resolved(options, files, val_files, tokenizer, chat_template)
    from contextlib import nullcontext

    from posttrain.data.audit.audit import audit
    from posttrain.data.audit.folder import FINDINGS, REPORT, output_folder
    from posttrain.data.audit.report import report
    from posttrain.run.progress import Display

    sources, val_sources, checks = _train_sources(config), _val_sources(config), _checks(config)
    with Display(shown=not as_json) as display, output_folder(output) if output else nullcontext() as folder:
        display.begin_work("checking rows", None)
        with open(folder.new_file(FINDINGS), "w") if folder else nullcontext() as file:
            found = audit(
                sources, val_sources, checks, file=file, num_workers=config.data.num_workers, progress=display.advance
            )
        display.end_work()
        told = report(found, checks)
        if folder:
            folder.write_json(REPORT, told)
    _print_report(told, as_json)
    if output and not as_json:
        print(f"every finding: {output / FINDINGS}")


@data_app.command("clean")
def data_clean(
    output: Annotated[
        Path, typer.Option(parser=_path, help="Folder for the cleaned files, report.json and left_out.jsonl.")
    ],
    options: Overrides = None,
    files: Files = None,
    val_files: ValFiles = None,
    tokenizer: Tokenizer = None,
    chat_template: ChatTemplate = None,
    drop: Annotated[
        list[str] | None, typer.Option(help="Kinds of findings to leave out; not given: unusable,duplicate,leak.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Write the rows without those that `data check` finds fault with. The files themselves stay as they are."""
    config = _resolved(options, files, val_files, tokenizer, chat_template)
    from posttrain.data.audit.clean import checked_kinds, clean
    from posttrain.data.audit.findings import DROPPED_BY_DEFAULT
    from posttrain.data.audit.folder import LEFT_OUT
    from posttrain.run.progress import Display

    kinds = checked_kinds(drop) if drop else DROPPED_BY_DEFAULT
    sources, val_sources, checks = _train_sources(config), _val_sources(config), _checks(config)
    with Display(shown=not as_json) as display:
        display.begin_work("checking rows", None)
        told = clean(
            sources, val_sources, checks, kinds, output, find_again=lambda: _train_sources(config),
            num_workers=config.data.num_workers, progress=display.advance,
        )  # fmt: skip
    if as_json:
        print_json(told)
        return
    _print_report(told, as_json)
    print(f"\nleft out {counted(told['rows_left_out'], 'row')} ({', '.join(kinds)}): {output / LEFT_OUT}")
    print(f"written {counted(told['rows_written'], 'row')}: {', '.join(told['written'])}")
    for folder in told["image_dirs"]:
        print(f"images that rows name by relative paths stay where they are: train with data.image_dir={folder}")


def _resolved(
    options: list[str] | None,
    files: list[str] | None,
    val_files: list[str] | None,
    tokenizer: str | None,
    chat_template: str | None,
) -> Config:
    named = {"data.train_files": files, "data.val_files": val_files}
    given = [f"{key}={list(names)!r}" for key, names in named.items() if names]
    flags = {"model.tokenizer_path": tokenizer, "data.chat_template": chat_template}
    return resolve([*(options or []), *given], flags, None).config


def _train_sources(config: Config) -> list[Source]:
    from posttrain.data.sources import find_sources

    data = config.data
    return find_sources(data.train_files, "data.train_files", data.train_split, data.hub_config)


def _val_sources(config: Config) -> list[Source]:
    from posttrain.data.sources import find_sources

    data = config.data
    return find_sources(data.val_files, "data.val_files", data.val_split, data.hub_config) if data.val_files else []


def _checks(config: Config) -> Checks:
    """What rows are checked against: with a tokenizer where one is named."""
    from posttrain.data.audit.chunk import Checks
    from posttrain.data.formats import Columns

    data, make_chat = config.data, None
    if config.model.tokenizer_path or config.model.path:
        from posttrain.loops.training_data import chat_maker

        make_chat = chat_maker(config)
    elif data.chat_template:
        raise InputError("--chat_template needs a tokenizer beside it: --tokenizer DIR, or model.path=DIR.")
    return Checks(Columns.of(data), make_chat, data.max_length, data.truncation)


def _print_report(told: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(told)
        return
    from rich.console import Console

    from posttrain.data.audit.report import as_page

    Console(highlight=False, soft_wrap=not sys.stdout.isatty()).print(*as_page(told), sep="\n")


@data_app.command("batches")
def data_batches(
    options: Overrides = None,
    steps: Annotated[str, typer.Option(help="Which steps, such as 0:5.")] = "0:5",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a step.")] = False,
) -> None:
    """Print the row numbers of each step: a function of data and seed alone."""
    config = resolve(options, {}, None).config
    try:
        first, last = (int(part) for part in steps.split(":"))
    except ValueError:
        raise InputError(f"--steps {steps}: expected two numbers such as 0:5.") from None
    from posttrain.distributed.device import HOST, choose_device
    from posttrain.distributed.world import World
    from posttrain.loops.training_data import open_training_data
    from posttrain.run.progress import Display

    data = open_training_data(config, World(choose_device(HOST)), Display(shown=not as_json))
    for step in range(first, min(last, data.schedule.num_steps)):
        rows = data.train.rows_N[data.schedule.rows(step)].tolist()
        print_json({"step": step, "rows": rows}, indent=None) if as_json else print(f"step {step}: {rows}")
