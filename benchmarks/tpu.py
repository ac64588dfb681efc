"""What the TPU compiler makes of full-size ensembles, on a machine without a TPU: memory, cycles, exchanges per step.

    python -m benchmarks.tpu [--quick] [--only WORDS] [--page]

Each case is the decoding loop of two members, lowered with shapes alone and compiled by libtpu (`pip install
'rlae-jax[tpu-plan]'`) for chips that are not there. Nothing is run: cycles are the compiler's estimates, to be compared
with the time in which a step's bytes can be read. A case takes one to five minutes; what is done is kept in
docs/tpu/results.json, and the same command goes on from there. `--page` writes docs/tpu.md from it.
"""

import argparse
import dataclasses
import importlib.metadata
import math
import time
from pathlib import Path
from typing import Any, TypedDict

import jax

from rlae_jax import files, hlo, records, report
from rlae_jax.models import ModelConfig
from rlae_jax.models.config import Rope
from rlae_jax.planning import tpu
from rlae_jax.planning.devices import DEVICES
from rlae_jax.planning.workload import Workload

FOLDER, PAGE = Path("docs/tpu"), Path("docs/tpu.md")
PROMPT, NEW = 512, 512
_SCALED = (
    *(("factor", 32.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0)),
    ("original_max_position_embeddings", 8192),
)
_COMMON: dict[str, Any] = {"vocab": 128_256, "context": 131_072, "dtype": "bfloat16", "norm_eps": 1e-5}
_COMMON["rope"] = Rope(base=500_000.0, kind="llama3", numbers=_SCALED)
MODELS = {
    "1B": ModelConfig(
        width=2048, layers=16, heads=32, kv_heads=8, head_width=64, ffn_width=8192, tied_head=True, **_COMMON
    ),
    "8B": ModelConfig(width=4096, layers=32, heads=32, kv_heads=8, head_width=128, ffn_width=14_336, **_COMMON),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Two members of a size on a slice of chips."""

    model: str
    kind: str
    chips: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.model} pair, {self.chips} x {self.kind}, batch {self.batch}"


CASES = (
    *(Case("1B", "v5e", 1, batch) for batch in (8, 1, 2, 64)),
    *(Case("1B", kind, 8, 8) for kind in ("v5e", "v6e", "v5p")),
    *(Case("8B", kind, 8, 8) for kind in ("v5e", "v6e", "v5p")),
    Case("8B", "v5e", 8, 64),
)


def device_bytes(tree: Any) -> int:
    """Of the arrays as one device holds them."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def measure(case: Case, quick: bool) -> dict[str, Any]:
    """One compilation, and what it says."""
    model = MODELS[case.model]
    if quick:
        model = dataclasses.replace(model, layers=1)
    workload = Workload(members=(model, model), batch=case.batch, prompt=PROMPT, new=NEW)
    mesh = tpu.make_mesh(case.kind, model=case.chips)
    lowered = workload.lower_loop(mesh)
    began = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - began
    module, memory = hlo.parse(compiled.as_text() or ""), compiled.memory_analysis()
    assert memory is not None
    caches = [cache.layers for cache in workload.state(mesh).caches]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(caches)]
    loop = module.loop_carrying(hlo.Shape("bf16", shapes[0]))
    inside = module.inside(loop)
    params = workload.params(mesh)
    # An embedding that is no head is read one row at a time.
    looked_up = 0 if model.tied_head else sum(device_bytes(member["embedding"]) for member in params)
    weights, cache = device_bytes(params), device_bytes(caches)
    exchanges: dict[str, int] = {}
    for (kind, _), n in hlo.collectives(inside).items():
        exchanges[kind] = exchanges.get(kind, 0) + n
    assert loop.body is not None
    return {
        "weights": weights,
        "cache": cache,
        "temporaries": memory.temp_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "read_per_step": weights - looked_up + cache,
        "cycles": module.cycles(loop.body),
        "exchanges": exchanges,
        "largest_exchange": hlo.collective_bytes(inside),
        "cache_copies": len(module.copies(inside, min(hlo.Shape("bf16", shape).nbytes for shape in shapes))),
        "compile_seconds": seconds,
    }


class Stored(TypedDict):
    """What of the file of results is used; a case's row has what was measured of it."""

    cases: dict[str, dict[str, Any]]


def read_results() -> dict[str, Any]:
    """What was measured so far, by case."""
    path = FOLDER / "results.json"
    stored: dict[str, Any] = files.read_json(path) if path.is_file() else {"cases": {}}
    records.check(stored, Stored, path)
    return stored


