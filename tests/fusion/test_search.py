"""The searches on functions whose optimum is known, and what they may not do: evaluate a point twice."""

import itertools
import json

import moocore
import numpy as np
import pytest

from rlae_jax.fusion.search import (
    Scores,
    _simplex_parts,
    grid,
    halving_rounds,
    hierarchical,
    hierarchical_size,
    hypervolume,
    pareto,
    random_points,
    search_size,
    successive_halving,
)


def cone(optimum):
    """Falls linearly from its only maximum; two objectives, of which the second is constant."""

    def evaluate(points):
        distance = np.abs(points - optimum).max(axis=1)
        return np.stack([1 - distance, np.full(len(points), 0.5)], axis=1)

    return evaluate


class TestHierarchical:
    @pytest.mark.parametrize("d", [2, 3, 4, 5])
    def test_a_box(self, d):
        optimum = np.random.default_rng(d).random(d)
        known = Scores(cone(optimum))
        found = hierarchical(known, d, levels=4)
        assert found.evaluations == len(found.points) == 3**d + 3 * (3**d - 2**d)
        assert [region.shape for region in found.regions] == [(2**d, d)] * 4
        assert np.abs(found.weights - optimum).max() <= 1 / 16 + 1e-9
        whole = grid(Scores(cone(optimum)), d, 1 / 16) if d <= 3 else None
        if whole is not None:
            assert whole.evaluations == 17**d
            assert found.score == pytest.approx(whole.score)

    @pytest.mark.parametrize("d", [2, 3, 4, 5])
    def test_a_simplex(self, d):
        optimum = np.random.default_rng(d).dirichlet(np.ones(d))
        found = hierarchical(Scores(cone(optimum)), d, levels=5, space="simplex")
        np.testing.assert_allclose(found.points.sum(axis=1), 1)
        assert np.all(found.points >= 0)
        assert found.evaluations <= d * (d + 1) // 2 + 4 * (d * (d + 1) // 2 - d)
        whole = grid(Scores(cone(optimum)), d, 1 / 8, space="simplex")
        assert found.score > whole.score - 0.1

    @pytest.mark.parametrize("d", [1, 2, 3, 4, 5])
    def test_parts_of_a_simplex_fill_it(self, d):
        parts = list(_simplex_parts(np.eye(d)))
        assert len(parts) == 2 ** (d - 1)
        volumes = [abs(np.linalg.det(corners)) for corners in parts]
        np.testing.assert_allclose(volumes, 0.5 ** (d - 1))
        points = np.unique(np.concatenate(parts), axis=0)
        assert len(points) == d * (d + 1) // 2
        inside = np.random.default_rng(0).dirichlet(np.ones(d), 200)
        holds = [np.all(np.linalg.solve(corners.T, inside.T) >= -1e-9, axis=0) for corners in parts]
        assert np.all(np.sum(holds, axis=0) == 1)

    def test_what_it_refuses(self, raises_input_error):
        known = Scores(cone(np.zeros(2)))
        raises_input_error(lambda: hierarchical(known, 2, beams=0), "beam")
        raises_input_error(lambda: hierarchical(known, 4, levels=7, beams=10**9), "7 levels", "beams")
        raises_input_error(lambda: hierarchical(known, 2, space="ball"), "box, simplex", "ball")
        raises_input_error(lambda: hierarchical(known, 2, levels=0), "level")


def published(evaluate, d, levels, parts):
    """EMORL's rule, written out: one region, the part with the highest sum at its corners. Points in their order."""
    scores, order, region = {}, [], parts(None)
    for _ in range(levels):
        candidates = parts(region)
        new = sorted({tuple(np.round(p, 9).tolist()) for part in candidates for p in part} - set(scores))
        for point in new:
            scores[point] = float(evaluate(np.array([point])).mean())
        order += new
        totals = [sum(scores[tuple(np.round(p, 9).tolist())] for p in part) for part in candidates]
        region = candidates[int(np.argmax(np.round(totals, 9)))]
    return order, scores


