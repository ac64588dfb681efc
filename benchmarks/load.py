"""How much memory and time loading a checkpoint takes, beside transformers on the same files.

In: nothing but the package; a random Llama checkpoint of about 1 GB is written as sharded safetensors into a temporary
directory, never more than a shard of it in memory. Out: per stored and target dtype and per side the peak resident
memory and the seconds of loading alone, and of loading and then touching every page of every parameter, since torch may
leave weights in the file until somebody reads them.

    python -m benchmarks.load [--quick] [--json PATH]

Every measurement is a process of its own; the sides take turns. Seconds count from when everything is imported until
the parameters are there, compilation included. The files are warm (in the page cache): they have just been written,
and are read once more before anything is measured. Memory is Linux's VmHWM where there is one, the peak of the process
from its first instruction on, imports included (what those cost has its own column; pages of a memory-mapped file count
while they are mapped). `ru_maxrss` stands in the JSON too: it may begin at what the parent process held, and is what is
shown elsewhere.

Without torch there is no other side, and the table says so.
"""

import dataclasses
import importlib.util
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks import common

MB = 10**6
ALLOWANCE = 400 * MB  # interpreter, libraries and whatever else does not grow with the checkpoint
TARGETS = ("float32", "bfloat16", "float16")
STORED = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SECONDS = {"float32": ("load_f32_s", 1.2), "bfloat16": ("load_bf16_s", 0.8)}  # of the large checkpoint, on two cores
AGAINST_COPY = 4.0
OURS, THEIRS = "rlae_jax", "transformers"
CHILD = "--measure"  # how this module calls itself: --measure SIDE DIRECTORY DTYPE


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a Llama checkpoint, and how many bytes of float32 go into one shard."""

    vocab: int
    width: int
    layers: int
    heads: int
    ffn_width: int
    shard_bytes: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape as stored) of every tensor."""
        yield "model.embed_tokens.weight", (self.vocab, self.width)
        for i in range(self.layers):
            layer = f"model.layers.{i}."
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"{layer}{name}.weight", (self.width,)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                yield f"{layer}self_attn.{name}.weight", (self.width, self.width)
            for name in ("gate_proj", "up_proj"):
                yield f"{layer}mlp.{name}.weight", (self.ffn_width, self.width)
            yield f"{layer}mlp.down_proj.weight", (self.width, self.ffn_width)
        yield "model.norm.weight", (self.width,)
        yield "lm_head.weight", (self.vocab, self.width)

    @property
    def numbers(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors())

    @property
    def largest(self) -> int:
        """The numbers in the largest tensor."""
        return max(math.prod(shape) for _, shape in self.tensors())

    def config(self, stored: str) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "intermediate_size": self.ffn_width,
            "tie_word_embeddings": False,
            "torch_dtype": stored,
        }


LARGE = Shape(vocab=32_000, width=1024, layers=16, heads=16, ffn_width=2816, shard_bytes=200 * MB)
SMALL = Shape(vocab=8_000, width=512, layers=6, heads=8, ffn_width=1408, shard_bytes=20 * MB)


def write_checkpoint(directory: Path, shape: Shape, stored: tuple[str, ...]) -> dict[str, Path]:
    """Writes the same random numbers once per stored dtype, shard by shard; dtype name -> its directory."""
    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    held = 0
    for name, sizes in shape.tensors():
        size = 4 * math.prod(sizes)
        if groups[-1] and held + size > shape.shard_bytes:
            groups.append([])
            held = 0
        groups[-1].append((name, sizes))
        held += size
    directories = {dtype: directory / dtype for dtype in stored}
    for path in directories.values():
        path.mkdir()
    files = [f"model-{i + 1:05}-of-{len(groups):05}.safetensors" for i in range(len(groups))]
    rng = np.random.default_rng(0)
    for file, group in zip(files, groups, strict=True):
        tensors = {name: rng.standard_normal(sizes, dtype=np.float32) * np.float32(0.02) for name, sizes in group}
        for dtype, path in directories.items():
            cast = {name: tensor.astype(STORED[dtype], copy=False) for name, tensor in tensors.items()}
            save_file(cast, path / file, metadata={"format": "pt"})
    weight_map = {name: file for file, group in zip(files, groups, strict=True) for name, _ in group}
    for dtype, path in directories.items():
        total = shape.numbers * STORED[dtype].itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        (path / "config.json").write_text(json.dumps(shape.config(dtype)), encoding="utf-8")
    return directories


