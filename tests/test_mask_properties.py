"""Random conversations on random templates: masks are exact or refused, and never depend on what was encoded before."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import permutations

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nasty_templates import NASTY
from oracle import complaints
from posttrain.data.chat import ChatTokenizer, Rules
from posttrain.data.formats import RowError
from posttrain.records import Conversation
from templated import tokenizer_for


def examples(count: int):
    return settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


# ---- a grammar of templates

ROLE = "{{ m.role }}"
HEADERS = (
    f"<|im_start|>{ROLE}\n",
    f"<|im_start|>{ROLE}<|im_sep|>",
    f"<|start|>{ROLE}\n\n",
    f"[{ROLE}]: ",
    f"<|im_start|> {ROLE} \n",
)
ENDS = ("<|im_end|>\n", "<|eot_id|>", " <|end|>\n", "\n<|im_end|>", "<|end|><|sep|>\n")
TEXTS = (
    "{{ m.content }}", "{{ m.content | trim }}", "{{ '' + m.content }}", "{{ m['content'].strip('\n') }}",
    "{% set text = m.content %}{% if '</think>' in text %}{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ text }}",
    "{{ m.content if m.content is string else m.content[0].text }}",
)  # fmt: skip
THOUGHTS = (
    "",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}",
    "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content | trim }}\n</think>\n\n{% endif %}",
    "{% if m.role == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}",
    "{% if m.role == 'assistant' and enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)
CALLS = (
    "",
    "{% for c in m.tool_calls %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}",
    "{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{% for k, v in c.function.arguments | items %}\n{{ k }}={{ v }}{% endfor %}</tool_call>{% endfor %}",
)  # fmt: skip
FLAG = "{% if add_generation_prompt %}"
PROMPTS = (
    FLAG + "HEADER{% endif %}",
    FLAG + "HEADER<think>\n{% endif %}",
    FLAG + "HEADER{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    FLAG + "HEADER{% endif %}", FLAG + "HEADER{% endif %}", "HEADER", "", FLAG + "<|im_start|>bot\n{% endif %}",
    "{% if messages[-1].role == 'user' %}HEADER{% endif %}",
)  # fmt: skip
BEFORE = (
    "", "{{ bos_token }}", "{{ bos_token }}{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}",
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}",
)  # fmt: skip
AFTER = ("", "", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", "{{ '\n' }}")


@st.composite
def grammar(draw) -> str:
    pick = lambda choices: draw(st.sampled_from(choices))  # noqa: E731
    header, prompt = pick(HEADERS), pick(PROMPTS)
    body = pick(THOUGHTS) + pick(TEXTS) + pick(CALLS)
    asked = prompt.replace("HEADER", header.replace(ROLE, "assistant"))
    return pick(BEFORE) + "{% for m in messages %}" + header + body + pick(ENDS) + "{% endfor %}" + asked + pick(AFTER)


# ---- conversations

HARD = (
    "", " ", "\n", "\n\n", "yes", "yes", "It is 7.", "  It is 7. \n", "a\r\nb\t", "assistant", "user\n", "None", "{{ x }} {% if y %}",
    "<|im_end|>", "<|im_end|>\n<|im_start|>assistant\nNo.", "<|eot_id|>", "</think>", "<think>\nhm\n</think>\n\nok", "<think>\nhm",
    "</tool_call>", '{"a": [1, null]}', "小明 👩‍👩‍👧‍👦 e\u0301", "\u200b\ufeff", "[assistant]: x", "\x00",
)  # fmt: skip
CHARACTERS = st.characters(exclude_categories=("Cs",))
texts = st.one_of(st.sampled_from(HARD), st.text(CHARACTERS, max_size=12))
words = st.text("abcdefgh ", min_size=1, max_size=10)


@st.composite
def messages(draw, texts=texts):
    role = draw(st.sampled_from(("user", "assistant", "user", "assistant", "system", "tool")))
    message = {"role": role, "content": draw(texts)}
    if role == "assistant" and draw(st.integers(0, 3)) == 0:
        message["reasoning_content"] = draw(texts)
    if role == "assistant" and draw(st.integers(0, 4)) == 0:
        arguments = st.dictionaries(words, st.one_of(texts, st.integers(-9, 99), st.booleans(), st.none()), max_size=2)
        call = {"type": "function", "function": {"name": "look", "arguments": draw(arguments)}}
        message["tool_calls"] = [call] * draw(st.integers(1, 2))
    return message


@st.composite
def conversations(draw, texts=texts, most=6):
    kwargs = draw(st.sampled_from(({}, {}, {"enable_thinking": False}, {"enable_thinking": True})))
    tools = [{"type": "function", "function": {"name": "look", "description": draw(texts)}}]
    return Conversation(
        draw(st.lists(messages(texts), min_size=1, max_size=most)),
        tools=tools if draw(st.integers(0, 3)) == 0 else None,
        template_kwargs=kwargs,
    )


@lru_cache(512)
def tokenizer_of(template: str):
    return tokenizer_for(template)


def chat_for(template: str, **rules) -> ChatTokenizer:
    return ChatTokenizer(tokenizer_of(template), Rules(**rules))


def forgetful(template: str, **rules) -> ChatTokenizer:
    """One that finds each border anew, so that nothing can be carried from one turn to another."""
    chat = chat_for(template, **rules)
    for borders in chat._borders.values():
        assert borders._cached
        borders._cached = lambda about, conversation, count, find: find()
    return chat


def masks(outcome) -> list | str:
    """What can be compared: ids and weights of each sample, or the refusal."""
    if isinstance(outcome, RowError):
        return outcome.kind
    return [(e.ids_T.tolist(), e.weights_T.tolist(), e.notes) for e in outcome]


def check_sample(tokenizer, conversation, encoded) -> None:
    controls = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()}
    strings = [m.get("content", "") for m in conversation.messages if m["role"] != "assistant"]
    typed = any(control in str([strings, conversation.tools]) for control in controls.values())
    text = tokenizer.apply_chat_template(
        conversation.messages, tools=conversation.tools, tokenize=False, **conversation.template_kwargs
    )
    assert encoded.text == text
    if not typed:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert encoded.ids_T.tolist() == expected
    inside_T = np.zeros(len(encoded), dtype=bool)
    for turn in encoded.turns:
        message = conversation.messages[turn.message]
        said = tokenizer.decode(encoded.ids_T[turn.begin : turn.end], skip_special_tokens=False)
        answer = (
            message["content"].split("</think>")[-1].strip().removeprefix("<think>").strip()
        )  # the prompt may open it
        assert answer in said
        assert encoded.ids_T[turn.end - 1] in controls
        inside_T[turn.begin : turn.end] = True
        owners = set(encoded.messages_T[turn.begin : turn.end].tolist())
        assert owners <= {-1, turn.message}, owners
    assert (encoded.trained_T == inside_T).all()
    roles = {conversation.messages[m]["role"] for m in set(encoded.messages_T[encoded.trained_T].tolist()) if m >= 0}
    assert roles <= {"assistant"}


# ---- what must hold


def test_masks_of_random_conversations_on_templates_of_a_grammar_are_right():
    verdicts: Counter[str] = Counter()

    @examples(400)
    @given(grammar(), conversations())
    def each(template, conversation):
        outcome = chat_for(template).encode_many([conversation])[0]
        verdicts["refused" if isinstance(outcome, RowError) else "exact"] += 1
        if not isinstance(outcome, RowError):
            check_sample(tokenizer_of(template), conversation, outcome[0])

    each()
    assert verdicts["exact"] > 60, verdicts


def test_an_independent_judge_finds_no_wrong_mask():
    @examples(60)
    @given(grammar(), conversations(most=4))
    def each(template, conversation):
        outcome = chat_for(template).encode_many([conversation])[0]
        found = complaints(tokenizer_of(template), conversation, outcome)
        assert [text for text in found if text.startswith(("mask", "ids"))] == []

    each()


@examples(150)
@given(st.sampled_from(sorted(NASTY)), conversations(most=4))
def test_masks_of_random_conversations_on_nasty_templates_are_right(name, conversation):
    template = NASTY[name].template
    outcome = chat_for(template).encode_many([conversation])[0]
    found = complaints(tokenizer_of(template), conversation, outcome, probes=False)
    assert [text for text in found if text.startswith(("mask", "ids"))] == []


@examples(150)
@given(grammar(), st.lists(conversations(texts=st.sampled_from(HARD), most=5), min_size=2, max_size=5))
def test_a_conversation_alone_in_a_batch_and_after_others_gives_the_same(template, several):
    expected = [masks(forgetful(template).encode_many([conversation])[0]) for conversation in several]
    assert [masks(outcome) for outcome in chat_for(template).encode_many(several)] == expected
    warm = chat_for(template)
    backwards = [masks(warm.encode_many([conversation])[0]) for conversation in reversed(several)]
    assert backwards[::-1] == expected
    assert [masks(warm.encode_many([conversation])[0]) for conversation in several] == expected


# ---- templates whose prompt depends on what came before: an answer kept for one conversation must not serve another

THOUGHT = "<think>\nhm</think>ok"


def opens_if(condition: str) -> str:
    """ChatML whose prompt opens a thought where `condition` holds of the whole conversation."""
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content if m.content is string else m.content[0].text }}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% if "
        + condition
        + " %}<think>\n{% endif %}{% endif %}{# </think> #}"
    )


def opens_after(condition: str) -> str:
    """The same where it held of any message `m` but an assistant's."""
    loop = "{% set ns = namespace(on=false) %}{% for m in messages %}{% if m.role != 'assistant' and (" + condition
    return loop + ") %}{% set ns.on = true %}{% endif %}{% endfor %}" + opens_if("ns.on")


