"""HellaSwag (Zellers et al. 2019): the beginning of a text and four ways to go on, one of them right.

activity_label, ctx_a, ctx_b, endings, label -> the beginning as prompt, the right ending as response, all as choices
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from posttrain.data.messages import RowError, checked_text, clean
from posttrain.data.prepare.data_set import DataSet, text_of
from posttrain.data.prepare.questions import question_row, question_schema
from posttrain.data.sources import Row
from posttrain.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = "HellaSwag has activity_label, ctx_a, ctx_b, endings and label"


def _hellaswag_row(row: Row, split: str, index: int) -> dict[str, Any]:
    if "label" not in row.values:
        there = ", ".join(row.values) or "(none)"
        raise InputError(f"{row.place}: there is no column 'label'; found: {there}. {_COLUMNS}.")
    label = str(row.values["label"]).strip()
    if not label:
        raise RowError("no label", "the row does not say which ending is right")
    endings = clean(row.values.get("endings"))
    if not isinstance(endings, list) or not label.isdecimal() or int(label) >= len(endings):
        raise RowError("bad label", f"label {label!r} names none of the endings")
    activity, begun = text_of(row, "activity_label", _COLUMNS), text_of(row, "ctx_a", _COLUMNS)
    last = text_of(row, "ctx_b", _COLUMNS, empty=True)
    prompt = _without_markup(f"{activity}: {begun} {last[:1].upper()}{last[1:]}")
    choices = [_without_markup(checked_text(ending, "an ending", "bad ending")) for ending in endings]
    response = choices[int(label)]
    extra_info = {"split": split, "index": index, "question": prompt, "answer": response}
    made = question_row("hellaswag", prompt, response, int(label), extra_info)
    made["reward_model"] |= {"style": "model", "eval": "multiple_choice", "choices": choices}
    return made


def _without_markup(text: str) -> str:
    """The text without the headings in brackets that its WikiHow part was cut out with."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return re.sub(" {2,}", " ", text).strip()


def _schema() -> pa.Schema:
    import pyarrow as pa

    text = pa.string()
    return question_schema({"style": text, "eval": text, "ground_truth": pa.int64(), "choices": pa.list_(text)})


HELLASWAG = DataSet(
    "HellaSwag",
    {"train": ("train",), "validation": ("validation", "val"), "test": ("test",)},
    _hellaswag_row,
    _schema,
    hub_name="Rowan/hellaswag",
)
