"""Fine-tuning in rounds: adapters, objectives and prompts in; a directory per adapter out.

    runs/x/config.json                  base, prompts and settings, which all adapters of the run share
           stack.json                   while adapters are in training: which, and their last common checkpoint
           objectives/NAME/config.json  what this adapter is taught
                           metrics.jsonl, checkpoints/
                           adapter/     the adapter in PEFT's format, once it is done: the best on dev
                           training.json  what it cost

A round is `validate_every` steps of all adapters that have not converged, as one stack, and a validation. Everything
that an adapter meets (its prompts' order, its keys, its dropout) is a function of its own name, seed and step: it
learns the same whichever others are in the stack, but for how numbers are rounded. So an objective can be added to a
run whenever one likes. After an interruption all go on from the last checkpoint that each of them has, so that the
stacks are those of a run without one, and the results the same to the last bit.
"""

import dataclasses
import functools
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
from jaxtyping import Int

from rlae_jax import files, hosts, ranges, records, sharding
from rlae_jax.emorl import fine_tune, scorers
from rlae_jax.emorl.dynaopt import DynaOpt
from rlae_jax.emorl.fine_tune import EMORLConfig, Samples, TrainingState
from rlae_jax.emorl.scorers import Objective
from rlae_jax.errors import InputError
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.prompts import Prompts, Row
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import LM, Adapter, finite, init_adapter, lora, peft_files, save_adapter
from rlae_jax.models.lm import load_adapter
from rlae_jax.ranges import Minutes
from rlae_jax.runs import lock
from rlae_jax.runs.checkpoints import Checkpoints
from rlae_jax.runs.directory import (
    CONFIG_FILE,
    OnDevices,
    RunConfig,
    claim_directory,
    devices,
    epoch_rows,
    is_late,
)
from rlae_jax.runs.metrics import FILE_NAME as METRICS_FILE
from rlae_jax.runs.metrics import Line, MetricsLog, read_metrics
from rlae_jax.signals import stop_requests
from rlae_jax.tasks.prompts import PromptSet

OBJECTIVES = "objectives"
TRAINING_FILE = "training.json"
STACK_FILE = "stack.json"
ADAPTER = "adapter"
# What an interruption may cost. On a small model a checkpoint takes longer than a step.
_SECONDS_BETWEEN_CHECKPOINTS = 20.0
WEIGHTINGS = ("equal", "dynaopt", "dynaopt_reference")
COMMAND = "emorl train"


@dataclasses.dataclass(frozen=True)
class Target:
    """What one adapter is taught: an objective, or several at once.

    Attributes:
      weighting: of several objectives: "equal", or by DynaOpt, repaired or as its reference has it.
      specs: what commands make the objectives of again, see `scorers.get_objective`.
    """

    name: str
    objectives: tuple[Objective, ...]
    weighting: str = "equal"
    specs: tuple[str, ...] = ()

    @classmethod
    def of(cls, scorer: Objective) -> "Target":
        """One objective."""
        return cls(scorer.name, (scorer,))

    def config(self) -> "AdapterRun":
        """What decides whether a directory is this target's."""
        names = [objective.name for objective in self.objectives]
        return AdapterRun(objectives=names, weighting=self.weighting, specs=list(self.specs))


def check_targets(targets: Sequence[Target]) -> None:
    """Raises an `InputError` for none, or for a name used twice."""
    names = [target.name for target in targets]
    if not names:
        raise InputError("no objectives: give at least one")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"objectives {', '.join(twice)} are named more than once; each adapter needs its own name")


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop reports after each round: of each adapter still training, its steps and its validation score.

    Attributes:
      done: which of them have just ended.
      adapter: one of them as it is while this is reported, by its name.
    """

    steps: Mapping[str, int]
    scores: Mapping[str, float]
    done: tuple[str, ...]
    adapter: Callable[[str], Adapter]


class _Saved(NamedTuple):
    """An adapter's checkpoint."""

    state: TrainingState
    best: lora.Factors
    best_score: Any  # Float[""], of numpy


