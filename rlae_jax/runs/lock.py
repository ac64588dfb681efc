"""One writer of a directory at a time.

    RUN/.lock   there while a process writes the run, and which one: held by flock, which the kernel lets go of when the
                process ends, however it ends

Where a file system has no flock, or may be mounted by other hosts, the record in the file decides: a process of this
host that is gone is told and its lock taken over; one of another host cannot be asked, and is believed. Of several
processes of one run the first takes the lock. Whoever only reads needs none.
"""

import contextlib
import dataclasses
import functools
import inspect
import json
import os
import shlex
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from rlae_jax import files, hosts
from rlae_jax.errors import InputError, shortened

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

P = ParamSpec("P")
T = TypeVar("T")

NAME = ".lock"
_LONGEST_COMMAND = 100
_SECONDS_TO_SETTLE = 0.2
# File systems that other hosts may have mounted, too; those in user space may be anything.
_SHARED = (
    "nfs",
    "cifs",
    "smb",
    "9p",
    "virtiofs",
    "lustre",
    "ceph",
    "gpfs",
    "beegfs",
    "glusterfs",
    "afs",
    "fuse",
    "gfs",
)


@dataclasses.dataclass
class _Held:
    """A lock of this process."""

    thread: int
    directory: int  # an open descriptor, which follows the directory where that is renamed
    name: str
    file: int
    made: list[Path]  # directories that were made for it, the outermost first
    depth: int = 1


_held: dict[str, _Held] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], *, beside: bool = False) -> Iterator[None]:
    """Keeps other writers out of a directory, which is made if need be; one that was made and stays empty goes again.
    A thread may ask again for what it has.

    Args:
      beside: the lock lies beside `path`: of what is to appear there only when it is complete.

    Raises:
      InputError: another process or thread writes there, in one line that says which; the directory cannot be made.
    """
    if fcntl is None:
        yield
        return
    target = Path(path)
    where, name = (target.parent, f".{target.name}{NAME}") if beside else (target, NAME)
    key = os.path.join(os.path.realpath(where), name)
    hosts.first(lambda: _acquire(key, target, where, name))
    try:
        yield
    finally:
        if hosts.is_first():
            _release(key)


def writes(argument: str, *, beside: bool = False) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A function that writes into the directory that it is given as this argument, unless that is None."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def locked(*args: P.args, **kwargs: P.kwargs) -> T:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            path = given.arguments[argument]
            with contextlib.nullcontext() if path is None else writing(path, beside=beside):
                return function(*args, **kwargs)

        return locked

    return decorate


def _acquire(key: str, target: Path, where: Path, name: str) -> None:
    with _guard:
        held = _held.get(key)
        if held is not None:
            if held.thread != threading.get_ident():
                raise InputError(f"{target} is being written by another thread of this process")
            held.depth += 1
            return
        files.require_place(where)
        made: list[Path] = []
        try:
            _held[key] = _take(target, where, name, made)
            if where == target:
                files.remove_abandoned(target)
        except BaseException as error:
            _remove_empty(made)
            if isinstance(error, OSError):
                raise InputError(f"{where}: cannot be written ({error.strerror})") from error
            raise


