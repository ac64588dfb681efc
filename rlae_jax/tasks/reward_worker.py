"""What is checked of the numbers of rewards and objectives, here and in worker processes: the standard library alone,
see `workers`."""

import math
import numbers
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

Reference = str | tuple[str, ...]


class UnusableReward(ValueError):
    """What a reward gave is no number in [0, 1]."""

    says_itself = True


def best(function: Callable[[str, str], Any], text: str, reference: str | Sequence[str]) -> float:
    """The best score over the references, each call checked.

    Raises:
      UnusableReward: a call gave something else than a number in [0, 1].
    """
    references = (reference,) if isinstance(reference, str) else reference
    return max((checked(function(text, one)) for one in references), default=0.0)


def number_of(function: Callable[..., Any], *arguments: Any) -> float:
    """The function's number, checked.

    Raises:
      UnusableReward: it is something else than a finite number.
    """
    return number(function(*arguments))


def checked(value: Any) -> float:
    """A reward's number.

    Raises:
      UnusableReward: it is something else than a number in [0, 1].
    """
    found = number(value)
    if not 0.0 <= found <= 1.0:
        raise UnusableReward(f"gave {found:g}, outside [0, 1]")
    return found


def number(value: Any) -> float:
    """A number of whatever type as a float.

    Raises:
      UnusableReward: it is something else than a finite number.
    """
    # Arrays of one number count as numbers only without axes.
    if not isinstance(value, numbers.Real | Decimal) and getattr(value, "shape", None) != ():
        shape = getattr(value, "shape", None)
        kind = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else type(value).__name__
        raise UnusableReward(f"gave no number but {kind}")
    found = float(value)
    if not math.isfinite(found):
        raise UnusableReward("gave NaN" if math.isnan(found) else f"gave {found:g}")
    return found
