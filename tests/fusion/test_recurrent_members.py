"""Members of which some layers have a state: the same tokens as without a cache, whatever keeps, repeats or lengthens
it, and whoever reads beside them."""

import dataclasses

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion import members
from rlae_jax.fusion.policy import BoundPolicy, Dims, Draw
from tests.helpers import reference
from tests.helpers.adapters import add_by_hand, random_adapter, write
from tests.helpers.mixed_reference import Mixed
from tests.helpers.recurrent import FIELDS, recurrent_lm
from tests.helpers.tokenizers import byte_level, sentencepiece

PROMPTS = [[3], [1, 2, 3, 4, 5, 6, 7], [5, 9, 2]]
TEXTS = ["ab the é x the the", "the", "ééé thé", "x"]
N = 12
WEIGHTS = np.array([0.4, 0.6])


@pytest.fixture(scope="module")
def pair(make_lm):
    return [recurrent_lm(make_lm, kind, 2 + k) for k, kind in enumerate(FIELDS)]


@pytest.fixture(scope="module")
def ensemble(pair):
    return rj.Ensemble(pair, end_ids=())


def expect(pair, key, **options):
    return [
        reference.decode_row(pair, prompt, key(b), lambda *_: WEIGHTS, max_new_tokens=N, **options).tokens
        for b, prompt in enumerate(PROMPTS)
    ]


def keys(b):
    return jax.random.fold_in(jax.random.key(0), b)


OPTIONS = {"weights": WEIGHTS, "max_new_tokens": N}


def test_tokens_are_those_without_a_cache(pair, ensemble):
    """A whole forward for every token of one row; prompts of one token and of several lengths."""
    assert write(ensemble, PROMPTS, **OPTIONS).tokens == expect(pair, keys)


@pytest.mark.rare
def test_a_row_alone(ensemble):
    together = write(ensemble, PROMPTS, **OPTIONS).tokens
    assert [write(ensemble, [prompt], **OPTIONS).tokens[0] for prompt in PROMPTS] == together


def test_samples_that_share_a_prefill_and_go_on(pair, ensemble):
    part = write(ensemble, PROMPTS, samples=2, temperature=1.2, keep=True, weights=WEIGHTS, max_new_tokens=3)
    out = ensemble.extend(part, N - 3)
    for i in range(2):
        wanted = expect(pair, lambda b, i=i: jax.random.fold_in(keys(b), i), temperature=1.2)
        assert out.tokens[i::2] == wanted


@pytest.mark.rare
def test_groups_of_rows(make_lm, monkeypatch):
    """Prompts longer than a chunk of the rule that are read, and answers that are written, a group after another."""
    lm = recurrent_lm(make_lm, "delta", 5)
    ids = np.random.default_rng(0).integers(0, 23, (8, 70))
    asked = []

    def tokens(groups, prefill):
        jax.clear_caches()
        monkeypatch.setattr(decoding, "_row_groups", lambda *args: asked.append(groups) or groups)
        monkeypatch.setattr(members, "_PREFILL_TOKENS", prefill)
        return rj.Ensemble([lm], end_ids=()).generate(prompt_ids=ids, max_new_tokens=5).tokens

    assert tokens(1, 10**6) == tokens(2, 140)
    assert set(asked) == {1, 2}
    jax.clear_caches()


@pytest.mark.parametrize("kind", [pytest.param("short", marks=pytest.mark.rare), "delta"])
def test_adapters_over_one_base(make_lm, kind):
    """All members of a shared pass, and rows with adapters of their own, write what merged kernels write."""
    lm = recurrent_lm(make_lm, kind, 2, end_ids=())
    adapters = [random_adapter(lm, seed, rank=2, alpha=1.0) for seed in (1, 2)]
    assert {path.split(".")[-1] for path in adapters[0].params if "recurrence" in path} >= {"o"}
    merged = [dataclasses.replace(lm, params=add_by_hand(lm, [adapter], [1.0])) for adapter in adapters]
    both, options = {"weights": [0.4, 0.6], "max_new_tokens": 9}, {"max_new_tokens": 9}
    shared = write(rj.Ensemble.from_adapters(lm, adapters), PROMPTS, **both)
    assert shared.tokens == write(rj.Ensemble(merged), PROMPTS, **both).tokens
    chosen = write(rj.Ensemble([lm.with_adapters(adapters)]), PROMPTS, adapters=[1, 0, 1], **options).tokens
    alone = [write(rj.Ensemble([own]), PROMPTS, **options).tokens for own in merged]
    assert chosen == [alone[m][b] for b, m in enumerate([1, 0, 1])]


