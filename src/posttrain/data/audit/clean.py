"""The rows that are left, in their own columns and under their files' names, and what was left out and why."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from posttrain.data.audit.audit import Audit, audit
from posttrain.data.audit.chunk import Checks
from posttrain.data.audit.findings import KINDS
from posttrain.data.audit.folder import FINDINGS, LEFT_OUT, REPORT, OutputFolder, output_folder
from posttrain.data.audit.report import report
from posttrain.data.sources import Source, open_file, parquet_batches
from posttrain.errors import InputError, RunError


def clean(
    sources: list[Source],
    val_sources: list[Source],
    checks: Checks,
    drop: tuple[str, ...],
    output: Path,
    *,
    find_again: Callable[[], list[Source]],
    num_workers: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> dict[str, Any]:
    """Write the rows without findings of the kinds in `drop`, and return the report.

    The rows are read twice; `find_again` tells whether the files changed in between.
    """
    names = _names(sources, output)
    with output_folder(output) as folder:
        with open(folder.new_file(FINDINGS), "w") as file:
            found = audit(sources, val_sources, checks, file=file, num_workers=num_workers, progress=progress)
        keep_R = ~found.rows_with(drop)
        begin = 0
        for source, name, rows in zip(sources, names, _num_rows(sources, found), strict=True):
            _WRITE[source.reader](source, keep_R[begin : begin + rows], folder.new_file(name))
            begin += rows
        if [source.fingerprint for source in find_again()] != [source.fingerprint for source in sources]:
            raise RunError("The files changed while they were read; nothing was written. Run the same command again.")
        told = report(found, checks) | {"dropped_kinds": list(drop), "rows_left_out": int((~keep_R).sum())}
        told |= {"rows_written": int(keep_R.sum()), "written": [str(output / name) for name in names]}
        told |= {"image_dirs": _image_dirs(sources, told["images"], checks)}
        _write_left_out(folder, drop)
        folder.write_json(REPORT, told)
    return told


def checked_kinds(names: list[str]) -> tuple[str, ...]:
    """The kinds that `--drop` names. Raises InputError for one that does not exist."""
    kinds = tuple(kind.strip() for name in names for kind in name.split(",") if kind.strip())
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"--drop {kind}: there is no such kind. There are {', '.join(KINDS)}.")
    return kinds


def _names(sources: list[Source], output: Path) -> list[str]:
    """A file in the output folder for each source. Raises InputError where one would be overwritten, or two be one."""
    target = output.resolve()
    for source in sources:
        if source.reader == "hub":
            raise InputError(
                f"{source.name} is a data set on the hub; `data clean` cleans files. Save it as parquet first."
            )
        if "://" not in source.name and target in Path(source.name).resolve().parents:
            raise InputError(f"--output {output} holds the source {source.name}. Name another folder.")
    names = [Path(source.name).name for source in sources]
    if len(set(names)) < len(names):
        common = os.path.commonpath([os.path.abspath(Path(source.name).parent) for source in sources])
        names = [os.path.relpath(os.path.abspath(source.name), common) for source in sources]
    twice = sorted({name for name in names if names.count(name) > 1 or name in (REPORT, FINDINGS, LEFT_OUT)})
    if twice:
        raise InputError(f"Two files would be written as {twice[0]} in {output}. Clean them one by one, or rename one.")
    return names


def _image_dirs(sources: list[Source], images: dict[str, Any] | None, checks: Checks) -> list[str]:
    """The folders at which relative paths of images began: the written rows lie elsewhere."""
    if images is None or checks.columns.image_dir is not None:
        return []
    return list(dict.fromkeys(os.path.dirname(source.name) or "." for source in sources))


def _num_rows(sources: list[Source], found: Audit) -> Iterator[int]:
    rows = iter(found.train.rows_a_file())
    waiting = next(rows, None)
    for source in sources:
        if waiting is not None and waiting["file"] == source.name:
            yield waiting["rows"]
            waiting = next(rows, None)
        else:
            yield 0  # a file without rows


def _write_parquet(source: Source, keep_R: np.ndarray, place: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_file(source.name) as stream:
        file = pq.ParquetFile(stream)
        has_groups = file.metadata.num_row_groups and file.metadata.num_columns
        codec = file.metadata.row_group(0).column(0).compression if has_groups else "SNAPPY"
        with pq.ParquetWriter(
            place, file.schema_arrow, compression="NONE" if codec == "UNCOMPRESSED" else codec
        ) as writer:
            begin = 0
            for batch in parquet_batches(file):
                kept = batch.filter(pa.array(keep_R[begin : begin + len(batch)]))
                if len(kept):
                    writer.write_batch(kept)
                begin += len(batch)


def _write_arrow(source: Source, keep_R: np.ndarray, place: Path) -> None:
    import pyarrow as pa

    with open_file(source.name) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        reader: Any = pa.ipc.open_file(stream) if is_file else pa.ipc.open_stream(stream)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
        make = pa.ipc.new_file if is_file else pa.ipc.new_stream
        with make(str(place), reader.schema) as writer:
            begin = 0
            for batch in batches:
                writer.write_batch(batch.filter(pa.array(keep_R[begin : begin + len(batch)])))
                begin += len(batch)


def _write_lines(source: Source, keep_R: np.ndarray, place: Path) -> None:
    """The lines that are kept, byte by byte."""
    keep = iter(keep_R.tolist())
    with open_file(source.name) as stream, open(place, "wb") as written:
        for line in stream:
            if line.strip() and next(keep):
                written.write(line if line.endswith(b"\n") else line + b"\n")


def _write_json(source: Source, keep_R: np.ndarray, place: Path) -> None:
    with open_file(source.name) as stream:
        try:
            rows = json.load(stream)
        except ValueError:
            _write_lines(source, keep_R, place)  # JSON lines under the name .json, as the audit has read them
            return
    kept = [json.dumps(row) for row, keep in zip(rows, keep_R.tolist(), strict=True) if keep]
    place.write_text("[\n" + ",\n".join(kept) + "\n]\n")


_WRITE: dict[str, Callable[[Source, np.ndarray, Path], None]] = {
    "parquet": _write_parquet, "arrow": _write_arrow, "lines": _write_lines, "json": _write_json,
}  # fmt: skip


def _write_left_out(folder: OutputFolder, drop: tuple[str, ...]) -> None:
    """The findings for which rows were left out."""
    with open(folder.unfinished[FINDINGS]) as findings, open(folder.new_file(LEFT_OUT), "w") as left_out:
        _copy_kinds(findings, left_out, drop)


def _copy_kinds(findings: IO[str], left_out: IO[str], kinds: tuple[str, ...]) -> None:
    for line in findings:
        if json.loads(line)["kind"] in kinds:
            left_out.write(line)
