"""The union vocabulary: bytes of tokens, one-to-one entries, spellings, characters, the file on disk."""

import codecs
import collections
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlae_jax.errors import InputError
from rlae_jax.fusion.vocabulary import UnionVocabulary, build, load_or_build, token_bytes
from rlae_jax.fusion.vocabulary import union as unions
from rlae_jax.fusion.vocabulary.rows import join
from rlae_jax.fusion.vocabulary.utf8 import utf8_states
from rlae_jax.models.lm import read_tokenizer
from tests.helpers.tokenizers import BYTE_CHARACTERS, byte_level, sentencepiece

REAL = {
    "gpt2": "tokenizers/gpt2",
    "neox": "tokenizers/neox",
    "mistral_v3": "tokenizers/mistral_v3",
    "stories": "models/stories260K",
}


@pytest.fixture(scope="module")
def real(shared: Path) -> dict[str, Any]:
    return {name: read_tokenizer(shared / path) for name, path in REAL.items()}


@pytest.fixture(scope="module")
def pair(real: dict[str, Any]) -> UnionVocabulary:
    return build([real["gpt2"], real["mistral_v3"]], ["gpt2", "mistral_v3"], [[50256], [2]])


def check_union(union: UnionVocabulary, tokenizers: Sequence[Any], end_ids: Sequence[Sequence[int]]) -> None:
    """Everything that must hold of any union, the slow way. The first of the end ids is the shared one."""
    pieces = [token_bytes(tokenizer, "") for tokenizer in tokenizers]
    vocabs = [set(tokenizer.get_vocab().values()) for tokenizer in tokenizers]
    for k, ends in enumerate(end_ids):
        for i in ends:
            pieces[k][i] = None
    entries = [union.entry_bytes(e) for e in range(union.size)]
    assert union.members == len(tokenizers)
    writers: list[list[tuple[int, int]]] = [[] for _ in entries]  # (member, id)
    for k, own in enumerate(union.own):
        assert len(own) == len(pieces[k])
        used = [i for i in range(len(own)) if own[i] >= 0]
        assert set(used) == vocabs[k]
        assert len(set(own[used])) == len(used)
        np.testing.assert_array_equal(union.partner[k][own[used]], used)
        assert np.sum(union.partner[k] >= 0) == len(used)
        for i in used:
            assert entries[own[i]] == (pieces[k][i] or b"")
            writers[own[i]].append((k, i))
        assert own[end_ids[k][0]] == union.end
        assert all(union.ends[own[i]] for i in end_ids[k])
    np.testing.assert_array_equal(union.own[0][union.own[0] >= 0], sorted(vocabs[0]))
    assert union.ends.sum() == 1 + sum(len(ends) - 1 for ends in end_ids)
    # What several members share is the end or bytes that no other shared entry has; entries come in the members' order.
    texts = [piece for e, piece in enumerate(entries) if len(writers[e]) > 1 and e != union.end]
    assert all(texts)
    assert len(set(texts)) == len(texts)
    first_writers = [min(writer) for writer in writers[len(pieces[0]) :]]
    assert first_writers == sorted(first_writers)
    # Bytes that several members have tokens for have one entry that all of those share.
    havers = collections.Counter(piece for own in pieces for piece in set(own) if piece)
    together = collections.Counter(entries[e] for e, own in enumerate(writers) if entries[e] and len(own) > 1)
    assert together == {piece: 1 for piece, n in havers.items() if n > 1}
    assert all(len(own) in (1, havers[entries[e]]) for e, own in enumerate(writers) if entries[e])

    for k in range(union.members):
        first, lengths = union.first(k), union.lengths(k)
        for e, piece in enumerate(entries):
            spelling = union.spell_ids[k][union.spell_offsets[k][e] : union.spell_offsets[k][e + 1]]
            assert len(spelling) == lengths[e]
            assert first[e] == (spelling[0] if len(spelling) else -1)
            if union.partner[k][e] >= 0:
                assert list(spelling) == [union.partner[k][e]]
            elif len(spelling):
                assert piece
                assert b"".join(pieces[k][i] or b"control" for i in spelling) == piece
    spelled = np.array([union.lengths(k) > 0 for k in range(union.members)])
    np.testing.assert_array_equal(union.control, [not piece for piece in entries])
    np.testing.assert_array_equal(
        union.choosable, np.all(spelled | union.control, axis=0) & np.array([bool(writer) for writer in writers])
    )


