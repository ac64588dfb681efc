"""What an engine saves in a rollout whose answers end at very different lengths.

    python -m benchmarks.rollout [--quick] [--json PATH]

In: the package, the lengths of gsm8k's answers. Out: per pair of members the seconds of a rollout under a fresh agent,
of answers that are all written together and of those by an engine's slots (`train --engine`), in turn on the same
prompts; and whether both are the same.

Members are random models, prompts random ids, and an answer ends at the length of one of the data.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.decode import LARGE, SMALL
from benchmarks.serving import lengths
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.models import ModelConfig, transformer
from rlae_jax.ppo import iteration as ppo

PROMPT, LONGEST, SPAN = 64, 384, 4


@dataclasses.dataclass(frozen=True)
class Case:
    """A pair of members, how many answers are written, and how often."""

    name: str
    config: ModelConfig
    prompts: int
    rounds: int


CASES = (Case("0.3M", SMALL, 256, 5), Case("134M", LARGE, 32, 2))
QUICK = Case("0.3M", SMALL, 128, 1)


def rollouts(case: Case, of_data: list[tuple[int, int]]) -> tuple[dict[str, Callable[[], ppo.Rollout]], np.ndarray]:
    """Both ways, and the lengths of the answers."""
    rng = np.random.default_rng(0)
    ends = rng.choice([min(answer, LONGEST) for _, answer in of_data], case.prompts).astype(np.int32)
    ids = rng.integers(0, case.config.vocab, (case.prompts, PROMPT), dtype=np.int32)
    prompts = prompts_from_arrays(ids, np.ones_like(ids), LONGEST)._replace(limits=ends)  # type: ignore[arg-type]
    nothing = np.zeros((case.prompts, 1), np.int32)
    batch = ppo.Batch(prompts, nothing, nothing[:, 0])
    members = [rj.LM(case.config, transformer.init_params(case.config, jax.random.key(k))) for k in range(2)]
    ensemble = rj.Ensemble(members, end_ids=())
    together = rj.PPOConfig.demo(prompts=case.prompts)
    spec = ensemble.spec(
        policy=ppo.make_policy(together), span_length=SPAN, max_new_tokens=LONGEST, sample_weights=True, record=True
    )
    seeds = np.zeros(1, np.uint32)
    agent = ppo.init_learners(seeds, spec.policy, spec.dims, together).params
    configs = {"together": together, "engine": dataclasses.replace(together, engine=True)}

    def write(config: rj.PPOConfig) -> ppo.Rollout:
        written: ppo.Rollout = ppo.rollout_for_text(agent, ensemble.params, batch, seeds, np.int32(0), spec, config)
        return jax.block_until_ready(written)

    return {name: functools.partial(write, config) for name, config in configs.items()}, ends


def compare(case: Case, of_data: list[tuple[int, int]]) -> dict[str, Any]:
    """Times both ways."""
    calls, ends = rollouts(case, of_data)
    written = {name: call() for name, call in calls.items()}  # compiles
    same = np.mean([np.array_equal(*rows) for rows in zip(*(one.tokens for one in written.values()), strict=True)])
    others = common.OtherLoad()
    timings = common.time_alternating(calls, rounds=case.rounds)
    return {
        "members": case.name,
        "prompts": case.prompts,
        "tokens": int(ends.sum()),
        "mean_length": float(ends.mean()),
        "longest": int(ends.max()),
        "seconds": {name: list(timing.seconds) for name, timing in timings.items()},
        "median_s": {name: timing.median for name, timing in timings.items()},
        "ratio": common.pairwise_ratio(timings["together"], timings["engine"]),
        "same_answers": float(same),
        "cores_used_by_others": others.share(),
    }


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    environment, of_data = common.environment(), lengths(common.require_shared("data"))
    rows = [compare(case, of_data) for case in ([QUICK] if options.quick else CASES)]
    checks = []
    for row in rows:
        seconds = row["median_s"]
        common.print_table(
            f"A rollout of {row['prompts']} answers by two members of {row['members']}, of {row['mean_length']:.0f} "
            f"tokens on average and {row['longest']} at most",
            ("", "together", "engine"),
            [
                ("seconds", *(f"{seconds[side]:.2f}" for side in ("together", "engine"))),
                ("tokens/s", *(f"{row['tokens'] / seconds[side]:,.0f}" for side in ("together", "engine"))),
                ("times faster", "", f"{row['ratio']:.2f}"),
            ],
        )
        checks.append(common.check(f"rollout_same {row['members']}", row["same_answers"], ">=", 1.0))
        checks.append(common.check(f"rollout_engine {row['members']}", row["ratio"], ">=", 1.2))
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
