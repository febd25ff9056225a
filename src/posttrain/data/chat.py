"""Conversation -> token ids and, for each, whether it is trained: what the model must produce itself.

A conversation is rendered once, whole, by the model's own template. An assistant turn's span begins where the rendering
of the messages before it, with the generation prompt, ends; its content must follow there, then one control token that
ends the turn. What cannot be shown to be so is refused with the reason, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from posttrain.data.encoded import NO_MESSAGE, Encoded, Part, Turn
from posttrain.data.formats import RowError, check_trainable, prompt_of
from posttrain.errors import InputError
from posttrain.records import Conversation

_PROBE = "posttrain7probe"  # stands in for an answer, to see what a template writes around one
_UNPROVEN = "template cannot be masked"


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model must produce, its end-of-turn token included."""

    start: int
    end: int
    message: int = 0


class ChatTokenizer:
    """A tokenizer and its chat template, as one reader of conversations.

    `tokenizer` is a fast tokenizer of transformers. Raises InputError where it has no template, is not a fast one, or
    has no token that could end a turn.
    """

    def __init__(self, tokenizer: Any):
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.is_fast:
            raise InputError(f"{name}: only fast tokenizers (tokenizer.json) tell where a token lies in the text.")
        if not tokenizer.chat_template:
            raise InputError(f"{name} has no chat template. Give one: data.chat_template=FILE.jinja")
        self.tokenizer = tokenizer
        self._backend = _keeping_offsets(tokenizer.backend_tokenizer)
        self._control = sorted((str(t) for t in tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        if not self._control:
            raise InputError(f"{name} has no control token, so that nothing can end an assistant's turn.")

    def render(self, messages: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        """The text that the template writes. Raises RowError where the template refuses the messages."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise RowError("refused by the template", f"the chat template says: {error}") from None

    def encode(self, conversation: Conversation) -> Encoded:
        """Ids, equal to those of `apply_chat_template`, and which of them are trained. Raises RowError."""
        encoded = self.encode_many([conversation])[0]
        if isinstance(encoded, RowError):
            raise encoded
        return encoded[0]

    def encode_many(self, conversations: Sequence[Conversation]) -> list[list[Encoded] | RowError]:
        """The samples of each, tokenized on all cores; a bad row gives its RowError in its place."""
        rendered: list[tuple[str, list[Span]] | RowError] = []
        for conversation in conversations:
            try:
                check_trainable(conversation)
                rendered.append(self._spans(conversation.messages))
            except RowError as error:
                rendered.append(error)
        texts = [item[0] for item in rendered if not isinstance(item, RowError)]
        tokens = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        masked = [item if isinstance(item, RowError) else _masked(*item, next(tokens)) for item in rendered]
        return [item if isinstance(item, RowError) else [item] for item in masked]

    def prompt_ids(self, conversation: Conversation) -> np.ndarray:
        """Ids (int32) of the messages before the last assistant's turn, with the header that asks for an answer."""
        text = self.render(prompt_of(conversation.messages), generation_prompt=True)
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def _spans(self, messages: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        text = self.render(messages)
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        return text, [self._span(text, messages, turn) for turn in turns]

    def _span(self, text: str, messages: list[dict[str, Any]], turn: int) -> Span:
        """Where the turn's own characters lie in `text`, the rendering of all messages."""
        before = self.render(messages[:turn], generation_prompt=True)
        through = text if turn == len(messages) - 1 else self.render(messages[: turn + 1])
        if not text.startswith(through):
            raise RowError(_UNPROVEN, f"the template writes message {turn} otherwise once the conversation goes on")
        if not through.startswith(before):
            raise RowError(_UNPROVEN, f"message {turn} does not begin with what the generation prompt writes")
        around = self._around(messages, turn, through[len(before) :], before)
        marker = around.lstrip()
        for control in self._control:
            if marker.startswith(control):
                return Span(len(before), len(through) - len(marker) + len(control), turn)
        raise RowError(_UNPROVEN, f"no control token ends message {turn}: after it comes {around[:20]!r}")

    def _around(self, messages: list[dict[str, Any]], turn: int, written: str, before: str) -> str:
        """What the template writes after the turn's content, shown to be all of that content."""
        content = messages[turn].get("content")
        if not isinstance(content, str) or messages[turn].get("tool_calls"):
            raise RowError(_UNPROVEN, f"message {turn} holds tool calls, whose place in the text is not proven")
        for form in (content, content.strip()):
            if form and written.startswith(form):
                return written[len(form) :]
        probe = self.render([*messages[:turn], {**messages[turn], "content": _PROBE}])
        lead, found, rest = probe[len(before) :].partition(_PROBE)
        for form in (content, content.strip()):
            if found and probe.startswith(before) and written == lead + form + rest:
                return rest
        raise RowError(_UNPROVEN, f"the template does not write the content of message {turn} as it stands")


def _masked(text: str, spans: list[Span], tokens: Any) -> Encoded | RowError:
    offsets_TC = np.asarray(tokens.offsets, dtype=np.int32).reshape(-1, 2)
    starts, ends = offsets_TC.T
    weights_T = np.zeros(len(starts), dtype=np.float32)
    messages_T, parts_T = np.full(len(starts), NO_MESSAGE), np.zeros(len(starts), dtype=np.uint8)
    turns = []
    for span in spans:
        inside = (starts >= span.start) & (ends <= span.end)
        straddles = ~inside & (starts < span.end) & (ends > span.start)
        if straddles.any():
            piece = text[slice(*offsets_TC[int(straddles.argmax())])]
            return RowError(_UNPROVEN, f"the token {piece!r} lies across the border of an assistant's turn")
        weights_T[inside] = 1
        messages_T[inside], parts_T[inside] = span.message, Part.TEXT
        first, *_, last = np.flatnonzero(inside).tolist() * 2
        parts_T[last] = Part.END
        turns.append(Turn(span.message, first, last + 1, 1.0, "all assistant turns"))
    ids_T = np.asarray(tokens.ids, dtype=np.int32)
    return Encoded(text, ids_T, weights_T, offsets_TC, messages_T, parts_T, tuple(turns))


def _keeping_offsets(backend: Any) -> Any:
    """The tokenizer without a post-processor that trims white space from offsets (Llama 3's does)."""
    if '"trim_offsets":true' not in backend.to_str().replace(" ", ""):
        return backend
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend.to_str())
    copy.post_processor = None
    return copy
