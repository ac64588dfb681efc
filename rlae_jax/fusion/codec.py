"""Between texts and rows of ids, on the host: one codec for members with one tokenizer, one for a union vocabulary.

`make_codec` chooses. Both have the same few functions, so that `Ensemble` does not know which it has. A row is a
prompt's ids, or a tuple of each member's, with different tokenizers and with chat templates that differ; a chosen token
is an id, or an entry of the union.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np

from rlae_jax.errors import SHOWN_PER_KIND, InputError, grouped_error
from rlae_jax.fusion import vocabulary as vocabularies
from rlae_jax.fusion.prompts import Row
from rlae_jax.fusion.spec import Spelling, UnionTables
from rlae_jax.models import LM, chat_templates
from rlae_jax.models.tokenizer import told

# A text, or a chat's messages: {"role": ..., "content": ...}.
Prompt = str | Sequence[Mapping[str, Any]]


@runtime_checkable
class Codec(Protocol):
    """See the module's text."""

    @property
    def members(self) -> tuple[LM, ...]: ...

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a text."""
        ...

    @property
    def member_ends(self) -> tuple[tuple[int, ...], ...]:
        """Each member's own ids that end a text."""
        ...

    @property
    def union(self) -> vocabularies.UnionVocabulary | None:
        """The union vocabulary; None with one tokenizer."""
        ...

    @property
    def vocab(self) -> int:
        """V: how many tokens, or entries, there are."""
        ...

    @property
    def tables(self) -> UnionTables:
        """What the compiled loop reads of the vocabulary, where members take in the text at their own pace."""
        ...

    def own_prompts(self, chat: bool) -> bool:
        """Whether each member reads prompts in ids of its own."""
        ...

    def encode(self, prompts: Sequence[Prompt], chat: bool) -> list[Row]:
        """Each prompt's ids; with `chat` each may be a chat's messages."""
        ...

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """The tokens that texts leave out, such as <|im_end|>, with what they are called."""
        ...

    def decode(self, prompts: Sequence[Row], tokens: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        """The text of each row's tokens, as they continue its prompt; `special` keeps special tokens in it."""
        ...

    def first_member_ids(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Each row's tokens as ids of the first member."""
        ...

    def start(self) -> Row:
        """What stands before a text without a prompt: each member's token for it, or else one that ends a text."""
        ...

    def continuation(self, prompt: str, text: str, joined: bool, cut: int | None = 0) -> list[int]:
        """A text's tokens; `joined`: as they continue the prompt, if the tokenizer segments the prompt alike with and
        without them. With different tokenizers in the segmentation of member `cut`; None takes the longest entry
        everywhere, from the left."""
        ...

    def spell(self, tokens: Sequence[int]) -> tuple[tuple[list[int], list[int]], ...]:
        """Each member's own ids of some tokens, and how many of them each token is."""
        ...

    def split(self, text: str) -> tuple[Row, list[int]]:
        """A text as what must be given, a token of every member at least, and the tokens behind it, in the first
        member's segmentation."""
        ...

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of tokens of each prompt, of the member that needs most."""
        ...

    def check_ids(self, rows: Sequence[Row]) -> None:
        """Raises an `InputError` for ids that some member's embedding does not have: a lookup would clamp them."""
        ...

    def room(self, steps: int) -> int:
        """The tokens that each member gets room for by default in so many steps."""
        ...

    def pieces(self) -> Sequence[bytes | None]:
        """The bytes that each token stands for; None for special ones."""
        ...


@dataclasses.dataclass(frozen=True, eq=False)
class TokenCodec:
    """Of members that read and write the same ids."""

    members: tuple[LM, ...]
    end_ids: tuple[int, ...]

    @property
    def member_ends(self) -> tuple[tuple[int, ...], ...]:
        return (self.end_ids,) * len(self.members)

    @property
    def union(self) -> None:
        return None

    @property
    def vocab(self) -> int:
        return min(lm.config.usable_vocab for lm in self.members)

    @functools.cached_property
    def tables(self) -> UnionTables:
        ids = jnp.arange(self.vocab, dtype=jnp.int32)
        spelling = Spelling(ids, ids, ids, ids, jnp.arange(self.vocab + 1, dtype=jnp.int32))
        return UnionTables((spelling,) * len(self.members), jnp.zeros((8, self.vocab), jnp.int8))

    def own_prompts(self, chat: bool) -> bool:
        return chat and self._own_templates

    @functools.cached_property
    def _own_templates(self) -> bool:
        """Whether the members' chat templates differ, or the special tokens that these write."""
        templates = list(map(_template, self.members))
        return any(template != templates[0] for template in templates)

    def encode(self, prompts: Sequence[Prompt], chat: bool) -> list[Row]:
        if self.own_prompts(chat):
            return list(zip(*(_encode(lm, prompts, chat) for lm in self.members), strict=True))
        return list(_encode(self.members[0], prompts, chat))

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        return _special_tokens(self.members[0].require_tokenizer())

    def decode(self, prompts: Sequence[Row], tokens: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        # An answer continues its prompt; an encoder-decoder's is a text of its own.
        before: list[Sequence[int]] = [()] * len(tokens)
        if self.members[0].config.encoder is None:
            before = [_of_members(row, 1)[0] for row in prompts]
        return decode_texts(self.members[0].require_tokenizer(), before, tokens, special)

    def first_member_ids(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        return [list(row) for row in tokens]

    def start(self) -> Row:
        return [_start(self.members[0], self.end_ids)]

    def continuation(self, prompt: str, text: str, joined: bool, cut: int | None = 0) -> list[int]:
        return _continuation(self.members[cut or 0], prompt, text, joined)

    def spell(self, tokens: Sequence[int]) -> tuple[tuple[list[int], list[int]], ...]:
        return ((list(tokens), [1] * len(tokens)),) * len(self.members)

    def split(self, text: str) -> tuple[Row, list[int]]:
        (ids,) = self.encode([text], False)
        return ids[:1], ids[1:]

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        return [max(map(len, _of_members(row, 1))) for row in rows]

    def check_ids(self, rows: Sequence[Row]) -> None:
        each = zip(*(_of_members(row, len(self.members)) for row in rows), strict=True)
        for lm, own in zip(self.members, each, strict=True):
            _check_ids(lm, own)

    def room(self, steps: int) -> int:
        return steps

    def pieces(self) -> Sequence[bytes | None]:
        return vocabularies.token_bytes(self.members[0].require_tokenizer(), self.members[0].name)


@dataclasses.dataclass(frozen=True, eq=False)
class UnionCodec:
    """Of members with different tokenizers."""

    members: tuple[LM, ...]
    member_ends: tuple[tuple[int, ...], ...]
    union: vocabularies.UnionVocabulary

    @functools.cached_property
    def end_ids(self) -> tuple[int, ...]:
        return tuple(np.flatnonzero(self.union.ends).tolist())

    @property
    def vocab(self) -> int:
        return self.union.size

    @functools.cached_property
    def tables(self) -> UnionTables:
        union = self.union
        spellings = tuple(
            Spelling(
                partner=jnp.asarray(union.partner[k]),
                first=jnp.asarray(union.first(k)),
                own=jnp.asarray(union.own[k]),
                ids=jnp.asarray(union.spell_ids[k]),
                offsets=jnp.asarray(union.spell_offsets[k]),
            )
            for k in range(union.members)
        )
        return UnionTables(spellings, jnp.asarray(np.where(union.choosable, union.utf8, -1).astype(np.int8)))

    def own_prompts(self, chat: bool) -> bool:
        del chat
        return True

    def encode(self, prompts: Sequence[Prompt], chat: bool) -> list[Row]:
        return list(zip(*(_encode(lm, prompts, chat) for lm in self.members), strict=True))

    @functools.cached_property
    def special_tokens(self) -> Mapping[int, str]:
        return {
            int(own[i]): text
            for own, lm in zip(self.union.own, self.members, strict=True)
            for i, text in _special_tokens(lm.tokenizer).items()
            if i < len(own) and own[i] >= 0
        }

    def decode(self, prompts: Sequence[Row], tokens: Sequence[Sequence[int]], special: bool = False) -> list[str]:
        del prompts
        named = self.special_tokens if special else {}
        rows = [[named[e].encode() if e in named else self.union.entry_bytes(e) for e in row] for row in tokens]
        # The last character may have been cut; all others are whole.
        return [b"".join(row).decode("utf-8", errors="ignore") for row in rows]

    def first_member_ids(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        ids, offsets = self.union.spell_ids[0], self.union.spell_offsets[0]
        return [[i for e in row for i in ids[offsets[e] : offsets[e + 1]].tolist()] for row in tokens]

    def start(self) -> Row:
        return tuple([_start(lm, ends)] for lm, ends in zip(self.members, self.member_ends, strict=True))

    def continuation(self, prompt: str, text: str, joined: bool, cut: int | None = 0) -> list[int]:
        if cut is None:
            return self._longest(text)
        return [int(self.union.own[cut][i]) for i in _continuation(self.members[cut], prompt, text, joined)]

    def _longest(self, text: str) -> list[int]:
        """A text in the longest entries from the left, of those that every member can write.

        Raises:
          InputError: a character that none of them begins.
        """
        lengths, entries = self._by_bytes
        data, at, found = text.encode(), 0, []
        while at < len(data):
            own = (entries.get(data[at : at + n]) for n in lengths)
            entry = next((entry for entry in own if entry is not None), None)
            if entry is None:
                left = data[at:].decode(errors="replace")
                raise InputError(
                    f"no entry that all members can write begins {left[:20]!r}; cut texts as a member does"
                )
            found.append(entry)
            at += len(self.union.entry_bytes(entry))
        return found

    @functools.cached_property
    def _by_bytes(self) -> tuple[list[int], dict[bytes, int]]:
        """The lengths of the entries that every member can write, the longest first, and these by their bytes: of
        several those that more members have as a token."""
        union = self.union
        owners = np.sum([partner >= 0 for partner in union.partner], axis=0)
        kept = np.flatnonzero(union.choosable & ~union.control & ~union.ends)
        ordered = kept[np.argsort(owners[kept], kind="stable")]
        entries = {union.entry_bytes(entry): int(entry) for entry in ordered}
        return sorted({len(own) for own in entries}, reverse=True), entries

    def spell(self, tokens: Sequence[int]) -> tuple[tuple[list[int], list[int]], ...]:
        spelled = []
        for ids, offsets in zip(self.union.spell_ids, self.union.spell_offsets, strict=True):
            each = [ids[offsets[e] : offsets[e + 1]].tolist() for e in tokens]
            spelled.append(([i for own in each for i in own], list(map(len, each))))
        return tuple(spelled)

    def split(self, text: str) -> tuple[Row, list[int]]:
        (rows,) = self.encode([text], False)
        # What a tokenizer puts before a text is given; without it, or without another's, so is the first entry.
        begins = [self._begin(k, ids) for k, ids in enumerate(rows)]
        entries = [int(self.union.own[0][i]) for i in rows[0][len(begins[0]) :]]
        if not all(begins):
            begins = [own + ids for own, (ids, _) in zip(begins, self.spell(entries[:1]), strict=True)]
            entries = entries[1:]
        return tuple(begins), entries

    def _begin(self, k: int, ids: list[int]) -> list[int]:
        """The first ids of a member's text that stand for none of its bytes."""
        entries = self.union.own[k][ids]
        real = (entries >= 0) & ~self.union.control[entries]
        return ids[: int(np.argmax(real)) if np.any(real) else len(ids)]

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        return [max(map(len, row)) for row in rows]

    def check_ids(self, rows: Sequence[Row]) -> None:
        for lm, own in zip(self.members, zip(*rows, strict=True), strict=True):
            _check_ids(lm, own)

    @functools.cached_property
    def _tokens_per_entry(self) -> int:
        """What 90% of the entries take at most, at least 2."""
        kept = self.union.choosable
        return max(2, *(int(np.quantile(self.union.lengths(k)[kept], 0.9)) for k in range(len(self.members))))

    def room(self, steps: int) -> int:
        return self._tokens_per_entry * steps + 8

    def pieces(self) -> Sequence[bytes | None]:
        return [self.union.entry_bytes(e) for e in range(self.union.size)]


def make_codec(members: Sequence[LM], end_ids: Any = None) -> Codec:
    """The codec of some members.

    Args:
      end_ids: ids that end a text; by default every member's own. With different tokenizers one list per member.

    Raises:
      InputError: members that cannot write one text; end ids outside the vocabulary, or not one list per member.
    """
    if same_tokenizer(members):
        ids = [i for lm in members for i in lm.config.end_ids] if end_ids is None else end_ids
        codec = TokenCodec(tuple(members), tuple(sorted(set(ids))))
        outside = [i for i in codec.end_ids if not 0 <= i < codec.vocab]
        if outside and end_ids is not None:
            raise InputError(f"end_ids {outside} lie outside the vocabulary of {codec.vocab}")
        return codec
    names = [lm.name for lm in members]
    for lm in members:
        if lm.config.encoder is not None:
            raise InputError(f"{lm.name} is an encoder-decoder: it needs members with its own tokenizer")
    ends = [_own_ends(lm) for lm in members] if end_ids is None else end_ids
    if len(ends) != len(names) or any(isinstance(ids, int | np.integer) for ids in ends):
        raise InputError(f"end_ids of members with different tokenizers must be {len(names)} lists, one per member")
    sizes = [lm.config.usable_vocab for lm in members]
    union = vocabularies.load_or_build([lm.tokenizer for lm in members], names, ends, sizes)
    return UnionCodec(tuple(members), tuple(tuple(ids) for ids in ends), union)


def _own_ends(lm: LM) -> tuple[int, ...]:
    """A member's end ids but for those that lie beyond its embedding: it never writes them."""
    return tuple(i for i in lm.config.end_ids if i < lm.config.vocab)


def same_tokenizer(members: Sequence[LM]) -> bool:
    """Whether all members read and write the same ids.

    Raises:
      InputError: members that cannot be told: some or all without a tokenizer, and vocabularies that differ.
    """
    first = members[0]
    same = True
    for other in members[1:]:
        if (first.tokenizer is None) != (other.tokenizer is None):
            raise InputError(f"{first.name} and {other.name}: one has a tokenizer and the other has none")
        if first.tokenizer is not None:
            same = same and first.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        elif first.config.vocab != other.config.vocab:
            raise InputError(
                f"{first.name} and {other.name} have no tokenizers and differ in vocabulary "
                f"({first.config.vocab} and {other.config.vocab}): without tokenizers their ids must be the same"
            )
    return same


def _of_members(row: Row, members: int) -> tuple[Sequence[int], ...]:
    """Each member's ids of a prompt, which are one list where they are alike."""
    return (row,) * members if isinstance(row[0], int | np.integer) else row


def _encode(lm: LM, prompts: Sequence[Prompt], chat: bool) -> list[list[int]]:
    """One member's ids of prompts; see `Ensemble.encode`."""
    tokenizer = lm.require_tokenizer()
    if chat:
        chats = [[{"role": "user", "content": one}] if isinstance(one, str) else list(one) for one in prompts]
        ids = chat_templates.encode(tokenizer, lm.name, chats)
    else:
        with told(lm.name, "its tokenizer cannot take these prompts"):
            ids = tokenizer(list(prompts))["input_ids"]
    empty = [("empty prompts", f"prompt {b}") for b, row in enumerate(ids) if not row]
    if empty:
        raise grouped_error("prompts without a single token", empty, "each prompt needs at least one token")
    return ids


def _start(lm: LM, ends: Sequence[int]) -> int:
    """The id that a member's texts begin with, or else one that ends them.

    Raises:
      InputError: there is none.
    """
    begin = lm.require_tokenizer().bos_token_id
    if begin is None and not ends:
        raise InputError(f"{lm.name} has no token that begins a text, and none that ends one; give its end_ids")
    return int(ends[0] if begin is None else begin)


def _template(lm: LM) -> tuple[Any, dict[str, Any]]:
    """A member's chat template, and the special tokens that it names."""
    template = getattr(lm.tokenizer, "chat_template", None)
    special = getattr(lm.tokenizer, "special_tokens_map", {})
    return template, {name: token for name, token in special.items() if name in str(template)}


def _check_ids(lm: LM, rows: Sequence[Sequence[int]], what: str = "prompt") -> None:
    """Raises an `InputError` for ids that a member's embedding does not have: a lookup would clamp them."""
    vocab = lm.config.vocab
    wrong = ((b, row) for b, row in enumerate(rows) if min(row) < 0 or max(row) >= vocab)
    outside = [(b, i) for b, row in wrong for i in row if not 0 <= i < vocab]
    if outside:
        names = {} if lm.tokenizer is None else lm.tokenizer.added_tokens_decoder
        shown = [f"{what} {b} has {i}" + (f" ({names[i]})" if i in names else "") for b, i in outside[:SHOWN_PER_KIND]]
        more = f" and {len(outside) - len(shown)} more" if len(outside) > len(shown) else ""
        raise InputError(
            f"ids that {lm.name} has no embedding of: {', '.join(shown)}{more}; ids from 0 to {vocab} - 1 exist"
        )


def _continuation(lm: LM, prompt: str, text: str, joined: bool) -> list[int]:
    """One member's ids of a text that continues a prompt; see `Codec.continuation`."""
    tokenizer = lm.require_tokenizer()
    ids: list[int] | None = None
    if joined:
        before, whole = (tokenizer(t)["input_ids"] for t in (prompt, prompt + text))
        if whole[: len(before)] == before:
            ids = whole[len(before) :]
    if ids is None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    lacking = [i for i in ids if i >= lm.config.usable_vocab]
    if lacking:
        raise InputError(f"{lm.name} can never write {text!r}: it has no embedding of its token {lacking[0]}")
    return ids


def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """The ids that decoding leaves out, with what they are called."""
    return {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}


def decode_texts(
    tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], special: bool = False
) -> list[str]:
    """What each row's tokens add to its prompt: decoding ids alone would lose a leading space. `special` keeps special
    tokens."""
    options = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode([list(prompt) for prompt in prompts], **options)
    whole = tokenizer.batch_decode([[*p, *t] for p, t in zip(prompts, tokens, strict=True)], **options)
    return [text[len(prefix) :] for prefix, text in zip(before, whole, strict=True)]
