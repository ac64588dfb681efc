"""What `accelerator.py` measures: shapes, and a function per kind of case that returns its row.

In: a `Bench`, which keeps the members that cases share. Out: figures by name, in milliseconds unless the name says
otherwise. What cannot be measured here raises `Skipped`.
"""

import dataclasses
import functools
import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common, device
from benchmarks.accelerator_tables import NO_TORCH
from benchmarks.common import Timing
from benchmarks.decode import SMALL, same_start
from rlae_jax.models import ModelConfig
from rlae_jax.models.config import Rope

MEMBERS = 2
PROMPT_TOKENS, NEW_TOKENS = 64, 64
LOOP_TOKENS = 16  # of the transformers loop, whose steps take long
ROUNDS, QUICK_ROUNDS = 7, 3
CASE_SECONDS = 6.0  # after which no further round begins

# The shapes of Llama 3.2 1B and of Mistral 7B.
LLAMA_1B = ModelConfig(
    vocab=128_256,
    width=2048,
    layers=16,
    heads=32,
    kv_heads=8,
    head_width=64,
    ffn_width=8192,
    norm_eps=1e-5,
    rope=Rope(base=500_000.0),
    tied_head=True,
    context=8192,
    dtype="bfloat16",
)
MISTRAL_7B = ModelConfig(
    vocab=32_000,
    width=4096,
    layers=32,
    heads=32,
    kv_heads=8,
    head_width=128,
    ffn_width=14_336,
    norm_eps=1e-5,
    context=8192,
    dtype="bfloat16",
)
SMALL_BF16 = dataclasses.replace(SMALL, dtype="bfloat16")
TINY = dataclasses.replace(SMALL_BF16, width=16, layers=1, heads=2, kv_heads=1, ffn_width=24)
TINY_UNTIED = dataclasses.replace(TINY, tied_head=False)


class Decode(NamedTuple):
    """A case of decoding."""

    model: str
    batch: int
    expected_s: float  # on an H100, compilation included
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS

    @property
    def name(self) -> str:
        return f"decode_{self.model}_b{self.batch}" + ("_long" if self.prompt_tokens > PROMPT_TOKENS else "")