def warm(directory: Path) -> None:
    """Reads every file once, so that all sides find it in the page cache."""
    buffer = bytearray(16 * MB)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def memory() -> dict[str, float | None]:
    """Megabytes: resident now and at most (Linux; else None), and `ru_maxrss`."""
    fields: dict[str, float] = {}
    try:
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                fields[name] = int(value.split()[0]) * 1024 / MB
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MB
    return {"resident": fields.get("VmRSS"), "peak": fields.get("VmHWM"), "ru_maxrss": largest}


def _touch(array: np.ndarray[Any, Any]) -> int:
    """Reads a byte of every page; the array is contiguous."""
    return int(array.reshape(-1).view(np.uint8)[:: resource.getpagesize()].sum())


def measure_ours(directory: str, dtype: str) -> dict[str, Any]:
    import jax

    import rlae_jax as rj

    jax.block_until_ready(jax.numpy.zeros(()))  # starts the backend
    imports = memory()
    begin = time.perf_counter()
    leaves = jax.block_until_ready(jax.tree.leaves(rj.load(directory, dtype=dtype).params))
    loaded = time.perf_counter() - begin
    after_load = memory()
    for leaf in leaves:
        _touch(np.asarray(leaf))
    read = time.perf_counter() - begin
    size = sum(leaf.nbytes for leaf in leaves)
    found = {"imports": imports, "load": after_load, "read": memory(), "load_s": loaded, "read_s": read, "bytes": size}
    del leaves
    return found | {"copy_s": common.seconds_of(lambda: _read_and_copy(Path(directory)))}


def _read_and_copy(directory: Path) -> None:
    """What nobody can do without: the files' bytes are read, and written once to where they stay."""
    kept = [np.frombuffer(path.read_bytes(), np.uint8).copy() for path in sorted(directory.glob("*.safetensors"))]
    assert kept


def measure_theirs(directory: str, dtype: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # the second name imports the model's own module

    assert LlamaForCausalLM is not None
    imports = memory()
    begin = time.perf_counter()
    parameters = list(AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).parameters())
    loaded = time.perf_counter() - begin
    after_load = memory()
    for parameter in parameters:
        _touch(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy())
    read = time.perf_counter() - begin
    size = sum(parameter.nbytes for parameter in parameters)
    return {"imports": imports, "load": after_load, "read": memory(), "load_s": loaded, "read_s": read, "bytes": size}


