"""What this program makes of an accelerator that one has for a few minutes, against torch on the same device.

    python -m benchmarks.accelerator [--part PART ...] [--minutes 5] [--json PATH] [--again] [--quick]
    python -m benchmarks.accelerator --page docs/accelerator.md [--json PATH]

In: nothing but the package; members are random, in bfloat16, and made on the device. Out: a row per case, written as
soon as it is measured, so that what is there survives whatever ends the run. The same command goes on with the cases
that are missing; none is begun for which the minutes that are left do not suffice. On a CPU shapes are tiny and figures
mean nothing: what is shown then is that every part runs.

- `copy`: bytes that a copy on the device reads and writes per second, the limit of what follows.
- `decode`: milliseconds per step of two members, prefill left out, as a share of that limit (weights, and keys and
  values of the tokens so far), against the transformers loop and the best torch peer (`peers.py`).
- `train`: an iteration of PPO, and which share of it is spent outside decoding.
- `adapters`: a batch with another adapter in each row, against the base alone.
- `search`: a level of EMORL's search, 27 points.
- `mixed`: two tokenizers against one, writing the same answers (tokenizers and texts from RLAE_JAX_SHARED).
- `tests`, only where it is named: the tests that are marked `device`.

Kernels per step are counted in the compiled loop (fusions, calls of libraries, copies and single instructions). A
program's memory is the compiler's account of it, the peak the most that the process has had in use so far.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import jax

from benchmarks import common, device
from benchmarks.accelerator_cases import (
    FULL,
    QUICK_ROUNDS,
    ROUNDS,
    SMALL_SHAPES,
    Bench,
    Decode,
    Shapes,
    Skipped,
    Train,
    measure_adapters,
    measure_copy,
    measure_decode,
    measure_mixed,
    measure_search,
    measure_tests,
    measure_train,
    told,
)
from benchmarks.accelerator_tables import measured, page, sentences, tables
from rlae_jax import files, records
from rlae_jax.errors import InputError

# Name of a check, case, what of it, and what is required.
REQUIRED = (
    ("gpu_1B_b1", "decode_1B_b1", "fraction", ">=", 0.70),
    ("gpu_1B_b2", "decode_1B_b2", "fraction", ">=", 0.70),
    ("gpu_7B_b1", "decode_7B_b1", "fraction", ">=", 0.82),
    ("gpu_7B_b8", "decode_7B_b8", "fraction", ">=", 0.85),
    ("loop_1B_b1", "decode_1B_b1", "ratio_loop", ">=", 10.0),
    ("outside_1B", "train_1B", "outside", "<=", 0.05),
)
AHEAD = 1.0  # of the best torch peer, in every row


@dataclasses.dataclass(frozen=True)
class Case:
    """A row to be."""

    name: str
    part: str
    seconds: float  # that it takes on an H100, compilation included
    measure: Callable[["Bench"], dict[str, Any]]


def all_cases(shapes: Shapes) -> list[Case]:
    """In the order of what one wants to know first."""

    def case(one: Decode | Train) -> Case:
        if isinstance(one, Train):
            return Case(f"train_{one.model}", "train", one.expected_s, functools.partial(measure_train, case=one))
        return Case(one.name, "decode", one.expected_s, functools.partial(measure_decode, case=one))

    of_full = float(shapes is FULL)
    return [
        Case("copy", "copy", 10 * of_full, measure_copy),
        *map(case, shapes.first),
        Case("adapters", "adapters", 35 * of_full, measure_adapters),
        Case("search", "search", 30 * of_full, measure_search),
        *map(case, shapes.then),
        Case("mixed", "mixed", 60 * of_full, measure_mixed),
        Case("tests", "tests", 240 * of_full, measure_tests),
    ]


PARTS = ("copy", "decode", "train", "adapters", "search", "mixed", "tests")
QUICK_CASES = ("copy", "decode_1B_b1", "decode_1B_b8", "train_0.3M")


def run_cases(cases: Sequence[Case], results: "Results", bench: Bench, *, minutes: float, began: float) -> None:
    """Measures one case after another, and keeps each row at once."""
    for case in cases:
        left = 60 * minutes - (time.monotonic() - began)
        if left < case.seconds:
            results.skip(case, f"{case.seconds:.0f} s are not left of {minutes:g} minutes")
            continue
        print(f"{case.name} ...", flush=True)
        start = time.perf_counter()
        try:
            row = case.measure(bench)
            row["peak_gb"] = (device.peak_bytes() or 0) / 1e9 or None
        except Skipped as why:
            row = {"skipped": str(why)}
        except InputError as error:
            row = {"error": str(error)}
        except Exception as error:  # what does not fit or compile must not take the other cases with it
            row = {"error": told(error)}
        results.add(case, {**row, "case_s": time.perf_counter() - start})


class KeptRow(TypedDict):
    """What every row of the file has."""

    case: str


class KeptEnvironment(TypedDict):
    """What of where rows were measured is compared."""

    devices: Any
    shapes: str


class Kept(TypedDict):
    """What of the file is used."""

    rows: list[KeptRow]
    environment: KeptEnvironment


def read_kept(path: Path) -> dict[str, Any]:
    """The file's content.

    Raises:
      InputError: it cannot be read, or is something else.
    """
    kept = files.read_json(path)
    records.check(kept, Kept, path)
    return kept


class Results:
    """The rows, their checks and where they were measured, and the file that has them."""

    def __init__(self, path: Path, environment: Mapping[str, Any]):
        self.path, self.environment = path, dict(environment)
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            kept = read_kept(path)
            self.rows = {row["case"]: row for row in kept["rows"]}
            for what in ("devices", "shapes"):
                if kept["environment"][what] != self.environment[what]:
                    raise InputError(
                        f"{path} has figures of {kept['environment'][what]}, this is {self.environment[what]}: name "
                        "another file with --json"
                    )

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if case.name not in self.rows or not measured(self.rows[case.name])]

    def add(self, case: Case, row: Mapping[str, Any]) -> None:
        """Keeps a row and writes the file anew."""
        versions = {name: v for name, v in self.environment["versions"].items() if name in ("rlae-jax", "jax", "torch")}
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.rows[case.name] = {"case": case.name, "part": case.part, **row, "time": when, "versions": versions}
        content = {"rows": list(self.rows.values()), "checks": self.checks(), "environment": self.environment}
        files.write_json(self.path, content)

    def skip(self, case: Case, why: str) -> None:
        """Says why a row is missing; one that is there from an earlier run stays."""
        if case in self.missing([case]):
            self.add(case, {"skipped": why})

    def checks(self) -> list[dict[str, Any]]:
        """Of what is measured, on an accelerator."""
        if self.environment["shapes"] != FULL.name:
            return []
        good = {name: row for name, row in self.rows.items() if measured(row)}
        checks = [
            common.check(name, good[case][what], op, required)
            for name, case, what, op, required in REQUIRED
            if case in good and good[case].get(what) is not None
        ]
        ahead = [(name, row["ratio_best"]) for name, row in good.items() if "ratio_best" in row]
        checks += [common.check(f"best_{name.removeprefix('decode_')}", ratio, ">=", AHEAD) for name, ratio in ahead]
        if "tests" in good:
            checks.append(common.check("tests_exit_status", good["tests"]["exit_status"], "<=", 0))
        return checks


# --- the command ---


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser((__doc__ or "").splitlines()[0])
    parser.set_defaults(json=Path("runs/accelerator.json"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:-1], help="all but tests by default")
    parser.add_argument("--minutes", type=float, default=5.0, help="no case begins that would end later (5)")
    parser.add_argument("--again", action="store_true", help="measure what is in the file, too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as on a CPU")
    parser.add_argument("--page", type=Path, metavar="PATH", help="write the file's figures there, and measure nothing")
    parsed = parser.parse_args(arguments)
    common.require_writable(parser, parsed.json)
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = read_arguments(arguments)
    if options.page is not None:
        content = read_kept(options.json) if options.json.is_file() else {"rows": []}
        files.write_text(options.page, page(content, how=(__doc__ or "").split("\n\n", 3)[3].strip()))
        return
    # Torch needs some of the memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shapes = SMALL_SHAPES if options.tiny or jax.default_backend() == "cpu" else FULL
    try:
        results = Results(options.json, {**common.environment(), "shapes": shapes.name})
    except InputError as error:
        sys.exit(f"error: {error}")
    bench = Bench(shapes, QUICK_ROUNDS if options.quick or shapes is SMALL_SHAPES else ROUNDS)
    if measured(kept := results.rows.get("copy", {"skipped": ""})):
        bench.bandwidth = kept["bytes_per_second"]
    # The copy is the limit that the others are compared with.
    parts = {*options.part, *(() if options.part == ["tests"] else ("copy",))}
    wanted = [case for case in all_cases(shapes) if case.part in parts]
    if options.quick:
        wanted = [case for case in wanted if case.name in QUICK_CASES or shapes is SMALL_SHAPES]
    with contextlib.suppress(KeyboardInterrupt):
        run_cases(
            wanted if options.again else results.missing(wanted), results, bench, minutes=options.minutes, began=began
        )
    rows = list(results.rows.values())
    for title, columns, cells in tables(rows):
        common.print_table(title, columns, cells)
    print(*sentences(rows), f"{(time.monotonic() - began) / 60:.1f} minutes", sep="\n")
    common.finish(rows, results.checks(), results.environment, options.json)


if __name__ == "__main__":
    main()
