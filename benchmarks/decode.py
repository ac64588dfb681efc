"""How fast two models write one text together, against torch on the same weights and prompts.

In: nothing but the package; the members are random and live in a temporary directory that both sides load. Out: per
case the tokens per second of this program, of the transformers loop and of the best torch peer (see `peers.py`), their
ratios, whether they write the same tokens, and at 134M and batch 1 how close decoding comes to reading the weights at
the speed of memory, and where the rest of the time goes.

    python -m benchmarks.decode [--quick] [--json PATH]

Everything is timed end to end: from prompt ids on the host to tokens on the host, prefill included, greedy, linear
fusion with uniform weights, end tokens ignored. A token counts once, however many members read it.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import rlae_jax as rj
from benchmarks import common
from benchmarks.common import Timing
from rlae_jax.models import ModelConfig, transformer

if TYPE_CHECKING:
    from benchmarks import peers

PROMPT_TOKENS = 64
NEW_TOKENS = 64
COMPARED_TOKENS = 16
MEMBERS = 2

# The shapes of stories260K and of SmolLM-135M.
SMALL = ModelConfig(
    vocab=512,
    width=64,
    layers=5,
    heads=8,
    kv_heads=4,
    head_width=8,
    ffn_width=172,
    norm_eps=1e-5,
    tied_head=True,
)
LARGE = ModelConfig(
    vocab=49152,
    width=576,
    layers=30,
    heads=9,
    kv_heads=3,
    head_width=64,
    ffn_width=1536,
    norm_eps=1e-5,
    tied_head=True,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table, and what this program has to reach against the transformers loop."""

    model: str
    batch: int
    required: float
    rounds: int
    # What the best peer tries. A whole step of the small members, ten layers, takes 15 s to compile; one of the large
    # members would have 60, so that there a single layer is compiled and serves them all.
    compiled: tuple[str | None, ...]
    # What the transformers loop tries. At 134M only the library's default: trying both costs half a minute a case, and
    # the one trial of both at batch 1, on a busy machine, differed by 4% in favour of eager.
    attentions: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.model}_b{self.batch}"


CONFIGS = {"0.3M": SMALL, "134M": LARGE}
CASES = (
    Case("0.3M", 1, 10.0, 15, (None, "step"), ("sdpa", "eager")),
    Case("0.3M", 32, 2.0, 15, (None, "step"), ("sdpa", "eager")),
    Case("0.3M", 256, 1.5, 11, (None, "step"), ("sdpa", "eager")),
    Case("134M", 1, 2.4, 7, (None, "layer"), ("sdpa",)),
    Case("134M", 8, 1.9, 5, (None, "layer"), ("sdpa",)),
)
LIMIT_CASE = "134M_b1"
LIMIT_REQUIRED = 0.65
QUICK_ROUNDS = 3
CASE_BUDGET_SECONDS = 45.0
QUIET = 0.05  # the share of the cores that other programs may use before the table says so

# 268 MB in float32, several times the largest caches: what a product reads comes from memory.
MATRIX_ELEMENTS = 2**26
MATRIX_ROWS = (1024, 8192, 65536)


def write_members(directory: Path, config: ModelConfig) -> list[Path]:
    """Random members, saved as Hugging Face directories without a tokenizer.

    The initialiser's scale is kept: logits have standard deviation 1, and the fused probability of the best token leads
    the second's by a factor of e^0.23 in the median and of e^1.5e-4 in the closest of 4,096 choices, far above the
    rounding of float32 sums in another order. Larger logits would scale gap and rounding alike.
    """
    paths = []
    for seed in range(MEMBERS):
        path = directory / f"member{seed}"
        rj.LM(config, transformer.init_params(config, jax.random.key(seed))).save(path)
        paths.append(path)
    return paths


