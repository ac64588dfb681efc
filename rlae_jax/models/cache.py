"""The cache: what a decoding step reads of the tokens before it.

One pair of arrays per layer, keys and values [B, G, H, S]. Rows are padded on the left, so that all rows write the same
slot:

    slot      0 1 2 3 4 5 6 7 ...
    row 0     . . a b c|d e        start = 2      . never attended to
    row 1     p q r s t|u v        start = 0      | end of the prompt

An encoder-decoder's prompt goes through the encoder once. Its cache also holds, per decoder layer, the keys and values
of the encoder's states, which no step changes; its own slots begin with the decoder's start token.

A layer that sees a window, or a chunk of as many tokens, keeps a ring where the cache has more slots than that takes:
slot s lies at s modulo R, where it replaces one that no query will see again. Which slot a place holds follows from the
newest one alone:

    window 3, R = 3     slot    0 1 2 3 4|5          place    0 1 2
                        token   a b c d e|           holds    d e c      newest 4: slots 3 4 2

Where rows take in up to A tokens at a time, each at its own slot and with filling behind what it really took, R is the
window and A more, so that filling replaces nothing that is still seen; and A places on either side are there for what a
slice update of A tokens would write beyond the ring's ends: it is made twice, R places apart.

    before     ring            behind
    . . . .   | s ... s + 3 |   . . . .
                       ^^^^^^^^^^^          tokens at the ring's end, of which the last two lie behind it
    ^^^^^^^^^^^                             the same again, of which the last two lie at its beginning

A recurrent layer keeps a state instead, of one size however long the text is: that after the last token that a row
took. It is replaced, not added to, and what is no token of a row leaves it as it was.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Shaped

from rlae_jax.models import quantise
from rlae_jax.models.config import GatedDelta, ModelConfig
from rlae_jax.sharding import constrain

SCALE_BYTES = 4  # float32


class LayerCache(NamedTuple):
    """Of one layer. Rows and slots differ between what is cached and what is new, so that they are not checked by
    name.

    With `ModelConfig.kv_dtype` they are held in 8 bits with a scale per row, head and slot: a key is keys * key_scale.
    The bits of fp8 are uint8, since the compiler for CPUs would widen a whole array of fp8 to write into it.
    """

    keys: Shaped[Array, "_B G H _S"]
    values: Shaped[Array, "_B G H _S"]
    key_scale: Float[Array, "_B G _S"] | None = None
    value_scale: Float[Array, "_B G _S"] | None = None

    @classmethod
    def hold(cls, k_bghs: Array, v_bghs: Array, config: ModelConfig) -> "LayerCache":
        """Keys and values in the form in which a cache of this model has them."""
        if config.kv_dtype is None:
            return cls(k_bghs, v_bghs)
        keys, values = (quantise.absmax(x.astype(jnp.float32), (2,), config.kv_dtype) for x in (k_bghs, v_bghs))
        k, v = keys.values, values.values
        if config.kv_dtype == "fp8":
            k, v = (lax.bitcast_convert_type(x, jnp.uint8) for x in (k, v))
        return cls(k, v, keys.scale[:, :, 0], values.scale[:, :, 0])

    @property
    def slots(self) -> int:
        """Places for tokens: S, or those of a ring."""
        return self.keys.shape[3]


class LayerState(NamedTuple):
    """Of one recurrent layer (`recurrent.py`)."""

    inputs: tuple[Shaped[Array, "_B J *_C"], ...]  # the last inputs of its convolution, part by part
    memory: Float[Array, "_B N K V"] | None = None  # float32, of linear attention


def zero_state(config: ModelConfig, rows: int) -> LayerState:
    """The state before a text."""
    spec = config.recurrent
    if isinstance(spec, GatedDelta):
        keys, values = (spec.key_heads, spec.key_width), (spec.heads, spec.value_width)
        parts: tuple[tuple[int, ...], ...] = (keys, keys, values)
        memory = jnp.zeros((rows, spec.heads, spec.key_width, spec.value_width))
    else:
        parts, memory = ((config.width,),), None
    taps = 1 if spec is None else spec.taps
    return LayerState(tuple(jnp.zeros((rows, taps - 1, *part), config.dtype) for part in parts), memory)


def state_axes(config: ModelConfig) -> LayerState:
    """The names of the first axes of a state's arrays, in a tree like it."""
    if isinstance(config.recurrent, GatedDelta):
        parts: tuple[Any, ...] = tuple(("batch", None, axis) for axis in ("kv_heads", "kv_heads", "heads"))
        memory: Any = ("batch", "heads")
        return LayerState(parts, memory)
    channels: Any = ("batch", None, "mlp")
    return LayerState((channels,))


