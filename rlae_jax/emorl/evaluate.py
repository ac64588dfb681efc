"""Methods side by side on held-out prompts: the base, single adapters, adapters taught everything, fusions, agents.

In: writers, which answer prompts at a temperature. Out: results.json and predictions.jsonl as every evaluation of the
package has them, with the score of each objective; greedy answers and sampled ones are two tables, never one.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from rlae_jax import files, report, statistics
from rlae_jax.emorl.fused import Fused
from rlae_jax.emorl.scorers import Scorer
from rlae_jax.fusion.ensemble import Ensemble, Generation, Weights
from rlae_jax.models import LM, Adapter

_ROWS = 128  # prompts answered at once


class Writer(NamedTuple):
    """A method: (prompts, temperature, seeds, longest answer) -> its answers; and what it took to find it."""

    write: Callable[[Sequence[str], float, Sequence[int], int], Generation]
    found: Mapping[str, Any]


def adapted(base: LM, adapters: Sequence[Adapter]) -> dict[str, Writer]:
    """The base and every adapter alone, all through one program."""
    ensemble = Ensemble([base.with_adapters(adapters)])

    def writer(weights: Float[np.ndarray, " M"]) -> Writer:
        def write(prompts: Sequence[str], temperature: float, seeds: Sequence[int], longest: int) -> Generation:
            rows = np.tile(weights, (len(prompts), 1))
            return ensemble.generate(
                prompts, adapters=rows, temperature=temperature, seed=seeds, max_new_tokens=longest
            )

        return Writer(write, {})

    m = len(adapters)
    return {"base": writer(np.zeros(m, np.float32))} | {
        adapter.name: writer(np.eye(m, dtype=np.float32)[i]) for i, adapter in enumerate(adapters)
    }


def fusion(fused: Fused, weights: Weights, found: Mapping[str, Any] | None = None) -> Writer:
    """Fused adapters under fixed weights, or under an agent."""

    def write(prompts: Sequence[str], temperature: float, seeds: Sequence[int], longest: int) -> Generation:
        options: dict[str, Any] = {"temperature": temperature, "seed": seeds, "max_new_tokens": longest}
        if fused.mode == "params":
            return fused.ensemble.generate(prompts, adapters=np.tile(np.asarray(weights), (len(prompts), 1)), **options)
        return fused.ensemble.generate(prompts, weights, **options)

    return Writer(write, {} if found is None else found)


@dataclasses.dataclass(frozen=True)
class _Table:
    """The answers of one way to decode."""

    rewards: dict[str, Float[np.ndarray, " N"]]
    rows: dict[str, dict[str, Any]]
    predictions: list[dict[str, Any]]


def evaluate(
    writers: Mapping[str, Writer],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    *,
    task: str,
    split: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    compare: str = "hidden",
    out: Path | None = None,
) -> dict[str, Any]:
    """Scores every method greedily and at a temperature, on the same prompts with the same seeds.

    Args:
      compare: the method that all others are compared with, if it is among them.
      out: a directory for results.json and predictions.jsonl.

    Returns the content of results.json: `methods` and `differences` of greedy answers, and `sampled` with the same of
    sampled ones.
    """
    began = time.perf_counter()
    tables = {}
    total = 2 * len(writers) * len(prompts)
    with report.progress("evaluation", total, "answers") as update:
        done = 0

        def step(n: int, name: str) -> None:
            nonlocal done
            done += n
            update(done, name)

        for way, heat in (("greedy", 0.0), ("sampled", temperature)):
            tables[way] = _answer(writers, prompts, scorers, way, heat, seed, max_new_tokens, step)
    greedy, sampled = tables["greedy"], tables["sampled"]
    results = {
        "schema": 1,
        "task": task,
        "split": split,
        "objectives": [scorer.name for scorer in scorers],
        "methods": greedy.rows,
        "differences": _differences(greedy.rewards, compare),
        "sampled": {
            "temperature": temperature,
            "methods": sampled.rows,
            "differences": _differences(sampled.rewards, compare),
        },
        "seconds": {"evaluation": time.perf_counter() - began},
        "environment": report.environment(),
    }
    if out is not None:
        files.write_json_lines(out / "predictions.jsonl", greedy.predictions + sampled.predictions)
        files.write_json(out / "results.json", results)
    return results


def _answer(
    writers: Mapping[str, Writer],
    prompts: Sequence[str],
    scorers: Sequence[Scorer],
    way: str,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    step: Callable[[int, str], None],
) -> _Table:
    table = _Table({}, {}, [])
    for name, writer in writers.items():
        texts: list[str] = []
        weights: list[Any] = []
        seconds, tokens = 0.0, 0
        compiled: set[int] = set()
        for start in range(0, len(prompts), _ROWS):
            part = list(prompts[start : start + _ROWS])
            seeds = list(range(seed + start, seed + start + len(part)))
            if len(part) not in compiled:  # the first call of a size compiles, and is not timed
                compiled.add(len(part))
                writer.write(part, temperature, seeds, max_new_tokens)
            began = time.perf_counter()
            generation = writer.write(part, temperature, seeds, max_new_tokens)
            seconds += time.perf_counter() - began
            tokens += sum(generation.steps)
            texts += generation.texts
            weights += [used[~np.isnan(used[:, 0])] for used in generation.weights]
            step(len(part), f"{name}, {way}")
        scores = np.stack([scorer(prompts, texts) for scorer in scorers], axis=1)
        rewards = scores.mean(axis=1)
        table.rewards[name] = rewards
        table.rows[name] = {
            "score": float(rewards.mean()),
            "accuracy": None,
            "n": len(rewards),
            "ci95": list(statistics.interval95(rewards[None])),
            "per_seed": [float(rewards.mean())],
            "scores": dict(zip((scorer.name for scorer in scorers), scores.mean(axis=0).tolist(), strict=True)),
            "tokens": tokens / len(prompts),
            "ms_per_token": seconds * 1e3 / max(tokens, 1),
            "ms_per_answer": seconds * 1e3 / len(prompts),
            **writer.found,
        }
        table.predictions.extend(_predictions(name, way, prompts, texts, scores, scorers, weights))
    return table


def _predictions(
    name: str,
    way: str,
    prompts: Sequence[str],
    texts: Sequence[str],
    scores: Float[np.ndarray, "N M"],
    scorers: Sequence[Scorer],
    weights: Sequence[Float[np.ndarray, "P K"]],
) -> Iterator[dict[str, Any]]:
    names = [scorer.name for scorer in scorers]
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        yield {
            "method": name,
            "decoding": way,
            "index": i,
            "prompt": prompt,
            "text": text,
            "reward": float(scores[i].mean()),
            "scores": dict(zip(names, scores[i].tolist(), strict=True)),
            "weights": np.round(weights[i], 4).tolist(),
        }


def _differences(rewards: Mapping[str, Float[np.ndarray, " N"]], compare: str) -> list[dict[str, Any]]:
    """One method against all others."""
    others = [name for name in rewards if name != compare] if compare in rewards else []
    found = [statistics.paired_difference(rewards[compare], rewards[name]) for name in others]
    corrected = statistics.holm([one.p for one in found])
    return [
        {"a": compare, "b": b, "difference": one.difference, "ci95": list(one.ci95), "p": one.p, "p_holm": p}
        for b, one, p in zip(others, found, corrected, strict=True)
    ]
