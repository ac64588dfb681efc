"""`Ensemble.generate`: what comes back, what it must not depend on, and what it refuses."""

import dataclasses

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion import programs
from rlae_jax.fusion.codec import decode_texts
from rlae_jax.fusion.policy import BoundPolicy, Confidence, Dims, Fixed
from rlae_jax.fusion.prompts import bucket, pad_rows
from rlae_jax.fusion.weights import normalise_weights
from tests.helpers.policies import Reader

V = 23
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0], [1, 2]]
CHARACTERS = "abcdefgh"


@pytest.fixture(scope="module")
def pair(make_lm):
    narrow = make_lm(3, sharpness=3.0, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
    return rj.Ensemble([make_lm(2, sharpness=3.0, layers=1), narrow], end_ids=(7, 18))


@pytest.fixture(scope="module")
def counter(make_chain_lm, make_tokenizer):
    """Writes the alphabet on: after "b" comes "c", after "h" the end token 8. An ensemble of one."""
    v = len(CHARACTERS) + 1
    logits = 20.0 * np.eye(v)[(np.arange(v) + 1) % v]
    return rj.Ensemble([make_chain_lm(logits, tokenizer=make_tokenizer(CHARACTERS), end_ids=(v - 1,))])


def generate_ids(ensemble, rows, width=None, **options):
    ids, mask = pad_rows(rows, width or max(map(len, rows)))
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, **{"max_new_tokens": 10} | options)


# Tests share these options where they can: nearly all their time is compilation.
SAMPLED = {"temperature": 1.4}


