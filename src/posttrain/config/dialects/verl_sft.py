"""Rules of verl's SFT trainers where one option becomes ours only together with others."""

from __future__ import annotations

import os
import re
from typing import Any

from posttrain.config.dialects.tables import Lookup, as_written
from posttrain.errors import InputError

ALL_STATE = {"model", "optimizer", "extra"}  # what a checkpoint of verl is loaded with
EVERY_EPOCH = "after_each_epoch"
# layers as peft names them: those of vision towers with their projectors, by family, and those of any language model
VISION = (
    ("model.visual.blocks.0.attn.qkv", "model.visual.merger.mlp.0"),
    ("model.vision_tower.encoder.layers.0.self_attn.q_proj", "model.multi_modal_projector.linear_1"),
)
LANGUAGE = ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.0.mlp.up_proj", "lm_head")


def messages(given: Lookup) -> dict[str, Any]:
    """The column of messages, where rows are conversations."""
    if not (_is_on(given("data.multiturn.enable")) or _is_on(given("data.use_multiturn"))):
        return {}
    return {"data.messages_key": given("data.multiturn.messages_key") or given("data.messages_key") or "messages"}


def prompt(given: Lookup) -> dict[str, Any]:
    """The column of prompts, which `prompt_dict_keys` look into."""
    return _column(given, "prompt")


def response(given: Lookup) -> dict[str, Any]:
    """The column of answers, which `response_dict_keys` look into."""
    return _column(given, "response")


def _column(given: Lookup, side: str) -> dict[str, Any]:
    keys = _as_list(given(f"data.{side}_key"))
    if len(keys) > 1:
        raise InputError(
            f"data.{side}_key={keys}: expected one column. Its text is taken as it stands; join columns before, in the rows."
        )
    inside = [
        key for key in _as_list(given(f"data.{side}_dict_keys")) if key != "content"
    ]  # of a message, which is read whole
    return {f"data.{side}_key": ".".join(map(str, [*keys, *inside]))} if keys else {}


def longest(given: Lookup) -> dict[str, Any]:
    """Prompt and answer together; a longest prompt alone is an option of ours."""
    prompt, response = given("data.max_prompt_length"), given("data.max_response_length")
    if response is None:
        return {"data.max_prompt_length": prompt}
    if prompt is None:
        raise InputError(
            "data.max_response_length: give data.max_prompt_length too; both together are data.max_length."
        )
    return {"data.max_length": _whole(prompt, "data.max_prompt_length") + _whole(response, "data.max_response_length")}


def cutting(given: Lookup) -> dict[str, Any]:
    """verl cuts the ends of long rows that it does not pad, and stops where it does; `data.truncation` has the last word."""
    truncation, pad_mode = given("data.truncation"), given("data.pad_mode")
    if pad_mode not in (None, "no_padding", "right", "left_right"):
        raise InputError(
            f"data.pad_mode={pad_mode}: rows are never padded; expected no_padding or right, or leave it out."
        )
    if truncation is not None:
        return {"data.truncation": truncation}
    if _is_on(given("data.filter_overlong_prompts")):
        return {"data.truncation": "drop"}
    return {"data.truncation": "right"} if pad_mode == "no_padding" else {}


def seed(given: Lookup) -> dict[str, Any]:
    """One seed decides everything; trainer.seed if several are given."""
    seeds = (given("trainer.seed"), given("engine.seed"), given("data.seed"))
    return {"trainer.seed": next((one for one in seeds if one is not None), None)}