def spelling(union: UnionVocabulary, k: int, entry: int) -> list[int]:
    return union.spell_ids[k][union.spell_offsets[k][entry] : union.spell_offsets[k][entry + 1]].tolist()


def entry_of(union: UnionVocabulary, piece: bytes) -> list[int]:
    """Entries with these bytes."""
    return [e for e in range(union.size) if union.entry_bytes(e) == piece]


class TestTokenBytes:
    @pytest.mark.parametrize("name", REAL)
    def test_a_text_is_the_bytes_of_its_tokens(self, real: dict[str, Any], name: str) -> None:
        tokenizer = real[name]
        pieces = token_bytes(tokenizer, name)
        controls = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]

        def written(text: str) -> str:
            """The text as the tokenizer means it."""
            normalised = {
                "gpt2": text,
                "neox": tokenizer.backend_tokenizer.normalizer.normalize_str(text) if name == "neox" else "",
                # Metaspace adds a space unless there is one, Prepend always.
                "mistral_v3": text if text.startswith((" ", "▁")) else " " + text,
                "stories": " " + text,
            }[name]
            return normalised if name in ("gpt2", "neox") or not text else normalised.replace("▁", " ")

        interesting = st.sampled_from(
            ["é", "é", "  ", " " * 30, "\n\n", "\t", "▁", "日本", "👩‍👩‍👧", "�", "<0x41>", ". ,"]
        )

        @settings(max_examples=150)
        @given(st.lists(st.text() | interesting, max_size=8).map("".join))
        def check(text: str) -> None:
            if any(control in text for control in controls):
                return
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert b"".join(pieces[i] for i in ids).decode() == (written(text) if text else "")

        check()

    def test_real_tokens(self, real: dict[str, Any]) -> None:
        neox, mistral = token_bytes(real["neox"], "neox"), token_bytes(real["mistral_v3"], "mistral_v3")
        gpt2 = token_bytes(real["gpt2"], "gpt2")
        assert neox[0] is None
        assert neox[1] is None
        assert neox[50254:50277] == [b" " * n for n in range(24, 1, -1)]
        assert mistral[:771].count(None) == 751
        assert mistral[2] is None
        assert mistral[real["mistral_v3"].convert_tokens_to_ids("<0xE9>")] == b"\xe9"
        assert mistral[real["mistral_v3"].convert_tokens_to_ids("é")] == "é".encode()
        assert gpt2[real["gpt2"].convert_tokens_to_ids("é")] == b"\xe9"
        assert gpt2[50256] is None
        assert len(token_bytes(real["stories"], "stories")) == 512

    def test_byte_tokens_need_byte_fallback(self) -> None:
        plain = PreTrainedTokenizerFast(
            tokenizer_object=sentencepiece(["<0x41>", "▁a"], byte_fallback=False).backend_tokenizer
        )
        assert token_bytes(plain, "plain")[3:] == [b"<0x41>", b" a"]
        assert token_bytes(sentencepiece(["▁a"]), "fallback")[3 + 0x41 :: 1000] == [b"A"]

    def test_unused_ids(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"▁a": 1, "b": 4}, unk_token="b"))
        tokenizer.decoder = decoders.Metaspace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        assert token_bytes(fast, "gaps") == [None, b" a", None, None, b"b"]

    def test_alphabet_is_the_librarys(self) -> None:
        assert set(BYTE_CHARACTERS.values()) == set(pre_tokenizers.ByteLevel.alphabet())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        for text in map(chr, [*range(0x800), 0x20AC, 0x10FFFF]):
            assert level.pre_tokenize_str(text)[0][0] == "".join(BYTE_CHARACTERS[byte] for byte in text.encode())


