"""A union vocabulary: members with different tokenizers write one text in entries that each of them can spell.

Every token is turned into the bytes that it stands for. An entry is (bytes, occurrence): occurrence 0 is the id that a
tokenizer itself emits for those bytes, and the members share it. Duplicates (a literal "A" beside `<0x41>`), control
tokens and further end ids are entries of their own member alone, so that every member maps into the union one-to-one:
merging them would let a member that is alone choose another token than it does without the union.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8
from tokenizers import AddedToken, Tokenizer, models, normalizers

from rlae_jax.errors import InputError, grouped_error

FORMAT = 1  # of the stored tables; another number makes them anew
DEFAULT_CACHE = "~/.cache/rlae_jax/unions"
MARKER = "▁"  # U+2581, SentencePiece's space
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")

Ids = Int[np.ndarray, "N"]


# What tokens stand for.


@functools.cache
def _byte_alphabet() -> dict[int, int]:
    """GPT-2's characters for bytes: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + i: byte for i, byte in enumerate(others)}


def _nodes(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unfolded."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            for child in value if isinstance(value, list) else ():
                yield from _nodes(child)


def _parts(backend: Tokenizer) -> dict[str, Any]:
    """The tokenizer's JSON without its vocabulary, which takes a long time to parse."""
    frame = Tokenizer(models.BPE())
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        if getattr(backend, part) is not None:
            setattr(frame, part, getattr(backend, part))
    return json.loads(frame.to_str())


def _is_byte_level(parts: dict[str, Any]) -> bool | None:
    """True for byte-level tokens, False for SentencePiece's, None for neither. The decoder has the first word."""
    for part in ("decoder", "pre_tokenizer", "normalizer"):
        for node in _nodes(parts[part]):
            if node["type"] == "ByteLevel":
                return True
            replaces = node["type"] == "Replace" and MARKER in (node["content"], *node["pattern"].values())
            if replaces or (node["type"] == "Metaspace" and node["replacement"] == MARKER):
                return False
    return None


def _backend(tokenizer: Any, name: str) -> Tokenizer:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise InputError(
            f"{name}: {'no tokenizer' if tokenizer is None else type(tokenizer).__name__ + ' is no fast tokenizer'}; a "
            "union vocabulary needs one that the tokenizers library can read (tokenizer.json)"
        )
    return backend


@dataclasses.dataclass(frozen=True, eq=False)
class _Tokens:
    """What a tokenizer's ids stand for."""

    pieces: list[bytes | None]  # None: control or unused
    used: Bool[np.ndarray, " V"]
    fallback: frozenset[int]  # the ids of byte tokens like <0x41>


def _read_tokens(tokenizer: Any, name: str) -> _Tokens:
    backend = _backend(tokenizer, name)
    model = backend.model
    parts = _parts(backend)
    byte_level = _is_byte_level(parts)
    affixes = [getattr(model, affix, None) for affix in ("continuing_subword_prefix", "end_of_word_suffix")]
    if byte_level is None or any(affixes) or isinstance(model, models.WordPiece):
        raise InputError(
            f"{name}: its tokenizer ({type(model).__name__}) is neither byte-level nor SentencePiece-like, so that its "
            "tokens stand for no bytes; a union vocabulary cannot hold it"
        )
    byte_fallback = getattr(model, "byte_fallback", False) or any(
        node["type"] == "ByteFallback" for node in _nodes(parts["decoder"])
    )
    added = tokenizer.added_tokens_decoder
    vocab = {token: i for token, i in backend.get_vocab(with_added_tokens=False).items() if i not in added}
    size = max((*vocab.values(), *added), default=-1) + 1
    used = np.zeros(size, bool)
    used[list(vocab.values())] = True
    used[list(added)] = True
    pieces: list[bytes | None] = [None] * size
    fallback = set()
    if byte_level:
        alphabet = _byte_alphabet()
        strange = set().union(*vocab) - set(map(chr, alphabet))
        if strange:
            token = next(token for token in vocab if strange.intersection(token))
            raise InputError(
                f"{name}: the token {token!r} (id {vocab[token]}) has characters outside the byte-level alphabet, so "
                "that it stands for no bytes"
            )
        for token, i in vocab.items():
            pieces[i] = token.translate(alphabet).encode("latin-1")
    else:
        for token, i in vocab.items():
            byte = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
            if byte:
                fallback.add(i)
            pieces[i] = bytes.fromhex(byte[1]) if byte else token.replace(MARKER, " ").encode()
    for i, token in added.items():
        if not token.special:
            # SentencePiece's decoders read the marker in these too; byte-level ones leave them as they are.
            pieces[i] = (token.content if byte_level else token.content.replace(MARKER, " ")).encode()
    return _Tokens(pieces, used, frozenset(fallback))


def token_bytes(tokenizer: Any, name: str) -> list[bytes | None]:
    """The bytes that each id, from 0 to the largest, stands for; None for control tokens and unused ids.

    Args:
      tokenizer: a fast tokenizer of transformers, byte-level or SentencePiece-like.
      name: what messages call it.

    Raises:
      InputError: another kind of tokenizer, or a token that stands for no bytes.
    """
    return _read_tokens(tokenizer, name).pieces


# Lists of lists as (data, offsets): row r is data[offsets[r] : offsets[r + 1]].


def _offsets(lengths: Any) -> Ids:
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


def _ranges(starts: Ids, lengths: Ids) -> Ids:
    """start, start + 1, ..., start + length - 1 of every row, one after the other."""
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())


