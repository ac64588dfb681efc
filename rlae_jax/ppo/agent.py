"""The weight agents: their networks.

The joint agents know a member by its place. One sets all weights of a span at once (PPO), or there is one per member
(MAPPO).

member k:  hidden [B, D_k] -> normalised -> projection -+
           stats [B, 4], agreement [B, K], prompt [B] --+-> what is read of member k [B, K, I] -+
shared:    span [B] -> embedding [B, J] ------------------------------------------------------- + -> joint [B, K*I+J]

           PPO                                          MAPPO
actor      joint -> K concentrations                    member k's and the shared part -> its own concentration
critic     joint -> value                               joint -> value

The set agent (`--agent set`) is one network for all members, of any number, and knows a member by what it reads of it:

member k:  hidden [B, D_k] -> normalised -> the projection of its width -+
           stats [B, 4], prompt [B], as they are and beside the others' -+-> x_k [B, X]
shared:    span, text [B, J] --------------------------------------------+
x [B, K, X], agreement [B, K, K] -> attention of each member to the others -> seen_k [B, X + H*E]

actor      seen_k -> member k's concentration, of a Dirichlet (PPO) or of a Gamma of its own (MAPPO)
critic     mean over k of tanh(seen_k) -> value
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import polygamma
from jaxtyping import Array, Float, Key

from rlae_jax.config import AgentConfig
from rlae_jax.fusion.policy import STATS, Dims, Distribution, Observation
from rlae_jax.ppo.dirichlet import Dirichlet
from rlae_jax.ppo.gamma import LogGammas
from rlae_jax.ppo.logistic_normal import LogisticNormal
from rlae_jax.ppo.span_choice import WithLength

Mlp = dict[str, Array]


def init_mlp(key: Key[Array, ""], inputs: int, width: int, outputs: int) -> Mlp:
    """One hidden layer; the output layer starts near zero, so that training starts from an undecided agent."""
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (inputs, width)) * inputs**-0.5,
        "b1": jnp.zeros((width,)),
        "w2": jax.random.normal(second, (width, outputs)) * 0.01 * width**-0.5,
        "b2": jnp.zeros((outputs,)),
    }


# Agents are small and their ratios near 1: accelerators' own rounding of float32 operands would be noise in them.
_product = functools.partial(jnp.matmul, precision="highest")
_einsum = functools.partial(jnp.einsum, precision="highest")


def apply_mlp(mlp: Mlp, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """w2 tanh(w1 x + b1) + b2."""
    b1, b2 = (jax.lax.broadcast_to_rank(mlp[name], x.ndim) for name in ("b1", "b2"))
    return _product(jnp.tanh(_product(x, mlp["w1"]) + b1), mlp["w2"]) + b2


def _normed(x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
    """Divided by its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _init_reading(key: Key[Array, ""], config: AgentConfig, dims: Dims) -> tuple[dict[str, Any], int, int]:
    """Parameters of what comes before actor and critic, and the widths I and J."""
    span_key, text_key, *member_keys = jax.random.split(key, dims.members + 2)
    params, shared = _init_shared(span_key, text_key, config, dims)
    of_member = 0
    if "hidden" in config.reads:
        params["projections"] = {
            f"member_{k}": jax.random.normal(member_keys[k], (width, config.projection)) * width**-0.5
            for k, width in enumerate(dims.widths)
        }
        of_member += config.projection
    of_member += len(STATS) * ("stats" in config.reads) + ("prompt" in config.reads)
    of_member += dims.members * ("agreement" in config.reads)
    return params, of_member, shared


def _init_shared(
    span_key: Key[Array, ""], text_key: Key[Array, ""], config: AgentConfig, dims: Dims
) -> tuple[dict[str, Any], int]:
    """Parameters of what is read besides the members, and its width J."""
    params: dict[str, Any] = {}
    shared = 0
    if "span" in config.reads:
        params["span_embedding"] = jax.random.normal(span_key, (dims.spans, config.span_embedding)) * 0.1
        shared += config.span_embedding
    if "text" in config.reads:
        params["text_projection"] = jax.random.normal(text_key, (dims.text, config.projection)) * dims.text**-0.5
        shared += config.projection
    return params, shared


def _read(
    params: dict[str, Any], observation: Observation, config: AgentConfig
) -> tuple[Float[Array, "B K I"] | None, Float[Array, "B J"] | None]:
    """What is read of each member, and what is read besides; None where that is nothing."""
    of_members: list[Array] = []
    if "hidden" in config.reads:
        projected = []
        for k, hidden in enumerate(observation.hidden):
            projected.append(_product(_normed(hidden), params["projections"][f"member_{k}"]))
        of_members.append(jnp.stack(projected, axis=1))
    of_members += _columns(observation, config)
    if "agreement" in config.reads:
        of_members.append(observation.agreement)
    return jnp.concatenate(of_members, axis=-1) if of_members else None, _read_shared(params, observation, config)


