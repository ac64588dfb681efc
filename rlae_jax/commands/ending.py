"""How a command ends: one place where exceptions become a line on standard error and an exit status.

0 done    1 unexpected, with a traceback    2 unusable input, or output that cannot be written
75 ended by SIGTERM, or because another process of the run was lost: run again    130 Ctrl-C    141 nobody reads
"""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from rlae_jax import hosts, signals
from rlae_jax.errors import InputError, Interrupted, Preempted, one_line
from rlae_jax.version import __version__

STATUSES = (
    "Exit status: 0 done; 1 something unexpected; 2 unusable input, or output that cannot be written; 75 ended by "
    "SIGTERM, run again (with --resume, where there is one); 130 ended by Ctrl-C; 141 nobody reads the output."
)
_LESS = "smaller batches, models or dtypes, or --quantise need less; rlae-jax plan says how much"
UNEXPECTED, UNUSABLE, NO_READER = 1, 2, 141
# What the runtime's errors begin with where another process may be gone.
_LOST = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")


def run(command: Callable[[], None], again: Callable[[], str] = lambda: "") -> None:
    """Runs a command, and ends the process where it fails, or is stopped.

    Args:
      again: how to go on with a command that was stopped: a command line, or nothing.
    """
    try:
        with signals.as_exceptions():
            command()
            _flush()
    except SystemExit:
        raise
    except Interrupted as error:  # of all processes at once
        if hosts.is_first():
            print(_stopped(str(error), again()), file=sys.stderr)
        sys.exit(signals.RUN_AGAIN if isinstance(error, Preempted) else signals.STOPPED)
    except KeyboardInterrupt as error:
        _end_stopped(error, again())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written
        sys.exit(NO_READER)
    except Exception as error:
        line = expected(error)
        if line is not None:
            _end(UNUSABLE, f"error: {line}")
        if stop := _stop_behind(error):
            _end_stopped(stop, again())
        if hosts.count() > 1 and _LOST.match(str(error)):
            hosts.await_loss()  # the process that it could not reach may be gone
        traceback.print_exc()
        told = f"{type(error).__name__}: {one_line(error)}"
        _end(
            UNEXPECTED, f"{told}\nerror: this is unexpected in rlae_jax {__version__}; please report it, with all above"
        )


def expected(error: BaseException) -> str | None:
    """What to say of an exception that is nobody's mistake in this package; None for one that is."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, OSError):
        return _os_error(error)
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({one_line(error) or 'of this machine'}); {_LESS}"
    if isinstance(error, RecursionError):
        return f"something that was read is nested too deeply ({one_line(error)})"
    if str(error).startswith("RESOURCE_EXHAUSTED"):  # of JAX's runtime
        return f"the device has not enough memory ({one_line(error)}); {_LESS}"
    return None


def _os_error(error: OSError) -> str:
    what = error.strerror or one_line(error) or type(error).__name__
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{what}: this process may open no more; ulimit -n raises that"
    names = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    return f"{' and '.join(names)}: {what}" if names else what


def _flush() -> None:
    """What was printed reaches its reader now, or there is an error that names it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be tried again at the end
        raise InputError(f"standard output: {error.strerror}") from error


def _stop_behind(error: BaseException) -> KeyboardInterrupt | None:
    """The signal that a library took for an error of its own: it comes at any line, those between `try` and `except`,
    too."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return cause


def _end_stopped(stop: KeyboardInterrupt, again: str) -> NoReturn:
    status = signals.RUN_AGAIN if isinstance(stop, signals.Terminated) else signals.STOPPED
    _end(status, _stopped(str(stop) or "stopped", again))


def _stopped(line: str, again: str) -> str:
    return f"{line}. Go on with:\n  {again}" if again else line


def _end(status: int, line: str) -> NoReturn:
    """Ends with a line on standard error; of several processes the others end too."""
    print(line, file=sys.stderr)
    if hosts.count() > 1:
        hosts.fail(line, status)
    sys.exit(status)
