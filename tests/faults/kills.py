"""Kills commands at random moments, goes on, and compares what is there at the end with an undisturbed run.

    python -m tests.faults.kills 100 --seed 0

A case is a command of `cases.py`, killed up to three times: SIGKILL at a random time, SIGKILL before a random write,
SIGTERM, SIGINT once or twice. A case has survived if every exit status and message was right, no process, held lock or
temporary file was left, and the last call ended with the bytes of the undisturbed run (`compare.py`). A line per case,
then `kills_survived: M of N`.
"""

import argparse
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import cases, compare
from tests.faults.cases import CASES, Case
from tests.faults.runner import Process, Request, Runner, start_cold

LIMIT = 180.0  # seconds for one call; most take two or three
MARK = "RLAE_JAX_FAULTS_CASE"  # in the environment of everything that a case starts
MOST_KILLS = 3
RUN_AGAIN, STOPPED = 75, 130
KINDS = ("kill", "write", "term", "interrupt", "twice")


class Wrong(Exception):
    """A case did not survive; says why."""


@dataclasses.dataclass(frozen=True)
class Reference:
    """An undisturbed run.

    Attributes:
      content: of its directory.
      seconds: that it took; what a random moment is drawn from.
      writes: that it made.
    """

    content: dict[str, Any]
    seconds: float
    writes: int


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to one call.

    Attributes:
      signals: (seconds since the start or the signal before, number), sent from outside.
      write: before which write it kills itself; 0 for none.
    """

    signals: tuple[tuple[float, int], ...] = ()
    write: int = 0

    def __str__(self) -> str:
        if self.write:
            return f"SIGKILL at write {self.write}"
        return " and ".join(f"{signal.Signals(number).name} after {after:.2f} s" for after, number in self.signals)


class Harness:
    """Runs cases in a directory of its own; a context manager.

    Args:
      directory: for everything, kept if it is given.
    """

    def __init__(self, directory: Path, programs: Path | None = None):
        self.directory = directory
        self.world = directory / "world"
        self._references: dict[str, Reference] = {}
        self._number = 0
        self._runner = Runner(programs or directory / "programs")

    def __enter__(self) -> "Harness":
        return self

    def __exit__(self, *error: object) -> None:
        self._runner.__exit__(*error)

    def build(self) -> None:
        """What the commands are given."""
        if (self.world / "adapters" / "objectives" / "diversity_2" / "training.json").is_file():
            return
        self.world.mkdir(parents=True)
        for arguments, setup in (([], "build"), (cases.MAKE_ADAPTERS.split(), "often")):
            process = self._start(arguments, self.world, setup)
            if process.wait(LIMIT):
                raise RuntimeError(process.errors)

    def _start(
        self, arguments: list[str], place: Path, setup: str, *, write: int = 0, full: int = 0, cold: bool = False
    ) -> Process:
        self._number += 1
        temporary = place / "temporary"
        environment = {"TMPDIR": str(temporary) if temporary.is_dir() else tempfile.gettempdir()}
        environment |= {"XDG_CACHE_HOME": str(place / "cache"), "COLUMNS": "120", MARK: str(place)}
        request = Request(
            arguments=arguments,
            directory=str(place),
            streams=str(place / f"call-{self._number}"),
            environment=environment,
            setup=[f"tests.faults.small:{setup}"],
            kill_at_write=write,
            full_at_write=full,
        )
        return start_cold(request) if cold else self._runner.start(request)

    def furnish(self, name: str) -> Path:
        """A new working directory."""
        place = self.directory / name
        shutil.rmtree(place, ignore_errors=True)
        cases.furnish(place, self.world)
        return place

    def call(
        self, case: Case, place: Path, *, resumed: bool, write: int = 0, full: int = 0, cold: bool = False
    ) -> Process:
        """Starts a case's command; the first call, or one that goes on."""
        setup = "shrink" if case.small else "often"
        return self._start(case.call(resumed), place, setup, write=write, full=full, cold=cold)

    def reference(self, case: Case) -> Reference:
        """The undisturbed run, made once."""
        name = f"{case.name}-reference"
        took = self.directory / f"{name}.json"
        if case.name not in self._references:
            if not took.is_file():
                place = self.furnish(name)
                began = time.monotonic()
                process = self.call(case, place, resumed=False)
                if process.wait(LIMIT):
                    raise Wrong(f"the undisturbed run failed: {process.errors[-2000:]}")
                seconds = time.monotonic() - began
                told = Path(f"{process.request.streams}.writes")
                writes = int(told.read_text()) if told.is_file() else 0
                took.write_text(json.dumps({"seconds": seconds, "writes": writes}))
            found = compare.content(self.directory / name / "out")
            self._references[case.name] = Reference(found, **json.loads(took.read_text()))
        return self._references[case.name]

    def survive(self, case: Case, seed: int, kinds: Sequence[str] = KINDS) -> str:
        """Kills a command in ways of these kinds and goes on with it; returns what was done.

        Raises:
          Wrong: it did not survive.
        """
        known = self.reference(case)
        rng = np.random.default_rng(seed)
        place = self.furnish(f"{case.name}-{seed}")
        cold = not case.small and rng.random() < 0.1
        done: list[str] = ["cold"] if cold else []
        try:
            for kill in range(MOST_KILLS):
                fault = draw(rng, known, cold, kinds)
                done.append(str(fault))
                process = self.call(case, place, resumed=kill > 0, write=fault.write, cold=cold)
                _inflict(process, fault)
                _judge(case, process, fault, process.wait(LIMIT))
                _alone(place)
                if rng.random() < 0.5:
                    break
            self.finish(case, place, known)
        except (Wrong, TimeoutError) as error:
            raise Wrong(f"{', '.join(done)}: {error}") from None
        shutil.rmtree(place)
        return ", ".join(done)

    def finish(self, case: Case, place: Path, known: Reference) -> None:
        """Goes on, undisturbed.

        Raises:
          Wrong: what is there at the end is not what an undisturbed run leaves.
        """
        process = self.call(case, place, resumed=True)
        status = process.wait(LIMIT)
        finished = status == 2 and case.done and case.done in process.errors
        if status and not finished:
            raise Wrong(f"going on ended with {status}: {_last(process)}")
        _quiet(process)
        _alone(place)
        _unlocked(place)
        if left := [*compare.leftovers(place), *map(str, (place / "temporary").iterdir())]:
            raise Wrong(f"left behind: {', '.join(left[:5])}")
        if found := list(compare.differences(compare.content(place / "out"), known.content)):
            raise Wrong("; ".join(found[:3]))


