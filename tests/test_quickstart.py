"""The quickstart's journey, on a few problems: what it writes and says. Its real length is measured in the docs."""

import json

import pytest

from posttrain.errors import InputError
from posttrain.quickstart import journey


def test_the_journey_ends_with_a_table_of_stages_and_says_where_everything_lies(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journey, "NUM_TRAIN", 96)
    monkeypatch.setattr(journey, "NUM_TEST", 24)
    monkeypatch.setattr(journey, "NUM_PROMPTS", 64)
    options = journey.grpo_options
    monkeypatch.setattr(
        journey, "grpo_options", lambda folder, seed: options(folder, seed, "trainer.total_training_steps=2")
    )
    folder = tmp_path / "run"
    journey.quickstart(folder, seed=0)
    results = json.loads((folder / "results.json").read_text())
    assert [stage["stage"] for stage in results["stages"]] == ["before", "after SFT", "after SFT + GRPO"]
    for stage in results["stages"]:
        assert stage["num_problems"] == 24 and 0 <= stage["low"] <= stage["accuracy"] <= stage["high"] <= 1
        lines = [json.loads(line) for line in open(stage["answers"])]
        assert sum(line["verdict"] == "right" for line in lines) == stage["num_correct"]
    assert results["stages"][0]["accuracy"] == 0
    assert results["grpo_gains"].keys() == {"likeliest", "drawn"}
    assert all(gain["low"] <= gain["mean"] <= gain["high"] for gain in results["grpo_gains"].values())
    said = capsys.readouterr().out
    for text in (
        "before",
        "after SFT",
        "95% interval",
        "results.json",
        "Epoch 1: loss=",
        "checkpoint-final",
        "GRPO against SFT alone",
    ):
        assert text in said
    train, test = (
        {json.loads(line)["question"] for line in open(folder / "problems" / f"{split}.jsonl")}
        for split in ("train", "test")
    )
    assert len(train) == 96 and len(test) == 24 and not train & test
    with pytest.raises(InputError, match="holds a quickstart already"):
        journey.quickstart(folder, seed=0)
