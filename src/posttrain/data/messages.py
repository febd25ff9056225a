"""Messages as rows write them -> messages as chat templates take them, checked, with the weight of each.

What a template could tell apart is left as the row has it: arguments as text or as an object, content as text, parts or
null. Templates disagree there: some test `content is none`, others search in it, so that only the row can choose.
"""

from __future__ import annotations

import json
import math
from typing import Any

Messages = list[dict[str, Any]]
Weights = list[float | None]

# who speaks in ShareGPT's rows, by any name that is in use
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "function_call": "assistant",
}
FUNCTION_CALL = "function_call"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
WEIGHT_FIELDS = ("train", "loss_mask", "weight")
OTHER_MEDIA = ("video", "audio")  # than images
NO_SUCH_MEDIA = "video or sound"


class RowError(Exception):
    """A row that cannot be used. `kind` groups such rows in the report; the text says what was found.

    `file` is the one that is at fault, if it is none of the rows': it may be mended while they stay as they are.
    """

    def __init__(self, kind: str, found: str, file: str | None = None):
        super().__init__(kind, found)
        self.kind = kind
        self.found = found
        self.file = file

    def __str__(self) -> str:
        return self.found


def read_messages(value: Any, sharegpt: bool = False, name: str = "message") -> tuple[Messages, Weights]:
    """The messages and, for each, its own weight or None. Raises RowError; `name` is what it calls a message.

    `sharegpt`: roles go by ShareGPT's names, also where they stand under `role`.
    """
    if isinstance(value, str):
        value = parsed(value, "not a conversation", "found text, expected a list of messages or JSON text of one")
    value = clean(value)
    if not isinstance(value, list):
        raise RowError("not a conversation", f"found {kind_of(value)}, expected a list of messages")
    messages, weights = [], []
    for number, message in enumerate(value):
        where = f"{name} {number}"
        if not isinstance(message, dict):
            raise RowError("message without role", f"{where} is {kind_of(message)} without a 'role'")
        weights.append(_weight(message, where))
        messages.append(_message(message, sharegpt, where))
    return messages, weights


