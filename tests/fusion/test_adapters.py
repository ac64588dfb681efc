"""Decoding with adapters: they write what models with merged kernels write, through one pass over the base.

Nearly all the time is compilation, so the tests share models, shapes and options where they can.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion import members, programs
from rlae_jax.fusion.policy import Confidence, Dims
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays
from rlae_jax.models import transformer
from tests.helpers.adapters import EVERY_LAYER, PROMPTS, N, add_by_hand, random_adapter, write
from tests.helpers.policies import Reader

B = len(PROMPTS)
END_IDS = (6, 18)
SAMPLED = {"temperature": 1.3, "seed": 5}
PLATFORMS = ("cpu", "cuda", "tpu")


@pytest.fixture(scope="module")
def lm(make_lm) -> rj.LM:
    return make_lm(0, layers=1, sharpness=3.0, end_ids=END_IDS)


@pytest.fixture(scope="module")
def trio(lm) -> list[rj.Adapter]:
    """Of different layers and scales; two of them change the output head."""
    return [
        random_adapter(lm, 1, rank=2, alpha=1.0, targets=EVERY_LAYER, name="first"),
        random_adapter(lm, 2, rank=2, alpha=1.5, targets=("q", "v", "up"), name="second"),
        random_adapter(lm, 3, rank=2, alpha=1.2, targets=("o", "down", "head"), name="third"),
    ]


@pytest.fixture(scope="module")
def merged(lm, trio) -> list[rj.LM]:
    """The same adapters, each in kernels of its own."""
    return [dataclasses.replace(lm, params=add_by_hand(lm, [adapter], [1.0]), name=adapter.name) for adapter in trio]


@pytest.fixture(scope="module")
def stacked(lm, trio) -> rj.Ensemble:
    return rj.Ensemble([lm.with_adapters(trio)])


@pytest.fixture(scope="module")
def alone(merged) -> Callable[..., Any]:
    """alone(m, **options) -> what merged model m writes by itself."""
    return lambda m, **options: write(rj.Ensemble([merged[m]]), **options)


def assert_same(one: rj.Generation, other: rj.Generation) -> None:
    assert one.tokens == other.tokens
    assert one.steps == other.steps
    assert one.finish_reasons == other.finish_reasons


class TestMembersOfOneBase:
    @pytest.mark.parametrize(
        ("fusion", "options"),
        [
            pytest.param("linear", {}, marks=pytest.mark.device),
            pytest.param("linear", SAMPLED, marks=pytest.mark.slow),
            pytest.param("loglinear", {}, marks=pytest.mark.slow),
            pytest.param("loglinear", SAMPLED, marks=pytest.mark.slow),
        ],
        ids=["linear-greedy", "linear-sampled", "loglinear-greedy", "loglinear-sampled"],
    )
    def test_they_write_what_merged_models_write(self, lm, trio, merged, alone, fusion, options):
        """Alone with one-hot weights, together with weights per row."""
        shared = rj.Ensemble.from_adapters(lm, trio, fusion)
        separate = rj.Ensemble(merged, fusion)
        assert shared.widths == separate.widths
        assert shared.end_ids == separate.end_ids == END_IDS
        weights = np.random.default_rng(0).dirichlet(np.ones(3), B)
        texts = []
        for m in range(3):
            one = write(shared, weights=np.eye(3)[m], **options)
            assert_same(one, alone(m, **options))
            texts.append(str(one.tokens))
        for given in (None, weights):
            one, other = (write(e, weights=given, **options) for e in (shared, separate))
            assert_same(one, other)
            np.testing.assert_allclose(one.weights, other.weights, rtol=1e-6)
            texts.append(str(one.tokens))
        assert len(set(texts)) == len(texts)

    @pytest.mark.slow
    def test_a_policy_sees_the_members(self, lm, trio, merged):
        """Each member's hidden state and statistics, in the members' order; `Confidence` reads a part of them."""
        policy, states = Reader(), []
        for ensemble in (rj.Ensemble.from_adapters(lm, trio), rj.Ensemble(merged)):
            spec = ensemble.spec(max_new_tokens=N, policy=policy, span_length=2, record=True, sample_weights=True)
            params = policy.init(jax.random.key(1), Dims(ensemble.widths, spec.spans))
            states.append(ensemble.run(PROMPTS, params, 3, spec))
        one, other = states
        np.testing.assert_array_equal(one.tokens, other.tokens)
        decided = one.span_mask()
        for ours, expected in zip(*(jax.tree.leaves(state.trajectory) for state in states), strict=True):
            np.testing.assert_allclose(ours[decided], expected[decided], rtol=0, atol=1e-4)
        hidden = [h[decided] for h in one.trajectory.observation.hidden]
        assert min(np.abs(a - b).max() for a, b in ((hidden[0], hidden[1]), (hidden[1], hidden[2]))) > 0.1

    @pytest.mark.slow
    def test_confidence(self, lm, trio, merged):
        one, other = (
            write(e, weights=Confidence()) for e in (rj.Ensemble.from_adapters(lm, trio), rj.Ensemble(merged))
        )
        assert_same(one, other)
        np.testing.assert_array_equal(one.weights, other.weights)
        chosen = one.weights[~np.isnan(one.weights).any(axis=-1)].argmax(axis=-1)
        assert set(chosen.tolist()) == {0, 1, 2}

    def test_one_pass_over_one_base(self, lm, trio):
        """The compiled loop takes the base once and the adapters; it has as many products for three as for one."""
        sizes, products = {}, {}
        for k in (1, 3):
            ensemble = rj.Ensemble.from_adapters(lm, [trio[0], trio[0], trio[0]][:k])
            arguments = (ensemble.params, *batch_of(2), jnp.ones((1, k)) / k)
            spec = ensemble.spec(max_new_tokens=3)

            def run(params, ids, mask, weights, spec=spec):
                return rj.decode(params, ids, mask, weights, jax.random.key(0), spec).tokens

            lowered = jax.jit(run).lower(*arguments)
            products[k] = len(re.findall(r"\bstablehlo\.dot_general\b", lowered.as_text()))
            if k == 3:
                analysis = lowered.compile().memory_analysis()
                sizes = {"found": analysis.argument_size_in_bytes, "rest": nbytes(arguments[1:])}
        base, adapters = nbytes(lm.params), nbytes(ensemble.shared)
        assert sizes["found"] <= base + adapters + sizes["rest"] + 256
        assert base < sizes["found"] < 3 * base
        assert products[3] == products[1] > 0

    def test_members_are_told_apart(self, lm, trio, stacked):
        members = rj.Ensemble.from_adapters(lm, trio).members
        names = [member.name for member in members]
        assert names == ["first", "second", "third"]
        prints = [member.fingerprint() for member in (lm, *members, *stacked.members)]
        assert len(set(prints)) == len(prints)

    def test_different_bases_cannot_be_members(self, lm, make_lm, trio, raises_input_error):
        foreign = random_adapter(make_lm(1, width=12, layers=2), 1)
        raises_input_error(lambda: rj.Ensemble.from_adapters(lm, [trio[0], foreign]), "adapter-1 does not fit")
        raises_input_error(lambda: rj.Ensemble.from_adapters(lm, []), "at least one")
        shared = rj.Ensemble.from_adapters(lm, trio)
        raises_input_error(lambda: write(shared, adapters=[0] * B), "choose among them with weights")

    @pytest.mark.slow
    def test_an_encoder_decoder(self, t5):
        adapters = [random_adapter(t5, seed, rank=2, alpha=1.0, targets=EVERY_LAYER) for seed in range(3)]
        shared = rj.Ensemble.from_adapters(t5, adapters)
        merged = [dataclasses.replace(t5, params=add_by_hand(t5, [adapter], [1.0])) for adapter in adapters]
        separate, one, chosen = rj.Ensemble(merged), rj.Ensemble(merged[1:2]), rj.Ensemble([t5.with_adapters(adapters)])
        weights = np.random.default_rng(0).dirichlet(np.ones(3), B)
        assert_same(write(shared, weights=weights), write(separate, weights=weights))
        expected = write(one)
        assert_same(write(shared, weights=[0, 1, 0]), expected)
        assert_same(write(chosen, adapters=[1] * B), expected)
        assert len({tuple(row) for row in expected.tokens}) > 2


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def batch_of(rows: int) -> tuple[jax.Array, jax.Array]:
    ids, mask = pad_rows((PROMPTS * 3)[:rows], 8)
    return jnp.asarray(ids), jnp.asarray(mask)


class TestRowsOfOneModel:
    CHOICE = (2, 0, 1, 2, 0)

    @pytest.mark.parametrize("options", [{}, pytest.param(SAMPLED, marks=pytest.mark.slow)], ids=["greedy", "sampled"])
    def test_each_row_is_written_under_its_adapter(self, stacked, alone, options):
        expected = [alone(m, **options) for m in range(3)]
        for choice in (
            self.CHOICE,
            np.eye(3)[list(self.CHOICE)],
            [stacked.members[0].adapters[m] for m in self.CHOICE],
        ):
            out = write(stacked, adapters=choice, **options)
            for b, m in enumerate(self.CHOICE):
                assert out.tokens[b] == expected[m].tokens[b]
                assert out.finish_reasons[b] == expected[m].finish_reasons[b]

    def test_choices_share_a_program(self, stacked):
        write(stacked, adapters=self.CHOICE)
        before = programs.decode_batch.cache_size()
        outs = [write(stacked, adapters=choice) for choice in ([0] * B, np.full((B, 3), 0.2), self.CHOICE[::-1])]
        assert programs.decode_batch.cache_size() == before
        assert len({str(out.tokens) for out in outs}) == 3

    def test_sums_of_adapters_and_rows_alone(self, lm, trio, stacked):
        weights = np.array([[0.5, 0.5, 0], [0, 0, 0], [1, -0.5, 0.25], [0, 1, 1], [0, 0, 0.5]], np.float32)
        out = write(stacked, adapters=weights)
        for b in (0, 1, 2):
            params = add_by_hand(lm, trio, weights[b])
            assert write(rj.Ensemble([dataclasses.replace(lm, params=params)])).tokens[b] == out.tokens[b]
        for b in (1, 2):
            assert write(stacked, PROMPTS[b : b + 1], adapters=weights[b : b + 1]).tokens == out.tokens[b : b + 1]

    def test_a_single_adapter(self, lm, trio, alone):
        """Needs no choice, and heeds one."""
        one = rj.Ensemble([lm.with_adapters(trio[:1])])
        assert_same(write(one), alone(0))
        assert_same(write(one, adapters=["first"] * B), alone(0))
        assert_same(write(one, adapters=np.zeros((B, 1))), write(rj.Ensemble([lm])))

    @pytest.mark.slow
    def test_beside_a_member_without_a_choice(self, lm, trio, merged):
        """A choice is for the members that have several adapters; plain ones and those with one go along."""
        mixed = rj.Ensemble([lm, lm.with_adapters(trio[:1]), lm.with_adapters(trio)])
        out = write(mixed, adapters=self.CHOICE)
        for m in (0, 1):
            expected = write(rj.Ensemble([lm, merged[0], merged[m]]))
            for b in np.flatnonzero(np.array(self.CHOICE) == m):
                assert out.tokens[b] == expected.tokens[b]

    @pytest.mark.parametrize(
        ("choice", "parts"),
        [
            (None, ("has 3 adapters (first, second, third): say which row uses which",)),
            (["first"] * 4 + ["fourth"], ("fourth", "first, second, third")),
            ([0, 1, 2, 3, 0], ("numbers from 0 to 2",)),
            ([0, 1], ("[5]", "[5, 3]", "[2]")),
            ("first", ("one entry per row",)),
        ],
        ids=str,
    )
    def test_bad_choices(self, stacked, raises_input_error, choice, parts):
        before = programs.decode_batch.cache_size()
        raises_input_error(lambda: write(stacked, adapters=choice), *parts)
        assert programs.decode_batch.cache_size() == before

    def test_nothing_to_choose_from(self, lm, raises_input_error):
        raises_input_error(lambda: write(rj.Ensemble([lm]), adapters=[0] * B), "no member has adapters")


class TestPrograms:
    @pytest.fixture(params=["members", "rows"])
    def form(self, request, lm, trio, stacked) -> tuple[rj.Ensemble, Any]:
        """An ensemble and its parameters for six rows."""
        if request.param == "members":
            ensemble = rj.Ensemble.from_adapters(lm, trio)
            return ensemble, ensemble.params
        return stacked, stacked.params_for([0, 1, 2, 1, 0, 2], 6)

    def test_prompts_are_read_in_groups(self, form, monkeypatch):
        """Rows keep their adapters when a long batch is read a few rows at a time."""
        ensemble, params = form
        spec = ensemble.spec(max_new_tokens=2)
        ids, mask = batch_of(6)
        read: list[tuple[int, ...]] = []
        original = transformer.Model.read_prompt

        def spy(model, ids, *rest):
            read.append(ids.shape)
            return original(model, ids, *rest)

        monkeypatch.setattr(transformer.Model, "read_prompt", spy)
        caches = []
        for tokens in (2048, 14):
            monkeypatch.setattr(members, "_PREFILL_TOKENS", tokens)
            run = jax.jit(lambda *args: decoding.prefill(*args, spec).caches)
            caches.append(run(params, prompts_from_arrays(ids, mask, 2, jax.random.key(0))))
        rows = 6 * len(ensemble.members)
        assert read == [(rows, 7), (2, 7)]
        real = np.asarray(mask)[:, None, None, :7] * np.ones((len(ensemble.members), 1, 1, 1, 1))
        real = real.reshape(rows, 1, 1, 7)
        for whole, grouped in zip(*map(jax.tree.leaves, caches), strict=True):
            np.testing.assert_allclose(whole[..., :7] * real, grouped[..., :7] * real, rtol=0, atol=1e-5)

    def test_they_lower_for_every_platform(self, form):
        ensemble, params = form
        weights = jnp.full((6, len(ensemble.members)), 1.0)
        arguments = (params, *batch_of(6), weights, jax.random.key(0))
        for options in ({}, {"temperature": 0.7, "top_k": 5, "top_p": 0.9}):
            spec = ensemble.spec(max_new_tokens=6, **options)
            shapes = jax.eval_shape(lambda *args: args, *arguments)
            run = jax.jit(lambda *args, spec=spec: rj.decode(*args, spec).tokens)
            exported = jax.export.export(run, platforms=PLATFORMS)(*shapes)
            assert exported.platforms == PLATFORMS
            assert exported.out_avals[0].shape == (6, 6)
