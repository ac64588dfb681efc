"""The same readers under atheris, which learns from what code a document reaches: `make fuzz`.

    python -m tests.faults.fuzz_guided [TARGET ...] -- [options of libFuzzer]

The fuzzer's bytes are the choices that change a valid document. Stops at the first finding, and says it.
"""

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["rlae_jax"]):
    from tests.faults import fuzz
    from tests.faults.targets import make_targets


class Choices(random.Random):
    """Choices from bytes, one after another; where they are used up, the first of everything."""

    def __new__(cls, data: bytes) -> "Choices":
        return super().__new__(cls)

    def __init__(self, data: bytes):
        self._left = data
        super().__init__(0)

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        taken, self._left = self._left[:size], self._left[size:]
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53

    def seed(self, *given: Any) -> None:
        """Nothing: the bytes are all."""


def main() -> None:
    """The command."""
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    only, options = given[:at], given[at + 1 :]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as directory:
        targets = [target for target in make_targets(Path(directory)) if not only or target.name in only]
        fuzz.warm(targets)

        def once(data: bytes) -> None:
            source = Choices(data)
            target = targets[source.randrange(len(targets))]
            document = fuzz.spoilt(target, source)
            finding = fuzz.check(target, document)
            if finding is not None:
                raise AssertionError(f"{target.name}: {finding}: {document[:500]!r}")

        atheris.Setup([sys.argv[0], *options], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
