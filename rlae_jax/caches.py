"""What is kept between calls and can be made again: where it lies, and that it is what was put there.

    XDG_CACHE_HOME/rlae_jax/NAME   (~/.cache/rlae_jax/NAME): this user's alone
    a file: SHA-256 of its name and its content, then the content

A place that another user owns, or that everybody can write to, is not used. A file whose digest is another one is told
and made anew. That nothing can be kept is told once, and stops nothing.
"""

import functools
import hashlib
import os
import stat
import warnings
from pathlib import Path
from typing import Any

from rlae_jax import files
from rlae_jax.errors import InputError, OutputError, one_line

_DIGEST_BYTES = 32


def home() -> Path:
    """The user's directory for caches. As its specification has it, XDG_CACHE_HOME counts only if it is absolute."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    return Path(given) if os.path.isabs(given) else Path.home() / ".cache"


def place(name: str, given: str | os.PathLike[str] | None = None) -> Path | None:
    """A directory to keep things in, which is there then; None, and a warning, where there is none to use.

    Args:
      name: of the directory below `home()`/rlae_jax.
      given: another directory, as the user named it.
    """
    try:
        if given is not None:
            path = Path(given)
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            told = _distrusted(path)
        else:
            path = home() / "rlae_jax" / name
            for directory in (path.parent, path):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                if told := _distrusted(directory):
                    break
                if directory.stat().st_mode & 0o077:
                    directory.chmod(0o700)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home
        where = given or f"~/.cache/rlae_jax/{name}"
        _warn(f"nothing is kept in {where}: {getattr(error, 'strerror', None) or one_line(error)}")
        return None
    if told:
        _warn(f"nothing is kept in {path}: {told}")
        return None
    return path


def _distrusted(directory: Path) -> str:
    """Why what lies in a directory may be somebody else's, or ""."""
    known = directory.stat()
    if not stat.S_ISDIR(known.st_mode):
        return f"{directory} is no directory"
    if hasattr(os, "geteuid") and known.st_uid not in (os.geteuid(), 0):
        return f"{directory} belongs to another user"
    if known.st_mode & 0o002:
        return f"{directory} can be written by everybody"
    return ""


@functools.cache  # once
def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def store(path: Path, content: bytes) -> None:
    """Keeps a file, at once.

    Raises:
      OutputError: it cannot be written.
    """
    with files.writing(path, binary=True) as file:
        file.write(_digest(path, content))
        file.write(content)


def fetch(path: Path) -> bytes:
    """What `store` was given.

    Raises:
      InputError: there is no such file, or it is not as it was stored.
    """
    try:
        stored = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    content = stored[_DIGEST_BYTES:]
    if stored[:_DIGEST_BYTES] != _digest(path, content):
        raise InputError(f"{path}: is not as it was stored")
    return content


def _digest(path: Path, content: bytes) -> bytes:
    digest = hashlib.sha256(path.name.encode() + b"\0")
    digest.update(content)
    return digest.digest()


def keep_programs(directory: Path) -> None:
    """Has JAX keep compiled programs in a directory, each with its digest: what it reads there, it runs."""
    import jax
    from jax._src import compilation_cache
    from jax._src.compilation_cache_interface import CacheInterface

    class Programs(CacheInterface):
        def __init__(self) -> None:
            self._path = directory
            self._writes = True

        def get(self, key: str) -> bytes | None:
            path = self._file(key)
            try:
                return fetch(path)
            except InputError as error:
                if path.exists():
                    warnings.warn(f"{error}; it is compiled anew", stacklevel=2)
                return None

        def put(self, key: str, value: bytes) -> None:
            if not self._writes:
                return
            try:
                store(self._file(key), value)
            except OutputError as error:
                self._writes = False
                _warn(f"compiled programs are not kept: {error}")

        def _file(self, key: str) -> Path:
            return directory / f"{key}.program"

    def programs(path: str) -> tuple[Any, str]:
        return Programs(), path

    compilation_cache.get_file_cache = programs
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
