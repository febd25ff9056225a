"""What a row says of its images -> the images in the order of their marks, and the messages with those marks as parts.

A mark is a part {"type": "image"} of a message, or `<image>` in a text of one. A part may hold its image; one that does not
takes the next of the row's column.
"""

from __future__ import annotations

import base64
import binascii
import io
import os
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from posttrain.data.messages import Messages, RowError, kind_of
from posttrain.records import ImageSource
from posttrain.wording import counted

MARK = "<image>"
PART = {"type": "image"}
DISAGREE, BAD_IMAGE, IN_AN_ANSWER = "marks and images disagree", "bad image", "image in an answer"
NOT_MARKED = "no mark says where the images stand: they were put before the text of the first user message"
NO_IMAGE = f"{MARK} stays text, for the row has no image; if it stands in another column, name that by data.image_key"
TYPED = f"{MARK} stays text, for the row's images are parts of their own; take it out of the text if it stands for one of them"
_PART_TYPES = ("image", "image_url", "input_image")
_LIKE_AN_IMAGE = re.compile(r"image|img|picture|photo", re.IGNORECASE)
_PLACES = ("bytes", "path", "image", "url", "image_url", "base64", "data")  # keys that hold an image, in this order
_OF_A_PART = {"type", "text", "detail", "index"}  # what else such a part may hold
_SETTINGS = ("min_pixels", "max_pixels", "resized_height", "resized_width")
# how the base64 text of a JPEG, PNG, GIF, WebP, TIFF or BMP file begins; the first looks like a path
_ENCODED = re.compile(r"(?:/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqAA|TU0AK|Qk[0-3])[A-Za-z0-9+/\s]{56,}={0,2}\s*")


def with_images(messages: Messages, column: Any, folder: str) -> tuple[Messages, tuple[ImageSource, ...], list[str]]:
    """Messages whose marks are parts {"type": "image"}, the images in that order, and notes.

    `column` is what the row's column of images holds, if anything; relative paths begin at `folder`. A message without a
    mark stays as it is. Raises RowError.
    """
    in_column = _in_column(column, folder)
    messages = [_without_null_media(message) for message in messages]
    _refuse_unknown_parts(messages)
    parts = [part for message in messages for part in _image_parts(message)]
    notes: list[str] = []
    if not parts and in_column:
        messages, notes = _marked(messages, len(in_column))
        parts = [part for message in messages for part in _image_parts(message)]
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and any(_image_parts(message)):
            raise RowError(
                IN_AN_ANSWER, f"message {number} is the assistant's and holds an image; models answer in text"
            )
    typed = any(MARK in text for message in messages if message["role"] == "user" for text in _texts(message))
    if not parts:
        return messages, (), [NO_IMAGE] if typed else []
    notes += [TYPED] if typed else []
    held = [_held_by(part, folder) for part in parts]
    _check_agree([part for part, image in zip(parts, held, strict=True) if image is None], len(in_column))
    rest = iter(in_column)
    images = tuple(next(rest) if image is None else image for image in held)
    return [_as_parts(message) if any(_image_parts(message)) else message for message in messages], images, notes


def is_image_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type") in _PART_TYPES


def num_images(messages: Messages) -> int:
    """How many images the messages show."""
    return sum(1 for message in messages for _ in _image_parts(message))


def to_source(value: Any, folder: str, where: str) -> ImageSource:
    """One image in any of the forms that rows have: a path, a URL, a data URI, base64 text, bytes, a picture, or an object
    with one."""
    if isinstance(value, bytes | bytearray | memoryview):
        if not len(value):
            raise RowError(BAD_IMAGE, f"{where} has 0 bytes")
        return ImageSource(data=bytes(value))
    if isinstance(value, str) and value.strip():
        return _from_text(value, folder, where)
    if hasattr(value, "convert") and hasattr(value, "save"):
        return ImageSource(data=_as_png(value))
    if isinstance(value, dict):
        for name in _SETTINGS:
            if value.get(name) is not None:
                raise RowError(
                    BAD_IMAGE, f"{where} sets {name} for itself; that holds for all images: model.processor_kwargs"
                )
        for key in _PLACES:
            if value.get(key) is not None:
                return to_source(value[key], folder, where)
    found = f"an object with {', '.join(value) or 'nothing'}" if isinstance(value, dict) else kind_of(value)
    found = "an empty text" if isinstance(value, str) else found
    raise RowError(
        BAD_IMAGE, f"{where} is {found}; expected a path, a URL, base64 text, bytes or an object with one of them"
    )


