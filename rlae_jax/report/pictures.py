"""Pictures: learning curves, scores with their intervals, weights per skill, what a search saw. Each is a PNG file that
appears whole or not at all; matplotlib is imported when the first one is drawn."""

import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from rlae_jax import files, hosts
from rlae_jax.errors import InputError
from rlae_jax.statistics import rank_correlation

# Distinguishable with colour-blind eyes (Okabe and Ito).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(
        1, columns, figsize=(width, height), squeeze=False, sharey=True, layout="constrained", dpi=150
    )


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    if hosts.is_first():
        with files.writing(path, binary=True) as file:
            figure.savefig(file, format="png")
    pyplot.close(figure)


def learning_curve(
    path: Path,
    runs: Mapping[str, Sequence[Mapping[str, float]]],
    references: Mapping[str, float],
    title: str,
    unit: str | None = None,
) -> None:
    """Dev score over iterations, one line per run, the training reward faint behind it.

    Args:
      runs: name -> rows of its metrics.jsonl.
      references: scores of methods that do not learn, drawn as dotted lines.
      unit: of scores that are no rewards.
    """
    figure, axes = _figure(7, 4)
    axis = axes[0][0]
    for colour, (name, rows) in zip(COLOURS, runs.items(), strict=False):
        axis.plot(
            [row["iteration"] for row in rows], [row["reward"] for row in rows], color=colour, alpha=0.2, linewidth=0.8
        )
        scored = [row for row in rows if "dev" in row]
        axis.plot(
            [row["iteration"] for row in scored], [row["dev"] for row in scored], color=colour, linewidth=2, label=name
        )
    for colour, (name, score) in zip(COLOURS[len(runs) :], references.items(), strict=False):
        axis.axhline(score, color=colour, linestyle=":", linewidth=1.5, label=name)
    axis.set(xlabel="PPO iteration", ylabel=unit or "mean reward", title=title)
    if unit is None:
        axis.set(ylim=(0, 1.02))
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def curves_with_bands(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float], Sequence[float]]]],
    over: str,
    title: str,
) -> None:
    """Scores over what they cost, a panel beside the other. Beyond the eighth line of a panel lines are dashed.

    Args:
      panels: title -> line's name -> (places, score, low, high), of one length each.
      over: what places are.
    """
    figure, axes = _figure(7 * len(panels), 5, len(panels))
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
        for i, (label, (places, scores, low, high)) in enumerate(lines.items()):
            colour, style = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
            axis.plot(places, scores, color=colour, linestyle=style, linewidth=1.8, label=label)
            axis.plot(places[-1:], scores[-1:], "o", color=colour, markersize=5)
            axis.fill_between(places, low, high, color=colour, alpha=0.12, linewidth=0)
        axis.set(title=name, xlabel=over)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("mean score on dev")
    figure.suptitle(title)
    _save(figure, path)


