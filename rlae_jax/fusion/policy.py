"""Weight policies: what sets the ensemble's weights at each span boundary.

A policy is a frozen (hashable) object with a pair of pure functions, like an optax transformation:

    init(key, dims)            -> params                    a pytree; traceable, as shapes are read off it
    apply(params, observation) -> (distribution, value)     value Float[B]

and `reads`, the parts of the observation that it looks at; the decoding loop computes no others. A distribution is a
pytree over a batch of rows that draws actions and says which weights an action is: most actions are the weights
themselves, but several agents that act together have an action each. A policy with `span_lengths` also chooses how long
its action holds. Fixed weights are a policy too, so decoding has one path. Trained policies live in `rlae_jax.ppo`.

Parameters are the same for all rows of a batch, unless the policy has a method `slice_rows`, which takes those of some
rows (see the function of that name); with `params_per_row` they may have a leading B axis. A policy may say the
`span_length` that it is made for, and that it `draws_members`.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.models import Encoder
from rlae_jax.ranges import CountOr0, Scale, Share
from rlae_jax.sharding import ROWS, WHOLE

OBSERVATION_PARTS = ("hidden", "stats", "span", "prompt", "text", "agreement")
# Those that say something of each member.
MEMBER_PARTS = ("agreement", "hidden", "stats", "prompt")
# The columns of Observation.stats.
STATS = ("entropy", "top_prob", "span_log_prob", "disagreement")


class Observation(NamedTuple):
    """What a policy sees at a span boundary; a part that it does not read is an empty tuple."""

    hidden: tuple[Float[Array, "B D"], ...]  # each member's last hidden state, which predicts the span's first token
    stats: Any  # Float[B, K, 4]: per member, see STATS
    span: Any  # Int[B]: the span's index p
    # Float[B, K]: each member's log-probability of the prompt, per token of member 0 (with one tokenizer, minus the
    # logarithm of its perplexity).
    prompt: Any = ()
    text: Any = ()  # Float[B, D]: what an encoder makes of prompt and text so far, see rlae_jax.fusion.reading
    # Float[B, K, K]: how alike two members' predictions of the next token are, from 0 to 1: sum_v sqrt(p_v q_v).
    agreement: Any = ()


class Dims(NamedTuple):
    """The sizes that a policy's parameters depend on."""

    widths: tuple[int, ...]  # D of each member
    spans: int  # P, the longest answer in spans
    text: int = 0  # D of the encoder that reads the text, if one does

    @property
    def members(self) -> int:
        return len(self.widths)


@runtime_checkable
class Distribution(Protocol):
    """A distribution over actions, one per row. N agents with a likelihood each give [B, N]."""

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B A"]: ...
    def mode(self) -> Float[Array, "B A"]: ...
    def log_prob(self, action: Float[Array, "B A"]) -> Float[Array, " B *N"]: ...
    def entropy(self) -> Float[Array, " B"]: ...
    def to_weights(self, action: Float[Array, "B A"]) -> Float[Array, "B K"]:
        """The weights on the simplex that an action is."""
        ...


@runtime_checkable
class ChoosesLength(Distribution, Protocol):
    """What a policy with `span_lengths` gives."""

    def to_length(self, action: Float[Array, "B A"]) -> Int[Array, " B"]:
        """How many steps an action holds."""
        ...


@runtime_checkable
class Policy(Protocol):
    """See the module's text. Implementations are hashable: equal policies share compiled programs."""

    @property
    def reads(self) -> tuple[str, ...]: ...
    def init(self, key: Key[Array, ""], dims: Dims) -> Any: ...
    def apply(self, params: Any, observation: Observation) -> tuple[Distribution, Float[Array, " B"]]: ...


def slice_rows(policy: Policy, params: Any, start: Array | int, n: int, total: int) -> tuple[Policy, Any]:
    """The policy and its parameters for n of the `total` rows of a batch, from row `start` on."""
    own = getattr(policy, "slice_rows", None)
    return (policy, params) if own is None else own(params, start, n, total)


def policy_places(policy: Policy, params: Any) -> Any:
    """Where a policy's parameters lie in `sharding.by_rows`: with their rows, if each row has its own."""
    return ROWS if getattr(policy, "params_per_row", False) and len(params) > 1 else WHOLE


def slice_params(params: Float[Array, " B *N"], start: Array | int, n: int) -> Float[Array, " n *N"]:
    """Of parameters with a row for each row of a batch, or with one for all."""
    return params if len(params) == 1 else jax.lax.dynamic_slice_in_dim(params, start, n)


