"""What an encoder read is kept once for all rows that go on from it: samples of a prompt, and points of a search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.emorl import fused as fused_module
from rlae_jax.emorl.fused import Fused
from rlae_jax.fusion.prompts import pad_rows, row_keys
from tests.helpers.adapters import random_adapter

ROWS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
N = 6


@pytest.fixture(scope="module")
def adapters(t5):
    return [random_adapter(t5, seed, rank=2, alpha=1.5) for seed in range(3)]


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# The CPU takes the queries of few samples one by one, those of many together.
@pytest.mark.parametrize(("shared", "samples"), [(False, 12), (True, 3)])
def test_samples_of_an_encoder_decoder(t5, adapters, shared, samples):
    """They are what the same rows write by themselves, with the samples' keys."""
    ensemble = rj.Ensemble.from_adapters(t5, adapters) if shared else rj.Ensemble([t5])
    spec = ensemble.spec(max_new_tokens=N, temperature=1.2)
    ids, mask = pad_rows(ROWS, 8)
    weights = jnp.full((1, len(ensemble.members)), 1 / len(ensemble.members))
    run = jax.jit(rj.decode)
    keys = row_keys(jax.random.key(3), len(ROWS))
    out = ensemble.generate(
        prompt_ids=ids, prompt_mask=mask, samples=samples, temperature=1.2, seed=3, max_new_tokens=N
    )
    for i in range(samples):
        own = jax.vmap(lambda key, i=i: jax.random.fold_in(key, i))(keys)
        alone = run(ensemble.params, ids, mask, weights, own, spec)
        for b, (tokens, steps) in enumerate(
            zip(alone.tokens, np.asarray(alone.steps) - np.asarray(alone.ended), strict=True)
        ):
            assert out.tokens[b * samples + i] == np.asarray(tokens)[:steps].tolist()
    assert len({str(row) for row in out.tokens}) > len(ROWS)


def test_an_answer_goes_on_with_its_samples(t5):
    """The cache of samples grows by its own slots only."""
    ensemble = rj.Ensemble([t5])
    ids, mask = pad_rows(ROWS, 8)
    given = {"prompt_ids": ids, "prompt_mask": mask, "samples": 2, "temperature": 1.2, "ignore_eos": True}
    begun = ensemble.generate(max_new_tokens=2, keep=True, **given)
    assert ensemble.extend(begun, N - 2).tokens == ensemble.generate(max_new_tokens=N, **given).tokens


class TestPoints:
    @pytest.fixture(scope="class")
    def points(self, t5, adapters):
        """Long prompts and short answers: nearly all that is kept is what the encoder read."""
        return Fused(t5, adapters).prepare([[5] * 128] * 2, max_new_tokens=2)

    def test_the_state_grows_by_what_is_written(self, points):
        def kept(n):
            state = jax.eval_shape(lambda state: fused_module._for_points(state, n, 1), points._read)
            return [cache.source for cache in state.caches], nbytes([cache.layers for cache in state.caches])

        one, few = kept(1), kept(5)
        assert few[0] == one[0]
        assert few[1] == 5 * one[1]

    def test_the_program_grows_by_what_is_written(self, points):
        params, read = points.fused.ensemble.params, points._read
        weights = np.random.default_rng(0).random((12, 3)).astype(np.float32)

        def bytes_of(n):
            lowered = fused_module._answer.lower(params, read, weights[:n], None, points.spec, 1)
            memory = lowered.compile().memory_analysis()
            return memory.temp_size_in_bytes + memory.output_size_in_bytes

        source = nbytes([cache.source for cache in read.caches])
        assert (bytes_of(12) - bytes_of(4)) / 8 < 0.5 * source

    def test_as_many_fit_as_what_they_write_leaves_room_for(self, t5, adapters, points):
        written = nbytes(points._read.members) - nbytes([(c.source, c.source_mask) for c in points._read.caches])
        for mode, at_once in (("hidden", 4), ("params", 1)):
            given = Fused(t5, adapters, mode).prepare([[5] * 128] * 2, max_new_tokens=2, memory=4 * written)
            assert given.at_once == at_once


class TestRuns:
    @pytest.mark.parametrize("samples", [1, 2])
    def test_every_row_with_weight_is_run(self, samples):
        prompts, points = 2, np.array([[1, 0, 0], [0, 1, 0], [1, 0, 1], [0, 0, 1], [1, 0, 0]], np.float32)
        runs = fused_module._row_subsets(points, prompts, samples)
        rows, batch = runs.rows.reshape(3, -1), prompts * len(points) * samples
        assert rows.shape[1] == 4 * prompts * samples  # three of five points, in steps of two
        of_rows = np.tile(np.repeat(points, samples, axis=0), (prompts, 1))
        for m, places in enumerate(runs.places.reshape(3, -1)):
            used = np.flatnonzero(of_rows[:, m])
            assert len(places) == batch
            assert np.array_equal(runs.rows[places[used]], used)
            assert set(rows[m]) == set(used)
            # What an encoder read is found by where a row stands.
            assert np.array_equal(rows[m] // (batch // prompts), np.arange(rows.shape[1]) // (rows.shape[1] // prompts))

    def test_none_where_it_saves_nothing(self):
        assert fused_module._row_subsets(np.ones((4, 2), np.float32), 2, 1) is None
        assert fused_module._row_subsets(np.array([[1, 0], [1, 1], [1, 0]], np.float32), 2, 1) is None
        assert fused_module._row_subsets(np.array([[1.0, 0.0]]), 2, 1) is None

    def test_few_programs(self):
        rng = np.random.default_rng(0)
        points = [rng.random((20, 3)) * (rng.random((20, 3)) < share) for share in np.linspace(0.05, 1, 50)]
        runs = [fused_module._row_subsets(p, 1, 1) for p in points]
        assert {None if run is None else len(run.rows) // 3 for run in runs} <= {5, 10, 15, None}
