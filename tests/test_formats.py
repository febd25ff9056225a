"""Every form of a row becomes the same messages; every malformed kind of row says what was found."""

import json
import re
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.config.schema import DataOptions
from posttrain.data.formats import Columns, RowError, conversation_of, to_conversation
from posttrain.data.sources import find_sources, read_rows
from posttrain.records import Tokens


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(row, **columns):
    return to_conversation(row, Columns(**columns))


ASKED = [user("q"), assistant("a")]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]

# row, what names its columns or form beyond what is recognised
SAME_CONVERSATION = [
    ({"messages": ASKED}, {}),
    ({"messages": json.dumps(ASKED)}, {}),
    ({"messages": np.array(ASKED, dtype=object)}, {}),
    ({"messages": [user("q"), assistant("a", tool_calls=None, name=None, reasoning_content=None)]}, {}),
    ({"messages": [user("q"), assistant("a", tool_calls=[])]}, {}),
    ({"chat": {"turns": ASKED}}, {"messages": "chat.turns"}),
    ({"chat": SHAREGPT}, {"messages": "chat"}),
    ({"conversations": SHAREGPT}, {}),
    ({"conversations": [{"from": "User", "value": "q"}, {"from": "ChatGPT", "value": "a"}]}, {}),
    ({"conversations": [{"role": "human", "content": "q"}, {"role": "model", "content": "a"}]}, {}),
    ({"turns": SHAREGPT}, {"messages": "turns", "format": "sharegpt"}),
    ({"instruction": "q", "input": "", "output": "a"}, {}),
    ({"instruction": "q", "input": None, "output": "a", "history": None}, {}),
    ({"prompt": "q", "response": "a"}, {}),
    ({"prompt": "q", "completion": "a"}, {}),
    ({"prompt": user("q"), "response": assistant("a")}, {}),
    ({"prompt": [user("q")], "response": np.array([assistant("a")], dtype=object)}, {}),
    ({"prompt": "q", "response": "a", "completion": "b"}, {"response": "response"}),
    ({"question": "q", "answer": "a"}, {}),
    ({"query": "q", "response": "a"}, {}),
    ({"problem": "q", "solution": "a", "answer": "7"}, {}),
    ({"problem": "p", "solution": "s", "prompt": "q", "response": "a"}, {}),
    ({"prompt": "p", "response": "r", "question": "q", "answer": "a"}, {"format": "question_answer"}),
    ({"extra": {"q": "q"}, "a": "a"}, {"prompt": "extra.q", "response": "a"}),
    ({"messages": ASKED, "input_ids": [1, 2], "labels": [1, 2]}, {"format": "messages"}),
]


@pytest.mark.parametrize(("row", "columns"), SAME_CONVERSATION, ids=lambda value: str(value)[:60])
def test_every_form_becomes_the_same_messages(row, columns):
    before = json.dumps(row, default=lambda array: array.tolist())
    assert read(row, **columns).messages == ASKED
    assert json.dumps(row, default=lambda array: array.tolist()) == before  # the row is left as it was


def test_what_a_template_could_tell_apart_stays_as_the_row_has_it():
    calls = [{"id": "1", **call("f", '{"x": null}')}, call("g", {"x": None}), {"name": "bare", "arguments": {}}]
    messages = [
        {"role": "developer", "content": "s"},
        user([{"type": "text", "text": "a"}, {"type": "thinking", "thinking": "?"}]),
        assistant(None, tool_calls=calls),
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": ""},
        {"role": "assistant", "tool_calls": calls[:1]},
        {"role": "critic", "content": "hm"},
        assistant("", function_call={"name": "f", "arguments": "{}"}),
        {"role": "function", "name": "f", "content": "7"},
        assistant("a", reasoning_content="r", reasoning="s", thinking="t", mood="gay"),
    ]
    assert read({"messages": messages}).messages == messages