class TestUnion:
    def test_real_pair(self, real: dict[str, Any], pair: UnionVocabulary) -> None:
        check_union(pair, [real["gpt2"], real["mistral_v3"]], [[50256], [2]])
        np.testing.assert_array_equal(pair.own[0], np.arange(50257))
        for text in (".", ",", "\n", "\t", "é", " the", "中", "€", "�"):
            assert sum(min(p[e] for p in pair.partner) >= 0 for e in entry_of(pair, text.encode())) == 1, text
        assert pair.choosable.all()

        texts = {pair.entry_bytes(e) for e in range(pair.size)} - {b""}
        both = np.sum((pair.partner[0] >= 0) & (pair.partner[1] >= 0) & ~pair.control)
        shares = [both / len({piece for piece in token_bytes(real[n], n) if piece}) for n in ("gpt2", "mistral_v3")]
        print(f"U {pair.size}; {len(texts)} distinct texts; shares {shares}")
        assert len(texts) + 1 == 60_909
        assert [round(share, 2) for share in shares] == [0.42, 0.67]
        assert [pair.lengths(k).max() for k in (0, 1)] == [16, 64]

    def test_emoji_and_broken_characters(self, real: dict[str, Any], pair: UnionVocabulary) -> None:
        """A character in parts stays what it is: bytes, never a replacement character or a letter of that number."""
        (letter,) = [e for e in entry_of(pair, "é".encode()) if pair.partner[0][e] >= 0]
        (raw,) = [e for e in entry_of(pair, b"\xe9") if pair.partner[0][e] >= 0]
        assert pair.partner[1][letter] == real["mistral_v3"].convert_tokens_to_ids("é")
        assert pair.partner[1][raw] == real["mistral_v3"].convert_tokens_to_ids("<0xE9>")
        assert pair.partner[0][raw] == real["gpt2"].convert_tokens_to_ids("é")
        for emoji in ("😀", "❤"):
            for name, k in (("gpt2", 0), ("mistral_v3", 1)):
                ids = real[name](emoji, add_special_tokens=False)["input_ids"]
                entries = pair.own[k][ids]
                assert b"".join(map(pair.entry_bytes, entries)).strip(b" ") == emoji.encode()
                other = 1 - k
                written = [i for e in entries for i in spelling(pair, other, e)]
                piece_of = token_bytes(real[("gpt2", "mistral_v3")[other]], "")
                assert b"".join(piece_of[i] for i in written).strip(b" ") == emoji.encode()

    def test_replacement_characters_are_text(self, real: dict[str, Any]) -> None:
        union = build([real["gpt2"], real["neox"]], ["gpt2", "neox"], [[50256], [0]])
        marked = [e for e in range(union.size) if b"\xef\xbf\xbd" in union.entry_bytes(e)]
        broken = [e for e in range(union.size) if union.utf8[0, e] != 0]
        assert marked
        assert broken
        assert not {union.entry_bytes(e) for e in marked if union.utf8[0, e] == 0} & set(map(union.entry_bytes, broken))
        for e in broken:
            for k in (0, 1):
                assert all(union.entry_bytes(union.own[k][i]) in union.entry_bytes(e) for i in spelling(union, k, e))
        # Bytes that no UTF-8 text has: gpt2 has tokens for them, neox none.
        off = {union.entry_bytes(e) for e in np.flatnonzero(~union.choosable)}
        assert off == {bytes([byte]) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))}

    @pytest.mark.parametrize("names", [("neox", "mistral_v3"), ("stories", "gpt2"), ("mistral_v3", "stories", "neox")])
    def test_real_combinations(self, real: dict[str, Any], names: Sequence[str]) -> None:
        tokenizers = [real[name] for name in names]
        ends = [[1] if name == "stories" else [real[name].eos_token_id] for name in names]
        union = build(tokenizers, names, ends)
        sample = np.random.default_rng(0).integers(0, union.size, 2000)
        for k, (tokenizer, name) in enumerate(zip(tokenizers, names, strict=True)):
            pieces = token_bytes(tokenizer, name)
            assert union.own[k][ends[k][0]] == union.end
            np.testing.assert_array_equal(union.partner[k][union.own[k]], np.arange(len(pieces)))
            for e in sample:
                assert b"".join(pieces[i] or b"" for i in spelling(union, k, e)) == (
                    union.entry_bytes(e) if union.lengths(k)[e] else b""
                )

    def test_spellings_are_the_tokenizers_own(self, real: dict[str, Any], pair: UnionVocabulary) -> None:
        """Within a text, so that SentencePiece adds no space, as it adds none after a line's end."""
        mistral = real["mistral_v3"]
        line_end = mistral("\n", add_special_tokens=False)["input_ids"]
        words = [e for e in range(50257) if pair.partner[1][e] < 0 and pair.entry_bytes(e).strip(b" ").isalpha()]
        assert len(words) > 1000
        for e in words[:500]:
            whole = mistral("\n" + pair.entry_bytes(e).decode(), add_special_tokens=False)["input_ids"]
            assert [*line_end, *spelling(pair, 1, e)] == whole
        words = [e for e in range(50257, pair.size) if pair.entry_bytes(e).decode("utf-8", "ignore").isalpha()]
        assert len(words) > 1000
        for e in words[:500]:
            text = pair.entry_bytes(e).decode()
            assert spelling(pair, 0, e) == real["gpt2"](text, add_special_tokens=False)["input_ids"]

    def test_control_strings_and_normalisers_change_nothing(self, real: dict[str, Any]) -> None:
        """What is a control token for one member is text for another; NFC would merge a letter and its accent."""
        pieces = [b"<|endoftext|>", b"x<|endoftext|>", "e\u0301".encode(), b" <|padding|>"]
        other = byte_level(pieces)
        union = build([other, real["neox"]], ["other", "neox"], [[other.eos_token_id], [0]])
        neox = token_bytes(real["neox"], "neox")
        for piece in pieces:
            ids = spelling(union, 1, entry_of(union, piece)[0])
            assert len(ids) > 1
            assert b"".join(neox[i] or b"" for i in ids) == piece

    def test_duplicates_ends_and_control_tokens_are_private(self) -> None:
        first = sentencepiece(["▁", "A", "B", "é", "▁A"])
        second = byte_level([b" A", "é".encode()], [AddedToken("<|pad|>", special=True), AddedToken("  ")])
        end, other_end = second.convert_tokens_to_ids(["</s>", "B"])
        ends = [[2], [other_end, end]]
        union = build([first, second], ["first", "second"], ends)
        check_union(union, [first, second], [[2], [end, other_end]])
        duplicate, literal = first.convert_tokens_to_ids(["<0x41>", "A"])
        assert union.partner[1][duplicate] == -1
        assert union.partner[1][literal] == second.convert_tokens_to_ids("A")
        assert spelling(union, 1, duplicate) == [second.convert_tokens_to_ids("A")]
        assert union.choosable[duplicate]
        # A second end has no bytes any more, so that the text "B" cannot be written by that member.
        private = union.own[1][other_end]
        assert union.ends[private]
        assert union.control[private]
        assert union.lengths(0)[private] == 0
        assert union.choosable[private]
        assert not union.choosable[first.convert_tokens_to_ids("B")]
        assert not union.choosable[first.convert_tokens_to_ids("<0x42>")]
        pad = union.own[1][second.convert_tokens_to_ids("<|pad|>")]
        assert union.control[pad]
        assert not union.ends[pad]
        assert union.utf8[:, pad].tolist() == [0] + [-1] * 7
        assert union.utf8[:, union.end].tolist() == [0] + [-1] * 7
        assert spelling(union, 0, union.own[1][second.convert_tokens_to_ids("  ")]) == [literal - 1] * 2

    def test_the_emitted_literal_is_shared(self, real: dict[str, Any]) -> None:
        """neox has runs of spaces twice: in its vocabulary and as added tokens, of which encoding emits the latter."""
        union = build([real["neox"], real["gpt2"]], ["neox", "gpt2"], [[0], [50256]])
        pieces = token_bytes(real["neox"], "neox")
        twice = [n for n in range(2, 25) if pieces.count(b" " * n) > 1]
        assert twice
        for n in twice:
            (emitted,) = real["neox"](" " * n, add_special_tokens=False)["input_ids"]
            for i in [i for i, piece in enumerate(pieces) if piece == b" " * n]:
                assert i == emitted or union.partner[1][i] == -1
            if b" " * n in token_bytes(real["gpt2"], "gpt2"):
                assert union.partner[1][emitted] >= 0

    def test_stories_end_with_their_start_token(self, real: dict[str, Any]) -> None:
        union = build([real["stories"], real["gpt2"]], ["stories", "gpt2"], [[1], [50256]])
        assert union.end == 1
        assert union.own[1][50256] == 1
        assert union.ends.sum() == 1

    def test_one_member_is_itself(self) -> None:
        tokenizer = byte_level([b"ab"])
        union = build([tokenizer], ["only"], [[tokenizer.eos_token_id]])
        np.testing.assert_array_equal(union.own[0], np.arange(union.size))
        np.testing.assert_array_equal(union.spell_ids[0], np.arange(union.size))

    def test_first_members_unused_ids_keep_their_places(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"a": 1, "b": 3}, unk_token="b"))
        tokenizer.decoder = decoders.Metaspace()
        gaps = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
        other = byte_level([b"ab"])
        for order in ((gaps, other), (other, gaps)):
            ends = [[tokenizer.eos_token_id] for tokenizer in order]
            check_union(build(order, ["x", "y"], ends), order, ends)
        union = build([gaps, other], ["gaps", "other"], [[gaps.eos_token_id], [other.eos_token_id]])
        assert union.own[0].tolist()[:2] == [-1, 1]
        assert not union.choosable[0]

    def test_dead_ends_are_avoided(self) -> None:
        """The longest token at the start leaves "c", which the second member cannot write: "a" and "bc" do."""
        first = byte_level([b"abc"])
        second = sentencepiece(["a", "ab", "bc"], byte_fallback=False)
        union = build([first, second], ["first", "second"], [[first.eos_token_id], [2]])
        (entry,) = entry_of(union, b"abc")
        assert spelling(union, 1, entry) == second.convert_tokens_to_ids(["a", "bc"])
        assert not union.choosable[entry_of(union, b"c")[0]]

    @settings(max_examples=40)
    @given(st.data())
    def test_any_vocabularies(self, data: st.DataObject) -> None:
        alphabet = ["a", "A", " ", "é", "\n", "日", "�", "😀", "▁"]
        text = st.text(st.sampled_from(alphabet), min_size=1, max_size=4)
        part = st.tuples(text, st.integers(0, 3), st.integers(1, 4)).map(lambda t: t[0].encode()[t[1] :][: t[2]])
        tokenizers = []
        for _ in range(data.draw(st.integers(1, 3))):
            if data.draw(st.booleans()):
                added = [AddedToken(t, normalized=False) for t in data.draw(st.lists(text, max_size=2))]
                pads = [AddedToken("<pad>", special=True)] * data.draw(st.integers(0, 1))
                words = data.draw(st.lists(part.filter(bool), max_size=12))
                lacking = b"".join(data.draw(st.lists(st.sampled_from([b"a", b"\xe9", b" "]), max_size=2)))
                tokenizers.append(byte_level(words, [*added, *pads], lacking))
            else:
                words = [word.replace(" ", "▁") for word in data.draw(st.lists(text, max_size=12))]
                tokenizers.append(sentencepiece(words, data.draw(st.booleans())))
        ends = []
        for tokenizer in tokenizers:
            ids = sorted(tokenizer.get_vocab().values())
            others = data.draw(st.lists(st.sampled_from(ids), max_size=2, unique=True))
            ends.append([tokenizer.eos_token_id, *(i for i in others if i != tokenizer.eos_token_id)])
        given_ids = [data.draw(st.permutations(ids)) for ids in ends]
        check_union(build(tokenizers, [f"m{k}" for k in range(len(ends))], given_ids), tokenizers, ends)


