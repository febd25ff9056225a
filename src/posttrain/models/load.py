"""Model paths -> tokenizers and models: a folder, a run of posttrain, a name on the hub, or a config alone."""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.values import is_template
from posttrain.errors import InputError
from posttrain.extras import check_images_installed

if TYPE_CHECKING:
    import torch

EXPORTS = ("checkpoint-best", "checkpoint-final")  # of a run folder, the one to use first
# what comes with posttrain: no weights, a tokenizer and, where it sees, a processor
OWN_MODELS = {f"posttrain/{name.replace('_', '-')}": Path(__file__).with_name(name) for name in ("tiny", "tiny_vision")}
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
# what processors are given that changes nothing of how they see, or is not for a person to give
NO_SETTINGS = {
    "self", "kwargs", "image_processor", "video_processor", "tokenizer", "chat_template", "image_processor_type", "processor_class",
    "return_tensors", "device", "data_format", "input_data_format", "disable_grouping",
}  # fmt: skip
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def find_model(path: str | None, option: str = "model.path") -> str:
    """The folder or hub name behind a path; for a run folder its best export, else its final one. Raises InputError."""
    if not path:
        raise InputError(f"{option} is missing: give a model folder, a run folder, or a name on the hub.")
    if path in OWN_MODELS:
        return str(OWN_MODELS[path])
    folder = Path(path)
    if not folder.exists():
        if path.startswith(("/", "./", "../", "~")) or path.count("/") != 1:
            raise InputError(
                f"{option}: {path} does not exist.{_nearest(folder)} Expected a model's folder, or its name on the hub, owner/name."
            )
        if folder.parent.is_dir():  # a mistyped path would go to the hub, and wait there
            raise InputError(
                f"{option}: {path} does not exist, and {folder.parent} is a folder here.{_nearest(folder)} If a model on the hub is "
                "meant, start from a folder that has none of this name."
            )
        return path
    if folder.is_file():
        raise InputError(f"{option}: {path} is a file; expected a folder with config.json.")
    if (folder / "config.json").exists():
        return path
    for export in EXPORTS:
        if (folder / export / "config.json").exists():
            return str(folder / export)
    if (folder / "progress.json").exists():
        raise InputError(
            f"{option}: {path} is a checkpoint to resume from, not a finished model. {_export_beside(folder)}"
        )
    if (folder / "run.json").exists():
        raise InputError(f"{option}: the run {path} has no finished model yet; resume it first, to its end.")
    raise InputError(f"{option}: {path} holds no config.json, so it is not a model folder of transformers.")


def find_tokenizer(path: str) -> str:
    """Likewise behind the path of a tokenizer, which may lie in a folder without a model."""
    return find_model(path, "model.tokenizer_path") if path in OWN_MODELS or Path(path, "run.json").exists() else path


def _nearest(folder: Path) -> str:
    beside = [other.name for other in folder.parent.iterdir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1)
    return f" Nearest: {folder.with_name(near[0])}." if near else ""


def _export_beside(checkpoint: Path) -> str:
    finished = [checkpoint.with_name(name) for name in EXPORTS if (checkpoint.with_name(name) / "config.json").exists()]
    if finished:
        return f"That of its run is {finished[0]}."
    return (
        "Its run has none yet: run the same command to its end, or go on from it elsewhere with trainer.resume_mode=resume_path "
        f"trainer.resume_from_path={checkpoint}."
    )