def scores_over(
    path: Path,
    values: Sequence[str],
    lines: Mapping[str, Sequence[tuple[float, float, float] | None]],
    field: str,
    title: str,
) -> None:
    """Scores with their intervals over the values of a setting.

    Args:
      lines: name -> (score, low, high) for each value; None leaves a gap.
    """
    figure, axes = _figure(7, 4)
    axis = axes[0][0]
    for i, (colour, (name, points)) in enumerate(zip(COLOURS, lines.items(), strict=False)):
        # Side by side, so that no interval hides another's.
        places = [place + 0.05 * (i - (len(lines) - 1) / 2) for place in range(len(values))]
        scores, low, high = zip(*((math.nan,) * 3 if point is None else point for point in points), strict=True)
        # A bound may miss its score by rounding, and lengths must not be negative.
        lengths = [[max(s - end, 0.0) for s, end in zip(scores, low, strict=True)]]
        lengths += [[max(end - s, 0.0) for s, end in zip(scores, high, strict=True)]]
        axis.errorbar(
            places, scores, lengths, color=colour, marker="o", linewidth=2, elinewidth=1, capsize=3, label=name
        )
        if len(lines) == 1:
            axis.fill_between(places, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(xlabel=field, ylabel="mean reward", title=title)
    axis.set_xticks(range(len(values)), values)
    if any(lines):
        axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.grid(alpha=0.3)
    _save(figure, path)


def weights_by_skill(
    path: Path, means: Sequence[Mapping[str, Sequence[float]]], members: Sequence[str], title: str
) -> None:
    """Mean weight of each member, per span (one panel each) and per skill that the span needs.

    Args:
      means: for each span, skill -> K mean weights.
    """
    figure, axes = _figure(3.2 * len(means) + 2, 3.6, len(means))
    for p, (axis, by_skill) in enumerate(zip(axes[0], means, strict=True)):
        skills = list(by_skill)
        base = [0.0] * len(skills)
        for k, member in enumerate(members):
            heights = [by_skill[skill][k] for skill in skills]
            axis.bar(skills, heights, bottom=base, color=COLOURS[k], label=member)
            for x, (bottom, height) in enumerate(zip(base, heights, strict=True)):
                if height >= 0.08:
                    axis.text(x, bottom + height / 2, f"{height:.2f}", ha="center", va="center", color="white")
            base = [bottom + height for bottom, height in zip(base, heights, strict=True)]
        axis.set(title=f"span {p + 1}", xlabel="skill that the span needs", ylim=(0, 1))
        axis.tick_params(axis="x", rotation=20)
    axes[0][0].set_ylabel("mean weight")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    _save(figure, path)


def scores_chart(path: Path, results: Mapping[str, Any]) -> None:
    """Score per method of a results.json with its 95% interval, in the table's order; small dots are single seeds, and
    reference lines are dotted."""
    methods = results["methods"]
    rows = {name: method for name, method in methods.items() if not method.get("reference")}
    figure, axes = _figure(7, 1.4 + 0.32 * len(rows))
    axis = axes[0][0]
    for y, (name, method) in enumerate(rows.items()):
        colour = COLOURS[5] if name.startswith("rlae_") else COLOURS[0]
        low, high = method["ci95"]
        axis.plot([low, high], [y, y], color=colour, linewidth=2, solid_capstyle="butt")
        axis.plot(method["score"], y, "o", color=colour, markersize=7)
        if len(method["per_seed"]) > 1:
            heights = [y + 0.28] * len(method["per_seed"])
            axis.plot(method["per_seed"], heights, "o", color=colour, markersize=3, alpha=0.6, linewidth=0)
        axis.annotate(
            f"{method['score']:.3f}",
            (1.01, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
        )
    for name, method in methods.items():
        if method.get("reference"):
            axis.axvline(method["score"], color=COLOURS[7], linestyle=":", label=f"{name} ({method['score']:.3f})")
            axis.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9, borderaxespad=0.2)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set(xlabel=f"{results.get('unit', 'mean reward')}, with 95% interval", ylim=(len(rows) - 0.5, -0.5))
    axis.set_title(f"{results['task']}, {results['split']} split", loc="left")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def transfer_map(path: Path, matrix: Mapping[str, Any], title: str, framed: Collection[tuple[int, int]] = ()) -> None:
    """A transfer matrix with its numbers: agents trained on the row, tested on the column.

    Args:
      matrix: "rows", "columns" and "scores", as `evaluation.transfer_matrix` returns them.
      framed: (row, column) of cells that have a frame.
    """
    from matplotlib.patches import Rectangle

    rows, columns = matrix["rows"], matrix["columns"]
    letters = max(map(len, rows))
    figure, axes = _figure(1.8 + 0.08 * letters + 0.95 * len(columns), 1.8 + 0.42 * len(rows))
    axis = axes[0][0]
    image = axis.imshow(matrix["scores"], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for r, scores in enumerate(matrix["scores"]):
        for c, score in enumerate(scores):
            axis.text(
                *(c, r, f"{score:.2f}"),
                ha="center",
                va="center",
                color="black" if score > 0.6 else "white",
                fontweight="bold" if rows[r] == columns[c] or (r, c) in framed else "normal",
            )
    for r, c in framed:
        axis.add_patch(Rectangle((c - 0.47, r - 0.45), 0.94, 0.9, fill=False, edgecolor=COLOURS[5], linewidth=2.2))
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="tested on", ylabel="trained on", title=title)
    figure.colorbar(image, ax=axis, label="mean reward")
    _save(figure, path)


_BEST: dict[str, Any] = {"color": COLOURS[5], "markeredgecolor": "black", "linestyle": "none", "zorder": 4}
_LABEL = 14  # letters in a line


def _directions(
    points: Float[np.ndarray, "N d"], scores: Float[np.ndarray, "N ..."]
) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "n d"], Float[np.ndarray, "n ..."]]:
    """Of the points that are not 0: their weights, these as shares of their sum, and their scores.

    Raises:
      InputError: there are none.
    """
    weights = np.asarray(points, np.float64)
    some = weights.any(axis=1)
    if not some.any():
        raise InputError(f"a picture of directions needs weights that are not 0; all {len(weights)} points are")
    weights = weights[some]
    return weights, weights / weights.sum(axis=1, keepdims=True), np.asarray(scores, np.float64)[some]


