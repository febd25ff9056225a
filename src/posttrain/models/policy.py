"""A causal language model seen as what training needs of it: the log-probability of each next token."""

# T tokens of a packed row, S tokens among them that count, D hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.distributed.device import logits_a_chunk
from posttrain.errors import InputError
from posttrain.losses.vocabulary import Head, token_logprobs
from posttrain.models.attention import PACKED, Documents


class Policy(nn.Module):
    """Wraps a transformers causal LM. With `packing` documents share a forward pass, else each has its own."""

    def __init__(self, lm: Any, packing: bool = True):
        super().__init__()
        self.lm = lm
        self.packing = packing
        if packing:
            _use_attention(lm, PACKED)

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        labels_T: Tensor,
        chosen_S: Tensor,
        documents: Documents,
        slope_S: Tensor | None = None,
    ) -> Tensor:
        """Log-probabilities (float32, S) of the labels at the positions `chosen_S`; see `token_logprobs` for the slope."""
        hidden_TD = self._hidden(ids_T, positions_T, documents)
        return token_logprobs(hidden_TD.index_select(0, chosen_S), self.head(), labels_T[chosen_S], slope_S)

    def head(self) -> Head:
        """The output layer, with the scaling that some families add (Gemma 2, Cohere, Granite)."""
        layer, config = self.lm.get_output_embeddings(), self.lm.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)
        chunk = logits_a_chunk(layer.weight.device)
        return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap, chunk)

    def reference_logprobs(self, ids_T: Tensor, labels_T: Tensor, lengths: list[int]) -> Tensor:
        """What transformers itself computes, with its plainest attention, one document at a time; for comparison."""
        chosen = self.lm.config._attn_implementation
        _use_attention(self.lm, "eager")
        logits = [self.lm(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_T.split(lengths)]
        _use_attention(self.lm, chosen)
        return torch.cat(logits).float().log_softmax(-1).gather(1, labels_T[:, None])[:, 0]

    def _hidden(self, ids_T: Tensor, positions_T: Tensor, documents: Documents) -> Tensor:
        body = self.lm.base_model
        if self.packing:
            out = body(input_ids=ids_T[None], position_ids=positions_T[None], documents=documents, use_cache=False)
            return out.last_hidden_state[0]
        lengths = list(documents.lengths)
        pieces = zip(ids_T.split(lengths), positions_T.split(lengths), strict=True)
        each = [body(input_ids=i[None], position_ids=p[None], use_cache=False).last_hidden_state[0] for i, p in pieces]
        return torch.cat(each)

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers, the unit of sharding and of recomputation."""
        for module in self.lm.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__.endswith("Layer"):
                return list(module)
        raise InputError(f"{type(self.lm).__name__}: no list of layers was found; is it a causal language model?")


def _use_attention(lm: Any, implementation: str) -> None:
    try:
        lm.set_attn_implementation(implementation)
    except ValueError as error:
        raise InputError(
            f"{type(lm).__name__} does not take our packed attention. Set data.packing=false. ({error})"
        ) from None
