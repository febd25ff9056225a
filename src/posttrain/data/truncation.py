"""Samples within a number of tokens: longer ones cut, left out or an error; an image is never cut.

Shape suffix: N samples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from posttrain.data.encoded import EncodedImage
from posttrain.data.tokenized import Report, TokenizedData
from posttrain.errors import InputError
from posttrain.wording import counted

IMAGE_TOO_LONG = "an image does not fit data.max_length"


def truncated(data: TokenizedData, max_length: int, how: str) -> TokenizedData:
    """The rows within `max_length` tokens: longer ones cut, left out or an error, as `how` (data.truncation) says."""
    long_N = data.lengths_N > max_length
    begins_N, ends_N = data.begins_N.copy(), data.ends_N.copy()
    report = copy.deepcopy(data.report)
    if long_N.any() and how == "error":
        worst = int(data.lengths_N.argmax())
        unit = "row" if len(data) == report.rows_used else "sample"
        raise InputError(
            f"{int(long_N.sum())} of {counted(len(data), unit)} {'is' if long_N.sum() == 1 else 'are'} longer than "
            f"data.max_length={max_length}; the longest, "
            f"{report.place_of(data.rows_N[worst])}, has {data.lengths_N[worst]} tokens{_of_its_image(data, worst, max_length)}. "
            "Raise data.max_length, or choose data.truncation=drop, left or right."
        )
    if how == "left":
        begins_N[long_N] = ends_N[long_N] - max_length
    elif how == "right":
        ends_N[long_N] = begins_N[long_N] + max_length
    image_N = _with_lost_images(data, begins_N, ends_N, max_length)
    for sample in np.flatnonzero(image_N).tolist():
        place = report.place_of(data.rows_N[sample])
        report.drop(IMAGE_TOO_LONG, f"{place}{_of_its_image(data, sample, max_length)}")
    keep_N = ~image_N
    if how == "drop":
        for row in data.rows_N[long_N & ~image_N]:
            report.drop("longer than data.max_length", report.place_of(row))
        keep_N &= ~long_N
    cut = replace(data, begins_N=begins_N, ends_N=ends_N, report=report)
    empty_N = keep_N & (cut.num_trained_N == 0)
    for row in data.rows_N[empty_N]:
        report.drop("no trained token left", report.place_of(row))
    keep_N &= ~empty_N
    report.rows_used = len(np.unique(data.rows_N[keep_N]))
    if not keep_N.any():
        raise InputError(f"No row is left to train on: {_reasons(report)}")
    return cut.kept(keep_N)


def lost_image(images: Sequence[EncodedImage], begin: int, end: int, max_length: int) -> EncodedImage | None:
    """The first of a sample's images for which it is left out when its tokens [begin, end) are kept."""
    return next((i for i in images if i.begin < begin or i.end > end or i.end - i.begin > max_length), None)


def why_lost(image: EncodedImage, max_length: int) -> str:
    return _why(image.width, image.height, image.end - image.begin, max_length)


def _with_lost_images(data: TokenizedData, begins_N: np.ndarray, ends_N: np.ndarray, max_length: int) -> np.ndarray:
    """Which samples have an image that a cut to [begin, end) would touch, or that is longer than any sample may be."""
    if data.images is None:
        return np.zeros(len(data), dtype=bool)
    cut_N = data.images.outside(begins_N - data.begins_N, ends_N - data.begins_N)
    return cut_N | (data.images.num_tokens_N() > max_length)


def _of_its_image(data: TokenizedData, sample: int, max_length: int) -> str:
    """What a message says of the sample's largest image, if it has one."""
    if data.images is None or not data.images.counts_N[sample]:
        return ""
    return f": {_why(*data.images.largest(sample), max_length)}"


def _why(width: int, height: int, num_tokens: int, max_length: int) -> str:
    shape = f"an image of {width} x {height} pixels makes {num_tokens:,} tokens"
    if num_tokens <= max_length:
        return f"{shape}, and images are never cut"
    return (
        f"{shape}, more than data.max_length={max_length} alone. Fewer pixels make fewer; for Qwen's models: "
        "'model.processor_kwargs={max_pixels: 786432}'"
    )


def _reasons(report: Report) -> str:
    return "; ".join(f"{count} {reason} ({report.places[reason][0]})" for reason, count in report.rows_dropped.items())
