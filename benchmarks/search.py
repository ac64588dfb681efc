"""What one level of EMORL's search for weights costs, against the published algorithm and against torch at its best.

    python -m benchmarks.search [--quick] [--json PATH]

In: nothing but the package; a random T5 of t5-small's shape and three random adapters of rank 8 on every linear layer
but the head, which all sides share. Out: seconds per point of a level, which is the 27 points of {0, 1/2, 1}^3, each of
which writes 64 tokens after each of 16 prompts, greedily and without an early end, so that all sides do equal work.
Peers are in `search_peers.py`. Before anything is timed all sides have to write the same tokens.

- `ours` and `best` are timed on whole levels, prompts included. Both decode the 19 directions that differ: a greedy
  text does not depend on the weights' size, and weights of zero write token 0 without any decoding.
- `reference` takes one point after another, all 27 alike, and is too slow to be timed whole. Three of its steps are
  timed, after the shortest, a middle and the longest text, and the others of a point are interpolated linearly.
"""

import dataclasses
import functools
import itertools
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.adapters import make_adapters
from benchmarks.common import Timing
from benchmarks.decode import QUIET
from rlae_jax.emorl.fused import Fused

if TYPE_CHECKING:
    from benchmarks import peers, search_peers

MEMBERS = 3
REQUIRED = {"reference": 30.0, "best": 1.5}
# Ties: of random T5s a choice in 500 depends on how float32 sums are rounded.
SAME_REQUIRED = 0.99
POINTS = np.array(list(itertools.product((0.0, 0.5, 1.0), repeat=MEMBERS)))


@dataclasses.dataclass(frozen=True)
class Case:
    """The models and what is written."""

    sizes: Mapping[str, int]  # fields of transformers' T5Config
    prompts: int
    prompt_tokens: tuple[int, int]  # shortest and longest
    new_tokens: int
    lengths: tuple[int, ...]  # of the text, after which the reference's steps are timed
    chunks: tuple[int, ...]  # what the best peer tries
    rounds: int
    budget: float  # seconds


