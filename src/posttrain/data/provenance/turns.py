"""The characters that a model must produce for a turn, shown to be all of the turn's text, or the reason why not."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from posttrain.data.encoded import Part
from posttrain.data.formats import RowError
from posttrain.data.provenance.borders import UNPROVEN, Borders
from posttrain.data.provenance.marked import GENERATED, LOST
from posttrain.data.provenance.messages import REASONING_TAGS, MarkedConversation, reasoning_end, texts_of
from posttrain.data.provenance.template import Rendered, Run

# A template may repeat the end of a turn in the header of the next message: the name of a called tool, for one.
_MOST_ECHOES = 3


@dataclass(frozen=True)
class Span:
    """Characters [start, end) of a turn, the token that ends it included.

    Its own text begins at `own_start`: before that stands what the template writes for it. Its reasoning ends before
    `reasoning_end`; None where it stands behind text.
    """

    message: int
    start: int
    own_start: int
    end: int
    reasoning_end: int | None
    notes: tuple[str, ...] = ()


def find_span(borders: Borders, conversation: MarkedConversation, rendered: Rendered, turn: int, header: bool) -> Span:
    """The span of message `turn` in the rendering of the whole conversation.

    `header`: the turn is one that a generation prompt asks for (an assistant's); else it begins with its own text. Raises
    RowError where the template leaves something out, moves it, or where begin or end cannot be proven.
    """
    first, last = _place(rendered.runs, turn)
    if first == last:
        return _empty(borders, conversation, rendered, turn, first, header)
    own_start = rendered.runs[first][0]
    start, notes = own_start, tuple[str, ...]()
    if header:
        start, notes = _begin(borders, conversation, rendered, turn, first)
    found = _end(borders, conversation, rendered, turn, start, first, last)
    for shorter in range(last - 1, max(first, last - _MOST_ECHOES - 1), -1):
        if isinstance(found, tuple):
            break
        echo = _end(borders, conversation, rendered, turn, start, first, shorter)
        found = echo if isinstance(echo, tuple) else found
    if isinstance(found, RowError):
        raise found
    last, end, said = found
    own_end = rendered.runs[last - 1][1]
    if LOST in rendered.codes[start:end]:
        raise RowError(
            UNPROVEN, f"the template writes part of message {turn} by an operation that hides where it came from"
        )
    start += _outside_generation(rendered, turn, start, own_end)
    return Span(
        turn, start, own_start, end, _reasoning_end(rendered.text, rendered.runs[first:last], start), (*notes, *said)
    )


def _begin(
    borders: Borders, conversation: MarkedConversation, rendered: Rendered, turn: int, first: int
) -> tuple[int, tuple[str, ...]]:
    """Where the header before the turn's first run ends, and notes."""
    gap_start, before = _content_before(rendered.runs, first)
    own_start = rendered.runs[first][0]
    length, opened = borders.begin(conversation, turn, rendered.text[gap_start:own_start], before)
    if opened and rendered.text.startswith(opened, own_start):
        return own_start + len(opened), ()  # the turn's own reasoning begins with what the prompt writes
    note = f"message {turn}: the generation prompt goes on with {opened!r}, which the conversation lacks"
    return gap_start + length, (note,) if opened else ()


def _end(
    borders: Borders, conversation: MarkedConversation, rendered: Rendered, turn: int, start: int, first: int, last: int
) -> tuple[int, int, list[str]] | RowError:
    """`last`, where the turn ends if its runs are [first, last), and notes; or why that cannot be."""
    runs, text = rendered.runs, rendered.text
    own_end, next_start = runs[last - 1][1], runs[last][0] if last < len(runs) else len(text)
    try:
        notes = _check_complete(conversation.plain[turn], turn, text, runs[first:last])
        scaffold = _scaffold(text, start, runs[first:last])
        return last, own_end + borders.end(conversation, turn, text[own_end:next_start], scaffold, turn), notes
    except RowError as error:
        return error


def _empty(
    borders: Borders, conversation: MarkedConversation, rendered: Rendered, turn: int, place: int, header: bool
) -> Span:
    """The span of a turn without text, between the runs before and from `place`."""
    if not header:
        raise RowError(UNPROVEN, f"message {turn} is empty, so that its place cannot be found")
    runs, text = rendered.runs, rendered.text
    gap_start, before = _content_before(runs, place)
    gap = text[gap_start : runs[place][0] if place < len(runs) else len(text)]
    length, opened = borders.begin(conversation, turn, gap, before)
    if opened:
        raise RowError(UNPROVEN, f"message {turn} is empty, and the template leaves out {opened!r} of its beginning")
    notes = _check_complete(conversation.plain[turn], turn, text, [])
    try:
        start, end = gap_start + length, gap_start + borders.end(conversation, turn, gap, "", before, length)
    except RowError:
        start = end = 0
    if end <= start:
        raise RowError(UNPROVEN, f"message {turn} is empty, and what ends it cannot be told from what is around it")
    return Span(turn, start, end, end, start, tuple(notes))


def _content_before(runs: list[Run], place: int) -> tuple[int, int]:
    """Where the content before a run ends, and whose it is."""
    return (runs[place - 1][1], runs[place - 1][2]) if place else (0, -1)


def _scaffold(text: str, start: int, runs: list[Run]) -> str:
    """What the template itself writes between a turn's beginning and its last character."""
    begins, ends = [start, *(run[1] for run in runs)], [run[0] for run in runs]
    return "\0".join(text[begin:end] for begin, end in zip(begins, ends, strict=False))


def _place(runs: list[Run], turn: int) -> tuple[int, int]:
    """Which runs are the turn's: [first, last), one stretch between those of earlier and of later messages."""
    own = [i for i, run in enumerate(runs) if run[2] == turn]
    if not own:
        place = next((i for i, run in enumerate(runs) if run[2] > turn), len(runs))
        if any(run[2] < turn for run in runs[place:]):
            raise RowError(UNPROVEN, f"message {turn} is empty, and the template writes others in another order")
        return place, place
    first = last = own[0]
    while last < len(runs) and runs[last][2] == turn:
        last += 1
    if any(run[2] > turn for run in runs[:first]):
        raise RowError(UNPROVEN, f"the template writes message {runs[first - 1][2]} before message {turn}")
    elsewhere = [run for run in runs[last:] if run[2] == turn and run[3] != Part.TOOL_CALL]
    if elsewhere:
        raise RowError(UNPROVEN, f"the template writes the text of message {turn} in more than one place")
    return first, last


def _check_complete(message: dict[str, Any], turn: int, text: str, runs: list[Run]) -> list[str]:
    """Raise RowError unless all of the message stands in its runs; reasoning that is left out is noted."""
    owned = {part: "".join(text[start:end] for start, end, _, p in runs if p == part) for part in Part}
    whole = texts_of(message.get("content"))
    texts = [part[reasoning_end(part) :] for part in whole]
    written = [run for run in runs if run[3] == Part.TEXT]
    between = (
        text[written[0][0] : written[-1][1]] if written else ""
    )  # what a template puts back between parts is the text's
    if not _same_text(texts, owned[Part.TEXT]) and not _same_text(texts, between):
        if not owned[Part.TEXT].strip():
            raise RowError(UNPROVEN, f"the template leaves out the text of message {turn}")
        raise RowError(UNPROVEN, f"the template does not write the text of message {turn} as it stands")
    calls = _calls(message)
    leaves = [leaf for call in calls for leaf in _leaves(call.get("arguments", call.get("parameters")))]
    for leaf, times in Counter([*(str(call.get("name", "")) for call in calls), *leaves]).items():
        if leaf and all(owned[Part.TOOL_CALL].count(form) < times for form in _forms(leaf)):
            raise RowError(UNPROVEN, f"the template leaves out {leaf[:40]!r} of a tool call in message {turn}")
    reasoning = "".join(part[: reasoning_end(part)] for part in whole) + str(message.get("reasoning_content") or "")
    if reasoning.strip() and not owned[Part.REASONING].strip():
        return [f"message {turn}: the template leaves out its reasoning"]
    return []


def _same_text(texts: list[str], owned: str) -> bool:
    """Whether the texts stand one after the other, but for white space around each, plain or as JSON."""
    for form in range(3):
        rest = owned.strip()
        for text in texts:
            stripped = _forms(text.strip())[form]
            if not rest.startswith(stripped):
                break
            rest = rest[len(stripped) :].lstrip()
        else:
            if not rest:
                return True
    return False


def _forms(text: str) -> tuple[str, str, str]:
    return text, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1]


