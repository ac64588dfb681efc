"""Mixtures of experts: what a block of rows gives against a loop over tokens, what a step reads, and what else holds.

That families compute what transformers computes is tested in test_families.py.
"""

import dataclasses
import functools
import json
import shutil
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax import hlo
from rlae_jax.errors import InputError
from rlae_jax.models import ModelConfig, experts, lora, transformer
from rlae_jax.models.cache import Cache, LayerCache, visible
from rlae_jax.models.config import Experts
from rlae_jax.models.quantise import quantise_kernel
from rlae_jax.models.transformer import Model
from tests.data import hf

EXPERTS = Experts(number=5, active=2, width=24, layers=(0, 1))
BIASED = Experts(number=4, active=3, width=8, layers=(0,), bias=True, router_bias=True, clamped=(1.7, 0.4))
D = 16


def config_of(spec: Experts, **fields: Any) -> ModelConfig:
    sizes = {"vocab": 40, "layers": 2, "heads": 4, "kv_heads": 2, "head_width": 4, "ffn_width": 24}
    return ModelConfig(**{**sizes, "width": D, "experts": spec, **fields})


def random_parts(rng: np.random.Generator, spec: Experts) -> dict[str, dict[str, Any]]:
    shapes = {"gate": (D, spec.width), "up": (D, spec.width), "down": (spec.width, D)}
    parts: dict[str, dict[str, Any]] = {}
    for name, shape in shapes.items():
        parts[name] = {"kernel": rng.normal(0, 0.3, (spec.number, *shape)).astype(np.float32)}
        if spec.bias:
            parts[name]["bias"] = rng.normal(0, 0.3, (spec.number, shape[1])).astype(np.float32)
    return parts


def one_by_one(x_nd: Any, ids_nk: Any, weights_nk: Any, parts: Any, spec: Experts) -> np.ndarray:
    """The sum of each token's experts, one after another."""

    def linear(name: str, x: np.ndarray, e: int) -> np.ndarray:
        out = x @ parts[name]["kernel"][e].astype(np.float64)
        return out + parts[name]["bias"][e] if spec.bias else out

    out = np.zeros(x_nd.shape)
    for n, ids in enumerate(ids_nk):
        for j, e in enumerate(ids):
            gate, up = linear("gate", x_nd[n], e), linear("up", x_nd[n], e)
            if spec.clamped is None:
                hidden = gate / (1 + np.exp(-gate)) * up
            else:
                alpha, limit = spec.clamped
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
                hidden = gate / (1 + np.exp(-alpha * gate)) * (up + 1)
            out[n] += weights_nk[n, j] * linear("down", hidden, e)
    return out


def random_rows(rng: np.random.Generator, n: int, spec: Experts, skewed: bool) -> tuple[np.ndarray, ...]:
    ids = np.stack([rng.permutation(spec.number)[: spec.active] for _ in range(n)])
    if skewed:  # all tokens take the same experts, and nobody the others
        ids = np.broadcast_to(ids[:1], ids.shape)
    x, weights = rng.normal(size=(n, D)), rng.random((n, spec.active))
    return x.astype(np.float32), ids.astype(np.int32), weights.astype(np.float32)


def apply(spec: Experts, rows: Any, parts: Any) -> np.ndarray:
    function = functools.partial(experts.apply_experts, device=0, spec=spec, config=config_of(spec))
    return np.asarray(jax.jit(lambda rows, parts: function(rows, parts))(rows, parts))


@pytest.mark.parametrize("tile", [2**19, 100], ids=["whole", "tiles"])
@pytest.mark.parametrize("spec", [EXPERTS, BIASED], ids=["plain", "biased"])
def test_blocks_give_what_a_loop_over_tokens_gives(monkeypatch, spec, tile):
    monkeypatch.setattr(experts, "_TILE_BYTES", tile)
    rng = np.random.default_rng()
    parts = random_parts(rng, spec)
    for n, skewed in ((1, False), (7, False), (20, True), (90, False)):
        rows = random_rows(rng, n, spec, skewed)
        np.testing.assert_allclose(apply(spec, rows, parts), one_by_one(*rows, parts, spec), rtol=0, atol=1e-5)


@pytest.mark.parametrize("spec", [EXPERTS, BIASED], ids=["plain", "biased"])
def test_ragged_products_give_the_same(monkeypatch, spec):
    """What a TPU runs, run here."""
    rng = np.random.default_rng()
    parts, rows = random_parts(rng, spec), random_rows(rng, 20, spec, False)
    monkeypatch.setattr(experts, "_in_blocks", experts._ragged)
    np.testing.assert_allclose(apply(spec, rows, parts), one_by_one(*rows, parts, spec), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("fp8", 0), ("int4", 8)])
