"""Inputs that no command can use: what `python -m tests.faults.bad_inputs` notices, and a sample of what it tries."""

import sys

import pytest

from rlae_jax.commands import main as commands
from tests.faults import bad_inputs
from tests.faults.bad_inputs import Bad

EVERY = bad_inputs.everything()
SAMPLE = EVERY[:: len(EVERY) // 40]
COLD = {  # by what is wrong: the command
    "no such command": "nonesuch",
    "--learning-rate nan": "train",
    "very many layers": "generate",
    "a config.json that is nested": "plan",
    "weights with a long header": "inspect",
    "a run of a list": "emorl",
    "data deep.jsonl": "evaluate",
    "--vary learning_rate=nan": "ablate",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("bad") / "world"
    bad_inputs.furnish(path)
    return path


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


def _wrong(monkeypatch, tmp_path, command):
    """What is noticed of a command that does this."""
    world = tmp_path / "world"
    world.mkdir(exist_ok=True)
    (world / "old").write_text("1")
    monkeypatch.setattr(commands, "main", lambda: command(world))
    return bad_inputs.try_one(Bad("all", ()), world, tmp_path / "scratch").wrong


def _refuse(status=2, lines=1):
    print("no\n" * lines, end="")
    sys.exit(status)


@pytest.mark.parametrize(
    ("command", "noticed"),
    [
        (lambda world: _refuse(), ""),
        (lambda world: _refuse(status=0), "exit status 0"),
        (lambda world: None, "exit status 0"),
        (lambda world: _refuse(status=139), "exit status 139"),
        (lambda world: _refuse(lines=0), "0 lines"),
        (lambda world: _refuse(lines=90), "90 lines"),
        (lambda world: 1 / 0, "a traceback"),
        (lambda world: (print("Traceback (most recent call last):"), _refuse()), "a traceback"),
        (lambda world: ((world / "new").mkdir(), _refuse()), "changed new"),
        (lambda world: ((world / "old").write_text("12"), _refuse()), "changed old"),
        (lambda world: ((world / "old").unlink(), _refuse()), "changed old"),
    ],
)
def test_what_is_noticed(monkeypatch, tmp_path, command, noticed):
    assert _wrong(monkeypatch, tmp_path, command) == noticed


def test_what_takes_too_much_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr(bad_inputs, "SECONDS", 0)
    assert _wrong(monkeypatch, tmp_path, lambda world: _refuse()) == "0 s of a processor"
    monkeypatch.setattr(bad_inputs, "SECONDS", 20)
    monkeypatch.setattr(bad_inputs, "KIB", -1)
    assert _wrong(monkeypatch, tmp_path, lambda world: _refuse()).endswith(" GiB")


def test_there_are_enough_of_every_command():
    assert len(EVERY) >= 300
    tried = {" ".join(bad.arguments[: 2 if bad.arguments[:1] == ("emorl",) else 1]) for bad in EVERY}
    assert tried >= bad_inputs.CALLS.keys()
    known = commands.COMMANDS.keys() - {"emorl"} | {f"emorl {name}" for name in commands.EMORL_COMMANDS}
    assert bad_inputs.CALLS.keys() == known


@pytest.mark.parametrize("bad", SAMPLE, ids=str)
def test_refused(world, scratch, bad):
    refusal = bad_inputs.try_one(bad, world, scratch)
    assert not refusal.wrong, refusal.told


@pytest.mark.rare
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # libraries leave files open on errors
def test_a_share_of_all_is_refused(world, scratch):
    taken = {str(bad): bad_inputs.try_one(bad, world, scratch) for bad in bad_inputs.share(14)}
    assert {bad: (refusal.wrong, refusal.told) for bad, refusal in taken.items() if refusal.wrong} == {}


@pytest.mark.rare
@pytest.mark.parametrize(("what", "command"), COLD.items())
def test_refused_in_a_process_of_its_own(world, scratch, what, command):
    (bad, *_) = [bad for bad in EVERY if what in str(bad) and bad.arguments[:1] == (command,)]
    refusal = bad_inputs.try_alone(bad, world, scratch)
    assert not refusal.wrong, refusal.told
