"""How much faster members decode whose weights are held in fewer bits.

In: nothing but the package; two members with random weights, held in every form, answer the same prompts in turn. Out:
per form and batch the milliseconds of a step (prefill left out), against the form that members have otherwise, the
bytes that a step has to read, and at what speed it reads them.

    python -m benchmarks.quantised [--quick] [--json PATH]

On a CPU the members are the 134M pair of `benchmarks.decode`, in float32 and bfloat16; on an accelerator a 7B pair in
bfloat16, one form at a time beside it, since all together would not fit.

On a CPU a line says how fast int8 could be at most: the compiler converts a block of a kernel and then multiplies by
it, so that what counts is how many weights it converts and multiplies in the processor's caches while float32 ones come
from memory.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import rlae_jax as rj
from benchmarks import common, device
from benchmarks.accelerator_cases import MISTRAL_7B, random_rows
from benchmarks.decode import LARGE, MEMBERS
from rlae_jax.models import transformer
from rlae_jax.models.quantise import Quantisation, quantise_params, weight_bytes

PROMPT_TOKENS, NEW_TOKENS = 32, 32
ROUNDS, QUICK_ROUNDS = 7, 3
BATCHES, QUICK_BATCHES = (1, 8), (1,)
# The forms, and what each has to be at batch 1 against what members are otherwise held in.
CPU = {
    "float32": None,
    "bfloat16": None,
    "int8": Quantisation("int8"),
    "int8, head too": Quantisation("int8", head=True),
    "int4, groups of 32": Quantisation("int4"),
    "fp8": Quantisation("fp8"),
}
ACCELERATOR = {
    "bfloat16": None,
    "int8": Quantisation("int8", head=True),
    "int4, groups of 128": Quantisation("int4", 128, head=True),
    "int4, groups of 32": Quantisation("int4", head=True),
    "fp8": Quantisation("fp8", head=True),
}
REQUIRED = {
    "cpu": {"int8, head too": ("int8_speed", 1.5)},
    "accelerator": {"int8": ("int8_speed", 1.5), "int4, groups of 128": ("int4_speed", 2.2)},
}


def make_members(base: list[rj.LM], form: str, quantisation: Quantisation | None) -> list[rj.LM]:
    """The same weights in another form."""
    if quantisation is None:
        config = dataclasses.replace(base[0].config, dtype=form)
        return [rj.LM(config, jax.tree.map(lambda leaf: leaf.astype(form), lm.params), name=lm.name) for lm in base]
    linears = transformer.linears(base[0].config)
    return [
        dataclasses.replace(lm, params=quantise_params(lm.params, linears, quantisation), quantisation=quantisation)
        for lm in base
    ]


def step_bytes(members: list[rj.LM]) -> int:
    """The weights that a step reads: all but a table of which it looks up a row."""
    params = [lm.params if lm.config.tied_head else {**lm.params, "embedding": None} for lm in members]
    return sum(map(weight_bytes, jax.tree.leaves(params)))


def measure(forms: dict[str, list[rj.LM]], batch: int, rounds: int) -> list[dict[str, Any]]:
    """A row per form; the first is what the others are compared with."""
    calls: dict[str, Callable[[], Any]] = {}
    for form, members in forms.items():
        rows = random_rows(members[0].config, batch, PROMPT_TOKENS)
        generate = functools.partial(rj.Ensemble(members).generate, prompt_ids=rows, ignore_eos=True)
        for n in (NEW_TOKENS, 1):
            calls[f"{form} {n}"] = functools.partial(generate, max_new_tokens=n)
    for call in calls.values():
        call()
    others = common.OtherLoad()
    timings = common.time_alternating(calls, rounds=rounds)
    steps = {
        form: common.step_seconds(timings[f"{form} {NEW_TOKENS}"], timings[f"{form} 1"], NEW_TOKENS) for form in forms
    }
    first = next(iter(forms))
    return [
        {
            "kind": "case",
            "form": form,
            "batch": batch,
            "ms": 1e3 * steps[form].median,
            "ms_quartiles": [1e3 * q for q in steps[form].quartiles],
            "ratio": common.pairwise_ratio(steps[first], steps[form]),
            "bytes_step": step_bytes(members),
            "gb_per_second": step_bytes(members) / steps[form].median / 1e9,
            "cores_used_by_others": others.share(),
        }
        for form, members in forms.items()
    ]


def cpu_rates() -> dict[str, float]:
    """Weights per second at batch 1: of a float32 product with a matrix in memory, and in the processor's caches of
    converting int8 and of a float32 product."""
    size, blocks, turns = 512, 128, 512
    keys = jax.random.split(jax.random.key(0), 3)
    held = jax.random.randint(keys[0], (blocks, size, size), -127, 128, jnp.int8)
    block = jax.random.normal(keys[1], (size, size)) / size**0.5
    matrix = jax.random.normal(keys[2], (8192, 8192))

    def convert(held: jax.Array) -> jax.Array:
        def one(i: jax.Array, block: jax.Array) -> jax.Array:
            del block
            return lax.dynamic_index_in_dim(held, i % blocks, keepdims=False).astype(jnp.float32)

        converted: jax.Array = lax.fori_loop(0, turns, one, jnp.zeros((size, size)))
        return converted

    def multiply(block: jax.Array) -> jax.Array:
        product: jax.Array = lax.fori_loop(0, turns, lambda _, x: jnp.tanh(block @ x), jnp.ones(size))
        return product

    calls = {
        "read": functools.partial(jax.jit(lambda matrix: matrix @ jnp.ones(len(matrix))), matrix),
        "convert": functools.partial(jax.jit(convert), held),
        "multiply": functools.partial(jax.jit(multiply), block),
    }
    blocking = {name: functools.partial(_finished, call) for name, call in calls.items()}
    for call in blocking.values():
        call()
    timings = common.time_alternating(blocking, rounds=QUICK_ROUNDS)
    weights = {"read": matrix.size, "convert": turns * block.size, "multiply": turns * block.size}
    return {name: weights[name] / timings[name].median for name in calls}


def _finished(call: Callable[[], Any]) -> None:
    jax.block_until_ready(call())


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    environment = common.environment()
    place = "cpu" if jax.default_backend() == "cpu" else "accelerator"
    config, forms = (LARGE, CPU) if place == "cpu" else (MISTRAL_7B, ACCELERATOR)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    base = [device.random_lm(config, seed) for seed in range(MEMBERS)]
    first = next(iter(forms))
    # Together, so that all forms are measured in the same rounds; where memory is short each beside the first.
    together = [list(forms)] if place == "cpu" else [[first, form] for form in forms if form != first]
    rows: list[dict[str, Any]] = []
    for batch in QUICK_BATCHES if options.quick else BATCHES:
        for names in together:
            print(f"batch {batch}: {', '.join(names)} ...", flush=True)
            found = measure({name: make_members(base, name, forms[name]) for name in names}, batch, rounds)
            rows += [row for row in found if row["form"] != first or not any(r["batch"] == batch for r in rows)]
    common.print_table(
        f"A step of two members of {sum(leaf.size for leaf in jax.tree.leaves(base[0].params)) / 1e6:.0f}M parameters; "
        f"median (quartiles); against {first}",
        ("weights", "batch", "ms", "times as fast", "MB read", "GB/s"),
        [
            (
                row["form"],
                row["batch"],
                f"{row['ms']:.1f} ({row['ms_quartiles'][0]:.1f} to {row['ms_quartiles'][1]:.1f})",
                f"{row['ratio']:.2f}",
                f"{row['bytes_step'] / 1e6:,.0f}",
                f"{row['gb_per_second']:,.0f}",
            )
            for row in rows
        ],
    )
    if place == "cpu":
        rates = cpu_rates()
        most = 1 / rates["read"] / (1 / rates["convert"] + 1 / rates["multiply"])
        read, convert, multiply = (rates[name] / 1e9 for name in ("read", "convert", "multiply"))
        print(
            f"billions of weights per second: float32 from memory {read:.1f}; in its caches this processor converts "
            f"{convert:.1f} from int8 and multiplies by {multiply:.1f}: int8 is at most {most:.2f} times as fast"
        )
        rows.append({"kind": "rates", **rates, "int8_at_most": most})
    busy = max((row.get("cores_used_by_others") or 0) for row in rows)
    if busy > 0.05:
        print(f"note: other programs used {busy:.0%} of the cores: repeat on a quiet machine before quoting this")
    ratios = {row["form"]: row["ratio"] for row in rows if row.get("batch") == 1}
    checks = [common.check(name, ratios[form], ">=", bar) for form, (name, bar) in REQUIRED[place].items()]
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