def test_sharegpt_calls_observations_system_and_tools():
    tools = [{"name": "f", "parameters": {"properties": {"x": {"default": None}}}}]
    row = {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": null}}'},
            {"from": "observation", "value": "[]"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": "{}"}]'},
            {"from": "tool", "value": "7"},
            {"from": "gpt", "value": "a", "weight": 2},
        ],
        "system": "s",
        "tools": json.dumps(tools),
    }
    conversation = read(row)
    assert conversation.messages == [
        {"role": "system", "content": "s"},
        user("q"),
        assistant("", tool_calls=[call("f", {"x": None})]),
        {"role": "tool", "content": "[]"},
        assistant("", tool_calls=[call("f", {}), call("g", "{}")]),
        {"role": "tool", "content": "7"},
        assistant("a"),
    ]
    assert conversation.tools == tools
    assert conversation.weights == (None, None, None, None, None, None, 2.0)


def test_parts_of_reasoning_text_and_calls_become_fields():
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "value": "a"},
        {"type": "tool_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    messages = read(
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "q"}]}, assistant(parts)]}
    ).messages
    assert messages == [user("q"), assistant("a", reasoning_content="hm", tool_calls=[call("f", {"x": 1})])]
    with pytest.raises(RowError, match="part 1 of message 0: text after tool_call"):
        read({"messages": [assistant([parts[2], parts[1]])]})


def test_alpaca_takes_input_system_and_history():
    row = {"instruction": "add", "input": "3 4", "output": "7", "system": "s", "history": [["q", "a"]]}
    assert read(row).messages == [{"role": "system", "content": "s"}, *ASKED, user("add\n3 4"), assistant("7")]


def test_a_system_prompt_goes_in_front_where_a_row_has_none():
    said = {"role": "system", "content": "s"}
    weighted = {"messages": [user("q"), assistant("a", weight=0.5)]}
    assert read(weighted, system_prompt="s").messages == [said, *ASKED]
    assert read(weighted, system_prompt="s").weights == (None, None, 0.5)
    assert read({"messages": [said, *ASKED]}, system_prompt="t").messages == [said, *ASKED]
    assert read({"messages": [said, *ASKED], "system": "s"}).messages == [said, *ASKED]
    assert read({"prompt": "q", "response": "a", "system": "s"}, system_prompt="t").messages == [said, *ASKED]


def test_weights_leave_the_messages_and_agree():
    turns = [
        user("q"),
        assistant("a", train=True),
        assistant("b", train=False, loss_mask=0, weight=0.0),
        assistant("c", loss_mask=np.int64(1), weight=0.25),
        assistant("d", train=None),
    ]
    conversation = read({"messages": turns})
    assert conversation.weights == (None, 1.0, 0.0, 0.25, None)
    assert conversation.messages == [user("q"), *(assistant(text) for text in "abcd")]
    assert read({"messages": ASKED}).weights is None


@pytest.mark.parametrize(
    ("row", "kwargs"),
    [
        ({"enable_thinking": True}, {"enable_thinking": True}),
        ({"enable_thinking": np.bool_(False)}, {"enable_thinking": False}),
        ({"enable_thinking": None}, {}),
        ({"chat_template_kwargs": '{"enable_thinking": false, "date": "today"}'}, {"enable_thinking": False, "date": "today"}),
        ({"chat_template_kwargs": {"enable_thinking": None}, "enable_thinking": False}, {"enable_thinking": False}),
        ({"chat_template_kwargs": None}, {}),
        ({"chat_template_kwargs": ""}, {}),
    ],
    ids=str,
)  # fmt: skip
def test_template_kwargs_are_set_or_not(row, kwargs):
    assert read({"messages": ASKED, **row}).template_kwargs == kwargs


@pytest.mark.parametrize("tools", [None, "", "[]", [], "null"])
def test_no_tools_are_none(tools):
    assert read({"messages": ASKED, "tools": tools}).tools is None


def test_tools_are_found_by_name_and_in_any_writing():
    tool = {"type": "function", "function": {"name": "f", "parameters": {"default": None}}}
    for written in ([tool], json.dumps([tool]), [json.dumps(tool)], np.array([tool], dtype=object)):
        assert read({"messages": ASKED, "functions": written, "tools": "no"}, tools="functions").tools == [tool]


