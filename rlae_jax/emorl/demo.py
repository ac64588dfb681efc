"""EMORL in a few minutes: a small base model, an adapter per objective, searched fusions, an agent, a table.

In: a seed and a directory. Out: that directory as a run of `emorl train`, with its searches and evaluation.
"""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import Any

from rlae_jax import files, report
from rlae_jax.emorl import embedded
from rlae_jax.emorl.agent import train_run_agent
from rlae_jax.emorl.display import search_progress, show_results, show_training, training_progress
from rlae_jax.emorl.evaluation import evaluate_run
from rlae_jax.emorl.fused import Fused
from rlae_jax.emorl.run import AGENT, Data, Run, make_targets
from rlae_jax.emorl.search import SEARCH_FILE, SearchConfig, search
from rlae_jax.emorl.train import train_adapters
from rlae_jax.errors import InputError
from rlae_jax.models import load
from rlae_jax.runs import lock
from rlae_jax.runs.directory import CONFIG_FILE
from rlae_jax.tasks import reflections

MODES = ("hidden", "probs", "params")
TEST_PROMPTS = 128


@lock.writes("out")
def run_demo(seed: int, out: Path, quick: bool = False) -> dict[str, Any]:
    """Everything, from a random initialisation to a table and pictures. Returns the content of results.json.

    Raises:
      InputError: `out` holds something else, or the demo of another seed.
    """
    began = time.perf_counter()
    files.require_place(out)
    config = embedded.settings(seed=seed, **({"steps": 160} if quick else {}))
    if (out / CONFIG_FILE).is_file() and (there := Run(out).config.settings.seed) != seed:
        raise InputError(f"{out} holds the demo of seed {there}; choose another --out")
    seconds: dict[str, float] = {}

    def finished(name: str) -> None:
        seconds[name] = time.perf_counter() - began - sum(seconds.values())

    base = load(embedded.build_base(out / "models", seed, 700 if quick else embedded.STEPS))
    finished("base")
    data = Data(reflections.NAME)
    targets = make_targets(embedded.OBJECTIVES, ["uniform_reward"], data)
    with training_progress(len(targets), config.steps) as on_progress:
        train_adapters(
            *(base, targets, data.read(), config, out),
            resume=True,
            data=dataclasses.asdict(data),
            on_progress=on_progress,
        )
    run = Run(out)
    show_training(run)
    finished("training")
    singles = list(embedded.OBJECTIVES)
    objectives = run.objectives(singles)
    adapters = [run.adapter(name) for name in singles]
    dev = run.prompts.split("dev")
    settings = SearchConfig(max_new_tokens=config.max_new_tokens, seed=seed, levels=2 if quick else 3)
    for mode in MODES:
        where = run.search_directory(mode)
        if (where / SEARCH_FILE).is_file():
            continue
        fused = Fused(base, adapters, mode)
        with search_progress(mode, settings, len(singles)) as on_points:
            search(fused, dev, objectives, settings, where, resume=True, on_points=on_points)
    finished("searches")
    train_run_agent(
        *(run, Fused(base, adapters), objectives, run.search_directory(AGENT)),
        iterations=20 if quick else 60,
        span_length=1,
        seed=seed,
        resume=True,
    )
    finished("agent")
    results = evaluate_run(run, "test", TEST_PROMPTS, 1.0, seed, out)
    finished("evaluation")
    results["seconds"] = seconds | {"total": time.perf_counter() - began}
    results["verdict"] = verdict(results["methods"])
    files.write_json(out / "results.json", results)
    show_results(results)
    report.console.print(results["verdict"], highlight=False)
    train = ["rlae-jax", "emorl", "train", "--out", str(out), "--objective", embedded.LATER]
    again = ["rlae-jax", "emorl", "search", "--run", str(out), "--out", str(out / "search/four")]
    report.say(
        f"{results['seconds']['total']:.0f} s in all. Look at {report.quoted(out / 'search/hidden/weights.png')}; "
        f"add an objective:\n  {shlex.join(train)}\nand search again:\n  {shlex.join(again)}"
    )
    return results


def verdict(methods: dict[str, dict[str, Any]]) -> str:
    """One plain sentence on what the table means."""
    alone = max((name for name in methods if name.startswith("single:")), key=lambda name: methods[name]["score"])
    score = {name: methods[name]["score"] for name in ("base", alone, "hidden", "rlae_ppo", "uniform_reward")}
    return (
        f"Mean of the objectives on {methods['base']['n']} unseen prompts, greedy: the base {score['base']:.3f}, the "
        f"best single adapter ({alone.removeprefix('single:')}) {score[alone]:.3f}, all adapters under searched "
        f"weights {score['hidden']:.3f}, under an agent's weights {score['rlae_ppo']:.3f}; one adapter trained on all "
        f"objectives at once {score['uniform_reward']:.3f}."
    )
