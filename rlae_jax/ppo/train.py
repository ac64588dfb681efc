"""The training loop: an ensemble, a task or several, and settings in; a trained policy and a run directory out.

    runs/x/config.json       settings, members, task: what decides whether a directory belongs to a run
          metrics.jsonl      a line per iteration
          checkpoints/       the newest state, which holds the agents that were best on dev
          texts/             of a reward by likelihood: what the members say about the texts

A run on several tasks has rows of all of them in each iteration (`iteration`: how their rewards are made alike), and
chooses on dev by the mean over the tasks of the share of the room that was taken: (score - that of the untrained agent)
/ (1 - that of the untrained agent). Of plain scores the tasks with much to gain would decide alone. The room counts as
at least `SMALLEST_ROOM`, since on a task that is nearly done it is chance what little is won or lost.

A run trains E agents of different seeds side by side, most often one. Every iteration is a function of (state,
settings, its own number), so that a run that was killed and resumed ends with the same parameters as one that was not.
"""

import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NotRequired

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Array, Float, Int

from rlae_jax import hosts, memory, ranges, records, sharding
from rlae_jax.config import ALGORITHMS, PPOConfig
from rlae_jax.errors import InputError
from rlae_jax.fusion.cutting import Cut
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.operators import FusionOperator
from rlae_jax.fusion.policy import BoundPolicy, Dims
from rlae_jax.fusion.prompts import Row
from rlae_jax.fusion.reading import Text, read_prompts
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers
from rlae_jax.models import Encoder, finite, load_encoder
from rlae_jax.ppo import given as given_texts
from rlae_jax.ppo import iteration as ppo
from rlae_jax.ranges import Minutes
from rlae_jax.runs import lock
from rlae_jax.runs.checkpoints import Checkpoints
from rlae_jax.runs.directory import (
    OnDevices,
    claim_directory,
    devices,
    epoch_rows,
    is_late,
    read_config,
)
from rlae_jax.runs.metrics import FILE_NAME as METRICS_FILE
from rlae_jax.runs.metrics import Line, MetricsLog, load_sinks, read_metrics
from rlae_jax.signals import stop_requests
from rlae_jax.tasks import Examples, RewardPools, Task, joined

UNION_FILE = "union.npz"  # of members with different tokenizers
SMALLEST_ROOM = 0.25
_EVALUATION_ROWS = 256
_LARGEST_SIZE = 2**20  # of what a run's file says: an agent is made of it
_Size = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST_SIZE)]


class TrainState(NamedTuple):
    """What a checkpoint holds; every leaf has a leading E axis."""

    learner: ppo.LearnerState
    best: Any  # each agent's parameters when it was best on dev
    best_dev: Float[Array, " E"]  # by which it was the best then; -inf before the first


@dataclasses.dataclass(frozen=True)
class TrainProgress:
    """What the loop reports after each iteration."""

    iteration: int
    metrics: dict[str, Any]
    problems: str = ""  # what went wrong so far with rewards, in a few lines


class SplitMark(records.Record):
    """What tells a split's content."""

    n: records.Count
    sha256: str


class MemberMark(records.Record):
    """What tells a member, and the width of what an agent sees of it."""

    name: str
    width: _Size
    sha256: str


class Setup(OnDevices, kw_only=True):
    """What a run with agents depends on besides its settings, and where it ran.

    Attributes:
      task: its name; of several "A + B", and the names of `examples` are then such as "A/train".
      spans: that the agent's embedding holds.
      text_width: of what an encoder makes of the text; 0 without one.
      cut: of a reward by likelihood, the rule by which texts are cut; None where answers are written.
    """

    algorithm: Annotated[str, records.one_of(ALGORITHMS)]
    task: str
    examples: dict[str, SplitMark]
    members: Annotated[list[MemberMark], msgspec.Meta(min_length=1)]
    fusion: str
    end_ids: list[list[int]]
    spans: _Size
    text_width: Annotated[int, msgspec.Meta(ge=0, le=_LARGEST_SIZE)]
    preset: str
    checkpoints: records.Place | None = None
    cut: str | None = None


class AgentRun(Setup, kw_only=True):
    """The content of config.json of a training run: everything that its result depends on, and where it ran."""

    settings: PPOConfig

    def __post_init__(self) -> None:
        kind = ALGORITHMS[self.algorithm]
        if type(self.settings) is not kind:
            values = {field.name: getattr(self.settings, field.name) for field in dataclasses.fields(self.settings)}
            self.settings = kind(**values)

    @property
    def dims(self) -> Dims:
        """The sizes that its agents were made for."""
        return Dims(tuple(member.width for member in self.members), self.spans, self.text_width)


