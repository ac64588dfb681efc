"""How sure a comparison is: bootstrap intervals, paired tests, Holm's correction, rank correlation. Numpy, no models.

Rewards are [S, N]: S seeds, each with models and agents of its own, on the same N prompts. A vector [N] is one seed.
What differs between seeds is what a repetition of the whole study would change, so the seed is the outer unit: many
prompts make up for few seeds in nothing. With one seed, all statements are about the models and agents of that seed.
Everything is a function of its arguments: resampling draws from a fixed seed.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

DRAWS = 4_000  # of a bootstrap
FLIPS = 20_000  # of a permutation test, so that no p-value is below 1/20,001
_Z95 = 1.959964
_CELLS = 2_000_000  # numbers in memory at a time


def wilson_interval(rewards: Float[np.ndarray, " N"]) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion, of rewards that are 0 or 1; it has a width also where all are alike."""
    n, mean = len(rewards), float(np.mean(rewards))
    centre = (mean + _Z95**2 / (2 * n)) / (1 + _Z95**2 / n)
    half = _Z95 / (1 + _Z95**2 / n) * np.sqrt(mean * (1 - mean) / n + _Z95**2 / (4 * n * n))
    return float(max(centre - half, 0.0)), float(min(centre + half, 1.0))


def t_two_sided(t: float, freedom: int) -> float:
    """P(|T| >= t) of Student's t with a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for i in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * i / (i + 1)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(max(1.0 - inside, 0.0), 1.0)


def t_quantile95(freedom: int) -> float:
    """The t with P(|T| >= t) = 0.05, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, freedom) > 0.05 else (low, middle)
    return high


def t_interval(values: Sequence[float]) -> tuple[float, float]:
    """mean +- t s / sqrt(n), with Student's t of n - 1 degrees of freedom: the mean's 95% interval, for n >= 2."""
    n, mean = len(values), float(np.mean(values))
    half = t_quantile95(n - 1) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return mean - half, mean + half


