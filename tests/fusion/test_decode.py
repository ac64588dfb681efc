"""The compiled loop against the slow reference, and what it must not do: copy caches or compile anew.

Nearly all the time of these tests is compilation, so each compares as much as one program can show.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import hlo
from rlae_jax.fusion.decode import decode_spans, member_agreement, prefill
from rlae_jax.fusion.members import left_align_padding
from rlae_jax.fusion.policy import Confidence, Dims, Fixed
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays, row_keys
from rlae_jax.models import ModelConfig
from rlae_jax.planning.workload import Workload
from tests.helpers import reference
from tests.helpers.policies import Reader

decode = jax.jit(rj.decode)

V = 23
PROMPTS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0]]
# Two of 23 ids end a text, so that rows end at different steps.
END_IDS = (6, 18)
N = 10


@pytest.fixture(scope="module")
def pair(make_lm):
    """Two members of different depth, width and head layout."""
    return make_lm(0), make_lm(1, width=12, layers=1, heads=2, kv_heads=1, head_width=6, ffn_width=20, tied_head=True)


def run(members, prompts, policy_params, seed=0, **options):
    first = rj.Ensemble(members[:1], options.pop("fusion", "linear"), end_ids=options.pop("end_ids", END_IDS))
    spec = dataclasses.replace(
        first.spec(**{"max_new_tokens": N} | options), members=tuple(lm.config for lm in members)
    )
    ids, mask = pad_rows(prompts, 8)
    return decode(tuple(lm.params for lm in members), ids, mask, policy_params, jax.random.key(seed), spec)


def written(state):
    return [row[:n].tolist() for row, n in zip(np.asarray(state.tokens), np.asarray(state.steps), strict=True)]


def expect(members, prompts, choose_weights, seed=0, **options):
    """The reference's rows; `choose_weights(b, key)` makes row b's function of (span, hidden, stats)."""
    rows = []
    for b, prompt in enumerate(prompts):
        key = jax.random.fold_in(jax.random.key(seed), b)
        settings = {"max_new_tokens": N, "end_ids": END_IDS} | options
        rows.append(reference.decode_row(members, prompt, key, choose_weights(b, key), **settings))
    return rows


OPTIONS = {
    "greedy": {},
    "greedy-min": {"min_new_tokens": 6},
    "temperature": {"temperature": 1.0},
    "cold": {"temperature": 0.5, "span_length": 1},
    "top-k": {"temperature": 1.5, "top_k": 3},
    "top-p": {"temperature": 1.5, "top_p": 0.8},
    "everything": {"temperature": 2.0, "top_k": 8, "top_p": 0.6, "min_new_tokens": 5},
    "min": {"temperature": 2.0, "min_new_tokens": N},
    "ignore-eos": {"temperature": 2.0, "ignore_eos": True},
    "min-p": {"temperature": 2.5, "min_p": 0.2, "scores": True},
    "penalty": {"repetition_penalty": 3.0, "min_new_tokens": 4, "scores": True},
    "reward": {"repetition_penalty": 0.3, "ignore_eos": True},
    "penalty-min-p": {"temperature": 2.5, "repetition_penalty": 2.0, "min_p": 0.1, "top_k": 12, "scores": True},
}


# "everything" holds what the slow ones have one by one.
MARKS = dict.fromkeys(("temperature", "top-k", "top-p", "min"), pytest.mark.slow)
MARKS |= dict.fromkeys(("greedy", "everything", "penalty-min-p"), pytest.mark.device)


@pytest.fixture(scope="module")
def expected_rows(pair):
    """The reference's rows for an operator and a name in OPTIONS, and the weights they were made with."""
    weights = np.random.default_rng(5).dirichlet(np.ones(2), len(PROMPTS)).astype(np.float32)

    @functools.cache
    def make(fusion, name):
        options = dict(OPTIONS[name])
        if options.pop("ignore_eos", False):
            options["end_ids"] = ()
        options.pop("scores", None)
        return weights, expect(pair, PROMPTS, lambda b, key: lambda *_: weights[b], seed=3, fusion=fusion, **options)

    return make