class RewardLine(Line):
    """What is used of a line of a training run's metrics. Of several tasks there are means over them, each one's, and
    in `dev_gain` what the best agent is chosen by."""

    reward: float
    dev: NotRequired[records.Finite]
    reward_of_tasks: NotRequired[dict[str, records.Finite]]
    dev_of_tasks: NotRequired[dict[str, records.Finite]]
    dev_gain: NotRequired[records.Finite]
    dev_bits_per_byte: NotRequired[records.Finite]


def setup(
    ensemble: Ensemble,
    tasks: Sequence[Task],
    config: PPOConfig,
    spec: DecodeSpec,
    checkpoints: str | None = None,
) -> dict[str, Any]:
    """The fields of `Setup`."""
    return {
        "algorithm": config.algorithm,
        "task": name_of(tasks),
        "examples": {
            split if len(tasks) == 1 else f"{task.name}/{split}": SplitMark(n=len(examples), sha256=examples.digest())
            for task in tasks
            for split, examples in task.splits.items()
        },
        "members": [
            MemberMark(name=lm.name, width=lm.config.hidden_width, sha256=mark)
            for lm, mark in zip(ensemble.members, ensemble.fingerprints, strict=True)
        ],
        "fusion": fusion_name(ensemble.fusion),
        "end_ids": [list(ids) for ids in ensemble.member_ends],
        "spans": max(spec.spans, config.agent.max_spans),
        "text_width": spec.dims.text,
        "preset": config.preset,
        "checkpoints": checkpoints,
        "cut": tasks[0].cut if tasks[0].by_likelihood else None,
        **devices(sharding.describe(ensemble.mesh)),
    }


def name_of(tasks: Sequence[Task]) -> str:
    """What a run on these tasks calls what it is trained on."""
    return " + ".join(task.name for task in tasks)


def fusion_name(fusion: FusionOperator) -> str:
    """What a run's configuration calls an operator."""
    return repr(fusion) if dataclasses.is_dataclass(fusion) else getattr(fusion, "__name__", "custom")


def check_members(run: str | os.PathLike[str], ensemble: Ensemble) -> None:
    """Warns if an ensemble's members are not those that a run's agents were trained with, or are fused otherwise: the
    weights of joint agents go by place, and set agents do not read the hidden states of members that they do not know.

    Raises:
      InputError: what `read_run` raises.
    """
    made = read_run(run)
    fusions = [name.removesuffix("()").lower() for name in (made.fusion, fusion_name(ensemble.fusion))]
    if fusions[0] != fusions[1]:
        warnings.warn(f"{run} was trained with fusion {fusions[0]}; here it is {fusions[1]}", stacklevel=2)
    given = [(lm.name, mark) for lm, mark in zip(ensemble.members, ensemble.fingerprints, strict=True)]
    known = [(member.name, member.sha256) for member in made.members]
    if [mark for _, mark in given] == [mark for _, mark in known]:
        return
    of_run, of_ensemble = (", ".join(name for name, _ in members) for members in (known, given))
    agent = made.settings.agent
    if agent.network == "set":
        new = ", ".join(name for name, mark in given if mark not in dict(known).values())
        how = " (read without hidden states)" if "hidden" in agent.reads else ""
        if new:
            warnings.warn(f"{run} was trained with {of_run}; new to its agent: {new}{how}", stacklevel=2)
        return
    order = sorted(mark for _, mark in given) == sorted(mark for _, mark in known)
    why = "in another order" if order else "these are others, even where names are alike, or an older version trained"
    warnings.warn(f"{run} was trained with {of_run}; given are {of_ensemble}: {why}", stacklevel=2)


