"""Where a sharded model's weights come from: parts of tensors, read by name, so that no process needs them all."""

from __future__ import annotations

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
    """Those of safetensors files whose tensors are the model's own, name by name and shape by shape."""

    def __init__(self, files: dict[str, Path]):
        self._files = files  # by the name of the tensor
        self._open: tuple[Path, Any] | None = None

    @classmethod
    def matching(cls, folder: Path, lm: Any) -> FileWeights | None:
        """The files of a model folder, or None where transformers must translate them (other names, quantized, no safetensors)."""
        from safetensors import safe_open

        if getattr(lm.config, "quantization_config", None):
            return None
        files: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    files[name], shapes[name] = path, tuple(opened.get_slice(name).get_shape())
        state = {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}
        own = {name for name, _ in lm.named_parameters()}
        tied = {name for name, _ in lm.named_parameters(remove_duplicate=False)} - own
        needed = {name: shape for name, shape in state.items() if name not in tied}
        extra = {name for name in shapes.keys() - state.keys() if not name.endswith(_DERIVED)}
        same = all(shapes.get(name) == shape for name, shape in needed.items())
        return cls(files) if same and not extra else None

    def read(self, name: str, shape: tuple[int, ...], part: Part) -> Tensor:
        from safetensors import safe_open

        path = self._files[name]
        if self._open is None or self._open[0] != path:
            self._open = (path, safe_open(path, framework="pt"))
        return self._open[1].get_slice(name)[part]


def weights_folder(path: str, revision: str | None) -> Path:
    """The folder with a model's files; for a name on the hub they are downloaded first."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, revision=revision, allow_patterns=["*.safetensors", "*.json"]))
