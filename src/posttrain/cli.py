"""The subcommands, each a few lines. Options are checked before anything heavy is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain import __version__
from posttrain.errors import InputError, RunError, RunStopped

if TYPE_CHECKING:
    from posttrain.config.compose import Resolved

app = typer.Typer(
    help="Teach language models after pretraining: fine-tune, evaluate, look at the data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Prepare data, and look at it as it will be trained.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OPTION=VALUE | RECIPE.yaml]...", help="Options in Hydra's grammar, and recipe files."),
]
Model = Annotated[
    str | None,
    typer.Option("--model", "--model_path", "--checkpoint", help="A model folder, a run folder, or a hub name."),
]


@app.command(context_settings={"help_option_names": []})
def sft(
    context: typer.Context,
    options: Overrides = None,
    model: Model = None,
    data_path: Annotated[str | None, typer.Option("--data_path", help="Short for data.train_files=.")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Short for trainer.default_local_dir=.")
    ] = None,
    eval_only: Annotated[bool, typer.Option("--eval_only", help="Print the validation loss of --checkpoint.")] = False,
    print_config: Annotated[bool, typer.Option("--print_config", help="Print the resolved options and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable output.")] = False,
    dump_gradients: Annotated[
        str | None, typer.Option("--dump_gradients", help="Write the first step's gradients there and stop.")
    ] = None,
    help_: Annotated[bool, typer.Option("--help", is_eager=True, help="Show this and every option.")] = False,
) -> None:
    """Fine-tune a chat model on conversations (supervised fine-tuning)."""
    if help_:
        _print_help(context)
        return
    given = {"model.path": model, "data.train_files": data_path, "trainer.default_local_dir": output_dir}
    resolved = _resolve(options, given, model if eval_only else None)
    if print_config:
        _print_config(resolved, as_json)
        return
    _check_needed(resolved, needs_val=eval_only)
    if _hand_to_processes(resolved):
        return
    if not eval_only:
        _say_ignored(resolved)
        from posttrain.loops.sft import sft as run

        run(resolved.config, resolved.as_yaml(), dump_gradients)
        return
    from posttrain.loops.sft import evaluate_loss

    found = evaluate_loss(resolved.config)
    if _is_main():
        _print_json(found) if as_json else print(*(f"{name}={value:.6g}" for name, value in found.items()))


@app.command()
def evaluate(
    options: Overrides = None,
    model: Model = None,
    test_file: Annotated[list[str] | None, typer.Option("--test_file", help="Problems with known answers.")] = None,
    limit: Annotated[int | None, typer.Option(help="Answer only the first so many.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where each answer is written (evaluation.jsonl).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print machine-readable output.")] = False,
) -> None:
    """Answer problems and print the accuracy with its 95% interval."""
    resolved = _resolve(options, {"model.path": model}, model)
    files = test_file or resolved.config.data.val_files
    if not files:
        raise InputError("Which problems? Give --test_file test.parquet.")
    if _hand_to_processes(resolved):
        return
    output = output or _home_of(resolved) / "evaluation.jsonl"
    from posttrain.loops.evaluate import evaluate as run

    accuracy = run(resolved.config, files, output, limit)
    if not _is_main():
        return
    if as_json:
        _print_json({
            "accuracy": accuracy.share, "low": accuracy.low, "high": accuracy.high,
            "num_problems": accuracy.num_problems, "num_correct": accuracy.num_correct,
            "num_unknown": accuracy.num_unknown,
        })  # fmt: skip
        return
    unknown = f"; {accuracy.num_unknown} could not be judged" if accuracy.num_unknown else ""
    print(f"accuracy {accuracy}{unknown}\neach answer with its verdict: {output}")


@app.command()
def generate(
    options: Overrides = None,
    model: Model = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompts", "--test_file", help="Rows to answer.")] = None,
    num_samples: Annotated[int, typer.Option("--num_samples", min=1, help="How many to answer.")] = 100,
    output: Annotated[Path | None, typer.Option(help="Where the samples are written.")] = None,
    show: Annotated[int, typer.Option(help="How many to print as well.")] = 3,
) -> None:
    """Write a model's answers, to look at."""
    resolved = _resolve(options, {"model.path": model}, model)
    data = resolved.config.data
    files = prompts or data.val_files or data.train_files
    if not files:
        raise InputError("What shall it answer? Give --prompts FILE with the rows to answer.")
    if _hand_to_processes(resolved):
        return
    from posttrain.loops.evaluate import generate as run
    from posttrain.run.folder import RunFolder

    home = _home_of(resolved)
    state = RunFolder(home).read_state()
    output = output or (home / "samples" / f"step-{state.step}.jsonl" if state else home / "samples.jsonl")
    answers = run(resolved.config, files, output, num_samples)
    if _is_main():
        for answer in answers[:show]:
            print(f"--- {answer.conversation.messages[0].get('content')}\n{answer.completion.text}  [{answer.verdict}]")
        print(f"{len(answers)} samples: {output}")


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("quickstart-run"),
    seed: Annotated[int, typer.Option(help="Another one gives other problems and other first weights.")] = 0,
) -> None:
    """From nothing to a trained, evaluated model, on this machine alone, in a few minutes."""
    from posttrain.quickstart.journey import quickstart as run

    run(folder, seed)


