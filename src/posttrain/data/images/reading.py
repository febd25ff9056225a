"""Bytes of images, and pictures from bytes: as transformers' own loader makes them, or the reason why there is none."""

from __future__ import annotations

import io
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.messages import RowError
from posttrain.extras import check_images_installed
from posttrain.records import ImageSource

if TYPE_CHECKING:
    from PIL.Image import Image

NOT_FOUND, BROKEN, NOT_FETCHED = "image not found", "broken image", "image cannot be fetched"
TOO_LARGE, TOO_SMALL, CHANGED = "image too large", "image too small", "image changed"
TOO_DEEP = "image of more than 8 bits"
TIMEOUT_SECONDS = 20
WAITS_SECONDS = (0.5, 2.0)  # before the second and third attempt


def read_bytes(source: ImageSource) -> bytes | memoryview:
    """The image as it is encoded. Raises RowError."""
    if source.data is not None:
        return source.data
    path = source.path or ""
    if "://" in path:
        return _fetched(path)
    try:
        with open(path, "rb") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        raise RowError(NOT_FOUND, f"{path} does not exist{_advice_on(Path(path))}", path) from None
    except OSError as error:
        raise RowError(NOT_FOUND, f"{path} cannot be read: {error.strerror or error}", path) from None


def _advice_on(missing: Path) -> str:
    """Where the file is, if one folder above, as in LLaMA-Factory's demo; else where it is looked for."""
    above = missing.parent.parent / missing.name
    if above.is_file():
        return f", and {above} does; move or link it there"
    return "; relative paths begin at the folder of their data file, or at data.image_dir"


def decode(source: ImageSource) -> Image:
    """The whole picture, upright and in RGB, as transformers' `load_image` makes it. Raises RowError."""
    check_images_installed("pillow", "PIL", "Images need")
    from PIL import Image, ImageOps

    data = read_bytes(source)
    try:
        with Image.open(io.BytesIO(data)) as image:
            if not all(image.size):
                found = f"{name_of(source)} has {image.width} x {image.height} pixels"
                raise RowError(TOO_SMALL, found, source.path)
            _check_depth(image, source)
            picture = ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError as error:
        raise RowError(TOO_LARGE, f"{name_of(source)}: {str(error).partition(',')[0]}", source.path) from None
    except RowError:
        raise
    except Exception as error:  # decoders raise what they like
        said = "no image that PIL knows" if isinstance(error, Image.UnidentifiedImageError) else f"{error}"
        raise RowError(
            BROKEN, f"{name_of(source)} ({len(data):,} bytes): {said or type(error).__name__}", source.path
        ) from None
    if source.size is not None and picture.size != source.size:
        was, now = (f"{width} x {height}" for width, height in (source.size, picture.size))
        raise RowError(CHANGED, f"{name_of(source)} had {was} pixels when rows were tokenized, and has {now} now")
    return picture


def _check_depth(image: Image, source: ImageSource) -> None:
    """Raise RowError for grey values that 8 bits cannot hold. PIL, and so transformers, makes what is above 255 white without a word."""
    if image.mode[0] not in "IF":
        return
    values = np.asarray(image)
    least, most = float(values.min()), float(values.max())
    if image.mode == "F" or least < 0 or most > 255:
        raise RowError(
            TOO_DEEP,
            f"{name_of(source)} has grey values from {least:g} to {most:g}, and a model is shown 0 to 255 alone, all above as white. "
            "Write it with 8 bits a pixel",
            source.path,
        )


def name_of(source: ImageSource) -> str:
    """What a message calls the image."""
    return source.path or "the image in the row"


def _fetched(url: str) -> bytes:
    fetch = _over_http if url.startswith(("http://", "https://")) else _over_fsspec
    for wait in (*WAITS_SECONDS, None):
        try:
            return fetch(url)
        except RowError:
            raise
        except Exception as error:  # each protocol has errors of its own
            if wait is None:
                attempts = len(WAITS_SECONDS) + 1
                said = getattr(error, "reason", None) or error or type(error).__name__
                found = f"{url} cannot be fetched ({attempts} attempts): {said}. Without a network, give files"
                raise RowError(NOT_FETCHED, found) from None
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _over_http(url: str) -> bytes:
    asked = urllib.request.Request(url, headers={"User-Agent": "posttrain"})
    try:
        with urllib.request.urlopen(asked, timeout=TIMEOUT_SECONDS) as answer:
            return answer.read()
    except urllib.error.HTTPError as error:
        said = f"the server answers {error.code} {error.reason}"
        if error.code in (408, 429) or error.code >= 500:
            raise OSError(said) from None
        raise RowError(NOT_FETCHED, f"{url}: {said}") from None


def _over_fsspec(url: str) -> Any:
    import fsspec

    try:
        with fsspec.open(url, "rb") as stream:
            return stream.read()
    except FileNotFoundError:
        raise RowError(NOT_FOUND, f"{url} does not exist") from None
    except (ImportError, ValueError) as error:  # a protocol that is unknown, or whose package is missing
        raise RowError(NOT_FETCHED, f"{url}: {error}") from None
