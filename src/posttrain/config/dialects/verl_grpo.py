"""Rules of verl's PPO trainer: options of it whose values need more than another name."""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

from posttrain.config.dialects.tables import Lookup
from posttrain.config.dialects.verl_sft import first_given, lora_vision, trackers
from posttrain.errors import InputError

__all__ = ["trackers"]  # a rule of both tables

ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
WITHOUT_END = 1_000  # batches of prompts, more than a step could need
ESTIMATORS = {
    "grpo": "grpo",
    "grpo_vectorized": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "dr_grpo": "dr_grpo",
}
LOSSES = {"vanilla": "clip", "gspo": "gspo", "cispo": "cispo"}
AGGREGATIONS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "seq-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "constant-length",
}
DIVERGENCES = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def estimator(given: Lookup) -> dict[str, Any]:
    name = str(given("algorithm.adv_estimator") or "grpo")
    if name == "gae":
        raise InputError(
            "algorithm.adv_estimator=gae, which is verl's default, needs a critic, and posttrain trains none. "
            "Choose grpo, rloo or dr_grpo."
        )
    if name not in ESTIMATORS:
        raise InputError(
            f"algorithm.adv_estimator={name}: posttrain has {', '.join(sorted(set(ESTIMATORS.values())))}."
        )
    ours = ESTIMATORS[name]
    by_std = _switch(given, "algorithm.norm_adv_by_std_in_grpo")
    return {"algorithm.adv_estimator": "dr_grpo" if ours == "grpo" and by_std is False else ours}


def divergence(given: Lookup) -> dict[str, Any]:
    """In the loss or off the reward. Before v0.3 verl had no `use_kl_in_reward`: a `kl_coef` counted where the loss had no divergence."""
    in_loss, in_reward = _switch(given, f"{ACTOR}.use_kl_loss"), _switch(given, "algorithm.use_kl_in_reward")
    coef = given("algorithm.kl_ctrl.kl_coef")
    of_loss = given(f"{ACTOR}.kl_loss_coef") if in_loss else 0
    of_reward = (0.001 if coef is None else coef) if in_reward or (in_reward is None and coef and not in_loss) else 0
    if of_loss and of_reward:
        raise InputError(
            f"{ACTOR}.use_kl_loss=True and algorithm.use_kl_in_reward=True: the divergence counts in the loss or in the reward, "
            "not in both. Choose one."
        )
    if of_loss:
        kind = _divergence(given, f"{ACTOR}.kl_loss_type")
        return {"algorithm.kl_coef": of_loss, "algorithm.kl_in": "loss", "algorithm.kl_type": kind}
    if of_reward:
        kind = _divergence(given, "algorithm.kl_penalty")
        return {"algorithm.kl_coef": of_reward, "algorithm.kl_in": "reward", "algorithm.kl_type": kind}
    return {"algorithm.kl_coef": 0.0}


def loss(given: Lookup) -> dict[str, Any]:
    mode = str(given(f"{ACTOR}.policy_loss.loss_mode") or "vanilla")
    if mode not in LOSSES:
        raise InputError(f"{ACTOR}.policy_loss.loss_mode={mode}: posttrain has {', '.join(LOSSES)}.")
    made: dict[str, Any] = {"algorithm.policy_loss": LOSSES[mode]}
    for side in ("low", "high"):
        bound = given(f"{ACTOR}.clip_ratio_{side}")
        bound = given(f"{ACTOR}.clip_ratio") if bound is None else bound
        if bound is not None:
            made[f"algorithm.clip_ratio_{side}"] = bound
    if mode == "vanilla" and given(f"{ACTOR}.clip_ratio_c") is not None:
        made["algorithm.dual_clip"] = given(f"{ACTOR}.clip_ratio_c")
    aggregation = _aggregation(given, mode)
    return made | ({"algorithm.loss_agg_mode": aggregation} if aggregation else {})


def correction(given: Lookup) -> dict[str, Any]:
    """Truncated importance weights of tokens; by v0.5's, v0.6's and later names."""
    if (cap := given(f"{ACTOR}.tis_imp_ratio_cap")) is not None and cap > 0:
        return {"algorithm.rollout_is_cap": cap}
    level = given("algorithm.rollout_correction.rollout_is") or given("algorithm.rollout_is")
    if level in (None, False, "null"):
        return {"algorithm.rollout_is_cap": None}
    threshold = given("algorithm.rollout_is_threshold")
    if level is True:  # v0.6: null still meant off
        level = given("algorithm.rollout_is_level") or "token"
        if threshold is None:
            return {"algorithm.rollout_is_cap": None}
    if level != "token" or given("algorithm.rollout_is_mode") not in (None, "truncate"):
        raise InputError(
            f"rollout_is={level}, rollout_is_mode={given('algorithm.rollout_is_mode') or 'truncate'}: posttrain weighs tokens, one "
            "by one, and cuts their weights off at the threshold. Choose rollout_is=token, with rollout_is_mode=truncate where that is given."
        )
    return {"algorithm.rollout_is_cap": threshold or given("algorithm.rollout_correction.rollout_is_threshold") or 2.0}