def micro_batches(given: Lookup) -> dict[str, Any]:
    """Tokens of a pass where batches are dynamic, which they are in the newer trainer; rows elsewhere."""
    tokens = first_given(given, "data.max_token_len_per_gpu", "engine.max_token_len_per_gpu")
    rows = first_given(given, "data.micro_batch_size_per_gpu", "engine.micro_batch_size_per_gpu")
    dynamic = first_given(given, "data.use_dynamic_bsz", "engine.use_dynamic_bsz")
    in_all = given("data.micro_batch_size")
    if rows is None and in_all is not None:
        rows = max(1, _whole(in_all, "data.micro_batch_size") // _groups(given))
    if _is_on(dynamic):
        forgotten = {} if rows is None else {"data.micro_batch_size_per_gpu": None}
        return forgotten if tokens is None else {**forgotten, "data.max_tokens_per_gpu": tokens}
    if dynamic is not None and rows is None:
        rows = 4  # verl's default
    made = {} if rows is None else {"data.micro_batch_size_per_gpu": rows}
    return made if tokens is None or dynamic is not None else {**made, "data.max_tokens_per_gpu": tokens}


def _groups(given: Lookup) -> int:
    """Processes, or groups of them that share a row."""
    asked_for = (given("trainer.n_gpus_per_node") or 1) * (given("trainer.nnodes") or 1)
    sharing = first_given(given, "ulysses_sequence_parallel_size", "engine.ulysses_sequence_parallel_size")
    return max(1, int(os.environ.get("WORLD_SIZE", asked_for)) // int(sharing or 1))


def adapted_parts(given: Lookup) -> dict[str, Any]:
    """verl gives the vision tower and its projector adapters too, unless they are left out."""
    return lora_vision(given, "model.exclude_modules") if given.in_force("model.lora_rank") else {}


def lora_vision(given: Lookup, key: str) -> dict[str, Any]:
    """Whether both get adapters, by the pattern or the list of names that peft leaves out."""
    left_out = given(key)
    if left_out in (None, [], "DONT_EXCLUDE"):  # the last as verl's own scripts write it
        return {"model.lora_vision": True}
    try:
        of_vision = any(all(_matches(left_out, name) for name in names) for names in VISION)
        of_language = any(_matches(left_out, name) for name in LANGUAGE)
    except re.error as error:
        raise InputError(f"{key}={left_out}: it is no regular expression: {error}.") from None
    if of_vision and not of_language:
        return {"model.lora_vision": False}
    raise InputError(
        f"{key}={left_out}: it may leave out the vision tower together with its projector, as .*visual.* does. Other layers are "
        "chosen by model.target_modules alone, such as [q_proj,v_proj]."
    )


def _matches(left_out: Any, name: str) -> bool:
    """As peft decides it: a text is a pattern of the whole name, a list holds ends of names."""
    if isinstance(left_out, str):
        return re.fullmatch(left_out, name) is not None
    return any(name == end or name.endswith(f".{end}") for end in _as_list(left_out))


def offload(given: Lookup) -> dict[str, Any]:
    """Weights in CPU memory, by any of the names that verl has had for it."""
    old = _is_on(given("model.fsdp_config.cpu_offload")) and given("model.fsdp_config.offload_params") is not False
    names = ("param_offload", "offload_policy", "enable_fsdp_offload")
    return {"engine.param_offload": old or any(_is_on(given(f"engine.{name}")) for name in names)}


def warmup(given: Lookup) -> dict[str, Any]:
    """Steps if there are any, else the share of all steps."""
    steps = first_given(given, "optim.lr_warmup_steps", "optim.warmup_steps")
    ratio = first_given(
        given, "optim.warmup_steps_ratio", "optim.lr_warmup_ratio", "engine.optim.lr_warmup_steps_ratio",
        "optim.lr_warmup_steps_ratio",
    )  # fmt: skip
    if steps is not None and (not _is_at_most(0, steps) or (ratio is None and not _is_at_most(-1, steps))):
        return {"optim.lr_warmup_steps": steps, **({} if ratio is None else {"optim.lr_warmup_steps_ratio": None})}
    dropped = {} if given("optim.lr_warmup_steps") is None else {"optim.lr_warmup_steps": None}
    return dropped if ratio is None else {**dropped, "optim.lr_warmup_steps_ratio": ratio}


def floor(given: Lookup) -> dict[str, Any]:
    """The lowest rate, as a share of the highest."""
    lowest, ratio = first_given(given, "optim.lr_min", "optim.min_lr"), given("optim.min_lr_ratio")
    if not lowest:
        return {} if ratio is None else {"optim.min_lr_ratio": ratio}
    highest = given.in_force("optim.lr")
    if highest is None:
        raise InputError(f"the lowest rate {lowest} needs optim.lr, of which it is a share: optim.min_lr_ratio.")
    return {"optim.min_lr_ratio": round(_number(lowest) / _number(highest), 12)}


def frequencies(given: Lookup) -> dict[str, Any]:
    """Steps, or epochs where tutorials' `trainer.eval_freq` is given, which then counts them, as `trainer.save_freq` does."""
    in_epochs = given("trainer.eval_freq") is not None
    test = given("trainer.eval_freq") if in_epochs else given("trainer.test_freq")
    made = {"trainer.save_freq": given("trainer.save_freq"), "trainer.test_freq": test}
    return {key: _frequency(value, in_epochs) for key, value in made.items() if value is not None}


def _frequency(value: Any, in_epochs: bool) -> Any:
    if value == EVERY_EPOCH:
        return "1ep"
    if not isinstance(value, int):
        return value
    return -1 if value <= 0 else f"{value}ep" if in_epochs else value


def kept(given: Lookup) -> dict[str, Any]:
    """All of them for null, 0 and -1."""
    names = ("max_ckpt_to_keep", "max_actor_ckpt_to_keep", "ckpt.num_to_keep")
    number = first_given(given, *(f"trainer.{name}" for name in names))
    return {"trainer.max_ckpt_to_keep": None if isinstance(number, int) and number <= 0 else number}


def loaded(given: Lookup) -> dict[str, Any]:
    """A run goes on with all that its checkpoint holds, or does not go on."""
    for key in ("checkpoint.load_contents", "trainer.checkpoint.load_contents"):
        contents = given(key)
        if contents is None or (isinstance(contents, str) and contents.startswith("${")):
            continue
        if missing := ALL_STATE - set(_as_list(contents)):
            raise InputError(
                f"{key}={contents}: a run goes on with all of its checkpoint, {', '.join(sorted(missing))} too. To begin anew from its "
                "weights, give its folder as model.path, with another trainer.default_local_dir."
            )
    return {}


def trackers(given: Lookup) -> dict[str, Any]:
    """Without `file`, since metrics.jsonl is always written; `tracking` is verl's old name of wandb."""
    names = _as_list(given("trainer.logger"))
    return {"trainer.logger": ["wandb" if name == "tracking" else name for name in names if name != "file"]}


def first_given(given: Lookup, *keys: str) -> Any:
    """The value of the first of these options that has one."""
    return next((value for key in keys if (value := given(key)) is not None), None)


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [] if value is None else [value]


def _is_on(value: Any) -> bool:
    return as_written(value) in ("true", "1")


def _is_at_most(limit: int, value: Any) -> bool:
    return isinstance(value, int | float) and value <= limit


def _whole(value: Any, key: str) -> int:
    if not isinstance(value, int):
        raise InputError(f"{key}={value}: expected a whole number.")
    return value


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InputError(f"{value!r}: expected a number.") from None
