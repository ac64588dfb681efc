"""Tables and the page of `accelerator.py`.

In: its rows, and what its file has. Out: titles, columns and cells, for the terminal and in Markdown.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study import check_cells
from rlae_jax.report.tables import markdown_table

NO_TORCH = "no torch"


def measured(row: Mapping[str, Any]) -> bool:
    """Whether a row has figures, rather than why there are none."""
    return not row.keys() & {"skipped", "error"}


DECODE_COLUMNS = (
    *("case", "ms/step (quartiles)", "of a copy's speed", "kernels/step", "compiled in, s", "program, GB", "peak, GB"),
    *("loop, ms", "times loop", "best torch, ms", "times best", "variant"),
)
OTHER_COLUMNS = ("case", "ms (quartiles)", "what", "kernels/step", "compiled in, s", "peak, GB")


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def with_quartiles(row: Mapping[str, Any], name: str = "ms") -> str:
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.3g} ({low:.3g} to {high:.3g})"


def decode_cells(row: Mapping[str, Any]) -> list[str]:
    peers = row["peers"]
    variant = peers["chosen"] if isinstance(peers, dict) else peers if peers == NO_TORCH else "failed"
    return [
        row["case"].removeprefix("decode_"),
        with_quartiles(row),
        number(row["fraction"], ".2f"),
        str(row["kernels_step"]),
        number(row["compile_s"], ".1f"),
        number(row["program_gb"], ".2f"),
        number(row["peak_gb"], ".1f"),
        *(number(row.get(name), ".3g") for name in ("loop_ms", "ratio_loop", "best_ms", "ratio_best")),
        variant,
    ]


def other_cells(row: Mapping[str, Any]) -> list[str]:
    step = f"a step; {number(row.get('fraction'), '.2f') or '?'} of a copy's speed"
    what = {
        "train": lambda: (
            f"an iteration of {row['prompts']} prompts; {row['spans_per_second']:,.0f} spans/s, "
            f"{row['outside']:.1%} outside decoding"
        ),
        "adapters": lambda: f"{step}; {row['ratio_base']:.2f} times the base alone ({row['base_ms']:.3g} ms)",
        "search": lambda: (
            f"{step}; a level takes {with_quartiles(row, 'level_ms')} ms, {row['ms_point']:.3g} ms a point "
            f"({row['points']} points, {row['prompts']} prompts, {row['adapters']} adapters)"
        ),
        "mixed": lambda: (
            f"{step}; {row['ratio_same']:.2f} times one tokenizer ({row['same_ms']:.3g} ms, "
            f"{row['kernels_same']} kernels)"
        ),
    }[row["part"]]()
    name = row["case"] if row["case"] == row["part"] else row["case"].replace("_", " ")
    kernels = str(row.get("kernels_step", ""))
    return [name, with_quartiles(row), what, kernels, number(row["compile_s"], ".1f"), number(row["peak_gb"], ".1f")]


def tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, columns, cells) of what is measured."""
    good = [row for row in rows if measured(row)]
    decode = [decode_cells(row) for row in good if row["part"] == "decode"]
    other = [other_cells(row) for row in good if row["part"] in ("train", "adapters", "search", "mixed")]
    parts: list[tuple[str, Sequence[str], list[list[str]]]] = [
        ("A step of two members", DECODE_COLUMNS, decode),
        ("Training, adapters, search, tokenizers", OTHER_COLUMNS, other),
    ]
    return [part for part in parts if part[2]]


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has no place in a table: the copy, the tests, and why something is missing."""
    said = []
    for row in rows:
        if not measured(row):
            said.append(f"{row['case']}: {row.get('skipped') or 'FAILED, ' + row['error']}")
        elif row["part"] == "copy":
            said.append(f"A copy on the device moves {row['bytes_per_second'] / 1e12:.3g} TB/s (read and written).")
        elif row["part"] == "tests":
            counts = ", ".join(f"{n} {word}" for word, n in row["counts"].items())
            said.append(f"Tests on the device: {counts} in {row['tests_s']:.0f} s. {' '.join(row['failed'])}".strip())
        elif row["part"] == "decode" and isinstance(row["peers"], dict):
            said += [f"{row['case']}: no {name} in torch: {why}" for name, why in row["peers"]["failed"].items()]
        elif row["part"] == "decode" and row["peers"] != NO_TORCH:
            said.append(f"{row['case']}: no peers: {row['peers']}")
    return said


def page(content: Mapping[str, Any], how: str) -> str:
    """The results in Markdown; without any, how to get them.

    Args:
      how: what is measured.
    """
    parts = [
        "# On an accelerator, measured",
        "Made by `python -m benchmarks.accelerator --page docs/accelerator.md --json FILE`.",
    ]
    rows = content["rows"]
    if not rows:
        commands = "\n".join(
            [
                "    pip install 'rlae-jax[cuda]'  # or rlae-jax[tpu]; torch with CUDA for the peers",
                "    python -m benchmarks.accelerator --json runs/accelerator.json",
                "    python -m benchmarks.accelerator --part tests --json runs/accelerator.json",
                "    python -m benchmarks.accelerator --page docs/accelerator.md --json runs/accelerator.json",
            ]
        )
        return "\n\n".join([*parts, "Nothing is measured yet. On a machine with a device:", commands]) + "\n"
    environment = content["environment"]
    days = sorted({row["time"][:10] for row in rows})
    versions = sorted({f"{name} {v}" for row in rows for name, v in row["versions"].items() if v})
    when = " to ".join(days[:: len(days) - 1 or 1])
    parts.append(f"{', '.join(environment['devices'])}; {when}; {', '.join(versions)}.")
    if environment["shapes"] != "full":
        parts.append("Shapes are tiny: the figures show only that everything runs.")
    parts += sentences(rows)
    for title, columns, cells in tables(rows):
        parts += [f"## {title}", markdown_table(columns, cells)]
    if content["checks"]:
        parts += ["## Checks", markdown_table(("check", "value", "required", "result"), check_cells(content["checks"]))]
    parts += ["## What is measured", how]
    return "\n\n".join(parts) + "\n"
