"""The whole method in a few minutes: two small specialists, an agent that learns when to trust which, every baseline.

In: a seed and a directory. Out: that directory as a run (settings, metrics, checkpoints, results, predictions), with
the specialists as Hugging Face directories, the learned baselines as runs of their own, and two pictures.
"""

import dataclasses
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlae_jax import files, report
from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.evaluation import Method, baseline_methods, evaluate
from rlae_jax.evaluation.results import read_predictions
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.policy import BoundPolicy
from rlae_jax.models import load
from rlae_jax.ppo.train import RewardLine, read_run, train
from rlae_jax.runs import lock
from rlae_jax.runs.directory import CONFIG_FILE
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.specialists import build_pair
from rlae_jax.tasks import Task, skills


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """How long everything is trained."""

    specialist_steps: int = 500
    iterations: int = 200
    test_prompts: int = 2_048


QUICK = DemoSettings(specialist_steps=250, iterations=40, test_prompts=1_024)


def agent_settings(settings: DemoSettings, seed: int) -> dict[str, PPOConfig]:
    """The agent, and the same agent with the same training but one action for the whole answer."""
    rlae = PPOConfig.demo(seed=seed, iterations=settings.iterations)
    return {"router": dataclasses.replace(rlae, span_length=2 * skills.DIGITS + 1), "rlae_ppo": rlae}


def train_agent(name: str, ensemble: Ensemble, task: Task, config: PPOConfig, out: Path) -> BoundPolicy:
    """Trains, or takes up where an earlier call stopped."""
    if any(row["iteration"] == config.iterations for row in read_metrics(out)):
        report.say(f"agent {name}: reusing {report.quoted(out)}")
        return train(ensemble, task, config, out, resume=True)
    with report.training_progress(f"training {name}", config.iterations) as display:
        return train(ensemble, task, config, out, resume=True, on_progress=display)


def _take_directory(out: Path, seed: int) -> None:
    """Gives `out` to this seed. Another seed's demo that lies there is kept, as `<out>-seed<its seed>`."""
    other = out / CONFIG_FILE
    if not other.is_file():
        return
    if not (out / "specialists").is_dir():
        raise InputError(f"{out} holds a run that is no demo; choose another --out")
    other_seed = read_run(out).settings.seed
    if other_seed == seed:
        return
    kept, mine = (out.with_name(f"{out.name}-seed{n}") for n in (other_seed, seed))
    if kept.exists():
        raise InputError(f"{out} holds the demo of seed {other_seed}, and {kept} exists already; choose another --out")
    with lock.writing(out):  # which goes with it
        out.rename(kept)
    report.say(f"the demo of seed {other_seed} is now in {report.quoted(kept)}")
    if mine.is_dir():
        mine.rename(out)


def skill_weights(task: Task, weights: Sequence[np.ndarray]) -> list[dict[str, list[float]]]:
    """Per span of the test answers: skill that it needs -> mean weights of the members.

    Args:
      weights: per test prompt the weights of its spans, [P, K].
    """
    assert task.skills is not None
    needed = task.skills["test"][: len(weights)]
    spans = len(needed[0])
    names = list(skills.OPERATION_NAMES.values())
    means = []
    for p in range(spans):
        by_skill = {
            name: [used[p] for used, skill in zip(weights, needed, strict=True) if skill[p] == name and len(used) > p]
            for name in names
        }
        # An answer may end before a span; a skill that no answer reached has no mean.
        means.append({name: np.mean(rows, axis=0).tolist() for name, rows in by_skill.items() if rows})
    return means


def verdict(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """One plain sentence on what the table means."""
    agent = methods["rlae_ppo"]
    others = {name: method for name, method in methods.items() if name != "rlae_ppo"}
    best = max(others, key=lambda name: others[name]["score"])
    alone = max(method["score"] for name, method in methods.items() if name.startswith("single:"))
    fixed = max(methods[name]["score"] for name in ("uniform", "static"))
    scores = (
        f"The agent answers {agent['score']:.1%} of {agent['n']} unseen prompts exactly; the better member alone "
        f"answers {alone:.1%}, the best fixed mixture {fixed:.1%}, and the best other method ({best}) "
        f"{others[best]['score']:.1%}"
    )
    if agent["ci95"][0] > others[best]["ci95"][1]:
        return f"{scores}: choosing whom to trust anew for each span is what makes the difference here."
    if agent["ci95"][1] < others[best]["ci95"][0]:
        return f"{scores}: here the agent is worse than {best}."
    return f"{scores}: the intervals overlap, so this run does not show that the agent is better than {best}."


def run_demo(seed: int, out: Path, settings: DemoSettings) -> dict[str, Any]:
    """Everything, from two random initialisations to a table and two pictures. Returns the content of results.json."""
    files.require_place(out)
    _take_directory(out, seed)
    with lock.writing(out):
        return _run_demo(seed, out, settings)


def _run_demo(seed: int, out: Path, settings: DemoSettings) -> dict[str, Any]:
    began = time.perf_counter()
    seconds: dict[str, float] = {}
    paths = build_pair(out / "specialists", seed, settings.specialist_steps)
    seconds["specialists"] = time.perf_counter() - began

    task = skills.skills()
    ensemble = Ensemble([load(path) for path in paths])
    began_training = time.perf_counter()
    agents = {
        name: train_agent(name, ensemble, task, config, out if name == "rlae_ppo" else out / name)
        for name, config in agent_settings(settings, seed).items()
    }
    seconds["training"] = time.perf_counter() - began_training

    methods = baseline_methods(ensemble, task) | {name: Method(ensemble, agent) for name, agent in agents.items()}
    results = evaluate(methods, task, "test", out=out, limit=settings.test_prompts)
    seconds |= results["seconds"] | {"total": time.perf_counter() - began}
    results["seconds"] = seconds

    scores = results["methods"]
    used = [np.array(row.weights) for row in read_predictions(out) if row.method == "rlae_ppo"]
    report.weights_by_skill(
        out / "weights.png",
        skill_weights(task, used),
        [lm.name for lm in ensemble.members],
        "What the agent trusts: mean weight of each member on the test prompts",
    )
    report.learning_curve(
        out / "curve.png",
        {name: read_metrics(out if name == "rlae_ppo" else out / name, RewardLine) for name in ("rlae_ppo", "router")},
        {f"{name} (test)": scores[name]["score"] for name in ("schedule", "static", "confidence")},
        "Learning on the skills task (thick: dev, faint: training)",
    )
    results["verdict"] = verdict(scores)
    files.write_json(out / "results.json", results)
    report.console.print(report.results_table(results))
    report.console.print(results["verdict"], highlight=False)
    pictures = [report.quoted(out / name) for name in ("weights.png", "curve.png")]
    models, policy = map(str, paths), str(out)
    call = ["--models", *models, "--policy", policy]
    length = ["--max-new-tokens", str(task.max_new_tokens)]  # what the agent was trained for
    commands = [
        ["rlae-jax", "generate", *call, *length, "--show-weights", "--prompt", "rs4821="],
        ["rlae-jax", "serve", *call],
    ]
    tried = "".join(f"\n  {shlex.join(command)}" for command in commands)
    report.say(f"{seconds['total']:.0f} s in all. Look at {pictures[0]} and {pictures[1]}; try{tried}")
    return results
