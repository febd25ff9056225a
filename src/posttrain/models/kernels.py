"""Fused kernels in place of a model's own modules."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from posttrain.distributed.device import runs_liger
from posttrain.errors import InputError

# they compute logits and loss in the model's own forward pass, where ours come in chunks
OF_THE_LOSS = ("cross_entropy", "fused_linear_cross_entropy")


def use_liger(lm: Any) -> None:
    """Let Liger's kernels compute what they know of the model, such as norms, rotary positions and gated layers; weights and names
    stay. Raises InputError where the package is missing or does not know the architecture.
    """
    apply = _patching_of(lm.config.model_type)
    modeling = sys.modules[type(lm).__module__]
    before = dict(vars(modeling))
    loss = {name: False for name in OF_THE_LOSS if name in inspect.signature(apply).parameters}
    apply(model=lm, **loss)
    _keep_other_models(modeling, before)


def _patching_of(family: str) -> Callable[..., None]:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise InputError(
            f"model.use_liger: the package liger-kernel cannot be imported ({error}). Install it by `pip install 'posttrain[liger]'`, "
            "or set model.use_liger=false."
        ) from None
    if family not in known:
        near = difflib.get_close_matches(family, known, n=1)
        raise InputError(
            f"model.use_liger: liger-kernel has no kernels for {family}{f', but for {near[0]}' if near else ''}. Set "
            "model.use_liger=false for this model."
        )
    return known[family]


def _keep_other_models(modeling: ModuleType, before: dict[str, Any]) -> None:
    """Undo what was changed for models yet to be made, such as exports on the CPU; the functions that are shared decide by where
    their tensors lie."""
    for name, ours in before.items():
        theirs = getattr(modeling, name)
        if theirs is not ours:
            setattr(modeling, name, ours if isinstance(ours, type) else _by_device(ours, theirs))


def _by_device(plain: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    def either(first: Any, *others: Any, **options: Any) -> Any:
        return (fused if runs_liger(first.device) else plain)(first, *others, **options)

    return either
