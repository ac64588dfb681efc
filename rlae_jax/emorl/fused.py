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
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.compilation import jit
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion import programs
from rlae_jax.fusion.decode import decode_spans, params_places, prefill
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.lockstep import Lockstep, RowSubsets
from rlae_jax.fusion.prompts import Prompts, smallest_batch
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers, DecodeState, answers_of, repeat_rows
from rlae_jax.models import LM, Adapter
from rlae_jax.models.lm import load_adapters
from rlae_jax.models.quantise import weight_bytes
from rlae_jax.sharding import ROWS, WHOLE, by_rows, fill, groups_of, to_host, use

MODES = {"hidden": "hidden", "probs": "linear", "loglinear": "loglinear", "params": "params"}
DEFAULT_MEMORY = 2 << 30  # bytes of keys and values that a batch of points may take


@dataclasses.dataclass(frozen=True)
class PointAnswers:
    """What N points answer to B prompts, S samples each."""

    tokens: Int[np.ndarray, "N BS T"]
    steps: Int[np.ndarray, "N BS"]  # the end token included
    ended: Bool[np.ndarray, "N BS"]


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

    def scale_invariant(self, temperature: float = 0.0) -> bool:
        """Whether only the direction of the weights matters: all multiples of a point answer alike."""
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

    def prepare(
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
    ) -> "PointDecoder":
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
        self.ensemble.require_memory(len(rows) * samples, max_new_tokens, "give fewer prompts or samples")
        batch = fill(len(rows), self.base.mesh)
        keys = _keys(np.uint32(seed), np.arange(first, first + batch))
        prompts = self.ensemble.prompts(rows, spec, batch=batch)._replace(keys=keys)
        return PointDecoder(self, tuple(map(tuple, rows)), prompts, spec, samples, memory)


