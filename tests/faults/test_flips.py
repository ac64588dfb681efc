"""Single bits that are flipped are noticed or harmless; `python -m tests.faults.flips` flips more of them."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlae_jax import files
from tests.faults import flips


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[flips.Flips]:
    with flips.world(tmp_path_factory.mktemp("flips")) as made:
        yield made


def outcomes(world: flips.Flips, n: int, subjects: list[flips.Subject]) -> set[str]:
    found = {told: flip for flip, told in flips.run(world, n, 0, subjects)}
    assert found.keys() <= {"noticed", "harmless"}, found
    return set(found)


def test_no_flip_in_what_is_written_is_silent(world: flips.Flips) -> None:
    written = [subject for subject in flips.SUBJECTS if not subject.commands]
    assert outcomes(world, 20, written) == {"noticed", "harmless"}


@pytest.mark.rare
@pytest.mark.parametrize(("goes_on", "n"), [(False, 24), (True, 2)])
def test_no_flip_in_what_commands_left_is_silent(world: flips.Flips, goes_on: bool, n: int) -> None:
    left = [subject for subject in flips.SUBJECTS if subject.commands and subject.goes_on == goes_on]
    assert "noticed" in outcomes(world, n, left)


@pytest.mark.parametrize("sealed", [False, True])
def test_the_harness_finds_what_nothing_tells(world: flips.Flips, sealed: bool) -> None:
    """A number without a digest; the place is that of its first digit, whose lowest bit makes 3 of 2."""
    made = "digest" if sealed else "number"

    def make(out: Path) -> None:
        out.mkdir(parents=True)
        text = '{"n": 25}'
        files.write_json(out / "a.json", json.loads(text)) if sealed else (out / "a.json").write_text(text)

    subject = flips.Subject(f"a {made}", make, lambda out: files.read_json(out / "a.json"))
    place = world.made(subject) / "a.json"
    at = place.read_bytes().index(b"25")
    assert world.judge(subject, (Path("a.json"), at, 0)) == ("noticed" if sealed else "silent")
    broken = dataclasses.replace(subject, read=lambda out: {}[(out / "a.json").read_text()])
    assert world.judge(broken, (Path("a.json"), at, 0)).startswith("KeyError")