def boxes(d):
    def parts(region):
        if region is None:
            return np.array(list(itertools.product((0.0, 1.0), repeat=d)))
        low, half = region.min(axis=0), np.ptp(region, axis=0) / 2
        corners = np.array(list(itertools.product((0, 1), repeat=d)))
        return [low + half * (np.array(shift) + corners) for shift in itertools.product((0, 1), repeat=d)]

    return parts


def simplices(d):
    return lambda region: np.eye(d) if region is None else list(_simplex_parts(region))


def ragged(seed):
    """A score without any order, the same for a point however often it is asked."""

    def evaluate(points):
        values = np.sin((points @ np.array([12.9898, 78.233, 37.719, 4.581])[: points.shape[1]] + seed) * 43.0)
        return np.stack([values, values**2], axis=1)

    return evaluate


class TestBeams:
    @pytest.mark.parametrize(("space", "parts"), [("box", boxes), ("simplex", simplices)])
    @pytest.mark.parametrize("d", [2, 3])
    def test_one_is_the_published_rule(self, d, space, parts):
        for seed in range(5):
            order, scores = published(ragged(seed), d, 4, parts(d))
            found = hierarchical(Scores(ragged(seed)), d, 4, space)
            assert found.points.tolist() == [list(point) for point in order]
            assert found.score == pytest.approx(max(scores.values()))
            again = hierarchical(Scores(ragged(seed)), d, 4, space, beams=1)
            np.testing.assert_array_equal(again.points, found.points)
            assert [len(region) for region in found.regions] == [2**d if space == "box" else d] * 4

    @pytest.mark.parametrize(("space", "parts"), [("box", boxes), ("simplex", simplices)])
    @pytest.mark.parametrize(("d", "beams"), [(2, 2), (2, 3), (3, 2), (3, 5)])
    def test_against_the_rule_written_out(self, d, beams, space, parts):
        evaluate, split, levels = ragged(d), parts(d), 3
        known, kept = {}, [split(None)]
        score = lambda p: known.setdefault(tuple(np.round(p, 9).tolist()), float(evaluate(p[None]).mean()))  # noqa: E731
        for _ in range(levels):
            candidates = [part for region in kept for part in split(region)]
            totals = [sum(score(p) for p in part) for part in candidates]
            kept = [candidates[i] for i in sorted(range(len(totals)), key=lambda i: -totals[i])[:beams]]
        asked = []
        found = hierarchical(Scores(lambda p: asked.append(p) or evaluate(p)), d, levels, space, beams)
        assert {tuple(p) for p in found.points.tolist()} == set(known)
        assert len(np.concatenate(asked)) == found.evaluations == len(found.points) == len(known)
        assert found.evaluations <= hierarchical_size(levels, d, space, beams)
        assert found.score == pytest.approx(max(known.values()))

    def test_a_landscape_that_needs_two(self):
        """A narrow peak within one quarter, a broad and lower hill in another, whose corners are better."""

        def evaluate(points):
            hill = 0.6 - 0.6 * np.abs(points - 0.75).max(axis=1)
            peak = 1.0 - 2.4 * np.abs(points - 0.25).max(axis=1)
            return np.maximum(hill, peak)[:, None]

        one, two = (hierarchical(Scores(evaluate), 2, 5, beams=beams) for beams in (1, 2))
        whole = grid(Scores(evaluate), 2, 1 / 32)
        assert one.score < whole.score - 0.35
        assert two.score == pytest.approx(whole.score)
        assert two.evaluations < whole.evaluations / 15

    @pytest.mark.parametrize(("space", "d", "levels"), [("box", 1, 5), ("box", 2, 4), ("box", 3, 3), ("simplex", 3, 4)])
    def test_all_of_them_are_the_grid_of_the_last_level(self, space, d, levels):
        found = hierarchical(Scores(ragged(0)), d, levels, space, beams=10**6)
        whole = grid(Scores(ragged(0)), d, 2.0**-levels, space)
        assert sorted(found.points.tolist()) == sorted(whole.points.tolist())
        assert found.evaluations == whole.evaluations == hierarchical_size(levels, d, space, 10**6)
        assert found.score == whole.score

    def test_its_size_by_hand(self):
        assert [hierarchical_size(n, 3) for n in (1, 2, 5)] == [27, 46, 103]
        assert [hierarchical_size(n, 3, beams=3) for n in (1, 2, 5)] == [27, 27 + 3 * 19, 27 + 12 * 19]
        assert hierarchical_size(3, 2, beams=9) == 9 + 4 * 5 + 9 * 5  # the second level has four quarters only
        assert hierarchical_size(2, 2, beams=9) == 25  # its grid


