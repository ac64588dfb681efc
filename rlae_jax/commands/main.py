"""`rlae-jax COMMAND` and `rlae-jax emorl COMMAND`: reads the command line, runs one command, tells what was wrong.

A command is a function whose parameters and docstring tyro turns into options and help. What it needs of the library it
imports inside, so that help and mistakes in a call come without waiting for it.
"""

import functools
import inspect
import os
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from rlae_jax import caches, ranges
from rlae_jax.commands import (
    ablate,
    demo,
    ending,
    evaluate,
    families,
    generate,
    lm_eval,
    plan,
    serve,
    specialists,
    train,
    transfer,
    watch,
)
from rlae_jax.commands import inspect as inspect_models
from rlae_jax.commands.devices import on_devices
from rlae_jax.commands.emorl import demo as emorl_demo
from rlae_jax.commands.emorl import evaluate as emorl_evaluate
from rlae_jax.commands.emorl import export as emorl_export
from rlae_jax.commands.emorl import search as emorl_search
from rlae_jax.commands.emorl import train as emorl_train

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
    "transfer": on_devices(transfer.transfer),
    "serve": serve.serve,  # an engine runs on one device
    "inspect": on_devices(inspect_models.inspect),
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


def _paths(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
    """How paths are read: an empty one is a mistake, and not the current directory."""
    if info.type is not Path:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=_read_path,
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda path: [str(path)],
    )


def _read_path(texts: list[str]) -> Path:
    if not texts[0]:
        raise ValueError("the path is empty")
    return Path(texts[0])


def _run() -> None:
    """The command of `sys.argv`."""
    turn_on_compilation_cache()
    registry = tyro.constructors.ConstructorRegistry()
    registry.primitive_rule(_paths)
    with registry:
        if sys.argv[1:2] == ["emorl"]:
            tyro.extras.subcommand_cli_from_dict(
                {name: within_ranges(command) for name, command in EMORL_COMMANDS.items()},
                prog="rlae-jax emorl",
                args=sys.argv[2:],
                description="LoRA adapters of one model, each fine-tuned with reinforcement learning for an objective "
                f"of its own, write one answer together under weights that are searched. {ending.STATUSES}",
            )
            return
        tyro.extras.subcommand_cli_from_dict(
            {name: within_ranges(command) for name, command in COMMANDS.items()},
            prog="rlae-jax",
            description="Several language models write one answer together; an agent learns how much to trust each. "
            f"Compiled programs are kept in ~/.cache/rlae_jax (set {CACHE_VARIABLE} to another directory, or to off). "
            f"{ending.STATUSES}",
        )


# Commands that go on with what is there when they are called again.
_REUSING = ("demo", "specialists")


def _again() -> str:
    """The command line that goes on with the command of `sys.argv`; nothing, where it has to begin anew."""
    commands, name = (EMORL_COMMANDS, sys.argv[2:3]) if sys.argv[1:2] == ["emorl"] else (COMMANDS, sys.argv[1:2])
    command = commands.get(name[0]) if name else None
    if command is None:
        return ""
    resumable = "resume" in inspect.signature(command).parameters
    if not resumable and name[0] not in _REUSING:
        return ""
    return shlex.join(["rlae-jax", *sys.argv[1:], *(["--resume"] if resumable and "--resume" not in sys.argv else [])])


def main() -> None:
    """Runs the command of `sys.argv`; `ending` says with which status the process ends."""
    watch.watch()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    ending.run(_run, _again)
