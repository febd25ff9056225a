"""Files, fsspec paths and hub names -> rows, one after the other, each with the place it came from."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from posttrain.errors import InputError

ROWS_A_READ = 1024
BYTES_A_READ = 64 << 20  # fewer rows where they are large, as those with images in them are
READERS = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".arrow": "arrow",
}
KNOWN_SUFFIXES = ", ".join(READERS)
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """One file, or one split of a hub data set. `fingerprint` changes with its content and its place."""

    name: str
    reader: str
    fingerprint: str
    hub_config: str | None = None
    split: str | None = None


@dataclass(frozen=True)
class Row:
    """A row as it was written; `number` counts from 0 in its file.

    A null inside a column was written by someone: those with which Arrow fills structs are gone. JSON rows keep theirs.
    """

    source: str
    number: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.source} row {self.number}"

    @property
    def folder(self) -> str:
        """Where its file lies: relative paths in the row begin there."""
        return self.source.rpartition("/")[0]


def find_sources(names: list[str], option: str, split: str = "train", hub_config: str | None = None) -> list[Source]:
    """The files behind the names, folders opened and sorted. Raises InputError naming `option` where one is missing."""
    sources = [source for name in names for source in _sources_of(name, option, split, hub_config)]
    if not sources:
        raise InputError(f"{option} names no rows. Give a file, such as {option}=train.parquet.")
    return sources


def read_rows(sources: list[Source]) -> Iterator[Row]:
    """Every row of every source, in order, never holding more than a few thousand in memory."""
    for source in sources:
        number = 0
        for number, values in enumerate(_READ[source.reader](source)):
            if not isinstance(values, dict):
                raise InputError(
                    f"{source.name} row {number}: found {type(values).__name__}, expected an object with columns."
                )
            yield Row(source.name, number, values)


def _sources_of(name: str, option: str, split: str, hub_config: str | None) -> Iterator[Source]:
    if "://" in name:
        yield _remote_file(name, option)
        return
    path = Path(name)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in READERS and not p.name.startswith("."))
        if not files:
            raise InputError(f"{option}: the folder {name} holds no data files ({KNOWN_SUFFIXES}).")
        yield from (_local_file(file, option) for file in files)
    elif path.is_file():
        yield _local_file(path, option)
    elif _HUB_NAME.fullmatch(name) and path.suffix not in READERS and not path.parent.is_dir():
        yield Source(name, "hub", f"hub:{name}:{hub_config}:{split}", hub_config, split)
    else:
        beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, beside, n=1)
        nearest = f"; nearest is {path.with_name(near[0])}" if near else ""
        raise InputError(f"{option}: {name} does not exist. Looked in {Path.cwd()}; check the path{nearest}.")


def _local_file(path: Path, option: str) -> Source:
    stat = path.stat()
    if stat.st_size == 0:
        raise InputError(f"{option}: {path} is empty (0 bytes).")
    return Source(
        str(path), _reader_of(path.suffix, str(path), option), f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}"
    )


def _remote_file(name: str, option: str) -> Source:
    import fsspec

    reader = _reader_of(Path(name).suffix, name, option)
    try:
        filesystem, path = fsspec.core.url_to_fs(name)
        facts = filesystem.info(path)
    except FileNotFoundError:
        raise InputError(f"{option}: {name} does not exist.") from None
    except (ImportError, ValueError) as error:  # a protocol whose package is missing
        raise InputError(f"{option}: cannot open {name}: {error}") from None
    changed = facts.get("mtime") or facts.get("LastModified") or facts.get("ETag") or ""
    return Source(name, reader, f"{name}:{facts.get('size')}:{changed}")


def _reader_of(suffix: str, name: str, option: str) -> str:
    if suffix not in READERS:
        raise InputError(f"{option}: {name} ends in {suffix or 'nothing'}; expected one of {KNOWN_SUFFIXES}.")
    return READERS[suffix]


def open_file(name: str) -> IO[bytes]:
    """The bytes of a file or an fsspec path."""
    import fsspec

    return fsspec.open(name, "rb").open()


def parquet_batches(file: Any) -> Iterator[Any]:
    """The rows of an open parquet file, a few at a time where they are large."""
    num_bytes = sum(file.metadata.row_group(i).total_byte_size for i in range(file.num_row_groups))
    yield from file.iter_batches(batch_size=_rows_a_read(file.metadata.num_rows, num_bytes))


def _read_parquet(source: Source) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    def batches() -> Iterator[Any]:
        with open_file(source.name) as stream:
            yield from parquet_batches(pyarrow.parquet.ParquetFile(stream))

    return _arrow_rows(source, batches())


def _read_arrow(source: Source) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with open_file(source.name) as stream:
            is_file = stream.read(6) == b"ARROW1"  # datasets writes the stream form, feather the file form
            stream.seek(0)
            if not is_file:
                yield from pa.ipc.open_stream(stream)
                return
            reader = pa.ipc.open_file(stream)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))

    return _arrow_rows(source, batches())


def _arrow_rows(source: Source, batches: Iterator[Any]) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    try:
        for batch in batches:
            filled = [name for name in batch.schema.names if _has_filler(batch.column(name))]
            rows = _rows_a_read(batch.num_rows, batch.nbytes)
            for values in (row for i in range(0, batch.num_rows, rows) for row in batch.slice(i, rows).to_pylist()):
                yield values | {name: without_filler(values[name]) for name in filled} if filled else values
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(
            f"{source.name} cannot be read as {source.reader}: {str(error).rstrip('.')}. Write it again."
        ) from None


def _rows_a_read(num_rows: int, num_bytes: int) -> int:
    """How many of such rows are made objects at a time."""
    return max(1, min(ROWS_A_READ, num_rows * BYTES_A_READ // max(num_bytes, 1)))


def _has_filler(array: Any) -> bool:
    """Whether any struct in the array has a null field."""
    import pyarrow as pa

    if pa.types.is_struct(array.type):
        fields = [array.field(i) for i in range(array.type.num_fields)]
        return any(field.null_count or _has_filler(field) for field in fields)
    return (
        _has_filler(array.values)
        if isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray)
        else False
    )


def without_filler(value: Any) -> Any:
    """The value without the nulls of its structs: all structs of a column have the same fields, a null where they had none.

    A message (its `role` is text) keeps null as `content`: so is a turn of tool calls alone written, and some templates
    ask for it.
    """
    if isinstance(value, list):
        return [without_filler(item) if isinstance(item, dict | list) else item for item in value]
    if not isinstance(value, dict):
        return value
    is_message = isinstance(value.get("role"), str)
    return {
        key: without_filler(item) if isinstance(item, dict | list) else item
        for key, item in value.items()
        if item is not None or (is_message and key == "content")
    }


def _read_lines(source: Source) -> Iterator[dict[str, Any]]:
    with open_file(source.name) as stream:
        for number, line in enumerate(stream):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{source.name} line {number + 1} is not JSON: {error}. Mend or remove it.") from None


def _read_json(source: Source) -> Iterator[dict[str, Any]]:
    with open_file(source.name) as stream:
        text = stream.read()
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip()[:1] == b"{" and b"\n{" in text:
            yield from _read_lines(source)  # JSON lines under the name .json
            return
        raise InputError(f"{source.name} is not JSON: {error}. Mend it, or write a row a line as .jsonl.") from None
    if not isinstance(rows, list):
        within = f" with {', '.join(rows)}" if isinstance(rows, dict) else ""
        raise InputError(f"{source.name}: found {type(rows).__name__}{within}, expected a list of objects, the rows.")
    yield from rows


def _read_hub(source: Source) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        rows = datasets.load_dataset(source.name, source.hub_config, split=source.split)
    except Exception as error:  # the hub's errors have no common root
        raise InputError(
            f"{source.name} was not found as a file, and loading it from the hub failed: {type(error).__name__}: {error}. "
            "Check the name, data.hub_config and the split, or give local files."
        ) from None
    # as Arrow holds them: images are then the bytes of their files, which nothing has decoded
    tables = rows.with_format("arrow").iter(ROWS_A_READ)
    yield from _arrow_rows(source, (batch for table in tables for batch in table.to_batches()))


_READ = {"parquet": _read_parquet, "arrow": _read_arrow, "lines": _read_lines, "json": _read_json, "hub": _read_hub}
