"""What every benchmark shares: its arguments, alternating timing, checks, the environment record, table and JSON.

In: callables to time, and figures with the bar that each has to reach. Out: a table on the terminal and, with
`--json PATH`, {"rows": [...], "checks": [...], "environment": {...}}. A failed check is a finding: it is shown, written
and leaves the exit status at 0, so that a benchmark never hides a result by stopping at it.
"""

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from rlae_jax import files

VERSIONS_OF = ("rlae-jax", "jax", "jaxlib", "flax", "numpy", "transformers", "torch")
# A thread pool that has just finished spins for some milliseconds before it sleeps. The pause keeps one side's idle
# threads from taking cores away from the side that is timed next.
SETTLE_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    quick: bool
    json_path: Path | None
    out: Path | None = None


def parse_args(description: str, arguments: Sequence[str] | None = None, out: Path | None = None) -> Options:
    """Reads `--quick` and `--json PATH`. A path that cannot be written is told before any long work starts.

    Args:
      out: the default of `--out DIR`, of a benchmark that keeps what it has done.
    """
    parser = make_parser(description)
    if out is not None:
        parser.add_argument("--out", type=Path, metavar="DIR", default=out, help=f"where results are kept ({out})")
    parsed = parser.parse_args(arguments)
    require_writable(parser, parsed.json)
    return Options(parsed.quick, parsed.json, getattr(parsed, "out", None))


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark, for one that has more."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few repeats and small cases only")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write rows, checks and environment here")
    return parser


def require_writable(parser: argparse.ArgumentParser, json_path: Path | None) -> None:
    """Leaves with status 2 where `--json` cannot be written; makes its directory."""
    if json_path is None:
        return
    try:
        json_path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--json {json_path}: cannot make its directory ({error})")
    if json_path.is_dir() or not os.access(json_path.parent, os.W_OK):
        parser.error(f"--json {json_path}: not a file that can be written")


def require(*modules: str) -> None:
    """Exits with status 1 and one line unless every module (a peer's library) is installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"error: this benchmark needs {', '.join(missing)}; install it with: pip install 'rlae-jax[bench]'")


def require_shared(folder: str) -> Path:
    """A folder of the shared data, which RLAE_JAX_SHARED names; exits with status 1 and one line where it is not."""
    path = Path(os.environ.get("RLAE_JAX_SHARED", "../shared")) / folder
    if not path.is_dir():
        sys.exit(f"error: {path} is not there; RLAE_JAX_SHARED names the directory of shared data")
    return path


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call, one entry per round, in the order of the rounds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.quantile(self.seconds, [0.25, 0.75])
        return float(low), float(high)


def seconds_of(call: Callable[[], Any], calls: int = 1) -> float:
    """Wall time per call. The callable returns only when its result is on the host."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def time_alternating(
    callables: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    sample_seconds: float = 0.1,
    budget_seconds: float = float("inf"),
    least_rounds: int = 3,
) -> dict[str, Timing]:
    """Times every callable once per round, in an order that turns with the round. Call each once before: it compiles.

    A sample is as many calls as fill about `sample_seconds` (one in the first round, which finds out how many), so that
    a call of milliseconds is not timed against the clock's and the scheduler's noise. Entry i of all timings belongs to
    the same round: ratios are taken pairwise, so that what slows the whole machine down for a while cancels. After
    `least_rounds`, a round begins only within the budget: on a busy machine the run gets fewer rounds, not longer.
    """
    names = list(callables)
    calls = dict.fromkeys(names, 1)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for i in range(rounds):
        if i >= least_rounds and time.perf_counter() - start > budget_seconds:
            break
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(SETTLE_SECONDS)
            took = seconds_of(callables[name], calls[name])
            seconds[name].append(took)
            calls[name] = calls[name] if i else max(1, round(sample_seconds / took))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


class OtherLoad:
    """How busy other processes keep the cores between construction and `share()`.

    It matters for fairness, not only for noise: torch's threads wait for each other after every operator, and one that
    has lost its core holds up all the others, so that a busy machine slows torch down several times more than XLA.
    """

    def __init__(self) -> None:
        self._start = (time.perf_counter(), _busy_seconds(), time.process_time())

    def share(self) -> float | None:
        """The fraction of all cores that others used; None where the system does not tell."""
        wall, busy, own = self._start
        now = _busy_seconds()
        if busy is None or now is None:
            return None
        used = (now - busy) - (time.process_time() - own)
        return max(0.0, used / ((time.perf_counter() - wall) * (os.cpu_count() or 1)))


def _busy_seconds() -> float | None:
    """Processor time that the whole machine has spent since it started, waiting excluded (Linux)."""
    try:
        fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:9]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields)
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def pairwise_ratio(slow: Timing, fast: Timing) -> float:
    """The median over rounds of slow / fast: how many times faster `fast` is."""
    return float(np.median(np.asarray(slow.seconds) / np.asarray(fast.seconds)))


def step_seconds(long: Timing, short: Timing, steps: int) -> Timing:
    """Seconds per step of each round, of calls of `steps` steps and of one: what begins and ends a call cancels."""
    return Timing(tuple((a - b) / (steps - 1) for a, b in zip(long.seconds, short.seconds, strict=True)))


def check(name: str, value: float, op: str, required: float) -> dict[str, Any]:
    """One record of the `checks` list; `op` is ">=" or "<="."""
    if op not in (">=", "<="):
        raise ValueError(f"op must be '>=' or '<=', not {op!r}")
    ok = value >= required if op == ">=" else value <= required
    return {"name": name, "value": float(value), "op": op, "required": required, "ok": bool(ok)}


def environment() -> dict[str, Any]:
    """Where the figures are measured: versions, processor, cores, devices, and the load before the run adds its own."""
    import jax

    versions: dict[str, str | None] = {}
    for name in VERSIONS_OF:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": cores(),
        "load_average_before": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "devices": [f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table whose first column is text and whose others are figures."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    # Piped output has no width of its own, and a table cut at 80 columns would lose figures.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    console.print(table)


def finish(
    rows: list[dict[str, Any]], checks: list[dict[str, Any]], environment: dict[str, Any], json_path: Path | None
) -> None:
    """Prints the checks and writes everything to `json_path`."""
    cells = [
        (c["name"], f"{c['value']:.3g}", f"{c['op']} {c['required']:g}", "ok" if c["ok"] else "FAILED") for c in checks
    ]
    print_table("Checks", ("check", "value", "required", "result"), cells)
    if json_path is not None:
        files.write_json(json_path, {"rows": rows, "checks": checks, "environment": environment})
