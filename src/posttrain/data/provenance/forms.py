"""Messages in the forms that a template may ask for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

Messages = list[dict[str, Any]]
_PROBE = "posttrain"


def forms_of(messages: Messages) -> Iterator[tuple[Messages, str]]:
    """The messages as they stand, then in forms that a template may ask for, each with what a person should know of it."""
    yield messages, ""
    filled = [{**m, "content": ""} if m.get("content") is None else m for m in messages]
    if filled != messages:
        yield filled, "the template cannot take a message without text: it was given an empty one"
    for form, name in ((_as_objects, "objects"), (_as_texts, "JSON text")):
        for base in (messages, filled) if filled != messages else (messages,):
            changed = [_with_arguments(message, form) for message in base]
            if changed != base:
                yield changed, f"the template takes arguments of tool calls as {name}: they were given so"


def in_parts(messages: Messages) -> Messages:
    """With texts as lists of one part, for templates that see nothing else."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def asks_for_parts(render: Callable[[Messages], str]) -> bool:
    """Whether a template leaves out a text that is no list of parts (LLaVA's and SmolVLM's do)."""
    messages = [{"role": "user", "content": _PROBE}]
    return not _writes_the_probe(render, messages) and _writes_the_probe(render, in_parts(messages))


def _writes_the_probe(render: Callable[[Messages], str], messages: Messages) -> bool:
    try:
        return _PROBE in render(messages)
    except Exception:  # what a template raises is its own choice
        return False


def _with_arguments(message: dict[str, Any], form: Any) -> dict[str, Any]:
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return message
    changed = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            call = {**call, "function": {**function, "arguments": form(function["arguments"])}}
        elif isinstance(call, dict) and "arguments" in call:
            call = {**call, "arguments": form(call["arguments"])}
        changed.append(call)
    return {**message, "tool_calls": changed}


def _as_objects(arguments: Any) -> Any:
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except ValueError:
        return arguments


def _as_texts(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
