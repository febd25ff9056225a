"""A row that was tokenized before it came here -> Tokens: ids, and which of them are trained.

Shape suffix: T tokens of the row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from posttrain.data.messages import RowError, kind_of
from posttrain.records import IGNORED_LABEL, Tokens

IDS_KEY, LABELS_KEY, ATTENTION_KEY = "input_ids", "labels", "attention_mask"
MASK_KEYS = ("loss_mask", "completion_mask", "assistant_masks")  # 0 and 1, or weights


def is_tokenized(row: dict[str, Any]) -> bool:
    return IDS_KEY in row and any(row.get(key) is not None for key in (LABELS_KEY, *MASK_KEYS))


def read_tokens(row: dict[str, Any]) -> Tokens:
    """Ids and weights, without the padding at the edges. Raises RowError."""
    if row.get(IDS_KEY) is None:
        there = ", ".join(row) or "(none)"
        raise RowError("no tokens", f"a pre-tokenized row has {IDS_KEY}; the columns are {there}")
    ids_T = _ids(row[IDS_KEY])
    weights_T = _weights(row, ids_T)
    kept = _within_padding(row.get(ATTENTION_KEY), len(ids_T))
    ids_T, weights_T = ids_T[kept], weights_T[kept]
    if not weights_T[1:].any():  # nothing predicts the first token
        raise RowError("nothing trained", f"no token of {len(ids_T)} is trained after the first")
    return Tokens(ids_T.astype(np.int32), weights_T.astype(np.float32))


def _ids(value: Any) -> np.ndarray:
    ids_T = _numbers(IDS_KEY, value)
    if ids_T.dtype.kind not in "iu" or (ids_T < 0).any() or (ids_T > np.iinfo(np.int32).max).any():
        wrong = next((i for i in ids_T.tolist() if not isinstance(i, int) or not 0 <= i < 2**31), ids_T[0])
        raise RowError("bad tokens", f"{IDS_KEY} holds {wrong!r}; ids are whole numbers of 0 or more")
    return ids_T.astype(np.int64)


def _weights(row: dict[str, Any], ids_T: np.ndarray) -> np.ndarray:
    """What labels or a mask say; where there are several, they must agree."""
    found = {key: _numbers(key, row[key], len(ids_T)) for key in MASK_KEYS if row.get(key) is not None}
    weights = {key: _checked_mask(key, mask_T) for key, mask_T in found.items()}
    if row.get(LABELS_KEY) is not None:
        weights[LABELS_KEY] = _from_labels(_numbers(LABELS_KEY, row[LABELS_KEY], len(ids_T)), ids_T)
    if not weights:
        expected = ", ".join((LABELS_KEY, *MASK_KEYS))
        raise RowError("nothing says what is trained", f"{IDS_KEY} stands alone; expected one of {expected} beside it")
    (name, weights_T), *others = weights.items()
    for other, others_T in others:
        if not np.array_equal(weights_T, others_T):
            at = int((weights_T != others_T).argmax())
            raise RowError("contradictory weights", f"{name} and {other} disagree on token {at}")
    return weights_T


def _from_labels(labels_T: np.ndarray, ids_T: np.ndarray) -> np.ndarray:
    trained_T = labels_T != IGNORED_LABEL
    wrong_T = trained_T & (labels_T != ids_T)
    if wrong_T.any():
        at = int(wrong_T.argmax())
        shifted = trained_T[:-1] & (labels_T[:-1] == ids_T[1:])
        hint = "; they look shifted by one, which is done later here" if shifted.sum() == trained_T[:-1].sum() else ""
        raise RowError(
            "bad labels",
            f"labels[{at}] is {labels_T[at]} where {IDS_KEY} has {ids_T[at]}; expected the same or {IGNORED_LABEL}{hint}",
        )
    return trained_T.astype(np.float64)


def _checked_mask(key: str, mask_T: np.ndarray) -> np.ndarray:
    mask_T = mask_T.astype(np.float64)
    bad_T = ~np.isfinite(mask_T) | (mask_T < 0)
    if bad_T.any():
        at = int(bad_T.argmax())
        raise RowError("bad weight", f"{key}[{at}] is {mask_T[at]}, expected 0, 1 or a weight above 0")
    return mask_T


def _within_padding(attention: Any, length: int) -> slice:
    if attention is None:
        return slice(0, length)
    seen = np.flatnonzero(_numbers(ATTENTION_KEY, attention, length))
    if not len(seen):
        raise RowError("bad attention mask", f"{ATTENTION_KEY} is 0 everywhere: the row is all padding")
    begin, end = int(seen[0]), int(seen[-1]) + 1
    if end - begin != len(seen):
        raise RowError(
            "bad attention mask", f"{ATTENTION_KEY} has a 0 between ones; expected padding at the edges only"
        )
    return slice(begin, end)


def _numbers(key: str, value: Any, length: int | None = None) -> np.ndarray:
    """One row of numbers, as long as `length` if that is given."""
    try:
        numbers = np.asarray(value)
    except ValueError:  # lists of different lengths
        numbers = np.empty((0, 0))
    if numbers.ndim != 1 or not len(numbers) or numbers.dtype.kind not in "biuf":
        found = f"an empty {kind_of(value)}" if numbers.shape == (0,) else kind_of(value)
        raise RowError("bad tokens", f"{key} is {found}; expected a list of numbers")
    if length is not None and len(numbers) != length:
        raise RowError("bad tokens", f"{key} has {len(numbers)} entries, {IDS_KEY} has {length}")
    return numbers