class Deterministic(NamedTuple):
    """All probability on one point of the simplex."""

    weights: Float[Array, "B K"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B K"]:
        del keys
        return self.weights

    def mode(self) -> Float[Array, "B K"]:
        return self.weights

    def log_prob(self, weights: Float[Array, "B K"]) -> Float[Array, " B"]:
        return jnp.where(jnp.all(weights == self.weights, axis=-1), 0.0, -jnp.inf)

    def entropy(self) -> Float[Array, " B"]:
        return jnp.zeros(self.weights.shape[0])

    def to_weights(self, action: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return action


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same weights in every span. Its parameters are the weights Float[B, K]: one row per sequence."""

    reads: tuple[str, ...] = ()
    params_per_row: ClassVar[bool] = True

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 K"]:
        """Uniform weights, for any number of rows."""
        del key
        return jnp.full((1, dims.members), 1.0 / dims.members)

    def apply(self, params: Float[Array, "B K"], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        del observation
        return Deterministic(params), jnp.zeros(params.shape[0])

    def slice_rows(self, params: Float[Array, "B K"], start: Array | int, n: int, total: int) -> tuple["Fixed", Array]:
        del total
        return self, slice_params(params, start, n)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Weights per span index that see no state. Its parameters are Float[P, K]; later spans take the last row."""

    reads: tuple[str, ...] = ("span",)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "P K"]:
        """Uniform weights in every span."""
        del key
        return jnp.full((dims.spans, dims.members), 1.0 / dims.members)

    def apply(self, params: Float[Array, "P K"], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        weights = params[jnp.minimum(observation.span, params.shape[0] - 1)]
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Confidence:
    """All weight on the member whose next-token entropy is lowest, chosen anew at every step."""

    reads: tuple[str, ...] = ("stats",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[()]:
        del key, dims
        return ()

    def apply(self, params: tuple[()], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        del params
        entropies_bk = observation.stats[..., STATS.index("entropy")]
        weights = jax.nn.one_hot(jnp.argmin(entropies_bk, axis=-1), entropies_bk.shape[-1])
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """Weights by how well each member predicts the prompt: softmax(-log perplexity / temperature), held for the whole
    answer (PackLLM-sim, Mavromatis et al., 2024, arXiv 2404.11531)."""

    temperature: Scale = 1.0
    reads: tuple[str, ...] = ("prompt",)

    def __post_init__(self) -> None:
        ranges.check(self)

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[()]:
        del key, dims
        return ()

    def apply(self, params: tuple[()], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        del params
        weights = jax.nn.softmax(observation.prompt / self.temperature, axis=-1)
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Weights by agreement: softmax(-KL(member || uniform mixture) / temperature), so that a member that contradicts
    the others loses its say (the idea of CoRE, at the level of members)."""

    temperature: Scale = 0.25
    reads: tuple[str, ...] = ("stats",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def __post_init__(self) -> None:
        ranges.check(self)

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[()]:
        del key, dims
        return ()

    def apply(self, params: tuple[()], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        del params
        disagreement_bk = observation.stats[..., STATS.index("disagreement")]
        weights = jax.nn.softmax(-disagreement_bk / self.temperature, axis=-1)
        return Deterministic(weights), jnp.zeros(weights.shape[0])


@dataclasses.dataclass(frozen=True)
class Gate:
    """One member writes alone unless its largest probability is below `threshold`; then all write with equal weights
    (the threshold of GaC, arXiv 2406.12585)."""

    threshold: Share = 0.5
    member: CountOr0 = 0
    reads: tuple[str, ...] = ("stats",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def __post_init__(self) -> None:
        ranges.check(self)

    def init(self, key: Key[Array, ""], dims: Dims) -> tuple[()]:
        del key
        if self.member >= dims.members:
            raise InputError(f"gate's member is {self.member}; the members are numbered 0 to {dims.members - 1}")
        return ()

    def apply(self, params: tuple[()], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        del params
        sure_b = observation.stats[:, self.member, STATS.index("top_prob")] >= self.threshold
        k = observation.stats.shape[1]
        alone, together = (jnp.arange(k) == self.member).astype(jnp.float32), jnp.full((k,), 1 / k)
        return Deterministic(jnp.where(sure_b[:, None], alone[None], together[None])), jnp.zeros(sure_b.shape[0])


class OneHot(NamedTuple):
    """One member, k with probability `probs[b, k]`."""

    probs: Float[Array, "B K"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B K"]:
        log_probs = jnp.broadcast_to(jnp.log(self.probs), (len(keys), self.probs.shape[1]))
        chosen = jax.vmap(jax.random.categorical)(keys, log_probs)
        return jax.nn.one_hot(chosen, self.probs.shape[1])

    def mode(self) -> Float[Array, "B K"]:
        return jax.nn.one_hot(jnp.argmax(self.probs, axis=1), self.probs.shape[1])

    def log_prob(self, weights: Float[Array, "B K"]) -> Float[Array, " B"]:
        return jnp.log(jnp.sum(self.probs * weights, axis=1))

    def entropy(self) -> Float[Array, " B"]:
        return jnp.sum(jax.scipy.special.entr(self.probs), axis=1)

    def to_weights(self, action: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return action


@dataclasses.dataclass(frozen=True)
class Draw:
    """One member per step, drawn with the probability of its weight (ME, arXiv 2605.00419).

    Sampling from the drawn member at temperature 1 is sampling from the linear ensemble, at the cost of one forward: a
    member that no row has drawn is not run and catches up later. Its parameters are the weights, as those of `Fixed`.
    """

    reads: tuple[str, ...] = ()
    params_per_row: ClassVar[bool] = True
    draws_members: ClassVar[bool] = True  # actions are sampled, and members that nobody has drawn are not run
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 K"]:
        """Uniform probabilities, for any number of rows."""
        del key
        return jnp.full((1, dims.members), 1.0 / dims.members)

    def apply(self, params: Float[Array, "B K"], observation: Observation) -> tuple[OneHot, Float[Array, " B"]]:
        del observation
        return OneHot(params), jnp.zeros(params.shape[0])

    def slice_rows(self, params: Float[Array, "B K"], start: Array | int, n: int, total: int) -> tuple["Draw", Array]:
        del total
        return self, slice_params(params, start, n)


# Policies that need no training, by name.
NAMED_POLICIES: dict[str, Policy] = {
    "perplexity": Perplexity(),
    "confidence": Confidence(),
    "consistency": Consistency(),
    "gate": Gate(),
    "draw": Draw(),
}


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
    encoder: Encoder | None = None  # of a policy that reads the text
    text_tokens: int = 512  # and how many tokens of it
