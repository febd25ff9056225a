"""Marks of images that a chat template wrote -> what the model's processor puts there, before the text is tokenized.

A mark is the template's where all of its characters are; one that somebody typed stays text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from posttrain.data.encoded import EncodedImage
from posttrain.data.images.processor import ImageText
from posttrain.data.images.reading import decode, read_bytes
from posttrain.data.images.references import IN_AN_ANSWER, num_images
from posttrain.data.messages import RowError
from posttrain.data.provenance.borders import REFUSED, UNPROVEN
from posttrain.data.provenance.marked import GENERATED, TEMPLATE
from posttrain.data.provenance.template import Rendered
from posttrain.data.provenance.turns import Span
from posttrain.records import Conversation, ImageSource, Tokens

FOR_A_TEXT_MODEL = "images for a text model"
TYPED = "control string typed"
NUM_THREADS = 8  # decoding leaves Python's lock, and fetching waits
_MOST_COMPARED = 4  # images of a row whose whole text is compared with the processor's own


@dataclass(frozen=True)
class Expanded:
    """A rendering with its marks expanded. `ranges` are the characters of each image's expansion, [start, end)."""

    rendered: Rendered
    sources: tuple[ImageSource, ...] = ()
    marks: tuple[tuple[int, int], ...] = ()  # where they stood before
    ranges: tuple[tuple[int, int], ...] = ()

    def moved(self, span: Span, trained: bool) -> Span:
        """Where the span lies now. Raises RowError for a trained one with an image in it."""
        if trained and any(span.start < end and start < span.end for start, end in self.marks):
            raise RowError(IN_AN_ANSWER, f"message {span.message} is trained and holds an image; models answer in text")
        return replace(
            span,
            start=self._moved(span.start),
            own_start=self._moved(span.own_start),
            end=self._moved(span.end),
            reasoning_end=None if span.reasoning_end is None else self._moved(span.reasoning_end),
        )

    def _moved(self, position: int) -> int:
        before = [(old, new) for old, new in zip(self.marks, self.ranges, strict=True) if old[1] <= position]
        return position + before[-1][1][1] - before[-1][0][1] if before else position

    def images(self, offsets_TC: np.ndarray) -> tuple[EncodedImage, ...]:
        """The images with the tokens of their expansions."""
        found = []
        for source, (start, end) in zip(self.sources, self.ranges, strict=True):
            first = int(np.searchsorted(offsets_TC[:, 1], start, "right"))
            last = int(np.searchsorted(offsets_TC[:, 0], end, "left"))
            assert source.size
            found.append(EncodedImage(source, *source.size, first, last))
        return tuple(found)


