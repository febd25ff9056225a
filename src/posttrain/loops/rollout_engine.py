"""The engine that answers, as the options choose it, and how it gets the trainer's weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.config.schema import Config
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.models.lora import file_name
from posttrain.rollout.rollout import Rollout
from posttrain.rollout.transformers import TransformersRollout
from posttrain.rollout.vllm import VLLMRollout, write_model_folder


@contextmanager
def open_rollout(
    config: Config, lm: Any, load: Callable[[], Any], tokenizer: Any, end_ids: Sequence[int], world: World, logs: Path
) -> Iterator[Rollout]:
    """The rollout engine of this process. Every process must call this.

    `load` gives a model for transformers to answer with; of `lm` vLLM takes the config alone, and has no weights before the first
    `take`. Its log goes to `logs`.
    """
    device = world.device
    if config.rollout.name == "transformers":
        yield TransformersRollout(load(), tokenizer, config.rollout.batch_size, end_ids)
        return
    with tempfile.TemporaryDirectory(prefix="posttrain-vllm-") as folder:
        write_model_folder(lm, Path(folder))
        rollout = world.everyone(
            lambda: VLLMRollout.start(
                Path(folder),
                tokenizer,
                end_ids or known_ends(lm, tokenizer),
                config.vllm,
                dtype=device.compute_dtype(config.model.dtype),
                device=device,
                log=logs / f"vllm-{world.rank}.log",
                lora_rank=config.model.lora_rank,
                local_rank=int(os.environ.get("LOCAL_RANK", 0)),
            )
        )
        try:
            yield rollout
        finally:
            rollout.close()


def known_ends(lm: Any, tokenizer: Any) -> list[int]:
    """The end tokens that the model and its tokenizer name."""
    listed = lm.generation_config.eos_token_id if lm.generation_config is not None else None
    own = listed if isinstance(listed, list) else [listed]
    return sorted({int(i) for i in (*own, tokenizer.eos_token_id) if i is not None})


def hand_over(engine: Engine, rollout: Rollout) -> None:
    """Let the rollout engine answer with the trainer's weights as they are now. Every process must call this.

    A server gets the frozen weights once, and from then on the adapter alone.
    """
    if not (engine.adapters and isinstance(rollout, VLLMRollout)):
        rollout.take(engine.named_weights())
        return
    if not rollout.has_weights:
        rollout.take(engine.named_base_weights())
    adapter = ((file_name(name), weight) for name, weight in engine.named_adapter())
    rollout.take_adapter(adapter, engine.adapters.config.to_dict())
