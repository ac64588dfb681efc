"""The parent of a process that runs a command together with others: it says in one line how that process was ended.

Where another process of the run is lost, JAX's runtime aborts this one, at whatever place it is. So the command is run
in a child, and `watch` puts this file in the place of the program that was called. It needs nothing but Python.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

VARIABLE = "RLAE_JAX_WATCHED"  # in the child: where to write once all processes are connected
FLAG = "--coordinator"
UNUSABLE, RUN_AGAIN = 2, 75


def watch() -> None:
    """Has a command of several processes run in a child: does not come back, but in the child, and without need."""
    asked = any(argument.partition("=")[0] == FLAG for argument in sys.argv[1:])
    if asked and VARIABLE not in os.environ:
        # -I: the directory of this file has modules with names of Python's own.
        os.execv(sys.executable, [sys.executable, "-I", __file__, *sys.orig_argv[1:]])


def tell_connected() -> None:
    """From the child: what happens from now on has nothing to do with the call."""
    os.write(int(os.environ[VARIABLE]), b"1")


def _end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> int:
    """Runs the command of the arguments, hands on signals, and gives its exit status."""
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, *sys.argv[1:]],
        env=os.environ | {VARIABLE: str(writer)},
        pass_fds=(writer,),
        start_new_session=True,  # what a terminal or a scheduler sends to all comes once, from here
        preexec_fn=_end_with_parent,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: child.send_signal(received))
    status = child.wait()
    if status >= 0:
        return status
    if status != -signal.SIGABRT:
        print(f"this process of the run was ended by {signal.Signals(-status).name}", file=sys.stderr)
        return 128 - status
    os.set_blocking(reader, False)
    connected = b""
    with contextlib.suppress(BlockingIOError):
        connected = os.read(reader, 1)
    if connected:
        print(
            "a process of this run was lost, and the runtime ended this one; run again (training: with --resume)",
            file=sys.stderr,
        )
        return RUN_AGAIN
    print(
        "error: the processes of this run did not come together: one is missing, or two have the same --process-id",
        file=sys.stderr,
    )
    return UNUSABLE


if __name__ == "__main__":
    sys.exit(main())