def test_ground_truth_and_source_come_along():
    row = {"messages": ASKED, "reward_model": {"ground_truth": 7}, "data_source": "gsm8k_sft"}
    assert (read(row).ground_truth, read(row).data_source) == ("7", "gsm8k_sft")


TOKENIZED = [
    ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, [5, 6, 7], [0, 1, 1]),
    ({"input_ids": np.array([5, 6, 7]), "loss_mask": np.array([0, 0.5, 2])}, [5, 6, 7], [0, 0.5, 2]),
    ({"input_ids": [5, 6, 7], "completion_mask": [False, True, True]}, [5, 6, 7], [0, 1, 1]),
    ({"input_ids": [5, 6, 7], "assistant_masks": [0, 1, 1], "labels": [-100, 6, 7]}, [5, 6, 7], [0, 1, 1]),
    ({"input_ids": [0, 5, 6, 0], "loss_mask": [0, 0, 1, 1], "attention_mask": [0, 1, 1, 0]}, [5, 6], [0, 1]),
]


@pytest.mark.parametrize(("row", "ids", "weights"), TOKENIZED, ids=lambda value: str(value)[:50])
def test_tokenized_rows_are_taken_as_they_are(row, ids, weights):
    for columns in ({}, {"format": "tokens"}):
        tokens = read(row, **columns)
        assert isinstance(tokens, Tokens)
        assert (tokens.ids_T.tolist(), tokens.weights_T.tolist()) == (ids, weights)
        assert (tokens.ids_T.dtype, tokens.weights_T.dtype) == (np.int32, np.float32)
    with pytest.raises(RowError, match="holds token ids and no messages"):
        conversation_of(row, Columns())


def with_call(**function):
    return {"messages": [user("q"), assistant(None, tool_calls=[{"function": function}])]}


def with_turn(**fields):
    return {"messages": [user("q"), {"role": "assistant", "content": "a", **fields}]}


