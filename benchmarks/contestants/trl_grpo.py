"""TRL's GRPOTrainer on the quickstart's model and prompts. python -m contestants.trl_grpo SETTING.json

Rollouts by transformers' generate; gradient checkpointing off, float32, the whole step's answers in `forwards` forward passes.
"""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import torch
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from contestants.setting import NUM_THREADS

MARK = re.compile(r"#### (-?[0-9]+)")


def right(completions, ground_truth, **_) -> list[float]:
    """1 where the number after the mark is the right one."""
    texts = [completion[0]["content"] for completion in completions]
    found = [MARK.search(text) for text in texts]
    return [float(bool(match) and match[1] == truth) for match, truth in zip(found, ground_truth, strict=True)]


class Timed(GRPOTrainer):
    """Notes how long answering takes; changes nothing."""

    rollout_seconds, num_tokens = 0.0, 0

    def _generate(self, *args, **kwargs):
        started = time.perf_counter()
        out = super()._generate(*args, **kwargs)
        self.rollout_seconds += time.perf_counter() - started
        self.num_tokens += sum(len(ids) for ids in out[1])
        return out


class WriteStep(TrainerCallback):
    def __init__(self, trainer: Timed, file: Path) -> None:
        self.trainer, self.file, self.ended = trainer, file.open("w"), time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        now, trainer = time.perf_counter(), self.trainer
        record = {
            "step_seconds": now - self.ended,
            "rollout_seconds": trainer.rollout_seconds,
            "num_tokens": trainer.num_tokens,
        }
        print(json.dumps(record), file=self.file, flush=True)
        self.ended, trainer.rollout_seconds, trainer.num_tokens = now, 0.0, 0


def main(setting: dict) -> None:
    torch.set_num_threads(NUM_THREADS)
    lines = [json.loads(line) for line in Path(setting["prompts"]).read_text().splitlines()]
    rows = Dataset.from_list([
        {"prompt": [{"role": "user", "content": line["question"]}], "ground_truth": line["answer"].rpartition("#### ")[2]}
        for line in lines
    ])  # fmt: skip
    answers = setting["prompts_a_step"] * setting["answers"]
    config = GRPOConfig(
        output_dir=setting["out"], per_device_train_batch_size=answers // setting["forwards"],
        gradient_accumulation_steps=setting["forwards"], num_generations=setting["answers"],
        max_completion_length=setting["max_new_tokens"], temperature=1.0, top_k=0, beta=0.0, learning_rate=setting["lr"],
        lr_scheduler_type="constant", max_steps=setting["steps"], bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", logging_steps=1000, disable_tqdm=True, use_cpu=True, seed=setting["seed"], adam_beta2=0.99,
    )  # fmt: skip
    trainer = Timed(setting["model"], right, config, train_dataset=rows)
    trainer.add_callback(WriteStep(trainer, Path(setting["out"]) / "steps.jsonl"))
    trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
