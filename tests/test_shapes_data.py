"""Sets of images: shapes that are drawn from a seed, Geometry3K from made rows, and the reward that judges them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from posttrain.cli.data import data_prepare
from posttrain.config.schema import RewardOptions
from posttrain.data.prepare import PREPARE, shapes
from posttrain.data.prepare.shapes import COLOURS, GREYS, SHAPES, prepare_shapes
from posttrain.data.sources import find_sources, read_rows
from posttrain.errors import InputError
from posttrain.rewards.score import Answered, Verdict, open_scorer

SPLITS = ("train", "test")


def read(file: Path) -> list[dict[str, Any]]:
    return pq.read_table(file).to_pylist()


def picture(row: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(row["images"][0]["bytes"])))


def colours_in(row: dict[str, Any]) -> dict[str, int]:
    """The colours of a picture, and how many pixels have each."""
    codes, counts = np.unique(picture(row).astype(int) @ (1 << 16, 1 << 8, 1), return_counts=True)
    found = {(code >> 16, code >> 8 & 255, code & 255): count for code, count in zip(codes, counts, strict=True)}
    there = {name: int(found.pop(value)) for name, value in COLOURS.items() if value in found}
    ((*ground,),) = found
    assert len(set(ground)) == 1 and GREYS[0] <= ground[0] <= GREYS[1]
    return there


def asked(row: dict[str, Any]) -> tuple[str, str]:
    """Question and answer, the one way that a row can have them."""
    user, assistant = row["messages"]
    assert [user["role"], assistant["role"]] == ["user", "assistant"]
    mark, question = user["content"]
    assert mark == {"type": "image", "text": None} and question["type"] == "text"
    (answer,) = assistant["content"]
    assert answer["type"] == "text" and answer["text"] == row["reward_model"]["ground_truth"]
    return question["text"], answer["text"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("shapes")
    for difficulty in ("easy", "hard"):
        prepare_shapes(None, str(folder / difficulty), difficulty=difficulty, rows=400)
    return {(d, split): read(folder / d / f"{split}.parquet") for d in ("easy", "hard") for split in SPLITS}


def test_a_row_of_shapes_asks_what_its_picture_answers(drawn: dict) -> None:
    for row in drawn["easy", "train"]:
        question, answer = asked(row)
        assert question == "Which colour is the circle?"
        ((colour, pixels),) = colours_in(row).items()
        assert colour == answer and {*picture(row).shape[:2]} <= {56, 84}
        assert pixels > 0.1 * picture(row).size / 3  # large enough to be seen in every patch row
    kinds = Counter()
    for row in drawn["hard", "train"]:
        question, answer = asked(row)
        there = colours_in(row)
        kinds[question.split()[1]] += 1
        match question.split():
            case ["How", "many", *_]:
                assert int(answer) == len(there)
            case ["Which", "colour", *_, shape]:
                assert answer in there and shape.rstrip("?") in SHAPES
            case ["Which", "shape", "is", colour]:
                assert colour.rstrip("?") in there and answer in SHAPES
    assert set(kinds) == {"many", "colour", "shape"} and min(kinds.values()) > 90


def test_the_question_alone_tells_nothing_of_the_colour(drawn: dict) -> None:
    for rows in (drawn["easy", "train"], drawn["hard", "train"]):
        told = [asked(row) for row in rows]
        answers = Counter(answer for question, answer in told if question.startswith("Which colour"))
        assert set(answers) == set(COLOURS)
        most = max(answers.values()) / answers.total()
        assert most < 1 / len(COLOURS) + 4 * (1 / len(COLOURS) / answers.total()) ** 0.5


def test_the_circle_may_lie_anywhere(drawn: dict) -> None:
    centres = []
    for row in drawn["easy", "train"]:
        found = picture(row)
        colour = np.array(COLOURS[asked(row)[1]])
        y, x = np.nonzero((found == colour).all(axis=2))
        centres.append((x.mean() / found.shape[1], y.mean() / found.shape[0]))
    spread = np.ptp(np.array(centres), axis=0)
    assert (spread > 0.4).all()


def test_shapes_are_a_function_of_the_seed_and_train_and_test_are_disjoint(drawn: dict, tmp_path: Path) -> None:
    prepare_shapes(None, str(tmp_path / "again"), rows=400)
    prepare_shapes(None, str(tmp_path / "fewer"), rows=100)
    prepare_shapes(None, str(tmp_path / "other"), rows=400, seed=1)
    train = drawn["easy", "train"]
    assert read(tmp_path / "again/train.parquet") == train and len(drawn["easy", "test"]) == 50
    assert read(tmp_path / "fewer/train.parquet") == train[:100]
    other = read(tmp_path / "other/test.parquet")
    assert other != drawn["easy", "test"]


def test_no_picture_is_there_twice_where_there_are_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(shapes.SIDES, "easy", (8,))
    monkeypatch.setattr(shapes, "GREYS", (150, 150))  # 400 pictures in all
    for seed in (0, 1):
        prepare_shapes(None, str(tmp_path / str(seed)), rows=200, seed=seed)
    train, test, other = (
        {picture(row).tobytes() for row in read(tmp_path / file)}
        for file in ("0/train.parquet", "0/test.parquet", "1/test.parquet")
    )
    assert (len(train), len(test), len(other)) == (200, 25, 25)
    assert not train & test and not train & other


def test_the_command_draws_shapes_and_refuses_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data_prepare("shapes", str(tmp_path / "out"), difficulty="hard", rows=9)
    assert "train: 9 rows" in (said := capsys.readouterr().out) and "test: 2 rows" in said
    for options, expected in [
        ({"difficulty": "odd"}, "--difficulty odd: there is easy and hard"),
        ({"rows": 0}, "--rows 0: expected 1 to 100,000"),
        ({"local_dataset_path": "x"}, "--local_dataset_path=x: shapes are drawn, not read"),
    ]:
        with pytest.raises(InputError, match=expected):
            data_prepare("shapes", str(tmp_path / "no"), **options)
    with pytest.raises(InputError, match="--seed is for shapes"):
        data_prepare("multiturn", str(tmp_path / "no"), seed=1)
    assert not (tmp_path / "no").exists()


def test_other_libraries_open_the_images_as_images_and_hub_sets_give_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    prepare_shapes(None, str(tmp_path), rows=2)
    rows = datasets.Dataset.from_parquet(str(tmp_path / "train.parquet"), cache_dir=str(tmp_path / "cache"))
    assert isinstance(rows[0]["images"][0], Image.Image)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split: rows)
    (hub,) = find_sources(["some/set"], "data.train_files")
    found = [row.values["images"][0]["bytes"] for row in read_rows([hub])]
    assert found == [row["images"][0]["bytes"] for row in read(tmp_path / "train.parquet")]


def png(side: int = 30) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), "red").save(stream, "PNG")
    return stream.getvalue()


def test_geometry3k_becomes_prompts_with_images(tmp_path: Path) -> None:
    row = {"images": [{"bytes": png(), "path": None}], "problem": "<image>Find x.", "answer": "2 \\sqrt { 3 }"}
    (tmp_path / "in/data").mkdir(parents=True)
    (tmp_path / "in/data/here.png").write_bytes(png(31))
    rows = [row, {**row, "images": []}, {**row, "images": [{"bytes": None, "path": "here.png"}]},
            {**row, "images": [{"bytes": None, "path": "absent.png"}]}]  # fmt: skip
    for split, some in {"train": rows, "validation": [row], "test": [row]}.items():
        pq.write_table(pa.Table.from_pylist(some), tmp_path / f"in/data/{split}-00000-of-00001.parquet")
    summary = PREPARE["geo3k"](str(tmp_path / "in"), str(tmp_path / "out"))
    assert (summary["train"]["rows"], summary["test"]["rows"]) == (2, 1)
    assert any("left out 1 of 4 rows of train: no image" in note for note in summary["notes"])
    assert any("image not found" in note and "absent.png" in note for note in summary["notes"])
    first, second = read(tmp_path / "out/train.parquet")
    (prompt,) = first.pop("prompt")
    assert prompt["role"] == "user" and prompt["content"].startswith("<image>Find x. ")
    assert "<think>" in prompt["content"] and r"\boxed{}" in prompt["content"]
    info = {"split": "train", "index": 0, "question": row["problem"], "answer": row["answer"]}
    assert first == {
        "data_source": "hiyouga/geometry3k",
        "images": row["images"],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": row["answer"]},
        "extra_info": info,
    }
    assert second["images"] == [{"bytes": png(31), "path": None}]
    assert not (tmp_path / "out/validation.parquet").exists()


def test_the_same_words_are_right_and_others_are_not() -> None:
    asked = [
        (" Red.\n", "red", Verdict.RIGHT),
        ("Straße  12", "STRASSE 12", Verdict.RIGHT),
        ("red circle", "red", Verdict.WRONG),
        ("", "red", Verdict.WRONG),
        ("red..", "red", Verdict.WRONG),
        ("red", None, Verdict.UNKNOWN),
    ]
    answers = [Answered(text, truth, "shapes", {}, 3, True) for text, truth, _ in asked]
    for name in ("exact_match", "data_source"):
        with open_scorer(RewardOptions(name=[name]), 1) as scorer:
            scores = scorer.score(answers)
        assert [score.verdict for score in scores] == [verdict for *_, verdict in asked]
