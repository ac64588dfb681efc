"""Baselines that are fitted: against numpy, on the toy ensemble, and that they read the training split alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.evaluation import baseline_methods, evaluate, fitted
from rlae_jax.evaluation.fitted import Collected, Expert, Regression, collect, fit_regression, gate_of, gate_targets
from rlae_jax.evaluation.searches import Budget
from rlae_jax.fusion.policy import BoundPolicy, Dims, Observation
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match, last_number
from tests.helpers import reference, toys
from tests.helpers.reference import log_softmax
from tests.helpers.tokenizers import byte_level, sentencepiece

CONFIG = dataclasses.replace(toys.SETTINGS, agent=AgentConfig(projection=8, span_embedding=4, ffn_width=16))
NAMES = ("regression", "dllg", "fusionroute")


@pytest.fixture(scope="module")
def three(ensemble, tmp_path_factory):
    """(results of the fitted methods, the splits that were asked for)."""
    task = toys.task()
    methods = baseline_methods(ensemble, task, ["uniform", *NAMES], config=CONFIG)
    asked = set(task.splits.names)
    return evaluate(methods, task, "test", out=tmp_path_factory.mktemp("three")), asked


class TestOnToys:
    def test_scores_worked_out_by_hand(self, three):
        table = three[0]["methods"]
        scores = {name: table[name]["score"] for name in NAMES}
        # Statistics do not tell the letter: all that can be learnt of them is who is right more often.
        assert scores == {"regression": 5 / 8, "dllg": 1.0, "fusionroute": 1.0}

    def test_the_training_split_alone(self, three):
        assert three[1] == {"train"}

    def test_what_is_told(self, three):
        table = three[0]["methods"]
        collected = 3 * 64 + 64  # both members' answers, those of both together, and the right ones that are read
        assert table["regression"]["searched"] == collected + 5 * 64
        assert table["dllg"]["searched"] == collected + 6 * 64
        assert table["fusionroute"]["searched"] == collected + 3 * 64
        assert np.shape(table["regression"]["coefficients"]) == (9, 2)
        assert table["dllg"]["supervision"] == "answers"
        assert table["dllg"]["fitted_to"] == 64 * 2  # tokens: a digit and the end
        assert table["fusionroute"]["logit_scale"] == 1.0
        assert all(table[name]["texts"] == 64 and table[name]["search_seconds"] > 0 for name in NAMES)
        rows = [row for row in three[0]["differences"] if row["b"] == "uniform"]
        assert {row["a"] for row in rows} == set(NAMES)


class TestCollect:
    def test_who_was_right_and_what_members_give(self, ensemble):
        collected = collect(ensemble, toys.task(), ("hidden", "stats"), Budget(prompts=20))
        assert collected.looked == 3 * 20 + 20
        assert collected.text.tolist() == np.repeat(np.arange(20), 2).tolist()
        for t, (prompt, tokens) in enumerate(zip(collected.prompts, collected.tokens, strict=True)):
            assert collected.right[t].tolist() == [float(prompt[-1] in toys.KNOWN[name]) for name in toys.KNOWN]
            ids = ensemble.encode([prompt])[0]
            assert tokens == [toys.CHARACTERS.index(toys.right_digit(prompt[-1])), toys.END]
            for n, token in enumerate(tokens):
                m = 2 * t + n
                reads = [reference.read(lm, [*ids, *tokens[:n]]) for lm in ensemble.members]
                np.testing.assert_allclose(collected.log_probs[m], [p[token] for _, p in reads], atol=1e-4)
                for k, (hidden, log_probs) in enumerate(reads):
                    np.testing.assert_allclose(collected.observation.hidden[k][m], hidden, atol=1e-5)
                    entropy = -np.sum(np.exp(log_probs) * log_probs)
                    np.testing.assert_allclose(collected.observation.stats[m, k, 0], entropy, atol=1e-4)

    def test_without_exact_answers_the_right_ones_are_those_that_were_written(self, ensemble):
        """Of the letters that either member knows; a text that nobody wrote right is left out."""
        train = toys.examples(["a", "f", "b", "h", "g"])
        references = [*train.references[:-1], "7"]  # which nobody writes
        task = dataclasses.replace(toys.task(token_reward=False), reward=last_number)
        task = dataclasses.replace(task, splits={"train": Examples(train.prompts, references)})
        collected = collect(ensemble, task, ("stats",), Budget())
        assert collected.prompts == ["a", "f", "b", "h"]
        assert ensemble.decode(collected.rows, collected.tokens) == references[:-1]

    @pytest.mark.rare
    def test_where_nobody_is_right(self, ensemble):
        train = Examples(["a", "b"], ["7", "7"])
        task = dataclasses.replace(toys.task(token_reward=False), reward=last_number, splits={"train": train})
        assert collect(ensemble, task, ("stats",), Budget()) is None
        methods = baseline_methods(ensemble, task, NAMES, config=CONFIG)
        assert [methods[name].record["texts"] for name in NAMES] == [0, 0, 0]
        table = evaluate(methods, task, "train")["methods"]
        assert [table[name]["score"] for name in NAMES] == [0, 0, 0]


def random_collected(rng, t=40, m=160, k=3):
    observation = Observation(hidden=(), stats=rng.normal(size=(m, k, 4)).astype(np.float32), span=())
    log_probs = -rng.gamma(1.0, 4.0, (m, k)).astype(np.float32)
    right = (rng.random((t, k)) < 0.4).astype(np.float32)
    return Collected([], [], [], right, np.sort(rng.integers(0, t, m)), observation, log_probs, 0)


class TestRegression:
    def test_against_the_normal_equations(self):
        rng = np.random.default_rng()
        collected = random_collected(rng)
        found = fit_regression(collected, 3)
        x, y = [], []
        for stats, log_probs in zip(collected.observation.stats, collected.log_probs, strict=True):
            x.append([*stats.ravel(), 1.0])
            clipped = np.maximum(log_probs.astype(np.float64), -10)
            y.append(clipped - clipped.mean())
        x, y = np.array(x, np.float64), np.array(y)
        penalty = 1e-3 * len(x) * np.eye(13)
        penalty[-1, -1] = 0
        expected = np.linalg.inv(x.T @ x + penalty) @ x.T @ y
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(found.sum(axis=1), 0, atol=1e-4)  # of what is above the mean

    def test_weights(self):
        rng = np.random.default_rng()
        stats, coefficients = rng.normal(size=(6, 3, 4)), rng.normal(size=(13, 3))
        observation = Observation(hidden=(), stats=jnp.asarray(stats, jnp.float32), span=())
        found = Regression(0.4).apply(jnp.asarray(coefficients, jnp.float32), observation)[0].weights
        for b in range(6):
            scores = np.append(stats[b].ravel(), 1.0) @ coefficients / 0.4
            np.testing.assert_allclose(found[b], np.exp(log_softmax(scores)), atol=1e-5)


class TestGate:
    def test_targets(self):
        rng = np.random.default_rng()
        collected = random_collected(rng)
        tokens, answers = (gate_targets(collected, kind) for kind in ("tokens", "answers"))
        for m, t in enumerate(collected.text):
            p = np.exp(collected.log_probs[m].astype(np.float64))
            np.testing.assert_allclose(tokens[m], p / p.sum(), rtol=1e-4)
            np.testing.assert_allclose(answers[m], collected.right[t] / max(collected.right[t].sum(), 1), rtol=1e-6)

    def test_it_learns_the_shares(self):
        """Of observations of two kinds it gives each the mean of its targets, where cross-entropy is least."""
        rng = np.random.default_rng()
        agent = gate_of(AgentConfig(reads=("hidden",), ffn_width=16, projection=4), True)
        kinds = rng.integers(0, 2, 400)
        shares = np.array([[0.8, 0.15, 0.05], [0.1, 0.2, 0.7]])
        right = np.eye(3)[[rng.choice(3, p=shares[kind]) for kind in kinds]]
        hidden = np.eye(4, dtype=np.float32)[kinds]
        observation = Observation(hidden=(hidden, hidden[:, :2], hidden), stats=(), span=())
        collected = Collected([], [], [], right, np.arange(400), observation, np.zeros((400, 3), np.float32), 0)
        params, told = fitted.fit_gate(agent, Dims((4, 2, 4), 1), collected, "answers", 1e-2)
        weights = np.asarray(agent.apply(params, observation)[0].mode())
        means = [right[kinds == kind].mean(axis=0) for kind in range(2)]
        for kind in range(2):
            np.testing.assert_allclose(weights[kinds == kind], np.tile(means[kind], (sum(kinds == kind), 1)), atol=0.08)
        least = -np.mean([right[i] @ np.log(np.maximum(means[kinds[i]], 1e-9)) for i in range(400)])
        assert abs(told["loss"] - least) < 0.1
        assert told["fitted_to"] == 400

    def test_the_network_is_the_agents(self):
        config = AgentConfig(reads=("stats", "text", "prompt"), encoder="somewhere", span_lengths=(1, 2))
        assert gate_of(config, True).config == dataclasses.replace(
            config, reads=("hidden", "stats", "prompt"), encoder=None, span_lengths=()
        )
        assert gate_of(config, False).reads == ("hidden", "stats")
        assert gate_of(AgentConfig.of_set(), True).config.network == "joint"


class TestExpert:
    def bound(self, ensemble, seed):
        agent = gate_of(AgentConfig(reads=("hidden",), ffn_width=8, projection=4), True)
        dims = Dims(ensemble.widths, 8)
        policy = Expert(agent, 23)
        params = policy.init(jax.random.key(seed), dims)
        gate, up = jax.random.split(jax.random.key(seed + 1))
        params["up"] = jax.random.normal(up, params["up"].shape) * 0.3
        shape = params["gate"]["actor"]["w2"].shape
        params["gate"]["actor"]["w2"] = jax.random.normal(gate, shape)  # an agent begins undecided
        return BoundPolicy(policy, params, dims, 1)

    def test_one_members_log_probabilities_and_logits(self, make_lm):
        """In the loop, and of given texts."""
        rng = np.random.default_rng()
        narrow = make_lm(1, width=12, layers=1, heads=2, kv_heads=1, head_width=6)
        ensemble = rj.Ensemble([make_lm(0, layers=1), narrow], end_ids=())
        prompts = [[3, 1, 4, 1, 5], [9, 2], [2, 6, 5]]
        policy = self.bound(ensemble, int(rng.integers(2**31 - 1)))
        ids, mask = pad_rows(prompts, 5)
        out = ensemble.generate(
            prompt_ids=ids, prompt_mask=mask, weights=policy, max_new_tokens=4, temperature=1.0, scores=True
        )
        given = ensemble.score_tokens(prompts, out.chosen, policy)
        down, up = (np.asarray(policy.params[name], np.float64) for name in ("down", "up"))
        for b, prompt in enumerate(prompts):
            np.testing.assert_allclose(given[b].fused, out.scores[b], atol=1e-4)
            np.testing.assert_array_equal(given[b].weights, out.weights[b])
            for n, token in enumerate(out.chosen[b]):
                reads = [reference.read(lm, prompt + out.chosen[b][:n]) for lm in ensemble.members]
                states = [h / np.sqrt(np.mean(h**2) + 1e-6) for h, _ in reads]
                k = int(np.argmax(out.weights[b, n]))
                assert out.weights[b, n].tolist() == np.eye(2)[k].tolist()
                fused = log_softmax(reads[k][1] + np.concatenate(states) @ down @ up)
                np.testing.assert_allclose(out.scores[b, n], fused[token], atol=1e-3)
        assert {int(k) for k in np.argmax(out.weights, axis=-1).ravel()} <= {0, 1}

    def test_an_engine_refuses_it(self, make_lm, raises_input_error):
        ensemble = rj.Ensemble([make_lm(0, layers=1), make_lm(1, layers=1)], end_ids=())
        raises_input_error(lambda: rj.Engine(ensemble, policies={"own": self.bound(ensemble, 0)}), "logits of its own")

    def test_logits_that_no_member_has(self, make_chain_lm, make_tokenizer):
        """Both members are wrong after "a" and sure of it; only logits of one's own can mend that."""
        tables = [toys.table(name) for name in toys.KNOWN]
        for table in tables:
            table[0, len(toys.LETTERS) : len(toys.LETTERS) + 4] = 0.0
            table[0, len(toys.LETTERS) + 2] = 3.0  # "2" for "0"
        tokenizer = make_tokenizer(toys.CHARACTERS)
        pair = [make_chain_lm(t, tokenizer=tokenizer, name="m", end_ids=(toys.END,), context=64) for t in tables]
        examples = toys.examples([letter + "a" for letter in toys.LETTERS] * 8)
        task = Task("a", {"train": examples}, exact_match, max_new_tokens=2, span_length=1)
        method = baseline_methods(rj.Ensemble(pair), task, ["fusionroute"], config=CONFIG)["fusionroute"]
        assert method.record["logit_scale"] > 0
        assert method.ensemble.generate(["ba", "ca"], method.weights, max_new_tokens=2).texts == ["0", "0"]


