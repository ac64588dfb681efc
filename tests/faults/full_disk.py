"""Has the disk be full from every write of a command on, in turn, and goes on when there is room.

    python -m tests.faults.full_disk [--only train-ppo emorl-search] [--every 1]

Three calls a write: one that meets the full disk, one that goes on while it is still full, one with room. The first two
must end with status 2 and one line that says what could not be written, the last with the bytes of an undisturbed run
(`kills.py`, whose cases these are). A line for every write that is lost, then `full_disk_survived: M of N`.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.faults import kills
from tests.faults.cases import CASES, Case
from tests.faults.kills import Harness, Wrong
from tests.faults.runner import Process

NO_ROOM = "No space left on device"


def survive(harness: Harness, case: Case, write: int) -> None:
    """The disk is full from a write on, still is when the command is called again, and then has room.

    Raises:
      Wrong: it did not survive.
    """
    known = harness.reference(case)
    place = harness.furnish(f"{case.name}-full")
    for resumed in (False, True):
        process = harness.call(case, place, resumed=resumed, full=1 if resumed else write)
        status = process.wait(kills.LIMIT)
        done = resumed and status in (0, 2) and case.done and case.done in process.errors
        if not done:  # only the last write of all can have nothing left to do after it
            refused(process, status, place)
    harness.finish(case, place, known)


def refused(process: Process, status: int, place: Path) -> None:
    """Raises `Wrong` unless a command said in one line what could not be written."""
    told = [line for line in process.errors.splitlines() if line.startswith("error: ")]
    if status != 2 or len(told) != 1 or NO_ROOM not in told[0] or "Traceback" in process.errors:
        raise Wrong(f"status {status}: {process.errors[-800:].strip() or 'it says nothing'}")
    name = told[0].removeprefix("error: ").split(":")[0]
    if not (place / name).is_relative_to(place) or ".partial-" in name:
        raise Wrong(f"names {name}")


def run(directory: Path, *, only: Sequence[str] = (), every: int = 1, programs: Path | None = None) -> tuple[int, int]:
    """Tries every so-manieth write of cases; returns how many survived, and how many there were."""
    survived = tried = 0
    with Harness(directory, programs) as harness:
        harness.build()
        for case in [case for case in CASES if not only or case.name in only]:
            writes = range(1, harness.reference(case).writes + 1, every)
            lost = 0
            for write in writes:
                try:
                    survive(harness, case, write)
                except (Wrong, TimeoutError) as error:
                    lost += 1
                    print(f"{case.name} LOST at write {write}: {error}", flush=True)
            survived, tried = survived + len(writes) - lost, tried + len(writes)
            print(f"{case.name}: {len(writes) - lost} of {len(writes)} writes survived", flush=True)
    print(f"full_disk_survived: {survived} of {tried}")
    return survived, tried


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], choices=[case.name for case in CASES])
    parser.add_argument("--every", type=int, default=1, help="try one write in so many")
    parser.add_argument("--directory", type=Path, help="kept, with the undisturbed runs; default: a temporary one")
    given = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell runs in the background ignores it
    with tempfile.TemporaryDirectory(prefix="full-") as temporary:
        directory = (given.directory or Path(temporary)).resolve()
        survived, tried = run(directory, only=given.only, every=given.every)
    sys.exit(survived != tried)


if __name__ == "__main__":
    main()
