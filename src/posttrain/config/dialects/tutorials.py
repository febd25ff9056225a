"""Rules of the options of tutorials; those about the same options of ours as verl's are verl's."""

from __future__ import annotations

from typing import Any

from posttrain.config.dialects.tables import Lookup, as_written
from posttrain.config.dialects.verl_sft import frequencies, warmup
from posttrain.config.schema import DataOptions
from posttrain.errors import InputError

__all__ = ["accumulated", "adapters", "frequencies", "mixed_precision", "warmup"]

DTYPES = {
    "bf16": "bfloat16", "bfloat16": "bfloat16", "fp32": "float32", "float32": "float32", "no": "float32", "false": "float32",
    "true": "auto", "auto": "auto",
}  # fmt: skip


def adapters(given: Lookup) -> dict[str, Any]:
    """The rank, 0 where adapters are switched off."""
    enabled, rank = given("model.peft_config.enable"), given("model.peft_config.r")
    if enabled is not None and as_written(enabled) != "true":
        return {"model.lora_rank": 0}
    rank = given.in_force("model.lora_rank") if rank is None else rank
    if rank is None:
        raise InputError("model.peft_config.enable=true: expected model.peft_config.r too, the rank; 16 is usual.")
    return {"model.lora_rank": rank}


def accumulated(given: Lookup) -> dict[str, Any]:
    """Rows of one optimizer step: those of one batch, as often as gradients are accumulated."""
    rows = given.in_force("data.train_batch_size")
    names = ("trainer.gradient_accumulation_steps", "gradient_accumulation_steps")
    several = {value for name in names if (value := given(name)) is not None}
    if not several:
        return {} if rows is None else {"data.train_batch_size": rows}
    if len(several) > 1:
        raise InputError(f"{names[0]}={given(names[0])}, {names[1]}={given(names[1])}: expected one of them.")
    rows = DataOptions.model_fields["train_batch_size"].default if rows is None else rows
    (times,) = several
    if not isinstance(times, int) or not isinstance(rows, int) or times < 1:
        raise InputError(
            f"gradient_accumulation_steps={times}, data.train_batch_size={rows}: expected whole numbers above 0."
        )
    return {"data.train_batch_size": rows * times}


def mixed_precision(given: Lookup) -> dict[str, Any]:
    """The format of forward and backward."""
    written = as_written(given("trainer.mixed_precision"))
    if written == "null":
        return {}
    if written not in DTYPES:
        raise InputError(
            f"trainer.mixed_precision={written}: posttrain computes in bf16 or fp32, whose range needs no scaling."
        )
    return {"model.dtype": DTYPES[written]}
