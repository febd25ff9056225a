"""LoRA through peft: small trained matrices beside frozen ones, in peft's own format on disk.

A linear layer's output gains `scaling * B(A(x))` with A (rank x in) and B (out x rank). Source: Hu et al. 2021, LoRA.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from posttrain.config.schema import ModelOptions
from posttrain.errors import InputError, RunError
from posttrain.models.load import architecture_fingerprint
from posttrain.models.vision import vision_modules
from posttrain.models.weights import Part, Weights

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "default"
# settings of peft under which an adapter is more than two matrices beside a frozen one
NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
)
ADAPTER_FOLDER = "adapter"  # of a checkpoint or an export
BASE_LAYER = ".base_layer"
_PREFIX = "base_model.model."  # of tensor names in peft's files


@dataclass(frozen=True)
class Adapters:
    """The adapters of an engine: peft's settings, and the model that they stand beside."""

    config: LoraConfig
    base_path: str
    base_fingerprint: str


def wants_adapters(options: ModelOptions) -> bool:
    return bool(options.lora_rank or options.lora_adapter_path)


def add_adapters(lm: Any, options: ModelOptions, frozen_dtype: torch.dtype) -> LoraConfig:
    """Put adapters without values into the model and freeze all else, kept in `frozen_dtype` from now on.

    Raises InputError where the layers named are not there or cannot have one.
    """
    from peft import inject_adapter_in_model

    config = _read_config(options.lora_adapter_path) if options.lora_adapter_path else _new_config(options, lm)
    trained_dtype = next(lm.parameters()).dtype
    try:
        inject_adapter_in_model(config, lm, adapter_name=ADAPTER, low_cpu_mem_usage=lm.device.type == "meta")
    except ValueError as error:
        raise InputError(f"model.target_modules={options.target_modules}: {str(error).splitlines()[0]}") from None
    _check_layers(lm)
    for name, parameter in lm.named_parameters():
        is_adapter = is_adapter_weight(name)
        parameter.requires_grad_(is_adapter)
        parameter.data = parameter.data.to(trained_dtype if is_adapter else frozen_dtype)
    return config


