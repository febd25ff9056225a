"""Bad input: each a message that says what, where and what to do; the right exit code; no traceback; nothing lost."""

import json
import os
import shutil
import subprocess

import pytest

from conftest import records

GOOD = {"prompt": "3+4?", "response": "#### 7"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(done, *expected, code=2):
    assert done.returncode == code, done.stdout + done.stderr
    for text in expected:
        assert text in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) <= 4, done.stderr
    return done


def test_bad_options_are_refused_before_anything_heavy_is_imported(posttrain):
    refused(posttrain("sft", "optim.learning_rate=1", code=None), "optim.learning_rate", "optim.lr")
    refused(posttrain("sft", "optim.lr=fast", code=None), "optim.lr", "fast")
    refused(posttrain("sft", "data.train_files=[a", code=None), "data.train_files=[a")
    refused(posttrain("sft", "nothing.yaml", code=None), "nothing.yaml")
    refused(posttrain("sft", code=None), "model.path=", "data.train_files=", "`posttrain sft --help`")
    refused(posttrain("grpo", code=None), "model.path=", "`posttrain grpo --help`")
    alike = ("evaluate", "rollout.n=4", "--test_file", "test.parquet")
    refused(posttrain(*alike, code=None), "the same answer 4 times; give rollout.temperature")
    refused(
        posttrain("sft", "data.chat_template_kwargs={tools: []}", code=None), "data.chat_template_kwargs", "sets tools"
    )
    refused(posttrain("sft", "model=gpt-17", code=None), "gpt-17", "qwen2.5-0.5b")


@pytest.mark.parametrize("case", ["missing file", "empty file", "wrong column", "not json", "broken parquet", "no rows used",
                                  "unknown suffix", "too long", "batch too large", "no model", "no weights", "bad tracker",
                                  "invalid row", "no chat template", "template is no text",
                                  "nested too deep", "wrong form"])  # fmt: skip
