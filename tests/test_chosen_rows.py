"""data.train_max_samples and data.val_max_samples: which rows are used, and what is said of the others."""

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.config.compose import compose
from posttrain.data.batches import choose
from posttrain.distributed.world import World
from posttrain.loops.prompts import describe_prompts, open_prompts, prompt_report
from posttrain.loops.training_data import chat_maker, data_report, describe, open_training_data
from posttrain.loops.validation import _problems
from posttrain.run.progress import Display
from tiny import alone

SILENT = Display(shown=False)


def config(tiny: Path, *options: str, command: str = "sft"):
    rows = [f"data.train_files={tiny / 'train.parquet'}", f"data.val_files={tiny / 'test.parquet'}"]
    where = [f"data.cache_dir={tiny / 'cache'}", f"model.path={tiny / 'model'}", "data.train_batch_size=8"]
    return compose([*rows, *where, *options], command).config


def opened(tiny: Path, *options: str):
    return open_training_data(config(tiny, *options), alone(), SILENT)


def asked(tiny: Path, *options: str, world: World | None = None):
    options_of_run = config(tiny, *options, "rollout.n=2", command="grpo")
    return open_prompts(options_of_run, chat_maker(options_of_run)(), None, world or alone(), SILENT)


def test_the_choice_is_a_function_of_the_seed_alone():
    assert choose(10, None, 0, True).tolist() == choose(10, 10, 0, True).tolist() == list(range(10))
    assert choose(10, 4, 0, False).tolist() == [0, 1, 2, 3]
    chosen = choose(1000, 300, 1, True)
    assert np.array_equal(chosen, choose(1000, 300, 1, True)) and len(set(chosen.tolist())) == 300
    assert np.array_equal(chosen, np.sort(chosen)) and chosen.max() > 900 and chosen.min() < 100
    assert not np.array_equal(chosen, choose(1000, 300, 2, True))
    assert set(choose(1000, 100, 1, True)) <= set(chosen)  # fewer are among more


def test_so_many_rows_are_trained_and_the_others_counted(tiny):
    options = ("data.train_max_samples=20", "data.val_max_samples=5")
    data, every = opened(tiny, *options), opened(tiny)
    assert (len(data.train), len(data.val), data.schedule.steps_per_epoch) == (20, 5, 3)
    assert data.train.rows_N.tolist() == choose(200, 20, 42, True).tolist()
    assert all(np.array_equal(data.train[i].ids_T, every.train[row].ids_T) for i, row in enumerate(data.train.rows_N))
    report = data_report(data)
    told = {key: report[key] for key in ("rows_read", "rows_used", "rows_not_chosen", "rows_dropped", "num_samples")}
    assert told == {"rows_read": 200, "rows_used": 20, "rows_not_chosen": 180, "rows_dropped": {}, "num_samples": 20}
    assert report["val"]["rows_not_chosen"] == 35
    lines = describe(data, config(tiny, *options), alone())
    assert lines[0].startswith("train: 20 of 200 rows")
    assert lines[1] == "  180 more could be used: data.train_max_samples takes 20 of them, chosen by trainer.seed=42"
    assert "could be used" not in " ".join(describe(every, config(tiny), alone()))
    assert data.fingerprint not in (every.fingerprint, opened(tiny, "data.train_max_samples=21").fingerprint)
    assert data.fingerprint != opened(tiny, *options, "trainer.seed=1").fingerprint
    first = opened(tiny, *options, "data.shuffle=false")
    assert first.train.rows_N.tolist() == list(range(20)) and first.val.rows_N.tolist() == list(range(5))


def test_validation_answers_the_rows_that_were_chosen(tiny):
    options = config(tiny, "data.val_max_samples=5", "trainer.num_val_generations=4")
    data = open_training_data(options, alone(), SILENT)
    places = [problem.place for problem in _problems(data, options, 4)]
    assert places == [f"{tiny / 'test.parquet'} row {row}" for row in data.val.rows_N[:4]]


def test_prompts_are_chosen_as_rows_are(tiny):
    data = asked(tiny, "data.train_max_samples=20", "data.val_max_samples=5", "trainer.num_val_generations=3",
                 "trainer.best_metric=val_reward")  # fmt: skip
    rows, val_rows = choose(200, 20, 42, True), choose(40, 5, 42, True)[:3]
    assert [p.place for p in data.train] == [f"{tiny / 'train.parquet'} row {row}" for row in rows]
    assert [p.place for p in data.val] == [f"{tiny / 'test.parquet'} row {row}" for row in val_rows]
    report = prompt_report(data)
    assert (report["rows_read"], report["rows_used"], report["rows_not_chosen"]) == (200, 20, 180)
    lines = describe_prompts(data, config(tiny, "data.train_max_samples=20", command="grpo"), alone())
    assert lines[1] == "  180 more could be used: data.train_max_samples takes 20 of them, chosen by trainer.seed=42"


@pytest.mark.parametrize("expand, samples", [(False, 2), (True, 4)])
def test_a_row_with_several_samples_is_taken_whole(tiny, tmp_path, expand, samples):
    turns = [{"role": role, "content": f"{i}"} for i, role in enumerate(["user", "assistant"] * 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(6)))
    data = opened(tiny, f"data.train_files={tmp_path / 'rows.jsonl'}", "data.val_files=[]", "data.train_max_samples=2",
                  f"data.expand_turns={expand}", "data.train_batch_size=2")  # fmt: skip
    assert len(data.train) == samples and data.train.report.rows_used == 2
    assert data.train.rows_N.tolist() == sorted(choose(6, 2, 42, True).tolist() * (samples // 2))
