"""What a worker process runs: somebody's function, watched by a guard. Standard library alone, and nothing of JAX.

`workers.Worker` starts this file as a script. That process is the guard; it starts the worker proper, which imports and
calls the function, and starts it anew whenever a call breaks it:

    parent ─frames─► guard ─frames─► worker: function(*arguments)
                       ▲ what the worker prints: counted, and its beginning kept

A frame is four bytes of length and JSON. The parent sends {"path", "source", "wrapper", limits...}, which {"fault"}
answers; then a number n and n frames of arguments, which {"outcomes", "fault", "printed"} answers. The end of the
parent's frames, however it ends, ends guard, worker and all that the worker started.
"""

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_LONGEST_MESSAGE = 200  # characters of an exception
_KEPT_OUTPUT = 400  # bytes of what is printed
_LOOK_SECONDS = 0.02  # between two looks at memory and processes
_STOP_SECONDS = 10.0
_DATA_PER_CORE = 128 << 20
_PIECE = 1 << 16
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def described(error: BaseException) -> str:
    """An exception in one short line."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        text = ""
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."


class NoFunction(LookupError):
    """There is no such function."""


def resolve(source: str) -> Callable[..., Any]:
    """The function that "module:function", or "path/to/file.py:function", names.

    Raises:
      NoFunction: no such module or function, or one that cannot be called; the message says which.
      BaseException: whatever the module itself raises while it is imported.
    """
    module_name, _, name = source.rpartition(":")
    if module_name.endswith(".py"):
        module = _module_of_file(Path(module_name))
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # The module may be there and lack one that it needs.
            if error.name is None or not (module_name + ".").startswith(error.name + "."):
                raise
            raise NoFunction(f"there is no module {error.name!r}") from error
    function = getattr(module, name, None)
    if function is None:
        raise NoFunction(f"{module_name} has no {name!r}")
    if not callable(function):
        raise NoFunction(f"{name!r} of {module_name} is no function but {type(function).__name__}")
    checked: Callable[..., Any] = function
    return checked


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise NoFunction(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_own_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def frame(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# The worker.


def _read_exactly(descriptor: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(descriptor, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def read_frame(descriptor: int) -> bytes:
    """Raises EOFError where no more comes."""
    return _read_exactly(descriptor, int.from_bytes(_read_exactly(descriptor, 4), "big"))


def _write(descriptor: int, content: bytes) -> None:
    rest = memoryview(frame(content))
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _work(start: dict[str, Any], calls: int, answers: int) -> None:
    """Imports, then answers calls for as long as they come. A call that forked must not answer twice."""
    own = os.getpid()
    function = None
    try:
        function = resolve(start["source"])
        if start["wrapper"]:
            call, function = function, resolve(start["wrapper"])
            arguments_before: tuple[Any, ...] = (call,)
        else:
            arguments_before = ()
        fault = ""
    except NoFunction as error:
        fault = str(error)
    except SystemExit:
        raise
    except BaseException as error:
        fault = f"{start['source'].rpartition(':')[0]} cannot be imported ({described(error)})"
    if os.getpid() != own:
        os._exit(0)
    _write(answers, fault.encode("utf-8", "backslashreplace"))
    if fault or function is None:
        return
    while True:
        try:
            arguments = json.loads(read_frame(calls))
        except EOFError:
            os._exit(0)  # not sys.exit: threads that the function left behind would be waited for
        try:
            outcome = json.dumps([function(*arguments_before, *arguments), ""])
        except SystemExit:
            raise
        except BaseException as error:
            # What a wrapper of ours objects to is said in its own words.
            said = str(error) if getattr(error, "says_itself", False) else f"raised {described(error)}"
            outcome = json.dumps([None, said])
        if os.getpid() != own:
            os._exit(0)
        _write(answers, outcome.encode())


# The guard.


class _Broken(Exception):
    """The worker cannot go on; says why."""


class _Guard:
    def __init__(self, parent: int, parent_process: int) -> None:
        self._parent, self._parent_process = parent, parent_process
        self._start: dict[str, Any] = {}
        self._worker = 0  # its process and its group of processes, 0 for none
        self._calls = self._answers = self._output = -1
        self._printed, self._beginning = 0, b""
        self._looked = 0.0

    def run(self) -> NoReturn:
        self._start = json.loads(self._heard())
        fault = self._load()
        self._tell({"fault": fault})
        while not fault:
            outcomes: list[Any] = []
            calls = [self._heard() for _ in range(int(self._heard()))]
            for call in calls:
                fault = "" if self._worker else self._load()
                if fault:
                    break
                outcomes.append(self._outcome(call))
            printed = [self._printed, self._beginning.decode("utf-8", "replace")]
            self._tell({"outcomes": outcomes, "fault": fault, "printed": printed})
        self._leave()

    def _tell(self, value: Any) -> None:
        try:
            _write(self._parent, json.dumps(value).encode())
        except OSError:
            self._leave()

    def _heard(self) -> bytes:
        """What the parent says next; meanwhile the worker is watched."""
        while self._parent not in self._wait(1.0, self._parent):
            with contextlib.suppress(_Broken):
                self._look()
                continue
            self._stop()
        try:
            return read_frame(self._parent)
        except (EOFError, OSError):
            self._leave()

    def _leave(self) -> NoReturn:
        self._stop()
        os._exit(0)

    def _load(self) -> str:
        """Starts a worker; "" or what is wrong."""
        calls, self._calls = os.pipe()
        self._answers, answers = os.pipe()
        self._output, output = os.pipe()
        try:
            self._worker = os.fork()
        except OSError as error:
            return f"no process can be started ({error})"
        if not self._worker:
            os.setsid()
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            for descriptor in (self._parent, self._calls, self._answers, self._output):
                os.close(descriptor)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.close(output)
            # What is asked for at once: more than what may be used, as libraries ask for some per core and thread.
            data = 2 * self._start["memory"] + (os.cpu_count() or 1) * _DATA_PER_CORE
            with contextlib.suppress(ValueError, OSError):  # a lower limit is in force
                resource.setrlimit(resource.RLIMIT_DATA, (data, data))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            sys.path[:] = self._start["path"]
            _work(self._start, calls, answers)
            os._exit(0)
        for descriptor in (calls, answers, output):
            os.close(descriptor)
        os.set_blocking(self._calls, False)
        os.set_blocking(self._output, False)
        module = self._start["source"].rpartition(":")[0]
        try:
            fault = self._exchange(None, self._start["start_seconds"]).decode()
        except _Broken as error:
            fault = f"{module} cannot be imported ({error})"
        if fault:
            self._stop()
        return fault

    def _outcome(self, call: bytes) -> Any:
        try:
            answer = self._exchange(call, self._start["seconds"])
            try:
                value, problem = json.loads(answer)
            except (ValueError, TypeError, RecursionError):
                raise _Broken("gave an answer that cannot be read") from None
            return value, problem
        except _Broken as error:
            self._stop()
            return None, str(error)

    def _exchange(self, call: bytes | None, seconds: float) -> bytes:
        """Sends a call, if there is one, and waits for the answer."""
        end = time.monotonic() + seconds
        rest = memoryview(frame(call) if call is not None else b"")
        answer, size = bytearray(), 4
        while len(answer) < size:
            left = end - time.monotonic()
            if left <= 0:
                raise _Broken(f"took longer than {seconds:g} s")
            ready = self._wait(min(left, _LOOK_SECONDS), self._answers, self._calls if rest else None)
            if self._calls in ready:
                with contextlib.suppress(BlockingIOError, BrokenPipeError):
                    rest = rest[os.write(self._calls, rest[:_PIECE]) :]
            if self._answers in ready:
                part = os.read(self._answers, min(size - len(answer), 1 << 20))
                if not part:
                    raise _Broken(f"ended its process ({self._how_it_ended()})")
                answer += part
                if size == 4 and len(answer) == 4:
                    size += int.from_bytes(answer, "big")
                    if size > self._start["answer"]:
                        raise _Broken(f"gave more than {self._start['answer'] / 1e6:g} MB")
            elif time.monotonic() >= self._looked + _LOOK_SECONDS:
                self._look()
        return bytes(answer[4:])

    def _wait(self, seconds: float, reading: int, writing: int | None = None) -> set[int]:
        """Which of these descriptors are ready. What is printed meanwhile is taken; a parent that is gone ends all."""
        poll = select.poll()
        poll.register(reading, select.POLLIN)
        poll.register(self._parent, select.POLLIN)
        if writing is not None:
            poll.register(writing, select.POLLOUT)
        if self._worker and self._output >= 0:
            poll.register(self._output, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll(seconds * 1000)}
        if self._output in ready:
            self._take_output()
        if self._parent in ready and reading != self._parent:
            self._leave()  # it says nothing before it has its answer
        return ready

    def _take_output(self) -> None:
        try:
            part = os.read(self._output, _PIECE)
        except BlockingIOError:
            return
        if not part:
            os.close(self._output)
            self._output = -1
        self._printed += len(part)
        self._beginning += part[: _KEPT_OUTPUT - len(self._beginning)]

    def _look(self) -> None:
        """Compares memory and processes with their limits."""
        self._looked = time.monotonic()
        if os.getppid() != self._parent_process:  # gone, while a fork of it holds its end of the frames
            self._leave()
        if not self._worker:
            return
        found = _descendants(os.getpid())
        if len(found) > self._start["processes"]:
            raise _Broken(f"started more than {self._start['processes']} processes")
        limit = self._start["memory"]
        # Pages that a fork shares count for each here, and only by their share there, which takes longer to find out.
        if sum(map(_resident, found)) > limit and sum(map(_proportional, found)) > limit:
            raise _Broken(f"used more than {limit / 1e9:g} GB of memory")
        for process in _children(os.getpid()):  # those whose own parents ended before them
            if process != self._worker:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(process, os.WNOHANG)

    def _how_it_ended(self) -> str:
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            process, status = os.waitpid(self._worker, os.WNOHANG)
            if process:
                code = os.waitstatus_to_exitcode(status)
                return f"exit status {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            time.sleep(0.001)
        return "closed its pipe"

    def _stop(self) -> None:
        """Ends the worker and all that it started, and forgets them."""
        if not self._worker:
            return
        end = time.monotonic() + _STOP_SECONDS
        while time.monotonic() < end:
            # At once, and so faster than any of them can fork; those that left the group are met one by one.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._worker, signal.SIGKILL)
            for process in [self._worker, *_descendants(os.getpid())]:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(process, signal.SIGKILL)
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                break
            time.sleep(0.001)
        self._worker = 0
        for descriptor in (self._calls, self._answers):
            os.close(descriptor)
        while self._output >= 0 and select.select([self._output], [], [], 0)[0]:
            self._take_output()
        if self._output >= 0:
            os.close(self._output)
        self._calls = self._answers = self._output = -1


def _children(process: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process}/task/{task}/children") as file:
                found += map(int, file.read().split())
    return found


def _descendants(process: int) -> list[int]:
    """All that a process started, and those started in turn. None where the system does not tell."""
    found = _children(process)
    for one in found:  # grows while it is read
        found += _children(one)
    return found


def _resident(process: int) -> int:
    """Bytes in memory that are no file's."""
    try:
        with open(f"/proc/{process}/statm") as file:
            _, resident, shared, *_ = map(int, file.read().split())
    except (OSError, ValueError):
        return 0
    return (resident - shared) * resource.getpagesize()


def _proportional(process: int) -> int:
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{process}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith(("Pss:", "SwapPss:"))) * 1024
    return 0


def main(parent: int, parent_process: int) -> NoReturn:
    """Serves one parent until it is gone."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _Guard(parent, parent_process).run()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
