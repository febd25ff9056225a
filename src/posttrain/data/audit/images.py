"""What images are checked for besides whether they can be read, and what tells that two are the same."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b

from posttrain.data.images.reading import read_bytes
from posttrain.data.messages import RowError
from posttrain.records import Conversation, ImageSource, Tokens

SMALLEST_SIDE = 28  # pixels; below it is less than one token of most models
MOST_PIXELS = 32_000_000

Found = tuple[str, str]  # kind, what was found


def check_images(sources: tuple[ImageSource, ...]) -> Iterator[Found]:
    """What is odd about the sizes of a row's images, which are known."""
    for number, source in enumerate(sources):
        assert source.size
        width, height = source.size
        if min(width, height) < SMALLEST_SIDE:
            yield "tiny-image", f"image {number} is {width} x {height} pixels"
        if width * height > MOST_PIXELS:
            yield "huge-image", f"image {number} is {width} x {height} pixels"


def image_keys(record: Conversation | Tokens) -> tuple[int, ...]:
    """For each image of the row 64 bits that are equal where two are the same file."""
    return tuple(_key(source) for source in record.images) if isinstance(record, Conversation) else ()


def _key(source: ImageSource) -> int:
    path = source.path or ""
    try:
        content = path.encode() if "://" in path else read_bytes(source)  # what lies far away is not fetched again
    except RowError:
        content = path.encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest())
