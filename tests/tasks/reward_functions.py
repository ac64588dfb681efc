"""A user's rewards, good and bad, as worker processes import them: the standard library and numpy alone."""

import os
import re
import signal
import sys
import time
from decimal import Decimal

import numpy as np

NOT_A_FUNCTION = 3


def length(text, reference):
    """A share of the reference's length: any number in [0, 1]."""
    return min(len(text) / len(reference), 1.0)


def same(text, reference):
    return text == reference


def by_order(text, reference):
    """Does what the text says; "0.25" and the like are scores."""
    orders = {
        "raise": lambda: 1 / 0,
        "raise long": lambda: (_ for _ in ()).throw(ValueError("x\n" * 5_000)),
        "nan": lambda: float("nan"),
        "inf": lambda: float("inf"),
        "two": lambda: 2,
        "below": lambda: -0.5,
        "list": lambda: [1.0],
        "text": lambda: "1.0",
        "none": lambda: None,
        "array": lambda: np.ones((1,)),
        "complex": lambda: 1j,
        "true": lambda: True,
        "scalar": lambda: np.float32(0.5),
        "zero axes": lambda: np.array(0.5),
        "decimal": lambda: Decimal("0.5"),
        "exit": lambda: sys.exit(3),
        "vanish": lambda: os._exit(3),
        "crash": lambda: os.kill(os.getpid(), signal.SIGSEGV),
        "hang": lambda: time.sleep(1_000),
        # Within C code that holds the interpreter's lock and sees no signal handler.
        "regex": lambda: re.match(r"(a+)+$", "a" * 60 + "b"),
        "print": lambda: print("printed by a reward") or 1.0,
    }
    return orders[text]() if text in orders else float(text)


def knows_jax(text, reference):
    """Whether the worker has loaded what starts threads or an accelerator, or the package itself."""
    return float(any(name.partition(".")[0] in ("jax", "jaxlib", "rlae_jax") for name in sys.modules))


def leaves_a_process(text, reference):
    """Starts a process whose id it writes to the file `text`, and waits for it."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(text, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    child.wait()


def is_path_clean(text, reference):
    """`datasets` is the library's name: the directory of the worker's own file must not hide it."""
    import importlib.util

    spec = importlib.util.find_spec("datasets")
    return float(spec is not None and "rlae_jax" not in str(spec.origin))