class Train(NamedTuple):
    """A case of training."""

    model: str
    prompts: int
    expected_s: float


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured, in the order of what one wants to know first."""

    name: str
    copied: int  # bytes
    models: Mapping[str, ModelConfig]
    first: tuple[Decode | Train, ...]
    then: tuple[Decode | Train, ...]
    base: str  # of the adapters
    points_prompts: int
    mixed: ModelConfig  # but for the vocabulary


# Seconds are guesses from what compiling took on an H200, and from what torch's compiler may take.
FULL = Shapes(
    name="full",
    copied=2 << 30,
    models={"0.3M": SMALL_BF16, "1B": LLAMA_1B, "7B": MISTRAL_7B},
    first=(
        Decode("1B", 1, 60),
        Decode("1B", 2, 30),
        Decode("1B", 8, 30),
        Decode("7B", 1, 65),
        Decode("7B", 8, 40),
        Train("1B", 256, 35),
    ),
    then=(
        Decode("1B", 64, 30),
        Decode("1B", 8, 35, prompt_tokens=2048, new_tokens=128),
        Train("0.3M", 256, 30),
        Decode("7B", 2, 45),
    ),
    base="1B",
    points_prompts=16,
    mixed=dataclasses.replace(LLAMA_1B, layers=4),  # a union's program takes long to compile
)
SMALL_SHAPES = Shapes(
    name="tiny",
    copied=1 << 20,
    models={"tiny": TINY, "tiny untied": TINY_UNTIED},
    first=(Decode("tiny", 2, 0, prompt_tokens=16, new_tokens=4),),
    then=(Decode("tiny untied", 1, 0, prompt_tokens=32, new_tokens=4), Train("tiny", 4, 0)),
    base="tiny",
    points_prompts=2,
    mixed=TINY,
)


class Skipped(Exception):
    """Why a case cannot be measured here."""


def told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


class Bench:
    """What cases share: shapes, the speed of a copy, and the members that were used last."""

    def __init__(self, shapes: Shapes, rounds: int):
        self.shapes, self.rounds = shapes, rounds
        self.bandwidth: float | None = None
        self._members: dict[str, list[rj.LM]] = {}
        self._peers: dict[str, tuple[list[Any], Callable[[Any, int], Any]]] = {}

    def members(self, model: str) -> list[rj.LM]:
        """Two random members. Those of another model are let go first, theirs in torch, too."""
        if model not in self._members:
            self.let_go()
            config = self.shapes.models[model]
            self._members[model] = [device.random_lm(config, seed) for seed in range(MEMBERS)]
        return self._members[model]

    def let_go(self) -> None:
        """Frees what the members take."""
        self._members.clear()
        self.free_peers()

    def free_peers(self) -> None:
        """Frees what torch holds."""
        self._peers.clear()
        gc.collect()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def peers(self, model: str) -> tuple[list[Any], Callable[[Any, int], Any]]:
        """The same members in torch, with stacked projections, and the transformers loop over them."""
        from benchmarks import peers

        if model not in self._peers:
            members = [peers.member_on_device(lm) for lm in self.members(model)]
            config = self.shapes.models[model]
            loop = peers.transformers_loop([peers.transformers_model(member, config) for member in members])
            self._peers[model] = members, loop
        return self._peers[model]

    def time(self, callables: Mapping[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Alternately, after a call of each."""
        for call in callables.values():
            call()
        return common.time_alternating(callables, rounds=self.rounds, budget_seconds=CASE_SECONDS)

    def share_of_copy(self, size: int, seconds: float) -> float | None:
        """Which part of the limit `size` bytes in `seconds` are."""
        return None if self.bandwidth is None else size / seconds / self.bandwidth


