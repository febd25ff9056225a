"""GRPO runs as a person starts them: the same gradients in any layout, current weights, resuming, what they say and write."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import forked
from conftest import records
from forked import run
from posttrain.config.checks import check_grpo
from posttrain.config.compose import compose
from posttrain.errors import InputError, RunError
from tiny import worst_gap

REWARD = '''
def share_of_digits(data_source, solution_str, ground_truth, extra_info):
    """More digits, more reward: something that a random model can learn in a few steps."""
    return sum(c.isdigit() for c in solution_str) / max(len(solution_str), 1)
'''


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """With a short SFT run to go on from, a reward, and given answers to the first step's prompts."""
    forked.start_server()
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "reward.py").write_text(REWARD)
    options = [
        f"data.train_files={tiny / 'train.parquet'}", f"data.cache_dir={folder / 'cache'}", f"model.path={tiny / 'model'}",
        f"trainer.default_local_dir={folder / 'sft'}", "trainer.total_training_steps=3", "optim.lr=1e-3",
    ]  # fmt: skip
    run(["sft", *options], folder)
    return folder


def options(tiny, folder, name, **more):
    given = {
        "algorithm.adv_estimator": "grpo", "model.path": folder / "sft", "data.train_files": tiny / "train.parquet",
        "data.train_batch_size": 8, "rollout.n": 4, "rollout.max_new_tokens": 12, "trainer.total_training_steps": 4,
        "reward.path": folder / "reward.py", "reward.name": "share_of_digits", "optim.lr": 3e-3, "trainer.save_freq": -1,
        "trainer.default_local_dir": folder / name,
    }  # fmt: skip
    given |= {key.replace("__", "."): value for key, value in more.items()}
    return ["grpo", *(f"{key}={value}" for key, value in given.items() if value is not None)]


@pytest.fixture(scope="module")
def finished(tiny, folder):
    """Six steps of full fine-tuning, with validation."""
    said = run(
        options(tiny, folder, "full", trainer__total_training_steps=6, data__val_files=tiny / "test.parquet",
                trainer__test_freq=3, trainer__num_val_generations=10, rollout__val_n=4, rollout__val_temperature=1.0,
                trainer__sample_freq=3, trainer__save_freq=3),
        folder,
    )  # fmt: skip
    return folder / "full", said


def test_a_run_from_an_sft_folder_earns_more_and_says_so(finished):
    path, said = finished
    rollout, train = records(path, "rollout"), records(path)
    assert [r["step"] for r in rollout] == [r["step"] for r in train] == [1, 2, 3, 4, 5, 6]
    assert rollout[-1]["reward_mean"] > rollout[0]["reward_mean"] + 0.05
    keys = {
        "reward_mean", "reward_std", "no_signal_share", "truncated_share", "kl", "clip_share", "entropy", "logprob_gap",
        "rewards_unknown", "rollout_seconds", "train_seconds", "reward_seconds", "answer_tokens_mean",
        "rollout_tokens_per_second",
    }  # fmt: skip
    assert all(keys <= r.keys() for r in rollout)
    assert all(0 <= r["truncated_share"] <= 1 and r["rewards_unknown"] == 0 and r["kl"] is None for r in rollout)
    assert all(0 < r["entropy"] < math.log(600) and r["clip_share"] == 0 for r in rollout)
    val = records(path, "val")
    assert [r["step"] for r in val] == [0, 3, 6]
    assert all({"val_accuracy", "val_accuracy_low", "val_pass_at_2", "val_pass_at_4"} <= r.keys() for r in val)
    assert "6 steps of 8 prompts x 4 answers of at most 12 tokens, 6 updates" in said
    assert "reward " in said and (path / "checkpoint-final" / "model.safetensors").exists()
    lines = [json.loads(line) for line in (path / "samples" / "step-3.jsonl").read_text().splitlines()]
    assert len(lines) == 32 and len({line["row"] for line in lines}) == 8
    assert all(len(line["ids"]) == len(line["logprobs"]) <= 12 for line in lines)
    assert json.loads((path / "run.json").read_text())["status"] == "finished"


