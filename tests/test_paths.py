"""Models, rows and checkpoints as tutorials name them on the command line."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import forked
from posttrain.data.sources import find_sources
from posttrain.errors import InputError
from posttrain.models.load import find_model
from tiny import worst_gap

TEMPLATE = (
    "{%- for m in messages %}{{- '<|im_start|>' + m.role + ':\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant:\\n' }}{%- endif %}"
)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """With ./checkpoints/run, a run of four steps that keeps checkpoint-2 and checkpoint-4."""
    forked.start_server()
    folder = tmp_path_factory.mktemp("paths")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        said = posttrain("sft", "--model_path", tiny / "model", "--data_path", tiny / "train.parquet", "--output_dir",
                         "./checkpoints/run", f"data.chat_template={TEMPLATE}", *options(tiny))  # fmt: skip
    assert "finished after 4 steps" in said
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def options(tiny):
    return [f"data.cache_dir={tiny / 'cache'}", "data.train_batch_size=16", "trainer.total_training_steps=4",
            "trainer.save_freq=2", "optim.lr=1e-3"]  # fmt: skip


def posttrain(*arguments, code=0):
    return forked.run(arguments, Path.cwd(), code=code)


def go_on(tiny, run, *more, code=0):
    return posttrain("sft", f"model.path={tiny / 'model'}", f"data.train_files={tiny / 'train.parquet'}",
                     f"trainer.default_local_dir={run}", f"data.chat_template={TEMPLATE}", *options(tiny), *more,
                     code=code)  # fmt: skip


def weights(run):
    return load_file(Path(run) / "checkpoint-final" / "model.safetensors")


def test_a_run_from_a_checkpoint_of_another_equals_it(tiny):
    path = "trainer.resume_from_path=checkpoints/run/checkpoint-2"
    given = ["trainer.resume_mode=resume_path", path]
    assert "resumed from checkpoints/run/checkpoint-2: step 2 of 4" in go_on(tiny, "second", *given)
    assert worst_gap(weights("second"), weights("checkpoints/run")) == 0
    assert [json.loads(line)["step"] for line in open("second/metrics.jsonl")] == [3, 4]
    said = go_on(tiny, "second", *given, code=2)  # it would write over what it did
    assert "second holds checkpoints, such as checkpoint-4" in said and "trainer.resume_mode=auto" in said
    assert "checkpoint-4: step 4 of 4" in go_on(tiny, "second", path)  # by auto the run folder's own come first
    own = ["trainer.resume_mode=resume_path", "trainer.resume_from_path=second/checkpoint-4"]
    assert "there is nothing to train" in go_on(tiny, "second", *own)


@pytest.mark.parametrize("path, message", [
    ("checkpoints/run", "is not a checkpoint to resume from; it holds checkpoint-4, which is one"),
    ("checkpoints/run/checkpoint-final", "Expected a checkpoint-<step> folder of posttrain"),
    ("checkpoints/run/checkpoint-3", "there is no such folder"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_refused_before_rows_are_read(tiny, path, message):
    said = go_on(tiny, "third", "trainer.resume_mode=resume_path", f"trainer.resume_from_path={path}", code=2)
    assert message in said and not Path("third/run.json").exists()


def test_resume_path_without_a_path_is_refused(tiny):
    said = go_on(tiny, "third", "trainer.resume_mode=resume_path", code=2)
    assert "needs trainer.resume_from_path" in said


def test_a_finished_model_is_evaluated_where_it_lies(tiny):
    from transformers import AutoTokenizer

    final = "./checkpoints/run/checkpoint-final"
    assert AutoTokenizer.from_pretrained(final).chat_template == TEMPLATE
    found = posttrain("sft", "--eval_only", "--checkpoint", final, f"data.val_files={tiny / 'test.parquet'}", "--json")
    assert json.loads(found[found.index("{") :])["val_loss"] > 0
    found = posttrain("evaluate", "--model_path", final, "--test_file", tiny / "test.parquet", "--limit", 2,
                      "rollout.max_new_tokens=4", "--json")  # fmt: skip
    assert json.loads(found[found.index("{") :])["num_problems"] == 2
    shown = posttrain("data", "show", "--files", tiny / "train.parquet", "--tokenizer", tiny / "model",
                      "--chat_template", TEMPLATE, "--rows", 1, "--json")  # fmt: skip
    assert "assistant:" in "".join(json.loads(shown)["pieces"])


@pytest.mark.parametrize("path, message", [
    ("checkpoints/rnu", r"checkpoints/rnu does not exist, and checkpoints is a folder here\. Nearest: checkpoints/run\."),
    ("./checkpoints/rnu", r"does not exist\. Nearest: checkpoints/run\."),
    ("checkpoints/run/checkpoint-finl", r"does not exist\. Nearest: checkpoints/run/checkpoint-final\."),
    ("checkpoints/run/checkpoint-2", "is a checkpoint to resume from, not a finished model. That of its run is "
     "checkpoints/run/checkpoint-final"),
    ("checkpoints", "holds no config.json"),
])  # fmt: skip
def test_a_path_that_leads_nowhere_is_not_looked_for_on_the_hub(path, message):
    with pytest.raises(InputError, match=message):
        find_model(path)


def test_a_path_to_a_model_is_taken_and_a_name_on_the_hub_is_left_alone():
    assert find_model("checkpoints/run") == "checkpoints/run/checkpoint-final"
    assert find_model("./checkpoints/run/checkpoint-final") == "./checkpoints/run/checkpoint-final"
    assert find_model("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    (source,) = find_sources(["openai/gsm8k"], "data.train_files")
    assert source.reader == "hub"


def test_a_folder_of_rows_that_is_mistyped_is_not_looked_for_on_the_hub():
    with pytest.raises(InputError, match=r"checkpoints/rnu does not exist.*nearest is checkpoints/run"):
        find_sources(["checkpoints/rnu"], "data.train_files")
