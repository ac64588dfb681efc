"""Frequencies of rotary positions under the scaling methods that checkpoints name.

In: the fields of a checkpoint's `rope_parameters`, kept in a `Rope`. Out: the frequency of each pair, and the scale of
the rotated queries and keys. All of it is arithmetic on the host, in float32 as the reference implementations do it.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.models.config import Rope


def _linear(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """Positions divided by a factor (Chen et al., 2023)."""
    return 1 / periods / np.float32(numbers["factor"]), 1.0


def _llama3(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """Long wavelengths divided by a factor, short ones kept, a blend between (Llama 3.1's published code)."""
    factor, low, high = (float(numbers[key]) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    old = float(numbers["original_max_position_embeddings"])
    frequencies = 1 / periods
    turns = old / (2 * math.pi * periods)  # that a pair makes within the original context
    kept = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return frequencies * (kept + (1 - kept) / np.float32(factor)), 1.0


def _yarn(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """Interpolation of slow pairs only, and a temperature (Peng et al., 2023, sections 3.2 and 3.4)."""
    old = float(numbers["original_max_position_embeddings"])
    factor = float(numbers["factor"])
    width = 2 * len(periods)

    def pair_that_turns(times: float) -> float:
        return width * math.log(old / (times * 2 * math.pi)) / (2 * math.log(base))

    first, last = (pair_that_turns(numbers.get(key) or times) for key, times in (("beta_fast", 32), ("beta_slow", 1)))
    if numbers.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    slow = np.clip((np.arange(len(periods)) - first) / (last - first or 0.001), 0, 1).astype(np.float32)

    def temperature(m: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0

    scale = numbers.get("attention_factor")
    if scale is None:
        m, m_all = numbers.get("mscale"), numbers.get("mscale_all_dim")
        scale = temperature(m) / temperature(m_all) if m and m_all else temperature(1.0)
    return (1 / periods) * (1 - slow) + (1 / (np.float32(factor) * periods)) * slow, float(scale)


def _longrope(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """A searched factor per pair, one list for texts within the original context and one for longer texts (Ding et
    al., 2024); `from_fields` picks the list."""
    old = int(numbers["original_max_position_embeddings"])
    factor = float(numbers["factor"])
    scale = numbers.get("attention_factor")
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(old))
    factors = np.asarray(numbers["factors"], np.float32)
    if factors.shape != periods.shape:
        raise ValueError(f"longrope has {factors.size} factors for {periods.size} pairs")
    return 1 / (factors * periods), float(scale)


def _proportional(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """The first pairs turn as among all pairs of the head, the others not at all (Gemma 4's published code)."""
    turning = int(float(numbers.get("partial_rotary_factor", 1.0)) * 2 * len(periods) // 2)
    frequencies = np.where(np.arange(len(periods)) < turning, 1 / periods, np.float32(0))
    return frequencies / np.float32(numbers.get("factor", 1.0)), 1.0


def _dynamic(periods: np.ndarray, numbers: Mapping[str, Any], base: float) -> tuple[np.ndarray, float]:
    """A larger base for texts beyond the original context (bloc97, 2023, "dynamic NTK"; as in transformers):

        base * (factor * length / original - (factor - 1))^(W / (W - 2))

    `length` is that of the longest text that the model is loaded for, at least the original context, within which
    nothing changes. (transformers takes a text's own length so far, and keeps keys that it turned by a former one.)
    """
    width = 2 * len(periods)
    factor, stretch = float(numbers["factor"]), float(numbers["length"]) / float(numbers["original"])
    base *= (factor * stretch - (factor - 1)) ** (width / max(width - 2, 1))
    return 1 / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width)), 1.0


SCALINGS = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
    "proportional": _proportional,
}


@functools.cache
def frequencies(rope: Rope, head_width: int) -> tuple[np.ndarray, float]:
    """(radians per position of each pair of entries, scale of the rotated queries and keys).

    Without scaling pair i of W entries turns base^(-2i/W) per position (Su et al., 2021, eq. 15).
    """
    width = int(head_width * rope.fraction)
    periods = np.float32(rope.base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    if rope.kind == "default":
        return 1 / periods, 1.0
    scaled, scale = SCALINGS[rope.kind](periods, dict(rope.numbers), rope.base)
    return scaled.astype(np.float32), scale


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < float("inf")


def from_fields(fields: Mapping[str, Any], *, context: int, used_context: int | None = None) -> Rope:
    """The `Rope` of a checkpoint's `rope_parameters`.

    Args:
      context: the checkpoint's max_position_embeddings.
      used_context: the longest text that the model is loaded for; `context` if None.

    Raises:
      InputError: a kind of scaling that is not supported.
    """
    kind = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in ("default", *SCALINGS):
        raise InputError(f"rope_type {kind} is not supported; supported: default, {', '.join(SCALINGS)}")
    base, fraction = float(fields["rope_theta"]), float(fields.get("partial_rotary_factor") or 1.0)
    if kind == "proportional":
        fraction = 1.0  # the fraction is among the method's numbers: all of a head's entries are paired
    if kind == "default":
        return Rope(base, fraction)
    numbers: dict[str, Any] = {key: value for key, value in fields.items() if _is_finite(value) and key != "rope_theta"}
    old = int(fields.get("original_max_position_embeddings") or context)
    if kind in ("yarn", "longrope"):
        numbers["factor"] = float(fields.get("factor") or context / old)
    if kind == "longrope":
        used = context if used_context is None else used_context
        numbers["factors"] = tuple(fields["long_factor" if used > old else "short_factor"])
    if kind == "dynamic":
        numbers |= {"original": context, "length": max(used_context or 0, context)}
    return Rope(base, fraction, kind, tuple(sorted(numbers.items())))
