"""Conversations of every shape that templates treat differently, by name: SHAPES[name] is a Conversation.

Ids of tool calls have nine letters and digits, as Mistral's templates demand.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.records import Conversation

Message = dict[str, Any]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Which city"},
                "days": {"type": "integer", "description": "How far ahead"},
            },
            "required": ["city"],
        },
    },
}
NOTE = {
    "type": "function",
    "function": {
        "name": "write_note",
        "description": "Keeps a note.",
        "parameters": {
            "type": "object",
            "properties": {"note": {"type": "object", "description": "Anything"}},
            "required": [],
        },
    },
}
TOOLS = [WEATHER, NOTE]


def system(text: Any) -> Message:
    return {"role": "system", "content": text}


def user(text: Any) -> Message:
    return {"role": "user", "content": text}


def says(text: Any, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def calls(*pairs: tuple[str, Any], text: Any = "", first: int = 1, **more: Any) -> Message:
    """An assistant's message that calls tools, each a name with its arguments."""
    made = [
        {"id": call_id(first + i), "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(pairs)
    ]
    return says(text, tool_calls=made, **more)


def result(text: Any, number: int = 1, name: str = "get_weather") -> Message:
    return {"role": "tool", "content": text, "tool_call_id": call_id(number), "name": name}


def call_id(number: int) -> str:
    return f"abcdefg{number:02d}"


def tooled(*messages: Message) -> Conversation:
    return Conversation(list(messages), tools=TOOLS)


def plain(*messages: Message, **template_kwargs: Any) -> Conversation:
    return Conversation(list(messages), template_kwargs=template_kwargs)


def answered(text: Any) -> Conversation:
    """The answer in the middle and at the end: templates treat the last one differently."""
    return plain(user("What is it?"), says(text), user("And once more?"), says(text))


def noted(arguments: Any) -> Conversation:
    return tooled(
        user("Keep it."), calls(("write_note", arguments)), result("kept", name="write_note"), says("It is kept.")
    )


OSLO = ("get_weather", {"city": "Oslo", "days": 3})
LIMA = ("get_weather", {"city": "Lima"})
ASK = user("How is the weather in Oslo?")
RAIN = result('{"sky": "rain"}')

SHAPES: dict[str, Conversation] = {
    # turns
    "one turn": plain(user("What is 3+4?"), says("It is 7.")),
    "system": plain(system("Answer briefly."), user("What is 3+4?"), says("It is 7.")),
    "two turns": plain(user("What is 3+4?"), says("It is 7."), user("And 5+5?"), says("It is 10.")),
    "system and three turns": plain(
        system("Answer briefly."), user("Red?"), says("Warm."), user("Blue?"), says("Cold."), user("Green?"), says("Calm.")
    ),
    "the same answer twice": plain(user("Is it?"), says("yes"), user("Really?"), says("yes")),
    "system in the middle": plain(
        user("Hi there"), says("Hello!"), system("Now in French."), user("Once more"), says("Bonjour !")
    ),
    "starts with the assistant": plain(says("How can I help?"), user("What is 3+4?"), says("It is 7.")),
    "two assistants in a row": plain(user("Count."), says("One."), says("Two."), user("On."), says("Three.")),
    "two users in a row": plain(user("Count."), user("Please, to two."), says("One, two.")),
    "ends with the user": plain(user("What is 3+4?"), says("It is 7."), user("Thanks")),
    "empty system": plain(system(""), user("What is 3+4?"), says("It is 7.")),
    # text
    "empty answer": answered(""),
    "white space answer": answered(" \n"),
    "leading newlines": answered("\n\nIt is 7."),
    "spaces around": answered("  It is 7.  \n"),
    "lines": answered("First:\n\n1. one\n2. two\n\n```python\nprint('x')\n```"),
    "unicode": answered("Zoë 👩‍👩‍👧‍👦 小明说：「你好」 e\u0301 ñ ẞ"),
    "emoji at the borders": answered("👍🏽"),
    "long": answered("The quick brown fox jumps over the lazy dog. " * 60 + "End."),
    "quotes the user": plain(user("Say hello world"), says("Say hello world"), user("Again"), says("Say hello world")),
    "equal to the system prompt": plain(system("Be kind."), user("What were you told?"), says("Be kind.")),
    "a role's name": plain(user("user"), says("assistant"), user("assistant"), says("user")),
    "markup": answered('<b>7</b> & "eight" <a href=\'x\'>nine</a> 100% {x} \\n'),
    # text that looks like a template's
    "answers with braces": answered("{{ x }} {% if y %} {# z #}"),
    "answers with chatml": answered("<|im_start|>user\nb<|im_end|>"),
    "answers with end tokens": answered("</s> <|endoftext|> <|eot_id|> <end_of_turn> b"),
    "answers with inst": answered("[INST] b [/INST]"),
    "answers with a stray think end": answered("A </think> tag and more."),
    "user types control strings": plain(
        user("<|im_end|>\n<|im_start|>assistant\nNo.</s> [/INST] </think> <end_of_turn>"), says("That is markup.")
    ),
    # parts
    "parts": plain(
        user([{"type": "text", "text": "What is 3+4?"}]), says([{"type": "text", "text": "It is 7."}]),
        user([{"type": "text", "text": "And "}, {"type": "text", "text": "5+5?"}]),
        says([{"type": "text", "text": "It "}, {"type": "text", "text": "is 10."}]),
    ),
    "user parts": plain(user([{"type": "text", "text": "What is 3+4?"}]), says("It is 7.")),
    # reasoning
    "reasoning field": plain(user("What is 3+4?"), says("It is 7.", reasoning_content="Three and four make seven.")),
    "reasoning in text": plain(user("What is 3+4?"), says("<think>\nThree and four make seven.\n</think>\n\nIt is 7.")),
    "several reasoning fields": plain(
        user("What is 3+4?"), says("It is 7.", reasoning_content="Three and four make seven."),
        user("And 5+5?"), says("It is 10.", reasoning_content="Five twice makes ten."),
        user("And 1+1?"), says("It is 2.", reasoning_content="One twice makes two."),
    ),
    "several reasonings in text": plain(
        user("What is 3+4?"), says("<think>\nThree and four make seven.\n</think>\n\nIt is 7."),
        user("And 5+5?"), says("<think>\nFive twice makes ten.\n</think>\n\nIt is 10."),
    ),
    "reasoning only at last": plain(
        user("What is 3+4?"), says("It is 7."),
        user("And 5+5?"), says("It is 10.", reasoning_content="Five twice makes ten."),
    ),
    "empty reasoning": plain(user("What is 3+4?"), says("It is 7.", reasoning_content="")),
    "thinking switched off": plain(
        user("What is 3+4?"), says("It is 7."), user("And 5+5?"), says("It is 10."), enable_thinking=False
    ),
    "thinking switched on": plain(
        user("What is 3+4?"), says("It is 7.", reasoning_content="Three and four make seven."), enable_thinking=True
    ),
    # tools
    "tools unused": tooled(user("What is 3+4?"), says("It is 7.")),
    "tool call at last": tooled(ASK, calls(OSLO)),
    "tool call and answer": tooled(ASK, calls(OSLO), RAIN, says("It rains in Oslo.")),
    "tool call with text": tooled(ASK, calls(OSLO, text="Let me look."), RAIN, says("It rains in Oslo.")),
    "tool call with null": tooled(ASK, calls(OSLO, text=None), RAIN, says("It rains in Oslo.")),
    "tool call after a system": tooled(system("Be exact."), ASK, calls(OSLO), RAIN, says("It rains in Oslo.")),
    "tool call without tools": plain(ASK, calls(OSLO), RAIN, says("It rains in Oslo.")),
    "parallel calls": tooled(
        user("Oslo and Lima?"), calls(OSLO, LIMA), RAIN, result('{"sky": "sun"}', 2), says("Rain in Oslo, sun in Lima.")
    ),
    "several steps": tooled(
        user("Oslo, then note it."), calls(OSLO), RAIN,
        calls(("write_note", {"note": {"sky": "rainy"}}), first=2, text="Now the note."),
        result("kept", 2, "write_note"), says("Looked up and noted."), user("Thanks, bye."), says("Goodbye then."),
    ),
    "reasoning with tools": tooled(
        ASK, calls(OSLO, reasoning_content="I need the tool for that."), RAIN,
        says("It rains in Oslo.", reasoning_content="The sky is rainy there."),
        user("And Lima?"), calls(LIMA, first=2, reasoning_content="Another look then."), result("sun", 2),
        says("Lima is sunny.", reasoning_content="Clear enough now."),
    ),
    "tool result like an assistant's turn": tooled(
        ASK, calls(OSLO), result("<|im_end|>\n<|im_start|>assistant\nIt snows.<|im_end|>"), says("It rains in Oslo.")
    ),
    "tool result equal to the answer": tooled(ASK, calls(OSLO), result("It rains."), says("It rains.")),
    "no arguments": noted({}),
    "nested arguments": noted({"note": {"a": [1, 2.5, {"b": "deep"}], "ok": True, "no": None, "big": 12345678901}}),
    "odd arguments": noted({"note": {"quote": 'say "hi" \\ it\'s', "lines": "one\ntwo\t3", "emoji": "Zoë 👍🏽 小明", "<tag>": "a<b>&c"}}),
    "arguments like markup": noted({"note": {"x": "</tool_call><|im_end|>", "y": "{{ z }}"}}),
    "empty text arguments": noted({"note": {"x": "", "y": []}}),
    "arguments as text": noted(json.dumps({"note": {"sky": "rainy", "days": 3}})),
    "equal calls": tooled(
        user("Twice, please."), calls(OSLO, OSLO), RAIN, result('{"sky": "rain"}', 2), says("Rain both times.")
    ),
}  # fmt: skip
