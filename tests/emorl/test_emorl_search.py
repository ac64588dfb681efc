"""A search for weights: against brute force over its own points, its files, and going on after an interruption."""

import dataclasses
import json
import shutil
import zlib

import jax
import numpy as np
import pytest

from rlae_jax.emorl import embedded
from rlae_jax.emorl.fused import Fused
from rlae_jax.emorl.scorers import of_function
from rlae_jax.emorl.search import PointEvaluator, SearchConfig, levels_within, most_points, search
from rlae_jax.fusion.search import Scores, hierarchical, level_sizes, pareto, search_size
from rlae_jax.models import LM, transformer
from rlae_jax.tasks import reflections
from tests.helpers.adapters import random_adapter

NAMES = ("red", "green", "blue")
PROMPTS = reflections.prompts().split("dev")[:3]
SETTINGS = {"levels": 3, "max_new_tokens": 5}
FILES = {"config.json", "points.jsonl", "search.json", "points.png", "contributions.png"}


def hashed(name):
    """A score that looks random, and is a function of prompt and response."""
    return of_function(name, lambda prompt, text: zlib.crc32(f"{name} {prompt} {text}".encode()) % 1000 / 999)


SCORERS = {m: [hashed(name) for name in NAMES[:m]] for m in (2, 3)}


def settings(**changes):
    return SearchConfig(**SETTINGS | changes)


@pytest.fixture(scope="module")
def fused():
    """fused[M, mode] of a random encoder-decoder; adapters and objectives have one another's names."""
    small = {"layers": 1, "width": 16, "head_width": 4, "ffn_width": 24}
    encoder = dataclasses.replace(embedded.MODEL.encoder, **small)
    model = dataclasses.replace(embedded.MODEL, **small, encoder=encoder, head_scale=0.25)
    params = transformer.init_params(model, jax.random.key(1))
    params["embedding"] = 2 * params["embedding"]
    lm = LM(model, params, embedded.make_tokenizer(), name="random")
    adapters = [random_adapter(lm, m, rank=2, alpha=8.0, name=name) for m, name in enumerate(NAMES)]
    return {(m, mode): Fused(lm, adapters[:m], mode) for m in (2, 3) for mode in ("hidden", "params")}


