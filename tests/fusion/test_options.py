"""`Ensemble`'s options for members with one tokenizer: samples, limits per row, going on, streams, stop strings.

Nearly all the time is compilation, so tests share models, shapes and options where they can.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion import programs
from rlae_jax.fusion.generation import read_answers
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.fusion.state import Answers, Span, answers_of
from rlae_jax.models import transformer
from tests.helpers import reference
from tests.helpers.adapters import EVERY_LAYER, random_adapter

V = 23
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0]]
B = len(PROMPTS)
END_IDS = (6, 18)
N = 9
SAMPLED = {"temperature": 1.4, "seed": 3}
CHARACTERS = "abcdefgh"

decode = jax.jit(rj.decode)


@pytest.fixture(scope="module")
def pair(make_lm):
    narrow = make_lm(3, sharpness=3.0, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
    return rj.Ensemble([make_lm(2, sharpness=3.0, layers=1), narrow], end_ids=END_IDS)


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(5).dirichlet(np.ones(2), B).astype(np.float32)


@pytest.fixture(scope="module")
def counter(make_chain_lm, make_tokenizer):
    """Writes the alphabet on and around: after "b" comes "c", after "h" comes "a"; the end token 8 never comes."""
    v = len(CHARACTERS)
    logits = np.zeros((v + 1, v + 1))
    logits[np.arange(v), (np.arange(v) + 1) % v] = 20.0
    return rj.Ensemble([make_chain_lm(logits, tokenizer=make_tokenizer(CHARACTERS), end_ids=(v,))])


@pytest.fixture(scope="module")
def metaspace(make_lm, make_tokenizer):
    """A random member whose words lose their space when they are decoded alone; ids 6 and 18 end a text."""
    words = ["▁" + letter if i % 3 else letter for i, letter in enumerate("abcdefghijklmnopqrstuvw"[: V - 1])]
    tokenizer = make_tokenizer(words, metaspace=True)
    return rj.Ensemble([make_lm(4, layers=1, sharpness=2.0, tokenizer=tokenizer)], end_ids=END_IDS)


def write(ensemble, rows=PROMPTS, **options):
    ids, mask = pad_rows(rows, 8)
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, **{"max_new_tokens": N} | options)


def assert_same(one, other):
    """Everything that a generation holds."""
    assert one.tokens == other.tokens
    assert one.steps == other.steps
    assert one.finish_reasons == other.finish_reasons
    assert one.decoded == other.decoded
    np.testing.assert_array_equal(one.weights, other.weights)
    for name in ("scores", "member_scores"):
        ours, expected = getattr(one, name), getattr(other, name)
        assert (ours is None) == (expected is None)
        if ours is not None:
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


class TestScoresAndLimits:
    def test_scores_and_limits_per_row_equal_the_reference(self, pair, weights):
        limits = [3, 9, 1, 6]
        options = {"temperature": 1.4, "repetition_penalty": 1.5, "min_p": 0.01}
        out = write(pair, weights=weights, max_new_tokens=limits, seed=3, scores=True, span_length=2, **options)
        rows = [
            reference.decode_row(
                pair.members,
                prompt,
                jax.random.fold_in(jax.random.key(3), b),
                lambda *_, b=b: weights[b],
                max_new_tokens=limits[b],
                end_ids=END_IDS,
                span_length=2,
                **options,
            )
            for b, prompt in enumerate(PROMPTS)
        ]
        assert out.scores.shape == (B, N)
        assert out.member_scores.shape == (B, N, 2)
        for b, row in enumerate(rows):
            n = len(row.tokens)
            assert out.steps[b] == n <= limits[b]
            assert out.tokens[b] == (row.tokens[:-1] if row.ended else row.tokens)
            assert out.finish_reasons[b] == ("stop" if row.ended else "length")
            np.testing.assert_allclose(out.scores[b, :n], row.scores, rtol=0, atol=1e-4)
            np.testing.assert_allclose(out.member_scores[b, :n], row.attribution, rtol=0, atol=1e-4)
            assert np.isnan(out.scores[b, n:]).all()
            assert np.isnan(out.member_scores[b, n:]).all()
            # The fused probability is the weighted mean of the members'.
            mean = np.exp(out.member_scores[b, :n]) @ weights[b]
            np.testing.assert_allclose(np.exp(out.scores[b, :n]), mean, rtol=1e-4)
            spans = -(-n // 2)
            np.testing.assert_allclose(out.weights[b, :spans], np.tile(weights[b], (spans, 1)), rtol=1e-6)
            assert np.isnan(out.weights[b, spans:]).all()
            assert out.spans[b].tolist() == [t // 2 if t < n else -1 for t in range(N)]
            assert out.chosen[b] == out.tokens[b]
        assert {len(row.tokens) == limit for row, limit in zip(rows, limits, strict=True)} >= {True}

    def test_spans_of_lengths_that_a_policy_chose(self, counter):
        """Against a loop over steps: a span ends when its length is over."""
        rng = np.random.default_rng(7)
        lengths, steps = rng.integers(1, 5, (6, N)), rng.integers(0, N + 1, 6)
        expected = np.full((6, N), -1)
        taken = np.zeros(6, int)
        for b in range(6):
            left = 0
            for t in range(steps[b]):
                if left == 0:
                    left, taken[b] = lengths[b, taken[b]], taken[b] + 1
                expected[b, t] = taken[b] - 1
                left -= 1
        zeros = np.zeros((6, N), np.float32)
        answers = Answers(
            done=steps >= N,
            ended=np.zeros(6, bool),
            steps=steps,
            tokens=zeros.astype(np.int32),
            decisions=taken,
            trajectory=Span(None, zeros[..., None], zeros[..., None], zeros, zeros, lengths),
            scores=None,
            failed=np.zeros(6, bool),
        )
        job = counter._job(["a"] * 6, None, SamplingOptions(max_new_tokens=N), seed=0)
        np.testing.assert_array_equal(read_answers(counter.codec, job, answers).spans, expected)

    def test_limits_are_data_and_only_cut(self, pair, weights):
        count = programs.decode_batch.cache_size
        whole = write(pair, weights=weights, max_new_tokens=[N] * B, **SAMPLED)
        before = count()
        for limits in ([1, 9, 4, 2], [9, 2, 3, 1]):
            out = write(pair, weights=weights, max_new_tokens=limits, **SAMPLED)
            for b, limit in enumerate(limits):
                assert out.tokens[b] == whole.tokens[b][:limit]
                assert out.steps[b] == min(limit, whole.steps[b])
        assert count() == before

    def test_scores_are_absent_unless_asked_for(self, counter):
        out = counter.generate(["a"], max_new_tokens=5)
        assert out.scores is None
        assert out.member_scores is None


def explicit(ensemble, params, rows, policy_params, samples, **options):
    """rj.decode of every row `samples` times, sample i of row b with the key fold_in(fold_in(key(3), b), i)."""
    key = jax.random.key(3)
    keys = [jax.random.fold_in(jax.random.fold_in(key, b), i) for b in range(len(rows)) for i in range(samples)]
    spec = ensemble.spec(max_new_tokens=N, temperature=options.pop("temperature"), **options)
    ids, mask = (np.repeat(array, samples, axis=0) for array in pad_rows(rows, 16))
    state = jax.device_get(answers_of(decode(params, ids, mask, policy_params, jnp.stack(keys), spec)))
    chosen = zip(state.tokens, state.steps, state.ended, strict=True)
    return [tokens[: n - ended].tolist() for tokens, n, ended in chosen]


class TestSamples:
    N_SAMPLES = 3

    def check(self, out, expected):
        assert out.tokens == expected
        assert len(out.tokens) == B * self.N_SAMPLES
        for b in range(B):  # samples of a row differ
            assert len({str(tokens) for tokens in out.tokens[b * self.N_SAMPLES : (b + 1) * self.N_SAMPLES]}) > 1

    def test_each_has_a_key_of_its_own(self, pair, weights):
        out = write(pair, weights=weights, samples=self.N_SAMPLES, **SAMPLED)
        repeated = np.repeat(weights, self.N_SAMPLES, axis=0)
        self.check(out, explicit(pair, pair.params, PROMPTS, repeated, self.N_SAMPLES, temperature=1.4))
        assert out.weights.shape[0] == B * self.N_SAMPLES
        np.testing.assert_allclose(out.weights[:, 0], repeated, rtol=1e-6)

    def test_members_of_one_base(self, make_lm):
        """Two of them and two prompts: a batch of as many rows as members."""
        lm = make_lm(0, layers=1, sharpness=2.0, end_ids=END_IDS)
        adapters = [random_adapter(lm, seed, rank=2, alpha=1.0, targets=EVERY_LAYER) for seed in (1, 2)]
        ensemble = rj.Ensemble.from_adapters(lm, adapters)
        w = np.array([[0.2, 0.8], [0.9, 0.1], [0.5, 0.5], [1.0, 0.0]], np.float32)
        repeated = np.repeat(w, self.N_SAMPLES, axis=0)
        out = write(ensemble, weights=w, samples=self.N_SAMPLES, **SAMPLED)
        expected = explicit(ensemble, ensemble.params, PROMPTS, repeated, self.N_SAMPLES, temperature=1.4)
        self.check(out, expected)
        few = write(ensemble, PROMPTS[:2], weights=w[:2], samples=self.N_SAMPLES, **SAMPLED)
        assert few.tokens == expected[: 2 * self.N_SAMPLES]

    def test_rows_with_adapters_of_their_own(self, make_lm):
        lm = make_lm(0, layers=1, sharpness=2.0, end_ids=END_IDS)
        adapters = [random_adapter(lm, seed, rank=2, alpha=1.0, targets=EVERY_LAYER) for seed in (1, 2)]
        ensemble = rj.Ensemble([lm.with_adapters(adapters)])
        rows, choice = PROMPTS[:3], [1, 0, 1]  # filled up neither by a bucket of the batch nor of the samples
        out = write(ensemble, rows, adapters=choice, samples=self.N_SAMPLES, **SAMPLED)
        repeated = np.repeat(choice, self.N_SAMPLES)
        params = ensemble.params_for(repeated, len(repeated))
        ones = np.ones((len(repeated), 1), np.float32)
        assert out.tokens == explicit(ensemble, params, rows, ones, self.N_SAMPLES, temperature=1.4)
        other = write(ensemble, rows, adapters=[0, 1, 0], samples=self.N_SAMPLES, **SAMPLED)
        assert other.tokens != out.tokens

    def test_they_share_one_prefill(self, pair, weights, monkeypatch):
        """The members read as many prompts as there are rows."""
        read = []
        original = transformer.Model.read_prompt

        def spy(model, ids, *rest):
            read.append(ids.shape[0])
            return original(model, ids, *rest)

        monkeypatch.setattr(transformer.Model, "read_prompt", spy)
        spec = pair.spec(max_new_tokens=2)
        prompts = pair.prompts(PROMPTS, spec, seed=0)
        state = jax.eval_shape(lambda: programs.prefill(pair.params, prompts, spec, 5))
        assert read == [B, B]
        assert state.tokens.shape[0] == 5 * B

    def test_limits_of_a_batch_that_is_filled_up(self, counter):
        """Five rows stand in a bucket of six."""
        out = counter.generate(list("abcde"), max_new_tokens=[1, 2, 3, 4, 5], samples=2)
        alphabet = CHARACTERS * 3
        assert out.texts == [alphabet[b + 1 : 2 * b + 2] for b in range(5) for _ in range(2)]


class TestGoingOn:
    OPTIONS = {"span_length": 2, "scores": True, "repetition_penalty": 1.3} | SAMPLED

    def test_equals_one_call(self, pair, weights):
        """Twice on, over boundaries of spans, with a penalty that must remember."""
        whole = write(pair, weights=weights, max_new_tokens=11, **self.OPTIONS)
        part = write(pair, weights=weights, max_new_tokens=3, keep=True, **self.OPTIONS)
        assert part.tokens == [row[:3] for row in whole.tokens]
        assert part.finish_reasons != whole.finish_reasons
        longer = pair.extend(part, 5)
        assert_same(pair.extend(longer, 3), whole)
        assert longer.steps == [min(n, 8) for n in whole.steps]
        assert min(whole.steps) < 8 < max(whole.steps)  # some rows ended before, some went on

    def test_rows_that_ended_stay_ended(self, make_chain_lm):
        """A counter: 7 ends a text."""
        lm = make_chain_lm(20.0 * np.eye(8)[(np.arange(8) + 1) % 8], end_ids=(7,))
        ensemble = rj.Ensemble([lm])
        part = write(ensemble, [[4], [0], [6], [2]], max_new_tokens=4, keep=True)
        assert (part.steps, part.finish_reasons) == ([3, 4, 1, 4], ["stop", "length", "stop", "length"])
        longer = ensemble.extend(part, 4)
        assert longer.tokens == [[5, 6], [1, 2, 3, 4, 5, 6], [], [3, 4, 5, 6]]
        assert longer.steps == [3, 7, 1, 5]
        assert longer.finish_reasons == ["stop"] * 4

    @pytest.mark.slow
    def test_samples_go_on(self, pair, weights):
        options = {"weights": weights[:3], "samples": 2} | SAMPLED
        whole = write(pair, PROMPTS[:3], max_new_tokens=8, **options)
        part = write(pair, PROMPTS[:3], max_new_tokens=4, keep=True, **options)
        assert_same(pair.extend(part, 4), whole)

    def test_with_stop_strings(self, counter):
        """What was stopped stays as it was, also where every row stopped at once."""
        options = {"stop": ["de"], "max_new_tokens": 8}
        part = counter.generate(["b", "f"], keep=True, **options)
        whole = counter.generate(["b", "f"], **{**options, "max_new_tokens": 20})
        assert part.texts == ["c", "ghabcdef"[:5]]
        longer = counter.extend(part, 12)
        assert longer.texts == whole.texts
        assert longer.tokens == whole.tokens
        assert longer.finish_reasons == ["stop", "stop"]

    def test_only_once_and_within_the_context(self, make_chain_lm, raises_input_error):
        lm = make_chain_lm(np.eye(8), context=12)
        ensemble = rj.Ensemble([lm], end_ids=())
        part = ensemble.generate(prompt_ids=[[1, 2, 3]], max_new_tokens=2, keep=True)
        raises_input_error(lambda: ensemble.extend(part, 0), "max_new_tokens", "0")
        raises_input_error(lambda: ensemble.extend(part, 8), "context is 12", "prompt 0 has 3")
        assert len(ensemble.extend(part, 7).tokens[0]) == 9  # what was refused can still go on
        raises_input_error(lambda: ensemble.extend(part, 1), "once")
        plain = ensemble.generate(prompt_ids=[[1, 2, 3]], max_new_tokens=2)
        raises_input_error(lambda: ensemble.extend(plain, 1), "keep=True")


class TestStreams:
    def test_pieces_join_to_the_text(self, metaspace):
        prompts = ["b c", "b", "e h b", "c"]
        options = {"max_new_tokens": [N, 4, N, 7], "span_length": 2, "min_p": 0.01} | SAMPLED
        whole = metaspace.generate(prompts, **options)
        pieces = list(metaspace.stream(prompts, **options))
        assert list(map("".join, zip(*pieces, strict=True))) == whole.texts
        assert len(pieces) == -(-max(whole.steps) // 2)
        for tokens, steps, own in zip(whole.tokens, whole.steps, zip(*pieces, strict=True), strict=True):
            # Each span's words come with that span.
            written = ["".join(own[:n]).replace(" ", "") for n in range(1, len(own) + 1)]
            assert [len(text) for text in written] == [min(2 * n, len(tokens)) for n in range(1, len(own) + 1)]
            assert not any(own[-(-steps // 2) :])
        assert any(piece.startswith(" ") for own in pieces for piece in own)

    def test_what_may_become_a_stop_string_is_held_back(self, counter):
        """Spans of one token: "de" is held until "f" comes instead of "x", and what is left at the end is given."""
        options = {"stop": ["dex", "ghb", "cdefgha"], "max_new_tokens": 12, "span_length": 1}
        prompts = ["b", "e", "c", "d"]
        whole = counter.generate(prompts, **options)
        assert whole.texts == ["", "fghab", "defghabcdefg", "efghabcdefgh"]
        assert whole.finish_reasons == ["stop", "stop", "length", "length"]
        pieces = list(counter.stream(prompts, **options))
        assert list(map("".join, zip(*pieces, strict=True))) == whole.texts
        columns = list(zip(*pieces, strict=True))
        assert columns[0] == ("",) * 12
        assert columns[1] == ("f", "", "", "gha", "b", *[""] * 7)  # "gh" might have become "ghb"
        assert columns[2] == ("", "", "def", "", "", "gha", "b", "", "", "", "", "cdefg")

    def test_samples_and_bad_options(self, counter, raises_input_error):
        pieces = list(counter.stream(["a", "f"], max_new_tokens=4, samples=2))
        assert list(map("".join, zip(*pieces, strict=True))) == ["bcde", "bcde", "ghab", "ghab"]
        with pytest.raises(TypeError, match="scores"):
            counter.stream(["a"], scores=True)
        raises_input_error(lambda: counter.stream(["a"], temperature=-1), "temperature")  # at the call
        raises_input_error(lambda: counter.stream(["a"], stop=""), "stop")


class TestStopStrings:
    def test_they_end_rows_early_and_cut_exactly(self, counter):
        """Rows are looked at every 16 steps, so a stopped row takes at most 15 more."""
        out = counter.generate(["b", "e", "c", "g"], max_new_tokens=64, stop=["de", "ab"])
        assert out.texts == ["c", "fgh", "", "h"]
        assert out.tokens == [[2], [5, 6, 7], [], [7]]
        assert out.finish_reasons == ["stop"] * 4
        assert out.steps == [16] * 4

    def test_a_space_that_is_lost_alone(self, metaspace):
        """Text is cut inside what the tokens decode to together with the prompt."""
        prompts, options = ["b c", "b", "e h b", "c"], {"max_new_tokens": 24, "ignore_eos": True} | SAMPLED
        whole = metaspace.generate(prompts, **options)
        b = max(range(4), key=lambda b: whole.texts[b][:8].count(" "))
        stop = whole.texts[b][3:8]
        out = metaspace.generate(prompts, stop=[stop], **options)
        for text, cut, tokens, all_tokens in zip(whole.texts, out.texts, out.tokens, whole.tokens, strict=True):
            assert cut == (text[: text.index(stop)] if stop in text else text)
            assert tokens == all_tokens[: len(tokens)]
        assert out.steps[b] == 16  # and others write on
        assert max(out.steps) == 24
        assert out.finish_reasons[b] == "stop"
        prefix = metaspace.decode(metaspace.encode(prompts), out.tokens)[b]
        assert prefix.startswith(out.texts[b])


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _nothing_may_be_decoded(self, monkeypatch):
        """Every complaint comes before any long work starts."""

        def decode(*args, **kwargs):
            raise AssertionError("decoding began before the input was checked")

        for name in ("decode_batch", "prefill", "decode_until"):
            monkeypatch.setattr(programs, name, decode)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"temperature": 1.0, "min_p": 1.5}, ("min_p", "1.5", "from 0 to 1")),
            ({"min_p": -0.5}, ("min_p", "-0.5")),
            ({"repetition_penalty": 0}, ("repetition_penalty", "0", "above 0")),
            ({"repetition_penalty": float("inf")}, ("repetition_penalty", "inf")),
            ({"samples": 0}, ("samples", "at least 1", "0")),
            ({"samples": -3}, ("samples", "-3")),
            ({"max_new_tokens": [1, 2]}, ("max_new_tokens", "[4]", "[1, 2]")),
            ({"max_new_tokens": [1, 0, 2, 3]}, ("max_new_tokens", "at least 1")),
            ({"max_new_tokens": [1.0, 2.0, 3.0, 4.0]}, ("max_new_tokens", "whole number")),
            ({"max_new_tokens": 2.5}, ("max_new_tokens", "whole number")),
            ({"max_new_tokens": [[1, 2, 3, 4]]}, ("max_new_tokens", "[4]")),
            ({"max_new_tokens": [1, 2, 3, 4], "min_new_tokens": 5}, ("min_new_tokens", "5")),
            ({"member_tokens": 0}, ("member_tokens", "at least 1")),
            ({"max_new_tokens": [1, 2, 3, 600]}, ("context is 512", "600")),
            ({"weights": "surest"}, ("'surest'", "draw")),
            ({"stop": ["a"], "keep": True}, ("stop", "tokenizer")),
            ({"adapters": [0] * 4}, ("no member has adapters",)),
        ],
        ids=str,
    )
    def test_options(self, pair, raises_input_error, options, parts):
        raises_input_error(lambda: write(pair, **options), *parts)

    @pytest.mark.parametrize("stop", ["ab", [""], ["a", 3]], ids=str)
    def test_stop_strings(self, counter, raises_input_error, stop):
        raises_input_error(lambda: counter.generate(["a"], stop=stop), "stop must be a list of strings")

    def test_streams_need_a_tokenizer(self, pair, raises_input_error):
        raises_input_error(lambda: pair.stream(["a"]), "tiny-2", "tokenizer")

    def test_a_policy_of_a_wrong_kind(self, pair, raises_input_error):
        members = [dataclasses.replace(lm, name=lm.name) for lm in pair.members]
        raises_input_error(lambda: rj.Ensemble(members, "proxy"), "three members", "2")
        raises_input_error(lambda: rj.Ensemble(members, "primary:2"), "primary:2", "0 to 1")
