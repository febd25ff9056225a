"""Control strings: which token ids steer a model, and keeping what people merely typed from becoming one."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from posttrain.data.encoded import Part
from posttrain.data.messages import RowError
from posttrain.data.provenance.marked import GENERATED, TEMPLATE, code_parts
from posttrain.data.provenance.template import Rendered


class ControlStrings:
    """The control tokens of a tokenizer: its special tokens, and other added ones that the template mentions (`<tool_call>`).

    Added tokens that are neither are text: some tokenizers have line breaks and HTML's tags among them. `strings` are the
    control tokens' texts.
    """

    def __init__(self, backend: Any, added_tokens: dict[int, Any], template: str):
        self._backend = backend
        controls = {
            id_: str(token)
            for id_, token in added_tokens.items()
            if str(token).strip() and (token.special or str(token) in template)
        }
        self.strings = list(controls.values())
        self._is_control = np.zeros(max(controls, default=0) + 1, dtype=bool)
        self._is_control[list(controls)] = True
        self._without: Any = None

    def is_control(self, ids_T: np.ndarray) -> np.ndarray:
        """Which ids are control tokens, as bool of the same shape."""
        return (ids_T < len(self._is_control)) & self._is_control[np.minimum(ids_T, len(self._is_control) - 1)]

    def _is_control_id(self, id_: int) -> bool:
        return bool(self.is_control(np.array([id_]))[0])

    def as_text(
        self, rendered: Rendered, theirs: Sequence[bool], ids_T: np.ndarray, offsets_TC: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """The ids and offsets with typed control strings encoded as text, and (message, string) of each.

        `theirs[m]`: message m is not the model's own. A control token is typed if all of its characters come from such a
        message or from the tools. The text between the control tokens around it is encoded anew. Raises RowError where
        that cannot be shown to equal the rest of the encoding.
        """
        controls = np.flatnonzero(self.is_control(ids_T))
        starts = offsets_TC[controls, 0]
        written = rendered.code_array[np.minimum(starts, len(rendered.text) - 1)] & ~np.uint32(GENERATED) == ord(
            TEMPLATE
        )
        typed: dict[int, tuple[int, str]] = {}
        for t in controls[~written].tolist():  # what begins with the template's own character is the template's
            start, end = offsets_TC[t].tolist()
            messages, parts = code_parts(rendered.code_array[start:end])
            if end > start and self._is_typed(messages, parts, theirs, rendered.text[start:end]):
                typed[t] = (int(messages[0]), rendered.text[start:end])
        if not typed:
            return ids_T, offsets_TC, []
        kept = [t for t in controls.tolist() if t not in typed]
        ids, offsets, done = [], [], 0
        for first, last in _gaps(sorted(typed), kept, len(ids_T)):
            ids += [ids_T[done:first]]
            offsets += [offsets_TC[done:first]]
            start, end = int(offsets_TC[first, 0]), int(offsets_TC[last - 1, 1])
            text_ids, text_offsets = self._encode_as_text(rendered.text[start:end], ids_T[first:last])
            ids.append(text_ids)
            offsets.append(text_offsets + start)
            done = last
        ids_T = np.concatenate([*ids, ids_T[done:]]).astype(np.int32)
        return ids_T, np.concatenate([*offsets, offsets_TC[done:]]).astype(np.int32), list(typed.values())

    def beginning(self, text: str, max_tokens: int) -> str:
        """As much of the text as makes so many tokens if nothing in it is a control string."""
        if len(text.encode()) <= max_tokens:  # no token is less than a byte
            return text
        offsets = self._plain().encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= max_tokens else text[: offsets[max_tokens][0]]

    def _is_typed(self, messages: np.ndarray, parts: np.ndarray, theirs: Sequence[bool], text: str) -> bool:
        if (parts == Part.UNKNOWN).any():
            raise RowError("control string of unknown origin", f"it cannot be told whether the template wrote {text!r}")
        return all(
            part == Part.TOOLS or (message >= 0 and theirs[message] and part != Part.TEMPLATE)
            for message, part in zip(messages.tolist(), parts.tolist(), strict=True)
        )

    def _encode_as_text(self, text: str, with_controls: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        alone = self._backend.encode(text, add_special_tokens=False).ids
        if alone != with_controls.tolist():
            raise RowError(
                "control string typed", "this tokenizer encodes text differently by itself, so that a typed control string "
                "cannot be made text: remove it, or allow it with data.control_strings=allow",
            )  # fmt: skip
        tokens = self._plain().encode(text, add_special_tokens=False)
        if self.is_control(np.asarray(tokens.ids, dtype=np.int64)).any():
            raise RowError("control string typed", "this tokenizer makes a control token even of plain text")
        return np.asarray(tokens.ids, dtype=np.int32), np.asarray(tokens.offsets, dtype=np.int32).reshape(-1, 2)

    def _plain(self) -> Any:
        """The tokenizer without its control tokens."""
        if self._without is None:
            from tokenizers import Tokenizer

            description = json.loads(self._backend.to_str())
            description["added_tokens"] = [t for t in description["added_tokens"] if not self._is_control_id(t["id"])]
            description["post_processor"] = None
            self._without = Tokenizer.from_str(json.dumps(description))
        return self._without


def _gaps(typed: list[int], kept: list[int], length: int) -> list[tuple[int, int]]:
    """The stretches of tokens between control tokens that hold a typed one: [first, last)."""
    borders = [-1, *kept, length]
    stretches = [(a + 1, b) for a, b in itertools.pairwise(borders)]
    return [stretches[i] for i in np.unique(np.searchsorted(kept, typed)).tolist()]