class MarkExpander:
    """Expands the marks of a chat template by the model's processor of images."""

    def __init__(self, images: ImageText, tokenizer: Any):
        self._images, self._tokenizer = images, tokenizer
        self._mark = re.compile(re.escape(images.mark))
        self._placeholders = np.array(sorted(images.placeholders))
        self._compared: set[int] = set()
        # transformers' processors let the tokenizer begin a text that the template does not begin itself
        begins = tokenizer("")["input_ids"]
        self._begin = begins if begins == [tokenizer.bos_token_id] else []

    def expand(self, rendered: Rendered, conversation: Conversation) -> Expanded:
        """Raises RowError where the template does not write one mark for each image of the messages."""
        sources = conversation.images[: num_images(conversation.messages)]
        marks = [match.span() for match in self._mark.finditer(rendered.text) if _is_the_templates(rendered, match)]
        if len(marks) != len(sources):
            raise RowError(
                REFUSED, f"the chat template writes {len(marks)} marks {self._images.mark!r} for {len(sources)} images"
            )
        if not marks:
            return Expanded(rendered)
        texts, codes, ranges, done, length = [], [], [], 0, 0
        for (start, end), source in zip(marks, sources, strict=True):
            expansion = self._expansion(source)
            texts += [rendered.text[done:start], expansion]
            codes += [rendered.codes[done:start], rendered.codes[start] * len(expansion)]
            ranges.append((length + start - done, length + start - done + len(expansion)))
            length, done = ranges[-1][1], end
        text, code = "".join([*texts, rendered.text[done:]]), "".join([*codes, rendered.codes[done:]])
        self._compare(rendered.text, text, [source.size for source in sources if source.size])
        return Expanded(Rendered(text, code), sources, tuple(marks), tuple(ranges))

    def with_begin(self, text: str, ids_T: np.ndarray, offsets_TC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """With the token that begins a text in front, where the processor puts one there."""
        if not self._begin or text.startswith(self._tokenizer.bos_token):
            return ids_T, offsets_TC
        offsets_TC = np.concatenate([np.zeros((1, 2), np.int32), offsets_TC]).astype(np.int32)
        return np.concatenate([self._begin, ids_T]).astype(np.int32), offsets_TC

    def check_placeholders(self, ids_T: np.ndarray, images: Sequence[EncodedImage]) -> None:
        """Raise RowError for a token that stands for a piece of an image where there is none."""
        stray_T = np.isin(ids_T, self._placeholders)
        for image in images:
            stray_T[image.begin : image.end] = False
        if stray_T.any():
            token = self._tokenizer.convert_ids_to_tokens(int(ids_T[stray_T.argmax()]))
            raise RowError(TYPED, f"the row holds {token!r}, which stands for a piece of an image; remove it")

    def _expansion(self, source: ImageSource) -> str:
        assert source.size
        try:
            return self._images.expansion(*source.size)
        except RowError as error:
            raise RowError(error.kind, error.found, source.path) from None

    def _compare(self, text: str, expanded: str, sizes: list[tuple[int, int]]) -> None:
        """Raise RowError unless the processor writes the same, asked once for each number of images."""
        if len(sizes) in self._compared or len(sizes) > _MOST_COMPARED or text.count(self._images.mark) != len(sizes):
            return
        if self._images.expanded(text, sizes) != expanded:
            raise RowError(UNPROVEN, "the model's processor changes more of the text than the marks of images")
        self._compared.add(len(sizes))


def look_at_all(
    conversations: Sequence[Conversation | Tokens | RowError],
) -> list[Conversation | Tokens | RowError]:
    """The conversations with the sizes of their images, each of which is decoded once, and with what was fetched for them.
    In the place of a row with an image that cannot be used stands the reason."""
    if not any(isinstance(c, Conversation) and c.images for c in conversations):
        return list(conversations)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        looks = [pool.map(_looked_at, c.images) if isinstance(c, Conversation) else () for c in conversations]
        return [_with_images(c, list(looked)) for c, looked in zip(conversations, looks, strict=True)]


def look_at(conversation: Conversation) -> Conversation:
    """As `look_at_all`, for one. Raises RowError."""
    (looked,) = look_at_all([conversation])
    if not isinstance(looked, Conversation):
        assert isinstance(looked, RowError)
        raise looked
    return looked


def refuse_images(conversation: Conversation) -> None:
    """Raise RowError if there are any: the model takes none."""
    if conversation.images:
        count = len(conversation.images)
        raise RowError(
            FOR_A_TEXT_MODEL,
            f"the row has {count} image{'s' if count > 1 else ''}, and the model takes none: choose a model that sees with "
            "model.path, or remove the images from the row",
        )


def _looked_at(source: ImageSource) -> ImageSource | RowError:
    if source.size is not None:
        return source
    try:
        if source.path is not None and "://" in source.path:
            fetched = ImageSource(data=read_bytes(source))
            return replace(fetched, size=_size(fetched, source.path))
        return replace(source, size=decode(source).size)
    except RowError as error:
        return error


def _size(fetched: ImageSource, url: str) -> tuple[int, int]:
    try:
        return decode(fetched).size
    except RowError as error:
        raise RowError(error.kind, f"{url}: {error}") from None


def _with_images(
    conversation: Conversation | Tokens | RowError, looked: list[ImageSource | RowError]
) -> Conversation | Tokens | RowError:
    wrong = next((image for image in looked if isinstance(image, RowError)), None)
    if wrong is not None or not isinstance(conversation, Conversation):
        return wrong or conversation
    return replace(conversation, images=tuple(image for image in looked if isinstance(image, ImageSource)))


def _is_the_templates(rendered: Rendered, match: re.Match[str]) -> bool:
    codes = rendered.code_array[match.start() : match.end()] & ~np.uint32(GENERATED)
    return bool((codes == ord(TEMPLATE)).all())