def draw(rng: np.random.Generator, known: Reference, cold: bool, kinds: Sequence[str]) -> Fault:
    """What happens to a call. The undisturbed one compiled everything; a cold one has to import it, too."""
    kind = rng.choice(list(kinds))
    moment = float(rng.uniform(0, 0.6 * known.seconds + (4.0 if cold else 0.0)))
    if kind == "write" and known.writes and not cold:
        return Fault(write=int(rng.integers(1, known.writes + 1)))
    if kind == "term":
        return Fault(((moment, signal.SIGTERM),))
    if kind == "interrupt":
        return Fault(((moment, signal.SIGINT),))
    if kind == "twice":
        return Fault(((moment, signal.SIGINT), (float(rng.uniform(0, 0.5)), signal.SIGINT)))
    return Fault(((moment, signal.SIGKILL),))


def _inflict(process: Process, fault: Fault) -> None:
    for after, number in fault.signals:
        if process.poll(after) is None:
            process.send(number)


def _judge(case: Case, process: Process, fault: Fault, status: int) -> None:
    """Whether a call that was killed ended as it should; it may have been done before."""
    expected = {0}
    for _, number in fault.signals:
        expected |= {signal.SIGKILL: {-signal.SIGKILL}, signal.SIGTERM: {RUN_AGAIN}, signal.SIGINT: {STOPPED}}[number]
    if fault.write:
        expected |= {-signal.SIGKILL}
    finished = status == 2 and case.done and case.done in process.errors
    if status not in expected and not finished:
        raise Wrong(f"ended with {status}, not {' or '.join(map(str, sorted(expected)))}: {_last(process)}")
    _quiet(process)


def _quiet(process: Process) -> None:
    if "Traceback" in process.errors or "Traceback" in process.output:
        raise Wrong(f"a traceback: {process.errors[-1500:]}")


def _last(process: Process) -> str:
    return process.errors[-1500:].strip() or "it says nothing"


def _alone(place: Path) -> None:
    """Nothing that a case has started still runs; what ends by itself has a few seconds."""
    late = time.monotonic() + 5
    while left := list(_running(place)):
        if time.monotonic() > late:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
            raise Wrong(f"{len(left)} processes still run")
        time.sleep(0.02)


def _running(place: Path) -> Iterator[int]:
    """Processes with the case's mark in their environment, or with its files open."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == os.getpid():
            continue
        try:
            marked = f"{MARK}={place}".encode() in (entry / "environ").read_bytes().split(b"\0")
            if marked or Path(os.readlink(entry / "fd" / "1")).parent == place:
                yield int(entry.name)
        except OSError:
            continue


def _unlocked(place: Path) -> None:
    for path in place.rglob(".lock"):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Wrong(f"{path} is still locked") from None


def run(
    count: int,
    seed: int,
    directory: Path,
    *,
    only: Sequence[str] = (),
    kinds: Sequence[str] = KINDS,
    programs: Path | None = None,
) -> int:
    """Runs cases and prints a line for each; returns how many survived."""
    chosen = [case for case in CASES if not only or case.name in only]
    survived = 0
    with Harness(directory, programs) as harness:
        harness.build()
        for own in range(seed, seed + count):
            case = chosen[own % len(chosen)]
            began = time.monotonic()
            try:
                told = f"survived: {harness.survive(case, own, kinds)}"
                survived += 1
            except Wrong as error:
                told = f"LOST: {error}"
            again = f"python -m tests.faults.kills 1 --only {case.name} --seed {own}"
            print(f"{case.name} {time.monotonic() - began:.1f} s {told}  [{again}]", flush=True)
    print(f"kills_survived: {survived} of {count}")
    return survived


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--kinds", nargs="*", default=KINDS, choices=KINDS)
    parser.add_argument("--directory", type=Path, help="kept, with the undisturbed runs; default: a temporary one")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    with tempfile.TemporaryDirectory(prefix="kills-") as temporary:
        directory = (given.directory or Path(temporary)).resolve()
        survived = run(given.count, given.seed, directory, only=given.only, kinds=given.kinds)
    sys.exit(survived != given.count)


if __name__ == "__main__":
    main()
