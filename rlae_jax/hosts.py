"""Several processes that run one command together, each with devices of its own, often on hosts of their own.

All of them call the same programs in the same order; jit does not notice where they differ. So they compare what they
were told (`agree`), exchange what only some of them know (`gather`, `join`), and leave to the first what is to be done
once (`is_first`, `first`). Values go through the coordinator that `jax.distributed` starts in process 0, not through
devices. In a run of one process all of this is nothing.
"""

import atexit
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import numpy as np
from jaxtyping import Int, Shaped

from rlae_jax import ranges
from rlae_jax.errors import InputError, shortened
from rlae_jax.ranges import PeerPort, WholeSeconds

CONNECT_VARIABLE, HEARTBEAT_VARIABLE = "RLAE_JAX_CONNECT_SECONDS", "RLAE_JAX_HEARTBEAT_SECONDS"
# Until missing processes (a cluster may start them minutes apart), and lost ones, are told.
_CONNECT_SECONDS, _CLUSTER_SECONDS, _HEARTBEAT_SECONDS = 60, 300, 30
_SHUTDOWN_SECONDS = 600  # at the end the others wait while the first writes
_LEAVE_SECONDS = 10
_HEAD_START_SECONDS = 2.0
_WEEK_MS = 7 * 24 * 3600 * 1000
_FAILURE = "rlae_jax/failure"

T = TypeVar("T")


@dataclasses.dataclass
class _Run:
    """What this process knows of the run."""

    index: int = 0
    count: int = 1
    client: Any = None  # of the coordinator
    rounds: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    checks: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    leaving: threading.Event = dataclasses.field(default_factory=threading.Event)


_run = _Run()


def count() -> int:
    """How many processes there are."""
    return _run.count


def is_first() -> bool:
    """Whether this is the process that prints, and writes files."""
    return _run.index == 0


def initialise(coordinator: str, processes: int | None, process_id: int | None) -> None:
    """Connects this process with the others of its run. To be called before anything asks for a device.

    Args:
      coordinator: HOST:PORT, where process 0 listens; or "auto", where the cluster says all (TPU pods, Slurm, Open
        MPI).

    Raises:
      InputError: numbers that are missing or do not fit, an address that is taken or at which nobody answers, no
        cluster that would be known. (Where processes are missing at an address that answers, the runtime ends this
        one.)
    """
    import jax
    from jax._src import distributed

    usual = _CLUSTER_SECONDS if coordinator == "auto" else _CONNECT_SECONDS
    connect = ranges.from_environment(CONNECT_VARIABLE, WholeSeconds, usual)
    heartbeat = ranges.from_environment(HEARTBEAT_VARIABLE, WholeSeconds, _HEARTBEAT_SECONDS)
    given: dict[str, Any] = {}
    if coordinator != "auto":
        host, port = _address(coordinator)
        if processes is None or process_id is None:
            raise InputError(
                f"--coordinator {coordinator} needs --processes N and --process-id I; auto finds out by itself on TPU "
                "pods, under Slurm and Open MPI"
            )
        if processes < 1 or not 0 <= process_id < processes:
            raise InputError(f"--process-id counts from 0 to --processes - 1; not {process_id} of {processes}")
        _require_answer(host, port, process_id, connect)
        given = {"coordinator_address": coordinator, "num_processes": processes, "process_id": process_id}
    elif processes is not None or process_id is not None:
        raise InputError("--coordinator auto finds out --processes and --process-id by itself; leave them out")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    answered = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=connect,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(
            f"--coordinator {coordinator}: the processes cannot be connected ({reason}); where nothing tells them of "
            "each other (a TPU pod, Slurm, Open MPI) give HOST:PORT, --processes and --process-id"
        ) from error
    # The runtime takes SIGTERM for itself and does nothing but note it; loops ask for it themselves (`signals`).
    signal.signal(signal.SIGTERM, answered or signal.SIG_DFL)
    state = distributed.global_state
    _run.index, _run.count, _run.client = state.process_id, state.num_processes or 1, state.client
    watch = threading.Thread(target=_watch_failures, name="hosts", daemon=True)
    watch.start()
    atexit.register(_end_watch, watch)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host:
        raise InputError(f"--coordinator {coordinator}: expected HOST:PORT, where process 0 listens, or auto")
    return host, ranges.read(port, PeerPort, f"--coordinator {host}:")


def _require_answer(host: str, port: int, process_id: int, seconds: float) -> None:
    """The runtime ends the process where it cannot listen or connect; this tells it first."""
    if process_id == 0:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", port))
            except OSError as error:
                raise InputError(
                    f"--coordinator {host}:{port}: process 0 cannot listen at this port ({error.strerror}); does "
                    "another one have --process-id 0?"
                ) from error
        return
    late = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > late:
                raise InputError(
                    f"--coordinator {host}:{port}: nobody answers after {seconds:g} seconds ({error}); is process 0 "
                    "running there?"
                ) from error
        time.sleep(0.2)


