"""How numbers of things read in messages."""

from __future__ import annotations


def counted(number: int, thing: str, things: str | None = None) -> str:
    """`1 step`, `1,200 steps`; `things` where an s does not make it many: `2 processes`."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"
