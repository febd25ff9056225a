"""What differs between CPU, CUDA and other accelerators: the only file that knows."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from posttrain.errors import InputError

# dense bfloat16 peak in FLOP/s, from the makers' data sheets, by a part of the device's name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}  # fmt: skip
TOKENS_A_MICRO_BATCH = {"cpu": 4096}
TOKENS_A_MICRO_BATCH_ELSEWHERE = 16384


@dataclass(frozen=True)
class Device:
    """One device of this process."""

    torch_device: torch.device

    @property
    def type(self) -> str:
        return self.torch_device.type

    @property
    def backend(self) -> str:
        """Of torch.distributed: gloo, nccl, hccl, ..."""
        return dist.get_default_backend_for_device(self.torch_device)

    @property
    def host(self) -> torch.device:
        """Where what is offloaded lives."""
        return torch.device("cpu")

    @property
    def has_own_memory(self) -> bool:
        """False where the device computes in the host's memory."""
        return self.type != "cpu"

    def zeros_like(self, tensor: torch.Tensor, home: torch.device) -> torch.Tensor:
        """Zeros on `home`; in the host's memory pinned, so that the device copies without waiting."""
        pinned = self.has_own_memory and home == self.host
        return torch.zeros_like(tensor, device=home, pin_memory=pinned)

    @property
    def default_max_tokens(self) -> int:
        """Tokens of a micro-batch where the user says nothing."""
        return TOKENS_A_MICRO_BATCH.get(self.type, TOKENS_A_MICRO_BATCH_ELSEWHERE)

    def compute_dtype(self, wanted: str) -> torch.dtype:
        """Of forward and backward. CPUs without bfloat16 units multiply it hundreds of times slower than float32."""
        if wanted != "auto":
            return getattr(torch, wanted)
        return torch.float32 if self.type == "cpu" else torch.bfloat16

    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s that MFU is a share of: the data sheet's bfloat16 rate, or a matrix product measured now."""
        if self.type != "cpu" and dtype == torch.bfloat16:
            name = torch.get_device_module(self.torch_device).get_device_name(self.torch_device)
            for part, peak in PEAK_FLOPS.items():
                if part in name:
                    return peak
        return measured_matmul_flops(self.torch_device, dtype)

    def peak_memory_gib(self) -> float:
        """Most memory that was in use: allocated on an accelerator, resident in the process on CPU."""
        if self.type == "cpu":
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return torch.accelerator.max_memory_allocated(self.torch_device) / 2**30

    def synchronize(self) -> None:
        if self.type != "cpu":
            torch.accelerator.synchronize(self.torch_device)


def choose_device(wanted: str = "auto") -> Device:
    """The device of this process: `wanted`, or the accelerator that torch finds, or the CPU; by LOCAL_RANK."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = (found.type if found else "cpu") if wanted == "auto" else wanted
    if kind == "cpu":
        return Device(torch.device("cpu"))
    if found is None or found.type != kind:
        raise InputError(
            f"trainer.device={kind}: torch finds {found.type if found else 'no accelerator'} on this machine."
        )
    index, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    if index >= count:
        raise InputError(
            f"Process {index} has no {kind} device: this machine has {count}. Start at most {count} processes."
        )
    torch.accelerator.set_device_index(index)
    return Device(torch.device(kind, index))


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product over about `seconds`."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for the device
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
