"""`posttrain data ...`: preparing rows, and looking at them as they will be trained."""

from __future__ import annotations

from typing import Annotated

import typer

from posttrain.cli.begin import Overrides, print_json, resolve
from posttrain.errors import InputError

data_app = typer.Typer(help="Prepare data, and look at it as it will be trained.", no_args_is_help=True)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[
        str,
        typer.Argument(help="gsm8k, gsm8k_multiturn_sft, multiturn, retool, hellaswag, math, or chat for your own."),
    ],
    local_save_dir: Annotated[str, typer.Option("--local_save_dir", help="Where train.parquet and test.parquet go.")],
    local_dataset_path: Annotated[
        str | None, typer.Option("--local_dataset_path", help="Folder or file with the data; not given: the hub.")
    ] = None,
    hdfs_dir: Annotated[
        str | None,
        typer.Option("--hdfs_dir", help="Folder or URL (hdfs://, s3://, ...) that gets copies of the files."),
    ] = None,
) -> None:
    """Turn a data set into parquet files for training and evaluation."""
    from posttrain.data.prepare import PREPARE

    if name not in PREPARE:
        raise InputError(f"There is no preparation for '{name}'; there is {', '.join(PREPARE)}.")
    summary = PREPARE[name](local_dataset_path, local_save_dir, hdfs_dir)
    for note in summary.pop("notes"):
        print(note)
    for split, made in summary.items():
        print(f"{split}: {made['rows']:,} rows from {', '.join(made['sources'])} -> {made['file']}")


@data_app.command("show")
def data_show(
    options: Overrides = None,
    files: Annotated[list[str] | None, typer.Option("--files", help="Rows to show; or data.train_files=.")] = None,
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Tokenizer folder or hub name.")] = None,
    chat_template: Annotated[str | None, typer.Option("--chat_template", help="File with a chat template.")] = None,
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
