"""What a published data set is, and how it becomes train.parquet and its like: read once, row by row, all or nothing."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.values import expand_path
from posttrain.data.messages import RowError
from posttrain.data.prepare.files import SplitFiles, copy_files, open_remote
from posttrain.data.sources import READERS, Row, Source, find_sources, read_rows
from posttrain.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

TRAIN = "train"
# The first pattern that a file matches is taken: the hub's layout, then the published names, then what is similar.
PATTERNS = ("{config}/{split}-*.parquet", "data/{split}-*.parquet", "{split}-*.parquet", "{split}/*.parquet",
            "{split}.jsonl", "{split}.json", "{split}.parquet", "{split}*.parquet", "{split}*.jsonl", "{split}*.json",
            "*_{split}.parquet", "*_{split}.jsonl", "*_{split}.json")  # fmt: skip
OWN_ROWS = "posttrain's own rows"
LOST = "lost_fields"


@dataclass(frozen=True)
class DataSet:
    """Where a data set lies and what a row of it becomes.

    `splits`: each file to write, with the names that its split has at the source, the hub's first. `to_row` takes a row,
    its split and its number there; a RowError from it leaves the row out and counts it, an InputError stops. What it
    names under LOST is said, not written. Without a `hub_name` there are `own_rows`, by split. `held_out` is the share that
    becomes `test` where the source has no such split.
    """

    name: str
    splits: Mapping[str, tuple[str, ...]]
    to_row: Callable[[Row, str, int], dict[str, Any]]
    schema: Callable[[], pa.Schema]
    hub_name: str | None = None
    hub_config: str | None = None
    own_rows: Mapping[str, Iterable[dict[str, Any]]] = field(default_factory=dict)
    held_out: float = 0.0


@dataclass
class Tally:
    """What became of the rows of each split."""

    read: dict[str, int] = field(default_factory=dict)
    left_out: dict[tuple[str, str], int] = field(default_factory=dict)  # by split and kind
    first: dict[tuple[str, str], str] = field(default_factory=dict)  # of each, its place and reason
    lost_fields: dict[str, int] = field(default_factory=dict)

    def leave_out(self, split: str, row: Row, error: RowError) -> None:
        self.left_out[split, error.kind] = self.left_out.get((split, error.kind), 0) + 1
        self.first.setdefault((split, error.kind), f"{row.place}: {error}")

    def notes(self) -> Iterator[str]:
        for (split, kind), count in self.left_out.items():
            example = self.first[split, kind]
            yield f"left out {count:,} of {self.read[split]:,} rows of {split}: {kind}, such as {example}"
        for name, count in self.lost_fields.items():
            yield f"left out the field '{name}' of messages, in {count:,} rows"


def prepare(
    data_set: DataSet, local_dataset_path: str | None, local_save_dir: str, hdfs_dir: str | None = None
) -> dict[str, Any]:
    """Write a parquet file for each split, and return {split: {rows, file, sources}, "notes": [...]}.

    `local_dataset_path` is a folder or a file with the data; without one the hub is asked. `hdfs_dir` is any folder that
    fsspec can write to; the finished files are copied there too.
    """
    remote = open_remote(hdfs_dir) if hdfs_dir else None
    sources = _local_splits(data_set, local_dataset_path) if local_dataset_path else _hub_splits(data_set)
    folder = _save_folder(data_set, Path(expand_path(local_save_dir)), sources)
    tally = Tally()
    with SplitFiles(folder, data_set.schema()) as files:
        for split, row in _rows(data_set, sources, tally):
            files.add(split, row)
        _check_counts(data_set, sources, tally, files.counts)
    summary: dict[str, Any] = {"notes": list(tally.notes())}
    for split in data_set.splits:
        if split not in files.counts:
            where = local_dataset_path or data_set.hub_name or OWN_ROWS
            found = "no row that can be used" if tally.read.get(split) else f"no {split} split"
            summary["notes"].append(f"{where} holds {found}: no {split}.parquet was written.")
            continue
        names = [source.name for source in sources[split] or sources[TRAIN]] or [OWN_ROWS]
        summary[split] = {"rows": files.counts[split], "file": str(folder / f"{split}.parquet"), "sources": names}
    if remote:
        copied = copy_files([Path(summary[split]["file"]) for split in data_set.splits if split in summary], remote)
        summary["notes"] += [f"copied to {name}" for name in copied]
    return summary


def text_of(row: Row, column: str, data_set: str, empty: bool = False) -> str:
    """The text in a column that every row of the data set has. Raises InputError naming the row."""
    if column not in row.values:
        there = ", ".join(row.values) or "(none)"
        raise InputError(f"{row.place}: there is no column '{column}'; found: {there}. {data_set}.")
    value = row.values[column]
    if not isinstance(value, str) or not (empty or value.strip()):
        raise InputError(f"{row.place}: the {column} is {value!r}; expected text. Mend or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write as an escape and parquet cannot hold
        raise InputError(
            f"{row.place}: the {column} holds half a character pair, which is not Unicode. Mend the row."
        ) from None
    return value


def _rows(data_set: DataSet, sources: dict[str, list[Source]], tally: Tally) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row that can be used, with the split that it goes to."""
    held_out = _held_out(data_set, sources) if data_set.held_out and not sources["test"] else None
    for split in data_set.splits:
        for number, row in enumerate(_read(data_set, sources[split], split)):
            tally.read[split] = tally.read.get(split, 0) + 1
            try:
                made = data_set.to_row(row, split, number)
            except RowError as error:
                tally.leave_out(split, row, error)
                continue
            for name in made.pop(LOST, ()):
                tally.lost_fields[name] = tally.lost_fields.get(name, 0) + 1
            if held_out is not None and _digest(made) in held_out:
                made["extra_info"]["split"] = "test"
            yield made["extra_info"]["split"], made


