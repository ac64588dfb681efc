"""The commands `rlae-jax emorl demo | train | search | evaluate | export`. Parses, calls the library, prints."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.errors import InputError, Interrupted
from rlae_jax.runs.directory import how_to_go_on

if TYPE_CHECKING:
    from rlae_jax.emorl.run import Run
    from rlae_jax.emorl.search import SearchConfig

Names = Annotated[tuple[str, ...], arg(metavar="NAME [NAME ...]")]
Weights = Annotated[tuple[float, ...] | None, arg(metavar="W [W ...]")]
Mode = Literal["hidden", "probs", "loglinear", "params"]
Method = Literal["hierarchical", "grid", "random", "halving", "agent"]
AGENT = "agent"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """How adapters are fine-tuned. What is left out is what the run has already, or EMORL's published figure."""

    algorithm: Literal["scst", "grpo", "ppo"] | None = None
    """scst = self-critical: a sample's reward minus the mean of its prompt's samples; grpo = the same in units of
    their spread, with a clipped ratio; ppo = a value head and a clipped ratio. Default: scst."""
    steps: int | None = None
    """Training steps at most. Default: 1000."""
    batch: int | None = None
    """Prompts per step. Default: 16."""
    samples: int | None = None
    """Answers to each prompt of a step. Default: 3."""
    accumulate: int | None = None
    """Cut a step's prompts into so many parts, to need less memory. Default: 1."""
    learning_rate: float | None = None
    """Of Adam. Default: 1e-4."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the learning rate falls over the steps. Default: constant."""
    warmup: int | None = None
    """Steps in which the learning rate grows. Default: 0."""
    gradient_norm: float | None = None
    """Longer gradients are cut to this length. Default: 2."""
    epochs: int | None = None
    """Updates from the answers of one step, of grpo and ppo. Default: 1."""
    kl_weight: float | None = None
    """Of the penalty that keeps an adapter near the base. Default: 0.05."""
    rank: int | None = None
    """Of the adapters. Default: 8."""
    alpha: float | None = None
    """Of the adapters; their scale is alpha / rank. Default: 32."""
    dropout: float | None = None
    """Of the adapters' inputs in training. Default: 0.05."""
    targets: Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]")] = None
    """Linear layers that adapters change: q k v o gate up down, or regular expressions. Default: all but the head."""
    combination: Literal["sum", "log", "product"] | None = None
    """How a baseline's reward is made of its objectives. Default: sum."""
    max_new_tokens: int | None = None
    """The longest answer. Default: 64."""
    temperature: float | None = None
    """Of the samples. Default: 1."""
    validate_every: int | None = None
    """Steps between two validations. Default: 8."""
    validation_prompts: int | None = None
    """Dev prompts of a validation. Default: 32."""
    window: int | None = None
    """An adapter has converged when so many last validation scores hardly differ. Default: 20."""
    threshold: float | None = None
    """Hardly: their standard deviation is below this share of their mean. Default: 0.015."""
    seed: int | None = None
    """Of everything random. Default: 0."""


Trained = Annotated[Training, OmitArgPrefixes]


def _settings(given: Training, known: dict[str, Any] | None) -> Any:
    """The settings of a run: those given, else those that it has, else the defaults."""
    from rlae_jax.emorl.fine_tune import EMORLConfig
    from rlae_jax.models import LoraConfig

    changes = {name: value for name, value in vars(given).items() if value is not None}
    of_adapter = {name: changes.pop(name) for name in ("rank", "alpha", "dropout", "targets") if name in changes}
    start = EMORLConfig()
    if known is not None:
        targets = known["lora"].pop("targets")
        lora = LoraConfig(**known.pop("lora"), targets=None if targets is None else tuple(targets))
        start = EMORLConfig(**known, lora=lora)
    return dataclasses.replace(start, **changes, lora=dataclasses.replace(start.lora, **of_adapter))