@dataclasses.dataclass
class _Learner:
    """An adapter that is being trained."""

    target: Target
    directory: Path
    seed: int
    saved: _Saved
    checkpoints: Checkpoints
    log: MetricsLog
    history: list[dict[str, Any]]  # the rows of its metrics
    weights: DynaOpt | None

    @property
    def step(self) -> int:
        return int(self.saved.state.step[0])

    def reward_weights(self) -> list[float] | None:
        return None if self.weights is None else self.weights.weights.tolist()

    def remember(self, row: Mapping[str, Any]) -> None:
        """Takes a validation into account."""
        self.history.append(dict(row))
        if self.weights is not None:
            self.weights.validated(row["scores"])

    def close(self) -> None:
        self.log.close()
        self.checkpoints.close()


def own_seed(name: str, seed: int) -> int:
    """An adapter's seed: another one for every name, whatever else is trained."""
    return (zlib.crc32(name.encode()) + seed) % 2**31


def converged(scores: Sequence[float], window: int, threshold: float) -> bool:
    """Whether the coefficient of variation of the last `window` scores is below the threshold (EMORL, section 3.2)."""
    last = np.asarray(scores[-window:], np.float64)
    if len(last) < window:
        return False
    return bool(last.std() < threshold * abs(last.mean()))


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split's prompts, tokenised and padded once to one width, so that all batches share a program."""

    texts: tuple[str, ...]
    rows: list[Row]
    prompts: Prompts

    def take(self, places: Int[np.ndarray, " n"]) -> Prompts:
        """Some of the prompts."""
        taken: Prompts = jax.tree.map(lambda leaf: leaf[places], self.prompts)
        return taken


def _tokenise(ensemble: Ensemble, texts: Sequence[str], max_new_tokens: int) -> _Split:
    rows = ensemble.encode(texts)
    ensemble.check_lengths(ensemble.lengths(rows), max_new_tokens)
    spec = ensemble.spec(max_new_tokens=max_new_tokens)
    return _Split(tuple(texts), rows, ensemble.prompts(rows, spec, batch=len(rows)))


# The arguments of `load` by which a base is held in fewer bits.
HELD = ("quantise", "quantise_head", "quantise_group", "kv_dtype")


def _held(base: LM) -> dict[str, Any]:
    """How the base is held, in `load`'s words, where it was asked to hold it in fewer bits."""
    asked, kv_dtype = base.quantisation, base.config.kv_dtype
    weights = {} if asked is None else dict(zip(HELD, (asked.kind, asked.head, asked.group), strict=False))
    return weights | ({} if kv_dtype is None else {HELD[-1]: kv_dtype})


class BaseMark(records.Record, omit_defaults=True):
    """What tells a run's base, where it is, and how it is held (`HELD`)."""

    name: str
    path: str
    sha256: str
    quantise: str | None = None
    quantise_head: bool | None = None
    quantise_group: int | None = None
    kv_dtype: str | None = None


class PromptsMark(records.Record):
    """What tells a run's prompts: a hash of each split's content."""

    name: str
    sha256: dict[str, str]


class AdaptersRun(OnDevices, kw_only=True, tag_field="command", tag=COMMAND):
    """The content of a run's config.json.

    Attributes:
      data: where the prompts come from, as whoever made the run says it.
    """

    base: BaseMark
    prompts: PromptsMark
    data: dict[str, Any] | None
    settings: EMORLConfig


class AdapterRun(RunConfig, kw_only=True, tag_field="command", tag=COMMAND):
    """The content of an adapter's config.json: what it is taught, as `Target` has it."""

    objectives: Annotated[list[str], msgspec.Meta(min_length=1)]
    weighting: Annotated[str, records.one_of(WEIGHTINGS)]
    specs: list[str]


class Training(records.Record, kw_only=True):
    """The content of training.json: what an adapter took."""

    schema: records.Schema = 1
    steps: records.Count
    converged: bool
    best_step: records.Count
    best_dev: records.Finite
    data_points: records.Count
    validation_points: records.Count
    points_to_95_percent: records.Count
    stopping_floor: records.Count
    seconds: records.Seconds
    seconds_shared: records.Seconds


class Stack(records.Record, kw_only=True):
    """The content of stack.json: of every adapter in training the step of the last checkpoint that all of them have;
    None before the first."""

    schema: records.Schema = 1
    steps: dict[str, records.Count | None]


