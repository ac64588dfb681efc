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
`span_length` that it is made for, and that it `draws_members`; with a method `hide` it does not see everything in
training (see the function); with a method `for_members` it takes any members, of which it is told which were there in
training. With a method `complement(params, hidden)`, of the members' last hidden states at every step, it gives
logits [B, V] that are added to what the operator gives.
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.models import Encoder
from rlae_jax.ranges import CountOr0, LearningRateOr0, PositiveOr0, Scale, Share
from rlae_jax.sharding import ROWS, WHOLE

# What agents may be told to read. Policies without training also read "so_far".
OBSERVATION_PARTS = ("hidden", "stats", "span", "prompt", "text", "agreement")
# Those that say something of each member.
MEMBER_PARTS = ("agreement", "hidden", "stats", "prompt")
# The columns of Observation.stats.
STATS = ("entropy", "top_prob", "span_log_prob", "disagreement")


class SoFar(NamedTuple):
    """What was written so far, the prompt apart, as the members saw it: for policies that keep account of a text."""

    tokens: Int[Array, " B"]  # how many
    log_probs: Float[Array, "B K"]  # each member's log-probability of all of them
    weights: Float[Array, "B K"]  # in force in the last span; equal ones before the first
    # The gradient of log sum_k w_k p_k by the last span's weights, summed over its tokens: p_k / sum_j w_j p_j.
    gains: Float[Array, "B K"]

    @staticmethod
    def nothing(batch: int, members: int) -> "SoFar":
        """Before the first token."""
        zeros = jnp.zeros((batch, members))
        return SoFar(jnp.zeros((batch,), jnp.int32), zeros, zeros + 1 / members, zeros)

    def and_token(
        self, log_probs: Float[Array, "B K"], weights: Float[Array, "B K"], begins: Array, written: Bool[Array, " B"]
    ) -> "SoFar":
        """One token later, in the rows where one was written.

        Args:
          log_probs: of the token under each member, finite.
          weights: in force at it.
          begins: whether it is its span's first, [] or Bool[B].
        """
        gains = jnp.exp(log_probs - jax.nn.logsumexp(log_probs, axis=1, b=weights, keepdims=True))
        return SoFar(
            self.tokens + written.astype(jnp.int32),
            self.log_probs + jnp.where(written[:, None], log_probs, 0.0),
            weights,
            jnp.where(begins[..., None], 0.0, self.gains) + jnp.where(written[:, None], gains, 0.0),
        )


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
    so_far: Any = ()  # SoFar


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


def hide(policy: Policy, observation: Observation, keys: Key[Array, " B"]) -> Observation:
    """What a policy is shown of an observation in training."""
    own = getattr(policy, "hide", None)
    shown: Observation = observation if own is None else own(observation, keys)
    return shown


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


class _StartsEqual:
    """What policies share whose parameters are the weights Float[1, K] that every text begins with."""

    def __post_init__(self) -> None:
        ranges.check(self)

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 K"]:
        """Equal weights."""
        del key
        return jnp.full((1, dims.members), 1.0 / dims.members)


@dataclasses.dataclass(frozen=True)
class Online(_StartsEqual):
    """Online mixing, begun anew in every text: after each span exponentiated gradient on the log-loss of the mixture
    (Kivinen and Warmuth, 1997; Helmbold et al., 1998), then a share of the start (fixed share, Herbster and Warmuth,
    1998), so that a member that fell behind comes back:

        v_k ~ w_k exp(learning_rate * sum_t p_k(x_t) / sum_j w_j p_j(x_t))        w'_k = (1 - share) v_k + share start_k

    The loss is that of the mean of probabilities, whatever the operator. Its parameters are the start.
    """

    learning_rate: LearningRateOr0 = 0.3
    share: Share = 0.05
    reads: tuple[str, ...] = ("so_far",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def apply(self, params: Float[Array, "1 K"], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        seen: SoFar = observation.so_far
        before = jnp.where(seen.tokens[:, None] == 0, params, seen.weights)
        moved = jax.nn.softmax(jnp.log(before) + self.learning_rate * seen.gains, axis=-1)
        return Deterministic((1 - self.share) * moved + self.share * params), jnp.zeros(len(moved))


@dataclasses.dataclass(frozen=True)
class Bayes(_StartsEqual):
    """The Bayesian mixture: weights proportional to prior times likelihood of the text so far, from the prompt's end.

    The likelihood counts to the power 1 / temperature. At temperature 1, with a decision at every step, the mixture's
    probability of a text is the prior-weighted mean of the members' probabilities of it. Its parameters are the prior.
    """

    temperature: Scale = 1.0
    reads: tuple[str, ...] = ("so_far",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def apply(self, params: Float[Array, "1 K"], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        log_probs = observation.so_far.log_probs
        weights = jax.nn.softmax(jnp.log(params) + log_probs / self.temperature, axis=-1)
        return Deterministic(weights), jnp.zeros(len(weights))


@dataclasses.dataclass(frozen=True)
class Selective(_StartsEqual):
    """One member writes alone unless the members disagree: where the mean of their KL(member || uniform mixture), the
    Jensen-Shannon divergence of all, is at least `threshold` (in nats, at most log K), all write.

    This is how SAFE (arXiv 2510.15346) selects positions, but for its tests: those look at the likeliest token, which
    under equal weights changes nothing in greedy answers, and at the members' segmentations, which a union needs not
    look at. Nothing is drafted ahead here, so that it saves no time. Its parameters are the weights where all write.
    """

    threshold: PositiveOr0 = 0.1
    member: CountOr0 = 0
    reads: tuple[str, ...] = ("stats",)
    span_length: ClassVar[int] = 1  # it decides anew at every step

    def init(self, key: Key[Array, ""], dims: Dims) -> Float[Array, "1 K"]:
        """Equal weights."""
        if self.member >= dims.members:
            raise InputError(f"selective's member is {self.member}; the members are numbered 0 to {dims.members - 1}")
        return super().init(key, dims)

    def apply(self, params: Float[Array, "1 K"], observation: Observation) -> tuple[Deterministic, Float[Array, " B"]]:
        disagreement_b = jnp.mean(observation.stats[..., STATS.index("disagreement")], axis=-1)
        alone = (jnp.arange(params.shape[1])[None] == self.member).astype(jnp.float32)
        weights = jnp.where((disagreement_b >= self.threshold)[:, None], params, alone)
        return Deterministic(weights), jnp.zeros(len(weights))


# Policies that need no training, by name.
NAMED_POLICIES: dict[str, Policy] = {
    "perplexity": Perplexity(),
    "confidence": Confidence(),
    "consistency": Consistency(),
    "gate": Gate(),
    "draw": Draw(),
    "online": Online(),
    "bayes": Bayes(),
    "selective": Selective(),
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
    # Fingerprints of the members that it was trained with, if known. A policy for any members reads others without
    # their hidden states.
    members: tuple[str, ...] = ()