def test_rollouts_have_the_log_probabilities_of_the_current_weights(finished, tiny, folder):
    full = records(finished[0], "rollout")
    run(
        options(
            tiny, folder, "lora", model__lora_rank=4, model__lora_alpha=16, model__lora_dropout=0.3, optim__lr=3e-2
        ),
        folder,
    )
    lora = records(folder / "lora", "rollout")
    assert max(r["logprob_gap"] for r in full + lora) < 1e-4
    assert lora[-1]["reward_mean"] > lora[0]["reward_mean"]
    assert (folder / "lora" / "checkpoint-final" / "adapter" / "adapter_model.safetensors").exists()


def test_stale_weights_show_in_the_gap(tiny, folder):
    run(options(tiny, folder, "stale", model__lora_rank=4, optim__lr=3e-2), folder, begin=stale)
    assert records(folder / "stale", "rollout")[-1]["logprob_gap"] > 1e-2


def stale(rank, size, arguments):
    from posttrain.rollout.transformers import TransformersRollout

    TransformersRollout.take = lambda self, weights: None
    forked.command(rank, size, arguments)


def test_an_engine_that_fails_on_one_process_ends_the_run_with_its_message(tiny, folder):
    """The other one gathers weights with it until the last, and does not wait for ever."""
    said = run(options(tiny, folder, "refused"), folder, size=2, code=3, begin=refusing)
    assert "the server has no memory for w" in said


def refusing(rank, size, arguments):
    from posttrain.rollout.transformers import TransformersRollout

    def take(rollout, weights):
        name, _ = next(iter(weights))
        raise RunError(f"the server has no memory for w {name}")

    if rank:
        TransformersRollout.take = take
    forked.command(rank, size, arguments)


def test_a_resumed_run_equals_an_undisturbed_one_bit_for_bit(finished, tiny, folder):
    path, _ = finished
    run(options(tiny, folder, "resumed", trainer__total_training_steps=3, trainer__sample_freq=3), folder)
    run(options(tiny, folder, "resumed", trainer__total_training_steps=6, trainer__sample_freq=3), folder)
    expected = weights(path)
    assert weights(folder / "resumed").keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(folder / "resumed").items())
    assert [told(r) for r in records(folder / "resumed", "rollout")] == [told(r) for r in records(path, "rollout")]
    assert answers(folder / "resumed", 6) == answers(path, 6)
    other = options(tiny, folder, "resumed", trainer__total_training_steps=9, algorithm__clip_ratio_high=0.3)
    assert "in GRPO also reward, algorithm, tools and sampling" in run(other, folder, code=2)


def test_two_processes_give_the_same_answers_also_after_resuming(tiny, folder):
    """At a rate so low that rounding stays rounding: AdamW makes much of small gradients."""
    slow = {"optim__lr": 1e-5, "trainer__sample_freq": 1}
    run(options(tiny, folder, "one", **slow), folder)
    run(options(tiny, folder, "two", **slow, trainer__total_training_steps=2), folder, size=2)
    run(options(tiny, folder, "two", **slow), folder, size=2)
    found, expected = ([told(r) for r in records(folder / name, "rollout")] for name in ("two", "one"))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert all(answers(folder / "two", step) == answers(folder / "one", step) for step in (1, 2, 3, 4))
    assert worst_gap(weights(folder / "two"), weights(folder / "one")) < 1e-4


def told(record):
    return [record[key] for key in ("reward_mean", "entropy", "truncated_share")]


def weights(path: Path):
    return load_file(path / "checkpoint-final" / "model.safetensors")


def answers(path: Path, step: int):
    lines = map(json.loads, (path / "samples" / f"step-{step}.jsonl").read_text().splitlines())
    return [(line["row"], line["ids"]) for line in lines]


