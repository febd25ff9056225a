"""A row, in any of the forms that people have -> Conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from posttrain.errors import InputError
from posttrain.records import Conversation

# columns that are recognised when no key is given, in this order
MESSAGES_KEY = "messages"
PROMPT_AND_RESPONSE_KEYS = (("prompt", "response"), ("question", "answer"))


class RowError(Exception):
    """A row that cannot be used. `kind` groups such rows in the report; the text says what was found."""

    def __init__(self, kind: str, found: str):
        super().__init__(kind, found)
        self.kind = kind
        self.found = found

    def __str__(self) -> str:
        return self.found


@dataclass(frozen=True)
class Columns:
    """Where the conversation stands in a row; None is recognised from the columns that there are."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None


def to_conversation(row: dict[str, Any], columns: Columns) -> Conversation:
    """The row as messages. Raises RowError for a bad row, InputError where a named column does not exist."""
    messages = [clean(message) for message in _messages(row, columns)]
    reward_model = row.get("reward_model") or {}
    truth = reward_model.get("ground_truth") if isinstance(reward_model, dict) else None
    return Conversation(
        messages, ground_truth=None if truth is None else str(truth), data_source=row.get("data_source")
    )


def check_trainable(conversation: Conversation) -> None:
    """Raise RowError unless the conversation ends with an assistant's turn."""
    if not conversation.messages:
        raise RowError("no messages", "the conversation is empty")
    last = conversation.messages[-1]["role"]
    if last != "assistant":
        raise RowError(
            "no assistant turn at the end",
            f"the last message is from '{last}'; SFT needs a final 'assistant' message to train on",
        )


def prompt_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages before the assistant's last turn: what a model is asked."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def clean(value: Any) -> Any:
    """The value without the nulls with which parquet fills structs, and with lists for numpy arrays."""
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items() if item is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [clean(item) for item in value] if isinstance(value, list) else value


def _messages(row: dict[str, Any], columns: Columns) -> list[dict[str, Any]]:
    if columns.messages:
        return _checked(_value(row, columns.messages, "data.messages_key"))
    if columns.prompt or columns.response:
        default_prompt, default_response = PROMPT_AND_RESPONSE_KEYS[0]
        prompt = _value(row, columns.prompt or default_prompt, "data.prompt_key")
        return _joined(prompt, _value(row, columns.response or default_response, "data.response_key"))
    if MESSAGES_KEY in row:
        return _checked(row[MESSAGES_KEY])
    for prompt_key, response_key in PROMPT_AND_RESPONSE_KEYS:
        if prompt_key in row and response_key in row:
            return _joined(row[prompt_key], row[response_key])
    raise InputError(
        f"No conversation recognised: the columns are {', '.join(row) or '(none)'}; expected `messages`, `prompt` with "
        "`response`, or `question` with `answer`. Name yours with data.messages_key, or data.prompt_key and data.response_key."
    )


def _value(row: dict[str, Any], key: str, option: str) -> Any:
    value: Any = row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise InputError(f"{option}={key}: there is no column '{part}'; found: {there or '(none)'}.")
        value = value[part]
    return value


def _joined(prompt: Any, response: Any) -> list[dict[str, Any]]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _checked(prompt)
    if isinstance(response, str):
        return [*messages, {"role": "assistant", "content": response}]
    if isinstance(response, list | tuple) or hasattr(response, "tolist"):
        return [*messages, *_checked(response)]
    raise RowError("no answer", f"the answer is {_kind(response)}, expected text")


def _checked(messages: Any) -> list[dict[str, Any]]:
    messages = messages.tolist() if hasattr(messages, "tolist") else messages
    if not isinstance(messages, list):
        raise RowError("not a conversation", f"found {_kind(messages)}, expected a list of messages")
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RowError("message without role", f"message {number} is {_kind(message)} without a 'role'")
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise RowError("message without text", f"message {number} has {_kind(content)} as content, expected text")
    return messages


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
