"""Options that are fine one by one and cannot work together, said before anything is loaded."""

from __future__ import annotations

from posttrain.config.schema import Config
from posttrain.errors import InputError


def check_grpo(config: Config) -> None:
    """Raise InputError for options that a model cannot learn from its own answers with."""
    rollout, algorithm, data = config.rollout, config.algorithm, config.data
    if config.rollout.n == 1:
        raise InputError(
            "rollout.n=1: an answer is compared with the others to the same prompt, and a group of one has none. Give 2 or more; 8 "
            "is usual."
        )
    if rollout.temperature == 0:
        raise InputError(
            "rollout.temperature=0 gives the same answer again and again, so that no group has anything to learn from. 1 is usual."
        )
    if algorithm.overlong_buffer_tokens > rollout.max_new_tokens:
        raise InputError(
            f"algorithm.overlong_buffer_tokens={algorithm.overlong_buffer_tokens} is more than "
            f"rollout.max_new_tokens={rollout.max_new_tokens}, the whole answer. Give a part of it, or 0 for no such penalty."
        )
    if (algorithm.ppo_mini_batch_size or 0) > data.train_batch_size:
        raise InputError(
            f"algorithm.ppo_mini_batch_size={algorithm.ppo_mini_batch_size} is more than data.train_batch_size={data.train_batch_size}; "
            "both count prompts."
        )
    if data.val_files and config.trainer.best_metric == "val_loss":
        raise InputError(
            "trainer.best_metric=val_loss: there is no validation loss without given answers. Choose val_accuracy or val_reward, with "
            "trainer.num_val_generations, or leave out data.val_files to validate nothing."
        )