LAYOUTS = {
    "two processes": (2, {}),
    "rows shared": (2, {"engine__ulysses_sequence_parallel_size": 2}),
    "one answer at a time": (1, {"data__micro_batch_size_per_gpu": 1}),
    "unpacked": (1, {"data__packing": "false"}),
    "few tokens": (2, {"data__max_tokens_per_gpu": 128}),
}
LOSSES = {
    "grpo": {
        "algorithm__kl_coef": 0.1,
        "algorithm__entropy_coef": 0.01,
        "algorithm__loss_agg_mode": "seq-mean-token-mean",
    },
    "gspo": {"algorithm__policy_loss": "gspo", "algorithm__ppo_mini_batch_size": 4, "algorithm__adv_estimator": "rloo"},
}


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_of_given_answers_do_not_depend_on_the_layout(finished, tiny, folder, loss):
    """The answers of a step that a run wrote, by the policy that another run begins with."""
    given = finished[0] / "samples" / "step-3.jsonl"

    def gradients(name, size=1, **layout):
        file = folder / f"{name}.safetensors"
        more = ["--completions", given, "--dump_gradients", file]
        run([*options(tiny, folder, f"{loss}-{name}", **LOSSES[loss], **layout), *more], folder, size)
        return load_file(file)

    expected = gradients("alone")
    assert sum(float(g.norm()) for g in expected.values()) > 1e-3
    for name, (size, layout) in LAYOUTS.items():
        assert worst_gap(gradients(name, size, **layout), expected) < 1e-4, name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rollout__n": 1}, "a group of one has none"),
        ({"rollout__temperature": 0}, "the same answer again and again"),
        ({"data__max_prompt_length": 5}, "more than data.max_prompt_length = 5"),
        ({"algorithm__ppo_mini_batch_size": 9}, "both count prompts"),
        ({"algorithm__overlong_buffer_tokens": 13}, "the whole answer"),
        ({"data__max_tokens_per_gpu": 11}, "does not hold the longest prompt"),
        ({"data__max_prompt_length": 5, "data__truncation": "drop"}, "no row can be asked"),
        ({"reward__name": "share_of_digit"}, "share_of_digits"),
    ],
    ids=str,
)
def test_wrong_options_are_said_before_a_model_is_loaded(tiny, folder, changes, said):
    assert said in run(options(tiny, folder, "wrong", **changes), folder, code=2)
    assert not list((folder / "wrong").glob("checkpoint-*"))


def test_a_validation_loss_is_not_there_to_watch():
    watching_loss = compose(["data.val_files=v.jsonl", "trainer.best_metric=val_loss"], "grpo").config
    with pytest.raises(InputError, match="Choose val_accuracy or val_reward"):
        check_grpo(watching_loss)


def test_everything_at_once(tiny, folder):
    """Two updates a step twice over, filtering with refills, shaping, KL in the reward, dual clip: the numbers stay finite."""
    said = run(
        options(tiny, folder, "all", optim__lr=1e-4, algorithm__ppo_mini_batch_size=4, algorithm__ppo_epochs=2, algorithm__dual_clip=3.0,
                algorithm__filter_groups="true", algorithm__max_num_gen_batches=2, algorithm__overlong_buffer_tokens=6,
                algorithm__kl_coef=0.01, algorithm__kl_in="reward", algorithm__kl_type="k1", rollout__top_p=0.9,
                rollout__temperature=0.8, algorithm__policy_loss="cispo", algorithm__mask_truncated="true"),
        folder, size=2,
    )  # fmt: skip
    assert (
        "16 updates of the weights" in said
        and "the divergence from a copy of the model that the run begins with" in said
    )
    rollout = records(folder / "all", "rollout")
    assert len(rollout) == 4 and all(math.isfinite(r["reward_mean"]) for r in rollout)
    assert 0 < rollout[-1]["kl"] < 3 and max(r["logprob_gap"] for r in rollout) < 1e-4


