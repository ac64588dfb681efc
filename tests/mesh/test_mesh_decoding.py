"""Every kind of decoding on a mesh writes what one device writes."""

import dataclasses
import warnings

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.models import Encoder, ModelConfig
from rlae_jax.models.transformer import init_params
from rlae_jax.ppo.agent import PPOAgent, SetAgent
from tests.helpers.adapters import random_adapter
from tests.helpers.policies import Reader
from tests.helpers.recurrent import FIELDS, recurrent_lm
from tests.helpers.tokenizers import byte_level, sentencepiece

N = 9
# Five rows: no mesh divides them.
IDS, MASK = pad_rows([[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0], [1, 2]], 8)
GIVEN = {"prompt_ids": IDS, "prompt_mask": MASK, "max_new_tokens": N, "seed": 5}
SAMPLED = {"temperature": 1.0, "top_k": 9, "top_p": 0.9, "repetition_penalty": 1.2}
WEIGHTS = np.random.default_rng(5).dirichlet(np.ones(2), len(IDS)).astype(np.float32)


def on(mesh, members):
    """The members on a mesh, whose notices are tested elsewhere."""
    if mesh is None:
        return list(members)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [lm.on_mesh(mesh) for lm in members]


def same(one, other):
    """Tokens, weights and what else two generations hold."""
    assert one.tokens == other.tokens
    assert one.finish_reasons == other.finish_reasons
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)
    if one.scores is not None:
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-4)


@pytest.fixture(scope="module")
def pair(make_wide):
    return make_wide(0, end_ids=(4,)), make_wide(1, layers=1, kv_heads=4, end_ids=(4,))


def trained(members, policy, spans):
    dims = rj.fusion.policy.Dims(tuple(lm.config.hidden_width for lm in members), spans)
    return BoundPolicy(policy, policy.init(jax.random.key(2), dims), dims, 2, sample=True)


# name -> (fusion, options of generate)
KINDS = {
    "greedy": ("linear", {}),
    "weights-of-rows": ("loglinear", {"weights": WEIGHTS}),
    "sampled": ("topk:3", SAMPLED | {"samples": 2}),
    "confidence": ("linear", {"weights": "confidence", "scores": True}),
    "perplexity": ("linear", {"weights": "perplexity"}),
    "draw": ("linear", {"weights": "draw"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_members_with_one_tokenizer(pair, mesh, kind):
    fusion, options = KINDS[kind]
    alone, spread = (rj.Ensemble(on(where, pair), fusion).generate(**GIVEN, **options) for where in (None, mesh))
    same(spread, alone)
    assert len({str(row) for row in alone.tokens}) > 3


CHOOSER = PPOAgent(AgentConfig(projection=4, span_embedding=4, ffn_width=8, span_lengths=(1, 2, 4)))


SET = SetAgent(AgentConfig.of_set(projection=4, span_embedding=4, ffn_width=8))


@pytest.mark.parametrize(
    "policy",
    [Reader(), CHOOSER, pytest.param(SET, marks=pytest.mark.rare)],
    ids=["reader", "chooses-lengths", "set"],
)
def test_agents(pair, mesh, policy):
    def write(where):
        members = on(where, pair)
        return rj.Ensemble(members).generate(weights=trained(members, policy, N), **GIVEN)

    same(write(mesh), write(None))


def test_going_on_stopping_and_streaming(pair, mesh, make_tokenizer):
    """`extend`, stop strings and `stream` run the loop in pieces, between which the state stays where it is."""
    tokenizer = make_tokenizer([chr(97 + i) for i in range(23)])
    members = [dataclasses.replace(lm, tokenizer=tokenizer) for lm in pair]
    prompts = ["abc", "x", "helloyou"]

    def write(where):
        ensemble = rj.Ensemble(on(where, members))
        begun = ensemble.generate(prompts, max_new_tokens=4, keep=True, ignore_eos=True, temperature=1.0)
        stop = begun.texts[0][1:3]
        stopped = ensemble.generate(prompts, max_new_tokens=8, ignore_eos=True, temperature=1.0, stop=[stop])
        pieces = list(ensemble.stream(prompts, max_new_tokens=7, temperature=1.0))
        options = [["ab", "c"], ["x"], ["def", "q", "a"]]
        return ensemble.extend(begun, 5), stopped, pieces, ensemble.log_likelihoods(prompts, options)

    (extended, stopped, pieces, scored), expected = write(mesh), write(None)
    same(extended, expected[0])
    same(stopped, expected[1])
    assert stopped.finish_reasons[0] == "stop"
    assert pieces == expected[2]
    for mine, theirs in zip(scored, expected[3], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


@pytest.mark.parametrize("fusion", ["linear", "hidden"])
def test_adapters_of_one_base(make_wide, mesh, fusion):
    lm = make_wide(0, layers=1, end_ids=(4,))
    adapters = [random_adapter(lm, seed) for seed in range(3)]

    def write(where):
        (base,) = on(where, [lm])
        return rj.Ensemble.from_adapters(base, adapters, fusion).generate(weights=[0.2, 0.5, 0.3], **GIVEN, samples=2)

    same(write(mesh), write(None))


def test_rows_with_adapters_of_their_own(make_wide, mesh):
    lm = make_wide(0, layers=1, end_ids=(4,))
    adapters = [random_adapter(lm, seed) for seed in range(3)]

    def write(where):
        (base,) = on(where, [lm])
        return rj.Ensemble([base.with_adapters(adapters)]).generate(adapters=[0, 2, 1, 1, 0], **GIVEN)

    same(write(mesh), write(None))


@pytest.fixture(scope="module")
def mixed(make_wide):
    """A byte-level tokenizer and a SentencePiece-like one."""
    tokenizers = [byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "é"])]
    members = []
    for seed, tokenizer in enumerate(tokenizers):
        end = (tokenizer.eos_token_id,)
        size = -(-len(tokenizer) // 8) * 8
        members.append(make_wide(seed, layers=1, vocab=size, tokens=len(tokenizer), tokenizer=tokenizer, end_ids=end))
    return members


@pytest.mark.parametrize("options", [{}, {"weights": "draw", "temperature": 1.0}], ids=["linear", "draw"])
def test_members_with_different_tokenizers(mixed, mesh, options):
    prompts = ["the other", "é", "thé", "a b c d e f g", "th"]

    def write(where):
        return rj.Ensemble(on(where, mixed)).generate(prompts, max_new_tokens=N, **options)

    got, want = write(mesh), write(None)
    same(got, want)
    assert got.texts == want.texts


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="linear"),
        pytest.param({"weights": "draw", "temperature": 1.0}, id="draw", marks=pytest.mark.rare),
    ],
)
def test_members_with_states(make_wide, options):
    """They are divided by heads and by channels; groups of devices that draw make different numbers of passes."""
    members = [recurrent_lm(make_wide, kind, 2) for kind in FIELDS]
    spread = on(rj.make_mesh(4, 2), members)
    for lm, of in zip(spread, ("x", "v"), strict=True):
        kernel = lm.params["layers"][0]["recurrence"][of]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 2
    same(*(rj.Ensemble(lms).generate(**GIVEN, **options) for lms in (spread, members)))