def pin_state(state: LayerState, config: ModelConfig) -> LayerState:
    """A state as it lies on a mesh."""
    pinned: LayerState = jax.tree.map(lambda part, names: constrain(part, *names), state, state_axes(config))
    return pinned


Layers = tuple[LayerCache | LayerState, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Cache:
    """What decoding reads again: keys and values of every layer, or its state."""

    layers: Layers  # of R rows, written at one slot per step
    slots: int = dataclasses.field(metadata={"static": True})  # S
    # Of an encoder's states, [B, G, H, T]; constant. R / B rows, one after another, continue what one row of it holds.
    source: tuple[LayerCache, ...] = ()
    source_mask: Any = ()  # Bool[B, T], True where the encoder had a token

    def is_ring(self, layer: int) -> bool:
        """Whether a layer keeps its window only."""
        held = self.layers[layer]
        return isinstance(held, LayerCache) and held.slots < self.slots


class Visible(NamedTuple):
    """What rows see of a cache."""

    whole: Bool[Array, "B S"]
    # For each place of a ring the slot that it holds, -1 where that is nobody's, the row's padding or of a chunk before
    # the newest slot's; None without.
    ring: Int[Array, "B places"] | None = None


def as_numbers(held: Array, dtype: Any) -> Array:
    """Keys or values as a cache holds them, without their scale."""
    if held.dtype == jnp.uint8:
        held = lax.bitcast_convert_type(held, jnp.float8_e4m3fn)
    return held.astype(dtype)


def pin_cache(cached_bghs: Array) -> Array:
    """Keys or values as they lie on a mesh."""
    return constrain(cached_bghs, "batch", "kv_heads")


def cache_layout(k_btgh: Array, v_btgh: Array, config: ModelConfig) -> LayerCache:
    """Keys and values [B, T, G, H] as the cache holds them, [B, G, H, T]."""
    return LayerCache.hold(jnp.einsum("btgh->bght", k_btgh), jnp.einsum("btgh->bght", v_btgh), config)


def layer_slots(config: ModelConfig, layer: int, slots: int, ahead: int = 0) -> int:
    """How many places for tokens a layer has in a cache of `slots` slots.

    Args:
      ahead: A, the tokens that a row takes in at a time where rows have slots of their own; 0 where all rows take in
        one token each, into the same slot.
    """
    return min(slots, config.window + 3 * ahead) if layer in config.local_layers else slots


def places(config: ModelConfig, slots: int, ahead: int = 0) -> int:
    """Of all layers that have keys and values together, those of layers with wider heads counted as so many more."""
    cached = (i for i in range(config.layers - config.reading_layers) if i not in config.recurrent_layers)
    own = [(i, config.of_layer(i)) for i in cached]
    entries = sum(layer_slots(config, i, slots, ahead) * layer.kv_heads * layer.head_width for i, layer in own)
    return -(-entries // (config.kv_heads * config.head_width))


def place_bytes(config: ModelConfig) -> int:
    """Keys and values of one token in one layer."""
    if config.kv_dtype is not None:
        return 2 * config.kv_heads * (config.head_width + SCALE_BYTES)
    return 2 * config.kv_heads * config.head_width * jnp.dtype(config.dtype).itemsize


def state_bytes(config: ModelConfig) -> int:
    """The states of all recurrent layers for one row."""
    state: list[jax.ShapeDtypeStruct] = jax.tree.leaves(jax.eval_shape(lambda: zero_state(config, 1)))
    return len(config.recurrent_layers) * int(sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in state))


def cache_bytes(config: ModelConfig, slots: int, ahead: int = 0) -> int:
    """What a cache of `slots` slots takes for one row; see `layer_slots`."""
    return places(config, slots, ahead) * place_bytes(config) + state_bytes(config)


def visible(cache: Cache, config: ModelConfig, start_b: Int[Array, " B"], newest: Int[Array, " *B"]) -> Visible:
    """The slots from each row's first one up to the newest, one for all rows or one for each.

    One for all may lie beyond the cache's end: slot s then has the place s modulo S, as in a ring, and rows see at most
    the S last ones.
    """
    slots = jnp.arange(cache.slots)[None]
    if newest.ndim:
        newest = newest[:, None]
        whole = (slots >= start_b[:, None]) & (slots <= newest)
    else:
        whole = newest - (newest - slots) % cache.slots >= start_b[:, None]
    rings = [layer for layer in config.local_layers if layer < len(cache.layers) and cache.is_ring(layer)]
    if not rings:
        return Visible(whole)
    of_ring = cache.layers[rings[0]]
    assert isinstance(of_ring, LayerCache)
    places, ahead, length = _ring(of_ring.slots, config.window)
    place = np.arange(places)[None] - ahead
    held = newest - (newest - place) % length  # the latest slot up to the newest that belongs there
    first = start_b[:, None]
    if config.chunked:
        first = first + jnp.maximum(newest - first, 0) // config.window * config.window
    used = (held >= first) & ((place >= 0) & (place < length))
    return Visible(whole, jnp.where(used, held, -1))


def _ring(places: int, window: int) -> tuple[int, int, int]:
    """(places, A, R) of a ring, from how many places it has."""
    ahead = (places - window) // 3
    return places, ahead, places - 2 * ahead


def extend_cache(cache: Cache, config: ModelConfig, slots: int, ahead: int = 0) -> Cache:
    """The cache of `slots` slots whose first hold what `cache` holds. Layers with a window keep what can still be seen
    of it, see `layer_slots`."""

    def extend(layer: int, cached: Array) -> Array:
        places = layer_slots(config, layer, slots, ahead)
        if cached.shape[-1] < cache.slots or places == cached.shape[-1] == slots:  # a ring already, or nothing to do
            return cached
        before, after = 0, slots - cache.slots
        if places < slots:
            _, before, length = _ring(places, config.window)
            cached = cached[..., max(cache.slots - length, 0) :]
            if cache.slots > length:
                cached = jnp.roll(cached, cache.slots % length, axis=-1)
            after = places - before - cached.shape[-1]
        return pin_cache(jnp.pad(cached, [*[(0, 0)] * (cached.ndim - 1), (before, after)]))

    layers = tuple(
        jax.tree.map(functools.partial(extend, i), layer) if isinstance(layer, LayerCache) else layer
        for i, layer in enumerate(cache.layers)
    )
    return dataclasses.replace(cache, layers=layers, slots=slots)


def empty_cache(config: ModelConfig, rows: int, slots: int, ahead: int | None = 0) -> Cache:
    """A cache that holds nothing yet.

    Args:
      ahead: as in `layer_slots`; None where no layer is to be a ring.
    """

    def zeros(layer: int) -> LayerCache | LayerState:
        if layer in config.recurrent_layers:
            return zero_state(config, rows)
        own = config.of_layer(layer)
        shape = (
            rows,
            own.kv_heads,
            own.head_width,
            slots if ahead is None else layer_slots(config, layer, slots, ahead),
        )
        return LayerCache.hold(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype), config)

    return Cache(tuple(map(zeros, range(config.layers - config.reading_layers))), slots)


