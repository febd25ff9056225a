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

from posttrain.config.schema import EngineOptions
from posttrain.distributed.device import Device
from posttrain.distributed.sequence import Sequence
from posttrain.distributed.watchdog import Watchdog
from posttrain.errors import InputError, RunError
from posttrain.wording import counted

T = TypeVar("T")
# the first process may tokenize for hours while the others wait; what hangs is found by the watchdog
COLLECTIVE_TIMEOUT = timedelta(hours=6)


@dataclass(frozen=True)
class World:
    """All processes, seen two ways.

    `mesh` lays weights over them: its axis `shard` cuts one copy, its axis `replicate`, if there is one, counts copies; it
    is None where nothing is cut. `sequence` holds those that share this one's rows, None where each has its own.
    """

    device: Device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None
    sequence: Sequence | None = None
    watchdog: Watchdog = field(default_factory=Watchdog)

    @property
    def is_main(self) -> bool:
        """True on the one process that prints and writes."""
        return self.rank == 0

    @property
    def num_readers(self) -> int:
        """Groups of processes that each read rows of their own."""
        return self.size // self.sequence.size if self.sequence else self.size

    @property
    def reader(self) -> int:
        """Which of those this process belongs to."""
        return self.rank // self.sequence.size if self.sequence else self.rank

    @property
    def counts(self) -> bool:
        """True on one of the processes that share a row: what all of them know is counted there."""
        return self.sequence is None or self.sequence.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place. Every process must call this."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def sum_over_readers(self, tensor: Tensor) -> Tensor:
        """The same where processes that share a row hold the same number, which counts once."""
        if not self.counts:
            tensor.zero_()
        return self.sum(tensor)

    def sum_over_shards(self, tensor: Tensor) -> Tensor:
        """The sum over the processes that share one copy of the weights, in place. Every process must call this."""
        if self.mesh is not None and self.mesh.ndim > 1:
            dist.all_reduce(tensor, group=self.mesh.get_group("shard"))
            return tensor
        return self.sum(tensor)

    def total(self, numbers: float | list[float]) -> Tensor:
        """The sum of plain numbers over the readers, on the device. Every process must call this."""
        device = self.device
        return self.sum_over_readers(torch.tensor(numbers, dtype=device.sum_dtype, device=device.torch_device))

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
def join_world(
    device: Device,
    dtype: torch.dtype = torch.float32,
    layout: EngineOptions | None = None,
    watchdog: Watchdog | None = None,
    kept_dtype: torch.dtype = torch.float32,
) -> Iterator[World]:
    """This process among the others that the launcher started; alone without one.

    One process has a mesh too where FSDP2 does something for it: keep weights in `kept_dtype` while it computes in `dtype`, or
    keep them on another device. Raises InputError where the processes cannot be laid out as asked.
    """
    layout, watchdog = layout or EngineOptions(), watchdog or Watchdog()
    size = world_size_wanted()
    shard_size = _checked_sizes(layout, size)
    offloads = layout.param_offload or (layout.reference_offload and device.has_own_memory)
    if size == 1 and dtype == kept_dtype and not offloads:
        yield World(device, watchdog=watchdog)
        return
    dist.init_process_group(
        device.group_backends,
        store=_store(size),
        rank=int(os.environ["RANK"]) if size > 1 else 0,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    try:
        if shard_size == size:
            mesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        else:
            mesh = init_device_mesh(
                device.type, (size // shard_size, shard_size), mesh_dim_names=("replicate", "shard")
            )
        sequence = Sequence.of(layout.ulysses_sequence_parallel_size, COLLECTIVE_TIMEOUT)
        yield World(device, dist.get_rank(), size, mesh, sequence, watchdog)
        # nobody leaves while another still talks; a barrier would guess the device of this process
        dist.all_reduce(torch.zeros((), device=device.torch_device))
        device.synchronize()
    finally:
        dist.destroy_process_group()


def _store(size: int) -> dist.Store:
    """Where the processes leave their addresses for each other.

    torchrun keeps its store when it starts workers again, with the addresses of those that are gone (pytorch issue
    135712): on one machine, whose workers all know the number of the restart, each restart gets names of its own.
    """
    if size == 1:
        return dist.HashStore()
    store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
    on_one_machine = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0) if on_one_machine else 0}", store)


def _checked_sizes(layout: EngineOptions, size: int) -> int:
    """Processes that share one copy of the weights. Raises InputError."""
    wanted = {
        "engine.fsdp_size": min(layout.fsdp_size or size, size),
        "engine.ulysses_sequence_parallel_size": layout.ulysses_sequence_parallel_size,
    }
    for option, number in wanted.items():
        if size % number:
            raise InputError(
                f"{option}={number} does not divide the {counted(size, 'process', 'processes')} of this run. Start "
                f"a multiple of {number} (trainer.n_gpus_per_node), or choose a divisor of {size}."
            )
    return wanted["engine.fsdp_size"]


def seed_all(*parts: int) -> None:
    """Set torch's generators from what the randomness is for, never from what ran before."""
    seed = 0
    for part in parts:
        seed = (seed * 1_000_003 + part + 1) % 2**63
    torch.manual_seed(seed)
