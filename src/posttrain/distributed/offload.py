"""Inputs of recomputed blocks in the host's memory between forward and backward pass, copied while the device computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from posttrain.distributed.device import Device


@dataclass
class Away:
    """A tensor whose values are in the host's memory."""

    host: Tensor
    before: Away | None  # the one that left before it, and is needed after it
    here: Tensor | None  # on the device, where it has been sent for or has not left yet
    copied: torch.Event  # when the last copy is done, out or back


class ActivationOffload:
    """Copies on a stream of its own: a tensor leaves while the next block computes, and is sent for one block before its turn.

    So the device holds two of them at a time. What is kept for the backward pass inside `around` goes through here.
    """

    def __init__(self, device: Device):
        self._device = device
        self._stream = torch.Stream(device.torch_device)
        self._last: Away | None = None  # its copy may still be going on, and its place must stay till then

    def around(self) -> saved_tensors_hooks:
        return saved_tensors_hooks(self._send_away, self._bring_back)

    def _send_away(self, tensor: Tensor) -> Away:
        main, before = torch.accelerator.current_stream(), self._last
        if before is not None and before.here is not None:
            main.wait_event(before.copied)  # what is freed now is used again by this stream alone, after that copy
            before.here = None
        here, host = tensor.detach(), self._device.host_like(tensor)
        self._last = Away(host, before, here, self._copied(here, host))
        return self._last

    def _bring_back(self, away: Away) -> Tensor:
        if away.here is None:
            self._send_for(away)
        if away.before is not None and away.before.here is None:
            self._send_for(away.before)
        torch.accelerator.current_stream().wait_event(away.copied)
        tensor, away.here, away.before, self._last = away.here, None, None, None
        assert tensor is not None
        return tensor

    def _send_for(self, away: Away) -> None:
        away.here = torch.empty_like(away.host, device=self._device.torch_device)
        away.copied = self._copied(away.host, away.here)

    def _copied(self, source: Tensor, to: Tensor) -> torch.Event:
        """A copy after all that was dispatched so far, beside what comes."""
        self._stream.wait_stream(torch.accelerator.current_stream())
        with self._stream:
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()
