"""What is trained: the answers and the token that ends each, nothing else; or a refusal."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import Columns, RowError, to_conversation
from posttrain.errors import InputError
from posttrain.records import Conversation

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" \
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # fmt: skip


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "model")


def trained_text(chat, messages):
    encoded = chat.encode(Conversation(messages))
    return chat.tokenizer.decode(encoded.ids_T[encoded.trained_T])


CONVERSATIONS = {
    "one turn": turns("3+4?", "#### 7"),
    "two turns": turns("3+4?", "#### 7", "and 5+5?", "#### 10"),
    "system": [{"role": "system", "content": "Be brief."}, *turns("3+4?", "#### 7")],
    "the same answer twice": turns("a", "yes", "b", "yes"),
    "an answer that quotes the question": turns("say hello", "say hello"),
    "unicode": turns("wie heißt du? 🤖", "Ich heiße 小明 👍🏽"),
    "white space around": turns("a", "  b\n"),
    "an answer that looks like the template": turns("a", "<|im_start|>user\nb"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_trained_are_exactly_the_answers_and_their_end_tokens(name, tokenizer):
    messages = CONVERSATIONS[name]
    expected = "".join(m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant")
    assert trained_text(ChatTokenizer(tokenizer), messages) == expected


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_are_those_of_apply_chat_template(name, tokenizer):
    messages = CONVERSATIONS[name]
    expected = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert ChatTokenizer(tokenizer).encode(Conversation(messages)).ids_T.tolist() == expected


def test_prompt_ids_are_what_inference_sees(tokenizer):
    messages = CONVERSATIONS["two turns"]
    expected = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    assert ChatTokenizer(tokenizer).prompt_ids(Conversation(messages)).tolist() == expected


# name -> template, and what is trained of the conversation ("q", " a "), or a part of the refusal
TEMPLATES = {
    "trims answers": (CHATML.replace("m.content", "m.content | trim"), "a<|im_end|>"),
    "writes thinking before the last answer": (
        CHATML.replace("{{ m.content }}", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"),
        "<think></think> a <|im_end|>"),
    "ends turns with text": (CHATML.replace("<|im_end|>", "###"), RowError("", "message 1: no control token of this tokenizer ends it")),
    "ends turns with nothing": (CHATML.replace("<|im_end|>\n", ""), RowError("", "message 1: no control token of this tokenizer ends it")),
    "rewrites answers": (CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"), RowError("", "as it stands")),
    "another header than the prompt": (CHATML.replace("prompt %}<|im_start|>assistant", "prompt %}<|im_start|>bot"),
                                       RowError("", "they do not agree")),
    "raises": ("{{ raise_exception('only in pairs') }}", RowError("", "only in pairs")),
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_masked_exactly_or_refused(name, tokenizer):
    tokenizer.chat_template, expected = TEMPLATES[name]
    if isinstance(expected, RowError):
        with pytest.raises(RowError, match=expected.found):
            trained_text(ChatTokenizer(tokenizer), turns("q", " a "))
    else:
        assert trained_text(ChatTokenizer(tokenizer), turns("q", " a ")) == expected


def test_a_tokenizer_without_template_or_control_tokens_is_refused(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="chat template"):
        ChatTokenizer(tokenizer)


# row, what is found
BAD_ROWS = [
    ({"messages": []}, "empty"),
    ({"messages": None}, "null"),
    ({"messages": "hello"}, "list of messages"),
    ({"messages": turns("a")}, "final 'assistant' message"),
    ({"messages": [{"content": "a"}]}, "without a 'role'"),
    ({"messages": turns("a", 7)}, "int as content"),
    ({"prompt": "a", "response": None}, "null"),
]


@pytest.mark.parametrize(("row", "found"), BAD_ROWS, ids=str)
def test_a_bad_row_says_what_was_found(row, found, tokenizer):
    with pytest.raises(RowError, match=found):
        ChatTokenizer(tokenizer).encode(to_conversation(row, Columns()))


ROWS = [
    {"prompt": "q", "response": "a"},
    {"prompt": [{"role": "user", "content": "q"}], "response": "a"},
    {"question": "q", "answer": "a"},
    {"messages": [{"role": "user", "content": "q", "tool_calls": None}, {"role": "assistant", "content": "a"}]},
    {"messages": np.array([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], dtype=object)},
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "+".join(row))
def test_forms_of_a_row_are_recognised(row):
    assert to_conversation(row, Columns()).messages == turns("q", "a")


def test_columns_can_be_named_with_dots():
    row = {"extra": {"q": "q"}, "a": "a", "reward_model": {"ground_truth": 7}}
    conversation = to_conversation(row, Columns(prompt="extra.q", response="a"))
    assert conversation.messages == turns("q", "a") and conversation.ground_truth == "7"
    with pytest.raises(RowError, match=r"data.prompt_key=extra.x: there is no column 'x'; found: q"):
        to_conversation(row, Columns(prompt="extra.x", response="a"))
