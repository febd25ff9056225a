"""Whole runs on rows with images, as a person starts them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import forked
from conftest import records
from pictures import picture
from tiny_vision import write_tiny_vision_model

ANSWER = "the circle is red"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """train.jsonl: rows with no, one and two images, which lie beside it; and tiny models."""
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    with open(folder / "train.jsonl", "w") as stream:
        for row in range(14):
            names = [f"{row}-{number}.png" for number in range((1, 2, 0)[row % 3])]
            for name in names:
                picture(*rng.integers(30, 120, 2), seed=row).save(folder / name)
            asked = "".join("<image>" for _ in names) + f"which colour is shape {row}"
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
            print(json.dumps({"messages": messages, "images": names}), file=stream)
    for family in ("qwen2_5_vl", "qwen3_vl"):
        write_tiny_vision_model(folder / family, family)
    forked.start_server()
    return folder


def sft(rows: Path, run: Path, size: int = 1, code: int = 0, model: str = "qwen2_5_vl", **options: object) -> str:
    given: dict[str, object] = {
        "model.path": rows / model, "data.train_files": rows / "train.jsonl", "data.cache_dir": rows / "cache",
        "data.train_batch_size": 4, "trainer.total_training_steps": 6, "trainer.save_freq": -1, "optim.lr": 1e-3,
        "trainer.default_local_dir": run, "trainer.val_before_train": False,
    }  # fmt: skip
    given |= {name.replace("__", "."): value for name, value in options.items()}
    return forked.run(["sft", *(f"{name}={value}" for name, value in given.items())], run.parent, size, code)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint-final" / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_vision_model_learns_and_its_export_is_a_model_of_transformers(family, rows, tmp_path):
    said = sft(rows, tmp_path / "run", model=family, data__val_files=rows / "train.jsonl", data__max_tokens_per_gpu=200)
    assert "images: 15, " in said and "14 of 14 rows" in said
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    report = json.loads((tmp_path / "run" / "data_report.json").read_text())
    assert (report["num_images"], report["rows_dropped"]) == (15, {})

    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = tmp_path / "run" / "checkpoint-final"
    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    before = AutoModelForImageTextToText.from_pretrained(rows / family)
    content = [{"type": "image"}, {"type": "text", "text": "which colour is shape 0"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": ANSWER}]
    text = processor.apply_chat_template(messages, tokenize=False)
    inputs = processor(text=[text], images=[Image.open(rows / "0-0.png").convert("RGB")], return_tensors="pt")
    labels = inputs["input_ids"].clone()
    labels[:, :-8] = -100
    with torch.no_grad():
        assert model(**inputs, labels=labels).loss < before(**inputs, labels=labels).loss
    first, last = load_file(rows / family / "model.safetensors"), weights(tmp_path / "run")
    same = [
        name for name in first if "visual" in name and name.endswith("weight") and torch.equal(first[name], last[name])
    ]
    assert not same


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(rows, tmp_path):
    constant = {"optim__lr_scheduler_type": "constant", "optim__lr_warmup_steps": 0}
    sft(rows, tmp_path / "whole", **constant)
    sft(rows, tmp_path / "halves", trainer__total_training_steps=3, **constant)
    sft(rows, tmp_path / "halves", **constant)
    assert losses(tmp_path / "halves") == losses(tmp_path / "whole")
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_two_processes_learn_as_one(rows, tmp_path):
    sft(rows, tmp_path / "one")
    for name, options in (
        ("sharded", {"data__micro_batch_size_per_gpu": 1}),
        ("shared", {"engine__ulysses_sequence_parallel_size": 2}),
        ("unpacked", {"data__packing": False}),
    ):
        sft(rows, tmp_path / name, size=2, **options)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5), name


def test_an_image_that_vanishes_ends_the_run_and_is_named(rows, tmp_path):
    (tmp_path / "0.png").write_bytes((rows / "0-0.png").read_bytes())
    with open(tmp_path / "train.jsonl", "w") as stream:
        for asked, images in (("<image>which", ["0.png"]), ("the longer one goes to the first process " * 9, [])):
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": ANSWER}]
            print(json.dumps({"messages": messages, "images": images}), file=stream)
    options = {
        "data__train_files": tmp_path / "train.jsonl",
        "data__train_batch_size": 2,
        "trainer__total_training_steps": 2,
    }
    sft(rows, tmp_path / "first", **options)
    Image.new("RGB", (99, 33)).save(tmp_path / "0.png")
    assert "0.png had" in sft(rows, tmp_path / "second", code=3, **options)
    (tmp_path / "0.png").unlink()
    said = sft(rows, tmp_path / "third", size=2, code=3, **options)
    assert "rank 1: An image that could be read" in said and "0.png does not exist" in said


def test_images_for_a_text_model_are_refused_and_counted(rows, tiny, tmp_path):
    said = sft(rows, tmp_path / "run", model=tiny / "model", data__train_batch_size=1)
    assert "left out 10: images for a text model" in said


def test_a_vision_model_on_text_alone_leaves_what_sees_as_it_is(rows, tiny, tmp_path):
    text = {"data__train_files": tiny / "train.parquet", "trainer__total_training_steps": 2}
    said = sft(rows, tmp_path / "alone", **text)
    validated = sft(
        rows, tmp_path / "validated", **text, data__val_files=rows / "train.jsonl"
    )  # on rows that have some
    assert all(
        "no row to train on has an image: the vision tower and its projector stay" in s for s in (said, validated)
    )
    assert re.findall(r"memory: .* trained", said) == re.findall(r"memory: .* trained", validated)
    before = load_file(rows / "qwen2_5_vl" / "model.safetensors")
    for after in (weights(tmp_path / "alone"), weights(tmp_path / "validated")):
        assert all(torch.equal(before[name], after[name]) == ("visual" in name) for name in before)


def test_adapters_of_what_sees_stay_as_they_are_where_only_rows_of_validation_have_images(rows, tiny, tmp_path):
    given = {
        "data__train_files": tiny / "train.parquet", "trainer__total_training_steps": 2,
        "model__lora_rank": 4, "model__lora_vision": "true",
    }  # fmt: skip
    found = {}
    for name, val_files in (("text", tiny / "train.parquet"), ("seen", rows / "train.jsonl")):
        sft(rows, tmp_path / name, **given, data__val_files=val_files)
        found[name] = load_file(tmp_path / name / "checkpoint-final" / "adapter" / "adapter_model.safetensors")
    assert all(
        torch.equal(weight, found["text"][name]) for name, weight in found["seen"].items() if "visual" not in name
    )
    moved = [name for name, weight in found["seen"].items() if "visual" in name and "lora_B" in name and weight.any()]
    assert not moved


def test_a_step_without_images_is_shown_as_its_rows_are(rows, tmp_path):
    lines = (rows / "train.jsonl").read_text().splitlines()
    (rows / "two.jsonl").write_text("\n".join([lines[2], lines[0]]) + "\n")  # of text alone; with an image
    asked = ["data", "show", f"--files={rows / 'two.jsonl'}", "--step=0", "--json", f"model.path={rows / 'qwen2_5_vl'}"]
    options = ["data.train_batch_size=1", "data.shuffle=false", f"data.cache_dir={tmp_path}"]
    said = forked.run([*asked, *options], tmp_path)
    (shown,) = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    assert shown["row"] == 0 and "which colour is shape 2" in "".join(shown["pieces"]) and not shown.get("images")


def test_adapters_are_merged_into_what_they_stand_on(rows, tmp_path):
    sft(rows, tmp_path / "run", model__lora_rank=2, model__lora_vision=True, trainer__total_training_steps=2)
    before, after = load_file(rows / "qwen2_5_vl" / "model.safetensors"), weights(tmp_path / "run")
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("visual" in name for name in moved) and any("layers" in name for name in moved)
