"""Byte strings in a tokenizer's ids: as the tokenizer itself writes them where it does, otherwise by longest matches.

Byte strings and a tokenizer go in; a spelling per string comes out, as (ids, offsets).
"""

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int
from tokenizers import AddedToken, Tokenizer, normalizers

from rlae_jax.fusion.vocabulary.rows import Ids, Offsets, join, offsets_of, ranges
from rlae_jax.fusion.vocabulary.tokens import MARKER, Tokens, is_byte_level, nodes, parts_of, read_tokens
from rlae_jax.fusion.vocabulary.utf8 import utf8_states


class Speller:
    """Writes pieces of text in one tokenizer's ids, as it would within a text."""

    def __init__(self, tokenizer: Any, tokens: Tokens):
        backend = tokenizer.backend_tokenizer
        parts = parts_of(backend)
        # The model is shared, not copied. Control tokens are left out, so that their strings are text like any other.
        self.tokenizer = Tokenizer(backend.model)
        if is_byte_level(parts):
            for node in nodes(parts["pre_tokenizer"]):
                if "add_prefix_space" in node:
                    node["add_prefix_space"] = False
            frame = Tokenizer.from_str(json.dumps(parts))
            if frame.pre_tokenizer is not None:
                self.tokenizer.pre_tokenizer = frame.pre_tokenizer
            # Some have the alphabet as a normalizer; the others (NFC) would change the text.
            if any(node["type"] == "ByteLevel" for node in nodes(parts["normalizer"])):
                self.tokenizer.normalizer = normalizers.ByteLevel()
        else:
            self.tokenizer.normalizer = normalizers.Replace(" ", MARKER)
        texts: list[tuple[int, AddedToken]] = sorted(
            (i, token)
            for i, token in tokenizer.added_tokens_decoder.items()
            if not token.special and i < len(tokens.pieces)
        )
        self.tokenizer.add_tokens([token for _, token in texts])
        self.ids = np.arange(max(len(tokens.pieces), self.tokenizer.get_vocab_size() + len(texts)))
        for i, token in texts:
            self.ids[self.tokenizer.token_to_id(token.content)] = i

    def encode(self, texts: list[str]) -> tuple[Ids, Offsets]:
        """(ids, offsets), a row per text; what the tokenizer cannot write may be missing or unknown tokens."""
        try:
            rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # the library raises bare Exception where a model has no token for the unknown
            rows = [[] for _ in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return self.ids[flat], offsets_of(lengths)


def canonical_ids(tokens: Tokens, encode: Callable[[list[str]], tuple[Ids, Offsets]]) -> dict[bytes, int]:
    """The id of each byte string that the tokenizer itself emits for it: occurrence 0."""
    index: dict[bytes, int] = {}
    contested: dict[bytes, list[int]] = {}
    for i, piece in enumerate(tokens.pieces):
        if piece and index.setdefault(piece, i) != i:
            contested.setdefault(piece, [index[piece]]).append(i)
    open_choices = []
    for piece, ids in contested.items():
        literals = [i for i in ids if i not in tokens.fallback]
        index[piece] = min(literals or ids)
        if len(literals) > 1:
            open_choices.append(piece)
    texts = [(piece, text) for piece in open_choices if (text := _text(piece)) is not None]
    emitted, offsets = encode([text for _, text in texts])
    for (piece, _), start, stop in zip(texts, offsets[:-1], offsets[1:], strict=True):
        if stop - start == 1 and emitted[start] in contested[piece]:
            index[piece] = int(emitted[start])
    return index


def _text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


def _longest_match(piece: bytes, index: dict[bytes, int], longest: int) -> list[int]:
    """Ids whose bytes make up `piece`: at each place the longest token from which the end can be reached. [] if none.

    Args:
      longest: bytes of the longest token.
    """
    n = len(piece)
    steps = [0] * n + [n]  # bytes of the token to take at each place; 0: a dead end
    for start in reversed(range(n)):
        for stop in range(min(n, start + longest), start, -1):
            if steps[stop] and piece[start:stop] in index:
                steps[start] = stop - start
                break
    ids, start = [], 0
    while start < n and steps[start]:
        ids.append(index[piece[start : start + steps[start]]])
        start += steps[start]
    return ids


def _matching(
    pieces: tuple[np.ndarray, Offsets], spellings: tuple[Ids, Offsets], tokens: tuple[np.ndarray, Offsets]
) -> Bool[np.ndarray, " P"]:
    """Which spellings' tokens concatenate to exactly their piece. All arguments are (data, offsets); a token without
    bytes is a control token, and no part of a text."""
    ids, rows = spellings
    starts, lengths = tokens[1][ids], np.diff(tokens[1])[ids]
    bytes_before, controls_before = offsets_of(lengths), offsets_of(lengths == 0)
    piece_lengths = np.diff(pieces[1])
    good: Bool[np.ndarray, " P"] = (np.diff(bytes_before[rows]) == piece_lengths) & (
        np.diff(controls_before[rows]) == 0
    )
    written = tokens[0][ranges(starts, lengths)]
    kept = piece_lengths[good]
    same = written[ranges(bytes_before[rows[:-1][good]], kept)] == pieces[0][ranges(pieces[1][:-1][good], kept)]
    good[good] = np.diff(offsets_of(~same)[offsets_of(kept)]) == 0
    return good


def spell(
    entries: Sequence[bytes],
    control: Bool[np.ndarray, " U"],
    whole_text: Bool[np.ndarray, " U"],
    partner: Int[np.ndarray, " U"],
    speller: Speller,
    index: dict[bytes, int],
    token_table: tuple[np.ndarray, Offsets],
) -> tuple[Ids, Offsets]:
    """One member's ids for every entry, as (ids, offsets).

    Args:
      whole_text: entries that are valid UTF-8 by themselves: a tokenizer takes nothing else.
      index: the member's bytes -> id.
      token_table: the bytes of each id, as (data, offsets).
    """
    missing = (partner < 0) & ~control
    asked = np.flatnonzero(missing & whole_text)
    pieces = [entries[e] for e in asked.tolist()]
    ids, rows = speller.encode([piece.decode() for piece in pieces])
    good = _matching(join(pieces), (ids, rows), token_table)

    lengths = (partner >= 0).astype(np.int64)
    written, counts = asked[good], np.diff(rows)[good]
    lengths[written] = counts
    missing[written] = False
    longest = max(map(len, index), default=0)
    matched = {e: _longest_match(entries[e], index, longest) for e in np.flatnonzero(missing).tolist()}
    for entry, spelling in matched.items():
        lengths[entry] = len(spelling)

    offsets = offsets_of(lengths)
    spelled = np.empty(offsets[-1], np.int32)
    spelled[offsets[:-1][partner >= 0]] = partner[partner >= 0]
    spelled[ranges(offsets[written], counts)] = ids[ranges(rows[:-1][good], counts)]
    for entry, spelling in matched.items():
        spelled[offsets[entry] : offsets[entry + 1]] = spelling
    return spelled, offsets.astype(np.int32)


def spell_texts(
    pieces: Sequence[bytes | None], tokenizer: Any, name: str, size: int | None = None
) -> tuple[Ids, Offsets]:
    """A tokenizer's ids, below `size` if that is given, for each of many byte strings, as (ids, offsets). None where
    there are no bytes, or where it cannot write them.

    Raises:
      InputError: a tokenizer whose tokens stand for no bytes.
    """
    entries = [piece or b"" for piece in pieces]
    tokens = read_tokens(tokenizer, name, size)
    speller = Speller(tokenizer, tokens)
    index = canonical_ids(tokens, speller.encode)
    data, offsets = join(entries)
    partner = np.array([index.get(entry, -1) if entry else -1 for entry in entries], np.int32)
    table = join([piece or b"" for piece in tokens.pieces])
    return spell(entries, np.diff(offsets) == 0, utf8_states(data, offsets)[0] == 0, partner, speller, index, table)
