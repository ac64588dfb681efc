"""Writing: whole or not at all, whatever happens, and told in one line."""

import errno
import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from rlae_jax import files
from rlae_jax.errors import InputError, OutputError, grouped_error
from rlae_jax.models.stored import write_tensors

Writer = Callable[[Path], None]


def write_with_library(path: Path) -> None:
    with files.making(path) as partial:
        write_tensors(partial / "a.safetensors", {"a": np.zeros(3, np.float32)})
        files.write_json(partial / "config.json", {})


def append_line(path: Path) -> None:
    with files.GrowingFile(path) as lines:
        lines.write("new\n")


WRITERS: dict[str, Writer] = {
    "text": lambda path: files.write_text(path, "new\n"),
    "bytes": lambda path: files.write_bytes(path, b"new\n"),
    "json": lambda path: files.write_json(path, {"new": 1}),
    "lines": lambda path: files.write_json_lines(path, [{"new": 1}, {"new": 2}]),
    "appended": append_line,
    "directory": write_with_library,
}


@pytest.fixture
def fail_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, BaseException], list[Path]]:
    """Has the n-th write (from 1) raise; gives the list of those that were announced."""
    told: list[Path] = []

    def arm(n: int, error: BaseException) -> list[Path]:
        told.clear()

        def announce(path: Path) -> None:
            told.append(path)
            if len(told) == n:
                raise error

        monkeypatch.setattr(files, "before_write", announce)
        return told

    return arm


def content(directory: Path) -> dict[str, bytes | None]:
    paths = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("kind", WRITERS)
def test_a_failure_at_any_write_leaves_what_was_there(
    kind: str, error: BaseException, tmp_path: Path, fail_at: Callable[[int, BaseException], list[Path]]
) -> None:
    path = tmp_path / "there"
    if kind != "directory":
        path.write_text("old\n")
    before, after = content(tmp_path), None
    told = fail_at(0, error)
    WRITERS[kind](path)
    total, after = len(told), content(tmp_path)
    assert total >= 2
    assert after != before
    for n in range(1, total + 1):
        if kind == "directory":
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.write_text("old\n")
        fail_at(n, error)
        with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            WRITERS[kind](path)
        assert content(tmp_path) == before, n
        if isinstance(error, OSError):
            assert str(tmp_path) in str(raised.value)
            assert "\n" not in str(raised.value)
    fail_at(0, error)
    WRITERS[kind](path)
    assert content(tmp_path) == after


def test_a_full_disk_is_told_with_what_was_needed_and_what_is_free(
    tmp_path: Path, fail_at: Callable[[int, BaseException], list[Path]]
) -> None:
    fail_at(2, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(
        OutputError, match=r"a: cannot be written \(No space.*: 2.0 KiB needed, .* free\); what was saved"
    ):
        files.write_bytes(tmp_path / "a", bytes(2048))


@pytest.mark.parametrize(
    "error",
    [
        Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
        ValueError("RESOURCE_EXHAUSTED: Failed to write 658 bytes to file 15: No space left [os_error_code='28']"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["Rust", "tensorstore", "Python"],
)
def test_what_libraries_say_of_a_full_disk_is_understood(error: Exception, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"No space left on device: 9.8 KiB needed"),
        files.library_write(tmp_path / "a", 10_000),
    ):
        raise error


def test_other_errors_of_libraries_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), files.library_write(tmp_path):
        raise ZeroDivisionError


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    at = tmp_path / "disk"
    at.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", at], capture_output=True).returncode:
        pytest.skip("mounting is not allowed")
    yield at
    subprocess.run(["umount", at], check=True)


def test_a_disk_that_is_full(small_disk: Path) -> None:
    files.write_text(small_disk / "kept", "kept")
    with files.GrowingFile(small_disk / "lines") as lines:
        lines.write("kept\n")
        with pytest.raises(OutputError, match=r"1.9 MiB needed"):
            lines.write("x" * 2_000_000)
        lines.write("also kept\n")
    with pytest.raises(OutputError, match=r"1.9 MiB needed"):
        files.write_text(small_disk / "kept", "x" * 2_000_000)
    with (
        pytest.raises(OutputError, match=r"/model/a: .*: 3.8 MiB needed"),
        files.making(small_disk / "model") as partial,
    ):
        write_tensors(partial / "a", {"a": np.zeros(1_000_000, np.float32)})
    assert content(small_disk) == {"kept": b"kept", "lines": b"kept\nalso kept\n"}


def test_a_list_of_findings_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    findings = [("missing", str(i)) for i in range(9)]
    assert "the full list is in" in str(grouped_error("all", findings))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no such directory"))
    error = grouped_error("all", findings)
    assert isinstance(error, InputError)
    assert str(error).splitlines() == ["all", "  9 missing: 0; 1; 2; 3; 4; ..."]


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, os, signal\n"
        "from pathlib import Path\n"
        "from rlae_jax import files\n"
        "with files.writing(Path(sys.argv[1])) as f, files.making(Path(sys.argv[2])) as partial:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "a", tmp_path / "b"], check=False)
    left = content(tmp_path)
    assert len(left) == 2
    assert all(".partial-" in name for name in left)
    with files.writing(tmp_path / "a") as first:
        assert len(content(tmp_path)) == 2  # that of b, and this one
        with files.writing(tmp_path / "a") as second:
            assert len(content(tmp_path)) == 3
            second.write("second")
        first.write("first")
    with files.making(tmp_path / "b"):
        pass
    assert content(tmp_path).keys() == {"a", "b", "b/digests.json"}
    assert (tmp_path / "a").read_text() == "first"


def test_files_get_the_usual_permissions_and_long_names_are_written(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    files.write_text(tmp_path / ("n" * 255), "long")
    files.write_text(tmp_path / "short", "short")
    modes = {path.name[:5]: path.stat().st_mode for path in tmp_path.iterdir()}
    assert modes["short"] == modes["usual"]
    assert (tmp_path / ("n" * 255)).read_text() == "long"


def test_a_line_without_its_end_gets_one(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text('{"a": 1}')
    append_line(tmp_path / "lines")
    assert (tmp_path / "lines").read_text() == '{"a": 1}\nnew\n'


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    files.write_text(tmp_path / "a", "text")
    (tmp_path / ".a.partial-somebody's").touch()
    files.write_text(tmp_path / "a", "again")
    assert content(tmp_path) == {"a": b"again", ".a.partial-somebody's": b""}
