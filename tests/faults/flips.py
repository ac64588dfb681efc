"""Flips single bits of what was written, one at a time, and reads it: noticed or harmless, never silent.

    python -m tests.faults.flips 300 --seed 0

A subject is a directory, made once by the commands or by what they write with, and what reads a copy of it in which
one bit is another one. A flip is noticed if reading raises an `InputError`, or warns and gives what it gave before;
harmless if it gives the same without a word. It is silent if anything else comes out. What is measured
(`compare.MEASURED`: times, where it ran) is not compared: a digest leaves out times, by choice. A line per flip, then
`flips_silent: M of N`.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rlae_jax import load, load_adapter, records
from rlae_jax.commands import main as commands
from rlae_jax.emorl import train as emorl_train
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.search import SearchRun, read_found
from rlae_jax.emorl.train import AdapterRun, Training, ValidationLine
from rlae_jax.errors import InputError
from rlae_jax.evaluation.results import Prediction, join_results, read_predictions, read_results, write_results
from rlae_jax.files import write_json, write_json_lines
from rlae_jax.fusion.search import ScoredPoint, Scores
from rlae_jax.fusion.vocabulary import union
from rlae_jax.ppo.train import AgentRun, RewardLine, load_policy, read_run
from rlae_jax.runs.checkpoints import Checkpoints
from rlae_jax.runs.directory import claim_directory, read_config
from rlae_jax.runs.metrics import MetricsLog, read_metrics
from tests.faults import cases, compare, small
from tests.helpers import run_files as kinds

_TRAIN = next(case.arguments for case in cases.CASES if case.name == "train-ppo")
_SKIPPED = {".png", ".md"}  # for people: nothing reads them


@dataclasses.dataclass(frozen=True)
class Subject:
    """A directory, and what reads it.

    Attributes:
      make: fills a directory; the working directory has what `small.build` makes.
      read: a copy of the directory -> what it says. It may write to it.
      commands: whether commands make it, which takes seconds.
      goes_on: whether reading it is a command that goes on, which takes seconds.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], Any]
    commands: bool = False
    goes_on: bool = False


def call(arguments: str) -> str:
    """What a command prints, in this process.

    Raises:
      InputError: the command ended with status 2; its line.
    """
    given, out, errors = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["rlae-jax", *arguments.split()]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            commands.main()
    except SystemExit as ended:
        if ended.code == 2:
            raise InputError(errors.getvalue()) from None
        if ended.code:
            raise RuntimeError(f"status {ended.code}: {errors.getvalue()}") from None
    finally:
        sys.argv = given
    for line in errors.getvalue().splitlines():
        if line.startswith("warning: "):
            warnings.warn(line, stacklevel=2)
    return out.getvalue()


def _trained(iterations: int) -> Callable[[Path], None]:
    def make(out: Path) -> None:
        call(f"{_TRAIN} --iterations {iterations} --out {out}")

    return make


def _agent(out: Path) -> Any:
    run, policy = read_run(out), load_policy(out)
    claim_directory(out, run, resume=True)
    MetricsLog(out, 3).close()
    return [
        run,
        policy.params,
        policy.dims,
        policy.span_length,
        read_metrics(out, RewardLine),
        read_results(out),
        read_predictions(out),
        join_results([out, out]),
    ]


def _gone_on(out: Path) -> Any:
    """A run of two iterations that becomes one of four."""
    call(f"{_TRAIN} --out {out} --resume")
    return compare.content(out)


def _adapters(out: Path) -> None:
    call(f"{cases.MAKE_ADAPTERS.removesuffix('adapters')} {out}")
    call(f"emorl search --run {out} --levels 1 --prompts 4")
    call(f"emorl search --run {out} --method halving --budget 8 --prompts 4 --mode probs --memory 0.0001")


def _read_adapters(out: Path) -> Any:
    run, told = Run(out), []
    claim_directory(out, run.config, resume=True)
    for name, target in run.targets().items():
        directory, adapter = out / "objectives" / name, run.adapter(name)
        told.append([name, target, adapter.params, adapter.config])
        told.append([read_metrics(directory, ValidationLine), records.read(directory / "training.json", Training)])
        claim_directory(directory, target, resume=True)
    searches = sorted((out / "search").iterdir())
    told += [[read_config(path, SearchRun), read_found(path, run.targets()), _points(path)] for path in searches]
    return [run.config, run.singles(), run.prompts.digest(), told]


def _points(path: Path) -> Any:
    """What a search that goes on knows. What it does not know it scores again, to the same."""
    return sorted(map(repr, Scores(_raise, path=path / "points.jsonl")._known))


def _raise(points: Any) -> Any:
    raise AssertionError("a point is scored again")


