"""A server under load for a while, with clients that vanish: is every answer right, is any lost, does memory grow?

In: two small members, one with the other's parameters disturbed. Out: how many answers came, were wrong and were lost,
and how much the server's resident memory grew after a quarter of the time.

    python -m benchmarks.soak [--minutes 20] [--quick] [--json PATH]

`rlae-jax serve` runs as a process of its own. First its capacity is measured, by as many clients as keep it busy; then
requests come as a Poisson process at 80% of that. They are drawn from a pool of different ones, whose answers
`Ensemble.generate` wrote before, each alone. A fifth of the clients close the connection at a random moment. Memory
settles in the first minutes: the growth of a run of less than twenty says little.
"""

import asyncio
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common

common.require("httpx2")
import httpx2 as httpx  # noqa: E402

NAME, POLICY = "pair", "confidence"
LOAD = 0.8  # of the capacity
VANISHING = 0.2  # of the clients
ANSWER_SECONDS = 120  # an answer that takes longer is lost
WORDS = ("once", "upon", "a", "time", "there", "was", "little", "girl", "big", "dog", "who", "liked", "to", "play")
# Few, as `generate` compiles a program for each; prompts, seeds and fixed weights are different every time.
KINDS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 24},
    {"max_new_tokens": 48, "temperature": 0.7, "top_p": 0.9, "stop": ["a little", "."]},
    {"max_new_tokens": 24, "temperature": 1.0, "samples": 3, "stop": [" the"]},
    {"max_new_tokens": 32, "temperature": 1.0, "top_k": 20, "weights": POLICY},
    {"max_new_tokens": 96, "temperature": 1.0, "min_p": 0.02, "repetition_penalty": 1.1},
)


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request's body without `stream`, and what `generate` writes for it, a text and an end's reason per sample."""

    body: dict[str, Any]
    texts: list[str]
    reasons: list[str]


@dataclasses.dataclass
class Tally:
    """What became of the requests, and [seconds, bytes] of resident memory."""

    right: int = 0
    wrong: int = 0
    lost: int = 0
    vanished: int = 0
    seconds: float = 0.0  # of all right answers together
    first_fault: str = ""
    memory: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    @property
    def ended(self) -> int:
        return self.right + self.wrong + self.lost + self.vanished

    def fault(self, what: str) -> None:
        self.first_fault = self.first_fault or what

    def growth(self) -> float:
        """Of the memory from a quarter of the time to the end, as a fraction: medians of a twentieth of the time."""
        at, resident = np.array(self.memory, np.float64).T
        first = resident[(at >= at[-1] * 0.25) & (at <= at[-1] * 0.3)]
        return float(np.median(resident[at >= at[-1] * 0.95]) / np.median(first) - 1)


def draw(ensemble: rj.Ensemble, count: int, kinds: Sequence[dict[str, Any]] = KINDS) -> list[Asked]:
    """Different requests with their answers."""
    rng, asked = np.random.default_rng(0), []
    for i in range(count):
        prompt = " ".join([*WORDS[: rng.integers(1, 9)], *rng.choice(WORDS, rng.integers(0, 12)), str(i)])
        kind: dict[str, Any] = {"temperature": 0.0, "stop": [], "samples": 1, "seed": i} | kinds[i % len(kinds)]
        weights: Any = kind.pop("weights", None) or [None, [1, 3], [1, 0]][rng.integers(3)]
        written = ensemble.generate([prompt], weights, **kind)
        body = {"model": NAME, "prompt": prompt, "max_tokens": kind.pop("max_new_tokens"), "n": kind.pop("samples")}
        if weights is not None:
            body["rlae"] = {"policy" if weights == POLICY else "weights": weights}
        asked.append(Asked(body | kind, list(written.texts), list(written.finish_reasons)))
    return asked


@contextlib.contextmanager
def server(models: Sequence[str], *options: str) -> Iterator[tuple[str, int]]:
    """A server's address and process id; at the end it is stopped by SIGTERM.

    Raises:
      RuntimeError: it did not start, or did not end with status 0.
    """
    command = [sys.executable, "-m", "rlae_jax", "serve", "--models", *models, "--name", NAME, "--policy", POLICY]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, "--port", "0", "--queue", "4096", *options], stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None

        def failed(what: str) -> RuntimeError:
            log.seek(0)
            return RuntimeError(f"{what}:\n{log.read()[-2000:]}")

        try:
            ready = re.match(r"ready at (http://[^/]+)/", process.stdout.readline())
            if ready is None:
                raise failed("the server did not start")
            yield ready[1], process.pid
            process.send_signal(signal.SIGTERM)
            if process.wait(ANSWER_SECONDS):
                raise failed(f"the server ended with status {process.returncode}")
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def resident_bytes(process: int) -> int:
    """The memory that a process has in use (Linux)."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


