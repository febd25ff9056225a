"""Where messages lie among the tokens, headers and end tokens included, and thinking and tool calls inside of them.

A template writes text between two messages: what ends the first belongs to it, what announces the next to that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from posttrain.data.encoded import NO_MESSAGE, Encoded, Part

APART = {Part.REASONING: "thinking", Part.TOOL_CALL: "tool call", Part.TOOLS: "tools"}


@dataclass(frozen=True)
class Block:
    """Tokens [begin, end) around one message, or NO_MESSAGE: what the template writes on its own account."""

    message: int
    begin: int
    end: int


def blocks_of(encoded: Encoded) -> list[Block]:
    """All tokens, in order, each in one block."""
    owners_T = owners(encoded)
    blocks: list[Block] = []
    begin = 0
    for message, first, last in _runs(owners_T):
        if message == NO_MESSAGE:
            continue
        before = blocks[-1].message if blocks else NO_MESSAGE
        if before == message:  # the template writes between two parts of one message
            blocks[-1] = Block(message, blocks[-1].begin, last)
        else:
            middle, header = _borders(encoded, begin, first, bool(blocks))
            _extend(blocks, begin, middle)
            if header > middle:
                blocks.append(Block(NO_MESSAGE, middle, header))
            blocks.append(Block(message, header, last))
        begin = last
    if begin < len(encoded):
        middle, _ = _borders(encoded, begin, len(encoded), bool(blocks))
        middle = len(encoded) if _is_blank(encoded, middle, len(encoded)) and blocks else middle
        _extend(blocks, begin, middle)
        if middle < len(encoded):
            blocks.append(Block(NO_MESSAGE, middle, len(encoded)))
    return blocks


def owners(encoded: Encoded) -> np.ndarray:
    """The message of each token, what the template writes within a turn included."""
    owners_T = np.array(encoded.messages_T, dtype=np.int64)
    for turn in encoded.turns:
        inside = owners_T[turn.begin : turn.end]
        inside[inside == NO_MESSAGE] = turn.message
    return owners_T


def headers_of(encoded: Encoded) -> list[range]:
    """For each turn the tokens before it that announce it."""
    begins = [block.begin for block in blocks_of(encoded)]
    return [range(max(begin for begin in begins if begin <= turn.begin), turn.begin) for turn in encoded.turns]


def apart_of(encoded: Encoded, controls_T: np.ndarray) -> list[str]:
    """For each token `thinking`, `tool call`, `tools` or nothing; with the brackets that the template writes around them."""
    apart_T = [""] * len(encoded)
    for turn in encoded.turns:
        _mark_turn(encoded.parts_T[turn.begin : turn.end], controls_T[turn.begin : turn.end], apart_T, turn.begin)
    tools = np.flatnonzero(encoded.parts_T == Part.TOOLS)
    if len(tools):
        begin, end = int(tools[0]), int(tools[-1]) + 1
        apart_T[begin:end] = [apart or APART[Part.TOOLS] for apart in apart_T[begin:end]]
    return apart_T


def _mark_turn(parts_T: np.ndarray, controls_T: np.ndarray, apart_T: list[str], offset: int) -> None:
    """What the template writes between two parts goes to the first, from its last control token on to the second."""
    before = ""
    runs = list(_runs(parts_T))
    for number, (part, first, last) in enumerate(runs):
        if part != Part.TEMPLATE:
            before = APART.get(Part(part), "")
            apart_T[offset + first : offset + last] = [before] * (last - first)
            continue
        after = APART.get(Part(runs[number + 1][0]), "") if number + 1 < len(runs) else ""
        opening = np.flatnonzero(controls_T[first:last])
        border = last
        if after:
            border = first + int(opening[-1]) if len(opening) else last if before else first
        apart_T[offset + first : offset + border] = [before] * (border - first)
        apart_T[offset + border : offset + last] = [after] * (last - border)


def _borders(encoded: Encoded, begin: int, end: int, has_before: bool) -> tuple[int, int]:
    """Of what lies between two messages: the end of what closes the first, and the beginning of what opens the second."""
    closing = {int(encoded.ids_T[turn.end - 1]) for turn in encoded.turns}
    found = [t for t in range(begin, end) if int(encoded.ids_T[t]) in closing]
    after_turn = any(turn.end == begin for turn in encoded.turns)  # its own end token lies within it
    middle = begin
    if has_before and (after_turn or found):
        middle = _past_blanks(encoded, begin if after_turn else found[0] + 1, end)
    header = _past_blanks(encoded, found[-1] + 1, end) if found else middle
    return middle, max(header, middle)


def _past_blanks(encoded: Encoded, begin: int, end: int) -> int:
    while begin < end and _is_blank(encoded, begin, begin + 1):
        begin += 1
    return begin


def _is_blank(encoded: Encoded, begin: int, end: int) -> bool:
    """Whether tokens [begin, end) write white space alone."""
    if begin >= end:
        return True
    text = encoded.text[int(encoded.offsets_TC[begin, 0]) : int(encoded.offsets_TC[end - 1, 1])]
    return bool(text) and text.isspace()


def _extend(blocks: list[Block], begin: int, end: int) -> None:
    if blocks and end > begin:
        blocks[-1] = Block(blocks[-1].message, blocks[-1].begin, end)


def _runs(values_T: np.ndarray) -> list[tuple[int, int, int]]:
    """Equal neighbours as (value, begin, end)."""
    borders = [0, *(np.flatnonzero(np.diff(values_T)) + 1).tolist(), len(values_T)]
    return [(int(values_T[begin]), begin, end) for begin, end in pairwise(borders) if end > begin]