BAD_ROWS = [  # row, what names its form, kind, what is found
    ({}, {}, "no conversation recognised", "the columns are (none)"),
    ({"text": "a"}, {}, "no conversation recognised", "the columns are text"),
    ({"messages": ASKED}, {"format": "sharegpt"}, "no column conversations", "found: messages"),
    ({"messages": ASKED}, {"messages": "chat.turns"}, "no column chat.turns", "there is no column 'chat'; found: messages"),
    ({"messages": ASKED}, {"format": "tokens"}, "no tokens", "the columns are messages"),
    ({"messages": ASKED}, {"format": "alpaca"}, "no column instruction", "the columns are messages"),
    ({"messages": ASKED, "input_ids": [1], "labels": [1]}, {}, "ambiguous form", "data.format=messages or tokens"),
    ({"prompt": "q", "response": "a", "completion": "b"}, {}, "ambiguous form", "data.response_key"),
    ({"messages": []}, {}, "no messages", "empty"),
    ({"messages": None}, {}, "not a conversation", "null, expected a list"),
    ({"messages": "hello"}, {}, "not a conversation", "found text"),
    ({"messages": {"role": "user"}}, {}, "not a conversation", "found dict"),
    ({"messages": ["hello"]}, {}, "message without role", "message 0 is str"),
    ({"messages": [user("q"), {"content": "a"}]}, {}, "message without role", "message 1 is dict without a 'role'"),
    ({"messages": [user(None)]}, {}, "message without text", "message 0 has null"),
    ({"messages": [{"role": "user"}]}, {}, "message without text", "message 0 has nothing"),
    ({"messages": [user(7)]}, {}, "message without text", "message 0 has int"),
    ({"messages": [user([])]}, {}, "message without text", "an empty list"),
    ({"messages": [user("\ud83d")]}, {}, "not Unicode", "content of message 0 holds half a character pair"),
    ({"messages": [user(["a"])]}, {}, "bad part of a message", "part 0 of message 0 is no object"),
    ({"messages": [user([{"type": "text"}])]}, {}, "bad part of a message", "text of part 0 of message 0 is null"),
    ({"messages": [user([{"type": "video_url", "video_url": {}}])]}, {}, "video or sound", "'video_url'"),
    ({"messages": ASKED, "videos": ["1.mp4"]}, {}, "video or sound", "column `videos`"),
    (with_turn(reasoning_content=["r"]), {}, "reasoning that is no text", "reasoning_content of message 1 is list"),
    ({"messages": [{"role": "tool", "content": "7", "tool_call_id": 1}]}, {}, "tool turn without text", "tool_call_id"),
    (with_turn(tool_calls={"name": "f"}), {}, "bad tool call", "tool_calls of message 1 is dict"),
    (with_turn(tool_calls=["f"]), {}, "bad tool call", "tool call 0 of message 1 is str"),
    (with_call(arguments="{}"), {}, "bad tool call", "names no function"),
    (with_call(name="f"), {}, "bad tool call", "the arguments are missing"),
    (with_call(name="f", arguments="{x: 1}"), {}, "bad tool call", "the arguments are '{x: 1}' (not JSON"),
    (with_call(name="f", arguments="[" * 100_000), {}, "bad tool call", "not JSON: maximum recursion"),
    (with_call(name="f", arguments="[1]"), {}, "bad tool call", "the arguments are list"),
    (with_turn(function_call={"name": "f", "arguments": ""}), {}, "bad tool call", "function_call of message 1"),
    (with_turn(train=1), {}, "bad weight", "train of message 1 is 1, expected true or false"),
    (with_turn(loss_mask=0.5), {}, "bad weight", "expected 0 or 1"),
    (with_turn(weight=-1), {}, "bad weight", "a number of 0 or more"),
    (with_turn(weight=float("nan")), {}, "bad weight", "nan"),
    (with_turn(train=True, weight=0), {}, "contradictory weights", "train=True, weight=0"),
    ({"conversations": [{"from": "wizard", "value": "q"}]}, {}, "unknown role", "'wizard'; expected one of human"),
    ({"conversations": [{"from": 7, "value": "q"}]}, {}, "message without role", "message 0"),
    ({"conversations": [{"from": "gpt"}]}, {}, "message without text", "message 0 has nothing"),
    ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, {}, "bad tool call", "the call is 'f(x)'"),
    ({"conversations": [{"from": "function_call", "value": "[]"}]}, {}, "bad tool call", "calls nothing"),
    ({"conversations": SHAREGPT, "system": 7}, {}, "message without text", "the column `system` is int"),
    ({"messages": [{"role": "system", "content": "s"}], "system": "t"}, {}, "two system prompts", "another"),
    ({"prompt": "a", "response": None}, {}, "no answer", "the answer is null"),
    ({"prompt": None, "response": "a"}, {}, "no prompt", "the prompt is null"),
    ({"prompt": [], "response": "a"}, {}, "no prompt", "an empty list"),
    ({"prompt": "a", "response": [{"role": "assistant"}]}, {}, "message without text", "message of the answer, number 0"),
    ({"instruction": "q", "output": 7}, {}, "no answer", "the output is int"),
    ({"instruction": "q", "output": "a", "history": ["q", "a"]}, {}, "bad history", "turn 0"),
    ({"instruction": "q", "output": "a", "history": "q"}, {}, "bad history", "is str"),
    ({"messages": ASKED, "tools": "f"}, {}, "bad tools", "the tools are 'f' (not JSON"),
    ({"messages": ASKED, "tools": {"name": "f"}}, {}, "bad tools", "the tools are dict"),
    ({"messages": ASKED, "tools": [7]}, {}, "bad tools", "tool 0 is int"),
    ({"messages": ASKED}, {"tools": "functions"}, "no column functions", "data.tools_key=functions"),
    ({"messages": ASKED, "enable_thinking": "yes"}, {}, "bad template kwargs", "'yes', expected true, false or null"),
    ({"messages": ASKED, "chat_template_kwargs": "x"}, {}, "bad template kwargs", "not JSON"),
    ({"messages": ASKED, "chat_template_kwargs": [1]}, {}, "bad template kwargs", "is list"),
    ({"messages": ASKED, "chat_template_kwargs": {"tools": []}}, {}, "bad template kwargs", "sets tools"),
    ({"messages": ASKED, "enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, {},
     "bad template kwargs", "contradict"),
    ({"input_ids": [1, 2], "labels": [1]}, {}, "bad tokens", "labels has 1 entries, input_ids has 2"),
    ({"input_ids": [1, 2], "labels": [-100, 3]}, {}, "bad labels", "labels[1] is 3 where input_ids has 2"),
    ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, {}, "bad labels", "shifted by one"),
    ({"input_ids": [1, -2], "labels": [1, -2]}, {}, "bad tokens", "input_ids holds -2"),
    ({"input_ids": [1.0, 2.0], "labels": [1, 2]}, {}, "bad tokens", "input_ids holds 1.0"),
    ({"input_ids": [[1], [2]], "labels": [1, 2]}, {}, "bad tokens", "expected a list of numbers"),
    ({"input_ids": [[1], [2, 3]], "labels": [1, 2]}, {}, "bad tokens", "expected a list of numbers"),
    ({"input_ids": [], "labels": []}, {}, "bad tokens", "an empty list"),
    ({"input_ids": "1 2", "labels": [1, 2]}, {}, "bad tokens", "is str"),
    ({"input_ids": [1, 2]}, {"format": "tokens"}, "nothing says what is trained", "stands alone"),
    ({"input_ids": [1, 2], "loss_mask": [1, 0]}, {}, "nothing trained", "after the first"),
    ({"input_ids": [1, 2], "loss_mask": [0, -1]}, {}, "bad weight", "loss_mask[1] is -1.0"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1], "completion_mask": [1, 1]}, {}, "contradictory weights", "on token 0"),
    ({"input_ids": [1, 2, 3], "loss_mask": [0, 1, 1], "attention_mask": [1, 0, 1]}, {}, "bad attention mask", "between"),
    ({"input_ids": [1, 2], "loss_mask": [0, 1], "attention_mask": [0, 0]}, {}, "bad attention mask", "all padding"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "columns", "kind", "found"), BAD_ROWS, ids=lambda value: str(value)[:60])
