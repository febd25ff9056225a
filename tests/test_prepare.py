from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from posttrain.data.formats import Columns, to_conversation
from posttrain.data.prepare import prepare_gsm8k
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
    assert to_conversation(row, Columns()).ground_truth == "1200"


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

    def disk_is_full(table: pa.Table, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq, "write_table", disk_is_full)
    with pytest.raises(RunError, match="No space left"):
        prepare_gsm8k(str(tmp_path), str(tmp_path / "out"))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["train.parquet"]
    assert len(read(tmp_path / "out/train.parquet")) == 1