@data_app.command("prepare")
def data_prepare(
    name: Annotated[str, typer.Argument(help="Which data set: gsm8k.")],
    local_save_dir: Annotated[str, typer.Option("--local_save_dir", help="Where train.parquet and test.parquet go.")],
    local_dataset_path: Annotated[
        str | None, typer.Option("--local_dataset_path", help="Folder with the data; not given: the hub.")
    ] = None,
) -> None:
    """Turn a data set into parquet files for training and evaluation."""
    from posttrain.data.prepare import PREPARE

    if name not in PREPARE:
        raise InputError(f"There is no preparation for '{name}'; there is {', '.join(PREPARE)}.")
    summary = PREPARE[name](local_dataset_path, local_save_dir)
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
    config = _resolve(options, given, None).config
    from posttrain.data.formats import Columns
    from posttrain.data.show import coloured, shown_rows
    from posttrain.data.sources import find_sources, read_rows
    from posttrain.loops.training_data import chat_maker

    data = config.data
    sources = find_sources(files or data.train_files, "data.train_files", data.train_split, data.hub_config)
    columns = Columns(data.messages_key, data.prompt_key, data.response_key)
    wanted = islice(read_rows(sources), rows if rows is not None or as_json else 3)
    for shown in shown_rows(wanted, columns, chat_maker(config)()):
        if as_json:
            _print_json(shown, indent=None)
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
    config = _resolve(options, {}, None).config
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
        _print_json({"step": step, "rows": rows}, indent=None) if as_json else print(f"step {step}: {rows}")


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point: turns what commands raise into one message and an exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    code = _exit_code(lambda: app(standalone_mode=False))
    if code and "RANK" in os.environ:  # threads of a group that broke can abort the interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _exit_code(command: Callable[[], object]) -> int:
    try:
        result = command()
        return result if isinstance(result, int) else 0
    except (InputError, RunError) as error:
        _complain(error)
        return 2 if isinstance(error, InputError) else 3
    except RunStopped as error:
        _complain(error)
        return 128 + error.signal_number
    except typer.Exit as error:
        return error.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _complain(RunError("Stopped before anything was saved."))
        return 130
    except Exception as error:
        if hasattr(error, "show") and hasattr(error, "exit_code"):  # a wrong flag, as typer's own kind of error
            error.show()
            return error.exit_code
        told = _tell_launcher(error)
        if os.environ.get("POSTTRAIN_TRACEBACK"):
            raise
        if told:
            return 3
        _complain(
            RunError(f"{type(error).__name__}: {error}\nSet POSTTRAIN_TRACEBACK=1 to see where."), of_any_rank=True
        )
        return 3


def _complain(error: Exception, of_any_rank: bool = False) -> None:
    """Print it; what all ranks have agreed on is said by the main one alone."""
    if _is_main():
        print(error, file=sys.stderr)
    elif of_any_rank:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)


def _tell_launcher(error: Exception) -> bool:
    """Leave the error for the launcher, which knows what failed first; True where it is ours and prints that."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return os.environ.get("ROLE_NAME") == "posttrain"


def _is_main() -> bool:
    """Whether this process speaks for all: of workers the first, of Slurm's tasks the first."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def _resolve(options: list[str] | None, given: dict[str, str | None], model: str | None) -> Resolved:
    """The options in force: those of the run that `model` lies in, then the command line's, then the flags'."""
    from posttrain.config.compose import compose
    from posttrain.run.folder import find_run

    run = find_run(model) if model else None
    saved = [str(run / "config.yaml")] if run else []
    flags = [f"{key}={value!r}" for key, value in given.items() if value is not None]
    if run:  # its export holds weights, tokenizer and template, whatever it began from
        flags += ["~model.random_weights", "~model.override_config", "~model.tokenizer_path", "~model.revision"]
        flags += ["~data.chat_template", "~model.lora_rank", "~model.lora_adapter_path"]
    here = ["~trainer.nnodes", "~trainer.rdzv_endpoint", "~trainer.max_restarts"] if run else []  # not where it trained
    return compose([*saved, *here, *(options or []), *flags])


def _check_needed(resolved: Resolved, needs_val: bool) -> None:
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
        raise InputError(
            f"Missing: {', '.join(f'{option}=...' for option in missing)}. `posttrain sft --help` explains each."
        )
    find_model(config.model.path)
    find_sources(config.data.train_files, "data.train_files")
    if config.data.val_files:
        find_sources(config.data.val_files, "data.val_files")


def _hand_to_processes(resolved: Resolved) -> bool:
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


def _home_of(resolved: Resolved) -> Path:
    """The run folder that the model belongs to, or the current folder."""
    from posttrain.run.folder import find_run

    return find_run(resolved.config.model.path or "") or Path()


def _print_help(context: typer.Context) -> None:
    from rich.console import Console

    from posttrain.config.describe import describe_options

    print(context.get_help())
    Console(highlight=False).print(describe_options())


def _print_config(resolved: Resolved, as_json: bool) -> None:
    from rich.console import Console

    print(resolved.as_json()) if as_json else Console(highlight=False).print(resolved)


def _say_ignored(resolved: Resolved) -> None:
    if _is_main():
        for ignored in resolved.ignored:
            print(f"no effect in this run: {ignored['key']}: {ignored['reason']}", file=sys.stderr)


def _print_json(value: object, indent: int | None = 2) -> None:
    import json

    print(json.dumps(value, indent=indent, ensure_ascii=False), flush=True)
