"""A UTF-8 automaton over byte strings: which entries of a vocabulary may follow, so that no character breaks."""

import functools

import numpy as np
from jaxtyping import Int, UInt8

from rlae_jax.fusion.vocabulary.rows import Offsets

_DEAD = 8


@functools.cache
def _utf8_steps() -> Int[np.ndarray, "9 256"]:
    """The next state of strict UTF-8 (RFC 3629, section 4) after a byte; `_DEAD` has none but itself.

    0: between characters; 1, 2, 3: so many continuation bytes to come; 4, 5, 6, 7: after E0, ED, F0, F4, whose first
    continuation byte is restricted (overlong forms, surrogates, beyond U+10FFFF).
    """
    steps = np.full((9, 256), _DEAD, np.int8)
    steps[0, :0x80] = 0
    steps[0, 0xC2:0xE0], steps[0, 0xE0:0xF0], steps[0, 0xF0:0xF5] = 1, 2, 3
    steps[0, [0xE0, 0xED, 0xF0, 0xF4]] = 4, 5, 6, 7
    steps[1, 0x80:0xC0], steps[2, 0x80:0xC0], steps[3, 0x80:0xC0] = 0, 1, 2
    steps[4, 0xA0:0xC0], steps[5, 0x80:0xA0], steps[6, 0x90:0xC0], steps[7, 0x80:0x90] = 1, 1, 2, 2
    return steps


def utf8_states(data: UInt8[np.ndarray, " N"], offsets: Offsets) -> Int[np.ndarray, "8 U"]:
    """From each of 8 states the state after each byte string, -1 where a character would break.

    A string without bytes stands for a control token, which may not come within a character: 0 -> 0, otherwise -1.
    """
    steps = _utf8_steps()
    lengths = np.diff(offsets)
    states = np.broadcast_to(np.arange(8, dtype=np.int8)[:, None], (8, len(lengths))).copy()
    states[1:, lengths == 0] = _DEAD
    order = np.argsort(-lengths, kind="stable")
    longer = np.searchsorted(-lengths[order], -np.arange(lengths.max(initial=0)))  # strings longer than each position
    for position, count in enumerate(longer):
        rows = order[:count]
        states[:, rows] = steps[states[:, rows], data[offsets[rows] + position]]
    return np.where(states == _DEAD, np.int8(-1), states)
