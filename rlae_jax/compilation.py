"""Compiled programs in one bounded cache: `jit` is `jax.jit` of a process that lives long.

A compiled program keeps memory, and on a CPU some hundred mappings, of which Linux allows a process 65,530. JAX keeps
every program for ever. Here all functions of the package share one least-recently-used order: beyond MOST_PROGRAMS, or
half of the mappings, those go that were not used for longest, and are compiled anew when they are asked for again.

    function(arguments) ─outline of the arguments' shapes─► a `jax.jit` of its own ─► JAX's own dispatch

The outline is cheap and coarse: it looks at a few arrays of a large tree. Arguments that differ elsewhere share an
entry, where JAX tells them apart, and are dropped together. What an engine uses is `kept_for` it.
"""

import collections
import contextlib
import dataclasses
import functools
import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

MOST_PROGRAMS = 256
_MOST_SHARING = 32  # programs of one outline, before its entry begins anew
_WIDEST, _DEEPEST = 4, 2  # of a tree, what an outline looks at
_MAPPINGS_EACH = 1000  # of a large program
_TRACES = 64  # programs that go, until what was traced of inner functions goes, too
_MAPS, _MOST_MAPS = Path("/proc/self/maps"), Path("/proc/sys/vm/max_map_count")


def jit(function: Callable[..., Any], **options: Any) -> "Jitted":
    """`jax.jit` whose programs are in the package's cache; options as there."""
    return Jitted(function, options)


class Jitted:
    """A function whose programs are in the package's cache."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]):
        functools.update_wrapper(self, function)
        self._function, self._options = function, options
        names = list(inspect.signature(function).parameters)
        numbers, named = (options.get(option, ()) for option in ("static_argnums", "static_argnames"))
        chosen = {named} if isinstance(named, str) else set(named)
        chosen |= {names[i] for i in ((numbers,) if isinstance(numbers, int) else numbers)}
        self._static = frozenset(chosen)
        self._outlines = [_constant if name in chosen else _outline for name in names]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        key: tuple[Any, ...] = (self, *[outline(arg) for outline, arg in zip(self._outlines, args, strict=False)])
        if kwargs:
            static = self._static
            key += tuple([(name, _constant(arg) if name in static else _outline(arg)) for name, arg in kwargs.items()])
        entry = _programs.entry(key, self._fresh)
        before = entry.traces[0]
        result = entry.run(*args, **kwargs)
        if entry.traces[0] != before:
            _programs.shrink(key, entry)
        return result

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """As of `jax.jit`; what is compiled from it is the caller's."""
        lowered: jax.stages.Lowered = self._fresh().run.lower(*args, **kwargs)
        return lowered

    def cache_size(self) -> int:
        """How many programs of this function there are."""
        return sum(entry.run._cache_size() for entry in _programs.of(self))

    def _fresh(self) -> "_Entry":
        # JAX's caches go by the function, which they hold weakly: with one of its own a program goes for good.
        function, traces = self._function, [0]

        @functools.wraps(function)
        def traced(*args: Any, **kwargs: Any) -> Any:
            traces[0] += 1
            return function(*args, **kwargs)

        return _Entry(jax.jit(traced, **self._options), traces)


@dataclasses.dataclass(eq=False)
class _Entry:
    """The programs of one function and outline."""

    run: Any  # of jax.jit
    traces: list[int]  # one number: how often it was traced, which is how many programs it has
    keepers: "weakref.WeakSet[Any]" = dataclasses.field(default_factory=weakref.WeakSet)