def checked_text(value: Any, where: str, kind: str = "message without text") -> str:
    """The value as text that a tokenizer takes."""
    if not isinstance(value, str):
        raise RowError(kind, f"{where} is {kind_of(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can write as an escape
        raise RowError("not Unicode", f"{where} holds half a character pair, which is not Unicode") from None
    return value


def parsed(text: str, kind: str, found: str) -> Any:
    """The value that JSON text stands for."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(kind, f"{found} (not JSON: {error})") from None


def clean(value: Any) -> Any:
    """A copy with lists and plain numbers in place of numpy's."""
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, dict):
        return {key: clean(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    return [clean(item) for item in value] if isinstance(value, list | tuple) else value


def kind_of(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _message(message: dict[str, Any], sharegpt: bool, where: str) -> dict[str, Any]:
    # a null field says that there is none, whoever wrote it; null content is a choice that templates see
    message = {k: v for k, v in message.items() if k not in WEIGHT_FIELDS and (v is not None or k == "content")}
    if sharegpt or ("from" in message and "role" not in message):
        message = _from_sharegpt(message, where)
    if not isinstance(message.get("role"), str):
        raise RowError("message without role", f"{where} is {kind_of(message)} without a 'role'")
    if not message.get("tool_calls", True):
        del message["tool_calls"]  # an empty list, which some templates would write as calls
    _check_calls(message, where)
    if _is_typed_parts(message.get("content")):
        message = _from_typed_parts(message, where)
    _check_content(message, where)
    for field in REASONING_FIELDS:
        if field in message:
            checked_text(message[field], f"{field} of {where}", "reasoning that is no text")
    for field in ("name", "tool_call_id"):
        if field in message:
            checked_text(message[field], f"{field} of {where}", "tool turn without text")
    return message


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if isinstance(content, str):
        checked_text(content, f"content of {where}")
    elif isinstance(content, list) and content:
        for number, part in enumerate(content):
            _check_part(part, f"part {number} of {where}")
    elif content is not None or not any(message.get(field) for field in ("tool_calls", FUNCTION_CALL)):
        found = "an empty list" if content == [] else kind_of(content) if "content" in message else "nothing"
        raise RowError("message without text", f"{where} has {found} as content, expected text")


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RowError("bad part of a message", f'{where} is no object with a type, such as {{"type": "text"}}')
    if any(medium in kind for medium in OTHER_MEDIA):
        raise RowError(NO_SUCH_MEDIA, f"{where} is of type {kind!r}; only text and images can be trained on")
    if kind == "text":
        checked_text(part.get("text"), f"text of {where}", "bad part of a message")


def _check_calls(message: dict[str, Any], where: str) -> None:
    """Calls that are whole: a name, and arguments as an object or as JSON text of one. Their nulls say nothing."""
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list):
            raise RowError("bad tool call", f"tool_calls of {where} is {kind_of(calls)}, expected a list")
        message["tool_calls"] = [
            _checked_call(call, f"tool call {number} of {where}") for number, call in enumerate(calls)
        ]
    if FUNCTION_CALL in message:
        message[FUNCTION_CALL] = _checked_function(message[FUNCTION_CALL], f"function_call of {where}")


def _checked_call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise RowError("bad tool call", f"{where} is {kind_of(call)}, expected an object with a function")
    call = {key: item for key, item in call.items() if item is not None}
    if "function" in call:
        return {**call, "function": _checked_function(call["function"], where)}
    return _checked_function(call, where)


def _checked_function(function: Any, where: str) -> dict[str, Any]:
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise RowError("bad tool call", f"{where} names no function: expected an object with name and arguments")
    function = {key: item for key, item in function.items() if item is not None}
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        checked_text(arguments, f"arguments of {where}", "bad tool call")
        arguments = parsed(arguments, "bad tool call", f"{where}: the arguments are {arguments[:60]!r}")
    if not isinstance(arguments, dict):
        found = kind_of(arguments) if "arguments" in function else "missing"
        raise RowError("bad tool call", f"{where}: the arguments are {found}, expected an object or JSON text of one")
    return function


def _from_sharegpt(message: dict[str, Any], where: str) -> dict[str, Any]:
    """{from, value} as {role, content}; a call of functions written out as JSON becomes `tool_calls`."""
    speaker = message.get("from", message.get("role"))
    if not isinstance(speaker, str):
        raise RowError("message without role", f"{where} has neither 'from' nor 'role'")
    role = SHAREGPT_ROLES.get(speaker.lower())
    if role is None and "role" not in message:
        known = ", ".join(SHAREGPT_ROLES)
        raise RowError("unknown role", f"{where} is from {speaker!r}; expected one of {known}")
    rest = {key: item for key, item in message.items() if key not in ("from", "value", "role", "content")}
    if speaker.lower() == FUNCTION_CALL:
        calls = _calls_in(message.get("value", message.get("content")), where)
        # empty text, which every template takes: null fails where content is searched, absence where it is joined
        return {"role": role, "content": "", "tool_calls": calls, **rest}
    content = {"content": message["value"]} if "value" in message else {}
    return {"role": role or speaker, **{k: message[k] for k in ("content",) if k in message}, **content, **rest}


def _calls_in(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls as OpenAI has them, of {name, arguments} or a list of such, as JSON text or not."""
    if isinstance(value, str):
        value = parsed(value, "bad tool call", f"{where}: the call is {value[:60]!r}")
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError("bad tool call", f"{where} calls nothing: expected {{name, arguments}} or a list of such")
    return [{"type": "function", "function": call} for call in calls]


def _is_typed_parts(content: Any) -> bool:
    return isinstance(content, list) and any(isinstance(part, dict) and "value" in part for part in content)


def _from_typed_parts(message: dict[str, Any], where: str) -> dict[str, Any]:
    """Parts {type: reasoning, text or tool_call, value} as the fields of OpenAI's messages, which keep that order."""
    order = ("reasoning", "text", "tool_call")
    values: dict[str, list[str]] = {kind: [] for kind in order}
    last = 0
    for number, part in enumerate(message["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in order:
            raise RowError("bad part of a message", f"part {number} of {where} is of type {kind!r}; expected {order}")
        if order.index(kind) < last:
            raise RowError("bad part of a message", f"part {number} of {where}: {kind} after {order[last]}")
        last = order.index(kind)
        values[kind].append(checked_text(part.get("value"), f"part {number} of {where}", "bad part of a message"))
    message = {**message, "content": "".join(values["text"])}
    if values["reasoning"]:
        message["reasoning_content"] = "".join(values["reasoning"])
    if values["tool_call"]:
        message["tool_calls"] = [call for text in values["tool_call"] for call in _calls_in(text, where)]
        _check_calls(message, where)
    return message


def _weight(message: dict[str, Any], where: str) -> float | None:
    """What `train`, `loss_mask` and `weight` say together."""
    given = {field: message[field] for field in WEIGHT_FIELDS if message.get(field) is not None}
    if not given:
        return None
    weights = {field: _checked_weight(field, value, where) for field, value in given.items()}
    if len({weight > 0 for weight in weights.values()}) > 1:
        said = ", ".join(f"{field}={value}" for field, value in given.items())
        raise RowError("contradictory weights", f"{where} says {said}: trained by one and not by the other")
    return weights.get("weight", next(iter(weights.values())))


def _checked_weight(field: str, value: Any, where: str) -> float:
    if field == "train":
        good, expected = isinstance(value, bool), "true or false"
    elif field == "loss_mask":
        good, expected = isinstance(value, int | float) and value in (0, 1), "0 or 1"
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good, expected = number and math.isfinite(value) and value >= 0, "a number of 0 or more"
    if not good:
        raise RowError("bad weight", f"{field} of {where} is {value!r}, expected {expected}")
    return float(value)
