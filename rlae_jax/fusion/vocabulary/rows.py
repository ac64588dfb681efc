"""Lists of lists as two arrays (data, offsets): row r is data[offsets[r] : offsets[r + 1]]."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

Ids = Int[np.ndarray, " N"]
Offsets = Int[np.ndarray, " _"]  # one more than rows


def offsets_of(lengths: Any) -> Offsets:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def ranges(starts: Ids, lengths: Ids) -> Int[np.ndarray, " _"]:
    """start, start + 1, ..., start + length - 1 of every row, one after the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def join(pieces: Sequence[bytes]) -> tuple[UInt8[np.ndarray, " N"], Offsets]:
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return np.frombuffer(b"".join(pieces), np.uint8), offsets_of(lengths)
