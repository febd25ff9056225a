"""The pretended accelerator as a package brings one to torch: its device, its module, its backend of torch.distributed.

The device is called what follows `torch_` in the name that this file is copied to. As torch_npu it behaves as Ascend's does
where that matters: the backend hccl sums no float64, and the fused AdamW neither clips nor skips.
"""

from __future__ import annotations

import types
from pathlib import Path

import torch
from torch._C._distributed_c10d import ProcessGroupGloo
from torch.distributed import Backend

NAME = __name__.removeprefix("torch_")
BACKEND = "hccl" if NAME == "npu" else "steam"
BACKENDS_MADE: list[str] = []


class Stream(torch.cpu.Stream):
    """Every operator has ended when it returns."""

    def synchronize(self) -> None: ...


def autoload() -> None:
    """What torch calls when it loads the packages that bring devices; importing this one has done it."""


def make_module() -> types.ModuleType:
    """torch.<name>: as little as torch asks of one, so neither memory statistics nor a name."""
    cpu = torch.cpu
    module = types.ModuleType(f"torch.{NAME}")
    module.__dict__.update(
        is_available=lambda: True,
        is_initialized=lambda: True,
        device_count=lambda: 2,
        current_device=torch.accelerator.current_device_index,
        set_device=torch.accelerator.set_device_index,
        synchronize=lambda device=None: None,
        Stream=Stream,
        Event=cpu.Event,
        StreamContext=cpu.StreamContext,
        stream=cpu.stream,
        current_stream=lambda device=None: Stream(),
        get_amp_supported_dtype=lambda: [torch.bfloat16],
        manual_seed_all=lambda seed: None,  # its random operators draw from the CPU's generator
        _is_in_bad_fork=lambda: False,
    )
    return module


def make_backend(store, rank: int, size: int, timeout) -> ProcessGroupGloo:
    BACKENDS_MADE.append(BACKEND)
    return ProcessGroupGloo(store, rank, size, timeout=timeout)


def __getattr__(name: str) -> None:
    if name.startswith("npu_"):  # kernels that transformers imports where it finds torch_npu
        return None
    raise AttributeError(name)


torch.ops.load_library(str(Path(__file__).with_name("device.so")))
torch.utils.rename_privateuse1_backend(NAME)
torch._register_device_module(NAME, make_module())
Backend.register_backend(BACKEND, make_backend, devices=[NAME, "cpu"])
if NAME == "npu":
    torch.ops.teapot.be_like_ascend()
