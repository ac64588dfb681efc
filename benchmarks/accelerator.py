"""What this program makes of an accelerator that one has for a few minutes, against torch on the same device.

    python -m benchmarks.accelerator [--part PART ...] [--minutes 5] [--json PATH] [--again] [--quick]
    python -m benchmarks.accelerator --page docs/accelerator.md [--json PATH]

In: nothing but the package; members are random, in bfloat16, and made on the device. Out: a row per case, written as
soon as it is measured, so that what is there survives whatever ends the run. The same command goes on with the cases
that are missing; none is begun for which the minutes that are left do not suffice. On a CPU shapes are tiny and figures
mean nothing: what is shown then is that every part runs.

- `copy`: bytes that a copy on the device reads and writes per second, the limit of what follows.
- `decode`: milliseconds per step of two members, prefill left out, as a share of that limit (weights, and keys and
  values of the tokens so far), against the transformers loop and the best torch peer (`peers.py`).
- `train`: an iteration of PPO, and which share of it is spent outside decoding.
- `adapters`: a batch with another adapter in each row, against the base alone.
- `search`: a level of EMORL's search, 27 points.
- `mixed`: two tokenizers against one, writing the same answers (tokenizers and texts from RLAE_JAX_SHARED).
- `tests`, only where it is named: the tests that are marked `device`.

Kernels per step are counted in the compiled loop (fusions, calls of libraries, copies and single instructions).
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common, device
from benchmarks.common import Timing
from benchmarks.decode import SMALL, same_start
from rlae_jax import files
from rlae_jax.errors import InputError
from rlae_jax.models import ModelConfig
from rlae_jax.models.config import Rope
from rlae_jax.report.tables import markdown_table

MEMBERS = 2
PROMPT_TOKENS, NEW_TOKENS = 64, 64
LOOP_TOKENS = 16  # of the transformers loop, whose steps take long
ROUNDS, QUICK_ROUNDS = 7, 3
CASE_SECONDS = 15.0  # after which no further round begins

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

# Name of a check, case, what of it, and what is required.
REQUIRED = (
    ("gpu_1B_b1", "decode_1B_b1", "fraction", ">=", 0.70),
    ("gpu_1B_b2", "decode_1B_b2", "fraction", ">=", 0.70),
    ("gpu_7B_b1", "decode_7B_b1", "fraction", ">=", 0.82),
    ("gpu_7B_b8", "decode_7B_b8", "fraction", ">=", 0.85),
    ("loop_1B_b1", "decode_1B_b1", "ratio_loop", ">=", 10.0),
    ("outside_1B", "train_1B", "outside", "<=", 0.05),
)
AHEAD = 1.0  # of the best torch peer, in every row


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured."""

    name: str
    copied: int  # bytes
    models: Mapping[str, ModelConfig]
    decode: tuple[tuple[str, int, int, int, float], ...]  # model, batch, prompt and new tokens, seconds expected
    train: tuple[tuple[str, int, float], ...]  # model, prompts, seconds expected
    base: str  # of the adapters
    points_prompts: int
    mixed: ModelConfig  # but for the vocabulary


FULL = Shapes(
    name="full",
    copied=2 << 30,
    models={"0.3M": SMALL_BF16, "1B": LLAMA_1B, "7B": MISTRAL_7B},
    decode=(
        ("1B", 1, 64, 64, 55),
        ("1B", 8, 64, 64, 40),
        ("1B", 2, 64, 64, 40),
        ("1B", 64, 64, 64, 40),
        ("7B", 1, 64, 64, 70),
        ("7B", 8, 64, 64, 60),
        ("7B", 2, 64, 64, 60),
        ("1B", 8, 2048, 128, 50),
    ),
    train=(("1B", 256, 45), ("0.3M", 256, 30)),
    base="1B",
    points_prompts=16,
    mixed=dataclasses.replace(LLAMA_1B, layers=4),  # a union's program takes long to compile
)
SMALL_SHAPES = Shapes(
    name="tiny",
    copied=1 << 20,
    models={"tiny": TINY, "tiny untied": TINY_UNTIED},
    decode=(("tiny", 2, 16, 4, 0), ("tiny untied", 1, 32, 4, 0)),
    train=(("tiny", 4, 0),),
    base="tiny",
    points_prompts=2,
    mixed=TINY,
)