async def answer(http: httpx.AsyncClient, body: dict[str, Any], stream: bool) -> tuple[list[str], list[str | None]]:
    """Texts and reasons of an answer, a stream's put together.

    Raises:
      RuntimeError: the server refused, or the stream has no proper end.
    """
    texts: list[str] = [""] * body["n"]
    reasons: list[str | None] = [None] * body["n"]
    async with http.stream("POST", "/v1/completions", json=body | {"stream": stream}) as response:
        if response.status_code != 200:
            raise RuntimeError(f"status {response.status_code}: {(await response.aread()).decode()}")
        if stream:
            events = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
            if events.pop() != "[DONE]":
                raise RuntimeError("a stream without [DONE]")
        else:
            events = [(await response.aread()).decode()]
    for event in events:
        for choice in json.loads(event)["choices"]:
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
    return texts, reasons


async def client(
    http: httpx.AsyncClient, asked: Asked, rng: np.random.Generator, patience: float, tally: Tally
) -> None:
    """Asks, and compares; or vanishes at a moment before `patience` seconds are over."""
    vanishes = rng.random() < VANISHING
    stream, start = bool(rng.random() < 0.5), time.perf_counter()
    try:
        async with asyncio.timeout(rng.uniform(0, patience) if vanishes else ANSWER_SECONDS):
            texts, reasons = await answer(http, asked.body, stream)
    except TimeoutError:
        if vanishes:
            tally.vanished += 1
        else:
            tally.lost += 1
            tally.fault(f"no answer in {ANSWER_SECONDS} s to {asked.body}")
    except (httpx.HTTPError, RuntimeError, ValueError, LookupError) as error:
        tally.lost += 1
        tally.fault(f"{error!r} to {asked.body}")
    else:
        if (texts, reasons) == (asked.texts, asked.reasons):
            tally.right += 1
            tally.seconds += time.perf_counter() - start
        else:
            tally.wrong += 1
            tally.fault(f"{texts} {reasons} in place of {asked.texts} {asked.reasons} to {asked.body}")


async def at_once(http: httpx.AsyncClient, pool: list[Asked], clients: int, seconds: float, tally: Tally) -> float:
    """Requests per second that so many clients get through who each ask again at once: the capacity."""
    rng, start = np.random.default_rng(1), time.perf_counter()

    async def ask_on() -> None:
        while time.perf_counter() < start + seconds:
            await client(http, pool[rng.integers(len(pool))], rng, 1.0, tally)

    await asyncio.gather(*(ask_on() for _ in range(clients)))
    return tally.ended / (time.perf_counter() - start)


async def poisson(
    http: httpx.AsyncClient,
    pool: list[Asked],
    rate: float,
    seconds: float,
    patience: float,
    memory: Callable[[], int],
    tally: Tally,
) -> None:
    """Clients that come at random, `rate` a second; ends when the last one has its answer."""
    rng, start = np.random.default_rng(2), time.perf_counter()

    async def watch() -> None:
        minute = 1
        while True:
            at = time.perf_counter() - start
            tally.memory.append((at, memory()))
            if at >= 60 * minute:
                print(
                    f"minute {minute}: {tally.right} right, {tally.wrong} wrong, {tally.lost} lost, {tally.vanished} "
                    f"vanished, {len(asyncio.all_tasks()) - 2} open, {tally.memory[-1][1] / 2**20:.1f} MiB",
                    flush=True,
                )
                minute += 1
            await asyncio.sleep(min(1.0, seconds / 100))

    watching, at = asyncio.create_task(watch()), 0.0
    async with asyncio.TaskGroup() as clients:
        while (at := at + rng.exponential(1 / rate)) < seconds:
            await asyncio.sleep(max(start + at - time.perf_counter(), 0.0))
            clients.create_task(client(http, pool[rng.integers(len(pool))], rng, patience, tally))
    watching.cancel()