T5_SMALL = {"vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}
FULL = Case(T5_SMALL, 16, (40, 128), 64, (1, 32, 64), (8, 16), 5, 240.0)
SMALL_SIZES = {"vocab_size": 4096, "d_model": 128, "d_kv": 16, "d_ff": 512, "num_layers": 3, "num_heads": 8}
QUICK = Case(SMALL_SIZES, 16, (40, 128), 16, (1, 8, 16), (8, 16), 5, 40.0)


def directions(points: np.ndarray) -> np.ndarray:
    """The points that differ greedily, scaled to a largest weight of 1; without the origin."""
    used = points[points.any(axis=1)]
    return np.unique(used / used.max(axis=1, keepdims=True), axis=0)


def same_share(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The share of equal tokens among those that both chose after the same text: a tie that rounding breaks differently
    counts once, and the different texts behind it do not count."""
    equal = int(np.cumprod(ours == theirs, axis=-1).sum())
    differ = int(np.any(ours != theirs, axis=-1).sum())
    return equal / (equal + differ)


def run_case(case: Case) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Verifies and times all sides. Returns their rows, and the checks."""
    from benchmarks import search_peers

    rng = np.random.default_rng(0)
    low, high = case.prompt_tokens
    lengths = rng.integers(low, high + 1, case.prompts)
    prompts = [rng.integers(1, case.sizes["vocab_size"], n).tolist() for n in lengths]
    points = directions(POINTS)
    with tempfile.TemporaryDirectory(prefix="rlae_jax-search-") as directory:
        base = Path(directory) / "base"
        search_peers.write_base(base, 0, **case.sizes)
        lm = rj.load(base)
        adapters = make_adapters(lm, MEMBERS)
        paths = [Path(directory) / adapter.name for adapter in adapters]
        for path, adapter in zip(paths, adapters, strict=True):
            lm.with_adapter(adapter).save(path)
        print("choosing the best peer's variant", flush=True)
        best = best_peer(paths, prompts, points, case)
        reference = search_peers.Reference(paths, prompts)
    fused = Fused(lm, adapters, mode="hidden")

    def ours() -> np.ndarray:
        answers = fused.prepare(prompts, max_new_tokens=case.new_tokens, ignore_eos=True)
        return np.asarray(answers.decode(points).tokens)

    print("comparing what all sides write", flush=True)
    tokens = ours()
    checks = same_tokens(tokens, best.generate(points, case.new_tokens), reference, points)
    if not all(check["ok"] for check in checks):
        common.finish([], checks, {}, None)
        sys.exit("error: the sides do not write the same tokens, so that their times cannot be compared")

    text = reference.begin(tokens[-1])
    callables: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "best": lambda: best.generate(points, case.new_tokens),
        **{f"after {n}": functools.partial(reference.choices, points[-1], text[:, :n]) for n in case.lengths},
    }
    others = common.OtherLoad()
    timings = common.time_alternating(callables, rounds=case.rounds, budget_seconds=case.budget)
    steps = {n: timings.pop(f"after {n}") for n in case.lengths}
    per_point = {name: Timing(tuple(s / len(POINTS) for s in timing.seconds)) for name, timing in timings.items()}
    per_point["reference"] = whole_point(steps, case.new_tokens)

    rows = []
    for name, timing in per_point.items():
        row: dict[str, Any] = {
            "kind": "level",
            "side": name,
            "points": len(POINTS),
            "decoded": len(POINTS if name == "reference" else points),
            "prompts": case.prompts,
            "new_tokens": case.new_tokens,
            "seconds_per_point": list(timing.seconds),
            "median_s": timing.median,
            "quartiles_s": list(timing.quartiles),
            "ratio": common.pairwise_ratio(timing, per_point["ours"]),
            "cores_used_by_others": others.share(),
        }
        if name == "best":
            row["variants"] = {"chosen": best.variant, "seconds": best.seconds, "failed": best.failed}
        if name == "reference":
            row["steps_s"] = {n: list(step.seconds) for n, step in steps.items()}
        if name in REQUIRED:
            checks.append(common.check(f"search_vs_{name}", row["ratio"], ">=", REQUIRED[name]))
        rows.append(row)
    return rows, checks


def best_peer(paths: list[Path], prompts: list[list[int]], points: np.ndarray, case: Case) -> "peers.Peer":
    """The fastest `BestPeer`, found on answers of a quarter of the length."""
    from benchmarks import peers, search_peers

    tried = dict(search_peers.variants(paths, prompts, case.new_tokens, case.chunks))
    return peers.fastest({name: peer.generate for name, peer in tried.items()}, points, case.new_tokens // 4)


def same_tokens(
    ours: np.ndarray, best: np.ndarray, reference: "search_peers.Reference", points: np.ndarray
) -> list[dict[str, Any]]:
    """Whether all sides write the same. Of the reference one step says it for a whole text: the head reads every
    position, so that this step's choices are those of all the steps before, had it written the same so far."""
    chosen = np.stack([reference.choices(w, reference.begin(own)) for w, own in zip(points, ours, strict=True)])
    return [
        common.check("same_tokens_best", same_share(ours, best), ">=", SAME_REQUIRED),
        common.check("same_tokens_reference", same_share(ours, chosen), ">=", SAME_REQUIRED),
    ]


def whole_point(steps: dict[int, Timing], new_tokens: int) -> Timing:
    """Seconds of the reference's whole point, from its steps after some lengths of text in the same round."""
    rounds = zip(*(step.seconds for step in steps.values()), strict=True)
    return Timing(
        tuple(float(np.interp(np.arange(1, new_tokens + 1), list(steps), seconds).sum()) for seconds in rounds)
    )


def print_rows(rows: list[dict[str, Any]], case: Case) -> None:
    cells = []
    for row in rows:
        low, high = row["quartiles_s"]
        how = "whole levels, prompts included"
        if row["side"] == "reference":
            how = f"steps after {', '.join(map(str, case.lengths))} tokens, the others interpolated"
        others = row["cores_used_by_others"]
        cells.append(
            (
                row["side"],
                f"{row['median_s']:.3g} ({low:.3g} to {high:.3g})",
                f"{row['ratio']:.2f}",
                f"{row['decoded']} of {row['points']}",
                row.get("variants", {}).get("chosen", ""),
                how,
                str(len(row["seconds_per_point"])),
                "?" if others is None else f"{others:.0%}",
            )
        )
    title = (
        f"Seconds per point of a level of the search, median (quartiles): {case.prompts} prompts of "
        f"{case.prompt_tokens[0]} to {case.prompt_tokens[1]} tokens, answers of {case.new_tokens}"
    )
    columns = ("side", "s/point", "ours is faster by", "decoded", "variant", "timed", "rounds", "others")
    common.print_table(title, columns, cells)
    if any((row["cores_used_by_others"] or 0) > QUIET for row in rows):
        print("Other programs used the cores meanwhile. That slows torch several times more: run this again.")


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    common.require("torch", "transformers")
    from benchmarks import peers

    peers.setup()
    environment = common.environment()
    case = QUICK if options.quick else FULL
    rows, checks = run_case(case)
    print_rows(rows, case)
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
