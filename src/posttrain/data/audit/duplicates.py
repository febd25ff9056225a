"""Rows that say the same, or nearly: hashes of whole rows, and MinHash signatures compared by bands (Broder 1997).

Shape suffixes: R rows, W words of all rows end to end, S shingles of all rows end to end, K places of a signature.
A shingle is three words in a row; two texts are as similar as the share of shingles that they have in common (Jaccard).
Two signatures agree in a place with that probability: with 60 places the estimate is off by 0.05 (one deviation) at 0.8.
Rows are compared where one of 12 bands of 5 places is equal: 99% of those that are 0.8 similar, 32% at 0.5.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from hashlib import blake2b

import numpy as np

from posttrain.data.audit.rows import text_of
from posttrain.records import Conversation, Tokens

SIMILAR = 0.8  # share of shingles in common from which rows are called nearly the same
BANDS, PLACES_A_BAND = 12, 5
SIGNATURE_PLACES = BANDS * PLACES_A_BAND
WORDS_A_SHINGLE = 3
PAIRS_AT_ONCE = 65_536  # these and the next bound what is copied
ROWS_MATCHED_AT_ONCE = 131_072
NO_HASH = np.uint64(0)  # of rows that cannot be compared

_FACTORS_K, _OFFSETS_K = np.random.default_rng(7).integers(1, 2**32, (2, SIGNATURE_PLACES, 1), dtype=np.uint32)
_FACTORS_K |= np.uint32(1)
_PRIME = np.uint64(0x100000001B3)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_FIRST_WORDLESS_SCRIPT = 0x2E80  # from here on (Chinese, Japanese, Korean, emoji) each character is a word


def row_hash(record: Conversation | Tokens, images: tuple[int, ...] = ()) -> int:
    """64 bits that are equal where two rows say the same of the same images, but for white space and forms of one character."""
    if isinstance(record, Tokens):
        return _hash(record.ids_T.tobytes() + record.weights_T.tobytes())
    said = [
        (m["role"], _normalised(text_of(m)), m.get("tool_calls"), m.get("reasoning_content")) for m in record.messages
    ]
    return _hash(json.dumps([said, record.tools, images], default=str).encode())


def question_hash(record: Conversation | Tokens, images: tuple[int, ...] = ()) -> int:
    """64 bits that are equal where two rows ask the same of the same images, whatever the system prompt; NO_HASH without a
    question."""
    if isinstance(record, Tokens):
        return int(NO_HASH)
    messages = record.messages
    end = next((i for i in range(len(messages) - 1, -1, -1) if messages[i]["role"] == "assistant"), len(messages))
    asked = [(m["role"], _normalised(text_of(m))) for m in messages[:end] if m["role"] not in ("system", "developer")]
    is_question = bool(images) or any(text for _, text in asked)
    return _hash(json.dumps([asked, images]).encode()) if is_question else int(NO_HASH)


def compared_text(record: Conversation | Tokens) -> str:
    """What near duplicates are told by: no system prompt, which many rows share."""
    if isinstance(record, Tokens):
        return " ".join(map(str, record.ids_T.tolist()))
    return "\n".join(text_of(m) for m in record.messages if m["role"] in ("user", "assistant"))


def signatures(texts: list[str]) -> np.ndarray:
    """A MinHash of each text (uint16, R x K); of one without any word, zeros."""
    shingles_S, begins_R = _shingles(texts)
    found = np.zeros((len(texts), SIGNATURE_PLACES), dtype=np.uint16)
    counts_R = np.diff(begins_R, append=len(shingles_S))
    if not len(shingles_S):
        return found
    with np.errstate(over="ignore"):
        for place in range(SIGNATURE_PLACES):
            hashes_S = shingles_S * _FACTORS_K[place] + _OFFSETS_K[place]
            least_R = np.minimum.reduceat(hashes_S, np.minimum(begins_R, len(shingles_S) - 1))
            found[:, place] = least_R ^ (least_R >> np.uint32(16))
    found[counts_R == 0] = 0
    return found


def apart_by_images(signatures_RK: np.ndarray, images_R: list[tuple[int, ...]]) -> np.ndarray:
    """The signatures, so that those of rows with other images agree by chance alone."""
    told_RK = signatures_RK.copy()
    for row, images in enumerate(images_R):
        if images and signatures_RK[row].any():
            told_RK[row] ^= np.random.default_rng(images).integers(1, 2**16, SIGNATURE_PLACES, dtype=np.uint16)
    return told_RK


def duplicates(hashes_R: np.ndarray) -> Iterator[tuple[int, int]]:
    """(row, the first row with the same hash), in the order of the rows."""
    order_R = np.argsort(hashes_R, kind="stable")
    sorted_R = hashes_R[order_R]
    is_first_R = np.ones(len(order_R), dtype=bool)
    is_first_R[1:] = sorted_R[1:] != sorted_R[:-1]
    firsts_R = order_R[np.maximum.accumulate(np.where(is_first_R, np.arange(len(order_R)), 0))]
    again = np.flatnonzero(~is_first_R & (sorted_R != NO_HASH))
    again = again[np.argsort(order_R[again])]
    yield from zip(order_R[again].tolist(), firsts_R[again].tolist(), strict=True)


def near_duplicates(signatures_RK: np.ndarray, skipped_R: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(row, an earlier row that it is like, how similar), in order; no row is told to be like one that was told itself.

    Rows of `skipped_R` are left aside.
    """
    told_R = skipped_R.copy()
    for row, others in _grouped(_similar_pairs(signatures_RK, skipped_R, len(signatures_RK))):
        others = others[~told_R[others]]
        if len(others):
            told_R[row] = True
            yield row, *_most_similar(signatures_RK, row, others)


