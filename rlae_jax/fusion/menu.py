"""Rows of one batch that follow different policies, as one policy of the loop."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from rlae_jax.fusion.policy import ChoosesLength, Dims, Distribution, Observation, Policy


class _Chosen(NamedTuple):
    """Each row's action is one of several distributions': the weights that it means, and how long they hold."""

    distributions: tuple[Distribution, ...]
    drawn: tuple[bool, ...]  # which policies' actions are drawn; of the others modes are taken
    choice: Int[Array, " B"]
    lengths: Int[Array, " B"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B A"]:
        b = len(keys)
        choice, lengths = (jnp.broadcast_to(row, (b,)) for row in (self.choice, self.lengths))
        found = jnp.zeros(())
        for i, (one, drawn) in enumerate(zip(self.distributions, self.drawn, strict=True)):
            action = one.sample(keys) if drawn else one.mode()
            length = one.to_length(action) if isinstance(one, ChoosesLength) else lengths
            weights = one.to_weights(action)
            weights = jnp.broadcast_to(weights, (b, weights.shape[1]))
            row = jnp.concatenate([weights, length[:, None].astype(jnp.float32)], axis=1)
            found = row if i == 0 else jnp.where((choice == i)[:, None], row, found)
        return found

    def mode(self) -> Float[Array, "B A"]:
        raise NotImplementedError  # the loop draws, and those that are not drawn give their modes

    def log_prob(self, action: Float[Array, "B A"]) -> Float[Array, " B"]:
        return jnp.zeros(len(action))

    def entropy(self) -> Float[Array, " B"]:
        return jnp.zeros(len(self.choice))

    def to_weights(self, action: Float[Array, "B A"]) -> Float[Array, "B K"]:
        return action[:, :-1]

    def to_length(self, action: Float[Array, "B A"]) -> Int[Array, " B"]:
        return action[:, -1].astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Menu:
    """Several policies, of which each row follows one. Its parameters are the rows' choices, the rows' span lengths and
    every policy's own parameters."""

    policies: tuple[Policy, ...]
    drawn: tuple[bool, ...]
    longest: int  # of the spans

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for policy in self.policies for part in policy.reads))

    @property
    def span_lengths(self) -> tuple[int, ...]:
        return (1, self.longest)

    def init(self, key: Key[Array, ""], dims: Dims) -> Any:
        """For one row."""
        one = jnp.zeros((1,), jnp.int32)
        return one, one + 1, tuple(policy.init(key, dims) for policy in self.policies)

    def apply(self, params: Any, observation: Observation) -> tuple[ChoosesLength, Float[Array, " B"]]:
        choice, lengths, own = params
        found = []
        for policy, its in zip(self.policies, own, strict=True):
            found.append(policy.apply(its, observation)[0])
        return _Chosen(tuple(found), self.drawn, choice, lengths), jnp.zeros(len(choice))
