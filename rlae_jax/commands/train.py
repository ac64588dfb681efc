"""`rlae-jax train`."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import AgentOptions, Dtype, ModelOptions, Models, TasksOptions
from rlae_jax.ranges import Count, LearningRate, Minutes, Positive, PositiveOr0, Spans, Temperature
from rlae_jax.runs import lock

if TYPE_CHECKING:
    from rlae_jax.config import PPOConfig
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.fusion.policy import BoundPolicy
    from rlae_jax.tasks import Task


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainModels(ModelOptions):
    """Which models, and how they are fused: by operators that an agent can learn to steer."""

    models: Models
    """Hugging Face directories, GGUF files or Hub ids (org/name). With different tokenizers, steps, spans and
    --max-new-tokens count entries of the union of their vocabularies."""
    fusion: Literal["linear", "loglinear", "hidden"] = "linear"
    """linear = mean of probabilities, loglinear = weighted mean of log-probabilities, hidden = sum of last hidden
    states, for --adapters."""
    dtype: Dtype = "float32"
    """of the members' parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions(AgentOptions):
    """How the agent is trained."""

    shares: Annotated[tuple[Positive, ...] | None, arg(name="task-shares", metavar="SHARE [SHARE ...]")] = None
    """of a rollout's prompts, one per task, as numbers of any scale, such as 2 1 1. Default: equal ones."""

    prompts: Count | None = None
    """prompts per rollout. Default: the preset's."""
    samples: Count | None = None
    """answers to each prompt of a rollout. Default: 1."""
    credit: Literal["span", "answer"] | None = None
    """with --reward likelihood: each span has its own reward, or the last one their sum. Default: span."""
    engine: bool = False
    """write a rollout as an engine does: some answers at a time, and a row that ends is given the next prompt, so that
    one long answer does not hold up a batch. The answers are the same. Not for encoder-decoders."""
    slots: Count | None = None
    """with --engine: answers of an agent that are written at a time. Default: a quarter of a rollout's, at least 8."""
    learning_rate: LearningRate | None = None
    """of Adam. Default: the preset's."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """how the learning rate falls over the iterations. Default: constant."""
    target_kl: Positive | None = None
    """leave out an iteration's remaining updates once the agent has moved this far. Default: never."""
    span_length: Count | None = None
    """steps for which weights are held. Default: the task's."""
    span_lengths: Annotated[tuple[Count, ...] | None, arg(metavar="L [L ...]")] = None
    """let the agent choose among these for each span."""
    temperature: Temperature | None = None
    """of the tokens during training; 0 writes the most probable ones. Default: the preset's."""
    reads: tuple[Literal["hidden", "stats", "span", "prompt", "text", "agreement"], ...] | None = None
    """what the agent sees. Default: hidden stats span, and of a set agent also agreement."""
    encoder: str | None = None
    """of an agent that reads text: a Hugging Face encoder, such as microsoft/deberta-v3-base."""
    max_spans: Spans | None = None
    """spans of the longest answers that the agent shall ever set weights for. Default: those of the task."""
    distribution: Literal["dirichlet", "logistic_normal"] | None = None
    """of a single agent's weights. Default: dirichlet."""
    share_actors: bool = False
    """the agents of mappo are one network."""
    member_cost: PositiveOr0 | None = None
    """taken off the reward for each further member in use. Default: 0."""
    length_cost: PositiveOr0 | None = None
    """taken off the reward of the longest answer, in proportion of shorter ones. Default: 0."""
    eval_every: Count | None = None
    """score dev and write a checkpoint every so many iterations. Default: the preset's."""
    eval_prompts: Count | None = None
    """score the first so many dev prompts. Default: four for each answer of a rollout, at least 32 and at most 512."""
    seeds: Count | None = None
    """train this many agents side by side, of seeds SEED, SEED + 1, ... Default: 1."""


