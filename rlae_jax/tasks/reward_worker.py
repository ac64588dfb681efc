"""How one reward is called, and the process that calls slow ones for `scoring.RewardPool`.

Imports the standard library alone: a worker runs this file as a script, never loads the package, and so never loads
JAX. A parent and its worker speak JSON over a pipe: first {"path", "source", "limit"}, answered by "" or by what went
wrong; then one [text, reference] after another, each answered by [value, problem]. The end of the pipe ends the worker.
"""

import functools
import importlib
import importlib.util
import json
import math
import numbers
import os
import signal
import sys
from collections.abc import Callable
from decimal import Decimal
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Reference = str | tuple[str, ...]

# A worker whose parent is gone, and which hangs itself, ends this long after the limit of its item.
_GRACE_SECONDS = 2.0
_LONGEST_MESSAGE = 200


class UnusableReward(ValueError):
    """What a reward gave is no number in [0, 1]."""


@functools.cache
def resolve(source: str) -> Callable[[str, str], Any]:
    """The function that "module:function", or "path/to/file.py:function", names.

    Raises:
      LookupError: no such module or function, or one that cannot be called; the message says which.
      Exception: whatever the module itself raises while it is imported.
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
            raise LookupError(f"there is no module {error.name!r}") from error
    function = getattr(module, name, None)
    if function is None:
        raise LookupError(f"{module_name} has no {name!r}")
    if not callable(function):
        raise LookupError(f"{name!r} of {module_name} is no function but {type(function).__name__}")
    checked: Callable[[str, str], Any] = function
    return checked


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise LookupError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(f"_reward_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickle look their module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def best(function: Callable[[str, str], Any], text: str, reference: Reference) -> float:
    """The best score over the references, each call checked.

    Raises:
      UnusableReward: a call gave something else than a number in [0, 1].
    """
    references = (reference,) if isinstance(reference, str) else reference
    return max((_checked(function(text, one)) for one in references), default=0.0)


def _checked(value: Any) -> float:
    # Arrays of one number count as numbers only without axes.
    if not isinstance(value, numbers.Real | Decimal) and getattr(value, "shape", None) != ():
        shape = getattr(value, "shape", None)
        kind = f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else type(value).__name__
        raise UnusableReward(f"gave no number but {kind}")
    number = float(value)
    if math.isnan(number):
        raise UnusableReward("gave NaN")
    if not 0.0 <= number <= 1.0:
        raise UnusableReward(f"gave {number:g}, outside [0, 1]")
    return number


def attempt(function: Callable[[str, Any], Any], text: str, reference: Reference) -> tuple[float, str]:
    """(score, "") or, where the call fails, (0, what happened)."""
    try:
        return _checked(function(text, reference)), ""
    except UnusableReward as error:
        return 0.0, str(error)
    except Exception as error:
        return 0.0, f"raised {described(error)}"


def described(error: BaseException) -> str:
    """An exception in one short line."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= _LONGEST_MESSAGE else line[:_LONGEST_MESSAGE] + "..."


def main(descriptor: int) -> None:
    """Serves one parent until it closes the pipe."""
    pipe = Connection(descriptor)
    try:
        start = json.loads(pipe.recv_bytes())
        sys.path[:] = start["path"]
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        try:
            function = functools.partial(best, resolve(start["source"]))
        except Exception as error:
            pipe.send_bytes(json.dumps(described(error)).encode())
            return
        pipe.send_bytes(b'""')
        while True:
            text, reference = json.loads(pipe.recv_bytes())
            # The parent keeps the limit. Should it die meanwhile, the kernel ends this process, even within C code.
            signal.setitimer(signal.ITIMER_REAL, start["limit"] + _GRACE_SECONDS)
            outcome = attempt(function, text, reference if isinstance(reference, str) else tuple(reference))
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            pipe.send_bytes(json.dumps(outcome).encode())
    except (EOFError, OSError):
        # Not sys.exit: threads that the user's code left behind would be waited for.
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))