class TestUtf8:
    EDGES = bytes.fromhex("7f 80 8f 90 9f a0 bf c0 c1 c2 df e0 e1 ec ed ee ef f0 f1 f3 f4 f5 ff")
    PREFIXES = (b"", b"\xc2", b"\xe1", b"\xf1", b"\xe0", b"\xed", b"\xf0", b"\xf4")

    @staticmethod
    def state(pending: bytes) -> int:
        """Of a decoder that waits to complete these bytes."""
        if not pending:
            return 0
        restricted = {b"\xe0": 4, b"\xed": 5, b"\xf0": 6, b"\xf4": 7}
        if pending in restricted:
            return restricted[pending]
        lead = pending[0]
        return (2 if lead < 0xE0 else 3 if lead < 0xF0 else 4) - len(pending)

    @settings(max_examples=300)
    @given(
        st.lists(
            st.binary(max_size=6)
            | st.text(max_size=4).map(str.encode)
            | st.lists(st.sampled_from(EDGES), max_size=5).map(bytes),
            max_size=12,
        )
    )
    def test_against_pythons_decoder(self, pieces: list[bytes]) -> None:
        states = utf8_states(*join(pieces))
        assert states.shape == (8, len(pieces))
        for u, piece in enumerate(pieces):
            for state, prefix in enumerate(self.PREFIXES):
                decoder = codecs.getincrementaldecoder("utf-8")()
                try:
                    decoder.decode(prefix + piece)
                    pending = decoder.getstate()[0]
                    # CPython tells surrogates only from their third byte.
                    expected = -1 if pending[:1] == b"\xed" and pending[1:] >= b"\xa0" else self.state(pending)
                except UnicodeDecodeError:
                    expected = -1
                if not piece:
                    expected = 0 if state == 0 else -1
                assert states[state, u] == expected, (prefix, piece)

    def test_states_are_reached(self) -> None:
        states = utf8_states(*join(self.PREFIXES[1:]))
        np.testing.assert_array_equal(states[0], range(1, 8))