@pytest.fixture(scope="module")
def finished(fused, tmp_path_factory):
    """(directory, result) of a search that nobody disturbed; do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "search"
    return out, search(fused[2, "params"], PROMPTS, SCORERS[2], settings(), out)


def read(out):
    return json.loads((out / "search.json").read_text())


def same(one, other):
    np.testing.assert_array_equal(one.points, other.points)
    np.testing.assert_array_equal(one.scores, other.scores)
    np.testing.assert_array_equal(one.weights, other.weights)
    assert one.score == other.score


class TestAgainstBruteForce:
    @pytest.mark.parametrize(("mode", "evaluations"), [("params", 9 + 5 + 5), ("hidden", None)])
    def test_its_best_point_is_the_best_of_its_points(self, fused, finished, mode, evaluations):
        """Every point is asked again, alone and through the ensemble."""
        one = fused[2, mode]
        found = finished[1] if mode == "params" else search(one, PROMPTS, SCORERS[2], settings())
        means = []
        for point, scores in zip(found.result.points, found.result.scores, strict=True):
            if mode == "params":
                out = one.ensemble.generate(PROMPTS, adapters=np.tile(point, (3, 1)), max_new_tokens=5).texts
            elif point.max() > 0:
                out = one.ensemble.generate(PROMPTS, weights=point, max_new_tokens=5).texts
            else:
                out = [""] * 3
            expected = [scorer(PROMPTS, out).mean() for scorer in SCORERS[2]]
            np.testing.assert_allclose(scores, expected)
            means.append(np.mean(expected))
        assert len(set(means)) > 5
        assert found.result.score == pytest.approx(max(means))
        np.testing.assert_array_equal(found.result.weights, found.result.points[int(np.argmax(means))])
        assert len(found.result.points) == 19
        directions = {tuple(np.round(p / max(p.max(), 1e-9), 9)) for p in found.result.points}
        assert found.result.evaluations == (evaluations or len(directions))
        assert found.answers == found.result.evaluations * len(PROMPTS)

    def test_its_way_is_that_of_the_search_over_a_table(self, finished):
        _, found = finished
        table = {tuple(p): s for p, s in zip(found.result.points.tolist(), found.result.scores, strict=True)}
        known = Scores(lambda points: np.array([table[tuple(point)] for point in points.tolist()]))
        same(hierarchical(known, 2, levels=3), found.result)

    def test_with_samples(self, fused):
        """All samples of a prompt count, of all points with the same keys."""
        one = fused[2, "params"]
        config = settings(method="grid", step=1.0, temperature=1.0, samples=2, seed=3)
        found = search(one, PROMPTS, SCORERS[2], config)
        assert found.answers == 4 * 3 * 2
        for point, scores in zip(found.result.points, found.result.scores, strict=True):
            texts = one.ensemble.generate(
                PROMPTS, adapters=np.tile(point, (3, 1)), max_new_tokens=5, temperature=1.0, samples=2, seed=3
            ).texts
            asked = [prompt for prompt in PROMPTS for _ in range(2)]
            np.testing.assert_allclose(scores, [scorer(asked, texts).mean() for scorer in SCORERS[2]])

    def test_little_memory_finds_the_same(self, fused, finished):
        told = []
        found = search(fused[2, "params"], PROMPTS, SCORERS[2], settings(), memory=1, on_points=told.append)
        same(found.result, finished[1].result)
        assert told == list(range(1, 20))


class TestFiles:
    def test_of_two_adapters(self, finished):
        out, found = finished
        assert {path.name for path in out.iterdir()} == FILES
        told = read(out)
        assert told["weights"] == dict(zip(NAMES, found.result.weights.tolist(), strict=False))
        assert told["score"] == found.result.score == pytest.approx(np.mean(list(told["scores"].values())))
        assert (told["mode"], told["points"], told["evaluations"], told["answers"]) == ("params", 19, 19, 57)
        front = pareto(found.result.scores)
        assert [row["scores"] for row in told["pareto"]] == found.result.scores[front].tolist()
        assert [row["weights"] for row in told["pareto"]] == found.result.points[front].tolist()
        lines = [json.loads(line) for line in (out / "points.jsonl").read_text().splitlines()]
        kept = {tuple(line["point"]): line["scores"] for line in lines}
        assert kept == dict(zip(map(tuple, found.result.points.tolist()), found.result.scores.tolist(), strict=True))

    def test_of_three_adapters_there_is_a_triangle(self, fused, tmp_path):
        found = search(fused[3, "hidden"], PROMPTS[:1], SCORERS[3], settings(levels=1), tmp_path / "search")
        assert {path.name for path in (tmp_path / "search").iterdir()} == FILES | {"weights.png"}
        assert len(found.result.points) == 27
        assert found.result.evaluations == 20  # 19 directions, and the origin
        assert found.answers == 20

    def test_rank_correlations(self, finished):
        """Of ranks, worked out by numpy; there are ties among shares, whose mean rank counts."""
        _, found = finished
        kept = found.result.points.max(axis=1) > 0
        points, scores = found.result.points[kept], found.result.scores[kept]
        shares = points / points.sum(axis=1, keepdims=True)

        def ranks(values):
            values = np.round(values, 12)
            return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])

        expected = {
            name: np.corrcoef(ranks(shares[:, m]), ranks(scores[:, m]))[0, 1] for m, name in enumerate(NAMES[:2])
        }
        assert found.correlations() == pytest.approx(expected, abs=1e-6)


class TestResuming:
    @pytest.fixture
    def cut(self, finished, tmp_path):
        """A search that was stopped after 12 of its 19 points."""
        out = shutil.copytree(finished[0], tmp_path / "cut")
        lines = (out / "points.jsonl").read_text().splitlines()
        (out / "points.jsonl").write_text("\n".join(lines[:12]) + "\n")
        (out / "search.json").unlink()
        return out

    def test_only_what_is_missing_is_evaluated(self, fused, finished, cut):
        found = search(fused[2, "params"], PROMPTS, SCORERS[2], settings(), cut, resume=True)
        assert (found.result.evaluations, found.answers) == (19, 19 * 3)
        same(found.result, finished[1].result)
        one, other = ({k: v for k, v in read(out).items() if k != "seconds"} for out in (cut, finished[0]))
        assert one == other
        again = search(fused[2, "params"], PROMPTS, SCORERS[2], settings(), cut, resume=True)
        assert (again.result.evaluations, again.answers, again.seconds) == (19, 57, found.seconds)
        same(again.result, finished[1].result)

    def test_deeper_levels(self, fused, finished, cut):
        one = fused[2, "params"]
        found = search(one, PROMPTS, SCORERS[2], settings(levels=4), cut, resume=True)
        assert found.result.evaluations == 19 + 5
        same(found.result, search(one, PROMPTS, SCORERS[2], settings(levels=4)).result)
        assert found.result.points[:19].tolist() == finished[1].result.points.tolist()

    def test_more_boxes(self, fused, finished, cut):
        """What one box has evaluated is not evaluated again, and the cost is that of a search that began so."""
        one, told = fused[2, "params"], []
        shutil.copy(finished[0] / "points.jsonl", cut / "points.jsonl")
        found = search(one, PROMPTS, SCORERS[2], settings(beams=3), cut, resume=True, on_points=told.append)
        alone = search(one, PROMPTS, SCORERS[2], settings(beams=3))
        same(found.result, alone.result)
        assert (found.result.evaluations, found.answers) == (alone.result.evaluations, alone.answers)
        assert told[-1] == found.result.evaluations - 19 > 0
        assert most_points(settings(beams=3), 2) >= found.result.evaluations
        assert read(cut)["evaluations"] == found.result.evaluations

    def test_a_directory_of_before_there_were_beams(self, fused, finished, cut):
        config = json.loads((cut / "config.json").read_text())
        del config["settings"]["beams"], config["digest"]
        (cut / "config.json").write_text(json.dumps(config))
        same(search(fused[2, "params"], PROMPTS, SCORERS[2], settings(), cut, resume=True).result, finished[1].result)

    def test_of_halving(self, fused, tmp_path):
        one = fused[2, "params"]
        config = settings(method="halving", budget=22)
        whole = search(one, PROMPTS, SCORERS[2], config, tmp_path / "whole")
        same(whole.result, search(one, PROMPTS, SCORERS[2], config).result)
        shutil.copytree(tmp_path / "whole", tmp_path / "cut")
        points = tmp_path / "cut" / "points.jsonl"
        points.write_text("".join(points.read_text().splitlines(True)[:9]))
        told = []
        found = search(one, PROMPTS, SCORERS[2], config, tmp_path / "cut", resume=True, on_points=told.append)
        same(found.result, whole.result)
        assert (found.answers, told[-1]) == (whole.answers, 22 - 9)
        one, other = ({k: v for k, v in read(tmp_path / out).items() if k != "seconds"} for out in ("cut", "whole"))
        assert one == other

    def test_what_it_refuses(self, fused, cut, raises_input_error):
        one = fused[2, "params"]
        before = (cut / "points.jsonl").read_bytes()
        raises_input_error(lambda: search(one, PROMPTS, SCORERS[2], settings(), cut), "already", "resume")

        def resumed(fused=one, prompts=PROMPTS, scorers=SCORERS[2], **changes):
            search(fused, prompts, scorers, settings(**changes), cut, resume=True)

        raises_input_error(lambda: resumed(prompts=PROMPTS[:2]), "another configuration", "prompts")
        raises_input_error(lambda: resumed(scorers=SCORERS[3]), "another configuration", "objectives")
        raises_input_error(lambda: resumed(fused=fused[2, "hidden"]), "another configuration", "mode")
        raises_input_error(lambda: resumed(max_new_tokens=4), "another configuration", "max_new_tokens")
        raises_input_error(lambda: resumed(method="grid"), "another configuration", "method")
        assert (cut / "points.jsonl").read_bytes() == before


class TestBudget:
    @pytest.mark.parametrize("space", ["box", "simplex"])
    @pytest.mark.parametrize("d", [2, 3, 4])
    def test_levels_within_it_take_no_more(self, d, space):
        optimum = np.random.default_rng(d).random(d)
        first, later = level_sizes(d, space)
        for budget in range(first, first + 4 * later, max(later // 3, 1)):
            levels = levels_within(settings(levels=9, budget=budget, space=space), d)
            taken = [
                hierarchical(Scores(lambda p: -np.abs(p - optimum).sum(axis=1, keepdims=True)), d, n, space).evaluations
                for n in (levels, levels + 1)
            ]
            assert taken[0] <= budget
            assert taken[0] == first + (levels - 1) * later or space == "simplex"
            assert first + levels * later > budget

    def test_by_hand(self):
        assert level_sizes(3, "box") == (27, 19)
        assert level_sizes(3, "simplex") == (6, 3)
        assert [levels_within(settings(budget=n, levels=3), 3) for n in (27, 45, 46, 64, 65, 400)] == [1, 1, 2, 2, 3, 3]
        assert levels_within(settings(levels=7), 3) == 7
        three = [settings(budget=n, levels=3, beams=3) for n in (27, 83, 84, 140, 141, 400)]
        assert [levels_within(config, 3) for config in three] == [1, 1, 2, 2, 3, 3]
        assert [most_points(config, 3) for config in three[1:4]] == [27, 84, 84]

    def test_below_one_level(self, fused, tmp_path, raises_input_error):
        for (m, budget), takes in {(2, 8): "9", (3, 26): "27"}.items():
            one = fused[m, "hidden"]
            config = settings(budget=budget)
            raises_input_error(lambda a=one, b=m, c=config: search(a, PROMPTS, SCORERS[b], c, tmp_path / "x"), takes)
        assert not (tmp_path / "x").exists()

    def test_settings(self, raises_input_error):
        raises_input_error(lambda: settings(method="best"), "hierarchical, grid, random, halving", "best")
        raises_input_error(lambda: settings(space="ball"), "box, simplex", "ball")
        raises_input_error(lambda: settings(levels=0), "levels")
        raises_input_error(lambda: settings(beams=0), "beams is 0", "at least 1")
        raises_input_error(lambda: settings(beams=2, method="grid"), "beams", "hierarchical", "grid")
        raises_input_error(lambda: settings(step=0.3), "step", "0.3")
        raises_input_error(lambda: settings(samples=2), "temperature")


class TestOtherMethods:
    @pytest.mark.parametrize("space", ["box", "simplex"])
    def test_a_grid(self, fused, space):
        found = search(fused[2, "params"], PROMPTS, SCORERS[2], settings(method="grid", step=0.5, space=space))
        n = {"box": 9, "simplex": 3}[space]
        assert (len(found.result.points), found.result.evaluations, found.answers) == (n, n, 3 * n)
        assert found.result.score == found.result.scores.mean(axis=1).max()

    def test_random_points(self, fused):
        one = fused[2, "params"]
        found = search(one, PROMPTS, SCORERS[2], settings(method="random", budget=9, seed=4))
        assert (len(found.result.points), found.result.evaluations, found.answers) == (9, 9, 27)
        expected = PointEvaluator(one, PROMPTS, SCORERS[2], settings())(found.result.points)
        np.testing.assert_array_equal(found.result.scores, expected)
        assert found.result.score == expected.mean(axis=1).max()
        again = search(one, PROMPTS, SCORERS[2], settings(method="random", budget=9, seed=4))
        same(again.result, found.result)

    def test_halving(self, fused):
        """Fewer points than rounds begin with: all are scored on all prompts, as of the random search."""
        one = fused[2, "params"]
        found = search(one, PROMPTS, SCORERS[2], settings(method="halving", budget=9, seed=4))
        whole = search(one, PROMPTS, SCORERS[2], settings(method="random", budget=9, seed=4))
        assert found.result.evaluations == found.answers == search_size(9, 3) == 27
        np.testing.assert_allclose(found.result.scores, whole.result.scores)
        np.testing.assert_allclose(found.result.weights, whole.result.weights, atol=1e-9)