@pytest.mark.rare
def test_hidden_states_of_adapters(make_lm):
    """A one-hot choice is the adapter alone."""
    lm = recurrent_lm(make_lm, "delta", 2, end_ids=())
    adapters = [random_adapter(lm, seed, rank=2, alpha=1.0, targets=(r".*recurrence.*",)) for seed in (1, 2)]
    ensemble = rj.Ensemble.from_adapters(lm, adapters, fusion="hidden")
    alone = dataclasses.replace(lm, params=add_by_hand(lm, adapters[1:], [1.0]))
    options = {"max_new_tokens": 9}
    tokens = write(ensemble, PROMPTS, weights=[0.0, 1.0], **options).tokens
    assert tokens == write(rj.Ensemble([alone]), PROMPTS, **options).tokens


class TestDifferentTokenizers:
    """Each row takes in its text at its own pace, several tokens at a time, packed with other rows' or alone."""

    @pytest.fixture(scope="class")
    def members(self, make_lm):
        tokenizers = byte_level([b" the", b"th", b" x the th"], ["</s>"]), sentencepiece(["▁the", "é", "th"])
        return [
            recurrent_lm(
                *(make_lm, kind, 3),
                **{"tokenizer": tokenizer, "vocab": len(tokenizer), "end_ids": (tokenizer.eos_token_id,)},
            )
            for kind, tokenizer in zip(FIELDS, tokenizers, strict=True)
        ]

    @pytest.fixture(scope="class")
    def mixed(self, members):
        return Mixed(members, rj.Ensemble(members).union)

    def expect(self, mixed, weights, b, steps, **options):
        ids = [lm.tokenizer(TEXTS[b])["input_ids"] for lm in mixed.members]
        options |= {"max_new_tokens": int(steps[b]), "temperature": 1.0}
        return mixed.decode_row(ids, keys(b), weights, **options).text.decode("utf-8", errors="ignore")

    @pytest.mark.rare
    @pytest.mark.parametrize("rows", [1, 4])
    def test_tokens_are_those_without_a_cache(self, members, mixed, rows):
        out = rj.Ensemble(members).generate(TEXTS[:rows], max_new_tokens=N, weights=WEIGHTS, temperature=1.0)
        assert out.texts == [self.expect(mixed, lambda _: WEIGHTS, b, out.steps) for b in range(rows)]

    def test_a_member_that_was_skipped_catches_up(self, members, mixed):
        """Rows with several tokens pending are packed with others; a state stays where a member is not run."""
        ensemble = rj.Ensemble(members)
        policy = BoundPolicy(Draw(), np.full((4, 2), 0.5, np.float32), Dims(ensemble.widths, N), 1, sample=True)
        out = ensemble.generate(TEXTS, policy, max_new_tokens=N, temperature=1.0)
        drawn = np.nan_to_num(out.weights)
        assert {tuple(row) for row in drawn[0, : out.steps[0]].tolist()} == {(0.0, 1.0), (1.0, 0.0)}
        wanted = [self.expect(mixed, lambda s, b=b: drawn[b, s], b, out.steps, span_length=1) for b in range(4)]
        assert out.texts == wanted

    @pytest.mark.rare
    def test_going_on_stopping_and_streaming(self, members):
        ensemble = rj.Ensemble(members)
        options = {"weights": WEIGHTS, "temperature": 1.0, "seed": 3}
        whole = ensemble.generate(TEXTS, max_new_tokens=N, **options)
        part = ensemble.generate(TEXTS, max_new_tokens=2, keep=True, **options)
        assert ensemble.extend(part, N - 2).texts == whole.texts
        pieces = list(ensemble.stream(TEXTS, max_new_tokens=N, **options))
        assert list(map("".join, zip(*pieces, strict=True))) == whole.texts
        stop = next(text[3:5] for text in whole.texts if len(text) > 6)
        stopped = ensemble.generate(TEXTS, max_new_tokens=N, stop=[stop], **options)
        assert stopped.texts == [text.split(stop)[0] for text in whole.texts]


@pytest.mark.rare
def test_one_tokenizer_at_its_own_pace(pair, ensemble):
    """`draw` reads members of one tokenizer as if they had several."""
    out = write(ensemble, PROMPTS, weights="draw", span_length=1, temperature=1.0, max_new_tokens=9)
    for b, prompt in enumerate(PROMPTS):
        choose = lambda span, *_, b=b: np.nan_to_num(out.weights[b, span])  # noqa: E731
        options = {"span_length": 1, "max_new_tokens": 9, "temperature": 1.0}
        assert out.tokens[b] == reference.decode_row(pair, prompt, keys(b), choose, **options).tokens
