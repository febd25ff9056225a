"""Answers from a file, to learn from instead of drawing any: for checks, and to learn again from what a run wrote.

One JSON object a line, as in samples/step-<N>.jsonl:

    {"row": 3, "ids": [31, 8, 2], "logprobs": [-0.1, -2.0, -0.3], "text": "#### 7"}

`row` is the number of the prompt, from 0, among those that can be used; without it `rollout.n` lines each belong to the prompts in
their order. Every step takes all of these prompts and no others. `ids` may be left out: then the text is encoded, with the end token that the template writes.
`logprobs` are those of the engine that drew the ids; `trained` says 0 of ids that a tool wrote. `text` may be called completion,
answer or response; it is what is judged, anew. An answer of several pieces, or to another rendering of the prompt, has `pieces`
instead of ids, in their order: [{"prompt_ids": [5, 9], "ids": [31, 2], "logprobs": [-0.1, -0.3]}, ...].
"""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.errors import InputError
from posttrain.loops.prompts import PromptData
from posttrain.records import Completion, Segment

TEXT_KEYS = ("text", "completion", "answer", "response")
HUGE = 1e30  # no log-probability is so far from 0


def read_completions(path: str, data: PromptData, answers: int) -> dict[int, list[Completion]]:
    """The answers of the file by the number of their prompt. Raises InputError."""
    try:
        lines = [line for line in Path(path).read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--completions {path} cannot be read: {error}.") from None
    records = [_record(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]
    if not records:
        raise InputError(f"--completions {path} is empty.")
    rows = _rows(records, path, data, answers)
    given: dict[int, list[Completion]] = {}
    for number, (row, record) in enumerate(zip(rows, records, strict=True), 1):
        given.setdefault(row, []).append(_completion(record, row, f"{path} line {number}", data))
    known = [all("logprobs" in piece for piece in record.get("pieces", [record])) for record in records]
    if any(known) and not all(known):
        raise InputError(f"{path} line {known.index(False) + 1} has no `logprobs` and others have. Give all or none.")
    return given


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is no JSON: {error}.") from None
    if not isinstance(record, dict) or not any(key in record for key in ("ids", "pieces", *TEXT_KEYS)):
        raise InputError(f'{where}: expected an object with `ids` or `text`, such as {{"row": 0, "ids": [5, 6]}}.')
    return {key: value for key, value in record.items() if value is not None}


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
        if type(row) is not int or not 0 <= row < len(data.train):
            raise InputError(f"{path} line {number}: row {row!r} is none of the {len(data.train)} prompts, from 0.")
    return [row for row in named if row is not None]


def _completion(record: dict[str, Any], row: int, where: str, data: PromptData) -> Completion:
    *earlier, last = _pieces(record, row, where, data)
    images, own = data.chat.images, [s.ids_T for piece in (*earlier, last) for s in piece.segments]
    if images and any((ids_T == images.token_id).any() for ids_T in own):
        raise InputError(
            f"{where}: the answer holds the token id {images.token_id}, which stands for a piece of an image; answers are text."
        )
    ids = [token for segment in last.segments for token in segment.ids_T.tolist()]
    text = next((record[key] for key in TEXT_KEYS if key in record), None)
    if text is None:
        text = data.chat.tokenizer.decode(ids, skip_special_tokens=True)
    stopped = not record["cut"] if "cut" in record else ids[-1] in data.end_ids
    return replace(last, text=str(text), stopped=stopped, earlier=tuple(earlier))


def _pieces(record: dict[str, Any], row: int, where: str, data: PromptData) -> list[Completion]:
    """The parts of an answer, each with its prompt; of a plain one there is one."""
    prompt_ids = data.train[row].prompt_ids_T.tolist()
    if "pieces" in record:
        pieces = record["pieces"]
        if not isinstance(pieces, list) or not pieces or not all(isinstance(piece, dict) for piece in pieces):
            raise InputError(
                f"{where}: pieces is {_short(pieces)}, expected a list of objects with prompt_ids and ids."
            )
    elif "ids" in record:
        pieces = [{**record, "prompt_ids": prompt_ids}]
    else:
        text = str(next(record[key] for key in TEXT_KEYS if key in record))
        ids = [*data.chat.tokenizer.encode(text, add_special_tokens=False), *data.end_ids[:1]]
        if not ids:
            raise InputError(f"{where}: the text is empty, and this template has no end token that an answer could be.")
        pieces = [{**record, "ids": ids, "prompt_ids": prompt_ids}]
    num_tokens = len(data.chat.tokenizer)
    empty = bool(record.get("cut"))  # of a prompt that left no room
    return [_piece(piece, num_tokens, where, empty and piece is pieces[-1]) for piece in pieces]


def _piece(piece: dict[str, Any], num_tokens: int, where: str, may_be_empty: bool) -> Completion:
    prompt_T = _ids(piece, "prompt_ids", num_tokens, where)
    ids_T = _ids(piece, "ids", num_tokens, where, may_be_empty)
    logprobs = _like_ids(piece, "logprobs", (int, float), len(ids_T), where)
    trained = _like_ids(piece, "trained", (int, bool), len(ids_T), where)
    logprobs_T = None if logprobs is None else np.array(logprobs, dtype=np.float32)
    trained_T = np.ones(len(ids_T), dtype=bool) if trained is None else np.array(trained, dtype=bool)
    return Completion(prompt_T, _segments(ids_T, logprobs_T, trained_T))


def _ids(piece: dict[str, Any], key: str, num_tokens: int, where: str, may_be_empty: bool = False) -> np.ndarray:
    """Token ids (int32). Raises InputError."""
    ids = piece.get(key)
    if not isinstance(ids, list) or not (ids or may_be_empty) or any(type(token) is not int for token in ids):
        raise InputError(f"{where}: {key} is {_short(ids)}, expected a list of token ids.")
    for token in ids:
        if not 0 <= token < num_tokens:
            raise InputError(f"{where}: token id {token} in {key}, and this tokenizer has {num_tokens:,}.")
    return np.array(ids, dtype=np.int32)


def _like_ids(piece: dict[str, Any], key: str, kinds: tuple[type, ...], length: int, where: str) -> list[Any] | None:
    """A list with a number for each id; None where it is not there. Raises InputError."""
    values = piece.get(key)
    if values is None:
        return None
    if not isinstance(values, list) or any(type(value) not in kinds or not abs(value) < HUGE for value in values):
        raise InputError(f"{where}: {key} is {_short(values)}, expected a list of finite numbers, one for each id.")
    if len(values) != length:
        raise InputError(f"{where}: {len(values)} {key} for {length} ids.")
    return values


def _segments(ids_T: np.ndarray, logprobs_T: np.ndarray | None, trained_T: np.ndarray) -> list[Segment]:
    """Stretches that the model wrote, and those that a tool did."""
    borders = [0, *(np.flatnonzero(np.diff(trained_T)) + 1).tolist(), len(ids_T)] if len(ids_T) else []
    return [
        Segment(ids_T[a:b], None if logprobs_T is None or not trained_T[a] else logprobs_T[a:b], bool(trained_T[a]))
        for a, b in itertools.pairwise(borders)
    ]


def _short(value: Any) -> str:
    return json.dumps(value)[:60]
