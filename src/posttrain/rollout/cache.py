"""Keys and values of answers being written: a prompt's once, however many answers it has, each answer's own beside them."""

# T tokens of all prompts in a row, P prompts, L longest prompt, B answers, S answers of the prompt with the most of them,
# H query heads, K key/value heads, R query heads of each key/value head, D head dim, N new tokens

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from posttrain.errors import InputError
from posttrain.models.attention import Documents, packed_attention

DECODING = "posttrain_decoding"
FIRST_ROOM = 64  # new tokens that there is room for at first; doubled when it is used up


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
    if decoding.num_new:
        return decoding.attend(module, query, key, value, scaling, sliding_window, softcap), None
    decoding.keep_prompts(module, key, value)
    return packed_attention(
        module,
        query,
        key,
        value,
        None,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        documents=decoding.documents,
    )


AttentionInterface.register(DECODING, decoding_attention)


class Groups:
    """Which prompt each answer belongs to: answers of a prompt lie next to each other, and attend to it together."""

    def __init__(self, prompt_of_B: np.ndarray, lengths_P: np.ndarray, device: torch.device):
        counts_P = np.bincount(prompt_of_B, minlength=len(lengths_P))
        self.prompt_of_B, self.lengths_P = prompt_of_B, lengths_P
        self.num_prompts, self.most = len(counts_P), int(counts_P.max())
        first_P = np.cumsum(counts_P) - counts_P
        slots_B = prompt_of_B * self.most + np.arange(len(prompt_of_B)) - first_P[prompt_of_B]
        full = len(prompt_of_B) == self.num_prompts * self.most
        self.slots_B = None if full else torch.from_numpy(slots_B).to(device, non_blocking=True)
        self.lengths_B1 = torch.from_numpy(lengths_P[prompt_of_B])[:, None].to(device, non_blocking=True)

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


@dataclass
class Layer:
    """What one attention layer remembers. Rows of `keys_BKND` from `num_new` on are not written yet."""

    prompt_keys_PKLD: Tensor
    prompt_values_PKLD: Tensor
    keys_BKND: Tensor
    values_BKND: Tensor

    def keep(self, answers: Tensor, prompts: Tensor | None, longest: int) -> None:
        self.keys_BKND, self.values_BKND = (x.index_select(0, answers) for x in (self.keys_BKND, self.values_BKND))
        if prompts is not None:
            both = (self.prompt_keys_PKLD, self.prompt_values_PKLD)
            self.prompt_keys_PKLD, self.prompt_values_PKLD = (x[:, :, :longest].index_select(0, prompts) for x in both)

    def grow(self) -> None:
        both = (self.keys_BKND, self.values_BKND)
        self.keys_BKND, self.values_BKND = (torch.cat([x, torch.empty_like(x)], dim=2) for x in both)


class Cache:
    """What the layers of a model remember of a batch of answers. `num_new` tokens of each are known, or about to be."""

    def __init__(self, lengths_P: Sequence[int], prompt_of_B: np.ndarray, limit: int, device: torch.device):
        lengths = np.asarray(lengths_P, dtype=np.int64)
        self.groups, self.device = Groups(prompt_of_B, lengths, device), device
        self.documents = Documents.of(tuple(lengths_P), device)
        self.num_new, self.room = 0, min(limit, FIRST_ROOM)
        self._layers: dict[nn.Module, Layer] = {}
        self._masks: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}
        self._prompt_T = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths)).to(device)
        self._place_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(device)

    @property
    def places_T(self) -> Tensor:
        """The position of each token of the packed prompts in its own."""
        return self._place_T

    def begin_token(self) -> Tensor:
        """Make room for one more token of each answer. Gives their positions (B, 1)."""
        self.num_new += 1
        if self.num_new > self.room:
            self.room *= 2
            for layer in self._layers.values():
                layer.grow()
        self._masks = {window: masks for window, masks in self._masks.items() if window is None}
        return self.groups.lengths_B1 + (self.num_new - 1)

    def keep(self, answers: np.ndarray) -> None:
        """Forget all answers but these, given in ascending order, and the prompts that no answer needs any more."""
        prompts, prompt_of_B = np.unique(self.groups.prompt_of_B[answers], return_inverse=True)
        fewer = len(prompts) < self.groups.num_prompts
        self.groups = Groups(prompt_of_B, self.groups.lengths_P[prompts], self.device)
        chosen = torch.from_numpy(answers).to(self.device)
        chosen_prompts = torch.from_numpy(prompts).to(self.device) if fewer else None
        for layer in self._layers.values():
            layer.keep(chosen, chosen_prompts, int(self.groups.lengths_P.max()))
        self._masks = {}

    def keep_prompts(self, module: nn.Module, key_1KTD: Tensor, value_1KTD: Tensor) -> None:
        prompts, longest, answers = self.groups.num_prompts, max(self.documents.lengths), len(self.groups.prompt_of_B)

        def padded(x_1KTD: Tensor) -> Tensor:
            x_PKLD = x_1KTD.new_zeros(prompts, x_1KTD.shape[1], longest, x_1KTD.shape[3])
            x_PKLD[self._prompt_T, :, self._place_T] = x_1KTD[0].transpose(0, 1)
            return x_PKLD

        def room(x_1KTD: Tensor) -> Tensor:
            return x_1KTD.new_empty(answers, x_1KTD.shape[1], self.room, x_1KTD.shape[3])

        self._layers[module] = Layer(padded(key_1KTD), padded(value_1KTD), room(key_1KTD), room(value_1KTD))

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
        layer, groups, count = self._layers[module], self.groups, self.num_new
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
        """Added to scores: -inf where a prompt has no token, or one that is `window` or more tokens back."""
        if window not in self._masks:
            place_L = torch.arange(longest, device=self.device)
            lengths_B1 = self.groups.lengths_B1
            hidden_BL, near = place_L >= lengths_B1, None
            if window is not None:
                hidden_BL |= lengths_B1 + (self.num_new - 1) - place_L >= window
                near_N = torch.arange(self.num_new - 1, -1, -1, device=self.device) >= window
                near = torch.zeros(self.num_new, device=self.device).masked_fill_(near_N, float("-inf"))
            far = torch.zeros(hidden_BL.shape, device=self.device).masked_fill_(hidden_BL, float("-inf"))
            even = window is None and bool((self.groups.lengths_P == longest).all())
            self._masks[window] = (None if even else far[:, None, None], near)
        return self._masks[window]
