"""What `data check` finds in images, and nothing where there is nothing; what `data clean` leaves out for it."""

import io
import json
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image

from pictures import make_processor
from posttrain.cli.data import data_clean
from posttrain.data.audit import images as audited
from posttrain.data.audit.audit import audit
from posttrain.data.audit.chunk import Checks
from posttrain.data.audit.clean import clean
from posttrain.data.audit.report import as_page, report
from posttrain.data.chat import ChatTokenizer
from posttrain.data.formats import Columns
from posttrain.data.images.processor import ImageText
from posttrain.data.sources import find_sources
from posttrain.data.tokenized import load_tokenized
from posttrain.data.truncation import IMAGE_TOO_LONG, truncated
from posttrain.loops.training_data import make_chat

QUESTION = (
    "Which animal is to be seen in the middle of this picture, and what does it carry in its mouth while it runs?"
)


def png(width=60, height=40, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


def bomb(side=20_000):
    """A small file that says of itself that it has 400 million pixels."""
    small = png()
    header = struct.pack(">II", side, side) + small[24:29]
    return small[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + small[33:]


FILES = {
    "dog.png": png(seed=1), "cat.png": png(seed=2), "dog-again.png": png(seed=1), "cut.png": png(seed=3)[:3000],
    "text.png": b"<html>404</html>", "dot.png": png(1, 1), "large.png": png(200, 100), "bomb.png": bomb(), "fox.png": png(seed=4),
}  # fmt: skip


def row(image, question=QUESTION, answer="A fox, which carries a hen."):
    content = f"<image>{question}" if "<image>" not in question else question
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "images": image if isinstance(image, list) else [image]}


SOUND = [
    row("dog.png"),
    row("cat.png"),  # another image makes it another row
    row(["dog.png", "cat.png"], "<image><image>" + QUESTION),
    row(["cat.png", "dog.png"], "<image><image>" + QUESTION),
    {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "I see none."}]},
]
FAULTS = [
    (row("cut.png"), {"unusable": "broken image: "}),
    (row("text.png"), {"unusable": "broken image: "}),
    (row("absent.png"), {"unusable": "image not found: "}),
    (row("bomb.png"), {"unusable": "image too large: "}),
    (row("dog.png", "<image><image>Which is larger?"), {"unusable": "marks and images disagree: "}),
    (row("dot.png"), {"tiny-image": "image 0 is 1 x 1 pixels"}),
    (row(["dog.png", "large.png"], "<image><image>How?"), {"huge-image": "image 1 is 200 x 100 pixels"}),
    (row("dog-again.png"), {"duplicate": "the same as row 0 of this file"}),
    (row("cat.png", QUESTION + " Say why."), {"near-duplicate": "the same as row 1 of this file"}),
    (row("cat.png", answer="No"), {"other-answer": "asks what row 1 of this file asks of the same images", "near-duplicate": "row 1"}),
    (row("fox.png", "Where?"), {"leak": "val.jsonl row 1"}),
]  # fmt: skip
VALIDATION = [row("fox.png", "Which?"), row("fox.png", "Where?"), row("large.png")]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(audited, "MOST_PIXELS", 15_000)
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    for name, rows in {"rows.jsonl": [*SOUND, *(row for row, _ in FAULTS)], "val.jsonl": VALIDATION}.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def sources(folder, name="rows.jsonl"):
    return find_sources([str(folder / name)], "data.train_files")


def found_in(found):
    return {(e.row, e.kind): e.found for of_kind in found.findings.examples.values() for e in of_kind}


def test_each_fault_of_an_image_is_found_in_its_row_without_a_tokenizer(folder):
    checks = Checks(Columns())
    found = audit(sources(folder), sources(folder, "val.jsonl"), checks, num_workers=0)
    expected = {(len(SOUND) + i, kind): said for i, (_, kinds) in enumerate(FAULTS) for kind, said in kinds.items()}
    told = found_in(found)
    assert told.keys() == expected.keys()
    for place, said in expected.items():
        assert said in told[place], place
    images = report(found, checks)["images"]
    assert (images["num_images"], images["num_different"], images["rows_with_images"]) == (17, 9, 14)
    assert (images["widths"]["50"], images["widths"]["100"], images["heights"]["100"]) == (60, 200, 100)
    assert images["tokens_an_image"] == {} and images["num_tokens"] == 0
    page = "\n".join(str(part) for part in as_page(report(found, checks)))
    assert "17 images, 9 of them different, in 14 rows" in page and "width in pixels" in page


