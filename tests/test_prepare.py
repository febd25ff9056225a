from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from posttrain.cli.data import data_prepare
from posttrain.data.formats import Columns, conversation_of
from posttrain.data.prepare import PREPARE, prepare_gsm8k
from posttrain.data.prepare.questions import final_boxed
from posttrain.data.sources import find_sources, read_rows
from posttrain.errors import InputError, RunError

ROW = {"question": "How many are 3 and 4?", "answer": "3+4=<<3+4=7>>7\n#### 7"}
OTHER_ROW = {"question": "How many are 1,000 and 200?", "answer": "1,000+200=1,200\n#### 1,200"}


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file)


def read(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


def test_real_gsm8k_is_prepared_whole_and_alike_from_json_lines_and_parquet(shared_data: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
        write_parquet(tmp_path / f"hub/main/{split}-00000-of-00001.parquet", [json.loads(line) for line in lines])

    summary = prepare_gsm8k(str(shared_data / "gsm8k"), str(tmp_path / "from_lines"))
    prepare_gsm8k(str(tmp_path / "hub"), str(tmp_path / "from_parquet"))

    assert (summary["train"]["rows"], summary["test"]["rows"], summary["notes"]) == (7473, 1319, [])
    for split in ("train", "test"):
        rows = read(tmp_path / f"from_lines/{split}.parquet")
        assert rows == read(tmp_path / f"from_parquet/{split}.parquet")
        lines = (shared_data / "gsm8k" / f"{split}.jsonl").read_text("utf-8").splitlines()
        for line, row in zip(lines, rows, strict=True):
            question, answer = json.loads(line)["question"], json.loads(line)["answer"]
            assert row["messages"] == [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            assert answer.rsplit("#### ", 1)[1].replace(",", "") == row["reward_model"]["ground_truth"]


def test_a_prepared_row_holds_what_sft_evaluation_and_rl_need(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "in/train.jsonl", [ROW, OTHER_ROW])
    prepare_gsm8k(str(tmp_path / "in"), str(tmp_path / "out"))
    row = read(tmp_path / "out/train.parquet")[1]
    prompt = [{"role": "user", "content": OTHER_ROW["question"]}]
    assert row == {
        "data_source": "gsm8k_sft",
        "prompt": prompt,
        "response": OTHER_ROW["answer"],
        "messages": [*prompt, {"role": "assistant", "content": OTHER_ROW["answer"]}],
        "reward_model": {"style": "rule", "ground_truth": "1200"},
        "extra_info": {"split": "train", "index": 1, **OTHER_ROW},
    }
    assert conversation_of(row, Columns()).ground_truth == "1200"


def test_a_missing_test_split_is_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    summary = prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))
    assert "no test split" in summary["notes"][0]
    assert "test" not in summary
    assert not (tmp_path / "out/test.parquet").exists()


def test_preparing_into_the_source_folder_can_be_repeated(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    first = prepare_gsm8k(str(tmp_path), str(tmp_path))
    assert prepare_gsm8k(str(tmp_path), str(tmp_path)) == first


def test_a_source_is_never_overwritten(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [ROW])
    with pytest.raises(InputError, match="the source itself"):
        prepare_gsm8k(str(tmp_path), str(tmp_path))
    assert read(tmp_path / "train.parquet") == [ROW]


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"question": "?", "answer": "seven"}, "row 1: the answer ends in 'seven'"),
        ({"question": "?", "answer": "#### seven"}, "row 1: the answer ends in '#### seven'"),
        ({"question": "", "answer": "#### 7"}, "row 1: the question is ''"),
        ({"question": "?", "answer": None}, "row 1: the answer is None"),
        ({"question": "\ud83d", "answer": "#### 7"}, "row 1: the question holds half a character pair"),
        ({"prompt": "?", "answer": "#### 7"}, "row 1: there is no column 'question'; found: prompt, answer"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_by_file_and_number(tmp_path: Path, row: dict, found: str) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW, row])
    with pytest.raises(InputError) as error:
        prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))
    assert f"{tmp_path / 'train.jsonl'} {found}" in str(error.value)


