"""`rlae-jax emorl evaluate`."""

from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes

from rlae_jax.commands.emorl.options import CodeOptions
from rlae_jax.ranges import Count, Seed, Temperature


def evaluate(
    *,
    run: Path,
    code: Annotated[CodeOptions, OmitArgPrefixes],
    split: str = "test",
    limit: Count | None = None,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    out: Path | None = None,
) -> None:
    """Compare base, single adapters, baselines, every fusion that was searched, and the agent, on held-out prompts.

    Args:
        run: a directory that `emorl train` made. Weights are those that `emorl search` found and left in RUN/search.
        code: which functions of one's own may run.
        split: whose prompts are answered.
        limit: only its first prompts.
        temperature: of the second table, of sampled answers; the first is of greedy ones.
        seed: of the sampling.
        out: a directory for results.json and predictions.jsonl. Default: RUN.
    """
    from rlae_jax import files, report
    from rlae_jax.emorl.display import show_results
    from rlae_jax.emorl.evaluation import evaluate_run
    from rlae_jax.emorl.run import Run

    where, trained = out or run, Run(run, code.objective, code.allow_code)
    files.require_place(where)
    show_results(evaluate_run(trained, split, limit, temperature, seed, where))
    report.say(f"in {report.quoted(where)}: results.json, predictions.jsonl")