def _columns(observation: Observation, config: AgentConfig) -> list[Float[Array, "B K _"]]:
    """What is read of each member as it is."""
    columns = [observation.stats] if "stats" in config.reads else []
    return columns + ([observation.prompt[..., None]] if "prompt" in config.reads else [])


def _read_shared(params: dict[str, Any], observation: Observation, config: AgentConfig) -> Float[Array, "B J"] | None:
    shared = []
    if "span" in config.reads:
        # An answer that was extended beyond those of training reuses the last span's embedding.
        last = params["span_embedding"].shape[0] - 1
        shared.append(params["span_embedding"][jnp.minimum(observation.span, last)])
    if "text" in config.reads:
        shared.append(_product(_normed(observation.text), params["text_projection"]))
    return jnp.concatenate(shared, axis=-1) if shared else None


def _joint(of_members: Float[Array, "B K I"] | None, shared: Float[Array, "B J"] | None) -> Float[Array, "B K*I+J"]:
    parts = [] if of_members is None else [of_members.reshape(len(of_members), -1)]
    return jnp.concatenate(parts + ([] if shared is None else [shared]), axis=-1)


def _init_team(key: Key[Array, ""], config: AgentConfig, joint: int) -> dict[str, Any]:
    """What sees everything in either kind of agent: the critic, and whoever chooses the span's length."""
    critic, length = jax.random.split(key)
    params: dict[str, Any] = {"critic": init_mlp(critic, joint, config.ffn_width, 1)}
    if config.span_lengths:
        params["length"] = init_mlp(length, joint, config.ffn_width, len(config.span_lengths))
    return params


def _with_length(
    params: dict[str, Any], config: AgentConfig, of_weights: Distribution, joint: Float[Array, "B I"]
) -> Distribution:
    if not config.span_lengths:
        return of_weights
    logits = apply_mlp(params["length"], joint)
    return WithLength(of_weights, logits, jnp.broadcast_to(jnp.array(config.span_lengths, jnp.int32), logits.shape))


def _concentration(raw: Array, config: AgentConfig) -> Array:
    """softplus + floor (RLAE, arXiv 2506.00439, section 3.3)."""
    return jax.nn.softplus(raw) + config.concentration_floor


def _start(config: AgentConfig) -> float:
    """softplus^-1: every weight starts with this concentration."""
    return math.log(math.expm1(config.initial_concentration))


@dataclasses.dataclass(frozen=True)
class _Agent:
    """What every agent's configuration says of it as a policy."""

    config: AgentConfig = dataclasses.field(default_factory=AgentConfig)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.reads

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return self.config.span_lengths


@dataclasses.dataclass(frozen=True)
class PPOAgent(_Agent):
    """A `Policy` (see rlae_jax.fusion.policy): one network that reads everything and draws all weights."""

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        """Parameters for members of these widths and answers of at most `dims.spans` spans."""
        config = self.config
        reading, actor, team = jax.random.split(key, 3)
        params, of_member, shared = _init_reading(reading, config, dims)
        joint = dims.members * of_member + shared
        params |= _init_team(team, config, joint)
        if config.distribution == "dirichlet":
            params["actor"] = init_mlp(actor, joint, config.ffn_width, dims.members)
            params["actor"]["b2"] += _start(config)
        else:
            free = dims.members - 1
            params["actor"] = init_mlp(actor, joint, config.ffn_width, free)
            # The spread that log ratios of the Dirichlet's components start with.
            params["log_std"] = jnp.full((free,), 0.5 * jnp.log(2 * polygamma(1, config.initial_concentration)))
        return params

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Distribution, Float[Array, " B"]]:
        """The distribution over weights, and the critic's value."""
        joint = _joint(*_read(params, observation, self.config))
        raw = apply_mlp(params["actor"], joint)
        of_weights: Any
        if self.config.distribution == "dirichlet":
            of_weights = Dirichlet(_concentration(raw, self.config))
        else:
            of_weights = LogisticNormal(raw, jnp.broadcast_to(params["log_std"], raw.shape))
        return _with_length(params, self.config, of_weights, joint), apply_mlp(params["critic"], joint)[:, 0]