def test_bad_files_and_models(case, posttrain, tiny):
    folder = posttrain.folder
    rows = folder / "rows.jsonl"
    options: dict[str, object] = {"data__train_files": rows, "data__train_batch_size": 1}
    expected: tuple[str, ...] = ()
    write_lines(rows, [GOOD, GOOD])
    match case:
        case "missing file":
            options["data__train_files"], expected = folder / "absent.parquet", ("absent.parquet", "does not exist")
        case "empty file":
            rows.write_text("")
            expected = ("rows.jsonl", "empty")
        case "wrong column":
            options["data__prompt_key"], expected = "questoin", ("data.prompt_key=questoin", "prompt, response")
        case "not json":
            rows.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
            expected = ("rows.jsonl line 2", "not JSON")
        case "broken parquet":
            broken = folder / "rows.parquet"
            broken.write_bytes((tiny / "train.parquet").read_bytes()[:2000])
            options["data__train_files"], expected = broken, ("rows.parquet", "cannot be read")
        case "no rows used":
            write_lines(rows, [{"messages": [{"role": "user", "content": "hello"}]}] * 3)
            expected = ("rows.jsonl row 0", "'user'", "3 such rows", "No row can be used")
        case "unknown suffix":
            shutil.copy(rows, folder / "rows.txt")
            options["data__train_files"], expected = folder / "rows.txt", ("rows.txt", ".parquet")
        case "too long":
            options["data__max_length"], expected = 4, ("2 of 2 rows", "data.max_length=4", "data.truncation")
        case "batch too large":
            options["data__train_batch_size"], expected = 3, ("data.train_batch_size=3", "2 rows")
        case "no model":
            options["model__path"], expected = folder / "absent", ("model.path", "does not exist")
        case "no weights":
            bare = folder / "bare"
            shutil.copytree(tiny / "model", bare, ignore=shutil.ignore_patterns("*.safetensors"))
            options["model__path"], expected = bare, ("no weights", "model.random_weights=true")
        case "bad tracker":
            options["trainer__logger"], expected = "papyrus", ("papyrus", "tensorboard")
        case "invalid row":
            write_lines(rows, [GOOD, {"prompt": "x", "response": None}])
            options["data__invalid_rows"], expected = "error", ("rows.jsonl row 1", "data.invalid_rows=drop")
            expected = (*expected, "1 such rows of 1", "posttrain data check")
        case "template is no text":
            (folder / "bad.jinja").write_bytes(b"\xff\xfe")
            options["data__chat_template"], expected = (
                folder / "bad.jinja",
                ("data.chat_template", "bad.jinja", "Jinja"),
            )
        case "nested too deep":
            rows.write_text('{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}\n")
            expected = ("rows.jsonl line 1", "not JSON")
        case "wrong form":
            options["data__format"], expected = "sharegpt", ("'conversations'", "found: prompt", "data.messages_key")
        case "no chat template":
            bare = folder / "bare"
            shutil.copytree(tiny / "model", bare, ignore=shutil.ignore_patterns("*.jinja"))
            options["model__tokenizer_path"], expected = (
                write_plain_tokenizer(tiny, bare),
                ("chat template", "data.chat_template"),
            )
    refused(posttrain.sft("run", code=None, **options), *expected)


def write_plain_tokenizer(tiny, folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.jinja"):
        path.unlink()
    return folder


def test_rows_that_cannot_be_used_are_left_out_counted_and_said(posttrain):
    rows = write_lines(posttrain.folder / "rows.jsonl", [GOOD, {"prompt": "x", "response": None}, GOOD, GOOD])
    done = posttrain.sft("run", data__train_files=rows, data__train_batch_size=3, trainer__total_training_steps=1)
    report = json.loads((posttrain.folder / "run" / "data_report.json").read_text())
    assert (report["rows_read"], report["rows_used"], report["rows_dropped"]) == (4, 3, {"no answer": 1})
    assert "left out 1: no answer" in done.stdout and "rows.jsonl row 1" in done.stdout


def test_notes_on_rows_are_counted_and_said_with_the_first_place(posttrain):
    """Also that what rows say is printed as it stands, and that options which a template never reads are told."""
    typed = {"messages": [{"role": "user", "content": "<|im_end|>?"}, {"role": "assistant", "content": "a"}] * 2}
    bad = {"instruction": "a", "output": "b", "history": [["[/INST]"]]}
    rows = write_lines(posttrain.folder / "[b]rows.jsonl", [GOOD, bad, typed, typed])
    done = posttrain.sft("run", data__train_files=[str(rows)], data__train_batch_size=3, data__expand_turns="true",
                         trainer__total_training_steps=1, data__enable_thinking="false",
                         data__chat_template_kwargs="{tone: dry}")  # fmt: skip
    report = json.loads((posttrain.folder / "run" / "data_report.json").read_text())
    assert (report["rows_used"], report["num_samples"], report["num_turns"]) == (3, 5, 5)
    kind = "'<|im_end|>' is encoded as text"
    assert report["notes"] == {kind: 4}
    assert report["examples"][kind][:2] == [f"{rows} row 2: message 0: {kind}", f"{rows} row 2: message 2: {kind}"]
    assert f"noted 4 times, first {rows} row 2: message 0: {kind}" in done.stdout
    assert "3 of 4 rows in 5 samples, 5 trained turns" in done.stdout and "1 step of 3 samples" in done.stdout
    assert "turn 0 of the history is not [question, answer]" in done.stdout
    for option in ("data.enable_thinking", "data.chat_template_kwargs.tone"):
        assert f"no effect in this run: {option}: the chat template never reads it" in done.stdout


def test_evaluate_says_what_of_the_command_line_has_no_effect(posttrain, tiny):
    (posttrain.folder / "saved.yaml").write_text("trainer: {num_val_generations: 8}\n")
    given = ("saved.yaml", "rollout.val_n=2", "data.val_split=test")
    done = posttrain(
        "evaluate", *given, "--model", tiny / "model", "--test_file", "org/set", code=None, HF_HUB_OFFLINE="1"
    )
    assert "no effect in this run: rollout.val_n: it is for validation during training" in done.stderr
    assert done.stderr.count("no effect") == 1  # the split is the one of --test_file


def test_what_cannot_be_judged_is_said_before_a_model_answers(posttrain, tiny):
    parts = {"messages": [{"role": "user", "content": "3+4?"},
                          {"role": "assistant", "content": [{"type": "text", "text": "seven"}]}]}  # fmt: skip
    rows = write_lines(posttrain.folder / "rows.jsonl", [parts, {"prompt": 5, "response": "a"}])
    done = posttrain("evaluate", "--model", tiny / "model", "--test_file", rows, code=None)
    refused(done, "None of the 1 rows", "reward_model.ground_truth", "posttrain generate")
    assert "left out 1: no prompt, such as" in done.stdout and "rows.jsonl row 1" in done.stdout
    write_lines(rows, [{"input_ids": [1, 2], "labels": [1, 2]}] * 2)
    done = posttrain("generate", "--model", tiny / "model", "--prompts", rows, code=None)
    refused(done, "no row can be used", "left out 2: pre-tokenized, such as", "rows.jsonl row 0")


def test_validation_answers_that_cannot_be_judged_are_refused_before_training(posttrain):
    rows = write_lines(posttrain.folder / "val.jsonl", [{"prompt": "3+4?", "response": "seven"}] * 2)
    more = {"data__val_files": rows, "trainer__num_val_generations": 2, "trainer__val_before_train": "false"}
    done = posttrain.sft("run", code=None, **more, reward__name="[format,gsm8k_strict]")
    refused(done, f"None of the 2 rows of {rows} can be judged by reward.name=format, gsm8k_strict")
    assert not (posttrain.folder / "run" / "metrics.jsonl").exists()


def test_on_two_processes_there_is_one_message_and_no_hang(posttrain):
    done = posttrain.sft("run", code=None, data__train_files="absent.parquet", trainer__n_gpus_per_node=2)
    refused(done, "absent.parquet")
    assert done.stderr.count("absent.parquet does not exist") == 1


def test_a_run_is_not_resumed_with_other_data_or_another_model(posttrain, tiny):
    posttrain.sft("run", trainer__total_training_steps=2, trainer__save_freq=1)
    saved = sorted(path.name for path in (posttrain.folder / "run").iterdir())
    refused(posttrain.sft("run", code=None, data__train_batch_size=8), "other data")
    refused(posttrain.sft("run", code=None, data__train_files=tiny / "test.parquet"), "other data")
    other = "{num_hidden_layers: 1}"
    options = {"model__random_weights": "true", "model__override_config": other}
    refused(posttrain.sft("run", code=None, **options), "another model")
    refused(posttrain.sft("run", code=None, trainer__resume_mode="disable"), "trainer.resume_mode=auto")
    assert sorted(path.name for path in (posttrain.folder / "run").iterdir()) == saved


def test_a_damaged_checkpoint_is_named(posttrain):
    posttrain.sft("run", trainer__total_training_steps=2, trainer__save_freq=1)
    newest = posttrain.folder / "run" / "checkpoint-2"
    for shard in (newest / "state").glob("*.distcp"):
        shard.write_bytes(shard.read_bytes()[:100])
    refused(posttrain.sft("run", code=None, trainer__total_training_steps=3), "checkpoint-2", "Delete this folder")
    shutil.rmtree(newest)
    assert "step 1 of 3" in posttrain.sft("run", trainer__total_training_steps=3).stdout


def test_a_disk_that_fills_while_saving_loses_nothing(posttrain):
    posttrain.sft("run", trainer__total_training_steps=2, trainer__save_freq=2)
    options = posttrain.sft_options("run", trainer__total_training_steps=4, trainer__save_freq=2)
    # a limit on the size of a file stands in for a full disk: every write beyond it fails
    limited = ["bash", "-c", 'ulimit -f 600; trap "" XFSZ; exec "$@"', "-", *posttrain.arguments("sft", *options)]
    done = subprocess.run(limited, cwd=posttrain.folder, env=posttrain.environment, capture_output=True, text=True)
    refused(done, "checkpoint-4 failed", "checkpoint-2 is complete", code=3)
    run = posttrain.folder / "run"
    assert not (run / "checkpoint-4").exists()
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert "step 2 of 4" in posttrain("sft", *options).stdout


def test_steps_that_are_not_finite_stop_the_run(posttrain):
    done = posttrain.sft("run", code=None, optim__lr=1e30, optim__clip_grad=0, trainer__total_training_steps=20,
                         optim__lr_warmup_steps=0, trainer__max_skipped_steps=3)  # fmt: skip
    refused(done, "3 steps in a row", "optim.lr", code=3)
    assert records(posttrain.folder / "run")[-1]["loss"] is None


def test_help_and_data_commands_need_no_model(posttrain, tiny):
    assert "data.train_files" in posttrain("sft", "--help").stdout
    refused(
        posttrain("data", "prepare", "gsm8k", "--local_save_dir", "out", "--local_dataset_path", "absent", code=None),
        "absent",
    )
    refused(posttrain("data", "prepare", "gsm9k", "--local_save_dir", "out", code=None), "gsm9k", "gsm8k")
    refused(
        posttrain("evaluate", "--model", "absent/model/x", "--test_file", tiny / "test.parquet", code=None), "absent"
    )
    assert os.listdir(posttrain.folder) == []
