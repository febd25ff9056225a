"""A causal language model seen as what training needs of it: the log-probability of each next token."""

# T tokens of a packed row, S tokens among them that count, D hidden

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.distributed.device import logits_a_chunk
from posttrain.errors import InputError
from posttrain.losses.vocabulary import Head, token_logprobs, token_logprobs_and_entropies
from posttrain.models.attention import PACKED, Documents


class Policy(nn.Module):
    """Wraps a transformers causal LM. With `packing` documents share a forward pass, else each has its own.

    Its probabilities are those at which tokens are drawn at `temperature`.
    """

    def __init__(self, lm: Any, packing: bool = True, temperature: float = 1.0):
        super().__init__()
        self.lm = lm
        self.packing, self.temperature = packing, temperature
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
        entropies: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (float32, S) of the labels at the positions `chosen_S`, and the entropies there if asked for; see
        `token_logprobs` for the slope."""
        hidden_SD = self._hidden(ids_T, positions_T, documents).index_select(0, chosen_S)
        if entropies:
            return token_logprobs_and_entropies(hidden_SD, self.head(), labels_T[chosen_S])
        return token_logprobs(hidden_SD, self.head(), labels_T[chosen_S], slope_S), None

    def head(self) -> Head:
        """The output layer, with the scaling that some families add (Gemma 2, Cohere, Granite)."""
        layer, config = self.lm.get_output_embeddings(), self.lm.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config, "final_logit_softcapping", None)
        chunk = logits_a_chunk(layer.weight.device)
        return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap, self.temperature, chunk)

    def reference_logprobs(self, ids_T: Tensor, labels_T: Tensor, lengths: list[int]) -> Tensor:
        """What transformers itself computes, with its plainest attention, one document at a time; for comparison."""
        chosen = self.lm.config._attn_implementation
        _use_attention(self.lm, "eager")
        logits = [self.lm(input_ids=ids[None], use_cache=False).logits[0] for ids in ids_T.split(lengths)]
        _use_attention(self.lm, chosen)
        tempered = torch.cat(logits).float() / self.temperature
        return tempered.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]

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


def without_dropout(lm: Any) -> None:
    """Let the model compute in training what it computes in use: ratios of probabilities must not be noise."""
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def with_dropout(policy: Policy, share: float) -> None:
    """Drop this share of each block's output in training (Srivastava et al. 2014).

    A hook stands outside of what is compiled or computed again, so that both passes see the same mask.
    """

    def dropped(block: nn.Module, _inputs: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if not isinstance(hidden, Tensor):
            raise InputError(
                f"model.dropout={share:g}: a {type(block).__name__} gives a {type(hidden).__name__}, expected a tensor. Set "
                "model.dropout=0 for this model."
            )
        hidden = nn.functional.dropout(hidden, share, block.training)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    for block in policy.blocks:
        block.register_forward_hook(dropped)


def _use_attention(lm: Any, implementation: str) -> None:
    try:
        lm.set_attn_implementation(implementation)
    except ValueError as error:
        raise InputError(
            f"{type(lm).__name__} does not take our packed attention. Set data.packing=false. ({error})"
        ) from None
