"""`rlae-jax emorl train`."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.emorl.options import Names
from rlae_jax.commands.options import HeldOptions
from rlae_jax.errors import InputError
from rlae_jax.ranges import (
    Count,
    CountOr0,
    LearningRate,
    Minutes,
    Passes,
    Positive,
    PositiveOr0,
    Seed,
    ShareBelow1,
    Temperature,
    Width,
)
from rlae_jax.runs import lock

if TYPE_CHECKING:
    from rlae_jax.emorl.fine_tune import EMORLConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """How adapters are fine-tuned. What is left out is what the run has already, or EMORL's published figure."""

    algorithm: Literal["scst", "grpo", "ppo"] | None = None
    """scst = self-critical: a sample's reward minus the mean of its prompt's samples; grpo = the same in units of
    their spread, with a clipped ratio; ppo = a value head and a clipped ratio. Default: scst."""
    steps: Count | None = None
    """Training steps at most. Default: 1000."""
    batch: Count | None = None
    """Prompts per step. Default: 16."""
    samples: Count | None = None
    """Answers to each prompt of a step. Default: 3."""
    accumulate: Count | None = None
    """Cut a step's prompts into so many parts, to need less memory. Default: 1."""
    learning_rate: LearningRate | None = None
    """Of Adam. Default: 1e-4."""
    schedule: Literal["constant", "linear", "cosine"] | None = None
    """How the learning rate falls over the steps. Default: constant."""
    warmup: CountOr0 | None = None
    """Steps in which the learning rate grows. Default: 0."""
    gradient_norm: Positive | None = None
    """Longer gradients are cut to this length. Default: 2."""
    epochs: Passes | None = None
    """Updates from the answers of one step, of grpo and ppo. Default: 1."""
    kl_weight: PositiveOr0 | None = None
    """Of the penalty that keeps an adapter near the base. Default: 0.05."""
    rank: Width | None = None
    """Of the adapters. Default: 8."""
    alpha: Positive | None = None
    """Of the adapters; their scale is alpha / rank. Default: 32."""
    dropout: ShareBelow1 | None = None
    """Of the adapters' inputs in training. Default: 0.05."""
    targets: Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]")] = None
    """Linear layers that adapters change: q k v o gate up down, or regular expressions. Default: all but the head."""
    combination: Literal["sum", "log", "product"] | None = None
    """How a baseline's reward is made of its objectives. Default: sum."""
    max_new_tokens: Count | None = None
    """The longest answer. Default: 64."""
    temperature: Temperature | None = None
    """Of the samples. Default: 1."""
    validate_every: Count | None = None
    """Steps between two validations. Default: 8."""
    validation_prompts: Count | None = None
    """Dev prompts of a validation. Default: 32."""
    window: Count | None = None
    """An adapter has converged when so many last validation scores hardly differ. Default: 20."""
    threshold: PositiveOr0 | None = None
    """Hardly: their standard deviation is below this share of their mean. Default: 0.015."""
    seed: Seed | None = None
    """Of everything random. Default: 0."""

    def config(self, known: "EMORLConfig | None") -> "EMORLConfig":
        """The settings of a run: those given, else those that it has, else the defaults.

        Args:
          known: the run's; None for a new one.
        """
        from rlae_jax.emorl.fine_tune import EMORLConfig
        from rlae_jax.models import LoraConfig

        changes = {name: value for name, value in vars(self).items() if value is not None}
        of_adapter = {f.name: changes.pop(f.name) for f in dataclasses.fields(LoraConfig) if f.name in changes}
        start = EMORLConfig() if known is None else known
        return dataclasses.replace(start, **changes, lora=dataclasses.replace(start.lora, **of_adapter))


@lock.writes("out")
def train(
    *,
    objective: Names,
    out: Path,
    base: str | None = None,
    data: str | None = None,
    layout: Literal["auto", "pair", "psych8k", "rows"] = "auto",
    prompt_field: str = "prompt",
    held: Annotated[HeldOptions, OmitArgPrefixes],
    baselines: Names = (),
    training: Annotated[TrainOptions, OmitArgPrefixes],
    resume: bool = False,
    max_minutes: Minutes | None = None,
    checkpoints: str | None = None,
) -> None:
    """Fine-tune one LoRA adapter per objective with reinforcement learning, all at once.

    Into a run that exists, only the new objectives are trained: base, data and settings are the run's own. Ctrl-C
    saves, and says how to go on; SIGTERM saves, too (exit status 75: run again with --resume).

    Args:
        objective: what to score answers by; each gets an adapter of its own. coverage (the prompt's words that the
            answer has), brevity, edit_rate, diversity_2 (distinct word pairs), reflection=MODEL, empathy=MODEL,
            coherence=MODEL, specificity=MODEL (encoders), fluency=MODEL (a causal language model), or your own
            module:function (or file.py:function) of a prompt and an answer that gives a number in [0, 1].
        out: the run's directory; adapters lie in OUT/objectives/NAME/adapter, in PEFT's format.
        base: a Hugging Face directory or Hub id: a T5 or a decoder-only model.
        held: how the base's weights are held.
        data: a file with prompts (.csv, .jsonl, .json), or reflections for the embedded ones.
        layout: pair = graded counselling responses, psych8k = a JSON list of instruction, input and output, rows = a
            prompt in each row.
        prompt_field: the prompt's field in rows.
        baselines: adapters taught all objectives at once: uniform_reward (their mean), dynaopt (weights by a bandit),
            dynaopt_reference (the same as its published code has it).
        training: how.
        resume: go on with these objectives.
        max_minutes: stop after this long; --resume goes on.
        checkpoints: where they go, if not into OUT: a directory of this run alone, or a bucket, gs://... (needs gcsfs)
            or s3://... (s3fs).
    """
    from rlae_jax import files, report
    from rlae_jax.emorl.display import show_problems, show_training, training_progress
    from rlae_jax.emorl.run import Data, Run, make_targets
    from rlae_jax.emorl.train import train_adapters
    from rlae_jax.models import load
    from rlae_jax.runs.checkpoints import require_place
    from rlae_jax.runs.directory import CONFIG_FILE

    files.require_place(out)
    if checkpoints is not None:
        require_place(checkpoints)
    run = Run(out) if (out / CONFIG_FILE).is_file() else None
    if run is None and (base is None or data is None):
        raise InputError(f"{out} is no run yet: a new one needs --base MODEL and --data FILE")
    config = training.config(None if run is None else run.config.settings)
    source = Data(data, layout, prompt_field) if data is not None else run.data if run is not None else None
    assert source is not None
    prompts = source.read()
    for skipped in prompts.skipped:
        report.say(f"{report.quoted(source.path)}: {skipped}")
    sizes = ", ".join(f"{len(prompts.splits[name])} {name}" for name in prompts.splits)
    report.say(f"{report.quoted(source.path)}: prompts: {sizes}")
    targets = make_targets(objective, baselines, source)
    lm = load(base, **dataclasses.asdict(held)) if base is not None else run.base if run is not None else None
    assert lm is not None
    finished = {} if run is None else run.targets()
    if done := [target.name for target in targets if target.name in finished]:
        report.say(f"done already, and left as they are: {', '.join(done)}")
    with training_progress(len(targets), config.steps) as on_progress:
        train_adapters(
            *(lm, targets, prompts, config, out),
            resume=resume,
            max_minutes=max_minutes,
            checkpoints=checkpoints,
            data=dataclasses.asdict(source),
            on_progress=on_progress,
        )
    show_problems(list({one.name: one for target in targets for one in target.objectives}.values()))
    show_training(Run(out))