class TestWhatComesBack:
    def test_texts_tokens_reasons_and_steps(self, counter):
        out = counter.generate(["ab", "g", "xyh", "a"], max_new_tokens=5)
        assert out.texts == ["cdefg", "h", "", "bcdef"]
        assert out.tokens == [[2, 3, 4, 5, 6], [7], [], [1, 2, 3, 4, 5]]
        assert out.finish_reasons == ["length", "stop", "stop", "length"]
        assert out.steps == [5, 2, 1, 5]

    def test_an_end_token_as_the_last_step_is_a_stop(self, counter):
        out = counter.generate(["d", "c", "b", "a"], max_new_tokens=5)
        assert out.texts == ["efgh", "defgh", "cdefg", "bcdef"]
        assert out.finish_reasons == ["stop", "length", "length", "length"]
        assert out.steps == [5, 5, 5, 5]

    def test_ignore_eos_writes_on(self, counter):
        out = counter.generate(["g"], max_new_tokens=4, ignore_eos=True)
        assert out.tokens == [[7, 8, 0, 1]]
        assert out.finish_reasons == ["length"]
        assert out.texts == ["hab"]  # the end token has no text

    def test_min_new_tokens(self, counter):
        out = counter.generate(["h"] * 4, max_new_tokens=5, min_new_tokens=3)
        assert out.steps == [5] * 4  # "a" follows once the end token is forbidden, and the counter goes on
        assert counter.generate(["h"] * 4, max_new_tokens=5).steps == [1] * 4

    def test_weights_are_per_span_and_nan_after_the_rows_end(self, counter):
        ensemble = rj.Ensemble(counter.members * 2)
        given = np.array([[1.0, 3.0], [2.0, 2.0], [1.0, 0.0]])
        out = ensemble.generate(["a", "e", "h"], weights=given, max_new_tokens=7, span_length=3)
        assert out.steps == [7, 4, 1]
        assert out.weights.shape == (3, 3, 2)
        expected = np.broadcast_to((given / given.sum(axis=1, keepdims=True))[:, None], (3, 3, 2)).copy()
        expected[1, 2:] = np.nan
        expected[2, 1:] = np.nan
        np.testing.assert_allclose(out.weights, expected, rtol=1e-6)

    def test_stop_strings_cut_the_text_before_the_first_of_them(self, counter):
        out = counter.generate(["a", "d", "f", "c"], max_new_tokens=5, stop=("f", "de", "zz"))
        assert out.texts == ["bc", "e", "gh", ""]
        assert out.tokens == [[1, 2], [4], [6, 7], []]
        assert out.finish_reasons == ["stop"] * 4
        out = counter.generate(["a"] * 4, max_new_tokens=5, stop=["g"])
        assert (out.texts, out.finish_reasons) == (["bcdef"] * 4, ["length"] * 4)

    def test_prompt_plus_text_is_the_whole_sequence_decoded(self, make_lm, make_tokenizer):
        """ "▁b" alone decodes to "b": its space must not get lost."""
        words = ["▁" + letter for letter in "abcdefghijklmnopqrstuvw"][: V - 1]
        tokenizer = make_tokenizer(words, metaspace=True)
        ensemble = rj.Ensemble([make_lm(0, layers=1, tokenizer=tokenizer)], end_ids=())
        prompts = ["a b", "c"]
        out = ensemble.generate(prompts, max_new_tokens=4)
        for prompt, text, tokens in zip(prompts, out.texts, out.tokens, strict=True):
            whole = [*tokenizer(prompt)["input_ids"], *tokens]
            assert prompt + text == tokenizer.decode(whole, skip_special_tokens=True)
            assert text.startswith(" ")
            assert not tokenizer.decode(tokens).startswith(" ")

    def test_real_tokenizers_lose_no_space_either(self, shared):
        from transformers import AutoTokenizer

        for name in ("gpt2", "mistral_v3"):
            tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
            prompt, whole = (tokenizer(text)["input_ids"] for text in ("Once upon", "Once upon a time, Zoë"))
            assert whole[: len(prompt)] == prompt
            assert decode_texts(tokenizer, [prompt], [whole[len(prompt) :]]) == [" a time, Zoë"]

    def test_chat_puts_each_prompt_into_the_template(self, make_chain_lm, make_tokenizer):
        template = "{% for m in messages %}c{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}d{% endif %}"
        tokenizer = make_tokenizer(CHARACTERS, chat_template=template)
        logits = 20.0 * np.eye(9)[(np.arange(9) + 1) % 9]
        ensemble = rj.Ensemble([make_chain_lm(logits, tokenizer=tokenizer, end_ids=(8,))])
        assert ensemble.encode(["ab", "h"], chat=True) == [[2, 0, 1, 3], [2, 7, 3]]
        prompts = ["ab", "h", "ab", "ab"]
        assert ensemble.generate(prompts, max_new_tokens=5, chat=True).texts == ["efgh"] * 4
        assert ensemble.generate(prompts, max_new_tokens=5).texts == ["cdefg", "", "cdefg", "cdefg"]

    def test_ids_without_a_tokenizer(self, pair):
        out = generate_ids(pair, PROMPTS)
        with pytest.raises(rj.InputError, match="no tokenizer"):
            _ = out.texts
        assert all(0 <= i < V for row in out.tokens for i in row)
        no_mask = pair.generate(prompt_ids=[PROMPTS[0]] * 5, max_new_tokens=10)
        assert no_mask.tokens == out.tokens[:1] * 5

    def test_every_members_end_tokens_end_a_text(self, make_lm):
        members = [make_lm(0, end_ids=(3,)), make_lm(1, end_ids=(7, 3))]
        assert rj.Ensemble(members).end_ids == (3, 7)
        assert rj.Ensemble(members, end_ids=[5]).end_ids == (5,)


