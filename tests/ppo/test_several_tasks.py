"""Training on several tasks at once: whose rows are whose, rewards made alike, dev per task, and going on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.ppo import iteration
from rlae_jax.ppo import train as train_module
from rlae_jax.ppo.objective import normalise_parts
from rlae_jax.runs.metrics import read_metrics, scalars_of
from tests.helpers import toys

SETTINGS = dataclasses.replace(toys.SETTINGS, iterations=8, prompts=48, eval_every=4, eval_prompts=32)
SHARES = (3.0, 1.0)


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="module")
def tasks():
    return [toys.of_letters("early", "abcf"), toys.of_letters("late", "degh")]


@pytest.fixture(scope="module")
def finished(ensemble, tasks, tmp_path_factory):
    out = tmp_path_factory.mktemp("several") / "run"
    config = dataclasses.replace(SETTINGS, shares=SHARES)
    return out, rj.train(ensemble, tasks, config, out)


def params_of(policy):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(policy.params)]


class TestShares:
    def test_counts_by_hand(self):
        assert PPOConfig(prompts=8).task_prompts == (8,)
        assert PPOConfig(prompts=8, shares=(1, 1)).task_prompts == (4, 4)
        assert PPOConfig(prompts=8, shares=(0.3, 0.3, 0.4)).task_prompts == (3, 2, 3)
        assert PPOConfig(prompts=10, shares=(1, 1, 1)).task_prompts == (4, 3, 3)

    def test_they_add_up_and_are_near_the_exact_parts(self):
        rng = np.random.default_rng()
        for _ in range(200):
            shares = tuple(rng.uniform(0.5, 2, size=rng.integers(1, 6)).tolist())
            prompts = int(rng.integers(30, 300))
            counts = PPOConfig(prompts=prompts, shares=shares).task_prompts
            assert sum(counts) == prompts
            assert np.all(np.abs(np.array(counts) - prompts * np.array(shares) / sum(shares)) < 1)

    def test_none_of_the_prompts_is_no_share(self, raises_input_error):
        raises_input_error(lambda: PPOConfig(prompts=8, shares=(1, 1000)), "share of 1 ", "8 prompts", "--task-shares")
        raises_input_error(lambda: PPOConfig(shares=(1, 0)), "shares")
        raises_input_error(lambda: PPOConfig(shares=(1, float("nan"))), "shares")


def test_rewards_are_made_alike_within_each_task():
    rng = np.random.default_rng()
    sizes = (5, 9, 1, 4)
    parts = [rng.normal(3 * t, 10.0 ** (t - 1), size=n) for t, n in enumerate(sizes)]
    parts[3][:] = 0.7  # all alike
    found = np.split(
        np.asarray(normalise_parts(np.concatenate(parts).astype(np.float32), sizes)), np.cumsum(sizes)[:-1]
    )
    for t in (0, 1):
        np.testing.assert_allclose(found[t], (parts[t] - parts[t].mean()) / parts[t].std(), rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(np.concatenate(found[2:]), 0, atol=2e-3)


class TestOneIteration:
    def test_its_rows_are_the_tasks_one_after_another(self, ensemble, tasks):
        config = train_module.settled(dataclasses.replace(SETTINGS, shares=SHARES), tasks)
        split = train_module._tokenise(ensemble, tasks, "train", None, config, None)
        seen = []
        for i in range(3):
            rows = split.of_iteration(config, 5, i)
            assert split.tasks[rows].tolist() == [0] * 36 + [1] * 12
            asked = [split.examples.prompts[row] for row in rows]
            assert all(prompt[-1] in "abcf" for prompt in asked[:36])
            assert all(prompt[-1] in "degh" for prompt in asked[36:])
            seen += rows[36:].tolist()
        # Passes of its own: nothing comes twice before all came once.
        sizes = np.bincount(split.tasks)
        assert len(set(seen)) == min(len(seen), sizes[1])

    def test_what_is_learnt_from(self, ensemble, tasks, monkeypatch):
        """The rewards that reach the advantages, against those by hand from the scores, with several samples and
        seeds."""
        config = dataclasses.replace(SETTINGS, shares=SHARES, samples=2, seeds=2, iterations=1)
        config = train_module.settled(config, tasks)
        seen = []
        real = iteration.terminal_rewards

        def spy(score, mask):
            jax.debug.callback(lambda value: seen.append(np.asarray(value)), score)
            return real(score, mask)

        monkeypatch.setattr(iteration, "terminal_rewards", spy)
        n, b = 96, 48
        rng = np.random.default_rng()
        scores = (rng.random((2, n)) < 0.4).astype(np.float32)
        spec = ensemble.spec(
            policy=iteration.make_policy(config), span_length=1, max_new_tokens=2, sample_weights=True, record=True
        )
        split = train_module._tokenise(ensemble, tasks, "train", None, config, None)
        rows = np.concatenate([split.of_iteration(config, s, 0) for s in (0, 1)])
        seeds = np.arange(2, dtype=np.uint32)
        learner = train_module._fresh(config, spec.dims).learner
        batch = split.batch(ensemble, rows, spec)
        experience = iteration.rollout_for_text(learner.params, ensemble.params, batch, seeds, 0, spec, config)
        _, metrics = iteration.learn_from_text(learner, experience, scores.reshape(-1), seeds, spec, config)
        jax.effects_barrier()
        of_first = 2 * (3 * b // 4)
        expected = []
        for own in scores:
            parts = own[:of_first], own[of_first:]
            expected.append(np.concatenate([(part - part.mean()) / part.std() for part in parts]))
        found = sorted(np.concatenate([value.reshape(-1, n) for value in seen]).tolist())
        np.testing.assert_allclose(found, sorted(np.array(expected).tolist()), atol=1e-3)
        told = np.stack([scores[:, :of_first].mean(axis=1), scores[:, of_first:].mean(axis=1)], axis=1)
        np.testing.assert_allclose(metrics["reward_of_tasks"], told, rtol=1e-5)


class TestARun:
    def test_what_it_writes(self, finished, ensemble, tasks):
        out, policy = finished
        config = json.loads((out / "config.json").read_text())
        assert config["task"] == "early + late"
        assert set(config["examples"]) == {
            f"{name}/{split}" for name in ("early", "late") for split in ("train", "dev", "test")
        }
        assert config["settings"]["shares"] == [3, 1]
        rows = read_metrics(out, train_module.RewardLine)
        for row in rows:
            each = row["reward_of_tasks"]
            assert list(each) == ["early", "late"]
            assert row["reward"] == pytest.approx((3 * each["early"] + each["late"]) / 4, abs=1e-6)
            assert ("dev_of_tasks" in row) == ("dev" in row) == ("dev_gain" in row)
        (last,) = rows[-1:]
        assert last["dev"] == pytest.approx(np.mean(list(last["dev_of_tasks"].values())))
        assert "dev_of_tasks/late" in scalars_of(last)
        loaded = rj.load_policy(out)
        assert all(map(np.array_equal, params_of(loaded), params_of(policy)))

    def test_dev_is_each_tasks_own(self, finished, ensemble, tasks):
        out, _ = finished
        newest = rj.load_policy(out, newest=True)
        told = read_metrics(out)[-1]["dev_of_tasks"]
        for task in tasks:
            examples = task.split("dev").take(16)
            texts = ensemble.generate(examples.prompts, newest, max_new_tokens=2).texts
            right = np.mean([text == reference for text, reference in zip(texts, examples.references, strict=True)])
            assert told[task.name] == pytest.approx(right)

    def test_the_best_by_the_share_of_the_room(self, ensemble, tasks, tmp_path, monkeypatch):
        """A made-up course: by plain means the second scoring were the best one, by shares the first is."""
        course = iter([(0.30, 0.90), (0.0, 0.80), (0.60, 0.80)])  # first scored, untrained, second scored
        sizes = [len(task.split("dev").take(16)) for task in tasks]

        def scores(*args):
            return np.repeat(np.array(next(course), np.float32), sizes)

        monkeypatch.setattr(train_module, "_dev_scores", scores)
        config = dataclasses.replace(SETTINGS, iterations=2, eval_every=1, shares=SHARES)
        rj.train(ensemble, tasks, config, tmp_path / "run")
        first, second = read_metrics(tmp_path / "run")
        assert first["dev"] < second["dev"]
        assert first["dev_gain"] == pytest.approx((0.3 + 0.1 / 0.25) / 2)
        assert second["dev_gain"] == pytest.approx((0.6 + 0.0) / 2)
        known = train_module.read_run(tmp_path / "run")
        shapes = jax.eval_shape(lambda: train_module._fresh(known.settings, known.dims))
        checkpoints = train_module.Checkpoints(tmp_path / "run", None, reading=True)
        state = checkpoints.restore(train_module.sharding.abstract(shapes, None))[1]
        checkpoints.close()
        np.testing.assert_allclose(state.best_dev, [first["dev_gain"]])

    @pytest.mark.parametrize("token_reward", [True, pytest.param(False, marks=pytest.mark.rare)])
    def test_a_resumed_run_is_the_same(self, finished, ensemble, tasks, tmp_path, token_reward):
        config = dataclasses.replace(SETTINGS, shares=SHARES)
        tasks = [dataclasses.replace(tasks[0], token_reward=token_reward), tasks[1]]
        out = tmp_path / "run"
        rj.train(ensemble, tasks, dataclasses.replace(config, iterations=4), out)
        gone_on = rj.train(ensemble, tasks, config, out, resume=True)
        # On the device or of texts: exactly these tasks' rewards are the same.
        assert all(map(np.allclose, params_of(gone_on), params_of(finished[1])))
        if token_reward:
            assert all(map(np.array_equal, params_of(gone_on), params_of(finished[1])))
        with pytest.raises(InputError, match="another configuration"):
            rj.train(ensemble, tasks[::-1], config, out, resume=True)
        with pytest.raises(InputError, match="another configuration"):
            rj.train(ensemble, tasks, dataclasses.replace(config, shares=(1, 1)), out, resume=True)

    def test_each_task_has_its_own_reward_stops_and_longest_answer(self, ensemble, tmp_path):
        """One task wants the digit alone, the other is scored by whether a text is empty, behind a stop string, or
        after no more than one token."""
        seen = {"early": [], "late": []}

        def reward_of(name):
            def reward(text, reference):
                seen[name].append(text)
                return float(text == reference)

            return reward

        early = toys.of_letters("early", "abcf", token_reward=False, reward=reward_of("early"), stop=("1",))
        late = toys.of_letters("late", "degh", token_reward=False, reward=reward_of("late"), max_new_tokens=1)
        config = dataclasses.replace(SETTINGS, iterations=1, max_new_tokens=None)
        rj.train(ensemble, [early, late], config, tmp_path / "run")
        assert set(seen["early"]) <= {"", "0", "2", "3"}
        assert "" in seen["early"]
        assert {len(text) for text in seen["late"]} == {1}
        assert "1" in seen["late"]

    def test_one_task_is_as_ever(self, ensemble, tmp_path):
        """In a list or not, and its files have nothing of several."""
        config = dataclasses.replace(SETTINGS, iterations=2, eval_every=2)
        one = rj.train(ensemble, toys.task(), config, tmp_path / "one")
        listed = rj.train(ensemble, [toys.task()], config, tmp_path / "listed")
        assert all(map(np.array_equal, params_of(one), params_of(listed)))
        config = json.loads((tmp_path / "one" / "config.json").read_text())
        assert (config["task"], set(config["examples"])) == ("toy", {"train", "dev", "test"})
        assert not {"dev_gain", "dev_of_tasks", "reward_of_tasks"} & set(read_metrics(tmp_path / "one")[-1])

    def test_what_does_not_go_together(self, ensemble, tasks, tmp_path, raises_input_error):
        early, late = tasks

        def refused(given, *told, **settings):
            config = dataclasses.replace(SETTINGS, **settings)
            raises_input_error(lambda: rj.train(ensemble, given, config, tmp_path / "run"), *told)
            assert not (tmp_path / "run").exists()

        refused([], "no task")
        refused([early, early], "early is given twice")
        longer = dataclasses.replace(late, span_length=3)
        refused([early, longer], "early", "3 in late", "--span-length", span_length=None)
        refused([early, dataclasses.replace(late, chat=True)], "chat templates", "late", "early")
        refused([early, dataclasses.replace(late, by_likelihood=True)], "late", "likelihood")
        refused(tasks, "3 shares", "early + late", shares=(1, 1, 1))
        refused([early], "2 shares", shares=(1, 1))
