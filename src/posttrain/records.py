"""The four things that travel through posttrain, and nothing else does.

    row -> Conversation -> Sample -> MicroBatch            (training)
    row -> Conversation -> prompt ids -> Completion        (evaluation, rollouts)

Shape suffixes: T tokens of a row or of a packed micro-batch, N documents packed into it.
Arrays are numpy: data is prepared without torch, and the engine alone knows devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

IGNORED_LABEL = -100


@dataclass(frozen=True)
class ImageSource:
    """One image, encoded as it came: the bytes of a JPEG, PNG or other file, or the path of one. Exactly one of the two.

    `size` is width and height in pixels, once it has been decoded; from then on, one of another size is another image.

    >>> ImageSource(path="images/1.jpg")
    """

    path: str | None = None
    data: bytes | memoryview | None = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Conversation:
    """One row as messages, in OpenAI's form, with what rendering it and judging an answer need.

    `messages` hold what the template is to see and nothing else. `weights`, if there are any, has one entry a message: how
    much its tokens count, or None where the run's options decide. `template_kwargs` go to the chat template, over the run's.
    `images` are those of the parts {"type": "image"} of the messages, in their order. `notes` say what a person should know of
    how the row was read.

    >>> Conversation([{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "#### 7"}], ground_truth="7")
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    weights: tuple[float | None, ...] | None = None
    ground_truth: str | None = None
    data_source: str | None = None
    extra_info: dict[str, Any] = field(default_factory=dict)
    images: tuple[ImageSource, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """One row that was tokenized before it came here. `weights_T[t]` says how much token t counts as a target.

    >>> Tokens(ids_T=np.array([5, 6, 7]), weights_T=np.array([0, 1, 1]))
    """

    ids_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32


@dataclass(frozen=True)
class Sample:
    """One tokenized row. `weights_T[t]` says how much token t counts as a target: 0 is untrained, 1 is trained.

    `signals` are what a loss wants to know of each token besides (float32, T): in reinforcement learning `advantages`,
    `old_logprobs`, `rollout_logprobs`, `reference_logprobs`.

    >>> Sample(row=0, ids_T=np.array([5, 6, 7]), weights_T=np.array([0, 1, 1]))
    """

    row: int
    ids_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32
    signals: dict[str, np.ndarray] = field(default_factory=dict)
    prompt_length: int = 0  # untrained tokens at its beginning that it may share with other answers to the same prompt
    images: tuple[ImageSource, ...] = ()  # whose tokens are among `ids_T`, in their order

    def __len__(self) -> int:
        return len(self.ids_T)


# of each document of a micro-batch, what the model's processor makes of its images, by the names of the model's arguments
# (`pixel_values`, `image_grid_thw`); nothing for a document without images
ImageArrays = tuple[dict[str, np.ndarray], ...]


@dataclass(frozen=True)
class MicroBatch:
    """Documents packed into one row for one forward pass. Labels are already shifted, inside each document only.

    `weights_T[t]` and each of `signals` belong to `labels_T[t]`, the token after t; the last token of a document has weight 0.
    A document may be a prompt with several answers, none of which sees another: first the prompt without its last token, then for
    each answer that token and its own, their positions following the prompt's. `branches_N` gives the tokens of each such part.
    A micro-batch without documents holds one token of weight 0: a rank without rows still joins every collective.
    """

    ids_T: np.ndarray  # int64
    labels_T: np.ndarray  # int64, IGNORED_LABEL where there is nothing to predict
    weights_T: np.ndarray  # float32
    positions_T: np.ndarray  # int64, from 0 in each document
    lengths_N: tuple[int, ...]  # tokens of each document, in order
    rows_N: tuple[int, ...]  # where each document came from; empty for a filler
    signals: dict[str, np.ndarray] = field(default_factory=dict)  # float32, T each; none in a filler
    branches_N: tuple[tuple[int, ...], ...] = ()  # (tokens,) for a plain document; () where all are plain
    num_filling: int = 0  # tokens behind the last document that stand for nothing
    images: Callable[[], ImageArrays] | None = None  # waits until workers have read them; None without images

    @property
    def parts(self) -> tuple[int, ...]:
        """Tokens of each stretch of tokens that follow each other: documents, or the parts of those that branch."""
        return tuple(length for branches in self.branches_N for length in branches) or self.lengths_N

    @property
    def num_tokens(self) -> int:
        """Real tokens: those of rows."""
        return sum(self.lengths_N[: len(self.rows_N)]) - (self.num_filling if self.rows_N else 0)


@dataclass(frozen=True)
class Segment:
    """Part of a completion: what the model wrote (trained) or what a tool answered (not).

    `logprobs_T` is the log-probability of each token as it was drawn, under softmax(logits / temperature) over the whole
    vocabulary, whatever top_p and top_k left out; at temperature 0 that of temperature 1.
    """

    ids_T: np.ndarray  # int32
    logprobs_T: np.ndarray | None = None  # float32
    trained: bool = True


@dataclass(frozen=True)
class Completion:
    """An answer as the model gave it: ids, never re-tokenized, and the text they decode to.

    Where a template rewrites history between turns, one answer is several: the `earlier` ones, each with the prompt that it
    was given for, and this last one, whose text is judged.

    >>> Completion(prompt_ids_T=np.array([1, 2]), segments=[Segment(np.array([3]))], text="7", stopped=True)
    """

    prompt_ids_T: np.ndarray  # int32
    segments: list[Segment] = field(default_factory=list)
    text: str = ""
    stopped: bool = True  # False: cut at the length limit
    earlier: tuple[Completion, ...] = ()

    @property
    def pieces(self) -> tuple[Completion, ...]:
        """The earlier ones and this last one."""
        return (*self.earlier, self)

    @property
    def num_trained(self) -> int:
        """Tokens that the model wrote, in all pieces."""
        segments = (segment for piece in self.pieces for segment in piece.segments)
        return sum(len(segment.ids_T) for segment in segments if segment.trained)
