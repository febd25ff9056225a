"""Keys and values of answers being written: a prompt's once, however many answers it has, each answer's own beside them."""

# T tokens of all prompts in a row, P prompts, L longest prompt, B answers, S answers of the prompt with the most of them,
# H query heads, K key/value heads, R query heads of each key/value head, D head dim, N new tokens

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.errors import InputError
from posttrain.models.attention import AttentionInterface, Documents, packed_attention

DECODING = "posttrain_decoding"
FIRST_ROOM = 64  # columns of new tokens that there is room for at first; doubled when it is used up


def decoding_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    decoding: Cache | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of packed prompts, and then of one new token an answer; what transformers calls in place of its own."""
    if decoding is None or s_aux is not None or attention_mask is not None:
        cause = "uses attention sinks" if s_aux is not None else "brings masks of its own or hides the cache"
        raise InputError(f"{type(module).__name__} {cause}")
    if decoding.prompts is None:
        return decoding.attend(module, query, key, value, scaling, sliding_window, softcap), None
    decoding.add_prompts(module, key, value)
    return packed_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        documents=decoding.prompts.documents,
    )


AttentionInterface.register(DECODING, decoding_attention)


class Groups:
    """Which prompt each answer belongs to: answers of a prompt lie next to each other, and attend to it together."""

    def __init__(self, prompt_of_B: np.ndarray, lengths_P: np.ndarray, device: torch.device):
        counts_P = np.bincount(prompt_of_B, minlength=len(lengths_P))
        self.prompt_of_B, self.lengths_P = prompt_of_B, lengths_P
        self.num_prompts, self.most = len(counts_P), int(counts_P.max(initial=0))
        first_P = np.cumsum(counts_P) - counts_P
        slots_B = prompt_of_B * self.most + np.arange(len(prompt_of_B)) - first_P[prompt_of_B]
        full = len(prompt_of_B) == self.num_prompts * self.most
        self.slots_B = None if full else torch.from_numpy(slots_B).to(device, non_blocking=True)

    def by_prompt(self, x_BKRD: Tensor) -> Tensor:
        """(P, K, S x R, D); zeros for answers that a prompt has less than others."""
        _, heads, repeats, width = x_BKRD.shape
        if self.slots_B is not None:
            slots = x_BKRD.new_zeros(self.num_prompts * self.most, heads, repeats, width)
            x_BKRD = slots.index_copy_(0, self.slots_B, x_BKRD)
        x_PSKRD = x_BKRD.reshape(self.num_prompts, self.most, heads, repeats, width)
        return x_PSKRD.transpose(1, 2).reshape(self.num_prompts, heads, self.most * repeats, width)

    def by_answer(self, x_PKSD: Tensor, repeats: int) -> Tensor:
        """(B, K, R, D); the way back."""
        _, heads, _, width = x_PKSD.shape
        x_PSKRD = x_PKSD.view(self.num_prompts, heads, self.most, repeats, width).transpose(1, 2)
        x_BKRD = x_PSKRD.reshape(self.num_prompts * self.most, heads, repeats, width)
        return x_BKRD if self.slots_B is None else x_BKRD.index_select(0, self.slots_B)


class Prompts:
    """Prompts in one packed row that are being read, and how many answers each will have. `images` as of `Documents`."""

    def __init__(
        self,
        lengths_P: np.ndarray,
        counts_P: np.ndarray,
        device: torch.device,
        images: tuple[Tensor | None, ...] = (),
    ):
        self.lengths_P, self.counts_P = lengths_P, counts_P
        self.documents = Documents.of(tuple(lengths_P.tolist()), device, images=images)
        self.last_P = (self.documents.borders[1:] - 1).long()
        self.prompt_T = torch.from_numpy(np.repeat(np.arange(len(lengths_P)), lengths_P)).to(device)
        self.place_T = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths_P])).to(device)

    def padded(self, x_1KTD: Tensor) -> Tensor:
        x_PKLD = x_1KTD.new_zeros(len(self.lengths_P), x_1KTD.shape[1], int(self.lengths_P.max()), x_1KTD.shape[3])
        x_PKLD[self.prompt_T, :, self.place_T] = x_1KTD[0].transpose(0, 1)
        return x_PKLD


@dataclass
class Layer:
    """What one attention layer remembers. An answer's columns in `keys_BKND` before it began are zeros."""

    prompt_keys_PKLD: Tensor
    prompt_values_PKLD: Tensor
    keys_BKND: Tensor
    values_BKND: Tensor

    def add(self, other: Layer) -> None:
        self.prompt_keys_PKLD = _stacked(self.prompt_keys_PKLD, other.prompt_keys_PKLD)
        self.prompt_values_PKLD = _stacked(self.prompt_values_PKLD, other.prompt_values_PKLD)
        self.keys_BKND = torch.cat([self.keys_BKND, other.keys_BKND])
        self.values_BKND = torch.cat([self.values_BKND, other.values_BKND])

    def keep(self, answers: Tensor, first: int, prompts: Tensor | None, longest: int) -> None:
        both = (self.keys_BKND, self.values_BKND)
        self.keys_BKND, self.values_BKND = (x[:, :, first:].index_select(0, answers) for x in both)
        if prompts is not None:
            both = (self.prompt_keys_PKLD, self.prompt_values_PKLD)
            self.prompt_keys_PKLD, self.prompt_values_PKLD = (x[:, :, :longest].index_select(0, prompts) for x in both)

    def grow(self, by: int) -> None:
        both = (self.keys_BKND, self.values_BKND)
        self.keys_BKND, self.values_BKND = (F.pad(x, (0, 0, 0, by)) for x in both)


