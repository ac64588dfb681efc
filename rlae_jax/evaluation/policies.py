"""Weight policies that only evaluations have: weights decided elsewhere, weights drawn at random, settings to be tried.

In: an ensemble and a task, which say how many spans an answer may have. Out: bound policies for `Ensemble.generate`.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy, Deterministic, Dims, Draw, Observation, Policy, slice_params
from rlae_jax.ppo.dirichlet import Dirichlet
from rlae_jax.tasks import Task


@dataclasses.dataclass(frozen=True)
class Replay:
    """Weights that were decided elsewhere. Its parameters are Float[B, P, K]; later spans take a row's last."""

    reads: tuple[str, ...] = ("span",)
    params_per_row: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 P K"]:
        """Uniform weights, for any number of rows."""
        del key
        return jnp.full((1, dims.spans, dims.members), 1.0 / dims.members)

    def apply(
        self, params: Float[Array, "B P K"], observation: Observation
    ) -> tuple[Deterministic, Float[Array, " B"]]:
        rows = jnp.arange(len(observation.span)) % params.shape[0]
        weights = params[rows, jnp.minimum(observation.span, params.shape[1] - 1)]
        return Deterministic(weights), jnp.zeros(weights.shape[0])

    def slice_rows(
        self, params: Float[Array, "B P K"], start: Array | int, n: int, total: int
    ) -> tuple["Replay", Array]:
        del total
        return self, slice_params(params, start, n)


@dataclasses.dataclass(frozen=True)
class RandomWeights:
    """Weights that are drawn anew for each row and span, all equally likely: Dirichlet(1, ..., 1)."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, " K"]:
        del key
        return jnp.ones(dims.members)

    def apply(self, params: Float[Array, " K"], observation: Observation) -> tuple[Dirichlet, Float[Array, " B"]]:
        rows = len(observation.span)
        return Dirichlet(jnp.broadcast_to(params, (rows, len(params)))), jnp.zeros(rows)


@dataclasses.dataclass(frozen=True)
class FieldsAsParameters:
    """A policy some of whose fields are parameters: trying others compiles nothing anew. Its parameters are these,
    {name: number}, and the policy's own."""

    policy: Any  # a dataclass
    names: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(self.policy.reads)

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[dict[str, Any], Any]:
        return {name: getattr(self.policy, name) for name in self.names}, self.policy.init(key, dims)

    def apply(self, params: tuple[dict[str, Any], Any], observation: Observation) -> tuple[Any, Float[Array, " B"]]:
        fields, own = params
        policy: Policy = dataclasses.replace(self.policy, **fields)
        return policy.apply(own, observation)


def span_count(task: Task, span_length: int) -> int:
    """The most spans that an answer may have."""
    return -(-task.max_new_tokens // span_length)


def dims_for(ensemble: Ensemble, task: Task, span_length: int) -> Dims:
    """The sizes of a policy that answers this task."""
    return Dims(ensemble.widths, span_count(task, span_length))


def replay(ensemble: Ensemble, task: Task, weights: Float[np.ndarray, "B P K"], span_length: int) -> BoundPolicy:
    """These weights, for the rows of one batch."""
    return BoundPolicy(Replay(), weights.astype(np.float32), dims_for(ensemble, task, span_length), span_length)


def random_weights(ensemble: Ensemble, task: Task, span_length: int) -> BoundPolicy:
    """`RandomWeights` of this ensemble's members."""
    ones = np.ones(len(ensemble.members), np.float32)
    return BoundPolicy(RandomWeights(), ones, dims_for(ensemble, task, span_length), span_length, sample=True)


def with_settings(
    ensemble: Ensemble, task: Task, policy: Any, span_length: int, own: Any = (), **settings: float
) -> BoundPolicy:
    """A policy under other settings.

    Args:
      own: the policy's own parameters, if it has any.
    """
    fields = {name: np.float32(value) if isinstance(value, float) else value for name, value in settings.items()}
    bound = FieldsAsParameters(policy, tuple(fields))
    return BoundPolicy(bound, (fields, own), dims_for(ensemble, task, span_length), span_length)


def drawn_members(ensemble: Ensemble, task: Task, weights: Float[np.ndarray, "B K"]) -> BoundPolicy:
    """One member per step, drawn with these probabilities, a row for each of a batch or one for all."""
    return BoundPolicy(Draw(), weights.astype(np.float32), dims_for(ensemble, task, 1), 1, sample=True)