class TestScores:
    def test_points_on_a_ray_are_one(self):
        asked = []
        known = Scores(lambda points: asked.append(points) or cone(np.ones(3))(points), scale_invariant=True)
        found = hierarchical(known, 3, levels=1)
        assert len(found.points) == 27
        assert found.evaluations == len(np.concatenate(asked)) == 20  # 19 directions, and the origin

    def test_a_file_from_which_a_search_goes_on(self, tmp_path):
        path = tmp_path / "points.jsonl"
        first = hierarchical(Scores(cone(np.full(2, 0.3)), path=path, batch=4), 2, levels=3)
        lines = path.read_text().splitlines()
        assert len(lines) == first.evaluations
        path.write_text("\n".join(lines[:7]) + "\n" + lines[7][:10])
        asked = []
        known = Scores(lambda points: asked.append(points) or cone(np.full(2, 0.3))(points), path=path, answers=(5, 1))
        again = hierarchical(known, 2, levels=3)
        assert len(np.concatenate(asked)) == first.evaluations - 7
        assert again.evaluations == first.evaluations  # what it cost is what it cost in both calls
        # The first seven took no answers.
        assert known.answers == 5 * (first.evaluations - 7)
        assert known.seconds == pytest.approx(
            sum(json.loads(line)["seconds"] for line in path.read_text().splitlines())
        )
        np.testing.assert_array_equal(again.points, first.points)
        np.testing.assert_array_equal(again.scores, first.scores)

    def test_of_halving_too(self, tmp_path):
        path, points = tmp_path / "points.jsonl", np.random.default_rng(0).random((60, 2))

        def evaluate(points, rows):
            asked.append((len(points), *rows[[0, -1]]))
            return np.sin(points.sum(axis=1)[:, None, None] * (rows[None, :, None] + 1)) + np.array([0, 1])

        def search(**options):
            known = Scores(None, evaluate, answers=(40, 2), **options)
            return successive_halving(known.on, points, 20, first=2), known

        asked = []
        expected, _ = search()
        whole, known = search(path=path, batch=16)
        lines = path.read_text().splitlines()
        totals = known.evaluations, known.answers
        assert totals == (len(lines), 2 * expected.evaluations)
        for kept in (1, 30, 60, 61, len(lines) - 1, len(lines)):
            path.write_text("".join(f"{line}\n" for line in lines[:kept]))
            asked.clear()
            again, known = search(path=path)
            for name in ("weights", "score", "points", "scores", "evaluations"):
                np.testing.assert_array_equal(getattr(again, name), getattr(expected, name))
                np.testing.assert_array_equal(getattr(whole, name), getattr(expected, name))
            assert sum(n for n, *_ in asked) == len(lines) - kept
            assert (known.evaluations, known.answers) == totals

    def test_a_file_of_something_else(self, tmp_path, raises_input_error):
        path = tmp_path / "points.jsonl"
        path.write_text(json.dumps({"prompt": "x"}) + "\n" + "{}\n")
        raises_input_error(lambda: Scores(cone(np.zeros(2)), path=path), "points.jsonl:1")

    @pytest.mark.parametrize("scores", [np.full((3, 1), np.nan), np.zeros((2, 1)), np.zeros(3)])
    def test_scores_that_are_none(self, raises_input_error, scores):
        raises_input_error(lambda: Scores(lambda points: scores)(np.eye(3)), "3 rows")


