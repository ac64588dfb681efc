"""What can be compared: methods that answer prompts, by name.

A method writes answers with an ensemble under some weights (`Method`), with the weights that an agent used for other
prompts (`Shuffled`), or takes one of several methods' answers (`Pick`). Several seeds of a method are a list.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from rlae_jax.errors import InputError
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.fusion.weights import Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
    """Answers of an ensemble.

    Attributes:
      weights: of the members, as `Ensemble.generate` takes them.
      span_length: by default the policy's own.
      record: what choosing the method found and cost; goes into results.json.
      adapters: for members with several adapters, how much each counts, in every answer.
    """

    ensemble: Ensemble
    weights: Weights = None
    span_length: int | None = None
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapters: Float[np.ndarray, " M"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """Answers under an agent's weights for another prompt, span by span: what is left of an agent if it is right about
    how much to trust each member on the whole, but not about when."""

    agent: Method


@dataclasses.dataclass(frozen=True, eq=False)
class Pick:
    """One of several methods' own answers to each prompt: the one that most of them agree with (of equally many the
    first), or, as an oracle, one that is right if any is. An oracle is a reference line, no method to win against."""

    methods: tuple[Method, ...]
    oracle: bool = False


AnyMethod = Method | Shuffled | Pick
# Name -> method, or its seeds.
Methods = Mapping[str, AnyMethod | Sequence[AnyMethod]]


def seeds_of(method: AnyMethod | Sequence[AnyMethod]) -> list[AnyMethod]:
    """A method's seeds; one that is no list is the only one."""
    return list(method) if isinstance(method, Sequence) else [method]


def policy_of(agent: Method) -> BoundPolicy:
    """An agent's policy.

    Raises:
      InputError: a method without one.
    """
    if not isinstance(agent.weights, BoundPolicy):
        raise InputError(f"an agent needs a trained policy as its weights, not {type(agent.weights).__name__}")
    return agent.weights


def member_names(ensemble: Ensemble) -> list[str]:
    """`single:<name>` per member, with #2, #3 where a name repeats."""
    return unique_names([f"single:{lm.name}" for lm in ensemble.members])


def unique_names(names: Sequence[str]) -> list[str]:
    """The names, each repeat with its number: a, b, a#2."""
    seen: dict[str, int] = {}
    unique = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        unique.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return unique


def member_alone(ensemble: Ensemble, k: int, span_length: int) -> Method:
    """Member k, which is itself under any operator."""
    return Method(Ensemble([ensemble.members[k]], end_ids=ensemble.member_ends[k]), None, span_length)
