"""Weights that one process alone has loaded, handed to the others a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from posttrain.distributed.world import World
from posttrain.models.load import tables
from posttrain.models.weights import Part


class BroadcastWeights:
    """Those of a model that the main process holds whole, for files that transformers must translate and for random weights.

    Every process must read the same names in the same order.
    """

    def __init__(self, world: World, load: Callable[[], Any], dtype: torch.dtype):
        """`load` gives the model, with weights in `dtype`; what it raises is raised everywhere. `tables` are its buffers that
        no file holds."""
        self._world, self._dtype = world, dtype
        self._state: dict[str, Tensor] = {}
        self.tables, self._others = world.on_main(lambda: self._keep(load()))

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        device = self._world.device.torch_device
        dtype = self._others.get(name, self._dtype)
        if self._world.is_main:
            whole = self._state[name].to(device, dtype).contiguous()
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
        if self._world.size > 1:
            dist.broadcast(whole, 0)
        return whole[part]

    def _keep(self, model: Any) -> tuple[dict[str, Tensor], dict[str, torch.dtype]]:
        """The buffers that no file holds, and the number formats of those that files hold, which stay as they are."""
        self._state = model.state_dict()
        buffers = {name: buffer.dtype for name, buffer in model.named_buffers() if name in self._state}
        return tables(model), buffers
