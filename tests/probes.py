"""What a conversation says, leaf by leaf, and how a rendering changes where one leaf says something else."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Range = tuple[int, int]


@dataclass(frozen=True)
class Leaf:
    """One text that somebody said: characters [begin, end) of the string at `path`, or the number there."""

    message: int  # NO_MESSAGE for the tools' descriptions
    kind: str  # text, reasoning, name, argument
    path: tuple[Any, ...]
    text: str
    begin: int = 0
    end: int = -1  # -1: a number


def leaves(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[Leaf]:
    """Every text, argument and name of a tool that is more than white space."""
    found = [leaf for i, message in enumerate(messages) for leaf in _leaves_of(i, message)]
    for t, tool in enumerate(tools or []):
        path = (t, "function", "description")
        found += _slices(-1, "text", path, tool["function"].get("description") or "")
    return found


def _leaves_of(i: int, message: dict[str, Any]) -> Iterator[Leaf]:
    content = message.get("content")
    parts = [((i, "content"), content)] if isinstance(content, str) else []
    if isinstance(content, list):
        parts = [((i, "content", p, "text"), part["text"]) for p, part in enumerate(content) if "text" in part]
    for path, text in parts:
        if message["role"] == "assistant":
            yield from _thought_and_said(i, path, text)
        else:
            yield from _slices(i, "text", path, text)
    for key in ("reasoning_content", "thinking", "reasoning"):
        if isinstance(message.get(key), str):
            yield from _slices(i, "reasoning", (i, key), message[key])
    for c, call in enumerate(message.get("tool_calls") or []):
        path = (i, "tool_calls", c, "function")
        yield from _slices(i, "name", (*path, "name"), call["function"]["name"])
        yield from _arguments(i, (*path, "arguments"), call["function"].get("arguments"))


def _thought_and_said(i: int, path: tuple[Any, ...], text: str) -> Iterator[Leaf]:
    thought = text.rfind("</think>")
    at = 0
    for piece in re.split(r"(</?think>)", text):
        kind = "reasoning" if at < thought else "text"
        if piece not in ("<think>", "</think>"):
            yield from _slices(i, kind, path, text, at, at + len(piece))
        at += len(piece)


def _arguments(i: int, path: tuple[Any, ...], value: Any) -> Iterator[Leaf]:
    if path[-1] == "arguments" and isinstance(value, str):  # JSON as text
        for match in re.finditer(r':\s*(?:"((?:[^"\\]|\\.)*)"|(-?\d[\d.]*))', value):
            group = 1 if match[1] is not None else 2
            yield from _slices(i, "argument", path, value, *match.span(group))
    elif isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arguments(i, (*path, key), item)
    elif isinstance(value, str):
        yield from _slices(i, "argument", path, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield Leaf(i, "argument", path, json.dumps(value))


def _slices(
    i: int, kind: str, path: tuple[Any, ...], text: str, begin: int = 0, end: int | None = None
) -> Iterator[Leaf]:
    piece = text[begin:end]
    core = piece.strip()
    if core:
        start = begin + piece.index(core)
        yield Leaf(i, kind, path, core, start, start + len(core))


def put(value: Any, leaf: Leaf, new: str) -> Any:
    """A copy of the messages (or tools) in which the leaf says `new`."""

    def changed(value: Any, path: tuple[Any, ...]) -> Any:
        if not path:
            if leaf.end < 0:
                return int(new) if isinstance(value, int) else float(f"{new}.5")
            return value[: leaf.begin] + new + value[leaf.end :]
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[path[0]] = changed(value[path[0]], path[1:])
        return copy

    return changed(value, leaf.path)


def probe_for(leaf: Leaf, number: int, text: str) -> str:
    """A word (or number) like nothing in `text`."""
    low = text.lower()
    for salt in range(1000):
        if leaf.end < 0 or leaf.text.isdigit():
            probe = str(7_030_418 + 1_017 * number + 77_777 * salt)
        else:
            n = number * 31 + salt
            probe = "qzv" + "".join("bcdfghjkmw"[int(d)] for d in f"{n:03d}") + "xj"
        if probe not in low:
            return probe
    raise AssertionError("no free word")


def aligned(text: str, changed: str, probe: str) -> list[Range] | None:
    """The parts of `text` in whose places `changed` has the probe."""
    pieces = re.split(re.escape(probe) + (r"(?:\.5)?" if probe.isdigit() else ""), changed, flags=re.IGNORECASE)
    times = len(pieces) - 1
    if not times:
        return [] if text == changed else None
    rest = len(text) - sum(map(len, pieces))
    if rest >= 0 and rest % times == 0:
        length, at, ranges = rest // times, 0, []
        for piece in pieces:
            if text[at : at + len(piece)] != piece:
                break
            at += len(piece)
            ranges.append((at, at + length))
            at += length
        else:
            return ranges[:-1]
    if not text.startswith(pieces[0]) or not text.endswith(pieces[-1]) or not all(pieces[1:-1]):
        return None
    at, ranges = len(pieces[0]), []
    for piece in pieces[1:-1]:
        found = text.find(piece, at)
        if found < 0:
            return None
        ranges.append((at, found))
        at = found + len(piece)
    stop = len(text) - len(pieces[-1])
    return [*ranges, (at, stop)] if at <= stop else None


def inserted(text: str, changed: str, probe: str) -> list[int] | None:
    """Where in `text` the probe was put, if that is all that changed."""
    pieces = changed.split(probe)
    if "".join(pieces) != text:
        return None
    places, at = [], 0
    for piece in pieces[:-1]:
        at += len(piece)
        places.append(at)
    return places


def stands_in(words: str, text: str) -> bool:
    forms = {words, json.dumps(words)[1:-1], json.dumps(words, ensure_ascii=False)[1:-1], html.escape(words)}
    forms |= {html.escape(form) for form in tuple(forms)} | {repr(words)[1:-1], " ".join(words.split())}
    return any(form.lower() in text.lower() for form in forms)
