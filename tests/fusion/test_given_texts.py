"""Given tokens read in whole sequences: what the decoding loop gives where it is made to write them one by one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.fusion import likelihood
from rlae_jax.fusion.policy import BoundPolicy, Dims, Online
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.adapters import random_adapter
from tests.helpers.policies import Reader, SoftmaxNoise
from tests.helpers.recurrent import recurrent_lm
from tests.helpers.tokenizers import byte_level, sentencepiece

L = 3
# Prompts of several lengths, some of which several texts share; texts of one token up to eight, two of them the same.
_RNG = np.random.default_rng(0)
PROMPTS = [_RNG.integers(0, 23, n).tolist() for n in (1, 5, 9, 4, 7)]
OF_PROMPT = [0, 0, 1, 2, 2, 2, 3, 4, 4]
ROWS = [PROMPTS[p] for p in OF_PROMPT]
TOKENS = [_RNG.integers(0, 23, n).tolist() for n in (1, 4, 3, 8, 2, 5, 7, 3)]
TOKENS.append(TOKENS[-1])
WEIGHTS = _RNG.dirichlet([1.0, 1.0], len(ROWS)).astype(np.float32)


def by_the_loop(ensemble, rows, tokens, weights=None, span_length=None, prompts=None, chat=False):
    options = SamplingOptions(
        max_new_tokens=max(map(len, tokens)), span_length=span_length, scores=True, ignore_eos=True, chat=chat
    )
    return ensemble._score_written(rows, tokens, weights, options, prompts, 0)


def same(found, expected, atol=2e-5):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in ("fused", "members", "weights"):
            mine, theirs = getattr(one, name), getattr(other, name)
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=atol, err_msg=name)


def compare(ensemble, weights=None, span_length=None, rows=ROWS, tokens=TOKENS, **options):
    found = ensemble.score_tokens(rows, tokens, weights, span_length, **options)
    same(found, by_the_loop(ensemble, rows, tokens, weights, span_length, **options))
    return found


@pytest.fixture(scope="module")
def pair(make_lm):
    """Of different architecture, and one with a local layer whose window the texts outgrow."""
    return [
        make_lm(0, end_ids=(4,), local_layers=(0,), window=4),
        make_lm(1, width=12, layers=1, heads=2, kv_heads=1, head_width=6, end_ids=(4,)),
    ]


def cubes(log_probs, weights):
    """An operator of a user's own."""
    return sum(weights[:, k, None] * jnp.exp(log_p / 3.0) for k, log_p in enumerate(log_probs))


@pytest.mark.parametrize(
    "fusion",
    [
        "linear",
        "loglinear",
        pytest.param("topk:3", marks=pytest.mark.rare),
        pytest.param(cubes, marks=pytest.mark.rare),
    ],
)
def test_operators(pair, fusion):
    compare(rj.Ensemble(pair, fusion), WEIGHTS)


def bound(ensemble, policy, span_length=L, sample=False, spans=8):
    dims = Dims(ensemble.widths, spans)
    return BoundPolicy(policy, policy.init(jax.random.key(3), dims), dims, span_length, sample)


@dataclasses.dataclass(frozen=True)
class ReadsAll(Reader):
    """Prompts and agreement, too."""

    reads: tuple[str, ...] = ("hidden", "stats", "span", "prompt", "agreement")

    def apply(self, params, observation):
        distribution, value = super().apply(params, observation)
        return SoftmaxNoise(distribution.logits_bk + observation.prompt + observation.agreement[:, 0]), value


AGENT = PPOAgent(AgentConfig(reads=("prompt", "hidden"), projection=4, ffn_width=8))


@pytest.mark.parametrize(
    ("policy", "sample", "fusion"),
    [
        (ReadsAll(), True, "loglinear"),
        (Online(0.5, 0.1), False, "loglinear"),
        *(
            pytest.param(policy, sample, "linear", marks=pytest.mark.rare)
            for policy, sample in (
                (ReadsAll(), False),
                (AGENT, False),
                ("confidence", False),
                ("draw", True),
                ("bayes", False),
            )
        ),
    ],
)
def test_policies_see_what_they_would_have_seen(pair, policy, sample, fusion):
    """Also what was drawn is the same."""
    ensemble = rj.Ensemble(pair, fusion)
    weights = policy if isinstance(policy, str) else bound(ensemble, policy, sample=sample)
    found = compare(ensemble, weights)
    assert np.ptp(found[3].weights[:, 0]) > 1e-3  # it acted


