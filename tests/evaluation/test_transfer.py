"""The transfer matrix."""

import dataclasses

import numpy as np

from rlae_jax import report
from rlae_jax.evaluation import (
    transfer_matrix,
)
from rlae_jax.evaluation.policies import Replay
from tests.helpers import toys


class TestTransfer:
    def test_every_cell(self, ensemble, agent, tmp_path):
        easy = toys.task()
        easy = dataclasses.replace(easy, name="easy", splits={"test": toys.examples(["a", "b", "f"])})
        left = dataclasses.replace(agent.weights, policy=Replay(), params=np.array([[[1, 0]]], np.float32))
        agents = {"toy": agent.weights, "easy": [left, left]}
        pools = {"toy": ensemble, "easy": [ensemble, ensemble]}
        matrix = transfer_matrix({"easy": agents["easy"]}, pools, {"toy": toys.task(), "easy": easy})
        np.testing.assert_allclose(matrix["scores"], [[5 / 8, 2 / 3]])
        assert matrix["per_seed"] == [[[5 / 8] * 2, [2 / 3] * 2]]
        pools["easy"] = ensemble
        matrix = transfer_matrix(agents, pools, {"toy": toys.task(), "easy": easy})
        np.testing.assert_allclose(matrix["scores"], [[1, 1], [5 / 8, 2 / 3]])
        assert (matrix["rows"], matrix["columns"], matrix["split"]) == (["toy", "easy"], ["toy", "easy"], "test")
        assert all(low <= high for row in matrix["ci95"] for low, high in row)
        report.transfer_map(tmp_path / "transfer.png", matrix, "transfer")
        assert (tmp_path / "transfer.png").read_bytes().startswith(b"\x89PNG")

    def test_what_does_not_match(self, ensemble, agent, raises_input_error):
        tasks = {"toy": toys.task()}
        raises_input_error(lambda: transfer_matrix({"toy": agent.weights}, {"x": ensemble}, tasks), "toy", "x")
        raises_input_error(
            lambda: transfer_matrix({"toy": [agent.weights] * 3}, {"toy": [ensemble] * 2}, tasks), "3 agents", "2 sets"
        )
