"""Agents from the directories of their runs, and the router."""

import dataclasses

import jax
import numpy as np
import pytest

from rlae_jax import files
from rlae_jax.evaluation import (
    baseline_methods,
    load_agents,
    router_config,
)
from rlae_jax.runs.directory import CONFIG_FILE
from tests.helpers import toys


class TestRouter:
    @pytest.mark.slow
    def test_one_action_per_answer_and_the_agents_settings(self, ensemble, tmp_path):
        task = toys.task()
        config = dataclasses.replace(toys.SETTINGS, iterations=2, prompts=8, eval_prompts=8, eval_every=2, seeds=2)
        (methods,) = baseline_methods(ensemble, task, ["router"], config=config, runs=tmp_path).values()
        settings = files.read_json(tmp_path / "router" / CONFIG_FILE)["settings"]
        assert (settings["span_length"], settings["max_new_tokens"], settings["seeds"]) == (2, 2, 2)
        assert settings["learning_rate"] == config.learning_rate
        answers = ensemble.generate(["ab"], methods[0].weights, max_new_tokens=2)
        assert answers.weights.shape == (1, 1, 2)
        # Agents trained side by side are seeds, and so are runs.
        run = tmp_path / "router"
        agents = load_agents(ensemble, task, [run, run])
        assert {name: len(seeds) for name, seeds in agents.items()} == {"rlae_ppo": 4}
        for loaded, trained in zip(agents["rlae_ppo"][:2], methods, strict=True):
            jax.tree.map(np.testing.assert_array_equal, loaded.weights.params, trained.weights.params)
        again = router_config([run, run])
        assert (again.seeds, again.agent) == (4, config.agent)
        assert router_config([]) is None
