"""The judge of masks is right about masks made by hand: right ones, and wrong ones of every kind."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest

from oracle import complaints
from posttrain.data.encoded import Encoded, Turn
from posttrain.data.formats import RowError
from posttrain.records import Conversation
from shapes import SHAPES
from templated import tokenizer_for

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls %}<tool_call>\n{{ call.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)


def by_hand(tokenizer, conversation, ranges=None, text=None, at=None):
    """An Encoded that trains the characters of `ranges`, one for each assistant's message, or for those of `at`."""
    if text is None:
        text = tokenizer.apply_chat_template(conversation.messages, tools=conversation.tools, tokenize=False)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets_TC = np.asarray(tokens["offset_mapping"], dtype=np.int32)
    ranges = [match.span(1) for match in TURN.finditer(text)] if ranges is None else ranges(text)
    turns, weights_T = [], np.zeros(len(offsets_TC), dtype=np.float32)
    answering = [i for i, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    for message, (begin, end) in zip(at or answering, ranges, strict=False):
        inside = np.flatnonzero((offsets_TC[:, 0] >= begin) & (offsets_TC[:, 1] <= end))
        weights_T[inside] = 1
        turns.append(Turn(message, int(inside[0]), int(inside[-1]) + 1, 1.0, "by hand"))
    nobody = np.full(len(offsets_TC), -1)
    ids_T = np.asarray(tokens["input_ids"], dtype=np.int32)
    return Encoded(text, ids_T, weights_T, offsets_TC, nobody, nobody.astype(np.uint8), tuple(turns))


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_for(CHATML)


# chatml as above cannot write parts, merges newlines into its header, and prints None; typed markup confuses the regex
UNFIT = re.compile(
    "parts|newlines|white space|null|control|chatml|like an assistant|like markup|ends with the user|as text"
)


@pytest.mark.parametrize("name", [name for name in SHAPES if not UNFIT.search(name)])
def test_right_masks_find_no_complaint(name, tokenizer):
    assert complaints(tokenizer, SHAPES[name], [by_hand(tokenizer, SHAPES[name])]) == []


def moved(begin=0, end=0):
    """The right ranges, but for the last one's ends."""

    def ranges(text):
        *others, (b, e) = [match.span(1) for match in TURN.finditer(text)]
        return [*others, (b + begin, e + end)]

    return ranges


def at(pattern):
    return lambda text: [match.span(1) for match in re.finditer(pattern, text, re.DOTALL)]


END = len("<|im_end|>")
# what is wrong: the shape, the ranges that are trained, part of the complaint
WRONG = {
    "the header": ("two turns", moved(begin=-len("<|im_start|>assistant\n")), "begins too early"),
    "the header's last newline": ("one turn", moved(begin=-1), "begins too early, by '\\n'"),
    "the first letter is missing": ("two turns", moved(begin=1), "trains a part of its text"),
    "the end token is missing": ("two turns", moved(end=-END), "ends without a control token"),
    "the newline after the end": ("one turn", moved(end=1), "ends without a control token"),
    "the end token of the user": ("one turn", moved(begin=-len("<|im_end|>\n<|im_start|>assistant\n")), "begins too early"),
    "all": ("two turns", at(r"^(.*)\n$"), "trains text"),
    "the user": ("two turns", at(r"user\n(.*?<\|im_end\|>)"), "trains text 'What is 3+4?' of message 0"),
    "the next header": ("two turns", at(r"assistant\n(.*?<\|im_end\|>(?:\n<\|im_start\|>)?)"), "ends too late"),
    "a turn is missing": ("two turns", lambda text: moved()(text)[:1], "message 3 (assistant) is trained 0 times, not 1"),
    "turns are swapped": ("two turns", lambda text: moved()(text)[::-1], "trains text"),
    "the call is missing": ("tool call with text", at(r"assistant\n(.*?)(?=<tool_call>|\n<\|im_start|\n$)"), "stands elsewhere"),
    "the end of the call is missing": ("tool call at last", moved(end=-END), "ends too early"),
    "the tool's result": ("tool call and answer", at(r"assistant\n(.*?)\n(?:<\|im_start\|>assistant|$)"), "trains text"),
    "the reasoning is missing": ("reasoning field", moved(begin=len("<think>\n")), "begins too late, by '<think>\\n'"),
    "an empty answer's header": ("empty answer", moved(begin=-len("assistant\n")), "begins too early"),
    "a half emoji": ("emoji at the borders", lambda text: [(b, e - END) for b, e in moved()(text)], "control token"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_named(name, tokenizer):
    shape, ranges, complaint = WRONG[name]
    found = complaints(tokenizer, SHAPES[shape], [by_hand(tokenizer, SHAPES[shape], ranges)])
    assert any(complaint in text for text in found), found


def test_other_ids_and_other_texts_are_named(tokenizer):
    conversation = SHAPES["one turn"]
    right = by_hand(tokenizer, conversation)
    assert "not what apply_chat_template writes" in complaints(tokenizer, conversation, [
        by_hand(tokenizer, conversation, text=right.text.replace("7", "8"))])[0]  # fmt: skip
    right.ids_T[3] += 1
    assert complaints(tokenizer, conversation, [right]) == ["ids: not those of apply_chat_template"]
    assert complaints(tokenizer, conversation, RowError("no", "no")) == []
    assert "KeyError" in complaints(tokenizer, conversation, KeyError("x"))[0]


# a template, the ranges that one might train, part of the complaint: each is a way in which templates mislead maskers
TRAPS = {
    "drops calls": (CHATML.replace("{% for call in m.tool_calls %}", "{% for call in [] %}"), "tool call at last", None, "lost"),
    "two end tokens": (CHATML.replace("<|im_end|>\n", "<|eot|><|im_end|>\n"), "two turns",
                       at(r"assistant\n(.*?<\|eot\|>)"), "ends too early, by '<|im_end|>'"),
    "the end is the next header": (CHATML.replace("<|im_end|>\n", ""), "two turns",
                                   at(r"assistant\n(.*?<\|im_start\|>|.*$)"), "ends without a control token"),
    "no generation prompt": (CHATML.replace("{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}", ""),
                             "one turn", at(r"\n(<\|im_start\|>assistant\n.*<\|im_end\|>)"), "trains a header"),
    "the prompt opens thinking": (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "several reasoning fields",
                                  None, "begins too early, by '<think>\\n'"),
    "writes None": (CHATML.replace("{{ m.content }}", "{{ m.content or 'None' }}"), "tool call with null", None, "garbage"),
    "quotes the user in the answer": (CHATML.replace("{{ m.content }}", "{{ m.content }}{% if m.role == 'assistant' %} ({{ messages[0].content }}){% endif %}"),
                                      "one turn", None, "trains text 'What is 3+4?' of message 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_traps_of_templates_are_named(name):
    template, shape, ranges, complaint = TRAPS[name]
    tokenizer = tokenizer_for(template)
    found = complaints(tokenizer, SHAPES[shape], [by_hand(tokenizer, SHAPES[shape], ranges)])
    assert any(complaint in text for text in found), found


FORGETS = CHATML.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")


def test_several_samples_of_a_row_train_each_turn_once():
    tokenizer, whole = tokenizer_for(FORGETS), SHAPES["several reasoning fields"]
    beginnings = [Conversation(whole.messages[:end]) for end in (2, 4, 6)]
    last_only = [by_hand(tokenizer, c, lambda text: moved()(text)[-1:], at=[len(c.messages) - 1]) for c in beginnings]
    assert complaints(tokenizer, whole, last_only) == []
    assert "message 1 (assistant) is trained 0 times" in complaints(tokenizer, whole, last_only[1:])[0]
    assert "message 1 (assistant) is trained 2 times" in complaints(tokenizer, whole, last_only[:1] + last_only)[0]
    cut = by_hand(tokenizer, Conversation(whole.messages[:1]), text=last_only[2].text[:30])
    assert "not what apply_chat_template writes" in complaints(tokenizer, whole, [cut])[0]


def test_arguments_in_json_may_be_read_first(tokenizer):
    conversation = SHAPES["arguments as text"]
    messages = copy.deepcopy(conversation.messages)
    function = messages[1]["tool_calls"][0]["function"]
    function["arguments"] = json.loads(function["arguments"])
    read = by_hand(tokenizer, Conversation(messages, conversation.tools))
    assert complaints(tokenizer, conversation, [read]) == []