@pytest.mark.rare
def test_policies_that_choose_spans_are_left_to_the_loop(pair):
    ensemble = rj.Ensemble(pair)
    config = AgentConfig(reads=("hidden",), projection=4, ffn_width=8, span_lengths=(1, 3))
    policy = bound(ensemble, PPOAgent(config), sample=True)
    found = ensemble.score_tokens(ROWS, TOKENS, policy, top=23)
    for own, one in zip(TOKENS, found, strict=True):
        assert one.weights.shape == (len(own), 2)
        np.testing.assert_allclose(one.fused, np.log(np.sum(one.weights * np.exp(one.members), axis=1)), atol=1e-5)
        np.testing.assert_allclose(np.sort(one.top)[np.arange(len(own)), -1], one.top[:, 0])
        assert all(one.top[n][list(one.top_tokens[n]).index(t)] == one.fused[n] for n, t in enumerate(own))


CASES = {
    "chunks": [{"local_layers": (0,), "window": 3, "chunked": True, "unrotated_layers": (1,)}],
    "learned positions": [{"rope": None, "learned_positions": 64}],
    "others' keys": [{"layers": 3, "reading_layers": 1, "local_layers": (0, 2), "window": 3}],
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=pytest.mark.rare) for name in CASES])
def test_attention_of_other_kinds(make_lm, case):
    compare(rj.Ensemble([make_lm(k, **fields) for k, fields in enumerate(CASES[case])], end_ids=()))


@pytest.mark.parametrize("kind", [pytest.param("short"), pytest.param("delta", marks=pytest.mark.rare)])
def test_recurrent_layers_read_each_text_by_itself(make_lm, pair, kind):
    compare(rj.Ensemble([recurrent_lm(make_lm, kind), pair[1]], end_ids=()), WEIGHTS)


@pytest.mark.rare
def test_an_encoder_decoder(t5):
    ensemble = rj.Ensemble([t5, t5], "loglinear")
    compare(ensemble, bound(ensemble, Reader()))


@pytest.mark.rare
@pytest.mark.parametrize("fusion", ["hidden", "linear"])
def test_adapters_of_one_base(pair, fusion):
    adapters = [random_adapter(pair[0], seed) for seed in range(2)]
    ensemble = rj.Ensemble.from_adapters(pair[0], adapters, fusion)
    compare(ensemble, WEIGHTS if fusion == "hidden" else bound(ensemble, Reader()))


