"""What studies of a paper's claims share: pieces of work in a process per core, verdicts, and the table of claims.

In: phases of pieces, each of which leaves a file behind and is done if that exists. Out: the same, done; after an
interruption the same call goes on.
"""

import concurrent.futures
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

import rlae_jax as rj
from benchmarks import common
from rlae_jax import files, report
from rlae_jax.tasks import Examples, Task

_MOST_MAPPINGS = 20_000  # every compiled program takes some of the 65,530 that a process may have
CLAIM_COLUMNS = ("claim", "measurement", "value (95% interval)", "verdict")
# A title, what to call, and with which arguments.
Phase = tuple[str, Callable[..., None], list[tuple[Any, ...]]]


def _start_worker(cores: "Queue[int]", log: Path) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores.get()})
    use_compilation_cache(log.parent)
    to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(to, 1)


def use_compilation_cache(out: Path) -> None:
    """Seeds and processes share their programs."""
    jax.config.update("jax_compilation_cache_dir", str(out / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _work(piece: Callable[..., None], *arguments: Any) -> float:
    began = time.perf_counter()
    piece(*arguments)
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_text(encoding="utf-8").count("\n") > _MOST_MAPPINGS:
        jax.clear_caches()
    return time.perf_counter() - began


def run_phases(log: Path, phases: Sequence[Phase]) -> None:
    """Everything that takes long, in as many processes as there are cores; a phase begins when the last is done."""
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(common.cores()))
    context = multiprocessing.get_context("spawn")
    cores: Queue[int] = context.Queue()
    for core in usable:
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(len(usable), context, _start_worker, (cores, log)) as pool:
        for title, piece, pieces in phases:
            with report.progress(title, len(pieces), "pieces") as update:
                pending = {pool.submit(_work, piece, *arguments): arguments for arguments in pieces}
                for done, future in enumerate(concurrent.futures.as_completed(pending), start=1):
                    named = ", ".join(str(x) for x in pending[future] if isinstance(x, str | int))
                    update(done, f"({named}: {future.result():.0f} s)")


def sign_verdict(interval: Sequence[float]) -> str:
    """The verdict on "this is above 0"."""
    return "holds" if interval[0] > 0 else "fails" if interval[1] <= 0 else "undecided"


def all_of(verdicts: Sequence[str]) -> str:
    """The verdict on several claims at once."""
    return "holds" if set(verdicts) == {"holds"} else "fails" if "fails" in verdicts else "undecided"


def claim(
    name: str, measurement: str, value: float | None, ci95: Sequence[float] | None, verdict: str, sign: str = "+"
) -> dict[str, Any]:
    """A row of the table of claims. A difference is shown with its sign."""
    shown = "" if value is None else f"{value:{sign}.3f}"
    if ci95 is not None and (ci95[0] != value or ci95[1] != value):
        shown += f" ({ci95[0]:{sign}.3f} to {ci95[1]:{sign}.3f})"
    return {
        "claim": name,
        "measurement": measurement,
        "value": value,
        "ci95": ci95,
        "verdict": verdict,
        "shown": shown,
    }


def claim_cells(claims: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of the table of claims."""
    return [(c["claim"], c["measurement"], c["shown"], c["verdict"]) for c in claims]


def take_directory(out: Path, wanted: Mapping[str, Any]) -> None:
    """Exits if the directory holds a study with another plan."""
    path = out / "plan.json"
    if path.is_file() and files.read_json(path) != wanted:
        sys.exit(f"error: {out} holds a study with other settings; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(path, wanted)


def check_cells(checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a table of checks."""
    return [
        (c["name"], f"{c['value']:.3g}", f"{c['op']} {c['required']:g}", "ok" if c["ok"] else "FAILED") for c in checks
    ]


def oracle_of_spans(ensemble: rj.Ensemble, task: Task, examples: Examples, weights: Float[np.ndarray, "W K"]) -> float:
    """The share of prompts that some choice among these weights, span by span, answers exactly: the room that there is
    for weights that change with the text. For members with one token per character.

    An answer is right only if every span is, behind right ones: so that spans can be looked at one by one.
    """
    length = task.span_length
    right = np.ones(len(examples), bool)
    for start in range(0, task.max_new_tokens, length):
        some = np.zeros(len(examples), bool)
        asked = [p + str(r)[:start] for p, r in zip(examples.prompts, examples.references, strict=True)]
        wanted = [str(r)[start : start + length] for r in examples.references]
        for point in weights:
            out = ensemble.generate(asked, point, span_length=length, max_new_tokens=length)
            same = [text == part for text, part in zip(out.texts, wanted, strict=True)]
            ends = [
                len(part) == length or reason == "stop" for part, reason in zip(wanted, out.finish_reasons, strict=True)
            ]
            some |= np.array(same) & np.array(ends)
        # Behind its own end an answer has no spans.
        right &= some | np.array([start > len(str(r)) for r in examples.references])
    return float(right.mean())
