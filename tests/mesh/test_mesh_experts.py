"""Experts on a mesh: whole ones on each device, or a part of each where there are too few, and the same tokens."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import hlo
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.models.config import Experts
from rlae_jax.models.transformer import Model

IDS, MASK = pad_rows([[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7], [11, 22, 0]], 8)
GIVEN = {"prompt_ids": IDS, "prompt_mask": MASK, "max_new_tokens": 6, "seed": 5, "ignore_eos": True}


def on(mesh, lm):
    """The member on a mesh, whose notices are tested elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return lm.on_mesh(mesh)


def mixture(make_wide, number):
    spec = Experts(number=number, active=2, width=32, layers=(0, 1), bias=True, shared_width=8)
    return make_wide(0, experts=spec, attention_sinks=True)


@pytest.mark.parametrize(("number", "split"), [(8, "experts"), (3, "entries")])
@pytest.mark.parametrize("size", [(2, 4), pytest.param((4, 2), marks=pytest.mark.rare)], ids=["2x4", "4x2"])
def test_tokens_are_those_of_one_device(make_wide, size, number, split):
    lm = mixture(make_wide, number)
    mesh = rj.make_mesh(*size)
    spread = on(mesh, lm)
    kernel = spread.params["layers"][0]["ffn"]["experts"]["up"]["kernel"]
    share = tuple(np.array(kernel.shape) // ((size[1], 1, 1) if split == "experts" else (1, 1, size[1])))
    assert kernel.addressable_shards[0].data.shape == share
    alone, together = (rj.Ensemble([member]).generate(**GIVEN) for member in (lm, spread))
    assert alone.tokens == together.tokens
    assert len({str(row) for row in alone.tokens}) > 2


@pytest.mark.rare
def test_scaled_inputs_and_chunks(make_wide):
    spec = Experts(number=8, active=2, width=32, layers=(0, 1), scaled_inputs=True, shared_width=8)
    lm = make_wide(0, experts=spec, local_layers=(0,), window=3, chunked=True)
    alone, together = (rj.Ensemble([member]).generate(**GIVEN) for member in (lm, on(rj.make_mesh(2, 4), lm)))
    assert alone.tokens == together.tokens


def test_gradients_are_those_of_one_device_and_no_expert_travels(make_wide):
    lm = mixture(make_wide, 8)
    spread = on(rj.make_mesh(2, 4), lm)

    def loss(params, ids, mask):
        return jnp.mean(jnp.sin(Model(lm.config, params).forward(ids, mask)[0]))

    gradient = jax.jit(jax.grad(loss))
    alone = gradient(lm.params, IDS, MASK)
    with rj.sharding.use(rj.make_mesh(2, 4)):
        compiled = gradient.lower(spread.params, IDS, MASK).compile()
        together = compiled(spread.params, IDS, MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), alone, jax.device_get(together))
    computations = hlo.parse(compiled.as_text()).computations.values()
    found = hlo.collectives(i for computation in computations for i in computation)
    assert not [
        shape for kind, shapes in found for shape in shapes if kind == "all-gather" and shape.startswith("f32[8,")
    ]