class TestDifferentTokenizers:
    TEXTS = ("ab the é x the the", "the", "ééé thé", "x" * 30)
    OPTIONS = ((" the", " é x", "ab"), ("x",), (" théâtre the th",), ("ab the the x",))

    @pytest.fixture(scope="class")
    def ensemble(self, make_lm):
        tokenizers = byte_level([b" the", b"th", b" x the th"], ["</s>"]), sentencepiece(["▁the", "é", "th"])
        members = [
            make_lm(k, tokenizer=t, vocab=len(t), end_ids=(t.eos_token_id,), layers=1 + k)
            for k, t in enumerate(tokenizers)
        ]
        return rj.Ensemble(members)

    def asked(self, ensemble):
        prompts = [text for text, own in zip(self.TEXTS, self.OPTIONS, strict=True) for _ in own]
        options = [option for own in self.OPTIONS for option in own]
        tokens = [ensemble.codec.continuation(p, o, True) for p, o in zip(prompts, options, strict=True)]
        prompts.append("th x")
        union = ensemble.union
        several = union.choosable & ((union.lengths(0) > 1) | (union.lengths(1) > 1))
        tokens.append([*np.flatnonzero(several), *np.flatnonzero(union.choosable)[::60]])
        assert any(a > 1 for own in tokens for _, counts in ensemble.codec.spell(own) for a in counts)
        return {"rows": ensemble.encode(prompts), "tokens": tokens, "prompts": prompts}

    @pytest.mark.parametrize("fusion", ["linear", pytest.param("topk:4", marks=pytest.mark.rare)])
    def test_entries(self, ensemble, fusion):
        ensemble = ensemble.with_fusion(fusion)
        compare(ensemble, [0.3, 0.7], **self.asked(ensemble))

    @pytest.mark.rare
    def test_a_policy_that_reads_everything(self, ensemble):
        policy = bound(ensemble, ReadsAll(), spans=24)
        compare(ensemble, policy, **self.asked(ensemble))

    @pytest.mark.rare
    @pytest.mark.parametrize("policy", ["online", "bayes"])
    def test_policies_that_keep_account(self, ensemble, policy):
        """Also of entries that a member lacks."""
        found = compare(ensemble, policy, **self.asked(ensemble))
        assert all(np.all(np.isfinite(one.weights)) for one in found)
        assert np.ptp(found[-1].weights[:, 0]) > 1e-3

    def test_the_likeliest(self, ensemble):
        asked = self.asked(ensemble)
        rows, tokens = (asked[name][:-1] for name in ("rows", "tokens"))  # the last is no text
        found = ensemble.score_tokens(rows, tokens, top=ensemble.union.size)
        for one, own in zip(found, tokens, strict=True):
            assert np.all(one.top[:, 1:] <= one.top[:, :-1])
            for n, token in enumerate(own):
                (at,) = np.flatnonzero(one.top_tokens[n] == token)
                assert one.top[n, at] == pytest.approx(one.fused[n], abs=1e-6)
            np.testing.assert_allclose(np.exp(one.top).sum(axis=1), 1.0, atol=1e-5)

    def test_a_text_and_its_beginning(self, ensemble):
        """One tokenizer puts nothing before a text, so that the first entry is given to both."""
        for text in self.TEXTS:
            row, tokens = ensemble.split_text(text)
            first = ensemble.codec.continuation("", text, False)[:1]
            assert ensemble.codec.decode([row], [[*first, *tokens]])[0].strip() == text
            assert all(row)
            assert len(ensemble.score_tokens([row], [tokens])[0].fused) == len(tokens)


def test_the_likeliest_tokens(pair):
    """Against whole forward passes."""
    ensemble = rj.Ensemble(pair)
    found = ensemble.score_tokens(ROWS, TOKENS, [0.4, 0.6], top=5)
    ids, mask = np.zeros((2, len(ROWS), 24), np.int32)
    for b, (row, own) in enumerate(zip(ROWS, TOKENS, strict=True)):
        ids[b, : len(row) + len(own)], mask[b, : len(row) + len(own)] = [*row, *own], 1
    each = [jax.nn.softmax(lm.logits(ids, mask)) for lm in pair]
    all_fused = np.log(0.4 * np.asarray(each[0]) + 0.6 * np.asarray(each[1]))
    for row, own, one, fused in zip(ROWS, TOKENS, found, all_fused, strict=True):
        fused = fused[len(row) - 1 : len(row) + len(own) - 1]
        np.testing.assert_allclose(one.top, -np.sort(-fused, axis=1)[:, :5], atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(fused, one.top_tokens, axis=1), one.top, atol=1e-4)
        np.testing.assert_allclose(one.fused, fused[np.arange(len(own)), own], atol=1e-4)


@pytest.mark.parametrize("fusion", ["loglinear", pytest.param("linear", marks=pytest.mark.rare)])
def test_small_parts_are_the_whole(pair, fusion, monkeypatch):
    """Few distributions at a time, few tokens in a batch, branches that do not fit behind one prompt."""
    ensemble = rj.Ensemble(pair, fusion)
    policy = bound(ensemble, ReadsAll(), sample=True)
    whole = ensemble.score_tokens(ROWS, TOKENS, policy)
    monkeypatch.setattr(likelihood, "_ALIVE", 23 * 3 * 5)
    monkeypatch.setattr(likelihood, "_TOKENS", 32)
    monkeypatch.setattr(likelihood, "_BRANCH_TOKENS", 4)
    done = []
    same(ensemble.score_tokens(ROWS, TOKENS, policy, on_progress=done.append), whole)
    assert len(done) > 2
    assert done[-1] == len(ROWS)
    assert sorted(done) == done


