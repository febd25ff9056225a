"""A chunk of rows -> everything that the audit wants to know of them, small enough to travel between processes.

Shape suffixes: R rows of the chunk, K places of a signature, N samples (a row may become several), T tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from posttrain.data.audit.duplicates import (
    NO_HASH,
    apart_by_images,
    compared_text,
    question_hash,
    row_hash,
    signatures,
)
from posttrain.data.audit.images import check_images, image_keys
from posttrain.data.audit.rows import check_conversation
from posttrain.data.chat import ChatTokenizer
from posttrain.data.encoded import Encoded, Part, kinds_of_notes
from posttrain.data.formats import Columns, RowError, conversation_or_error
from posttrain.data.images.expansion import look_at_all
from posttrain.data.sources import Row
from posttrain.data.truncation import IMAGE_TOO_LONG, lost_image, why_lost
from posttrain.records import Conversation, Tokens

TOO_LONG, NOTHING_TRAINED = "longer than data.max_length", "no trained token left"  # as training counts them

_FATE = {
    "error": "stop the run (data.truncation=error)",
    "drop": "are left out (data.truncation=drop)",
    "left": "lose their beginning (data.truncation=left)",
    "right": "lose their end (data.truncation=right)",
}
_PART_NAMES = tuple(part.name.lower() for part in Part)
IMAGE = "image"  # the role that tokens of images are counted under

Record = Conversation | Tokens | RowError
PartOfRole = tuple[str, str]  # such as ("assistant", "text")


@dataclass(frozen=True)
class Checks:
    """What rows are checked against. Without `make_chat` nothing is tokenized; it must be picklable."""

    columns: Columns
    make_chat: Callable[[], ChatTokenizer] | None = None
    max_length: int = 4096
    truncation: str = "error"


@dataclass
class Checked:
    """What became of a chunk. Findings are (number in the chunk, kind, found, reason)."""

    places: list[tuple[str, int]]
    row_hashes_R: np.ndarray  # uint64
    question_hashes_R: np.ndarray  # uint64
    signatures_RK: np.ndarray  # uint16
    images_R: list[tuple[int, ...]]  # for each image of a row what is equal where two are the same file
    findings: list[tuple[int, str, str, str]] = field(default_factory=list)
    lengths_N: list[int] = field(default_factory=list)  # before truncation
    kept_lengths_N: list[int] = field(default_factory=list)  # after it, of the samples that are used
    num_trained: int = 0  # targets after truncation
    tokens: Counter[PartOfRole] = field(default_factory=Counter)  # before truncation
    trained: Counter[PartOfRole] = field(default_factory=Counter)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)  # width and height of those that can be read
    image_tokens: list[int] = field(default_factory=list)

    def add(self, number: int, kind: str, found: str, reason: str = "") -> None:
        self.findings.append((number, kind, found, reason))


def compare_only(columns: Columns, rows: tuple[Row, ...]) -> Checked:
    """Hashes and signatures alone."""
    return _compared(rows, [conversation_or_error(row.values, columns, row.folder) for row in rows])


class ChunkChecker:
    """Checks chunks of rows, with a tokenizer of its own."""

    def __init__(self, checks: Checks):
        self.checks = checks
        self.chat = checks.make_chat() if checks.make_chat else None

    def __call__(self, rows: tuple[Row, ...]) -> Checked:
        records = [conversation_or_error(row.values, self.checks.columns, row.folder) for row in rows]
        checked = _compared(rows, records)
        records = look_at_all(records)
        for number, record in enumerate(records):
            if isinstance(record, RowError):
                checked.add(number, "unusable", f"{record.kind}: {record}", record.kind)
            elif isinstance(record, Conversation):
                for kind, found in (*check_conversation(record), *check_images(record.images)):
                    checked.add(number, kind, found)
                checked.image_sizes += [image.size for image in record.images if image.size]
        for number, record, samples in self._encoded(records):
            if isinstance(samples, RowError):
                checked.add(number, "unusable", f"{samples.kind}: {samples}", samples.kind)
                continue
            for note, kind in kinds_of_notes(s for s in samples if isinstance(s, Encoded)).items():
                checked.add(number, "note", note, kind)
            for sample in samples:
                _count_sample(checked, number, record, sample, self.checks)
            # of several samples the last has all of the row's images
            images = samples[-1].images if isinstance(samples[-1], Encoded) else ()
            checked.image_tokens += [image.end - image.begin for image in images]
        return checked

    def _encoded(
        self, records: list[Record]
    ) -> Iterator[tuple[int, Conversation | Tokens, list[Encoded | Tokens] | RowError]]:
        known = [(number, record) for number, record in enumerate(records) if not isinstance(record, RowError)]
        if self.chat is None:
            known = [(number, record) for number, record in known if isinstance(record, Tokens)]
        # ready-made tokens too: a tokenizer may lack their ids
        encoded = iter(self.chat.encode_many([record for _, record in known]) if self.chat else [])
        for number, record in known:
            samples = next(encoded, None)
            if isinstance(record, Tokens) and not isinstance(samples, RowError):
                yield number, record, [record]
            else:
                yield number, record, samples  # type: ignore[misc]


def _compared(rows: tuple[Row, ...], records: list[Record]) -> Checked:
    known = [None if isinstance(r, RowError) else r for r in records]
    images_R = [() if r is None else image_keys(r) for r in known]
    both = list(zip(known, images_R, strict=True))
    return Checked(
        [(row.source, row.number) for row in rows],
        np.array([NO_HASH if r is None else row_hash(r, images) for r, images in both], dtype=np.uint64),
        np.array([NO_HASH if r is None else question_hash(r, images) for r, images in both], dtype=np.uint64),
        apart_by_images(signatures(["" if r is None else compared_text(r) for r in known]), images_R),
        images_R,
    )


def _count_sample(
    checked: Checked, number: int, record: Conversation | Tokens, sample: Encoded | Tokens, checks: Checks
) -> None:
    length = len(sample.ids_T)
    checked.lengths_N.append(length)
    _count_parts(checked, record, sample)
    begin, end = _kept(length, checks)
    if isinstance(sample, Encoded):
        kept = (begin, end) if begin < end else (0, length)
        if image := lost_image(sample.images, *kept, checks.max_length):
            said = why_lost(image, checks.max_length)
            checked.add(number, "unusable", f"{IMAGE_TOO_LONG}: {said}", IMAGE_TOO_LONG)
            return
        _check_turns(checked, number, sample, begin, end, checks)
    if length > checks.max_length:
        checked.add(number, "too-long", f"{length} tokens", _FATE[checks.truncation])
    if begin == end:
        return
    num_trained = int((sample.weights_T[begin + 1 : end] > 0).sum())  # the first token is nobody's target
    if num_trained:
        checked.kept_lengths_N.append(end - begin)
        checked.num_trained += num_trained
    else:
        checked.add(number, "unusable", f"{NOTHING_TRAINED}: none of {end - begin} tokens is a target", NOTHING_TRAINED)


def _kept(length: int, checks: Checks) -> tuple[int, int]:
    """The tokens that data.truncation leaves; none where it leaves the sample out, or stops."""
    if length <= checks.max_length:
        return 0, length
    match checks.truncation:
        case "left":
            return length - checks.max_length, length
        case "right":
            return 0, checks.max_length
    return 0, 0


def _check_turns(checked: Checked, number: int, sample: Encoded, begin: int, end: int, checks: Checks) -> None:
    for turn in sample.turns:
        if turn.weight <= 0 or turn.begin == turn.end:
            continue
        if not sample.weights_T[turn.end - 1] > 0:
            checked.add(number, "end-untrained", f"message {turn.message} ends at token {turn.end - 1}, of weight 0")
        if end > begin and (turn.begin < begin or turn.end > end):
            lost = max(begin - turn.begin, 0) + max(turn.end - end, 0)
            lost, size = min(lost, turn.end - turn.begin), turn.end - turn.begin
            checked.add(
                number, "cut-answer", f"message {turn.message} loses {lost} of {size} tokens at the {checks.truncation}"
            )


def _count_parts(checked: Checked, record: Conversation | Tokens, sample: Encoded | Tokens) -> None:
    if isinstance(sample, Tokens) or isinstance(record, Tokens):
        checked.tokens["pre-tokenized", "text"] += len(sample.ids_T)
        checked.trained["pre-tokenized", "text"] += int((sample.weights_T > 0).sum())
        return
    roles = ["template", *(message["role"] for message in record.messages), IMAGE]
    codes_T = (sample.messages_T.astype(np.int64) + 1) * len(_PART_NAMES) + sample.parts_T
    for image in sample.images:
        codes_T[image.begin : image.end] = (len(roles) - 1) * len(_PART_NAMES) + Part.TEMPLATE
    for counter, counts in (
        (checked.tokens, np.bincount(codes_T)),
        (checked.trained, np.bincount(codes_T[sample.trained_T])),
    ):
        for code in np.flatnonzero(counts):
            message, part = divmod(int(code), len(_PART_NAMES))
            counter[roles[message], _PART_NAMES[part]] += int(counts[code])
