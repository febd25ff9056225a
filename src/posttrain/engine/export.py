"""The finished model as a transformers folder, which loads without anything of ours."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.engine.engine import Engine
from posttrain.errors import RunError
from posttrain.models.load import model_class
from posttrain.models.lora import ADAPTER_FOLDER, save_adapter
from posttrain.run.folder import put_in_place


def assemble(engine: Engine, dtype: torch.dtype, device: torch.device | None = None) -> Any:
    """A plain transformers model with the engine's weights, in `dtype`. Every process must call this and gets the whole model.

    On one process, in float32, it shares the engine's memory.
    """
    return _assemble(engine, ((name, weight.to(device, dtype)) for name, weight in engine.named_weights()))


def export(
    engine: Engine,
    tokenizer: Any,
    folder: Path,
    dtype: torch.dtype,
    end_ids: Iterable[int],
    processor: Any | None = None,
) -> None:
    """Write the model, its tokenizer and its chat template to `folder`, in `dtype`, with the processor of its images if it has
    one. Every process must call this.

    `end_ids` are the tokens that ended turns in training; generation stops at them. Raises RunError; what was in the
    folder stays until the new model is complete.
    """
    weights = _on_main(engine, engine.named_weights(), dtype)
    adapter = _on_main(engine, engine.named_adapter(), torch.float32)

    def write(aside: Path) -> None:
        _write(_assemble(engine, weights.items()), tokenizer, aside, set(end_ids))
        if processor is not None:
            processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
            processor.save_pretrained(aside)
        if engine.adapters:
            save_adapter(aside / ADAPTER_FOLDER, engine.adapters, adapter)

    engine.world.on_main(lambda: _replace(folder, write))


def export_adapter(engine: Engine, folder: Path) -> None:
    """Write the adapter alone, in peft's format, to `folder/adapter`. Every process must call this. Raises RunError."""
    weights = _on_main(engine, engine.named_adapter(), torch.float32)
    if engine.adapters and engine.world.is_main:
        save_adapter(folder / ADAPTER_FOLDER, engine.adapters, weights)


def _on_main(engine: Engine, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> dict[str, Tensor]:
    """Whole tensors on the main process's host; the others take part in gathering, and keep nothing."""
    host = engine.world.device.host
    return {name: weight.to(host, dtype) for name, weight in weights if engine.world.is_main}


def _assemble(engine: Engine, weights: Iterable[tuple[str, Tensor]]) -> Any:
    source = engine.policy.lm
    model = _unfilled(source.config)
    model.load_state_dict(dict(weights), assign=True)
    model.tie_weights()
    first, own = next(model.parameters()), dict(model.named_buffers())
    device, dtype = first.device, first.dtype
    for name, buffer in source.named_buffers():
        if name in own:  # rotary frequencies are in no state dict
            owner, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(owner), attribute, buffer.detach().to(device))
    model.config.dtype = dtype
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    model.generation_config = deepcopy(source.generation_config)
    return model.eval()


def _unfilled(config: Any) -> Any:
    """A model whose weights are yet to come: without memory, where its code can make it so."""
    make = model_class(config).from_config
    try:
        with torch.device("meta"):
            return make(deepcopy(config))
    except Exception:  # code of its own, which may need values that are not there: what is wrong else, is so again
        return make(deepcopy(config))


def _write(model: Any, tokenizer: Any, folder: Path, end_ids: set[int]) -> None:
    listed = model.generation_config.eos_token_id
    known = listed if isinstance(listed, list) else [] if listed is None else [listed]
    ends = sorted({*known, *end_ids})
    model.generation_config.eos_token_id = ends[0] if len(ends) == 1 else ends
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _replace(folder: Path, write: Callable[[Path], None]) -> None:
    """Put what `write` makes in the folder's place, which keeps what it had until the new is complete."""
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        write(aside)
        put_in_place(aside, folder)
    except Exception as error:  # safetensors raises errors of its own for a full disk
        shutil.rmtree(aside, ignore_errors=True)
        raise RunError(f"Writing the model to {folder} failed: {error}. Checkpoints are untouched; free space and run the "
                       "same command again.") from None  # fmt: skip
