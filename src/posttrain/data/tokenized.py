"""The memory-mapped cache of tokenized rows: rendered once, shared by all processes, lengths known before a model loads.

A folder per key, where the key covers rows, tokenizer, template and columns:
    ids.bin      int32, all samples end to end          weights.bin  uint8, the same shape: which of the weights.npy
    weights.npy  float32, the weights that there are: first 0, then 1
    offsets.npy  int64 (N+1), where each sample begins  rows.npy     int64 (N), its row's number among all rows read
    turns.npy    int64 (N), how many turns each sample trains
    report.json  rows read, rows left out and why, notes, and the places of the first few of each

Images, where there are any, are kept as `posttrain.data.images.cache` says.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from posttrain.data.chat import ChatTokenizer
from posttrain.data.encoded import Encoded, EncodedImage, kinds_of_notes
from posttrain.data.formats import Columns, RowError, conversation_or_error
from posttrain.data.images.cache import ImageWriter, KeptImages
from posttrain.data.sources import Row, Source, read_rows
from posttrain.data.workers import map_chunks
from posttrain.errors import InputError
from posttrain.records import Sample

FORMAT = 4  # of the cache; a new number makes all older caches unused
PLACES_A_REASON = 5
MOST_WEIGHTS = 256  # different weights in one set of rows


@dataclass(frozen=True)
class Outcome:
    """What a row gave: ids, weights, the number of trained turns and the images of each sample, or why there are none.

    `notes` are what a person should know of the row, each with its kind.
    """

    source: str
    number: int
    samples: list[tuple[np.ndarray, np.ndarray, int, tuple[EncodedImage, ...]]] | RowError
    notes: dict[str, str]

    @property
    def place(self) -> str:
        return f"{self.source} row {self.number}"


@dataclass
class Report:
    """What became of the rows: every one is used or counted under a reason.

    `rows_not_chosen` could be used, and fewer were asked for. `notes` count, by kind, what a person should know of rows, also of
    those that truncation leaves out. `places` are the first few of each reason and of
    each kind. `files` are the names of the sources, each with the number of its first row among all rows read. `faulty` are the
    first few files that rows name and that could not be used, each with the time of its last change, if it is there.
    """

    rows_read: int = 0
    rows_used: int = 0
    rows_not_chosen: int = 0
    rows_dropped: dict[str, int] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)
    files: list[tuple[str, int]] = field(default_factory=list)
    faulty: dict[str, int | None] = field(default_factory=dict)

    def drop(self, reason: str, place: str) -> None:
        self._count(self.rows_dropped, reason, place)

    def note(self, kind: str, place: str) -> None:
        self._count(self.notes, kind, place)

    def blame(self, file: str | None) -> None:
        if file is not None and len(self.faulty) < PLACES_A_REASON:
            self.faulty[file] = _changed(file)

    def place_of(self, row: int) -> str:
        """File and number in it of a row that is counted among all rows read."""
        name, first = self.files[bisect_right(self.files, row, key=lambda file: file[1]) - 1]
        return f"{name} row {row - first}"

    def _count(self, counts: dict[str, int], kind: str, place: str) -> None:
        counts[kind] = counts.get(kind, 0) + 1
        if len(self.places.setdefault(kind, [])) < PLACES_A_REASON:
            self.places[kind].append(place)


@dataclass(frozen=True)
class TokenizedData:
    """Tokenized rows on disk, as a sequence of Samples. `lengths_N` and `num_trained_N` are known without reading them."""

    ids: np.ndarray  # int32, memory-mapped
    weights: np.ndarray  # uint8, memory-mapped: indices into `weight_values`
    weight_values: np.ndarray  # float32; the first is 0
    begins_N: np.ndarray  # int64, after truncation
    ends_N: np.ndarray  # int64
    rows_N: np.ndarray  # int64, number of the row among all that were read
    turns_N: np.ndarray  # int64, trained turns, also those that truncation cuts
    report: Report
    fingerprint: str
    images: KeptImages | None = None

    def __len__(self) -> int:
        return len(self.begins_N)

    def kept(self, keep_N: np.ndarray) -> TokenizedData:
        """Those of the samples, with the same report."""
        return replace(
            self,
            begins_N=self.begins_N[keep_N],
            ends_N=self.ends_N[keep_N],
            rows_N=self.rows_N[keep_N],
            turns_N=self.turns_N[keep_N],
            images=self.images and self.images.kept(keep_N),
        )

    @property
    def lengths_N(self) -> np.ndarray:
        return self.ends_N - self.begins_N

    @cached_property
    def num_trained_N(self) -> np.ndarray:
        """Trained targets of each row; its first token is nobody's target."""
        borders = np.stack([np.minimum(self.begins_N + 1, self.ends_N - 1), self.ends_N], axis=1).reshape(-1)
        if len(borders) and borders[-1] == len(self.weights):
            borders = borders[:-1]  # the last sum runs to the end by itself
        # where all weights are 0 or 1, their indices are booleans already
        trained = self.weights.view(bool) if len(self.weight_values) == 2 else self.weights > 0
        sums_N = np.add.reduceat(trained, borders, dtype=np.int64)[::2] if len(borders) else np.zeros(0, np.int64)
        return np.where(self.lengths_N > 1, sums_N, 0)

    def __getitem__(self, index: int) -> Sample:
        piece = slice(self.begins_N[index], self.ends_N[index])
        images = self.images.sources(index) if self.images else ()
        return Sample(int(self.rows_N[index]), self.ids[piece], self.weight_values[self.weights[piece]], images=images)