def test_random_points_are_the_same_for_a_seed():
    one, other = (random_points(Scores(cone(np.full(3, 0.5))), 3, 20, seed=s, space="simplex") for s in (0, 0))
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_allclose(one.points.sum(axis=1), 1)
    assert random_points(Scores(cone(np.full(3, 0.5))), 3, 20, seed=1).points.max() <= 1


class TestHalving:
    def test_rounds(self):
        assert halving_rounds(21, 1_024) == [(1_024, 1)]
        assert halving_rounds(231, 1_024) == [(64, 58), (256, 15), (1_024, 1)]
        assert halving_rounds(22, 100) == [(64, 8), (100, 1)]
        assert halving_rounds(231, 64) == [(64, 1)]

    def test_size(self):
        assert search_size(231, 1_024) == 231 * 64 + 58 * 192 + 15 * 768
        assert search_size(231, 1_024, again=True) == 231 * 64 + 58 * 256 + 15 * 1_024
        assert search_size(24, 12, first=2) == 24 * 2 + 8 * 10
        assert search_size(3, 5) == 15

    def test_a_trace_by_hand(self):
        """Point i scores i on the first two prompts under both objectives together, of 24 points 16 to 23 go on; then
        16 to 19 catch up, and of these 17 most."""
        points = np.arange(24)[:, None] / 100
        scores = np.repeat(np.arange(24.0)[:, None, None], 6, axis=1) + np.array([-1.0, 1.0])
        scores[16:20, 2:] += 10
        scores[17, 2:] += 10
        asked = []

        def evaluate(left, rows):
            asked.append(((left[:, 0] * 100).round().tolist(), rows.tolist()))
            return scores[(left[:, 0] * 100).round().astype(int)][:, rows]

        found = successive_halving(evaluate, points, 6, first=2)
        assert asked == [(list(range(24)), [0, 1]), (list(range(16, 24)), [2, 3, 4, 5])]
        np.testing.assert_array_equal(found.points, points[16:])
        np.testing.assert_allclose(found.scores, scores[16:].mean(axis=1))
        assert found.weights.tolist() == [0.17]
        assert found.score == pytest.approx(17 + 20 * 4 / 6)
        assert found.evaluations == search_size(24, 6, first=2) == 24 * 2 + 8 * 4

    def test_of_equally_good_points_the_first_go_on(self):
        found = successive_halving(lambda left, rows: np.zeros((len(left), len(rows), 2)), np.eye(30), 9, first=1)
        np.testing.assert_array_equal(found.points, np.eye(30)[:8])
        np.testing.assert_array_equal(found.weights, np.eye(30)[0])

    @pytest.mark.parametrize(("n", "prompts", "first"), [(1, 1, 1), (21, 40, 2), (22, 40, 3), (150, 37, 2), (90, 5, 8)])
    def test_against_keeping_all_scores(self, n, prompts, first):
        """No score is asked for twice, and the survivors of a round are the best by all scores up to it."""
        rng = np.random.default_rng(n)
        points, scores = rng.random((n, 3)), rng.random((n, prompts, 2))
        asked = np.zeros((n, prompts), int)

        def evaluate(left, rows):
            places = [points.tolist().index(point) for point in left.tolist()]
            asked[np.ix_(places, rows)] += 1
            return scores[np.ix_(places, rows)]

        found = successive_halving(evaluate, points, prompts, first)
        left = list(range(n))
        for seen, kept in halving_rounds(n, prompts, first)[:-1]:
            left = sorted(sorted(left, key=lambda i: -scores[i, :seen].mean())[:kept])
        np.testing.assert_array_equal(found.points, points[left])
        np.testing.assert_allclose(found.scores, scores[left].mean(axis=1))
        np.testing.assert_array_equal(found.weights, points[max(left, key=lambda i: scores[i].mean())])
        assert asked.max() == 1
        assert np.all(asked[left] == 1)
        assert found.evaluations == asked.sum() == search_size(n, prompts, first)

    @pytest.mark.parametrize("levels", [1, 2, 5])
    def test_costs_decide_between_equally_good_points(self, levels):
        """Then the round before does. With `again` a round sees all of its prompts anew."""
        rng = np.random.default_rng(levels)
        scores, costs = rng.integers(levels, size=(60, 20)), rng.integers(3, size=60).astype(float)
        asked = []

        def evaluate(left, rows):
            places = left[:, 0].astype(int)
            asked.append((places.tolist(), len(rows)))
            return scores[np.ix_(places, rows)][..., None]

        found = successive_halving(evaluate, np.arange(60.0)[:, None], 20, first=2, again=True, costs=costs)
        left = list(range(60))
        for seen, kept in halving_rounds(60, 20, 2):
            assert asked.pop(0) == (left, seen)
            left = sorted(left, key=lambda i: (-scores[i, :seen].mean(), costs[i]))[:kept]
        assert found.weights.tolist() == left
        assert found.evaluations == search_size(60, 20, first=2, again=True)

    def test_what_it_refuses(self, raises_input_error):
        def flat(left, rows):
            return np.zeros((len(left), len(rows)))

        raises_input_error(lambda: successive_halving(flat, np.eye(3), 4), "3 points", "4 prompts", "[3, 4]")
        lost = np.full((3, 4, 2), np.nan)
        raises_input_error(lambda: successive_halving(lambda left, rows: lost, np.eye(3), 4), "finite", "nan")
        raises_input_error(lambda: successive_halving(flat, np.zeros((0, 3)), 4), "[0, 3]")
        raises_input_error(lambda: successive_halving(flat, np.eye(3), 0), "0 prompts")
        raises_input_error(lambda: successive_halving(flat, np.eye(3), 4, first=0), "0 in the first")


