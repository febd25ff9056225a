"""What a rollout engine is asked, and what it answers: transformers and vLLM behind one protocol."""

# T tokens

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor

from posttrain.records import Completion, ImageSource


@dataclass(frozen=True)
class Request:
    """One answer that is wanted.

    `key` says what its sampling noise is for, such as (seed, step, row, number of the answer): the noise is a function of it and of
    the position alone. Positions count from `first_position`, which is not 0 where an answer goes on after a tool's.
    """

    prompt_ids_T: np.ndarray  # int32
    key: tuple[int, ...]
    max_new_tokens: int
    first_position: int = 0
    images: tuple[ImageSource, ...] = ()  # whose tokens are in the prompt, in their order

    @property
    def prompt(self) -> tuple[bytes, tuple[int, ...]]:
        """The same for requests that ask the same: ids, and the very images that they are of."""
        return self.prompt_ids_T.tobytes(), tuple(map(id, self.images))


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; means the same in every engine. Temperature 0 takes the likeliest; `top_k` 0 leaves all.

    Those of `never` are not drawn: one that stands for an image stands for nothing in an answer.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    never: tuple[int, ...] = ()


class Rollout(Protocol):
    """A model that answers prompts given as token ids, and stops at its end tokens.

    `warnings` are what a person should hear; who says them takes them out.
    """

    warnings: list[str]

    def take(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Answer with these weights from now on: all of the plain model's, by its own names."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, advance: Callable[[int], None] = lambda done: None
    ) -> list[Completion]:
        """One completion a request, in their order, with ids and log-probabilities. `advance` hears of each that is done."""

    def sleep(self) -> None:
        """Give back the device's memory until the next `take`."""

    def close(self) -> None:
        """End for good."""
