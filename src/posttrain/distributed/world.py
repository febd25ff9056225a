"""The processes of a run: who this one is, and how they agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from posttrain.distributed.device import Device
from posttrain.distributed.watchdog import Watchdog
from posttrain.errors import InputError, RunError

T = TypeVar("T")
# the first process may tokenize for hours while the others wait; what hangs is found by the watchdog
COLLECTIVE_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """All processes; `mesh` is None when there is one."""

    device: Device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place. Every process must call this."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_main(self, action: Callable[[], T]) -> T:
        """What `action` returns on the main process, everywhere; its InputError or RunError too. All must call this."""
        outcome: list[Any] = [None]
        if self.is_main:
            try:
                outcome = [action()]
            except (InputError, RunError) as error:
                outcome = [error]
        if self.size > 1:
            dist.broadcast_object_list(outcome)
        if isinstance(outcome[0], InputError | RunError):
            raise outcome[0]
        return outcome[0]

    def everyone(self, action: Callable[[], T]) -> T:
        """What `action` returns here; an InputError or RunError of any process is raised on all. All must call this."""
        result: Any = None
        try:
            result, error = action(), None
        except (InputError, RunError) as caught:
            error = caught
        for other in self.gather(error):
            if other is not None:
                raise other
        return result

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in the order of ranks. All must call this."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def world_size_wanted() -> int:
    """Processes that the launcher announced; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def join_world(device: Device, dtype: torch.dtype = torch.float32, watchdog: Watchdog | None = None) -> Iterator[World]:
    """This process among the others that the launcher started; alone without one.

    One process has a mesh too where FSDP2 does something for it: keep float32 weights while it computes in `dtype`.
    """
    watchdog = watchdog or Watchdog()
    size = world_size_wanted()
    if size == 1 and dtype == torch.float32:
        yield World(device, watchdog=watchdog)
        return
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    bound = None if device.type == "cpu" else device.torch_device
    dist.init_process_group(device.backend, timeout=COLLECTIVE_TIMEOUT, device_id=bound, **alone)
    try:
        mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        yield World(device, dist.get_rank(), size, mesh, watchdog)
        dist.barrier()  # nobody leaves while another still talks
    finally:
        dist.destroy_process_group()


def seed_all(*parts: int) -> None:
    """Set torch's generators from what the randomness is for, never from what ran before."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    torch.manual_seed(seed)