def is_adapter_weight(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def model_fingerprint(config: Any, options: ModelOptions) -> str:
    """Of what decides which weights are trained and their shapes: the architecture, and the adapters if there are any."""
    whole = architecture_fingerprint(config)
    if not wants_adapters(options):
        frozen = [option for option in ("freeze_vision_tower", "freeze_projector") if getattr(options, option)]
        return "-".join([whole, *frozen])
    if options.lora_adapter_path:
        adapter = _read_config(options.lora_adapter_path)
        parts = [adapter.r, adapter.lora_alpha, sorted(adapter.target_modules or [])]
    else:
        parts = [options.lora_rank, options.lora_alpha, sorted(options.target_modules), *([True] * options.lora_vision)]
    return f"{whole}-lora-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


class AdapterWeights:
    """The base model's weights with an adapter's beside them: those of a folder, else fresh ones by the seed."""

    def __init__(self, base: Weights | None, options: ModelOptions, seed: int):
        self._base, self._seed = base, seed
        self._saved = _read_adapter(Path(options.lora_adapter_path)) if options.lora_adapter_path else None

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        if not is_adapter_weight(name):
            assert self._base is not None
            return self._base.read(name.replace(BASE_LAYER, ""), shape, part)
        if self._saved is not None:
            return self._taken(file_name(name), shape)[part]
        return _fresh(name, shape, self._seed)[part]

    def _taken(self, name: str, shape: tuple[int, ...]) -> Tensor:
        found = (self._saved or {}).get(name)
        if found is None or tuple(found.shape) != shape:
            what = "lacks" if found is None else f"has shape {tuple(found.shape)}, not {shape}, for"
            raise InputError(f"model.lora_adapter_path: the adapter {what} {name}; was it made for this model?")
        return found


@torch.no_grad()
def fill_adapters(lm: Any, weights: AdapterWeights) -> None:
    """Give the adapters of a whole model their values."""
    for name, parameter in lm.named_parameters():
        if is_adapter_weight(name):
            shape = tuple(parameter.shape)
            parameter.copy_(weights.read(name, shape, tuple(slice(0, size) for size in shape)))


def fingerprint(weights: Iterable[tuple[str, Tensor]], total: Callable[[Tensor], Tensor]) -> str:
    """Of frozen weights, from this process's parts of them: the same for any number of processes and either number format.

    Adds up the bits of each tensor in bfloat16, or those that int16 shows; `total` adds over the processes that hold the parts.
    """
    names, sums = [], []
    for name, weight in weights:
        names.append(name)
        bits = weight if weight.dtype == torch.int16 else weight.detach().to(torch.bfloat16).view(torch.int16)
        sums.append(bits.sum(dtype=torch.int64))
    added = total(torch.stack(sums)).tolist()
    return hashlib.sha256(json.dumps(list(zip(names, added, strict=True))).encode()).hexdigest()[:16]


@contextmanager
def without_adapters(lm: Any) -> Iterator[None]:
    """The model as it was before it had adapters, while inside."""
    layers = [layer for _, layer in _adapted_layers(lm)]
    for layer in layers:  # peft's own switch also changes requires_grad, which sharded parameters must keep
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged_weights(lm: Any, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The plain model's weights by its own names, adapters added to what they stand beside.

    `weights` are whole tensors in the order of the state dict, where A and B follow their frozen matrix. Sums are float32.
    """
    layers = dict(_adapted_layers(lm))
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, weight in weights:
        layer, _, rest = _split(name)
        if layer not in layers or rest.endswith("bias"):
            yield name.replace(BASE_LAYER, ""), weight
            continue
        parts = waiting.setdefault(layer, {})
        parts[rest] = weight
        if len(parts) == 3:
            base, down, up = (parts[part] for part in ("weight", "lora_A", "lora_B"))
            scaling = layers[layer].scaling[ADAPTER]
            yield f"{layer}.weight", base.float() + scaling * (up.float() @ down.float())
            del waiting[layer]
    assert not waiting, f"adapters without their layers: {list(waiting)}"


def base_weights(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Of a state dict with adapters, the plain model's weights by its own names, as they were without."""
    return ((name.replace(BASE_LAYER, ""), weight) for name, weight in weights if not is_adapter_weight(name))


def save_adapter(folder: Path, adapters: Adapters, weights: dict[str, Tensor]) -> None:
    """Write an adapter as peft does, and `base.json`, which names the model it belongs to. Raises RunError.

    `weights` are whole adapter tensors by the model's names.
    """
    from safetensors.torch import save_file

    saved = deepcopy(adapters.config)
    saved.inference_mode, saved.base_model_name_or_path = True, adapters.base_path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        saved.save_pretrained(str(folder))
        tensors = {file_name(name): weight.contiguous() for name, weight in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        base = {"model": adapters.base_path, "fingerprint": adapters.base_fingerprint}
        (folder / "base.json").write_text(json.dumps(base, indent=2) + "\n")
    except Exception as error:  # safetensors raises errors of its own for a full disk
        raise RunError(f"Writing the adapter to {folder} failed: {error}. Checkpoints are untouched.") from None


def check_base(checkpoint: Path | None, adapters: Adapters | None) -> None:
    """Raise InputError where a checkpoint's adapter was trained beside another model than this one."""
    if checkpoint is None or adapters is None:
        return
    try:
        base = json.loads((checkpoint / ADAPTER_FOLDER / "base.json").read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{checkpoint} cannot be loaded: {error}. Delete this folder to resume from the one before it."
        ) from None
    if base["fingerprint"] != adapters.base_fingerprint:
        raise InputError(
            f"{checkpoint} holds an adapter for {base['model']} as it was then; the weights of {adapters.base_path} are others. "
            "Use the same model.path and model.load_in_4bit, or another trainer.default_local_dir."
        )


def _new_config(options: ModelOptions, lm: Any) -> LoraConfig:
    from peft import LoraConfig

    targets = options.target_modules
    excluded = [] if options.lora_vision else vision_modules(lm)
    beside = [re.escape(name) for name, module in lm.named_modules() if any(module is part for part in excluded)]
    return LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=options.lora_dropout,
        target_modules=_linear_layers(lm) if targets == ["all-linear"] else targets,
        exclude_modules=rf"({'|'.join(beside)})(\..*)?" if beside else None,
        task_type="CAUSAL_LM",
    )


def _linear_layers(lm: Any) -> list[str]:
    """All but the output layer and routers, which give several tensors. peft (0.21) would take `all-linear` to mean experts that are
    fused into one tensor too."""
    output = lm.get_output_embeddings()
    linear = ((name, module) for name, module in lm.named_modules() if isinstance(module, nn.Linear))
    return [name for name, module in linear if module is not output and not type(module).__name__.endswith("Router")]


def _read_config(path: str) -> LoraConfig:
    from peft import LoraConfig, PeftConfig

    try:
        config = PeftConfig.from_pretrained(path)
    except Exception as error:  # broken files raise errors of many libraries
        raise InputError(f"model.lora_adapter_path={path}: no adapter of peft can be read there: {error}") from None
    unknown = [name for name in NOT_PLAIN if getattr(config, name, None)]
    if not isinstance(config, LoraConfig) or config.bias != "none" or unknown:
        raise InputError(
            f"model.lora_adapter_path={path}: only plain LoRA can go on, without {', '.join(unknown) or 'biases or other methods'}."
        )
    config.inference_mode = False
    return config


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    try:
        return load_file(folder / "adapter_model.safetensors")
    except Exception as error:  # broken files raise errors of safetensors' own
        raise InputError(f"model.lora_adapter_path={folder}: {error}") from None


def _check_layers(lm: Any) -> None:
    output = lm.get_output_embeddings()
    for name, layer in _adapted_layers(lm):
        if layer is output or not isinstance(layer.get_base_layer(), nn.Linear):
            raise InputError(
                f"model.target_modules: {name} cannot have an adapter, only linear layers before the output layer can, no "
                "embeddings and no fused experts. Name others, such as model.target_modules=[q_proj,k_proj,v_proj,o_proj]."
            )


def _adapted_layers(lm: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def _split(name: str) -> tuple[str, str, str]:
    """'...q_proj.lora_A.default.weight' -> the layer's name, and which of its parts: weight, bias, lora_A, lora_B."""
    for part in ("lora_A", "lora_B"):
        layer, found, _ = name.partition(f".{part}.{ADAPTER}.")
        if found:
            return layer, found, part
    layer, _, part = name.replace(BASE_LAYER, "").rpartition(".")
    return layer, "", part


def _fresh(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """peft's own start, A uniform and B zero, as a function of the seed and the name alone."""
    if ".lora_B." in name:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7]))
    bound = math.sqrt(6 / ((1 + 5) * shape[1]))  # kaiming_uniform_(a=sqrt(5))
    return torch.rand(shape, generator=generator) * (2 * bound) - bound


def file_name(name: str) -> str:
    """How peft's files call an adapter weight."""
    return _PREFIX + name.replace(f".{ADAPTER}.", ".")