@pytest.mark.parametrize(
    ("fusion", "name"),
    [pytest.param("linear", name, marks=MARKS.get(name, [])) for name in OPTIONS]
    + [
        pytest.param("loglinear", name, marks=[] if name == "greedy" else pytest.mark.slow)
        for name in ("greedy", "temperature", "everything", "penalty-min-p")
    ],
)
def test_the_loop_equals_the_reference(pair, expected_rows, fusion, name):
    weights, rows = expected_rows(fusion, name)
    state = run(pair, PROMPTS, weights, seed=3, fusion=fusion, **OPTIONS[name])
    assert written(state) == [row.tokens for row in rows]
    assert np.asarray(state.ended).tolist() == [row.ended for row in rows]
    assert int(state.step) == max(len(row.tokens) for row in rows)
    assert np.asarray(state.done).all()
    assert not np.asarray(state.tokens)[np.arange(N) >= np.asarray(state.steps)[:, None]].any()
    if OPTIONS[name].get("scores"):  # of the fused distribution itself, whatever was penalised or forbidden
        for b, row in enumerate(rows):
            n = len(row.tokens)
            np.testing.assert_allclose(np.asarray(state.scores.fused)[b, :n], row.scores, rtol=0, atol=1e-4)
            np.testing.assert_allclose(np.asarray(state.scores.members)[b, :n], row.attribution, rtol=0, atol=1e-4)


def test_the_options_are_told_apart(expected_rows):
    """The comparison above would prove little if every option gave the same text, or if no row ended early."""
    rows = {name: expected_rows("linear", name)[1] for name in OPTIONS}
    texts = [str([row.tokens for row in rows[name]]) for name in OPTIONS]
    assert len(set(texts)) == len(OPTIONS)
    assert texts[0] != str([row.tokens for row in expected_rows("loglinear", "greedy")[1]])
    lengths = {len(row.tokens) for name in OPTIONS for row in rows[name] if row.ended}
    assert len(lengths) >= 3
    assert any(not row.ended for name in OPTIONS for row in rows[name])


@pytest.mark.parametrize(
    ("fusion", "sample_weights"),
    [
        pytest.param("linear", True, marks=pytest.mark.device),
        pytest.param("loglinear", False, marks=pytest.mark.slow),
    ],
)
def test_a_policy_sees_and_sets_what_the_reference_says(pair, fusion, sample_weights):
    span_length = 3
    policy = Reader(reads=("hidden", "stats", "span", "agreement"))
    params = policy.init(jax.random.key(1), Dims(tuple(lm.config.width for lm in pair), 4))
    options = {"fusion": fusion, "temperature": 1.2, "span_length": span_length}
    state = run(pair, PROMPTS, params, seed=2, policy=policy, record=True, sample_weights=sample_weights, **options)

    def choose_weights(b, key):
        def choose(span, hidden, stats):
            logits = policy.logits(params, span, hidden, stats)
            if sample_weights:
                drawn = jax.random.fold_in(jax.random.fold_in(key, 0x5EED), span)
                logits = logits + np.asarray(jax.random.gumbel(drawn, (2,)), np.float64)
            return np.exp(reference.log_softmax(logits))

        return choose

    rows = expect(pair, PROMPTS, choose_weights, seed=2, **options)
    assert written(state) == [row.tokens for row in rows]
    trajectory = jax.device_get(state.trajectory)
    mask = np.asarray(state.span_mask())
    assert mask.shape == (len(PROMPTS), 4)
    for b, row in enumerate(rows):
        assert mask[b].sum() == len(row.weights) == -(-len(row.tokens) // span_length)
        for span, weights in enumerate(row.weights):
            np.testing.assert_allclose(trajectory.weights[b, span], weights, rtol=0, atol=1e-4)
            seen = trajectory.observation
            np.testing.assert_allclose(seen.stats[b, span], row.stats[span], rtol=0, atol=1e-4)
            np.testing.assert_allclose(seen.agreement[b, span], row.agreement[span], rtol=0, atol=1e-5)
            for hidden, expected in zip(seen.hidden, row.hidden[span], strict=True):
                np.testing.assert_allclose(hidden[b, span], expected, rtol=0, atol=1e-4)
            assert seen.span[b, span] == span
            logits = policy.logits(params, span, row.hidden[span], row.stats[span])
            np.testing.assert_allclose(trajectory.value[b, span], logits.sum(), rtol=0, atol=1e-3)
            np.testing.assert_allclose(trajectory.log_prob[b, span], weights @ logits, rtol=0, atol=1e-3)
    assert np.ptp(trajectory.weights[mask][:, 0]) > 0.2  # weights really differ between rows and spans


def test_agreement_of_members_that_lack_tokens():
    """As over a union: what one cannot write it agrees about with nobody; members that share nothing have none."""
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(6), (3, 5)))
    log_probs[0, :, 4:], log_probs[1, :, :2], log_probs[2, 1, :4] = -np.inf, -np.inf, -np.inf
    found = np.asarray(member_agreement(tuple(jnp.asarray(p, jnp.float32) for p in log_probs)))
    for b in range(5):
        for j in range(3):
            for k in range(3):
                expected = 1.0 if j == k else reference.agreement(log_probs[j, b], log_probs[k, b])
                assert found[b, j, k] == pytest.approx(expected, abs=1e-6)
    assert found[1, 0, 2] == 0


