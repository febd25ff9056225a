"""The engine that answers, as the options choose it, and how it gets the trainer's weights."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from posttrain.config.schema import Config
from posttrain.data.images.processor import ImageText
from posttrain.distributed.world import World
from posttrain.engine.engine import Engine
from posttrain.errors import InputError, RunError
from posttrain.models.lora import file_name
from posttrain.rollout.rollout import Rollout
from posttrain.rollout.transformers import TransformersRollout
from posttrain.rollout.vllm import VLLMRollout, write_model_folder

Weight = tuple[str, Tensor]


@contextmanager
def open_rollout(
    config: Config,
    lm: Any,
    load: Callable[[], Any],
    tokenizer: Any,
    end_ids: Sequence[int],
    world: World,
    logs: Path,
    lora_rank: int = 0,
    images: ImageText | None = None,
) -> Iterator[Rollout]:
    """The rollout engine of this process. Every process must call this.

    `load` gives a model for transformers to answer with; of `lm` vLLM takes the config alone, and has no weights before the first
    `take`. Its log goes to `logs`; with `lora_rank` it has room for an adapter. With `images` prompts may hold some, which vLLM is
    not given.
    """
    device = world.device
    if config.rollout.name == "transformers":
        yield TransformersRollout(load(), tokenizer, config.rollout.batch_size, end_ids, images)
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
                lora_rank=lora_rank,
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


def adapter_rank(engine: Engine) -> int:
    """The largest rank of the adapters in use, 0 without any."""
    if not engine.adapters:
        return 0
    config = engine.adapters.config
    return max([config.r, *(config.rank_pattern or {}).values()])


def hand_over(engine: Engine, rollout: Rollout) -> None:
    """Let the rollout engine answer with the trainer's weights as they are now. Every process must call this.

    A server gets the frozen weights once, and from then on the adapter alone. Raises what any process raises.
    """
    world, adapters = engine.world, engine.adapters
    world.watchdog.beat("handing over weights", patient=True)
    world.device.empty_cache()  # the server on this device needs what training used
    if not (adapters and isinstance(rollout, VLLMRollout)):
        give(engine.named_weights(), rollout.take, world)
        return
    if not rollout.has_weights:
        give(engine.named_base_weights(), rollout.take, world)
    adapter = ((file_name(name), weight) for name, weight in engine.named_adapter())
    give(adapter, partial(rollout.take_adapter, config=adapters.config.to_dict()), world)


def give(weights: Iterator[Weight], take: Callable[[Iterator[Weight]], None], world: World) -> None:
    """Let every process take the weights; an InputError or RunError of one is raised on all. Every process must call this.

    Whole weights are gathered from all processes, so that one that fails goes on gathering them for the others.
    """

    def take_or_gather() -> None:
        try:
            take(weights)
        except (InputError, RunError):
            for _ in weights:
                pass
            raise

    world.everyone(take_or_gather)