@pytest.mark.rare
@pytest.mark.parametrize("by_likelihood", [False, True])
def test_members_with_different_tokenizers(make_lm, by_likelihood):
    """Also where the likeliest option is the answer."""
    tokenizers = byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "th"])
    members = [
        make_lm(k, tokenizer=t, vocab=len(t), end_ids=(t.eos_token_id,), layers=1 + k) for k, t in enumerate(tokenizers)
    ]
    ensemble = rj.Ensemble(members)
    options = [(" the", " x"), (" th", " e the")] * 2 if by_likelihood else None
    examples = Examples(
        ["x", "the x", "ex", "h"], ["A", "B", "A", "A"] if by_likelihood else ["the", "th", "x", "ee"], options
    )
    task = Task("t", {"train": examples}, exact_match, max_new_tokens=8, span_length=2, by_likelihood=by_likelihood)
    names = (*NAMES, "online", "bayes", "selective")
    methods = baseline_methods(ensemble, task, names, config=CONFIG)
    assert [methods[name].record["texts"] for name in NAMES] == [4, 4, 4]
    table = evaluate(methods, task, "train")["methods"]
    assert all(0 <= table[name]["score"] <= 1 for name in names)
    assert all(table[name]["score"] == 1 for name in ("fusionroute",))  # four texts are learnt by heart