def near_matches(signatures_RK: np.ndarray, known_RK: np.ndarray) -> Iterator[tuple[int, int, float]]:
    """(row, a row of the known ones that it is like, how similar), in order."""
    num_known = len(known_RK)
    for begin in range(0, len(signatures_RK) if num_known else 0, ROWS_MATCHED_AT_ONCE):
        both_RK = np.concatenate([known_RK, signatures_RK[begin : begin + ROWS_MATCHED_AT_ONCE]])
        for row, others in _grouped(_similar_pairs(both_RK, np.zeros(len(both_RK), dtype=bool), num_known)):
            if row >= num_known:
                other, similar = _most_similar(both_RK, row, others)
                yield begin + row - num_known, other, similar


def _similar_pairs(signatures_RK: np.ndarray, skipped_R: np.ndarray, num_earlier: int) -> np.ndarray:
    """Pairs (later row, earlier row, which is below `num_earlier`) that share a band and are similar, sorted.

    In a band each row is compared with the first of those that share it and with the one before it.
    """
    rows = np.flatnonzero(signatures_RK.any(axis=1) & ~skipped_R)
    similar = np.zeros(0, dtype=np.int64)  # later row x 2^32 + earlier row
    for band in range(BANDS):
        keys_R = _band_keys(signatures_RK[rows, band * PLACES_A_BAND : (band + 1) * PLACES_A_BAND])
        order_R = np.argsort(keys_R, kind="stable")
        sorted_R, rows_R = keys_R[order_R], rows[order_R]
        is_same_R = np.zeros(len(rows), dtype=bool)
        is_same_R[1:] = sorted_R[1:] == sorted_R[:-1]
        firsts_R = np.maximum.accumulate(np.where(is_same_R, 0, np.arange(len(rows))))
        later = np.flatnonzero(is_same_R)
        for earlier in (rows_R[firsts_R[later]], rows_R[later - 1]):
            is_meant = earlier < num_earlier
            codes = (rows_R[later[is_meant]] << 32) + earlier[is_meant]
            similar = np.union1d(similar, codes[_are_similar(signatures_RK, codes)])
    return np.stack([similar >> 32, similar & (2**32 - 1)], axis=1)


def _are_similar(signatures_RK: np.ndarray, codes: np.ndarray) -> np.ndarray:
    least = round(SIMILAR * SIGNATURE_PLACES)
    parts = [
        (signatures_RK[part >> 32] == signatures_RK[part & (2**32 - 1)]).sum(axis=1) >= least
        for part in np.split(codes, range(PAIRS_AT_ONCE, len(codes), PAIRS_AT_ONCE))
    ]
    return np.concatenate(parts)