@dataclasses.dataclass(frozen=True)
class MAPPOAgent(_Agent):
    """A `Policy`: an agent per member that sees its own member and the shared part, and one critic that sees all.

    Agent k draws g_k ~ Gamma(alpha_k, 1) and the weights are g / sum g; see rlae_jax.ppo.gamma. With
    `config.share_actors` all agents are one network that is told whose agent it is.
    """

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        """Parameters for members of these widths and answers of at most `dims.spans` spans."""
        config, k = self.config, dims.members
        reading, actor, team = jax.random.split(key, 3)
        params, of_member, shared = _init_reading(reading, config, dims)
        params |= _init_team(team, config, k * of_member + shared)
        inputs = of_member + shared
        if config.share_actors:
            params["actor"] = init_mlp(actor, inputs + k, config.ffn_width, 1)
        else:
            keys = jax.random.split(actor, k)
            params["actor"] = jax.vmap(lambda one: init_mlp(one, inputs, config.ffn_width, 1))(keys)  # leaves [K, ...]
        params["actor"]["b2"] += _start(config)
        return params

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Distribution, Float[Array, " B"]]:
        """The agents' distributions, and the critic's value."""
        of_members, shared = _read(params, observation, self.config)
        assert of_members is not None, "the configuration makes sure"
        b, k, _ = of_members.shape
        local = [of_members]
        if shared is not None:
            local.append(jnp.broadcast_to(shared[:, None], (b, k, shared.shape[1])))
        if self.config.share_actors:
            local.append(jnp.broadcast_to(jnp.eye(k), (b, k, k)))
            raw = apply_mlp(params["actor"], jnp.concatenate(local, axis=-1))
        else:
            raw = jax.vmap(apply_mlp, in_axes=(0, 1), out_axes=1)(params["actor"], jnp.concatenate(local, axis=-1))
        joint = _joint(of_members, shared)
        gammas = LogGammas(_concentration(raw[..., 0], self.config))
        return _with_length(params, self.config, gammas, joint), apply_mlp(params["critic"], joint)[:, 0]


_HEADS = 4
_LEAST_SPREAD = 0.01  # of a statistic: smaller differences are next to none
_HIDING = 0x41DE  # the stream that says which hidden states are hidden, apart from the one that draws weights


