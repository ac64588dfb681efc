"""What a decoding step of a mixture of experts reads, and how long it takes beside a dense model of the active width.

In: nothing but the package; random weights of 8 experts, 2 active. Out: per number of rows the bytes that the compiled
step reads of arrays that no processor's cache holds, beside those of the parameters that its rows take, and the
milliseconds of a step of either model.

    python -m benchmarks.experts [--quick] [--json PATH]

`moe_bytes` is the first figure over the second with one row.
"""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from rlae_jax import hlo
from rlae_jax.models import ModelConfig, experts, transformer
from rlae_jax.models.cache import Cache, LayerCache, visible
from rlae_jax.models.config import Experts
from rlae_jax.models.transformer import Model

SLOTS = 64
MIXTURE = ModelConfig(
    vocab=8192, width=1024, layers=4, heads=16, kv_heads=16, head_width=64, ffn_width=2 * 2816, tied_head=True,
    experts=Experts(number=8, active=2, width=2816, layers=(0, 1, 2, 3)),
)  # fmt: skip
DENSE = dataclasses.replace(MIXTURE, experts=None)


def step(config: ModelConfig, params: Any, ids_b: jax.Array, cache: Cache, slot: jax.Array) -> tuple[jax.Array, Cache]:
    """The likeliest next token of every row."""
    model = Model(config, params)
    hidden, cache = model.decode_step(ids_b, ids_b, cache, slot, visible(cache, config, jnp.zeros_like(ids_b), slot))
    return jnp.argmax(model.logits(hidden), axis=-1), cache


def measure(config: ModelConfig, rows: int, rounds: int) -> dict[str, Any]:
    """Bytes and milliseconds of a step."""
    params = transformer.init_params(config, jax.random.key(0))
    shape = (rows, config.kv_heads, config.head_width, SLOTS)
    cache = Cache(tuple(LayerCache(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(config.layers)), SLOTS)
    ids, slot = jnp.arange(rows), jnp.int32(0)
    compiled = jax.jit(step, static_argnums=0, donate_argnums=3).lower(config, params, ids, cache, slot).compile()
    text, used = compiled.as_text(), compiled.memory_analysis()
    assert text is not None
    assert used is not None
    module = hlo.parse(text)
    seconds = []
    for i in range(rounds):
        start = time.perf_counter()
        ids, cache = compiled(params, ids, cache, jnp.int32(i))
        ids.block_until_ready()
        seconds.append(time.perf_counter() - start)
    return {
        "rows": rows,
        "read": module.bytes_read(module.entry, experts._TILE_BYTES),
        "active": transformer.active_bytes(config, rows=rows),
        "temporaries": used.temp_size_in_bytes,
        "ms": 1000 * float(np.median(seconds[1:])),
    }


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    environment = common.environment()
    rows = []
    for n in (1, 8):
        for name, config in (("8 experts, 2 active", MIXTURE), ("dense, as wide as 2", DENSE)):
            rows.append({"model": name, **measure(config, n, 6 if options.quick else 40)})
    mb = 10**6
    common.print_table(
        "A decoding step",
        ("model", "rows", "MB read", "MB of active parameters", "MB of temporaries", "ms"),
        [
            (
                r["model"],
                r["rows"],
                *(f"{r[what] / mb:.1f}" for what in ("read", "active", "temporaries")),
                f"{r['ms']:.1f}",
            )
            for r in rows
        ],
    )
    checks = [common.check("moe_bytes", rows[0]["read"] / rows[0]["active"], "<=", 1.3)]
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
