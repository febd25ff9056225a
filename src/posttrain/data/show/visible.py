"""Characters that cannot be seen, made visible: line breaks, spaces at the end of a line, tabs, controls."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

from posttrain.data.show.samples import Shown

NEWLINE, SPACE, TAB = "↵", "·", "⇥"
_AT_LINE_ENDS = re.compile(r" +(?=\n|$)")
_JOINERS = {"\u200c", "\u200d"}  # part of emoji and of scripts: seen by their effect


def marked(sample: Shown) -> Iterator[list[tuple[str, str]]]:
    """What each token adds to the text, in pieces, each with the mark that stands for it, or nothing where it is seen."""
    trailing = _trailing_spaces(sample)
    for piece, (start, end) in zip(sample.new_T, sample.encoded.offsets_TC.tolist(), strict=True):
        begin = end - len(piece)
        is_space = trailing[begin:end] if end > start else np.zeros(len(piece), dtype=bool)
        if piece.isascii() and piece.isprintable() and not is_space.any():
            yield [(piece, "")]
        else:
            yield [(c, SPACE if space else mark_of(c)) for c, space in zip(piece, is_space.tolist(), strict=True)]


@cache
def mark_of(character: str) -> str:
    """What stands for a character that has no shape of its own; nothing where it has one."""
    if character == "\n":
        return NEWLINE
    if character == "\t":
        return TAB
    if character.isalnum() or character == " " or character in _JOINERS:
        return ""
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") or character == "\u00a0":
        return f"U+{ord(character):04X}"
    return ""


def _trailing_spaces(sample: Shown) -> np.ndarray:
    """For each character whether it is a space before a line break, a control token or the end."""
    text = sample.encoded.text
    trailing = np.zeros(len(text), dtype=bool)
    for found in _AT_LINE_ENDS.finditer(text):
        trailing[found.start() : found.end()] = True
    for border in sample.encoded.offsets_TC[sample.controls_T, 0].tolist():
        spaces = len(text[:border]) - len(text[:border].rstrip(" ")) if text[border - 1 : border] == " " else 0
        trailing[border - spaces : border] = True
    return trailing
