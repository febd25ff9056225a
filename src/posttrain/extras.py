"""Packages that only some runs need."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec

from posttrain.errors import InputError


def check_images_installed(package: str, module: str, wanted_by: str) -> None:
    """Raise InputError where a package of the extra `images` is missing."""
    if find_spec(module) is None:
        # torch is named so that it stays: pip would bring the newest torchvision, and with it another torch
        torch = version("torch").partition("+")[0]
        raise InputError(
            f"{wanted_by} the package {package}, which is missing. Install it by `pip install torch=={torch} 'posttrain[images]'`."
        )
