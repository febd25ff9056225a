"""Frozen linear layers in 4 bits a weight, which adapters are trained beside. Source: Dettmers et al. 2023, QLoRA (NF4).

A row is cut into blocks of 64 weights; each is one of 16 levels times the block's largest magnitude. A shard holds whole rows, so
that it is coded as the whole is. In place of the paper's second quantization scales are bfloat16: a quarter of a bit a weight.
"""

# R rows, I inputs, B blocks of a row, P pairs of weights of a row, Y bytes of a row

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

from posttrain.errors import InputError
from posttrain.models.weights import Part, Weights

BLOCK = 64
# quantiles of a normal distribution, and 0
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
PAIRS = torch.cartesian_prod(torch.tensor(LEVELS), torch.tensor(LEVELS))  # what each byte means
BYTES_A_BLOCK = BLOCK // 2 + 2


def pack(weight_RI: Tensor) -> Tensor:
    """Rows of bytes (R, Y): codes of two weights each, then the scales of the row's blocks."""
    blocks_RBb = pad(weight_RI.float(), (0, -weight_RI.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scales_RB = blocks_RBb.abs().amax(-1).bfloat16()
    shares_RBb = blocks_RBb / scales_RB.float().clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    levels = torch.tensor(LEVELS, device=weight_RI.device)
    codes_RI = torch.bucketize(shares_RBb, (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8).flatten(1)
    pairs_RP = codes_RI[:, 0::2] << 4 | codes_RI[:, 1::2]
    bytes_RY = torch.cat([pairs_RP, scales_RB.view(torch.uint8)], 1)
    return pad(bytes_RY, (0, -bytes_RY.shape[1] % 4)).contiguous()


def unpack(bytes_RY: Tensor, inputs: int, dtype: torch.dtype, pairs: Tensor = PAIRS) -> Tensor:
    """The weights (R, I) that `pack` kept, of each row's inputs; `pairs` are PAIRS on the device of the bytes."""
    blocks = -(-inputs // BLOCK)
    pairs_RP, scales = bytes_RY[:, : blocks * BLOCK // 2], bytes_RY[:, blocks * BLOCK // 2 : blocks * BYTES_A_BLOCK]
    shares_RBb = embedding(pairs_RP.int(), pairs).view(-1, blocks, BLOCK)
    scales_RB = scales.contiguous().view(torch.bfloat16).float()
    return (shares_RBb * scales_RB[..., None]).to(dtype).flatten(1)[:, :inputs]


class _Linear(torch.autograd.Function):
    """Weights are unpacked again in the backward pass, and never kept."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, num_inputs: int, pairs: Tensor
    ) -> Tensor:
        ctx.save_for_backward(packed, pairs)
        ctx.num_inputs = num_inputs
        return linear(inputs, unpack(packed.view(torch.uint8), num_inputs, inputs.dtype, pairs), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        packed, pairs = ctx.saved_tensors
        weight = unpack(packed.view(torch.uint8), ctx.num_inputs, gradient.dtype, pairs)
        return gradient @ weight, None, None, None, None


class FourBitLinear(nn.Linear):
    """A frozen linear layer. Its `weight` holds packed bytes seen as numbers of the format of computation, which FSDP2 then gathers
    as they are."""

    pairs: Tensor

    def __init__(self, frozen: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = frozen.in_features, frozen.out_features, frozen.bias
        weight = frozen.weight.detach()
        if weight.is_meta:
            size = -(-self.in_features // BLOCK) * BYTES_A_BLOCK
            packed = torch.empty(self.out_features, size + -size % 4, dtype=torch.uint8, device=weight.device)
        else:
            packed = pack(weight)
        self.weight = nn.Parameter(packed.view(weight.dtype), requires_grad=False)
        self.register_buffer(
            "pairs", PAIRS.clone(), persistent=False
        )  # on the device: each copy to it would be waited for

    def forward(self, inputs: Tensor) -> Tensor:
        return _Linear.apply(inputs, self.weight, self.bias, self.in_features, self.pairs)

    def unpacked(self, packed: Tensor) -> Tensor:
        """The weights (float32) that its whole packed ones mean."""
        return unpack(packed.view(torch.uint8), self.in_features, torch.float32, self.pairs.to(packed.device))


def load_in_4bit(blocks: list[nn.Module]) -> None:
    """Put a packed layer in the place of every frozen linear layer of the blocks. Raises InputError where they have none."""
    frozen = [
        (module, *found) for block in blocks for module in block.modules() for found in frozen_linear_layers(module)
    ]
    if not frozen:
        raise InputError(
            f"model.load_in_4bit: no frozen linear layer of torch's own kind was found in {type(blocks[0]).__name__}, so that "
            "nothing would be kept in 4 bits. Set it to false for this model."
        )
    for module, name, layer in frozen:
        setattr(module, name, FourBitLinear(layer))


def frozen_linear_layers(module: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those that a module holds itself."""
    return [
        (name, child)
        for name, child in module.named_children()
        if type(child) is nn.Linear and not child.weight.requires_grad
    ]


def four_bit_layers(lm: nn.Module) -> dict[str, FourBitLinear]:
    """Packed layers by the names of their weights."""
    return {f"{name}.weight": module for name, module in lm.named_modules() if isinstance(module, FourBitLinear)}


def unpacked(lm: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The same whole weights of a state dict, the packed ones (float32) as they are computed with."""
    layers = four_bit_layers(lm)
    for name, weight in weights:
        packed = layers.get(name)
        yield name, packed.unpacked(weight) if packed else weight


class PackedWeights:
    """Those of other weights, the ones of packed layers packed on the way, on the device."""

    def __init__(self, lm: nn.Module, rest: Weights, device: torch.device):
        self._layers, self._rest, self._device = four_bit_layers(lm), rest, device

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        layer = self._layers.get(name)
        if layer is None:
            return self._rest.read(name, shape, part)
        whole = (layer.out_features, layer.in_features)
        rows = self._rest.read(name, whole, (part[0], slice(0, layer.in_features)))
        return pack(rows.to(self._device, layer.weight.dtype)).view(layer.weight.dtype)
