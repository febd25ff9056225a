"""Rows in chunks through worker processes, results in the order of the rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from multiprocessing import get_context
from typing import Any, TypeVar

from posttrain.data.sources import Row

ROWS_A_CHUNK = 256
BYTES_A_CHUNK = 16 << 20  # fewer rows where they are large, as those with images in them are
# Workers take seconds to start, in which one process does about this many rows.
ROWS_BEFORE_WORKERS = 8192
CHUNKS_WAITING_A_WORKER = 4

Result = TypeVar("Result")
Work = Callable[[tuple[Row, ...]], Result]


def map_chunks(
    make_work: Callable[[], Work[Result]],
    rows: Iterator[Row],
    num_workers: int | None,
    work_here: Work[Result] | None = None,
) -> Iterator[Result]:
    """The work's result for each chunk of rows: here while they are few, on worker processes from then on.

    `make_work` must be picklable: it is called once in each worker, and here unless `work_here` is given. `num_workers` None
    is one a core.
    """
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    work = work_here or make_work()
    for chunk in chunks(rows if workers < 2 else islice(rows, ROWS_BEFORE_WORKERS)):
        yield work(chunk)
    rest = next(rows, None)
    if rest is None:
        return
    # spawned, not forked: a fork would copy locks that a tokenizer's threads hold
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (make_work,)) as pool:
        yield from _in_order(pool, chunks(chain([rest], rows)), CHUNKS_WAITING_A_WORKER * workers)


def chunks(rows: Iterable[Row]) -> Iterator[tuple[Row, ...]]:
    chunk: list[Row] = []
    num_bytes = 0
    for row in rows:
        chunk.append(row)
        num_bytes += _num_bytes(row.values)
        if len(chunk) == ROWS_A_CHUNK or num_bytes >= BYTES_A_CHUNK:
            yield tuple(chunk)
            chunk, num_bytes = [], 0
    if chunk:
        yield tuple(chunk)


def _num_bytes(value: Any) -> int:
    """Of bytes and texts, also those in lists and objects; numbers count nothing."""
    if isinstance(value, bytes | str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_num_bytes, value.values()))
    holds = isinstance(value, list) and value and isinstance(value[0], bytes | str | dict | list)
    return sum(map(_num_bytes, value)) if holds else 0


def _in_order(pool: ProcessPoolExecutor, todo: Iterable[tuple[Row, ...]], most_waiting: int) -> Iterator[Any]:
    """Never reading far ahead of the workers."""
    waiting: list[Future[Any]] = []
    for chunk in todo:
        waiting.append(pool.submit(_work_in_worker, chunk))
        if len(waiting) >= most_waiting:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


_work: Work[Any]


def _start_worker(make_work: Callable[[], Work[Any]]) -> None:
    global _work  # a worker process keeps its tokenizer between chunks
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _work = make_work()


def _work_in_worker(rows: tuple[Row, ...]) -> Any:
    return _work(rows)
