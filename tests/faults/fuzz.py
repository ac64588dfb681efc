"""Gives every reader of the package documents that are wrong somewhere.

    python -m tests.faults.fuzz 20000 --seed 0

A reader may give what it read or raise its own error: `InputError`, for bodies of requests `ApiError`. Anything else is
a finding, as is more than five seconds, or more than 3 GiB. Prints each kind of finding once, with a command that
repeats it, and `fuzz_findings: K of N`.
"""

import argparse
import contextlib
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.targets import Target, make_targets

SECONDS = 5.0
BYTES = 3 * 2**30


class Hang(BaseException):
    """A reader did not come back in time."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Ends what takes longer than `SECONDS`; warnings are not shown."""

    def end(number: int, frame: Any) -> None:
        raise Hang(f"more than {SECONDS:.0f} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check(target: Target, data: bytes) -> str | None:
    """What is wrong with how a reader takes a document, as kind and place; None where nothing is."""
    began = time.monotonic()
    try:
        with limited():
            target.read(data)
    except target.may_raise as error:
        lines = str(error).splitlines()
        if not lines or len(lines) > 12:
            return "a message without words, or of too many lines"
        if max(map(len, lines)) > 3_000:
            return "a message with an endless line"
    except Hang:
        return f"took more than {SECONDS:.0f} s"
    except BaseException as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/rlae_jax/" in frame.filename]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].name}" if own else "outside"
        return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"
    if time.monotonic() - began > SECONDS:
        return f"took more than {SECONDS:.0f} s"
    return None


def spoilt(target: Target, source: random.Random) -> bytes:
    """One of a target's documents, changed."""
    return target.change(source, source.choice(target.documents))


def warm(targets: Sequence[Target]) -> None:
    """Reads all documents: what is imported late is imported now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target in targets:
            for document in target.documents:
                target.read(document)


def limit_memory() -> None:
    """An allocation far beyond what readers need fails, as `MemoryError`."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + BYTES, resource.RLIM_INFINITY))


def run(count: int, seed: int, only: Sequence[str], directory: Path, keep: Path | None = None) -> int:
    """Tries documents; returns how many were findings."""
    targets = [target for target in make_targets(directory) if not only or target.name in only]
    warm(targets)
    limit_memory()
    found: dict[tuple[str, str], int] = {}
    for own in range(seed, seed + count):
        target = targets[own % len(targets)]
        data = spoilt(target, random.Random(own))
        finding = check(target, data)
        if finding is None:
            continue
        kind = (target.name, finding.split(":")[0] + finding.partition(":")[2].split(" ")[0])
        found[kind] = found.get(kind, 0) + 1
        if found[kind] == 1:
            again = f"python -m tests.faults.fuzz 1 --only {target.name} --seed {own}"
            print(f"{target.name}: {finding}  [{again}]", flush=True)
            if keep is not None:
                keep.mkdir(parents=True, exist_ok=True)
                (keep / f"{target.name.replace('/', '-')}-{own}").write_bytes(data)
    total = sum(found.values())
    print(f"fuzz_findings: {total} of {count}")
    return total


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", type=Path, help="where the documents of findings go")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        sys.exit(run(given.count, given.seed, given.only, Path(directory), given.keep) > 0)


if __name__ == "__main__":
    main()
