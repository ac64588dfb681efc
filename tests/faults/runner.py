"""Commands in processes of their own that need not import anything: a server, in which everything is imported and
nothing of JAX has begun, forks one for each.

    Runner().start(Request) ─JSON, a line─► server ─fork─► a session of its own: python -m rlae_jax ARGUMENTS

A process behaves as a cold one does from `main` on: its session, streams, signals and end are its own.
"""

import dataclasses
import errno
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rlae_jax import signals

# Imported before anything is forked: nearly all of a short command's time.
MODULES = (
    "rlae_jax.commands.main",
    *(f"rlae_jax.{name}" for name in ("demo", "ablate", "specialists", "evaluation", "emorl.demo", "emorl.export")),
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
    "transformers.models.auto.tokenization_auto",
    "tests.faults.small",
)
# Compiled programs are kept, small ones too, and compiled with little effort, as in all tests.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "agg",
}
ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A process to start.

    Attributes:
      arguments: of `rlae-jax`; none runs `setup` alone.
      directory: where it runs; its output goes to `streams`.out and .err.
      environment: added to the server's.
      setup: "module:function" names, called before the command with nothing.
      kill_at_write: the write, counted from 1, before which it kills itself with SIGKILL; 0 kills never.
      full_at_write: the write from which on the disk is full; 0 for a disk that is not.
    """

    arguments: list[str]
    directory: str
    streams: str
    environment: dict[str, str]
    setup: list[str] = dataclasses.field(default_factory=list)
    kill_at_write: int = 0
    full_at_write: int = 0


class Process:
    """A command that runs: `pid`, which leads a session; `wait` gives what `subprocess` calls its return code."""

    def __init__(self, pid: int, request: Request):
        self.pid, self.request = pid, request

    def send(self, number: int) -> None:
        """A signal, unless it has ended."""
        if self.poll(0) is None:
            os.kill(self.pid, number)

    def poll(self, seconds: float) -> int | None:
        """Its return code if it ends within this time."""
        raise NotImplementedError

    def wait(self, seconds: float) -> int:
        """Its return code.

        Raises:
          TimeoutError: it did not end, and was killed.
        """
        status = self.poll(seconds)
        if status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.poll(10)
            raise TimeoutError(f"did not end within {seconds:.0f} s")
        return status

    @property
    def errors(self) -> str:
        """Its standard error."""
        return Path(f"{self.request.streams}.err").read_text(errors="replace")

    @property
    def output(self) -> str:
        """Its standard output."""
        return Path(f"{self.request.streams}.out").read_text(errors="replace")


class _Forked(Process):
    def __init__(self, pid: int, request: Request, runner: "Runner"):
        super().__init__(pid, request)
        self._runner, self._status = runner, None

    def poll(self, seconds: float) -> int | None:
        if self._status is None:
            told = self._runner.read(seconds)
            self._status = None if told is None else told["status"]
        return self._status


class _Cold(Process):
    def __init__(self, request: Request):
        with open(f"{request.streams}.out", "wb") as out, open(f"{request.streams}.err", "wb") as errors:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "rlae_jax", *request.arguments],
                cwd=request.directory,
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT)} | request.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,
            )
        super().__init__(self._child.pid, request)

    def poll(self, seconds: float) -> int | None:
        try:
            return self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


def start_cold(request: Request) -> Process:
    """The command as a user starts it; `setup` and what happens at writes are for forked ones."""
    return _Cold(request)


class Runner:
    """The server's other end. A context manager; one process at a time.

    Args:
      programs: a directory for compiled programs.
    """

    def __init__(self, programs: Path):
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.runner"],
            cwd=ROOT,
            env=os.environ | ENVIRONMENT | {"PYTHONPATH": str(ROOT), "JAX_COMPILATION_CACHE_DIR": str(programs)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._told = b""

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.kill()
        self._server.wait()
        self._server.stdout.close()

    def start(self, request: Request) -> Process:
        """A forked process."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(dataclasses.asdict(request)).encode() + b"\n")
        self._server.stdin.flush()
        told = self.read(120)
        assert told is not None, "the server of forked processes does not answer"
        return _Forked(told["pid"], request, self)

    def read(self, seconds: float) -> dict[str, int] | None:
        """The server's next line, if it comes within this time."""
        assert self._server.stdout is not None
        late = time.monotonic() + seconds
        while b"\n" not in self._told:
            if not select.select([self._server.stdout], [], [], max(late - time.monotonic(), 0))[0]:
                return None
            piece = os.read(self._server.stdout.fileno(), 4096)
            if not piece:
                raise RuntimeError("the server of forked processes has ended")
            self._told += piece
        line, _, self._told = self._told.partition(b"\n")
        told: dict[str, int] = json.loads(line)
        return told


def _serve() -> Request:
    """Answers requests; returns in every forked process, with what it is to do."""
    # As `entry` does, first of all: forked processes have it from here, and what is called at their end in its order.
    signals.end_at_once()
    told = os.dup(1)
    os.dup2(2, 1)  # what imports print is no answer
    for name in MODULES:
        importlib.import_module(name)
    with os.fdopen(0, "rb", closefd=False) as requests:
        for line in requests:
            request = Request(**json.loads(line))
            pid = os.fork()
            if pid == 0:
                os.close(told)
                return request
            os.write(told, json.dumps({"pid": pid}).encode() + b"\n")
            _, status = os.waitpid(pid, 0)
            os.write(told, json.dumps({"status": os.waitstatus_to_exitcode(status)}).encode() + b"\n")
    sys.exit(0)


def _become(request: Request) -> None:
    """What a process has of its own from the beginning."""
    os.setsid()
    os.chdir(request.directory)
    os.environ.update(request.environment)
    tempfile.tempdir = None
    for stream, path in ((0, os.devnull), (1, f"{request.streams}.out"), (2, f"{request.streams}.err")):
        opened = os.open(path, os.O_RDONLY if stream == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, stream)
        os.close(opened)
    sys.argv = ["rlae-jax", *request.arguments]
    for name in request.setup:
        module, _, function = name.partition(":")
        getattr(importlib.import_module(module), function)()


def _count_writes(request: Request) -> None:
    """Tells the number of writes at the end in `streams`.writes; does what the request has happen at one of them."""
    from rlae_jax import files

    count = 0

    def before(*what: object) -> None:
        nonlocal count
        count += 1
        if count == request.kill_at_write:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < request.full_at_write <= count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Path(f"{request.streams}.writes").write_text(str(count))

    files.before_write = before


def main() -> None:
    """The server, and after a fork the command."""
    request = _serve()
    _become(request)
    if request.arguments:
        _count_writes(request)
        from rlae_jax.commands.entry import main as command

        command()


if __name__ == "__main__":
    main()
