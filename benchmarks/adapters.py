"""What stacked LoRA adapters cost while decoding, against the base model alone.

    python -m benchmarks.adapters [--quick] [--json PATH]

In: nothing but the package; base and adapters are random, of SmolLM-135M's shape and rank 8 on every linear layer. Out:
seconds per generation, alternating, of one prompt under no adapter, under three at once in one pass (fused into one
text), and under three merged copies of the base; and of a batch of eight with no adapter and with another adapter in
each row. The prompt is short: reading it under three adapters is three times the work whatever one does, since their
activations differ from the first layer on; decoding need not be, since it waits for the weights.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.decode import LARGE, QUIET
from rlae_jax.models import transformer

RANK = 8
PROMPT_TOKENS = 16
NEW_TOKENS = 64
STACKED = 3
ROWS = 8
STACKED_REQUIRED, MIXED_REQUIRED = 1.4, 1.25


def make_adapters(lm: rj.LM, count: int) -> list[rj.Adapter]:
    """Adapters whose second factor is not zero, so that they do change the text."""
    adapters = []
    for seed in range(count):
        adapter = rj.init_adapter(lm, rj.LoraConfig(rank=RANK), seed=seed, name=f"adapter{seed}")
        keys = jax.random.split(jax.random.key(seed), len(adapter.params))
        params = {
            path: {"a": factors["a"], "b": 0.02 * jax.random.normal(key, factors["b"].shape)}
            for key, (path, factors) in zip(keys, adapter.params.items(), strict=True)
        }
        adapters.append(dataclasses.replace(adapter, params=params))
    return adapters


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    environment = common.environment()
    lm = rj.LM(LARGE, transformer.init_params(LARGE, jax.random.key(0)))
    adapters = make_adapters(lm, ROWS)
    rng = np.random.default_rng(0)
    prompts: Any = rng.integers(0, LARGE.vocab, (ROWS, PROMPT_TOKENS), dtype=np.int32)

    def generate(ensemble: rj.Ensemble, rows: int, **choice: Any) -> Callable[[], Any]:
        return lambda: (
            ensemble.generate(prompt_ids=prompts[:rows], ignore_eos=True, max_new_tokens=NEW_TOKENS, **choice).tokens
        )

    base = rj.Ensemble([lm])
    groups = {
        "batch 1": {
            "base alone": generate(base, 1),
            "3 adapters, stacked": generate(rj.Ensemble.from_adapters(lm, adapters[:STACKED]), 1),
            "3 merged copies": generate(rj.Ensemble([lm.with_adapter(a) for a in adapters[:STACKED]]), 1),
        },
        "batch 8": {
            "base alone": generate(base, ROWS),
            "8 adapters, one a row": generate(
                rj.Ensemble([lm.with_adapters(adapters)]), ROWS, adapters=np.arange(ROWS)
            ),
        },
    }
    rows: list[dict[str, Any]] = []
    cells = []
    for batch, callables in groups.items():
        for name, call in callables.items():
            print(f"compiling {batch}: {name}", flush=True)
            call()
        load = common.OtherLoad()
        timings = common.time_alternating(callables, rounds=3 if options.quick else 15)
        others = load.share()
        for name, timing in timings.items():
            ratio = common.pairwise_ratio(timing, timings["base alone"])
            low, high = timing.quartiles
            rows.append(
                {"batch": batch, "case": name, "seconds": list(timing.seconds), "ratio": ratio, "others": others}
            )
            cells.append((batch, name, f"{timing.median:.2f}", f"{low:.2f} to {high:.2f}", f"{ratio:.2f}"))
        if others is not None and others > QUIET:
            print(f"other programs used {others:.0%} of the cores during {batch}: figures are rough")
    common.print_table(
        f"{NEW_TOKENS} tokens after a prompt of {PROMPT_TOKENS}, 134M parameters, rank {RANK}",
        ("batch", "case", "median s", "quartiles", "times the base"),
        cells,
    )
    ratios = {row["case"]: row["ratio"] for row in rows if row["case"] != "base alone"}
    checks = [
        common.check("stacked_3_b1", ratios["3 adapters, stacked"], "<=", STACKED_REQUIRED),
        common.check("rows_8_b8", ratios["8 adapters, one a row"], "<=", MIXED_REQUIRED),
    ]
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
