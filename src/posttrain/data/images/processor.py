"""A model's own processor of images, asked for the text that it puts where an image stands and for the model's inputs."""

from __future__ import annotations

import copy
import re
import threading
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.messages import RowError
from posttrain.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

REFUSED = "image refused by the processor"
_OF_TEXT = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "special_tokens_mask"}
_KEPT_EXPANSIONS = 256  # photos have as many sizes as there are photos, and a text may have 200 kB
# the last is large, for what is cut into pieces from some size on (Gemma 3's pan_and_scan_min_crop_size)
_PROBES = ((448, 448), (1200, 300), (300, 1200), (640, 480), (3200, 800))


class ImageText:
    """What a processor of transformers writes for images, as text; of no model in particular.

    `mark` is what the chat template writes for one image, `token_id` the token that stands for a piece of one, and
    `placeholders` are it and those of other media. Raises InputError for a processor that expands no mark.
    """

    def __init__(self, processor: Any):
        mark = getattr(processor, "image_token", None)
        if not isinstance(mark, str) or not mark:
            raise InputError(
                f"{type(processor).__name__} names no mark of images (image_token), which rows with images need."
            )
        self.processor, self.mark = processor, mark
        self._writer = copy.copy(processor)  # the processor itself may be in use by other threads
        self._writer.tokenizer = _Recorder(processor.tokenizer)
        self._reader = copy.copy(processor)
        self._reader.tokenizer = _OneAtATime(processor.tokenizer)
        try:
            probes = {size: self.expanded(mark, [size]) for size in _PROBES}
        except RowError as error:
            raise InputError(f"{type(processor).__name__} cannot be used for rows with images: {error}.") from None
        ids = processor.tokenizer(probes[_PROBES[0]], add_special_tokens=False)["input_ids"]
        added = processor.tokenizer.added_tokens_decoder
        self.token_id: int = Counter(id_ for id_ in ids if id_ in added).most_common(1)[0][0]
        others = (getattr(processor, f"{medium}_token_id", None) for medium in ("video", "audio"))
        self.placeholders = frozenset({self.token_id, *(id_ for id_ in others if isinstance(id_, int))})
        self._repeats = self._one_rule(probes)
        self.expansion = lru_cache(_KEPT_EXPANSIONS)(self._expansion)

    def _expansion(self, width: int, height: int) -> str:
        """What the processor puts in the place of the mark of an image of that size. Raises RowError where it takes none."""
        if self._repeats is None:
            return self.expanded(self.mark, [(width, height)])
        return self._repeats.text(self._counted(width, height))

    def ids(self, width: int, height: int) -> np.ndarray:
        """The tokens of that text, int32."""
        ids = self.processor.tokenizer(self.expansion(width, height), add_special_tokens=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)

    def expanded(self, text: str, sizes: list[tuple[int, int]]) -> str:
        """The text as the processor hands it to its tokenizer, for blank images of these sizes (width, height)."""
        from PIL import Image

        blank = [Image.new("RGB", size) for size in sizes]
        try:
            self._writer(text=[text], images=[blank], return_tensors="pt")
        except _RecordedError as recorded:
            return recorded.text
        except Exception as error:  # what it refuses, and how, is the processor's choice
            raise _refusal(sizes, error) from None
        raise InputError(f"{type(self.processor).__name__} writes no text for images, which rows with images need.")

    def arrays(self, images: list[Image]) -> dict[str, np.ndarray]:
        """What the model takes of the images, by the names of its arguments. Threads may call it."""
        made = self._reader(text=[self.mark * len(images)], images=[images], return_tensors="pt")
        return {name: np.asarray(value) for name, value in made.items() if name not in _OF_TEXT}

    @property
    def key(self) -> str:
        """Changes with everything of the processor that changes ids."""
        import transformers

        return f"{transformers.__version__} {type(self.processor).__name__} {self.processor.to_json_string()}"

    def _counted(self, width: int, height: int) -> int:
        """Tokens of an image of that size as the processor counts them, which needs no pixels."""
        try:
            return int(self.processor._get_num_multimodal_tokens(image_sizes=[(height, width)]).num_image_tokens[0])
        except Exception as error:  # what it refuses, and how, is the processor's choice
            raise _refusal([(width, height)], error) from None

    def _one_rule(self, probes: dict[tuple[int, int], str]) -> _Repeats | None:
        """The rule that all of these expansions follow, if there is one and the processor counts tokens."""
        if not hasattr(self.processor, "_get_num_multimodal_tokens"):
            return None
        piece = self.processor.tokenizer.convert_ids_to_tokens(self.token_id)
        split = {size: _around_run(text, piece) for size, text in probes.items()}
        rules = {_Repeats(before, piece, after, self._counted(*size) - n) for size, (before, n, after) in split.items()}
        rule = rules.pop()
        return rule if not rules and piece not in rule.after else None


@dataclass(frozen=True)
class _Repeats:
    """Expansions in which nothing varies but how often one token stands in a row: `frame` times less than is counted."""

    before: str
    piece: str
    after: str
    frame: int

    def text(self, num_counted: int) -> str:
        return self.before + self.piece * (num_counted - self.frame) + self.after


def _around_run(text: str, piece: str) -> tuple[str, int, str]:
    """What stands before the first run of the piece, how often that has it, and what stands behind it."""
    before, _, rest = text.partition(piece)
    rest = piece + rest
    run = re.match(f"(?:{re.escape(piece)})*", rest)
    assert run
    return before, run.end() // len(piece), rest[run.end() :]


def _refusal(sizes: list[tuple[int, int]], error: Exception) -> RowError:
    shape = ", ".join(f"{width} x {height}" for width, height in sizes)
    return RowError(REFUSED, f"an image of {shape} pixels: the processor says: {error}")


class _RecordedError(Exception):
    """Ends a processor's work once its text is known."""

    def __init__(self, text: str):
        super().__init__(text)
        self.text = text


class _Recorder:
    """A tokenizer that is told a text and stops there; all else it leaves to the one that it stands for."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any = None, *args: Any, **kwargs: Any) -> Any:
        raise _RecordedError(text if isinstance(text, str) else text[0])


class _OneAtATime:
    """A tokenizer for several threads, which a tokenizer itself refuses to serve."""

    def __init__(self, tokenizer: Any):
        self._tokenizer, self._lock = tokenizer, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            return self._tokenizer(*args, **kwargs)
