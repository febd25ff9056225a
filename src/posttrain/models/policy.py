"""A causal language model seen as what training needs of it: the log-probability of each next token."""

# T tokens of a packed row, S tokens among them that count, D hidden, A axes of positions

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.distributed.device import logits_a_chunk
from posttrain.errors import InputError
from posttrain.losses.vocabulary import Head, token_logprobs, token_logprobs_and_entropies
from posttrain.models.attention import PACKED, Documents
from posttrain.models.kernels import plainly
from posttrain.models.vision import Images, language_model, vision_modules, vision_of


class Policy(nn.Module):
    """Wraps a transformers causal LM. With `packing` documents share a forward pass, else each has its own.

    Its probabilities are those at which tokens are drawn at `temperature`.
    """

    def __init__(self, lm: Any, packing: bool = True, temperature: float = 1.0):
        super().__init__()
        if lm.base_model is lm:
            raise InputError(
                f"{type(lm).__name__}: transformers does not tell its layers apart from its output layer, so that posttrain cannot train "
                "this model. Choose another one."
            )
        self.lm = lm
        self.packing, self.temperature = packing, temperature
        self.vision = vision_of(lm)
        if packing:
            _use_attention(lm, PACKED)
        if self.vision:
            language_model(lm).register_forward_pre_hook(_cut_embeddings, with_kwargs=True)

    def forward(
        self,
        ids_T: Tensor,
        positions_T: Tensor,
        labels_T: Tensor,
        chosen_S: Tensor,
        documents: Documents,
        slope_S: Tensor | None = None,
        entropies: bool = False,
        images: Images | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities (float32, S) of the labels at the positions `chosen_S`, and the entropies there if asked for; see
        `token_logprobs` for the slope.

        With images, ids and positions, (T) or (A, T), are those of the whole row also where processes share it.
        """
        hidden_SD = self._hidden(ids_T, positions_T, documents, images).index_select(0, chosen_S)
        if entropies:
            return token_logprobs_and_entropies(hidden_SD, self.head(), labels_T[chosen_S])
        return token_logprobs(hidden_SD, self.head(), labels_T[chosen_S], slope_S), None

    def head(self) -> Head:
        """The output layer, with the scaling that some families add (Gemma 2, Cohere, Granite)."""
        layer, config = self.lm.get_output_embeddings(), self.lm.config
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        chunk = logits_a_chunk(layer.weight.device)
        return Head(layer.weight, getattr(layer, "bias", None), float(scale), softcap, self.temperature, chunk)

    def reference_logprobs(
        self, ids_T: Tensor, labels_T: Tensor, lengths: list[int], images: Images | None = None
    ) -> Tensor:
        """What transformers itself computes, with its own modules and plainest attention, one document at a time; for comparison."""
        chosen = _attention_of(self.lm)
        _use_attention(self.lm, "eager", of_vision="eager")
        with plainly(self.lm):
            logits = [
                self.lm(input_ids=ids[None], use_cache=False, **of_images).logits[0]
                for ids, of_images in zip(ids_T.split(lengths), self._each(ids_T, lengths, images), strict=True)
            ]
        self.lm.set_attn_implementation(chosen)
        if self.vision:
            self.vision.forget()
        tempered = torch.cat(logits).float() / self.temperature
        return tempered.log_softmax(-1).gather(1, labels_T[:, None])[:, 0]

    def _hidden(self, ids_T: Tensor, positions_T: Tensor, documents: Documents, images: Images | None) -> Tensor:
        body = self.lm.base_model
        positions_A1T = positions_T[..., None, :]  # (1, T) where there is but one axis
        if self.packing:
            seen = images.packed() if images else {}
            out = body(input_ids=ids_T[None], position_ids=positions_A1T, documents=documents, use_cache=False, **seen)
            return out.last_hidden_state[0]
        lengths = list(documents.lengths)
        pieces = zip(
            ids_T.split(lengths),
            positions_A1T.split(lengths, -1),
            self._each(ids_T, lengths, images),
            strict=True,
        )
        each = [
            body(input_ids=i[None], position_ids=p, use_cache=False, **seen).last_hidden_state[0]
            for i, p, seen in pieces
        ]
        return torch.cat(each)

    def _each(self, ids_T: Tensor, lengths: list[int], images: Images | None) -> list[dict[str, Tensor]]:
        """What the model takes of the images of each document by itself."""
        if not self.vision or not images:
            return [{} for _ in lengths]
        each = [(ids, images.of_document(number)) for number, ids in enumerate(ids_T.split(lengths))]
        return [{**given, **self.vision.types(ids)} if given else {} for ids, given in each]

    @property
    def blocks(self) -> list[nn.Module]:
        """The repeated layers of the language model, the unit of sharding and of recomputation."""
        found = _repeated(language_model(self.lm), "Layer")
        if not found:
            raise InputError(f"{type(self.lm).__name__}: no list of layers was found; is it a causal language model?")
        return found

    @property
    def vision_blocks(self) -> list[nn.Module]:
        """Those of the vision tower, if there is one."""
        return [block for module in vision_modules(self.lm) for block in _repeated(module, "Layer", "Block")]


def _repeated(body: nn.Module, *kinds: str) -> list[nn.Module]:
    """The first list of modules whose class is called so."""
    for module in body.modules():
        if isinstance(module, nn.ModuleList) and len(module) and type(module[0]).__name__.endswith(kinds):
            return list(module)
    return []


def _cut_embeddings(_language: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Where processes share a row with images, leave this one's part of it: the vision tower saw it whole."""
    documents, embeddings = given.get("documents"), given.get("inputs_embeds")
    if not isinstance(documents, Documents) or documents.sequence is None or embeddings is None:
        return None
    if embeddings.shape[1] != sum(documents.lengths):  # a row without images, cut before
        return None
    part = documents.sequence.part
    cut: dict[str, Any] = {
        "inputs_embeds": part(embeddings, 1).clone(),  # a view would keep the whole, and start anywhere in it
        "position_ids": part(given["position_ids"], -1),
    }
    if (places_1T := given.get("visual_pos_masks")) is not None:  # features that go into several layers (DeepStack)
        numbers = part((places_1T.cumsum(1) - 1).masked_fill(~places_1T, -1), 1)
        own = numbers[numbers >= 0]
        cut["visual_pos_masks"] = part(places_1T, 1)
        cut["deepstack_visual_embeds"] = [features[own] for features in given["deepstack_visual_embeds"]]
    return args, {**given, **cut}


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


def _attention_of(lm: Any) -> str | dict[str, str]:
    """What `set_attn_implementation` takes to come back to the present choice."""
    parts = {name: getattr(lm.config, name) for name in lm.config.sub_configs}
    chosen = {name: part._attn_implementation for name, part in parts.items() if part is not None}
    return {"": lm.config._attn_implementation, **chosen} if chosen else lm.config._attn_implementation


def _use_attention(lm: Any, implementation: str, of_vision: str | None = None) -> None:
    """Let the language model attend in that way, and the vision tower too if it is named."""
    chosen = _attention_of(lm)
    wanted: Any = implementation
    if isinstance(chosen, dict):
        text = {name for name in chosen if name in ("", "text_config")}
        wanted = {name: implementation if name in text else of_vision or own for name, own in chosen.items()}
    try:
        lm.set_attn_implementation(wanted)
    except ValueError as error:
        raise InputError(
            f"{type(lm).__name__} does not take our packed attention. Set data.packing=false. ({error})"
        ) from None