@settings(max_examples=60)
@given(
    prompts=st.lists(st.integers(1, 300), min_size=1, max_size=12),
    texts=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 80)), min_size=1, max_size=40),
    groups=st.sampled_from([1, 2, 4]),
)
def test_every_text_is_asked_once(make_lm, prompts, texts, groups):
    """And reads its own prompt and itself, whatever stands beside it."""
    spec = rj.Ensemble([make_lm(0)], end_ids=()).spec()
    rng = np.random.default_rng(len(texts))
    rows = [rng.integers(0, 23, n).tolist() for n in prompts]
    pairs = [(rows[p % len(rows)], rng.integers(0, 23, n).tolist()) for p, n in texts]
    asked = [likelihood.Given((row,), own, ((own, [1] * len(own)),)) for row, own in pairs]
    seen = []
    for batch in likelihood.plan(asked, spec, None, groups):
        t = batch.texts
        b, n, r = len(t.ids[0]) // groups, len(t.asked.row) // groups, len(batch.pairs) // groups
        assert not any(len(leaf) % groups for leaf in jax.tree.leaves(t))
        for pair, start in batch.slots:
            group, own = start // n, pairs[pair]
            seen.append(pair)
            for step, token in enumerate(own[1]):
                at = start + step
                row, place = group * b + t.asked.row[at], t.asked.places[0][at]
                text, branch, ids = (x[0][row] for x in (t.text, t.branch, t.ids))
                visible = (text == text[place]) & ((branch == 0) | (branch == branch[place]))
                visible &= np.arange(len(ids)) <= place
                assert ids[visible].tolist() == [*own[0], *own[1][:step]]
                assert t.position[0][row][visible].tolist() == list(range(len(own[0]) + step))
                assert (t.asked.token[at], t.asked.step[at]) == (token, step)
                answer = group * r + t.asked.answer[at]
                assert (t.answers.pair[answer], t.answers.length[answer]) == (pair, len(own[1]))
                assert group * n + t.answers.first[answer] == start
    assert sorted(seen) == list(range(len(pairs)))


def test_programs_are_used_again(pair):
    """Other texts of about the same number and length compile nothing."""
    from rlae_jax.fusion import programs

    ensemble = rj.Ensemble(pair)
    rng = np.random.default_rng(5)
    sizes = set()
    for _ in range(3):
        rows = [rng.integers(0, 23, n).tolist() for n in (22, *rng.integers(18, 23, 15))]
        tokens = [rng.integers(0, 23, 3).tolist() for _ in rows]
        ensemble.score_tokens(rows, tokens, rng.dirichlet([1, 1], 16))
        sizes.add(programs.read_given.cache_size())
    assert len(sizes) == 1


def test_it_lowers_everywhere(pair):
    ensemble = rj.Ensemble(pair, "loglinear")
    spec = ensemble.spec(policy=Reader(), max_new_tokens=8, span_length=L, ignore_eos=True)
    asked = [likelihood.Given((row,), own, ((own, [1] * len(own)),)) for row, own in zip(ROWS, TOKENS, strict=True)]
    (batch,) = likelihood.plan(asked, spec, None, 1)
    params = Reader().init(jax.random.key(0), Dims(ensemble.widths, 8))
    run = jax.jit(functools.partial(likelihood.read_given, top=2))
    shapes = jax.eval_shape(lambda *args: args, ensemble.params, batch.texts, params, spec)
    assert jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(*shapes).out_avals


def test_bad_input(pair, raises_input_error):
    ensemble = rj.Ensemble(pair)
    raises_input_error(lambda: ensemble.score_tokens([[1]], []), "1 rows", "0 lists")
    raises_input_error(lambda: ensemble.score_tokens([[1]], [[23]]), "row 0 has 23", "0 to 23 - 1")
    raises_input_error(lambda: ensemble.score_tokens([[99]], [[1]]), "99")
    raises_input_error(lambda: ensemble.score_tokens([[1] * 500], [[1] * 14]), "512", "text 0 has 513")
    raises_input_error(lambda: ensemble.score_tokens([[1]], [[1]], [0.5]), "weights")
    assert len(ensemble.score_tokens([[1] * 500], [[1] * 13])[0].fused) == 13
    none, one = ensemble.score_tokens([[1], [2]], [[], [3]], top=2)
    assert none.top.shape == (0, 2)
    assert one.top_tokens.shape == (1, 2)
    assert ensemble.score_tokens([[1]], [[]])[0].members.shape == (0, 2)