def load_tokenizer(
    path: str, chat_template: str | None = None, revision: str | None = None, trust: bool = False
) -> Any:
    """The tokenizer of a model, with the template that `chat_template` is, or that lies in this file, if one is given."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"No tokenizer could be loaded from {path}: {_first_line(error)}") from None
    if chat_template and is_template(chat_template):
        tokenizer.chat_template = chat_template
    elif chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"data.chat_template: cannot read {chat_template}: {reason}. Give a Jinja file, or the "
                "template itself.") from None  # fmt: skip
    return tokenizer


def load_processor(
    path: str, revision: str | None = None, trust: bool = False, kwargs: dict[str, Any] | None = None
) -> Any | None:
    """What turns images into a model's inputs: the processor of a vision model, else None. `kwargs` change its settings.

    Raises InputError where it is missing or cannot be loaded.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").exists():  # a tokenizer alone, or one with its processor
        sees = any((folder / name).exists() for name in PROCESSOR_FILES)
    else:
        sees = sees_images(load_config(path, None, revision, trust))
    if not sees:
        if kwargs:
            raise InputError(
                f"model.processor_kwargs: {path} is a text model and has no processor of images; leave it out."
            )
        return None
    for package, module in (("torchvision", "torchvision"), ("pillow", "PIL")):
        check_images_installed(package, module, f"{path} reads images and needs")
    missing = f"{path} sees images and has no processor of them; copy {' or '.join(PROCESSOR_FILES)} from the model that it was made of."
    if folder.is_dir() and not any((folder / name).exists() for name in PROCESSOR_FILES):
        raise InputError(missing)
    from transformers import AutoProcessor

    # Qwen's processors warn of max_pixels at each call, though it is a setting of theirs and no argument of the call
    warnings.filterwarnings("ignore", message=".*`max_pixels` to a processor call", category=FutureWarning)
    try:
        processor = AutoProcessor.from_pretrained(path, revision=revision, trust_remote_code=trust, **(kwargs or {}))
    except Exception as error:  # each family's own checks of its settings
        raise InputError(f"No processor of images could be loaded from {path}: {_first_line(error)}") from None
    if getattr(processor, "image_processor", None) is None:
        raise InputError(missing)
    _check_settings(processor, kwargs or {})
    return processor


def _check_settings(processor: Any, kwargs: dict[str, Any]) -> None:
    """Raise InputError for a setting that the processor does not have: transformers would pass over it."""
    images = processor.image_processor
    known = {*images.to_dict(), *getattr(getattr(images, "valid_kwargs", None), "__annotations__", ())}
    known = (known | set(inspect.signature(type(processor).__init__).parameters)) - NO_SETTINGS
    for name in kwargs:
        if name in known:
            continue
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(
            f"model.processor_kwargs.{name}: {type(processor).__name__} has no such setting. "
            + (f"Nearest: {near[0]}." if near else f"It has {', '.join(sorted(known))}.")
        )