def test_an_encoder_decoder(stored_checkpoint, mesh):
    if mesh.shape["model"] > 2:
        pytest.skip("it has two heads")
    lm = rj.load(stored_checkpoint("untied", "t5"))

    def write(where):
        return rj.Ensemble(on(where, [lm])).generate(**GIVEN, samples=2, temperature=1.0)

    same(write(mesh), write(None))


def test_an_agent_that_reads_the_text(make_wide, mesh):
    """An encoder in the loop, whose ids are a window in every row's state."""
    sizes = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 24}
    tokenizer = byte_level([b" a", b"on"], ["</s>"])
    config = ModelConfig(
        vocab=len(tokenizer), causal=False, has_head=False, rope=None, learned_positions=40, context=40, **sizes
    )
    encoder = Encoder(config, init_params(config, jax.random.key(5)), tokenizer, name="small")
    members = [
        make_wide(k, layers=1, vocab=-(-len(tokenizer) // 8) * 8, tokens=len(tokenizer), tokenizer=tokenizer)
        for k in range(2)
    ]
    policy = PPOAgent(AgentConfig(reads=("text", "span"), encoder="small", projection=4, ffn_width=8))

    def write(where):
        ensemble = rj.Ensemble(on(where, members), end_ids=(tokenizer.eos_token_id,))
        dims = ensemble.spec(policy=policy, span_length=2, max_new_tokens=N, reader=ensemble.reader(encoder)).dims
        params = policy.init(jax.random.key(1), dims)
        bound = BoundPolicy(policy, params, dims, 2, sample=True, encoder=encoder, text_tokens=8)
        return ensemble.generate(["abc", "x", "helloyou"], bound, max_new_tokens=N)

    same(write(mesh), write(None))


def test_scores_of_an_encoder(stored_checkpoint, mesh):
    """Its heads are held whole where the mesh does not divide them."""
    directory = stored_checkpoint("one_label", "roberta")
    alone = rj.load_encoder(directory)
    with warnings.catch_warnings(), rj.sharding.use(mesh):
        warnings.simplefilter("ignore")
        spread = rj.load_encoder(directory)
    assert spread.mesh == mesh
    ids = np.arange(8 * 6).reshape(8, 6) % 20 + 4
    np.testing.assert_allclose(spread.logits(ids), alone.logits(ids), atol=2e-5)
    np.testing.assert_allclose(spread.hidden(ids), alone.hidden(ids), atol=2e-5)


def test_the_compiled_loop_itself(pair, mesh):
    """`rj.decode` under a mesh, jitted by its user."""

    def write(where):
        members = on(where, pair)
        ensemble = rj.Ensemble(members)
        spec = ensemble.spec(max_new_tokens=N)
        ids, mask = np.repeat(IDS, 8, axis=0)[:8], np.repeat(MASK, 8, axis=0)[:8]
        with rj.sharding.use(where):
            state = jax.jit(rj.decode)(
                ensemble.params, ids, mask, np.full((1, 2), 0.5, np.float32), jax.random.key(0), spec
            )
        return np.asarray(state.tokens), np.asarray(state.steps)

    for mine, theirs in zip(write(mesh), write(None), strict=True):
        np.testing.assert_array_equal(mine, theirs)


def test_logits_states_and_scores(pair, mesh, make_wide):
    lm = make_wide(3, end_ids=(4,))
    (spread,) = on(mesh, [lm])
    ids = np.tile(IDS, (2, 1))[:8]
    for method in ("logits", "hidden", "log_probs"):
        expected = np.asarray(getattr(lm, method)(ids))
        np.testing.assert_allclose(np.asarray(getattr(spread, method)(ids)), expected, atol=2e-5)
    assert spread.fingerprint() == lm.fingerprint()