class _Programs:
    """All entries, those used last at the end."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._entries: collections.OrderedDict[tuple[Any, ...], _Entry] = collections.OrderedDict()
        self._unseen = 0  # programs that may be compiled before mappings are counted again
        self._dropped = 0  # programs whose traces of inner functions are still there

    def entry(self, key: tuple[Any, ...], make: Callable[[], _Entry]) -> _Entry:
        """What is kept under a key, which is now the one used last."""
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = make()
            else:
                self._entries.move_to_end(key)
            if _thread.keeper is not None:
                entry.keepers.add(_thread.keeper)
            return entry

    def of(self, function: Jitted) -> list[_Entry]:
        """A function's entries."""
        with self._lock:
            return [entry for key, entry in self._entries.items() if key[0] is function]

    def count(self) -> int:
        """Programs in all entries."""
        with self._lock:
            return sum(entry.traces[0] for entry in self._entries.values())

    def release(self, keeper: object) -> None:
        """What was kept for somebody may go."""
        with self._lock:
            for entry in self._entries.values():
                entry.keepers.discard(keeper)

    def shrink(self, key: tuple[Any, ...], newest: _Entry) -> None:
        """Drops what was not used for longest, as far as there is too much, after `newest` has got a program."""
        with self._lock:
            if newest.traces[0] > _MOST_SHARING and not newest.keepers:
                self._entries.pop(key, None)
            self._drop(self.count() - MOST_PROGRAMS, newest)
            self._unseen -= 1
            most = most_mappings()
            if most is not None and self._unseen <= 0:
                found = mappings()
                while found > most and self._drop(max(1, self.count() // 8), newest):
                    gc.collect()
                    found = mappings()
                self._unseen = (most - found) // _MAPPINGS_EACH
            if self._dropped >= _TRACES:
                self._dropped = 0
                _forget_traces()

    def _drop(self, programs: int, spared: _Entry) -> bool:
        """Drops entries with at least so many programs, the least recently used first. Whether there were any."""
        dropped = 0
        for key, entry in list(self._entries.items()):
            if dropped >= programs:
                break
            if entry is not spared and not entry.keepers:
                del self._entries[key]
                dropped += entry.traces[0]
        self._dropped += dropped
        return dropped > 0


def _forget_traces() -> None:
    """JAX has no bound for what it traced of functions inside of programs (`jnp.where` of every shape), and no public
    way to drop that alone: `jax.clear_caches` would drop the programs, too. What is compiled stays, and is called as
    before; only arguments of another kind (numpy's after JAX's) would be traced once more."""
    with contextlib.suppress(ImportError, AttributeError):
        from jax._src.interpreters import partial_eval

        partial_eval.trace_to_jaxpr.cache_clear()


class _Thread(threading.local):
    keeper: object = None


_programs, _thread = _Programs(), _Thread()


def count() -> int:
    """Programs in the cache."""
    return _programs.count()


@contextlib.contextmanager
def kept_for(keeper: object) -> Iterator[None]:
    """What this thread uses inside stays, as long as the keeper lives or until `release`, however long it is idle."""
    before, _thread.keeper = _thread.keeper, keeper
    try:
        yield
    finally:
        _thread.keeper = before


def release(keeper: object) -> None:
    """What was kept for somebody is dropped as everything else."""
    _programs.release(keeper)


def mappings() -> int:
    """Memory mappings of this process; 0 where the system does not tell."""
    try:
        return _MAPS.read_bytes().count(b"\n")
    except OSError:
        return 0


@functools.cache
def most_mappings() -> int | None:
    """Half of the mappings that a process may have; None where there is no such limit."""
    try:
        return int(_MOST_MAPS.read_text()) // 2
    except (OSError, ValueError):
        return None


def _constant(value: Any) -> Any:
    """Of a static argument: itself where it is cheap to compare."""
    return value if isinstance(value, int | str | None) else type(value)


def _outline(value: Any, depth: int = _DEEPEST) -> Any:
    """Of arguments that JAX takes for alike the same; of others mostly another one."""
    return _OUTLINES[type(value)](value, depth)


class _Outlines(dict[type, Callable[[Any, int], Any]]):
    def __missing__(self, kind: type) -> Callable[[Any, int], Any]:
        outline = self[kind] = _outline_of(kind)
        return outline


_OUTLINES = _Outlines()


def _outline_of(kind: type) -> Callable[[Any, int], Any]:
    """How values of a type are outlined. Numbers that may be traced are only of their type: JAX does not tell them
    apart."""
    if hasattr(kind, "shape"):
        return lambda value, depth: value.shape
    if issubclass(kind, dict):
        return lambda value, depth: (len(value), _outline(next(iter(value.values()), None), depth))
    if issubclass(kind, tuple | list):
        widest = None if hasattr(kind, "_fields") else _WIDEST

        def of_entries(value: Any, depth: int) -> Any:
            return (len(value), *[_OUTLINES[type(one)](one, depth - 1) for one in value[: widest if depth else 0]])

        return of_entries
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        static = [field.name for field in fields if field.metadata.get("static")]
        traced = [field.name for field in fields if not field.metadata.get("static")]

        def of_fields(value: Any, depth: int) -> Any:
            constants = [_constant(getattr(value, name)) for name in static]
            return (*constants, *[_outline(getattr(value, name), depth - 1) for name in traced[: None if depth else 0]])

        return of_fields
    return lambda value, depth: kind
