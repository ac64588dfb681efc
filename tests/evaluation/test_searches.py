"""Searches for weights: what they choose, on which prompts, and at how many answers they look."""

import dataclasses

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.evaluation import (
    baseline_methods,
    searches,
)
from rlae_jax.evaluation.searches import Budget, search_size, simplex_grid, static_weights
from tests.helpers import toys


class TestGrid:
    @pytest.mark.parametrize(("k", "n"), [(1, 1), (2, 21), (3, 231)])
    def test_counts_sums_and_corners(self, k, n):
        grid = simplex_grid(k, 0.05)
        assert grid.shape == (n, k)
        assert len({tuple(point) for point in grid.tolist()}) == n
        np.testing.assert_allclose(grid.sum(axis=1), 1.0, rtol=1e-6)
        assert np.all(grid >= 0)
        np.testing.assert_allclose(grid * 20, np.round(grid * 20), atol=1e-5)
        for corner in np.eye(k):
            assert corner.tolist() in grid.tolist()


class TestSearch:
    def test_how_many_answers_it_looks_at(self):
        assert search_size(21, 1_024) == 21 * 1_024  # two members: every point on every prompt
        assert search_size(231, 1_024) == 231 * 64 + 58 * 256 + 15 * 1_024
        assert search_size(231, 40) == 231 * 40
        assert search_size(1, 1_024) == 1_024

    def test_halving_finds_what_the_whole_grid_finds(self, make_chain_lm, make_tokenizer, monkeypatch):
        """Of three members the surest one must be outweighed, and the other two be balanced."""
        members = toys.members(make_chain_lm, make_tokenizer)
        logits = np.zeros((toys.END + 1, toys.END + 1), np.float32)
        logits[:, len(toys.LETTERS)] = 8.0  # "0", which is right after a and e
        members.append(make_chain_lm(logits, tokenizer=members[0].tokenizer, name="zero", end_ids=(), context=64))
        ensemble, task = rj.Ensemble(members, end_ids=(toys.END,)), toys.task()
        whole, looked = static_weights(ensemble, task)
        assert looked == 232 * 64  # the grid and equal weights
        monkeypatch.setattr(searches, "FIRST_PROMPTS", 16)
        halved, looked = static_weights(ensemble, task)
        np.testing.assert_array_equal(halved, whole)
        assert looked == search_size(232, 64) < 232 * 64 / 1.5

    def test_it_looks_at_no_fewer_answers_than_asked_for(self, ensemble, monkeypatch):
        monkeypatch.setattr(searches, "SEARCH_PROMPTS", 8)
        task = toys.task()
        n = len(task.split("train"))
        assert n == 64
        assert static_weights(ensemble, task)[1] == 21 * 8
        assert static_weights(ensemble, task, Budget(21 * 8 + 1))[1] == 21 * n  # in steps of 64 prompts
        assert static_weights(ensemble, task, Budget(10**9))[1] == 21 * n
        assert static_weights(ensemble, task, Budget(10**9, prompts=5))[1] == 21 * 5
        config = dataclasses.replace(toys.SETTINGS, iterations=1, prompts=100)
        (tuned,) = baseline_methods(ensemble, task, ["perplexity"], config=config).values()
        assert tuned.record["searched"] == 7 * 15 >= 100
        (tuned,) = baseline_methods(ensemble, task, ["perplexity"], config=config, search_prompts=4).values()
        assert tuned.record["searched"] == 7 * 4