def _calls(message: dict[str, Any]) -> list[dict[str, Any]]:
    calls = message.get("tool_calls") or []
    calls = [call.get("function", call) for call in calls if isinstance(call, dict)]
    legacy = message.get("function_call")
    return [*calls, legacy] if isinstance(legacy, dict) else calls


def _leaves(value: Any) -> list[str]:
    """Keys and texts of a tool call's arguments; arguments given as JSON text are one text."""
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict):
        return [leaf for key, item in value.items() for leaf in (str(key), *_leaves(item))]
    return [leaf for item in value for leaf in _leaves(item)] if isinstance(value, list) else []


def _reasoning_end(text: str, runs: list[Run], start: int) -> int | None:
    """Where text or calls begin behind the reasoning and the tag that closes it; `start` without reasoning, None where text
    stands before it."""
    reasoning = [number for number, run in enumerate(runs) if run[3] == Part.REASONING]
    if not reasoning:
        return start
    if reasoning != list(range(len(reasoning))):
        return None
    last = runs[reasoning[-1]]
    if len(runs) == len(reasoning):
        return last[1]
    following = runs[len(reasoning)]
    closers = [
        text.rfind(close, last[0], following[0]) + len(close)
        for _, close in REASONING_TAGS
        if close in text[last[0] : following[0]]
    ]
    end = max(closers, default=following[0])
    while end < following[1] and text[end].isspace():
        end += 1
    return end


def _outside_generation(rendered: Rendered, turn: int, start: int, own_end: int) -> int:
    """How many of the span's first characters the template's own {% generation %} block leaves out; it may leave out what the
    template writes and reasoning, not an answer's text. That it may begin with the header, which it should not, is mended."""
    if not (rendered.code_array >= GENERATED).any():
        return 0
    inside = rendered.code_array[start:own_end] >= GENERATED
    first = int(inside.argmax()) if inside.any() else len(inside)
    text = [run for run in rendered.runs if run[2] == turn and run[3] != Part.REASONING and run[0] < own_end]
    if any(run[0] < start + first for run in text) or not inside[first:].all():
        raise RowError(UNPROVEN, f"the template's generation block leaves out part of message {turn}")
    return first
