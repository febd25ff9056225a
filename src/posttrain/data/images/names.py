"""Images as people read of them: by name in files, by size where a text is shown."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from posttrain.data.encoded import EncodedImage
from posttrain.records import ImageSource

HASH_CHARACTERS = 16


def reference_of(source: ImageSource) -> str:
    """What a file says of it: its path, or a short hash of its bytes."""
    if source.path is not None:
        return source.path
    assert source.data is not None
    return f"sha256:{hashlib.sha256(source.data).hexdigest()[:HASH_CHARACTERS]}"


def question_of(messages: Sequence[dict[str, Any]], images: Sequence[EncodedImage]) -> str:
    """The text of the last message, in which an image is written as [image 640x480]. `images` are those of all messages."""
    content = messages[-1].get("content") if messages else None
    if not isinstance(content, list):
        return content or ""
    own = sum(part.get("type") == "image" for part in content)
    sizes = (f"[image {image.width}x{image.height}]" for image in images[len(images) - own :])
    return "".join(next(sizes) if part.get("type") == "image" else str(part.get("text", "")) for part in content)
