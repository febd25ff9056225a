"""Rows -> what is shown of each: its samples, token by token, cut as a run would cut them, or why there is none.

Shape suffixes: T tokens of a sample, M messages of its conversation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise
from typing import Any

import numpy as np

from posttrain.data.chat import ChatTokenizer
from posttrain.data.encoded import NO_MESSAGE, Encoded, EncodedImage, Part
from posttrain.data.formats import Columns, RowError, conversation_or_error
from posttrain.data.show.blocks import owners
from posttrain.data.show.pictures import place_of
from posttrain.data.show.reasons import reasons_of
from posttrain.data.sources import Row
from posttrain.data.truncation import lost_image, why_lost
from posttrain.records import Conversation

ROWS_AT_ONCE = 64
# what stands for a role where there is no message: the template wrote it, or the row came as ids
TEMPLATE, GIVEN = "template", "tokens"


@dataclass(frozen=True)
class Length:
    """The longest sample that a run takes, and what becomes of longer ones: data.max_length and data.truncation."""

    most: int
    how: str


@dataclass(frozen=True)
class Refused:
    """A row that gives no sample."""

    source: str
    row: int
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"row": self.row, "refused": self.reason}


@dataclass(frozen=True)
class Shown:
    """One sample. `number` counts those of a row that gives several. A run trains tokens [begin, end) of it, or none of
    it where `unused` says why."""

    source: str
    row: int
    number: int | None
    encoded: Encoded
    roles_M: tuple[str, ...]
    controls_T: np.ndarray  # bool: a token of its own in the tokenizer, such as <|im_end|>
    begin: int
    end: int
    unused: str = ""
    decoded: dict[int, str] = field(default_factory=dict)  # texts of tokens that have no characters of their own

    def __len__(self) -> int:
        return len(self.encoded)

    @property
    def num_cut(self) -> int:
        return len(self) - (self.end - self.begin)

    @property
    def num_used(self) -> int:
        """Tokens that a run reads."""
        return 0 if self.unused else self.end - self.begin

    @property
    def num_trained(self) -> int:
        return 0 if self.unused else int((self.targets_T > 0).sum())

    @cached_property
    def targets_T(self) -> np.ndarray:
        """Weights as a run counts them: none for what is cut, nor for the first token, which nothing predicts."""
        weights_T = self.encoded.weights_T.copy()
        weights_T[: self.begin + 1] = 0
        weights_T[self.end :] = 0
        return weights_T

    @cached_property
    def roles_T(self) -> list[str]:
        """The role of the message or of the turn that a token belongs to."""
        return [self.role_of(message) for message in owners(self.encoded).tolist()]

    def role_of(self, message: int) -> str:
        if message != NO_MESSAGE:
            return self.roles_M[message]
        return TEMPLATE if self.roles_M else GIVEN

    @cached_property
    def reasons_T(self) -> list[str]:
        """Why each token is trained, or not."""
        reasons = reasons_of(self.encoded, self.roles_M)
        if self.unused:
            return [f"left out with its sample; {reason} otherwise" for reason in reasons]
        if self.num_cut:
            cut = f"cut: the sample is {self.num_cut:,} tokens too long for data.max_length"
            reasons = [
                reason if self.begin <= t < self.end else f"{cut}; {reason} otherwise"
                for t, reason in enumerate(reasons)
            ]
        if self.encoded.weights_T[self.begin] > 0:
            reasons[self.begin] = "not trained: the first token of a sample, which nothing before it predicts"
        return reasons

    @property
    def pieces_T(self) -> list[str]:
        """The text of each token; a token that is part of a character shows the whole of it."""
        text, decoded = self.encoded.text, self.decoded
        return [
            text[start:end] if end > start else decoded[t]
            for t, (start, end) in enumerate(self.encoded.offsets_TC.tolist())
        ]

    @cached_property
    def new_T(self) -> list[str]:
        """What each token adds to the text: all pieces in a row are the text, each character once."""
        reached, added = 0, []
        for t, (start, end) in enumerate(self.encoded.offsets_TC.tolist()):
            added.append(self.encoded.text[max(start, reached) : end] if end > start else self.decoded[t])
            reached = max(reached, end)
        return added

    @cached_property
    def joined_T(self) -> list[bool]:
        """Whether a token shares a character with the one before it."""
        offsets = self.encoded.offsets_TC.tolist()
        return [False, *(before[1] > here[0] and here[1] > here[0] for before, here in pairwise(offsets))]

    def as_json(self) -> dict[str, Any]:
        """The whole sample, whatever a run would cut of it."""
        encoded = self.encoded
        told = {
            "row": self.row,
            "ids": encoded.ids_T.tolist(),
            "pieces": self.pieces_T,
            "trained": encoded.trained_T.tolist(),
            "roles": self.roles_T,
            "parts": [Part(part).name.lower() for part in encoded.parts_T.tolist()],
            "messages": [None if m == NO_MESSAGE else m for m in encoded.messages_T.tolist()],
            "weights": encoded.weights_T.tolist(),
            "reasons": reasons_of(encoded, self.roles_M),
            "notes": list(encoded.notes),
        }
        if encoded.images:
            told["images"] = [_image_json(image) for image in encoded.images]
        if self.number is not None:
            told["sample"] = self.number
        if self.num_cut:
            told["truncated"] = self.num_cut
        if self.unused:
            told["unused"] = self.unused
        return told


def _image_json(image: EncodedImage) -> dict[str, Any]:
    """Tokens [begin, end) are what stands for it."""
    told = {"begin": image.begin, "end": image.end, "width": image.width, "height": image.height}
    return told | {"source": place_of(image.source)}


@dataclass(frozen=True)
class Group:
    """Rows under one heading: all of them, or those of a micro-batch."""

    rows: Iterable[list[Shown] | Refused]
    title: str = ""
    note: str = ""


def shown_rows(
    rows: Iterable[Row], columns: Columns, chat: ChatTokenizer, length: Length
) -> Iterator[list[Shown] | Refused]:
    """For each row its samples, or why it gives none."""
    rows = iter(rows)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        conversations = [conversation_or_error(row.values, columns, row.folder) for row in some]
        encoded = iter(chat.encode_many([c for c in conversations if not isinstance(c, RowError)]))
        for row, conversation in zip(some, conversations, strict=True):
            samples = conversation if isinstance(conversation, RowError) else next(encoded)
            if isinstance(samples, RowError):
                yield Refused(row.source, row.number, f"{samples.kind}: {samples}")
                continue
            roles_M = tuple(m["role"] for m in conversation.messages) if isinstance(conversation, Conversation) else ()
            yield [
                shown_sample(sample, roles_M, chat.tokenizer, length, row, number if len(samples) > 1 else None)
                for number, sample in enumerate(samples)
            ]


def shown_sample(
    encoded: Encoded, roles_M: Sequence[str], tokenizer: Any, length: Length, row: Row, number: int | None = None
) -> Shown:
    """The sample with what a run would cut of it, and why it would leave it out, if it would."""
    begin, end, unused = 0, len(encoded), ""
    if end > length.most:
        too_long = f"{end:,} tokens are more than data.max_length={length.most}"
        match length.how:
            case "left":
                begin = end - length.most
            case "right":
                end = length.most
            case "drop":
                unused = f"dropped: {too_long} (data.truncation=drop)"
            case "error":
                unused = f"a run stops here: {too_long} (data.truncation=error; choose drop, left or right)"
    if not unused and (image := lost_image(encoded.images, begin, end, length.most)):
        unused = f"dropped: {why_lost(image, length.most)}"
    if not unused and not (encoded.weights_T[begin + 1 : end] > 0).any():
        unused = f"dropped: no trained token {'is left' if end - begin < len(encoded) else 'in it'}"
    starts, ends = encoded.offsets_TC.T
    bare = np.flatnonzero(ends <= starts).tolist()
    return Shown(
        row.source, row.number, number, encoded, tuple(roles_M), np.isin(encoded.ids_T, _controls(tokenizer)),
        begin, end, unused, {t: tokenizer.decode([int(encoded.ids_T[t])]) for t in bare},
    )  # fmt: skip


def _controls(tokenizer: Any) -> list[int]:
    return [i for i, token in tokenizer.added_tokens_decoder.items() if not str(token).isspace()]
