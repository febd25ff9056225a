"""Where a sharded model's weights come from: parts of tensors, read by name, so that no process needs them all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

Part = tuple[slice, ...]
_DERIVED = "rotary_emb.inv_freq"  # old files hold it; models compute it


class Weights(Protocol):
    """A model's weights. Every process must read the same names in the same order, each its own parts."""

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        """The part of a tensor that is `shape` as a whole."""
        ...


class FileWeights:
    """Those of safetensors files whose tensors are the model's own, shape by shape, under its names or those of older versions."""

    def __init__(self, files: dict[str, tuple[Path, str]]):
        self._files = files  # by the model's name of the tensor: the file, and its name there
        self._open: tuple[Path, Any] | None = None

    @classmethod
    def matching(cls, folder: Path, lm: Any) -> FileWeights | None:
        """The files of a model folder, or None where transformers must translate more than names (quantized, split or joined tensors,
        no safetensors)."""
        from safetensors import safe_open

        if getattr(lm.config, "quantization_config", None):
            return None
        files: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        named = _namer(lm)
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, it is no dict
                    name = named(key)
                    if name is None or name in files:
                        return None
                    files[name], shapes[name] = (path, key), tuple(opened.get_slice(key).get_shape())
        state = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
        own = {name for name, _ in lm.named_parameters()}
        tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - own
        needed = {name: shape for name, shape in state.items() if name not in tied}
        extra = {name for name in shapes.keys() - state.keys() if not name.endswith(_DERIVED)}
        same = all(shapes.get(name) == shape for name, shape in needed.items())
        return cls(files) if same and not extra else None

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        from safetensors import safe_open

        path, key = self._files[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1].get_slice(key)[part]


def _namer(lm: Any) -> Callable[[str], str | None]:
    """How the model calls a tensor of its files, by transformers' own table of old names; None where more than the name changes."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    changes = get_model_conversion_mapping(lm)
    names = [change for change in changes if isinstance(change, WeightRenaming)]
    others = [change for change in changes if isinstance(change, WeightConverter)]
    state = lm.state_dict()

    def named(key: str) -> str | None:
        name, changed = rename_source_key(key, names, others, lm.base_model_prefix, state)
        return name if changed is None else None

    return named


def weights_folder(path: str, revision: str | None) -> Path:
    """The folder with a model's files; for a name on the hub they are downloaded first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
