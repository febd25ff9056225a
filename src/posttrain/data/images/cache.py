"""The images of tokenized rows, kept beside them: the bytes that rows brought or that were fetched, and the paths of the others.

    images.bin         each different image's bytes, or its path, end to end
    images.npy         int64 (M, 7), the images of all samples in their order, a row each with the columns named below
    image_counts.npy   int64 (N), how many of them each sample has

Shape suffixes: N samples, M images of them all. Without an image there is none of the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np

from posttrain.data.encoded import EncodedImage
from posttrain.records import ImageSource

# columns of images.npy: where its bytes or its path lie in images.bin, whether it is a path, its pixels, its tokens
FIRST, LAST, IS_PATH, WIDTH, HEIGHT, BEGIN, END = range(7)


class ImageWriter:
    """Writes the images of one sample after the other."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._stream: IO[bytes] | None = None
        self._places: dict[bytes, tuple[int, int]] = {}
        self._counts: list[int] = []
        self._table: list[tuple[int, ...]] = []

    def add(self, images: Sequence[EncodedImage]) -> None:
        self._counts.append(len(images))
        for image in images:
            source = image.source
            is_path = source.data is None
            first, last = self._place(os.fsencode(source.path or "") if source.data is None else bytes(source.data))
            self._table.append((first, last, is_path, image.width, image.height, image.begin, image.end))

    def close(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        np.save(self._folder / "images.npy", np.asarray(self._table, dtype=np.int64))
        np.save(self._folder / "image_counts.npy", np.asarray(self._counts, dtype=np.int64))

    def _place(self, content: bytes) -> tuple[int, int]:
        """Where the bytes lie; those that are there already are not written again."""
        key = hashlib.blake2b(content, digest_size=16).digest()
        if key not in self._places:
            self._stream = self._stream or open(self._folder / "images.bin", "wb")
            first = self._stream.tell()
            self._stream.write(content)
            self._places[key] = (first, first + len(content))
        return self._places[key]


@dataclass(frozen=True)
class KeptImages:
    """The images of samples. Tokens are counted from the beginning of a sample as it was before truncation."""

    content: np.ndarray  # uint8, memory-mapped
    table: np.ndarray  # int64 (M, 7), memory-mapped
    firsts_N: np.ndarray  # int64, the sample's first image in the table
    counts_N: np.ndarray  # int64

    @classmethod
    def open(cls, folder: Path) -> KeptImages | None:
        """None where no row has an image."""
        if not (folder / "images.bin").exists():
            return None
        counts_N = np.load(folder / "image_counts.npy")
        return cls(
            np.memmap(folder / "images.bin", dtype=np.uint8, mode="r"),
            np.load(folder / "images.npy", mmap_mode="r"),
            np.cumsum(counts_N) - counts_N,
            counts_N,
        )

    def sources(self, sample: int) -> tuple[ImageSource, ...]:
        first = self.firsts_N[sample]
        return tuple(map(self._source, self.table[first : first + self.counts_N[sample]].tolist()))

    def kept(self, keep_N: np.ndarray) -> KeptImages | None:
        """Those of some of the samples; None where these have no image."""
        firsts_N, counts_N = self.firsts_N[keep_N], self.counts_N[keep_N]
        return replace(self, firsts_N=firsts_N, counts_N=counts_N) if counts_N.any() else None

    def num_tokens_N(self) -> np.ndarray:
        """Tokens of each sample's largest image, int64."""
        samples_M, rows_M = self._of_samples()
        largest_N = np.zeros(len(self.counts_N), dtype=np.int64)
        np.maximum.at(largest_N, samples_M, self.table[rows_M, END] - self.table[rows_M, BEGIN])
        return largest_N

    def token_counts(self) -> np.ndarray:
        """Tokens of every image of these samples, int64."""
        _, rows_M = self._of_samples()
        return self.table[rows_M, END] - self.table[rows_M, BEGIN]

    def outside(self, begins_N: np.ndarray, ends_N: np.ndarray) -> np.ndarray:
        """Which samples have an image that is not whole within their tokens [begin, end), as bool N."""
        samples_M, rows_M = self._of_samples()
        cut_M = (self.table[rows_M, BEGIN] < begins_N[samples_M]) | (self.table[rows_M, END] > ends_N[samples_M])
        return np.bincount(samples_M[cut_M], minlength=len(self.counts_N)) > 0

    def largest(self, sample: int) -> tuple[int, int, int]:
        """Width, height and tokens of the sample's image with the most tokens."""
        first = self.firsts_N[sample]
        images = self.table[first : first + self.counts_N[sample]]
        image = images[(images[:, END] - images[:, BEGIN]).argmax()]
        return int(image[WIDTH]), int(image[HEIGHT]), int(image[END] - image[BEGIN])

    def _of_samples(self) -> tuple[np.ndarray, np.ndarray]:
        """For each image of these samples the sample's number, and the image's row in the table."""
        samples_M = np.repeat(np.arange(len(self.counts_N)), self.counts_N)
        within_M = np.arange(len(samples_M)) - np.repeat(np.cumsum(self.counts_N) - self.counts_N, self.counts_N)
        return samples_M, self.firsts_N[samples_M] + within_M

    def _source(self, image: list[int]) -> ImageSource:
        content = memoryview(self.content)[image[FIRST] : image[LAST]]  # type: ignore[arg-type]
        size = (image[WIDTH], image[HEIGHT])
        if image[IS_PATH]:
            return ImageSource(path=os.fsdecode(bytes(content)), size=size)
        return ImageSource(data=content, size=size)
