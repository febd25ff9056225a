"""Conversations in any recognised form -> `messages`, with `tools` and all that a chat template may be given.

Arguments of tool calls, tools and template options are written as JSON text: parquet would give all objects of a column
the same fields, and fill what they do not have with nulls.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from posttrain.data.formats import Columns, conversation_of
from posttrain.data.messages import FUNCTION_CALL, RowError, checked_text
from posttrain.data.prepare.data_set import LOST, TRAIN, DataSet
from posttrain.data.sources import Row
from posttrain.records import Conversation

if TYPE_CHECKING:
    import pyarrow as pa

HELD_OUT = 0.05
TEXT_FIELDS = ("reasoning_content", "reasoning", "thinking", "tool_call_id", "name")
# written as they are, or in a form of their own
KNOWN_FIELDS = {"role", "content", "tool_calls", FUNCTION_CALL, *TEXT_FIELDS}


def conversation_row(conversation: Conversation, data_source: str, split: str, index: int) -> dict[str, Any]:
    """A row with all that the conversation has, and under LOST the fields of messages that have no column."""
    if not any(message["role"] == "assistant" for message in conversation.messages):
        raise RowError("no assistant turn", "nothing in the conversation is from 'assistant'")
    weights = conversation.weights or (None,) * len(conversation.messages)
    truth = conversation.ground_truth
    made = {
        "data_source": conversation.data_source or data_source,
        "messages": [_message(*pair) for pair in zip(conversation.messages, weights, strict=True)],
        "tools": _json(conversation.tools) if conversation.tools else None,
        "chat_template_kwargs": _json(conversation.template_kwargs) if conversation.template_kwargs else None,
        "reward_model": None if truth is None else {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": split, "index": index},
    }
    checked_text(_json(made), "a text of the row", "not Unicode")  # which parquet could not hold
    return made | {LOST: sorted({name for m in conversation.messages for name in m} - KNOWN_FIELDS)}


def conversation_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    function = pa.struct({"name": text, "arguments": text})
    call = pa.struct({"id": text, "type": text, "function": function})
    message = {"role": text, "content": text, "tool_calls": pa.list_(call), "weight": pa.float64()}
    return pa.schema(
        {
            "data_source": text,
            "messages": pa.list_(pa.struct({**message, **dict.fromkeys(TEXT_FIELDS, text)})),
            "tools": text,
            "chat_template_kwargs": text,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64()}),
        }
    )


def _message(message: dict[str, Any], weight: float | None) -> dict[str, Any]:
    made = {field: message[field] for field in ("role", *TEXT_FIELDS) if field in message}
    made |= {"content": _text(message.get("content")), "weight": weight}
    calls = list(message.get("tool_calls", []))
    if FUNCTION_CALL in message:
        calls.append(message[FUNCTION_CALL])
    return made | {"tool_calls": [_call(call) for call in calls]} if calls else made


def _text(content: Any) -> str | None:
    if not isinstance(content, list):
        return content
    if other := next((part["type"] for part in content if part["type"] != "text"), None):
        found = f"a message has a part of type {other!r}, and only text is written; train on such rows as they are"
        raise RowError("part that is no text", found)
    return "".join(part["text"] for part in content)


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function["arguments"]
    written = arguments if isinstance(arguments, str) else _json(arguments)
    made = {"type": "function", "function": {"name": function["name"], "arguments": written}}
    return {"id": str(call["id"]), **made} if "id" in call else made


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _chat_row(row: Row, split: str, index: int, *, data_source: str) -> dict[str, Any]:
    return conversation_row(conversation_of(row.values, Columns()), data_source, split, index)


def _turns(*texts: str) -> dict[str, Any]:
    roles = ("user", "assistant")
    system = {"role": "system", "content": "Answer briefly."}
    return {"messages": [system, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]}


# enough to try several turns without any download
OWN_CONVERSATIONS = (
    _turns("Which planet is the largest?", "Jupiter.", "And the smallest?", "Mercury."),
    _turns("What is 12 times 12?", "144.", "And half of that?", "72.", "Is it even?", "Yes: 72 is 2 times 36."),
    _turns("Translate 'good morning' into French.", "Bonjour.", "And into German?", "Guten Morgen."),
    _turns("Name a prime number above 20.", "23.", "The next one?", "29."),
    _turns("Sort these: pear, apple, fig.", "apple, fig, pear", "Now the other way round.", "pear, fig, apple"),
    _turns("Who wrote Faust?", "Johann Wolfgang von Goethe.", "When was he born?", "In 1749."),
)

CHAT = DataSet(
    "a chat set",
    {"train": ("train_sft", "train"), "test": ("test_sft", "test", "validation", "val")},
    partial(_chat_row, data_source="chat_sft"),
    conversation_schema,
    hub_name="HuggingFaceH4/ultrachat_200k",
    held_out=HELD_OUT,
)
MULTITURN = DataSet(
    "a multi-turn set",
    {"train": ("train",), "test": ("test",)},
    partial(_chat_row, data_source="multiturn_sft"),
    conversation_schema,
    own_rows={TRAIN: OWN_CONVERSATIONS},
    held_out=HELD_OUT,
)