def test_quantised_experts_give_what_their_weights_give(monkeypatch, kind, group):
    monkeypatch.setattr(experts, "_TILE_BYTES", 600)
    rng = np.random.default_rng()
    parts = random_parts(rng, EXPERTS)
    quantise = jax.vmap(functools.partial(quantise_kernel, kind=kind, inputs=1, group=group))
    few_bits = {name: {"kernel": quantise(part["kernel"])} for name, part in parts.items()}
    stood_for = {
        name: {"kernel": np.asarray(part["kernel"].weights()).reshape(parts[name]["kernel"].shape)}
        for name, part in few_bits.items()
    }
    for n in (1, 20):
        rows = random_rows(rng, n, EXPERTS, False)
        expected = one_by_one(*rows, stood_for, EXPERTS)
        np.testing.assert_allclose(apply(EXPERTS, rows, few_bits), expected, rtol=0, atol=2e-5)


def test_experts_lower_for_every_platform():
    for n in (1, 40):
        rows, parts = (
            random_rows(np.random.default_rng(), n, BIASED, False),
            random_parts(np.random.default_rng(), BIASED),
        )
        function = functools.partial(experts.apply_experts, device=0, spec=BIASED, config=config_of(BIASED))
        exported = jax.export.export(jax.jit(function), platforms=("cpu", "cuda", "tpu"))(rows, parts)
        assert exported.out_avals[0].shape == (n, D)
        assert ("ragged_dot" in exported.mlir_module()) == (n > 1)


# Wide enough that nothing of the kernels stays in a cache by chance.
WIDE = ModelConfig(
    vocab=2048, width=512, layers=2, heads=4, kv_heads=4, head_width=320, ffn_width=1,
    experts=Experts(number=8, active=2, width=4096, layers=(0, 1)),
)  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_reads_the_experts_that_its_tokens_take(rows):
    """At batch 1 at most 1.3 times the bytes of the parameters that a token takes (8 experts, 2 active)."""
    params = transformer.abstract_params(WIDE)
    cached = jax.ShapeDtypeStruct((rows, WIDE.kv_heads, WIDE.head_width, 32), jnp.float32)
    cache = Cache((LayerCache(cached, cached),) * WIDE.layers, 32)
    ids, slot = jax.ShapeDtypeStruct((rows,), jnp.int32), jax.ShapeDtypeStruct((), jnp.int32)

    def step(params, ids_b, cache, slot):
        model = Model(WIDE, params)
        seen = visible(cache, WIDE, jnp.zeros_like(ids_b), slot)
        hidden, cache = model.decode_step(ids_b, ids_b, cache, slot, seen)
        return jnp.argmax(model.logits(hidden), axis=-1), cache

    compiled = jax.jit(step, donate_argnums=2).lower(params, ids, cache, slot).compile()
    module = hlo.parse(compiled.as_text())
    active = transformer.active_bytes(WIDE)
    read = module.bytes_read(module.entry, experts._TILE_BYTES)
    every = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    if rows == 1:
        assert 0.9 <= read / active <= 1.3
    else:  # three rows of two experts: what six experts would be is an upper bound
        assert read <= 1.05 * transformer.active_bytes(WIDE, rows=6)
    assert read < 0.9 * every
    # No copy of an expert's kernel, of 8 MiB, is made.
    assert compiled.memory_analysis().temp_size_in_bytes < 2**23


def test_active_bytes_by_hand():
    spec = dataclasses.replace(EXPERTS, layers=(1,), shared_width=6, shared_gate=True)
    config = config_of(spec, tied_head=True)
    attention, dense, one = D * 4 * 12, 3 * D * 24, 3 * D * 24
    whole = config.vocab * D + 2 * (attention + 2 * D) + D + dense + D * 5 + 3 * D * 6 + D
    assert transformer.active_bytes(config) == pytest.approx(4 * (whole + 2 * one), abs=1)
    assert transformer.active_bytes(config, rows=2) == pytest.approx(4 * (whole + (1 - 0.6**2) * 5 * one), abs=1)


@pytest.fixture
def lm(make_lm):
    spec = dataclasses.replace(EXPERTS, layers=(1,), shared_width=6, shared_gate=True)
    return make_lm(3, width=D, experts=spec, attention_sinks=True)


def test_filling_changes_nothing(lm):
    ids, mask = np.arange(12).reshape(2, 6), np.ones((2, 6), int)
    mask[1, :4] = 0
    before = np.asarray(lm.logits(ids, mask))
    changed = ids.copy()
    changed[1, :4] = 7
    np.testing.assert_allclose(np.asarray(lm.logits(changed, mask))[mask > 0], before[mask > 0], rtol=0, atol=2e-5)


def test_gradients_of_experts_and_router_are_those_of_differences():
    rng = np.random.default_rng(0)
    parts = random_parts(rng, EXPERTS)
    x, ids, weights = random_rows(rng, 9, EXPERTS, False)
    config = config_of(EXPERTS)

    def loss(x: Any, weights: Any, parts: Any) -> Any:
        rows = (x, jnp.asarray(ids), weights)
        return jnp.sum(jnp.sin(experts.apply_experts(rows, parts, 0, spec=EXPERTS, config=config)))

    def exact(x: Any, weights: Any, parts: Any) -> float:
        return float(np.sin(one_by_one(x, ids, weights, parts, EXPERTS)).sum())

    given = (x, weights, parts)
    directions = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), given)
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)
    slope = sum(np.sum(g * d) for g, d in zip(*map(jax.tree.leaves, (gradients, directions)), strict=True))

    def moved(step: float) -> Any:
        return jax.tree.map(lambda leaf, d: leaf.astype(np.float64) + step * d, given, directions)

    assert slope == pytest.approx((exact(*moved(1e-5)) - exact(*moved(-1e-5))) / 2e-5, rel=1e-4)


