"""Ensemble decoding as one would write it first: one row at a time, a whole forward for every token, numpy in float64.

Nothing here is shared with the program but the members' uncached forward pass (tested against Hugging Face) and the
random bits: the noise of row b at step t is gumbel(fold_in(key_b, t)).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlae_jax.models import LM

WIDTH = 48  # every forward is padded to this, so that a member compiles once


@dataclasses.dataclass
class Row:
    """What one row wrote and what its policy saw and chose."""

    tokens: list[int]  # end token included
    ended: bool
    weights: list[np.ndarray]  # [K] per span
    hidden: list[list[np.ndarray]]  # [K][D] per span
    stats: list[np.ndarray]  # [K, 4] per span
    agreement: list[np.ndarray]  # [K, K] per span
    scores: list[float]  # each token's log-probability under the fused distribution, before penalties and masks
    attribution: list[np.ndarray]  # [K] per token: under each member


def log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max()
    return shifted - np.log(np.exp(shifted).sum())


def linear(log_probs: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(sum(w * np.exp(log_p) for w, log_p in zip(weights, log_probs, strict=True)))


def loglinear(log_probs: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    return log_softmax(sum(w * log_p for w, log_p in zip(weights, log_probs, strict=True) if w > 0))


FUSIONS = {"linear": linear, "loglinear": loglinear}


def truncate(scaled: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> np.ndarray:
    """Temperature is behind us; top-k, then top-p over what is left, token by token from the likeliest down, and of
    these whatever has at least `min_p` times the probability of the likeliest."""
    out = np.full_like(scaled, -np.inf)
    order = list(np.argsort(-scaled, kind="stable"))
    if top_k:
        order = order[:top_k]
    probs = np.exp(log_softmax(scaled[order]))
    total = 0.0
    for token, p in zip(order, probs, strict=True):
        if p >= min_p * probs[0]:
            out[token] = scaled[token]
        total += p
        if top_p < 1 and total >= top_p:
            break
    return out


def read(lm: LM, ids: Sequence[int], width: int = WIDTH) -> tuple[np.ndarray, np.ndarray]:
    """(last hidden state, log-probabilities of the next token) after `ids`."""
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(ids)] = ids
    mask = (np.arange(width) < len(ids)).astype(np.int32)[None]
    hidden = np.asarray(lm.hidden(padded, mask), np.float64)[0, len(ids) - 1]
    logits = np.asarray(lm.logits(padded, mask), np.float64)[0, len(ids) - 1]
    return hidden, log_softmax(logits)


def describe(log_probs: list[np.ndarray], span_log_probs: np.ndarray, span_length: int) -> np.ndarray:
    """Entropy, largest probability, mean log-probability of the last span's tokens, KL to the uniform mixture."""
    mixture = np.mean([np.exp(log_p) for log_p in log_probs], axis=0)
    rows = []
    for log_p, summed in zip(log_probs, span_log_probs, strict=True):
        p = np.exp(log_p)
        kl = np.sum(p * (log_p - np.log(mixture)))
        rows.append([-np.sum(p * log_p), p.max(), summed / span_length, kl])
    return np.array(rows)


def agreement(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """How alike two predictions are, token by token."""
    return sum(float(np.sqrt(np.exp(p) * np.exp(q))) for p, q in zip(log_p, log_q, strict=True))


def decode_row(
    members: Sequence[LM],
    prompt: Sequence[int],
    key: jax.Array,
    choose_weights: Callable[[int, list[np.ndarray], np.ndarray], np.ndarray],
    *,
    fusion: str = "linear",
    span_length: int = 4,
    max_new_tokens: int = 16,
    min_new_tokens: int = 0,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    end_ids: Sequence[int] = (),
) -> Row:
    """One row. `choose_weights(span, hidden, stats)` gives the span's weights."""
    ids, row = list(prompt), Row([], False, [], [], [], [], [], [])
    vocab = min(lm.config.vocab for lm in members)
    span_log_probs = np.zeros(len(members))
    for step in range(max_new_tokens):
        hidden, log_probs = map(list, zip(*(read(lm, ids) for lm in members), strict=True))
        log_probs = [log_softmax(log_p[:vocab]) for log_p in log_probs]
        if step % span_length == 0:
            stats = describe(log_probs, span_log_probs, span_length)
            row.hidden.append(hidden)
            row.stats.append(stats)
            row.agreement.append(np.array([[agreement(p, q) for q in log_probs] for p in log_probs]))
            row.weights.append(np.asarray(choose_weights(step // span_length, hidden, stats), np.float64))
            span_log_probs = np.zeros(len(members))
        fused = log_softmax(FUSIONS[fusion](log_probs, row.weights[-1]))
        plain = fused.copy()
        for token in set(ids):
            fused[token] *= repetition_penalty
        if step < min_new_tokens:
            fused[list(end_ids)] = -np.inf
        if temperature == 0:
            token = int(np.argmax(fused))
        else:
            noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, step), (vocab,)), np.float64)
            token = int(np.argmax(truncate(fused / temperature, top_k, top_p, min_p) + noise))
        row.scores.append(plain[token])
        row.attribution.append(np.array([log_p[token] for log_p in log_probs]))
        span_log_probs += row.attribution[-1]
        ids.append(token)
        row.tokens.append(token)
        if token in end_ids:
            row.ended = True
            break
    return row