async def figure(http: httpx.AsyncClient, name: str) -> float:
    """One of the server's own."""
    lines = (await http.get("/metrics")).text.splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))


async def soak(address: str, process: int, pool: list[Asked], slots: int, seconds: float) -> dict[str, Any]:
    """The figures of a server under load for `seconds`, after a tenth of that, at most half a minute, at capacity."""
    tally = Tally()
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=None) as http:
        capacity = await at_once(http, pool, 2 * slots, min(seconds / 10, 30.0), tally)
        busy = tally.seconds / max(tally.right, 1)
        await poisson(http, pool, LOAD * capacity, seconds, busy, lambda: resident_bytes(process), tally)
        deadline = time.perf_counter() + 30
        while (left := await figure(http, "rlae_slots_in_use") + await figure(http, "rlae_queue")) > 0:
            if time.perf_counter() > deadline:
                break
            await asyncio.sleep(0.1)
        compiles = await figure(http, "rlae_compiles_total")
    return {
        "capacity": capacity,
        "rate": LOAD * capacity,
        "seconds": seconds,
        "right": tally.right,
        "wrong": tally.wrong,
        "lost": tally.lost,
        "vanished": tally.vanished,
        "left_in_slots": left,
        "compiles": compiles,
        "growth": tally.growth(),
        "memory_mib": [(round(at, 1), round(resident / 2**20, 2)) for at, resident in tally.memory],
        "first_fault": tally.first_fault,
    }


def write_members(shared: Path, directory: Path) -> list[str]:
    """Directories of a small model and of one whose parameters are a little different."""
    lm = rj.load(shared / "models" / "stories260K")
    rng = np.random.default_rng(0)

    def disturb(leaf: Any) -> Any:
        return leaf * jax.numpy.asarray(rng.normal(1.0, 0.2, leaf.shape), leaf.dtype)

    dataclasses.replace(lm, params=jax.tree.map(disturb, lm.params)).save(directory / "sibling")
    return [str(shared / "models" / "stories260K"), str(directory / "sibling")]


def main() -> None:
    """The command."""
    parser = common.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, metavar="M", help="how long requests come (20; 2 with --quick)")
    options = parser.parse_args()
    common.require_writable(parser, options.json)
    minutes = options.minutes or (2.0 if options.quick else 20.0)
    shared = common.require_shared("models").parent
    environment, slots = common.environment(), 8
    with tempfile.TemporaryDirectory() as directory:
        models = write_members(shared, Path(directory))
        print("writing the expected answers", flush=True)
        pool = draw(rj.Ensemble([rj.load(model) for model in models]), 24 if options.quick else 128)
        jax.clear_caches()
        print("starting the server", flush=True)
        with server(models, "--slots", str(slots)) as (address, process):
            found = asyncio.run(soak(address, process, pool, slots, 60 * minutes))
    shown = ("capacity", "rate", "right", "wrong", "lost", "vanished", "left_in_slots", "compiles", "growth")
    common.print_table(f"{minutes:g} minutes", ("", "value"), [(name, f"{found[name]:.5g}") for name in shown])
    if found["first_fault"]:
        print(f"the first fault: {found['first_fault']}")
    checks = [
        common.check("soak_wrong", found["wrong"], "<=", 0),
        common.check("soak_lost", found["lost"] + found["left_in_slots"], "<=", 0),
        common.check("soak_growth", found["growth"], "<=", 0.01),
    ]
    common.finish([found], checks, environment, options.json)


if __name__ == "__main__":
    main()
