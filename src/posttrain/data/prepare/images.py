"""Questions about images: Geometry3K (Lu et al. 2021), and the columns that sets with images have.

problem (with `<image>` where it stands), answer, images -> data_source, prompt, images, ability, reward_model, extra_info
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from posttrain.data.images.reading import read_bytes
from posttrain.data.images.references import to_source
from posttrain.data.messages import RowError, clean
from posttrain.data.prepare.data_set import DataSet, text_of
from posttrain.data.sources import Row

if TYPE_CHECKING:
    import pyarrow as pa

GEO3K_INSTRUCTION = (
    r"Reason first, inside of <think> </think> tags. Then give the final answer, and put it in \boxed{}."
)


def image_schema(columns: dict[str, pa.DataType]) -> pa.Schema:
    """A row's columns besides `columns`, the images so that `datasets` opens them as images."""
    import pyarrow as pa
    from datasets import Features, Image, List

    text = pa.string()
    plain = pa.schema(
        {
            "data_source": text,
            **columns,
            "reward_model": pa.struct({"style": text, "ground_truth": text}),
            "extra_info": pa.struct({"split": text, "index": pa.int64(), "question": text, "answer": text}),
        }
    )
    return Features({**Features.from_arrow_schema(plain), "images": List(Image())}).arrow_schema


def _geo3k_row(row: Row, split: str, index: int) -> dict[str, Any]:
    columns = "Geometry3K has problem, answer and images"
    problem, answer = text_of(row, "problem", columns), text_of(row, "answer", columns)
    images = clean(row.values.get("images"))
    if not isinstance(images, list) or not images:
        raise RowError("no image", f"the column images is {images!r}, expected a list of images")
    sources = [to_source(image, row.folder, f"image {number}") for number, image in enumerate(images)]
    return {
        "data_source": "hiyouga/geometry3k",
        "prompt": [{"role": "user", "content": f"{problem} {GEO3K_INSTRUCTION}"}],
        "images": [{"bytes": bytes(read_bytes(source)), "path": None} for source in sources],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": answer},
        "extra_info": {"split": split, "index": index, "question": problem, "answer": answer},
    }


def _geo3k_schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return image_schema({"prompt": pa.list_(pa.struct({"role": text, "content": text})), "ability": text})


GEO3K = DataSet(
    "Geometry3K", {"train": ("train",), "test": ("test",)}, _geo3k_row, _geo3k_schema, hub_name="hiyouga/geometry3k"
)