def same_start(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The fraction of rows whose first tokens are equal."""
    return float(np.mean(np.all(ours[:, :COMPARED_TOKENS] == theirs[:, :COMPARED_TOKENS], axis=1)))


def rate(timing: Timing, batch: int) -> dict[str, float]:
    """Tokens per second: median and quartiles over the rounds."""
    tokens = batch * NEW_TOKENS
    low, high = timing.quartiles
    return {"median": tokens / timing.median, "q25": tokens / high, "q75": tokens / low}


def run_case(case: Case, paths: list[Path], *, quick: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measures one case. Returns its row and its checks."""
    from benchmarks import peers

    config = CONFIGS[case.model]
    rng = np.random.default_rng(case.batch)
    prompt_ids: Any = rng.integers(0, config.vocab, (case.batch, PROMPT_TOKENS), dtype=np.int32)
    ensemble = rj.Ensemble([rj.load(path) for path in paths], fusion="linear")

    def ours(new_tokens: int = NEW_TOKENS) -> np.ndarray:
        out = ensemble.generate(prompt_ids=prompt_ids, ignore_eos=True, max_new_tokens=new_tokens)
        return np.asarray(out.tokens)

    loop = peers.loop_peer(paths, prompt_ids, NEW_TOKENS, attentions=case.attentions)
    best = peers.best_peer(paths, prompt_ids, NEW_TOKENS, compiled=case.compiled)
    callables: dict[str, Callable[[], Any]] = {
        "ours": ours,
        "loop": lambda: loop.generate(prompt_ids, NEW_TOKENS),
        "best": lambda: best.generate(prompt_ids, NEW_TOKENS),
    }
    tokens = {name: call() for name, call in callables.items()}
    if case.name == LIMIT_CASE:
        # In the same rounds as the decoding that they explain: on a shared machine bandwidth comes and goes.
        callables["one token"] = lambda: ours(1)
        callables["products"] = step_products(config)
        callables |= matrix_vector_products()
        for name in callables.keys() - tokens.keys():
            callables[name]()
    others = common.OtherLoad()
    timings = common.time_alternating(
        callables, rounds=QUICK_ROUNDS if quick else case.rounds, budget_seconds=CASE_BUDGET_SECONDS
    )

    row: dict[str, Any] = {
        "kind": "case",
        "case": case.name,
        "members": MEMBERS,
        "parameters_per_member": sum(leaf.size for leaf in jax.tree.leaves(ensemble.members[0].params)),
        "batch": case.batch,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "rounds": len(timings["ours"].seconds),
        "cores_used_by_others": others.share(),
        "tokens_per_second": {name: rate(timings[name], case.batch) for name in ("ours", "loop", "best")},
        "seconds": {name: timing.seconds for name, timing in timings.items()},
        "ratio_loop": common.pairwise_ratio(timings["loop"], timings["ours"]),
        "ratio_best": common.pairwise_ratio(timings["best"], timings["ours"]),
        "same_tokens_loop": same_start(tokens["ours"], tokens["loop"]),
        "same_tokens_best": same_start(tokens["ours"], tokens["best"]),
        "variants": {"loop": _variants(loop, case.batch), "best": _variants(best, case.batch)},
    }
    checks = [
        common.check(f"loop_{case.name}", row["ratio_loop"], ">=", case.required),
        common.check(f"same_tokens_{case.name}", min(row["same_tokens_loop"], row["same_tokens_best"]), ">=", 1.0),
    ]
    if case.name == LIMIT_CASE:
        row["limit"] = memory_limit(ensemble, timings)
        checks.append(common.check(f"limit_{case.name}", row["limit"]["fraction"], ">=", LIMIT_REQUIRED))
    return row, checks


def _variants(peer: "peers.Peer", batch: int) -> dict[str, Any]:
    rates = {name: batch * NEW_TOKENS / seconds for name, seconds in peer.seconds.items()}
    return {"chosen": peer.variant, "tokens_per_second": rates, "failed": peer.failed}


def matrix_vector_products() -> dict[str, Callable[[], Any]]:
    """One large matrix times a vector, in several shapes and both orientations. They share one matrix's memory."""
    flat = jnp.ones((MATRIX_ELEMENTS,), jnp.float32)
    products: dict[str, Callable[[], Any]] = {}
    for rows in MATRIX_ROWS:
        for einsum, size in (("r,rc->c", rows), ("c,rc->r", MATRIX_ELEMENTS // rows)):
            shape = (rows, MATRIX_ELEMENTS // rows)
            products[f"{einsum} {shape[0]}x{shape[1]}"] = _matrix_vector(einsum, flat, shape, jnp.ones((size,)))
    return products


def _matrix_vector(einsum: str, flat: Array, shape: tuple[int, int], x: Array) -> Callable[[], Any]:
    # The reshape is inside, where it costs nothing, so that all shapes read the same memory.
    product = jax.jit(lambda x, flat: jnp.einsum(einsum, x, flat.reshape(shape), precision="highest"))
    return lambda: product(x, flat).block_until_ready()


PRODUCT_STEPS = 4


def step_products(config: ModelConfig) -> Callable[[], Any]:
    """Nothing but the matrix products of one member's decoding step at batch 1, `PRODUCT_STEPS` times over.

    Each kernel is its own array and each product needs the one before it, as in the real step; norms, rotations,
    attention, fusion and the choice of a token are left out.
    """
    d, f = config.width, config.ffn_width
    n, g = config.heads * config.head_width, config.kv_heads * config.head_width
    shapes = [(d, n), (d, g), (d, g), (n, d), (d, f), (d, f), (f, d)]
    keys = jax.random.split(jax.random.key(0), config.layers + 1)
    layers = [[jax.random.normal(key, shape) * shape[0] ** -0.5 for shape in shapes] for key in keys[1:]]
    table = jax.random.normal(keys[0], (config.vocab, d)) * d**-0.5

    def step(x: Array, layers: list[list[Array]], table: Array) -> Array:
        def product(x: Array, kernel: Array) -> Array:
            return jnp.einsum("bd,df->bf", x, kernel, precision=config.precision)

        for q, k, v, o, gate, up, down in layers:
            x = product(product(x, q), o) + jnp.sum(product(x, k) + product(x, v))
            x = product(product(x, gate) * product(x, up), down)
            x = x / (1 + jnp.max(jnp.abs(x)))  # keeps the numbers finite; a few hundred flops
        return x + jnp.max(jnp.einsum("bd,vd->bv", x, table, precision=config.precision))

    @jax.jit
    def steps(x: Array, layers: list[list[Array]], table: Array) -> Array:
        return lax.fori_loop(0, PRODUCT_STEPS, lambda _, x: step(x, layers, table) * 1e-6, x)

    x = jnp.ones((1, d))
    return lambda: steps(x, layers, table).block_until_ready()


def memory_limit(ensemble: rj.Ensemble, timings: dict[str, Timing]) -> dict[str, Any]:
    """How close decoding comes to reading its weights at full speed, and where the rest goes. Seconds are medians.

    Counted per step: every parameter of every member once, the embedding table (which is also the head) included. Not
    counted: the cache, the activations, and that prefill reads the weights once more.
    """
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(ensemble.params))
    matrix_bytes = 4 * MATRIX_ELEMENTS
    bandwidths = {name: matrix_bytes / t.median for name, t in timings.items() if "->" in name}
    bandwidth = max(bandwidths.values())
    whole, one = timings["ours"].median, timings["one token"].median
    step = (whole - one) / (NEW_TOKENS - 1)
    at_limit = weight_bytes / bandwidth
    products = MEMBERS * timings["products"].median / PRODUCT_STEPS
    parts = {
        "reading the weights at the bandwidth of a large product": NEW_TOKENS * at_limit,
        "the step's own, smaller products beyond that": NEW_TOKENS * (products - at_limit),
        "the rest of the steps: attention, norms, fusion, choice": NEW_TOKENS * (step - products),
        "prefill and the host's side": whole - NEW_TOKENS * step,
    }
    return {
        "weight_bytes_per_step": weight_bytes,
        "bandwidth_bytes_per_second": bandwidth,
        "bandwidths": bandwidths,
        "seconds_per_step": step,
        "fraction": NEW_TOKENS * at_limit / whole,
        "fraction_of_the_steps_alone": at_limit / step,
        "parts": parts,
    }


def print_limit(limit: dict[str, Any]) -> None:
    """Where the time of one answer goes at the limit case."""
    whole = sum(limit["parts"].values())
    cells = [(name, f"{1e3 * seconds:.0f}", f"{seconds / whole:.0%}") for name, seconds in limit["parts"].items()]
    title = (
        f"{LIMIT_CASE}: where one answer's {1e3 * whole:.0f} ms go. {limit['weight_bytes_per_step'] / 1e9:.2f} GB of "
        f"weights a step; a large product reads {limit['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s; "
        f"{limit['fraction']:.2f} of the limit, {limit['fraction_of_the_steps_alone']:.2f} without prefill"
    )
    common.print_table(title, ("part", "ms", "share"), [*cells, ("whole", f"{1e3 * whole:.0f}", "100%")])


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["case"]]
    for name in ("ours", "loop", "best"):
        rates = row["tokens_per_second"][name]
        cells.append(f"{rates['median']:,.0f} ({rates['q25']:,.0f} to {rates['q75']:,.0f})")
    cells += [f"{row['ratio_loop']:.2f}", f"{row['ratio_best']:.2f}"]
    cells += [f"{row['same_tokens_loop']:.0%}", f"{row['same_tokens_best']:.0%}"]
    return [
        *cells,
        f"{row['variants']['loop']['chosen']}; {row['variants']['best']['chosen']}",
        str(row["rounds"]),
        _percent(row),
    ]


def _percent(row: dict[str, Any]) -> str:
    share = row["cores_used_by_others"]
    return "?" if share is None else f"{share:.0%}"


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    common.require("torch", "transformers")
    from benchmarks import peers

    peers.setup()
    environment = common.environment()
    rows: list[dict[str, Any]] = []
    checks: list[dict[str, Any]] = []
    for model, config in CONFIGS.items():
        cases = [case for case in CASES if case.model == model]
        if options.quick and model == "134M":
            print("--quick: the 134M cases and their checks are left out")
            rows += [{"kind": "skipped", "case": case.name, "why": "--quick"} for case in cases]
            continue
        with tempfile.TemporaryDirectory(prefix="rlae_jax-decode-") as directory:
            paths = write_members(Path(directory), config)
            for case in cases:
                print(f"{case.name} ...", flush=True)
                row, case_checks = run_case(case, paths, quick=options.quick)
                rows.append(row)
                checks += case_checks

    measured = [row for row in rows if row["kind"] == "case"]
    title = (
        f"Tokens per second, median (quartiles): two members, {PROMPT_TOKENS} prompt and {NEW_TOKENS} new tokens, "
        f"greedy. same: rows whose first {COMPARED_TOKENS} tokens equal ours; others: share of the cores"
        " that other programs took"
    )
    columns = (
        *("case", "ours", "loop", "best", "ours/loop", "ours/best"),
        *("same loop", "same best", "variants", "rounds", "others"),
    )
    common.print_table(title, columns, [_cells(row) for row in measured])
    if any((row["cores_used_by_others"] or 0) > QUIET for row in measured):
        print(
            f"note: other programs used more than {QUIET:.0%} of the cores. That slows torch down several times more "
            "than this program and inflates the ratios: repeat on a quiet machine before quoting them"
        )
    for row in measured:
        for peer, variants in row["variants"].items():
            for name, why in variants["failed"].items():
                print(f"note: {row['case']}: {peer} could not run its variant {name!r}: {why}")
        if "limit" in row:
            print_limit(row["limit"])
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
