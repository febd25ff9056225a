"""A row, in any of the forms that people have -> Conversation, or Tokens where it was tokenized before.

A form is known by its columns, or named by `data.format`; docs/data.md shows a row of each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os.path import abspath
from typing import Any

from posttrain.config.schema import DataOptions
from posttrain.config.values import RESERVED_KWARGS
from posttrain.data.images.references import BAD_IMAGE, with_images
from posttrain.data.messages import (
    NO_SUCH_MEDIA,
    OTHER_MEDIA,
    Messages,
    RowError,
    Weights,
    checked_text,
    clean,
    kind_of,
    parsed,
    read_messages,
)
from posttrain.data.pretokenized import is_tokenized, read_tokens
from posttrain.records import Conversation, Tokens

AUTO, TOKENS = "auto", "tokens"
SYSTEM_ROLES = ("system", "developer")
QUESTION_PAIRS = (("question", "answer"), ("query", "response"), ("problem", "solution"))
# columns by which a form is recognised where none is named, in this order; pairs of a prompt and an answer come last
PAIRS_BEGIN = 3
RECOGNISED = (
    ("messages", ("messages",)),
    ("sharegpt", ("conversations",)),
    ("alpaca", ("instruction", "output")),
    ("prompt_response", ("prompt", "response")),
    ("prompt_response", ("prompt", "completion")),
    *(("question_answer", pair) for pair in QUESTION_PAIRS),
)
IMAGE_COLUMNS = ("images", "image")
OTHER_MEDIA_COLUMNS = {*OTHER_MEDIA, *(f"{medium}s" for medium in OTHER_MEDIA)}


@dataclass(frozen=True)
class Columns:
    """Where the conversation stands in a row, and in which form: None or "auto" is recognised."""

    messages: str | None = None
    prompt: str | None = None
    response: str | None = None
    format: str = AUTO
    tools: str | None = None
    system_prompt: str | None = None
    answers_needed: bool = True  # False: a row may be a prompt alone, to be answered
    images: str | None = None
    image_dir: str | None = None  # absolute, or a URL

    @classmethod
    def of(cls, data: DataOptions, answers_needed: bool = True) -> Columns:
        return cls(
            data.messages_key,
            data.prompt_key,
            data.response_key,
            data.format,
            data.tools_key,
            data.system_prompt,
            answers_needed,
            data.image_key,
            data.image_dir if data.image_dir is None or "://" in data.image_dir else abspath(data.image_dir),
        )


def to_conversation(row: dict[str, Any], columns: Columns, folder: str = "") -> Conversation | Tokens:
    """The row as messages, or as the tokens that it brings. Raises RowError for a row that cannot be used.

    Relative paths of images begin at the columns' `image_dir`, or else at `folder`, which is that of the row's file.
    """
    try:
        return _read_row(row, columns, columns.image_dir or folder)
    except (RecursionError, OverflowError) as error:
        raise RowError("too deep or too large", f"the row holds what nothing can read: {error}") from None


def _read_row(row: dict[str, Any], columns: Columns, image_folder: str) -> Conversation | Tokens:
    form = _recognised(row, columns) if columns.format == AUTO else columns.format
    in_column = _image_column(row, columns)
    if form == TOKENS:
        if in_column is not None:
            found = "the row brings token ids and images, and does not say which tokens stand for which image"
            raise RowError("images with token ids", f"{found}; give messages in place of input_ids")
        return read_tokens(row)
    _refuse_other_media(row)
    source = row.get("data_source")
    messages, weights = _READ[form](row, columns)
    _refuse_media_beside_content(messages)
    messages, images, notes = with_images(messages, in_column, image_folder)
    messages, weights = _with_system(messages, weights, row, columns)
    return Conversation(
        messages,
        tools=_tools(row, columns),
        template_kwargs=_template_kwargs(row),
        weights=tuple(weights) if any(weight is not None for weight in weights) else None,
        ground_truth=_ground_truth(row),
        data_source=None if source is None else str(source),
        extra_info=_extra_info(row),
        images=images,
        notes=tuple(notes),
    )


def conversation_or_error(row: dict[str, Any], columns: Columns, folder: str = "") -> Conversation | Tokens | RowError:
    """As `to_conversation`, with the error in the place of a row that cannot be used."""
    try:
        return to_conversation(row, columns, folder)
    except RowError as error:
        return error


def conversation_of(row: dict[str, Any], columns: Columns, folder: str = "") -> Conversation:
    """As `to_conversation`, where only messages will do."""
    conversation = to_conversation(row, columns, folder)
    if isinstance(conversation, Tokens):
        raise RowError("pre-tokenized", "the row holds token ids and no messages, which are needed here")
    return conversation


def prompt_of(messages: Messages) -> Messages:
    """The messages before the assistant's last turn: what a model is asked."""
    return messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages


def _recognised(row: dict[str, Any], columns: Columns) -> str:
    if columns.messages:
        return "messages"
    if columns.prompt or columns.response:
        return "prompt_response"
    form = next((form for form, keys in RECOGNISED if all(key in row for key in keys)), None)
    if form is None and not columns.answers_needed:
        form = next((form for form, keys in RECOGNISED[PAIRS_BEGIN:] if keys[0] in row), None)
    if is_tokenized(row):
        if form:
            raise RowError(
                "ambiguous form", f"the row holds input_ids and a conversation; choose data.format={form} or tokens"
            )
        return TOKENS
    if form is None:
        raise RowError(
            "no conversation recognised",
            f"the columns are {', '.join(row) or '(none)'}; expected `messages`, `conversations`, `instruction` with "
            "`output`, `prompt` with `response`, `question` with `answer`, or `input_ids` with `labels`. Name yours with "
            "data.messages_key, or data.prompt_key and data.response_key",
        )
    return form


def _read_openai(row: dict[str, Any], columns: Columns) -> tuple[Messages, Weights]:
    return read_messages(_value(row, columns.messages, "data.messages_key", "messages"))


def _read_sharegpt(row: dict[str, Any], columns: Columns) -> tuple[Messages, Weights]:
    return read_messages(_value(row, columns.messages, "data.messages_key", "conversations"), sharegpt=True)


def _read_pair(row: dict[str, Any], columns: Columns) -> tuple[Messages, Weights]:
    prompt = _value(row, columns.prompt, "data.prompt_key", "prompt")
    there = [key for key in ("response", "completion") if row.get(key) is not None]
    if columns.response is None and len(there) > 1:
        raise RowError("ambiguous form", "there are `response` and `completion`; choose one with data.response_key")
    if not columns.answers_needed and columns.response is None and not there:
        return _side(prompt, "user", "prompt", "no prompt")
    return _joined(prompt, _value(row, columns.response, "data.response_key", (there or ["response"])[0]))


def _read_question(row: dict[str, Any], columns: Columns) -> tuple[Messages, Weights]:
    there = (pair for pair in QUESTION_PAIRS if all(key in row for key in pair))
    asked = (pair for pair in QUESTION_PAIRS if pair[0] in row and not columns.answers_needed)
    question, answer = next(there, next(asked, QUESTION_PAIRS[0]))
    prompt = _value(row, columns.prompt, "data.prompt_key", question)
    if not columns.answers_needed and columns.response is None and answer not in row:
        return _side(prompt, "user", "prompt", "no prompt")
    return _joined(prompt, _value(row, columns.response, "data.response_key", answer))


def _read_alpaca(row: dict[str, Any], columns: Columns) -> tuple[Messages, Weights]:
    if missing := [key for key in ("instruction", "output") if key not in row]:
        there = ", ".join(row) or "(none)"
        raise RowError(f"no column {missing[0]}", f"an alpaca row has instruction and output; the columns are {there}")
    instruction = checked_text(row["instruction"], "the instruction", "no prompt")
    context = checked_text(clean(row.get("input")) or "", "the input", "no prompt")
    turns = _history(clean(row.get("history")) or [])
    output = checked_text(row["output"], "the output", "no answer")
    turns.append(("\n".join(text for text in (instruction, context) if text), output))
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return messages, [None] * len(messages)


_READ: dict[str, Callable[[dict[str, Any], Columns], tuple[Messages, Weights]]] = {
    "messages": _read_openai,
    "sharegpt": _read_sharegpt,
    "prompt_response": _read_pair,
    "question_answer": _read_question,
    "alpaca": _read_alpaca,
}


def _history(history: Any) -> list[tuple[str, str]]:
    if not isinstance(history, list):
        raise RowError("bad history", f"the history is {kind_of(history)}, expected a list of [question, answer]")
    turns = []
    for number, turn in enumerate(history):
        if not isinstance(turn, list) or len(turn) != 2:
            raise RowError("bad history", f"turn {number} of the history is not [question, answer]")
        where = f"turn {number} of the history"
        turns.append((checked_text(turn[0], where, "bad history"), checked_text(turn[1], where, "bad history")))
    return turns


def _joined(prompt: Any, response: Any) -> tuple[Messages, Weights]:
    """A prompt and its answer, each as text, as a message or as messages."""
    asked, asked_weights = _side(prompt, "user", "prompt", "no prompt")
    answered, answered_weights = _side(response, "assistant", "answer", "no answer")
    return [*asked, *answered], [*asked_weights, *answered_weights]


def _side(value: Any, role: str, name: str, kind: str) -> tuple[Messages, Weights]:
    if isinstance(value, str):
        return [{"role": role, "content": checked_text(value, f"the {name}", kind)}], [None]
    value = clean([value] if isinstance(value, dict) else value)
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind_of(value)
        raise RowError(kind, f"the {name} is {found}, expected text or messages")
    return read_messages(value, name=f"message of the {name}, number")


