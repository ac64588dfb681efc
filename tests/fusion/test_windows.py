"""Layers that keep only their window in the cache: the same tokens as without a cache, in fewer bytes.

Texts are several times as long as the windows, so that every place of a ring is written again and again. A model that
keeps everything is one whose rings are switched off; its configuration has another context, so that no program is
shared.
"""

import dataclasses

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion.decode import prefill
from rlae_jax.fusion.policy import BoundPolicy, Dims, Draw
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.models import cache
from rlae_jax.models.config import Rope
from tests.helpers import reference
from tests.helpers.adapters import EVERY_LAYER, random_adapter
from tests.helpers.mixed_reference import Mixed
from tests.helpers.tokenizers import byte_level, sentencepiece

FAMILIES = {
    "gemma3": {"local_layers": (0, 1), "window": 5, "layers": 3, "local_rope": Rope(100.0), "query_key_norm": "head"},
    "mistral": {"local_layers": (0, 1), "window": 7},
    "gemma2": {"local_layers": (0,), "window": 6, "attention_cap": 5.0, "logit_cap": 30.0},
    "llama4": {"local_layers": (0,), "window": 5, "chunked": True, "unrotated_layers": (1,)},
    "phi3": {"local_layers": (0, 1), "window": 1, "kv_heads": 4, "rope": Rope(10_000.0, fraction=0.5)},
}
PROMPTS = [[3], list(range(1, 15)), [5, 9, 2, 2, 7, 1]]
TEXTS = ["the", "ab the é x the the", "ééé thé", "x" * 30]
N = 24


@pytest.fixture
def whole_caches(monkeypatch):
    """whole_caches() -> from now on every layer keeps all slots."""
    return lambda: monkeypatch.setattr(cache, "layer_slots", lambda config, layer, slots, ahead=0: slots)


def elsewhere(lm):
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, context=lm.config.context + 1))


def write(ensemble, prompts=PROMPTS, **options):
    width = max(map(len, prompts))
    ids = [[0] * (width - len(row)) + row for row in prompts]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    return ensemble.generate(prompt_ids=ids, prompt_mask=mask, **{"max_new_tokens": N} | options)


def kept_bytes(ensemble, batch, t, n):
    """Of each member's cache, per row."""
    spec, ids = ensemble.spec(max_new_tokens=n), np.ones((batch, t), np.int32)
    prompts = prompts_from_arrays(ids, ids, n, jax.random.key(0))
    state = jax.eval_shape(lambda: prefill(ensemble.params, prompts, spec))
    layers = [held.layers for held in state.caches]
    return [sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held)) // batch for held in layers]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_without_a_cache(make_lm, family):
    """Against a whole forward for every token, beside a member without windows."""
    members = [make_lm(0, **FAMILIES[family]), make_lm(1, layers=1)]
    out = write(rj.Ensemble(members, end_ids=()), weights=[0.7, 0.3])
    for prompt, tokens in zip(PROMPTS, out.tokens, strict=True):
        row = reference.decode_row(
            members, prompt, jax.random.key(0), lambda *_: np.array([0.7, 0.3]), max_new_tokens=N
        )
        assert tokens == row.tokens


def test_bytes(make_lm):
    """What is allocated is what `cache_bytes` says: whole layers grow with the text, the others to their window."""
    members = [make_lm(0, **FAMILIES["gemma3"]), make_lm(1, **FAMILIES["mistral"])]
    per_slot = 2 * 2 * 4 * 4  # keys and values, heads, entries, bytes
    for t, n in ((2, 1), (3, 3), (4, 40), (40, 4)):
        slots = t + n
        expected = [per_slot * (slots + 2 * min(slots, 5)), per_slot * 2 * min(slots, 7)]
        assert kept_bytes(rj.Ensemble(members, end_ids=()), 2, t, n) == expected
        assert [cache.cache_bytes(lm.config, slots) for lm in members] == expected


