"""What rows say of images, in every form that people have, and what is wrong with those that cannot be used."""

from __future__ import annotations

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures import encoded, picture
from posttrain.data.formats import Columns, RowError, to_conversation
from posttrain.data.images import reading
from posttrain.data.images.expansion import look_at_all
from posttrain.data.images.reading import decode
from posttrain.data.images.references import NOT_MARKED, TYPED, num_images
from posttrain.records import Conversation, ImageSource

SEEN = picture(5, 3)
PNG = encoded(SEEN)
TEXT = base64.b64encode(PNG).decode()
PART = {"type": "image"}
ANSWER = {"role": "assistant", "content": "A circle"}


def user(*parts, **message) -> dict:
    return {"role": "user", "content": list(parts) if parts else "What is it?", **message}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def read(row: dict, folder: Path | str = "", **columns) -> Conversation:
    return to_conversation(row, Columns(**columns), str(folder))


def is_seen(source: ImageSource) -> bool:
    return np.array_equal(decode(source), SEEN)


def objects(value: object) -> np.ndarray:
    array = np.empty(1, dtype=object)
    array[0] = value
    return array


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.png").write_bytes(PNG)
    return tmp_path


VALUES = {
    "relative path": lambda folder: "pictures/1.png",
    "absolute path": lambda folder: f"{folder}/pictures/1.png",
    "file URL": lambda folder: f"file://{folder}/pictures/1.png",
    "fsspec URL": lambda folder: f"local://{folder}/pictures/1.png",
    "data URI": lambda folder: f"data:image/png;base64,{TEXT}",
    "base64": lambda folder: TEXT,
    "base64 of a JPEG, which begins like a path": lambda folder: base64.b64encode(encoded(SEEN, "JPEG")).decode(),
    "bytes": lambda folder: PNG,
    "picture of a hub set": lambda folder: Image.open(io.BytesIO(PNG)),
    "bytes of datasets": lambda folder: {"bytes": PNG, "path": "gone.png"},
    "path of datasets": lambda folder: {"bytes": None, "path": "pictures/1.png"},
    "url": lambda folder: {"url": "pictures/1.png"},
    "image": lambda folder: {"image": "pictures/1.png"},
}