def _with_system(
    messages: Messages, weights: Weights, row: dict[str, Any], columns: Columns
) -> tuple[Messages, Weights]:
    """With the row's `system` column in front, or else the run's system prompt where the row has none."""
    if not messages:
        raise RowError("no messages", "the conversation is empty")
    own = clean(row.get("system")) or None
    has_one = any(message["role"] in SYSTEM_ROLES for message in messages)
    if own is not None and has_one and own != messages[0].get("content"):
        raise RowError("two system prompts", "the column `system` says one thing, the system message another")
    text = own if own is not None else columns.system_prompt
    if has_one or not text:
        return messages, weights
    return [{"role": "system", "content": checked_text(text, "the column `system`")}, *messages], [None, *weights]


def _tools(row: dict[str, Any], columns: Columns) -> list[dict[str, Any]] | None:
    tools = _value(row, columns.tools, "data.tools_key", "tools") if columns.tools else row.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "bad tools", f"the tools are {tools[:60]!r}") if tools.strip() else None
    tools = clean(tools)
    if not tools:
        return None
    if not isinstance(tools, list):
        raise RowError("bad tools", f"the tools are {kind_of(tools)}, expected a list of objects")
    tools = [
        parsed(tool, "bad tools", f"tool {number} is {tool[:60]!r}") if isinstance(tool, str) else tool
        for number, tool in enumerate(tools)
    ]
    for number, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise RowError("bad tools", f"tool {number} is {kind_of(tool)}, expected an object")
    return tools


def _template_kwargs(row: dict[str, Any]) -> dict[str, Any]:
    """What the row says to the template. A null says nothing, so that the run or the template decides."""
    kwargs = row.get("chat_template_kwargs")
    if isinstance(kwargs, str):
        kwargs = parsed(kwargs, "bad template kwargs", f"chat_template_kwargs is {kwargs[:60]!r}") if kwargs else None
    kwargs = clean(kwargs) or {}
    if not isinstance(kwargs, dict):
        raise RowError("bad template kwargs", f"chat_template_kwargs is {kind_of(kwargs)}, expected an object")
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if reserved := [key for key in RESERVED_KWARGS if key in kwargs]:
        raise RowError("bad template kwargs", f"chat_template_kwargs sets {reserved[0]}, which rendering itself gives")
    thinking = clean(row.get("enable_thinking"))
    if thinking is not None:
        if not isinstance(thinking, bool):
            raise RowError("bad template kwargs", f"enable_thinking is {thinking!r}, expected true, false or null")
        if kwargs.setdefault("enable_thinking", thinking) != thinking:
            raise RowError("bad template kwargs", "enable_thinking and chat_template_kwargs contradict each other")
    return kwargs


def _ground_truth(row: dict[str, Any]) -> str | None:
    reward_model = row.get("reward_model")
    truth = clean(reward_model.get("ground_truth")) if isinstance(reward_model, dict) else None
    return None if truth is None else str(truth)


def _extra_info(row: dict[str, Any]) -> dict[str, Any]:
    """What a reward is told besides the ground truth; a column of that name that is no mapping says nothing to it."""
    extra_info = row.get("extra_info")
    return clean(extra_info) if isinstance(extra_info, dict) else {}


def _image_column(row: dict[str, Any], columns: Columns) -> Any:
    """What stands in the row's column of images; None where it holds none."""
    if columns.images:
        value = _value(row, columns.images, "data.image_key", "images")
        return value if _is_filled(value) else None
    filled = [key for key in IMAGE_COLUMNS if _is_filled(row.get(key))]
    if len(filled) > 1:
        raise RowError("ambiguous form", "there are `images` and `image`; choose one with data.image_key")
    return row[filled[0]] if filled else None


def _refuse_other_media(row: dict[str, Any]) -> None:
    for key in OTHER_MEDIA_COLUMNS & row.keys():
        if _is_filled(row[key]):
            raise RowError(NO_SUCH_MEDIA, f"the column `{key}` is filled; only text and images can be trained on")


def _refuse_media_beside_content(messages: Messages) -> None:
    """Raise RowError for a message with a field of its own for them, which no template reads."""
    for number, message in enumerate(messages):
        for key in ({*IMAGE_COLUMNS} | OTHER_MEDIA_COLUMNS) & message.keys():
            if _is_filled(message[key]):
                kind = BAD_IMAGE if key in IMAGE_COLUMNS else NO_SUCH_MEDIA
                found = f"message {number} has a field `{key}` beside its content, where no model would see it"
                raise RowError(kind, f"{found}; give images in the row's column `images`, or as parts of the content")


def _is_filled(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _value(row: dict[str, Any], named: str | None, option: str, usual: str) -> Any:
    """What stands in the column that `option` names, or else in the usual one."""
    key, value = named or usual, row
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            there = (", ".join(value) if isinstance(value, dict) else kind_of(value)) or "(none)"
            missing = f"there is no column '{part}'; found: {there}"
            said = f"{option}={key}: {missing}" if named else f"{missing}. Name yours with {option}"
            raise RowError(f"no column {key}", said)
        value = value[part]
    return value