def _stacked(x_PKLD: Tensor, y_PKLD: Tensor) -> Tensor:
    longest = max(x_PKLD.shape[2], y_PKLD.shape[2])
    return torch.cat([F.pad(each, (0, 0, 0, longest - each.shape[2])) for each in (x_PKLD, y_PKLD)])


class Cache:
    """What the layers of a model remember of a batch of answers.

    New tokens stand in columns, the newest of all answers in the same one. An answer began at the column `starts_B`.
    """

    def __init__(self, limit: int, device: torch.device):
        self.device = device
        self.prompts: Prompts | None = None  # that are being read
        self.groups = Groups(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), device)
        self.starts_B = np.zeros(0, dtype=np.int64)
        self.num_columns, self.room = 0, min(limit, FIRST_ROOM)
        self._layers: dict[nn.Module, Layer] = {}
        self._masks: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}
        self._set_starts()

    @contextmanager
    def reading(
        self, lengths_P: np.ndarray, counts_P: np.ndarray, images: tuple[Tensor | None, ...] = ()
    ) -> Iterator[Prompts]:
        """Inside, the model reads packed prompts; their answers begin at the next column, behind all others."""
        self.prompts = Prompts(lengths_P, counts_P, self.device, images)
        yield self.prompts
        self.prompts = None
        new_B = self.groups.num_prompts + np.repeat(np.arange(len(counts_P)), counts_P)
        prompt_of_B = np.concatenate([self.groups.prompt_of_B, new_B])
        self.groups = Groups(prompt_of_B, np.concatenate([self.groups.lengths_P, lengths_P]), self.device)
        self.starts_B = np.concatenate([self.starts_B, np.full(len(new_B), self.num_columns)])
        self._set_starts()

    def begin_token(self) -> Tensor:
        """Begin the next column. Gives the positions (B, 1) of its tokens."""
        if self.num_columns == self.room:
            for layer in self._layers.values():
                layer.grow(max(self.room, FIRST_ROOM))
            self.room += max(self.room, FIRST_ROOM)
        self.num_columns += 1
        self._masks = {}
        return self._lengths_B1 + self.num_columns - 1 - self._starts_B1

    def keep(self, answers: np.ndarray) -> None:
        """Forget all answers but these, given in ascending order, and the prompts and columns that none of them needs."""
        prompts, prompt_of_B = np.unique(self.groups.prompt_of_B[answers], return_inverse=True)
        fewer = len(prompts) < self.groups.num_prompts
        first = int(self.starts_B[answers].min())
        self.groups = Groups(prompt_of_B, self.groups.lengths_P[prompts], self.device)
        self.starts_B = self.starts_B[answers] - first
        self.num_columns, self.room = self.num_columns - first, self.room - first
        chosen = torch.from_numpy(answers).to(self.device)
        chosen_prompts = torch.from_numpy(prompts).to(self.device) if fewer else None
        for layer in self._layers.values():
            layer.keep(chosen, first, chosen_prompts, int(self.groups.lengths_P.max()))
        self._set_starts()

    def add_prompts(self, module: nn.Module, key_1KTD: Tensor, value_1KTD: Tensor) -> None:
        prompts = self.prompts
        assert prompts is not None

        def room(x_1KTD: Tensor) -> Tensor:
            return x_1KTD.new_zeros(int(prompts.counts_P.sum()), x_1KTD.shape[1], self.room, x_1KTD.shape[3])

        layer = Layer(prompts.padded(key_1KTD), prompts.padded(value_1KTD), room(key_1KTD), room(value_1KTD))
        if module in self._layers:
            self._layers[module].add(layer)
        else:
            self._layers[module] = layer

    def _set_starts(self) -> None:
        self._starts_B1 = torch.from_numpy(self.starts_B)[:, None].to(self.device, non_blocking=True)
        self._lengths_B1 = torch.from_numpy(self.groups.lengths_P[self.groups.prompt_of_B])[:, None].to(self.device)
        self._masks = {}

    def attend(
        self,
        module: nn.Module,
        query_BH1D: Tensor,
        key_BK1D: Tensor,
        value_BK1D: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        """What the newest token of each answer sees (B, 1, H, D): its prompt, its answer so far, and itself."""
        layer, groups, count = self._layers[module], self.groups, self.num_columns
        layer.keys_BKND[:, :, count - 1] = key_BK1D[:, :, 0]
        layer.values_BKND[:, :, count - 1] = value_BK1D[:, :, 0]
        answers, heads, _, width = query_BH1D.shape
        repeats = heads // key_BK1D.shape[1]
        query_BKRD = query_BH1D.reshape(answers, -1, repeats, width) * (scaling if scaling is not None else width**-0.5)
        far = groups.by_answer(groups.by_prompt(query_BKRD) @ layer.prompt_keys_PKLD.transpose(2, 3), repeats)
        near = query_BKRD @ layer.keys_BKND[:, :, :count].transpose(2, 3)
        if softcap:
            far, near = softcap * torch.tanh(far / softcap), softcap * torch.tanh(near / softcap)
        far_mask, near_mask = self._mask(window, far.shape[-1])
        far = far if far_mask is None else far + far_mask
        near = near if near_mask is None else near + near_mask
        weights = torch.cat([far, near], dim=-1).softmax(-1, dtype=torch.float32).to(value_BK1D.dtype)
        far, near = weights[..., : far.shape[-1]], weights[..., far.shape[-1] :]
        seen = groups.by_answer(groups.by_prompt(far) @ layer.prompt_values_PKLD, repeats)
        seen = seen + near @ layer.values_BKND[:, :, :count]
        return seen.reshape(answers, 1, heads, -1)

    def _mask(self, window: int | None, longest: int) -> tuple[Tensor | None, Tensor | None]:
        """Added to scores of prompt and answer: -inf where a row has no token, or one that is `window` or more tokens back."""
        if window not in self._masks:
            newest = self.num_columns - 1
            place_L, column_N = (torch.arange(count, device=self.device) for count in (longest, self.num_columns))
            hidden_BL, hidden_BN = place_L >= self._lengths_B1, column_N < self._starts_B1
            if window is not None:
                hidden_BL |= self._lengths_B1 + newest - self._starts_B1 - place_L >= window
                hidden_BN |= newest - column_N >= window
            far = None if window is None and (self.groups.lengths_P == longest).all() else _added(hidden_BL)
            near = None if window is None and not self.starts_B.any() else _added(hidden_BN)
            self._masks[window] = far, near
        return self._masks[window]


def _added(hidden_BN: Tensor) -> Tensor:
    zeros_BN = torch.zeros(hidden_BN.shape, device=hidden_BN.device)
    return zeros_BN.masked_fill_(hidden_BN, float("-inf"))[:, None, None]
