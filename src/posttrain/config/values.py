"""Kinds of values that options take: paths, lists as people write them, frequencies; each checked, or a ValueError that says what
was expected."""

from __future__ import annotations

import datetime
import os
import re
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, NonNegativeInt

# what rendering itself gives a template, and what apply_chat_template takes for itself
RESERVED_KWARGS = (
    "self", "conversation", "messages", "tools", "add_generation_prompt", "chat_template", "tokenize", "tokenizer_kwargs",
    "continue_final_message", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "sanitize_control_tokens",
)  # fmt: skip


def expand_path(path: str) -> str:
    """The path with `~` and `$VAR` replaced; hub names and URLs pass unchanged."""
    return os.path.expandvars(os.path.expanduser(path))


def _checked_path(path: str) -> str:
    expanded = expand_path(path)
    if not expanded:
        raise ValueError(f"{path!r} is an empty path")
    return expanded


def is_template(text: str) -> bool:
    """Whether it is a Jinja template itself, not the path of one."""
    return "{%" in text or "{{" in text


def _checked_template(text: str) -> str:
    return text if is_template(text) else _checked_path(text)


def _checked_local_folder(path: str) -> str:
    if "://" in path:
        raise ValueError(
            f"{path!r} is not a folder of this machine, where a run writes; give such a folder, and "
            f"trainer.default_hdfs_dir={path}, which then gets a copy of it"
        )
    return _checked_path(path)


def as_list(value: Any) -> Any:
    """One value as a list of it, and a list whose quotes the shell left in place, such as "['a','b']", as a list."""
    if value is None:
        return []
    value = unquoted(value)
    return [value] if isinstance(value, str | int | float) else value


def unquoted(value: Any) -> Any:
    if not (isinstance(value, str) and value.strip().startswith("[") and value.strip().endswith("]")):
        return value
    try:
        return yaml.load(value, yaml.BaseLoader)  # its items as text, of which pydantic makes what is asked for
    except yaml.YAMLError:
        return value


def _valid_frequency(value: Any) -> Any:
    text = str(value).strip()
    if not re.fullmatch(r"-1|[1-9]\d*(ep)?", text):
        raise ValueError("expected a number of steps such as 100, epochs such as 2ep, or -1 for never")
    return text if text.endswith("ep") else int(text)


def _checked_endpoint(endpoint: str) -> str:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"{endpoint!r} is not HOST:PORT, such as node1:29500")
    return endpoint


def checked_date(text: str) -> str:
    try:
        return datetime.date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"{text!r} is not a day, such as 2026-01-31") from None


def checked_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    if reserved := [key for key in RESERVED_KWARGS if key in kwargs]:
        raise ValueError(f"it sets {reserved[0]}, which rendering itself gives a template")
    return kwargs


def checked_pattern(pattern: str) -> str:
    try:
        re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


PathText = Annotated[str, AfterValidator(_checked_path)]
TemplateText = Annotated[str, AfterValidator(_checked_template)]
LocalFolder = Annotated[str, AfterValidator(_checked_local_folder)]
PathList = Annotated[list[PathText], BeforeValidator(as_list)]
TextList = Annotated[list[str], BeforeValidator(as_list)]
NumberList = Annotated[list[float], BeforeValidator(as_list)]
DeviceList = Annotated[list[NonNegativeInt], BeforeValidator(as_list)]
Frequency = Annotated[int | str, BeforeValidator(_valid_frequency)]
Endpoint = Annotated[str, AfterValidator(_checked_endpoint)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