class ValidationLine(Line):
    """What is used of a line of an adapter's metrics."""

    dev: records.Finite
    scores: dict[str, records.Finite]
    seconds: records.Seconds
    adapters: records.Positive
    validated: records.Positive


def run_config(base: LM, prompts: PromptSet, config: EMORLConfig, data: Mapping[str, Any] | None) -> AdaptersRun:
    """The content of a run's config.json."""
    return AdaptersRun(
        base=BaseMark(name=base.name, path=str(base.path or ""), sha256=base.fingerprint(), **_held(base)),
        prompts=PromptsMark(name=prompts.name, sha256=prompts.digest()),
        data=None if data is None else dict(data),
        settings=config,
        **devices(sharding.describe(base.mesh)),
    )


@lock.writes("out")
def train_adapters(
    base: LM,
    targets: Sequence[Target],
    prompts: PromptSet,
    config: EMORLConfig,
    out: Path,
    *,
    resume: bool = False,
    max_minutes: Minutes | None = None,
    data: Mapping[str, Any] | None = None,
    checkpoints: str | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Adapter]:
    """Fine-tunes an adapter for every target, all at once, and returns those that were best on dev.

    Args:
      out: a run's directory, new or with other adapters of the same base, prompts and settings.
      resume: go on with targets that are there already; those that are done are read.
      max_minutes: after this long it stops, with checkpoints from which it can be resumed.
      data: where the prompts come from, for those who open the run again.
      checkpoints: where they go, if not into `out`: a directory of this run alone, or a bucket's URL.
      on_progress: called after every validation.

    Raises:
      InputError: two targets of one name, a directory of another run or with one of the targets, a tokenizer that is
        missing, prompts that do not fit.
      Interrupted: Ctrl-C; `resume=True` goes on. `Preempted` where SIGTERM or the platform stopped it.
    """
    ranges.check_arguments(train_adapters, max_minutes=max_minutes)
    check_targets(targets)
    base.require_tokenizer()
    sharding.check_rows("batch / accumulate =", config.batch // config.accumulate, base.mesh)
    ensemble = Ensemble([base.with_adapters([init_adapter(base, config.lora)])])
    answers = config.batch * config.samples * len(targets)
    ensemble.require_memory(answers, config.max_new_tokens, "give a smaller --batch, or fewer --samples")
    train = _tokenise(ensemble, prompts.split("train"), config.max_new_tokens)
    dev = _tokenise(ensemble, prompts.split("dev")[: config.validation_prompts], config.max_new_tokens)
    directories = {target.name: files.inside(out / OBJECTIVES, target.name) for target in targets}
    claimed = [name for name, directory in directories.items() if (directory / CONFIG_FILE).exists()]
    there = [name for name in claimed if read_metrics(directories[name])]
    trained = [name for name in claimed if (directories[name] / TRAINING_FILE).is_file()]
    if resume:
        for name in list(trained):
            if problem := _problem(directories[name]):
                warnings.warn(f"{problem}; {name} is trained again", stacklevel=2)
                trained.remove(name)
    claimed, there, trained = hosts.gather([claimed, there, trained])[0]
    if there and not resume:
        raise InputError(
            f"{out} holds {', '.join(there)} already; resume (--resume, resume=True) or choose other names"
        )
    claim_directory(out, run_config(base, prompts, config, data), resume=True)
    stack = hosts.gather(read_stack(out) if hosts.is_first() else {})[0]
    learners = []
    for target in targets:
        directory = directories[target.name]
        if target.name in claimed and target.name not in there and hosts.is_first():
            shutil.rmtree(directory)  # failed before its first validation: nothing to go on from
        claim_directory(directory, target.config(), resume=resume)
        if target.name not in trained:
            at = None if checkpoints is None else f"{checkpoints}/{target.name}"
            learners.append(_begin(base, target, directory, config, at, stack))
    if learners:
        _write_stack(out, {learner.target.name: learner.checkpoints.newest() for learner in learners})
    loop = _Loop(base, ensemble, config, train, dev)
    began = saved = time.monotonic()
    try:
        with sharding.use(base.mesh), stop_requests() as stop_requested:
            # Those that had their steps, or more than are asked for now, are done without another one.
            for learner in [learner for learner in learners if _is_done(learner, config)]:
                _finish(base, learner, config)
                learners.remove(learner)
            while learners:
                loop.round(learners)
                done = [learner for learner in learners if _is_done(learner, config)]
                now = time.monotonic()
                late = is_late(began, now, max_minutes)
                stop = stop_requested()
                due: bool = hosts.gather(now - saved > _SECONDS_BETWEEN_CHECKPOINTS)[0]
                if done or stop is not None or late or due:
                    saved = now
                    for learner in learners:
                        learner.checkpoints.save(learner.step, learner.saved)
                    _write_stack(out, {learner.target.name: learner.step for learner in learners})
                for learner in done:
                    _finish(base, learner, config)
                on_progress(
                    Progress(
                        {learner.target.name: learner.step for learner in learners},
                        {learner.target.name: learner.history[-1]["dev"] for learner in learners},
                        tuple(learner.target.name for learner in done),
                        functools.partial(_as_now, tuple(learners), config),
                    )
                )
                learners = [learner for learner in learners if learner not in done]
                if learners and stop is not None:
                    raise stop(f"{stop.what}; saved in {out}")
                if late:
                    break
    finally:
        for learner in learners:
            learner.close()
    if not learners and hosts.is_first():
        (out / STACK_FILE).unlink(missing_ok=True)
    hosts.wait()  # for what the first has written
    finished = [target.name for target in targets if (directories[target.name] / ADAPTER).is_dir()]
    return {name: dataclasses.replace(load_adapter(directories[name] / ADAPTER, base), name=name) for name in finished}


def read_stack(out: Path) -> dict[str, int | None]:
    """The content of stack.json; nothing where there is none.

    Raises:
      InputError: it is of another shape, or not what was written.
    """
    return records.read(out / STACK_FILE, Stack).steps if (out / STACK_FILE).exists() else {}


def _write_stack(out: Path, steps: dict[str, int | None]) -> None:
    files.write_json(out / STACK_FILE, records.plain(Stack(steps=steps)))


def _begin(
    base: LM, target: Target, directory: Path, config: EMORLConfig, at: str | None, stack: Mapping[str, int | None]
) -> _Learner:
    """A learner as its directory had it when the whole stack had a checkpoint, or a new one."""
    seed = own_seed(target.name, config.seed)
    state = fine_tune.begin(base.config, config, seed)
    saved = sharding.whole(_Saved(state, jax.tree.map(jnp.copy, state.factors), np.float32(-np.inf)), base.mesh)
    checkpoints = Checkpoints(directory, at)
    if target.name in stack:
        checkpoints.go_back(stack[target.name])
    newest = checkpoints.newest()
    if newest is not None:
        newest, saved = checkpoints.restore(sharding.abstract(saved, base.mesh), going_on=True)
    log = MetricsLog(directory, -1 if newest is None else newest)
    weights = None
    if target.weighting != "equal":
        weights = DynaOpt(
            [objective.name for objective in target.objectives], seed, target.weighting == "dynaopt_reference"
        )
    learner = _Learner(target, directory, seed, saved, checkpoints, log, [], weights)
    done = 0
    told: list[dict[str, Any]] = hosts.gather(read_metrics(directory, ValidationLine))[0]
    _check_validations(told, target, directory, newest)
    for row in told:
        if weights is not None:
            for _ in range(row["iteration"] - done):
                weights.step()
        done = row["iteration"]
        learner.remember(row)
    return learner


def _check_validations(rows: Sequence[Mapping[str, Any]], target: Target, directory: Path, newest: int | None) -> None:
    """Raises an `InputError` for an adapter's validations that are not those up to its newest checkpoint, which came
    right after one, or lack a score of one of its objectives."""
    path = directory / METRICS_FILE
    for i, row in enumerate(rows, 1):
        if lacking := [one.name for one in target.objectives if one.name not in row["scores"]]:
            raise InputError(f"{path}:{i}: the key scores.{lacking[0]} is missing")
    if newest is not None and (not rows or rows[-1]["iteration"] != newest):
        raise InputError(f"{path}: the line of iteration {newest} is missing, whose checkpoint is there")


def _is_done(learner: _Learner, config: EMORLConfig) -> bool:
    scores = [row["dev"] for row in learner.history]
    return learner.step >= config.steps or converged(scores, config.window, config.threshold)


def _problem(directory: Path) -> str | None:
    """Why an adapter that is said to be done cannot be used."""
    try:
        records.read(directory / TRAINING_FILE, Training)
    except InputError as error:
        return str(error)
    return _adapter_problem(directory / ADAPTER)


def _adapter_problem(directory: Path) -> str | None:
    try:
        peft_files.require_whole(directory)
    except InputError as error:
        return str(error)
    return None


def _finish(base: LM, learner: _Learner, config: EMORLConfig) -> None:
    """Writes what was best on dev, and what it took."""
    rows = learner.history
    best = max(rows, key=lambda row: row["dev"])
    adapter = _adapter(config, learner.saved.best, learner.target.name)
    where = learner.directory / ADAPTER
    if hosts.is_first() and (not where.is_dir() or _adapter_problem(where)):
        shutil.rmtree(where, ignore_errors=True)
        save_adapter(adapter, base, where)
    per_step = config.batch * config.samples
    record = Training(
        steps=learner.step,
        converged=converged([row["dev"] for row in rows], config.window, config.threshold),
        best_step=best["iteration"],
        best_dev=best["dev"],
        data_points=learner.step * per_step,
        validation_points=len(rows) * min(config.validation_prompts, rows[-1]["validated"]),
        points_to_95_percent=_points_to(rows, 0.95, per_step),
        stopping_floor=(config.window - 1) * config.validate_every * per_step,
        seconds=sum(row["seconds"] for row in rows),
        seconds_shared=sum(row["seconds"] / row["adapters"] for row in rows),
    )
    files.write_json(learner.directory / TRAINING_FILE, records.plain(record))
    learner.close()


def _as_now(learners: Sequence[_Learner], config: EMORLConfig, name: str) -> Adapter:
    (learner,) = (learner for learner in learners if learner.target.name == name)
    return _adapter(config, learner.saved.state.factors, name)


def _adapter(config: EMORLConfig, factors: lora.Factors, name: str) -> Adapter:
    """An adapter that was alone in its axis."""
    return Adapter(config.lora, jax.tree.map(lambda leaf: leaf[0], sharding.to_host(factors)), name)


def _points_to(rows: Sequence[Mapping[str, Any]], share: float, per_step: int) -> int:
    """Data points until the validation score had made this share of its way from the first to the best."""
    first, best = rows[0]["dev"], max(row["dev"] for row in rows)
    reached = next(row for row in rows if row["dev"] >= first + share * (best - first))
    return int(reached["iteration"] * per_step)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What rounds of training share."""

    base: LM
    ensemble: Ensemble
    config: EMORLConfig
    train: _Split
    dev: _Split

    def spec(self, temperature: float) -> DecodeSpec:
        return self.ensemble.spec(max_new_tokens=self.config.max_new_tokens, temperature=temperature)

    def round(self, learners: Sequence[_Learner]) -> None:
        """Steps up to the next validation of the adapters, and it. A new adapter is validated before its first step."""
        began = time.perf_counter()
        config = self.config
        untrained = [learner for learner in learners if not learner.history]
        if untrained:
            self._validate(untrained, {}, began)
            began = time.perf_counter()
        stack = fine_tune.join([learner.saved.state for learner in learners])
        told: list[dict[str, Any]] = []
        # Always whole rounds, so that an adapter's validations do not depend on how far others are.
        for _ in range(config.validate_every):
            stack, metrics = self._step(stack, learners)
            told.append(metrics)
        names = [learner.target.name for learner in learners]
        finite.check_trained((stack.factors, stack.value), names, f"step {int(np.max(np.asarray(stack.step)))}")
        for m, learner in enumerate(learners):
            learner.saved = learner.saved._replace(state=fine_tune.take(stack, m))
        host = jax.device_get(told)
        means = {
            learner.target.name: {name: float(np.mean([row[name][m] for row in host])) for name in host[0]}
            for m, learner in enumerate(learners)
        }
        self._validate(learners, means, began)

    def _step(self, stack: TrainingState, learners: Sequence[_Learner]) -> tuple[TrainingState, dict[str, Any]]:
        config = self.config
        steps = np.asarray(stack.step)
        seeds = np.array([learner.seed for learner in learners], np.uint32)
        rows = np.stack(
            [
                epoch_rows(len(self.train.texts), config.batch, learner.seed, int(step))
                for learner, step in zip(learners, steps, strict=True)
            ]
        )
        prompts = sharding.place_rows(self.train.take(rows.reshape(-1)), self.base.mesh)
        samples = fine_tune.sample(self.base.params, stack, prompts, seeds, self.spec(config.temperature), self._static)
        # Every process reads and scores the samples that lie on its devices.
        per_block = config.batch * config.samples
        own = sharding.own_rows(len(learners) * per_block, self.base.mesh)
        asked = np.repeat(rows.reshape(-1), config.samples)[own]
        texts = self._decode(self.train, asked, sharding.fetch_own_rows(samples))
        own_rewards = np.empty(len(own), np.float32)
        for m, learner in enumerate(learners):
            if learner.weights is not None:
                learner.weights.step()
            of_block = np.flatnonzero(own // per_block == m)
            questions, answers = [self.train.texts[i] for i in asked[of_block]], [texts[i] for i in of_block]
            scores = np.stack([score(questions, answers) for score in learner.target.objectives], axis=1)
            own_rewards[of_block] = scorers.combine(scores, config.combination, learner.reward_weights())
        rewards = hosts.join(own_rewards, own, len(learners) * per_block).reshape(len(learners), per_block)
        after: tuple[TrainingState, dict[str, Any]] = fine_tune.update(
            self.base.params, stack, prompts, samples, rewards, seeds, self.base.config, self._static
        )
        return after

    @property
    def _static(self) -> EMORLConfig:
        """What programs depend on, so that runs that differ in the rest share them."""
        steps = 1 if self.config.schedule == "constant" else self.config.steps
        return dataclasses.replace(
            self.config, steps=steps, seed=0, validate_every=1, validation_prompts=1, window=1, threshold=0.0
        )

    def _decode(self, split: _Split, places: Int[np.ndarray, " R"], samples: Samples) -> list[str]:
        lengths = samples.mask.sum(axis=1) - samples.ended
        tokens = [row[:n].tolist() for row, n in zip(samples.tokens, lengths, strict=True)]
        return self.ensemble.decode([split.rows[i] for i in places], tokens)

    def _validate(self, learners: Sequence[_Learner], means: Mapping[str, Mapping[str, float]], began: float) -> None:
        """Scores greedy answers to the dev prompts, keeps the adapters that are the best so far, and writes metrics."""
        n, m = len(self.dev.texts), len(learners)
        stack = fine_tune.join([learner.saved.state for learner in learners])
        filled = sharding.fill(n, self.base.mesh)
        places = np.tile(np.arange(filled) % n, m)
        seeds = np.zeros(m, np.uint32)
        once = dataclasses.replace(self._static, samples=1, algorithm="ppo")
        prompts = sharding.place_rows(self.dev.take(places), self.base.mesh)
        samples = fine_tune.sample(self.base.params, stack, prompts, seeds, self.spec(0.0), once)
        texts = self._decode(self.dev, places, sharding.to_host(samples))
        took = time.perf_counter() - began
        for i, learner in enumerate(learners):
            own = texts[i * filled : i * filled + n]
            scores = {
                objective.name: float(objective.share(self.dev.texts, own).mean())
                for objective in learner.target.objectives
            }
            score = float(np.mean(list(scores.values())))
            if score > learner.saved.best_score:
                best = jax.tree.map(jnp.copy, learner.saved.state.factors)
                learner.saved = learner.saved._replace(best=best, best_score=np.float32(score))
            own_means = means.get(learner.target.name, {})
            values: dict[str, Any] = {"dev": score, "scores": scores, **own_means}
            if learner.weights is not None:
                values["weights"] = learner.reward_weights()
            values |= {"seconds": took, "adapters": m, "validated": n, "trained": bool(own_means)}
            step = learner.step
            learner.log.write(step, values)
            learner.remember({"iteration": step, **values})