def _exported(out: Path) -> None:
    call(f"emorl export --run subjects/adapters-and-searches --weights 0.5 1 --mode params --out {out}")


def _read_exported(out: Path) -> Any:
    told: list[Any] = []
    base = load("base")
    for path in sorted(path for path in out.rglob("*") if path.is_dir()):
        if (path / "adapter_config.json").is_file() or (path / "adapter_model.safetensors").is_file():
            adapter = load_adapter(path, base)
            told.append([adapter.params, adapter.config])
        elif (path / "config.json").is_file() or (path / "model.safetensors").is_file():
            told.append(_model(path))
    assert told, f"nothing was exported to {out}"
    return told


def _saved(out: Path) -> None:
    shutil.copytree("alpha", out, dirs_exist_ok=True)


def _model(out: Path) -> Any:
    lm = load(out)
    return [lm.fingerprint(), repr(lm.config), lm.tokenizer.encode("r1234="), lm.tokenizer.decode([2, 3, 4])]


def _union(out: Path) -> Any:
    members = [load(name) for name in ("ones", "pairs")]
    tokenizers, ends = [lm.tokenizer for lm in members], [[lm.tokenizer.eos_token_id] for lm in members]
    return dataclasses.asdict(union.load_or_build(tokenizers, ["ones", "pairs"], ends, cache=out))


_TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": {"c": np.arange(4, dtype=np.int32)}}


def _times(factor: int, leaf: np.ndarray) -> jax.Array:
    return jax.numpy.asarray(leaf * factor)


def _checkpointed(out: Path) -> None:
    checkpoints = Checkpoints(out)
    for iteration in (1, 2):
        checkpoints.save(iteration, jax.tree.map(functools.partial(_times, iteration), _TREE))
    checkpoints.close()


def _checkpoints(out: Path) -> Any:
    """A run makes what was damaged again; here it is the double of the checkpoint before."""
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), _TREE)
    checkpoints = Checkpoints(out)
    try:
        iteration, state = checkpoints.restore(abstract, going_on=True)
    finally:
        checkpoints.close()
    return jax.tree.map(lambda leaf: np.asarray(leaf) * (2 // iteration), state)


def _written(out: Path) -> None:
    """A file of every kind that we write, without models."""
    write_json(out / "agent" / "config.json", records.plain(kinds.AGENT))
    write_json_lines(out / "agent" / "metrics.jsonl", kinds.VALIDATIONS)
    write_results(out / "agent", dict(kinds.RESULTS), [Prediction(**row) for row in kinds.PREDICTIONS])
    write_json(
        out / "adapter" / "config.json",
        records.plain(AdapterRun(objectives=["brevity"], weighting="equal", specs=["brevity"])),
    )
    write_json_lines(out / "adapter" / "metrics.jsonl", kinds.VALIDATIONS)
    write_json(out / "adapter" / "training.json", records.plain(kinds.TRAINING))
    write_json(out / "search" / "config.json", records.plain(kinds.SEARCH))
    write_json(out / "search" / "search.json", records.plain(kinds.FOUND))
    points = [ScoredPoint(point=[i / 2, 1.0], scores=[0.5, 0.25]) for i in range(3)]
    write_json_lines(out / "search" / "points.jsonl", map(records.plain, points))


def _read_written(out: Path) -> Any:
    agent, adapter, search = out / "agent", out / "adapter", out / "search"
    MetricsLog(agent, 2).close()
    found = [read_config(agent, AgentRun), read_config(adapter, AdapterRun), read_config(search, SearchRun)]
    return [
        found,
        [claim_directory(path, one, resume=True) for path, one in zip((agent, adapter, search), found, strict=True)],
        [read_metrics(agent, RewardLine), read_metrics(adapter, ValidationLine)],
        [read_results(agent), read_predictions(agent), join_results([agent, agent])],
        records.read(adapter / "training.json", Training),
        [read_found(search, ["brevity", "coverage"]), _points(search)],
    ]


SUBJECTS = (
    Subject("files of every kind", _written, _read_written),
    Subject("a saved model", _saved, _model),
    Subject("a union", _union, _union),
    Subject("two checkpoints", _checkpointed, _checkpoints),
    Subject("a trained agent", _trained(4), _agent, commands=True),
    Subject("adapters and searches", _adapters, _read_adapters, commands=True),
    Subject("an export", _exported, _read_exported, commands=True),
    Subject("a run that goes on", _trained(2), _gone_on, commands=True, goes_on=True),
)


def said(value: Any) -> Any:
    """What can be compared, without times."""
    if isinstance(value, records.Record):
        value = records.plain(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): said(item) for key, item in value.items() if not compare.MEASURED.fullmatch(str(key))}
    if isinstance(value, list | tuple):
        return [said(item) for item in value]
    if isinstance(value, np.ndarray | jax.Array):
        return [str(value.dtype), value.shape, np.asarray(value).tobytes()]
    return value if isinstance(value, bytes) else repr(value)


class Flips:
    """Directories, each made once, and copies of them that are read. The working directory has `small.build`'s."""

    def __init__(self, root: Path):
        self._root = root
        self._expected: dict[str, Any] = {}

    def made(self, subject: Subject) -> Path:
        """The directory."""
        place = self._root / subject.name.replace(" ", "-")
        if subject.name not in self._expected:
            subject.make(place)
            self._expected[subject.name], told = self._read(subject, place)
            assert not told, f"{subject.name}: what is whole is read with a warning: {told}"
        return place

    def files(self, subject: Subject) -> list[Path]:
        """What can be flipped, as names in the directory."""
        place = self.made(subject)
        found = sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size)
        return [path.relative_to(place) for path in found if path.suffix not in _SKIPPED]

    def _read(self, subject: Subject, place: Path, flip: tuple[Path, int, int] | None = None) -> tuple[Any, list[str]]:
        copy = self._root / "flipped"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy, symlinks=True)
        if flip is not None:
            path, at, bit = copy / flip[0], *flip[1:]
            content = bytearray(path.read_bytes())
            content[at] ^= 1 << bit
            path.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            found = said(subject.read(copy))
        return found, [str(one.message) for one in told if str(copy) in str(one.message)]

    def judge(self, subject: Subject, flip: tuple[Path, int, int]) -> str:
        """noticed, harmless, or what is wrong."""
        expected = (self.made(subject), self._expected[subject.name])[1]
        try:
            found, told = self._read(subject, self.made(subject), flip)
        except InputError as error:
            return "noticed" if len(str(error).splitlines()) <= 10 else f"many lines: {str(error)[:200]}"
        except Exception as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
        if found != expected:
            return "silent" + (" (with a warning)" if told else "")
        return "noticed" if told else "harmless"


