"""What one conversation is checked for by its text alone."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from posttrain.data.audit.arithmetic import disagreeing_answer, disagreeing_truth, wrong_calculations
from posttrain.records import Conversation

Found = tuple[str, str]  # kind, what was found

# C0 and C1 but tab and line ends; zero width and direction; what stands for an undecodable byte; half surrogate pairs
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufffd\ud800-\udfff]"
)
_JOINERS = "\u200c\u200d"  # spelling in several scripts and in emoji, so that only those after ASCII are meant
_QUOTED_CHARACTERS = 60
# Shorter ones, such as "yes", are rightly said again.
SHORTEST_REPEATED_CHARACTERS = 20


def check_conversation(conversation: Conversation) -> Iterator[Found]:
    """Everything found in one conversation, by kind."""
    messages = conversation.messages
    texts = [text_of(message) for message in messages]
    if messages and messages[-1]["role"] != "assistant":
        yield "no-final-answer", f"the last of {len(messages)} messages is from {messages[-1]['role']!r}"
    for number, (message, text) in enumerate(zip(messages, texts, strict=True)):
        if not text.strip() and message["role"] != "tool" and not _says_otherwise(message):  # a tool may answer nothing
            yield "empty-turn", f"message {number} ({message['role']}) is {text!r}"
        if found := _unseen(text):
            yield "control-character", f"message {number} ({message['role']}): {found}"
        if message["role"] == "assistant":
            yield from (("wrong-arithmetic", f"message {number}: {found}") for found in wrong_calculations(text))
    yield from _repeated(messages, texts)
    yield from _final_answer(conversation, texts)


def text_of(message: dict[str, Any]) -> str:
    """What a message says, its reasoning and calls aside."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, dict))


def quoted(text: str) -> str:
    """The beginning of a text in quotes, without half surrogate pairs, which cannot be printed."""
    shown = text if len(text) <= _QUOTED_CHARACTERS else text[:_QUOTED_CHARACTERS] + "…"
    return repr(shown).encode("utf-8", "backslashreplace").decode()


def _says_otherwise(message: dict[str, Any]) -> bool:
    """Whether it says something by other means than text: calls, reasoning, images."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    has_media = any(isinstance(part, dict) and part.get("type", "text") != "text" for part in parts)
    return has_media or bool(message.get("tool_calls") or message.get("reasoning_content"))


def _unseen(text: str) -> str | None:
    for match in _UNSEEN.finditer(text):
        before = text[match.start() - 1 : match.start()] if match.start() else ""
        if match[0] not in _JOINERS or before.isascii():
            return f"{_named(match[0])} at character {match.start()}"
    return None


def _repeated(messages: list[dict[str, Any]], texts: list[str]) -> Iterator[Found]:
    said: dict[str, tuple[int, str]] = {}  # by role, where and what it said last
    for number, (message, raw) in enumerate(zip(messages, texts, strict=True)):
        role, text = message["role"], raw.strip()
        if not text or message.get("tool_calls") or role == "tool":
            continue
        before, last = said.get(role, (-1, ""))
        is_long = before == number - 1 or len(text) >= SHORTEST_REPEATED_CHARACTERS
        if text == last and is_long:
            yield "repeated-turn", f"message {number} ({role}) says what message {before} said: {quoted(text)}"
        asked = texts[number - 1].strip() if number and messages[number - 1]["role"] == "user" else None
        if role == "assistant" and text == asked:
            yield "echo", f"message {number} repeats message {number - 1}: {quoted(text)}"
        said[role] = (number, text)


def _final_answer(conversation: Conversation, texts: list[str]) -> Iterator[Found]:
    if not texts or conversation.messages[-1]["role"] != "assistant":
        return
    if found := disagreeing_answer(texts[-1]):
        yield "answer-mismatch", found
    if found := disagreeing_truth(texts[-1], conversation.ground_truth):
        yield "truth-mismatch", found


def _named(character: str) -> str:
    name = unicodedata.name(character, "")
    return f"U+{ord(character):04X}{' ' + name.lower() if name else ''}"