def train(
    *,
    objective: Names,
    out: Path,
    base: str | None = None,
    data: str | None = None,
    layout: Literal["auto", "pair", "psych8k", "rows"] = "auto",
    prompt_field: str = "prompt",
    baselines: Names = (),
    training: Trained,
    resume: bool = False,
    max_minutes: float | None = None,
) -> None:
    """Fine-tune one LoRA adapter per objective with reinforcement learning, all at once.

    Into a run that exists, only the new objectives are trained: base, data and settings are the run's own. Ctrl-C
    saves, and says how to go on.

    Args:
        objective: what to score answers by; each gets an adapter of its own. coverage (the prompt's words that the
            answer has), brevity, edit_rate, diversity_2 (distinct word pairs), reflection=MODEL, empathy=MODEL,
            coherence=MODEL, specificity=MODEL (encoders), fluency=MODEL (a causal language model), or your own
            module:function (or file.py:function) of a prompt and an answer that gives a number in [0, 1].
        out: the run's directory; adapters lie in OUT/objectives/NAME/adapter, in PEFT's format.
        base: a Hugging Face directory or Hub id: a T5 or a decoder-only model.
        data: a file with prompts (.csv, .jsonl, .json), or reflections for the embedded ones.
        layout: pair = graded counselling responses, psych8k = a JSON list of instruction, input and output, rows = a
            prompt in each row.
        prompt_field: the prompt's field in rows.
        baselines: adapters taught all objectives at once: uniform_reward (their mean), dynaopt (weights by a bandit),
            dynaopt_reference (the same as its published code has it).
        training: how.
        resume: go on with these objectives.
        max_minutes: stop after this long; --resume goes on.
    """
    from rlae_jax import report
    from rlae_jax.emorl.run import Data, Run, make_targets
    from rlae_jax.emorl.train import train_adapters
    from rlae_jax.models import load
    from rlae_jax.runs.directory import CONFIG_FILE

    run = Run(out) if (out / CONFIG_FILE).is_file() else None
    if run is None and (base is None or data is None):
        raise InputError(f"{out} is no run yet: a new one needs --base MODEL and --data FILE")
    config = _settings(training, None if run is None else dict(run.config["settings"]))
    source = Data(data, layout, prompt_field) if data is not None else run.data if run is not None else None
    assert source is not None
    prompts = source.read()
    for line in prompts.skipped:
        report.console.print(f"{source.path}: {line}", highlight=False, soft_wrap=True)
    sizes = ", ".join(f"{len(prompts.splits[name])} {name}" for name in prompts.splits)
    report.console.print(f"{source.path}: prompts: {sizes}", highlight=False, soft_wrap=True)
    targets = make_targets(objective, baselines, source)
    lm = load(base) if base is not None else run.base if run is not None else None
    assert lm is not None
    finished = {} if run is None else run.targets()
    if done := [target.name for target in targets if target.name in finished]:
        report.console.print(f"done already, and left as they are: {', '.join(done)}", highlight=False, soft_wrap=True)
    try:
        with report.progress(f"training {counted(len(targets), 'adapter')}", config.steps, "steps") as update:
            update(0, "(the first round compiles)")
            train_adapters(
                *(lm, targets, prompts, config, out),
                resume=resume,
                max_minutes=max_minutes,
                data=dataclasses.asdict(source),
                on_progress=lambda progress: update(max(progress.steps.values()), told(progress.scores)),
            )
    except (Interrupted, KeyboardInterrupt) as interrupted:
        raise how_to_go_on(str(interrupted) or "stopped", resume) from None
    show_training(Run(out))