@lock.writes("out")
def train(
    *,
    model: Annotated[TrainModels, OmitArgPrefixes],
    out: Path,
    task: Annotated[TasksOptions, OmitArgPrefixes],
    training: Annotated[TrainOptions, OmitArgPrefixes],
    max_minutes: Minutes | None = None,
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = (),
    resume: bool = False,
    checkpoints: str | None = None,
) -> None:
    """Train an agent that sets the ensemble's weights, span by span, for the reward of a task or of several.

    Several tasks share each rollout and are answered by the same models; rewards are made alike (mean 0 and spread 1 in
    each rollout and task), and the agent is kept that was best on dev by the mean over the tasks of the share of the
    room above an untrained agent that it took. Results of each task are then in OUT/tasks/TASK.

    With --reward likelihood nothing is written: the models read the answers of train, or texts of any kind, once, and
    the agent learns from how likely each span is under its weights. That takes seconds where writing takes minutes.

    Ctrl-C saves and says how to go on; SIGTERM saves, too (exit status 75: run again with --resume). At the end the
    agent and equal weights are scored on the dev split, or on its first prompts where an iteration has few.

    Args:
        model: which models, and how they are fused.
        out: the run's directory (config.json, metrics.jsonl, results.json, predictions.jsonl, checkpoints/, curve.png).
        task: what the agent is trained on; several tasks as --task A B.
        training: how.
        max_minutes: stop after this long; --resume goes on.
        log_to: where metrics go besides metrics.jsonl; needs rlae_jax[log].
        resume: go on with the run in OUT.
        checkpoints: where they go, if not into OUT: a directory of this run alone, or a bucket, gs://... (needs gcsfs)
            or s3://... (s3fs). Where OUT is lost with its machine, the run goes on from there.
    """
    from rlae_jax import files, report
    from rlae_jax.ppo.train import name_of, read_run, train_seeds
    from rlae_jax.runs.checkpoints import require_place
    from rlae_jax.runs.directory import CONFIG_FILE

    files.require_place(out)
    if resume and (out / CONFIG_FILE).exists():
        read_run(out)  # what cannot be gone on with is told before models are read
    if checkpoints is not None:
        require_place(checkpoints)
    asked = task.load_all()
    config = training.config()
    ensemble = model.load()
    asked = [task.select(one, ensemble) for one in asked]
    began = time.perf_counter()
    with report.training_progress("training", config.iterations) as display:
        policies = train_seeds(
            *(ensemble, asked, config, out),
            resume=resume,
            max_minutes=max_minutes,
            log_to=log_to,
            checkpoints=checkpoints,
            on_progress=display,
        )
    if display.last is None:
        report.say(f"all {config.iterations} iterations had been done")
    elif display.last.iteration < config.iterations:
        done = display.last.iteration
        report.say(f"time is up after iteration {done} of {config.iterations}; --resume goes on")
    used = -(-config.dev_prompts // len(asked))
    for one in asked:
        if used < (dev := len(one.split("dev"))):
            told = f"the first {used} of {dev} dev prompts of {one.name} were scored in training"
            report.say(f"{told}; --eval-prompts sets how many")
    references: dict[str, float] = {}
    for one in asked:
        directory = out if len(asked) == 1 else out / "tasks" / one.name
        results = _score(ensemble, policies, one, config, used, directory, began)
        uniform = "uniform (dev)" if len(asked) == 1 else f"uniform ({one.name})"
        references[uniform] = results["methods"]["uniform"]["score"]
        if len(asked) > 1:
            report.say(f"{one.name}:")
        report.console.print(report.results_table(results))
    title = f"{name_of(asked)}, {config.algorithm.upper()}"
    unit = "bits per byte on dev" if asked[0].by_likelihood else None
    references = references if asked[0].reads_texts or unit is None else {}  # an accuracy is none of these
    report.learning_curve(out / "curve.png", _curves(out, config.method), references, title, unit)
    run = report.quoted(out)
    report.say(f"the trained policy is in {run}; use it with --policy {run}")


def _score(
    ensemble: "Ensemble",
    policies: "list[BoundPolicy]",
    task: "Task",
    config: "PPOConfig",
    used: int,
    out: Path,
    began: float,
) -> dict[str, Any]:
    """The results of the agents and of equal weights on a task's dev prompts, of which training used some."""
    from rlae_jax import files
    from rlae_jax.config import DEV_SHARE
    from rlae_jax.evaluation import Method, evaluate

    methods: dict[str, Any] = {
        "uniform": Method(ensemble, None, policies[0].span_length),
        config.method: [Method(ensemble, policy) for policy in policies],
    }
    limit = used if task.reads_texts else max(used, DEV_SHARE * config.prompts * config.samples)
    results = evaluate(methods, task, "dev", limit=limit, out=out)
    results["seconds"]["total"] = time.perf_counter() - began
    files.write_json(out / "results.json", results)
    return results


def _curves(out: Path, agent: str) -> dict[str, list[dict[str, Any]]]:
    """A run's learning curves, one for each task."""
    from rlae_jax.ppo.train import RewardLine
    from rlae_jax.runs.metrics import read_metrics

    rows = read_metrics(out, RewardLine)
    if all("dev_bits_per_byte" in row for row in rows):
        bits = [(row["iteration"], row["dev_bits_per_byte"]) for row in rows]
        return {agent: [{"iteration": done, "reward": one, "dev": one} for done, one in bits]}
    if not any("reward_of_tasks" in row for row in rows):
        return {agent: rows}
    return {
        task: [
            {"iteration": row["iteration"], "reward": row["reward_of_tasks"][task]}
            | ({"dev": row["dev_of_tasks"][task]} if "dev_of_tasks" in row else {})
            for row in rows
        ]
        for task in rows[0]["reward_of_tasks"]
    }
