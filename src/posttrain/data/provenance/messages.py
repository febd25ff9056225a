"""A conversation as a template gets it: every text marked with the message and the part that it comes from."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from posttrain.data.encoded import Part
from posttrain.data.provenance.forms import in_parts
from posttrain.data.provenance.marked import TEMPLATE, TOOLS, MarkedDict, code_of, marked
from posttrain.data.provenance.trace import Question, Source, Trace, answer

REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
REASONING_TAGS = (
    ("<think>", "</think>"), ("<thinking>", "</thinking>"), ("<reasoning>", "</reasoning>"), ("<thought>", "</thought>"),
    ("<seed:think>", "</seed:think>"), ("<mm:think>", "</mm:think>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>thought", "<channel|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)  # fmt: skip

Kind = tuple[Any, ...]  # what of a message a template's course can depend on, as far as is known


class Questions:
    """Which questions a template asks of messages of a shape, learnt from every rendering."""

    def __init__(self) -> None:
        self._of_shape: dict[Any, dict[Question, None]] = {}

    @property
    def num_shapes(self) -> int:
        return len(self._of_shape)

    def learn(self, conversation: MarkedConversation) -> None:
        """Take in what the last rendering of the conversation asked."""
        for number, question in conversation.trace.asked:
            self._of_shape.setdefault(conversation.shapes[number], {})[question] = None

    def kind(self, conversation: MarkedConversation, number: int) -> Kind:
        """The message's shape and its answers. Messages of one kind lead a template along the same way."""
        shape = conversation.shapes[number]
        questions = self._of_shape.setdefault(shape, {})
        asked, kind = conversation.kinds.get(number, (None, ()))
        if asked is not questions or len(kind) != len(questions) + 1:
            message = conversation.plain[number]
            kind = (shape, *(answer(message, question) for question in questions))
            conversation.kinds[number] = (questions, kind)
        return kind


class MarkedConversation:
    """Messages for a template, marked; `plain` are the same without marks, as transformers hands them to templates."""

    def __init__(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        variables: dict[str, Any],
        row_variables: dict[str, Any] | None = None,
        drops_nulls: bool = True,
        parts_only: bool = False,
    ):
        """`drops_nulls`: whether this version of transformers keeps null fields from templates. `parts_only`: whether
        `with_messages` gives texts as lists of one part."""
        self.trace = Trace()
        # what was rendered of it, by the number of messages and whether with a prompt
        self.rendered: dict[tuple[int, bool], Any] = {}
        self.drops_nulls, self.parts_only = drops_nulls, parts_only
        self.plain = [_with_reasoning_names(message, drops_nulls) for message in messages]
        self.kinds: dict[int, tuple[Any, Kind]] = {}  # with the questions that they answer
        self.shapes = [_shape(message) for message in self.plain]
        self.messages = [_mark_message(self.trace, number, message) for number, message in enumerate(self.plain)]
        self.tools, self.row_variables = tools, row_variables or {}
        text = None if tools is None else json.dumps(tools, ensure_ascii=False)
        self._tools = None if text is None else _marked_tools(text)
        self.variables = {**variables, **self.row_variables}
        self.surroundings = (hash(text), json.dumps(list(self.variables.items()), ensure_ascii=False, default=str))

    def with_messages(self, messages: list[dict[str, Any]]) -> MarkedConversation:
        """Other messages in the same surroundings."""
        messages = in_parts(messages) if self.parts_only else messages
        return MarkedConversation(
            messages, self.tools, self.variables, self.row_variables, self.drops_nulls, self.parts_only
        )

    def arguments(self, count: int, generation_prompt: bool) -> dict[str, Any]:
        """What the template is called with, for the first `count` messages."""
        self.trace.begin()
        marks = {
            key: _mark(value, TOOLS if key in self.row_variables else TEMPLATE, None)
            for key, value in self.variables.items()
        }
        return {
            "documents": None,
            **marks,
            "messages": self.messages[:count],
            "tools": self._tools,
            "add_generation_prompt": generation_prompt,
        }


