"""Places that nothing can be written to are told in one line before anything is loaded, and nothing is changed."""

import os
import sys
from pathlib import Path

import pytest

from rlae_jax import files
from rlae_jax.commands import main as commands
from rlae_jax.errors import InputError


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """Places where nothing can be, by what is wrong with them."""
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone" / "away")
    os.mkfifo(tmp_path / "pipe")
    places = {name: str(tmp_path / name) for name in ("loop", "nowhere", "pipe")}
    return places | {
        "in a loop": str(tmp_path / "loop" / "x"),
        "below a file": str(tmp_path / "file" / "x" / "y"),
        "long name": str(tmp_path / ("n" * 256)),
        "long name, of few letters": str(tmp_path / ("ä" * 128)),
        "long name below": str(tmp_path / "a" / ("n" * 256) / "b"),
        "long path": str(tmp_path / "/".join(["directory"] * 500)),
        "NUL": f"{tmp_path}/a\0b",
        "no text": f"{tmp_path}/a\ud800b",
        "a line's end": f"{tmp_path}/file/a\nb",
        "device": "/dev/null",
        "below a device": "/dev/null/x",
        "processes": "/proc/x/y",
    }


def listing(directory: Path) -> list[tuple[str, int]]:
    return sorted((str(path), path.lstat().st_mtime_ns) for path in [directory, *directory.rglob("*")])


def test_bad_places(places: dict[str, str], tmp_path: Path) -> None:
    before = [one for one in listing(tmp_path) if one[0] != str(tmp_path)]
    for kind in ("directory", "file"):
        for what, place in places.items():
            with pytest.raises(InputError, match="can be made there") as raised:
                files.require_place(place, kind)  # type: ignore[arg-type]
            told = str(raised.value)
            assert "\n" not in told, what
            assert len(told) < 1000, what
    with pytest.raises(InputError, match="is a file"):
        files.require_place(tmp_path / "file", "directory")
    with pytest.raises(InputError, match="is a directory"):
        files.require_place(tmp_path, "file")
    assert [one for one in listing(tmp_path) if one[0] != str(tmp_path)] == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_not_ours(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="is not writable"):
        files.require_place(tmp_path / "x")


def test_good_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for place in ("a", "a/b/c", ".", "link/x", "n" * 255, "with space\tand more"):
        files.require_place(place)
    for place in ("file", "a/b/c", "link/file", "link/x"):
        files.require_place(place, "file")
    assert sorted(os.listdir()) == ["file", "link"]


MODELS = ["--models", "no-model-at-all"]
TASK = ["--task", "skills"]
COMMANDS = [
    ["train", *MODELS, *TASK, "--out"],
    ["train", *MODELS, *TASK, "--out", "fine", "--checkpoints"],
    ["ablate", *MODELS, *TASK, "--vary", "span_length=1,2", "--out"],
    ["evaluate", *MODELS, *TASK, "--out"],
    ["generate", *MODELS, "--prompt", "x", "--html"],
    ["specialists", *TASK, "--out"],
    ["demo", "--out"],
    ["emorl", "train", "--base", "none", "--data", "reflections", "--objective", "brevity", "--out"],
    ["emorl", "demo", "--out"],
    ["emorl", "export", "--run", "none", "--out"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_commands_look_at_the_place_first(
    command: list[str],
    places: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(commands.CACHE_VARIABLE, "off")
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for place in ("loop", "below a file", "long name", "below a device"):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *command, places[place]])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        told = capsys.readouterr().err
        assert ended.value.code == 2, told
        assert told.startswith("error: "), told
        assert places[place][:100] in told
        assert len(told.splitlines()) == 1
    assert sorted(os.listdir()) == before


def test_an_empty_path_is_not_the_current_directory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["demo", "--out", ""], ["generate", *MODELS, "--prompt", "x", "--html", ""]):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *command])
        with pytest.raises(SystemExit) as ended:
            commands.main()
        assert ended.value.code == 2
        assert "the path is empty" in capsys.readouterr().err
