"""Options that someone chose and that have no effect in this run, each with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from posttrain.config.arguments import COMMAND_LINE, DEFAULT, DEFAULT_OF_COMMAND, DEFAULT_OF_OTHER
from posttrain.config.describe import default_of
from posttrain.config.schema import (
    BUILT_IN_REWARDS,
    AlgorithmOptions,
    Config,
    DataOptions,
    RewardOptions,
    TrainerOptions,
    VLLMOptions,
)


def options_without_effect(config: Config, origins: dict[str, str], command: str | None = None) -> list[dict[str, str]]:
    """{key, reason} of each in the command, sft, grpo or, None, one that trains nothing. A default written out in a file, as in a
    run's own config.yaml, is nobody's choice."""

    def was_chosen(key: str) -> bool:
        section, option = key.split(".")
        differs = getattr(getattr(config, section), option) != default_of(key)
        is_nobodys = origins[key] in (DEFAULT, DEFAULT_OF_COMMAND) or origins[key].endswith(DEFAULT_OF_OTHER)
        return origins[key] == COMMAND_LINE or (differs and not is_nobodys)

    return [{"key": key, "reason": reason} for key, reason in _without_effect(config, command) if was_chosen(key)]


def _without_effect(config: Config, command: str | None) -> Iterator[tuple[str, str]]:
    yield from _of_answers(config) if command == "grpo" else _of_imitation()
    if command == "sft":
        for option in ("n", "temperature"):
            yield f"rollout.{option}", f"validation during training has rollout.val_{option}"
        yield "rollout.name", "validation during fine-tuning answers by transformers"
        yield (
            "tools.functions",
            "answers of validation during fine-tuning call no tools; `posttrain grpo` and `evaluate` do",
        )
    yield from _of_model_and_data(config, command)
    yield from _of_adapters(config)
    yield from _of_layout(config)
    yield from _of_optim(config)
    yield from _of_sampling(config, command)
    yield from _of_validation(config, command)
    yield from _of_rewards(config.reward)
    yield from _of_tools(config)
    yield from _of_rollout(config)
    yield from _of_trainer(config)


def _of_imitation() -> Iterator[tuple[str, str]]:
    reason = "it is for learning from one's own answers: `posttrain grpo`"
    for option in AlgorithmOptions.model_fields:
        yield f"algorithm.{option}", reason
    yield "data.max_prompt_length", reason
    yield "engine.reference_offload", reason
    yield "trainer.sample_freq", reason


def _of_answers(config: Config) -> Iterator[tuple[str, str]]:
    algorithm = config.algorithm
    for option in ("train_on", "train_roles", "train_reasoning", "expand_turns"):
        yield f"data.{option}", "prompts alone are read from the rows; what is trained is what the model answers"
    for option in ("num_workers", "cache_dir"):
        yield f"data.{option}", "prompts are read anew"
    if not config.tools.functions:
        yield "data.max_length", "rollout.max_new_tokens and data.max_prompt_length are the limits"
    if not algorithm.kl_coef:
        for name in ("algorithm.kl_type", "algorithm.kl_in", "engine.reference_offload"):
            yield name, "algorithm.kl_coef is 0, so that there is no reference"
    elif config.model.lora_rank or config.model.lora_adapter_path:
        yield "engine.reference_offload", "the reference is the model without its adapters"
    if not algorithm.overlong_buffer_tokens:
        yield "algorithm.overlong_penalty", "algorithm.overlong_buffer_tokens is 0"
    if not algorithm.filter_groups:
        yield "algorithm.max_num_gen_batches", "algorithm.filter_groups is false"
        yield "algorithm.filter_metric", "algorithm.filter_groups is false"
    elif not algorithm.overlong_buffer_tokens and algorithm.filter_metric == "score":
        yield "algorithm.filter_metric", "algorithm.overlong_buffer_tokens is 0, so that score and reward are the same"
    if algorithm.policy_loss == "cispo":
        yield "algorithm.dual_clip", "algorithm.policy_loss=cispo has none"
    if _makes_one_update(config):
        clips = ("clip_ratio_low", "clip_ratio_high", "dual_clip")
        for option in clips[:2] if algorithm.policy_loss == "cispo" else clips:
            yield (
                f"algorithm.{option}",
                "a step makes one update, by the policy that answered: every ratio is 1; algorithm.ppo_mini_batch_size or ppo_epochs "
                "would make more",
            )
    if config.data.max_prompt_length is None and not config.tools.functions:
        yield "data.truncation", "data.max_prompt_length is not given, so that no prompt is too long"
    adapted = config.model.lora_rank and not config.model.lora_adapter_path
    for option in ("dropout", "lora_dropout") if adapted else ("dropout",):
        yield (
            f"model.{option}",
            "learning from one's own answers drops nothing, so that the policy is the one that answered",
        )


def _makes_one_update(config: Config) -> bool:
    algorithm = config.algorithm
    prompts = algorithm.ppo_mini_batch_size or config.data.train_batch_size
    return algorithm.ppo_epochs == 1 and prompts >= config.data.train_batch_size


def _of_layout(config: Config) -> Iterator[tuple[str, str]]:
    processes = _processes(config)
    if processes <= (config.engine.fsdp_size or 0):
        yield (
            "engine.fsdp_size",
            "there is one process" if processes == 1 else f"all {processes} processes share one copy anyway",
        )


def _of_adapters(config: Config) -> Iterator[tuple[str, str]]:
    model = config.model
    shape = ("lora_rank", "lora_alpha", "lora_dropout", "target_modules")
    if model.lora_adapter_path:
        for option in shape:
            yield f"model.{option}", "the adapter of model.lora_adapter_path brings its own"
        yield "model.lora_vision", "the adapter of model.lora_adapter_path stands where it stands"
    elif not model.lora_rank:
        for option in (*shape[1:], "lora_vision"):
            yield f"model.{option}", "model.lora_rank is 0, so there is no adapter"
    if model.lora_rank or model.lora_adapter_path:
        for option in ("freeze_vision_tower", "freeze_projector"):
            yield f"model.{option}", "with adapters all of the model's own weights stay as they are"


def _of_model_and_data(config: Config, command: str | None) -> Iterator[tuple[str, str]]:
    model, data = config.model, config.data
    if not data.packing:
        for option in ("micro_batch_size_per_gpu", "max_tokens_per_gpu"):
            yield f"data.{option}", "data.packing=false runs rows one by one"
    if command is None:
        for option in ("load_in_4bit", "torch_compile", "use_liger"):
            yield f"model.{option}", "answers are written by the model as it is"
    if not model.enable_gradient_checkpointing:
        yield "model.gradient_checkpointing_every", "model.enable_gradient_checkpointing is false"
        yield (
            "model.enable_activation_offload",
            "model.enable_gradient_checkpointing is false, and only the inputs of recomputed blocks are kept in CPU memory",
        )
    if model.path and Path(model.path).is_dir():
        yield "model.revision", "model.path is a folder, and folders have no revisions"
    yield from _of_forms(data)
    train_is_local, val_is_local = all(map(_is_local, data.train_files)), all(map(_is_local, data.val_files))
    if train_is_local:
        yield "data.train_split", "data.train_files names no data set on the hub"
    if val_is_local:
        yield "data.val_split", "data.val_files names no data set on the hub"
    if train_is_local and val_is_local:
        yield "data.hub_config", "no data set on the hub is used"


def _of_forms(data: DataOptions) -> Iterator[tuple[str, str]]:
    pair, whole = ("prompt_key", "response_key"), ("messages_key",)
    unread = {
        "messages": pair,
        "sharegpt": pair,
        "prompt_response": whole,
        "question_answer": whole,
        "alpaca": pair + whole,
        "tokens": (*pair, *whole, "tools_key", "system_prompt"),
    }
    rendering = ("chat_template_kwargs", "enable_thinking", "date", "control_strings")
    masking = ("train_on", "train_roles", "train_reasoning", "expand_turns")
    for option in unread.get(data.format, ()):
        yield f"data.{option}", f"rows of data.format={data.format} are not read by it"
    if data.format == "tokens":
        for option in rendering + masking:
            yield f"data.{option}", "rows of data.format=tokens bring their ids, and say themselves which are trained"
    if data.format == "auto" and data.messages_key:
        for option in pair:
            yield f"data.{option}", "data.messages_key names the column with the whole conversation"


def _of_optim(config: Config) -> Iterator[tuple[str, str]]:
    schedule = config.optim.lr_scheduler_type
    if schedule != "wsd":
        yield "optim.wsd_decay_ratio", f"optim.lr_scheduler_type is {schedule}, not wsd"
    if schedule == "constant":
        yield "optim.min_lr_ratio", "a constant rate never falls to its floor"


def _of_sampling(config: Config, command: str | None) -> Iterator[tuple[str, str]]:
    rollout = config.rollout
    drawn = 1.0 if command == "grpo" and rollout.temperature is None else rollout.temperature
    used = {"rollout.temperature": drawn} if command != "sft" else {}
    if command is not None:
        used["rollout.val_temperature"] = rollout.val_temperature
    if not any(used.values()):
        names = " and ".join(used)
        for option in ("top_p", "top_k"):
            yield f"rollout.{option}", f"at {names} 0 the likeliest token is always taken"
    if command is not None and not rollout.val_temperature:
        for option in ("val_top_p", "val_top_k"):
            yield f"rollout.{option}", "at rollout.val_temperature 0 the likeliest token is always taken"


def _of_validation(config: Config, command: str | None) -> Iterator[tuple[str, str]]:
    reason = None if config.data.val_files else "there is nothing to validate on without data.val_files"
    if reason:
        for option in ("test_freq", "val_before_train", "best_metric", "early_stopping_patience"):
            yield f"trainer.{option}", reason
    if command is None:
        reason = "it is for validation during training"
    if reason:
        yield "data.val_max_samples", reason
    answering = (
        "rollout.val_n", "rollout.val_temperature", "rollout.val_top_p", "rollout.val_top_k",
        "trainer.num_val_generations",
    )  # fmt: skip
    if reason:
        for name in answering:
            yield name, reason
    elif not config.trainer.num_val_generations:
        for name in answering[:-1]:
            yield name, "trainer.num_val_generations is 0, so that validation generates no answers"
    elif config.rollout.val_n > 1 and not config.rollout.val_temperature:
        yield "rollout.val_n", "at rollout.val_temperature=0 it is the same answer each time"


def _of_rewards(reward: RewardOptions) -> Iterator[tuple[str, str]]:
    used = set(reward.names)
    own = used.difference(BUILT_IN_REWARDS)
    default_format = "format" in used and reward.format_pattern is None
    if not own:
        yield "reward.kwargs", "reward.name has no function of your own"
        yield (
            "reward.path",
            f"reward.name is {', '.join(reward.names)}, which is not in the file; name its function, such as compute_score",
        )
    if "format" not in used:
        yield "reward.format_pattern", "reward.name has no format"
    if "length" not in used:
        yield "reward.length_target", "reward.name has no length"
    if not (default_format or used & {"gsm8k_strict", "data_source"}):
        yield "reward.answer_mark", "no reward in reward.name looks for it"
    judge = next((name for name in reward.names if name not in ("format", "length")), None)
    if judge in BUILT_IN_REWARDS:
        yield "reward.right_at", f"{judge} judges, and knows itself what is right"
    if not own and not used & {"math", "data_source"} and ("format" not in used or default_format):
        for option in ("timeout_seconds", "num_workers"):
            yield f"reward.{option}", "the rewards in reward.name need no processes of their own"


def _of_tools(config: Config) -> Iterator[tuple[str, str]]:
    if not config.tools.functions:
        for option in ("max_turns", "max_answer_tokens", "timeout_seconds"):
            yield f"tools.{option}", "tools.functions names no tool"


def _of_rollout(config: Config) -> Iterator[tuple[str, str]]:
    if config.rollout.name == "vllm":
        yield "rollout.batch_size", "vLLM decides how many answers are written at the same time"
        return
    for option in VLLMOptions.model_fields:
        yield f"vllm.{option}", f"rollout.name is {config.rollout.name}"


def _of_trainer(config: Config) -> Iterator[tuple[str, str]]:
    trainer = config.trainer
    if trainer.total_training_steps is not None:
        yield "trainer.total_epochs", "trainer.total_training_steps decides how long the run is"
    if set(trainer.logger) <= {"console"}:
        for option in ("project_name", "experiment_name"):
            yield f"trainer.{option}", "trainer.logger names no tracker that would show it"
    yield from _of_resuming(trainer)
    yield from _of_launch(trainer)


def _of_resuming(trainer: TrainerOptions) -> Iterator[tuple[str, str]]:
    if trainer.resume_mode == "disable":
        yield "trainer.resume_from_path", "trainer.resume_mode is disable"


def _of_launch(trainer: TrainerOptions) -> Iterator[tuple[str, str]]:
    num_here, role = os.environ.get("LOCAL_WORLD_SIZE"), os.environ.get("ROLE_NAME")
    if num_here and trainer.n_gpus_per_node != int(num_here):
        yield "trainer.n_gpus_per_node", f"torchrun already started {num_here} on this machine"
    if num_here and trainer.nnodes != int(os.environ.get("GROUP_WORLD_SIZE", 1)):
        yield "trainer.nnodes", "torchrun already decided on how many machines the run is"
    if num_here and role != "posttrain":  # the role of those that posttrain's own launcher starts
        yield "trainer.rdzv_endpoint", "torchrun was told where the machines meet"
        yield "trainer.max_restarts", "torchrun starts workers again, by its own --max-restarts"
    elif trainer.nnodes == 1:
        yield "trainer.rdzv_endpoint", "trainer.nnodes is 1, so that there is nobody to meet"
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) not in (1, trainer.nnodes):
        yield "trainer.max_restarts", "Slurm starts one task a device, and restarts none of them alone"


def _processes(config: Config) -> int:
    """How many there will be: those that a launcher started, else those that the options ask for."""
    asked_for = (config.trainer.n_gpus_per_node or 1) * config.trainer.nnodes
    return int(os.environ.get("WORLD_SIZE", asked_for))


def _is_local(name: str) -> bool:
    """A file, a folder or an fsspec path; data.sources has the last word when it opens them."""
    return "://" in name or Path(name).suffix in (".parquet", ".jsonl", ".json", ".arrow") or Path(name).exists()