def test_confidence_follows_the_lowest_entropy(pair):
    state = run(pair, PROMPTS, (), policy=Confidence(), span_length=1)

    def choose(span, hidden, stats):
        return np.eye(2)[np.argmin(stats[:, 0])]

    rows = expect(pair, PROMPTS, lambda b, key: choose, span_length=1)
    assert written(state) == [row.tokens for row in rows]
    chosen = np.concatenate([np.argmax(row.weights, axis=1) for row in rows])
    assert set(chosen) == {0, 1}


@pytest.mark.device
def test_one_hot_weights_equal_the_member_alone(pair):
    options = {"temperature": 1.3, "top_k": 9}
    one_hot = np.eye(2, dtype=np.float32)
    texts = []
    for k, member in enumerate(pair):
        together = run(pair, PROMPTS, one_hot[[k] * len(PROMPTS)], **options)
        alone = run([member], PROMPTS, np.ones((len(PROMPTS), 1), np.float32), **options)
        rows = expect([member], PROMPTS, lambda b, key: lambda *_: np.ones(1), **options)
        assert written(together) == written(alone) == [row.tokens for row in rows]
        texts.append(str(written(alone)))
    assert texts[0] != texts[1]


def test_three_members_and_a_function_as_the_operator(make_lm):
    """An operator of the user's own: the largest probability of any member, whatever the weights."""

    def best(log_probs, weights):
        return jnp.max(jnp.stack(log_probs), axis=0) + 0.0 * weights[:, :1]

    members = [make_lm(seed, layers=1) for seed in range(3)]
    state = run(members, PROMPTS, np.full((len(PROMPTS), 3), 1 / 3, np.float32), fusion=best)
    for prompt, tokens in zip(PROMPTS, written(state), strict=True):
        log_probs = [reference.read(lm, prompt)[1] for lm in members]
        assert tokens[0] == np.argmax(np.max(log_probs, axis=0))


def test_heads_padded_beyond_the_others_lose_the_rest(make_lm):
    """The longer vocabulary is cut before the softmax, so that no member spends probability on ids nobody shares."""
    members = [make_lm(0, layers=1), make_lm(3, layers=1, vocab=V + 9)]
    weights = np.array([[0.2, 0.8]] * len(PROMPTS), np.float32)
    rows = expect(members, PROMPTS, lambda b, key: lambda *_: weights[b])
    assert written(run(members, PROMPTS, weights)) == [row.tokens for row in rows]
    # Alone it does choose them.
    alone = expect(members[1:], PROMPTS, lambda b, key: lambda *_: np.ones(1), end_ids=())
    assert max(max(row.tokens) for row in alone) >= V


