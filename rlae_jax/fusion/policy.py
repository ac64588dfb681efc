"""Weight policies: what sets the ensemble's weights at each span boundary.

A policy is a frozen (hashable) object with a pair of pure functions, like an optax transformation:

    init(key, dims)            -> params                    a pytree
    apply(params, observation) -> (distribution, value)     value Float[B]

and `reads`, the parts of the observation that it looks at; the decoding loop computes no others. A distribution is a
pytree with `sample(keys)`, `mode()`, `log_prob(weights)` and `entropy()`, each over a batch of rows. Fixed weights are
a policy too, so decoding has one path. Trained policies live in `rlae_jax.ppo`.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

OBSERVATION_PARTS = ("hidden", "stats", "span")
# The columns of Observation.stats.
STATS = ("entropy", "top_prob", "span_log_prob", "disagreement")


class Observation(NamedTuple):
    """What a policy sees at a span boundary; a part that it does not read is an empty tuple."""

    hidden: tuple[Float[Array, "B D"], ...]  # each member's last hidden state, which predicts the span's first token
    stats: Any  # Float[B, K, 4]: per member, see STATS
    span: Any  # Int[B]: the span's index p


class Dims(NamedTuple):
    """The sizes that a policy's parameters depend on."""

    widths: tuple[int, ...]  # D of each member
    spans: int  # P, the longest answer in spans

    @property
    def members(self) -> int:
        return len(self.widths)


class WeightDistribution(Protocol):
    """A distribution over weights on the simplex, one per row."""

    def sample(self, keys: Key[Array, "B"]) -> Float[Array, "B K"]: ...
    def mode(self) -> Float[Array, "B K"]: ...
    def log_prob(self, weights: Float[Array, "B K"]) -> Float[Array, "B"]: ...
    def entropy(self) -> Float[Array, "B"]: ...


@runtime_checkable
class Policy(Protocol):
    """See the module's text. Implementations are hashable: equal policies share compiled programs."""

    @property
    def reads(self) -> tuple[str, ...]: ...
    def init(self, key: Key[Array, ""], dims: Dims) -> Any: ...
    def apply(self, params: Any, observation: Observation) -> tuple[WeightDistribution, Float[Array, "B"]]: ...


class Deterministic(NamedTuple):
    """All probability on one point of the simplex."""

    weights: Float[Array, "B K"]

    def sample(self, keys: Key[Array, "B"]) -> Float[Array, "B K"]:
        del keys
        return self.weights

    def mode(self) -> Float[Array, "B K"]:
        return self.weights

    def log_prob(self, weights: Float[Array, "B K"]) -> Float[Array, "B"]:
        return jnp.where(jnp.all(weights == self.weights, axis=-1), 0.0, -jnp.inf)

    def entropy(self) -> Float[Array, "B"]:
        return jnp.zeros(self.weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same weights in every span. Its parameters are the weights Float[B, K]: one row per sequence."""

    reads: tuple[str, ...] = ()

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 K"]:
        """Uniform weights, for any number of rows."""
        del key
        return jnp.full((1, dims.members), 1.0 / dims.members)

    def apply(self, params: Float[Array, "B K"], observation: Observation) -> tuple[Deterministic, Float[Array, "B"]]:
        del observation
        return Deterministic(params), jnp.zeros(params.shape[0])


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Weights per span index that see no state. Its parameters are Float[P, K]; later spans take the last row."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "P K"]:
        """Uniform weights in every span."""
        del key
        return jnp.full((dims.spans, dims.members), 1.0 / dims.members)

    def apply(self, params: Float[Array, "P K"], observation: Observation) -> tuple[Deterministic, Float[Array, "B"]]:
        weights = params[jnp.minimum(observation.span, params.shape[0] - 1)]
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Confidence:
    """All weight on the member whose next-token entropy is lowest. With `span_length=1` it chooses at every step."""

    reads: tuple[str, ...] = ("stats",)

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[()]:
        del key, dims
        return ()

    def apply(self, params: tuple[()], observation: Observation) -> tuple[Deterministic, Float[Array, "B"]]:
        del params
        entropies_bk = observation.stats[..., STATS.index("entropy")]
        weights = jax.nn.one_hot(jnp.argmin(entropies_bk, axis=-1), entropies_bk.shape[-1])
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True, eq=False)
class BoundPolicy:
    """A policy with its parameters: what training returns and `Ensemble.generate(weights=...)` takes.

    `sample` draws every span's weights from the policy instead of taking the distribution's mode.
    """

    policy: Policy
    params: Any
    dims: Dims
    span_length: int  # L that it was trained with
    sample: bool = False
