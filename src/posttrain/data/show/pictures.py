"""Images as a page draws them: small copies that stand in it as text."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from posttrain.data.images.reading import decode
from posttrain.records import ImageSource

LONGEST_SIDE = 320  # of a copy, in pixels
SHARP_SIDE = 112  # up to which a copy is kept pixel by pixel, as PNG


@dataclass(frozen=True)
class Thumbnail:
    url: str
    width: int
    height: int


def thumbnail(source: ImageSource) -> Thumbnail:
    """The image as its model sees it, no longer than LONGEST_SIDE. Raises RowError where it cannot be read."""
    image = decode(source)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    kind = "PNG" if max(image.size) <= SHARP_SIDE else "JPEG"
    stream = io.BytesIO()
    image.save(stream, kind, quality=80)
    text = base64.b64encode(stream.getvalue()).decode()
    return Thumbnail(f"data:image/{kind.lower()};base64,{text}", *image.size)


def place_of(source: ImageSource) -> str:
    """Where an image comes from, in few words."""
    return source.path if source.path is not None else f"{len(source.data or b''):,} bytes in the row"
