"""What is known of models. transformers imports torchvision wherever it is installed, so it must be importable from here on."""

from __future__ import annotations

import importlib.util
import sys

# operators that torchvision's Python files name when they are imported
_OPERATORS = ("nms", "qnms")


def _make_torchvision_importable() -> None:
    """A torchvision whose compiled part is for another torch fails at its import, and with it all of transformers, although nothing
    compiled is needed to read images: then its operators get names, and no code."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        import torch

        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in _OPERATORS:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


if importlib.util.find_spec("torchvision"):
    _make_torchvision_importable()