def test_cleaning_leaves_out_the_kinds_of_images_that_are_named(folder):
    kinds = ("unusable", "tiny-image", "other-answer")
    told = clean(
        sources(folder), [], Checks(Columns()), kinds, folder / "out", find_again=lambda: sources(folder), num_workers=0
    )
    left = {number for number, (_, found) in enumerate(FAULTS, len(SOUND)) if set(found) & set(kinds)}
    lines = (folder / "rows.jsonl").read_text().splitlines()
    kept = (folder / "out/rows.jsonl").read_text().splitlines()
    assert kept == [line for number, line in enumerate(lines) if number not in left]
    assert told["rows_left_out"] == len(left) == 7
    assert told["image_dirs"] == [str(folder)]  # where the paths of the written rows began
    named = Checks(Columns(image_dir=str(folder)))
    told = clean(sources(folder), [], named, kinds, folder / "named", find_again=lambda: sources(folder), num_workers=0)
    assert told["image_dirs"] == []


def test_cleaned_rows_find_their_images_as_the_command_says(folder, capsys):
    data_clean(output=folder / "out", files=[str(folder / "rows.jsonl")])
    said = capsys.readouterr().out.splitlines()[-1]
    option, _, place = said.rpartition(" ")[2].partition("=")
    assert "relative paths" in said and option == "data.image_dir" and place == str(folder)
    again = sources(folder / "out")
    assert (
        report(audit(again, [], Checks(Columns(image_dir=place)), num_workers=0), Checks(Columns()))["rows_dropped"]
        == {}
    )
    assert report(audit(again, [], Checks(Columns()), num_workers=0), Checks(Columns()))["rows_dropped"]


def make_seeing_chat():
    processor = make_processor("qwen2_5_vl")
    return ChatTokenizer(processor.tokenizer, images=ImageText(processor))


LONG = "the same " * 40
ROWS = [
    row("dog.png", "What is this ?", answer="A red circle"),
    row("large.png", "What is that ?", answer=LONG),  # 28 tokens of an image and a long answer: cut at the end of the answer
    row(["large.png", "cat.png"], LONG + "<image> and <image>", answer="one"),
    row("wide.png", "and this ?", answer="A green square"),
    row("dog.png", LONG, answer="no"),
    row("dog.png", "<image><image>"),
]  # fmt: skip


@pytest.mark.parametrize("truncation", ["right", "left", "drop"])
def test_images_that_do_not_fit_are_counted_as_training_counts_them(folder, truncation):
    (folder / "wide.png").write_bytes(png(400, 110))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    checks = Checks(Columns(), make_seeing_chat, max_length=55, truncation=truncation)
    found = audit(sources(folder), [], checks, num_workers=0)
    told = report(found, checks)
    data = load_tokenized(sources(folder), Columns(), make_seeing_chat, str(folder / "cache"), num_workers=0)
    used = truncated(data, 55, truncation)
    assert told["rows_dropped"] == used.report.rows_dropped and told["rows_used"] == used.report.rows_used
    assert told["tokens"]["num_tokens"] == int(used.lengths_N.sum())
    assert told["rows_dropped"][IMAGE_TOO_LONG] == {"right": 2, "left": 3, "drop": 1}[truncation]
    alone = found_in(found)[3, "unusable"]
    assert "an image of 400 x 110 pixels makes 56 tokens, more than data.max_length=55 alone. Fewer pixels" in alone
    images = told["images"]
    assert (images["num_images"], images["num_different"], images["rows_with_images"]) == (6, 4, 5)
    assert (images["num_tokens"], images["tokens_an_image"]["100"]) == (2 + 28 + 28 + 2 + 56 + 2, 56)
    (of_images,) = [part for part in told["tokens"]["parts"] if part["role"] == "image"]
    assert (of_images["tokens"], of_images["trained"]) == (images["num_tokens"], 0)


def test_images_for_a_text_model_are_named(folder, tiny):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SOUND))
    checks = Checks(Columns(), partial(make_chat, str(tiny / "model"), None, None, False))
    told = report(audit(sources(folder), [], checks, num_workers=0), checks)
    assert told["rows_dropped"] == {"images for a text model": 4} and told["rows_used"] == 1
    assert told["images"]["num_images"] == 6