def _join(pieces: Sequence[bytes]) -> tuple[UInt8[np.ndarray, " N"], Ids]:
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    return np.frombuffer(b"".join(pieces), np.uint8), _offsets(lengths)


# UTF-8.

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


def utf8_states(data: UInt8[np.ndarray, " N"], offsets: Ids) -> Int[np.ndarray, "8 U"]:
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


# Spelling.


class _Speller:
    """Writes pieces of text in one tokenizer's ids, as it would within a text."""

    def __init__(self, tokenizer: Any, tokens: _Tokens):
        backend = tokenizer.backend_tokenizer
        parts = _parts(backend)
        # The model is shared, not copied. Control tokens are left out, so that their strings are text like any other.
        self.tokenizer = Tokenizer(backend.model)
        if _is_byte_level(parts):
            for node in _nodes(parts["pre_tokenizer"]):
                if "add_prefix_space" in node:
                    node["add_prefix_space"] = False
            frame = Tokenizer.from_str(json.dumps(parts))
            if frame.pre_tokenizer is not None:
                self.tokenizer.pre_tokenizer = frame.pre_tokenizer
            # Some have the alphabet as a normalizer; the others (NFC) would change the text.
            if any(node["type"] == "ByteLevel" for node in _nodes(parts["normalizer"])):
                self.tokenizer.normalizer = normalizers.ByteLevel()
        else:
            self.tokenizer.normalizer = normalizers.Replace(" ", MARKER)
        texts: list[tuple[int, AddedToken]] = sorted(
            (i, token) for i, token in tokenizer.added_tokens_decoder.items() if not token.special
        )
        self.tokenizer.add_tokens([token for _, token in texts])
        self.ids = np.arange(max(len(tokens.pieces), self.tokenizer.get_vocab_size() + len(texts)))
        for i, token in texts:
            self.ids[self.tokenizer.token_to_id(token.content)] = i

    def encode(self, texts: list[str]) -> tuple[Ids, Ids]:
        """(ids, offsets), a row per text; what the tokenizer cannot write may be missing or unknown tokens."""
        try:
            rows = [encoding.ids for encoding in self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
        except Exception:  # the library raises bare Exception where a model has no token for the unknown
            rows = [[] for _ in texts]
        lengths = np.fromiter(map(len, rows), np.int64, len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int64, int(lengths.sum()))
        return self.ids[flat], _offsets(lengths)


def _canonical(tokens: _Tokens, encode: Callable[[list[str]], tuple[Ids, Ids]]) -> dict[bytes, int]:
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
    pieces: tuple[np.ndarray, Ids], spellings: tuple[Ids, Ids], tokens: tuple[np.ndarray, Ids]
) -> Bool[np.ndarray, " N"]:
    """Which spellings' tokens concatenate to exactly their piece. All arguments are (data, offsets); a token without
    bytes is a control token, and no part of a text."""
    ids, rows = spellings
    starts, lengths = tokens[1][ids], np.diff(tokens[1])[ids]
    bytes_before, controls_before = _offsets(lengths), _offsets(lengths == 0)
    piece_lengths = np.diff(pieces[1])
    good = (np.diff(bytes_before[rows]) == piece_lengths) & (np.diff(controls_before[rows]) == 0)
    written = tokens[0][_ranges(starts, lengths)]
    kept = piece_lengths[good]
    same = written[_ranges(bytes_before[rows[:-1][good]], kept)] == pieces[0][_ranges(pieces[1][:-1][good], kept)]
    good[good] = np.diff(_offsets(~same)[_offsets(kept)]) == 0
    return good


