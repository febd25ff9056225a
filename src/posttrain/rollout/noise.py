"""Sampling noise as a function of what it is for, never of what was drawn before or beside it."""

# B answers, P positions

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64: Steele, Lea, Flood 2014


def stream(key: Sequence[int]) -> int:
    """A 64-bit number for what noise is for: the name of its stream."""
    packed = struct.pack(f"<{len(key)}q", *key)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little")


def uniforms(streams_B: Sequence[int], positions_BP: np.ndarray) -> np.ndarray:
    """Numbers (float64, B x P) in (0, 1), one for each stream and position."""
    with np.errstate(over="ignore"):
        z = np.asarray(streams_B, dtype=np.uint64)[:, None] + (positions_BP.astype(np.uint64) + np.uint64(1)) * _STEP
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2**53
