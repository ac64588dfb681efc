"""What people look at: progress, tables, the environment of a run, and pictures."""

import contextlib
import math
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.console
import rich.progress
import rich.table

Update = Callable[[int, str], None]
# Without a terminal, a line at most this often.
_SECONDS_BETWEEN_LINES = 10.0

console = rich.console.Console()


@contextlib.contextmanager
def progress(description: str, total: int, unit: str) -> Iterator[Update]:
    """Shows how far a long piece of work is, with its rate and the time left.

    Yields `update(done, note)`. On a terminal it is a bar; elsewhere plain lines, one every ten seconds and one at the
    end.
    """
    started = time.monotonic()
    if console.is_terminal:
        with rich.progress.Progress(
            rich.progress.TextColumn("{task.description}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TextColumn("{task.fields[rate]}"),
            rich.progress.TimeRemainingColumn(),
            rich.progress.TextColumn("{task.fields[note]}"),
            console=console,
        ) as bars:
            bar = bars.add_task(description, total=total, note="", rate="")

            def update(done: int, note: str = "") -> None:
                rate = done / max(time.monotonic() - started, 1e-9)
                bars.update(bar, completed=done, note=note, rate=f"{rate:.3g} {unit}/s")

            yield update
        return

    last, told = started, -1

    def line(done: int, note: str = "") -> None:
        nonlocal last, told
        now = time.monotonic()
        if done == told or (done < total and now - last < _SECONDS_BETWEEN_LINES):
            return
        last, told = now, done
        elapsed = max(now - started, 1e-9)
        left = f"{elapsed / done * (total - done):.0f} s left" if 0 < done < total else f"{elapsed:.1f} s"
        print(
            f"{description}: {done}/{total} {unit}, {done / elapsed:.3g} {unit}/s, {left} {note}".rstrip(), flush=True
        )

    yield line


def environment() -> dict[str, Any]:
    """Versions and hardware, for a run's results."""
    import jax

    from rlae_jax import __version__

    devices = jax.devices()
    return {
        "rlae_jax": __version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "backend": devices[0].platform,
        "device": devices[0].device_kind,
        "devices": len(devices),
        "command": " ".join(Path(argument).name if i == 0 else argument for i, argument in enumerate(sys.argv)),
    }


def results_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The methods of a results.json, in order, with 95% intervals; every seed's score where there are several."""
    methods = results["methods"]
    prompts = " or ".join(str(n) for n in sorted({method["n"] for method in methods.values()}))
    table = rich.table.Table(title=f"{results['task']}, {results['split']} split, {prompts} prompts")
    table.add_column("method", overflow="fold")
    seeds = any(len(method["per_seed"]) > 1 for method in methods.values())
    for column in ("score", "95% interval", *(["each seed"] if seeds else []), "ms/token", "ms/answer"):
        table.add_column(column, justify="right", no_wrap=column != "each seed")
    best = max((m["score"] for m in methods.values() if not m.get("reference")), default=None)
    for name, method in methods.items():
        low, high = method["ci95"]
        reference = method.get("reference", False)
        table.add_row(
            f"{name} (reference)" if reference else name,
            f"{method['score']:.3f}",
            f"{low:.3f} to {high:.3f}",
            *([" ".join(f"{score:.3f}" for score in method["per_seed"])] if seeds else []),
            f"{method['ms_per_token']:.3f}",
            f"{method['ms_per_answer']:.3f}",
            style="dim" if reference else "bold" if method["score"] == best else None,
        )
    return table


def differences_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The differences of a results.json, with p-values corrected for their number (Holm)."""
    table = rich.table.Table(title="differences on the same prompts; p corrected for all rows (Holm)")
    table.add_column("a")
    table.add_column("b")
    for column in ("a - b", "95% interval", "p", "p (Holm)"):
        table.add_column(column, justify="right")
    for row in results["differences"]:
        low, high = row["ci95"]
        table.add_row(
            *(row["a"], row["b"], f"{row['difference']:+.3f}", f"{low:+.3f} to {high:+.3f}"),
            *(f"{row['p']:.2g}", f"{row['p_holm']:.2g}"),
            style="bold" if row["p_holm"] < 0.05 else None,
        )
    return table


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table in Markdown whose first columns, so many, are aligned on the left."""
    sides = [":--" if i < left else "--:" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, sides, *rows))


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

    partial = path.with_name(f".{path.name}.partial.png")
    figure.savefig(partial)
    pyplot.close(figure)
    partial.replace(path)


def learning_curve(
    path: Path, runs: Mapping[str, Sequence[Mapping[str, float]]], references: Mapping[str, float], title: str
) -> None:
    """Dev score over iterations, one line per run, the training reward faint behind it.

    Args:
      runs: name -> rows of its metrics.jsonl.
      references: scores of methods that do not learn, drawn as dotted lines.
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
    axis.set(xlabel="PPO iteration", ylabel="mean reward", ylim=(0, 1.02), title=title)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    axis.grid(alpha=0.3)
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
    axis.set(xlabel="mean reward, with 95% interval", ylim=(len(rows) - 0.5, -0.5))
    axis.set_title(f"{results['task']}, {results['split']} split", loc="left")
    axis.grid(axis="x", alpha=0.3)
    _save(figure, path)


def transfer_map(path: Path, matrix: Mapping[str, Any], title: str) -> None:
    """A transfer matrix with its numbers: agents trained on the row, tested on the column.

    Args:
      matrix: what `evaluate.transfer_matrix` returns.
    """
    rows, columns = matrix["rows"], matrix["columns"]
    figure, axes = _figure(2.5 + 0.9 * len(columns), 1.8 + 0.55 * len(rows))
    axis = axes[0][0]
    image = axis.imshow(matrix["scores"], cmap="viridis", vmin=0, vmax=1, aspect="auto")
    for r, scores in enumerate(matrix["scores"]):
        for c, score in enumerate(scores):
            axis.text(
                *(c, r, f"{score:.2f}"),
                ha="center",
                va="center",
                color="black" if score > 0.6 else "white",
                fontweight="bold" if rows[r] == columns[c] else "normal",
            )
    axis.set_xticks(range(len(columns)), columns, rotation=20)
    axis.set_yticks(range(len(rows)), rows)
    axis.set(xlabel="tested on", ylabel="trained on", title=title)
    figure.colorbar(image, ax=axis, label="mean reward")
    _save(figure, path)