def counted(n: int, what: str) -> str:
    """2, "adapter" -> "2 adapters"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def told(scores: Mapping[str, float]) -> str:
    """Names with their scores, or weights."""
    return ", ".join(f"{name} {score:.3f}" for name, score in scores.items())


def show_training(run: "Run") -> None:
    """What every adapter took."""
    import rich.table

    from rlae_jax import files, report
    from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE

    table = rich.table.Table(title=f"adapters in {run.directory}")
    for i, column in enumerate(("adapter", "dev", "steps", "data points", "converged", "seconds of it")):
        table.add_column(column, justify="left" if i == 0 else "right")
    for name in run.targets():
        found = files.read_json(run.directory / OBJECTIVES / name / TRAINING_FILE)
        table.add_row(
            *(name, f"{found['best_dev']:.3f}", str(found["steps"]), f"{found['data_points']:,}"),
            *("yes" if found["converged"] else "no", f"{found['seconds_shared']:.0f}"),
        )
    report.console.print(table)


def search(
    *,
    run: Path,
    mode: Mode = "hidden",
    adapters: Names = (),
    method: Method = "hierarchical",
    levels: int = 5,
    budget: int | None = None,
    step: float = 0.1,
    space: Literal["box", "simplex"] = "box",
    split: str = "dev",
    prompts: int | None = None,
    temperature: float = 0.0,
    samples: int = 1,
    iterations: int = 60,
    span_length: int = 1,
    memory: Annotated[float, arg(metavar="GB")] = 2.0,
    seed: int = 0,
    out: Path | None = None,
    resume: bool = False,
) -> None:
    """Search the weights with which a run's adapters answer best together.

    Args:
        run: a directory that `emorl train` made.
        mode: what is fused: hidden = last hidden states, probs = probabilities, loglinear = log-probabilities, params =
            the adapters' own parameters.
        adapters: of the run. Default: all of one objective.
        method: hierarchical = EMORL's grid search, grid = every point of a grid, random = random points, halving =
            random points, most of them on few prompts only, agent = train an agent that sets weights anew for every
            span of an answer.
        levels: of the hierarchical search.
        budget: evaluations at most; for random and halving the number of points (default: 3^M).
        step: of the grid.
        space: box = weights in [0, 1] each, as published, simplex = weights that sum to 1.
        split: whose prompts are answered.
        prompts: how many of them. Default: all.
        temperature: of decoding; 0 is greedy.
        samples: answers to each prompt, at a temperature above 0.
        iterations: of the agent's training.
        span_length: tokens for which the agent holds its weights.
        memory: for keys and values at once; more points are decoded one batch after another.
        seed: of sampling, of random points, of the agent.
        out: Default: RUN/search/MODE, or RUN/search/agent.
        resume: go on with the search in OUT.
    """
    from rlae_jax import report
    from rlae_jax.emorl.fused import Fused
    from rlae_jax.emorl.run import Run
    from rlae_jax.emorl.search import SearchConfig
    from rlae_jax.emorl.search import search as search_weights

    found = Run(run)
    names = list(adapters) or found.singles()
    scorers = found.scorers(names)
    fused = Fused(found.base, [found.adapter(name) for name in names], mode)
    longest = found.config["settings"]["max_new_tokens"]
    if method == AGENT:
        where = out or _room(found, AGENT, names)
        try:
            run_agent(found, fused, scorers, iterations, span_length, seed, where, resume)
        except (Interrupted, KeyboardInterrupt) as interrupted:
            raise how_to_go_on(str(interrupted) or "stopped", resume) from None
        report.console.print(
            f"the agent is in {where}; compare it with all else: rlae-jax emorl evaluate --run {run}",
            highlight=False,
            soft_wrap=True,
        )
        return
    config = SearchConfig(
        method=method,
        levels=levels,
        budget=budget,
        step=step,
        space=space,
        max_new_tokens=longest,
        temperature=temperature,
        samples=samples,
        seed=seed,
    )
    asked = found.prompts.split(split)[:prompts]
    where = out or _room(found, mode, names)
    try:
        with report.progress(f"search, {mode}", most_points(config, len(names)), "points") as update:
            result = search_weights(
                *(fused, asked, scorers, config, where),
                resume=resume,
                memory=int(memory * 2**30),
                on_points=lambda done: update(done, ""),
            )
    except KeyboardInterrupt:
        raise how_to_go_on("stopped", resume) from None
    summary = result.summary()
    report.console.print(
        f"best of {summary['points']} points, {summary['evaluations']} of them decoded, on {len(asked)} {split} "
        f"prompts: {summary['score']:.3f} ({told(summary['scores'])}) at the weights {told(summary['weights'])}\n"
        f"in {where}: search.json, points.jsonl, pictures",
        highlight=False,
        soft_wrap=True,
    )


def _room(run: "Run", name: str, adapters: Sequence[str]) -> Path:
    from rlae_jax import report

    where, kept = run.room_for_search(name, adapters)
    if kept is not None:
        report.console.print(
            f"the earlier search, over other adapters, is now in {kept}", highlight=False, soft_wrap=True
        )
    return where


def most_points(config: "SearchConfig", dimensions: int) -> int:
    """For the progress bar."""
    from rlae_jax.emorl.search import level_sizes, levels_within

    if config.method == "hierarchical":
        first, later = level_sizes(dimensions, config.space)
        return first + (levels_within(config, dimensions) - 1) * later
    if config.method == "grid":
        steps = round(1 / config.step)
        return (steps + 1) ** dimensions if config.space == "box" else math.comb(steps + dimensions - 1, steps)
    return config.budget or 3**dimensions


def run_agent(
    run: "Run",
    fused: Any,
    scorers: Sequence[Any],
    iterations: int,
    span_length: int,
    seed: int,
    out: Path,
    resume: bool,
) -> None:
    from rlae_jax import report
    from rlae_jax.config import PPOConfig
    from rlae_jax.emorl.agent import train_agent

    settings = run.config["settings"]
    config = PPOConfig(iterations=iterations, prompts=128, eval_prompts=64, seed=seed)
    dev = float("nan")
    with report.progress("training an agent", iterations, "iterations") as update:
        update(0, "(the first iteration compiles)")

        def show(progress: Any) -> None:
            nonlocal dev
            dev = progress.metrics.get("dev", dev)
            update(progress.iteration, f"reward {progress.metrics['reward']:.3f}, dev {dev:.3f}")

        train_agent(
            *(fused, run.prompts, scorers, config, out),
            max_new_tokens=settings["max_new_tokens"],
            span_length=span_length,
            resume=resume,
            on_progress=show,
        )


def evaluate(
    *,
    run: Path,
    split: str = "test",
    limit: int | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Compare base, single adapters, baselines, every fusion that was searched, and the agent, on held-out prompts.

    Args:
        run: a directory that `emorl train` made. Weights are those that `emorl search` found and left in RUN/search.
        split: whose prompts are answered.
        limit: only its first prompts.
        temperature: of the second table, of sampled answers; the first is of greedy ones.
        seed: of the sampling.
        out: a directory for results.json and predictions.jsonl. Default: RUN.
    """
    from rlae_jax import report
    from rlae_jax.emorl.evaluation import evaluate_run
    from rlae_jax.emorl.run import Run

    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}")
    results = evaluate_run(Run(run), split, limit, temperature, seed, out or run)
    show_results(results)
    report.console.print(f"in {out or run}: results.json, predictions.jsonl", highlight=False, soft_wrap=True)


