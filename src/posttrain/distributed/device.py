"""What differs between CPU, CUDA and other accelerators: the only file that knows.

An accelerator is used through torch.accelerator, its own module (torch.get_device_module) and the backend that
torch.distributed holds for its type. What stands here by name is what these cannot say. docs/accelerators.md tells more.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from posttrain.errors import InputError

HOST = "cpu"
# packages that bring a device to torch, which loads them itself unless TORCH_DEVICE_BACKEND_AUTOLOAD=0
PLUGINS = {"npu": "torch_npu"}
# which devices of the machine a process sees
VISIBLE_DEVICES = {"cuda": "CUDA_VISIBLE_DEVICES", "npu": "ASCEND_RT_VISIBLE_DEVICES"}

# dense bfloat16 peak in FLOP/s, from the makers' data sheets, by a part of the device's name
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "B200": 2250e12, "A100": 312e12, "A800": 312e12,
              "L40S": 362e12, "RTX 4090": 165e12, "RTX 3090": 71e12}  # fmt: skip
# of the vocabulary at a time: a chunk stays in a CPU's cache, and keeps an accelerator busy
LOGITS_A_CHUNK = {HOST: 2**23}
LOGITS_A_CHUNK_ELSEWHERE = 2**27
# of the optimizer's averages: what is computed between decoding and coding stays in a CPU's cache
DECODED_AT_ONCE = {HOST: 2**16}
DECODED_AT_ONCE_ELSEWHERE = 2**24
TOKENS_A_MICRO_BATCH = {HOST: 4096}
TOKENS_A_MICRO_BATCH_ELSEWHERE = 16384

# HCCL sums no float64 before Ascend 950 (HcclAllReduce in CANN's API reference); Metal has no float64
SUMMED_IN_FLOAT32 = ("npu", "mps")
# torch_npu's kernel takes `grad_scale` and `found_inf` and reads neither (FusedAdamWKernelNpuOpApi.cpp of op-plugin)
FUSED_ADAMW_CLIPS = ("cpu", "cuda")
LIGER = ("cuda",)  # liger-kernel has others for Ascend, which nobody here has tried
SHARES_MEMORY = ("cuda",)  # between processes, by handles as torch.multiprocessing makes them there


@dataclass(frozen=True)
class Device:
    """One device of this process."""

    torch_device: torch.device

    @property
    def type(self) -> str:
        return self.torch_device.type

    @property
    def name(self) -> str:
        """As its maker calls it; its type where torch does not say."""
        named = getattr(self._module, "get_device_name", None)
        return named(self.torch_device) if named else self.type

    @property
    def backend(self) -> str:
        """Of torch.distributed: gloo, nccl, hccl, ..."""
        try:
            return dist.get_default_backend_for_device(self.torch_device)
        except ValueError:
            raise InputError(
                f"torch.distributed has no backend for {self.type} devices, so that they cannot work together, nor keep "
                "float32 weights beside bfloat16 ones. Start one process with model.dtype=float32."
            ) from None

    @property
    def host_backend(self) -> str:
        """Of torch.distributed, for what is in the host's memory."""
        return dist.get_default_backend_for_device(HOST)

    @property
    def group_backends(self) -> str:
        """Of a process group that sums what is on the device and what is in the host's memory."""
        if self.type == HOST:
            return self.backend
        return f"{HOST}:{self.host_backend},{self.type}:{self.backend}"

    @property
    def number(self) -> str:
        """Of this device on the machine, whichever of them this process sees."""
        index = self.torch_device.index or 0
        visible = os.environ.get(VISIBLE_DEVICES.get(self.type, ""), "").split(",")
        return visible[index] if visible[0] else str(index)

    def enter_thread(self) -> None:
        """Make this the device of the thread that calls: each begins with the first one of the machine."""
        if self.has_own_memory:
            torch.accelerator.set_device_index(self.torch_device)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The widest number format in which this device's processes can sum."""
        return torch.float32 if self.type in SUMMED_IN_FLOAT32 else torch.float64

    @property
    def fused_adamw_clips(self) -> bool:
        """Whether torch's fused AdamW is known to obey `grad_scale` and `found_inf` here."""
        return self.type in FUSED_ADAMW_CLIPS

    @property
    def host(self) -> torch.device:
        """Where what is offloaded lives."""
        return torch.device(HOST)

    @property
    def has_own_memory(self) -> bool:
        """False where the device computes in the host's memory."""
        return self.type != HOST

    @property
    def knows_pinned(self) -> bool:
        """Whether pinned memory is known as such afterwards, which not every device's package tells. FSDP2 pins again what it takes for
        unpinned, and goes on with the copy, so that the weights of the model would stay as they began."""
        return self.has_own_memory and torch.empty(1, pin_memory=True).is_pinned()

    def zeros_like(self, tensor: torch.Tensor, home: torch.device) -> torch.Tensor:
        """Zeros on `home`; in the host's memory pinned, so that the device copies without waiting."""
        pinned = self.has_own_memory and home == self.host
        return torch.zeros_like(tensor, device=home, pin_memory=pinned)

    def host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Room for the tensor's values in the host's memory, pinned where the device copies on its own."""
        return torch.empty_like(tensor, device=self.host, pin_memory=self.has_own_memory)

    @property
    def shares_prompts(self) -> bool:
        """Whether answers may go through the model with their prompt once: where attention is computed document by document."""
        return not has_varlen_attention(self.torch_device)

    @property
    def default_max_tokens(self) -> int:
        """Tokens of a micro-batch where the user says nothing."""
        return TOKENS_A_MICRO_BATCH.get(self.type, TOKENS_A_MICRO_BATCH_ELSEWHERE)

    @property
    def decoded_at_once(self) -> int:
        """How many of the optimizer's averages are decoded at the same time."""
        return DECODED_AT_ONCE.get(self.type, DECODED_AT_ONCE_ELSEWHERE)

    def compute_dtype(self, wanted: str) -> torch.dtype:
        """Of forward and backward; auto is bfloat16 on accelerators that have units for it.

        CPUs without them multiply it hundreds of times slower than float32; CUDA devices before A100 emulate it.
        """
        if wanted != "auto":
            return getattr(torch, wanted)
        return torch.bfloat16 if self._multiplies_bfloat16() else torch.float32

    def peak_flops(self, dtype: torch.dtype) -> float:
        """FLOP/s that MFU is a share of: the data sheet's bfloat16 rate, or a matrix product measured now."""
        if dtype == torch.bfloat16:
            name = self.name
            for part, peak in PEAK_FLOPS.items():
                if part in name:
                    return peak
        return measured_matmul_flops(self.torch_device, dtype)

    def peak_memory_gib(self) -> float | None:
        """Most memory that was in use: allocated on an accelerator, resident in the process on CPU; None where unknown."""
        if self.type == HOST:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        allocated = getattr(self._module, "max_memory_allocated", None)
        return allocated(self.torch_device) / 2**30 if allocated else None

    def capacity_gib(self) -> float | None:
        """Memory that this process may use: the accelerator's; on CPU its part of the machine's, or the limit set for it. None
        where unknown."""
        if self.type == HOST:
            return _host_memory_bytes() / 2**30
        told = getattr(self._module, "mem_get_info", None)
        return told(self.torch_device)[1] / 2**30 if told else None

    def reset_peak_memory(self) -> None:
        """Begin to count the peak anew, where the device can."""
        reset = getattr(self._module, "reset_peak_memory_stats", None) if self.type != HOST else None
        if reset:
            reset(self.torch_device)

    def empty_cache(self) -> None:
        """Give back the memory that torch keeps for later, where another process works on the device too."""
        empty = getattr(self._module, "empty_cache", None) if self.type != HOST else None
        if empty:
            empty()

    def synchronize(self) -> None:
        """Wait for what was dispatched to this device."""
        if self.type != HOST:
            torch.accelerator.synchronize(self.torch_device)

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.torch_device)

    def _multiplies_bfloat16(self) -> bool:
        if self.type == HOST:
            return False
        if self.type == "cuda":
            return torch.cuda.is_bf16_supported(including_emulation=False)
        supported = getattr(self._module, "is_bf16_supported", None)
        return supported() if supported else True


