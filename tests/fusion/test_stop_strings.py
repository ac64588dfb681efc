"""Stop strings that are special tokens or meet them in the text, and characters that a limit cuts."""

import itertools

import numpy as np
import pytest
from tokenizers import AddedToken

import rlae_jax as rj
from tests.helpers.tokenizers import BYTE_CHARACTERS, byte_level, sentencepiece

END, IM_END, MARK = "</s>", "<|im_end|>", "<mark>"
ADDED = [AddedToken(text, special=True) for text in (END, IM_END, MARK)]
TOKENIZER = byte_level([], ADDED)
IDS = {text: TOKENIZER.convert_tokens_to_ids(text) for text in (END, IM_END, MARK)}
V = len(TOKENIZER)


def chain(ids, size=V):
    """Logits under which each of the ids follows the one before."""
    logits = np.zeros((size, size))
    for before, after in itertools.pairwise(ids):
        logits[before, after] = 30.0
    return logits


def tokens(text):
    """A special token's id, or a text's bytes."""
    return [IDS[text]] if text in IDS else [TOKENIZER.convert_tokens_to_ids(BYTE_CHARACTERS[b]) for b in text.encode()]


@pytest.fixture
def write(make_chain_lm):
    """write(texts...) -> an ensemble that goes from token to token of the texts."""

    def make(*texts, members=1):
        ids = [i for text in texts for i in tokens(text)]
        lm = make_chain_lm(chain(ids), tokenizer=TOKENIZER, end_ids=(IDS[END],))
        return rj.Ensemble([lm] * members)

    return make


def pieces_of(ensemble, prompt, **options):
    return [piece for (piece,) in ensemble.stream([prompt], span_length=1, **options)]


class TestASpecialToken:
    def test_becomes_an_end_token_and_says_so(self, write):
        ensemble = write("ab", IM_END, "cd", END)
        assert ensemble.generate(["a"], max_new_tokens=6).texts == ["bcd"]
        with pytest.warns(UserWarning, match=rf"special tokens .* <\|im_end\|> \({IDS[IM_END]}\)"):
            out = ensemble.generate(["a"], max_new_tokens=6, stop=[IM_END])
        assert (out.texts, out.finish_reasons, out.steps) == (["b"], ["stop"], [2])
        with pytest.warns(UserWarning, match="special tokens"):
            assert pieces_of(ensemble, "a", stop=[IM_END, "x"], max_new_tokens=6) == ["b", ""]
        # The next request knows nothing of it.
        assert ensemble.generate(["a"], max_new_tokens=6).texts == ["bcd"]

    def test_ends_an_answer_whatever_else_does_not(self, write):
        with pytest.warns(UserWarning, match="special tokens"):
            out = write("ab", IM_END, "cd").generate(["a"], max_new_tokens=6, stop=[IM_END], ignore_eos=True)
        assert out.texts == ["b"]

    def test_that_ends_answers_anyway_is_not_worth_a_word(self, write):
        assert write("ab", END).generate(["a"], max_new_tokens=6, stop=[END]).texts == ["b"]

    def test_written_letter_by_letter_is_found_too(self, make_chain_lm):
        """The token's text, of which no character comes twice, by its bytes."""
        mark = AddedToken("<im>", special=True)
        own = byte_level([], [mark, AddedToken(END, special=True)])
        ids = [own.convert_tokens_to_ids(character) for character in "ax<im>yz"]
        ensemble = rj.Ensemble([make_chain_lm(chain(ids, len(own)), tokenizer=own)])
        with pytest.warns(UserWarning, match="special tokens"):
            assert ensemble.generate(["a"], max_new_tokens=7, stop=["<im>"]).texts == ["x"]

    def test_of_one_member_among_different_tokenizers(self, write, make_lm):
        """The union's entry of the token is that member's own."""
        lm = write("ab", IM_END, "cd", END).members[0]
        other = make_lm(1, vocab=270, tokenizer=sentencepiece(["▁", "a", "b"]), end_ids=(2,))
        for order in ([lm, other], [other, lm]):
            weights = [1.0, 0.0] if order[0] is lm else [0.0, 1.0]
            with pytest.warns(UserWarning, match=r"<\|im_end\|>"):
                out = rj.Ensemble(order).generate(["a"], weights, max_new_tokens=6, stop=[IM_END])
            assert (out.texts, out.finish_reasons) == (["b"], ["stop"])


class TestAPartOfASpecialToken:
    @pytest.mark.parametrize(
        ("stop", "text"),
        [
            ("im_end", "b"),
            ("b<|im", ""),
            (f"{IM_END}c", "b"),
            ("end|>cd", "b"),
            (f"b{IM_END}", ""),
            ("cd", "b"),
            ("d", "b"),  # of the token's name
            ("<m", "bcd"),
        ],
    )
    @pytest.mark.parametrize("members", ["one", "mixed"])
    def test_the_text_is_searched_with_special_tokens(self, write, make_lm, stop, text, members):
        ensemble = write("ab", IM_END, "cd", MARK, "e", END)
        weights = None
        if members == "mixed":
            other = make_lm(1, vocab=270, tokenizer=sentencepiece(["▁", "a", "b"]), end_ids=(2,))
            ensemble, weights = rj.Ensemble([ensemble.members[0], other]), [1.0, 0.0]
        out = ensemble.generate(["a"], weights, max_new_tokens=7, stop=[stop])
        assert (out.texts, out.finish_reasons) == ([text], ["stop"])
        streamed = [piece for (piece,) in ensemble.stream(["a"], weights, span_length=1, stop=[stop], max_new_tokens=7)]
        assert "".join(streamed) == text

    def test_without_it_nothing_changes(self, write):
        ensemble = write("ab", IM_END, "cd", MARK, "e", END)
        assert ensemble.generate(["a"], max_new_tokens=9, stop=["zz"]).texts == ["bcde"]


class TestCutCharacters:
    @pytest.mark.parametrize("tokenizer", ["bytes", "fallback"])
    def test_the_last_one_is_left_out(self, write, make_chain_lm, tokenizer):
        if tokenizer == "bytes":
            ensemble = write("ab€")
        else:
            own = sentencepiece(["▁", "a", "b"])
            ids = [*own("ab", add_special_tokens=False)["input_ids"][-2:], *(3 + byte for byte in "€".encode())]
            ensemble = rj.Ensemble([make_chain_lm(chain(ids, len(own)), tokenizer=own, end_ids=(2,))])
        for n, text in ((1, "b"), (2, "b"), (3, "b"), (4, "b€")):
            out = ensemble.generate(["a"], max_new_tokens=n)
            assert (out.texts, out.finish_reasons) == ([text], ["length"])
            assert len(out.tokens[0]) == n
            assert "".join(pieces_of(ensemble, "a", max_new_tokens=n)) == text

    def test_going_on_completes_it(self, write):
        ensemble = write("ab€")
        part = ensemble.generate(["a"], max_new_tokens=3, keep=True)
        assert part.texts == ["b"]
        assert ensemble.extend(part, 1).texts == ["b€"]

    def test_broken_bytes_within_a_text_stay(self, make_chain_lm):
        broken = [*tokens("a"), TOKENIZER.convert_tokens_to_ids(BYTE_CHARACTERS[0x80]), *tokens("b")]
        ensemble = rj.Ensemble([make_chain_lm(chain(broken), tokenizer=TOKENIZER)])
        assert ensemble.generate(["a"], max_new_tokens=2).texts == ["\ufffdb"]
