"""A union vocabulary: members with different tokenizers write one text in entries that each of them can spell.

Every token is turned into the bytes that it stands for. An entry is (bytes, occurrence): occurrence 0 is the id that a
tokenizer itself emits for those bytes, and the members share it. Duplicates (a literal "A" beside `<0x41>`), control
tokens and further end ids are entries of their own member alone, so that every member maps into the union one-to-one:
merging them would let a member that is alone choose another token than it does without the union.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from rlae_jax import caches
from rlae_jax.errors import InputError, OutputError, grouped_error
from rlae_jax.fusion.vocabulary.rows import join
from rlae_jax.fusion.vocabulary.spelling import Speller, canonical_ids, spell
from rlae_jax.fusion.vocabulary.tokens import backend_of, read_tokens
from rlae_jax.fusion.vocabulary.utf8 import utf8_states

FORMAT = 1  # of the stored tables; another number makes them anew


@dataclasses.dataclass(frozen=True, eq=False)
class UnionVocabulary:
    """U entries, K members with V_k ids each. Entries 0..V_0 - 1 are the first member's ids in order."""

    end: int  # the members' first end ids share this entry
    byte_data: UInt8[np.ndarray, " _N"]  # entry e's bytes are byte_data[byte_offsets[e] : byte_offsets[e + 1]]
    byte_offsets: Int[np.ndarray, " O"]  # O = U + 1
    own: tuple[Int[np.ndarray, " _V"], ...]  # a member's id -> entry; -1 for unused ids
    partner: tuple[Int[np.ndarray, " U"], ...]  # entry -> the member's id that is exactly this entry, or -1
    # Entry -> the member's ids that spell it: the partner if there is one; nothing for others' control tokens.
    spell_ids: tuple[Int[np.ndarray, " _N"], ...]
    spell_offsets: tuple[Int[np.ndarray, " O"], ...]
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

    def entry_bytes(self, entry: int | np.integer) -> bytes:
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
        """Writes a file of `caches`, whose content is an .npz archive, at once.

        Raises:
          OutputError: it cannot be written.
        """
        arrays: dict[str, Any] = {"format": np.array(FORMAT), "members": np.array(self.members)}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                arrays |= {f"{field.name}.{k}": array for k, array in enumerate(value)}
            else:
                arrays[field.name] = np.asarray(value)
        content = io.BytesIO()
        np.savez(content, **arrays)
        caches.store(path, content.getvalue())

    @classmethod
    def load(cls, path: Path) -> "UnionVocabulary":
        """What `save` wrote.

        Raises:
          InputError: the file is absent, not as it was written, or of another format.
        """
        content = io.BytesIO(caches.fetch(path))
        try:
            with np.load(content, allow_pickle=False) as stored:
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


def _check_ends(
    tokenizers: Sequence[Any],
    names: Sequence[str],
    end_ids: Sequence[Sequence[int]],
    sizes: Sequence[int | None],
) -> list[list[int]]:
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
    for tokenizer, name, given, size in zip(tokenizers, names, end_ids, sizes, strict=True):
        backend = backend_of(tokenizer, name)
        ids = list(dict.fromkeys(map(int, given)))
        unknown = [i for i in ids if i < 0 or i >= (size or i + 1) or backend.id_to_token(i) is None]
        if unknown:
            raise InputError(f"{name}: end_ids {unknown} are no ids of its tokenizer")
        # Stable: only the primary one moves.
        ordered.append(sorted(ids, key=lambda i: i != tokenizer.eos_token_id))
    return ordered


def build(
    tokenizers: Sequence[Any],
    names: Sequence[str],
    end_ids: Sequence[Sequence[int]],
    sizes: Sequence[int] | None = None,
) -> UnionVocabulary:
    """The union of the tokenizers' vocabularies.

    Args:
      tokenizers: fast tokenizers of transformers.
      names: what messages call the members.
      end_ids: each member's ids that end a text. The tokenizer's own end token, or else the first, is the shared end.
      sizes: how many ids each member's model has; tokens beyond are no entries. By default as many as its tokenizer.

    Raises:
      InputError: a tokenizer whose tokens stand for no bytes, no end ids, end ids that the tokenizer lacks.
    """
    limits = [None] * len(tokenizers) if sizes is None else sizes
    all_ends = _check_ends(tokenizers, names, end_ids, limits)
    members = []
    for tokenizer, name, ends, size in zip(tokenizers, names, all_ends, limits, strict=True):
        tokens = read_tokens(tokenizer, name, size)
        for i in ends:
            tokens.pieces[i] = None
        speller = Speller(tokenizer, tokens)
        members.append((tokens, speller, canonical_ids(tokens, speller.encode), ends))

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
    data, offsets = join(entries)
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
        spell(entries, control, utf8[0] == 0, partner[k], speller, index, join([p or b"" for p in tokens.pieces]))
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


def load_or_build(
    tokenizers: Sequence[Any],
    names: Sequence[str],
    end_ids: Sequence[Sequence[int]],
    sizes: Sequence[int] | None = None,
    cache: Path | None = None,
) -> UnionVocabulary:
    """`build`, kept on disk under a hash of the tokenizers, end ids and sizes.

    Args:
      cache: the directory; by default the user's for unions. One that cannot be used is no error.
    """
    limits = [None] * len(tokenizers) if sizes is None else sizes
    ends = _check_ends(tokenizers, names, end_ids, limits)
    digest = hashlib.sha256(json.dumps([FORMAT, ends, list(limits)]).encode())
    for tokenizer in tokenizers:
        digest.update(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).digest())
    directory = caches.place("unions", cache)
    if directory is None:
        return build(tokenizers, names, ends, sizes)
    path = directory / f"{digest.hexdigest()}.union"
    try:
        return UnionVocabulary.load(path)
    except InputError as error:
        if path.exists():
            warnings.warn(f"{error}; it is made anew", stacklevel=2)
        union = build(tokenizers, names, ends, sizes)
    with contextlib.suppress(OutputError):
        union.save(path)
    return union