def require_together(tasks: Sequence[Task], span_length: int | None = None) -> None:
    """Raises an `InputError` for tasks that one run cannot be on.

    Args:
      span_length: of all of them; None leaves each its own.
    """
    if not tasks:
        raise InputError("no task: give at least one")
    if read := [task.name for task in tasks if task.by_likelihood and len(tasks) > 1]:
        raise InputError(f"{read[0]} is learnt from by likelihood, and so is one task alone; train on it by itself")
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"task {twice[0]} is given twice; tasks that are trained on together need names of their own")
    first = tasks[0]
    for task in tasks[1:]:
        if span_length is None and task.span_length != first.span_length:
            raise InputError(
                f"weights are held for {first.span_length} steps in {first.name} and for {task.span_length} in "
                f"{task.name}; give one length for all tasks (span_length, --span-length)"
            )
        if task.chat != first.chat:
            chat, plain = (task, first) if task.chat else (first, task)
            raise InputError(
                f"prompts of {chat.name} go through the members' chat templates and those of {plain.name} do not; "
                "train on tasks of one kind together"
            )


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split, tokenised once; of several tasks theirs, one after another."""

    examples: Examples
    tasks: Int[np.ndarray, " N"]  # which task an example is of
    limits: Int[np.ndarray, " N"]  # its longest answer
    rows: list[Row]  # as `Ensemble.encode` gives them
    references: list[list[int]]  # empty lists where the reward is computed from text
    text: Text | None  # the prompts as the agent's encoder reads them

    def batch(self, ensemble: Ensemble, places: Sequence[int] | np.ndarray, spec: DecodeSpec) -> ppo.Batch:
        """Some of its examples, for one iteration."""
        references = [self.references[i] for i in places]
        lengths = np.array([len(reference) for reference in references], np.int32)
        padded = np.zeros((len(references), max(int(lengths.max()), 1)), np.int32)
        for b, reference in enumerate(references):
            padded[b, : len(reference)] = reference
        rows = [self.rows[i] for i in places]
        text, limits = self.read_text(places), self.limits[np.asarray(places)]
        prompts = ensemble.prompts(rows, spec, batch=len(rows), limits=limits, text=text)
        return sharding.place_rows(ppo.Batch(prompts, padded, lengths), ensemble.mesh)

    def read_text(self, places: Any) -> Text | None:
        """What the agent's encoder reads of some of them."""
        text: Text | None = jax.tree.map(lambda leaf: leaf[np.asarray(places)], self.text)
        return text

    def of_iteration(self, config: PPOConfig, seed: int, iteration: int) -> Int[np.ndarray, " B"]:
        """The examples of an agent's iteration, the tasks' one after another. Every task has passes of its own."""
        sizes = np.bincount(self.tasks)
        parts = zip(np.cumsum(sizes) - sizes, sizes, config.task_prompts, strict=True)
        return np.concatenate([start + epoch_rows(int(n), b, seed, iteration) for start, n, b in parts])


def _tokenise(
    ensemble: Ensemble,
    tasks: Sequence[Task],
    split: str,
    limit: int | None,
    config: PPOConfig,
    encoder: Encoder | None,
) -> _Split:
    """A split of all tasks.

    Args:
      limit: examples of each.
    """
    parts = [task.split(split) for task in tasks]
    if limit is not None:
        parts = [examples.take(limit) for examples in parts]
    examples = parts[0] if len(parts) == 1 else joined(parts)
    sizes = [len(part) for part in parts]
    rows = ensemble.encode(examples.prompts, chat=tasks[0].chat)
    limits = np.repeat([config.max_new_tokens or task.max_new_tokens for task in tasks], sizes).astype(np.int32)
    ensemble.check_lengths(ensemble.lengths(rows), int(limits.max()))
    references: list[list[int]] = [[] for _ in rows]
    if rewards_tokens(ensemble, tasks):
        references = ensemble.tokenizer(list(examples.references), add_special_tokens=False)["input_ids"]
    text = None
    if encoder is not None:
        text = read_prompts(examples.prompts, encoder, ensemble.reader(encoder), config.agent.text_tokens)
    return _Split(examples, np.repeat(np.arange(len(tasks)), sizes), limits, rows, references, text)


def rewards_tokens(ensemble: Ensemble, tasks: Sequence[Task]) -> bool:
    """Whether rewards are computed from ids on the device. With different tokenizers a text has many spellings."""
    return all(task.token_reward for task in tasks) and ensemble.union is None


