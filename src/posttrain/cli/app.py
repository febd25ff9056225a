"""The subcommands but those of `data`, each a few lines, and what an error becomes. Options are checked before heavy imports."""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from posttrain import __version__
from posttrain.cli.begin import (
    AsJson,
    ConfigName,
    ConfigPath,
    DataPath,
    DumpGradients,
    Help,
    Model,
    OutputDir,
    Overrides,
    PrintConfig,
    check_needed,
    dated,
    hand_to_processes,
    home_of,
    is_main,
    of_hydra,
    print_json,
    resolve,
    say_resolved,
)
from posttrain.cli.data import data_app
from posttrain.cli.recipes import recipes_app
from posttrain.errors import InputError, LocalError, LostContact, RunError, RunStopped
from posttrain.wording import counted

if TYPE_CHECKING:
    from posttrain.config.compose import Resolved

# typer imports pydantic to check a flag that nobody gave and that has no default, as its own --help: a fifth of `posttrain recipes`
HELP_NOT_GIVEN = {"help": False}
app = typer.Typer(
    context_settings={"default_map": {**HELP_NOT_GIVEN, "recipes": HELP_NOT_GIVEN}},
    help="Teach language models after pretraining: fine-tune, reinforce, evaluate, look at the data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data_app, name="data")
app.add_typer(recipes_app, name="recipes")


@app.command(context_settings={"help_option_names": []})
def sft(
    context: typer.Context,
    options: Overrides = None,
    model: Model = None,
    data_path: DataPath = None,
    output_dir: OutputDir = None,
    eval_only: Annotated[bool, typer.Option("--eval_only", help="Print the validation loss of --checkpoint.")] = False,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
    dump_gradients: DumpGradients = None,
    config_path: ConfigPath = None,
    config_name: ConfigName = None,
    help_: Help = False,
) -> None:
    """Fine-tune a model on conversations with given answers (SFT)."""
    if help_:
        _print_help(context)
        return
    given = {"model.path": model, "data.train_files": data_path, "trainer.default_local_dir": output_dir}
    options = [*of_hydra(config_path, config_name), *(options or [])]
    resolved = resolve(options, given, model if eval_only else None, "sft")
    if print_config:
        _print_config(resolved, as_json)
        return
    check_needed(resolved, "sft", needs_val=eval_only)
    if hand_to_processes(resolved):
        return
    if not eval_only:
        say_resolved(resolved)
        from posttrain.loops.sft import sft as run

        resolved = dated(resolved)
        run(resolved.config, resolved.as_yaml(), dump_gradients)
        return
    from posttrain.loops.sft import evaluate_loss

    found = evaluate_loss(resolved.config)
    if is_main():
        print_json(found) if as_json else print(*(f"{name}={value:.6g}" for name, value in found.items()))


@app.command(context_settings={"help_option_names": []})
def grpo(
    context: typer.Context,
    options: Overrides = None,
    model: Model = None,
    data_path: DataPath = None,
    output_dir: OutputDir = None,
    print_config: PrintConfig = False,
    as_json: AsJson = False,
    dump_gradients: DumpGradients = None,
    completions: Annotated[
        str | None, typer.Option("--completions", help="Learn from the answers in this file (JSON lines).")
    ] = None,
    config_path: ConfigPath = None,
    config_name: ConfigName = None,
    help_: Help = False,
) -> None:
    """Let a model learn from its own answers and rewards (GRPO)."""
    if help_:
        _print_help(context)
        return
    given = {"model.path": model, "data.train_files": data_path, "trainer.default_local_dir": output_dir}
    resolved = resolve([*of_hydra(config_path, config_name), *(options or [])], given, None, "grpo")
    if print_config:
        _print_config(resolved, as_json)
        return
    check_needed(resolved, "grpo", needs_val=False)
    if hand_to_processes(resolved):
        return
    say_resolved(resolved)
    from posttrain.loops.grpo import grpo as run

    resolved = dated(resolved)
    run(resolved.config, resolved.as_yaml(), dump_gradients, completions)


@app.command()
def evaluate(
    options: Overrides = None,
    model: Model = None,
    test_file: Annotated[list[str] | None, typer.Option("--test_file", help="Problems with known answers.")] = None,
    limit: Annotated[int | None, typer.Option(help="Answer only the first so many.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where each answer is written (evaluation.jsonl).")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer problems and print the accuracy with its 95% interval."""
    given = [f"data.val_files={test_file!r}"] if test_file else []
    resolved = resolve([*(options or []), *given], {"model.path": model}, model)
    files, rollout = resolved.config.data.val_files, resolved.config.rollout
    if not files:
        raise InputError("Which problems? Give --test_file test.parquet.")
    if (rollout.n or 1) > 1 and not rollout.temperature:
        raise InputError(
            f"rollout.n={rollout.n} at temperature 0 is the same answer {rollout.n} times; give rollout.temperature, such as 1."
        )
    if hand_to_processes(resolved):
        return
    say_resolved(resolved, given_here=True)
    output = output or home_of(resolved) / "evaluation.jsonl"
    from posttrain.loops.evaluate import evaluate as run

    accuracy = run(resolved.config, files, output, limit)
    if not is_main():
        return
    if as_json:
        print_json({
            "accuracy": accuracy.share, "low": accuracy.low, "high": accuracy.high,
            "num_problems": accuracy.num_problems, "num_correct": accuracy.num_correct,
            "num_unknown": accuracy.num_unknown, **{f"pass_at_{k}": chance for k, chance in accuracy.pass_at.items()},
        })  # fmt: skip
        return
    unknown = f"; {accuracy.num_unknown} could not be judged" if accuracy.num_unknown else ""
    for k, chance in accuracy.pass_at.items():
        print(f"pass@{k} {chance:.1%}")
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
    resolved = resolve(options, {"model.path": model}, model)
    data = resolved.config.data
    files = prompts or data.val_files or data.train_files
    if not files:
        raise InputError("What shall it answer? Give --prompts FILE with the rows to answer.")
    if hand_to_processes(resolved):
        return
    from posttrain.loops.evaluate import generate as run
    from posttrain.run.folder import RunFolder

    home = home_of(resolved)
    state = RunFolder(home).read_state()
    of_run = home / "samples" / f"step-{state.step if state else 0}.jsonl"
    if state and of_run.exists() and '"ids"' in of_run.open().readline():  # what the run itself answered there
        of_run = of_run.with_name(f"generated-{state.step}.jsonl")
    output = output or (of_run if state else home / "samples.jsonl")
    answers = run(resolved.config, files, output, num_samples)
    if is_main():
        for answer in answers[:show]:
            print(f"--- {answer.question or '(no question)'}\n{answer.completion.text}  [{answer.verdict}]")
        print(f"{counted(len(answers), 'sample')}: {output}")


@app.command()
def quickstart(
    folder: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("quickstart-run"),
    seed: Annotated[int, typer.Option(help="Another one gives other problems and other first weights.")] = 0,
) -> None:
    """From nothing to a trained, evaluated model in a few minutes."""
    from posttrain.quickstart.journey import quickstart as run

    run(folder, seed)


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
    if sys.__stderr__ is not None and not faulthandler.is_enabled():  # a crash in native code says in which line
        faulthandler.enable(sys.__stderr__)
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
    except LostContact as error:
        if is_main() or not _is_started_by_us():  # where rank 0 is the one that is gone, another must say so
            print(error, file=sys.stderr)
        return 3
    except LocalError as error:
        if not _tell_launcher(error):
            _complain(error, of_any_rank=True)
        return 3
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
    if is_main():
        print(error, file=sys.stderr)
    elif of_any_rank:
        print(f"rank {os.environ['RANK']}: {error}", file=sys.stderr)


def _tell_launcher(error: Exception) -> bool:
    """Leave the error for the launcher, which knows what failed first; True where it is ours and prints that."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return False
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
    return _is_started_by_us()


def _is_started_by_us() -> bool:
    """Whether our launcher started this worker: it says which one was lost."""
    return os.environ.get("ROLE_NAME") == "posttrain"


def _print_help(context: typer.Context) -> None:
    from rich.console import Console

    from posttrain.config.compose import compose
    from posttrain.config.describe import describe_options

    print(context.get_help())
    Console(highlight=False).print(describe_options(compose([], context.info_name).config))


def _print_config(resolved: Resolved, as_json: bool) -> None:
    from rich.console import Console

    print(resolved.as_json()) if as_json else Console(highlight=False).print(resolved, soft_wrap=True)