def test_answers_without_a_known_reward_are_counted_and_not_learnt_from(tiny, folder):
    (folder / "moody.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    if len(solution_str) % 2: raise ValueError('odd')\n    return float(len(solution_str))\n"
    )
    changes = {"reward__path": folder / "moody.py", "reward__name": "compute_score", "trainer__total_training_steps": 2}
    validation = {
        "data__val_files": tiny / "test.parquet",
        "trainer__num_val_generations": 16,
        "rollout__val_temperature": 1.0,
        "trainer__best_metric": "val_reward",
    }
    said = run(options(tiny, folder, "moody", **changes, **validation), folder)
    val = records(folder / "moody", "val")
    assert all(0 < r["val_unknown"] < 16 and r["val_reward"] > 1 for r in val)
    assert f"validation: {val[0]['val_unknown']} of 16 answers could not be judged, such as: compute_score: " in said
    found = records(folder / "moody", "rollout")
    assert all(0 < r["rewards_unknown"] < 32 and r["reward_mean"] > 1 for r in found)
    (folder / "broken.py").write_text("def compute_score(**given):\n    return 'much'\n")
    changes = {
        "reward__path": folder / "broken.py",
        "reward__name": "compute_score",
        "trainer__total_training_steps": 2,
    }
    said = run(options(tiny, folder, "broken", **changes, **validation), folder, code=3)
    assert "validation: none of the 16 answers could be judged; the first: compute_score: " in said
    assert all(r["val_accuracy"] is None and r["val_unknown"] == 16 for r in records(folder / "broken", "val"))
    assert "step 1: 32 of 32 answers could not be judged" in said and "much" in said


def test_a_refused_run_leaves_the_one_in_its_folder_as_it_was(tiny, folder):
    run(options(tiny, folder, "kept", trainer__total_training_steps=1), folder)
    kept = {name: (folder / "kept" / name).read_text() for name in ("config.yaml", "run.json", "metrics.jsonl")}
    run(options(tiny, folder, "kept", trainer__total_training_steps=2, rollout__top_p=0.5), folder, code=2)
    assert {name: (folder / "kept" / name).read_text() for name in kept} == kept
    said = run(options(tiny, folder, "kept", trainer__total_training_steps=1), folder)
    assert "there is nothing to train" in said


def test_a_run_that_learns_nothing_says_so_and_keeps_its_weights(tiny, folder):
    (folder / "same.py").write_text("def compute_score(**given):\n    return 0.7\n")
    changes = {"reward__path": folder / "same.py", "reward__name": "compute_score", "trainer__total_training_steps": 2,
               "data__train_max_samples": 8}  # fmt: skip
    said = run(options(tiny, folder, "same", **changes), folder)
    assert "the weights did not move" in said and "Epoch 1: no step changed the weights" in said
    sft, same = (load_file(folder / name / "checkpoint-final" / "model.safetensors") for name in ("sft", "same"))
    assert all(torch.equal(weight, same[name]) for name, weight in sft.items())


def test_answers_may_call_tools_and_what_tools_say_is_not_learnt(tiny, folder):
    """A template that shows the model a call in the prompt, and a reward for whatever is written: the run goes through all of it."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+{n}"}], "reward_model": {"ground_truth": str(2 * n)}}
        for n in range(16)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = {
        "data__train_files": folder / "sums.jsonl", "tools__functions": "[calculator]", "tools__max_turns": 2,
        "data__chat_template": Path(__file__).parent / "tool_template.jinja", "trainer__sample_freq": 1,
        "rollout__max_new_tokens": 24, "trainer__total_training_steps": 2,
    }  # fmt: skip
    run(options(tiny, folder, "tools", **more), folder)
    found = records(folder / "tools", "rollout")
    assert all(r["tool_trajectories"] == 32 and r["tool_turns"] >= 32 and r["logprob_gap"] < 1e-4 for r in found)
    assert "calculator" in (folder / "tools" / "config.yaml").read_text()
