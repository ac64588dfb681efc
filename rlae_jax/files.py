"""The one place through which the package writes, and what it reads as JSON.

A file that is written is complete or as it was, a directory complete or absent: both are made under a temporary name
beside their own, put on disk, and renamed. Lines that are appended are whole. What cannot be written raises an
`OutputError`, and nothing is left of it. Of several processes the first one writes.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from rlae_jax import digests, hosts
from rlae_jax.errors import InputError, OutputError, one_line

try:
    import fcntl
except ImportError:  # on Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

# Called with a path before every write to it, before it is put on disk, and before it gets its name: where tests have
# a disk become full, or the process end.
before_write: Callable[[Path], None] | None = None

_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes; what is made below a directory has longer paths
_LFS_POINTER = b"version https://git-lfs"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_OS_ERROR = re.compile(r"os[ _]error(?:_code='|:? )(\d+)", re.IGNORECASE)  # as libraries in Rust and C++ tell it
_PARTIAL = re.compile(r"^\..+\.partial-[0-9a-f]{16}$")  # temporary names
_KEPT_NAME = 200  # bytes that are taken into a temporary name; file systems allow 255


@contextlib.contextmanager
def writing(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
    """A file to write into, which takes the place of the one at `path` at the end, if nothing was raised.

    Args:
      binary: bytes, not text.

    Raises:
      OutputError: it cannot be written; the file at `path` is as it was.
    """
    path = Path(path)
    with _partial(path, _create_file) as partial:
        with _told(path):
            raw = _Raw(partial, path)
        try:
            file: IO[Any] = io.BufferedWriter(raw)
            if not binary:
                file = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
            yield file
            file.flush()
            _sync(path, raw.fileno())
        finally:
            raw.close()  # before what is buffered: of a file that failed it is not wanted
        with _told(path):
            _announce(path)
            partial.replace(path)


@contextlib.contextmanager
def making(directory: Path) -> Iterator[Path]:
    """An empty directory to fill, which gets its digests and the name `directory` at the end, if nothing was raised.

    What fills it: the functions of this module, or other libraries within `library_write`.

    Raises:
      InputError: there is a directory (with something in it) of this name.
      OutputError: it cannot be written.
    """
    directory = Path(directory)
    with _partial(directory, Path.mkdir) as partial:
        try:
            yield partial
            with _told(partial / digests.FILE):
                _announce(partial / digests.FILE)
                digests.seal(partial)
            for path in sorted(partial.rglob("*")):
                if path.is_file():
                    with _told(path), path.open("rb") as file:
                        _sync(path, file.fileno())
        except OutputError as error:
            raise OutputError(str(error).replace(str(partial), str(directory))) from error
        with _told(directory):
            _announce(directory)
            try:
                partial.rename(directory)
            except OSError as error:
                if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise InputError(f"{directory} exists already; choose another name or remove it") from None
                raise


class GrowingFile:
    """A file that grows by whole lines, each on disk when `write` returns. What another process left without its end
    gets one.

    Raises:
      OutputError: it cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = Path(path)
        with _told(self._path):
            _announce(self._path)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b", buffering=0)
            self._end = self._file.seek(0, os.SEEK_END)
            if self._end:
                self._file.seek(-1, os.SEEK_END)
                if self._file.read(1) != b"\n":
                    self._write(b"\n")

    def write(self, line: str) -> None:
        """One or more lines, with their ends.

        Raises:
          OutputError: they cannot be written; the file is as it was before.
        """
        data = line.encode()
        with _told(self._path, len(data)):
            _announce(self._path)
            self._write(data)

    def _write(self, data: bytes) -> None:
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) or 0 :]
            _announce(self._path)
            os.fsync(self._file.fileno())
        except BaseException:
            self._file.truncate(self._end)
            raise
        self._end += len(data)

    def close(self) -> None:
        """Nothing is left to write."""
        self._file.close()

    def __enter__(self) -> "GrowingFile":
        return self

    def __exit__(self, *raised: Any) -> None:
        self.close()