def _init_attention(key: Key[Array, ""], inputs: int, width: int, agreement: bool) -> dict[str, Array]:
    """At first every member looks at all others alike: what it then sees, their mean, does not depend on how many they
    are. With two members, where there is one other, it stays so."""
    token, keys, values, alike = jax.random.split(key, 4)
    each = max(width // _HEADS, 1)
    params = {
        "token": jax.random.normal(token, (inputs, width)) * max(inputs, 1) ** -0.5,
        "bias": jnp.zeros((width,)),
        "query": jnp.zeros((width, _HEADS, each)),
        "key": jax.random.normal(keys, (width, _HEADS, each)) * width**-0.5,
        "value": jax.random.normal(values, (width, _HEADS, each)) * width**-0.5,
    }
    if agreement:
        params["agreement_score"] = jnp.zeros((_HEADS,))
        params["agreement_value"] = jax.random.normal(alike, (_HEADS, each))
    return params


def _attend(
    params: dict[str, Array], x: Float[Array, "B K X"], agreement: Float[Array, "B K K"] | None
) -> Float[Array, "B K H*E"]:
    """What each member sees of the others: softmax over k != j of q_j k_k / sqrt(E) + s_h agreement_jk, of values
    v_k + agreement_jk u_h. One that is alone sees zeros."""
    b, k, _ = x.shape
    heads, each = params["value"].shape[1:]
    if k == 1:
        return jnp.zeros((b, k, heads * each))
    query, key = (_einsum("bkx,xhe->bkhe", _normed(x), params[name]) for name in ("query", "key"))
    scores = _einsum("bjhe,bkhe->bjkh", query, key) * each**-0.5
    if agreement is not None:
        scores = scores + agreement[..., None] * params["agreement_score"][None, None, None]
    scores = jnp.where(jnp.eye(k, dtype=bool)[None, :, :, None], -jnp.inf, scores)
    share = jax.nn.softmax(scores, axis=2)
    seen = _einsum("bjkh,bkhe->bjhe", share, _einsum("bkx,xhe->bkhe", x, params["value"]))
    if agreement is not None:
        alike = _einsum("bjkh,bjk->bjh", share, agreement)
        seen = seen + alike[..., None] * params["agreement_value"][None, None]
    return seen.reshape(b, k, heads * each)


@dataclasses.dataclass(frozen=True)
class SetAgent(_Agent):
    """A `Policy` for any members, in any order: its parameters depend on their widths alone, each of which has a
    projection. A member of another width, and one that `known` says was not there in training, is read as if its hidden
    state were zeros.

    Attributes:
      several: every member's concentration is a Gamma's, with a likelihood of its own (MAPPO).
      known: whether each member was there in training; () where all were, as far as their widths tell.
    """

    several: bool = False
    known: tuple[bool, ...] = ()

    def for_members(self, known: tuple[bool, ...]) -> "SetAgent":
        """The agent over some members, of which some were there in training."""
        return dataclasses.replace(self, known=() if all(known) else known)

    def init(self, key: Key[Array, ""], dims: Dims) -> dict[str, Any]:
        """Parameters for members of these widths, whatever their order and number, and answers of at most `dims.spans`
        spans."""
        config = self.config
        span, text, hidden, attention, pool, actor, team = jax.random.split(key, 7)
        params, inputs = _init_shared(span, text, config, dims)
        if "hidden" in config.reads:
            params["projections"] = {
                _of_width(width): jax.random.normal(jax.random.fold_in(hidden, width), (width, config.projection))
                * width**-0.5
                for width in sorted(set(dims.widths))
            }
            inputs += config.projection + 1
        inputs += 2 * (len(STATS) * ("stats" in config.reads) + ("prompt" in config.reads))
        params["attention"] = _init_attention(attention, inputs, config.projection, "agreement" in config.reads)
        seen = config.projection + params["attention"]["value"][0].size
        params["pool"] = jax.random.normal(pool, (seen, config.ffn_width)) * seen**-0.5
        params["actor"] = init_mlp(actor, seen, config.ffn_width, 1)
        params["actor"]["b2"] += _start(config)
        return params | _init_team(team, config, config.ffn_width)

    def apply(self, params: dict[str, Any], observation: Observation) -> tuple[Distribution, Float[Array, " B"]]:
        """The distribution over weights, or the members' own, and the critic's value."""
        config = self.config
        if "prompt" in config.reads:  # counted in tokens of whoever is first, so that only their proportions are read
            size = jnp.mean(jnp.abs(observation.prompt), axis=1, keepdims=True)
            observation = observation._replace(prompt=observation.prompt / jnp.maximum(size, 1e-6))
        columns = _columns(observation, config)
        of_members = self._hidden(params, observation) + columns + [_relative(column) for column in columns]
        agreement = observation.agreement if "agreement" in config.reads else None
        b, k = of_members[0].shape[:2] if agreement is None else agreement.shape[:2]
        shared = _read_shared(params, observation, config)
        if shared is not None:
            of_members.append(jnp.broadcast_to(shared[:, None], (b, k, shared.shape[1])))
        attention = params["attention"]
        read = jnp.concatenate(of_members, axis=-1) if of_members else jnp.zeros((b, k, 0))
        x = _product(read, attention["token"]) + attention["bias"][None, None]
        seen = jnp.concatenate([x, _attend(attention, x, agreement)], axis=-1)
        alpha = _concentration(apply_mlp(params["actor"], seen)[..., 0], config)
        pooled = jnp.mean(jnp.tanh(_product(seen, params["pool"])), axis=1)
        of_weights: Distribution = LogGammas(alpha) if self.several else Dirichlet(alpha)
        return _with_length(params, config, of_weights, pooled), apply_mlp(params["critic"], pooled)[:, 0]

    def _hidden(self, params: dict[str, Any], observation: Observation) -> list[Float[Array, "B K _"]]:
        """The projections of the members' hidden states, and whether there is one: not where it is all zeros."""
        if "hidden" not in self.config.reads:
            return []
        projected = []
        for k, hidden in enumerate(observation.hidden):
            kernel = params["projections"].get(_of_width(hidden.shape[1]))
            if kernel is None or (self.known and not self.known[k]):
                projected.append(jnp.zeros((len(hidden), self.config.projection + 1)))
                continue
            there = jnp.any(hidden != 0, axis=1, keepdims=True).astype(jnp.float32)
            projected.append(jnp.concatenate([_product(_normed(hidden), kernel), there], axis=1))
        return [jnp.stack(projected, axis=1)]

    def hide(self, observation: Observation, keys: Key[Array, " B"]) -> Observation:
        """What is shown in training: some hidden states are zeros, so that the agent learns to do without them."""
        share = self.config.hidden_dropout
        if not share or "hidden" not in self.reads:
            return observation
        n = len(observation.hidden)
        shown = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, _HIDING), 1 - share, (n,)))(keys)
        hidden = tuple(jnp.where(shown[:, k, None], one, 0.0) for k, one in enumerate(observation.hidden))
        return observation._replace(hidden=hidden)


def _relative(column: Float[Array, "B K N"]) -> Float[Array, "B K N"]:
    """By how much each member is above the members' mean, in units of their spread: who is the surer one may show in a
    hundredth of a nat."""
    above = column - jnp.mean(column, axis=1, keepdims=True)
    return above * jax.lax.rsqrt(jnp.mean(above * above, axis=1, keepdims=True) + _LEAST_SPREAD**2)


def _of_width(width: int) -> str:
    return f"width_{width}"
