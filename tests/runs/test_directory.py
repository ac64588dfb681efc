"""Whose a run's directory is, on which devices, and for which processes."""

import dataclasses
import json

import pytest

from rlae_jax import files, hosts, records
from rlae_jax.errors import InputError
from rlae_jax.runs import directory
from rlae_jax.runs.directory import CONFIG_FILE, OnDevices, RunConfig, claim_directory, is_late, read_config


@dataclasses.dataclass(frozen=True)
class Settings:
    iterations: int = 3
    seed: int = 1
    engine: bool = False
    slots: int | None = None

    def __post_init__(self):
        if self.iterations < 1:
            raise InputError(f"iterations must be at least 1, not {self.iterations}")


class OwnRun(OnDevices, kw_only=True):
    settings: Settings


class Other(RunConfig, tag_field="command", tag="other"):
    pass


RUN = OwnRun(settings=Settings())
ON_A_MESH = OwnRun(settings=Settings(), mesh={"data": 4, "model": 2}, processes=2)


def test_a_run_may_move_to_other_devices_which_is_told(tmp_path):
    out = tmp_path / "run"
    claim_directory(out, RUN, resume=False)
    claim_directory(out, RUN, resume=True)
    with pytest.warns(UserWarning, match="was on one device and goes on on the mesh data=4,model=2 of 2 processes$"):
        claim_directory(out, ON_A_MESH, resume=True)
    assert files.read_json(out / CONFIG_FILE) == records.plain(ON_A_MESH)
    with pytest.warns(UserWarning, match="was on the mesh data=4,model=2 of 2 processes and goes on on one device$"):
        claim_directory(out, RUN, resume=True)
    files.write_json(out / CONFIG_FILE, {"settings": {"iterations": 3, "seed": 1}})  # as earlier versions have it
    claim_directory(out, RUN, resume=True)


def test_a_run_may_be_longer_and_write_its_answers_otherwise(tmp_path):
    claim_directory(tmp_path / "run", RUN, resume=False)
    other = OwnRun(settings=Settings(iterations=5, engine=True, slots=3))
    claim_directory(tmp_path / "run", other, resume=True)
    assert read_config(tmp_path / "run", OwnRun) == other


def test_what_all_processes_are_told(tmp_path, monkeypatch, raises_input_error):
    """A directory that is not shared; the clock of the first process; settings that differ."""
    monkeypatch.setattr(directory, "_SECONDS_TO_APPEAR", 0.0)
    answers = {}
    monkeypatch.setattr(hosts, "gather", lambda value: [value, answers.get(type(value), value)])
    answers[bool] = False
    message = raises_input_error(lambda: claim_directory(tmp_path / "run", RUN, resume=False), "process 1", "share")
    assert str(tmp_path / "run") in message
    del answers[bool]
    claim_directory(tmp_path / "seen", RUN, resume=False)
    assert is_late(0.0, 61.0, 1.0)
    assert not is_late(0.0, 59.0, 1.0)
    answers[dict] = records.plain(OwnRun(settings=Settings(seed=2)))
    with pytest.raises(InputError, match=r"settings\.seed is 2 on process 1 and 1 on process 0"):
        claim_directory(tmp_path / "third", RUN, resume=False)
    assert not (tmp_path / "third").exists()


@pytest.mark.parametrize(
    ("there", "told"),
    [
        ({"settings": {"iterations": 0}}, r"config\.json: settings: iterations must be at least 1, not 0"),
        ({"settings": {"iterations": "x"}}, r"config\.json: settings\.iterations is a text \('x'\); expected int"),
        ({"settings": {"hue": 1}}, r"config\.json: unknown key settings\.hue: written by a newer version"),
        ({"settings": {}, "mesh": {"data": 0}}, r"config\.json: mesh\.data is a number \(0\); expected int >= 1"),
        ({"settings": {}, "schema": 2}, r"config\.json: schema 2 was written by a newer version"),
        ({"settings": {}, "schema": 0}, r"config\.json: schema is a number \(0\); expected int >= 1"),
        ({"settings": {}, "command": "other"}, r"(what the command other made|no run of train, but of other)"),
        ({"settings": {}, "command": [1]}, r"(what the command a list made|no run of train, but of a list)"),
    ],
)
def test_a_configuration_is_checked_before_it_is_used(tmp_path, there, told):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(there))
    for use in (lambda: read_config(tmp_path, OwnRun), lambda: claim_directory(tmp_path, RUN, resume=True)):
        with pytest.raises(InputError, match=told):
            use()


def test_a_command_reads_its_own_runs(tmp_path):
    claim_directory(tmp_path / "run", Other(), resume=False)
    assert files.read_json(tmp_path / "run" / CONFIG_FILE) == {"command": "other", "schema": 1}
    assert read_config(tmp_path / "run", Other) == Other()
    with pytest.raises(InputError, match=r"a training run; \S+ is no run of train, but of other$"):
        read_config(tmp_path / "run", OwnRun)
    with pytest.raises(InputError, match=r"is not a run directory: it has no config\.json"):
        read_config(tmp_path, OwnRun)
