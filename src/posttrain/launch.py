"""One command becomes N worker processes, by torch.distributed's own launcher; under torchrun it just runs."""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

EXIT_CODES = (2, 3, 130, 143)  # a worker's own, which the command gives on
# what mostly ends a process by this signal
CAUSES = {
    "SIGKILL": "the kernel for want of memory (see `dmesg`), a scheduler, or somebody",
    "SIGBUS": "most likely /dev/shm or a disk is full",
    "SIGSEGV": "a library crashed",
    "SIGABRT": "a library gave up; its own message stands above",
}
SECONDS_AROUND_THE_FIRST = 5  # failures later than that are processes that the launcher itself ended


def is_launched() -> bool:
    """Whether torchrun or another launcher has started this process among others."""
    return "LOCAL_RANK" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def run_on_processes(count: int, arguments: list[str]) -> int:
    """Run `posttrain ARGUMENTS` in `count` processes of this machine and give the exit code of the first that failed."""
    import logging
    import uuid

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # what it logs of failed processes is said below
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "posttrain", *arguments)
    except ChildFailedError as error:
        _say_who_was_lost(error.failures)
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in EXIT_CODES if code in codes), 3)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def _say_who_was_lost(failures: dict[int, ProcessFailure]) -> None:
    """Name the ranks that a signal ended; those that failed by themselves have said why."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in sorted(failures.items()):
        name = failure.signal_name() if failure.exitcode < 0 else ""
        if name and name != signal.SIGTERM.name and failure.timestamp <= first + SECONDS_AROUND_THE_FIRST:
            cause = f": {CAUSES[name]}" if name in CAUSES else ""
            print(
                f"rank {rank} (process {failure.pid}) was ended by {name}{cause}. The same command resumes from the "
                "newest checkpoint.",
                file=sys.stderr,
            )
