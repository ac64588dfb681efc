"""What tests of agents share: small networks, random observations."""

import jax.numpy as jnp
import numpy as np

from rlae_jax.fusion.policy import STATS, Dims, Observation

DIMS = Dims((6, 4, 5), 3, text=7)
SMALL = {"projection": 3, "span_embedding": 4, "ffn_width": 8}


def observe(batch=7, seed=0, spans=3, scale=1.0):
    rng = np.random.default_rng(seed)
    return Observation(
        hidden=tuple(jnp.asarray(rng.normal(0, scale, (batch, width)), jnp.float32) for width in DIMS.widths),
        stats=jnp.asarray(rng.normal(0, scale, (batch, DIMS.members, len(STATS))), jnp.float32),
        span=jnp.asarray(rng.integers(0, spans, batch), jnp.int32),
        prompt=jnp.asarray(rng.normal(0, scale, (batch, DIMS.members)), jnp.float32),
        text=jnp.asarray(rng.normal(0, scale, (batch, DIMS.text)), jnp.float32),
        agreement=jnp.asarray(rng.uniform(0, 1, (batch, DIMS.members, DIMS.members)), jnp.float32),
    )


def undecided_no_more(params):
    """The output layers start near zero; larger ones make differences visible."""
    return params | {name: params[name] | {"w2": params[name]["w2"] * 100} for name in ("actor", "critic")}