def train(
    ensemble: Ensemble,
    task: Task | Sequence[Task],
    config: PPOConfig | None = None,
    out: str | os.PathLike[str] = "runs/train",
    *,
    resume: bool = False,
    max_minutes: Minutes | None = None,
    log_to: Sequence[str] = (),
    checkpoints: str | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> BoundPolicy:
    """Trains a weight agent with PPO (or, with a `MAPPOConfig`, one per member) and returns what was best on dev.

    Where the task's reward can be computed from tokens, an iteration is one XLA program; otherwise the reward is called
    between two.

    Args:
      ensemble: members with a tokenizer.
      task: or several, of which each has its share (`PPOConfig.shares`, by default all alike) of an iteration's prompts
        and an equal part of the dev prompts that are scored.
      config: settings; `span_length` and `max_new_tokens` default to the task's. Of several tasks each keeps its own
        longest answer, but all need one length of spans.
      out: the run's directory.
      resume: continue the run in `out` (or begin it, if there is none).
      max_minutes: after this long the run stops, with a checkpoint from which it can be resumed.
      log_to: "tensorboard", "wandb": where metrics go besides metrics.jsonl.
      checkpoints: where they go, if not into `out`: a directory of this run alone, or a bucket's URL.
      on_progress: called after every iteration.

    Raises:
      InputError: prompts that do not fit, members that an engine cannot run, a directory that belongs to another run,
        tasks that do not go together. Told before any training.
      Interrupted: Ctrl-C; the state was saved and `resume=True` goes on from it. `Preempted` where SIGTERM or the
        platform stopped it.
    """
    if config is not None and config.seeds > 1:
        raise InputError("train returns one policy; use train_seeds for several seeds")
    (policy,) = train_seeds(
        ensemble,
        task,
        config,
        out,
        resume=resume,
        max_minutes=max_minutes,
        log_to=log_to,
        checkpoints=checkpoints,
        on_progress=on_progress,
    )
    return policy


@lock.writes("out")
def train_seeds(
    ensemble: Ensemble,
    task: Task | Sequence[Task],
    config: PPOConfig | None = None,
    out: str | os.PathLike[str] = "runs/train",
    *,
    resume: bool = False,
    max_minutes: Minutes | None = None,
    log_to: Sequence[str] = (),
    checkpoints: str | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda progress: None,
) -> list[BoundPolicy]:
    """As `train`, for `config.seeds` agents in one program: agent e is what seed `config.seed` + e alone gives."""
    ranges.check_arguments(train_seeds, max_minutes=max_minutes)
    config = PPOConfig() if config is None else config
    tasks = [task] if isinstance(task, Task) else list(task)
    require_together(tasks, config.span_length)
    given, config = config, settled(config, tasks)
    span_length, max_new_tokens = config.span_length, config.max_new_tokens
    assert span_length is not None
    assert max_new_tokens is not None
    out = Path(out)
    done = max((row["iteration"] for row in read_metrics(out)), default=0) if resume else 0
    if done > config.iterations:
        raise InputError(
            f"{out} has done {done} iterations already; to go on give at least that, not {config.iterations}"
        )
    sharding.check_rows("prompts", config.prompts, ensemble.mesh)
    if config.engine and any(lm.config.encoder is not None for lm in ensemble.members):
        raise InputError("an engine writes answers of decoders; train encoder-decoders without engine (--engine)")
    encoder = None if config.agent.encoder is None else load_encoder(config.agent.encoder, mesh=ensemble.mesh)
    cuts: tuple[Cut, Cut] | None = None
    if tasks[0].by_likelihood:
        cuts = _cut(ensemble, tasks[0], config, given.max_new_tokens)
        room = given_texts.with_room_for_options(ensemble, tasks[0]).max_new_tokens
        max_new_tokens = max(max_new_tokens, room, *(cut.longest for cut in cuts))
        config = dataclasses.replace(config, max_new_tokens=max_new_tokens)
    elif config.credit == "span":
        raise InputError('a written answer has one reward, at its end: credit "span" needs a reward by likelihood')
    spec = ensemble.spec(
        policy=ppo.make_policy(config),
        span_length=span_length,
        max_new_tokens=max_new_tokens,
        temperature=config.temperature,
        sample_weights=True,
        record=True,
        chat=tasks[0].chat,
        reader=None if encoder is None else ensemble.reader(encoder),
    )
    dims = spec.dims._replace(spans=max(spec.spans, config.agent.max_spans))
    _require_memory(ensemble, config, spec, dims, cuts)
    splits: tuple[_Split, _Split] | None = None
    if cuts is None:
        train_split = _tokenise(ensemble, tasks, "train", None, given, encoder)
        splits = train_split, _tokenise(ensemble, tasks, "dev", -(-config.dev_prompts // len(tasks)), given, encoder)
    load_sinks(log_to)  # told before anything is written
    claimed = AgentRun(**setup(ensemble, tasks, config, spec, checkpoints), settings=config)
    claim_directory(out, claimed, resume=resume, shared=not checkpoints)
    if ensemble.union is not None and hosts.is_first():
        ensemble.union.save(out / UNION_FILE)

    state, seeds = sharding.whole(_fresh(config, dims), ensemble.mesh), _seeds(config)
    static = _shaping(config)
    saved = Checkpoints(out, checkpoints)
    newest = saved.newest()
    if newest is not None and not resume:
        raise InputError(f"{saved.path} holds checkpoints: resume (--resume, resume=True) or choose another place")
    if newest is not None:
        _, state = saved.restore(sharding.abstract(state, ensemble.mesh), going_on=True)
    first = int(state.learner.iteration[0])
    _tell_missing_lines(out, first)
    log = MetricsLog(out, first, sinks=log_to)
    began = time.monotonic()
    names_of_tasks = [task.name for task in tasks]

    try:
        rewards = RewardPools({task.name: task.reward for task in tasks})
        with sharding.use(ensemble.mesh), rewards as pool, stop_requests() as stop_requested:
            source: _Written | given_texts.Given
            if splits is not None:
                source = _Written(ensemble, tasks, pool, *splits, config, static, spec)
            else:
                assert cuts is not None
                place = out / given_texts.DIRECTORY
                source = given_texts.read(ensemble, tasks[0], cuts, config, static, spec, encoder, place)

            def dev_scores(learner: ppo.LearnerState) -> Float[np.ndarray, "E M"]:
                """Every agent's mean on each task's dev prompts."""
                return source.scores([_nth(learner.params, e) for e in range(config.seeds)])

            untrained: Float[np.ndarray, "E M"] | None = None
            for iteration in range(first, config.iterations):
                started = time.perf_counter()
                learner, metrics, phases = source.iterate(state.learner, seeds, iteration)
                names = [f"the agent of seed {seed}" for seed in seeds]
                finite.check_trained(
                    *(learner.params, names, f"iteration {iteration + 1} in {out}"),
                    unchecked=not all(lm.check_finite for lm in ensemble.members),
                )
                state = state._replace(learner=learner)
                values = _values(jax.device_get(metrics), names_of_tasks)
                values["seconds"] = took = time.perf_counter() - started
                values |= phases and phases | {"update_seconds": took - sum(phases.values())}
                problems = hosts.gather(list(pool.problems))
                values["failed_rewards"] = sum(n for n, _ in problems)
                done = iteration + 1
                late = is_late(began, time.monotonic(), max_minutes)
                stop = stop_requested()
                # A run that is stopped is not scored for that: what resumes it would choose among other agents.
                scored = late or done % config.eval_every == 0 or done == config.iterations
                if scored:
                    started = time.perf_counter()
                    scores = dev_scores(state.learner)
                    chosen_by = scores.mean(axis=1, dtype=np.float32)
                    values |= _values({"dev": chosen_by}, names_of_tasks)
                    if len(tasks) > 1:
                        if untrained is None:
                            fresh = sharding.whole(_fresh(config, dims), ensemble.mesh)
                            untrained = dev_scores(fresh.learner)
                        chosen_by = gain(scores, untrained)
                        values |= _values({"dev_gain": chosen_by, "dev_of_tasks": scores}, names_of_tasks)
                    values |= {"dev_prompts": source.dev_prompts, "dev_seconds": time.perf_counter() - started}
                    state = _keep_best(state, chosen_by)
                # In this order a run killed between the two loses nothing: lines after the newest checkpoint are
                # forgotten on resuming, but one before it would never be written again.
                log.write(done, values)
                if scored or stop is not None:
                    saved.save(done, state)
                on_progress(TrainProgress(done, values, "\n".join(told for _, told in problems if told)))
                if stop is not None and done < config.iterations:
                    raise stop(f"{stop.what} after iteration {done} of {config.iterations}; saved in {out}")
                if late:
                    break
    finally:
        log.close()
        saved.close()
    agents = [_best(state, e) for e in range(config.seeds)]
    return [_bound(config, params, dims, encoder, ensemble.fingerprints) for params in agents]


def settled(config: PPOConfig, tasks: Sequence[Task]) -> PPOConfig:
    """The settings with what they take from the tasks.

    Raises:
      InputError: not a share per task.
    """
    shares = config.shares or (1.0,) * len(tasks)
    if len(shares) != len(tasks):
        raise InputError(
            f"{len(shares)} shares for {name_of(tasks)}; give one per task, or none for equal ones (--task-shares)"
        )
    longest = max(task.max_new_tokens for task in tasks)
    return dataclasses.replace(
        config,
        shares=shares if len(tasks) > 1 else (),
        span_length=config.span_length or tasks[0].span_length,
        max_new_tokens=config.max_new_tokens or longest,
        eval_prompts=config.dev_prompts,
    )


def gain(scores: Float[np.ndarray, "E M"], untrained: Float[np.ndarray, "E M"]) -> Float[np.ndarray, " E"]:
    """The mean over M tasks of the share of the room above an untrained agent's score that was taken."""
    room = np.maximum(1.0 - untrained, SMALLEST_ROOM)
    gained: Float[np.ndarray, " E"] = ((scores - untrained) / room).mean(axis=1, dtype=np.float32)
    return gained


def _bound(
    config: PPOConfig, params: Any, dims: Dims, encoder: Encoder | None, members: tuple[str, ...]
) -> BoundPolicy:
    # Wherever they were trained, they are to be used anywhere.
    params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params)
    assert config.span_length is not None
    return BoundPolicy(
        ppo.make_policy(config),
        params,
        dims,
        config.span_length,
        encoder=encoder,
        text_tokens=config.agent.text_tokens,
        members=members,
    )


def _tell_missing_lines(out: Path, done: int) -> None:
    """Warns of metrics that are not those of all iterations up to a checkpoint: a file that was cut."""
    known = {row["iteration"] for row in read_metrics(out)} if hosts.is_first() else set()
    missing = [i for i in range(1, done + 1) if i not in known]
    if known and missing:  # nothing is known where only the checkpoints, elsewhere, are left
        which = f"{missing[0]} to {missing[-1]}" if len(missing) > 1 else f"{missing[0]}"
        warnings.warn(
            f"{out / METRICS_FILE}: lines of iterations {which} are missing; the file was cut, and the run goes on "
            "without them",
            stacklevel=3,
        )


def _cut(ensemble: Ensemble, task: Task, config: PPOConfig, most: int | None) -> tuple[Cut, Cut]:
    """The texts of train and of as much of dev as is scored, in windows of `most` tokens."""
    given_texts.check(ensemble, config)
    splits = task.split("train"), task.split("dev").take(config.dev_prompts)
    train, dev = (given_texts.cut_examples(ensemble, task, own, most) for own in splits)
    return train, dev


def _require_memory(
    ensemble: Ensemble, config: PPOConfig, spec: DecodeSpec, dims: Dims, cuts: tuple[Cut, Cut] | None
) -> None:
    """Raises an `InputError` where an iteration, or the agents, cannot be held."""
    answers = config.prompts * config.samples
    together = (config.engine_slots or answers) * config.seeds
    remedy = "give fewer --prompts, --samples or --seeds, or a lower --max-new-tokens"
    if cuts is None:
        ensemble.require_memory(together, spec.max_new_tokens, remedy)
    seen = sum(dims.widths) if "hidden" in config.agent.reads else 1
    seen += dims.members**2 if "agreement" in config.agent.reads else 0
    decisions = answers * config.seeds * spec.spans
    of_decisions = 4 * decisions * (seen + config.epochs)  # what was seen, and the orders in which it is learnt from
    memory.require(
        of_decisions, f"{decisions:,} decisions of an iteration", f"{remedy}, or fewer epochs", ensemble.mesh
    )
    alone = jax.eval_shape(functools.partial(_fresh, dataclasses.replace(config, seeds=1), dims))
    of_agent = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(alone))
    what, smaller = f"{config.seeds:,} agents of these widths", "give smaller ones (agent.projection, agent.ffn_width)"
    memory.require(of_agent * config.seeds, what, f"{smaller}, or fewer --seeds", ensemble.mesh)


def _seeds(config: PPOConfig) -> Int[np.ndarray, " E"]:
    return np.uint32(config.seed) + np.arange(config.seeds, dtype=np.uint32)


def _fresh(config: PPOConfig, dims: Dims) -> TrainState:
    """The state before the first iteration."""
    learner = ppo.init_learners(_seeds(config), ppo.make_policy(config), dims, config)
    best = jax.tree.map(jnp.copy, learner.params)  # the programs take the learner's buffers
    return TrainState(learner, best, jnp.full((config.seeds,), -jnp.inf))


def _shaping(config: PPOConfig) -> PPOConfig:
    """What compiled programs depend on; the rest may change without compiling again."""
    iterations = 1 if config.schedule == "constant" else config.iterations
    return dataclasses.replace(config, iterations=iterations, eval_every=1, eval_prompts=1, seed=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _Written:
    """What a run whose answers are written learns from and is scored on; `given.Given` is the other kind.

    Attributes:
      settings: of the compiled program, see `_shaping`.
    """

    ensemble: Ensemble
    tasks: Sequence[Task]
    pool: RewardPools
    train: _Split
    dev: _Split
    config: PPOConfig
    settings: PPOConfig
    spec: DecodeSpec

    @property
    def dev_prompts(self) -> int:
        """How many of dev are scored."""
        return len(self.dev.rows)

    def iterate(
        self, learner: ppo.LearnerState, seeds: Int[np.ndarray, " E"], iteration: int
    ) -> tuple[ppo.LearnerState, dict[str, Array], dict[str, float]]:
        """See `_iterate`."""
        rows = np.concatenate([self.train.of_iteration(self.config, int(seed), iteration) for seed in seeds])
        return _iterate(
            self.ensemble, self.tasks, self.pool, self.train, rows, learner, seeds, self.spec, self.settings
        )

    def scores(self, agents: Sequence[Any]) -> Float[np.ndarray, "E M"]:
        """Every agent's mean reward on each task's dev prompts."""
        each = [_dev_scores(self.ensemble, self.tasks, self.pool, self.dev, agent, self.spec) for agent in agents]
        scores, of_tasks = np.stack(each), [self.dev.tasks == t for t in range(len(self.tasks))]
        return np.stack([scores[:, own].mean(axis=1) for own in of_tasks], axis=1)


def _iterate(
    ensemble: Ensemble,
    tasks: Sequence[Task],
    pool: RewardPools,
    split: _Split,
    rows: Int[np.ndarray, " EB"],
    learner: ppo.LearnerState,
    seeds: Int[np.ndarray, " E"],
    spec: DecodeSpec,
    config: PPOConfig,
) -> tuple[ppo.LearnerState, dict[str, Array], dict[str, float]]:
    """The learner after an iteration, its metrics, and the seconds of what came before the update, where that is not in
    one program with it."""
    began = time.perf_counter()
    batch = split.batch(ensemble, rows, spec)
    if rewards_tokens(ensemble, tasks):
        after: tuple[ppo.LearnerState, dict[str, Array]] = ppo.iterate(
            learner, ensemble.params, batch, seeds, spec, config
        )
        return *after, {}
    iteration = learner.iteration[0]
    experience = ppo.rollout_for_text(learner.params, ensemble.params, batch, seeds, iteration, spec, config)
    # Every process reads and rewards the answers that lie on its devices.
    n = len(rows) * config.samples
    own = sharding.own_rows(n, ensemble.mesh)
    answered = np.repeat(rows, config.samples)[own]
    which = split.tasks[answered]
    texts = _texts(ensemble, [tasks[t] for t in which], [split.rows[i] for i in answered], experience)
    asked, references = (
        [column[i] for i in answered] for column in (split.examples.prompts, split.examples.references)
    )
    written = time.perf_counter()
    rewards = hosts.join(pool.submit(which, asked, texts, references)(), own, n)
    scores = sharding.place_rows(rewards, ensemble.mesh)
    phases = {"rollout_seconds": written - began, "reward_seconds": time.perf_counter() - written}
    learnt: tuple[ppo.LearnerState, dict[str, Array]] = ppo.learn_from_text(
        learner, experience, scores, seeds, spec, config
    )
    return *learnt, phases


def _nth(tree: Any, e: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[e], tree)


def _best(state: TrainState, e: int) -> Any:
    """An agent's parameters: its best ones on dev, or its newest where a run was stopped before any were scored."""
    return _nth(state.best if np.isfinite(state.best_dev[e]) else state.learner.params, e)


def _values(metrics: dict[str, Float[np.ndarray, "E ..."]], tasks: Sequence[str]) -> dict[str, Any]:
    """Means over the agents, of each task where there are several, and of the scores also every agent's own."""
    values: dict[str, Any] = {name: np.mean(value, axis=0).tolist() for name, value in metrics.items()}
    values |= {name: dict(zip(tasks, value, strict=True)) for name, value in values.items() if isinstance(value, list)}
    for name in ("reward", "dev", "dev_gain", "dev_bits_per_byte"):
        if name in metrics and len(metrics[name]) > 1:
            values[f"{name}_per_seed"] = [float(value) for value in metrics[name]]
    return values


def _keep_best(state: TrainState, dev: Float[np.ndarray, " E"]) -> TrainState:
    """Each agent's parameters become its best ones if they are; of equally good ones the first stay."""
    better = dev > state.best_dev

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)

    best = jax.tree.map(choose, state.learner.params, state.best)
    return state._replace(best=best, best_dev=jnp.maximum(state.best_dev, dev))


def _texts(
    ensemble: Ensemble, tasks: Sequence[Task], prompts: Sequence[Row], experience: ppo.Rollout | Answers
) -> list[str]:
    """The answers to prompts of these tasks, up to the first of the task's stop strings. A rollout goes on behind one;
    what the agent decides there has no effect on the reward."""
    tokens, steps, ended = sharding.fetch_own_rows((experience.tokens, experience.steps, experience.ended))
    written = [row[: n - int(end)].tolist() for row, n, end in zip(tokens, steps, ended, strict=True)]
    texts = ensemble.decode(prompts, written)
    for b, task in enumerate(tasks):
        for stop in task.stop:
            texts[b] = texts[b].split(stop, 1)[0]
    return texts


def _dev_scores(
    ensemble: Ensemble, tasks: Sequence[Task], pool: RewardPools, dev: _Split, policy_params: Any, spec: DecodeSpec
) -> Float[np.ndarray, " B"]:
    """Rewards on dev of greedy answers under the policy's modes. Scoring goes on while the next rows are decoded."""
    options: dict[str, Any] = {"span_length": spec.span_length, "max_new_tokens": spec.max_new_tokens}
    greedy = ensemble.spec(policy=spec.policy, reader=spec.reader, chat=tasks[0].chat, **options)
    pending = []
    for start in range(0, len(dev.rows), _EVALUATION_ROWS):
        part = slice(start, start + _EVALUATION_ROWS)
        text = dev.read_text(np.arange(len(dev.rows))[part])
        which = dev.tasks[part]
        answers = ensemble.run(dev.rows[part], policy_params, 0, greedy, limits=dev.limits[part], text=text)
        texts = _texts(ensemble, [tasks[t] for t in which], dev.rows[part], answers)
        pending.append(pool.share(which, dev.examples.prompts[part], texts, dev.examples.references[part]))
    return np.concatenate([scores() for scores in pending])


def read_run(run: str | os.PathLike[str]) -> AgentRun:
    """The configuration of a training run: its settings, its members, the sizes that its agents were made for.

    Raises:
      InputError: not the directory of a training run.
    """
    return read_config(Path(run), AgentRun)


def load_policy(run: str | os.PathLike[str], *, seed: int | None = None, newest: bool = False) -> BoundPolicy:
    """The policy of a run directory: what was best on dev, or the newest.

    Args:
      seed: of a run that trained several; by default the one that was best on dev.

    Raises:
      InputError: not a run directory, no checkpoint in it, one that does not fit its configuration, no such seed.
    """
    known = read_run(run)
    config, dims = known.settings, known.dims
    if seed is not None and not config.seed <= seed < config.seed + config.seeds:
        last = config.seed + config.seeds - 1
        raise InputError(f"{run} has no agent of seed {seed}; its seeds are {config.seed} to {last}")
    checkpoints = Checkpoints(Path(run), known.checkpoints, reading=True)
    try:
        if checkpoints.newest() is None:
            raise InputError(f"{run}: no checkpoint yet; resume the run")
        shapes = jax.eval_shape(functools.partial(_fresh, config, dims))
        state = sharding.to_host(checkpoints.restore(sharding.abstract(shapes, None))[1])
    finally:
        checkpoints.close()
    e = int(np.argmax(state.best_dev)) if seed is None else seed - config.seed
    params = _nth(state.learner.params, e) if newest else _best(state, e)
    encoder = None if config.agent.encoder is None else load_encoder(config.agent.encoder)
    return _bound(config, params, dims, encoder, tuple(member.sha256 for member in known.members))
