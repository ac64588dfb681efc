"""Adapters of one base that write together, and many weightings of them at once.

In: a base, M adapters, a mode, prompts; then points, Float[N, M] weights in [0, 1]^M. Out: the answers to every prompt
under every point, from one batched decode: prompts are read once per adapter, and what was read serves all points. An
adapter runs about as many rows as there are points that give it weight.

| mode | the next token comes from |
| --- | --- |
| hidden | head(sum_m w_m h_m), the states after the final norm (EMORL's own) |
| probs | sum_m w_m p_m / sum_m w_m |
| loglinear | softmax(sum_m w_m log p_m / sum_m w_m) |
| params | the base under sum_m w_m scale_m B_m A_m (a "soup" of the adapters), never merged |

All modes continue one common text. Greedily `hidden` depends on the direction of the weights alone, and `probs` and
`loglinear` always do. Without any weight `params` is the base, and the others have no prediction: such a point answers
with nothing.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.feed import Lockstep, Runs
from rlae_jax.models import LM, Adapter
from rlae_jax.models.lm import load_adapters

MODES = {"hidden": "hidden", "probs": "linear", "loglinear": "loglinear", "params": "params"}
DEFAULT_MEMORY = 2 << 30  # bytes of keys and values that a batch of points may take


@dataclasses.dataclass(frozen=True)
class Answers:
    """What N points answer to B prompts, S samples each."""

    tokens: Int[np.ndarray, "N B*S T"]
    steps: Int[np.ndarray, "N B*S"]  # the end token included
    ended: Bool[np.ndarray, "N B*S"]


class Fused:
    """Adapters of one base and the mode in which they write together.

    Args:
      adapters: at least two, of this base: PEFT directories or `Adapter`s.
      mode: a key of `MODES`.

    Raises:
      InputError: fewer than two adapters, an unknown mode, an adapter of another base, one that changes the head in
        mode hidden.
    """

    def __init__(self, base: LM, adapters: Sequence[str | os.PathLike[str] | Adapter], mode: str = "hidden"):
        if mode not in MODES:
            raise InputError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
        loaded = load_adapters(adapters, base)
        if len(loaded) < 2:
            raise InputError(f"a fusion needs at least two adapters, not {len(loaded)}")
        self.base, self.mode, self.names = base, mode, tuple(adapter.name for adapter in loaded)
        if mode == "params":
            self.ensemble = Ensemble([base.with_adapters(loaded)])
        else:
            self.ensemble = Ensemble.from_adapters(base, loaded, MODES[mode])

    def rays(self, temperature: float = 0.0) -> bool:
        """Whether weights of one direction answer alike."""
        return self.mode in ("probs", "loglinear") or (self.mode == "hidden" and temperature == 0)

    def check(self, points: Any) -> Float[np.ndarray, "N M"]:
        """The points as an array.

        Raises:
          InputError: another number of weights than adapters, weights outside [0, 1].
        """
        m = len(self.names)
        weights = np.asarray(points, np.float32)
        if weights.ndim != 2 or weights.shape[1] != m or not len(weights):
            raise InputError(f"points must be [N, {m}], weights of {', '.join(self.names)}; not {list(weights.shape)}")
        outside = [
            ("outside [0, 1]", f"point {n}: {row.tolist()}")
            for n, row in enumerate(weights)
            if not np.all((row >= 0) & (row <= 1))
        ]
        if outside:
            raise grouped_error("unusable weights", outside, "each adapter's weight lies in [0, 1]")
        return weights

    def over(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
        first: int = 0,
        ignore_eos: bool = False,
        memory: int = DEFAULT_MEMORY,
    ) -> "Points":
        """What answers these prompts under many points.

        Args:
          rows: ids of the prompts, as `ensemble.encode` gives them.
          samples, seed: of sampling; every point uses the same keys.
          first: the first prompt's number, where these are a part of more; its key depends on it.
          memory: bytes of keys and values at once, beside those of the prompts that all points share; more points are
            decoded one batch after another.

        Raises:
          InputError: prompts that do not fit.
        """
        spec = self.ensemble.spec(max_new_tokens=max_new_tokens, temperature=temperature, ignore_eos=ignore_eos)
        self.ensemble.check_lengths(self.ensemble.lengths(rows), max_new_tokens)
        ids, mask = self.ensemble.pad(rows)
        return Points(self, tuple(map(tuple, rows)), ids, mask, spec, samples, seed, first, memory)


@dataclasses.dataclass(eq=False)
class Points:
    """Prompts that were read, ready to be answered under any weights."""

    fused: Fused
    rows: tuple[tuple[int, ...], ...]
    ids: Int[np.ndarray, "B T"]
    mask: Int[np.ndarray, "B T"]
    spec: decoding.DecodeSpec
    samples: int
    seed: int
    first: int
    memory: int

    @functools.cached_property
    def _keys(self) -> Array:
        numbers = jnp.arange(self.first, self.first + len(self.rows))
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(self.seed)))(numbers)

    @functools.cached_property
    def _read(self) -> decoding.DecodeState:
        """The state before the first token, with every prompt's keys and values under every adapter."""
        return _start(self.fused.ensemble.params, self.ids, self.mask, self._keys, self.spec)

    @functools.cached_property
    def at_once(self) -> int:
        """How many points are decoded together."""
        alone = self.fused.mode == "params"
        if alone:
            adapted = self._adapted(np.zeros((1, len(self.fused.names)), np.float32))
            state = jax.eval_shape(_start, adapted, self.ids, self.mask, self._keys, self.spec)
        else:
            state = self._read
        # Samples share what an encoder read, and so do points that do not change how it reads.
        shared = _size([(cache.source, cache.source_mask) for cache in state.caches])
        size = (_size(state.feed) - shared) * self.samples + shared * alone
        return max(self.memory // size, 1)

    def _adapted(self, points: Float[np.ndarray, "N M"]) -> Any:
        """Mode params: the parameters of a batch with every prompt under every point."""
        weights = np.tile(points, (len(self.rows), 1))
        return self.fused.ensemble.params_for(weights, len(weights))

    def decode(self, points: Float[np.ndarray, "N M"]) -> Answers:
        """Answers under each point.

        Raises:
          InputError: see `Fused.check`.
        """
        points = self.fused.check(points)
        n, b = len(points), len(self.rows) * self.samples
        tokens = np.zeros((n, b, self.spec.max_new_tokens), np.int32)
        steps, ended = np.zeros((n, b), np.int32), np.zeros((n, b), bool)
        predicts = np.arange(n) if self.fused.mode == "params" else np.flatnonzero(points.max(axis=1) > 0)
        for start in range(0, len(predicts), self.at_once):
            part = predicts[start : start + self.at_once]
            found = self._decode(points[part])
            for whole, own in zip((tokens, steps, ended), found, strict=True):
                whole[part] = own
        return Answers(tokens, steps, ended)

    def _decode(self, points: Float[np.ndarray, "N M"]) -> tuple[np.ndarray, ...]:
        n = len(points)
        filled = np.concatenate([points, np.repeat(points[:1], _granules(n) - n, axis=0)])
        if self.fused.mode == "params":
            ids, mask = (np.repeat(x, len(filled), axis=0) for x in (self.ids, self.mask))
            state = _answer_alone(self._adapted(filled), ids, mask, self._keys, self.spec, self.samples, len(filled))
        else:
            if self.fused.mode != "hidden":
                filled = filled / filled.sum(axis=1, keepdims=True)
            runs = _runs(filled, len(self.rows), self.samples)
            state = _answer(self.fused.ensemble.params, self._read, filled, runs, self.spec, self.samples)
        # Rows are prompts, then points, then samples.
        shape = (len(self.rows), len(filled), self.samples)
        found = jax.device_get((state.tokens, state.steps, state.ended))
        by_point = [np.moveaxis(x.reshape(*shape, *x.shape[1:]), 1, 0)[:n] for x in found]
        return tuple(x.reshape(n, -1, *x.shape[3:]) for x in by_point)

    def texts(self, answers: Answers) -> list[list[str]]:
        """The answers' texts, those of each point: all samples of a prompt one after another."""
        asked = [row for row in self.rows for _ in range(self.samples)]
        lengths = answers.steps - answers.ended
        return [
            self.fused.ensemble.decode(asked, [row[:k].tolist() for row, k in zip(tokens, own, strict=True)])
            for tokens, own in zip(answers.tokens, lengths, strict=True)
        ]


def _size(tree: Any) -> int:
    """Bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _granules(n: int) -> int:
    """The next size that a program is compiled for: an eighth more than n at most."""
    step = max(1 << (n.bit_length() - 1) >> 3, 1)
    return -(-n // step) * step


def _runs(points: Float[np.ndarray, "N M"], prompts: int, samples: int) -> Runs | None:
    """The rows that each member runs: those of points that give it weight. None where that saves nothing."""
    n, m = points.shape
    used = [np.flatnonzero(of_member) for of_member in points.T]
    step = -(-n // 4)  # there are few widths, since each is a program
    width = -(-max(map(len, used)) // step) * step
    if width >= n:
        return None
    # Rows are prompts, then points, then samples.
    batch = np.arange(prompts * n * samples).reshape(prompts, n, samples)
    run = np.arange(m * prompts * width * samples).reshape(m, prompts, width, samples)
    rows = [batch[:, np.resize(own, width)] for own in used]  # filled up with rows that it runs already
    place = np.maximum(np.cumsum(points.T > 0, axis=1) - 1, 0)
    places = [of_member[:, own] for of_member, own in zip(run, place, strict=True)]
    return Runs(*(np.stack(index).astype(np.int32).ravel() for index in (rows, places)))


@jax.jit
def _start(params: Any, ids: Any, mask: Any, keys: Array, spec: decoding.DecodeSpec) -> decoding.DecodeState:
    return decoding.prefill(params, ids, mask, keys, spec)


def _many(state: decoding.DecodeState, spec: decoding.DecodeSpec, points: int, samples: int) -> decoding.DecodeState:
    """Every prompt's row for every point and sample. Points share their keys, so that only weights differ."""
    many = decoding.repeat_rows(state, spec, points)._replace(row_keys=jnp.repeat(state.row_keys, points))
    return decoding.repeat_rows(many, spec, samples) if samples > 1 else many


@functools.partial(jax.jit, static_argnames="samples")
def _answer(
    params: Any,
    state: decoding.DecodeState,
    points: Float[Array, "N M"],
    runs: Runs | None,
    spec: decoding.DecodeSpec,
    samples: int,
) -> decoding.DecodeState:
    """The state is not donated: it serves other points."""
    weights = jnp.tile(jnp.repeat(points, samples, axis=0), (len(state.done), 1))
    many = _many(state, spec, len(points), samples)
    if runs is not None:
        assert isinstance(many.feed, Lockstep)  # adapters of one base have one tokenizer
        times = len(runs.rows) // (len(spec.members) * len(state.done))
        caches = decoding.repeat_rows(state, spec, times).caches  # alike for all points
        many = many._replace(feed=many.feed._replace(caches=caches, runs=runs))
    return decoding.without_caches(decoding.decode_spans(params, many, weights, spec))


@functools.partial(jax.jit, static_argnames=("samples", "points"))
def _answer_alone(
    params: Any, ids: Any, mask: Any, keys: Array, spec: decoding.DecodeSpec, samples: int, points: int
) -> decoding.DecodeState:
    """Where prompts themselves read differently under every point."""
    state = decoding.prefill(params, ids, mask, jnp.repeat(keys, points), spec)
    state = decoding.repeat_rows(state, spec, samples) if samples > 1 else state
    return decoding.without_caches(decoding.decode_spans(params, state, jnp.ones((1, 1)), spec))
