"""Answers from a file, to learn from instead of drawing any: for checks, and to learn again from what a run wrote.

One JSON object a line, as in samples/step-<N>.jsonl:

    {"row": 3, "ids": [31, 8, 2], "logprobs": [-0.1, -2.0, -0.3], "text": "#### 7"}

`row` is the number of the prompt, from 0, among those that can be used; without it `rollout.n` lines each belong to the prompts in
their order. Every step takes all of these prompts and no others. `ids` may be left out: then the text is encoded, with the end token that the template writes.
`logprobs` are those of the engine that drew the ids; `trained` says 0 of ids that a tool wrote. `text` may be called completion,
answer or response; it is what is judged, anew.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import InputError
from posttrain.loops.prompts import PromptData
from posttrain.records import Completion, Segment

TEXT_KEYS = ("text", "completion", "answer", "response")


def read_completions(path: str, data: PromptData, answers: int) -> dict[int, list[Completion]]:
    """The answers of the file by the number of their prompt. Raises InputError."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--completions {path} cannot be read: {error}.") from None
    records = [_record(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    if not records:
        raise InputError(f"--completions {path} is empty.")
    rows = _rows(records, path, data, answers)
    known = [record.get("logprobs") is not None for record in records]
    if any(known) and not all(known):
        raise InputError(f"{path} line {known.index(False) + 1} has no `logprobs` and others have. Give all or none.")
    given: dict[int, list[Completion]] = {}
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        given.setdefault(row, []).append(_completion(record, row, f"{path} line {number}", data))
    return given


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}.") from None
    if not isinstance(record, dict) or ("ids" not in record and not any(key in record for key in TEXT_KEYS)):
        raise InputError(f'{where}: expected an object with `ids` or `text`, such as {{"row": 0, "ids": [5, 6]}}.')
    return record


def _rows(records: list[dict[str, Any]], path: str, data: PromptData, answers: int) -> list[int]:
    named = [record.get("row") for record in records]
    if all(row is None for row in named):
        if len(records) % answers or len(records) > answers * len(data.train):
            raise InputError(
                f"{path} has {len(records)} lines without `row`; expected rollout.n={answers} for each of the first prompts, of which "
                f"there are {len(data.train)}."
            )
        return [number // answers for number in range(len(records))]
    for number, row in enumerate(named, 1):
        if not isinstance(row, int) or not 0 <= row < len(data.train):
            raise InputError(f"{path} line {number}: row {row!r} is none of the {len(data.train)} prompts, from 0.")
    return [row for row in named if row is not None]


def _completion(record: dict[str, Any], row: int, where: str, data: PromptData) -> Completion:
    tokenizer = data.chat.tokenizer
    text = next((record[key] for key in TEXT_KEYS if key in record), None)
    if "ids" in record:
        ids_T = np.asarray(record["ids"])
        if ids_T.ndim != 1 or not len(ids_T) or ids_T.dtype.kind not in "iu":
            raise InputError(f"{where}: ids is {str(record['ids'])[:60]}, expected a list of token ids.")
        if ids_T.min() < 0 or ids_T.max() >= len(tokenizer):
            raise InputError(f"{where}: token id {ids_T.max()}, and this tokenizer has {len(tokenizer):,}.")
    else:
        ids_T = np.array([*tokenizer.encode(str(text), add_special_tokens=False), *data.end_ids[:1]])
    logprobs_T = record.get("logprobs")
    if logprobs_T is not None:
        logprobs_T = np.asarray(logprobs_T, dtype=np.float32)
        if logprobs_T.shape != ids_T.shape:
            raise InputError(f"{where}: {logprobs_T.size} logprobs for {len(ids_T)} ids.")
    if text is None:
        text = tokenizer.decode(ids_T, skip_special_tokens=True)
    stopped = not record["cut"] if "cut" in record else int(ids_T[-1]) in data.end_ids
    segments = _segments(ids_T.astype(np.int32), logprobs_T, record.get("trained"), where)
    return Completion(data.train[row].prompt_ids_T, segments, str(text), stopped)


def _segments(ids_T: np.ndarray, logprobs_T: np.ndarray | None, trained: Any, where: str) -> list[Segment]:
    """Stretches that the model wrote, and those that a tool did."""
    trained_T = np.ones(len(ids_T), dtype=bool) if trained is None else np.asarray(trained, dtype=bool)
    if trained_T.shape != ids_T.shape:
        raise InputError(f"{where}: `trained` has {trained_T.size} entries for {len(ids_T)} ids.")
    borders = [0, *(np.flatnonzero(np.diff(trained_T)) + 1).tolist(), len(ids_T)]
    return [
        Segment(ids_T[a:b], None if logprobs_T is None or not trained_T[a] else logprobs_T[a:b], bool(trained_T[a]))
        for a, b in itertools.pairwise(borders)
    ]