@contextlib.contextmanager
def world(root: Path) -> Iterator[Flips]:
    """Subjects in a directory, which is the working directory inside."""
    before, given = emorl_train._SECONDS_BETWEEN_CHECKPOINTS, os.environ.get(commands.CACHE_VARIABLE)
    os.environ[commands.CACHE_VARIABLE] = "off"
    try:
        with contextlib.chdir(root), warnings.catch_warnings():
            small.build()
            small.often()
            yield Flips(root / "subjects")
    finally:
        emorl_train._SECONDS_BETWEEN_CHECKPOINTS = before
        os.environ.pop(commands.CACHE_VARIABLE)
        if given is not None:
            os.environ[commands.CACHE_VARIABLE] = given


def run(flips: Flips, n: int, seed: int, subjects: Sequence[Subject]) -> Iterator[tuple[str, str]]:
    """(which flip, what came of it) of n flips, spread over the subjects and their files."""
    rng = np.random.default_rng(seed)
    orders: dict[str, list[Path]] = {}
    for i in range(n):
        subject = subjects[i % len(subjects)]
        if not orders.get(subject.name):
            names = flips.files(subject)
            orders[subject.name] = [names[k] for k in rng.permutation(len(names))]
        name = orders[subject.name].pop()
        flip = name, int(rng.integers((flips.made(subject) / name).stat().st_size)), int(rng.integers(8))
        yield f"{subject.name}: {name}, byte {flip[1]}, bit {flip[2]}", flips.judge(subject, flip)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", nargs="?", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a part of the subjects' names")
    parser.add_argument("--going-on", type=int, default=4, help="how many of the flips are of a run that goes on")
    given = parser.parse_args()
    chosen = [subject for subject in SUBJECTS if given.only in subject.name]
    slow = [subject for subject in chosen if subject.goes_on]
    quick = [subject for subject in chosen if not subject.goes_on]
    few = (given.going_on if quick else given.n) if slow else 0
    counts = {"noticed": 0, "harmless": 0}
    with tempfile.TemporaryDirectory() as directory, world(Path(directory).resolve()) as flips:
        for subjects, n in ((quick, given.n - few), (slow, few)):
            for flip, told in run(flips, n, given.seed, subjects):
                counts[told] = counts.get(told, 0) + 1
                print(f"{told}: {flip}", flush=True)
    print(f"noticed: {counts['noticed']}, harmless: {counts['harmless']}")
    wrong = given.n - counts["noticed"] - counts["harmless"]
    print(f"flips_silent: {wrong} of {given.n}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
