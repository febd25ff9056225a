"""One command becomes N worker processes, by torch.distributed's own launcher; under torchrun it just runs."""

from __future__ import annotations

import os
import sys

EXIT_CODES = (2, 3, 130, 143)  # a worker's own, which the command gives on


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
        codes = {failure.exitcode for failure in error.failures.values()}
        return next((code for code in EXIT_CODES if code in codes), 3)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0
