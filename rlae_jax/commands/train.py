"""`rlae-jax train`."""

import dataclasses
import time
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import AgentOptions, Dtype, ModelOptions, Models, TaskFlags
from rlae_jax.ranges import Count, LearningRate, Minutes, Positive, PositiveOr0, Spans, Temperature
from rlae_jax.runs import lock


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

    prompts: Count | None = None
    """prompts per rollout. Default: the preset's."""
    samples: Count | None = None
    """answers to each prompt of a rollout. Default: 1."""
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
    task: TaskFlags,
    training: Annotated[TrainOptions, OmitArgPrefixes],
    max_minutes: Minutes | None = None,
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = (),
    resume: bool = False,
    checkpoints: str | None = None,
) -> None:
    """Train an agent that sets the ensemble's weights, span by span, for the reward of a task.

    Ctrl-C saves and says how to go on; SIGTERM saves, too (exit status 75: run again with --resume). At the end the
    agent and equal weights are scored on the dev split, or on its first prompts where an iteration has few.

    Args:
        model: which models, and how they are fused.
        out: the run's directory (config.json, metrics.jsonl, results.json, predictions.jsonl, checkpoints/, curve.png).
        task: what the agent is trained on.
        training: how.
        max_minutes: stop after this long; --resume goes on.
        log_to: where metrics go besides metrics.jsonl; needs rlae_jax[log].
        resume: go on with the run in OUT.
        checkpoints: where they go, if not into OUT: a directory of this run alone, or a bucket, gs://... (needs gcsfs)
            or s3://... (s3fs). Where OUT is lost with its machine, the run goes on from there.
    """
    from rlae_jax import files, report
    from rlae_jax.config import DEV_SHARE
    from rlae_jax.evaluation import Method, evaluate
    from rlae_jax.ppo.train import RewardLine, train_seeds
    from rlae_jax.runs.checkpoints import require_place
    from rlae_jax.runs.metrics import read_metrics

    files.require_place(out)
    if checkpoints is not None:
        require_place(checkpoints)
    asked = task.load()
    config = training.config()
    ensemble = model.load()
    asked = task.select(asked, ensemble)
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
    if display.problems:
        report.say(display.problems)
    if display.last is not None and display.last.iteration < config.iterations:
        done = display.last.iteration
        report.say(f"time is up after iteration {done} of {config.iterations}; --resume goes on")
    dev, used = len(asked.split("dev")), config.dev_prompts
    if used < dev:
        report.say(f"the first {used} of {dev} dev prompts were scored in training; --eval-prompts sets how many")
    name = config.method
    uniform = Method(ensemble, None, policies[0].span_length)
    agents = [Method(ensemble, policy) for policy in policies]
    limit = max(used, DEV_SHARE * config.prompts * config.samples)
    results = evaluate({"uniform": uniform, name: agents}, asked, "dev", limit=limit, out=out)
    results["seconds"]["total"] = time.perf_counter() - began
    files.write_json(out / "results.json", results)
    references = {"uniform (dev)": results["methods"]["uniform"]["score"]}
    title = f"{asked.name}, {config.algorithm.upper()}"
    report.learning_curve(out / "curve.png", {name: read_metrics(out, RewardLine)}, references, title)
    report.console.print(report.results_table(results))
    run = report.quoted(out)
    report.say(f"the trained policy is in {run}; use it with --policy {run}")
