"""`rlae-jax COMMAND` and `rlae-jax emorl COMMAND`: reads the command line, runs one command, tells what was wrong.

A command is a function whose parameters and docstring tyro turns into options and help. What it needs of the library it
imports inside, so that help and mistakes in a call come without waiting for it.
"""

import functools
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, NoReturn

import tyro

from rlae_jax import caches, hosts, ranges
from rlae_jax.commands import (
    ablate,
    demo,
    evaluate,
    families,
    generate,
    inspect,
    lm_eval,
    plan,
    serve,
    specialists,
    train,
    watch,
)
from rlae_jax.commands.devices import on_devices
from rlae_jax.commands.emorl import demo as emorl_demo
from rlae_jax.commands.emorl import evaluate as emorl_evaluate
from rlae_jax.commands.emorl import export as emorl_export
from rlae_jax.commands.emorl import search as emorl_search
from rlae_jax.commands.emorl import train as emorl_train
from rlae_jax.errors import InputError, Interrupted, Preempted

CACHE_VARIABLE = "RLAE_JAX_COMPILATION_CACHE"


def emorl() -> None:
    """One adapter per objective, fused: demo, train, search, evaluate, export; see rlae-jax emorl --help."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": on_devices(demo.demo),
    "specialists": on_devices(specialists.specialists),
    "generate": on_devices(generate.generate, hosts_too=True),
    "train": on_devices(train.train, hosts_too=True),
    "evaluate": on_devices(evaluate.evaluate, hosts_too=True),
    "lm-eval": on_devices(lm_eval.lm_eval),
    "ablate": on_devices(ablate.ablate),
    "serve": serve.serve,  # an engine runs on one device
    "inspect": on_devices(inspect.inspect),
    "families": families.families,
    "plan": plan.plan,
    "emorl": emorl,
}
EMORL_COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": on_devices(emorl_demo.demo),
    "train": on_devices(emorl_train.train, hosts_too=True),
    "search": on_devices(emorl_search.search, hosts_too=True),
    "evaluate": on_devices(emorl_evaluate.evaluate, hosts_too=True),
    "export": emorl_export.export,
}


def within_ranges(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which first says what of its options is out of range."""

    @functools.wraps(command)
    def run(**options: Any) -> Any:
        ranges.check_options(command, options)
        return command(**options)

    return run


def turn_on_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second call does not compile again."""
    import jax

    given = os.environ.get(CACHE_VARIABLE)
    if given == "off" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    if (place := caches.place("programs", given or None)) is not None:
        caches.keep_programs(place)


# What the runtime's errors begin with.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")


def _end(status: int, line: str) -> NoReturn:
    """Ends with a line on standard error; of several processes the others end too."""
    print(line, file=sys.stderr)
    if hosts.count() > 1:
        hosts.fail(line, status)
    sys.exit(status)


def main() -> None:
    """The entry point of `rlae-jax`.

    Exit status 2: unusable input; 130: stopped by Ctrl-C; 75: stopped from outside after the state was saved (SIGTERM,
    preemption), or another process of the run was lost: run again with --resume.
    """
    watch.watch()
    turn_on_compilation_cache()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        if sys.argv[1:2] == ["emorl"]:
            tyro.extras.subcommand_cli_from_dict(
                {name: within_ranges(command) for name, command in EMORL_COMMANDS.items()},
                prog="rlae-jax emorl",
                args=sys.argv[2:],
                description="LoRA adapters of one model, each fine-tuned with reinforcement learning for an objective "
                "of its own, write one answer together under weights that are searched.",
            )
            return
        tyro.extras.subcommand_cli_from_dict(
            {name: within_ranges(command) for name, command in COMMANDS.items()},
            prog="rlae-jax",
            description="Several language models write one answer together; an agent learns how much to trust each. "
            f"Compiled programs are kept in ~/.cache/rlae_jax (set {CACHE_VARIABLE} to another directory, or to off).",
        )
    except InputError as error:
        _end(2, f"error: {error}")
    except Interrupted as error:  # of all processes at once
        if hosts.is_first():
            print(error, file=sys.stderr)
        sys.exit(75 if isinstance(error, Preempted) else 130)
    except KeyboardInterrupt:
        _end(130, "stopped")
    except Exception as error:
        if hosts.count() == 1:
            raise
        if _STATUS.match(str(error)):
            hosts.await_loss()  # the process that it could not reach may be gone
        traceback.print_exc()
        _end(1, f"{type(error).__name__}: {error}")
