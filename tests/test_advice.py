"""What a run shows is said with its numbers: each rule on a course of its own fault, none on healthy ones, and real runs with faults."""

import json
import random
import re
import resource
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

import forked
from conftest import records
from forked import run
from posttrain.config.compose import compose
from posttrain.config.describe import options
from posttrain.distributed.device import ran_out_of_memory
from posttrain.run.advice.advice import EarlierRun, Seen
from posttrain.run.advice.adviser import AT_END, AT_START
from posttrain.run.advice.history import History
from posttrain.run.advice.memory import Needs, does_not_fit, gib, memory_line, out_of_memory

REWARD = '''
def has_mark(data_source, solution_str, ground_truth, extra_info):
    """What fine-tuning teaches at once, and too high a rate destroys."""
    return float(solution_str.count("####") == 1)
'''


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """With a fine-tuned model in `sft`, whose run was healthy."""
    forked.start_server()
    folder = tmp_path_factory.mktemp("advice")
    (folder / "reward.py").write_text(REWARD)
    said = run(
        sft(tiny, folder, "sft", model__path=tiny / "model", optim__lr=3e-3, trainer__total_training_steps=60), folder
    )
    return folder, said


def sft(tiny, folder, name, **more):
    given = {
        "model.path": folder / "sft", "data.train_files": tiny / "train.parquet", "data.cache_dir": tiny / "cache",
        "data.train_batch_size": 16, "trainer.total_training_steps": 30, "trainer.save_freq": -1,
        "trainer.default_local_dir": folder / name, **{key.replace("__", "."): value for key, value in more.items()},
    }  # fmt: skip
    return ["sft", *(f"{key}={value}" for key, value in given.items())]


