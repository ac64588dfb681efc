"""The weight agents. One that sets all weights of a span at once (PPO), or one per member (MAPPO).

member k:  hidden [B, D_k] -> normalised -> projection -+
           stats [B, 4], agreement [B, K], prompt [B] --+-> what is read of member k [B, K, I] -+
shared:    span [B] -> embedding [B, J] ------------------------------------------------------- + -> joint [B, K*I+J]

           PPO                                          MAPPO
actor      joint -> K concentrations                    member k's and the shared part -> its own concentration
critic     joint -> value                               joint -> value
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


def apply_mlp(mlp: Mlp, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
    """w2 tanh(w1 x + b1) + b2."""
    b1, b2 = (jax.lax.broadcast_to_rank(mlp[name], x.ndim) for name in ("b1", "b2"))
    return _product(jnp.tanh(_product(x, mlp["w1"]) + b1), mlp["w2"]) + b2


def _normed(x: Float[Array, "B D"]) -> Float[Array, "B D"]:
    """Divided by its root mean square."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def _init_reading(key: Key[Array, ""], config: AgentConfig, dims: Dims) -> tuple[dict[str, Any], int, int]:
    """Parameters of what comes before actor and critic, and the widths I and J."""
    span_key, text_key, *member_keys = jax.random.split(key, dims.members + 2)
    params: dict[str, Any] = {}
    of_member, shared = 0, 0
    if "hidden" in config.reads:
        params["projections"] = {
            f"member_{k}": jax.random.normal(member_keys[k], (width, config.projection)) * width**-0.5
            for k, width in enumerate(dims.widths)
        }
        of_member += config.projection
    of_member += len(STATS) * ("stats" in config.reads) + ("prompt" in config.reads)
    of_member += dims.members * ("agreement" in config.reads)
    if "span" in config.reads:
        params["span_embedding"] = jax.random.normal(span_key, (dims.spans, config.span_embedding)) * 0.1
        shared += config.span_embedding
    if "text" in config.reads:
        params["text_projection"] = jax.random.normal(text_key, (dims.text, config.projection)) * dims.text**-0.5
        shared += config.projection
    return params, of_member, shared


def _read(
    params: dict[str, Any], observation: Observation, config: AgentConfig
) -> tuple[Float[Array, "B K I"] | None, Float[Array, "B J"] | None]:
    """What is read of each member, and what is read besides; None where that is nothing."""
    of_members, shared = [], []
    if "hidden" in config.reads:
        projected = []
        for k, hidden in enumerate(observation.hidden):
            projected.append(_product(_normed(hidden), params["projections"][f"member_{k}"]))
        of_members.append(jnp.stack(projected, axis=1))
    if "stats" in config.reads:
        of_members.append(observation.stats)
    if "agreement" in config.reads:
        of_members.append(observation.agreement)
    if "prompt" in config.reads:
        of_members.append(observation.prompt[..., None])
    if "span" in config.reads:
        # An answer that was extended beyond those of training reuses the last span's embedding.
        last = params["span_embedding"].shape[0] - 1
        shared.append(params["span_embedding"][jnp.minimum(observation.span, last)])
    if "text" in config.reads:
        shared.append(_product(_normed(observation.text), params["text_projection"]))
    return (
        jnp.concatenate(of_members, axis=-1) if of_members else None,
        jnp.concatenate(shared, axis=-1) if shared else None,
    )


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
class PPOAgent:
    """A `Policy` (see rlae_jax.fusion.policy): one network that reads everything and draws all weights."""

    config: AgentConfig = dataclasses.field(default_factory=AgentConfig)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.reads

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return self.config.span_lengths

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
class MAPPOAgent:
    """A `Policy`: an agent per member that sees its own member and the shared part, and one critic that sees all.

    Agent k draws g_k ~ Gamma(alpha_k, 1) and the weights are g / sum g; see rlae_jax.ppo.gamma. With
    `config.share_actors` all agents are one network that is told whose agent it is.
    """

    config: AgentConfig = dataclasses.field(default_factory=AgentConfig)

    @property
    def reads(self) -> tuple[str, ...]:
        return self.config.reads

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return self.config.span_lengths

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
