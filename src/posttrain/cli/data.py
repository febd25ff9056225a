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
    rows: Annotated[int | None, typer.Option(help="How many rows; not given: 3, or all with --json.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a row.")] = False,
) -> None:
    """Show rows as they will be trained: trained tokens in colour. Needs no model weights."""
    from itertools import islice

    given = {"model.tokenizer_path": tokenizer, "data.chat_template": chat_template}
    config = resolve(options, given, None).config
    from posttrain.data.formats import Columns
    from posttrain.data.show import coloured, shown_rows
    from posttrain.data.sources import find_sources, read_rows
    from posttrain.loops.training_data import chat_maker

    data = config.data
    sources = find_sources(files or data.train_files, "data.train_files", data.train_split, data.hub_config)
    columns = Columns.of(data)
    wanted = islice(read_rows(sources), rows if rows is not None or as_json else 3)
    for shown in shown_rows(wanted, columns, chat_maker(config)()):
        if as_json:
            print_json(shown, indent=None)
        else:
            from rich.console import Console

            Console(highlight=False).print(coloured(shown))


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
