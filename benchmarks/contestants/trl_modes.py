"""TRL's SFTTrainer in each mode that trains on CPU. python -m contestants.trl_modes SETTING.json MODE

Every mode gets the micro-batch that was fastest for it on two cores, float32 and no gradient checkpointing; `as-it-comes`
keeps TRL's own choice of all three. `given-labels` is for comparing losses: it takes ids and labels, in the order given.
The others tokenize the conversations themselves, as prompt and completion: the loss is on the completion, which by Qwen's
template is the answer, `<|im_end|>` and the line break after it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer
from transformers.trainer_callback import TrainerCallback
from trl import SFTConfig, SFTTrainer

from contestants.setting import NUM_THREADS, Setting, StepLog, tokenize


@dataclass(frozen=True)
class Mode:
    """How many rows (conversations, or packed blocks of `block_tokens`) go through one forward pass, and TRL's options."""

    rows_per_forward: int
    block_tokens: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


MODES = {
    "one row at a time": Mode(1),
    "padded": Mode(2),
    "padded, grouped": Mode(2, options={"train_sampling_strategy": "group_by_length"}),
    "padding-free": Mode(2, options={"padding_free": True, "max_length": None}),
    "packed bfd": Mode(1, 512, {"packing": True, "packing_strategy": "bfd"}),
    "packed wrapped": Mode(2, 512, {"packing": True, "packing_strategy": "wrapped"}),
    "as-it-comes": Mode(8, options={"gradient_checkpointing": True, "bf16": True}),
    "given-labels": Mode(4, options={"train_sampling_strategy": "sequential"}),
}


class TimedTrainer(SFTTrainer):
    """Adds up loss and real tokens of a step's micro-batches; changes nothing else."""

    loss_sum, num_tokens = 0.0, 0

    def training_step(self, model, inputs, num_items_in_batch=None):
        mask = inputs.get("attention_mask")
        self.num_tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_sum += float(loss)
        return loss


class WriteStep(TrainerCallback):
    def __init__(self, trainer: TimedTrainer, log: StepLog) -> None:
        self.trainer, self.log = trainer, log

    def on_step_end(self, args, state, control, **_):
        self.log.write(state.global_step, self.trainer.loss_sum, self.trainer.num_tokens)
        self.trainer.loss_sum, self.trainer.num_tokens = 0.0, 0


def rows_of_step(setting: Setting, mode: Mode, rows: Dataset, tokenizer: Any) -> int:
    """Conversations of an optimizer step; where TRL packs them, as many blocks as hold about as many tokens."""
    if mode.block_tokens is None:
        return setting.batch_rows
    num_tokens = sum(len(tokenize(tokenizer, row["prompt"] + row["completion"])[0]) for row in rows)
    return round(num_tokens / len(rows) * setting.batch_rows / mode.block_tokens)


def main(setting: Setting, mode: Mode, given_labels: bool) -> None:
    torch.set_num_threads(NUM_THREADS)
    tokenizer = AutoTokenizer.from_pretrained(setting.model)
    rows = Dataset.from_list(setting.conversations()).select_columns(["prompt", "completion"])
    batch_rows = rows_of_step(setting, mode, rows, tokenizer)
    if given_labels:
        pairs = [tokenize(tokenizer, row["prompt"] + row["completion"]) for row in rows]
        rows = Dataset.from_list([{"input_ids": ids, "labels": labels} for ids, labels in pairs])
    options = {"max_length": mode.block_tokens or 4096, "bf16": False, "gradient_checkpointing": False} | mode.options
    config = SFTConfig(
        output_dir=setting.out, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        per_device_train_batch_size=mode.rows_per_forward,
        gradient_accumulation_steps=max(1, round(batch_rows / mode.rows_per_forward)),
        num_train_epochs=setting.num_epochs, learning_rate=setting.lr, lr_scheduler_type="constant", warmup_steps=0,
        adam_beta1=setting.betas[0], adam_beta2=setting.betas[1], adam_epsilon=setting.eps,
        weight_decay=setting.weight_decay, max_grad_norm=setting.clip_grad,
        model_init_kwargs={"dtype": "float32"}, **options,
    )  # fmt: skip
    trainer = TimedTrainer(setting.model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.add_callback(WriteStep(trainer, StepLog(setting)))
    trainer.train()


if __name__ == "__main__":
    main(Setting.read(sys.argv[1]), MODES[sys.argv[2]], given_labels=sys.argv[2] == "given-labels")
