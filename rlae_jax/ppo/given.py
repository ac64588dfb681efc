"""Learning from given texts: the reward is the mixture's log-probability of them, and nothing is written.

    texts ─cut, read once─► Kept ─take─► rows [B, P] ─weights drawn─► Rollout ─log-probability─► `iteration.learn`

Each span's reward is log p(its tokens) under the weights that were drawn, less that under equal weights, in nats and
divided by the span's length: what is taken off depends on the text alone, so that it changes no comparison of weights.
Since the text is given, no decision has an effect on what is observed later. With a reward per span, undiscounted,
every span is therefore a problem of its own: a contextual bandit, whose rollouts have one step (`credit` "span").
"answer" gives the sum at the last span, as a written answer's reward comes.

Units: nats per token of the cut, and bits per byte of the text in UTF-8. A text's end token is not among its tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from rlae_jax import report, sharding
from rlae_jax.compilation import jit
from rlae_jax.config import PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.fusion.cutting import Cut, cut_texts
from rlae_jax.fusion.decode import act
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.kept import Kept, SpanRows, keep, span_log_probs
from rlae_jax.fusion.operators import linear
from rlae_jax.fusion.prompts import row_keys
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import Encoder
from rlae_jax.ppo import iteration as ppo
from rlae_jax.runs.directory import epoch_rows
from rlae_jax.tasks import Examples, Task

DIRECTORY = "texts"  # of a run's, where what was read is kept


def credit_of(config: PPOConfig) -> str:
    """Where the reward comes: "span" unless the settings say otherwise."""
    return config.credit or "span"


def check(ensemble: Ensemble, config: PPOConfig) -> None:
    """Raises an `InputError` for settings that given texts cannot be learnt from under."""
    if ensemble.fusion is not linear:
        raise InputError(
            "a reward by likelihood needs fusion linear: under another operator each weights' normaliser takes the "
            "log-probabilities of all tokens, which are not kept"
        )
    if config.agent.span_lengths:
        raise InputError("texts are read once, in spans of one length; leave span_lengths out")
    for name, what in (("engine", "is how answers are written"), ("length_cost", "is taken off for written tokens")):
        if getattr(config, name):
            raise InputError(f"{name} {what}, and a reward by likelihood reads given texts; leave it out")


def with_room_for_options(ensemble: Ensemble, task: Task) -> Task:
    """Of a task by likelihood whose examples have options, the task whose longest answer is its longest option in the
    ensemble's tokens."""
    options = {option for examples in task.splits.values() for own in examples.options or () for option in own}
    if not (task.by_likelihood and options):
        return task
    return dataclasses.replace(task, max_new_tokens=max(ensemble.lengths(ensemble.encode(sorted(options)))))


def bits_per_byte(nats: float | np.ndarray, size: float | np.ndarray) -> Any:
    """Of a log-probability in nats and a text's bytes."""
    return -nats / (math.log(2) * size)


