"""Reading prompts a part at a time, from where a prompt that was read before parts from them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlae_jax.fusion import slots as programs
from rlae_jax.models import ModelConfig
from rlae_jax.models.cache import Cache
from rlae_jax.serving.prefix import PrefixCache

# The smallest cache that a prompt is read into, and how much larger the next ones are.
_SMALLEST, _GROWTH = 128, 8
# The fewest tokens that a program reads at a time, and how many more the next ones: reading costs as much as its width.
_NARROWEST, _WIDER = 32, 2


@dataclasses.dataclass(eq=False)
class Reading:
    """A prompt that is being read."""

    ids: list[Sequence[int]]  # of each forward pass
    caches: list[Cache]
    read: list[int]  # tokens so far
    known: int  # of the first one's tokens, those that another prompt had, too

    @property
    def left(self) -> int:
        """Tokens to read, of the pass with most. The last one of a prompt is what decoding begins with."""
        return max(len(ids) - 1 - n for ids, n in zip(self.ids, self.read, strict=True))


class PromptReader:
    """Reads prompts with some members.

    Args:
      passes: each forward pass's configuration, and how many members it runs.
      params: and its arrays.
      context: tokens of the longest prompt.
      chunk: the most tokens that are read at a time.
      prefix_bytes: for prompts that were read.
    """

    def __init__(
        self,
        passes: Sequence[tuple[ModelConfig, int]],
        params: Sequence[Any],
        context: int,
        chunk: int,
        prefix_bytes: int,
    ):
        self._passes = list(zip(passes, params, strict=True))
        self._chunk = min(chunk, context)
        self._prefixes = [PrefixCache(prefix_bytes // len(passes)) for _ in passes]
        self.sizes = [*self._smaller(context), context]
        self._empty: dict[tuple[int, int], Cache] = {}  # by pass and size; nothing is ever written into them

    @staticmethod
    def _smaller(context: int) -> list[int]:
        sizes, size = [], _SMALLEST
        while size < context:
            sizes.append(size)
            size *= _GROWTH
        return sizes

    def _widths(self, size: int) -> list[int]:
        """Tokens that programs read at a time into a cache of this size."""
        widest, width, widths = min(self._chunk, size), _NARROWEST, []
        while width < widest:
            widths.append(width)
            width *= _WIDER
        return [*widths, widest]

    def _slots(self, size: int) -> int:
        return size + self._widths(size)[0]  # what a chunk fills lies beyond a prompt's end

    def _size_of(self, cache: Cache) -> int:
        return next(size for size in self.sizes if self._slots(size) == cache.slots)

    def start(self, ids: Sequence[Sequence[int]]) -> Reading:
        """A prompt of which what is known already is read.

        Args:
          ids: of each pass, or one list for all.
        """
        found = Reading([ids[p % len(ids)] for p in range(len(self._passes))], [], [], 0)
        for p, (own, prefix) in enumerate(zip(found.ids, self._prefixes, strict=True)):
            size = next(size for size in self.sizes if size >= len(own))
            slots = self._slots(size)
            known = prefix.find(own[:-1])
            if known is None:
                found.caches.append(self._nothing(p, size))
            else:
                cache = known[1]
                found.caches.append(cache if cache.slots >= slots else programs.grow(cache, slots))
            found.read.append(0 if known is None else known[0])
        found.known = found.read[0]
        return found

    def _nothing(self, p: int, size: int) -> Cache:
        """A cache that holds nothing yet."""
        if (p, size) not in self._empty:
            config, members = self._passes[p][0]
            self._empty[p, size] = programs.empty_prompt(config, members, self._slots(size))
        return self._empty[p, size]

    def read(self, reading: Reading) -> int:
        """Reads the next tokens of a prompt, and returns how many at most by any pass."""
        most = 0
        for p, (((config, members), params), ids) in enumerate(zip(self._passes, reading.ids, strict=True)):
            at, cache = reading.read[p], reading.caches[p]
            left = len(ids) - 1 - at
            if left <= 0:
                continue
            widths = [w for w in self._widths(self._size_of(cache)) if at + w <= cache.slots]
            width = next((w for w in widths if w >= left), widths[-1])
            count = min(width, left)
            chunk, own = np.zeros((1, width), np.int32), ids[at : at + count]
            if at:
                chunk[0, :count] = own
                cache = programs.read_chunk(params, cache, chunk, np.int32(at), np.int32(count), config, members)
            else:
                chunk[0, width - count :] = own
                cache = programs.read_first(params, chunk, np.int32(count), config, members, cache.slots)
            reading.caches[p], reading.read[p] = cache, at + count
            # A state is of use where it ends alone, so that those in between are kept, too.
            if count == left or config.recurrent_layers:
                self._prefixes[p].keep(ids[: at + count], cache)
            most = max(most, width)
        return most

    def finish(self, reading: Reading) -> tuple[tuple[Cache, ...], int]:
        """The caches of a prompt that is read, all of one size, and that size."""
        size = max(map(self._size_of, reading.caches))
        slots = self._slots(size)
        return tuple(cache if cache.slots == slots else programs.grow(cache, slots) for cache in reading.caches), size

    def forget(self) -> None:
        """Every prompt that was read."""
        for prefix in self._prefixes:
            prefix.clear()

    def warm_up(self, size: int) -> tuple[Cache, ...]:
        """Compiles what reads into caches of this size, and returns some."""
        caches = []
        for p, ((config, members), params) in enumerate(self._passes):
            cache = self._nothing(p, size)
            for width in self._widths(size):
                ids = np.zeros((1, width), np.int32)
                one = np.int32(1)
                cache = programs.read_first(params, ids, one, config, members, cache.slots)
                cache = programs.read_chunk(params, cache, ids, one, one, config, members)
            jax.block_until_ready([programs.grow(cache, self._slots(s)) for s in self.sizes if s > size])
            caches.append(cache)
        return tuple(caches)