@pytest.mark.parametrize("form", VALUES)
def test_every_form_of_an_image_is_read_from_a_column_and_from_a_part(form, folder):
    value = VALUES[form](folder)
    rows = [
        {"messages": [user(), ANSWER], "image": value},
        {"messages": [user(PART, text("What?")), ANSWER], "images": [value]},
        {"messages": [user({"type": "image", "image": value}, text("What?")), ANSWER], "images": []},
        {
            "messages": [
                user({"type": "image_url", "image_url": {"url": value, "detail": "low"}}, text("What?")),
                ANSWER,
            ]
        },
        {"messages": [user({"type": "image_url", "image_url": value, "text": None}, text("What?")), ANSWER]},
        {"question": "What?", "answer": "A circle", "images": objects(value)},
        {"conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "."}], "image": value},
    ]
    for row in rows:
        (source,) = read(row, folder).images
        if "JPEG" in form:
            assert decode(source).size == SEEN.size
        else:
            assert is_seen(source)
    for key in ("url", "path", "base64", "bytes"):
        assert read({"messages": [user({"type": "image", key: value}), ANSWER]}, folder).images == (source,)
    assert read({"messages": [user(), ANSWER], "a": {"b": [value]}}, folder, images="a.b").images == (source,)


def test_relative_paths_begin_at_image_dir_before_the_folder_of_the_file(folder):
    row = {"messages": [user(), ANSWER], "image": "1.png"}
    assert read(row, "elsewhere", image_dir=f"{folder}/pictures").images == (ImageSource(f"{folder}/pictures/1.png"),)
    assert read(row, "s3://bucket/set").images == (ImageSource("s3://bucket/set/1.png"),)


def contents(row: dict) -> list:
    return [message["content"] for message in read(row).messages]


def test_marks_become_parts_and_the_text_around_them_stays(folder):
    row = {"messages": [user(content="<image>\nWhat ?<image>"), ANSWER, user(content="And <image>"), ANSWER]}
    assert contents({**row, "images": ["1", "2", "3"]}) == [
        [PART, text("\nWhat ?"), PART], "A circle", [text("And "), PART], "A circle"
    ]  # fmt: skip
    assert contents(row) == ["<image>\nWhat ?<image>", "A circle", "And <image>", "A circle"]  # text, without images
    # where parts are marks, <image> is text; bare ones take what the column has
    own = {"type": "image", "image": "own.png"}
    mixed = read({"messages": [user(own, text("<image>"), {**PART, "index": 0}), ANSWER], "images": ["/1.png"]})
    assert mixed.messages[0]["content"] == [PART, text("<image>"), PART]
    assert [Path(image.path).name for image in mixed.images] == ["own.png", "1.png"] and mixed.notes == (TYPED,)
    # a mark in a text among parts; a system message keeps its form
    parts = [{"role": "system", "content": "s"}, user(text("a<image>b"), text("c")), ANSWER]
    assert contents({"messages": parts, "images": "1"})[:2] == ["s", [text("a"), PART, text("b"), text("c")]]


def test_images_without_any_mark_stand_before_the_first_user_message_and_that_is_noted():
    row = {"messages": [{"role": "system", "content": "s"}, user(), ANSWER, user(), ANSWER], "images": ["1", "2"]}
    found = read(row)
    assert found.messages[1]["content"] == [PART, PART, text("What is it?")] and found.notes == (NOT_MARKED,)
    assert num_images(found.messages) == 2 and found.messages[3]["content"] == "What is it?"
    assert read({"instruction": "i", "input": "x", "output": "o", "images": ["1"]}).messages[0]["content"] == [
        PART, text("i\nx")
    ]  # fmt: skip


def test_rows_without_images_are_what_they_were():
    for images in ({}, {"images": None}, {"images": []}, {"image": ""}, {"images": np.array([])}):
        found = read({"messages": [user(text("a")), ANSWER], **images})
        assert (found.messages, found.images, found.notes) == ([user(text("a")), ANSWER], (), ())
    nulls = user({"type": "text", "text": "a", "image": None, "image_url": None})
    assert read({"messages": [nulls, ANSWER]}).messages[0]["content"] == [text("a")]


MARKED = {"messages": [user(content="<image>a"), ANSWER]}
REFUSED = [
    ({**MARKED, "images": ["1", "2"]}, "marks and images disagree", "1 mark in the messages, and 2 images"),
    ({"messages": [user(PART, PART), ANSWER], "images": ["1"]}, "marks and images disagree", "2 marks"),
    ({"messages": [user(PART), ANSWER]}, "marks and images disagree", "0 images for them"),
    ({"messages": [ANSWER], "images": ["1"]}, "marks and images disagree", "nor a user message"),
    ({"messages": [user(), {**ANSWER, "content": "<image>"}], "images": ["1"]}, "image in an answer", "message 1"),
    ({"messages": [user(), {**ANSWER, "content": [PART]}], "images": ["1"]}, "image in an answer", "message 1"),
    ({**MARKED, "images": ["1"], "image": "2"}, "ambiguous form", "data.image_key"),
    ({**MARKED, "images": [None]}, "bad image", "image 0 is null"),
    ({**MARKED, "images": [b""]}, "bad image", "image 0 has 0 bytes"),
    ({**MARKED, "images": [7]}, "bad image", "image 0 is int; expected a path"),
    ({**MARKED, "images": [["1"]]}, "bad image", "image 0 is list"),
    ({**MARKED, "images": [{"id": 3}]}, "bad image", "an object with id"),
    ({**MARKED, "images": ["data:image/png,abc"]}, "bad image", "expected data:image/png;base64"),
    ({**MARKED, "images": ["data:image/png;base64,a"]}, "bad image", "is not base64"),
    ({**MARKED, "images": ["x" * 5000]}, "bad image", "neither a path nor"),
    ({**MARKED, "images": [{"image": "1", "max_pixels": 9}]}, "bad image", "model.processor_kwargs"),
    (
        {"messages": [user({**PART, "index": 1}, {**PART, "index": 0.0}), ANSWER], "images": ["1", "2"]},
        "marks and images disagree",
        "mark 0 has the index 1; .* in the order of the marks",
    ),
    ({"messages": [user({"type": "image", "source": {"data": TEXT}}), ANSWER]}, "bad image", "an object with source"),
    (
        {"messages": [user({"type": "img", "url": "1"}), ANSWER]},
        "bad image",
        "message 0 .* part of type 'img'; expected",
    ),
    (
        {"messages": [user({"type": "file", "image": "1"}), ANSWER]},
        "bad image",
        "part of type 'file'; expected type 'image'",
    ),
    (
        {"messages": [user({"type": "text", "text": "Who?", "image": "1"}), ANSWER]},
        "bad image",
        "part of type 'text'; expected type 'image'",
    ),
    ({"input_ids": [1, 2], "labels": [1, 2], "images": ["1"]}, "images with token ids", "give messages"),
    ({**MARKED, "videos": ["1"], "images": ["1"]}, "video or sound", "only text and images"),
    (
        {"messages": [{"role": "user", "content": "Who?", "images": ["1"]}, ANSWER]},
        "bad image",
        "message 0 has a field `images` beside its content",
    ),
    (
        {"prompt": [{"role": "user", "content": "Who?", "videos": ["1"]}], "completion": "He."},
        "video or sound",
        "message 0 has a field `videos`",
    ),
]


@pytest.mark.parametrize(("row", "kind", "said"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_rows_whose_images_cannot_be_meant_are_refused(row, kind, said):
    with pytest.raises(RowError, match=said) as refused:
        read(row)
    assert refused.value.kind == kind


def pictures_of_every_kind() -> dict[str, bytes]:
    rotated = Image.Exif()
    rotated[0x0112] = 6
    frames = [picture(5, 3, seed).convert("P") for seed in range(3)]
    return {
        "grey": encoded(SEEN.convert("L")),
        "grey and alpha": encoded(SEEN.convert("LA")),
        "alpha": encoded(SEEN.convert("RGBA")),
        "palette": encoded(SEEN.convert("P")),
        "palette with a transparent colour": encoded(SEEN.convert("P"), transparency=0),
        "black and white": encoded(SEEN.convert("1")),
        "CMYK": encoded(SEEN.convert("CMYK"), "JPEG"),
        "16 bits": encoded(Image.fromarray(np.arange(15, dtype=np.uint16).reshape(3, 5) * 17)),
        "animated": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "rotated by EXIF": encoded(SEEN, "JPEG", exif=rotated),
        "WebP": encoded(SEEN, "WEBP", lossless=True),
        "TIFF": encoded(SEEN, "TIFF"),
        "one pixel": encoded(picture(1, 1)),
    }


def test_pictures_are_decoded_as_transformers_does_it():
    from transformers.image_utils import load_image

    for kind, data in pictures_of_every_kind().items():
        expected = load_image(base64.b64encode(data).decode())
        found = decode(ImageSource(data=data))
        assert found.mode == "RGB" and np.array_equal(found, expected), kind
    assert decode(ImageSource(data=pictures_of_every_kind()["rotated by EXIF"])).size == (3, 5)
    assert decode(ImageSource(data=memoryview(bytearray(PNG))[:])).size == (5, 3)


def test_what_rgb_would_show_as_white_is_refused():
    """X-rays and depth have 16 bits: `load_image` makes them white all over."""
    grey = np.linspace(0, 60_000, 15).reshape(3, 5)
    deep = {
        "PNG": grey.astype(np.uint16), "TIFF": grey.astype(np.int32), "PPM": grey.astype(np.uint16), "floats.TIFF": grey / 60_000,
    }  # fmt: skip
    for name, values in deep.items():
        form = name.rpartition(".")[2]
        image = Image.fromarray(values.astype(np.float32) if name == "floats.TIFF" else values)
        with pytest.raises(RowError, match=r"grey values from 0 to (60000|1), .* Write it with 8 bits") as error:
            decode(ImageSource(data=encoded(image, form)))
        assert error.value.kind == "image of more than 8 bits"


def test_broken_images_say_what_is_wrong_and_where(folder, monkeypatch):
    (folder / "text.jpg").write_text("not a picture")
    (folder / "empty.png").write_bytes(b"")
    jpeg = encoded(picture(200, 200), "JPEG")
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    gone = ImageSource(path=str(folder / "gone.png"))
    said = {
        ImageSource(path=str(folder / "text.jpg")): ("broken image", r"text.jpg \(13 bytes\): no image that PIL knows"),
        ImageSource(path=str(folder / "empty.png")): ("broken image", r"empty.png \(0 bytes\)"),
        ImageSource(path=str(folder / "cut.jpg")): ("broken image", "truncated"),
        ImageSource(data=PNG[:50]): ("broken image", "the image in the row"),
        gone: ("image not found", "gone.png does not exist; .* data.image_dir"),
        ImageSource(path=str(folder)): ("image not found", "Is a directory"),
        ImageSource(path=str(folder / "pictures" / "1.png"), size=(9, 9)): ("image changed", "had 9 x 9 .* has 5 x 3"),
        ImageSource(path="memory://gone.png"): ("image not found", "memory://gone.png does not exist"),
        ImageSource(path="nowhere://x.png"): ("image cannot be fetched", "nowhere"),
    }
    for source, (kind, words) in said.items():
        with pytest.raises(RowError, match=words) as error:
            decode(source)
        assert error.value.kind == kind
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(RowError, match="15 pixels") as error:
        decode(ImageSource(path=str(folder / "pictures" / "1.png")))
    assert (error.value.kind, error.value.file) == ("image too large", str(folder / "pictures" / "1.png"))


@pytest.fixture
def server():
    """A server of one picture under /1.png, which fails twice before it gives /later.png; with the paths that were asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            code = 404 if self.path == "/gone.png" else 200
            if self.path == "/down.png" or (self.path == "/later.png" and asked.count(self.path) < 3):
                code = 503
            self.send_response(code)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *arguments: object) -> None:
            pass

    asked: list[str] = []
    with HTTPServer(("localhost", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://localhost:{listening.server_port}", asked
        listening.shutdown()
        thread.join()


def test_urls_are_fetched_once_and_what_fails_is_tried_three_times(server, monkeypatch):
    monkeypatch.setattr(reading, "WAITS_SECONDS", (0.0, 0.0))
    url, asked = server

    def looked(*names: str):
        (found,) = look_at_all([Conversation([], images=tuple(ImageSource(path=f"{url}/{name}") for name in names))])
        return found

    found = looked("1.png", "later.png")
    assert [image.data for image in found.images] == [PNG, PNG] and found.images[0].size == (5, 3)
    assert all(map(is_seen, found.images)) and sorted(asked) == ["/1.png", *["/later.png"] * 3]
    for name, attempts, said in (
        ("gone.png", 1, "the server answers 404"),
        ("down.png", 3, "(3 attempts): the server answers 503"),
    ):
        error = looked("1.png", name)
        assert error.kind == "image cannot be fetched" and f"{url}/{name}" in str(error) and said in str(error)
        assert asked.count(f"/{name}") == attempts
    monkeypatch.setattr(reading, "_over_http", lambda url: (_ for _ in ()).throw(OSError("Network is unreachable")))
    assert "Network is unreachable. Without a network, give files" in str(looked("1.png"))