def measure(side: str, directory: Path, dtype: str) -> dict[str, Any]:
    """One measurement in a process of its own; {"error": its last line} if that fails."""
    command = [sys.executable, "-m", "benchmarks.load", CHILD, side, str(directory), dtype]
    # Neither side may look for anything but the files, nor find programs that an earlier process compiled.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "RLAE_JAX_COMPILATION_CACHE": "off"}
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def peak(measured: dict[str, Any], when: str) -> float:
    """The peak in MB: VmHWM, or `ru_maxrss` where there is none."""
    kept = measured[when]
    return float(kept["ru_maxrss"] if kept["peak"] is None else kept["peak"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians, with the quartiles of the seconds and the extremes of the memory."""
    result: dict[str, Any] = {"runs": runs}
    for key in ("load_s", "read_s"):
        timing = common.Timing(tuple(run[key] for run in runs))
        result[key] = {"median": timing.median, "quartiles": list(timing.quartiles)}
    if all("copy_s" in run for run in runs):
        result["against_copy"] = float(np.median([run["load_s"] / run["copy_s"] for run in runs]))
    for when in ("imports", "load", "read"):
        peaks = [peak(run, when) for run in runs]
        result[f"{when}_peak_mb"] = {"median": float(np.median(peaks)), "range": [min(peaks), max(peaks)]}
    return result


def case(directory: Path, shape: Shape, stored: str, target: str, sides: list[str], repeats: int) -> dict[str, Any]:
    """Every side's figures for one stored and one target dtype, and the bound on our memory."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    errors: dict[str, str] = {}
    for i in range(repeats):
        for side in sides if i % 2 == 0 else sides[::-1]:
            if side not in errors:
                measured = measure(side, directory, target)
                if "error" in measured:
                    errors[side] = measured["error"]
                else:
                    runs[side].append(measured)
    target_bytes = shape.numbers * {"float32": 4, "bfloat16": 2, "float16": 2}[target]
    for side, measurements in runs.items():
        if any(run["bytes"] != target_bytes for run in measurements):
            errors[side] = f"loaded {measurements[0]['bytes']} bytes of parameters, not {target_bytes}"
    largest = shape.largest * STORED[stored].itemsize
    return {
        "stored": stored,
        "target": target,
        "parameters_mb": target_bytes / MB,
        "largest_tensor_mb": largest / MB,
        "bound_mb": (target_bytes + 2 * largest + ALLOWANCE) / MB,
        "sides": {side: {"error": errors[side]} if side in errors else summary(runs[side]) for side in sides},
    }


def _cells(row: dict[str, Any], side: str, figures: dict[str, Any]) -> tuple[str, ...]:
    name = f"{row['stored']} to {row['target']}, {side}"
    if "error" in figures:
        return name, *["failed"] * 5, ""

    def seconds(key: str) -> str:
        low, high = figures[key]["quartiles"]
        return f"{figures[key]['median']:.2f} ({low:.2f} to {high:.2f})"

    def megabytes(when: str) -> str:
        low, high = figures[f"{when}_peak_mb"]["range"]
        return f"{figures[f'{when}_peak_mb']['median']:,.0f} ({low:,.0f} to {high:,.0f})"

    bound = f"{row['bound_mb']:,.0f}" if side == OURS else ""
    imports = f"{figures['imports_peak_mb']['median']:,.0f}"
    return name, imports, seconds("load_s"), seconds("read_s"), megabytes("load"), megabytes("read"), bound


def main() -> None:
    if sys.argv[1:2] == [CHILD]:
        side, directory, dtype = sys.argv[2:]
        print(json.dumps({OURS: measure_ours, THEIRS: measure_theirs}[side](directory, dtype)))
        return
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    environment = common.environment()
    shape, stored, repeats = (SMALL, ("float32",), 3) if options.quick else (LARGE, tuple(STORED), 5)
    sides = [OURS, THEIRS] if importlib.util.find_spec("torch") else [OURS]
    rows = []
    with tempfile.TemporaryDirectory(prefix="rlae_jax-load-") as temporary:
        for kept, path in write_checkpoint(Path(temporary), shape, stored).items():
            warm(path)
            rows += [case(path, shape, kept, target, sides, repeats) for target in TARGETS]
    common.print_table(
        f"Loading {shape.numbers / 1e6:,.0f}M parameters, {repeats} processes each; files in the page cache\n"
        "s: median (quartiles); MB: peak resident memory, median (least to most); read: a byte of every page",
        ("stored to target, side", "MB, imports", "s, load", "s, and read", "MB, load", "MB, and read", "bound, MB"),
        [_cells(row, side, figures) for row in rows for side, figures in row["sides"].items()],
    )
    if THEIRS not in sides:
        print("transformers: not measured, torch is not installed (pip install 'rlae-jax[bench]')")
    checks = []
    for row in rows:
        for side, figures in row["sides"].items():
            if "error" in figures:
                print(f"{row['stored']} to {row['target']}, {side}: FAILED ({figures['error']})")
        if row["stored"] == "float32" and "error" not in row["sides"][OURS]:
            most = row["sides"][OURS]["read_peak_mb"]["range"][1]
            checks.append(common.check(f"peak_{row['target']}", most / 1000, "<=", round(row["bound_mb"] / 1000, 3)))
            if not options.quick and row["target"] in SECONDS:
                name, required = SECONDS[row["target"]]
                ours = row["sides"][OURS]
                checks.append(common.check(name, ours["load_s"]["median"], "<=", required))
                if row["target"] == "float32":
                    checks.append(common.check("load_f32_ratio", ours["against_copy"], "<=", AGAINST_COPY))
    print(
        "Checks are of the float32 checkpoint: GB (10^9 bytes), the highest peak of its processes; seconds; and the "
        "seconds against reading and copying the files once"
    )
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