@contextlib.contextmanager
def library_write(path: Path, needed: int = 0) -> Iterator[None]:
    """Around what another library writes at `path`.

    Args:
      needed: bytes, for the message.

    Raises:
      OutputError: for errors of the operating system, in whatever form the library tells them.
    """
    try:
        with _told(path, needed):
            _announce(path)
            yield
    except InputError:
        raise
    except Exception as error:
        code = _error_code(error)
        if code is None:
            raise
        raise _output_error(path, OSError(code, os.strerror(code)), needed) from error


def _error_code(error: BaseException | None) -> int | None:
    """The number of the operating system's error behind an exception, if there is one."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if told := _OS_ERROR.search(str(error)):
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _told(path: Path, needed: int = 0) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _output_error(path, error, needed) from error


def _output_error(path: Path, error: OSError, needed: int) -> OutputError:
    reason = _reason(error)
    if error.errno not in _NO_ROOM:
        return OutputError(f"{path}: cannot be written ({reason})")
    room = f"{_size(needed)} needed" if needed else "some"
    with contextlib.suppress(OSError):
        at = next(place for place in Path(path).absolute().parents if place.is_dir())
        room += f", {_size(shutil.disk_usage(at).free)} free"
    return OutputError(
        f"{path}: cannot be written ({reason}: {room}); what was saved before is kept: make room and run again"
    )


def _size(n: float) -> str:
    """Bytes, for people."""
    for unit in ("bytes", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} GiB"


def _announce(path: Path) -> None:
    if before_write is not None:
        before_write(Path(path))


def _sync(path: Path, descriptor: int) -> None:
    """Puts a file's content on disk."""
    with _told(path):
        _announce(path)
        os.fsync(descriptor)


class _Raw(io.FileIO):
    """A file whose errors name its later path."""

    def __init__(self, partial: Path, path: Path):
        super().__init__(partial, "r+")
        self._path = path

    def write(self, data: Any) -> int:
        with _told(self._path, self.tell() + memoryview(data).nbytes):
            _announce(self._path)
            return super().write(data)


