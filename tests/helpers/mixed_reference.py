"""Decoding over a union vocabulary as one would write it first: one row at a time, no cache, numpy in float64.

Every member re-reads its whole text for every step; what may be written is asked of Python's own UTF-8 decoder. Shared
with the program are the members' uncached forward pass, the union vocabulary (tested by itself) and the random bits.
"""

import codecs
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlae_jax.fusion.vocabulary import UnionVocabulary
from rlae_jax.models import LM
from tests.helpers import reference
from tests.helpers.reference import log_softmax


@dataclasses.dataclass
class Row:
    """What one row wrote."""

    entries: list[int]  # end entry included
    ids: list[list[int]]  # of each member, prompt included
    text: bytes
    ended: bool
    weights: list[np.ndarray]  # [K] per span
    scores: list[float]
    attribution: list[np.ndarray]  # [K] per step


class Mixed:
    """Members and their union."""

    def __init__(self, members: Sequence[LM], union: UnionVocabulary):
        self.members, self.union = members, union
        self.bytes = [union.entry_bytes(e) for e in range(union.size)]
        self._allowed: dict[bytes, np.ndarray] = {}

    def spell(self, k: int, entry: int) -> list[int]:
        ids, offsets = self.union.spell_ids[k], self.union.spell_offsets[k]
        return ids[offsets[entry] : offsets[entry + 1]].tolist()

    def allowed(self, pending: bytes) -> np.ndarray:
        """The entries that may follow the first bytes of a character (nothing: a whole one)."""
        if pending not in self._allowed:
            out = np.zeros(self.union.size, bool)
            for e, piece in enumerate(self.bytes):
                if not self.union.choosable[e]:
                    continue
                if self.union.control[e]:
                    out[e] = not pending
                    continue
                try:
                    codecs.getincrementaldecoder("utf-8")("strict").decode(pending + piece)
                    out[e] = True
                except UnicodeDecodeError:
                    pass
            self._allowed[pending] = out
        return self._allowed[pending]

    def read(self, k: int, ids: Sequence[int]) -> np.ndarray:
        """Member k's log-probabilities of its own next token."""
        return log_softmax(reference.read(self.members[k], ids, 160)[1][: len(self.union.own[k])])

    def exact(self, k: int, own: np.ndarray) -> np.ndarray:
        out = np.full(self.union.size, -np.inf)
        for i, entry in enumerate(self.union.own[k]):
            if entry >= 0:
                out[entry] = own[i]
        return out

    def first(self, k: int, own: np.ndarray) -> np.ndarray:
        out = np.full(self.union.size, -np.inf)
        for e in range(self.union.size):
            spelled = self.spell(k, e)
            if spelled:
                out[e] = own[spelled[0]]
        return out

    def decode_row(
        self,
        prompts: Sequence[Sequence[int]],
        key: jax.Array,
        choose_weights: Callable[[int], np.ndarray],
        *,
        fuse: Callable[[list[np.ndarray], list[np.ndarray], np.ndarray], np.ndarray] | None = None,
        span_length: int = 4,
        max_new_tokens: int = 8,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        member_tokens: int = 10**6,
    ) -> Row:
        """One row. `fuse(exact, own, weights)` is the operator, by default the linear one."""
        ids = [list(prompt) for prompt in prompts]
        row = Row([], ids, b"", False, [], [], [])
        pending, seen = b"", set(prompts[0])
        for step in range(max_new_tokens):
            if step % span_length == 0:
                row.weights.append(np.asarray(choose_weights(step // span_length), np.float64))
            own = [self.read(k, ids[k]) for k in range(len(ids))]
            allowed = self.allowed(pending)
            exact = [np.where(allowed, self.exact(k, p), -np.inf) for k, p in enumerate(own)]
            with np.errstate(invalid="ignore", divide="ignore"):
                if fuse is None:
                    fused = np.log(sum(w * np.exp(p) for w, p in zip(row.weights[-1], exact, strict=True)))
                else:
                    fused = fuse(exact, own, row.weights[-1])
            fused = np.where(allowed & ~np.isnan(fused), fused, -np.inf)
            if step < min_new_tokens:
                fused[self.union.ends] = -np.inf
            scored = plain = fused - fused.max() - np.log(np.exp(fused - fused.max()).sum())
            if repetition_penalty != 1:
                scored = scored.copy()
                scored[list(seen)] *= repetition_penalty
            if temperature == 0:
                entry = int(np.argmax(scored))
            else:
                noise = np.asarray(jax.random.gumbel(jax.random.fold_in(key, step), scored.shape), np.float64)
                kept = reference.truncate(scored / temperature, top_k, top_p)
                if min_p:
                    kept[kept < kept.max() + np.log(min_p)] = -np.inf
                entry = int(np.argmax(kept + noise))
            spelled = [self.spell(k, entry) for k in range(len(ids))]
            if any(len(ids[k]) - len(prompts[k]) + len(spelled[k]) > member_tokens for k in range(len(ids))):
                break
            row.attribution.append(np.array([own[k][s[0]] if s else -np.inf for k, s in enumerate(spelled)]))
            row.scores.append(plain[entry])
            row.entries.append(entry)
            seen.add(entry)
            for k, more in enumerate(spelled):
                ids[k] += more
            if self.union.ends[entry]:
                row.ended = True
                break
            row.text += self.bytes[entry]
            decoder = codecs.getincrementaldecoder("utf-8")("strict")
            decoder.decode(pending + self.bytes[entry])
            pending = decoder.getstate()[0]
        return row
