"""`rlae-jax serve`."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import ModelOptions
from rlae_jax.errors import InputError
from rlae_jax.ranges import Context, Count, MiB, Port, Seconds

if TYPE_CHECKING:
    from rlae_jax.fusion.weights import Weights

KEY_VARIABLE = "RLAE_JAX_API_KEY"


def serve(
    *,
    model: Annotated[ModelOptions, OmitArgPrefixes],
    policy: Annotated[tuple[str, ...], arg(metavar="RUN|NAME [RUN|NAME ...]")] = (),
    name: str = "ensemble",
    host: str = "127.0.0.1",
    port: Port = 8000,
    api_key: str | None = None,
    slots: Count = 8,
    context: Context | None = None,
    queue: Count = 256,
    prefix_mib: MiB = 256,
    timeout: Seconds = 600.0,
    warm_up: bool = True,
) -> None:
    """Serve several language models that write together, to every client of the OpenAI API.

    Point a client at http://HOST:PORT/v1. Its models are the ensemble, every member by its own name, and every policy.
    A page at http://HOST:PORT/ shows who wrote what; /metrics has figures for Prometheus, /openapi.json describes it.
    Ctrl-C or SIGTERM: running answers end, new requests are refused, exit status 0; a second one ends at once.

    Args:
      model: which models, and how they are fused.
      policy: run directories whose trained agents set the weights, or policies that need no training (perplexity,
        confidence, consistency, gate, online, bayes, selective): each is a model that clients can name.
      name: what the ensemble is called.
      host: where to listen; 0.0.0.0 is every address of this machine.
      port: where to listen; 0 takes one that is free.
      api_key: what clients must send (better in the variable RLAE_JAX_API_KEY: others see command lines).
        Default: no key is asked for.
      slots: answers that are written at a time; others wait.
      context: the longest prompt and answer together, in tokens, as far as the models' own context goes. Memory grows
        with slots x context. Default: what the models were made for, at most 2048.
      queue: requests that may wait for a slot; further ones are told to come back (429).
      prefix_mib: memory in MiB for the beginnings of prompts, which are then not read again.
      timeout: seconds after which an answer ends with what is written.
      warm_up: compile everything before the first request is taken; otherwise the first ones wait for it. What
        scores given prompts (echo with logprobs) is compiled when it is first asked for.
    """
    try:
        from rlae_jax.serving.app import Limits, make_app
        from rlae_jax.serving.server import Server, listen
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is missing; serving needs: pip install 'rlae-jax[serve]'") from None
    from rlae_jax import report
    from rlae_jax.ppo.train import check_members
    from rlae_jax.serving.api import Catalogue
    from rlae_jax.serving.engine import Engine

    if not name:
        raise InputError("--name is empty: clients need it to name the ensemble")
    key = os.environ.get(KEY_VARIABLE) if api_key is None else api_key
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
        raise InputError("--api-key must be printable ASCII without spaces around it, and not empty")
    policies = _policies(policy)
    with listen(host, port) as socket:
        _tell(f"loading {', '.join(model.models)}")
        ensemble = model.load()
        for run in policy:
            if Path(run).is_dir():
                check_members(run, ensemble)
        engine = Engine(
            ensemble, slots=slots, context=context, policies=policies, prefix_bytes=prefix_mib * 2**20, queue=queue
        )
        try:
            created = int(time.time())
            catalogue = Catalogue.create(engine, name=name, fusion=model.fusion, policies=policies, created=created)
            app = make_app(engine, catalogue, api_key=key, limits=Limits(answer_seconds=timeout))
            if warm_up:
                _tell("compiling, so that no request waits for it; --no-warm-up leaves it out")
                engine.warm_up(lambda done, total: _tell(f"compiled {done} of {total}"))
            shown = f"[{host}]" if ":" in host else host
            address = f"http://{shown}:{socket.getsockname()[1]}"

            def ready() -> None:
                report.say(f"ready at {address}/ (the page) and {address}/v1 (the API)")
                report.say(f"models: {', '.join(catalogue.models)}")

            _log_to_standard_error()
            _allow_many_connections()
            server = Server(app, ready)
            server.run([socket])
        finally:
            engine.close(wait=False)
    report.say("stopped")


def _policies(names: tuple[str, ...]) -> "dict[str, Weights]":
    """Policies by the names that clients use: a run's is its directory's; one that is taken gets a number."""
    from rlae_jax.ppo.policies import get_policy

    policies: dict[str, Weights] = {}
    for given in names:
        short = Path(given).resolve().name if Path(given).is_dir() else given
        numbered = (short if i == 1 else f"{short}-{i}" for i in range(1, len(names) + 1))
        policies[next(one for one in numbered if one not in policies)] = get_policy(given)
    return policies


def _tell(what: str) -> None:
    """On standard error: who starts a server reads its standard output for the line that says that it is ready."""
    print(what, file=sys.stderr, flush=True)


def _log_to_standard_error() -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("rlae_jax")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False  # other libraries give the root logger handlers of their own


def _allow_many_connections() -> None:
    """As many open files as this user may have: a connection is one."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
