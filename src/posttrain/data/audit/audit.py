"""The audit of a whole set: rows stream through, and what stays in memory is about 150 bytes a row.

Shape suffixes: R rows of all files, V validation rows, K places of a signature, N samples.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import IO, Any

import numpy as np

from posttrain.data.audit.chunk import Checked, Checks, ChunkChecker, PartOfRole, compare_only
from posttrain.data.audit.duplicates import NO_HASH, SIGNATURE_PLACES, duplicates, near_duplicates, near_matches
from posttrain.data.audit.findings import NUMBERS, Finding, Findings
from posttrain.data.sources import Source, read_rows
from posttrain.data.workers import map_chunks
from posttrain.errors import InputError

UNRECOGNISED = ("no conversation recognised", "no column ")  # beginnings of reasons that an option may be the cause of


class Column:
    """Numbers that are added in chunks, kept once in memory."""

    def __init__(self, dtype: Any, width: int = 1):
        self._dtype, self._width, self._bytes = np.dtype(dtype), width, bytearray()

    def append(self, values: Any) -> None:
        self._bytes += np.asarray(values, dtype=self._dtype).tobytes()

    @property
    def values(self) -> np.ndarray:
        found = np.frombuffer(self._bytes, dtype=self._dtype)
        return found if self._width == 1 else found.reshape(-1, self._width)


@dataclass
class Compared:
    """What rows of one set are compared by, and where each stands."""

    row_hashes: Column = field(default_factory=lambda: Column(np.uint64))
    question_hashes: Column = field(default_factory=lambda: Column(np.uint64))
    signatures: Column = field(default_factory=lambda: Column(np.uint16, SIGNATURE_PLACES))
    has_images: Column = field(default_factory=lambda: Column(np.bool_))
    image_keys: Column = field(default_factory=lambda: Column(np.uint64))
    num_rows: int = 0
    files: list[str] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)  # the number of each file's first row

    def append(self, checked: Checked) -> None:
        for number, (file, row) in enumerate(checked.places, self.num_rows):
            if row == 0:
                self.files.append(file)
                self.begins.append(number)
        self.num_rows += len(checked.places)
        self.row_hashes.append(checked.row_hashes_R)
        self.question_hashes.append(checked.question_hashes_R)
        self.signatures.append(checked.signatures_RK)
        self.has_images.append([bool(images) for images in checked.images_R])
        self.image_keys.append([key for images in checked.images_R for key in images])

    def place(self, number: int) -> tuple[str, int]:
        file = bisect_right(self.begins, number) - 1
        return self.files[file], number - self.begins[file]

    def said(self, number: int, beside: int | None = None) -> str:
        """Where a row stands, for one who looks at the row `beside` it."""
        file, row = self.place(number)
        is_here = beside is not None and file == self.place(beside)[0]
        return f"row {row} of this file" if is_here else f"{file} row {row}"

    def rows_a_file(self) -> list[dict[str, Any]]:
        counts = np.diff([*self.begins, self.num_rows]).tolist()
        return [{"file": file, "rows": rows} for file, rows in zip(self.files, counts, strict=True)]


@dataclass
class Audit:
    """Everything that was found. `kinds_R` has, for each row, a bit for each kind that was found in it."""

    findings: Findings
    train: Compared = field(default_factory=Compared)
    val: Compared = field(default_factory=Compared)
    kinds_R: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint32))
    lengths: Column = field(default_factory=lambda: Column(np.int32))
    kept_lengths: Column = field(default_factory=lambda: Column(np.int32))
    image_sizes: Column = field(default_factory=lambda: Column(np.int32, 2))
    image_tokens: Column = field(default_factory=lambda: Column(np.int32))
    num_trained: int = 0
    tokens: Counter[PartOfRole] = field(default_factory=Counter)
    trained: Counter[PartOfRole] = field(default_factory=Counter)

    def rows_with(self, kinds: tuple[str, ...]) -> np.ndarray:
        """Which rows have a finding of any of these kinds."""
        return (self.kinds_R & sum(1 << NUMBERS[kind] for kind in kinds)) > 0


def audit(
    sources: list[Source],
    val_sources: list[Source],
    checks: Checks,
    *,
    file: IO[str] | None = None,
    num_workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Audit:
    """Check every row of the sources, and compare them with each other and with the validation rows.

    Every finding goes to `file` as a line of JSON. Raises InputError where no row is recognised.
    """
    found = Audit(Findings(file))
    bits = Column(np.uint32)
    for checked in map_chunks(partial(ChunkChecker, checks), read_rows(sources), num_workers):
        if not found.train.num_rows:
            _check_recognised(checked)
        bits.append(_add_chunk(found, checked))
        progress(len(checked.places))
    if not found.train.num_rows:
        raise InputError(f"{', '.join(source.name for source in sources)}: no rows in it.")
    found.kinds_R = bits.values.copy()
    for checked in map_chunks(partial(partial, compare_only, checks.columns), read_rows(val_sources), num_workers):
        found.val.append(checked)
        progress(len(checked.places))
    for number, kind, text in chain(_duplicates(found), _other_answers(found.train), _leaks(found)):
        found.findings.add(Finding(*found.train.place(number), kind, text))
        found.kinds_R[number] |= 1 << NUMBERS[kind]
    return found


def _check_recognised(first: Checked) -> None:
    """Raise InputError where no row has the columns that are looked for: then an option is wrong, and not the rows."""
    unrecognised = [
        text for _, kind, text, reason in first.findings if kind == "unusable" and reason.startswith(UNRECOGNISED)
    ]
    if len(unrecognised) == len(first.places):
        raise InputError(f"{first.places[0][0]} row 0: {unrecognised[0]}")


def _add_chunk(found: Audit, checked: Checked) -> np.ndarray:
    bits_R = np.zeros(len(checked.places), dtype=np.uint32)
    for number, kind, text, reason in checked.findings:
        found.findings.add(Finding(*checked.places[number], kind, text), reason)
        bits_R[number] |= 1 << NUMBERS[kind]
    found.train.append(checked)
    found.lengths.append(checked.lengths_N)
    found.kept_lengths.append(checked.kept_lengths_N)
    found.image_sizes.append(checked.image_sizes)
    found.image_tokens.append(checked.image_tokens)
    found.num_trained += checked.num_trained
    found.tokens += checked.tokens
    found.trained += checked.trained
    return bits_R


def _duplicates(found: Audit) -> Iterator[tuple[int, str, str]]:
    train = found.train
    is_duplicate_R = np.zeros(train.num_rows, dtype=bool)
    for row, first in duplicates(train.row_hashes.values):
        is_duplicate_R[row] = True
        yield row, "duplicate", f"the same as {train.said(first, row)}"
    for row, other, similar in near_duplicates(train.signatures.values, is_duplicate_R):
        yield row, "near-duplicate", f"about {similar:.0%} the same as {train.said(other, row)}"


def _other_answers(train: Compared) -> Iterator[tuple[int, str, str]]:
    rows_R = train.row_hashes.values
    asked_R = np.where(train.has_images.values, train.question_hashes.values, NO_HASH)
    for row, first in duplicates(asked_R):
        if rows_R[row] != rows_R[first]:
            yield row, "other-answer", f"asks what {train.said(first, row)} asks of the same images"


def _leaks(found: Audit) -> Iterator[tuple[int, str, str]]:
    train, val = found.train, found.val
    hashes_V, firsts_V = np.unique(val.question_hashes.values, return_index=True)
    hashes_R = train.question_hashes.values
    places_R = np.minimum(np.searchsorted(hashes_V, hashes_R), max(len(hashes_V) - 1, 0))
    is_leak_R = np.zeros(train.num_rows, dtype=bool)
    if len(hashes_V):
        is_leak_R = (hashes_V[places_R] == hashes_R) & (hashes_R != NO_HASH)
    for row in np.flatnonzero(is_leak_R).tolist():
        yield row, "leak", f"asks what {val.said(int(firsts_V[places_R[row]]))} asks"
    for row, other, similar in near_matches(train.signatures.values, val.signatures.values):
        if not is_leak_R[row]:
            yield row, "near-leak", f"about {similar:.0%} the same as {val.said(other)}"