def choose_device(wanted: str = "auto") -> Device:
    """The device of this process: `wanted`, or the accelerator that torch finds, or the CPU; by LOCAL_RANK."""
    _load_plugins(wanted)
    found = torch.accelerator.current_accelerator(check_available=True)
    accelerator = found.type if found else None
    kind = (accelerator or HOST) if wanted == "auto" else wanted
    if kind == HOST:
        return Device(torch.device(HOST))
    if kind != accelerator:
        choices = ", ".join(filter(None, ("auto", HOST, accelerator)))
        raise InputError(
            f"trainer.device={kind}: torch {torch.__version__} finds {accelerator or 'no accelerator'} on this machine. "
            f"Expected one of {choices}."
        )
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.accelerator.device_count()
    started = max(local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if started > count:  # said by every process, since only the first one is heard
        raise InputError(f"{started} processes need a {kind} device each, and torch finds {count} on this machine. "
                         f"Set trainer.n_gpus_per_node={count}, or start so many.")  # fmt: skip
    torch.accelerator.set_device_index(local_rank)
    return Device(torch.device(kind, local_rank))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether it says that there was no memory left. Allocators of CPUs and of some accelerators have no error of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _host_memory_bytes() -> float:
    """Of this machine or this container, shared by the processes started here; less where a limit is set for each."""
    machine = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (limit := container.read_text().strip()).isdecimal():
        machine = min(machine, float(limit))
    own = resource.getrlimit(resource.RLIMIT_AS)[0]
    shared = machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return shared if own == resource.RLIM_INFINITY else min(shared, float(own))


@cache
def has_varlen_attention(device: torch.device) -> bool:
    """Whether torch.nn.attention.varlen, flash attention over packed rows, runs there: on CUDA from A100 on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_liger(device: torch.device) -> bool:
    """Whether Liger's kernels, which are written in Triton, are used there."""
    return device.type in LIGER


def environment_with(numbers: str) -> dict[str, str]:
    """In which a process sees these devices of the machine alone, a list of their numbers; none where it is empty."""
    return dict.fromkeys(VISIBLE_DEVICES.values(), numbers)


def shares_memory(device: torch.device) -> bool:
    """Whether another process on the machine can be given memory of the device."""
    return device.type in SHARES_MEMORY


def tokens_between_looks(device: torch.device) -> int:
    """How seldom answers that are being written are looked at for those that have ended: on an accelerator that waits for all that
    was dispatched."""
    return 1 if device.type == "cpu" else 8


def logits_a_chunk(device: torch.device) -> int:
    """How many logits of the vocabulary are held at the same time."""
    return LOGITS_A_CHUNK.get(device.type, LOGITS_A_CHUNK_ELSEWHERE)


def measured_matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """The best rate of a square matrix product over about `seconds`, at a size that keeps the device busy."""
    size = 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    while size < 8192 and min(_seconds_of_product(a), _seconds_of_product(a)) < 0.002:
        size *= 2
        a = torch.randn(size, size, device=device, dtype=dtype)
    _seconds_of_product(a)  # the first one of a size may load or compile its kernel
    best, stop = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < stop:
        best = max(best, 2 * size**3 / _seconds_of_product(a))
    return best


def _seconds_of_product(a: torch.Tensor) -> float:
    start = time.perf_counter()
    (a @ a)[0, 0].item()  # waits for the device
    return time.perf_counter() - start


def _load_plugins(wanted: str) -> None:
    """Import the package that brings `wanted` to torch; for auto, whichever is installed. Raises InputError."""
    for kind, package in PLUGINS.items():
        if wanted not in ("auto", kind):
            continue
        if find_spec(package):
            _load_plugin(package, wanted)
        elif wanted == kind:
            raise InputError(
                f"trainer.device={kind} needs the package {package} in the version of torch, {torch.__version__}; it is not "
                "installed. docs/npu.md has the commands."
            )


def _load_plugin(package: str, wanted: str) -> None:
    try:
        import_module(package)
    except (ImportError, OSError, RuntimeError) as error:  # a driver's library is missing, or of another version
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"trainer.device={wanted}: {package} is installed and cannot be loaded: {reason}. Set up its driver and "
            f"libraries in this shell, or choose trainer.device={HOST}."
        ) from None