def test_a_malformed_row_is_refused_with_its_kind_and_what_was_found(row, columns, kind, found):
    with pytest.raises(RowError) as error:
        read(row, **columns)
    assert error.value.kind == kind
    assert found in str(error.value)


CALLS = [
    [user("q"), assistant(None, tool_calls=[call("f", {"x": None})]), {"role": "tool", "content": "7"}],
    [user("q"), assistant("a", tool_calls=[call("g", {"content": "text", "y": [{"z": 1}, {"w": None}]})])],
]


def test_filler_is_found_wherever_a_struct_stands(tmp_path):
    nested = {"a": [[{"b": {"c": 1, "d": [{"e": 1}]}}]], "f": 1}
    rows = [
        {"x": nested, "y": None, "deep": {"a": {"b": 1}}},
        {"x": {"a": [[{"b": {"d": [{"g": 2}]}}], None]}, "y": {"z": []}, "deep": {"a": {"c": 1}}},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert [row.values for row in read_rows(find_sources([str(tmp_path / "rows.parquet")], "files"))] == rows


@pytest.mark.parametrize("suffix", ["parquet", "arrow", "jsonl"])
def test_arrow_fills_structs_with_nulls_and_json_means_its_own(suffix, tmp_path):
    file = tmp_path / f"rows.{suffix}"
    rows = [{"messages": messages, "tools": [{"name": "f", "default": i or None}]} for i, messages in enumerate(CALLS)]
    if suffix == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
    first, second = [to_conversation(row.values, Columns()) for row in read_rows(find_sources([str(file)], "files"))]
    own_nulls = suffix == "jsonl"
    assert first.messages[1] == assistant(None, tool_calls=[call("f", {"x": None} if own_nulls else {})])
    assert first.messages[0] == user("q") and first.messages[2] == {"role": "tool", "content": "7"}
    assert first.tools == ([{"name": "f", "default": None}] if own_nulls else [{"name": "f"}])
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {
        "content": "text",
        "y": [{"z": 1}, {"w": None} if own_nulls else {}],
    }


# file -> rows, rows that are used, kinds of refusals, rows with tools
REAL_FILES = {
    "alpaca_en_demo.json": (999, 999, set(), 0),
    "glaive_toolcall_en_demo.json": (300, 300, set(), 191),
    "reason_tool_use_demo_50.jsonl": (50, 50, set(), 48),
    "sharegpt_dummy.json": (500, 500, set(), 0),
    "tau_bench_airline.jsonl": (100, 100, set(), 0),
    "mllm/mllm_demo.json": (6, 6, set(), 0),
}


@pytest.mark.parametrize("file", REAL_FILES)
def test_every_real_row_is_read_or_refused_for_a_true_reason(file, shared_data):
    used, refused = [], set()
    rows = [row.values for row in read_rows(find_sources([str(shared_data / "conversations" / file)], "files"))]
    for row in rows:
        try:
            used.append(conversation_of(row, Columns()))
        except RowError as error:
            refused.add(error.kind)
    tools = sum(conversation.tools is not None for conversation in used)
    assert (len(rows), len(used), refused, tools) == REAL_FILES[file]
    if file.startswith("tau"):  # nothing is lost, and null content stays
        assert [c.messages for c in used] == [row["messages"] for row in rows]


def test_columns_are_those_of_the_options():
    given = {"messages_key": "m", "prompt_key": "p", "response_key": "r", "format": "sharegpt", "tools_key": "t",
             "system_prompt": "s"}  # fmt: skip
    assert Columns.of(DataOptions(**given)) == Columns("m", "p", "r", "sharegpt", "t", "s")
    assert Columns.of(DataOptions()) == Columns()


def test_every_example_in_the_documentation_is_read():
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text("utf-8")
    forms = []
    for form, block in re.findall(r"### (\w+)\n\n```json\n(.*?)```", page, re.DOTALL):
        rest = block.strip()
        while rest:
            row, end = json.JSONDecoder().raw_decode(rest)
            assert repr(to_conversation(row, Columns())) == repr(to_conversation(row, Columns(format=form)))
            rest = rest[end:].strip()
        forms.append(form)
    assert set(forms) | {"auto"} == set(get_args(DataOptions.model_fields["format"].annotation))


JUNK = [None, "", "x", "\ud83d", "[", "{}", "[1]", 7, -1, 0.5, float("nan"), True, [], {}, [None], [[]], [{}], {"a": None},
        {"role": 7}, {"type": "text"}, b"x", np.array([1, 2]), np.float32(1), 2**70]  # fmt: skip
WHOLE = {
    "messages": [user([{"type": "text", "text": "q"}]),
                 assistant(None, tool_calls=[{"id": "1", **call("f", {"x": 1})}], weight=1, train=True, reasoning="r"),
                 assistant("a", function_call={"name": "f", "arguments": "{}"}, loss_mask=1, name="n"),
                 assistant([{"type": "tool_call", "value": '{"name": "f", "arguments": {}}'}])],
    "tools": [{"name": "f"}], "system": "s", "enable_thinking": True, "chat_template_kwargs": {"a": 1},
    "reward_model": {"ground_truth": "7"}, "data_source": "d", "images": [],
}  # fmt: skip
WHOLE_ROWS = [
    WHOLE,
    {"conversations": [*SHAREGPT, {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}]},
    {"instruction": "q", "input": "i", "output": "a", "history": [["q", "a"]]},
    {"prompt": [user("q")], "response": assistant("a")},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "loss_mask": [0, 1, 1], "attention_mask": [1, 1, 1]},
]


def with_junk(value, junk):
    """The value with junk in each of its places in turn."""
    yield junk
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            for changed in with_junk(value[key], junk):
                copy = value.copy()
                copy[key] = changed
                yield copy


@pytest.mark.parametrize("row", WHOLE_ROWS, ids=lambda row: next(iter(row)))
def test_junk_anywhere_in_a_row_is_read_or_refused_and_never_breaks(row):
    to_conversation(row, Columns())
    refused = 0
    for junk in JUNK:
        for changed in with_junk(row, junk):
            if isinstance(changed, dict):
                try:
                    to_conversation(changed, Columns())
                except RowError as error:
                    assert error.kind and str(error)
                    refused += 1
    assert refused > 100