def reasoning_end(text: str) -> int:
    """Where the reasoning that an answer begins with ends in its text; 0 without any."""
    for begin, end in REASONING_TAGS:
        if end not in text:
            continue
        if text.lstrip().startswith(begin) or (begin not in text and text.count(end) == 1):
            return text.index(end) + len(end)
    return 0


def texts_of(content: Any) -> list[str]:
    """The texts of a message's content: one, or those of its parts."""
    if isinstance(content, str):
        return [content]
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return []


def _with_reasoning_names(message: dict[str, Any], drops_nulls: bool) -> dict[str, Any]:
    """The message as transformers hands it to a template: reasoning under each of its names, newer versions without nulls."""
    message = {key: value for key, value in message.items() if value is not None or not drops_nulls}
    if message.keys().isdisjoint(REASONING_FIELDS):
        return message
    from transformers.utils import chat_template_utils

    alias = getattr(chat_template_utils, "_alias_reasoning_fields", None)  # older versions have one name only
    return alias([message])[0] if alias else message


def _mark_message(trace: Trace, number: int, message: dict[str, Any]) -> dict[str, Any]:
    result = {}
    for key, value in message.items():
        source = Source(trace, number, (key,))
        if key == "role":
            result[key] = marked(value, code_of(number, Part.NAME) * len(value), None)
        elif key == "content":
            result[key] = _mark_content(value, number, source)
        elif key in REASONING_FIELDS:
            result[key] = _mark(value, code_of(number, Part.REASONING), source)
        elif key in ("tool_calls", "function_call"):
            result[key] = _mark(value, code_of(number, Part.TOOL_CALL), source)
        else:
            result[key] = _mark(value, code_of(number, Part.NAME), source)
    return result


def _mark_content(content: Any, number: int, source: Source) -> Any:
    code = code_of(number, Part.TEXT)
    if isinstance(content, str):
        end = reasoning_end(content)
        return marked(content, code_of(number, Part.REASONING) * end + code * (len(content) - end), source)
    if not isinstance(content, list):
        return _mark(content, code, source)
    name = code_of(number, Part.NAME)
    return [
        {
            key: marked(value, name * len(value), None) if key == "type" else _mark(value, code, _below(source, i, key))
            for key, value in part.items()
        }
        if isinstance(part, dict)
        else _mark(part, code, _below(source, i))
        for i, part in enumerate(content)
    ]


def _mark(value: Any, code: str, source: Source | None) -> Any:
    if isinstance(value, str):
        return marked(value, code * len(value), source)
    if isinstance(value, dict):
        made = MarkedDict(
            (
                marked(key, code * len(key), None) if isinstance(key, str) else key,
                _mark(item, code, _below(source, key)),
            )
            for key, item in value.items()
        )
        made._code, made._raw, made._source = code, value, source
        return made
    if isinstance(value, list | tuple):
        return [_mark(item, code, _below(source, i)) for i, item in enumerate(value)]
    return value


def _below(source: Source | None, *path: Any) -> Source | None:
    return None if source is None else Source(source.trace, source.message, (*source.path, *path))


@lru_cache(maxsize=64)
def _marked_tools(key: str) -> list[Any]:
    return _mark(json.loads(key), TOOLS, None)


def _shape(message: dict[str, Any]) -> tuple[Any, ...]:
    """The role and what fields there are, with their types and numbers; of lists the length, of what is in them the keys."""
    return tuple((key, value if key == "role" else _outline(value)) for key, value in message.items())


def _outline(value: Any, depth: int = 3) -> Any:
    if isinstance(value, list) and depth:
        return tuple(_outline(item, depth - 1) for item in value)
    if isinstance(value, dict) and depth < 3:
        return tuple((key, item if key == "type" else _outline(item, 0)) for key, item in value.items())
    return (type(value).__name__, value) if isinstance(value, int | float) else type(value).__name__
