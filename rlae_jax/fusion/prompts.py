"""The rows of a batch before decoding: `Prompts`, one pytree whose every leaf has B first, and what makes it.

In: rows of ids on the host, seeds, limits. Out: arrays of a few sizes (buckets), so that programs are reused; rows that
fill a bucket write nothing. Padding, splitting, repeating and sharding prompts are each one `tree.map`.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, Integer, Key

from rlae_jax.compilation import jit
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion.reading import Text
from rlae_jax.sharding import fill, groups_of, platform

SMALLEST_PROMPT_BUCKET = 16
# A prompt's ids; of members with different tokenizers a tuple of each member's own.
Row = Any


class Prompts(NamedTuple):
    """Everything that belongs to the rows of a batch, every leaf with B first."""

    ids: tuple[Int[Array, "B T"], ...]  # of the one tokenizer, or each member's own
    mask: tuple[Int[Array, "B T"], ...]  # 1 where there is a token; padding on either side
    keys: Key[Array, " B"] | None  # what a row draws is a function of its key; None until they are known
    active: Bool[Array, " B"]  # False for the filling of a bucket, which writes nothing
    limits: Int[Array, " B"]  # each row's longest answer
    forced: Int[Array, "B N"] | None = None  # what is written, whatever is likely: to score given texts
    text: Text | None = None  # the prompts in an encoder's ids, for policies that read "text"

    @property
    def batch(self) -> int:
        """B."""
        return self.active.shape[0]


def row_keys(key: Key[Array, ""] | Key[Array, " B"], batch: int) -> Key[Array, " B"]:
    """Row b's key is fold_in(key, b); a batch of keys is taken as it is."""
    return jax.vmap(lambda b: jax.random.fold_in(key, b))(jnp.arange(batch)) if key.ndim == 0 else key


@functools.partial(jit, static_argnames="batch")
def keys_of_seeds(seed: Integer[Array | np.ndarray, "*B"], batch: int) -> Key[Array, " B"]:
    """Row b's key: fold_in(key(seed), b), or key(seed[b]) if there is a seed per row."""
    if seed.ndim:
        return jax.vmap(jax.random.key)(seed)
    return row_keys(jax.random.key(seed), batch)


def bucket(n: int, smallest: int = 1) -> int:
    """The next size in 1, 2, 3, 4, 6, 8, 12, 16, ... (2^i and 3 * 2^i) that holds n: at most half is wasted."""
    size = smallest
    while size < n:
        if 3 * size % 2 == 0 and 3 * size // 2 >= n:
            return 3 * size // 2
        size *= 2
    return size


def smallest_batch() -> int:
    """The fewest rows that are decoded together. A single row's products are made reductions by the compilers for GPUs
    and TPUs, which takes 1.5 and 3 times as long as two rows."""
    return 1 if platform() == "cpu" else 2