def prompts(given: Lookup) -> dict[str, Any]:
    """Of a step, of an update, and how often further ones are asked. Without filtering verl's `gen_batch_size` is what a step asks."""
    in_step, asked = given.in_force("data.train_batch_size"), _number(given, "data.gen_batch_size")
    if isinstance(in_step, str):  # `${...}`, or what is no number
        return {"data.train_batch_size": in_step}
    mini = _number(given, f"{ACTOR}.ppo_mini_batch_size")
    made: dict[str, Any] = {}
    if (filtering := _switch(given, "algorithm.filter_groups.enable")) is not None:
        made["algorithm.filter_groups"] = filtering
    if filtering:
        most = _number(given, "algorithm.filter_groups.max_num_gen_batches") or 0
        wider = math.ceil(asked / in_step) if asked and in_step else 1
        made["algorithm.max_num_gen_batches"] = most * wider if most > 0 else WITHOUT_END
    else:
        in_step = asked or in_step
    if in_step:
        made["data.train_batch_size"] = in_step
    if mini:
        made["algorithm.ppo_mini_batch_size"] = min(mini, in_step or mini)
    return made


def warmup(given: Lookup) -> dict[str, Any]:
    """verl's scheduler counts steps, ours updates, of which a step makes several."""
    if given("optim.lr_warmup_steps") is not None or given("optim.lr_warmup_steps_ratio") is not None:
        return {}
    steps = _number(given, f"{ACTOR}.optim.lr_warmup_steps")
    if steps is None or steps < 0:
        return {"optim.lr_warmup_steps_ratio": given(f"{ACTOR}.optim.lr_warmup_steps_ratio") or 0.0}
    planned = prompts(given)
    in_step, mini = planned.get("data.train_batch_size", 1), planned.get("algorithm.ppo_mini_batch_size", 1)
    return {"optim.lr_warmup_steps": steps * math.ceil(in_step / mini) * (_number(given, f"{ACTOR}.ppo_epochs") or 1)}


def schedule(given: Lookup) -> dict[str, Any]:
    kind = given(f"{ACTOR}.optim.warmup_style") or given(f"{ACTOR}.optim.lr_scheduler_type") or "constant"
    return {"optim.lr_scheduler_type": kind}


def offload(given: Lookup) -> dict[str, Any]:
    """FSDP2's own offloading keeps weights, gradients and optimizer states in CPU memory."""
    if _switch(given, f"{ACTOR}.fsdp_config.offload_policy"):
        return {"engine.param_offload": True, "engine.optimizer_offload": True}
    return {}


def adapter_scale(given: Lookup) -> dict[str, Any]:
    """Scripts that train all weights may give 0."""
    alpha = given("actor_rollout_ref.model.lora_alpha")
    return {"model.lora_alpha": alpha} if alpha or given("actor_rollout_ref.model.lora_rank") else {}


def adapted_parts(given: Lookup) -> dict[str, Any]:
    """As in fine-tuning: the vision tower and its projector get adapters too, unless they are left out."""
    rank = given("actor_rollout_ref.model.lora_rank") or given.in_force("model.lora_rank")
    return lora_vision(given, "actor_rollout_ref.model.exclude_modules") if rank else {}


def frozen_tower(given: Lookup) -> dict[str, Any]:
    """What verl calls the tower of Qwen's models holds their projector too; of other models it freezes nothing."""
    frozen = bool(_switch(given, f"{ACTOR}.freeze_vision_tower"))
    return {"model.freeze_vision_tower": frozen, "model.freeze_projector": frozen}


def micro_batches(given: Lookup) -> dict[str, Any]:
    if _switch(given, f"{ACTOR}.use_dynamic_bsz"):
        tokens = given(f"{ACTOR}.ppo_max_token_len_per_gpu")
        return {"data.max_tokens_per_gpu": tokens} if tokens else {}
    rows = given(f"{ACTOR}.ppo_micro_batch_size_per_gpu")
    return {"data.micro_batch_size_per_gpu": rows} if rows else {}


def rollout_engine(given: Lookup) -> dict[str, Any]:
    """Any engine draws from the same distribution: vLLM where it is installed, else transformers."""
    name = str(given(f"{ROLLOUT}.name"))
    if name not in ("vllm", "sglang", "sglang_async", "trtllm", "hf"):
        raise InputError(f"{ROLLOUT}.name={name}: expected vllm, sglang, trtllm or hf.")
    has_vllm = given("vllm.python") is not None or find_spec("vllm") is not None
    return {"rollout.name": "vllm" if name != "hf" and has_vllm else "transformers"}


