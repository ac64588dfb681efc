"""How commands end: exceptions and signals become a line and a status, at any moment."""

import contextlib
import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rlae_jax import signals
from rlae_jax.commands import ending
from rlae_jax.commands import main as commands
from rlae_jax.errors import InputError, Interrupted, OutputError, Preempted


def ended(command: Callable[[], None], capsys: pytest.CaptureFixture[str], again: str = "") -> tuple[object, str]:
    with pytest.raises(SystemExit) as raised:
        ending.run(command, lambda: again)
    return raised.value.code, capsys.readouterr().err


def raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (InputError("wrong"), 2, "error: wrong\n"),
        (OutputError("full"), 2, "error: full\n"),
        (PermissionError(errno.EACCES, "Permission denied", "/a"), 2, "error: /a: Permission denied\n"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", b"/a"), 2, "error: /a: Too many levels"),
        (OSError(errno.EXDEV, "Invalid cross-device link", "/a", None, "/b"), 2, "error: /a and /b: Invalid"),
        (OSError("told by a library\nin two lines"), 2, "error: told by a library in two lines\n"),
        (OSError(errno.EMFILE, "Too many open files"), 2, "error: Too many open files: this process may open no more"),
        (TimeoutError(), 2, "error: TimeoutError\n"),
        (MemoryError(), 2, "error: there is not enough memory (of this machine); smaller batches"),
        (MemoryError("Unable to allocate 8 EiB"), 2, "error: there is not enough memory (Unable to allocate 8 EiB)"),
        (RecursionError("maximum recursion depth exceeded"), 2, "error: something that was read is nested too deeply"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\n 9 bytes"),
            2,
            "error: the device has not enough memory (RES",
        ),
        (Interrupted("stopped after iteration 1"), 130, "stopped after iteration 1\n"),
        (Preempted("preempted after iteration 1"), 75, "preempted after iteration 1\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (signals.Terminated(), 75, "stopped by SIGTERM\n"),
    ],
    ids=repr,
)
def test_what_is_told(error: BaseException, status: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    found, errors = ended(raising(error), capsys)
    assert found == status
    assert errors.startswith(told)
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(("stop", "status"), [(KeyboardInterrupt, 130), (signals.Terminated, 75)])
def test_a_signal_that_a_library_took_for_an_error(
    stop: type[KeyboardInterrupt], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def translated() -> None:
        try:
            raise stop
        except BaseException as error:
            raise ValueError("Exception raised while comparing") from error

    found, errors = ended(translated, capsys)
    assert found == status
    assert errors == f"{stop() if str(stop()) else 'stopped'}\n"


def test_what_is_unexpected_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    status, errors = ended(raising(KeyError("x")), capsys)
    assert status == 1
    assert "Traceback" in errors
    assert errors.splitlines()[-1].startswith("error: this is unexpected")


def test_how_to_go_on_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in [
        (["train", "--out", "a b"], "rlae-jax train --out 'a b' --resume"),
        (["ablate", "--resume"], "rlae-jax ablate --resume"),
        (["emorl", "search"], "rlae-jax emorl search --resume"),
        (["emorl", "demo"], "rlae-jax emorl demo"),
        (["demo"], "rlae-jax demo"),
        (["generate"], ""),
        (["serve"], ""),
        ([], ""),
    ]:
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *arguments])
        assert commands._again() == told
    assert ended(raising(Interrupted("stopped")), capsys, "x --resume")[1] == "stopped. Go on with:\n  x --resume\n"
    assert ended(raising(signals.Terminated()), capsys, "x")[1] == "stopped by SIGTERM. Go on with:\n  x\n"


def test_nobody_reads_the_output() -> None:
    code = "from rlae_jax.commands import ending\nending.run(lambda: print('x' * 10))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
        assert process.wait(60) == 141
    with open("/dev/full", "w") as full:
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            [sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, env=buffered, check=False
        )
    assert done.returncode == 2
    assert done.stderr == b"error: standard output: No space left on device\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_are_exceptions(number: signal.Signals, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    cleaned = []

    def command() -> None:
        try:
            signal.raise_signal(number)
        finally:
            if number == signal.SIGTERM:
                signal.raise_signal(number)  # to the process and to its group
            cleaned.append(True)

    found, errors = ended(command, capsys)
    assert found == status
    assert len(errors.splitlines()) == 1
    assert cleaned
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, signals.Terminated)])
def test_a_signal_in_a_destructor_is_not_lost(number: signal.Signals, kind: type[BaseException]) -> None:
    class Destroyed:
        def __del__(self) -> None:
            signal.raise_signal(number)

    def destroy() -> None:
        Destroyed()
        time.sleep(5)

    with pytest.raises(kind), signals.as_exceptions():
        destroy()


def test_what_is_not_to_be_taken_back_is_done_first() -> None:
    done = []

    def save() -> None:
        with signals.delayed():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            done.append(True)
        done.append(False)

    with pytest.raises(KeyboardInterrupt), signals.as_exceptions():
        save()
    assert done == [True]


START = (
    "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # which background jobs ignore
    "from rlae_jax import signals\nfrom rlae_jax.commands import entry\n"
    "signals.end_at_once()\nprint('ready', flush=True)\nentry.main()"
)


def stopped_while_it_begins(arguments: list[str], number: signal.Signals, seconds: float) -> tuple[int, str]:
    process = subprocess.Popen(
        [sys.executable, "-c", START, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


def test_a_signal_while_a_command_is_imported() -> None:
    for number, status, told in [
        (signal.SIGINT, 130, "stopped\n"),
        (signal.SIGTERM, 75, "stopped by SIGTERM\n"),
    ]:
        assert stopped_while_it_begins(["families"], number, 0) == (status, told)


@pytest.mark.rare
def test_signals_at_random_moments(tmp_path: Path) -> None:
    """Of imports, of a command that ends by itself, and of its end."""
    drawn = random.Random(0)
    arguments = ["generate", "--models", str(tmp_path), "--prompt", "x"]
    began = time.monotonic()
    assert stopped_while_it_begins(arguments, signal.SIGINT, 60)[0] == 2
    took, found = time.monotonic() - began, set()
    for _ in range(24):
        number = drawn.choice([signal.SIGINT, signal.SIGTERM])
        status, errors = stopped_while_it_begins(arguments, number, drawn.uniform(0, 2 * took))
        assert status in (2, 75 if number == signal.SIGTERM else 130), errors
        assert len(errors.splitlines()) == 1, errors
        assert errors.startswith("error: " if status == 2 else "stopped")
        found.add(status)
    assert found == {2, 75, 130}


def test_the_entry_imports_the_standard_library_alone() -> None:
    code = "import sys, rlae_jax.commands.entry; print(*(m for m in sys.modules if m[:3] in ('rla', 'num', 'jax')))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert set(found) == {
        "rlae_jax",
        "rlae_jax.commands",
        "rlae_jax.commands.entry",
        "rlae_jax.errors",
        "rlae_jax.signals",
    }


def test_every_public_name_has_its_home() -> None:
    import ast

    import rlae_jax

    tree = ast.parse(Path(rlae_jax.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    told = {(node.module, node.names[0].name) for node in block.body if isinstance(node, ast.ImportFrom)}
    assert told == {(f"rlae_jax.{home}", name) for home, names in rlae_jax._HOMES.items() for name in names}
    assert all(getattr(rlae_jax, name) is not None for name in rlae_jax.__all__)
    assert set(rlae_jax.__all__) <= set(dir(rlae_jax))
    assert rlae_jax.fusion.decode.decode is rlae_jax.decode
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = rlae_jax.nothing  # type: ignore[attr-defined]
