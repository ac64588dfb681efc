"""What the engine gives to requests that come at any time, against `generate` for one after another and for batches.

In: the package, the lengths of gsm8k's questions and answers. Out: per pair of members the tokens per second of the
engine (while requests wait, and until all are answered), of a server that answers one request at a time, and of one
that takes what has come, up to as many as the engine has slots, and waits until all of them are answered; what a step
costs beside `generate`'s; how long the first token takes when half of the slots are in use, and how much of it a
prompt that is known saves.

    python -m benchmarks.serving [--quick] [--json PATH]

Requests come as a Poisson process, faster than any of the three can answer them, with random ids; answers end at the
length of the answer in the data. All sides answer the same requests, greedily (of large members one at a time only the
first ones).
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.decode import LARGE, SMALL
from rlae_jax.fusion import programs
from rlae_jax.models import ModelConfig, transformer

CONTEXT = 512
PREFIX = 512  # tokens that prompts have in common


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair of members, and how much is asked of it."""

    name: str
    config: ModelConfig
    slots: int
    requests: int
    alone: int  # of them that are answered one at a time
    rounds: int
    steps: tuple[int, int]  # short and long answers, of which the difference is timed
    probes: int  # requests whose first token is timed


CASES = (
    Case("0.3M", SMALL, 8, 160, 160, 3, (16, 272), 40),
    Case("134M", LARGE, 8, 40, 8, 1, (8, 40), 6),
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request."""

    ids: list[int]
    length: int
    arrival: float = 0.0


def lengths(data: Path) -> list[tuple[int, int]]:
    """Tokens of gsm8k's questions and answers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(data.parent / "tokenizers" / "gpt2")
    with (data / "gsm8k" / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [tuple(len(tokenizer(row[key])["input_ids"]) for key in ("question", "answer")) for row in rows]  # type: ignore[misc]


def draw(case: Case, of_data: list[tuple[int, int]], seed: int, rate: float) -> list[Asked]:
    """Requests that come `rate` a second."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(of_data), case.requests, replace=False)
    arrivals = np.cumsum(rng.exponential(1 / rate, case.requests))
    found = []
    for i, at in zip(chosen, arrivals, strict=True):
        prompt, answer = of_data[i]
        prompt = min(prompt, CONTEXT // 2)
        ids = rng.integers(0, case.config.vocab, prompt).tolist()
        found.append(Asked(ids, min(answer, CONTEXT - prompt), float(at)))
    return found


def request(asked: Asked, **fields: Any) -> rj.Request:
    return rj.Request(
        prompt=asked.ids, options=rj.SamplingOptions(max_new_tokens=asked.length, ignore_eos=True, **fields)
    )


def by_engine(engine: rj.Engine, asked: list[Asked]) -> tuple[float, float]:
    """Tokens per second until the last request has a row, after which fewer and fewer rows are in use; and until all
    are answered."""
    start, before = time.perf_counter(), engine.stats().tokens
    tickets: list[Any] = []
    busy: list[float] = []
    for one in asked:
        time.sleep(max(start + one.arrival - time.perf_counter(), 0.0))
        tickets.append(engine.submit(request(one)))

    def hear(piece: Any) -> None:
        del piece
        if not busy:
            busy.append((engine.stats().tokens - before) / (time.perf_counter() - start))

    tickets[-1].listen(hear)
    for ticket in tickets:
        ticket.result()
    return busy[0], sum(one.length for one in asked) / (time.perf_counter() - start)


def by_batches(ensemble: rj.Ensemble, asked: list[Asked], size: int) -> float:
    """Tokens per second of batches of so many that start and end together."""
    start = time.perf_counter()
    for first in range(0, len(asked), size):
        batch = asked[first : first + size]
        time.sleep(max(start + batch[-1].arrival - time.perf_counter(), 0.0))
        generate(ensemble, batch, size)
    return sum(one.length for one in asked) / (time.perf_counter() - start)


def compile_batches(ensemble: rj.Ensemble, asked: list[Asked], size: int) -> None:
    """Runs their programs for a step each."""
    for first in range(0, len(asked), size):
        generate(ensemble, asked[first : first + size], size, most=1)


def generate(ensemble: rj.Ensemble, batch: list[Asked], size: int, most: int = CONTEXT) -> None:
    """One call. The longest prompt and answer are rounded up to some of a few lengths, so that few programs are
    compiled; none of their time is counted."""
    filled = [*batch, *[Asked(batch[0].ids, 1)] * (size - len(batch))]
    width = -(-max(len(one.ids) for one in filled) // 32) * 32
    ids = np.zeros((size, width), np.int32)
    mask = np.arange(width)[None] >= width - np.array([[len(one.ids)] for one in filled])
    for row, one in zip(ids, filled, strict=True):
        row[width - len(one.ids) :] = one.ids
    limits = np.array([one.length for one in filled], np.int32)
    options = rj.SamplingOptions(max_new_tokens=-(-int(limits.max()) // 64) * 64, ignore_eos=True)
    limits = np.minimum(limits, most)
    programs.run(ensemble._job(None, None, options, seed=0, limits=limits, prompt_ids=ids, prompt_mask=mask))


def first_token_seconds(engine: rj.Engine, asked: Asked) -> float:
    """From the request to its first piece."""
    start = time.perf_counter()
    ticket = engine.submit(request(asked))
    next(iter(ticket))
    took = time.perf_counter() - start
    ticket.cancel()
    ticket.result()
    return took


def throughput(case: Case, ensemble: rj.Ensemble, engine: rj.Engine, of_data: list[tuple[int, int]]) -> dict[str, Any]:
    """Tokens per second of the three."""
    rates: list[dict[str, float]] = []
    compiles = 0
    for seed in range(case.rounds):
        at_once = draw(case, of_data, seed + 1000, 1e9)  # others: prompts that were read once are known
        before = engine.compiles
        capacity = by_engine(engine, at_once)[0] / float(np.mean([one.length for one in at_once]))
        compiles += engine.compiles - before
        asked = draw(case, of_data, seed, 2 * capacity)
        few = asked[: case.alone]
        compile_batches(ensemble, asked, case.slots)
        compile_batches(ensemble, few, 1)
        sides: dict[str, Callable[[], Any]] = {
            "engine": functools.partial(by_engine, engine, asked),
            "batches": functools.partial(by_batches, ensemble, asked, case.slots),
            "single": functools.partial(by_batches, ensemble, few, 1),
        }
        names = list(sides)[seed % 3 :] + list(sides)[: seed % 3]
        found = {name: sides[name]() for name in names}
        busy, whole = found.pop("engine")
        rates.append(found | {"engine": busy, "engine_whole": whole})
    return (
        {"members": case.name, "slots": case.slots, "capacity": capacity, "compiles": compiles}
        | {name: float(np.median([of_round[name] for of_round in rates])) for name in rates[0]}
        | {
            f"against_{name}{whole}": [of_round[f"engine{whole}"] / of_round[name] for of_round in rates]
            for name in ("single", "batches")
            for whole in ("", "_whole")
        }
    )


def overhead(case: Case, ensemble: rj.Ensemble) -> dict[str, Any]:
    """A step of as many rows as the engine has slots, all of one length, by both."""
    short, long = case.steps
    rng = np.random.default_rng(0)
    rows = [Asked(rng.integers(0, case.config.vocab, 64).tolist(), long) for _ in range(case.slots)]
    with rj.Engine(ensemble, slots=case.slots, context=64 + long, prefix_bytes=2**30) as engine:

        def written(steps: int) -> Callable[[], None]:
            asked = [dataclasses.replace(row, length=steps) for row in rows]

            def write() -> None:
                for ticket in [engine.submit(request(one)) for one in asked]:
                    ticket.result()

            return write

        def at_once(steps: int) -> Callable[[], None]:
            ids = [row.ids for row in rows]
            return lambda: ensemble.generate(prompt_ids=ids, max_new_tokens=steps, ignore_eos=True)  # type: ignore[return-value]

        calls = {
            f"{name}_{n}": make(n)
            for name, make in {"engine": written, "generate": at_once}.items()
            for n in case.steps
        }
        for call in calls.values():
            call()
        times = common.time_alternating(calls, rounds=5 if case.rounds > 1 else 3)
    steps = {
        name: common.Timing(
            tuple(
                (a - b) / (long - short)
                for a, b in zip(times[f"{name}_{long}"].seconds, times[f"{name}_{short}"].seconds, strict=True)
            )
        )
        for name in ("engine", "generate")
    }
    return {
        "members": case.name,
        "slots": case.slots,
        "engine_ms": steps["engine"].median * 1e3,
        "generate_ms": steps["generate"].median * 1e3,
        "overhead": common.pairwise_ratio(steps["engine"], steps["generate"]),
    }


def first_tokens(case: Case, engine: rj.Engine, of_data: list[tuple[int, int]], capacity: float) -> dict[str, Any]:
    """The time to the first token of an idle engine and at half of its capacity, and the time between two looks."""
    probes = draw(case, of_data, 100, 1e9)[: case.probes]
    idle = [first_token_seconds(engine, one) for one in probes]
    asked = draw(dataclasses.replace(case, requests=4 * case.probes), of_data, 101, capacity / 2)
    start, tickets, heard = time.perf_counter(), [], []
    before = engine.stats()
    for one in asked:
        time.sleep(max(start + one.arrival - time.perf_counter(), 0.0))
        submitted = time.perf_counter()
        ticket = engine.submit(request(one))
        first: list[float] = []

        def hear(piece: Any, first: list[float] = first, at: float = submitted) -> None:
            del piece
            if not first:
                first.append(time.perf_counter() - at)

        ticket.listen(hear)
        tickets.append(ticket)
        heard.append(first)
    for ticket in tickets:
        ticket.result()
    took = time.perf_counter() - start
    looks = engine.stats().looks - before.looks
    loaded = [first[0] for first in heard[case.probes // 2 :]]
    look = took / max(looks, 1)
    return {
        "members": case.name,
        "idle_ms": float(np.median(idle)) * 1e3,
        "half_load_ms": float(np.median(loaded)) * 1e3,
        "half_load_p90_ms": float(np.quantile(loaded, 0.9)) * 1e3,
        "look_ms": look * 1e3,
        "looks_more": (float(np.median(loaded)) - float(np.median(idle))) / look,
    }


def known_prefix(case: Case, ensemble: rj.Ensemble) -> dict[str, Any]:
    """The time to the first token of prompts that begin with the same tokens, of which the first one is new."""
    rng = np.random.default_rng(1)
    new: list[float] = []
    known: list[float] = []
    with rj.Engine(ensemble, slots=case.slots, context=2 * PREFIX, prefix_bytes=2**30) as engine:
        engine.warm_up()
        for _ in range(5):
            shared = rng.integers(0, case.config.vocab, PREFIX).tolist()
            for i in range(3):
                took = first_token_seconds(
                    engine, Asked([*shared, *rng.integers(0, case.config.vocab, 16).tolist()], 8)
                )
                (known if i else new).append(took)
    return {
        "members": case.name,
        "new_ms": float(np.median(new)) * 1e3,
        "known_ms": float(np.median(known)) * 1e3,
        "ratio": float(np.median(new) / np.median(known)),
    }


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    data = common.require_shared("data")
    environment, of_data = common.environment(), lengths(data)
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for case in CASES[:1] if options.quick else CASES:
        members = [rj.LM(case.config, transformer.init_params(case.config, jax.random.key(k))) for k in range(2)]
        ensemble = rj.Ensemble(members, end_ids=())
        with rj.Engine(ensemble, slots=case.slots, context=CONTEXT, queue=1000) as engine:
            engine.warm_up()
            speed = throughput(case, ensemble, engine, of_data)
            before = engine.compiles
            first = first_tokens(case, engine, of_data, speed["capacity"])
            compiles = speed["compiles"] + engine.compiles - before
        jax.clear_caches()  # each program keeps memory mappings, of which a process may have so many
        step, prefix = overhead(case, ensemble), known_prefix(case, ensemble)
        jax.clear_caches()
        others = ("single", "batches")
        rows.append({"throughput": speed, "first_token": first, "step": step, "prefix": prefix})
        common.print_table(
            f"Two members of {case.name}, {case.slots} slots",
            ("", "engine", "one at a time", "batches"),
            [
                ("tokens/s, while requests wait", *(f"{speed[side]:,.0f}" for side in ("engine", *others))),
                ("engine against it, every round", "", *(_spread(speed[f"against_{side}"]) for side in others)),
                ("the same until all are answered", "", *(_spread(speed[f"against_{side}_whole"]) for side in others)),
                ("ms a step of all rows, steady", f"{step['engine_ms']:.2f}", "", f"{step['generate_ms']:.2f}"),
                ("ms to the first token, idle", f"{first['idle_ms']:.1f}", "", ""),
                ("at half load (90%)", f"{first['half_load_ms']:.1f} ({first['half_load_p90_ms']:.1f})", "", ""),
                ("ms between two looks", f"{first['look_ms']:.1f}", "", ""),
                (
                    f"ms with {PREFIX} new tokens, known ones",
                    f"{prefix['new_ms']:.0f}, {prefix['known_ms']:.0f}",
                    "",
                    "",
                ),
            ],
        )
        checks += [
            common.check(f"serve_vs_single {case.name}", float(np.median(speed["against_single"])), ">=", 3.0),
            common.check(f"serve_vs_static {case.name}", float(np.median(speed["against_batches"])), ">=", 1.5),
            common.check(f"engine_overhead {case.name}", step["overhead"], "<=", 1.1),
            common.check(f"first_token_spans {case.name}", first["looks_more"], "<=", 2.0),
            common.check(f"prefix_hit {case.name}", prefix["ratio"], ">=", 3.0),
        ]
        checks.append(common.check(f"compiles_after_warmup {case.name}", compiles, "<=", 0))
    common.finish(rows, checks, environment, options.json_path)


def _spread(ratios: list[float]) -> str:
    return ", ".join(f"{ratio:.2f}" for ratio in ratios)


if __name__ == "__main__":
    main()
