"""Models whose axes every mesh of eight devices divides, and the meshes."""

import functools

import pytest

import rlae_jax as rj

SIZES = ((4, 2), (2, 4), (8, 1), (1, 8))
# Every kind on two meshes in the ordinary run, on the other two in the full one.
EVERY_MESH = [
    pytest.param(size, marks=() if i < 2 else pytest.mark.rare, id="x".join(map(str, size)))
    for i, size in enumerate(SIZES)
]
WIDE = {"vocab": 24, "width": 32, "heads": 8, "kv_heads": 8, "head_width": 4, "ffn_width": 32}


@pytest.fixture(scope="session")
def make_wide(make_lm):
    """make_wide(seed, **fields) -> a tiny LM that eight devices share."""
    return functools.partial(make_lm, **WIDE)


@pytest.fixture(params=EVERY_MESH)
def mesh(request):
    return rj.make_mesh(*request.param)