class TestWhatGoesOn:
    """Everything that keeps, repeats or lengthens a cache."""

    @pytest.fixture(scope="class")
    def ensemble(self, make_lm):
        return rj.Ensemble([make_lm(0, **FAMILIES["gemma3"], sharpness=2.0), make_lm(1, layers=1)], end_ids=(4,))

    @pytest.mark.parametrize("first", [1, 9])
    def test_extend(self, ensemble, first):
        """From a text within the window as well as from one beyond it."""
        options = {"temperature": 1.2, "scores": True, "prompts": PROMPTS[::2]}
        whole = write(ensemble, **options)
        part = write(ensemble, max_new_tokens=first, keep=True, **options)
        longer = ensemble.extend(ensemble.extend(part, 3), N - first - 3)
        assert longer.tokens == whole.tokens
        np.testing.assert_allclose(longer.scores[0], whole.scores[0], rtol=0, atol=1e-5)

    def test_samples(self, ensemble, whole_caches):
        options = {"temperature": 1.2, "samples": 3}
        out = write(ensemble, **options)
        whole_caches()
        kept = rj.Ensemble([elsewhere(lm) for lm in ensemble.members], end_ids=(4,))
        assert write(kept, **options).tokens == out.tokens
        assert len(set(map(str, out.tokens))) == 3 * len(PROMPTS)

    def test_a_shared_base(self, make_lm, whole_caches):
        lm = make_lm(0, **FAMILIES["mistral"])
        adapters = [random_adapter(lm, seed, rank=2, alpha=1.0, targets=EVERY_LAYER) for seed in (1, 2)]
        out = write(rj.Ensemble.from_adapters(lm, adapters, end_ids=()))
        whole_caches()
        assert write(rj.Ensemble.from_adapters(elsewhere(lm), adapters, end_ids=())).tokens == out.tokens

    def test_many_rows(self, make_lm, whole_caches):
        """Prompts that are read in groups, each longer than the window."""
        lm = make_lm(0, **FAMILIES["gemma2"])
        prompts = np.random.default_rng(0).integers(0, 23, (32, 129)).tolist()
        out = write(rj.Ensemble([lm], end_ids=()), prompts, max_new_tokens=9)
        whole_caches()
        assert write(rj.Ensemble([elsewhere(lm)], end_ids=()), prompts, max_new_tokens=9).tokens == out.tokens


class TestDifferentTokenizers:
    """Each row of a member at its own slot, several tokens at a time."""

    @pytest.fixture(scope="class")
    def pair(self, make_lm):
        tokenizers = byte_level([b" the", b"th", b" x the th"], ["</s>"]), sentencepiece(["▁the", "é", "th"])
        fields = {"window": 4, "local_layers": (0,)}, {"window": 9, "local_layers": (0,)}
        return [
            make_lm(
                k, tokenizer=tokenizer, vocab=len(tokenizer), end_ids=(tokenizer.eos_token_id,), layers=1 + k, **own
            )
            for k, (tokenizer, own) in enumerate(zip(tokenizers, fields, strict=True))
        ]

    @pytest.mark.parametrize("rows", [pytest.param(1, marks=pytest.mark.rare), 4])
    def test_tokens_are_those_of_a_whole_cache(self, pair, rows, whole_caches):
        texts = TEXTS[-rows:]
        out = rj.Ensemble(pair).generate(texts, max_new_tokens=40, weights=[0.5, 0.5])
        whole_caches()
        kept = rj.Ensemble([elsewhere(lm) for lm in pair]).generate(texts, max_new_tokens=40, weights=[0.5, 0.5])
        assert (out.texts, out.tokens) == (kept.texts, kept.tokens)

    def test_tokens_of_chunks_are_those_without_a_cache(self, pair):
        """Against a whole forward for every entry."""
        members = [dataclasses.replace(lm, config=dataclasses.replace(lm.config, chunked=True)) for lm in pair]
        ensemble, weights = rj.Ensemble(members), np.array([0.5, 0.5], np.float32)
        mixed = Mixed(members, ensemble.union)
        out = ensemble.generate(TEXTS, weights, max_new_tokens=12)
        for text, written in zip(TEXTS, out.texts, strict=True):
            ids = [lm.tokenizer(text)["input_ids"] for lm in members]
            row = mixed.decode_row(ids, jax.random.key(0), lambda _: weights, max_new_tokens=12)
            assert written == row.text.decode(errors="ignore")

    @pytest.mark.rare
    def test_going_on_streams_and_likelihoods(self, pair, whole_caches):
        ensemble = rj.Ensemble(pair)
        options = {"weights": [0.4, 0.6], "temperature": 1.0, "seed": 3}
        whole = ensemble.generate(TEXTS, max_new_tokens=30, **options)
        part = ensemble.generate(TEXTS, max_new_tokens=2, keep=True, **options)
        assert ensemble.extend(part, 28).texts == whole.texts
        pieces = list(ensemble.stream(TEXTS, max_new_tokens=30, **options))
        assert list(map("".join, zip(*pieces, strict=True))) == whole.texts
        asked = TEXTS, [[text] for text in whole.texts], [0.4, 0.6]
        likely = ensemble.log_likelihoods(*asked)
        whole_caches()
        expected = rj.Ensemble([elsewhere(lm) for lm in pair]).log_likelihoods(*asked)
        np.testing.assert_allclose(likely, expected, rtol=0, atol=1e-4)

    @pytest.mark.rare
    def test_a_member_that_was_skipped_catches_up(self, pair, whole_caches):
        def draw(members):
            ensemble = rj.Ensemble(members)
            policy = BoundPolicy(Draw(), np.full((4, 2), 0.5, np.float32), Dims(ensemble.widths, 40), 1, sample=True)
            return ensemble.generate(TEXTS, policy, max_new_tokens=40, temperature=1.0)

        out = draw(pair)
        whole_caches()
        assert out.texts == draw([elsewhere(lm) for lm in pair]).texts