def gather(value: Any) -> list[Any]:
    """Every process's value, in their order. All must call it.

    Args:
      value: what JSON can hold; numbers come back exactly.
    """
    if _run.count == 1:
        return [value]
    number = next(_run.rounds)
    room = f"rlae_jax/gather/{number}"
    _run.client.key_value_set(f"{room}/{_run.index}", json.dumps(value))
    _run.client.wait_at_barrier(room, _WEEK_MS)
    found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in _run.client.key_value_dir_get(f"{room}/")}
    if is_first() and number:
        _run.client.key_value_delete(f"rlae_jax/gather/{number - 1}/")  # who came here has read it
    return [found[i] for i in range(_run.count)]


def wait() -> None:
    """Goes on once all processes are here."""
    gather(None)


def agree(what: Mapping[str, Any]) -> None:
    """Makes sure that all processes have the same values.

    Args:
      what: names and JSON values, nested as one likes.

    Raises:
      InputError: they differ: on all processes, in one line.
    """
    if told := differences(gather(json.loads(json.dumps(what, default=str)))):
        raise InputError(f"the processes of this run differ: {told}")


def differences(values: Sequence[Any]) -> str:
    """What the values of some processes have other than the first's; empty where nothing is."""
    told = []
    for i, value in enumerate(values[1:], start=1):
        found = [
            f"{where} is {_short(theirs)} on process {i} and {_short(ours)} on process 0"
            for where, ours, theirs in _differing(values[0], value)
        ]
        told += found[:3] + ["..."] * (len(found) > 3)
    return "; ".join(told[:6])


def _differing(ours: Any, theirs: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted(ours.keys() | theirs.keys()):
            yield from _differing(ours.get(key), theirs.get(key), f"{where}.{key}" if where else key)
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            yield from _differing(*pair, f"{where}[{i}]")
    elif ours != theirs:
        yield where, ours, theirs


def _short(value: Any) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value), 60)


def first(work: Callable[[], T]) -> None:
    """Has the first process do something while the others wait.

    Raises:
      InputError: on all processes, where the first one raised it.
    """
    error = None
    if is_first():
        try:
            work()
        except InputError as raised:
            if _run.count == 1:
                raise
            error = str(raised)
    (error, *_) = gather(error)
    if error is not None:
        raise InputError(error)


def share(n: int) -> Int[np.ndarray, " n"]:
    """Which of n things are this process's to do."""
    return np.array_split(np.arange(n), _run.count)[_run.index]


def join(own: Shaped[np.ndarray, "n ..."], places: Int[np.ndarray, " n"], n: int) -> Shaped[np.ndarray, "N ..."]:
    """The n rows of which every process has some; of what several have, the first one's.

    Args:
      places: which rows this process has.
    """
    if _run.count == 1:
        return own
    whole = np.empty((n, *own.shape[1:]), own.dtype)
    for rows, values in reversed(gather([places.tolist(), own.tolist()])):
        whole[rows] = np.asarray(values, own.dtype).reshape(len(rows), *own.shape[1:])
    return whole


def preempted() -> bool:
    """Whether the platform wants some process's host back: all are told at the same call. All must call it."""
    if _run.count == 1:
        return False
    from jax.experimental import multihost_utils

    return bool(multihost_utils.reached_preemption_sync_point(next(_run.checks)))


@contextlib.contextmanager
def only_first_prints() -> Iterator[None]:
    """Keeps what the other processes print on standard output, and their warnings, to themselves."""
    if is_first():
        yield
        return
    import warnings

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.showwarning = lambda *_: None
        yield


def fail(line: str, status: int) -> NoReturn:
    """Ends this process and has the others end too, which would wait for it. Where all of them fail, each does so by
    itself."""
    _run.leaving.set()
    with contextlib.suppress(Exception):
        _run.client.key_value_set(_FAILURE, json.dumps([_run.index, line, status]))
    _leave(status)


def _leave(status: int) -> NoReturn:
    # The coordinator must not be gone before all have heard.
    with contextlib.suppress(Exception):
        _run.client.wait_at_barrier("rlae_jax/leave", _LEAVE_SECONDS * 1000)
        if is_first():  # the runtime aborts whoever is still on the way out when the coordinator goes
            time.sleep(_HEAD_START_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # past the runtime, which waits for all at a normal end


def _watch_failures() -> None:
    """Ends this process where another one failed, and says why."""
    while not _run.leaving.wait(0.5):
        try:
            index, line, status = json.loads(_run.client.key_value_try_get(_FAILURE))
        except Exception:  # most often: there is no such key
            continue
        if _run.leaving.wait(2.0):
            return  # it fails by itself
        sys.stderr.write(f"process {index} of this run: {line}\n")
        _leave(status)


def _end_watch(watch: threading.Thread) -> None:
    _run.leaving.set()
    watch.join()


def await_loss() -> None:
    """Waits as long as the runtime needs to notice that a process is gone, which ends this one, and its parent says so.
    Returns where all are there."""
    time.sleep(ranges.from_environment(HEARTBEAT_VARIABLE, WholeSeconds, _HEARTBEAT_SECONDS) + 10)
