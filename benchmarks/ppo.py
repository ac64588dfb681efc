"""How long one PPO iteration takes on models of the demo's size: rollout, reward, advantages and updates.

    python -m benchmarks.ppo [--quick] [--json PATH]

In: nothing but the package; the members are random models of the demo's shape, which cost what trained ones cost when
every answer runs to its full length. Out: seconds per iteration of 256 prompts after compilation, with their spread.
"""

import dataclasses
import time

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from rlae_jax.demo import SPECIALIST
from rlae_jax.models import transformer
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ppo.agent import PPOAgent
from rlae_jax.tasks import skills

PROMPTS = 256


def measure(repeats: int) -> common.Timing:
    """Seconds of each of `repeats` iterations, the compiling one left out."""
    members = [rj.LM(SPECIALIST, transformer.init_params(SPECIALIST, jax.random.key(k))) for k in range(2)]
    ensemble = rj.Ensemble(members)
    task = skills.skills()
    config = rj.PPOConfig.demo(prompts=PROMPTS)
    spec = ensemble.spec(
        policy=PPOAgent(config.agent),
        span_length=task.span_length,
        max_new_tokens=task.max_new_tokens,
        sample_weights=True,
        record=True,
    )
    rng = np.random.default_rng(0)
    width = len(skills.prompt("ri", "0000"))
    ids = rng.integers(3, SPECIALIST.vocab, (PROMPTS, width)).astype(np.int32)
    references = rng.integers(3, SPECIALIST.vocab, (PROMPTS, task.max_new_tokens - 1)).astype(np.int32)
    lengths = np.full(PROMPTS, task.max_new_tokens - 1, np.int32)
    batch = ppo.Batch(ids, np.ones_like(ids), references, lengths)
    # An end token would shorten the answers of random members.
    spec = dataclasses.replace(spec, end_ids=())
    seeds = np.zeros(1, np.uint32)
    state = ppo.init_learners(seeds, spec.policy, spec.dims, config)
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        state, metrics = ppo.iterate(state, ensemble.params, batch, seeds, spec, config)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return common.Timing(tuple(seconds[1:]))


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    environment = common.environment()
    timing = measure(5 if options.quick else 30)
    low, high = timing.quartiles
    row = {"prompts": PROMPTS, "median_s": timing.median, "quartiles_s": [low, high], "seconds": list(timing.seconds)}
    common.print_table(
        "One PPO iteration after compilation",
        ("prompts", "median s", "quartiles"),
        [(PROMPTS, f"{timing.median:.3f}", f"{low:.3f} to {high:.3f}")],
    )
    common.finish([row], [common.check("iteration_256", timing.median, "<=", 0.5)], environment, options.json_path)


if __name__ == "__main__":
    main()