def test_adapters_change_attention_and_shared_experts_and_no_others(lm):
    linears = transformer.linears(lm.config)
    assert {path.split(".", 2)[2] for path in linears if path.startswith("layers.1.")} == {
        *(f"attention.{name}" for name in "qkvo"),
        *(f"ffn.shared.{name}" for name in ("gate", "up", "down")),
        "ffn.shared_gate",
    }
    settings = rj.LoraConfig(rank=2, targets=("q", "v", r"layers\.1\.ffn\.shared\..*"))
    factors = lora.init(settings, linears, jax.random.key(0))
    factors = jax.tree.map(lambda leaf: leaf + 0.1, factors)
    stack = lora.stack([lora.Adapter(settings, factors)])
    ids = jnp.arange(10).reshape(2, 5)
    adapted = Model(lm.config, lm.params, lora.for_rows(stack, np.ones((2, 1), np.float32)))
    merged = Model(lm.config, lora.merge(lm.params, stack, [1.0]))
    values = [np.asarray(jax.jit(Model.forward)(model, ids, jnp.ones_like(ids))[0]) for model in (adapted, merged)]
    np.testing.assert_allclose(*values, rtol=0, atol=2e-5)
    assert np.abs(values[0] - np.asarray(lm.hidden(ids))).max() > 0.01
    with pytest.raises(InputError, match="experts"):
        dataclasses.replace(settings, targets=(r"layers\.1\.ffn\.experts\.up",)).select(linears)


def stored(directory, family, case):
    it = hf.read_stored(family, case)
    hf.write_checkpoint(directory, it.config, it.tensors, it.seed)
    return directory


def test_an_expert_that_is_missing_or_too_much_is_named(tmp_path):
    whole = stored(tmp_path / "whole", "qwen3_moe", "wide_heads")
    tensors = load_file(whole / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    save_file({key: value for key, value in tensors.items() if key != name}, cut / "model.safetensors")
    with pytest.raises(InputError, match=f"missing: {name}"):
        rj.load(cut)
    raw = json.loads((whole / "config.json").read_text())
    for fields, told in (
        ({"num_experts": 4}, r"unexpected: model.layers.0.mlp.experts.4"),
        ({"num_experts_per_tok": 9}, "cannot take 9 of 5 experts"),
        ({"num_experts": 0}, "experts = 0"),
    ):
        (cut / "config.json").write_text(json.dumps(raw | fields))
        with pytest.raises(InputError, match=told):
            rj.load(cut)


def test_adapters_of_experts_are_refused_by_name(tmp_path):
    lm = rj.load(stored(tmp_path / "base", "qwen3_moe", "wide_heads"))
    module = "model.layers.0.mlp.experts.2.down_proj"
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4})
    )
    sizes = {"A": (2, 9), "B": (12, 2)}
    factors = {
        f"base_model.model.{module}.lora_{side}.weight": np.ones(size, np.float32) for side, size in sizes.items()
    }
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(InputError, match=f"2 on experts, where LoRA is not supported: .*{module}"):
        rj.Ensemble.from_adapters(lm, [str(tmp_path / "adapter")])


@pytest.mark.parametrize(("family", "case"), [("qwen2_moe", "shared"), ("gpt_oss", "clamped")])
def test_quantised_on_loading(tmp_path, family, case):
    """Tensors of one expert each, and of all: int8 is near, the router is exact, and what is saved is what is held."""
    directory = stored(tmp_path / "plain", family, case)
    plain, few_bits = rj.load(directory), rj.load(directory, quantise="int8")
    ids = np.arange(14).reshape(2, 7)
    exact, near = (np.asarray(lm.hidden(ids)) for lm in (plain, few_bits))
    assert 0 < np.abs(near - exact).mean() < 0.03 * np.abs(exact).mean()
    held, router = (
        few_bits.params["layers"][0]["ffn"][name]["kernel" if name == "router" else "up"]
        for name in ("experts", "router")
    )
    np.testing.assert_array_equal(router, plain.params["layers"][0]["ffn"]["router"]["kernel"])
    kernel = plain.params["layers"][0]["ffn"]["experts"]["up"]["kernel"]
    assert held["kernel"].values.shape == kernel.shape
    for e in range(len(kernel)):
        one = quantise_kernel(kernel[e], kind="int8", inputs=1)
        np.testing.assert_array_equal(held["kernel"].values[e], one.values)
    rj.save(few_bits, tmp_path / "saved")
    again = rj.load(tmp_path / "saved").params["layers"][0]["ffn"]["experts"]
    for name, part in few_bits.params["layers"][0]["ffn"]["experts"].items():
        weights = part["kernel"].weights().reshape(again[name]["kernel"].shape)
        np.testing.assert_array_equal(again[name]["kernel"], weights)