@dataclasses.dataclass(eq=False)
class PointDecoder:
    """Prompts that were read, ready to be answered under any weights."""

    fused: Fused
    rows: tuple[tuple[int, ...], ...]
    prompts: Prompts
    spec: DecodeSpec
    samples: int
    memory: int

    @functools.cached_property
    def _read(self) -> DecodeState:
        """The state before the first token, with every prompt's keys and values under every adapter."""
        with use(self._mesh):
            state: DecodeState = programs.prefill(self.fused.ensemble.params, self.prompts, self.spec, 1)
        return state

    @property
    def _mesh(self) -> Mesh | None:
        return self.fused.base.mesh

    @property
    def _groups(self) -> int:
        """Of devices, each with prompts of its own."""
        return groups_of(self._mesh)

    @functools.cached_property
    def at_once(self) -> int:
        """How many points are decoded together."""
        alone = self.fused.mode == "params"
        if alone:
            adapted = self._adapted(np.zeros((1, len(self.fused.names)), np.float32))
            read = functools.partial(programs.prefill, samples=1)
            state = jax.eval_shape(read, adapted, self.prompts, self.spec)
        else:
            state = self._read
        # Samples share what an encoder read, and so do points that do not change how it reads.
        shared = _size([(cache.source, cache.source_mask) for cache in state.caches])
        size = (_size(state.members) - shared) * self.samples + shared * alone
        return max(self.memory * self._groups // size, 1)

    def _adapted(self, points: Float[np.ndarray, "N M"]) -> Any:
        """Mode params: the parameters of a batch with every prompt under every point."""
        weights = np.tile(points, (self.prompts.batch, 1))
        return self.fused.ensemble.params_for(weights, len(weights))

    def decode(self, points: Float[np.ndarray, "N M"]) -> PointAnswers:
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
            for whole, own in zip((tokens, steps, ended), self._decode(points[part]), strict=True):
                whole[part] = own
        return PointAnswers(tokens, steps, ended)

    def _decode(self, points: Float[np.ndarray, "N M"]) -> tuple[np.ndarray, ...]:
        n = len(points)
        size = _batch_size(max(n, -(-smallest_batch() * self._groups // (self.prompts.batch * self.samples))))
        filled = np.concatenate([points, np.repeat(points[:1], size - n, axis=0)])
        with use(self._mesh):
            if self.fused.mode == "params":
                answers = _answer_each(self._adapted(filled), self.prompts, self.spec, self.samples, len(filled))
            else:
                if self.fused.mode != "hidden":
                    filled = filled / filled.sum(axis=1, keepdims=True)
                subsets = _row_subsets(filled, self.prompts.batch // self._groups, self.samples)
                answers = _answer(self.fused.ensemble.params, self._read, filled, subsets, self.spec, self.samples)
            read = to_host((answers.tokens, answers.steps, answers.ended))
        # Rows are prompts, then points, then samples.
        shape = (self.prompts.batch, len(filled), self.samples)
        by_point = [np.moveaxis(x.reshape(*shape, *x.shape[1:])[: len(self.rows)], 1, 0)[:n] for x in read]
        return tuple(x.reshape(n, -1, *x.shape[3:]) for x in by_point)

    def texts(self, answers: PointAnswers) -> list[list[str]]:
        """The answers' texts, those of each point: all samples of a prompt one after another."""
        asked = [row for row in self.rows for _ in range(self.samples)]
        lengths = answers.steps - answers.ended
        return [
            self.fused.ensemble.decode(asked, [row[:k].tolist() for row, k in zip(tokens, own, strict=True)])
            for tokens, own in zip(answers.tokens, lengths, strict=True)
        ]


def _size(tree: Any) -> int:
    """Bytes."""
    return sum(map(weight_bytes, jax.tree.leaves(tree)))


def _batch_size(n: int) -> int:
    """The next size that a program is compiled for: an eighth more than n at most."""
    step = max(1 << (n.bit_length() - 1) >> 3, 1)
    return -(-n // step) * step


def _row_subsets(points: Float[np.ndarray, "N M"], prompts: int, samples: int) -> RowSubsets | None:
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
    return RowSubsets(*(np.stack(index).astype(np.int32).ravel() for index in (rows, places)))


@jit
def _keys(seed: Array, numbers: Int[Array, " B"]) -> Array:
    """A key for each prompt, by its number."""
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(numbers)


def _for_points(state: DecodeState, points: int, samples: int) -> DecodeState:
    """Every prompt's row for every point and sample. Points share their keys, so that only weights differ."""
    many = repeat_rows(state, points)
    many = many._replace(rows=many.rows._replace(keys=jnp.repeat(state.rows.keys, points)))
    return repeat_rows(many, samples) if samples > 1 else many


@functools.partial(jit, static_argnames="samples")
def _answer(
    params: Any,
    state: DecodeState,
    points: Float[Array, "N M"],
    subsets: RowSubsets | None,
    spec: DecodeSpec,
    samples: int,
) -> Answers:
    """The state is not donated: it serves other points. On a mesh a group of devices has all points of its prompts, and
    `subsets` are of as many prompts."""
    run = functools.partial(_answer_rows, samples=samples)
    places = (params_places(params, spec), ROWS, WHOLE, WHOLE, WHOLE)
    answers: Answers = by_rows(run, places)(params, state, points, subsets, spec)
    return answers


def _answer_rows(
    params: Any,
    state: DecodeState,
    points: Float[Array, "N M"],
    subsets: RowSubsets | None,
    spec: DecodeSpec,
    *,
    samples: int,
) -> Answers:
    prompts = len(state.done)
    weights = jnp.tile(jnp.repeat(points, samples, axis=0), (prompts, 1))
    many = _for_points(state, len(points), samples)
    if subsets is not None:
        # Adapters of one base have one tokenizer.
        assert isinstance(state.members, Lockstep)
        assert isinstance(many.members, Lockstep)
        times = len(subsets.rows) // (len(spec.members) * prompts)
        caches = state.members.repeat(prompts, times).caches  # alike for all points
        many = many._replace(members=many.members._replace(caches=caches, subsets=subsets))
    return answers_of(decode_spans(params, many, weights, spec))


@functools.partial(jit, static_argnames=("samples", "points"))
def _answer_each(params: Any, prompts: Prompts, spec: DecodeSpec, samples: int, points: int) -> Answers:
    """Where prompts themselves read differently under every point."""

    def run(params: Any, prompts: Prompts, spec: DecodeSpec) -> Answers:
        state = prefill(params, jax.tree.map(lambda leaf: jnp.repeat(leaf, points, axis=0), prompts), spec)
        state = repeat_rows(state, samples) if samples > 1 else state
        return answers_of(decode_spans(params, state, jnp.ones((1, 1)), spec))

    answers: Answers = by_rows(run, (params_places(params, spec), ROWS, WHOLE))(params, prompts, spec)
    return answers