def torch_on_device() -> bool:
    """Whether torch can use the device that JAX uses."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("transformers") is None:
        return False
    import torch

    return jax.default_backend() == "cpu" or (jax.default_backend() == "gpu" and torch.cuda.is_available())


def spread(timing: Timing, name: str = "ms") -> dict[str, Any]:
    """Milliseconds: median and quartiles."""
    low, high = timing.quartiles
    return {name: 1e3 * timing.median, f"{name}_quartiles": [1e3 * low, 1e3 * high]}


def random_rows(config: ModelConfig, batch: int, tokens: int) -> np.ndarray:
    """Int[B, T] prompts."""
    return np.random.default_rng(batch).integers(1, config.vocab, (batch, tokens), dtype=np.int32)


# --- copy and decode ---


def measure_copy(bench: Bench) -> dict[str, Any]:
    size = bench.shapes.copied
    timing = bench.time({"copy": device.copy_call(size)})["copy"]
    moved = 2 * device.COPIES * size
    bench.bandwidth = moved / timing.median
    low, high = timing.quartiles
    return {"bytes": size, "bytes_per_second": bench.bandwidth, "quartiles": [moved / high, moved / low]}


def describe(bench: Bench, decoding: device.Decoding, step: Timing, size: int) -> dict[str, Any]:
    """What is said of every decoding program. `size`: the bytes that a step has to read."""
    return {
        **spread(step),
        "bytes_step": size,
        "fraction": bench.share_of_copy(size, step.median),
        "kernels_step": decoding.kernels,
        "compile_s": decoding.compile_seconds,
        "program_gb": device.program_bytes(decoding.compiled) / 1e9,
    }


def measure_decode(bench: Bench, case: Decode) -> dict[str, Any]:
    model, batch, new_tokens = case.model, case.batch, case.new_tokens
    lms = bench.members(model)
    prompts = random_rows(lms[0].config, batch, case.prompt_tokens)
    ensemble = rj.Ensemble(lms)
    spec = ensemble.spec(max_new_tokens=new_tokens, ignore_eos=True)
    decoding = device.compile_decoding(ensemble, prompts.tolist(), spec)
    lengths = {"ours": new_tokens, "best": new_tokens, "loop": min(LOOP_TOKENS, new_tokens)}
    calls: dict[str, Callable[[int], Any]] = {"ours": decoding.write}
    row: dict[str, Any] = {**case._asdict(), "peers": NO_TORCH}
    if torch_on_device():
        try:
            found, row["peers"] = prepare_peers(bench, model, prompts, new_tokens)
            calls |= found
        except Exception as error:  # out of memory, a kernel that does not compile: the figures of ours stand
            row["peers"] = told(error)
            bench.free_peers()
    tokens = {side: np.asarray(call(lengths[side])) for side, call in calls.items()}
    timings = bench.time(
        {f"{side} {n}": functools.partial(call, n) for side, call in calls.items() for n in (lengths[side], 1)}
    )
    steps = {
        side: common.step_seconds(timings[f"{side} {lengths[side]}"], timings[f"{side} 1"], lengths[side])
        for side in calls
    }
    size = device.step_bytes(lms, batch, case.prompt_tokens + new_tokens / 2)
    row |= describe(bench, decoding, steps["ours"], size)
    for side in calls.keys() - {"ours"}:
        n = min(lengths[side], lengths["ours"])
        row |= spread(steps[side], f"{side}_ms")
        row[f"ratio_{side}"] = common.pairwise_ratio(steps[side], steps["ours"])
        row[f"same_{side}"] = same_start(tokens["ours"][:, :n], tokens[side][:, :n])
    return row


def prepare_peers(
    bench: Bench, model: str, prompts: np.ndarray, new_tokens: int
) -> tuple[dict[str, Callable[[int], Any]], dict[str, Any]]:
    """What generates so many tokens in torch, and what was found out about the variants of the best peer."""
    from benchmarks import peers

    peers.setup()
    members, loop = bench.peers(model)
    best = peers.best_on_device(members, prompts, new_tokens)
    loop(prompts, 2)
    calls: dict[str, Callable[[int], Any]] = {
        "loop": functools.partial(loop, prompts),
        "best": functools.partial(best.generate, prompts),
    }
    return calls, {"chosen": best.variant, "seconds": best.seconds, "failed": best.failed}


# --- train ---


def measure_train(bench: Bench, case: Train) -> dict[str, Any]:
    """Seconds of an iteration, and of its updates alone, from experience of the same shape."""
    from benchmarks import train
    from rlae_jax.ppo import iteration as ppo

    bench.free_peers()
    lms = bench.members(case.model)
    work = train.Workload(
        lms[0].config, case.prompts, PROMPT_TOKENS, train.COMPARED.new_tokens, train.COMPARED.span_length
    )
    ours = train.Ours(work, lms)
    given = (ours.ensemble.params, ours.batch, ours.seeds)
    begin = time.perf_counter()
    program = ppo.iterate.lower(ours.state, *given, ours.spec, train.CONFIG).compile()
    compile_seconds = time.perf_counter() - begin

    def iterate() -> None:
        ours.state, metrics = program(ours.state, *given, ours.spec)
        jax.block_until_ready((ours.state, metrics))

    rollout = functools.partial(ppo.rollout_for_text, config=train.CONFIG)
    shapes = jax.eval_shape(rollout, ours.state.params, *given, np.int32(0), ours.spec)
    experience = jax.tree.map(
        lambda leaf: np.full(leaf.shape, leaf.dtype.type(0.5 if leaf.dtype.kind not in "bi" else 1)), shapes
    )
    experience = jax.device_put(experience)
    score = jax.device_put(np.linspace(0, 1, case.prompts, dtype=np.float32))
    held = [ppo.init_learners(ours.seeds, ours.spec.policy, ours.spec.dims, train.CONFIG)]

    def learn() -> None:
        held[0], metrics = ppo.learn_from_text(held[0], experience, score, ours.seeds, ours.spec, train.CONFIG)
        jax.block_until_ready((held[0], metrics))

    timings = bench.time({"iteration": iterate, "learn": learn})
    pairs = zip(timings["learn"].seconds, timings["iteration"].seconds, strict=True)
    return {
        **case._asdict(),
        "new_tokens": work.new_tokens,
        **spread(timings["iteration"]),
        **spread(timings["learn"], "learn_ms"),
        "outside": float(np.median([learning / whole for learning, whole in pairs])),
        "spans_per_second": work.spans / timings["iteration"].median,
        "kernels_step": device.loop_kernels(program.as_text() or ""),
        "compile_s": compile_seconds,
        "program_gb": device.program_bytes(program) / 1e9,
    }


# --- adapters and search ---


def measure_adapters(bench: Bench) -> dict[str, Any]:
    """Eight rows, each under an adapter of its own, against the same rows of the base."""
    from benchmarks.adapters import ROWS, make_adapters

    bench.free_peers()
    lm = bench.members(bench.shapes.base)[0]
    rows = random_rows(lm.config, ROWS, PROMPT_TOKENS).tolist()
    under = {"base": rj.Ensemble([lm]), "adapters": rj.Ensemble([lm.with_adapters(make_adapters(lm, ROWS))])}
    decodings = {
        name: device.compile_decoding(
            *(ensemble, rows, ensemble.spec(max_new_tokens=NEW_TOKENS, ignore_eos=True)),
            params=ensemble.params_for(np.arange(ROWS) if name == "adapters" else None, ROWS),
        )
        for name, ensemble in under.items()
    }
    steps = time_steps(bench, decodings, NEW_TOKENS)
    size = device.step_bytes(under["adapters"].members, ROWS, PROMPT_TOKENS + NEW_TOKENS / 2)
    return {
        "model": bench.shapes.base,
        "batch": ROWS,
        "adapters": ROWS,
        **describe(bench, decodings["adapters"], steps["adapters"], size),
        **spread(steps["base"], "base_ms"),
        "ratio_base": common.pairwise_ratio(steps["adapters"], steps["base"]),
    }


def time_steps(bench: Bench, decodings: Mapping[str, device.Decoding], steps: int) -> dict[str, Timing]:
    """Seconds per step of several programs, in turn."""
    calls = {name: decoding.write for name, decoding in decodings.items()}
    timings = bench.time({f"{name} {n}": functools.partial(calls[name], n) for name in calls for n in (steps, 1)})
    return {name: common.step_seconds(timings[f"{name} {steps}"], timings[f"{name} 1"], steps) for name in decodings}


def measure_search(bench: Bench) -> dict[str, Any]:
    """A level of 27 points, of which 19 directions differ, with three adapters; prompts are read in every call."""
    from benchmarks.adapters import make_adapters
    from benchmarks.search import MEMBERS as ADAPTERS
    from benchmarks.search import POINTS, directions
    from rlae_jax.emorl.fused import Fused

    bench.free_peers()
    lm = bench.members(bench.shapes.base)[0]
    adapters = make_adapters(lm, ADAPTERS)
    fused = Fused(lm, adapters, mode="hidden")
    rows = random_rows(lm.config, bench.shapes.points_prompts, PROMPT_TOKENS).tolist()
    points = directions(POINTS)

    def level(steps: int) -> None:
        decoder = fused.prepare(rows, max_new_tokens=NEW_TOKENS, ignore_eos=True, memory=8 << 30)
        decoder = dataclasses.replace(decoder, prompts=device.limit_steps(decoder.prompts, steps))
        assert np.all(decoder.decode(points).steps == steps)

    first = common.seconds_of(functools.partial(level, NEW_TOKENS))
    timings = bench.time({"level": functools.partial(level, NEW_TOKENS), "one step": functools.partial(level, 1)})
    step = common.step_seconds(timings["level"], timings["one step"], NEW_TOKENS)
    # Each adapter runs the rows of the points that give it weight.
    run = len(rows) * int(np.count_nonzero(points))
    size = device.step_bytes([lm.with_adapters(adapters)], run, PROMPT_TOKENS + NEW_TOKENS / 2)
    return {
        "model": bench.shapes.base,
        "adapters": ADAPTERS,
        "points": len(POINTS),
        "decoded": len(points),
        "prompts": len(rows),
        "new_tokens": NEW_TOKENS,
        **spread(step),
        "bytes_step": size,
        "fraction": bench.share_of_copy(size, step.median),
        **spread(timings["level"], "level_ms"),
        "ms_point": 1e3 * timings["level"].median / len(POINTS),
        "compile_s": first - timings["level"].median,
    }


# --- mixed ---


def measure_mixed(bench: Bench) -> dict[str, Any]:
    """One entry per step of a text in the second member's own segmentation, against one token of a pair with one
    tokenizer; both write gsm8k answers."""
    from benchmarks import mixed
    from benchmarks.members import fit

    shared = Path(os.environ.get("RLAE_JAX_SHARED", "../shared"))
    names = ("gpt2", "mistral_v3")
    wanted = [shared / "data" / "gsm8k" / "train.jsonl", *(shared / "tokenizers" / name for name in names)]
    missing = [str(path) for path in wanted if not path.exists()]
    if missing:
        raise Skipped(f"no {', '.join(missing)}; set RLAE_JAX_SHARED")
    bench.let_go()
    lms = []
    for seed, name in enumerate(names):
        tokenizer, config = fit(bench.shapes.mixed, shared / "tokenizers" / name)
        lms.append(device.random_lm(config, seed, tokenizer))
    ensembles = {"mixed": rj.Ensemble(lms, mixed.forced), "same": rj.Ensemble([lms[0], lms[0]], mixed.forced)}
    prompts, texts = mixed.answers(shared / "data", 1, 6 * mixed.STEPS)
    prompts = [mixed.cut(ensembles["mixed"], prompts[0] * 2, mixed.PROMPT_TOKENS)]
    own = ensembles["same"].tokenizer(texts[0], add_special_tokens=False)["input_ids"][: mixed.STEPS]
    entries = {
        "mixed": mixed.segmentations(ensembles["mixed"], texts, mixed.STEPS)["second member's"],
        "same": np.array([own], np.float32).T,
    }
    decodings = {}
    for name, ensemble in ensembles.items():
        rows, padded, spec = mixed.forced_call(ensemble, prompts, entries[name])
        decodings[name] = device.compile_decoding(ensemble, rows, spec, padded)
    steps = time_steps(bench, decodings, mixed.STEPS)
    size = device.step_bytes(lms, 1, mixed.PROMPT_TOKENS + mixed.STEPS / 2)
    return {
        "model": f"{bench.shapes.mixed.layers} layers of width {bench.shapes.mixed.width}",
        "batch": 1,
        "tokenizers": list(names),
        **describe(bench, decodings["mixed"], steps["mixed"], size),
        **spread(steps["same"], "same_ms"),
        "ratio_same": common.pairwise_ratio(steps["mixed"], steps["same"]),
        "kernels_same": decodings["same"].kernels,
    }


# --- tests ---


def measure_tests(_: Bench) -> dict[str, Any]:
    """What `make test-device` runs, in a process of its own that takes what memory it needs."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device and not rare"]
    environment = os.environ | {"RLAE_JAX_TEST_PLATFORM": "device", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    began = time.perf_counter()
    done = subprocess.run(
        command, env=environment, cwd=Path(__file__).resolve().parents[1], capture_output=True, text=True, check=False
    )
    print(done.stdout, done.stderr, sep="\n")
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    row = {"counts": counts, "failed": failed, "exit_status": done.returncode}
    return {**row, "tests_s": time.perf_counter() - began}