def put_row(
    cache: Cache,
    config: ModelConfig,
    read: Cache,
    row: Int[Array, ""],
    first: Int[Array, ""],
    count: Int[Array, ""],
    ahead: int = 0,
) -> Cache:
    """Gives one row of a cache, as its slots from `first` on, what a cache of one row without rings holds in its first
    `count` slots; what lies behind them there will not be seen. States are those after them.

    Args:
      ahead: what the cache was made with, see `layer_slots`.
    """

    def put(layer: int, cached: Array, own: Array) -> Array:
        places = cached.shape[-1]
        margin = _ring(places, config.window)[1] if ahead and places < cache.slots else 0
        length = places - 2 * margin
        kept = min(length, own.shape[-1])
        begin = jnp.maximum(count - kept, 0)
        piece = lax.dynamic_slice_in_dim(own, begin, kept, axis=-1)
        piece = jnp.pad(piece, [*[(0, 0)] * (own.ndim - 1), (0, length - kept)])
        turned = jnp.roll(piece, first + begin, axis=-1)
        turned = jnp.pad(turned, [*[(0, 0)] * (own.ndim - 1), (margin, margin)])
        return lax.dynamic_update_slice_in_dim(cached, turned, row, axis=0)

    def put_layer(layer: int, held: LayerCache | LayerState, own: LayerCache | LayerState) -> LayerCache | LayerState:
        if isinstance(held, LayerState):
            state: LayerState = jax.tree.map(lambda x, y: lax.dynamic_update_slice_in_dim(x, y, row, axis=0), held, own)
            return state
        written: LayerCache = jax.tree.map(functools.partial(put, layer), held, own)
        return written

    pairs = enumerate(zip(cache.layers, read.layers, strict=True))
    return dataclasses.replace(cache, layers=tuple(put_layer(i, *pair) for i, pair in pairs))


