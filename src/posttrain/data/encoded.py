"""A conversation as it will be trained: ids, weights, and for every token where it came from.

Shape suffixes: T tokens of the conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from posttrain.records import ImageSource

NO_MESSAGE = -1


class Part(IntEnum):
    """What of a message, or of what surrounds messages, a token belongs to."""

    TEMPLATE = 0  # written by the template itself
    NAME = 1  # role, name or id in a header
    TEXT = 2
    REASONING = 3
    TOOL_CALL = 4
    TOOLS = 5  # descriptions of the tools
    END = 6  # the token that ends a turn
    UNKNOWN = 7  # written through an operation that loses where its characters came from


@dataclass(frozen=True)
class Turn:
    """What the model must produce for one message: tokens [begin, end), the token that ends the turn included.

    `weight` 0 means that the turn is context only, and `why` says by whose choice.
    """

    message: int
    begin: int
    end: int
    weight: float
    why: str


@dataclass(frozen=True)
class EncodedImage:
    """One image among the ids: its pixels, and the tokens [begin, end) that the processor writes for it.

    Some of those stand for pieces of the image; others may frame them.
    """

    source: ImageSource  # with its bytes, if it was fetched
    width: int
    height: int
    begin: int
    end: int


@dataclass(frozen=True)
class Encoded:
    """Ids of a rendered conversation with, for each, its weight as a target and where it came from.

    `offsets_TC[t]` are the first character of token t in `text` and the one after its last. `turns` are those of the
    roles that can be trained, in order, chosen or not. `notes` say what a person should know of this row. `images` are in the
    order of their tokens.
    """

    text: str
    ids_T: np.ndarray  # int32
    weights_T: np.ndarray  # float32, 0 is untrained
    offsets_TC: np.ndarray  # int32 (T, 2)
    messages_T: np.ndarray  # int32, the message's number, or NO_MESSAGE
    parts_T: np.ndarray  # uint8, a Part
    turns: tuple[Turn, ...] = ()
    notes: tuple[str, ...] = ()
    images: tuple[EncodedImage, ...] = ()

    def __len__(self) -> int:
        return len(self.ids_T)

    @property
    def trained_T(self) -> np.ndarray:
        return self.weights_T > 0


def kinds_of_notes(samples: Iterable[Encoded]) -> dict[str, str]:
    """Each note on the samples of a row, once, and its kind: the note without the message's number and long quotations."""
    notes = dict.fromkeys(note for sample in samples for note in sample.notes)
    return {note: re.sub(r"'[^']{30,}'", "'…'", re.sub(r"^message \d+: ", "", note)) for note in notes}