def show_results(results: dict[str, Any]) -> None:
    """The tables of an evaluation."""
    from rlae_jax import report

    objectives, sampled = results["objectives"], results["sampled"]
    where = f"{results['task']}, {results['split']} split"
    prompts = next(iter(results["methods"].values()))["n"]
    report.console.print(
        report.objectives_table(results["methods"], objectives, f"{where}, {prompts} prompts, greedy answers")
    )
    report.console.print(
        report.objectives_table(
            sampled["methods"], objectives, f"the same, sampled at temperature {sampled['temperature']:g}"
        )
    )


def export(
    *,
    run: Path,
    out: Path,
    mode: Mode = "params",
    weights: Weights = None,
    adapters: Names = (),
) -> None:
    """Write adapters in PEFT's format, their weights in weights.json, and the fused model as a Hugging Face directory.

    OUT/model is the base under the weighted sum of the adapters' parameters (mode params), which is one model. The
    other modes read all adapters while they write: for them OUT/model is left out.

    Args:
        run: a directory that `emorl train` made.
        out: a new directory.
        mode: whose searched weights are taken: RUN/search/MODE.
        weights: others, one per adapter, in [0, 1].
        adapters: of the run, in the order of the weights. Default: those of the search, or all of one objective.
    """
    from rlae_jax import report
    from rlae_jax.emorl.export import export_run
    from rlae_jax.emorl.run import Run

    paths = export_run(Run(run), out, mode, weights, adapters)
    without = "" if mode == "params" else f"; no model, since mode {mode} reads all adapters while it writes"
    report.console.print(f"wrote {', '.join(map(str, paths))}{without}", highlight=False, soft_wrap=True)


def demo(*, seed: int = 0, out: Path = Path("runs/emorl-demo"), quick: bool = False) -> None:
    """The whole method in a few minutes on two CPU cores: a small base model, three objectives, a search, a table.

    What is already in OUT for this seed is reused; remove the directory to begin anew.

    Args:
        seed: of everything random.
        out: directory for everything: models, adapters, searches, results.json, pictures.
        quick: fewer training steps, to see that everything works; scores are lower.
    """
    from rlae_jax.emorl.demo import run_demo

    run_demo(seed, out, quick)


COMMANDS: dict[str, Any] = {"demo": demo, "train": train, "search": search, "evaluate": evaluate, "export": export}
