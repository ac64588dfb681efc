"""Mathematical equivalence by math-verify. Imports nothing of this package: worker processes load it by its path.

It is loaded only where the reward is asked for, so that the library is needed only then, and is there before the first
text's time begins.
"""

import logging
import re
from decimal import Decimal

from math_verify import parse, verify

# What says where the mathematics in a text is; a reference without any is taken to be LaTeX as a whole.
_MARKS = ("$", "\\boxed", "\\(", "\\[")

# It warns that its time limits are off and logs every text that it cannot read.
logging.getLogger("math_verify").setLevel(logging.CRITICAL)

# What math-verify does not read: digits in groups with spaces that do not break, and exponents.
_GROUPED = re.compile(r"(?<=\d)[\u00a0\u202f\u2009](?=\d{3}(?!\d))")
_EXPONENT = re.compile(r"(?<![\w.])\d+(?:\.\d+)?[eE][+-]?\d{1,2}(?!\w)")


def _plain(text: str) -> str:
    return _EXPONENT.sub(lambda match: format(Decimal(match[0]), "f"), _GROUPED.sub("", text))


def math_equivalence(text: str, reference: str) -> float:
    """1.0 if the last expression or number in the text equals the reference's: 1/2, 0.5, \\frac{1}{2}.

    math-verify's own time limits use signals, which only a main thread may, so they are off: some expressions take
    for ever, which the time limit of `RewardPool` is for.
    """
    text, reference = _plain(text), _plain(reference)
    marked = reference if any(mark in reference for mark in _MARKS) else f"${reference}$"
    expected = parse(marked, parsing_timeout=None)
    answer = parse(text, parsing_timeout=None)
    return float(bool(expected and answer) and verify(expected, answer, timeout_seconds=None))