def cut_examples(ensemble: Ensemble, task: Task, examples: Examples, most: int | None = None) -> Cut:
    """The right answers of examples, as they are to be read behind their prompts; see `cut_texts`."""
    return cut_texts(ensemble, examples.prompts, examples.texts(), task.cut, chat=task.chat, most=most)


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """What a run learns from and is scored on.

    Attributes:
      settings: of the compiled program, see `train`.
    """

    train: Kept
    dev: Kept
    config: PPOConfig
    settings: PPOConfig
    spec: DecodeSpec
    ensemble: Ensemble

    @functools.cached_property
    def rows_each(self) -> tuple[int, int]:
        """B and P of an iteration's rows, of one agent: as many spans as `config.prompts` texts have in the mean, one
        by one; or so many texts, with all their spans."""
        windows, prompts = len(self.train.cut.rows), self.config.prompts
        if credit_of(self.config) == "span":
            return prompts * -(-len(self.train) // windows), 1
        return prompts, int(np.bincount(self.train.window).max())

    @property
    def dev_prompts(self) -> int:
        """How many texts of dev are scored."""
        return len(self.dev.cut.bytes)

    def spans(self, seed: int, iteration: int) -> tuple[Int[np.ndarray, "B P"], Bool[np.ndarray, "B P"]]:
        """The spans that an agent looks at in an iteration, and which of them there are."""
        b, p = self.rows_each
        if p == 1 and credit_of(self.config) == "span":
            rows = epoch_rows(len(self.train), b, seed, iteration)[:, None]
            return rows, np.ones_like(rows, bool)
        counts = np.bincount(self.train.window)
        windows = epoch_rows(len(counts), b, seed, iteration)
        first, places = np.cumsum(counts) - counts, np.arange(p)[None]
        mask = places < counts[windows][:, None]
        return np.where(mask, first[windows][:, None] + places, first[windows][:, None]), mask

    def iterate(
        self, learner: ppo.LearnerState, seeds: Int[np.ndarray, " E"], iteration: int
    ) -> tuple[ppo.LearnerState, dict[str, Any], dict[str, float]]:
        """The learner after an iteration, and its metrics; in each of them bits per byte on dev."""
        spans, mask = (
            np.concatenate(leaves) for leaves in zip(*(self.spans(int(seed), iteration) for seed in seeds), strict=True)
        )
        rows: SpanRows = jax.tree.map(
            lambda leaf: leaf.reshape(*spans.shape, *leaf.shape[1:]), self.train.take(spans.reshape(-1))
        )
        rows, mask = sharding.place_rows((rows, mask), self.ensemble.mesh)
        learner, metrics = learn_from_given(learner, rows, mask, seeds, self.spec, self.settings)
        agents = [jax.tree.map(lambda leaf, e=e: leaf[e], learner.params) for e in range(len(seeds))]
        bits = bits_per_byte(self.nats(agents), self.dev.cut.bytes.sum()).astype(np.float32)
        return learner, metrics | {"dev_bits_per_byte": bits}, {}

    def nats(self, agents: Sequence[Any]) -> Float[np.ndarray, " E"]:
        """Of each agent, under its modes, the log-probability of all of dev."""
        return np.array([self.dev.log_likelihoods(self.spec.policy, params).sum() for params in agents])

    def scores(self, agents: Sequence[Any]) -> Float[np.ndarray, "E 1"]:
        """Of each agent the log-probability of dev, in nats per token."""
        each: Float[np.ndarray, " E"] = (self.nats(agents) / self.dev.tokens.sum()).astype(np.float32)
        return each[:, None]


def read(
    ensemble: Ensemble,
    task: Task,
    cuts: tuple[Cut, Cut],
    config: PPOConfig,
    settings: PPOConfig,
    spec: DecodeSpec,
    encoder: Encoder | None,
    directory: Path | None,
) -> Given:
    """What a run learns from and is scored on, read as far as it is not in the run's directory.

    Args:
      cuts: of train and of dev.
    """
    total, done, found = sum(len(cut.rows) for cut in cuts), 0, []
    with report.progress("reading texts", total, "texts") as update:
        for cut in cuts:
            before = done
            kept = keep(
                *(ensemble, cut, spec.policy.reads, spec.span_length),
                directory=directory,
                chat=task.chat,
                encoder=encoder,
                text_tokens=config.agent.text_tokens,
                on_progress=lambda n, before=before: update(before + n, ""),  # type: ignore[misc]
            )
            found.append(kept)
            done += len(cut.rows)
    return Given(found[0], found[1], config, settings, spec, ensemble)


@functools.partial(jit, static_argnames="config", donate_argnames="states")
def learn_from_given(
    states: ppo.LearnerState,
    rows: SpanRows,
    mask: Bool[Array, "EB P"],
    seeds: Integer[Array, " E"],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[ppo.LearnerState, dict[str, Array]]:
    """An iteration's draws, rewards and updates as one program.

    Args:
      states: leaves [E, ...].
      rows: E blocks of texts with P spans each, leaves [EB, P, ...].
      mask: which of the spans there are.
      spec: whose policy is one agent's, and which draws actions.
    """
    e = len(seeds)
    drawn = jax.vmap(functools.partial(_draw, spec=spec, config=config))(
        states.params, *sharding.split_blocks((rows, mask), e), seeds, states.iteration
    )
    experience, score, log_prob = drawn
    learnt, metrics = ppo.learn_all(states, experience, score, seeds, spec, config)
    metrics = {name: value for name, value in metrics.items() if name not in ("steps", "ended")}
    return learnt, metrics | {"reward": log_prob}


def _draw(
    params: Any, rows: SpanRows, mask: Array, seed: Array, iteration: Array, spec: DecodeSpec, config: PPOConfig
) -> tuple[ppo.Rollout, Float[Array, " BS"], Float[Array, ""]]:
    """One agent's decisions, `config.samples` for each span, with the score of each row and nats per token."""
    rows, mask = jax.tree.map(lambda leaf: jnp.repeat(leaf, config.samples, axis=0), (rows, mask))
    b, p = mask.shape
    flat: SpanRows = jax.tree.map(lambda leaf: leaf.reshape(b * p, *leaf.shape[2:]), rows)
    span = act(params, flat.observation, row_keys(ppo.iteration_keys(seed, iteration)[0], b * p), spec)
    k = flat.log_probs.shape[-1]
    log_probs = span_log_probs(flat, span.weights)
    gains = (log_probs - span_log_probs(flat, jnp.full((1, k), 1.0 / k))) / spec.span_length
    real = mask.reshape(-1)
    length = jnp.where(real, flat.length, 0)
    shaped: Any = jax.tree.map(
        lambda leaf: leaf.reshape(b, p, *leaf.shape[1:]),
        (flat.observation, span.action, span.weights, span.log_prob, span.value),
    )
    observation, action, weights, log_prob, value = shaped
    steps = length.reshape(b, p).sum(axis=1)
    experience = ppo.Rollout(
        observation=observation,
        action=action,
        weights=weights,
        log_prob=log_prob,
        value=value,
        mask=mask,
        tokens=jnp.zeros((b, 1), jnp.int32),
        steps=steps,
        ended=jnp.ones((b,), bool),
    )
    score = jnp.sum(jnp.where(real, gains, 0.0).reshape(b, p), axis=1)
    total = jnp.sum(jnp.where(real, log_probs, 0.0)) / jnp.maximum(jnp.sum(length), 1).astype(jnp.float32)
    return experience, score, total