class TestFronts:
    def test_pareto_by_hand(self):
        scores = np.array([[1, 0], [0, 1], [0.5, 0.5], [0.4, 0.5], [0.5, 0.5], [1, 0]])
        assert pareto(scores) == [0, 1, 2, 4, 5]
        assert pareto(np.zeros((0, 2))) == []

    @pytest.mark.parametrize("m", [1, 2, 3, 4])
    def test_hypervolume_by_counting_cells(self, m):
        """On a lattice the volume is the number of cells that lie below some point."""
        rng = np.random.default_rng(m)
        points = rng.integers(0, 6, size=(7, m))
        cells = [
            any(all(c < p for c, p in zip(cell, point, strict=True)) for point in points)
            for cell in itertools.product(range(6), repeat=m)
        ]
        assert hypervolume(points) == pytest.approx(sum(cells))
        shifted = hypervolume(points + 2.0, reference=[2.0] * m)
        assert shifted == pytest.approx(sum(cells))

    @pytest.mark.parametrize("m", [2, 3, 4, 5])
    def test_against_moocore(self, m):
        """With points twice, points that are equal under some objectives, and points below the reference."""
        rng = np.random.default_rng(m)
        for n in (1, 2, 6, 15):
            for values in (rng.random((n, m)), rng.integers(4, size=(n, m)) / 4):
                scores = np.concatenate([values, values[: n // 3]])
                kept = moocore.is_nondominated(scores, maximise=True, keep_weakly=True)
                assert pareto(scores) == np.flatnonzero(kept).tolist()
                for reference in (np.zeros(m), np.full(m, 0.3), rng.random(m)):
                    expected = moocore.hypervolume(scores, ref=reference, maximise=True)
                    assert hypervolume(scores, reference) == pytest.approx(expected, abs=1e-12)


def test_a_file_that_was_cut_off_goes_on_where_it_was_whole(tmp_path):
    path = tmp_path / "points.jsonl"

    def evaluate(points):
        return np.asarray(points).sum(axis=1, keepdims=True)

    Scores(evaluate, path=path)(np.array([[0.0, 0.5], [0.5, 0.0]]))
    path.write_text(path.read_text()[:-9])  # killed in the middle of its last line
    for points in ([[0.5, 0.0]], [[1.0, 1.0]]):
        Scores(evaluate, path=path)(np.array(points))
    known = Scores(evaluate, path=path)
    assert known(np.array([[0.0, 0.5], [0.5, 0.0], [1.0, 1.0]])).ravel().tolist() == [0.5, 0.5, 2.0]
    assert known.evaluations == 3