class TestIndependence:
    """A row's tokens are a function of its prompt, its weights and its seed."""

    @pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
    def test_of_the_batch_around_it(self, pair, options):
        seeds = [11, 7, 5, 3, 2]
        weights = np.random.default_rng(0).dirichlet([1, 1], len(PROMPTS))
        together = generate_ids(pair, PROMPTS, seed=seeds, weights=weights, **options)
        assert len({str(row) for row in together.tokens}) >= 4
        for order in ([3], [3, 3, 1, 0, 2, 4, 4]):
            rows = [PROMPTS[b] for b in order]
            part = generate_ids(pair, rows, seed=[seeds[b] for b in order], weights=weights[order], **options)
            for b, tokens, steps, used in zip(order, part.tokens, part.steps, part.weights, strict=True):
                assert tokens == together.tokens[b]
                assert steps == together.steps[b]
                np.testing.assert_allclose(used, together.weights[b], rtol=1e-6)

    @pytest.mark.slow
    def test_of_a_large_batch(self, pair):
        """Two hundred rows: prompts are read in groups, and products take other shapes."""
        rng = np.random.default_rng(1)
        rows = [rng.integers(0, V, rng.integers(1, 17)).tolist() for _ in range(200)]
        seeds = rng.integers(0, 2**31, 200)
        together = generate_ids(pair, rows, seed=seeds, **SAMPLED)
        few = generate_ids(pair, rows[50:55], seed=seeds[50:55], **SAMPLED)
        assert few.tokens == together.tokens[50:55]

    @pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
    def test_of_padding_on_either_side(self, pair, options):
        expected = generate_ids(pair, PROMPTS, seed=4, **options).tokens
        width = 30
        for side in ("left", "right", "both"):
            ids, mask = np.full((len(PROMPTS), width), 22), np.zeros((len(PROMPTS), width), int)
            for b, row in enumerate(PROMPTS):
                start = {"left": width - len(row), "right": 0, "both": 9}[side]
                ids[b, start : start + len(row)] = row
                mask[b, start : start + len(row)] = 1
            out = pair.generate(prompt_ids=ids, prompt_mask=mask, seed=4, max_new_tokens=10, **options)
            assert out.tokens == expected

    @pytest.mark.slow
    def test_of_a_longer_neighbour(self, pair):
        """A prompt of 40 tokens puts everybody into a wider bucket."""
        alone = generate_ids(pair, PROMPTS, seed=4, **SAMPLED)
        long = np.random.default_rng(2).integers(0, V, 40).tolist()
        assert generate_ids(pair, [*PROMPTS, long], seed=4, **SAMPLED).tokens[:-1] == alone.tokens

    def test_seeds(self, pair):
        """The same seed draws the same, another one draws otherwise, and row b of seed s has a stream of its own."""
        rows = [PROMPTS[2]] * 5
        first = generate_ids(pair, rows, seed=1, **SAMPLED)
        assert generate_ids(pair, rows, seed=1, **SAMPLED).tokens == first.tokens
        assert generate_ids(pair, rows, seed=2, **SAMPLED).tokens != first.tokens
        assert len({str(row) for row in first.tokens}) >= 3
        own = generate_ids(pair, rows, seed=[9, 9, 8, 7, 6], **SAMPLED).tokens
        assert own[0] == own[1]
        assert len({str(row) for row in own}) >= 3
        assert generate_ids(pair, rows, seed=jax.numpy.array([9, 9, 8, 7, 6]), **SAMPLED).tokens == own

    def test_max_new_tokens_only_cuts(self, pair):
        long = generate_ids(pair, PROMPTS, **SAMPLED)
        short = generate_ids(pair, PROMPTS, max_new_tokens=4, **SAMPLED)
        assert max(map(len, long.tokens)) > 4
        assert short.tokens == [row[:4] for row in long.tokens]


