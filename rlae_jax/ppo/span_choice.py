"""Actions that say how long they hold: another distribution's action, and a length chosen from a small set."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class WithLength(NamedTuple):
    """A weights' distribution, and independently of it a length; the last number of an action is the length's place
    in `lengths`. Where the weights have a likelihood per agent, whoever chooses the length counts as one more."""

    of_weights: Any
    logits: Float[Array, "B C"]
    lengths: Int[Array, "B C"]

    def sample(self, keys: Key[Array, " B"]) -> Float[Array, "B A1"]:
        """One key per row."""
        both = jax.vmap(jax.random.split)(keys)
        chosen = jax.vmap(jax.random.categorical)(both[:, 1], self.logits)
        return self._join(self.of_weights.sample(both[:, 0]), chosen)

    def mode(self) -> Float[Array, "B A1"]:
        return self._join(self.of_weights.mode(), jnp.argmax(self.logits, axis=-1))

    def log_prob(self, action: Float[Array, "B A1"]) -> Float[Array, " B *N"]:
        of_weights: Float[Array, " B *N"] = self.of_weights.log_prob(action[:, :-1])
        log_probs = jax.nn.log_softmax(self.logits, axis=-1)
        of_length = jnp.take_along_axis(log_probs, self._place(action)[:, None], axis=-1)
        if of_weights.ndim == 1:
            return of_weights + of_length[:, 0]
        return jnp.concatenate([of_weights, of_length], axis=-1)

    def entropy(self) -> Float[Array, " B"]:
        log_probs = jax.nn.log_softmax(self.logits, axis=-1)
        of_weights: Float[Array, " B"] = self.of_weights.entropy()
        return of_weights - jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)

    def to_weights(self, action: Float[Array, "B A1"]) -> Float[Array, "B K"]:
        weights: Float[Array, "B K"] = self.of_weights.to_weights(action[:, :-1])
        return weights

    def to_length(self, action: Float[Array, "B A1"]) -> Int[Array, " B"]:
        """How many steps the action holds."""
        return jnp.take_along_axis(self.lengths, self._place(action)[:, None], axis=1)[:, 0]

    def _join(self, action: Array, place: Array) -> Array:
        return jnp.concatenate([action, place[:, None].astype(action.dtype)], axis=-1)

    def _place(self, action: Array) -> Array:
        return action[:, -1].astype(jnp.int32)
