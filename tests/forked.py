"""The posttrain command in processes forked from one that has imported everything: a second instead of ten."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

WARM = [
    "posttrain.models", "torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.distributed.checkpoint.staging",
    "torch.distributed.tensor", "transformers.models.auto.modeling_auto", "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen2.tokenization_qwen2", "transformers.generation", "safetensors.torch", "pyarrow.parquet",
    "hydra.core.override_parser.overrides_parser", "omegaconf", "fsspec", "numpy.ma", "rich._emoji_codes",
    "transformers.models.qwen3.modeling_qwen3", "transformers.models.llama.modeling_llama", "peft",
    "posttrain.cli.app", "posttrain.loops.sft", "posttrain.loops.grpo", "posttrain.loops.evaluate", "posttrain.config.compose",
    "warmed",
]  # fmt: skip
SECONDS = 120  # longer than anything here should ever take


@dataclass(frozen=True)
class Moment:
    """Just before a process does something to a file: an audit event of Python, and the path that it is done to."""

    event: str
    path: str  # a regular expression
    occurrence: int = 1
    rank: int = 0


def start_server() -> None:
    """Import everything once, before any thread is there. Processes that tests fork inherit one thread for torch."""
    here = str(Path(__file__).parent)  # Python 3.11 gives the server no path of ours
    wanted = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    multiprocessing.get_context("forkserver").set_forkserver_preload(WARM)
    forkserver.ensure_running()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@dataclass
class Group:
    """What runs in `size` processes."""

    size: int
    said: Path
    store: TCPStore  # through which they find each other; it ends with the group
    processes: list[Any] = field(default_factory=list)

    def wait(self, seconds: float = SECONDS) -> list[int]:
        """Exit codes; -9 for what was killed. Fails where one does not end."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        hung = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for rank in hung:
            os.kill(self.processes[rank].pid, signal.SIGABRT)  # upon which it writes its stacks
            self.processes[rank].join(5.0)
        self.kill(hung)
        assert not hung, f"processes {hung} of {self.size} did not end:\n{self.output()}"
        return [process.exitcode for process in self.processes]

    def ends(self, codes: list[int], seconds: float = SECONDS) -> None:
        """Fails where its processes end with others."""
        assert (found := self.wait(seconds)) == codes, f"exit codes {found}:\n{self.output()}"

    def kill(self, ranks: list[int]) -> None:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGKILL)
                self.processes[rank].join()

    def output(self) -> str:
        return self.said.read_text()


def start(function: Callable[..., None], size: int, *arguments: Any, said: Path) -> Group:
    """Start `function(rank, size, *arguments)` in `size` processes that find each other as torchrun's do."""
    context = multiprocessing.get_context("forkserver")
    # the system chooses the port, and no other takes it
    group = Group(size, said, TCPStore("localhost", 0, is_master=True, wait_for_workers=False))
    said.write_text("")
    for rank in range(size):
        process = context.Process(target=_run, args=(function, rank, size, group.store.port, said, arguments))
        process.start()
        group.processes.append(process)
    return group


def sft(rank: int, size: int, options: list[str], die: Moment | None = None, rows_to: Path | None = None) -> None:
    """`posttrain sft OPTIONS`, killed at a moment; `rows_to`: write which rows each step takes into that folder."""
    from posttrain import cli

    if rows_to is not None:
        _note_rows(rows_to)
    if die is not None and die.rank == rank:
        _die_at(die)
    sys.argv = ["posttrain", "sft", *options]
    cli.main()


def command(rank: int, size: int, arguments: list[str]) -> None:
    """`posttrain ARGUMENTS`."""
    from posttrain import cli

    sys.argv = ["posttrain", *arguments]
    cli.main()


def run(arguments: list[Any], folder: Path, size: int = 1, code: int = 0, begin: Callable[..., None] = command) -> str:
    """What `posttrain ARGUMENTS` said in so many processes. Fails where one ends with another code, or by a traceback.
    `begin`: what changes something first, and then calls `command`."""
    group = start(begin, size, [str(argument) for argument in arguments], said=folder / "said")
    group.ends([code] * size)
    assert "Traceback" not in group.output(), group.output()
    return group.output()


def _run(function: Callable, rank: int, size: int, port: int, said: Path, arguments: tuple) -> None:
    stream = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    faulthandler.enable(2)
    if size > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    function(rank, size, *arguments)


def meet_again(number: int) -> None:
    """Called by all processes of a group before they join a world once more: as if torchrun had restarted them so many times."""
    os.environ |= {"GROUP_WORLD_SIZE": "1", "TORCHELASTIC_RESTART_COUNT": str(number)}


def _die_at(moment: Moment) -> None:
    left = [moment.occurrence]

    def hook(event: str, arguments: tuple) -> None:
        if event == moment.event and re.search(moment.path, str(arguments[0])):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _note_rows(folder: Path) -> None:
    """Each process appends `step row row ...` for the rows that it was given, in the order that it trains them."""
    from posttrain.loops.training_data import TrainingData

    given = TrainingData.micro_batches

    def noting(data, step, world):
        micro_batches = given(data, step, world)
        rows = [row for micro_batch in micro_batches for row in micro_batch.rows_N]
        with open(folder / f"rows-{world.rank}", "a") as stream:
            print(step, *rows, file=stream)
        return micro_batches

    TrainingData.micro_batches = noting