def load_model(
    path: str,
    *,
    dtype: torch.dtype,
    random_weights: bool = False,
    override_config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust: bool = False,
    seed: int = 0,
) -> Any:
    """A language model on the CPU, with its vision tower if it has one, its weights in `dtype`. Random weights are a function of
    the seed."""
    import torch
    import transformers

    from posttrain.distributed.device import ran_out_of_memory

    config = _of_full_precision(load_config(path, override_config, revision, trust), path)
    transformers.utils.logging.disable_progress_bar()  # the run has a live line of its own
    if random_weights:
        torch.manual_seed(seed)
        return model_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)
    folder = Path(path)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise InputError(
            f"{path} has no weights ({', '.join(WEIGHT_FILES)}). To start from random ones, say model.random_weights=true."
        )
    try:
        loaded: Any = model_class(config).from_pretrained(
            path, config=config, dtype=dtype, revision=revision, trust_remote_code=trust, output_loading_info=True
        )
    except Exception as error:  # broken files raise errors of many libraries
        if ran_out_of_memory(error):  # no fault of the files
            raise
        raise InputError(
            f"The weights of {path} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from None
    model, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        raise InputError(f"{path} lacks {len(missing)} of the model's weights, such as {missing[0]}.")
    return model


def empty_model(
    path: str,
    *,
    dtype: torch.dtype,
    override_config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust: bool = False,
) -> tuple[Any, bool]:
    """The same model, its weights without memory yet (torch's meta device).

    True where its tables are filled: buffers that no file holds, such as rotary frequencies. Else they must be taken from
    a whole model, with `tables` and `set_tables`.
    """
    import torch
    from transformers import PreTrainedModel

    config = _of_full_precision(load_config(path, override_config, revision, trust), path)
    with torch.device("meta"):
        model = model_class(config).from_config(config, dtype=dtype, trust_remote_code=trust)
    # each model inside of a model makes its own tables: the innermost comes last
    makers = {id(inside): m for m in model.modules() if isinstance(m, PreTrainedModel) for inside in m.modules()}
    for module in model.modules():
        keys = [
            key
            for key, table in module._buffers.items()
            if table is not None and key in module._non_persistent_buffers_set
        ]
        if not keys:
            continue
        for key in keys:
            table = module._buffers[key]
            module._buffers[key] = torch.full(table.shape, _unset(table.dtype), dtype=table.dtype)
        for weight in module.parameters(recurse=False):
            weight._is_hf_initialized = True  # transformers then makes the tables only
        makers[id(module)]._init_weights(module)
        if any(_is_unset(module._buffers[key]) for key in keys):
            return model, False
    return model, True


def _unset(dtype: torch.dtype) -> float | int:
    """A number that no table holds."""
    import torch

    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def _is_unset(table: torch.Tensor) -> bool:
    return bool((table.isnan() if table.is_floating_point() else table == _unset(table.dtype)).any())


def sees_images(config: Any) -> bool:
    """Whether a model of this configuration takes images."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as known

    return getattr(config, "vision_config", None) is not None and config.model_type in known


def model_class(config: Any) -> Any:
    """transformers' maker of models that write text, with eyes where the configuration has them."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if sees_images(config) else AutoModelForCausalLM


def tables(model: Any) -> dict[str, torch.Tensor]:
    """The buffers of a whole model that no file holds."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name not in kept}


def set_tables(model: Any, found: dict[str, torch.Tensor]) -> None:
    for name, table in found.items():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner)._buffers[key] = table


def load_config(path: str, override: dict[str, Any] | None, revision: str | None = None, trust: bool = False) -> Any:
    """The model's configuration with fields replaced; unknown fields are refused."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise InputError(f"No model configuration could be loaded from {path}: {_first_line(error)}") from None
    _replace(config, override or {}, "model.override_config")
    return config


def _replace(config: Any, fields: dict[str, Any], option: str) -> None:
    """Fields of a configuration, and of the parts that it has (text_config, vision_config)."""
    for name, value in fields.items():
        if not hasattr(config, name):
            raise InputError(f"{option}.{name}: {type(config).__name__} has no such field.")
        if isinstance(value, dict) and name in config.sub_configs:
            _replace(getattr(config, name), value, f"{option}.{name}")
        else:
            setattr(config, name, value)
    if "num_hidden_layers" in fields and getattr(config, "layer_types", None):
        config.layer_types = _types_of_layers(config.layer_types, config.num_hidden_layers, option)


def _of_full_precision(config: Any, path: str) -> Any:
    """The configuration, if it is not one of packed weights, which nothing here can train or write."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return config
    method = (found if isinstance(found, dict) else vars(found)).get("quant_method", "quantized")
    raise InputError(
        f"{path} has weights that are quantized already ({getattr(method, 'value', method)}, by quantization_config of its config.json). Give "
        "the model that it was made of; model.load_in_4bit=true with model.lora_rank=16 then keeps it in 4 bits (QLoRA)."
    )


def _types_of_layers(types: list[str], num_layers: int, option: str) -> list[str]:
    """The kind of attention of each layer, where there are fewer or more than `config.json` has."""
    if len(types) < num_layers and len(set(types)) > 1:
        raise InputError(
            f"{option}.num_hidden_layers={num_layers}: config.json says of {len(types)} layers which attention each has, and they differ; "
            f"give {option}.layer_types too."
        )
    return types[:num_layers] + types[:1] * (num_layers - len(types))


def architecture_fingerprint(config: Any) -> str:
    """Of what in a configuration decides the weights, without where it came from or who wrote it."""
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        fields.pop(name, None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
