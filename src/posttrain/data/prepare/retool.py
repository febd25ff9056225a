"""ReTool's demonstrations (Feng et al. 2025): reasoning that runs Python -> turns, calls of a tool and its results.

messages (a question, and one long text with <code>, <interpreter> and <answer>) -> messages with tool_calls, tools
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.data.messages import RowError, read_messages
from posttrain.data.prepare.conversations import conversation_row, conversation_schema
from posttrain.data.prepare.data_set import DataSet
from posttrain.data.sources import Row
from posttrain.records import Conversation

QUESTION_MARK = "*user question:*"  # before it stand instructions for the tags, which tool calls replace
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Run Python code and return what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "The Python code to run."}},
            "required": ["code"],
        },
    },
}
_TAGGED = re.compile(r"<(code|interpreter|answer)>(.*?)</\1>", re.DOTALL)
_FENCED = re.compile(r"```(?:python|py)?\s*\n(.*?)```", re.DOTALL)


def _retool_row(row: Row, split: str, index: int) -> dict[str, Any]:
    messages, _ = read_messages(row.values.get("messages"))
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise RowError("not a ReTool row", "expected one question and one answer")
    asked, answered = (message["content"] for message in messages)
    question = re.sub("</?answer>", "", asked.rpartition(QUESTION_MARK)[2]).strip()
    conversation = Conversation([{"role": "user", "content": question}, *_turns(answered)], tools=[TOOL])
    return conversation_row(conversation, "retool_sft", split, index)


def _turns(answer: str) -> list[dict[str, Any]]:
    """The text cut at its tags: text with code calls the tool, which answers; text with <answer> is the last."""
    turns: list[dict[str, Any]] = []
    begin = 0
    for found in _TAGGED.finditer(answer):
        tag, inside = found.groups()
        text, begin = answer[begin : found.start()], found.end()
        waits = bool(turns) and "tool_calls" in turns[-1]
        if waits != (tag == "interpreter") or (waits and text.strip()):
            raise RowError("not a ReTool row", f"<{tag}> is out of place: each <code> is followed by its <interpreter>")
        if tag == "code":
            turns.append({"role": "assistant", "content": text.strip(), "tool_calls": [_call(inside)]})
        elif tag == "interpreter":
            turns.append({"role": "tool", "content": inside.strip()})
        else:
            turns.append({"role": "assistant", "content": f"{text}{inside}".strip()})
            break
    if not turns or turns[-1]["role"] != "assistant" or "tool_calls" in turns[-1] or answer[begin:].strip():
        raise RowError("not a ReTool row", f"the answer ends in {answer[-60:]!r}; expected </answer>")
    return turns


def _call(code: str) -> dict[str, Any]:
    fenced = _FENCED.search(code)
    code = (fenced[1] if fenced else code).strip()
    return {"type": "function", "function": {"name": "code_interpreter", "arguments": {"code": code}}}


RETOOL = DataSet("ReTool", {"train": ("train",)}, _retool_row, conversation_schema, hub_name="JoeYing/ReTool-SFT")
