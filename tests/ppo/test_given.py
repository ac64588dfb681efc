"""Learning from given texts: draws, rewards and updates against slow ones, known answers, and whole runs."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig, MAPPOConfig, PPOConfig
from rlae_jax.fusion.cutting import Cut
from rlae_jax.fusion.kept import Kept
from rlae_jax.fusion.policy import Dims, Observation
from rlae_jax.fusion.prompts import row_keys
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import ModelConfig
from rlae_jax.ppo import given
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.runs.metrics import read_metrics
from tests.helpers import toys

L, WIDTH = 2, 3
AGENT = AgentConfig(reads=("hidden", "span"), projection=4, span_embedding=3, ffn_width=8)


def kept_of(log_probs, tokens, hidden=None, mass=()):
    """Texts of so many tokens each, whose spans are as given."""
    counts = [-(-n // L) for n in tokens]
    spans = sum(counts)
    window = np.repeat(np.arange(len(tokens)), counts)
    span = np.concatenate([np.arange(n) for n in counts])
    length = np.minimum(np.array(tokens)[window] - span * L, L)
    part = {"log_probs": log_probs.astype(np.float32)}
    if not isinstance(mass, tuple):
        part["mass"] = mass.astype(np.float32)
    if hidden is not None:
        part |= {f"hidden.{k}": own.astype(np.float32) for k, own in enumerate(hidden)}
    assert log_probs.shape[:2] == (spans, L)
    texts = np.arange(len(tokens))
    cut = Cut([[1]] * len(tokens), [[1] * n for n in tokens], [""] * len(tokens), texts, np.array(tokens) * 3)
    return Kept(cut, ("hidden", "span"), L, [part], window, span, length)


def spec_of(agent, members=2, spans=8):
    config = ModelConfig(vocab=5, width=WIDTH, layers=1, heads=1, kv_heads=1, head_width=2, ffn_width=2)
    return DecodeSpec(
        members=(config,) * members,
        policy=PPOAgent(agent),
        sample_weights=True,
        record=True,
        span_length=L,
        max_new_tokens=spans * L,
    )


@pytest.fixture
def random_kept():
    """Of a union, in which some tokens are one member's alone."""
    rng = np.random.default_rng()
    tokens = [3, 8, 1, 5]
    spans = sum(-(-n // L) for n in tokens)
    log_probs = np.log(rng.dirichlet(np.ones(4), (spans, L, 2))[..., 0])
    log_probs[0, 0, 1] = -np.inf
    mass = np.log(rng.uniform(0.5, 1.0, (spans, L, 2)))
    return kept_of(log_probs, tokens, rng.normal(size=(2, spans, WIDTH)), mass)


def slow_update(kept, spans, mask, params, seed, config, spec):
    """One step of one minibatch, span by span in Python. Returns the new parameters, and nats per token."""
    b, p = mask.shape
    agent = spec.policy
    keys = row_keys(ppo.iteration_keys(jnp.uint32(seed), jnp.int32(0))[0], b * p)
    flat = kept.take(spans.reshape(-1))
    seen = Observation(flat.observation.hidden, (), flat.observation.span)
    distribution, values = agent.apply(params, seen)
    actions = distribution.sample(keys)
    values = np.asarray(values, np.float64)
    rows, nats, n = [], 0.0, 0
    for i in range(b):
        decisions = []
        for place in i * p + np.flatnonzero(mask[i]):
            w, gain = np.asarray(actions[place], np.float64), 0.0
            for t in range(int(flat.length[place])):
                probs, mass = (np.exp(leaf[place, t].astype(np.float64)) for leaf in (flat.log_probs, flat.mass))
                drawn, equal = (np.log(v @ probs / (v @ mass)) for v in (w, np.full(2, 0.5)))
                gain, nats, n = gain + (drawn - equal) / L, nats + drawn, n + 1
            decisions.append([place, gain])
        if given.credit_of(config) == "answer":
            total = sum(gain for _, gain in decisions)
            decisions = [[place, 0.0] for place, _ in decisions]
            decisions[-1][1] = total
        after, advantage = 0.0, 0.0
        for place, reward in reversed(decisions):
            advantage = reward + config.discount * (after + config.gae_lambda * advantage) - values[place]
            after = values[place]
            rows.append((place, advantage, advantage + values[place]))
    places, each, targets = (np.array(column) for column in zip(*rows, strict=True))
    normal = (each - each.mean()) / np.sqrt(each.var() + 1e-8)

    def loss(params):
        distribution, value = agent.apply(params, seen)
        # Its value at the old parameters is 1, its gradient that of the ratio.
        log_prob = distribution.log_prob(actions)
        ratio = jnp.exp(log_prob - jax.lax.stop_gradient(log_prob))[places]
        error = 0.5 * (value[places] - targets.astype(np.float32)) ** 2
        entropy = distribution.entropy()[places]
        each = config.value_weight * error - ratio * normal.astype(np.float32) - config.entropy_weight * entropy
        return jnp.mean(each)

    gradient = jax.grad(loss)(params)
    clip = optax.clip_by_global_norm(config.gradient_norm)
    gradient = clip.update(gradient, clip.init(gradient))[0]
    # Adam's first step: every number moves by the learning rate against its gradient's sign, nearly.
    return (
        jax.tree.map(lambda x, g: x - config.learning_rate * g / (jnp.abs(g) + 1e-5), params, gradient),
        nats / n,
    )


@pytest.mark.parametrize("credit", ["span", "answer"])
def test_an_update_is_the_slow_one(random_kept, credit):
    seed = int(np.random.default_rng().integers(1000))
    config = PPOConfig(
        prompts=4, epochs=1, minibatches=1, credit=credit, span_length=L, agent=AGENT, learning_rate=1e-2, discount=0.9
    )
    spec = spec_of(AGENT)
    learner = given.Given(random_kept, random_kept, config, config, spec, _NoMesh())
    state = ppo.init_learners(np.array([seed], np.uint32), spec.policy, spec.dims, config)
    params = jax.tree.map(lambda leaf: np.array(leaf[0]), state.params)
    spans, mask = learner.spans(seed, 0)
    after, metrics, _ = learner.iterate(state, np.array([seed], np.uint32), 0)
    expected, nats = slow_update(random_kept, spans, mask, params, seed, config, spec)
    assert float(metrics["reward"][0]) == pytest.approx(nats, rel=1e-4)
    for one, other, before in zip(*map(jax.tree.leaves, (after.params, expected, params)), strict=True):
        moved = np.abs(other - before) > 1e-3  # where the gradient is no rounding error
        np.testing.assert_allclose(np.asarray(one[0])[moved], np.asarray(other)[moved], atol=2e-3)


class _NoMesh:
    mesh = None


class TestWhatAnIterationLooksAt:
    @pytest.mark.parametrize("credit", ["span", "answer"])
    def test_every_span_once_in_a_pass(self, random_kept, credit):
        config = PPOConfig(prompts=2, credit=credit, span_length=L, agent=AGENT)
        learner = given.Given(random_kept, random_kept, config, config, spec_of(AGENT), _NoMesh())
        seen = []
        b, p = learner.rows_each
        n = len(random_kept) if credit == "span" else 4
        for iteration in range(n):  # b passes
            spans, mask = learner.spans(3, iteration)
            assert spans.shape == mask.shape == (b, p)
            seen += spans[mask].tolist()
            if credit == "answer":
                for own, real in zip(spans, mask, strict=True):
                    window = random_kept.window[own[real][0]]
                    assert own[real].tolist() == np.flatnonzero(random_kept.window == window).tolist()
        assert np.bincount(seen).tolist() == [b] * len(random_kept)


@pytest.mark.parametrize("credit", ["span", "answer"])
def test_the_best_fixed_weights(credit):
    """Two members who give a token 0.8 and 0.2 of two: the best mixture gives it its frequency f, so that the first has
    the weight (f - 0.2) / 0.6."""
    rng = np.random.default_rng(5)
    f, texts = 333 / 512, 256
    first = np.arange(texts * L) < 333
    first = rng.permutation(first).reshape(texts, L)
    log_probs = np.log(np.where(first[..., None], [0.8, 0.2], [0.2, 0.8]))
    kept = kept_of(log_probs, [L] * texts)
    agent = AgentConfig(reads=("span",), span_embedding=4, ffn_width=8)
    config = PPOConfig(
        prompts=256, minibatches=1, credit=credit, span_length=L, agent=agent, learning_rate=2e-2, entropy_weight=0.0
    )
    spec = spec_of(agent, spans=1)
    learner = given.Given(kept, kept, config, config, spec, _NoMesh())
    seeds = np.array([0], np.uint32)
    state = ppo.init_learners(seeds, spec.policy, spec.dims, config)
    best = f * math.log(f) + (1 - f) * math.log(1 - f)
    for iteration in range(90):
        state, metrics, _ = learner.iterate(state, seeds, iteration)
    params = jax.tree.map(lambda leaf: leaf[0], state.params)
    distribution, _ = spec.policy.apply(params, Observation((), (), jnp.zeros(1, jnp.int32)))
    assert float(distribution.mode()[0, 0]) == pytest.approx((f - 0.2) / 0.6, abs=0.06)
    nats = -float(metrics["dev_bits_per_byte"][0]) * math.log(2) * 3
    assert best - 0.004 < nats <= best + 1e-4


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="module")
def task():
    return dataclasses.replace(toys.task(), by_likelihood=True)


@pytest.fixture(scope="module")
def finished(ensemble, task, tmp_path_factory):
    out = tmp_path_factory.mktemp("given") / "run"
    return out, rj.train(ensemble, task, toys.SETTINGS, out)


class TestARun:
    def test_it_beats_the_best_fixed_weights(self, finished, ensemble, task):
        out, policy = finished
        dev = task.split("dev").take(toys.SETTINGS.eval_prompts)
        size = sum(len(text.encode()) for text in dev.texts())

        def bits(weights):
            nats = np.concatenate(ensemble.log_likelihoods(dev.prompts, [[text] for text in dev.texts()], weights))
            return -nats.sum() / math.log(2) / size

        fixed = min(bits([w, 1 - w]) for w in np.linspace(0, 1, 21))
        scored = [row for row in read_metrics(out) if "dev" in row]
        best = max(scored, key=lambda row: row["dev"])
        assert best["dev_bits_per_byte"] == pytest.approx(bits(policy), rel=1e-4)
        assert bits(policy) < 0.5 * fixed
        answers = ensemble.generate(dev.prompts, policy, max_new_tokens=1).texts
        assert answers == dev.texts()

    def test_what_its_directory_holds(self, finished):
        out, _ = finished
        config = json.loads((out / "config.json").read_text())
        assert config["cut"] == "own"
        assert len(list((out / "texts").iterdir())) == 2  # train, dev
        rows = read_metrics(out)
        assert len(rows) == toys.SETTINGS.iterations
        for row in rows:  # one token of one byte
            assert row["reward"] < 0
            assert row["dev_bits_per_byte"] > 0
            if "dev" in row:
                assert row["dev"] == pytest.approx(-row["dev_bits_per_byte"] * math.log(2), rel=1e-5)
        assert not {"steps", "ended"} & set(rows[0])

    def test_it_goes_on_with_the_same_numbers(self, finished, ensemble, task, tmp_path, monkeypatch):
        half = dataclasses.replace(toys.SETTINGS, iterations=8)
        rj.train(ensemble, task, half, tmp_path / "run")

        def reads(*args, **options):
            raise AssertionError("read again")

        monkeypatch.setattr(rj.Ensemble, "read_spans", reads)
        policy = rj.train(ensemble, task, toys.SETTINGS, tmp_path / "run", resume=True)
        for one, other in zip(jax.tree.leaves(policy.params), jax.tree.leaves(finished[1].params), strict=True):
            np.testing.assert_array_equal(one, other)

    @pytest.mark.rare
    def test_seeds_side_by_side_and_an_agent_per_member(self, ensemble, task, tmp_path):
        """Each seed is what it is alone."""
        names = ("prompts", "learning_rate", "span_length", "max_new_tokens", "agent", "eval_prompts")
        fields = {name: getattr(toys.SETTINGS, name) for name in names}
        config = MAPPOConfig(**fields, iterations=4, eval_every=4, seeds=2, samples=2, credit="answer")
        both = rj.train_seeds(ensemble, task, config, tmp_path / "both")
        alone = rj.train(ensemble, task, dataclasses.replace(config, seeds=1, seed=1), tmp_path / "alone")
        for one, other in zip(jax.tree.leaves(both[1].params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)

    def test_another_reward_is_another_run(self, finished, ensemble, raises_input_error):
        out, _ = finished
        raises_input_error(
            lambda: rj.train(ensemble, toys.task(), toys.SETTINGS, out, resume=True), "cut is 'own' there"
        )


def test_what_cannot_be_learnt(ensemble, task, tmp_path, raises_input_error):
    def refused(*parts, of=ensemble, on=task, **changes):
        config = dataclasses.replace(toys.SETTINGS, **changes)
        raises_input_error(lambda: rj.train(of, on, config, tmp_path / "run"), *parts)
        assert not (tmp_path / "run" / "config.json").exists()

    refused("fusion linear", "normaliser", of=ensemble.with_fusion("loglinear"))
    refused("span_lengths", agent=dataclasses.replace(toys.SMALL_AGENT, span_lengths=(1, 2)))
    refused("engine", engine=True)
    refused("length_cost", length_cost=0.1)
    refused("'longest'", "own", on=dataclasses.replace(task, cut="longest"))
    refused("credit", "likelihood", on=toys.task(), credit="span")
    raises_input_error(lambda: PPOConfig(credit="token"), "span, answer", "'token'")


def test_dims_are_those_of_a_policy(finished):
    """So that it writes answers, too, which have an end that given texts have not."""
    assert finished[1].dims == Dims(finished[1].dims.widths, 2)
