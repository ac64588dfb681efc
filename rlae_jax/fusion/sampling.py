"""Choosing one token per row from fused log-probabilities: greedy, temperature, top-k, top-p, min-p, penalties.

Sampling is by the Gumbel-max trick with a key per row and position, so that what a row draws depends on nothing else in
its batch: argmax_v(log p_v / temperature + g_v) with g_v ~ Gumbel(0, 1) is a draw from softmax(log p / temperature).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count, CountOr0, Positive, Seed, Share, ShareAbove0, Temperature
from rlae_jax.sharding import constrain

DEFAULT_SPAN_LENGTH = 4
COLDEST = 1e-6  # lower temperatures are as good as 0, and log-probabilities divided by them may be infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How answers are written. `Ensemble.generate` takes the fields as keywords, the commands as flags."""

    max_new_tokens: Count = 64
    """The longest answer, in tokens or, with different tokenizers, in entries of the union vocabulary."""
    min_new_tokens: CountOr0 = 0
    """No end before this many."""
    member_tokens: Count | None = None
    """With different tokenizers, how many of its own tokens any member has room for in an answer. Default: ample for
    nearly all entries; a hint says when it was too few."""
    span_length: Count | None = None
    """Steps for which weights are held. Default: the policy's own, else 4."""
    temperature: Temperature = 0.0
    """0 always takes the most probable token."""
    top_k: CountOr0 = 0
    """Sample among the k most probable tokens only; 0 is no limit."""
    top_p: ShareAbove0 = 1.0
    """Sample within the smallest set of tokens with this probability."""
    min_p: Share = 0.0
    """Sample only tokens at least this often as probable as the most probable one."""
    repetition_penalty: Positive = 1.0
    """Multiplies the log-probabilities of tokens that came already; 1 is none."""
    samples: Count = 1
    """Answers per prompt."""
    seed: Seed = 0
    """Of the sampling."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""
    chat: bool = False
    """Put each prompt into the tokenizer's chat template."""
    ignore_eos: bool = False
    """Go on after the end token."""
    scores: bool = False
    """Also tell the log-probabilities of what was chosen, together and of each member."""

    def check(self) -> None:
        """Raises an `InputError` for a number outside its range."""
        ranges.check(self if np.ndim(self.seed) == 0 else dataclasses.replace(self, seed=0))  # or one per prompt
        if self.min_new_tokens > self.max_new_tokens:
            raise InputError(f"min_new_tokens must be at most max_new_tokens, not {self.min_new_tokens}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is chosen. Make one with `Sampling.create`.

    Numbers are data, so that sweeping them compiles once; the static fields shape the program.
    """

    temperature: Float[Array, ""] | float
    top_p: Float[Array, ""] | float
    greedy: bool = dataclasses.field(metadata={"static": True})
    top_k: int = dataclasses.field(metadata={"static": True})  # 0: no limit
    nucleus: bool = dataclasses.field(metadata={"static": True})  # whether top_p < 1
    min_p: Float[Array, ""] | float = 0.0
    repetition_penalty: Float[Array, ""] | float = 1.0
    has_floor: bool = dataclasses.field(default=False, metadata={"static": True})  # whether min_p > 0
    penalised: bool = dataclasses.field(default=False, metadata={"static": True})

    @classmethod
    def create(cls, options: SamplingOptions | None = None) -> "Sampling":
        """The order is penalty, temperature, top-k, top-p, min-p, as in transformers.

        Raises:
          InputError: a number outside its range.
        """
        options = SamplingOptions() if options is None else options
        options.check()
        greedy = options.temperature < COLDEST
        if greedy:  # what these cut off never holds the maximum
            options = dataclasses.replace(options, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
        return cls(
            float(options.temperature),
            float(options.top_p),
            greedy=greedy,
            top_k=options.top_k,
            nucleus=options.top_p < 1,
            min_p=float(options.min_p),
            repetition_penalty=float(options.repetition_penalty),
            has_floor=options.min_p > 0,
            penalised=options.repetition_penalty != 1,
        )

    def of_rows(self, rows: int) -> "RowSampling":
        """The same for every row."""
        numbers = (0.0 if self.greedy else self.temperature, self.top_k, self.top_p, self.min_p)
        repeated = [jnp.full((rows,), number) for number in (*numbers, self.repetition_penalty)]
        return RowSampling(*repeated)

    def penalise(self, log_probs_bv: Float[Array, "B V"], seen_bv: Bool[Array, "B V"] | None) -> Float[Array, "B V"]:
        """log p times `repetition_penalty` where a token stands in the prompt or the answer (Keskar et al., 2019, on
        log-probabilities, since the members' logits share no scale)."""
        if seen_bv is None or not self.penalised:
            return log_probs_bv
        return jnp.where(seen_bv, log_probs_bv * self.repetition_penalty, log_probs_bv)


class Chosen(NamedTuple):
    """The tokens, and the scores that they won with: NaN or infinite where no choice could be made."""

    token: Int[Array, " B"]
    score: Float[Array, " B"]


def argmax(scores_bv: Float[Array, "B V"]) -> Chosen:
    """The first index of each row's maximum, and the maximum: two plain reductions, which the CPU runs 1.8 to 2.6 times
    faster than `jnp.argmax`'s one over (value, index) pairs."""
    v = scores_bv.shape[-1]
    largest = jnp.max(scores_bv, axis=-1, keepdims=True)
    first = jnp.min(jnp.where(scores_bv == largest, jnp.arange(v, dtype=jnp.int32), v), axis=-1)
    return Chosen(jnp.minimum(first, v - 1), largest[:, 0])


def truncate(scaled_bv: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """-inf outside the `top_k` largest (ties with the k-th stay) and then outside the nucleus: the fewest most likely
    tokens whose probability reaches `top_p` (Holtzman et al., 2020), and below `min_p` times the largest probability
    (Nguyen et al., 2024)."""
    scaled_bv = constrain(scaled_bv, "batch")  # sorting needs whole rows
    if 0 < sampling.top_k < scaled_bv.shape[-1]:
        smallest = lax.top_k(scaled_bv, sampling.top_k)[0][:, -1:]
        scaled_bv = jnp.where(scaled_bv < smallest, -jnp.inf, scaled_bv)
    if sampling.nucleus:
        smallest = _nucleus_edge(-jnp.sort(-scaled_bv, axis=-1), sampling.top_p)
        scaled_bv = jnp.where(scaled_bv < smallest, -jnp.inf, scaled_bv)
    if sampling.has_floor:
        floor = jnp.max(scaled_bv, axis=-1, keepdims=True) + jnp.log(sampling.min_p)
        scaled_bv = jnp.where(scaled_bv < floor, -jnp.inf, scaled_bv)
    return scaled_bv


def _nucleus_edge(descending_bv: Float[Array, "B V"], top_p: Any) -> Float[Array, "B 1"]:
    """The smallest entry of each row's nucleus."""
    probs = jax.nn.softmax(descending_bv, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs
    kept = jnp.sum(before < top_p, axis=-1, keepdims=True)
    return jnp.take_along_axis(descending_bv, jnp.maximum(kept, 1) - 1, axis=-1)


def choose_token(
    fused_bv: Float[Array, "B V"],
    row_keys: Key[Array, " B"],
    step: Int[Array, " *B"],
    sampling: "Sampling | RowSampling",
) -> Chosen:
    """One token per row; the noise of row b at a step is a function of (row_keys[b], step) alone.

    Args:
      step: of all rows, or each row's own.
    """
    if isinstance(sampling, RowSampling):
        return sampling.choose(fused_bv, row_keys, step)
    if sampling.greedy:
        return argmax(fused_bv)
    truncated = truncate(fused_bv / sampling.temperature, sampling)
    return argmax(truncated + _noise(row_keys, step, fused_bv.shape[1]))


def _noise(row_keys: Key[Array, " B"], step: Int[Array, " *B"], vocab: int) -> Float[Array, "B V"]:
    def of_row(key: Key[Array, ""], step: Int[Array, ""]) -> Float[Array, " V"]:
        return jax.random.gumbel(jax.random.fold_in(key, step), (vocab,))

    return jax.vmap(of_row, in_axes=(0, 0 if step.ndim else None))(row_keys, step)


class RowSampling(NamedTuple):
    """As `Sampling`, with every number a row's own: of rows that are written for different requests. What no row asks
    for is passed over while the program runs."""

    temperature: Float[Array, " B"]  # 0: greedy
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    min_p: Float[Array, " B"]
    repetition_penalty: Float[Array, " B"]

    @property
    def penalised(self) -> Bool[Array, " B"]:
        """Rows with a penalty."""
        return self.repetition_penalty != 1

    def penalise(self, log_probs_bv: Float[Array, "B V"], seen_bv: Bool[Array, "B V"]) -> Float[Array, "B V"]:
        """As `Sampling.penalise`."""
        return jnp.where(seen_bv, log_probs_bv * self.repetition_penalty[:, None], log_probs_bv)

    def choose(self, scores_bv: Float[Array, "B V"], row_keys: Key[Array, " B"], step: Int[Array, " *B"]) -> Chosen:
        """As `choose_token` with each row's `Sampling`, bit for bit."""
        greedy = self.temperature == 0
        v = scores_bv.shape[1]
        limited = (self.top_k > 0) & (self.top_k < v)

        def draw() -> Chosen:
            scaled = scores_bv / jnp.where(greedy, 1.0, self.temperature)[:, None]

            def cut() -> Float[Array, "B V"]:
                descending = -jnp.sort(-scaled, axis=-1)
                kth = jnp.take_along_axis(descending, jnp.clip(self.top_k - 1, 0, v - 1)[:, None], axis=-1)
                least = jnp.where(limited[:, None], kth, -jnp.inf)
                edge = _nucleus_edge(jnp.where(descending < least, -jnp.inf, descending), self.top_p[:, None])
                edge = jnp.where((self.top_p < 1)[:, None], edge, -jnp.inf)
                return jnp.where((scaled < least) | (scaled < edge), -jnp.inf, scaled)

            some = jnp.any(~greedy & (limited | (self.top_p < 1)))
            kept = lax.cond(some, cut, lambda: scaled)
            floor = jnp.max(kept, axis=-1, keepdims=True) + jnp.log(self.min_p)[:, None]
            kept = jnp.where(kept < floor, -jnp.inf, kept)
            drawn = argmax(kept + _noise(row_keys, step, v))
            return Chosen(*(jnp.where(greedy, *both) for both in zip(argmax(scores_bv), drawn, strict=True)))

        chosen: Chosen = lax.cond(jnp.all(greedy), lambda: argmax(scores_bv), draw)
        return chosen