def weight_triangle(
    path: Path, points: Float[np.ndarray, "N d"], scores: Float[np.ndarray, " N"], names: Sequence[str], title: str
) -> None:
    """Scores of three weights over their direction, w / sum w, on which alone greedily decoded hidden states depend. Of
    points in one direction the best is on top; w = 0 has none and is left out.

    Raises:
      InputError: other than three names, or no weights but 0.
    """
    if len(names) != 3:
        raise InputError(f"a triangle has three corners, not {len(names)} ({', '.join(names)})")
    weights, shares, values = _directions(points, scores)
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
    places = shares @ corners
    figure, axes = _figure(6.4, 5.2)
    axis = axes[0][0]
    axis.plot(*corners[[0, 1, 2, 0]].T, color="black", linewidth=1, zorder=1)
    for share in (0.25, 0.5, 0.75):
        for k in range(3):
            ends = [share * corners[k] + (1 - share) * corners[other] for other in range(3) if other != k]
            axis.plot(*np.transpose(ends), color="#BBBBBB", linewidth=0.6, zorder=0)
    order = np.argsort(values, kind="stable")  # what is drawn later is on top
    drawn = axis.scatter(
        *places[order].T, c=values[order], cmap="viridis", s=46, edgecolors="black", linewidths=0.4, zorder=2
    )
    best = int(np.argmax(values))
    found = "\n".join(f"w {name} {weight:.3g}" for name, weight in zip(names, weights[best], strict=True))
    axis.plot(*places[best], "*", **_BEST, markersize=19, label=f"best: {values[best]:.3f}\n{found}")
    # Names begin and end a little outside of the triangle, so that long ones do not make it small.
    for name, (x, y), side in zip(
        names, ((-0.08, -0.09), (1.08, -0.09), (0.5, 0.93)), ("left", "right", "center"), strict=True
    ):
        axis.text(x, y, name, ha=side, va="center", fontweight="bold")
    axis.set(title=title, aspect="equal", xlim=(-0.1, 1.1), ylim=(-0.13, 0.97))
    axis.axis("off")
    axis.legend(loc="upper left", bbox_to_anchor=(-0.02, 0.95), frameon=False, borderaxespad=0)
    figure.colorbar(drawn, ax=axis, label="mean score", shrink=0.8)
    _save(figure, path)