class TestWeights:
    def test_none_is_uniform_and_scale_does_not_matter(self, pair):
        expected = generate_ids(pair, PROMPTS)
        for weights in (None, [0.5, 0.5], [7, 7], np.full((len(PROMPTS), 2), 3.0), Fixed()):
            out = generate_ids(pair, PROMPTS, weights=weights)
            assert out.tokens == expected.tokens
            np.testing.assert_allclose(out.weights[:, 0], 0.5)

    def test_one_hot_weights_equal_the_member_alone(self, pair):
        together = rj.Ensemble(pair.members, "loglinear", end_ids=pair.end_ids)
        for k, lm in enumerate(pair.members):
            alone = rj.Ensemble([lm], "loglinear", end_ids=pair.end_ids)
            expected = generate_ids(alone, PROMPTS)
            out = generate_ids(together, PROMPTS, weights=np.eye(2)[k])
            assert out.tokens == expected.tokens
            assert out.finish_reasons == expected.finish_reasons

    def test_rows_have_their_own_weights(self, pair):
        weights = [[1, 0], [0, 1], [1, 0], [0, 1], [1, 1]]
        out = generate_ids(pair, PROMPTS, weights=weights)
        singles = [generate_ids(pair, PROMPTS, weights=w).tokens for w in ([1, 0], [0, 1], [1, 1])]
        expected = [singles[0][0], singles[1][1], singles[0][2], singles[1][3], singles[2][4]]
        assert out.tokens == expected
        assert singles[0] != singles[1]

    def test_confidence_chooses_at_every_step(self, pair):
        out = generate_ids(pair, PROMPTS, weights=Confidence(), ignore_eos=True)
        assert out.weights.shape == (len(PROMPTS), 10, 2)
        assert set(np.unique(out.weights)) == {0.0, 1.0}
        np.testing.assert_array_equal(out.weights.sum(axis=-1), 1.0)

    def test_a_bound_policy_brings_its_span_length(self, pair):
        policy, dims = Reader(), Dims(pair.widths, 4)
        bound = BoundPolicy(policy, policy.init(jax.random.key(0), dims), dims, span_length=3)
        out = generate_ids(pair, PROMPTS, weights=bound, ignore_eos=True)
        assert out.weights.shape == (len(PROMPTS), 4, 2)
        np.testing.assert_allclose(out.weights.sum(axis=-1), 1.0, rtol=1e-5)
        assert np.ptp(out.weights[..., 0]) > 0.1

    def test_normalise_weights(self):
        np.testing.assert_allclose(normalise_weights([1, 3], 2, 2), [[0.25, 0.75]] * 2)
        np.testing.assert_allclose(normalise_weights([[1, 3], [5, 0]], 2, 2), [[0.25, 0.75], [1, 0]])


class TestCompilation:
    def test_what_changes_from_call_to_call_does_not_compile_anew(self, pair):
        count = programs.decode_batch.cache_size
        generate_ids(pair, PROMPTS, **SAMPLED)
        before = count()
        generate_ids(pair, [[5] * 16, [2, 2], [1], [3], [4]], **SAMPLED)  # 16 is the smallest bucket
        generate_ids(pair, [*PROMPTS[::-1], [1]], **SAMPLED)  # 6 rows share the bucket of 5
        generate_ids(pair, PROMPTS, temperature=0.3, seed=5)
        generate_ids(pair, PROMPTS, weights=[0.2, 0.8], min_new_tokens=2, **SAMPLED)
        generate_ids(pair, PROMPTS, weights=np.ones((5, 2)), **SAMPLED)
        assert count() == before
        generate_ids(pair, [[5] * 17, *PROMPTS[1:]], **SAMPLED)
        assert count() == before + 1

    @pytest.mark.parametrize("smallest", [1, 16])
    def test_buckets_are_few_and_waste_at_most_half(self, smallest):
        sizes = [bucket(n, smallest) for n in range(1, 3000)]
        assert sizes == sorted(sizes)
        for n, size in enumerate(sizes, 1):
            assert size >= n
            assert size <= max(1.5 * n, smallest)
            assert bucket(size, smallest) == size
        assert len(set(sizes)) <= 24
        assert [bucket(n) for n in (1, 2, 3, 4, 5, 6, 7, 9, 13)] == [1, 2, 3, 4, 6, 6, 8, 12, 16]

    def test_pad_rows(self):
        ids, mask = pad_rows([[1, 2], [3]], 3)
        np.testing.assert_array_equal(ids, [[0, 1, 2], [0, 0, 3]])
        np.testing.assert_array_equal(mask, [[0, 1, 1], [0, 0, 1]])