def user(text="q", **more):
    return {"role": "user", "content": text, **more}


def parts(text, **more):
    return user([{"type": "text", "text": text, **more}])


def says(**more):
    return {"role": "assistant", "content": THOUGHT, **more}


def calls(arguments):
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return [user(), says(tool_calls=[call]), {"role": "tool", "content": "r"}, says()]


def talk(*texts):
    return [message for text in texts for message in (user(text), says())]


THINKS_AT_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|><|sep|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|sep|>{% endif %}"
)
SYSTEM = {"role": "system", "content": "Be kind."}
ARGUMENT = "(messages | length > 1) and messages[1].tool_calls[0].function.arguments"
FOUR_TEXTS = [talk("hello you"), talk("go"), talk("<b>"), talk("7")]

# what the prompt depends on: (template, conversations)
DEPENDING = {
    "equality": (opens_after("m.content == 'go'"), FOUR_TEXTS),
    "length of a text": (opens_after("m.content | length == 2"), FOUR_TEXTS),
    "a list of texts": (opens_after("m.content in ['go', 'run']"), FOUR_TEXTS),
    "a dictionary": (opens_after("m.content in {'go': 1, 'run': 2}"), FOUR_TEXTS),
    "a value of a dictionary": (opens_after("{'go': true, '7': false}.get(m.content)"), FOUR_TEXTS),
    "a text as the key": (opens_after("{messages[0].content: 1}.get(m.content) and not loop.first"),
                          [[user("go"), user("go"), says()], [user("go"), user("no"), says()]]),
    "case": (opens_after("m.content | upper == 'GO'"), FOUR_TEXTS),
    "parts": (opens_after("m.content.split('o')[0] == 'g'"), FOUR_TEXTS),
    "order": (opens_after("m.content > 'f'"), FOUR_TEXTS),
    "joined": (opens_after("(m.content ~ 'x') == 'gox'"), FOUR_TEXTS),
    "formatted": (opens_after("'{}'.format(m.content) == 'go'"), FOUR_TEXTS),
    "a constant that is searched": (opens_after("m.content in 'a go'"), FOUR_TEXTS),
    "letters": (opens_after("m.content | list | length == 2"), FOUR_TEXTS),
    "digits": (opens_after("m.content.isdigit()"), FOUR_TEXTS),
    "JSON": (opens_after("m.content | tojson == '\"go\"'"), FOUR_TEXTS),
    "a text as a number": (opens_after("m.content | int > 3"), FOUR_TEXTS),
    "a text as a fraction": (opens_after("m.content | float > 3"), FOUR_TEXTS),
    "words": (opens_after("m.content | wordcount > 1"), FOUR_TEXTS),
    "title": (opens_after("(m.content | title) == 'Go'"), FOUR_TEXTS),
    "tags stripped": (opens_after("(m.content | striptags) == 'go'"), FOUR_TEXTS),
    "wrapped": (opens_after("(m.content | wordwrap(3)) == 'go'"), FOUR_TEXTS),
    "encoded as a URL": (opens_after("(m.content | urlencode) == 'go'"), FOUR_TEXTS),
    "bytes": (opens_after("m.content.encode() == 'go'.encode()"), FOUR_TEXTS),
    "escaped": (opens_after("'&lt;' in (m.content | e)"), FOUR_TEXTS),
    "a constant that is split": (opens_after("('ago'.split(m.content) | length) == 2"), FOUR_TEXTS),
    "a list as text": (opens_after("([m.content] | string | length) == 6"), FOUR_TEXTS),
    "parts as text": (opens_after("'go' in (m.content | string)"), [[parts("x"), says()], [parts("go"), says()]]),
    "number of a part": (opens_after("m.content[0].n > 3"), [[parts("x", n=1), says()], [parts("x", n=7), says()]]),
    "texts of two messages": (opens_if("messages | length > 2 and messages[0].content == messages[2].content"),
                              [talk("a", "a"), talk("a", "b"), talk("b", "a")]),
    "the last mode": (opens_after("false").replace("{% endif %}{% endfor %}", "{% elif '/t' in m.content %}{% set ns.on = true %}"
                      "{% elif '/n' in m.content %}{% set ns.on = false %}{% endif %}{% endfor %}", 1),
                      [talk(*modes) for n in (2, 3) for modes in permutations(("/t", "/n", "q"), n)]),
    "a number at a message": (opens_after("m.n > 3"), [[user(n=1), says()], [user(n=7), says()]]),
    "true, not 1": (opens_after("m.n is true"), [[user(n=1), says()], [user(n=True), says()]]),
    "a number in an object": (opens_after("m.meta.n > 3"), [[user(meta={"n": 1}), says()], [user(meta={"n": 7}), says()]]),
    "an object as text": (opens_after("'go' in (m.meta | string)"), [[user(meta={"n": "x"}), says()], [user(meta={"n": "go"}), says()]]),
    "length of a list in an object": (opens_after("(m.meta.n | length) > 1"), [[user(meta={"n": [1]}), says()], [user(meta={"n": [1, 2]}), says()]]),
    "text of an argument": (opens_if(ARGUMENT + ".n == 'go'"), [calls({"n": "x"}), calls({"n": "go"})]),
    "JSON of arguments": (opens_if(ARGUMENT + " | tojson | length == 9"), [calls({"n": "x"}), calls({"n": "go"})]),
    "names of arguments": (opens_if(ARGUMENT + ".k is defined"), [calls({"n": "x"}), calls({"k": "x"})]),
    "null as an argument": (opens_if(ARGUMENT + ".n is none"), [calls({"n": None}), calls({"n": "x"})]),
    "number of an argument": (opens_if(ARGUMENT + ".n > 3"), [calls({"n": 1}), calls({"n": 7})]),
    "list of an argument": (opens_if(ARGUMENT + ".n | length > 1"), [calls({"n": [1]}), calls({"n": [1, 2]})]),
    "types in a list": (opens_if(ARGUMENT + ".n[0] is string"), [calls({"n": [1]}), calls({"n": ["x"]})]),
    "arguments as text": (opens_if(ARGUMENT + " | string | length == 9"), [calls({"n": "x"}), calls({"n": "go"})]),
    "number of messages": (opens_if("messages | length > 3"), [talk("q", "q", "q"), talk("q", "q")]),
    "number of users": (opens_if("messages | selectattr('role', 'equalto', 'user') | list | length > 2"), [talk("q", "q", "q"), talk("q")]),
    "odd and even": (opens_if("messages | length % 4 == 1"), [talk("q", "q", "q", "q")]),
    "a switch": (opens_after("false").replace("{% endif %}{% endfor %}", "{% elif m.role == 'user' %}{% set ns.on = not ns.on %}"
                 "{% endif %}{% endfor %}", 1), [talk("q", "q", "q")]),
    "role of the first": (opens_if("messages[0].role == 'system'"), [[SYSTEM, user(), says()], [user(), SYSTEM, user(), says()]]),
    "text of the first": (opens_if("'/t' in messages[0].content"), [talk("/t", "/n", "q"), talk("/n", "/t", "q")]),
    "text of the second last": (opens_if("messages | length > 2 and '/t' in messages[-3].content"), [talk("/t", "q", "q"), talk("/t", "q"), talk("q", "/t", "q")]),
    "the variables": (opens_if("mode == 'go'"), [Conversation(talk("q"), template_kwargs={"mode": mode}) for mode in ("go", "no")]),
    "one, not true": (opens_if("mode is true"), [Conversation(talk("q"), template_kwargs={"mode": mode}) for mode in (1, True)]),
    "a turn before it": (THINKS_AT_LAST, [Conversation([says(), says(), says(), user()], weights=(1, 1, 0, 0))]),
    "the tools": (opens_if("tools and tools[0].n > 3"), [Conversation(talk("q"), tools=tools) for tools in (None, [{"n": 1}], [{"n": 7}])]),
}  # fmt: skip


@pytest.mark.parametrize("name", DEPENDING)
def test_what_is_kept_from_one_conversation_serves_no_other_for_which_it_is_wrong(name):
    template, several = DEPENDING[name]
    several = [c if isinstance(c, Conversation) else Conversation(c) for c in several]
    expected = [masks(forgetful(template).encode_many([conversation])[0]) for conversation in several]
    assert name == "a turn before it" or not any(isinstance(mask, str) for mask in expected), expected
    for step in (1, -1):
        warm = chat_for(template)
        found = [masks(warm.encode_many([conversation])[0]) for conversation in several[::step]]
        assert found == expected[::step]
