"""The images of micro-batches, read and processed on threads a little ahead of when they are needed.

Decoding and resizing leave Python's lock, so that threads do. Pixels are held for a few micro-batches only.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from io import BytesIO

import numpy as np

from posttrain.data.batches import pack
from posttrain.data.images.processor import ImageText
from posttrain.data.images.reading import decode
from posttrain.data.messages import RowError
from posttrain.errors import LocalError
from posttrain.records import ImageArrays, ImageSource, MicroBatch, Sample

AHEAD = 2  # micro-batches whose images are read before they are asked for
MOST_THREADS = 8
SMALLEST = 56  # pixels, a side of the image that fills up; processors bring it to the least they take


class ImageLoader:
    """Packs samples to micro-batches that bring their images."""

    def __init__(self, images: ImageText):
        self.images = images
        cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._threads = ThreadPoolExecutor(max(1, min(MOST_THREADS, cores)), "images")
        self._expected: list[_Reading] = []

    def pack(self, samples: Sequence[Sample], take_part: bool) -> MicroBatch:
        """Samples end to end, their images to come. `take_part`: without any, a tiny one whose tokens count nothing follows the last,
        because other processes have some, and all must run the vision tower as often."""
        if any(sample.images for sample in samples):
            return replace(pack(samples), images=_Reading(self, samples))
        if not take_part:
            return pack(samples)
        filler = self._filler()
        filled = [*samples[:-1], _followed(samples[-1], filler)] if samples else [filler]
        rows_N = tuple(sample.row for sample in samples)
        return replace(pack(filled), rows_N=rows_N, num_filling=len(filler), images=_Reading(self, filled))

    def expect(self, micro_batches: Iterable[MicroBatch]) -> None:
        """Those that will be asked for next, in this order; the first few are begun."""
        self._expected = [m.images for m in micro_batches if isinstance(m.images, _Reading)]
        self.begin(self._expected[: AHEAD + 1])

    def begin_after(self, reading: _Reading) -> None:
        """Begin the few that are expected after this one."""
        if reading in self._expected:
            place = self._expected.index(reading)
            self._expected = self._expected[place + 1 :]
            self.begin(self._expected[:AHEAD])

    @staticmethod
    def begin(readings: Iterable[_Reading]) -> None:
        for reading in readings:
            reading.begin()

    def read(self, sample: Sample) -> dict[str, np.ndarray]:
        """What the processor makes of the images of one sample. Raises LocalError."""
        try:
            return self.images.arrays([decode(image) for image in sample.images])
        except RowError as error:
            raise LocalError(
                f"An image that could be read when rows were prepared cannot be used now: {error}. Put it back and run the same command "
                "again; if it was meant to change, choose another data.cache_dir, so that rows are prepared anew."
            ) from None

    def submit(self, sample: Sample) -> Future[dict[str, np.ndarray]]:
        return self._threads.submit(self.read, sample)

    @cache  # noqa: B019, a loader lives as long as its run
    def _filler(self) -> Sample:
        from PIL import Image

        stream = BytesIO()
        Image.new("RGB", (SMALLEST, SMALLEST)).save(stream, "PNG")
        ids_T = self.images.ids(SMALLEST, SMALLEST)
        image = ImageSource(data=stream.getvalue())
        return Sample(-1, ids_T, np.zeros(len(ids_T), np.float32), images=(image,))


def _followed(sample: Sample, filler: Sample) -> Sample:
    return replace(
        sample,
        ids_T=np.concatenate([sample.ids_T, filler.ids_T]),
        weights_T=np.concatenate([sample.weights_T, filler.weights_T]),
        signals={name: np.concatenate([values_T, filler.weights_T]) for name, values_T in sample.signals.items()},
        images=filler.images,
    )


class _Reading:
    """The images of one micro-batch: begun when they are expected, waited for when they are asked for, then let go."""

    def __init__(self, loader: ImageLoader, samples: Sequence[Sample]):
        self._loader, self._samples = loader, samples
        self._begun: list[Future[dict[str, np.ndarray]] | None] | None = None

    def begin(self) -> None:
        if self._begun is not None:
            return
        of_images: dict[tuple[int, ...], Future[dict[str, np.ndarray]]] = {}  # answers to one prompt have the very same
        for sample in self._samples:
            if sample.images and _identity(sample) not in of_images:
                of_images[_identity(sample)] = self._loader.submit(sample)
        self._begun = [of_images.get(_identity(sample)) for sample in self._samples]

    def __call__(self) -> ImageArrays:
        self.begin()
        assert self._begun is not None
        begun, self._begun = self._begun, None
        self._loader.begin_after(self)
        return tuple(future.result() if future else {} for future in begun)


def _identity(sample: Sample) -> tuple[int, ...]:
    return tuple(map(id, sample.images))
