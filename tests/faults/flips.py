"""Flips single bits of what commands left, one at a time, and runs what reads it: noticed or harmless, never silent.

    python -m tests.faults.flips 100 --seed 0

A subject is a directory that a command left, finished or killed half-way, and the call that reads it. A flip is noticed
if the call ends with status 2 and one line, or says a warning and ends as it does without the flip; harmless if it ends
so without a word. It is silent if anything else came out: other files, or another answer. A line per flip, then
`flips_silent: M of N`.
"""

import argparse
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults import compare
from tests.faults.cases import CASES, Case
from tests.faults.kills import LIMIT, Harness

_SKIPPED = {".png", ".md"}  # for people: no command reads them


@dataclasses.dataclass(frozen=True)
class Subject:
    """A directory, and what reads it.

    Attributes:
      case: the command that made it.
      reader: the call; none goes on with the case.
      killed: the command was killed in the middle of its writes.
      under: what of the working directory is flipped.
    """

    name: str
    case: str
    reader: str = ""
    killed: bool = False
    under: str = "out"


_ANSWER = "--prompt r1234= --max-new-tokens 4 --show-weights"
SUBJECTS = (
    Subject("a run that goes on", "train-ppo", killed=True),
    Subject("a trained policy", "train-ppo", f"generate --models alpha beta --policy out {_ANSWER}"),
    Subject("adapters that go on", "emorl-train", killed=True),
    Subject("adapters that are done", "emorl-train"),
    Subject("a search that goes on", "emorl-grid", killed=True),
    Subject("halving that goes on", "emorl-halving", killed=True),
    Subject("adapters that are searched", "emorl-random", under="adapters"),
    Subject("an exported model", "emorl-export", "generate --models out/model --prompt hello --max-new-tokens 4"),
    Subject("an exported adapter", "emorl-export", "generate --base base --adapters out/adapters/brevity --prompt a"),
    Subject("an ablation that goes on", "ablate", killed=True),
    Subject("specialists", "specialists"),
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a call left."""

    status: int
    told: str  # on standard error
    output: str
    content: dict[str, Any]


class Flips:
    """Directories, each made once, and calls that read copies of them."""

    def __init__(self, harness: Harness):
        self._harness = harness
        self._expected: dict[str, Outcome] = {}

    def made(self, subject: Subject) -> Path:
        """The working directory with what the command left."""
        harness, case = self._harness, _case(subject.case)
        place = harness.directory / f"flips-{SUBJECTS.index(subject)}"
        if subject.name not in self._expected:
            writes = harness.reference(case).writes
            place = harness._furnish(place.name)
            process = harness._call(case, place, resumed=False, write=max(2 * writes // 3, 1) if subject.killed else 0)
            process.wait(LIMIT)
            self._expected[subject.name] = self.read(subject, place, "whole")
        return place

    def read(self, subject: Subject, place: Path, name: str, flip: tuple[str, int, int] | None = None) -> Outcome:
        """What reads a copy of the directory, in which one bit may be another one."""
        case, harness = _case(subject.case), self._harness
        copy = harness.directory / f"flipped-{name}"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(place, copy, symlinks=True)
        if flip is not None:
            path, at, bit = copy / flip[0], *flip[1:]
            content = bytearray(path.read_bytes())
            content[at] ^= 1 << bit
            path.write_bytes(content)
        if subject.reader:
            process = harness._start(subject.reader.split(), copy, "often")
        else:
            resumed = subject.under == "out"
            if not resumed:
                shutil.rmtree(copy / "out", ignore_errors=True)
            process = harness._call(case, copy, resumed=resumed)
        status = process.wait(LIMIT)
        content = {} if subject.reader or status else compare.content(copy / "out")
        return Outcome(status, process.errors, process.output if subject.reader else "", content)

    def judge(self, subject: Subject, flip: tuple[str, int, int]) -> str:
        """noticed, harmless, or what is wrong."""
        place = self.made(subject)
        expected = self._expected[subject.name]
        found = self.read(subject, place, "one", flip)
        if found.status != 0:
            lines = found.told.strip().splitlines()
            told = found.status == 2 and "Traceback" not in found.told and len(lines) <= 10
            return "noticed" if told else f"status {found.status}: {' / '.join(lines[-2:])}"
        # What is not written anew is still another one.
        changed = [
            name
            for name in sorted(found.content.keys() | expected.content.keys())
            if found.content.get(name) != expected.content.get(name) and f"out/{name}" != flip[0]
        ]
        if found.output != expected.output:
            changed.append("the answer")
        if changed:
            return f"silent: {', '.join(changed[:3])}" + (" (with a warning)" if "warning" in found.told else "")
        return "noticed" if "warning" in found.told and found.told != expected.told else "harmless"

    def files(self, subject: Subject) -> list[Path]:
        """What can be flipped, as names in the working directory."""
        place = self.made(subject)
        found = sorted(path for path in (place / subject.under).rglob("*") if path.is_file() and path.stat().st_size)
        return [path.relative_to(place) for path in found if path.suffix not in _SKIPPED]


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


def run(harness: Harness, n: int, seed: int, subjects: tuple[Subject, ...] = SUBJECTS) -> Iterator[tuple[str, str]]:
    """(which flip, what came of it) of n flips, spread over the subjects and their files."""
    flips, rng = Flips(harness), np.random.default_rng(seed)
    orders: dict[str, list[Path]] = {}
    for i in range(n):
        subject = subjects[i % len(subjects)]
        if not orders.get(subject.name):
            names = flips.files(subject)
            orders[subject.name] = [names[k] for k in rng.permutation(len(names))]
        name = orders[subject.name].pop()
        size = (flips.made(subject) / name).stat().st_size
        flip = str(name), int(rng.integers(size)), int(rng.integers(8))
        yield f"{subject.name}: {flip[0]}, byte {flip[1]}, bit {flip[2]}", flips.judge(subject, flip)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("n", nargs="?", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a part of the subjects' names")
    given = parser.parse_args()
    subjects = tuple(subject for subject in SUBJECTS if (given.only or "") in subject.name)
    counts = {"noticed": 0, "harmless": 0}
    with tempfile.TemporaryDirectory() as directory, Harness(Path(directory)) as harness:
        harness.build()
        for flip, told in run(harness, given.n, given.seed, subjects):
            counts[told] = counts.get(told, 0) + 1
            print(f"{told}: {flip}", flush=True)
    print(f"noticed: {counts['noticed']}, harmless: {counts['harmless']}")
    print(f"flips_silent: {given.n - counts['noticed'] - counts['harmless']} of {given.n}")


if __name__ == "__main__":
    main()
