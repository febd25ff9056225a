"""Model paths -> tokenizers and models: a folder, a run of posttrain, a name on the hub, or a config alone."""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.config.schema import is_template
from posttrain.errors import InputError

if TYPE_CHECKING:
    import torch

EXPORTS = ("checkpoint-best", "checkpoint-final")  # of a run folder, the one to use first
OWN_MODELS = {"posttrain/tiny": Path(__file__).with_name("tiny")}  # what comes with posttrain: no weights, a tokenizer
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
    """A causal language model on the CPU, its weights in `dtype`. Random weights are a function of the seed."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from posttrain.distributed.device import ran_out_of_memory

    config = load_config(path, override_config, revision, trust)
    transformers.utils.logging.disable_progress_bar()  # the run has a live line of its own
    if random_weights:
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    folder = Path(path)
    if folder.is_dir() and not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise InputError(
            f"{path} has no weights ({', '.join(WEIGHT_FILES)}). To start from random ones, say model.random_weights=true."
        )
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
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
    """A causal language model whose weights have no memory yet (torch's meta device).

    True where its tables are filled: buffers that no file holds, such as rotary frequencies. Else they must be taken from
    a whole model, with `tables` and `set_tables`.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(path, override_config, revision, trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)
    for module in model.modules():
        keys = [
            key
            for key, table in module._buffers.items()
            if table is not None and key in module._non_persistent_buffers_set
        ]
        if not keys:
            continue
        if not all(module._buffers[key].is_floating_point() for key in keys):
            return model, False
        for key in keys:
            module._buffers[key] = torch.full(module._buffers[key].shape, torch.nan, dtype=module._buffers[key].dtype)
        for weight in module.parameters(recurse=False):
            weight._is_hf_initialized = True  # transformers then makes the tables only
        model._init_weights(module)
        if any(module._buffers[key].isnan().any() for key in keys):
            return model, False
    return model, True


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
    for name, value in (override or {}).items():
        if not hasattr(config, name):
            raise InputError(f"model.override_config.{name}: {type(config).__name__} has no such field.")
        setattr(config, name, value)
    if override and "num_hidden_layers" in override and getattr(config, "layer_types", None):
        config.layer_types = _types_of_layers(config.layer_types, config.num_hidden_layers)
    return config


def _types_of_layers(types: list[str], num_layers: int) -> list[str]:
    """The kind of attention of each layer, where there are fewer or more than `config.json` has."""
    if len(types) < num_layers and len(set(types)) > 1:
        raise InputError(
            f"model.override_config.num_hidden_layers={num_layers}: config.json says of {len(types)} layers which attention each has, and "
            "they differ; give model.override_config.layer_types too."
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
