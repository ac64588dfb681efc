"""The PPO agent: what it reads, the shapes it gives, the floor of its concentrations, and its settings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlae_jax.config import PRESETS, AgentConfig, PPOConfig
from rlae_jax.fusion.policy import OBSERVATION_PARTS, Observation, Policy
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.agents import DIMS, SMALL, observe, undecided_no_more

SUBSETS = [(part,) for part in OBSERVATION_PARTS] + [OBSERVATION_PARTS[1:], OBSERVATION_PARTS]


def keep(observation, reads):
    return Observation(*(value if name in reads else () for name, value in observation._asdict().items()))


@pytest.mark.parametrize("reads", SUBSETS, ids="+".join)
def test_it_reads_the_parts_that_are_named_and_no_others(reads):
    agent = PPOAgent(AgentConfig(reads=reads, encoder="any" if "text" in reads else None, **SMALL))
    params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
    assert ("projections" in params) == ("hidden" in reads)
    assert ("span_embedding" in params) == ("span" in reads)
    before = observe()
    apply = jax.jit(agent.apply)
    distribution, value = apply(params, keep(before, reads))  # an unread part is not even there
    for name in OBSERVATION_PARTS:
        changed = before._replace(**{name: getattr(observe(seed=1), name)})
        other, other_value = apply(params, changed)
        moved = not np.allclose(other.concentration, distribution.concentration, rtol=1e-4)
        assert moved == (name in reads), name
        assert (not np.allclose(other_value, value, rtol=1e-4)) == (name in reads), name


def test_each_members_hidden_state_and_each_statistic_matters():
    agent = PPOAgent(AgentConfig(**SMALL))
    params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
    observation = observe(batch=2)

    def total(observation):
        distribution, value = agent.apply(params, observation)
        return jnp.sum(distribution.concentration[:, 0]) + jnp.sum(value)

    slopes = jax.jit(jax.grad(total, allow_int=True))(observation)
    for hidden in slopes.hidden:
        assert np.all(np.any(np.asarray(hidden) != 0, axis=1))
    assert np.all(np.asarray(slopes.stats) != 0)


def test_shapes_and_dtypes():
    agent = PPOAgent(AgentConfig(**SMALL))
    assert isinstance(agent, Policy)
    params = agent.init(jax.random.key(0), DIMS)
    distribution, value = agent.apply(params, observe(batch=7))
    assert (distribution.concentration.shape, value.shape) == ((7, 3), (7,))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_rows_do_not_see_each_other():
    agent = PPOAgent(AgentConfig(**SMALL))
    params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
    observation = observe()
    distribution, value = agent.apply(params, observation)
    alone, alone_value = agent.apply(params, jax.tree.map(lambda leaf: leaf[4:5], observation))
    np.testing.assert_allclose(alone.concentration[0], distribution.concentration[4], rtol=1e-5)
    np.testing.assert_allclose(alone_value[0], value[4], rtol=1e-5, atol=1e-6)


def test_the_scale_of_hidden_states_does_not_matter():
    agent = PPOAgent(AgentConfig(reads=("hidden",), **SMALL))
    params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
    small, large = (agent.apply(params, observe(scale=scale))[0].concentration for scale in (1.0, 1e4))
    np.testing.assert_allclose(small, large, rtol=1e-3)


def test_answers_longer_than_in_training_reuse_the_last_span():
    agent = PPOAgent(AgentConfig(reads=("span",), **SMALL))
    params = undecided_no_more(agent.init(jax.random.key(0), DIMS))
    spans = jnp.arange(8, dtype=jnp.int32)
    alpha = np.asarray(agent.apply(params, Observation((), (), spans))[0].concentration)
    np.testing.assert_array_equal(alpha[3:], np.tile(alpha[2], (5, 1)))
    assert len(np.unique(alpha[:, 0])) == 3


@pytest.mark.parametrize("floor", [0.05, 1e-4])
def test_concentrations_never_fall_below_the_floor(floor):
    agent = PPOAgent(AgentConfig(concentration_floor=floor, **SMALL))
    params = agent.init(jax.random.key(0), DIMS)
    params["actor"]["b2"] = jnp.array([-200.0, 0.0, 200.0])
    distribution, _ = agent.apply(params, observe())
    alpha = np.asarray(distribution.concentration)
    np.testing.assert_allclose(alpha[:, 0], floor, rtol=1e-5)
    assert np.all(np.isfinite(distribution.log_prob(jnp.eye(3)[jnp.arange(7) % 3])))


@pytest.mark.parametrize("start", [0.5, 1.0, 4.0])
def test_every_weight_starts_with_the_initial_concentration(start):
    agent = PPOAgent(AgentConfig(initial_concentration=start, concentration_floor=0.0, **SMALL))
    alpha = agent.apply(agent.init(jax.random.key(0), DIMS), observe())[0].concentration
    np.testing.assert_allclose(alpha, start, atol=0.1 * start)


def test_equal_settings_share_compiled_programs():
    assert PPOAgent(AgentConfig()) == PPOAgent(AgentConfig())
    assert hash(PPOAgent(AgentConfig())) == hash(PPOAgent(AgentConfig()))
    assert PPOAgent(AgentConfig(projection=3)) != PPOAgent(AgentConfig())


class TestSettings:
    @pytest.mark.parametrize("reads", [(), ("hiden",), ("stats", "txt")], ids=str)
    def test_reads_must_name_parts(self, reads, raises_input_error):
        raises_input_error(lambda: AgentConfig(reads=reads), "hidden, stats, span")

    @pytest.mark.parametrize("name", ["iterations", "prompts", "epochs", "minibatches", "eval_every", "eval_prompts"])
    def test_counts_must_be_positive(self, name, raises_input_error):
        raises_input_error(lambda: PPOConfig(**{name: 0}), f"{name} is 0; expected a whole number")

    @pytest.mark.parametrize(
        ("fields", "expected"),
        [
            ({}, 512),
            ({"prompts": 128}, 512),
            ({"prompts": 60}, 240),
            ({"prompts": 8}, 32),
            ({"prompts": 8, "samples": 4}, 128),
            ({"prompts": 1}, 32),
            ({"prompts": 8, "eval_prompts": 700}, 700),
            ({"eval_prompts": 5}, 5),
        ],
        ids=str,
    )
    def test_dev_prompts_go_by_what_an_iteration_decodes(self, fields, expected):
        assert PPOConfig(**fields).dev_prompts == expected
        assert PPOConfig.paper().dev_prompts == PPOConfig.demo().dev_prompts == 512

    def test_the_papers_figures(self):
        """arXiv 2506.00439, appendix."""
        paper = PPOConfig.paper()
        expected = {"learning_rate": 1e-4, "clip": 0.2, "discount": 0.99, "gae_lambda": 0.95, "entropy_weight": 0.01}
        expected |= {"epochs": 3, "prompts": 128, "span_length": 4}
        assert {name: getattr(paper, name) for name in expected} == expected

    @pytest.mark.parametrize("preset", PRESETS)
    def test_a_run_records_its_preset(self, preset):
        make = getattr(PPOConfig, preset)
        assert make().preset == preset
        assert make(iterations=3, seed=9, eval_every=2, span_length=1).preset == preset
        assert make(learning_rate=0.5).preset == "custom"
        agent = dataclasses.replace(make().agent, reads=("span",))
        assert make(agent=agent).preset == "custom"
