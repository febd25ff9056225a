"""Pictures of coloured shapes with questions, drawn from a seed: what only a model that sees can answer.

easy: one large circle somewhere in the picture, "Which colour is the circle?"
hard: one to four different shapes of different colours, and questions for colour, shape and number
"""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from posttrain.data.prepare.data_set import TRAIN, DataSet, prepare
from posttrain.data.prepare.images import image_schema
from posttrain.data.sources import Row
from posttrain.errors import InputError
from posttrain.extras import check_images_installed

COLOURS = {
    "red": (215, 40, 40), "orange": (250, 140, 30), "yellow": (250, 225, 50), "green": (40, 150, 60),
    "blue": (45, 80, 215), "purple": (135, 50, 170), "black": (15, 15, 15), "white": (250, 250, 250),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond")
EASY, HARD = "easy", "hard"
SIDES = {EASY: (56, 84), HARD: (84, 112)}  # of pictures, in pixels
GREYS = (120, 200)  # of the ground, which no colour is
MOST_ROWS = 100_000
ROWS_A_TEST_ROW = 8

Scene = dict[str, Any]


def prepare_shapes(
    local_dataset_path: str | None,
    local_save_dir: str,
    hdfs_dir: str | None = None,
    *,
    difficulty: str = EASY,
    rows: int = 4000,
    seed: int = 0,
) -> dict[str, Any]:
    """As `prepare`: `rows` rows to train on and an eighth of that to test with."""
    if local_dataset_path:
        raise InputError(f"--local_dataset_path={local_dataset_path}: shapes are drawn, not read. Leave it out.")
    if difficulty not in SIDES:
        raise InputError(f"--difficulty {difficulty}: there is {EASY} and {HARD}.")
    if not 1 <= rows <= MOST_ROWS:
        raise InputError(f"--rows {rows}: expected 1 to {MOST_ROWS:,}.")
    check_images_installed("pillow", "PIL", "Images need")
    counts = {TRAIN: rows, "test": -(-rows // ROWS_A_TEST_ROW)}
    drawn = {split: Scenes(split, count, difficulty, seed) for split, count in counts.items()}
    data_set = DataSet("shapes", {TRAIN: (TRAIN,), "test": ("test",)}, _shapes_row, _schema, own_rows=drawn)
    return prepare(data_set, None, local_save_dir, hdfs_dir)


@dataclass(frozen=True)
class Scenes:
    """So many different pictures, each with its question: fewer of them are the first of more.

    A picture belongs to one split by what is in it, so that none is in both, whatever the seeds.
    """

    split: str
    count: int
    difficulty: str
    seed: int

    def __iter__(self) -> Iterator[Scene]:
        chance = random.Random(f"{self.seed} {self.split} {self.difficulty}")
        draw = _easy if self.difficulty == EASY else _hard
        seen: set[int] = set()
        while len(seen) < self.count:
            picture = draw(chance)
            question, answer = _question(chance, picture["shapes"], self.difficulty)
            digest = _digest(picture)
            if digest not in seen and (digest % ROWS_A_TEST_ROW == 0) == (self.split == "test"):
                seen.add(digest)
                yield {**picture, "question": question, "answer": answer}


def _easy(chance: random.Random) -> Scene:
    """One circle, half to three quarters as wide as the picture's shorter side."""
    width, height = chance.choice(SIDES[EASY]), chance.choice(SIDES[EASY])
    shorter = min(width, height)
    side = chance.randint(shorter // 2, 3 * shorter // 4)
    place = (chance.randint(0, width - side), chance.randint(0, height - side))
    return _picture(chance, width, height, [_shape(place, side, "circle", chance.choice(list(COLOURS)))])


def _hard(chance: random.Random) -> Scene:
    """One to four shapes, each in a quarter of its own."""
    width, height = chance.choice(SIDES[HARD]), chance.choice(SIDES[HARD])
    count = chance.randint(1, 4)
    quarters = chance.sample([(x, y) for x in (0, width // 2) for y in (0, height // 2)], count)
    shapes = []
    for quarter, name, colour in zip(
        quarters, chance.sample(SHAPES, count), chance.sample(list(COLOURS), count), strict=True
    ):
        side = chance.randint(min(width, height) // 4, min(width, height) // 2 - 4)
        place = (
            quarter[0] + chance.randint(0, width // 2 - side),
            quarter[1] + chance.randint(0, height // 2 - side),
        )
        shapes.append(_shape(place, side, name, colour))
    return _picture(chance, width, height, shapes)


def _picture(chance: random.Random, width: int, height: int, shapes: list[dict[str, Any]]) -> Scene:
    return {"width": width, "height": height, "grey": chance.randint(*GREYS), "shapes": shapes}


def _shape(place: tuple[int, int], side: int, name: str, colour: str) -> dict[str, Any]:
    return {"left": place[0], "top": place[1], "side": side, "name": name, "colour": colour}


def _question(chance: random.Random, shapes: list[dict[str, Any]], difficulty: str) -> tuple[str, str]:
    asked = chance.choice(shapes)
    match chance.choice(("colour", "shape", "number")) if difficulty == HARD else "colour":
        case "colour":
            return f"Which colour is the {asked['name']}?", asked["colour"]
        case "shape":
            return f"Which shape is {asked['colour']}?", asked["name"]
    return "How many shapes are there?", str(len(shapes))


def _digest(picture: Scene) -> int:
    text = json.dumps(picture, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def _shapes_row(row: Row, split: str, index: int) -> dict[str, Any]:
    question, answer = row.values["question"], row.values["answer"]
    asked = [{"type": "image"}, {"type": "text", "text": question}]
    return {
        "data_source": "shapes",
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "images": [{"bytes": _drawn(row.values), "path": None}],
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "question": question, "answer": answer},
    }


def _schema() -> Any:
    import pyarrow as pa

    part = pa.struct({"type": pa.string(), "text": pa.string()})
    return image_schema({"messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.list_(part)}))})


def _drawn(scene: Scene) -> bytes:
    """The picture as PNG."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (scene["width"], scene["height"]), (scene["grey"],) * 3)
    pen = ImageDraw.Draw(image)
    for shape in scene["shapes"]:
        left, top, colour = shape["left"], shape["top"], COLOURS[shape["colour"]]
        right, bottom = left + shape["side"] - 1, top + shape["side"] - 1
        middle, centre = (left + right) / 2, (top + bottom) / 2
        match shape["name"]:
            case "circle":
                pen.ellipse((left, top, right, bottom), fill=colour)
            case "square":
                pen.rectangle((left, top, right, bottom), fill=colour)
            case "triangle":
                pen.polygon([(middle, top), (right, bottom), (left, bottom)], fill=colour)
            case "diamond":
                pen.polygon([(middle, top), (right, centre), (middle, bottom), (left, centre)], fill=colour)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()
