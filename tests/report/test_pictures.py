"""Pictures of a search: what is drawn where, for two, three and five objectives."""

import itertools

import matplotlib.image
import numpy as np
import pytest
from matplotlib import pyplot

from rlae_jax import report, statistics
from rlae_jax.fusion.search import pareto

NAMES = ["positive sentiment", "reading level", "length", "humour", "tact"]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, still open."""
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    yield figures
    monkeypatch.undo()
    for figure in figures:
        pyplot.close(figure)


def searched(d):
    """Points of which the first is 0, and their scores: each objective's rises with its weight."""
    points = np.array(list(itertools.product((0.0, 0.5, 1.0), repeat=d)))
    return points, 0.2 + 0.7 * np.sqrt(points / np.maximum(points.sum(axis=1, keepdims=True), 1))


def check_png(path):
    height, width, _ = matplotlib.image.imread(path).shape
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 300 <= height <= 1_500
    assert 500 <= width <= 2_500
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


class TestTriangle:
    def test_places(self, drawn, tmp_path):
        points = np.array([[0, 0, 0], [1, 0, 0], [0, 0.5, 0], [0, 0, 1], [1, 1, 1], [0.5, 0.5, 0.5]])
        scores = np.array([0.9, 0.1, 0.2, 0.3, 0.5, 0.4])
        report.weight_triangle(tmp_path / "x.png", points, scores, NAMES[:3], "title")
        check_png(tmp_path / "x.png")
        axis = drawn[0].axes[0]
        dots = axis.collections[0]
        top, middle = np.sqrt(0.75), np.sqrt(0.75) / 3
        # From the worst to the best, without w = 0; the last two lie in one direction.
        expected = [[0, 0], [1, 0], [0.5, top], [0.5, middle], [0.5, middle]]
        np.testing.assert_allclose(dots.get_offsets(), expected, atol=1e-12)
        np.testing.assert_allclose(dots.get_array(), [0.1, 0.2, 0.3, 0.4, 0.5])
        assert labels(axis) == ["best: 0.500\nw positive sentiment 1\nw reading level 1\nw length 1"]
        assert [text.get_text() for text in axis.texts] == NAMES[:3]

    def test_what_it_refuses(self, raises_input_error, tmp_path):
        path = tmp_path / "x.png"
        raises_input_error(
            lambda: report.weight_triangle(path, np.eye(2), np.ones(2), NAMES[:2], ""), "three corners", "2"
        )
        raises_input_error(
            lambda: report.weight_triangle(path, np.zeros((2, 3)), np.ones(2), NAMES[:3], ""), "not 0", "2 points"
        )


class TestParallelCoordinates:
    @pytest.mark.parametrize("d", [2, 3, 5])
    def test_lines(self, drawn, tmp_path, d):
        points, scores = searched(d)
        report.parallel_coordinates(tmp_path / "x.png", points, scores, NAMES[:d], "title", pareto(scores))
        check_png(tmp_path / "x.png")
        axis = drawn[0].axes[0]
        _, faint, thick = axis.collections  # the first ones are the axes
        assert len(faint.get_segments()) + len(thick.get_segments()) == len(points)
        assert thick.get_linewidth()[0] > faint.get_linewidth()[0]
        best = scores.mean(axis=1).argmax()
        (line,) = [line for line in axis.lines if str(line.get_label()).startswith("best mean")]
        heights = line.get_ydata()
        np.testing.assert_allclose(heights[:d], points[best])
        scale = (np.append(scores[best], scores[best].mean()) - scores.min()) / np.ptp(scores)
        np.testing.assert_allclose(heights[d:], scale)
        ticks = [label.get_text().replace("\n", " ") for label in axis.get_xticklabels()]
        assert ticks == [*(f"w {name}" for name in NAMES[:d]), *NAMES[:d], "mean"]

    def test_scores_that_are_all_equal(self, drawn, tmp_path):
        report.parallel_coordinates(tmp_path / "x.png", np.eye(3), np.full((3, 3), 0.25), NAMES[:3], "title", [0, 1, 2])
        check_png(tmp_path / "x.png")
        (line,) = [line for line in drawn[0].axes[0].lines if str(line.get_label()).startswith("best mean")]
        np.testing.assert_allclose(line.get_ydata(), [1, 0, 0, 0.5, 0.5, 0.5, 0.5])


class TestContributions:
    @pytest.mark.parametrize("d", [2, 3, 5])
    def test_panels(self, drawn, tmp_path, d):
        points, scores = searched(d)
        scores[:, 0] = 0.25
        report.contributions(tmp_path / "x.png", points, scores, NAMES[:d], "title")
        check_png(tmp_path / "x.png")
        panels = drawn[0].axes
        assert len(panels) == d
        assert panels[0].get_title() == "positive sentiment\nrank correlation none"
        shares = points[1:] / points[1:].sum(axis=1, keepdims=True)
        for m in range(1, d):
            np.testing.assert_allclose(
                panels[m].collections[0].get_offsets(), np.column_stack([shares[:, m], scores[1:, m]])
            )
            correlation = statistics.rank_correlation(shares[:, m], scores[1:, m])
            assert panels[m].get_title() == f"{NAMES[m]}\nrank correlation {correlation:+.2f}"

    def test_nothing_but_0(self, raises_input_error, tmp_path):
        points = np.zeros((4, 2))
        raises_input_error(lambda: report.contributions(tmp_path / "x.png", points, points, NAMES[:2], ""), "4 points")


def test_curves_with_bands(drawn, tmp_path):
    """More lines than there are colours: each can be told from the others."""
    places = [0.0, 10.0, 20.0]
    lines = {f"line {i}": (places, [0.1 * i, 0.2, 0.3], [0.0, 0.1, 0.2], [0.5, 0.5, 0.5]) for i in range(10)}
    report.curves_with_bands(tmp_path / "x.png", {"one": lines, "other": {"own": lines["line 0"]}}, "cost", "title")
    check_png(tmp_path / "x.png")
    one, other = drawn[0].axes
    assert (labels(one), labels(other)) == (list(lines), ["own"])
    assert [axis.get_title() for axis in (one, other)] == ["one", "other"]
    shown = [line for line in one.lines if len(line.get_xdata()) > 1]
    assert [line.get_ydata()[0] for line in shown] == pytest.approx([0.1 * i for i in range(10)])
    assert len({(line.get_color(), line.get_linestyle()) for line in shown}) == 10
