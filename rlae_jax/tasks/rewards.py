"""Rewards: how good a finished answer is, from its text and a reference. Each returns a number in [0, 1]."""

import re
from collections.abc import Callable
from decimal import Decimal

from rlae_jax.errors import InputError

Reward = Callable[[str, str], float]

_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")


def exact_match(text: str, reference: str) -> float:
    """1.0 if the texts are equal but for white space at their ends."""
    return float(text.strip() == reference.strip())


def last_number(text: str, reference: str) -> float:
    """1.0 if the last number written equals the reference's last number (1,000 = 1000.0), as RLAE scores GSM8K."""
    written, expected = _NUMBER.findall(text), _NUMBER.findall(reference)
    if not written or not expected:
        return 0.0
    return float(_value(written[-1]) == _value(expected[-1]))


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


REWARDS: dict[str, Reward] = {"exact_match": exact_match, "last_number": last_number}


def get_reward(name: str) -> Reward:
    """The reward of a name.

    Raises:
      InputError: an unknown name.
    """
    if name not in REWARDS:
        raise InputError(f"reward {name!r} is unknown; use one of {', '.join(REWARDS)}")
    return REWARDS[name]