def group(given: Lookup) -> dict[str, Any]:
    answers = given(f"{ROLLOUT}.n") if given("rollout.n") is None else given("rollout.n")
    if answers == 1 and given("algorithm.adv_estimator") in ESTIMATORS:
        raise InputError(
            f"{ROLLOUT}.n=1, which is verl's default: an answer is compared with the others to the same prompt, and a group of one has "
            f"none. Give {ROLLOUT}.n=5 or more."
        )
    return {"rollout.n": answers}


def validation_sampling(given: Lookup) -> dict[str, Any]:
    draws = _switch(given, f"{ROLLOUT}.val_kwargs.do_sample")
    return {"rollout.val_temperature": 0.0 if draws is False else given(f"{ROLLOUT}.val_kwargs.temperature") or 0.0}


def prompt_length(given: Lookup) -> dict[str, Any]:
    return {"data.max_prompt_length": first_given(given, f"{ROLLOUT}.prompt_length", "data.max_prompt_length")}


def answer_length(given: Lookup) -> dict[str, Any]:
    return {"rollout.max_new_tokens": first_given(given, f"{ROLLOUT}.response_length", "data.max_response_length")}


def truncation(given: Lookup) -> dict[str, Any]:
    if _switch(given, "data.filter_overlong_prompts"):
        return {"data.truncation": "drop"}
    how = given("data.truncation")
    if how == "middle":
        raise InputError("data.truncation=middle: prompts are cut at one end. Choose left, right, drop or error.")
    return {} if how is None else {"data.truncation": how}


def judge(given: Lookup) -> dict[str, Any]:
    """One's own function, else what the row's data_source asks for: without a file verl reads no name either."""
    path = given("custom_reward_function.path") or given("reward.path")
    named = given("reward.name") or (given("custom_reward_function.name") or "compute_score" if path else "data_source")
    return {"reward.name": named} | ({"reward.path": path} if path else {})


def overlong(given: Lookup) -> dict[str, Any]:
    """DAPO's over-long shaping, by the older and the newer names."""
    found: dict[str, Any] = {}
    for option in ("enable", "len", "penalty_factor"):
        newer = given(f"reward_model.reward_kwargs.overlong_buffer_cfg.{option}")
        found[option] = given(f"reward_model.overlong_buffer.{option}") if newer is None else newer
    longest, limit = given("reward_model.reward_kwargs.max_resp_len"), answer_length(given)["rollout.max_new_tokens"]
    if not found["enable"] or not found["len"] or found["penalty_factor"] in (0, 0.0):
        return {"algorithm.overlong_buffer_tokens": 0}
    if longest is not None and limit is not None and longest != limit:
        raise InputError(
            f"reward_model.reward_kwargs.max_resp_len={longest} and data.max_response_length={limit}: the buffer ends where answers are "
            "cut. Give the same number."
        )
    penalty = 1.0 if found["penalty_factor"] is None else found["penalty_factor"]
    return {"algorithm.overlong_buffer_tokens": found["len"], "algorithm.overlong_penalty": penalty}


def resumed(given: Lookup) -> dict[str, Any]:
    """verl reads a path only where the mode asks for one; scripts give both."""
    is_read = given("trainer.resume_mode") == "resume_path" or given("actor_rollout_ref.model.path") is None
    return {"trainer.resume_from_path": given("trainer.resume_from_path") or None if is_read else None}


def _divergence(given: Lookup, key: str) -> str:
    """`+` takes the gradient of the squared difference whatever the value: in the loss that is k2, off the reward nothing."""
    name = str(given(key))
    plain = name.removesuffix("+")
    if plain not in DIVERGENCES:
        raise InputError(f"{key}={name}: posttrain has {', '.join(DIVERGENCES)}.")
    return "k2" if name != plain and key.endswith("kl_loss_type") else DIVERGENCES[plain]


def _aggregation(given: Lookup, mode: str) -> str | None:
    if mode == "gspo":  # whatever is given
        return "seq-mean-token-mean"
    name = given(f"{ACTOR}.loss_agg_mode")
    if name is None:
        return None
    if name not in AGGREGATIONS:
        raise InputError(f"{ACTOR}.loss_agg_mode={name}: posttrain has {', '.join(AGGREGATIONS)}.")
    factor, limit = given(f"{ACTOR}.loss_scale_factor"), answer_length(given)["rollout.max_new_tokens"]
    if AGGREGATIONS[name] == "constant-length" and factor not in (None, limit):
        raise InputError(
            f"{ACTOR}.loss_scale_factor={factor}: sums are divided by data.max_response_length, {limit}. Leave it out."
        )
    return AGGREGATIONS[name]


def _switch(given: Lookup, key: str) -> bool | None:
    value = given(key)
    return None if value is None else str(value).lower() == "true"


def _number(given: Lookup, key: str) -> int | None:
    value = given(key)
    if value is not None and not isinstance(value, int):
        raise InputError(f"{key}={value}: expected a whole number.")
    return value
