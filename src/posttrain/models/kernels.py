"""Fused kernels in place of a model's own modules."""

from __future__ import annotations

import difflib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from posttrain.distributed.device import runs_liger
from posttrain.errors import InputError

PACKAGE = "liger_kernel"
# they compute logits and loss in the model's own forward pass, where ours come in chunks
OF_THE_LOSS = ("cross_entropy", "fused_linear_cross_entropy")


@dataclass(frozen=True)
class Either:
    """A function of a file of models, and Liger's in its place for tensors on a device that runs it."""

    plain: Callable[..., Any]
    fused: Callable[..., Any]

    def __call__(self, first: Tensor, *others: Any, **options: Any) -> Any:
        return (self.fused if runs_liger(first.device) else self.plain)(first, *others, **options)


def use_liger(lm: Any) -> None:
    """Let Liger's kernels compute what they know of the model, such as norms, rotary positions and gated layers; weights and names
    stay. Raises InputError where the package is missing, or has nothing for the architecture.
    """
    part, apply = _patching_of(lm)
    _replace_lost_outputs()
    before = {modeling: dict(vars(modeling)) for modeling in _files(lm)}
    loss = {name: False for name in OF_THE_LOSS if name in inspect.signature(apply).parameters}
    try:
        apply(model=part, **loss)
    except (AttributeError, ImportError, TypeError) as error:  # it knows the architecture as other versions have it
        raise InputError(
            f"model.use_liger: liger-kernel cannot change this {type(part).__name__}: {error}. Set model.use_liger=false."
        ) from error
    for modeling, names in before.items():
        _keep_other_models(modeling, names)
    if not fused_parts(lm):
        raise InputError(
            f"model.use_liger: liger-kernel found nothing to change in {type(lm).__name__}. Set model.use_liger=false."
        )


def fused_parts(lm: Any) -> list[str]:
    """What Liger computes in this model: its kinds of modules with their numbers, and functions by name."""
    kinds = Counter(module._get_name().removeprefix("Liger") for module in _fused_modules(lm))
    return [f"{count} {kind}" for kind, count in kinds.items()] + sorted({name for _, name, _ in _functions(lm)})


@contextmanager
def plainly(lm: Any) -> Iterator[None]:
    """The model's own modules and functions, in place of Liger's."""
    modules = [(module, vars(module).pop("forward")) for module in _fused_modules(lm)]
    functions = list(_functions(lm))
    for modeling, name, either in functions:
        setattr(modeling, name, either.plain)
    try:
        yield
    finally:
        for module, forward in modules:
            vars(module)["forward"] = forward
        for modeling, name, either in functions:
            setattr(modeling, name, either)


def _patching_of(lm: Any) -> tuple[Any, Callable[..., None]]:
    """The part of the model that Liger knows, the whole or its language model, and what changes it."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN as known
    except ImportError as error:
        raise InputError(
            f"model.use_liger: the package liger-kernel cannot be imported ({error}). Install it by `pip install 'posttrain[liger]'`, "
            "or set model.use_liger=false."
        ) from None
    family, language = lm.config.model_type, lm.config.get_text_config().model_type
    if family in known:
        return lm, known[family]
    if language in known and language != family:
        return lm.get_decoder(), known[language]
    near = difflib.get_close_matches(family, known, n=1)
    raise InputError(
        f"model.use_liger: liger-kernel has no kernels for {family}{f', but for {near[0]}' if near else ''}. Set "
        "model.use_liger=false for this model."
    )


def _replace_lost_outputs() -> None:
    """Let Liger's files be imported where transformers (5.23) no longer has the classes that forward passes with Liger's loss give:
    those passes stay unused."""
    from liger_kernel.transformers.model import output_classes

    def lost(name: str) -> type:
        if name.endswith("OutputWithPast"):
            return CausalLMOutputWithPast
        raise AttributeError(name)

    vars(output_classes).setdefault("__getattr__", lost)


def _keep_other_models(modeling: ModuleType, before: dict[str, Any]) -> None:
    """Undo what was changed for models yet to be made, such as exports on the CPU; the functions that are shared decide by where
    their tensors lie."""
    for name, ours in before.items():
        theirs = getattr(modeling, name)
        if theirs is not ours:
            plain = ours.plain if isinstance(ours, Either) else ours
            setattr(modeling, name, ours if isinstance(ours, type) else Either(plain, theirs))


def _files(lm: Any) -> list[ModuleType]:
    """The Python files that define the model's parts."""
    return [sys.modules[name] for name in sorted({type(module).__module__ for module in lm.modules()})]


def _functions(lm: Any) -> Iterator[tuple[ModuleType, str, Either]]:
    for modeling in _files(lm):
        for name, value in vars(modeling).items():
            if isinstance(value, Either):
                yield modeling, name, value


def _fused_modules(lm: Any) -> list[nn.Module]:
    return [module for module in lm.modules() if _is_fused(vars(module).get("forward"))]


def _is_fused(forward: Any) -> bool:
    return str(getattr(forward, "__module__", "")).startswith(PACKAGE)
