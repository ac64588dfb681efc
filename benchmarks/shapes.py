"""A process that is asked for ever other shapes: do its memory and its mappings stay bounded, and its answers the same?

In: a small random model. Out: programs, mappings and resident memory over 2,000 calls of `generate` in 1,000 shapes, of
which each is compiled; how many answers changed when a shape came again.

    python -m benchmarks.shapes [--quick] [--json PATH]

Every other call asks for a shape that was there before, most for one of the last ones, some for one whose program has
gone and is compiled again. Linux only, whose limit of mappings (vm.max_map_count) this is about.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from rlae_jax import compilation
from rlae_jax.models import LM, ModelConfig
from rlae_jax.models.transformer import init_params

# Rows, tokens of the prompts, tokens of the answers: each a program.
ROWS, PROMPTS, ANSWERS = (1, 2, 3, 4, 6), (16, 24, 32, 48, 64), tuple(range(1, 41))
RECENT = 32  # shapes of which one comes again
OLD = 20  # one of so many calls is for any shape that there was
LOOKS = 40  # at mappings and memory
QUICK_SHAPES, QUICK_PROGRAMS = 40, 12

Shape = tuple[int, int, int]


def shapes(count: int) -> list[Shape]:
    """Different ones in a random order."""
    every = list(itertools.product(ROWS, PROMPTS, ANSWERS))
    return [every[i] for i in np.random.default_rng(0).permutation(len(every))[:count]]


def calls(asked: list[Shape]) -> Iterator[Shape]:
    """Each shape, and after it one that there was."""
    rng = np.random.default_rng(1)
    for i, shape in enumerate(asked):
        yield shape
        first = 0 if i % OLD == OLD - 1 else max(0, i - RECENT)
        yield asked[rng.integers(first, i + 1)]


def resident_bytes() -> int:
    """The memory that this process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(ensemble: rj.Ensemble, asked: list[Shape]) -> dict[str, Any]:
    """The figures of two calls for each shape."""
    known: dict[Shape, Any] = {}
    looks: list[tuple[int, int, int, float]] = []
    changed, start = 0, time.perf_counter()
    for i, (rows, prompt, answer) in enumerate(calls(asked), 1):
        ids = np.random.default_rng(prompt).integers(0, 23, (rows, prompt))
        written = ensemble.generate(prompt_ids=ids, max_new_tokens=answer).tokens
        changed += known.setdefault((rows, prompt, answer), written) != written
        if i % max(1, 2 * len(asked) // LOOKS) == 0:
            mapped, resident = compilation.mappings(), resident_bytes() / 2**20
            looks.append((i, compilation.count(), mapped, resident))
            print(f"call {i}: {looks[-1][1]} programs, {mapped} mappings, {resident:.0f} MiB", flush=True)
    half = looks[len(looks) // 2 :]
    return {
        "calls": i,
        "shapes": len(asked),
        "seconds": time.perf_counter() - start,
        "programs": max(programs for _, programs, _, _ in looks),
        "mappings": max(mapped for _, _, mapped, _ in looks),
        "resident_mib": max(resident for *_, resident in looks),
        "growth": half[-1][3] / half[0][3] - 1,  # of the memory in the second half
        "changed": changed,
        "looks": looks,
    }


def tiny() -> rj.Ensemble:
    """One small model."""
    config = ModelConfig(vocab=23, width=16, layers=1, heads=4, kv_heads=2, head_width=4, ffn_width=24, context=512)
    return rj.Ensemble([LM(config, init_params(config, jax.random.key(0)))])


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    most = compilation.most_mappings()
    if most is None:
        sys.exit("error: this system does not tell how many memory mappings a process may have")
    if options.quick:
        compilation.MOST_PROGRAMS = QUICK_PROGRAMS
    environment = common.environment()
    found = soak(tiny(), shapes(QUICK_SHAPES if options.quick else 1000))
    shown = ("calls", "shapes", "seconds", "programs", "mappings", "resident_mib", "growth", "changed")
    common.print_table("ever other shapes", ("", "value"), [(name, f"{found[name]:.5g}") for name in shown])
    checks = [
        common.check("soak_mappings", found["mappings"], "<=", most),
        common.check("soak_programs", found["programs"], "<=", compilation.MOST_PROGRAMS),
        common.check("soak_resident_growth", found["growth"], "<=", 0.05),
        common.check("soak_changed", found["changed"], "<=", 0),
    ]
    common.finish([found], checks, environment, options.json_path)


if __name__ == "__main__":
    main()