def parallel_coordinates(
    path: Path,
    points: Float[np.ndarray, "N d"],
    scores_by_objective: Float[np.ndarray, "N d"],
    names: Sequence[str],
    title: str,
    pareto: Sequence[int] | Int[np.ndarray, " F"],
) -> None:
    """A line per point through its weights in [0, 1], its score under each objective, and their mean. All scores have
    one scale, from the lowest to the highest.

    Args:
      names: of the objectives; weight k is of the member made for objective k.
      pareto: the points that no other one dominates, which are drawn thicker.
    """
    from matplotlib.collections import LineCollection

    weights, scores = np.asarray(points, np.float64), np.asarray(scores_by_objective, np.float64)
    means = scores.mean(axis=1)
    pad = 0.5 if np.ptp(scores) == 0 else 0.0  # scores that are all equal are drawn in the middle
    low, high = float(scores.min()) - pad, float(scores.max()) + pad
    heights = np.column_stack([weights, (np.column_stack([scores, means]) - low) / (high - low)])
    places = np.arange(heights.shape[1]) + 0.4 * (np.arange(heights.shape[1]) >= len(names))
    front = np.isin(np.arange(len(means)), pareto)
    figure, axes = _figure(2 + 1.1 * len(places), 4.4)
    axis = axes[0][0]
    axis.vlines(places, 0, 1, color="black", linewidth=0.8, zorder=0)
    for chosen, width, alpha, label in ((~front, 0.8, 0.4, "other points"), (front, 1.6, 1.0, "Pareto set")):
        order = np.argsort(means[chosen], kind="stable")
        lines = LineCollection(
            [np.column_stack([places, row]) for row in heights[chosen][order]],
            array=means[chosen][order],
            clim=(means.min(), means.max()),
            cmap="viridis",
            linewidths=width,
            alpha=alpha,
            zorder=1,
        )
        axis.add_collection(lines)
        axis.plot([], [], color="#555555", linewidth=width, alpha=alpha, label=label)
    best = int(np.argmax(means))
    label = f"best mean ({means[best]:.3f})"
    axis.plot(places, heights[best], "o-", color=COLOURS[5], linewidth=2.6, markersize=5, zorder=4, label=label)
    labels = [*(f"w {name}" for name in names), *names, "mean"]
    axis.set_xticks(places, [textwrap.fill(label, _LABEL) for label in labels])
    axis.set(title=title, ylabel="weight", xlim=(places[0] - 0.15, places[-1] + 0.15), ylim=(-0.02, 1.02))
    scale = axis.secondary_yaxis(
        "right", functions=(lambda height: low + height * (high - low), lambda score: (score - low) / (high - low))
    )
    scale.set_ylabel("score")
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    figure.colorbar(lines, ax=axis, label="mean score", pad=0.02)
    _save(figure, path)


def contributions(
    path: Path,
    points: Float[np.ndarray, "N d"],
    scores_by_objective: Float[np.ndarray, "N d"],
    names: Sequence[str],
    title: str,
) -> None:
    """Each objective's score over the share of its own weight, w_m / sum w, with their rank correlation: whether the
    weights tell what an ensemble is good at. w = 0 has no shares and is left out.

    Raises:
      InputError: no weights but 0.
    """
    _, shares, scores = _directions(points, scores_by_objective)
    best = int(np.argmax(scores.mean(axis=1)))
    figure, axes = _figure(1.4 + 2.4 * len(names), 3.4, len(names))
    for axis, name, x, y in zip(axes[0], names, shares.T, scores.T, strict=True):
        axis.scatter(x, y, color=COLOURS[0], s=16, alpha=0.5, linewidths=0)
        axis.plot(x[best], y[best], "*", **_BEST, markersize=13, label="best mean")
        correlation = rank_correlation(x, y)
        told = "none" if math.isnan(correlation) else f"{correlation:+.2f}"
        axis.set(title=f"{name}\nrank correlation {told}", xlabel="share of its weight", xlim=(-0.05, 1.05))
        axis.title.set_fontsize(10)
        axis.set_xticks([0, 0.5, 1])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("score")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.suptitle(title)
    _save(figure, path)
