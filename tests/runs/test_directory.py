"""Whose a run's directory is, on which devices, and for which processes."""

import pytest

from rlae_jax import files, hosts
from rlae_jax.errors import InputError
from rlae_jax.runs import directory
from rlae_jax.runs.directory import CONFIG_FILE, claim_directory, devices, is_late

RUN = {"schema": 1, "settings": {"iterations": 3, "seed": 1}}
ON_A_MESH = RUN | {"mesh": {"data": 4, "model": 2}, "processes": 2}


def test_a_run_may_move_to_other_devices_which_is_told(tmp_path):
    out = tmp_path / "run"
    claim_directory(out, RUN | devices(None), resume=False)
    claim_directory(out, RUN | devices(None), resume=True)
    with pytest.warns(UserWarning, match="was on one device and goes on on the mesh data=4,model=2 of 2 processes$"):
        claim_directory(out, ON_A_MESH, resume=True)
    assert files.read_json(out / CONFIG_FILE) == ON_A_MESH
    with pytest.warns(UserWarning, match="was on the mesh data=4,model=2 of 2 processes and goes on on one device$"):
        claim_directory(out, RUN, resume=True)  # as runs of earlier versions have it


def test_a_run_may_be_longer_and_write_its_answers_otherwise(tmp_path):
    claim_directory(tmp_path / "run", RUN, resume=False)
    other = RUN | {"settings": RUN["settings"] | {"iterations": 5, "engine": True, "slots": 3}}
    claim_directory(tmp_path / "run", other, resume=True)
    assert files.read_json(tmp_path / "run" / CONFIG_FILE) == other


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
    answers[dict] = RUN | {"settings": {"iterations": 3, "seed": 2}}
    with pytest.raises(InputError, match=r"settings\.seed is 2 on process 1 and 1 on process 0"):
        claim_directory(tmp_path / "third", RUN, resume=False)
    assert not (tmp_path / "third").exists()
