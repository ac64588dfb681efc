"""What people look at: progress, tables, the environment of a run, and pictures."""

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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

    last = started

    def line(done: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        if done < total and now - last < _SECONDS_BETWEEN_LINES:
            return
        last = now
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
    """The methods of a results.json, in order, with 95% intervals."""
    table = rich.table.Table(title=f"{results['task']}, {results['split']} split")
    table.add_column("method")
    for column in ("score", "95% interval", "n", "ms/token"):
        table.add_column(column, justify="right")
    best = max(method["score"] for method in results["methods"].values())
    for name, method in results["methods"].items():
        low, high = method["ci95"]
        table.add_row(
            name,
            f"{method['score']:.3f}",
            f"{low:.3f} to {high:.3f}",
            str(method["n"]),
            f"{method['ms_per_token']:.3f}",
            style="bold" if method["score"] == best else None,
        )
    return table


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