class TestBadInput:
    @pytest.fixture(autouse=True)
    def _nothing_may_be_decoded(self, monkeypatch):
        """Every complaint comes before any long work starts."""

        def decode(*args, **kwargs):
            raise AssertionError("decoding began before the input was checked")

        monkeypatch.setattr(programs, "decode_batch", decode)

    def test_no_members(self, raises_input_error):
        raises_input_error(lambda: rj.Ensemble([]), "at least one member")

    def test_unknown_fusion(self, pair, raises_input_error):
        raises_input_error(lambda: rj.Ensemble(pair.members, "average"), "'average'", "linear", "loglinear")

    def test_tokenizers_whose_tokens_stand_for_no_bytes(self, make_lm, make_tokenizer, raises_input_error):
        one = make_lm(0, tokenizer=make_tokenizer("abc"), name="one")
        other = make_lm(1, tokenizer=make_tokenizer("acbd"), name="other")
        raises_input_error(lambda: rj.Ensemble([one, other], end_ids=[[3], [4]]), "one", "WordLevel")

    def test_one_member_without_a_tokenizer(self, make_lm, make_tokenizer, raises_input_error):
        members = [make_lm(0, name="bare"), make_lm(1, tokenizer=make_tokenizer("abc"), name="texted")]
        raises_input_error(lambda: rj.Ensemble(members), "bare", "texted", "tokenizer")

    def test_vocabularies_differ_without_tokenizers(self, make_lm, raises_input_error):
        raises_input_error(lambda: rj.Ensemble([make_lm(0), make_lm(1, vocab=9)]), "23 and 9", "without tokenizers")

    def test_end_ids_outside_the_vocabulary(self, pair, raises_input_error):
        raises_input_error(lambda: rj.Ensemble(pair.members, end_ids=[3, 23, -1]), "[-1, 23]", "of 23")

    @pytest.mark.parametrize(
        ("weights", "parts"),
        [
            ([1.0], ("[1]", "[2]", "[5, 2]")),
            ([1.0, 1.0, 1.0], ("[3]", "[2]")),
            (np.ones((4, 2)), ("[4, 2]", "[5, 2]")),
            (np.ones((5, 3)), ("[5, 3]", "[5, 2]")),
            (0.5, ("shape []", "[2]")),
            ([-0.1, 1.1], ("1 negative", "-0.1")),
            ([float("nan"), 1.0], ("1 not finite", "nan")),
            ([float("inf"), 1.0], ("1 not finite", "inf")),
            ([0.0, 0.0], ("1 all zero", "> 0")),
            ([[1, 1], [0, 0], [1, 1], [-1, 2], [0, 0]], ("2 all zero", "prompt 1", "prompt 4", "1 negative: prompt 3")),
            ("surest", ("'surest' is unknown", "perplexity, confidence")),
            ([[1, 2], [3]], ("weights",)),
        ],
        ids=str,
    )
    def test_weights(self, pair, raises_input_error, weights, parts):
        raises_input_error(lambda: generate_ids(pair, PROMPTS, weights=weights), *parts)

    def test_many_bad_rows_of_weights_are_counted(self, pair, raises_input_error):
        message = raises_input_error(lambda: normalise_weights(np.zeros((9, 2)), 9, 2), "9 all zero", "full list")
        assert message.count("prompt ") == 5

    def test_a_policy_for_other_members(self, pair, raises_input_error):
        dims = Dims((16, 16), 4)
        bound = BoundPolicy(Reader(), Reader().init(jax.random.key(0), dims), dims, span_length=4)
        raises_input_error(lambda: generate_ids(pair, PROMPTS, weights=bound), "[16, 16]", "[16, 12]")

    @pytest.mark.parametrize("prompts", [[], ()])
    def test_no_prompts(self, counter, raises_input_error, prompts):
        raises_input_error(lambda: counter.generate(prompts), "no prompts")

    def test_no_prompt_ids(self, pair, raises_input_error):
        raises_input_error(lambda: pair.generate(prompt_ids=np.zeros((0, 4), int)), "no prompts")

    def test_one_string_instead_of_a_list(self, counter, raises_input_error):
        raises_input_error(lambda: counter.generate("abc"), "list of strings")

    def test_an_empty_prompt(self, counter, raises_input_error):
        raises_input_error(lambda: counter.generate(["a", "", "b", ""]), "2 empty prompts", "prompt 1; prompt 3")

    def test_an_empty_mask_row(self, pair, raises_input_error):
        raises_input_error(
            lambda: pair.generate(prompt_ids=[[1, 2], [3, 4]], prompt_mask=[[1, 0], [0, 0]]), "1 empty prompts", "row 1"
        )

    def test_prompts_and_ids_or_neither(self, counter, raises_input_error):
        raises_input_error(lambda: counter.generate(), "either prompts or prompt_ids")
        raises_input_error(lambda: counter.generate(["a"], prompt_ids=[[1]]), "either prompts or prompt_ids")

    @pytest.mark.parametrize(("ids", "mask"), [([1, 2], None), ([[1, 2]], [[1]]), ([[[1]]], None)])
    def test_shapes_of_ids(self, pair, raises_input_error, ids, mask):
        raises_input_error(lambda: pair.generate(prompt_ids=ids, prompt_mask=mask), "[B, T]")

    @pytest.mark.parametrize("wrong", [-1, V, 10**6])
    def test_ids_outside_the_vocabulary(self, pair, raises_input_error, wrong):
        raises_input_error(lambda: pair.generate(prompt_ids=[[1, 2], [3, wrong]]), str(wrong), str(V))

    def test_masked_ids_may_be_anything(self, pair):
        with pytest.raises(AssertionError, match="decoding began"):
            pair.generate(prompt_ids=[[-100, 2]], prompt_mask=[[0, 1]])

    def test_a_prompt_longer_than_the_context(self, counter, make_lm, raises_input_error):
        ensemble = rj.Ensemble([make_lm(0, context=20), make_lm(1, context=30)])
        rows = [[1] * 21, [1], [1] * 11]
        ids, mask = pad_rows(rows, 21)
        raises_input_error(
            lambda: ensemble.generate(prompt_ids=ids, prompt_mask=mask, max_new_tokens=10),
            "context is 20",
            "max_new_tokens takes 10",
            "prompt 0 has 21; prompt 2 has 11",
            "at most 10 tokens fit",
        )

    def test_a_prompt_that_just_fits_is_no_error(self, make_lm):
        ensemble = rj.Ensemble([make_lm(0, context=20)])
        with pytest.raises(AssertionError, match="decoding began"):
            ensemble.generate(prompt_ids=[[1] * 10], max_new_tokens=10)

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            ({"temperature": -1.0}, ("temperature", "-1.0")),
            ({"temperature": 1.0, "top_k": -2}, ("top_k", "-2")),
            ({"temperature": 1.0, "top_p": 0.0}, ("top_p", "0.0")),
            ({"temperature": 1.0, "top_p": 1.01}, ("top_p", "1.01")),
            ({"max_new_tokens": 0}, ("max_new_tokens", "0")),
            ({"max_new_tokens": -5}, ("max_new_tokens", "-5")),
            ({"span_length": 0}, ("span_length", "0")),
            ({"min_new_tokens": -1}, ("min_new_tokens", "-1")),
            ({"min_new_tokens": 11}, ("min_new_tokens", "11")),
            ({"seed": [1, 2]}, ("seed", "[5]", "[2]")),
            ({"seed": -1}, ("seed", "-1")),
            ({"seed": 2**40}, ("seed", str(2**40))),
            ({"seed": 0.5}, ("seed", "0.5")),
            ({"stop": ("a",)}, ("stop", "tokenizer")),
        ],
        ids=str,
    )
    def test_options(self, pair, raises_input_error, options, parts):
        raises_input_error(lambda: generate_ids(pair, PROMPTS, **options), *parts)

    @pytest.mark.parametrize("stop", ["ab", ("a", "")], ids=["a-string", "an-empty-string"])
    def test_stop_strings(self, counter, raises_input_error, stop):
        raises_input_error(lambda: counter.generate(["a"], stop=stop), "stop")

    def test_chat_without_a_template(self, counter, raises_input_error):
        raises_input_error(lambda: counter.generate(["a"], chat=True), "chain", "no chat template")

    def test_text_without_a_tokenizer(self, pair, raises_input_error):
        raises_input_error(lambda: pair.generate(["a"]), "tiny-2", "tokenizer.json")