def _cells(row: dict[str, Any]) -> list[str]:
    device = DEVICES[row["kind"]]
    bound = row["read_per_step"] / (device.bandwidth * 1e9)
    computing = row["cycles"] / (device.clock * 1e9)
    return [
        f"{row['model']} pair",
        f"{row['chips']} x {row['kind']}",
        str(row["batch"]),
        *(f"{row[part] / 2**30:.2f}" for part in ("weights", "cache", "temporaries")),
        f"{row['cycles'] / 1e6:.2f}",
        f"{1e3 * computing:.2f}",
        f"{1e3 * bound:.2f}",
        f"{bound / computing:.2f}",
        f"{row['batch'] / max(bound, computing):,.0f}",
        str(sum(row["exchanges"].values()) or "-"),
        str(row["cache_copies"] or "-"),
        f"{row['compile_seconds']:.0f}",
    ]


HEAD = (
    *("members", "chips", "batch", "weights, GiB", "cache, GiB", "temporaries, GiB", "cycles a step, M"),
    *("ms of cycles", "ms of reading", "reading / cycles", "tokens/s at best", "exchanges a step", "cache copies"),
    "compile, s",
)
TEXT = """# On TPUs, compiled without one

Made by `python -m benchmarks.tpu --page` from docs/tpu/results.json, which `python -m benchmarks.tpu` fills. Needed:
`pip install 'rlae-jax[tpu-plan]'`, a CPU. {versions}.

Two members of Llama 3's 1B and 8B sizes, bfloat16, one tokenizer, uniform weights, prompts of {prompt} and answers of
{new} tokens: the decoding loop, whose cache has {slots} slots. Chips lie on the mesh axis `model`. Bytes are those of
one chip. Nothing was run.

{table}

- **Cycles** are the compiler's estimates, summed over a step. It gives none to copies into vector memory that run
  beside the products, nor to exchanges: where weights are fetched ahead, the sum is less than reading takes. A step
  takes at least the longer of the two, from which the tokens per second are.
- **Reading** is weights and the whole cache once, by the memory's published bandwidth ({bandwidths}).
{facts}
- The 1B pair needs {one:.1f} GiB of weights and fits one v5e (16 GiB). The 8B pair needs {pair:.1f} GiB: more chips.
- Every cache is donated, written in place, and copied in no step.

`rlae-jax plan` answers the same by formula in seconds, and with `--compile` by this compiler, for any members.
"""


def page(results: dict[str, Any]) -> str:
    """docs/tpu.md."""
    rows = results["cases"]
    kinds = list(dict.fromkeys(row["kind"] for row in rows.values()))
    alone, few, many = (rows[Case("1B", "v5e", 1, batch).name]["cycles"] for batch in (1, 2, 8))
    facts = (
        f"- **One row is slower than eight.** At batch 1 a product becomes a sum on the vector unit: "
        f"{alone / 1e6:.1f}M cycles, against {few / 1e6:.1f}M for two rows and {many / 1e6:.1f}M for eight. On TPUs "
        "batches have at least two rows."
    )
    left = [case.name for case in CASES if case.name not in rows]
    if left:
        facts += f"\n- Not compiled yet: {'; '.join(left)}."
    text = TEXT.format(
        versions=", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        prompt=PROMPT,
        new=NEW,
        slots=PROMPT + NEW,
        table=report.markdown_table(HEAD, [_cells(rows[case.name]) for case in CASES if case.name in rows], left=2),
        bandwidths=", ".join(f"{kind} {DEVICES[kind].bandwidth:g} GB/s" for kind in kinds),
        facts=facts,
        one=rows[Case("1B", "v5e", 1, 8).name]["weights"] / 2**30,
        pair=8 * rows[Case("8B", "v5e", 8, 8).name]["weights"] / 2**30,
    )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one layer per model, nothing is kept")
    parser.add_argument("--only", metavar="WORDS", default="", help="cases in whose names this stands")
    parser.add_argument("--page", action="store_true", help=f"write {PAGE} from what is kept, and compile nothing")
    args = parser.parse_args()
    results = read_results()
    if args.page:
        PAGE.write_text(page(results), encoding="utf-8")
        report.say(f"wrote {PAGE}")
        return
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    for case in CASES:
        if args.only not in case.name or (case.name in results["cases"] and not args.quick):
            continue
        row = dataclasses.asdict(case) | measure(case, args.quick)
        report.say(f"{case.name}: {row['cycles'] / 1e6:.2f}M cycles a step, compiled in {row['compile_seconds']:.0f} s")
        if not args.quick:
            results["cases"][case.name] = row
            results["versions"] = versions
            FOLDER.mkdir(parents=True, exist_ok=True)
            files.write_json(FOLDER / "results.json", results)


if __name__ == "__main__":
    main()
