"""Memory in which weights pass from the trainer to a rollout server on the same machine, chunk by chunk."""

from __future__ import annotations

import mmap
import os
from typing import Any, Protocol

import torch
from torch import Tensor

from posttrain.distributed.device import shares_memory
from posttrain.rollout.vllm_server import view

ALIGNMENT = 256  # bytes, enough for every number format and every device


class Memory(Protocol):
    """Bytes that the trainer writes and the server reads."""

    def reserve(self, num_bytes: int) -> Tensor:
        """At least so many bytes (uint8); what was there may be lost."""

    def handle(self) -> dict[str, Any]:
        """What the server opens them by, as JSON; asked anew for each time that it opens them."""

    def release(self) -> None:
        """Give them back until the next `reserve`."""


class HostMemory:
    """A file that lies in memory only. Child processes find it by its descriptor; it needs no room in /dev/shm."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("posttrain-weights")
        self._bytes: Tensor | None = None

    def reserve(self, num_bytes: int) -> Tensor:
        if self._bytes is None or len(self._bytes) < num_bytes:
            os.ftruncate(self.descriptor, num_bytes)
            self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, num_bytes), dtype=torch.uint8)
        return self._bytes

    def handle(self) -> dict[str, Any]:
        assert self._bytes is not None
        return {"fd": self.descriptor, "bytes": len(self._bytes)}

    def release(self) -> None:
        self._bytes = None
        os.ftruncate(self.descriptor, 0)


class DeviceMemory:
    """Memory of a CUDA device that trainer and server share, handed over by CUDA's IPC handles: weights never leave it."""

    def __init__(self, device: torch.device):
        self.device = device
        self._bytes: Tensor | None = None

    def reserve(self, num_bytes: int) -> Tensor:
        if self._bytes is None or len(self._bytes) < num_bytes:
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._bytes

    def handle(self) -> dict[str, Any]:
        from torch.multiprocessing.reductions import reduce_tensor

        assert self._bytes is not None
        torch.accelerator.synchronize(self.device)  # what was written is there before anyone is told of it
        _, parts = reduce_tensor(self._bytes)
        (_, size, stride, start, _, _, _, storage, num_bytes, first, _, counter, counter_start, event, event_counts) = (
            parts
        )
        kept = [list(size), list(stride), start, storage, num_bytes, first, counter, counter_start, event, event_counts]
        return {"parts": [{"hex": part.hex()} if isinstance(part, bytes) else part for part in kept]}

    def release(self) -> None:
        self._bytes = None
        torch.get_device_module(self.device).ipc_collect()


def shares_device(device: torch.device, uuid: str | None) -> bool:
    """Whether this device is the one that a server named, and memory on it can be shared between processes."""
    if uuid is None or not shares_memory(device):
        return False
    return str(getattr(torch.get_device_module(device).get_device_properties(device), "uuid", "")) == uuid


def write(memory: Tensor, start: int, weight: Tensor, dtype: torch.dtype) -> int:
    """Copy a weight to `start`, in a number format and from whatever device; gives the place for the next one."""
    view(memory, name_of(dtype), weight.shape, start).copy_(weight)
    return start + size_of(weight, dtype)


def size_of(weight: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a weight takes, up to where the next one may begin."""
    return -(-weight.numel() * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