class TestEncoderDecoders:
    """Their answers are texts of their own, written by a decoder that starts from its own token."""

    @pytest.fixture(scope="class")
    def pair(self, stored_checkpoint, make_tokenizer):
        lms = [rj.load(stored_checkpoint(case, "t5")) for case in ("tied", "untied")]
        tokenizer = make_tokenizer([chr(0x4E00 + i) for i in range(lms[0].config.vocab - 1)])
        return [dataclasses.replace(lm, tokenizer=tokenizer) for lm in lms]

    def test_texts_do_not_continue_the_prompt(self, pair):
        prompt = "".join(map(chr, range(0x4E03, 0x4E09)))
        out = rj.Ensemble(pair[:1]).generate([prompt], max_new_tokens=5, ignore_eos=True)
        assert out.texts == ["".join(chr(0x4E00 + i) for i in out.tokens[0] if i != pair[0].config.vocab - 1)]
        assert out.texts[0]

    @pytest.mark.slow
    def test_two_members_equal_fusing_their_whole_logits(self, pair):
        """Step by step without a cache; the prompts are of unequal length. Zeros fill what is not written yet."""
        prompts, weights = [[3, 4, 5, 6], [7, 8]], np.array([0.3, 0.7])
        mask = np.array([[1, 1, 1, 1], [0, 0, 1, 1]])
        ids = np.array([prompts[0], [0, 0, *prompts[1]]])
        out = rj.Ensemble(pair).generate(
            prompt_ids=ids, prompt_mask=mask, weights=weights, max_new_tokens=6, ignore_eos=True
        )
        for row, prompt in enumerate(prompts):
            written = np.zeros((1, 7), int)
            written[0, 0] = pair[0].config.start_id
            for t in range(6):
                probs = [jax.nn.softmax(lm.logits(np.array([prompt]), None, written)[0, t]) for lm in pair]
                written[0, t + 1] = np.argmax(weights @ np.array(probs))
            assert out.tokens[row] == written[0, 1:].tolist()

    @pytest.mark.slow
    def test_one_beside_a_decoder(self, pair, make_lm):
        """Kinds may be mixed; a one-hot weight still is that member alone."""
        other = make_lm(3, vocab=pair[0].config.vocab)
        small = dataclasses.replace(pair[0], tokenizer=None)
        ids = np.array([[1, 2, 3]])
        both = rj.Ensemble([small, other])
        for k, lm in enumerate((small, other)):
            alone = rj.Ensemble([lm]).generate(prompt_ids=ids, max_new_tokens=6, ignore_eos=True)
            chosen = both.generate(prompt_ids=ids, weights=np.eye(2)[k], max_new_tokens=6, ignore_eos=True)
            assert chosen.tokens == alone.tokens