def test_prompts_may_be_padded_on_either_side_or_with_holes(make_lm):
    lm = make_lm(0, layers=1)
    spec = rj.Ensemble([lm], end_ids=()).spec(max_new_tokens=N, temperature=1.0)
    layouts = ["abc.....", ".....abc", "..abc...", "a..b...c"]
    letters = {"a": 3, "b": 14, "c": 15, ".": 22}
    ids = np.array([[letters[letter] for letter in layout] for layout in layouts])
    keys = jnp.stack([jax.random.key(0)] * 4)
    tokens = np.asarray(decode((lm.params,), ids, ids != 22, np.ones((1, 1), np.float32), keys, spec).tokens)
    np.testing.assert_array_equal(tokens, np.tile(tokens[:1], (4, 1)))
    assert len(set(tokens[0])) > 1


def test_left_align_padding():
    ids = jnp.array([[5, 6, 0, 0], [0, 7, 0, 8], [1, 2, 3, 4]])
    mask = jnp.array([[1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 1]])
    aligned, real = left_align_padding(ids, mask)
    np.testing.assert_array_equal(real, [[0, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1]])
    np.testing.assert_array_equal(jnp.where(real, aligned, -1), [[-1, -1, 5, 6], [-1, -1, 7, 8], [1, 2, 3, 4]])


def test_row_keys():
    key = jax.random.key(7)
    folded = row_keys(key, 3)
    for b in range(3):
        np.testing.assert_array_equal(jax.random.key_data(folded[b]), jax.random.key_data(jax.random.fold_in(key, b)))
    batch = jax.random.split(key, 3)
    np.testing.assert_array_equal(jax.random.key_data(row_keys(batch, 3)), jax.random.key_data(batch))


def test_rows_that_are_not_active_write_nothing(make_lm):
    lm = make_lm(0, layers=1)
    spec = rj.Ensemble([lm], end_ids=()).spec(max_new_tokens=4)
    ids, mask = pad_rows(PROMPTS, 8)

    def steps(*active):
        state = decode((lm.params,), ids, mask, np.ones((1, 1), np.float32), jax.random.key(0), spec, np.array(active))
        assert not np.asarray(state.tokens)[~np.array(active)].any()
        return np.asarray(state.steps).tolist(), int(state.step)

    assert steps(True, False, True, False) == ([4, 0, 4, 0], 4)
    assert steps(False, False, False, False) == ([0, 0, 0, 0], 0)


def test_the_loop_stops_when_every_row_is_done(make_chain_lm):
    """A counter: token i is followed by i + 1, and 9 ends the text."""
    lm = make_chain_lm(20.0 * np.eye(10)[(np.arange(10) + 1) % 10], end_ids=(9,))
    state = run([lm], [[5], [7], [2]], np.ones((3, 1), np.float32), end_ids=(9,), max_new_tokens=60)
    assert written(state) == [[6, 7, 8, 9], [8, 9], [3, 4, 5, 6, 7, 8, 9]]
    assert int(state.step) == 7
    assert np.asarray(state.ended).all()
    state = run([lm], [[5], [7], [2]], np.ones((3, 1), np.float32), end_ids=(9,), max_new_tokens=4)
    assert np.asarray(state.ended).tolist() == [True, True, False]
    assert np.asarray(state.steps).tolist() == [4, 2, 4]


def test_min_new_tokens_takes_the_best_token_that_does_not_end(make_chain_lm):
    """Everything is followed by the end token 3 first and 1 second."""
    lm = make_chain_lm(np.tile([0.0, 2.0, 1.0, 5.0], (4, 1)))
    for least in range(4):
        state = run([lm], [[0]], np.ones((1, 1), np.float32), end_ids=(3,), min_new_tokens=least)
        assert written(state) == [[1] * least + [3]]


