"""What the decoding loop carries and what is read of it: decisions, the loop's state, answers.

Every leaf has B, the rows of a batch, first, so that splitting, padding and sharding are each one `tree.map`; only the
caches of members that share one base hold a batch per member, one after another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax.fusion.lockstep import Lockstep
from rlae_jax.fusion.policy import Observation, SoFar
from rlae_jax.fusion.ragged import Ragged
from rlae_jax.fusion.reading import Text
from rlae_jax.fusion.sampling import RowSampling
from rlae_jax.models.cache import Cache


class Span(NamedTuple):
    """One decision for every row. In a trajectory each field has P, the spans, as its second axis."""

    observation: Observation | None  # None where observations are not recorded
    action: Float[Array, "B A"]
    weights: Float[Array, "B K"]  # what the action means
    log_prob: Float[Array, " B *N"]  # of each of N agents, where several act
    value: Float[Array, " B"]
    length: Int[Array, " B"] | None  # the steps that it holds, where the policy chooses them


class Decisions(NamedTuple):
    """What the policy decided so far."""

    span: Span  # the decision in force
    taken: Int[Array, " B"]  # decisions so far
    trajectory: Span  # all of them, [B, P, ...]; spans after a row's end hold no information
    next_step: Int[Array, " B"] | None  # the step of the next one, where the policy chooses how long spans are
    # Each member's summed log-probability of this span's tokens; None where the policy does not read it.
    token_log_probs: Float[Array, "B K"] | None
    so_far: SoFar | None = None  # for a policy that reads it


class TokenScores(NamedTuple):
    """The chosen tokens' log-probabilities."""

    fused: Float[Array, "B N"]
    members: Float[Array, "B N K"]
    top: "TopTokens | None" = None


class TopTokens(NamedTuple):
    """The most likely tokens of every step, first the most likely, and their log-probabilities."""

    tokens: Int[Array, "B N X"]
    log_probs: Float[Array, "B N X"]


class RowOptions(NamedTuple):
    """What rows that began at different times, for different requests, have each for itself."""

    sampling: RowSampling
    min_new_tokens: Int[Array, " B"]
    ignore_eos: Bool[Array, " B"]
    told: Int[Array, " B"]  # 0: tokens alone; 1: and their log-probabilities; 2: and the most likely tokens
    span_length: Int[Array, " B"]
    policy: Int[Array, " B"]  # which of several; of rows with fixed weights -1
    steps: Int[Array, " B"]  # what was written, and decided, before this program began
    spans: Int[Array, " B"]


class RowInputs(NamedTuple):
    """What the loop reads of a row and never changes."""

    keys: Key[Array, " B"]
    limits: Int[Array, " B"]  # the longest answer
    forced: Int[Array, "B N"] | None  # what is written, whatever is likely
    prompt_scores: Float[Array, "B K"] | None  # see Observation.prompt
    options: RowOptions | None = None  # None: those of the spec


class Seen(NamedTuple):
    """What is kept of prompt and answer besides the members' own caches; None where nobody reads it."""

    tokens: Bool[Array, "B V"] | None  # those that came already, for a repetition penalty
    text: Text | None  # in an encoder's ids


class DecodeState(NamedTuple):
    """The loop's carry, and its result."""

    clock: Int[Array, " B"]  # steps that the batch has made, alike in all its rows
    rows: RowInputs
    members: Lockstep | Ragged  # what they have taken in
    seen: Seen
    decisions: Decisions
    done: Bool[Array, " B"]
    ended: Bool[Array, " B"]  # by an end token rather than by the length
    steps: Int[Array, " B"]  # steps of each row, the one that chose its end token included
    tokens: Int[Array, "B N"]  # chosen tokens or union entries; zeros from steps[b] on
    scores: TokenScores | None  # None where they are not asked for
    failed: Bool[Array, " B"]  # ended since a prediction was not finite

    @property
    def step(self) -> Int[Array, ""]:
        """Fused steps so far."""
        return self.clock[0]

    @property
    def trajectory(self) -> Span:
        """All decisions, [B, P, ...]."""
        return self.decisions.trajectory

    @property
    def caches(self) -> tuple[Cache, ...]:
        """Each forward pass's keys and values."""
        return self.members.caches

    def span_mask(self) -> Bool[Array, "B P"]:
        """True where a row really took a decision."""
        mask: Bool[Array, "B P"] = _span_mask(self.decisions.taken, self.trajectory)
        return mask


class Answers(NamedTuple):
    """What is read of a state when its rows are written: no caches, which would be copied out of a program, and no
    keys, which have no form outside."""

    done: Bool[Array, " B"]
    ended: Bool[Array, " B"]
    steps: Int[Array, " B"]
    tokens: Int[Array, "B N"]
    decisions: Int[Array, " B"]  # taken
    trajectory: Span  # [B, P, ...]
    scores: TokenScores | None
    failed: Bool[Array, " B"]  # ended since a prediction was not finite

    def span_mask(self) -> Any:
        """Bool[B, P], of the device or of the host as the answers are: True where a row really took a decision."""
        return _span_mask(self.decisions, self.trajectory)


def _span_mask(taken: Any, trajectory: Span) -> Any:
    return taken[:, None] > np.arange(trajectory.value.shape[1])[None]


def answers_of(state: DecodeState) -> Answers:
    """The answers as far as they are written."""
    return Answers(
        done=state.done,
        ended=state.ended,
        steps=state.steps,
        tokens=state.tokens,
        decisions=state.decisions.taken,
        trajectory=state.trajectory,
        scores=state.scores,
        failed=state.failed,
    )


def repeat_rows(state: DecodeState, times: int) -> DecodeState:
    """Every row `times` times, one after another, each with a key of its own: samples that share one prefill. What an
    encoder read stays as it is, for all of them."""
    b = len(state.done)
    own = state._replace(members=None, rows=state.rows._replace(keys=None))  # type: ignore[arg-type]
    repeated: DecodeState = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), own)
    keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(times)))(state.rows.keys)
    rows = repeated.rows._replace(keys=keys.reshape(b * times))
    return repeated._replace(members=state.members.repeat(b, times), rows=rows)