def test_a_bad_test_row_leaves_nothing_written(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    write_jsonl(tmp_path / "test.jsonl", [{"question": "?", "answer": "seven"}])
    with pytest.raises(InputError):
        prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("train.jsonl", b'{"question": ', "line 1 is not JSON"),
        ("train.jsonl", b"", "is empty"),
        ("train.jsonl", b"\n\n", "holds no rows"),
        ("train.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("notes.txt", b"7", "there is no train split. Found notes.txt"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, found: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=found):
        prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="found nothing, expected a folder"):
        prepare_gsm8k(str(tmp_path / "absent"), str(tmp_path / "out"))


def test_a_save_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    with pytest.raises(InputError, match="local_save_dir"):
        prepare_gsm8k(str(tmp_path), str(tmp_path / "train.jsonl/out"))


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))

    def disk_is_full(writer: pq.ParquetWriter, table: pa.Table) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", disk_is_full)
    with pytest.raises(RunError, match="No space left"):
        prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert len(read(tmp_path / "out/train.parquet")) == 1


def test_gsm8k_as_messages_asks_for_the_answer_mark(shared_data: Path, tmp_path: Path) -> None:
    summary = PREPARE["gsm8k_multiturn_sft"](str(shared_data / "gsm8k"), str(tmp_path))
    assert (summary["train"]["rows"], summary["test"]["rows"], summary["notes"]) == (7473, 1319, [])
    row = read(tmp_path / "test.parquet")[0]
    question, answer = row["extra_info"]["question"], row["extra_info"]["answer"]
    asked, answered = row["messages"]
    assert asked["content"].startswith(question + "\n") and "####" in asked["content"]
    assert answered == {"role": "assistant", "content": answer}
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("gsm8k_multiturn_sft", "18")


@pytest.mark.parametrize(
    ("solution", "boxed"),
    [
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"first \boxed{3}, then \boxed{4}", "4"),
        (r"it is $\boxed 7$", "7"),
        (r"it is \fbox{8}", "8"),
        ("it is 7", None),
        (r"\boxed{7", None),
        (r"\boxed{}", None),
    ],
)
def test_the_last_boxed_result_is_found_with_its_braces(solution: str, boxed: str | None) -> None:
    assert final_boxed(solution) == boxed


def test_math_rows_carry_the_boxed_result_and_others_are_counted(tmp_path: Path) -> None:
    good = {"problem": "1+1?", "solution": r"It is $\boxed{2}$.", "level": "Level 1", "type": "Algebra"}
    write_parquet(tmp_path / "in/data/train-00000.parquet", [good, {**good, "solution": "two"}])
    write_parquet(tmp_path / "in/data/test-00000.parquet", [good])
    summary = PREPARE["math"](str(tmp_path / "in"), str(tmp_path / "out"))
    assert (summary["train"]["rows"], summary["test"]["rows"]) == (1, 1)
    assert "left out 1 of 2 rows of train: no boxed result" in summary["notes"][0] and "row 1" in summary["notes"][0]
    row = read(tmp_path / "out/train.parquet")[0]
    assert (row["data_source"], row["reward_model"]["ground_truth"]) == ("math", "2")
    assert row["prompt"][0]["content"].startswith("1+1?\n") and row["response"] == good["solution"]


def test_hellaswag_rows_hold_the_right_ending_and_all_choices(tmp_path: Path) -> None:
    row = {"activity_label": "Removing ice", "ctx_a": "A man scrapes [header] ice  off.", "ctx_b": "he",
           "endings": ["rests. [step] Then goes.", "sings."], "label": "1"}  # fmt: skip
    write_jsonl(tmp_path / "in/hellaswag_train.jsonl", [row])
    write_jsonl(tmp_path / "in/hellaswag_val.jsonl", [{**row, "label": 0}])
    write_jsonl(tmp_path / "in/hellaswag_test.jsonl", [{**row, "label": ""}])
    summary = PREPARE["hellaswag"](str(tmp_path / "in"), str(tmp_path / "out"))
    train = read(tmp_path / "out/train.parquet")[0]
    assert train["messages"] == [
        {"role": "user", "content": "Removing ice: A man scrapes ice off. He"},
        {"role": "assistant", "content": "sings."},
    ]
    choices = ["rests. Then goes.", "sings."]
    expected = {"style": "model", "eval": "multiple_choice", "ground_truth": 1, "choices": choices}
    assert (train["data_source"], train["reward_model"]) == ("hellaswag", expected)
    assert read(tmp_path / "out/validation.parquet")[0]["response"] == "rests. Then goes."
    assert "test" not in summary and not (tmp_path / "out/test.parquet").exists()
    assert any("no label" in note for note in summary["notes"])
    write_jsonl(tmp_path / "in/hellaswag_val.jsonl", [{"problem": "?"}])
    with pytest.raises(InputError, match=r"row 0: there is no column .label.; found: problem\. HellaSwag has"):
        PREPARE["hellaswag"](str(tmp_path / "in"), str(tmp_path / "other"))


