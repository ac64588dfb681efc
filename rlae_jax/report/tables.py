"""Tables of results.json files: for the terminal, and in Markdown."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.table


def results_table(results: Mapping[str, Any]) -> rich.table.Table:
    """The methods of a results.json, in order, with 95% intervals; every seed's score where there are several."""
    methods = results["methods"]
    prompts = " or ".join(str(n) for n in sorted({method["n"] for method in methods.values()}))
    unit = results.get("unit")
    of = f"{prompts} texts, {unit}, less is better" if unit else f"{prompts} prompts"
    table = rich.table.Table(title=f"{results['task']}, {results['split']} split, {of}")
    table.add_column("method", overflow="fold")
    seeds = any(len(method["per_seed"]) > 1 for method in methods.values())
    for column in ("score", "95% interval", *(["each seed"] if seeds else []), "ms/token", "ms/answer"):
        table.add_column(column, justify="right", no_wrap=column != "each seed")
    best = (min if unit else max)((m["score"] for m in methods.values() if not m.get("reference")), default=None)
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


def objectives_table(methods: Mapping[str, Any], objectives: Sequence[str], title: str) -> rich.table.Table:
    """Methods with the score of each objective, of a results.json of EMORL; means with half of their 95% interval."""
    table = rich.table.Table(title=title)
    table.add_column("method", overflow="fold", min_width=8)
    table.add_column("mean", justify="right", no_wrap=True)
    for objective in objectives:
        table.add_column(objective, justify="right", overflow="fold", min_width=5)
    table.add_column("tokens", justify="right", no_wrap=True)
    best = max((method["score"] for method in methods.values()), default=None)
    for name, method in methods.items():
        low, high = method["ci95"]
        table.add_row(
            *(name, f"{method['score']:.3f} ±{(high - low) / 2:.3f}"),
            *(f"{method['scores'][objective]:.3f}" for objective in objectives),
            f"{method['tokens']:.1f}",
            style="bold" if method["score"] == best else None,
        )
    return table


def adapters_table(trainings: Mapping[str, Mapping[str, Any]]) -> rich.table.Table:
    """What every adapter of a run took.

    Args:
      trainings: adapter -> its training.json.
    """
    table = rich.table.Table()
    for i, column in enumerate(("adapter", "dev", "steps", "data points", "converged", "seconds of it")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name, training in trainings.items():
        table.add_row(
            *(name, f"{training['best_dev']:.3f}", str(training["steps"]), f"{training['data_points']:,}"),
            *("yes" if training["converged"] else "no", f"{training['seconds_shared']:.0f}"),
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