@contextlib.contextmanager
def _partial(path: Path, create: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary name beside `path` at which something was created; nothing is there at the end."""
    name = path.name
    if len(os.fsencode(name)) > _KEPT_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    # Not by tempfile, whose files only their owner may read. The name is known before anything has it: a signal at any
    # moment leaves nothing behind.
    partial = path.with_name(f".{name}.partial-{secrets.token_hex(8)}")
    lock = None
    try:
        with _told(path):
            _announce(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(entry for entry in os.scandir(path.parent) if entry.name.startswith(f".{name}.partial-"))
            while lock is None:
                create(partial)
                lock = _lock(partial, wait=True)
                if not partial.exists():  # somebody had the lock first, and took it for abandoned
                    os.close(lock)
                    lock = None
        yield partial
    finally:
        if lock is not None:
            os.close(lock)
        _remove(partial)


def _create_file(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))


def _lock(path: Path, *, wait: bool) -> int:
    """A descriptor that holds a lock on a file or directory, where there are locks.

    Raises:
      BlockingIOError: somebody else has it, and it is not to be waited for.
    """
    if fcntl is None:
        if not wait:
            raise BlockingIOError
        return os.open(os.devnull, os.O_RDONLY)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if not wait:
            os.close(descriptor)
            raise
        del error  # a file system without locks
    return descriptor


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _remove_abandoned(partials: Iterable[os.DirEntry[str]]) -> None:
    """Removes what writers left that were killed: their locks are gone."""
    with contextlib.suppress(OSError):
        for entry in list(partials):
            with contextlib.suppress(OSError):
                lock = _lock(Path(entry.path), wait=False)
                _remove(Path(entry.path))
                os.close(lock)


def remove_abandoned(directory: Path) -> None:
    """Removes what killed writers left at any depth of a directory, which may be of files that nobody writes again."""

    def partials(place: str | Path) -> Iterator[os.DirEntry[str]]:
        for entry in os.scandir(place):
            if _PARTIAL.search(entry.name):
                yield entry
            elif entry.is_dir(follow_symlinks=False):
                yield from partials(entry.path)

    _remove_abandoned(partials(directory))


def write_bytes(path: Path, data: bytes) -> None:
    """Replaces the file's content at once.

    Raises:
      OutputError: it cannot be written; the file is as it was.
    """
    if hosts.is_first():
        with writing(path, binary=True) as file:
            file.write(data)


def write_text(path: Path, text: str) -> None:
    """Replaces the file's content at once.

    Raises:
      OutputError: it cannot be written; the file is as it was.
    """
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any], *, ours: bool = True) -> None:
    """One indented JSON object.

    Args:
      ours: with its digest; without it where the form is somebody else's.
    """
    write_text(path, json.dumps(digests.sealed(value) if ours else value, indent=2) + "\n")


def json_line(row: Mapping[str, Any]) -> str:
    """A JSON object with its digest, as a line."""
    return json.dumps(digests.sealed(row)) + "\n"


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object with its digest per line."""
    write_text(path, "".join(map(json_line, rows)))


def check_fetched(path: Path) -> None:
    """Raises an `InputError` for what git leaves in the place of a large file that was not fetched."""
    with path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise InputError(f"{path}: a git-LFS pointer, not the file itself; fetch it with: git lfs pull")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; of ours without its digest.

    Raises:
      InputError: the file cannot be read, is something else, or is not what was written.
    """
    try:
        check_fetched(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # of bytes, of JSON, of numbers and nesting without end
        raise InputError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return digests.opened(value, path)


def inside(root: Path, name: str, where: object = None) -> Path:
    """The file that a name in some file means: in the directory `root`, or in one below.

    Args:
      where: the file that says the name; by default the directory.

    Raises:
      InputError: a name that is no relative path with plain parts, or by links leads out of the directory. (The links
        of the Hub's cache, from its snapshots into the same repository's blobs, lead nowhere else.)
    """
    named = f"{root if where is None else where}: the name {name[:80]!r}"
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or any(c in name for c in "\\\0") or len(name) > _LONGEST_NAME:
        raise InputError(f"{named} is no file's in {root}: it must be a relative path, without .. and \\")
    path = root / name
    try:
        real, home = path.resolve(), root.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # no text for this file system; links in a circle
        raise InputError(f"{named} cannot be followed ({error})") from None
    homes = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(real.is_relative_to(one) for one in homes):
        raise InputError(f"{named} is a link that leads out of {root}")
    return path


def digest(value: Any) -> str:
    """A hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def require_place(path: str | os.PathLike[str], kind: Literal["directory", "file"] = "directory") -> None:
    """Makes sure that a file or directory can be made at `path`, or is there and can be written: to be called before
    any work is done for it. Nothing is made.

    Raises:
      InputError: it cannot, and why.
    """
    given = str(path) if str(path).isprintable() else repr(str(path))
    told = f"{given[:_LONGEST_NAME]}: no {kind} can be made there"
    whole = Path(path).absolute()
    if not _is_text(whole):
        raise InputError(f"{told} (no name of a file has such characters)")
    parts = [os.fsencode(part) for part in whole.parts]
    if max(map(len, parts)) > _LONGEST_NAME or sum(map(len, parts)) + len(parts) > _LONGEST_PATH:
        raise InputError(f"{told} ({os.strerror(errno.ENAMETOOLONG)})")
    existing = next(place for place in (whole, *whole.parents) if os.path.lexists(place))
    try:
        mode = existing.stat().st_mode
    except OSError as error:
        what = "is a link that leads nowhere" if isinstance(error, FileNotFoundError) else f"({_reason(error)})"
        raise InputError(f"{told}: {existing} {what}") from None
    if not (stat.S_ISREG(mode) if existing == whole and kind == "file" else stat.S_ISDIR(mode)):
        what = "a directory" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "no file and no directory"
        raise InputError(f"{told}: {existing} is {what}")
    directory = existing if stat.S_ISDIR(mode) else existing.parent
    try:
        with tempfile.TemporaryFile(dir=directory):  # a file without a name, where there are such
            pass
    except OSError as error:
        raise InputError(f"{told}: {directory} is not writable ({_reason(error)})") from None


def _is_text(path: Path) -> bool:
    """Whether the operating system takes these characters in a path."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        return False


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else one_line(error)