def test_decode_can_be_mapped_over_keys(make_lm):
    """`decode` is pure: under vmap over keys every row is what the reference writes with that key."""
    lm = make_lm(0, layers=1)
    spec = rj.Ensemble([lm], end_ids=END_IDS).spec(max_new_tokens=4, temperature=1.5)
    ids, mask = pad_rows(PROMPTS, 8)
    weights = np.ones((4, 1), np.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    mapped = jax.jit(jax.vmap(lambda key: rj.decode((lm.params,), ids, mask, weights, key, spec)))(keys)
    for i, key in enumerate(keys):
        for b, prompt in enumerate(PROMPTS):
            row = reference.decode_row(
                [lm],
                prompt,
                jax.random.fold_in(key, b),
                lambda *_: np.ones(1),
                max_new_tokens=4,
                temperature=1.5,
                end_ids=END_IDS,
            )
            assert np.asarray(mapped.tokens)[i, b, : mapped.steps[i, b]].tolist() == row.tokens
    assert len({str(tokens) for tokens in mapped.tokens}) == 3


def test_data_fields_of_the_spec_do_not_compile_anew(make_lm):
    """Temperature, top_p, min_p, the penalty, min_new_tokens, weights and the key are data; what shapes the
    program is static."""
    lm = make_lm(0, layers=1)
    fresh = jax.jit(functools.partial(rj.decode))  # an object of its own: jit caches by the function
    ensemble = rj.Ensemble([lm, lm], end_ids=END_IDS)
    ids, mask = pad_rows(PROMPTS, 8)

    def call(seed, weight, **options):
        weights = np.array([[weight, 1 - weight]] * 4, np.float32)
        fresh(ensemble.params, ids, mask, weights, jax.random.key(seed), ensemble.spec(max_new_tokens=2, **options))
        return fresh._cache_size()

    assert call(0, 0.5, temperature=1.0, top_p=0.9) == 1
    assert call(1, 0.3, temperature=0.3, top_p=0.5) == 1
    assert call(1, 0.3, temperature=0.3, top_p=0.5, min_new_tokens=2) == 1
    assert call(1, 0.3, temperature=0.3, min_p=0.5, repetition_penalty=1.1) == 2
    assert call(2, 0.4, temperature=1.3, min_p=0.1, repetition_penalty=0.9) == 2


@pytest.mark.parametrize("policy", [Fixed(), Reader()], ids=lambda policy: type(policy).__name__)
@pytest.mark.device
def test_the_loop_copies_no_cache(make_lm, policy):
    """With the state donated the caches are updated in place: what the program needs beside them is small, also where
    a policy decides inside a `cond`."""
    lm = make_lm(0, layers=1)
    ensemble = rj.Ensemble([lm, lm], end_ids=())
    spec = ensemble.spec(max_new_tokens=256, policy=policy)
    params = ensemble.params
    ids, mask = np.ones((8, 512), np.int32), np.ones((8, 512), np.int32)
    policy_params = policy.init(jax.random.key(0), Dims(ensemble.widths, spec.spans))
    prompts = prompts_from_arrays(ids, mask, 256, jax.random.key(0))
    state = jax.eval_shape(lambda: prefill(params, prompts, spec))
    compiled = jax.jit(decode_spans, donate_argnums=1).lower(params, state, policy_params, spec).compile()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes <= 0.5 * cache_bytes


@pytest.mark.parametrize("rows", [1, 2])
def test_the_loop_copies_no_long_cache_of_one_key_head(rows):
    """Axes of size 1, which the CPU compiler drops before a product."""
    config = ModelConfig(vocab=24, width=16, layers=2, heads=2, kv_heads=1, head_width=16, ffn_width=16)
    workload = Workload(members=(config,), batch=rows, prompt=40_000, new=64)
    module = hlo.parse(workload.lower_loop(None).compile().as_text())
    caches = workload.cache_shapes(rj.make_mesh(1, 1))
    inside = module.inside(module.loop_carrying(*caches))
    assert module.copies(inside, min(shape.nbytes for shape in caches)) == []