def advice(folder, name):
    path = folder / name / "advice.jsonl"
    return {line["rule"]: line for line in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


# ---- each rule by itself, on courses with its fault and without

FINE = 7_000_000_000


def seen(history=(), rl=False, num_weights=FINE, options=(), **facts):
    """A run of 100 steps, 20 an epoch; `history` are (phase, {metric: values}), one a step from 1, or with their steps."""
    config = compose(["optim.lr=8e-6" if not rl else "optim.lr=1e-6", *options], "grpo" if rl else "sft").config
    made = History()
    for phase, series in history:
        steps = series.get("steps")
        for name, values in series.items():
            for step, value in zip(steps or range(1, len(values) + 1), values, strict=True):
                if name != "steps":
                    made.log({f"{phase}/{name}": value}, step)
    given = {
        "config": config, "draws_answers": rl, "num_steps": 100, "num_updates": 100, "steps_per_epoch": 20, "vocabulary": 32000,
        "num_weights": num_weights, "num_trained": num_weights, "history": made,
        "rows": {"rows_read": 640, "rows_used": 640, "num_tokens": 64000, "num_trained_tokens": 16000},
    }  # fmt: skip
    return Seen(**{**given, **facts})


def course(*points, num=100, noise=0.05, seed=0):
    """Straight lines through these points, with noise."""
    dice = random.Random(seed)
    at = [i * (len(points) - 1) / (num - 1) for i in range(num)]
    lines = (points[int(x)] + (points[min(int(x) + 1, len(points) - 1)] - points[int(x)]) * (x - int(x)) for x in at)
    return [value + dice.gauss(0, noise) for value in lines]


def training(losses, lr=8e-6, norm=1.0, **more):
    return ("train", {"loss": losses, "lr": [lr] * len(losses), "grad_norm": [norm] * len(losses), **more})


def validation(*values, every=20, first=0):
    return ("val", {"steps": [first + every * i for i in range(len(values))], "val_loss": list(values)})


def accuracy(*shares, half=0.03):
    return ("val", {"steps": [20 * i for i in range(len(shares))], "val_accuracy": list(shares),
                    "val_accuracy_low": [s - half for s in shares], "val_accuracy_high": [s + half for s in shares]})  # fmt: skip


def answers(num=40, **series):
    usual = {"reward_mean": course(0.4, 0.6, num=num), "no_signal_share": 0.4, "entropy": course(0.4, 0.2, num=num, noise=0.01),
             "truncated_share": 0.02, "reward_std": 0.4, "kl": 0.02, "logprob_gap": 0.003, "rewards_unknown": 0}  # fmt: skip
    return (
        "rollout",
        {name: value if isinstance(value, list) else [value] * num for name, value in {**usual, **series}.items()},
    )


EARLIER = EarlierRun(
    "runs/sft", lr=1e-5, uses_adapters=False, imitated=True, val_files=("t.parquet",), accuracy=(0.5, 0.47, 0.53)
)
ON_T = ["data.val_files=t.parquet", "trainer.num_val_generations=100", "trainer.best_metric=val_accuracy"]
FALLING, FLAT = course(1.4, 1.0, 0.9), course(1.2, 1.2)

# rule, a run in which it fires, what it says of that run
FAULTS = [
    ("rate-unusual", seen(options=["optim.lr=1e-3"]), ["optim.lr=0.001 is far above", "7B weights", "5e-06 to 1e-05", "optim.lr=1e-05"]),
    ("rate-unusual", seen(options=["optim.lr=1e-7"]), ["far below", "optim.lr=5e-06"]),
    ("rate-unusual", seen(options=["optim.lr=1e-2", "model.lora_rank=8"]), ["of adapters", "5e-05 to 0.0001"]),
    ("rate-unusual", seen(rl=True, options=["optim.lr=1e-5"]), ["reinforcement learning", "5e-07 to 1e-06"]),
    ("rl-rate", seen(rl=True, earlier=replace(EARLIER, lr=1e-6)), ["optim.lr=1e-06 is not below", "runs/sft", "optim.lr=1e-07"]),
    ("long-warmup", seen(options=["optim.lr_warmup_steps=400"]), ["400 of the 100 updates", "never reaches more than 25%"]),
    ("few-updates", seen(num_updates=5, rows={"rows_used": 160}), ["160 rows in batches of 32 make 5 steps", "data.train_batch_size=1: 160 steps", "total_epochs=5: 100 steps"]),
    ("few-updates", seen(num_updates=9, steps_per_epoch=3, rows={"rows_used": 5}, options=["data.train_batch_size=2", "trainer.total_epochs=3"]),
     ["make 9 steps in 3 epochs", "data.train_batch_size=1: 15 steps", "total_epochs=5: 15 steps"]),
    ("bad-rows", seen(rows={"rows_read": 100, "rows_used": 60}, rows_dropped={"no answer": 40}, options=["data.train_files=a.jsonl"]),
     ["40 of 100 rows (40%)", "40: no answer", "posttrain data check checkpoints/sft/config.yaml"]),
    ("few-trained-tokens", seen(rows={"num_tokens": 10000, "num_trained_tokens": 12}, options=["data.train_files=a.jsonl"]),
     ["12 of 10,000 tokens (0.12%)"]),
    ("rate-too-low", seen([training(FLAT, lr=1e-8)], options=["optim.lr=1e-8", "model.weights_dtype=bfloat16"]),
     ["went from 1.", "does not fall", "by at most about 1e-06", "optim.lr=5e-06", "weights_dtype=float32"]),
    ("rate-too-high", seen([training(course(1.2, 1.0, 3.0), norm=40.0)]), ["it rose from 1.", "100% of the gradients were clipped", "optim.lr=8e-07"]),
    ("rate-too-high", seen([training(course(1.2, 6.0, 0.9))]), ["it rose from 1.", "(step 51)"]),
    ("rate-too-high", seen([("train", {"loss": FLAT, "grad_norm": course(1, 9), "lr": [1e-5] * 100})]), ["gradient grew from 2"]),
    ("rate-too-high", seen([training(FLAT, skipped_steps=[4] * 100)]), ["4 steps were not finite"]),
    ("batch-too-small", seen([training(course(1.2, 1.19, noise=0.3))], options=["data.train_batch_size=2"]),
     ["with 2 rows a step", "data.train_batch_size=32"]),
    ("random-weights", seen([training(course(10.4, 10.4))]), ["begins at 10.4", "ln(32,000) = 10.4"]),
    ("random-weights", seen([training(course(10.4, 10.4))], options=["model.random_weights=true"]), ["model.random_weights=true: the loss"]),
    ("nothing-trained", seen([training(FLAT, norm=0.0)]), ["0 in each of 100 steps", "7,000,000,000 weights"]),
    ("seen-before", seen([training(FALLING), validation(0.01, 0.01)], earlier=EARLIER), ["validation before training is 0.01", "runs/sft"]),
    ("seen-before", seen([training([0.02, 0.01, 0.02])]), ["first 3 steps is 0.017"]),
    ("overfitting", seen([training(course(1.4, 0.2)), validation(1.4, 1.2, 1.25, 1.4)]),
     ["from 1.2 (step 20, the best) to 1.4 (step 60)", "640 rows by heart", "checkpoint-best", "trainer.total_epochs=1", "weight_decay=0.1",
      "early_stopping_patience=2", "model.lora_rank=8 optim.lr=8e-05"]),
    ("overfitting", seen([training(course(1.4, 0.2)), validation(1.2, 1.25, 1.4)], options=["model.lora_rank=64", "optim.weight_decay=0.2"]),
     ["(step 0, the best)", "No step was better", "model.lora_rank=8 (it is 64)"]),
    ("rl-below-start", seen([accuracy(0.5, 0.45, 0.4), answers(entropy=course(0.4, 0.1, num=40, noise=0))], rl=True, options=ON_T,
                            earlier=replace(EARLIER, lr=1e-6)),
     ["fell from 50.0% before training to 40.0% at step 40", "optim.lr=1e-06 is not below", "entropy 0.4 -> 0.1", "kl_coef=0.01"]),
    ("rl-below-start", seen([answers(reward_mean=course(0.6, 0.2, num=40))], rl=True), ["reward_mean fell from 0.5", "optim.lr=1e-07"]),
    ("other-checkpoint", seen([accuracy(0.3)], rl=True, options=ON_T, earlier=EARLIER), ["is 30.0% (at most 33.0%)", "runs/sft", "50.0%"]),
    ("other-checkpoint", seen(rl=True, options=["model.random_weights=true"]), ["model.random_weights=true"]),
    ("no-signal", seen([answers(no_signal_share=0.95, reward_mean=0.01, reward_std=0.01)], rl=True), ["95% of the groups", "all 8 answers", "too hard", "rollout.n=32"]),
    ("no-signal", seen([answers(no_signal_share=0.95, reward_mean=0.9, entropy=0.01)], rl=True), ["entropy is down to 0.01", "clip_ratio_high=0.28"]),
    ("no-signal", seen([answers(no_signal_share=0.95, reward_mean=0.97)], rl=True), ["reward_mean 0.97", "filter_groups=true"]),
    ("truncated", seen([answers(truncated_share=0.4)], rl=True), ["40% of the answers were cut at rollout.max_new_tokens=512", "=1024"]),
    ("kl-high", seen([answers(kl=0.8)], rl=True, options=["algorithm.kl_coef=0.001"]), ["kl is 0.8", "algorithm.kl_coef=0.01 (it is 0.001)"]),
    ("logprob-gap", seen([answers(logprob_gap=0.3)], rl=True, options=["rollout.name=vllm"]), ["0.3", "rollout.name=vllm"]),
    ("unknown-rewards", seen([answers(rewards_unknown=100)], rl=True, options=["data.train_batch_size=32"]), ["100 of about 256 answers", "reward.timeout_seconds=30"]),
]  # fmt: skip

HEALTHY = {
    "falls": seen([training(FALLING), validation(1.4, 1.1, 1.0, 0.95, 0.96)]),
    "falls by little, in noise": seen([training(course(0.92, 0.88, noise=0.08))]),
    "flat at a usual rate: nobody knows why": seen([training(FLAT)]),
    "flat in training, better in validation": seen([training(FLAT, lr=1e-8), validation(1.2, 1.1)], options=["optim.lr=1.1e-6"]),
    "one bad batch": seen([training([*FALLING[:50], 6.0, *FALLING[51:]])]),
    "three bad batches": seen([training([*FALLING[:30], 3.0, *FALLING[31:60], 3.0, 2.0, *FALLING[62:]])]),
    "too short to say": seen([training(course(1.2, 2.0, num=12))]),
    "both rise": seen([training(course(1.2, 1.3)), validation(1.2, 1.25, 1.4)]),
    "validation wavers": seen([training(FALLING), validation(1.2, 1.0, 1.01, 1.0, 1.015)]),
    "goes on from the checkpoint of another run": seen([training(course(0.03, 0.03, num=40, noise=0.01), lr=1e-9, steps=range(61, 101))]),
    "tiny, from random weights": seen([training(course(6.4, 2, 0.3), lr=1e-3)], num_weights=850_000, options=["optim.lr=1e-3"], vocabulary=600),
    "adapters": seen([training(FALLING)], options=["model.lora_rank=16", "optim.lr=2e-4"]),
    "0.5B at 2e-5": seen([training(FALLING)], num_weights=494_000_000, options=["optim.lr=2e-5"]),
    "4 steps that were asked for": seen(num_updates=4, options=["trainer.total_training_steps=4"]),
    "600 rows of 7,473 that were asked for": seen(rows={"rows_read": 7473, "rows_used": 600}),
    "earns more": seen([answers(), accuracy(0.45, 0.5)], rl=True, earlier=EARLIER, options=ON_T),
    "accuracy within its interval": seen([answers(), accuracy(0.5, 0.48)], rl=True, options=ON_T),
    "reward wavers": seen([answers(reward_mean=course(0.5, 0.48, num=40))], rl=True),
    "few steps of a hard start": seen([answers(num=6, no_signal_share=1.0, reward_mean=0.0)], rl=True),
    "answers drawn otherwise than in the earlier run": seen([accuracy(0.3)], rl=True, earlier=replace(EARLIER, val_temperature=1.0), options=ON_T),
    "another test set than the earlier run": seen([accuracy(0.3)], rl=True, earlier=replace(EARLIER, val_files=("u.parquet",)), options=ON_T),
    "adapters, five times the usual rate": seen(rl=True, options=["optim.lr=5e-5", "model.lora_rank=16"]),
    "after SFT with adapters": seen(rl=True, earlier=replace(EARLIER, lr=1e-6, uses_adapters=True)),
}  # fmt: skip

RULES = list(dict.fromkeys([*AT_START, *AT_END]))


def found(run):
    return [advice for rule in RULES if (advice := rule(run)) is not None]


@pytest.mark.parametrize(("rule", "run", "says"), FAULTS, ids=[f"{n}-{rule}" for n, (rule, *_) in enumerate(FAULTS)])
def test_a_rule_fires_on_its_fault_with_the_numbers_of_the_run(rule, run, says):
    (advice,) = [advice for advice in found(run) if advice.rule == rule]
    assert [part for part in says if part not in str(advice)] == [], str(advice)
    assert advice.remedies
    named = {key for remedy in advice.remedies for key in re.findall(r"\b([a-z]+\.[a-z0-9_]+)=", remedy)}
    assert named <= set(options()), named - set(options())


@pytest.mark.parametrize("name", HEALTHY)
def test_nothing_is_said_of_a_healthy_run(name):
    assert [str(advice) for advice in found(HEALTHY[name])] == []


def test_a_model_that_was_destroyed_is_not_told_that_its_prompts_are_too_hard():
    none = answers(no_signal_share=0.99, reward_mean=course(0.4, 0.0, 0.0, 0.0, num=40, noise=0.01), reward_std=0.0)
    run = seen([accuracy(0.5, 0.0), none], rl=True, options=ON_T)
    assert [advice.rule for advice in found(run)] == ["rl-below-start"]


def test_noise_alone_seldom_fires():
    """Of 60 flat or slowly falling losses at a usual rate, none is called too high, too low or too small a batch."""
    said = [
        advice.rule
        for seed in range(60)
        for advice in found(
            seen([training(course(1.0, 1.0 - seed / 200, num=30 + 5 * seed, noise=0.02 + seed / 600, seed=seed))])
        )
    ]
    assert said == []


def test_every_rule_is_tried_and_has_its_section():
    pages = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text()
    sections = set(re.findall(r"^## ([a-z-]+)$", pages, re.MULTILINE))
    tried = {rule for rule, *_ in FAULTS}
    named = {re.match(r"([a-z-]+): ", rule.__doc__)[1] for rule in RULES}
    assert tried == named and named | {"does-not-fit", "out-of-memory"} <= sections


def test_metrics_that_a_kill_cut_short_are_read_as_far_as_they_go(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "phase": "train", "loss": 2.0}\n{"step": 2, "pha')
    assert list(History().read(tmp_path / "metrics.jsonl").of("train/loss")) == [2.0]


# ---- memory

NEEDS = Needs(
    num_weights=7 * 10**9, num_trained=7 * 10**9, num_blocks=28, hidden=3584, inner=18944, shards=4, sharded=True, kept_bytes=4,
    computed_bytes=2, reference=True, tokens=16384, longest=4096,
)  # fmt: skip
OOM = {"place": "step 3, forward and backward", "cause": "CUDA out of memory", "peak_gib": 78.25, "capacity_gib": 80.0,
       "has_own_memory": True, "answering": False}  # fmt: skip


def test_memory_is_what_the_formulas_say():
    assert NEEDS.gradients == 7e9 and NEEDS.averages == 14e9 and NEEDS.copy == 7e9
    assert NEEDS.weights == 7e9 + 2 * (7e9 / 28) * 2
    assert replace(NEEDS, stays_gathered=True).weights == 7e9 + 7e9 * 2
    assert NEEDS.activations == 16384 * 28 * (11 * 3584 + 4 * 18944) * 2
    assert replace(NEEDS, recompute_every=1).activations < NEEDS.activations / 10
    assert replace(NEEDS, param_offload=True, optimizer_offload=True, reference_offload=True).fixed == 1e9
    assert "7,000,000,000 weights, all trained" in memory_line(NEEDS, 80.0) and "of 80.0 GiB" in memory_line(
        NEEDS, 80.0
    )


def test_memory_that_ran_out_says_what_would_fit_nearest_first_and_nothing_that_is_on():
    def keys(*given, needs=NEEDS, **more):
        advice = out_of_memory(needs, compose([*given], "sft").config, **{**OOM, **more})
        named = [key for remedy in advice.remedies for key in re.findall(r"([a-z]+\.[a-z0-9_]+)=", remedy)[:1]]
        assert set(named) <= set(options())
        return named

    every = ["data.max_tokens_per_gpu", "model.enable_gradient_checkpointing", "model.lora_rank", "engine.optimizer_offload",
             "optim.optimizer", "engine.param_offload", "engine.reference_offload", "model.weights_dtype", "data.max_length",
             "engine.ulysses_sequence_parallel_size"]  # fmt: skip
    assert keys() == every
    on = [
        "model.enable_gradient_checkpointing=true",
        "model.enable_activation_offload=true",
        "model.lora_rank=8",
        "engine.optimizer_offload=true",
        "engine.param_offload=true",
    ]
    adapters = replace(
        NEEDS,
        num_trained=10**7,
        reference=False,
        param_offload=True,
        optimizer_offload=True,
        recompute_every=1,
        tokens=4096,
    )
    linear = replace(adapters, num_linear=6 * 10**9)
    assert keys(*on, needs=linear)[0] == "model.load_in_4bit"
    assert keys(*on, needs=adapters) == ["data.max_length", "engine.ulysses_sequence_parallel_size"]
    assert keys("data.micro_batch_size_per_gpu=4")[0] == "data.micro_batch_size_per_gpu"
    assert "data.micro_batch_size_per_gpu" not in keys("data.micro_batch_size_per_gpu=4", "data.packing=false")
    assert not [key for key in keys(has_own_memory=False) if "offload" in key]
    assert keys(capacity_gib=20.0)[0] == "model.lora_rank"  # smaller rows would not help
    assert keys(answering=True)[:2] == ["rollout.batch_size", "rollout.max_new_tokens"]
    gathered = replace(NEEDS, stays_gathered=True)
    assert keys("engine.reshard_after_forward=false", needs=gathered)[2] == "engine.reshard_after_forward"
    coded = replace(NEEDS, averages_in_8bit=True)  # which bfloat16 weights leave as they are
    assert f"weights_dtype=bfloat16: {gib(10.5e9)} less" in str(out_of_memory(coded, compose([], "sft").config, **OOM))
    said = str(out_of_memory(NEEDS, compose([], "sft").config, **OOM))
    assert "(step 3, forward and backward): CUDA out of memory" in said and "used up to 78.2 GiB of 80.0 GiB" in said
    # with 8,192 it were 82.8 GiB
    assert "gradient accumulation" in said and "data.max_tokens_per_gpu=4096: about 73.8 GiB less" in said
    assert "data.max_tokens_per_gpu=8192: about 49.2 GiB less" in str(
        out_of_memory(NEEDS, compose([], "sft").config, **{**OOM, "capacity_gib": None})
    )


def test_a_model_that_cannot_fit_is_told_before_it_is_loaded():
    config = compose([], "sft").config
    assert does_not_fit(NEEDS, config, 80.0, True) is None and does_not_fit(NEEDS, config, None, True) is None
    advice = does_not_fit(NEEDS, config, 24.0, True)
    assert "33.5 GiB, more than the 24.0 GiB" in advice.found and advice.remedies[0].startswith("model.lora_rank=16")


def test_what_memory_errors_look_like():
    assert ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and ran_out_of_memory(MemoryError())
    assert ran_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not ran_out_of_memory(RuntimeError("shapes do not match")) and not ran_out_of_memory(
        ValueError("out of memory")
    )


# ---- real runs with real faults


def test_a_healthy_run_says_what_memory_it_needs_and_nothing_else(folder):
    folder, said = folder
    assert "memory: 852,992 weights, all trained; on each device weights 3.3 MiB, gradients 3.3 MiB" in said
    assert "advice before" not in said and "What this run shows" not in said and advice(folder, "sft") == {}


def test_a_rate_that_is_100_times_too_high_is_told_before_and_after(folder, tiny):
    folder, _ = folder
    said = run(sft(tiny, folder, "high", optim__lr=0.3), folder)
    assert said.index("advice before training: [rate-unusual] optim.lr=0.3") < said.index("What this run shows:")
    assert "[rate-too-high]" in said and "Also rate-unusual, said before" in said
    assert set(advice(folder, "high")) == {"rate-unusual", "rate-too-high"}
    rose = re.search(r"it rose from ([\d.]+) \(step (\d+)\) to ([\d.]+) \(step (\d+)\)", said)
    losses = [r["loss"] for r in records(folder / "high")]
    assert float(rose[3]) == pytest.approx(sorted(losses[int(rose[4]) - 3 : int(rose[4])])[1], rel=1e-3)
    again = run(sft(tiny, folder, "high", optim__lr=0.3), folder)  # goes on from its end, and says nothing twice
    assert "advice before" not in again and "[rate" not in again


def test_a_refused_resume_names_the_options_that_differ(folder, tiny):
    folder, _ = folder
    said = run(sft(tiny, folder, "sft", model__path=tiny / "model", optim__lr=3e-3, trainer__total_training_steps=60,
                   data__train_batch_size=8), folder, code=2)  # fmt: skip
    assert "was trained on other data or other batches" in said
    assert f"Not as in {folder / 'sft' / 'config.yaml'}: data.train_batch_size=8 (16 before)." in said


def test_a_rate_that_is_far_too_low_is_told(folder, tiny):
    folder, _ = folder
    said = run(sft(tiny, folder, "low", optim__lr=1e-8), folder)
    assert "[rate-too-low] The loss went from" in said and "At optim.lr=1e-08 all steps together" in said
    assert set(advice(folder, "low")) == {"rate-too-low"}


def test_eight_rows_learnt_by_heart_are_told_after_the_validation_that_shows_it(folder, tiny):
    folder, _ = folder
    pq.write_table(pq.read_table(tiny / "train.parquet").slice(0, 8), folder / "few.parquet")
    said = run(
        sft(tiny, folder, "heart", optim__lr=3e-3, data__train_files=folder / "few.parquet", data__train_batch_size=8,
            data__val_files=tiny / "test.parquet", trainer__test_freq=8, trainer__total_training_steps=40), folder,
    )  # fmt: skip
    val = {r["step"]: r["val_loss"] for r in records(folder / "heart", "val")}
    best = min(val, key=val.get)
    assert said.count("[overfitting]") == 1 and said.index("[overfitting]") < said.index("step 40: val_loss")
    assert f"from {val[best]:.4g} (step {best}, the best)" in said and "its 8 rows by heart" in said
    assert "data.train_files" not in advice(folder, "heart")["overfitting"]["found"]


def test_reinforcement_learning_that_destroys_its_model_is_told(folder, tiny):
    folder, _ = folder
    given = {
        "model.path": folder / "sft", "data.train_files": tiny / "train.parquet", "data.train_batch_size": 8, "rollout.n": 4,
        "rollout.max_new_tokens": 16, "trainer.total_training_steps": 20, "reward.path": folder / "reward.py",
        "reward.name": "has_mark", "trainer.save_freq": -1, "trainer.sample_freq": -1, "optim.lr": 0.1,
        "trainer.default_local_dir": folder / "rl",
    }  # fmt: skip
    said = run(["grpo", *(f"{key}={value}" for key, value in given.items())], folder)
    assert (
        f"[rl-rate] optim.lr=0.1 is not below the rate of the fine-tuning that this model came from (0.003, {folder / 'sft'})"
        in said
    )
    told = advice(folder, "rl")
    rewards = [r["reward_mean"] for r in records(folder / "rl", "rollout")]
    assert f"reward_mean fell from {sum(rewards[:3]) / 3:.3g} to" in told["rl-below-start"]["found"]
    assert {"rl-rate", "rate-unusual", "rl-below-start"} <= set(told)


def out_of_memory_in_the_second_process(rank, size, arguments):
    from posttrain.engine.engine import Engine

    passes = Engine.forward_backward

    def short(engine, *given):
        if rank == 1 and engine.step == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore lines")
        return passes(engine, *given)

    Engine.forward_backward = short
    forked.command(rank, size, arguments)


def test_a_process_whose_memory_ran_out_says_so_though_it_is_not_the_first(folder, tiny):
    folder, _ = folder
    said = run(sft(tiny, folder, "oom"), folder, 2, 3, out_of_memory_in_the_second_process)
    assert re.search(
        r"rank 1: \[out-of-memory\] Memory ran out \(step 2, \S.*, rank 1\): CUDA out of memory. Tried", said
    ), said
    assert (
        "more lines" not in said
        and "data.max_tokens_per_gpu=" in said
        and "model.enable_gradient_checkpointing=true" in said
    )
    assert json.loads((folder / "oom" / "run.json").read_text())["status"] == "failed"


def with_little_memory(rank, size, arguments):
    used = int(re.search(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, used + 2**29))
    forked.command(rank, size, arguments)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux, to limit a process's memory")
def test_a_model_that_does_not_fit_is_told_before_and_when_memory_runs_out(folder, tiny):
    folder, _ = folder
    large = "{hidden_size: 4096, intermediate_size: 131072}"
    said = run(
        sft(tiny, folder, "large", model__path=tiny / "model", model__random_weights="true", model__override_config=large),
        folder, code=3, begin=with_little_memory,
    )  # fmt: skip
    assert said.index("[does-not-fit] Weights, gradients and AdamW's averages alone take") < said.index(
        "[out-of-memory]"
    )
    assert "loading the model" in said and "offload" not in said.replace("docs/", "")