def _from_text(text: str, folder: str, where: str) -> ImageSource:
    if text.startswith("data:"):
        head, comma, encoded = text.partition(",")
        if not comma or not head.endswith(";base64"):
            raise RowError(BAD_IMAGE, f"{where} begins with {text[:40]!r}; expected data:image/png;base64,...")
        return ImageSource(data=_decoded(unquote(encoded), where))
    if _ENCODED.fullmatch(text):
        return ImageSource(data=_decoded(text, where))
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if "\0" in text or len(text) > 4096:
        raise RowError(
            BAD_IMAGE, f"{where} begins with {text[:40]!r}, and is neither a path nor the base64 text of an image"
        )
    if "://" in text or os.path.isabs(text):
        return ImageSource(path=text)
    if "://" in folder:
        return ImageSource(path=f"{folder.rstrip('/')}/{text}")
    return ImageSource(path=os.path.abspath(os.path.join(folder, text)))


def _as_png(picture: Any) -> bytes:
    """A picture of PIL, which is what datasets makes of a hub set's images, without loss."""
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, "PNG", compress_level=1)
    return stream.getvalue()


def _decoded(text: str, where: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(BAD_IMAGE, f"{where} is not base64: {error}") from None
    if not data:
        raise RowError(BAD_IMAGE, f"{where} has 0 bytes")
    return data


def _in_column(column: Any, folder: str) -> list[ImageSource]:
    if column is None:
        return []
    if hasattr(column, "tolist"):
        column = column.tolist()
    values = list(column) if isinstance(column, list | tuple) else [column]
    return [to_source(value, folder, f"image {number}") for number, value in enumerate(values)]


def _held_by(part: dict[str, Any], folder: str) -> ImageSource | None:
    """The image that the part itself brings; None for a bare mark."""
    rest = {key: item for key, item in part.items() if item is not None and key not in _OF_A_PART}
    return to_source(rest, folder, "the image of a part") if rest else None


def _image_parts(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    content = message.get("content")
    return (part for part in content if is_image_part(part)) if isinstance(content, list) else iter(())


def _refuse_unknown_parts(messages: Messages) -> None:
    """Raise RowError for an image in a part of another type: most templates pass over it, and say nothing."""
    for number, message in enumerate(messages):
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if is_image_part(part):
                continue
            filled = [key for key, value in part.items() if value is not None]
            if any(_LIKE_AN_IMAGE.search(word) for word in (part["type"], *filled)):
                raise RowError(
                    BAD_IMAGE,
                    f"message {number} has an image in a part of type {part['type']!r}; expected type 'image'",
                )


def _check_agree(marks: list[dict[str, Any]], num_images: int) -> None:
    """Raise RowError unless there is a mark for each image of the column, in its order."""
    if len(marks) != num_images:
        raise RowError(
            DISAGREE, f"{counted(len(marks), 'mark')} in the messages, and {counted(num_images, 'image')} for them"
        )
    for number, mark in enumerate(marks):
        if mark.get("index") not in (None, number):
            raise RowError(
                DISAGREE,
                f"mark {number} has the index {mark['index']}; marks take the row's images in their order: put the images "
                "in the order of the marks",
            )


def _marked(messages: Messages, count: int) -> tuple[Messages, list[str]]:
    """With each `<image>` in texts as a part; where there is none, `count` parts before the first user message's text."""
    if any(MARK in text for message in messages for text in _texts(message)):
        return [_split(message) for message in messages], []
    first = next((number for number, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None:
        raise RowError(
            DISAGREE, f"{counted(count, 'image')}, and neither a mark for them nor a user message to show them in"
        )
    content = messages[first].get("content")
    texts = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
    shown = {**messages[first], "content": [*(dict(PART) for _ in range(count)), *texts]}
    return [*messages[:first], shown, *messages[first + 1 :]], [NOT_MARKED]


def _split(message: dict[str, Any]) -> dict[str, Any]:
    if not any(MARK in text for text in _texts(message)):
        return message
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    split: list[Any] = []
    for part in parts:
        if part.get("type") != "text":
            split.append(part)
            continue
        for number, text in enumerate(part["text"].split(MARK)):
            split += [dict(PART)] if number else []
            split += [{"type": "text", "text": text}] if text else []
    return {**message, "content": split}


def _as_parts(message: dict[str, Any]) -> dict[str, Any]:
    """The message with what a template is to see of its parts, and nothing else."""
    parts = [dict(PART) if is_image_part(part) else _plain(part) for part in message["content"]]
    return {**message, "content": parts}


def _plain(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "text", "text": part["text"]} if part.get("type") == "text" else part


def _without_null_media(message: dict[str, Any]) -> dict[str, Any]:
    """Without null fields that templates take for an image merely because they are there."""
    content = message.get("content")
    if not isinstance(content, list):
        return message

    def kept(part: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in part.items() if v is not None or not k.startswith(("image", "video", "audio"))}

    return {**message, "content": [kept(part) if isinstance(part, dict) else part for part in content]}


def _texts(message: dict[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, list):
        return [part["text"] for part in content if part.get("type") == "text"]
    return [content] if isinstance(content, str) else []