# The union.


@dataclasses.dataclass(frozen=True, eq=False)
class UnionVocabulary:
    """U entries, K members with V_k ids each. Entries 0..V_0 - 1 are the first member's ids in order."""

    end: int  # the members' first end ids share this entry
    byte_data: UInt8[np.ndarray, " N"]  # entry e's bytes are byte_data[byte_offsets[e] : byte_offsets[e + 1]]
    byte_offsets: Int[np.ndarray, " U+1"]
    own: tuple[Int[np.ndarray, " V"], ...]  # a member's id -> entry; -1 for unused ids
    partner: tuple[Int[np.ndarray, " U"], ...]  # entry -> the member's id that is exactly this entry, or -1
    # Entry -> the member's ids that spell it: the partner if there is one; nothing for others' control tokens.
    spell_ids: tuple[Int[np.ndarray, " N"], ...]
    spell_offsets: tuple[Int[np.ndarray, " U+1"], ...]
    choosable: Bool[np.ndarray, " U"]  # every member can write it
    ends: Bool[np.ndarray, " U"]  # ends a text: the shared end and the members' further end ids
    control: Bool[np.ndarray, " U"]  # has no bytes
    utf8: Int[np.ndarray, "8 U"]  # see `utf8_states`

    @property
    def members(self) -> int:
        """K."""
        return len(self.own)

    @property
    def size(self) -> int:
        """U."""
        return len(self.control)

    def entry_bytes(self, entry: int) -> bytes:
        """What the entry adds to the text; nothing for control tokens and ends."""
        return self.byte_data[self.byte_offsets[entry] : self.byte_offsets[entry + 1]].tobytes()

    def lengths(self, k: int) -> Int[np.ndarray, " U"]:
        """How many tokens each entry takes member k; 0 for what it cannot spell and for others' control tokens."""
        return np.diff(self.spell_offsets[k])

    def first(self, k: int) -> Int[np.ndarray, " U"]:
        """The first id of each entry's spelling by member k, -1 where that has no ids."""
        return np.where(self.lengths(k) > 0, np.append(self.spell_ids[k], -1)[self.spell_offsets[k][:-1]], -1).astype(
            np.int32
        )

    def save(self, path: Path) -> None:
        """Writes an .npz file, at once."""
        arrays: dict[str, Any] = {"format": np.array(FORMAT), "members": np.array(self.members)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                arrays |= {f"{field.name}.{k}": array for k, array in enumerate(value)}
            else:
                arrays[field.name] = np.asarray(value)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "UnionVocabulary":
        """What `save` wrote.

        Raises:
          InputError: the file is absent, broken, or of another format.
        """
        try:
            # Opened here: numpy leaves a broken file open.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                if stored["format"] != FORMAT:
                    raise ValueError(f"format {stored['format']}, expected {FORMAT}")
                values: dict[str, Any] = {"end": int(stored["end"])}
                for field in dataclasses.fields(cls)[1:]:
                    if field.name in stored:
                        values[field.name] = stored[field.name]
                    else:
                        values[field.name] = tuple(stored[f"{field.name}.{k}"] for k in range(stored["members"]))
        except Exception as error:  # what a broken file raises depends on where it is broken
            raise InputError(f"{path}: no readable union vocabulary ({error})") from error
        return cls(**values)


def _check_ends(tokenizers: Sequence[Any], names: Sequence[str], end_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each member's end ids without repetitions, the one that all share first."""
    if not tokenizers or not len(tokenizers) == len(names) == len(end_ids):
        raise InputError(
            f"{len(tokenizers)} tokenizers, {len(names)} names, {len(end_ids)} lists of end ids: a union vocabulary "
            "needs at least one member, and one of each for every member"
        )
    findings = [("members with no end token", name) for name, ids in zip(names, end_ids, strict=True) if not len(ids)]
    if findings:
        raise grouped_error("the members cannot end a text together", findings, "give their end_ids")
    ordered = []
    for tokenizer, name, given in zip(tokenizers, names, end_ids, strict=True):
        backend = _backend(tokenizer, name)
        ids = list(dict.fromkeys(map(int, given)))
        unknown = [i for i in ids if i < 0 or backend.id_to_token(i) is None]
        if unknown:
            raise InputError(f"{name}: end_ids {unknown} are no ids of its tokenizer")
        # Stable: only the primary one moves.
        ordered.append(sorted(ids, key=lambda i: i != tokenizer.eos_token_id))
    return ordered


def build(tokenizers: Sequence[Any], names: Sequence[str], end_ids: Sequence[Sequence[int]]) -> UnionVocabulary:
    """The union of the tokenizers' vocabularies.

    Args:
      tokenizers: fast tokenizers of transformers.
      names: what messages call the members.
      end_ids: each member's ids that end a text. The tokenizer's own end token, or else the first, is the shared end.

    Raises:
      InputError: a tokenizer whose tokens stand for no bytes, no end ids, end ids that the tokenizer lacks.
    """
    all_ends = _check_ends(tokenizers, names, end_ids)
    members = []
    for tokenizer, name, ends in zip(tokenizers, names, all_ends, strict=True):
        tokens = _read_tokens(tokenizer, name)
        for i in ends:
            tokens.pieces[i] = None
        speller = _Speller(tokenizer, tokens)
        members.append((tokens, speller, _canonical(tokens, speller.encode), ends))

    entries: list[bytes] = []
    shared: dict[bytes, int] = {}
    end = all_ends[0][0]
    own = []
    for k, (tokens, _, index, ends) in enumerate(members):
        entry_of = np.full(len(tokens.pieces), -1, np.int32)
        for i, piece in enumerate(tokens.pieces):
            if k and not tokens.used[i]:
                continue
            entry = len(entries)
            if k and i == ends[0]:
                entry = end
            elif piece and index[piece] == i:
                entry = shared.setdefault(piece, len(entries))
            if entry == len(entries):
                entries.append(piece or b"")
            entry_of[i] = entry
        # The first member's unused ids have entries, so that its other ids keep their numbers.
        own.append(np.where(tokens.used, entry_of, -1).astype(np.int32))

    size = len(entries)
    data, offsets = _join(entries)
    control = np.diff(offsets) == 0
    utf8 = utf8_states(data, offsets)
    ends_mask, used = np.zeros(size, bool), np.zeros(size, bool)
    partner = []
    for entry_of, ends in zip(own, all_ends, strict=True):
        ends_mask[entry_of[ends]] = True
        used[entry_of[entry_of >= 0]] = True
        ids = np.full(size, -1, np.int32)
        ids[entry_of[entry_of >= 0]] = np.flatnonzero(entry_of >= 0)
        partner.append(ids)
    spellings = [
        _spell(entries, control, utf8[0] == 0, partner[k], speller, index, _join([p or b"" for p in tokens.pieces]))
        for k, (tokens, speller, index, _) in enumerate(members)
    ]
    choosable = used.copy()
    for _, spell_offsets in spellings:
        choosable &= control | (np.diff(spell_offsets) > 0)
    return UnionVocabulary(
        end=end,
        byte_data=data,
        byte_offsets=offsets.astype(np.int32),
        own=tuple(own),
        partner=tuple(partner),
        spell_ids=tuple(ids for ids, _ in spellings),
        spell_offsets=tuple(spell_offsets for _, spell_offsets in spellings),
        choosable=choosable,
        ends=ends_mask,
        control=control,
        utf8=utf8,
    )


def _spell(
    entries: Sequence[bytes],
    control: Bool[np.ndarray, " U"],
    whole_text: Bool[np.ndarray, " U"],
    partner: Int[np.ndarray, " U"],
    speller: _Speller,
    index: dict[bytes, int],
    token_table: tuple[np.ndarray, Ids],
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " U+1"]]:
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
    good = _matching(_join(pieces), (ids, rows), token_table)

    lengths = (partner >= 0).astype(np.int64)
    written, counts = asked[good], np.diff(rows)[good]
    lengths[written] = counts
    missing[written] = False
    longest = max(map(len, index), default=0)
    matched = {e: _longest_match(entries[e], index, longest) for e in np.flatnonzero(missing).tolist()}
    for entry, spelling in matched.items():
        lengths[entry] = len(spelling)

    offsets = _offsets(lengths)
    spelled = np.empty(offsets[-1], np.int32)
    spelled[offsets[:-1][partner >= 0]] = partner[partner >= 0]
    spelled[_ranges(offsets[written], counts)] = ids[_ranges(rows[:-1][good], counts)]
    for entry, spelling in matched.items():
        spelled[offsets[entry] : offsets[entry + 1]] = spelling
    return spelled, offsets.astype(np.int32)


def spell_texts(
    pieces: Sequence[bytes | None], tokenizer: Any, name: str
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " V+1"]]:
    """A tokenizer's ids for each of many byte strings, as (ids, offsets). None where there are no bytes, or where it
    cannot write them.

    Raises:
      InputError: a tokenizer whose tokens stand for no bytes.
    """
    entries = [piece or b"" for piece in pieces]
    tokens = _read_tokens(tokenizer, name)
    speller = _Speller(tokenizer, tokens)
    index = _canonical(tokens, speller.encode)
    data, offsets = _join(entries)
    partner = np.array([index.get(entry, -1) if entry else -1 for entry in entries], np.int32)
    table = _join([piece or b"" for piece in tokens.pieces])
    return _spell(entries, np.diff(offsets) == 0, utf8_states(data, offsets)[0] == 0, partner, speller, index, table)


def load_or_build(
    tokenizers: Sequence[Any], names: Sequence[str], end_ids: Sequence[Sequence[int]], cache: Path | None = None
) -> UnionVocabulary:
    """`build`, kept on disk under a hash of the tokenizers and end ids.

    Args:
      cache: the directory; by default `DEFAULT_CACHE`. One that cannot be written is no error.
    """
    ends = _check_ends(tokenizers, names, end_ids)
    digest = hashlib.sha256(json.dumps([FORMAT, ends]).encode())
    for tokenizer in tokenizers:
        digest.update(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest())
    directory = Path(os.path.expanduser(DEFAULT_CACHE)) if cache is None else Path(cache)
    path = directory / f"{digest.hexdigest()}.npz"
    try:
        return UnionVocabulary.load(path)
    except InputError:  # absent or broken
        union = build(tokenizers, names, ends)
    with contextlib.suppress(OSError):
        union.save(path)
    return union
