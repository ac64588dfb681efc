"""Training with an engine: agents learn what they learn from answers that are written together."""

import dataclasses

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import MAPPOConfig, PPOConfig
from rlae_jax.ppo.train import train_seeds
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import Examples, Task
from tests.helpers import toys

N = 12


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    """Members that write at random, and end at random."""
    tokenizer = make_tokenizer(toys.CHARACTERS)
    rng = np.random.default_rng(0)
    tables = [rng.normal(0, 1.5, (toys.END + 1, toys.END + 1)).astype(np.float32) for _ in range(2)]
    return rj.Ensemble([make_chain_lm(t, tokenizer=tokenizer, end_ids=(toys.END,), context=64) for t in tables])


def different_characters(text, reference):
    del reference
    return len(set(text)) / len(toys.CHARACTERS)


def make_task(*, token_reward):
    splits = {
        name: Examples([toys.LETTERS[i : i + n] for n in (1, 3) for i in range(6)], [toys.DIGITS[0]] * 12)
        for name in ("train", "dev", "test")
    }
    reward = toys.exact_match if token_reward else different_characters
    return Task("characters", splits, reward, token_reward=token_reward, max_new_tokens=N, span_length=2)


SETTINGS = {"iterations": 2, "prompts": 10, "epochs": 2, "minibatches": 2, "learning_rate": 1e-2, "eval_every": 2}
SETTINGS |= {"agent": toys.SMALL_AGENT, "temperature": 1.0}
CASES = {
    "in-one-program": (PPOConfig(**SETTINGS, samples=2), True),
    "two-seeds-of-mappo": (MAPPOConfig(**SETTINGS, seeds=2), False),
}


@pytest.mark.parametrize("case", [pytest.param("in-one-program", marks=pytest.mark.rare), "two-seeds-of-mappo"])
def test_agents_learn_the_same(ensemble, tmp_path, case):
    together, token_reward = CASES[case]
    queued = dataclasses.replace(together, engine=True, slots=3)
    task = make_task(token_reward=token_reward)
    wanted, found = (
        train_seeds(ensemble, task, config, tmp_path / str(config.engine)) for config in (together, queued)
    )
    for one, other in zip(wanted, found, strict=True):
        for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    rows, others = read_metrics(tmp_path / "False"), read_metrics(tmp_path / "True")
    assert 3 < rows[0]["steps"] < N
    for name in ("reward", "steps", "spans", "ended", "entropy", "approx_kl"):
        np.testing.assert_allclose([r[name] for r in rows], [r[name] for r in others], atol=1e-5, err_msg=name)


def test_what_it_cannot_be(stored_checkpoint, tmp_path, raises_input_error):
    raises_input_error(lambda: PPOConfig(slots=3), "engine")
    raises_input_error(lambda: PPOConfig(engine=True, slots=0), "slots is 0; expected a whole number of at least 1")
    assert [PPOConfig(engine=True, prompts=n).engine_slots for n in (4, 10, 512)] == [4, 8, 128]
    assert PPOConfig(engine=True, slots=512).preset == "demo"
    lm = rj.load(stored_checkpoint("untied", "t5"))
    config = PPOConfig(**SETTINGS, engine=True)
    raises_input_error(lambda: rj.train(rj.Ensemble([lm]), make_task(token_reward=False), config, tmp_path), "--engine")
    assert not list(tmp_path.iterdir())
