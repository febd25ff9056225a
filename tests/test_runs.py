"""Whole runs, as a person starts them: what they write, and how they survive being stopped."""

import json
import os
import signal
import subprocess
import time

import pytest
import torch
from safetensors.torch import load_file

from conftest import Command, records
from tiny import worst_gap


def weights(run, export="checkpoint-final"):
    return load_file(run / export / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """A run of two epochs that nobody disturbed."""
    command = Command(tiny, tmp_path_factory.mktemp("finished"))
    done = command.sft("run", data__val_files=tiny / "test.parquet", trainer__total_training_steps=None,
                       trainer__total_epochs=2, trainer__save_freq=5, trainer__test_freq=10,
                       trainer__num_val_generations=8, rollout__max_new_tokens=8, trainer__logger="[console,tensorboard]",
                       trainer__project_name="tests", trainer__experiment_name="two-epochs")  # fmt: skip
    return command.folder / "run", done


def test_a_run_says_and_writes_what_it_did(finished):
    run, done = finished
    lines = done.stdout.splitlines()
    assert any(line.startswith("Epoch 1: loss=") for line in lines)
    assert any(line.startswith("Epoch 2: loss=") for line in lines)
    assert (
        "200 of 200 rows" in done.stdout and "checkpoint-final" in done.stdout and "posttrain evaluate" in done.stdout
    )
    state = json.loads((run / "run.json").read_text())
    assert (state["status"], state["step"], state["total_steps"]) == ("finished", 26, 26)
    train = records(run)
    assert [r["step"] for r in train] == list(range(1, 27))
    assert train[-1]["loss"] < train[0]["loss"] - 1
    for key in ("loss", "grad_norm", "lr", "epoch", "num_tokens", "num_trained_tokens", "tokens_per_second", "mfu",
                "step_seconds", "data_wait_seconds", "save_wait_seconds", "peak_memory_gib", "skipped_steps"):  # fmt: skip
        assert all(isinstance(r[key], int | float) for r in train), key
    assert [r["step"] for r in records(run, "val")] == [0, 10, 20, 26]
    assert {"val_loss", "val_accuracy", "val_accuracy_low", "val_accuracy_high"} <= records(run, "val")[0].keys()
    report = json.loads((run / "data_report.json").read_text())
    assert (report["rows_read"], report["rows_used"], report["rows_dropped"]) == (200, 200, {})
    assert sum(r["num_trained_tokens"] for r in train) == 2 * report["num_trained_tokens"]
    assert sum(r["num_tokens"] for r in train) == 2 * report["num_tokens"]
    assert list(run.glob("tensorboard/events*"))


def test_the_tail_of_the_data_is_used(finished):
    steps = [r["num_trained_tokens"] for r in records(finished[0])]
    assert steps[12] < min(steps[:12])  # 200 rows in batches of 16 leave 8


def test_retention_keeps_the_newest_checkpoints(finished):
    kept = sorted(path.name for path in finished[0].glob("checkpoint-*"))
    assert kept == ["checkpoint-25", "checkpoint-26", "checkpoint-best", "checkpoint-final"]


def test_the_export_loads_in_transformers_with_template_and_end_token(finished, tiny):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished[0] / "checkpoint-final"
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.architectures == ["Qwen2ForCausalLM"]
    tokenizer, before = (AutoTokenizer.from_pretrained(path) for path in (folder, tiny / "model"))
    assert tokenizer.chat_template == before.chat_template
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == model.generation_config.eos_token_id
    started = AutoModelForCausalLM.from_pretrained(tiny / "model").state_dict()
    assert all(not torch.equal(weight, started[name]) for name, weight in model.state_dict().items())


def test_eval_only_gives_the_validation_loss_of_the_run(finished, posttrain):
    run, _ = finished
    best = min(records(run, "val"), key=lambda r: r["val_loss"])
    found = json.loads(posttrain("sft", "--eval_only", "--checkpoint", run, "--json").stdout)
    assert found["val_loss"] == pytest.approx(best["val_loss"], rel=1e-5)


def test_evaluate_and_generate_write_their_answers(finished, posttrain, tiny):
    run, _ = finished
    found = json.loads(
        posttrain("evaluate", "--model_path", run, "--test_file", tiny / "test.parquet", "--json").stdout
    )
    assert found["num_problems"] == 40 and 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1
    lines = [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert len(lines) == 40 and sum(line["verdict"] == "right" for line in lines) == found["num_correct"]
    done = posttrain("generate", "--model", run / "checkpoint-final", "--num_samples", "5")
    samples = (run / "samples" / "step-26.jsonl").read_text().splitlines()
    assert len(samples) == 5 and "5 samples" in done.stdout


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_an_epoch_resumes_bit_for_bit(finished, posttrain, tiny):
    run, _ = finished
    options = posttrain.sft_options(
        "killed", trainer__total_training_steps=None, trainer__total_epochs=2, trainer__save_freq=5,
        trainer__test_freq=10, data__val_files=tiny / "test.parquet",
    )  # fmt: skip
    process = subprocess.Popen(posttrain.arguments("sft", *options), cwd=posttrain.folder, env=posttrain.environment)
    killed = posttrain.folder / "killed"
    wait_for(lambda: (killed / "checkpoint-15").exists(), process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoint-final").exists()
    done = posttrain("sft", *options)
    assert "resumed from" in done.stdout
    assert [r["step"] for r in records(killed)] == list(range(1, 27))
    assert [r["loss"] for r in records(killed)] == [r["loss"] for r in records(run)]
    assert [r["grad_norm"] for r in records(killed)] == [r["grad_norm"] for r in records(run)]
    found, expected = weights(killed), weights(run)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_saves_says_how_to_go_on_and_does(posttrain, number, code):
    options = posttrain.sft_options("stopped", trainer__total_training_steps=40)
    process = subprocess.Popen(
        posttrain.arguments("sft", *options), cwd=posttrain.folder, env=posttrain.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    run = posttrain.folder / "stopped"
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(records(run)) >= 2, process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, out + err
    assert "saved" in err and "Traceback" not in err
    state = json.loads((run / "run.json").read_text())
    assert state["status"] == "stopped" and 2 <= state["step"] < 40
    assert (run / f"checkpoint-{state['step']}").exists() and not (run / "checkpoint-final").exists()
    assert f"step {state['step']} of 40" in posttrain("sft", *options).stdout
    assert [r["step"] for r in records(run)] == list(range(1, 41))


@pytest.mark.slow
def test_two_processes_train_as_one_however_they_are_started(posttrain):
    posttrain.sft("one")
    posttrain.sft("two", trainer__n_gpus_per_node=2)
    options = posttrain.sft_options("torchrun", data__micro_batch_size_per_gpu=3)
    torchrun = [os.path.join(os.path.dirname(posttrain.arguments()[0]), "torchrun"), "--nproc_per_node=2"]
    subprocess.run([*torchrun, "-m", "posttrain", "sft", *options], cwd=posttrain.folder, env=posttrain.environment,
                   check=True, capture_output=True)  # fmt: skip
    one = posttrain.folder / "one"
    for name in ("two", "torchrun"):
        run = posttrain.folder / name
        assert json.loads((run / "run.json").read_text())["world_size"] == 2
        assert records(run)[0]["loss"] == pytest.approx(records(one)[0]["loss"], rel=1e-6)
        assert [r["loss"] for r in records(run)] == pytest.approx([r["loss"] for r in records(one)], rel=1e-4)
        assert [r["num_tokens"] for r in records(run)] == [r["num_tokens"] for r in records(one)]
        assert worst_gap(weights(run), weights(one)) < 1e-3


def test_gradients_can_be_dumped_and_do_not_depend_on_processes(posttrain):
    posttrain.sft("a", "--dump_gradients", "one.safetensors")
    posttrain.sft("b", "--dump_gradients", "two.safetensors", trainer__n_gpus_per_node=2)
    one, two = (load_file(posttrain.folder / f"{name}.safetensors") for name in ("one", "two"))
    assert len(one) > 10 and worst_gap(two, one) < 1e-5


def test_early_stopping_keeps_the_best_model(posttrain, tiny):
    done = posttrain.sft("early", data__val_files=tiny / "test.parquet", optim__lr=0.3, optim__lr_scheduler_type="constant",
                         optim__lr_warmup_steps=0, trainer__total_training_steps=30, trainer__test_freq=1,
                         trainer__early_stopping_patience=2)  # fmt: skip
    run = posttrain.folder / "early"
    state, losses = json.loads((run / "run.json").read_text()), [r["val_loss"] for r in records(run, "val")]
    assert "stopping early" in done.stdout and state["step"] < 30
    assert state["best_step"] == losses.index(min(losses))
    assert len(losses) - 1 - losses.index(min(losses)) == 2


def wait_for(condition, process, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended too early"
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.02)


def test_bfloat16_compute_keeps_float32_weights(posttrain):
    posttrain.sft("half", model__dtype="bfloat16", trainer__total_training_steps=2)
    posttrain.sft("whole", trainer__total_training_steps=2)
    half, whole = posttrain.folder / "half", posttrain.folder / "whole"
    assert [r["loss"] for r in records(half)] == pytest.approx([r["loss"] for r in records(whole)], rel=1e-2)
    assert records(half)[0]["loss"] != records(whole)[0]["loss"]
    found, expected = ({n: w for n, w in weights(run).items() if w.dim() > 1} for run in (half, whole))
    assert all(w.dtype == torch.float32 and not torch.equal(w, w.bfloat16().float()) for w in found.values())
    assert worst_gap(found, expected) < 0.1