def load_tokenized(
    sources: list[Source],
    columns: Columns,
    make_chat: Callable[[], ChatTokenizer],
    cache_dir: str,
    *,
    drop_invalid: bool = True,
    num_workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> TokenizedData:
    """The cached rows, made first if they are not there. `make_chat` must be picklable: each worker calls it.

    Raises InputError at the first bad row when `drop_invalid` is false, and when no row is left.
    """
    chat = make_chat()
    key = cache_key(sources, columns, chat)
    folder = Path(cache_dir) / "tokenized" / key
    if not _is_good(folder):
        shutil.rmtree(folder, ignore_errors=True)
        encoder, here = partial(_encoder, make_chat, columns), partial(_encode_chunk, chat, columns)
        chunks = map_chunks(encoder, read_rows(sources), num_workers, here)
        _build(folder, chunks, progress)
    return _open(folder, key, drop_invalid, [source.name for source in sources])


def cache_key(sources: list[Source], columns: Columns, chat: ChatTokenizer) -> str:
    """Changes with everything that changes the ids or the masks."""
    parts = [
        str(FORMAT),
        *(source.fingerprint for source in sources),
        repr(columns),
        chat.tokenizer.backend_tokenizer.to_str(),
        json.dumps(chat.tokenizer.chat_template),
        json.dumps({name: str(token) for name, token in chat.tokenizer.special_tokens_map.items()}),
        chat.rules_key,
        *([chat.images.key] if chat.images else []),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def taken(data: TokenizedData, choose: Callable[[int], np.ndarray]) -> TokenizedData:
    """The samples of those rows that `choose` takes of so many, by their place among the rows that can be used."""
    rows_R, row_of_sample_N = np.unique(data.rows_N, return_inverse=True)
    chosen_C = choose(len(rows_R))
    if len(chosen_C) == len(rows_R):
        return data
    keep_N = np.isin(row_of_sample_N, chosen_C)
    report = copy.deepcopy(data.report)
    report.rows_used, report.rows_not_chosen = len(chosen_C), len(rows_R) - len(chosen_C)
    return replace(data.kept(keep_N), report=report)


def _is_good(folder: Path) -> bool:
    """Whether the cache is there, and files that its rows lacked have not come or been mended since."""
    if not (folder / "report.json").exists():
        return False
    faulty = json.loads((folder / "report.json").read_text()).get("faulty", {})
    return all(_changed(file) == before for file, before in faulty.items())


def _changed(file: str) -> int | None:
    """When, in nanoseconds; None where there is no such file."""
    try:
        return os.stat(file).st_mtime_ns
    except OSError:
        return None


def _build(folder: Path, chunks: Iterable[list[Outcome]], progress: Callable[[int], None]) -> None:
    """Write the cache beside its place and rename it, so that a half-written one is never opened."""
    aside = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    aside.mkdir(parents=True)
    try:
        report, lengths, rows, turns, images = Report(), [0], [], [], ImageWriter(aside)
        values = {0.0: 0, 1.0: 1}
        with open(aside / "ids.bin", "wb") as ids, open(aside / "weights.bin", "wb") as weights:
            for chunk in chunks:
                for row in chunk:
                    if row.number == 0:
                        report.files.append((row.source, report.rows_read))
                    if isinstance(row.samples, RowError):
                        report.drop(row.samples.kind, f"{row.place}: {row.samples}")
                        report.blame(row.samples.file)
                    else:
                        report.rows_used += 1
                        for ids_T, weights_T, num_turns, shown in row.samples:
                            images.add(shown)
                            ids.write(ids_T.tobytes())
                            weights.write(_indices(weights_T, values, row.place).tobytes())
                            lengths.append(len(ids_T))
                            rows.append(report.rows_read)
                            turns.append(num_turns)
                    for note, kind in row.notes.items():
                        report.note(kind, f"{row.place}: {note}")
                    report.rows_read += 1
                progress(len(chunk))
        images.close()
        np.save(aside / "weights.npy", np.asarray(list(values), dtype=np.float32))
        np.save(aside / "offsets.npy", np.cumsum(np.asarray(lengths, dtype=np.int64)))
        np.save(aside / "rows.npy", np.asarray(rows, dtype=np.int64))
        np.save(aside / "turns.npy", np.asarray(turns, dtype=np.int64))
        (aside / "report.json").write_text(json.dumps(report.__dict__))
        try:
            aside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    except OSError as error:
        raise InputError(f"Cannot write the cache of tokenized rows: {error}. Choose another data.cache_dir.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _indices(weights_T: np.ndarray, values: dict[float, int], place: str) -> np.ndarray:
    """Each weight as its number among `values`, which new ones are added to."""
    distinct, inverse_T = np.unique(weights_T, return_inverse=True)
    numbers = [values.setdefault(float(weight), len(values)) for weight in distinct]
    if len(values) > MOST_WEIGHTS:
        raise InputError(f"{place}: more than {MOST_WEIGHTS} different weights in one set of rows. Round them.")
    return np.asarray(numbers, dtype=np.uint8)[inverse_T]


def _encoder(make_chat: Callable[[], ChatTokenizer], columns: Columns) -> Callable[[Iterable[Row]], list[Outcome]]:
    return partial(_encode_chunk, make_chat(), columns)


def _encode_chunk(chat: ChatTokenizer, columns: Columns, rows: Iterable[Row]) -> list[Outcome]:
    rows = list(rows)
    conversations = [conversation_or_error(row.values, columns, row.folder) for row in rows]
    encoded = iter(chat.encode_many([c for c in conversations if not isinstance(c, RowError)], origins=False))
    outcomes = []
    for row, conversation in zip(rows, conversations, strict=True):
        result = conversation if isinstance(conversation, RowError) else next(encoded)
        outcomes.append(_outcome(row, result))
    return outcomes


def _outcome(row: Row, result: list[Encoded] | RowError) -> Outcome:
    if isinstance(result, RowError):
        return Outcome(row.source, row.number, result, {})
    samples = [(e.ids_T, e.weights_T, sum(turn.weight > 0 for turn in e.turns), e.images) for e in result]
    return Outcome(row.source, row.number, samples, kinds_of_notes(result))


def _open(folder: Path, key: str, drop_invalid: bool, names: list[str]) -> TokenizedData:
    report = Report(**json.loads((folder / "report.json").read_text()))
    if report.rows_read == 0:
        raise InputError(f"{', '.join(names)}: no rows in it.")
    if report.rows_used == 0 or (report.rows_dropped and not drop_invalid):
        kind = next(iter(report.rows_dropped))
        advice = "No row can be used." if report.rows_used == 0 else "Leave such rows out with data.invalid_rows=drop."
        counts = f"{report.rows_dropped[kind]} such rows of {sum(report.rows_dropped.values())} that cannot be used"
        raise InputError(
            f"{report.places[kind][0]} ({kind}; {counts}). {advice} `posttrain data check` lists them with their reasons."
        )
    offsets = np.load(folder / "offsets.npy")
    return TokenizedData(
        ids=np.memmap(folder / "ids.bin", dtype=np.int32, mode="r"),
        weights=np.memmap(folder / "weights.bin", dtype=np.uint8, mode="r"),
        weight_values=np.load(folder / "weights.npy"),
        begins_N=offsets[:-1],
        ends_N=offsets[1:],
        rows_N=np.load(folder / "rows.npy"),
        turns_N=np.load(folder / "turns.npy"),
        report=report,
        fingerprint=key,
        images=KeptImages.open(folder),
    )
