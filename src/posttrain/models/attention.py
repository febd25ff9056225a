"""Attention over packed rows, inside transformers' attention interface: no token ever sees another document.

Where torch has it for the device, variable-length flash attention; elsewhere one scaled-dot-product call per document.
Where processes share a row, each attends with a part of the heads over all of its tokens.
"""

# T tokens of the packed row, H query heads, K key/value heads, D head dim, L tokens of one document

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from posttrain.distributed.device import has_varlen_attention
from posttrain.distributed.sequence import Sequence
from posttrain.errors import InputError

PACKED = "posttrain_packed"


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed row begin and end. `borders` is int32 on the device, num_documents + 1 long.

    `sequence` holds the processes that share the row, if several do.
    """

    lengths: tuple[int, ...]
    borders: Tensor
    sequence: Sequence | None = None
    branches: tuple[tuple[int, ...], ...] = ()  # see MicroBatch
    # of each document, for each token the number of its image or -1, where tokens of an image see each other; None for no image
    images: tuple[Tensor | None, ...] = ()
    masks: dict[tuple[Any, int | None], Tensor] = field(default_factory=dict)  # of branches and images, made once

    @classmethod
    def of(
        cls,
        lengths: tuple[int, ...],
        device: torch.device,
        sequence: Sequence | None = None,
        branches: tuple[tuple[int, ...], ...] = (),
        images: tuple[Tensor | None, ...] = (),
    ) -> Documents:
        borders = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(lengths, borders.to(device, non_blocking=True), sequence, branches, images)

    def mask(self, number: int, window: int | None) -> Tensor | None:
        """True where a token of that document may look at another; None where it is plain."""
        if number < len(self.images) and (images_L := self.images[number]) is not None:
            if (number, window) not in self.masks:
                same = (images_L[:, None] == images_L) & (images_L >= 0)
                self.masks[number, window] = _window(len(images_L), window or len(images_L), same.device) | same
            return self.masks[number, window]
        parts = self.branches[number] if self.branches else ()
        if len(parts) < 2:
            return None
        if (parts, window) not in self.masks:
            self.masks[parts, window] = _branched(parts, window, self.borders.device)
        return self.masks[parts, window]


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    documents: Documents | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document; what transformers calls in place of its own. Returns (1, T, H, D).

    Where processes share the row, T is this one's part of it, here and in what comes in.
    """
    if documents is None or s_aux is not None or attention_mask is not None:
        cause = "uses attention sinks" if s_aux is not None else "brings masks of its own or hides where documents end"
        raise InputError(f"{type(module).__name__} cannot attend over packed rows: it {cause}. Set data.packing=false.")
    head_dim = query_1HTD.shape[-1]
    fits = head_dim == value_1KTD.shape[-1] and head_dim % 8 == 0 and head_dim <= 256
    plain = fits and not softcap and not dropout and query_1HTD.dtype != torch.float32
    causal = not documents.branches and not documents.images
    attend = _varlen if plain and causal and has_varlen_attention(query_1HTD.device) else _per_document
    sequence = documents.sequence
    if sequence is not None:
        times = sequence.repeats(query_1HTD.shape[1], key_1KTD.shape[1])
        if times > 1:
            key_1KTD, value_1KTD = (x.repeat_interleave(times, dim=1) for x in (key_1KTD, value_1KTD))
        query_1HTD, key_1KTD, value_1KTD = map(sequence.tokens_for_heads, (query_1HTD, key_1KTD, value_1KTD))
    out_1THD = attend(query_1HTD, key_1KTD, value_1KTD, documents, scaling, sliding_window, softcap, dropout)
    return sequence.heads_for_tokens(out_1THD) if sequence is not None else out_1THD, None


AttentionInterface.register(PACKED, packed_attention)


def leave_uncompiled() -> None:
    """Keep attention out of compiled blocks: its documents differ in every row, and each would be compiled anew."""
    AttentionInterface.register(PACKED, torch.compiler.disable(packed_attention))


def _varlen(query, key, value, documents: Documents, scaling, sliding_window, softcap, dropout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": ((sliding_window or 0) - 1, 0)}
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    longest = max(documents.lengths)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(q, k, v, documents.borders, documents.borders, longest, longest, **options)
    assert isinstance(out, Tensor)
    return out[None]


def _per_document(query, key, value, documents: Documents, scaling, sliding_window, softcap, dropout) -> Tensor:
    lengths = list(documents.lengths)
    if query.shape[1] != key.shape[1]:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    out = []
    each = zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True)
    for number, (q, k, v) in enumerate(each):
        length = q.shape[2]
        mask = documents.mask(number, sliding_window)
        if softcap:
            seen = mask if mask is not None else _window(length, sliding_window or length, q.device)
            out.append(_eager(q, k, v, scaling, seen, softcap, dropout))
        elif mask is not None:
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
        elif sliding_window is not None and sliding_window < length:
            mask = _window(length, sliding_window, q.device)
            out.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
        else:
            out.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, scale=scaling))
    return torch.cat(out, dim=2).transpose(1, 2)


def _eager(q, k, v, scaling, seen: Tensor, softcap: float, dropout: float) -> Tensor:
    """Attention whose scores pass through `softcap * tanh(scores / softcap)` (Gemma 2), which no fused call offers."""
    scores = (q @ k.transpose(-1, -2)) * (scaling if scaling is not None else q.shape[-1] ** -0.5)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    return F.dropout(scores.softmax(-1, dtype=torch.float32).to(q.dtype), dropout) @ v


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """True where a query (row) may look: at itself and the window - 1 tokens before it."""
    distance = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (distance >= 0) & (distance < window)


def _branched(parts: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """The same where the first part is followed by each of the others alone."""
    sizes = torch.tensor(parts, device=device)
    owners = torch.arange(len(parts), device=device).repeat_interleave(sizes)
    begins = torch.cat([sizes.new_zeros(1), sizes[:1].expand(len(parts) - 1)])
    starts = sizes.cumsum(0) - sizes
    positions = torch.arange(len(owners), device=device) + (begins - starts).repeat_interleave(sizes)
    distance = positions[:, None] - positions
    seen = ((owners[:, None] == owners) | (owners == 0)) & (distance >= 0)
    return seen if window is None else seen & (distance < window)