def _most_similar(signatures_RK: np.ndarray, row: int, others: np.ndarray) -> tuple[int, float]:
    shares = (signatures_RK[others] == signatures_RK[row]).mean(axis=1)
    best = int(shares.argmax())
    return int(others[best]), float(shares[best])


def _grouped(pairs: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The earlier rows of each later row."""
    begins = np.flatnonzero(np.diff(pairs[:, 0], prepend=-1))
    for begin, end in zip(begins, np.append(begins, len(pairs))[1:], strict=True):
        yield int(pairs[begin, 0]), pairs[begin:end, 1]


def _band_keys(band_RK: np.ndarray) -> np.ndarray:
    keys_R = np.zeros(len(band_RK), dtype=np.uint64)
    for place in range(band_RK.shape[1]):
        keys_R = (keys_R ^ band_RK[:, place].astype(np.uint64)) * _MIX
        keys_R ^= keys_R >> np.uint64(29)
    return keys_R


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes (uint32, S) of the shingles of all texts, and where each text's begin."""
    words_W, counts_R = _words(texts)
    text_of_W = np.repeat(np.arange(len(texts)), counts_R)
    shingles_S = words_W.copy()
    for step in range(1, WORDS_A_SHINGLE):
        shingles_S[:-step] = (shingles_S[:-step] * _MIX) ^ words_W[step:]
    # a shingle that runs into the next text is none; a text shorter than a shingle is one, over its words alone
    runs_over_W = np.zeros(len(words_W), dtype=bool)
    runs_over_W[-(WORDS_A_SHINGLE - 1) :] = True
    runs_over_W[: -(WORDS_A_SHINGLE - 1)] = text_of_W[: -(WORDS_A_SHINGLE - 1)] != text_of_W[WORDS_A_SHINGLE - 1 :]
    begins_R = np.cumsum(counts_R) - counts_R
    for text in np.flatnonzero((counts_R > 0) & (counts_R < WORDS_A_SHINGLE)):
        begin, count = begins_R[text], counts_R[text]
        shingles_S[begin] = (words_W[begin : begin + count] * _MIX ** np.arange(1, count + 1, dtype=np.uint64)).sum()
        runs_over_W[begin] = False
    mixed_S = shingles_S[~runs_over_W] * _MIX
    kept_R = np.bincount(text_of_W[~runs_over_W], minlength=len(texts))
    return ((mixed_S >> np.uint64(32)) ^ (mixed_S >> np.uint64(7))).astype(np.uint32), np.cumsum(kept_R) - kept_R


def _words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """A hash (uint64, W) of each word of all texts, lower case, and how many each text has."""
    texts = [text.lower() + "\n" for text in texts]
    points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    is_alone = points >= _FIRST_WORDLESS_SCRIPT
    is_word = _IS_WORD[np.minimum(points, len(_IS_WORD) - 1)] | is_alone
    # prefix sums of character x power of a prime: a difference, divided by the power where it begins, is a word's hash
    powers = np.cumprod(np.full(len(points), _PRIME))
    sums = np.concatenate([[np.uint64(0)], np.cumsum((points.astype(np.uint64) + np.uint64(1)) * powers)])
    joined = is_word[1:] & is_word[:-1] & ~is_alone[1:] & ~is_alone[:-1]
    begins_W = np.flatnonzero(is_word & ~np.concatenate([[False], joined]))
    ends_W = np.flatnonzero(is_word & ~np.concatenate([joined, [False]])) + 1
    inverse = np.cumprod(np.full(len(points), np.uint64(pow(int(_PRIME), -1, 2**64))))
    words_W = (sums[ends_W] - sums[begins_W]) * inverse[begins_W]
    lengths = np.array([len(text) for text in texts], dtype=np.int64)
    return words_W ^ (words_W >> np.uint64(31)), np.diff(np.searchsorted(begins_W, np.cumsum(lengths)), prepend=0)


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little") or 1


_IS_WORD = np.array([chr(point).isalnum() for point in range(_FIRST_WORDLESS_SCRIPT)])