RETOOL = {
    "messages": [
        {"role": "user", "content": "Use <code>.\n*user question:*\n<answer>What is 2**10?</answer>"},
        {
            "role": "assistant",
            "content": "Let me compute.\n<code>\n```python\nprint(2**10)\n```\n</code>\n<interpreter>\n1024\n</interpreter>\n"
            "So it is\n<answer>\n\\boxed{1024}\n</answer>",
        },
    ]
}


def test_retool_becomes_turns_calls_and_results(tmp_path: Path) -> None:
    code, result, answer = "<code>1</code>", "<interpreter>1</interpreter>", "<answer>1</answer>"
    wrong = [code, code + result, result + answer, code + answer, f"{code}so{result}{answer}", answer + "so", "1"]
    bad = [{"messages": [RETOOL["messages"][0], {"role": "assistant", "content": text}]} for text in wrong]
    write_jsonl(tmp_path / "in/train.jsonl", [RETOOL, *bad])
    summary = PREPARE["retool"](str(tmp_path / "in"), str(tmp_path / "out"))
    assert "left out 7 of 8 rows of train: not a ReTool row" in summary["notes"][0]
    (row,) = read_rows(find_sources([str(tmp_path / "out/train.parquet")], "files"))
    assert isinstance(row.values["tools"], str) and row.values["data_source"] == "retool_sft"
    conversation = conversation_of(row.values, Columns())
    code = {"name": "code_interpreter", "arguments": '{"code": "print(2**10)"}'}
    assert conversation.messages == [
        {"role": "user", "content": "What is 2**10?"},
        {
            "role": "assistant",
            "content": "Let me compute.",
            "tool_calls": [{"type": "function", "function": code}],
        },
        {"role": "tool", "content": "1024"},
        {"role": "assistant", "content": "So it is\n\n\\boxed{1024}"},
    ]
    assert conversation.tools and conversation.tools[0]["function"]["parameters"]["required"] == ["code"]


def test_multiturn_needs_no_data_and_takes_its_own(tmp_path: Path) -> None:
    summary = PREPARE["multiturn"](None, str(tmp_path / "own"))
    assert (summary["train"]["rows"], summary["test"]["rows"]) == (5, 1)
    for row in read(tmp_path / "own/train.parquet"):
        assert row["data_source"] == "multiturn_sft"
        assert [m["role"] for m in row["messages"]] == ["system", *["user", "assistant"] * (len(row["messages"]) // 2)]
    conversations = [{"messages": RETOOL["messages"]}, {"question": "q", "answer": "a"}]
    write_jsonl(tmp_path / "mine.jsonl", conversations)
    summary = PREPARE["multiturn"](str(tmp_path / "mine.jsonl"), str(tmp_path / "out"))
    assert (summary["train"]["rows"], summary["test"]["rows"]) == (1, 1)


def chat_rows(count: int) -> list[dict[str, Any]]:
    """Conversations in several forms, every third one written twice."""
    rows: list[dict[str, Any]] = []
    for i in range(count):
        rows.append({"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]})
        if i % 3 == 0:
            rows.append({"instruction": f"q{i}", "input": "", "output": f"a{i}"})
    return rows


def test_a_chat_set_is_split_the_same_each_time_and_equal_rows_stay_together(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [*chat_rows(60), {"text": "no conversation"}])
    for folder in ("a", "b"):
        summary = PREPARE["chat"](str(tmp_path / "chat.jsonl"), str(tmp_path / folder))
    assert "left out 1 of 81 rows of train: no conversation recognised" in summary["notes"][0]
    train, test = read(tmp_path / "a/train.parquet"), read(tmp_path / "a/test.parquet")
    assert (train, test) == (read(tmp_path / "b/train.parquet"), read(tmp_path / "b/test.parquet"))
    questions = [{row["messages"][0]["content"] for row in rows} for rows in (train, test)]
    assert len(train) + len(test) == 80
    assert (len(questions[0]), len(questions[1]), questions[0] & questions[1]) == (57, 3, set())
    assert {row["extra_info"]["split"] for row in test} == {"test"}


def test_a_row_with_an_image_is_left_out_of_a_chat_set_and_said(tmp_path: Path) -> None:
    seen = {"instruction": "<image>What?", "output": "A cat.", "images": ["cat.png"]}
    write_jsonl(tmp_path / "chat.jsonl", [*chat_rows(30), seen])
    summary = PREPARE["chat"](str(tmp_path / "chat.jsonl"), str(tmp_path / "out"))
    assert "part of type 'image', and only text is written; train on such rows as they are" in summary["notes"][0]


def test_a_chat_set_loses_nothing_that_a_template_sees(tmp_path: Path) -> None:
    arguments = '{"x": null, "y": ["ü"]}'
    rows = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}], "timestamp": 7},
                {
                    "role": "assistant",
                    "content": None,
                    "reasoning_content": "hm",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": json.loads(arguments)}}],
                    "weight": 0.5,
                },
                {"role": "tool", "tool_call_id": "1", "name": "f", "content": "7"},
                {"role": "assistant", "content": "a"},
            ],
            "tools": [{"name": "f", "parameters": {"default": None}}],
            "enable_thinking": False,
            "data_source": "mine",
        },
        {"question": "q", "answer": "a", "reward_model": {"ground_truth": 7}},
    ]
    write_jsonl(tmp_path / "in/train.jsonl", rows)
    write_jsonl(tmp_path / "in/test.jsonl", rows[:1])
    summary = PREPARE["chat"](str(tmp_path / "in"), str(tmp_path / "out"))
    assert summary["notes"] == ["left out the field 'timestamp' of messages, in 2 rows"]
    source = find_sources([str(tmp_path / "out/train.parquet")], "files")
    first, second = [conversation_of(row.values, Columns()) for row in read_rows(source)]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    assert first.messages == [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": "f", "content": "7"},
        {"role": "assistant", "content": "a"},
    ]
    assert (first.weights, first.tools) == ((None, 0.5, None, None), rows[0]["tools"])
    assert (first.template_kwargs, first.data_source) == ({"enable_thinking": False}, "mine")
    assert (second.ground_truth, second.data_source) == ("7", "chat_sft")
    assert second.messages == [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_a_set_without_a_usable_row_is_refused_with_the_reasons(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "q"}]}] * 2)
    with pytest.raises(
        InputError, match=r"left out 2 of 2 rows of train: no assistant turn, such as .*chat.jsonl row 0"
    ):
        PREPARE["chat"](str(tmp_path / "chat.jsonl"), str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_are_written_in_groups(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW] * 2500)
    PREPARE["gsm8k"](str(tmp_path / "train.jsonl"), str(tmp_path / "out"))
    assert pq.ParquetFile(tmp_path / "out/train.parquet").metadata.num_row_groups == 3
    assert len(read(tmp_path / "out/train.parquet")) == 2500