def batch_bucket(n: int, mesh: Mesh | None = None) -> int:
    """The size of a batch that holds n rows, for each group of a mesh's devices alike."""
    groups = groups_of(mesh)
    return groups * bucket(fill(n, mesh) // groups, smallest_batch())


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Ids and mask, padded on the left to `width`."""
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return ids, mask


T = TypeVar("T")


def fill_rows(tree: T, batch: int) -> T:
    """Arrays with rows first, filled up to `batch` rows with the first one."""

    def fill(leaf: Any) -> Any:
        missing = batch - len(leaf)
        return np.concatenate([leaf, np.repeat(leaf[:1], missing, axis=0)]) if missing else leaf

    filled: T = jax.tree.map(fill, tree)
    return filled


def make_prompts(
    rows: Sequence[Row],
    members: int,
    max_new_tokens: int,
    *,
    seed: Any = None,
    batch: int | None = None,
    limits: Int[np.ndarray, " n"] | None = None,
    forced: Sequence[Sequence[int]] | None = None,
    text: Text | None = None,
) -> Prompts:
    """Rows of ids as a batch.

    Args:
      rows: ids of each prompt, or for each prompt a tuple of every member's ids.
      members: how many arrays of ids there are: 1 with one tokenizer, else K. Rows with one list of ids are then read
        by all of them.
      seed: one integer, one per row, or None where keys are drawn later.
      batch: B, filled up with rows that write nothing; by default the next bucket.
      limits: each row's longest answer; by default `max_new_tokens`.
      forced: ids that are written, of at most `max_new_tokens`.

    Raises:
      InputError: seeds that are neither one integer nor one per row.
    """
    n = len(rows)
    batch = batch_bucket(n) if batch is None else batch
    each = [rows] * members if isinstance(rows[0][0], int | np.integer) else list(zip(*rows, strict=True))
    padded = [pad_rows(own, bucket(max(map(len, own)), SMALLEST_PROMPT_BUCKET)) for own in each]
    ids, mask = zip(*padded, strict=True)
    written: Any = None
    if forced is not None:
        written = np.zeros((n, max_new_tokens), np.int32)
        for b, row in enumerate(forced):
            written[b, : len(row)] = row
    longest: Any = np.full(n, max_new_tokens, np.int32) if limits is None else limits
    active: Any = np.arange(batch) < n
    prompts = fill_rows(Prompts(ids, mask, None, active[:n], longest, written, text), batch)._replace(active=active)
    if seed is None:
        return prompts
    seeds = check_seeds(seed, n)
    return prompts._replace(keys=keys_of_seeds(fill_rows(seeds, batch) if seeds.ndim else seeds, batch))


def prompts_from_arrays(
    ids: Any, mask: Any, max_new_tokens: int, key: Any = None, active: Bool[Array, " B"] | None = None
) -> Prompts:
    """Arrays of ids as a batch, traced or not.

    Args:
      ids, mask: [B, T], or a tuple of each member's.
      key: row b draws from fold_in(key, b), or from key[b]; None where keys are drawn later.
      active: rows that are False write nothing.

    Raises:
      AssertionError: ids and masks of other shapes.
    """
    each, masks = ((x,) if not isinstance(x, tuple | list) else tuple(x) for x in (ids, mask))
    chex.assert_rank([*each, *masks], 2)
    chex.assert_equal_shape_prefix([*each, *masks], 1)
    for own, real in zip(each, masks, strict=True):
        chex.assert_equal_shape([own, real])
    b = each[0].shape[0]
    return Prompts(
        ids=tuple(map(jnp.asarray, each)),
        mask=tuple(map(jnp.asarray, masks)),
        keys=None if key is None else row_keys(key, b),
        active=jnp.ones((b,), bool) if active is None else active,
        limits=jnp.full((b,), max_new_tokens, jnp.int32),
    )


def check_seeds(seed: Any, batch: int) -> Integer[np.ndarray, "*B"]:
    """The seed, or the seeds of rows, as unsigned integers.

    Raises:
      InputError: seeds that are neither one integer nor one per row.
    """
    seeds = np.asarray(seed)
    if seeds.shape not in ((), (batch,)):
        raise InputError(f"seed must be an integer or one per prompt ([{batch}]), not shape {list(seeds.shape)}")
    if seeds.dtype.kind not in "iu" or np.any(seeds < 0) or np.any(seeds > np.iinfo(np.uint32).max):
        raise InputError(f"seeds must be integers from 0 to 2^32 - 1, not {seed}")
    return seeds.astype(np.uint32)


def read_ids(prompt_ids: Any, prompt_mask: Any) -> list[list[int]]:
    """Rows of ids from arrays [B, T] with padding on either side.

    Raises:
      InputError: shapes that are not [B, T], no rows, a row without a token.
    """
    ids = np.asarray(prompt_ids)
    mask = np.ones_like(ids) if prompt_mask is None else np.asarray(prompt_mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise InputError(
            f"prompt_ids and prompt_mask must both be [B, T], not {list(ids.shape)} and {list(mask.shape)}"
        )
    if not ids.shape[0]:
        raise InputError("no prompts: give at least one")
    rows = [row[keep].tolist() for row, keep in zip(ids, mask.astype(bool), strict=True)]
    empty = [("empty prompts", f"row {b}") for b, row in enumerate(rows) if not row]
    if empty:
        raise grouped_error("prompt_mask leaves rows without a single token", empty)
    return rows
