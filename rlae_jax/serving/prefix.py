"""Prompts that were read, kept so that others that begin alike need not be read from the start."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import numpy as np

from rlae_jax.models.cache import Cache, LayerState

# Fewer tokens in common are not worth a look.
_LEAST = 8


@dataclasses.dataclass(eq=False)
class _Entry:
    ids: np.ndarray
    cache: Cache  # of one prompt; its first slots hold these ids
    bytes: int


class PrefixCache:
    """Caches of prompts by their ids, of one forward pass. The least recently used go first.

    Keys and values of a prompt serve every prompt that begins as it does, however far; a recurrent layer's state serves
    those alone that go on where it ends.

    Args:
      budget: bytes that all of them together take.
    """

    def __init__(self, budget: int):
        self._budget = budget
        self._entries: collections.OrderedDict[int, _Entry] = collections.OrderedDict()
        self._beginnings: dict[bytes, list[int]] = collections.defaultdict(list)  # the entries with these first ids
        self._numbers = itertools.count()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, ids: Sequence[int]) -> tuple[int, Cache] | None:
        """How many of the first ids some prompt has, too, and its cache; None where they are hardly any."""
        wanted = np.asarray(ids, np.int32)
        best, at = 0, -1
        for number in self._beginnings.get(_beginning(wanted), ()):
            entry = self._entries[number]
            common = _common(entry.ids, wanted)
            if any(isinstance(layer, LayerState) for layer in entry.cache.layers) and common < len(entry.ids):
                continue
            if common > best:
                best, at = common, number
        if best < _LEAST:
            return None
        self._entries.move_to_end(at)
        return best, self._entries[at].cache

    def keep(self, ids: Sequence[int], cache: Cache) -> None:
        """Keeps a prompt that was read, in place of those whose ids it begins with."""
        kept = np.asarray(ids, np.int32)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
        if len(kept) < _LEAST or size > self._budget:
            return
        recurrent = any(isinstance(layer, LayerState) for layer in cache.layers)
        for number in list(self._beginnings.get(_beginning(kept), ())):
            entry = self._entries[number]
            common = _common(entry.ids, kept)
            if common == len(kept) == len(entry.ids) or (common == len(kept) and not recurrent):
                self._entries.move_to_end(number)  # which holds it already
                return
            if common == len(entry.ids) and not recurrent:
                self._drop(number)
        number = next(self._numbers)
        self._entries[number] = _Entry(kept, cache, size)
        self._beginnings[_beginning(kept)].append(number)
        self.bytes += size
        while self.bytes > self._budget:
            self._drop(next(iter(self._entries)))

    def clear(self) -> None:
        """Forgets everything."""
        self._entries.clear()
        self._beginnings.clear()
        self.bytes = 0

    def _drop(self, number: int) -> None:
        entry = self._entries.pop(number)
        self.bytes -= entry.bytes
        alike = self._beginnings[_beginning(entry.ids)]
        alike.remove(number)
        if not alike:
            del self._beginnings[_beginning(entry.ids)]


def _beginning(ids: np.ndarray) -> bytes:
    """Prompts that have less than this in common are of no use to each other."""
    return ids[:_LEAST].tobytes()


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many of their first ids are alike."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