class TestFiles:
    @pytest.fixture
    def small(self) -> tuple[list[Any], list[str], list[list[int]]]:
        tokenizers = [byte_level([b" a", b"ab"]), sentencepiece(["▁", "a", "b", "▁a"])]
        return tokenizers, ["first", "second"], [[tokenizer.eos_token_id] for tokenizer in tokenizers]

    @staticmethod
    def assert_equal(one: UnionVocabulary, two: UnionVocabulary) -> None:
        for field in dataclasses.fields(UnionVocabulary):
            ours, theirs = getattr(one, field.name), getattr(two, field.name)
            assert type(ours) is type(theirs)
            for a, b in zip(*[x if isinstance(x, tuple) else (x,) for x in (ours, theirs)], strict=True):
                assert np.asarray(a).dtype == np.asarray(b).dtype
                np.testing.assert_array_equal(a, b)

    def test_save_and_load(self, small: Any, tmp_path: Path) -> None:
        union = build(*small)
        union.save(tmp_path / "new" / "union.npz")
        assert [path.name for path in (tmp_path / "new").iterdir()] == ["union.npz"]
        self.assert_equal(UnionVocabulary.load(tmp_path / "new" / "union.npz"), union)

    def test_cache(self, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        built: list[int] = []
        real_build = unions.build
        monkeypatch.setattr(unions, "build", lambda *args: built.append(1) or real_build(*args))
        union = load_or_build(*small, cache=tmp_path)
        self.assert_equal(load_or_build(*small, cache=tmp_path), union)
        assert len(built) == 1
        # Other end ids, another tokenizer: other files. Names are for messages alone.
        tokenizers, _, ends = small
        load_or_build(tokenizers, ["x", "y"], ends, cache=tmp_path)
        assert len(built) == 1
        load_or_build(tokenizers, ["x", "y"], [ends[0], [1]], cache=tmp_path)
        load_or_build([byte_level([b" a"]), tokenizers[1]], ["x", "y"], [[257], ends[1]], cache=tmp_path)
        assert len(built) == 3
        assert len(list(tmp_path.iterdir())) == 3

    @pytest.mark.parametrize(
        "spoil", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"PK" + b"x" * 50, lambda b: b[:32] + b[33:]]
    )
    def test_broken_cache_is_rebuilt(self, small: Any, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
        union = load_or_build(*small, cache=tmp_path)
        (path,) = tmp_path.iterdir()
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.warns(UserWarning, match="is not as it was stored; it is made anew"):
            self.assert_equal(load_or_build(*small, cache=tmp_path), union)
        self.assert_equal(UnionVocabulary.load(path), union)

    def test_damaged_anywhere(self, small: Any, tmp_path: Path, raises_input_error: Callable[..., str]) -> None:
        """A file with changed bytes is refused."""
        union = build(*small)
        path = tmp_path / "union.npz"
        union.save(path)
        whole = path.read_bytes()
        rng = np.random.default_rng(0)
        for at in rng.integers(0, len(whole), 60):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
            with pytest.raises(InputError):
                UnionVocabulary.load(path)
        raises_input_error(lambda: UnionVocabulary.load(tmp_path / "absent.npz"), "absent.npz")

    def test_other_format(self, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        build(*small).save(tmp_path / "union.npz")
        monkeypatch.setattr(unions, "FORMAT", unions.FORMAT + 1)
        with pytest.raises(InputError, match="format"):
            UnionVocabulary.load(tmp_path / "union.npz")

    def test_a_union_in_anothers_place(self, small: Any, tmp_path: Path) -> None:
        tokenizers, names, ends = small
        union = load_or_build(*small, cache=tmp_path)
        (path,) = tmp_path.iterdir()
        load_or_build(tokenizers, names, [ends[0], [1]], cache=tmp_path)
        (other,) = set(tmp_path.iterdir()) - {path}
        path.write_bytes(other.read_bytes())
        with pytest.warns(UserWarning, match="is not as it was stored"):
            self.assert_equal(load_or_build(*small, cache=tmp_path), union)

    def test_unwritable_cache(self, small: Any, tmp_path: Path) -> None:
        blocked = tmp_path / "file"
        blocked.write_text("not a directory")
        with pytest.warns(UserWarning, match="nothing is kept in"):
            self.assert_equal(load_or_build(*small, cache=blocked / "unions"), build(*small))
        assert blocked.read_text() == "not a directory"

    def test_default_cache(self, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path))
        load_or_build(*small)
        assert len(list((tmp_path / ".cache" / "rlae_jax" / "unions").glob("*.union"))) == 1


class TestBadInput:
    def test_tokenizers_without_bytes(self, raises_input_error: Callable[..., str], make_tokenizer: Any) -> None:
        raises_input_error(lambda: token_bytes(make_tokenizer(["a", "b"]), "words"), "words", "WordLevel")
        piece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
        piece.decoder = decoders.WordPiece()
        raises_input_error(
            lambda: token_bytes(PreTrainedTokenizerFast(tokenizer_object=piece), "bert"), "bert", "WordPiece"
        )
        clip = Tokenizer(models.BPE({"a</w>": 0}, [], end_of_word_suffix="</w>"))
        clip.pre_tokenizer = pre_tokenizers.ByteLevel()
        raises_input_error(lambda: token_bytes(PreTrainedTokenizerFast(tokenizer_object=clip), "clip"), "clip")
        raises_input_error(lambda: token_bytes(object(), "slow"), "slow", "object")
        raises_input_error(lambda: build([None], ["bare"], [[0]]), "bare", "no tokenizer")

    def test_a_token_outside_the_alphabet(self, raises_input_error: Callable[..., str]) -> None:
        odd = Tokenizer(models.BPE({"a": 0, "日": 7}, []))
        odd.decoder = decoders.ByteLevel()
        raises_input_error(lambda: token_bytes(PreTrainedTokenizerFast(tokenizer_object=odd), "odd"), "odd", "日", "7")

    def test_end_ids(self, raises_input_error: Callable[..., str]) -> None:
        tokenizer = byte_level([])
        raises_input_error(
            lambda: build([tokenizer] * 3, ["one", "two", "three"], [[3], [], []]),
            "2 members with no end token: two; three",
            "end_ids",
        )
        raises_input_error(lambda: build([tokenizer], ["one"], [[3, 4000, -1]]), "one", "[4000, -1]")
        raises_input_error(lambda: build([], [], []), "at least one")
        raises_input_error(lambda: build([tokenizer], ["one"], []), "0 lists of end ids")


def synthetic(seed: int) -> Any:
    """A byte-level BPE of 128k tokens: pairs of letters, pairs of pairs, and those after a space."""
    rng = np.random.default_rng(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [a + b for a in letters for b in letters]
    known = [pairs[i // len(pairs)] + pairs[i % len(pairs)] for i in np.random.default_rng(99).permutation(676**2)]
    words = [*known[:40_000], *(known[i] for i in 40_000 + rng.choice(676**2 - 40_000, 23_600, replace=False))]
    merges = [(pair[0], pair[1]) for pair in pairs] + [(word[:2], word[2:]) for word in words]
    merges += [("Ġ", word) for word in words]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.mark.slow
def test_two_large_vocabularies_take_seconds(tmp_path: Path) -> None:
    tokenizers = [synthetic(0), synthetic(1)]
    names, ends = ["first", "second"], [[tokenizer.eos_token_id] for tokenizer in tokenizers]
    started = time.perf_counter()
    union = load_or_build(tokenizers, names, ends, cache=tmp_path)
    cold = time.perf_counter() - started
    started = time.perf_counter()
    load_or_build(tokenizers, names, ends, cache=tmp_path)
    warm = time.perf_counter() - started
    print(f"V {[len(own) for own in union.own]} U {union.size}: cold {cold:.2f} s, cached {warm:.2f} s")
    assert union.choosable.all()
    # 3 s on two free cores; other tests run beside this one.
    assert cold < 9
    assert warm < cold