def bootstrap_interval(rewards: ArrayLike, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The percentile bootstrap's 95% interval of the mean: seeds are drawn with replacement, then prompts.

    All seeds of a draw get the same prompts, as they did in the study, so that hard prompts are hard for all. The
    spread of a few resampled means is too small: it lacks a factor sqrt(S / (S - 1)), and the normal distribution's
    1.96 stands where Student's t would. Deviations of the seeds' means are stretched by both beforehand (Hesterberg,
    2015, section 3.3, corrects the percentiles for the same reason); those of prompts, which are many, are not.

    Args:
      rewards: [S, N] or [N].
    """
    table = np.atleast_2d(np.asarray(rewards, np.float64))
    s, n = table.shape
    if s > 1:
        means = table.mean(axis=1, keepdims=True)
        stretch = math.sqrt(s / (s - 1)) * t_quantile95(s - 1) / _Z95
        table = table + (stretch - 1) * (means - means.mean())
    rng = np.random.default_rng(seed)
    drawn = []
    rows = max(_CELLS // n, 1)
    for start in range(0, draws, rows):
        size = min(rows, draws - start)
        by_prompt = rng.multinomial(s, [1 / s] * s, size=size) / s @ table
        prompts = rng.integers(n, size=(size, n))
        drawn.append(np.take_along_axis(by_prompt, prompts, axis=1).mean(axis=1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return float(low), float(high)


def interval95(rewards: ArrayLike) -> tuple[float, float]:
    """A 95% interval of a mean reward: Wilson's for one seed of rewards that are all 0 or 1, else the bootstrap's.

    Args:
      rewards: [S, N] or [N], in [0, 1], which bounds the interval.
    """
    table = np.atleast_2d(np.asarray(rewards, np.float64))
    if len(table) == 1 and np.all((table == 0) | (table == 1)):
        return wilson_interval(table[0])
    low, high = bootstrap_interval(table)
    return max(low, 0.0), min(high, 1.0)


def sign_flip_p(differences: Float[np.ndarray, " N"], flips: int = FLIPS, seed: int = 0) -> float:
    """Two-sided p-value of "each difference is as likely as its opposite", by the sum's size under flipped signs.

    Assumes nothing of the rewards' distribution. Where all differences that are not 0 have one size, as those of
    rewards 0 and 1, it is the exact sign test (McNemar's); otherwise flips are drawn, and p is at least 1/(flips + 1).
    """
    values = np.asarray(differences, np.float64)
    values = values[values != 0]
    n = len(values)
    if not n:
        return 1.0
    if np.ptp(np.abs(values)) < 1e-12:
        fewer = min(int(np.sum(values > 0)), int(np.sum(values < 0)))
        # Whole numbers: a product of probabilities would underflow.
        term = total = 1
        for i in range(fewer):
            term = term * (n - i) // (i + 1)
            total += term
        return float(min(1.0, 2 * total / 2**n))
    rng = np.random.default_rng(seed)
    observed = abs(values.sum()) - 1e-9 * np.abs(values).sum()  # sums of the same numbers may differ in the last digits
    reached, rows = 0, max(_CELLS // n, 1)
    for start in range(0, flips, rows):
        signs = 2 * rng.integers(2, size=(min(rows, flips - start), n), dtype=np.int8) - 1
        reached += int(np.sum(np.abs(signs @ values) >= observed))
    return (reached + 1) / (flips + 1)


def t_test_p(differences: Float[np.ndarray, " S"]) -> float:
    """Two-sided p-value of "the mean is 0" by Student's t test."""
    mean, n = float(np.mean(differences)), len(differences)
    error = float(np.std(differences, ddof=1)) / math.sqrt(n)
    if error <= 1e-12 * abs(mean):
        return 1.0 if mean == 0 else 0.0
    return t_two_sided(abs(mean) / error, n - 1)


class Difference(NamedTuple):
    """What one method is better by than another."""

    difference: float
    ci95: tuple[float, float]
    p: float  # two-sided


def paired_difference(a: ArrayLike, b: ArrayLike, *, bounded: bool = True) -> Difference:
    """Mean reward of `a` minus that of `b` on the same prompts, with its bootstrap interval and p-value.

    One seed: the sign-flip test over prompts. Several: the difference must show over prompts (of its mean over seeds)
    and over seeds (Student's t test of the seeds' differences), and p is the larger of the two. With five seeds a
    sign-flip test over seeds could never go below 1/16, so that t, which takes means over many prompts as normal, is
    the only useful test there.

    Args:
      a, b: [S, N] or [N]. Seeds are paired in their order: a method with one seed is paired with each seed of the
        other; of different numbers the first ones count.
      bounded: they are rewards, in [0, 1], which bounds the interval.
    """
    tables = [np.atleast_2d(np.asarray(x, np.float64)) for x in (a, b)]
    seeds = min((len(x) for x in tables if len(x) > 1), default=1)
    first, second = (x[:seeds] for x in tables)
    by_seed = first - second
    p = sign_flip_p(by_seed.mean(axis=0))
    if seeds > 1:
        p = max(p, t_test_p(by_seed.mean(axis=1)))
    low, high = bootstrap_interval(by_seed)
    if bounded:
        low, high = max(low, -1.0), min(high, 1.0)
    return Difference(float(by_seed.mean()), (low, high), p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction (1979): rejecting where a corrected value is below 5% makes any false rejection among
    all of them at most 5% likely."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(value) for value in corrected]


def rank_correlation(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's rank correlation of pairs; equal values share their mean rank. NaN where one side is constant.

    Args:
      x, y: [N].
    """
    a, b = (_ranks(np.asarray(values, np.float64)) for values in (x, y))
    a, b = a - a.mean(), b - b.mean()
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else math.nan


def _ranks(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    """From 1."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last: Float[np.ndarray, " U"] = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]