def _held_out(data_set: DataSet, sources: dict[str, list[Source]]) -> set[int]:
    """Digests of the conversations that are kept for testing: a share of the different ones, the same each time.

    Equal conversations have equal digests, so that none is on both sides.
    """
    digests: set[int] = set()
    for number, row in enumerate(_read(data_set, sources[TRAIN], TRAIN)):
        try:
            digests.add(_digest(data_set.to_row(row, TRAIN, number)))
        except RowError:
            continue
    count = math.ceil(len(digests) * data_set.held_out) if len(digests) > 1 else 0
    return set(sorted(digests)[:count])


def _digest(row: dict[str, Any]) -> int:
    text = json.dumps(row["messages"], sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _read(data_set: DataSet, sources: list[Source], split: str) -> Iterator[Row]:
    if not data_set.hub_name and not sources:
        yield from (Row(OWN_ROWS, number, values) for number, values in enumerate(data_set.own_rows.get(split, ())))
    try:
        yield from read_rows(sources)
    except InputError as error:
        if sources[0].reader != "hub":
            raise
        raise InputError(f"{error} A folder with {data_set.name} can be given with --local_dataset_path.") from None


def _check_counts(data_set: DataSet, sources: dict[str, list[Source]], tally: Tally, counts: dict[str, int]) -> None:
    for split in data_set.splits:
        if sources[split] and not tally.read.get(split):
            raise InputError(f"{sources[split][0].name} holds no rows; expected {data_set.name}'s {split} split.")
    if TRAIN not in counts:
        raise InputError(f"No row of {data_set.name} can be used: {'; '.join(tally.notes())}.")


def _hub_splits(data_set: DataSet) -> dict[str, list[Source]]:
    if not data_set.hub_name:
        return {split: [] for split in data_set.splits}
    return {
        split: [Source(data_set.hub_name, "hub", "", data_set.hub_config, names[0])]
        for split, names in data_set.splits.items()
    }


def _local_splits(data_set: DataSet, given: str) -> dict[str, list[Source]]:
    path, option = Path(expand_path(given)), "--local_dataset_path"
    if path.is_file():
        return _file_as_split(data_set, path, find_sources([str(path)], option))
    if not path.is_dir():
        elsewhere = f" Without the option, {data_set.hub_name} is taken from the hub." if data_set.hub_name else ""
        raise InputError(
            f"{option}={path}: found nothing, expected a folder or file with {data_set.name} as train.jsonl or "
            f"train*.parquet.{elsewhere}"
        )
    files = {split: _files_of(path, names, data_set.hub_config) for split, names in data_set.splits.items()}
    if not files[TRAIN] and data_set.held_out:
        files = {split: [path] if split == TRAIN else [] for split in files}
    if not files[TRAIN]:
        there = ", ".join(sorted(item.name for item in path.iterdir())[:10]) or "nothing"
        raise InputError(
            f"{option}={path}: there is no train split. Found {there}; expected train.jsonl, train*.parquet or "
            f"{data_set.hub_config or 'data'}/train-*.parquet."
        )
    return {
        split: find_sources([str(file) for file in found], option) if found else [] for split, found in files.items()
    }


def _file_as_split(data_set: DataSet, path: Path, sources: list[Source]) -> dict[str, list[Source]]:
    """A single file is the split that its name says, else the first."""
    named = [split for split, names in data_set.splits.items() if any(path.stem.startswith(name) for name in names)]
    if data_set.held_out or not named:
        named = [TRAIN]
    if named != [TRAIN]:
        raise InputError(
            f"--local_dataset_path={path}: the file is the {named[0]} split by its name, and there is nothing to train "
            "on. Give the folder with all splits."
        )
    return {split: sources if split == TRAIN else [] for split in data_set.splits}


def _files_of(folder: Path, names: tuple[str, ...], config: str | None) -> list[Path]:
    for name in names:
        for pattern in PATTERNS:
            files = sorted(folder.glob(pattern.format(split=name, config=config or name)))
            if files := [file for file in files if file.suffix in READERS]:
                return files
    return []


def _save_folder(data_set: DataSet, folder: Path, sources: dict[str, list[Source]]) -> Path:
    names = {Path(source.name).resolve() for split in sources.values() for source in split}
    for split in data_set.splits:
        if (folder / f"{split}.parquet").resolve() in names:
            raise InputError(
                f"--local_save_dir={folder}: {split}.parquet there is the source itself and would be overwritten. "
                "Name another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--local_save_dir={folder} cannot be made: {error}. Name another folder.") from None
    return folder
