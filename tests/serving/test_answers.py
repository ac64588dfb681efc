"""From pieces to choices: whole and in chunks alike, with the text of every token."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlae_jax.serving.answers import LEAST, Choice, Scored, TextOfTokens, joined, shown_token
from rlae_jax.serving.api import read_chat, read_completion
from rlae_jax.serving.requests import Piece
from tests.helpers.serving import FakeEngine, make_catalogue

MEMBERS = 2


def cuts(data, length):
    """Places between which something is cut into parts."""
    return [0, *sorted(data.draw(st.lists(st.integers(0, length), max_size=4))), length]


@given(data=st.data(), text=st.text(st.characters(codec="utf-8"), min_size=1, max_size=12))
def test_parts_of_a_text_are_its_tokens(data, text):
    raw = text.encode()
    places = cuts(data, len(raw))
    vocabulary = [raw[a:b] for a, b in itertools.pairwise(places)]
    parts = TextOfTokens(vocabulary.__getitem__).split(range(len(vocabulary)), text)
    expected = [raw[:b].decode(errors="ignore") for b in places]
    assert parts == [later[len(earlier) :] for earlier, later in itertools.pairwise(expected)]


@pytest.mark.parametrize(
    ("vocabulary", "text", "parts"),
    [
        ([b" Once", b" upon"], "Once upon", ["Once", " upon"]),  # as SentencePiece decodes
        ([b"ab", b"cd"], "abc", ["ab", "c"]),  # a stop string cut it
        ([b"<s>", b"a", b"</s>", b"b"], "ab", ["", "a", "", "b"]),  # special tokens are not shown
        ([b"a", b"b"], "a?!", ["a", "?!"]),
    ],
)
def test_parts_where_a_text_is_not_its_tokens(vocabulary, text, parts):
    assert TextOfTokens(vocabulary.__getitem__).split(range(len(vocabulary)), text) == parts


def test_tokens_within_a_character_are_shown_as_bytes():
    assert shown_token("é".encode()) == "é"
    assert shown_token(b"\xc3") == "bytes:\\xc3"


@pytest.fixture(scope="module")
def catalogue():
    engine = FakeEngine()
    yield make_catalogue(engine)
    engine.close()


def make_call(catalogue, *, chat=False, **fields):
    if chat:
        return read_chat({"model": "both", "messages": [{"role": "user", "content": "p"}]} | fields, catalogue)
    return read_completion({"model": "both", "prompt": "p"} | fields, catalogue)


def make_piece(rng, n=9, span=4):
    tokens = rng.integers(97, 122, n).tolist()
    decided = rng.dirichlet(np.ones(MEMBERS), -(-n // span)).astype(np.float32)
    members = rng.normal(-2, 1, (n, MEMBERS)).astype(np.float32)
    members[rng.random((n, MEMBERS)) < 0.2] = -np.inf
    scores = rng.normal(-2, 1, n).astype(np.float32)
    top = [{int(t): float(s), 65: float(s) - 1} for t, s in zip(tokens, scores, strict=True)]
    text = bytes(tokens).decode()
    return Piece(0, text, tokens, decided[np.arange(n) // span], scores, members, top, "length")


def cut(piece, places):
    """A piece as several."""
    parts = []
    for a, b in itertools.pairwise(places):
        part = {
            name: getattr(piece, name)[a:b] for name in ("text", "tokens", "weights", "scores", "member_scores", "top")
        }
        parts.append(piece._replace(**part, finish_reason=None))
    return [*parts[:-1], parts[-1]._replace(finish_reason=piece.finish_reason)]


@given(data=st.data(), seed=st.integers(0, 2**16))
def test_chunks_are_the_whole_cut_into_pieces(data, seed):
    engine = FakeEngine()
    catalogue = make_catalogue(engine)
    engine.close()
    piece = make_piece(np.random.default_rng(seed))
    parts = cut(piece, cuts(data, len(piece.tokens)))
    chat = data.draw(st.booleans())
    options = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2, "echo": True}
    call = make_call(catalogue, chat=chat, rlae={"attribution": True}, **options)
    prompt = ("pq", Scored([112, 113], [None, -1.5], [None, {113: -1.5}]))
    whole = Choice(call, 0, lambda t: bytes([t]), prompt).gain(joined(parts), chunk=False)
    streamed = Choice(call, 0, lambda t: bytes([t]), prompt)
    chunks = [streamed.gain(part, chunk=True) for part in parts]

    if chat:
        assert whole["message"]["content"] == "".join(c["delta"]["content"] for c in chunks) == piece.text
        assert [c["delta"].get("role") for c in chunks] == ["assistant", *[None] * (len(chunks) - 1)]
        assert whole["logprobs"]["content"] == [one for c in chunks for one in c["logprobs"]["content"]]
    else:
        assert whole["text"] == "".join(c["text"] for c in chunks) == "pq" + piece.text
        for name, told in whole["logprobs"].items():
            assert told == [one for c in chunks for one in c["logprobs"][name]]
        assert whole["logprobs"]["text_offset"] == list(range(2 + len(piece.tokens)))
        assert whole["logprobs"]["token_logprobs"][:2] == [None, -1.5]
    for name in ("spans", "tokens"):
        assert whole["rlae"][name] == [one for c in chunks for one in c["rlae"][name]]
    assert [c["finish_reason"] for c in chunks] == [*[None] * (len(chunks) - 1), "length"]


def test_who_wrote_what(catalogue):
    piece = make_piece(np.random.default_rng(0))
    call = make_call(catalogue, rlae={"attribution": True})
    told = Choice(call, 0, lambda t: bytes([t])).gain(piece, chunk=False)["rlae"]
    assert [(span["span"], span["start"]) for span in told["spans"]] == [(0, 0), (1, 4), (2, 8)]
    for i, token in enumerate(told["tokens"]):
        assert token["text"] == piece.text[i]
        np.testing.assert_array_equal(told["spans"][token["span"]]["weights"], piece.weights[i])
        assert token["logprob"] == piece.scores[i]
        expected = [None if np.isinf(score) else score for score in piece.member_scores[i]]
        assert token["member_logprobs"] == expected


def test_spans_of_equal_weights_are_told_apart_where_their_length_is_known(catalogue):
    piece = make_piece(np.random.default_rng(0))
    piece = piece._replace(weights=np.full_like(piece.weights, 0.5))
    call = make_call(catalogue, rlae={"span_length": 3})
    for length, starts in ((3, [0, 3, 6]), (None, [0])):
        choice = Choice(dataclasses.replace(call, span_length=length), 0, lambda t: bytes([t]))
        told = choice.gain(piece, chunk=False)["rlae"]
        assert [span["start"] for span in told["spans"]] == starts
        assert "tokens" not in told


def test_nothing_is_told_that_was_not_asked_for(catalogue):
    choice = Choice(make_call(catalogue), 3, lambda t: bytes([t])).gain(
        make_piece(np.random.default_rng(0)), chunk=False
    )
    assert choice.keys() == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"]) == (3, None)


def test_tokens_that_read_alike_and_minus_infinity(catalogue):
    piece = make_piece(np.random.default_rng(0), n=1)
    piece = piece._replace(tokens=[97], scores=np.array([-np.inf]), top=[{1: -3.0, 2: -2.0}])
    call = make_call(catalogue, logprobs=2)
    told = Choice(call, 0, {97: b"a", 1: b"x", 2: b"x"}.__getitem__).gain(piece, chunk=False)["logprobs"]
    assert told["token_logprobs"] == [LEAST]
    assert told["top_logprobs"] == [{"x": -2.0, "a": LEAST}]


def test_the_likeliest_token_has_one_number(catalogue):
    """Clients tell by it whether the chosen token is the likeliest."""
    piece = make_piece(np.random.default_rng(0), n=1)._replace(
        tokens=[97], scores=np.array([-0.1]), top=[{97: -0.1 + 1e-9, 98: -2.0}]
    )
    told = Choice(make_call(catalogue, logprobs=2), 0, lambda t: bytes([t])).gain(piece, chunk=False)["logprobs"]
    assert told["token_logprobs"] == [told["top_logprobs"][0]["a"]] == [max(told["top_logprobs"][0].values())]