def test_finished_files_are_copied_to_any_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = MemoryFileSystem.mv

    def move_like_hdfs(filesystem: MemoryFileSystem, source: str, target: str, **options: Any) -> None:
        assert not filesystem.exists(target), "HDFS does not move onto a file that is there"
        move(filesystem, source, target, **options)

    monkeypatch.setattr(MemoryFileSystem, "mv", move_like_hdfs)
    write_jsonl(tmp_path / "in/train.jsonl", [ROW])
    write_jsonl(tmp_path / "in/test.jsonl", [OTHER_ROW])
    for where in (str(tmp_path / "copies/deep"), "memory://sets/gsm8k"):
        for _ in range(2):  # a second time replaces the copies
            summary = PREPARE["gsm8k"](str(tmp_path / "in"), str(tmp_path / "out"), where)
        assert len(summary["notes"]) == 2 and summary["notes"][1].endswith("test.parquet")
        filesystem, folder = fsspec.core.url_to_fs(where)
        assert sorted(Path(name).name for name in filesystem.ls(folder, detail=False)) == [
            "test.parquet",
            "train.parquet",
        ]
        for split in ("train", "test"):
            assert filesystem.cat_file(f"{folder}/{split}.parquet") == (tmp_path / f"out/{split}.parquet").read_bytes()


def test_a_folder_that_cannot_be_copied_to_is_refused_before_any_work(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [ROW])
    with pytest.raises(InputError, match="--hdfs_dir=nosuch://x cannot be written to"):
        PREPARE["gsm8k"](str(tmp_path), str(tmp_path / "out"), "nosuch://x")
    assert not (tmp_path / "out").exists()


def test_the_command_prepares_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data_prepare("multiturn", str(tmp_path / "out"), None, str(tmp_path / "copy"))
    said = capsys.readouterr().out
    assert "train: 5 rows from posttrain's own rows" in said and "copy/train.parquet" in said
    with pytest.raises(InputError, match=r"no preparation for 'gsm9k'; there is gsm8k, .*chat"):
        data_prepare("gsm9k", str(tmp_path / "out"))
