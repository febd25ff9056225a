"""Rows as they will be trained: each token, in colour or as JSON, with whether it is trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from posttrain.data.chat import ChatTokenizer
from posttrain.data.encoded import Encoded
from posttrain.data.formats import Columns, RowError, conversation_of
from posttrain.data.sources import Row

if TYPE_CHECKING:
    from rich.text import Text

TRAINED, UNTRAINED = "trained", "context"
_STYLES = {TRAINED: "bold green", UNTRAINED: "dim"}


def shown_rows(rows: Iterable[Row], columns: Columns, chat: ChatTokenizer) -> Iterator[dict[str, Any]]:
    """One object a row: {row, ids, pieces, trained, roles}, or {row, refused: reason}."""
    for row in rows:
        try:
            encoded = chat.encode(conversation_of(row.values, columns))
        except RowError as error:
            yield {"row": row.number, "refused": f"{error.kind}: {error}"}
            continue
        trained = encoded.trained_T.tolist()
        yield {
            "row": row.number,
            "ids": encoded.ids_T.tolist(),
            "pieces": pieces(encoded, chat),
            "trained": trained,
            "roles": ["assistant" if t else "context" for t in trained],
        }


def pieces(encoded: Encoded, chat: ChatTokenizer) -> list[str]:
    """The text of each token; a token that is part of a character shows the whole of it."""
    return [encoded.text[start:end] or chat.tokenizer.decode([i]) for i, (start, end) in zip(
        encoded.ids_T.tolist(), encoded.offsets_TC.tolist(), strict=True)]  # fmt: skip


def coloured(shown: dict[str, Any]) -> Text:
    """A row for the terminal: trained tokens bold green, the rest dim, line breaks visible."""
    from rich.text import Text

    if "refused" in shown:
        return Text(f"row {shown['row']} refused: {shown['refused']}", style="red")
    text = Text(f"row {shown['row']}: {len(shown['ids'])} tokens, {sum(shown['trained'])} trained\n", style="cyan")
    for piece, trained in zip(shown["pieces"], shown["trained"], strict=True):
        text.append(piece.replace("\n", "⏎\n"), style=_STYLES[TRAINED if trained else UNTRAINED])
    return text
