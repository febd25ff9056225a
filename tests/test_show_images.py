"""What `data show` makes of images: one line on the terminal, a small copy on the page, their places as JSON."""

import base64
import io
import json
import re
from dataclasses import replace

import pytest
from PIL import Image
from transformers import AutoTokenizer

from pictures import make_processor
from posttrain.cli.data import data_show
from posttrain.data.encoded import EncodedImage, Part
from posttrain.data.images.processor import ImageText
from posttrain.data.prepare.shapes import prepare_shapes
from posttrain.data.show.page import Summary, page
from posttrain.data.show.pictures import LONGEST_SIDE, thumbnail
from posttrain.data.show.samples import Group, Length, shown_sample
from posttrain.data.show.terminal import coloured_sample, headline
from posttrain.data.sources import Row
from posttrain.records import ImageSource
from shown import encoded_from

ROW = Row("folder/seen.parquet", 3, {})
WHOLE = Length(4096, "error")
PIECE = "<|pad|>"
T, N, X, E = Part.TEMPLATE, Part.NAME, Part.TEXT, Part.END


def picture(width, height, kind="PNG"):
    stream = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(stream, kind)
    return stream.getvalue()


@pytest.fixture(scope="module")
def tokenizer(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    tokenizer.add_special_tokens({"additional_special_tokens": [PIECE]})
    return tokenizer


@pytest.fixture(scope="module")
def encoded(tokenizer, tmp_path_factory):
    """A text, an image in a file, an image held by the row, a text, and an answer."""
    file = tmp_path_factory.mktemp("images") / 'a"b.jpg'
    file.write_bytes(picture(640, 480, "JPEG"))
    story = [
        ("<|im_start|>", None, T, None), ("user", 0, N, None), ("\n", None, T, None), ("Compare ", 0, X, None),
        (PIECE * 6, None, T, None), (PIECE * 2, None, T, None), (" both", 0, X, None), ("<|im_end|>\n<|im_start|>", None, T, None),
        ("assistant", 1, N, None), ("\n", None, T, None), ("Equal", 1, X, 1.0), ("<|im_end|>", 1, E, 1.0),
    ]  # fmt: skip
    made = encoded_from(tokenizer, story)
    first = made.ids_T.tolist().index(tokenizer.convert_tokens_to_ids(PIECE))
    images = (
        EncodedImage(ImageSource(path=str(file)), 640, 480, first, first + 6),
        EncodedImage(ImageSource(data=picture(56, 84)), 56, 84, first + 6, first + 8),
    )
    return replace(made, images=images)


@pytest.fixture
def sample(tokenizer, encoded):
    return shown_sample(encoded, ("user", "assistant"), tokenizer, WHOLE, ROW)


def test_the_terminal_says_each_image_in_one_place(sample):
    text = coloured_sample(sample).plain
    assert "Compare[image 640x480, 6 tokens][image 56x84, 2 tokens] both" in text.replace("·", "").replace(
        "Compare ", "Compare"
    )
    assert PIECE not in text
    assert headline(sample).endswith("2 images of 8 tokens")


def test_json_has_the_place_and_the_size_of_each_image(sample, encoded):
    told = sample.as_json()
    first, second = told["images"]
    path = encoded.images[0].source.path
    assert first == {"begin": first["begin"], "end": first["begin"] + 6, "width": 640, "height": 480, "source": path}
    assert (second["begin"], second["end"], second["width"], second["height"]) == (
        first["end"],
        first["end"] + 2,
        56,
        84,
    )
    assert re.fullmatch(r"\d+ bytes in the row", second["source"])
    assert told["pieces"][first["begin"] : second["end"]] == [PIECE] * 8
    assert told["reasons"][first["begin"]] == "not trained: image 0" and told["reasons"][second["begin"]].endswith(
        "image 1"
    )
    assert not any(told["trained"][first["begin"] : second["end"]])


def test_the_page_draws_each_image_where_it_stands_with_its_tokens_folded(sample):
    html = page(Summary("Rows"), [Group([[sample]])])
    before, first, second = html.split("<div class=image>")
    assert "Compare" in before.replace("</i><i>", "") and "both" in second.replace("</i><i>", "")
    for drawn, size, count in ((first, (320, 240), 6), (second, (56, 84), 2)):
        url, *sides = re.search(r'<img src="data:image/\w+;base64,([^"]+)" width=(\d+) height=(\d+)', drawn).groups()
        assert tuple(map(int, sides)) == size
        seen = Image.open(io.BytesIO(base64.b64decode(url)))
        assert seen.size == size and seen.getpixel((5, 5))[0] > 240
        folded = drawn[drawn.index("<details>") : drawn.index("</details>")]
        assert folded.count("<i") == count
    assert "<summary>640x480, 6 tokens</summary>" in first and "a&quot;b.jpg" in first
    assert "<summary>56x84, 2 tokens</summary>" in second
    assert "<b>2</b><span>images</span>" in html
    markup = html[html.index("<main>") : html.index("</main>")]
    assert len(re.findall(r"<i[ >]", markup)) == len(sample)  # each token once


def test_a_copy_is_never_larger_than_the_image_or_the_page_allows():
    sizes = {(1, 1): (1, 1), (320, 10): (320, 10), (1000, 10): (LONGEST_SIDE, 3), (4000, 3000): (LONGEST_SIDE, 240)}
    for (width, height), expected in sizes.items():
        drawn = thumbnail(ImageSource(data=picture(width, height)))
        assert (drawn.width, drawn.height) == expected
        assert len(drawn.url) < 40_000


def test_the_command_finds_the_processor_beside_the_tokenizer(tmp_path, capsys):
    processor = make_processor("qwen2_5_vl")
    processor.save_pretrained(tmp_path / "reader")
    prepare_shapes(None, str(tmp_path), rows=3)
    options = {"files": [str(tmp_path / "train.parquet")], "tokenizer": str(tmp_path / "reader")}
    data_show(options=["model.processor_kwargs={min_pixels: 12544}"], as_json=True, **options)
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(told) == 3
    for sample in told:
        (image,) = sample["images"]
        piece = ImageText(processor).token_id
        assert {image["width"], image["height"]} <= {56, 84}
        assert sample["ids"][image["begin"] : image["end"]] == [piece] * (image["end"] - image["begin"])
        assert sample["ids"].count(piece) == image["end"] - image["begin"] >= 12544 / 28**2
    data_show(rows=1, html=str(tmp_path / "page.html"), **options)
    assert (tmp_path / "page.html").read_text().count('<img src="data:image/png') == 1
