"""What concerns images and would be without effect is refused or said, and a run says which of a vision model's weights learn."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

import forked

pytest.importorskip("torchvision")
WHOLE, TOWER, VISION, TEXT_ADAPTERS = 1_308_992, 158_592, 257_344, 35_328  # weights of posttrain/tiny-vision


def _all(rank: int, size: int, folder: Path, commands: list[list[str]]) -> None:
    from posttrain import cli

    os.chdir(folder)
    for command in commands:
        sys.argv = ["posttrain", *command]
        print(f"$ {' '.join(command)}", flush=True)
        try:
            cli.main()
        except SystemExit as end:
            print(f"code {end.code or 0}", flush=True)


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What each command prints, by the last of its words."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("settings")
    Image.new("RGB", (80, 60), "red").save(folder / "a.png")
    question = [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "red"}]
    for name, more in (("seen", {"images": ["a.png"]}), ("unseen", {}), ("moved", {"images": ["b/a.png"]})):
        (folder / f"{name}.jsonl").write_text((json.dumps({"messages": question, **more}) + "\n") * 2)

    def sft(rows: str, model: str, *options: str) -> list[str]:
        run = [
            f"data.train_files={rows}.jsonl",
            "data.train_batch_size=2",
            "trainer.total_training_steps=1",
            "trainer.device=cpu",
        ]
        run += ["data.cache_dir=cache", f"trainer.default_local_dir=runs/{len(commands)}"]
        return ["sft", f"model={model}", *run, "data.shuffle=false", *options]

    commands: list[list[str]] = []
    for options in (
        ("seen", "tiny-vision", "model.processor_kwargs={max_pixls: 1}"),
        ("seen", "tiny-vision", "model.processor_kwargs={wide: 1}"),
        ("seen", "tiny-vision", "model.processor_kwargs={max_pixels: 3136}"),
        ("seen", "tiny-vision", "model.freeze_vision_tower=true"),
        ("seen", "tiny-vision", "model.freeze_vision_tower=true", "model.freeze_projector=true"),
        ("seen", "tiny-vision", "model.lora_rank=4"),
        ("unseen", "tiny-vision", "trainer.seed=0"),
        ("moved", "tiny-vision", "trainer.seed=1"),
        ("unseen", "tiny", "model.lora_rank=4", "model.lora_vision=true"),
    ):
        commands.append(sft(*options))
    commands.append(["data", "check", "--files", "seen.jsonl", "--tokenizer", "posttrain/tiny-vision"])
    commands.append(["data", "check", "--files", "seen.jsonl", "--tokenizer", "runs/2"])
    forked.start_server()
    group = forked.start(_all, 1, folder, commands, said=folder / "said")
    group.ends([0])
    parts = group.output().split("$ ")[1:]
    return {command[-1]: part for command, part in zip(commands, parts, strict=True)}


def test_a_setting_that_the_processor_does_not_have_is_refused(said):
    wrong, unlike = said["model.processor_kwargs={max_pixls: 1}"], said["model.processor_kwargs={wide: 1}"]
    assert "max_pixls: Qwen2_5_VLProcessor has no such setting. Nearest: max_pixels." in wrong and "code 2" in wrong
    assert "It has crop_size, " in unlike and "tokenizer" not in unlike and "code 2" in unlike
    known = said["model.processor_kwargs={max_pixels: 3136}"]
    assert "the largest has 2" in known and "Warning" not in known and "code 0" in known


def test_an_export_has_the_settings_of_the_processor_that_its_run_had(tmp_path):
    from posttrain.data.images.processor import ImageText
    from posttrain.loops.training_data import make_chat
    from posttrain.models.load import load_processor
    from tiny_vision import write_tiny_vision_model

    model = str(write_tiny_vision_model(tmp_path / "gemma3", "gemma3"))
    chat = make_chat(model, None, None, False, processor_kwargs={"do_pan_and_scan": True})
    assert chat.images is not None
    chat.tokenizer.save_pretrained(tmp_path / "export")
    processor = chat.images.processor
    processor.tokenizer = chat.tokenizer
    processor.save_pretrained(tmp_path / "export")
    kept = ImageText(load_processor(str(tmp_path / "export")))
    plain = ImageText(load_processor(model)).expansion(1200, 300)
    assert kept.expansion(1200, 300) == chat.images.expansion(1200, 300) != plain


def test_a_folder_without_a_processor_is_told_what_to_copy(tmp_path):
    from posttrain import models
    from posttrain.errors import InputError
    from posttrain.models.load import load_processor

    for file in Path(models.__file__).with_name("tiny_vision").iterdir():
        if file.name != "processor_config.json":
            shutil.copy(file, tmp_path)
    with pytest.raises(
        InputError, match=r"no processor of them; copy processor_config\.json or preprocessor_config\.json"
    ):
        load_processor(str(tmp_path))


def test_a_run_counts_the_weights_that_learn(said):
    def learns(option: str) -> str:
        return said[option].partition("memory: ")[2].partition(";")[0]

    assert learns("model.processor_kwargs={max_pixels: 3136}") == f"{WHOLE:,} weights, all trained"
    assert learns("model.freeze_vision_tower=true") == f"{WHOLE:,} weights, {WHOLE - TOWER:,} trained"
    assert learns("model.freeze_projector=true") == f"{WHOLE:,} weights, {WHOLE - VISION:,} trained"
    assert learns("trainer.seed=0") == f"{WHOLE:,} weights, {WHOLE - VISION:,} trained"  # no row has an image
    assert learns("model.lora_rank=4") == f"{WHOLE + TEXT_ADAPTERS:,} weights, {TEXT_ADAPTERS:,} trained"
    beside = "beside what its images take in the vision tower"
    assert beside in said["model.processor_kwargs={max_pixels: 3136}"]
    assert beside not in said["model.freeze_vision_tower=true"] + said["model.lora_rank=4"] + said["trainer.seed=0"]


def test_what_is_amiss_is_said(said):
    noted = "<image> stays text, for the row has no image; if it stands in another column, name that by data.image_key"
    assert noted in said["trainer.seed=0"]
    moved = said["trainer.seed=1"]
    assert (
        "b/a.png does not exist, and " in moved and "/a.png does; move or link it there" in moved and "code 2" in moved
    )
    blind = said["model.lora_vision=true"]
    assert "no effect in this run: model.lora_vision: the model has no vision tower" in blind and "code 0" in blind, (
        blind
    )


def test_a_tokenizer_is_named_as_a_model_is(said):
    for name in ("posttrain/tiny-vision", "runs/2"):
        assert "2 rows, 2 can be used" in said[name] and "code 0" in said[name], said[name]


@pytest.mark.parametrize(("package", "module"), [("torchvision", "torchvision"), ("pillow", "PIL")])
def test_without_a_package_the_command_is_named_that_leaves_torch_as_it_is(package, module, monkeypatch):
    import torch

    from posttrain import extras, models
    from posttrain.data.images.reading import decode
    from posttrain.errors import InputError
    from posttrain.models.load import load_processor
    from posttrain.records import ImageSource

    monkeypatch.setattr(extras, "find_spec", lambda name: None if name == module else "there")
    command = re.escape(f"`pip install torch=={torch.__version__.partition('+')[0]} 'posttrain[images]'`")
    missing = f"the package {package}, which is missing. Install it by {command}"
    with pytest.raises(InputError, match=f"needs {missing}"):
        load_processor(str(Path(models.__file__).with_name("tiny_vision")))
    if module == "PIL":
        with pytest.raises(InputError, match=f"Images need {missing}"):
            decode(ImageSource(data=b""))