def _take(target: Path, where: Path, name: str, made: list[Path]) -> _Held:
    while True:
        missing = [place for place in (where, *where.parents) if not place.exists()]
        for place in reversed(missing):
            with contextlib.suppress(FileExistsError):
                place.mkdir()
                made.append(place)
        try:
            directory = os.open(where, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # whoever made it has removed it again
            continue
        try:
            file = os.open(name, os.O_RDWR | os.O_CREAT, 0o644, dir_fd=directory)
        except FileNotFoundError:
            os.close(directory)
            continue
        try:
            locked = _lock(file, target, where / name)
            if _is(file, name, directory):
                record = _record()
                os.ftruncate(file, 0)
                os.pwrite(file, json.dumps(record).encode(), 0)
                if not locked:  # another one may have looked at the same moment: the last to write has it
                    time.sleep(_SECONDS_TO_SETTLE)
                    if (there := _read(file)) != record:
                        raise InputError(f"{target} is being written by {_told(there)}")
                return _Held(threading.get_ident(), directory, name, file, made)
        except BaseException:
            os.close(file)
            os.close(directory)
            raise
        os.close(file)  # the one who had it has removed the file in the meantime
        os.close(directory)


def _lock(file: int, target: Path, path: Path) -> bool:
    """Locks the open file where its file system can do that, and makes sure that nobody else has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        locked = True
    except (BlockingIOError, PermissionError):
        raise InputError(f"{target} is being written by {_told(_read(file))}") from None
    except OSError:  # the file system has no locks
        locked = False
    there = _read(file)
    if there is None:
        return locked
    if not locked or _may_be_shared(path.parent):
        if there.get("host") != socket.gethostname():
            raise InputError(
                f"{target} is being written by {_told(there)}, which cannot be asked from here; if it has ended, "
                f"remove {path}"
            )
        if _lives(there):
            raise InputError(
                f"{target} is being written by {_told(there)}; wait for its end, or choose another directory"
            )
    warnings.warn(f"{target} was being written by {_told(there)}, which is gone; its lock is taken over", stacklevel=2)
    return locked


def _is(file: int, name: str, directory: int) -> bool:
    """Whether the open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(name, dir_fd=directory))
    except FileNotFoundError:
        return False


def _release(key: str) -> None:
    with _guard:
        held = _held[key]
        held.depth -= 1
        if held.depth:
            return
        del _held[key]
        with contextlib.suppress(OSError):
            os.unlink(held.name, dir_fd=held.directory)  # before it is let go of, so that nobody's else is removed
        os.close(held.file)
        os.close(held.directory)
        _remove_empty(held.made)


def _remove_empty(made: list[Path]) -> None:
    for place in reversed(made):
        with contextlib.suppress(OSError):
            place.rmdir()


def _forget() -> None:
    """In a forked child: the locks are its parent's."""
    for held in _held.values():
        os.close(held.file)
        os.close(held.directory)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _record() -> dict[str, Any]:
    program = Path(sys.argv[0]).name
    command = shlex.join(["rlae-jax" if program in ("rlae-jax", "__main__.py") else program, *sys.argv[1:]])
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": _started(os.getpid()),
        "since": time.time(),
        "command": shortened(command, _LONGEST_COMMAND),
    }


def _read(file: int) -> dict[str, Any] | None:
    """The record in an open lock; None where there is none, which is a new one, or another's of this very moment."""
    data = os.pread(file, 65536, 0)
    if not data:
        return None
    try:
        there = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return there if isinstance(there, dict) else {}


def _told(there: dict[str, Any] | None) -> str:
    """Who, of a record."""
    try:
        assert there is not None
        since = time.localtime(float(there["since"]))
        today = since[:3] == time.localtime()[:3]
        at = time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M", since)
        return f"process {there['pid']} on {there['host']} ({there['command']}, since {at})"
    except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
        return "another process"


def _started(pid: int) -> str | None:
    """What tells a process from a later one of the same number: which boot of the machine, and when since then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError, ValueError):
        return None
    return f"{boot} {ticks}"


def _lives(there: dict[str, Any]) -> bool:
    """Whether the process of a record of this host is still there."""
    pid = there.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    started = _started(pid)
    return started is None or there.get("started") in (None, started)


def _may_be_shared(directory: Path) -> bool:
    """Whether other hosts may have mounted the directory's file system, too, where a lock may not be seen by them."""
    try:
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return False
    path = os.path.realpath(directory)
    kinds = {"": ""}
    for fields in mounts:
        point = fields[4].encode().decode("unicode_escape")
        if path == point or path.startswith(point.rstrip("/") + "/"):
            kinds[point] = fields[fields.index("-") + 1]
    return kinds[max(kinds, key=len)].startswith(_SHARED)