class Skipped(Exception):
    """Why a case cannot be measured here."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A row to be."""

    name: str
    part: str
    seconds: float  # that it takes on an H100, compilation included
    measure: Callable[["Bench"], dict[str, Any]]


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
        "program_gb": decoding.program_bytes / 1e9,
    }


def measure_decode(bench: Bench, model: str, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    lms = bench.members(model)
    prompts = random_rows(lms[0].config, batch, prompt_tokens)
    ensemble = rj.Ensemble(lms)
    spec = ensemble.spec(max_new_tokens=new_tokens, ignore_eos=True)
    decoding = device.compile_decoding(ensemble, prompts.tolist(), spec)
    lengths = {"ours": new_tokens, "best": new_tokens, "loop": min(LOOP_TOKENS, new_tokens)}
    calls: dict[str, Callable[[int], Any]] = {"ours": decoding.write}
    row: dict[str, Any] = {"model": model, "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    row["peers"] = "no torch"
    if torch_on_device():
        try:
            found, row["peers"] = prepare_peers(bench, model, prompts, new_tokens)
            calls |= found
        except Exception as error:  # out of memory, a kernel that does not compile: the figures of ours stand
            row["peers"] = told(error)
    tokens = {side: np.asarray(call(lengths[side])) for side, call in calls.items()}
    timings = bench.time(
        {f"{side} {n}": functools.partial(call, n) for side, call in calls.items() for n in (lengths[side], 1)}
    )
    steps = {side: common.step_seconds(timings[f"{side} {lengths[side]}"], timings[f"{side} 1"], n) for side, n in
             ((side, lengths[side]) for side in calls)}  # fmt: skip
    size = device.step_bytes(lms, batch, prompt_tokens + new_tokens / 2)
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
    calls = {"loop": functools.partial(loop, prompts), "best": functools.partial(best.generate, prompts)}
    return calls, {"chosen": best.variant, "seconds": best.seconds, "failed": best.failed}


# --- train ---


def measure_train(bench: Bench, model: str, prompts: int) -> dict[str, Any]:
    """Seconds of an iteration, and of its updates alone, from experience of the same shape."""
    from benchmarks import train
    from rlae_jax.ppo import iteration as ppo

    bench.free_peers()
    lms = bench.members(model)
    work = train.Workload(lms[0].config, prompts, PROMPT_TOKENS, train.COMPARED.new_tokens, train.COMPARED.span_length)
    ours = train.Ours(work, lms)
    first = common.seconds_of(ours.iterate)
    rest = (ours.batch, ours.seeds, np.int32(0), ours.spec, train.CONFIG)
    shapes = jax.eval_shape(
        functools.partial(ppo.rollout_for_text, config=train.CONFIG), ours.state.params, ours.ensemble.params, *rest[:4]
    )
    experience = jax.tree.map(
        lambda leaf: np.full(leaf.shape, leaf.dtype.type(0.5 if leaf.dtype.kind not in "bi" else 1)), shapes
    )
    experience = jax.device_put(experience)
    score = jax.device_put(np.linspace(0, 1, prompts, dtype=np.float32))
    held = [ppo.init_learners(ours.seeds, ours.spec.policy, ours.spec.dims, train.CONFIG)]

    def learn() -> None:
        held[0], metrics = ppo.learn_from_text(held[0], experience, score, ours.seeds, ours.spec, train.CONFIG)
        jax.block_until_ready((held[0], metrics))

    timings = bench.time({"iteration": ours.iterate, "learn": learn})
    pairs = zip(timings["learn"].seconds, timings["iteration"].seconds, strict=True)
    return {
        "model": model,
        "prompts": prompts,
        "new_tokens": work.new_tokens,
        **spread(timings["iteration"]),
        **spread(timings["learn"], "learn_ms"),
        "outside": float(np.median([learning / whole for learning, whole in pairs])),
        "spans_per_second": work.spans / timings["iteration"].median,
        "compile_s": first - timings["iteration"].median,
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
    timings = bench.time(
        {f"{name} {n}": functools.partial(decoding.write, n) for name, decoding in decodings.items() for n in (steps, 1)}
    )
    return {name: common.step_seconds(timings[f"{name} {steps}"], timings[f"{name} 1"], steps) for name in decodings}


def measure_search(bench: Bench) -> dict[str, Any]:
    """A level of 27 points, of which 19 directions differ, with three adapters; prompts are read in every call."""
    from benchmarks.adapters import make_adapters
    from benchmarks.search import MEMBERS as ADAPTERS
    from benchmarks.search import POINTS, directions
    from rlae_jax.emorl.fused import Fused

    bench.free_peers()
    lm = bench.members(bench.shapes.base)[0]
    fused = Fused(lm, make_adapters(lm, ADAPTERS), mode="hidden")
    rows = random_rows(lm.config, bench.shapes.points_prompts, PROMPT_TOKENS).tolist()
    points = directions(POINTS)

    def level(steps: int) -> None:
        decoder = fused.prepare(rows, max_new_tokens=NEW_TOKENS, ignore_eos=True, memory=8 << 30)
        limits = np.full(decoder.prompts.batch, steps, np.int32)
        decoder = dataclasses.replace(decoder, prompts=decoder.prompts._replace(limits=limits))
        assert np.all(decoder.decode(points).steps == steps)

    first = common.seconds_of(functools.partial(level, NEW_TOKENS))
    timings = bench.time({"level": functools.partial(level, NEW_TOKENS), "one step": functools.partial(level, 1)})
    step = common.step_seconds(timings["level"], timings["one step"], NEW_TOKENS)
    return {
        "model": bench.shapes.base,
        "adapters": ADAPTERS,
        "points": len(POINTS),
        "decoded": len(points),
        "prompts": len(rows),
        "new_tokens": NEW_TOKENS,
        **spread(step),
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
    command = [sys.executable, "-m", "pytest", "-q", "-m", "device"]
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


# --- all cases ---


def all_cases(shapes: Shapes) -> list[Case]:
    """In the order of what one wants to know first, where that does not make members twice."""
    cases = [Case("copy", "copy", 10, measure_copy)]
    for model, batch, prompt_tokens, new_tokens, seconds in shapes.decode:
        name = f"decode_{model}_b{batch}" + ("_long" if prompt_tokens > PROMPT_TOKENS else "")
        measure = functools.partial(
            measure_decode, model=model, batch=batch, prompt_tokens=prompt_tokens, new_tokens=new_tokens
        )
        cases.append(Case(name, "decode", seconds, measure))
    for model, prompts, seconds in shapes.train:
        measure = functools.partial(measure_train, model=model, prompts=prompts)
        cases.append(Case(f"train_{model}", "train", seconds, measure))
    of_full = float(shapes is FULL)
    return [
        *cases,
        Case("adapters", "adapters", 40 * of_full, measure_adapters),
        Case("search", "search", 40 * of_full, measure_search),
        Case("mixed", "mixed", 60 * of_full, measure_mixed),
        Case("tests", "tests", 240 * of_full, measure_tests),
    ]


PARTS = ("copy", "decode", "train", "adapters", "search", "mixed", "tests")
QUICK_CASES = ("copy", "decode_1B_b1", "decode_1B_b8", "train_0.3M")


def told(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def measured(row: Mapping[str, Any]) -> bool:
    return not row.keys() & {"skipped", "error"}


def run_cases(cases: Sequence[Case], results: "Results", bench: Bench, *, minutes: float, began: float) -> None:
    """Measures one case after another, and keeps each row at once."""
    for case in cases:
        left = 60 * minutes - (time.monotonic() - began)
        if left < case.seconds:
            results.add(case, {"skipped": f"{case.seconds:.0f} s are not left of {minutes:g} minutes"})
            continue
        print(f"{case.name} ...", flush=True)
        start = time.perf_counter()
        try:
            row = case.measure(bench)
            row["peak_gb"] = (device.peak_bytes() or 0) / 1e9 or None
        except Skipped as why:
            row = {"skipped": str(why)}
        except InputError as error:
            row = {"error": str(error)}
        except Exception as error:  # what does not fit or compile must not take the other cases with it
            row = {"error": told(error)}
        results.add(case, {**row, "case_s": time.perf_counter() - start})


class Results:
    """The rows, their checks and where they were measured, and the file that has them."""

    def __init__(self, path: Path, environment: Mapping[str, Any]):
        self.path, self.environment = path, dict(environment)
        self.rows: dict[str, dict[str, Any]] = {}
        if path.is_file():
            kept = files.read_json(path)
            self.rows = {row["case"]: row for row in kept["rows"]}
            for what in ("devices", "shapes"):
                if kept["environment"][what] != self.environment[what]:
                    raise InputError(
                        f"{path} has figures of {kept['environment'][what]}, this is {self.environment[what]}: name "
                        "another file with --json"
                    )

    def missing(self, cases: Sequence[Case]) -> list[Case]:
        return [case for case in cases if case.name not in self.rows or not measured(self.rows[case.name])]

    def add(self, case: Case, row: Mapping[str, Any]) -> None:
        """Keeps a row and writes the file anew."""
        versions = {name: v for name, v in self.environment["versions"].items() if name in ("rlae-jax", "jax", "torch")}
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.rows[case.name] = {"case": case.name, "part": case.part, **row, "time": when, "versions": versions}
        content = {"rows": list(self.rows.values()), "checks": self.checks(), "environment": self.environment}
        files.write_json(self.path, content)

    def checks(self) -> list[dict[str, Any]]:
        """Of what is measured, on an accelerator."""
        if self.environment["shapes"] != FULL.name:
            return []
        good = {name: row for name, row in self.rows.items() if measured(row)}
        checks = [
            common.check(name, good[case][what], op, required)
            for name, case, what, op, required in REQUIRED
            if case in good and good[case].get(what) is not None
        ]
        ahead = [(name, row["ratio_best"]) for name, row in good.items() if "ratio_best" in row]
        return checks + [
            common.check(f"best_{name.removeprefix('decode_')}", ratio, ">=", AHEAD) for name, ratio in ahead
        ]


# --- tables and the page ---


DECODE_COLUMNS = (
    *("case", "ms/step (quartiles)", "of a copy's speed", "kernels/step", "compiled in, s", "program, GB", "peak, GB"),
    *("loop, ms", "times loop", "best torch, ms", "times best", "variant"),
)
OTHER_COLUMNS = ("case", "ms (quartiles)", "what", "compiled in, s", "peak, GB")


def number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def with_quartiles(row: Mapping[str, Any], name: str = "ms") -> str:
    low, high = row[f"{name}_quartiles"]
    return f"{row[name]:.3g} ({low:.3g} to {high:.3g})"


def decode_cells(row: Mapping[str, Any]) -> list[str]:
    peers = row["peers"]
    told_of_peers = peers if isinstance(peers, str) else peers["chosen"]
    return [
        row["case"].removeprefix("decode_"),
        with_quartiles(row),
        number(row["fraction"], ".2f"),
        str(row["kernels_step"]),
        number(row["compile_s"], ".1f"),
        number(row["program_gb"], ".2f"),
        number(row["peak_gb"], ".1f"),
        *(number(row.get(name), ".3g") for name in ("loop_ms", "ratio_loop", "best_ms", "ratio_best")),
        told_of_peers,
    ]


def other_cells(row: Mapping[str, Any]) -> list[str]:
    step = f"a step; {number(row.get('fraction'), '.2f') or '?'} of a copy's speed, {row.get('kernels_step')} kernels"
    what = {
        "train": lambda: (
            f"an iteration of {row['prompts']} prompts; {row['spans_per_second']:,.0f} spans/s, "
            f"{row['outside']:.1%} outside decoding"
        ),
        "adapters": lambda: f"{step}; {row['ratio_base']:.2f} times the base alone ({row['base_ms']:.3g} ms)",
        "search": lambda: (
            f"a step; a level takes {with_quartiles(row, 'level_ms')} ms, {row['ms_point']:.3g} ms a point "
            f"({row['points']} points, {row['prompts']} prompts, {row['adapters']} adapters)"
        ),
        "mixed": lambda: (
            f"{step}; {row['ratio_same']:.2f} times one tokenizer ({row['same_ms']:.3g} ms, "
            f"{row['kernels_same']} kernels)"
        ),
    }[row["part"]]()
    name = row["case"] if row["case"] == row["part"] else row["case"].replace("_", " ")
    return [name, with_quartiles(row), what, number(row["compile_s"], ".1f"), number(row["peak_gb"], ".1f")]


def tables(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """(title, columns, cells) of what is measured."""
    good = [row for row in rows if measured(row)]
    decode = [decode_cells(row) for row in good if row["part"] == "decode"]
    other = [other_cells(row) for row in good if row["part"] in ("train", "adapters", "search", "mixed")]
    title = f"Two members, one step: {PROMPT_TOKENS} prompt tokens, {NEW_TOKENS} new ones; long: 2048 and 128"
    parts: list[tuple[str, Sequence[str], list[list[str]]]] = [
        (title, DECODE_COLUMNS, decode),
        ("Training, adapters, search, tokenizers", OTHER_COLUMNS, other),
    ]
    return [part for part in parts if part[2]]


def sentences(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What has no table: the copy, the tests, and why something is missing."""
    said = []
    for row in rows:
        if not measured(row):
            said.append(f"{row['case']}: {row.get('skipped') or 'FAILED, ' + row['error']}")
        elif row["part"] == "copy":
            said.append(f"A copy on the device moves {row['bytes_per_second'] / 1e12:.3g} TB/s (read and written).")
        elif row["part"] == "tests":
            counts = ", ".join(f"{n} {word}" for word, n in row["counts"].items())
            said.append(f"Tests on the device: {counts} in {row['tests_s']:.0f} s. {' '.join(row['failed'])}".strip())
    return said


def page(content: Mapping[str, Any]) -> str:
    """The results in Markdown; without any, how to get them."""
    parts = [
        "# On an accelerator, measured",
        "Made by `python -m benchmarks.accelerator --page docs/accelerator.md --json FILE`.",
    ]
    rows = content["rows"]
    if not rows:
        commands = "\n".join(
            [
                "    pip install 'rlae-jax[cuda]'  # or rlae-jax[tpu]; torch with CUDA for the peers",
                "    python -m benchmarks.accelerator --json runs/accelerator.json",
                "    python -m benchmarks.accelerator --part tests --json runs/accelerator.json",
                "    python -m benchmarks.accelerator --page docs/accelerator.md --json runs/accelerator.json",
            ]
        )
        return "\n\n".join([*parts, "Nothing is measured yet. On a machine with a device:", commands]) + "\n"
    environment = content["environment"]
    days = sorted({row["time"][:10] for row in rows})
    versions = sorted({f"{name} {v}" for row in rows for name, v in row["versions"].items() if v})
    tiny = "" if environment["shapes"] == FULL.name else " Shapes are tiny: the figures show only that everything runs."
    parts.append(f"{', '.join(environment['devices'])}; {' to '.join({days[0], days[-1]})}; {', '.join(versions)}.{tiny}")
    parts += sentences(rows)
    for title, columns, cells in tables(rows):
        parts += [f"## {title}", markdown_table(columns, cells)]
    if content["checks"]:
        from benchmarks.study import check_cells

        parts += ["## Checks", markdown_table(("check", "value", "required", "result"), check_cells(content["checks"]))]
    parts.append((__doc__ or "").split("\n\n", 3)[3].strip())
    return "\n\n".join(parts) + "\n"


# --- the command ---


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = common.make_parser((__doc__ or "").splitlines()[0])
    parser.set_defaults(json=Path("runs/accelerator.json"))
    parser.add_argument("--part", nargs="+", choices=PARTS, default=PARTS[:-1], help="all but tests by default")
    parser.add_argument("--minutes", type=float, default=5.0, help="no case begins that would end later (5)")
    parser.add_argument("--again", action="store_true", help="measure what is in the file, too")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, as on a CPU")
    parser.add_argument("--page", type=Path, metavar="PATH", help="write the file's figures there, and measure nothing")
    parsed = parser.parse_args(arguments)
    common.require_writable(parser, parsed.json)
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.monotonic()
    options = read_arguments(arguments)
    if options.page is not None:
        content = files.read_json(options.json) if options.json.is_file() else {"rows": []}
        files.write_text(options.page, page(content))
        return
    # Torch needs some of the memory, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    shapes = SMALL_SHAPES if options.tiny or jax.default_backend() == "cpu" else FULL
    try:
        results = Results(options.json, {**common.environment(), "shapes": shapes.name})
    except InputError as error:
        sys.exit(f"error: {error}")
    bench = Bench(shapes, QUICK_ROUNDS if options.quick or shapes is SMALL_SHAPES else ROUNDS)
    if measured(kept := results.rows.get("copy", {"skipped": ""})):
        bench.bandwidth = kept["bytes_per_second"]
    wanted = [case for case in all_cases(shapes) if case.part in options.part]
    if options.quick:
        wanted = [case for case in wanted if case.name in QUICK_CASES or shapes is SMALL_SHAPES]
    with contextlib.suppress(KeyboardInterrupt):
        run_cases(
            wanted if options.again else results.missing(wanted), results, bench, minutes=options.minutes, began=began
        )
    rows = list(results.rows.values())
    for title, columns, cells in tables(rows):
        common.print_table(title, columns, cells)
    print(*sentences(rows), f"{(time.monotonic() - began) / 60:.1f} minutes", sep="\n")
    common.finish(rows, results.checks(), results.environment, options.json)


if __name__ == "__main__":
    main()