def resize_rings(cache: Cache, config: ModelConfig, slots: int, newest: Int[Array, ""]) -> tuple[Cache, Int[Array, ""]]:
    """A cache whose rows all write the same slot, slot s at the place s modulo S, with another number of slots: what it
    holds of the last ones up to the newest.

    Returns it with the number that the newest slot has now: slots are numbered so that most places stay where they are.
    """
    change = slots - cache.slots
    place = newest % cache.slots
    kept = jnp.minimum(place, slots - 1)
    renumbered = newest + (kept - newest) % slots
    before = jnp.arange(slots) <= kept

    def whole(cached: Array) -> Array:
        edges = [(0, 0)] * (cached.ndim - 1)
        if change > 0:
            return jnp.where(before, jnp.pad(cached, [*edges, (0, change)]), jnp.pad(cached, [*edges, (change, 0)]))
        last = lax.dynamic_slice_in_dim(cached, place - kept, slots, axis=-1)
        return jnp.where(before, last, cached[..., -change:])

    def resize(layer: int, cached: Array) -> Array:
        old, new = cached.shape[-1], layer_slots(config, layer, slots)
        if (old, new) == (cache.slots, slots):
            return whole(cached)
        in_order = jnp.roll(cached, -(newest + 1), axis=-1)[..., max(old - new, 0) :]
        filled = jnp.pad(in_order, [*[(0, 0)] * (cached.ndim - 1), (new - in_order.shape[-1], 0)])
        return jnp.roll(filled, renumbered + 1, axis=-1)

    layers = tuple(
        jax.tree.map(functools.partial(resize, i), layer) if isinstance(layer, LayerCache) else layer
        for i, layer in enumerate(cache.layers)
    )
    return dataclasses.replace(cache, layers=layers, slots=slots), renumbered


# Up to this many rows a chunk is written by one slice update per row, which XLA does in place; beyond it by a loop.
_UNROLLED_ROWS = 16


def _places(cached: Array, new: Array, slots: int, slot: Array) -> tuple[Array, ...]:
    """Where the first of W new tokens is written, which belongs into `slot` of a cache of so many."""
    if cached.shape[-1] == slots:
        return (slot,)
    ahead = new.shape[-1]
    length = cached.shape[-1] - 2 * ahead
    place = ahead + slot % length
    return place, jnp.maximum(place - length, 0)


def _write_row_by_row(slots: int, layers: Layers, new: Layers, slot_b: Array) -> Layers:
    def write(b: Any, layers: Layers) -> Layers:
        def one(cached: Array, values: Array) -> Array:
            row = lax.dynamic_slice_in_dim(values, b, 1, axis=0)
            for place in _places(cached, values, slots, slot_b[b]):
                cached = lax.dynamic_update_slice(cached, row, (b, *[0] * (cached.ndim - 2), place))
            return cached

        written: Layers = jax.tree.map(one, layers, new)
        return written

    rows = len(slot_b)
    if rows > _UNROLLED_ROWS:
        layers = lax.fori_loop(0, rows, write, layers)
    else:
        for b in range(rows):
            layers = write(b, layers)
    return layers


def _write_at_once(slots: int, layers: Layers, new: Layers, slot_b: Array) -> Layers:
    def one(cached: Array, values: Array, place: Array) -> Array:
        return lax.dynamic_update_slice(cached, values, (*[0] * (cached.ndim - 1), place))

    def all_rows(cached: Array, values: Array) -> Array:
        for place_b in _places(cached, values, slots, slot_b):
            cached = jax.vmap(one)(cached, values, place_b)
        return cached

    written: Layers = jax.tree.map(all_rows, layers, new)
    return written


def write_chunk(cache: Cache, new: Layers, slot_b: Int[Array, " B"]) -> Cache:
    """Puts W keys and values per row into the slots from `slot_b` on, all of which must exist: a slice update beyond
    the end would move back and overwrite others. Rings must have been made for W tokens at a time. New states take the
    place of the old ones."""
    # A scatter is one kernel per array on an accelerator; the CPU compiler makes a slow loop of it.
    ways = {
        "cpu": functools.partial(_write_row_by_row, cache.slots),
        "default": functools.partial(_write_at_once, cache.slots),
    }
    kept = [i for i, layer in enumerate(cache.layers) if isinstance(layer, LayerCache)]
    held, added = (tuple(layers[i] for i in kept) for layers in (cache.layers, new))
    written = dict(zip(kept, lax.platform_dependent(held, added, slot_b, **ways), strict=True))
    return dataclasses.replace(cache, layers=tuple(written.get(i, layer) for i, layer in enumerate(new)))
