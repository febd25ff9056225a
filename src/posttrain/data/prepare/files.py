"""Parquet files that appear whole or not at all, and copies of them wherever fsspec reaches."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.values import expand_path
from posttrain.errors import InputError, RunError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS_A_GROUP = 1024  # held in memory for each split


class SplitFiles:
    """`<split>.parquet` in `folder` for every split that gets a row; all get their names together, at the end.

    Used in a `with`: what ends it early leaves the old files as they were. `counts` are the rows of each split.
    """

    def __init__(self, folder: Path, schema: pa.Schema):
        self.folder, self.schema = folder, schema
        self.counts: dict[str, int] = {}
        self._waiting: dict[str, list[dict[str, Any]]] = {}
        self._writers: dict[str, Any] = {}

    def add(self, split: str, row: dict[str, Any]) -> None:
        self.counts[split] = self.counts.get(split, 0) + 1
        waiting = self._waiting.setdefault(split, [])
        waiting.append(row)
        if len(waiting) == ROWS_A_GROUP:
            self._write(split)

    def __enter__(self) -> SplitFiles:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            for split in self.counts:
                self._aside(split).unlink(missing_ok=True)

    def _finish(self) -> None:
        for split in self.counts:
            self._write(split)
        for split, writer in self._writers.items():
            self._guarded(split, writer.close)
        for split in self.counts:
            self._guarded(split, lambda split=split: self._aside(split).replace(self._file(split)))

    def _write(self, split: str) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows, self._waiting[split] = self._waiting[split], []
        if split not in self._writers:
            self._writers[split] = self._guarded(split, lambda: pq.ParquetWriter(self._aside(split), self.schema))
        if rows:
            table = pa.Table.from_pylist(rows, self.schema)
            self._guarded(split, lambda: self._writers[split].write_table(table))

    def _guarded(self, split: str, write: Any) -> Any:
        try:
            return write()
        except OSError as error:
            raise RunError(
                f"{self._file(split)} could not be written: {error}. Make room, or name another --local_save_dir."
            ) from None

    def _file(self, split: str) -> Path:
        return self.folder / f"{split}.parquet"

    def _aside(self, split: str) -> Path:
        return self.folder / f".{split}.parquet.{os.getpid()}"


def open_remote(folder: str) -> tuple[Any, str]:
    """The file system and the path of a folder to copy to, found before any work is done."""
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(expand_path(folder))
        filesystem.makedirs(path, exist_ok=True)
    except Exception as error:  # the errors of file systems have no common root
        first_line = str(error).partition("\n")[0].rstrip(".")  # Hadoop's goes on over all places where Java is not
        raise InputError(f"--hdfs_dir={folder} cannot be written to: {type(error).__name__}: {first_line}.") from None
    return filesystem, path


def copy_files(files: list[Path], remote: tuple[Any, str]) -> list[str]:
    """Copies each file into the folder, under another name until it is whole, and returns their URLs."""
    filesystem, folder = remote
    copied = []
    for file in files:
        there = f"{folder.rstrip('/')}/{file.name}"
        unfinished = f"{folder.rstrip('/')}/.{file.name}.{os.getpid()}"
        try:
            filesystem.put_file(str(file), unfinished)
            if filesystem.exists(there):
                filesystem.rm_file(there)  # not every file system moves onto a file that is there
            filesystem.mv(unfinished, there)
        except Exception as error:  # the errors of file systems have no common root
            raise RunError(
                f"{file} is written, but copying it to --hdfs_dir as {there} failed: {type(error).__name__}: {error}. "
                "Copy it by hand, or run the command again."
            ) from None
        copied.append(filesystem.unstrip_protocol(there))
    return copied
