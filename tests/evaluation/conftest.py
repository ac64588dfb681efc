"""What the tests of evaluations share: the ensemble of `toys`, an agent that looks at the letter, two evaluations."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import rlae_jax as rj
from rlae_jax.evaluation import Method, baseline_methods, baselines, evaluate, fitted
from rlae_jax.fusion.policy import BoundPolicy, Deterministic, Dims
from tests.helpers import toys


@dataclasses.dataclass(frozen=True)
class ByLetter:
    """All weight on the member that knows the last letter."""

    reads: tuple[str, ...] = ("hidden",)

    def init(self, key, dims):
        return ()

    def apply(self, params, observation):
        letter = jnp.argmax(observation.hidden[0], axis=1)
        weights = jax.nn.one_hot(jnp.where(letter < len(toys.KNOWN["left"]), 0, 1), 2)
        return Deterministic(weights), jnp.zeros(len(letter))


@pytest.fixture(scope="session")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="session")
def evaluated(ensemble, tmp_path_factory):
    """(results, directory, the splits that choosing the methods asked for)."""
    task = toys.task()
    methods = baseline_methods(ensemble, task)
    asked = set(task.splits.names)
    out = tmp_path_factory.mktemp("evaluated")
    return evaluate(methods, task, "test", out=out), out, asked


@pytest.fixture(scope="session")
def agent(ensemble):
    return Method(ensemble, BoundPolicy(ByLetter(), (), Dims(ensemble.widths, 2), 1))


@pytest.fixture(scope="session")
def everything(ensemble, agent, tmp_path_factory):
    """(methods, results, directory, the splits that choosing the methods asked for) of `all` without a router."""
    task = toys.task()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "TOP_KS", (10, 1))  # each compiles a program
        patch.setattr(fitted, "STEPS", 20)  # test_fitted.py has enough
        methods = baseline_methods(ensemble, task, ["all"], agents={"rlae_ppo": [agent]})
    asked = set(task.splits.names)
    out = tmp_path_factory.mktemp("everything")
    return methods, evaluate({**methods, "rlae_ppo": agent}, task, "test", out=out), out, asked
