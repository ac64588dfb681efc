"""LoRA adapters against PEFT, against sums worked out in numpy, and what is refused.

Stored references (tests.data.make_adapters) are adapters that PEFT saved with the logits that PEFT and transformers
compute; where torch and peft are installed, fresh random ones are compared in both directions, and messages name the
seed that RLAE_JAX_TEST_SEED repeats.
"""

import dataclasses
import json
import os
import re
import secrets
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.models import lm as lm_module
from rlae_jax.models import lora, transformer
from tests.data import hf
from tests.data.make_adapters import ADAPTERS, CASES, make_adapter, refer
from tests.helpers.adapters import EVERY_LAYER, add_by_hand, leaf_at, random_adapter
from tests.helpers.telling import telling
from tests.helpers.tolerance import on_device

# The stored adapters were made for bases of other names.
pytestmark = pytest.mark.filterwarnings("ignore:.*by its shapes alone")

NO_PEFT = "peft is not installed"
# Largest absolute difference over the largest absolute value of the reference.
TOLERANCE = 2e-5
SEED = int(os.environ.get("RLAE_JAX_TEST_SEED") or secrets.randbelow(2**31))

DECODING = [name for name, family in hf.FAMILIES.items() if family.kind != "encoder"]
FUSED = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}
# The first of each kind in every run, the others unless time is short.
FAST_CASES = ("llama_patterns", "llama_head", "gpt_neox", "t5")


def slow_but(fast: tuple[str, ...], names: Any) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def close(actual: Any, expected: Any, tolerance: float = TOLERANCE) -> None:
    actual, expected = (np.asarray(x, np.float32) for x in (actual, expected))
    assert actual.shape == expected.shape
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    assert error <= tolerance, f"{error:.1e} of the largest value"


@pytest.fixture(scope="session")
def peft(torch: Any) -> Any:
    """The peft module; skips where it or torch is not installed."""
    return pytest.importorskip("peft", reason=NO_PEFT)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """base(case) -> the directory of a case's base checkpoint."""
    root = tmp_path_factory.mktemp("bases")

    def write(name: str) -> Path:
        if not (root / name).exists():
            stored = hf.Stored(**json.loads((ADAPTERS / "cases.json").read_text())[name])
            hf.write_checkpoint(root / name, stored.config, stored.tensors, stored.seed)
        return root / name

    return write


@pytest.fixture(scope="module")
def family_lm(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], rj.LM]:
    """family_lm(family) -> its first hand-picked checkpoint, loaded."""
    loaded: dict[str, rj.LM] = {}

    def load(family: str) -> rj.LM:
        if family not in loaded:
            stored = hf.read_stored(family, next(iter(hf.FAMILIES[family].cases)))
            directory = tmp_path_factory.mktemp("family") / family
            hf.write_checkpoint(directory, stored.config, stored.tensors, stored.seed)
            loaded[family] = rj.load(directory, **stored.load)
        return loaded[family]

    return load


@pytest.fixture(scope="module")
def llama(base: Callable[[str], Path]) -> rj.LM:
    return rj.load(base("llama_qv"))


def inputs_of(lm: rj.LM, seed: int = 0, batch: int = 2, length: int = 7) -> tuple[np.ndarray, ...]:
    """Ids, a mask that leaves some out, and for an encoder-decoder the decoder's ids."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[1:2, :2] = 0
    ids = rng.integers(0, lm.config.vocab, (batch, length))
    if lm.config.encoder is None:
        return ids, mask
    return ids, mask, rng.integers(0, lm.config.vocab, (batch, 5))


def real(values: Any, inputs: tuple[np.ndarray, ...]) -> np.ndarray:
    """What stands at real tokens, or at all of a decoder's."""
    values = np.asarray(values)
    return values.reshape(-1, values.shape[-1]) if len(inputs) == 3 else values[inputs[1] == 1]


class TestAgainstPeft:
    @pytest.mark.parametrize("name", slow_but(FAST_CASES, CASES))
    def test_stored_adapters_compute_what_peft_computes(self, base, name):
        with np.load(ADAPTERS / "logits.npz") as file:
            arrays = {key.removeprefix(f"{name}."): file[key] for key in file.files if key.startswith(f"{name}.")}
        inputs = tuple(
            arrays[key].astype(np.int64) for key in ("left_ids", "left_mask", "decoder_ids") if key in arrays
        )
        merged = rj.load(base(name), adapter=ADAPTERS / name)
        close(real(merged.logits(*inputs), inputs), arrays["logits"])
        unmerged = rj.load(base(name)).with_adapters([ADAPTERS / name])
        close(real(unmerged.logits(*inputs), inputs), arrays["logits"])
        assert merged.name == unmerged.name == name
        assert unmerged.adapters == (name,)

    @pytest.mark.parametrize("name", CASES)
    def test_what_is_saved_is_what_was_read(self, base, tmp_path, name):
        lm = rj.load(base(name))
        adapter = rj.load_adapter(ADAPTERS / name, lm)
        rj.save_adapter(adapter, lm, tmp_path / "saved")
        again = rj.load_adapter(tmp_path / "saved", lm)
        assert again.config.scale == pytest.approx(adapter.config.scale, rel=1e-12)
        assert again.params.keys() == adapter.params.keys()
        for path, factors in adapter.params.items():
            for side in "ab":
                np.testing.assert_allclose(again.params[path][side], factors[side], rtol=1e-6)
        assert set(os.listdir(tmp_path)) == {"saved"}

    def test_settings_are_those_of_the_file(self, base):
        lm = rj.load(base("llama_patterns"))
        adapter = rj.load_adapter(ADAPTERS / "llama_patterns", lm)
        assert (adapter.config.rank, adapter.config.alpha) == (4, 6.0)
        ranks = {path: leaf["b"].shape[0] for path, leaf in adapter.params.items()}
        assert ranks["layers.0.attention.q"] == 2
        assert ranks["layers.1.ffn.down"] == 5
        assert ranks["layers.0.ffn.down"] == 4
        assert set(ranks) == set(transformer.linears(lm.config)) - {"head"} == set(adapter.config.targets)

    def test_an_adapter_of_the_bare_model(self, base, tmp_path):
        """Trained without a head, its modules lack the prefix; patterns are matched against the names in the file."""
        lm = rj.load(base("llama_patterns"))
        shutil.copytree(ADAPTERS / "llama_patterns", tmp_path / "bare")
        tensors = load_file(tmp_path / "bare" / "adapter_model.safetensors")
        tensors = {key.replace("base_model.model.model.", "base_model.model."): x for key, x in tensors.items()}
        save_file(tensors, tmp_path / "bare" / "adapter_model.safetensors")
        raw = json.loads((tmp_path / "bare" / "adapter_config.json").read_text())
        for pattern in ("alpha_pattern", "rank_pattern"):
            raw[pattern] = {re.sub(r"^(\^?)model\\?\.", r"\1", key): value for key, value in raw[pattern].items()}
        (tmp_path / "bare" / "adapter_config.json").write_text(json.dumps(raw))
        bare, whole = (rj.load_adapter(path, lm) for path in (tmp_path / "bare", ADAPTERS / "llama_patterns"))
        chex.assert_trees_all_equal(bare.params, whole.params)

    @pytest.mark.parametrize("family", FUSED)
    def test_fused_modules_with_factors_of_their_own(self, family_lm, tmp_path, family):
        """Different A's for q, k, v become one block-diagonal pair, which is taken apart again."""
        lm = family_lm(family)
        adapter = random_adapter(lm, 3, rank=2)
        del adapter.params["layers.1.attention.k"]
        rj.save_adapter(adapter, lm, tmp_path / "saved")
        stored = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        a, also = (
            next(x for key, x in stored.items() if f".{i}." in key and FUSED[family] in key and "lora_A" in key)
            for i in (0, 1)
        )
        assert (a.shape, also.shape) == ((6, lm.config.width), (4, lm.config.width))
        raw = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
        assert sorted(raw["rank_pattern"].values()) == sorted([6, 4] + ([4, 4] if family == "phi3" else []))
        assert raw["fan_in_fan_out"] == (family == "gpt2")
        again = rj.load_adapter(tmp_path / "saved", lm)
        assert again.params.keys() == adapter.params.keys()
        chex.assert_trees_all_close(again.params, adapter.params, rtol=1e-6)

    @pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
    def test_fused_modules_of_layers_with_a_state(self, family_lm, tmp_path, family):
        """q, k and v of linear attention differ in width; a gate shares a module with the queries, head by head."""
        lm = family_lm(family)
        adapter = random_adapter(lm, 3, rank=2)
        rj.save_adapter(adapter, lm, tmp_path / "saved")
        again = rj.load_adapter(tmp_path / "saved", lm)
        assert again.params.keys() == adapter.params.keys()
        chex.assert_trees_all_close(again.params, adapter.params, rtol=1e-6)

    def test_a_fresh_adapter_survives_saving(self, family_lm, tmp_path):
        """B is zero everywhere: nothing tells whose ranks are whose, and none may be dropped."""
        lm = family_lm("gpt2")
        rj.save_adapter(rj.init_adapter(lm, rj.LoraConfig(rank=2)), lm, tmp_path / "saved")
        again = rj.load_adapter(tmp_path / "saved", lm)
        assert again.params.keys() == set(transformer.linears(lm.config)) - {"head"}
        assert all(np.any(leaf["a"]) and not np.any(leaf["b"]) for leaf in again.params.values())

    def test_kernels_of_experts_do_not_say_how_those_of_adapters_lie(self, family_lm, tmp_path):
        lm = family_lm("llama4")
        rj.save_adapter(rj.init_adapter(lm, rj.LoraConfig(rank=2)), lm, tmp_path / "saved")
        assert not json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["fan_in_fan_out"]

    def test_the_embedding_beside_the_factors(self, base, tmp_path, raises_input_error):
        """PEFT saves it when the head is trained. The base's own is nothing new; another one is refused."""
        lm = rj.load(base("llama_head"))
        shutil.copytree(ADAPTERS / "llama_head", tmp_path / "kept")
        file = tmp_path / "kept" / "adapter_model.safetensors"
        tensors = load_file(file)
        tensors["base_model.model.model.embed_tokens.weight"] = np.asarray(lm.params["embedding"])
        save_file(tensors, file)
        kept, plain = (rj.load_adapter(path, lm) for path in (tmp_path / "kept", ADAPTERS / "llama_head"))
        chex.assert_trees_all_equal(kept.params, plain.params)
        half = rj.load(base("llama_head"), dtype="bfloat16")
        assert rj.load_adapter(tmp_path / "kept", half).params.keys() == plain.params.keys()
        for name in ("model.embed_tokens", "lm_head.base_layer"):
            save_file(
                tensors | {f"base_model.model.{name}.weight": tensors[f"base_model.model.{name}.weight"] * 2}, file
            )
            raises_input_error(
                lambda: rj.load_adapter(tmp_path / "kept", lm), "1 changed from the base", f"{name}.weight"
            )
        longer = {"base_model.model.model.embed_tokens.weight": np.zeros((50, 12), np.float32)}
        save_file(tensors | longer, file)
        raises_input_error(lambda: rj.load_adapter(tmp_path / "kept", lm), "1 changed from the base")

    def test_either_name_of_a_head(self, family_lm, tmp_path):
        """GPT-NeoX's is embed_out in checkpoints and in older adapters, and lm_head in memory and in newer ones."""
        lm = family_lm("gpt_neox")
        adapter = random_adapter(lm, 0, targets=("head", "o"))
        rj.save_adapter(adapter, lm, tmp_path / "new")
        tensors = load_file(tmp_path / "new" / "adapter_model.safetensors")
        assert "base_model.model.lm_head.lora_A.weight" in tensors
        shutil.copytree(tmp_path / "new", tmp_path / "old")
        older = {key.replace("lm_head", "embed_out"): x for key, x in tensors.items()}
        (tmp_path / "old" / "digests.json").unlink()
        save_file(older, tmp_path / "old" / "adapter_model.safetensors")
        for name in ("new", "old"):
            chex.assert_trees_all_equal(rj.load_adapter(tmp_path / name, lm).params, adapter.params)

    def test_a_hub_adapter_has_the_name_of_its_repository(self, llama, monkeypatch):
        monkeypatch.setattr(lm_module.hub, "resolve", lambda name: ADAPTERS / "llama_qv")
        assert rj.load_adapter("someone/kind-words", llama).name == "kind-words"


class TestLive:
    """Random configurations of every family with random adapters, in both directions."""

    @pytest.mark.parametrize("family", DECODING)
    def test_peft_to_here(self, peft, tmp_path, family):
        seed = zlib.crc32(f"{SEED} {family} adapter".encode())
        rng = np.random.default_rng(seed)
        case = hf.FAMILIES[family].sample(rng)
        with telling(f"RLAE_JAX_TEST_SEED={SEED} {family} {case}"):
            model, stored = hf.build(family, case, seed, tmp_path / "base")
            inputs = hf.make_inputs(seed, hf.FAMILIES[family].kind, stored.config, stored.token_types)
            linear = _linear_names(model)
            chosen = [name for name in linear if rng.random() < 0.5] or linear
            fields = {
                "r": int(rng.integers(1, 5)),
                "lora_alpha": int(rng.integers(1, 9)),
                "target_modules": chosen if rng.random() < 0.7 else "all-linear",
                "use_rslora": bool(rng.random() < 0.3),
                "rank_pattern": {name: int(rng.integers(1, 6)) for name in chosen if rng.random() < 0.3},
                "alpha_pattern": {name: int(rng.integers(1, 9)) for name in chosen if rng.random() < 0.3},
                "fan_in_fan_out": family == "gpt2",
            }
            with telling(str(fields)):
                make_adapter(model, tmp_path / "adapter", seed, **fields)
                expected = refer(model, hf.FAMILIES[family].kind, inputs)
                given = tuple(inputs[key] for key in ("left_ids", "left_mask", "decoder_ids") if key in inputs)
                merged = rj.load(tmp_path / "base", adapter=tmp_path / "adapter", **stored.load)
                close(real(merged.logits(*given), given), expected)
                unmerged = rj.load(tmp_path / "base", **stored.load).with_adapters([tmp_path / "adapter"])
                close(real(unmerged.logits(*given), given), expected)

    @pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")  # a T5 whose head is its own
    @pytest.mark.parametrize("family", DECODING)
    def test_here_to_peft(self, peft, tmp_path, family):
        seed = zlib.crc32(f"{SEED} {family} saved".encode())
        rng = np.random.default_rng(seed)
        case = hf.FAMILIES[family].sample(rng)
        with telling(f"RLAE_JAX_TEST_SEED={SEED} {family} {case}"):
            model, stored = hf.build(family, case, seed, tmp_path / "base")
            inputs = hf.make_inputs(seed, hf.FAMILIES[family].kind, stored.config, stored.token_types)
            lm = rj.load(tmp_path / "base", **stored.load)
            paths = [path for path in transformer.linears(lm.config) if rng.random() < 0.6]
            adapter = random_adapter(lm, seed, rank=2, alpha=3.0, targets=paths or None, name="ours")
            rj.save_adapter(adapter, lm, tmp_path / "ours")
            wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "ours").eval()
            trained = {name for name, _ in wrapped.named_parameters() if ".lora_" in name}
            stored_names = load_file(tmp_path / "ours" / "adapter_model.safetensors").keys()
            assert {name.replace(".default", "") for name in trained} == stored_names
            given = tuple(inputs[key] for key in ("left_ids", "left_mask", "decoder_ids") if key in inputs)
            ours = real(lm.with_adapters([adapter]).logits(*given), given)
            close(ours, refer(model, hf.FAMILIES[family].kind, inputs))


def _linear_names(model: Any) -> list[str]:
    """The last parts of the names of a torch model's linear layers but a tied head."""
    embedding, kinds = model.get_input_embeddings().weight, ("Linear", "Conv1D")
    linear = [(name, module) for name, module in model.named_modules() if type(module).__name__ in kinds]
    return sorted({name.rsplit(".", 1)[-1] for name, module in linear if module.weight is not embedding})


class TestFactors:
    @pytest.mark.parametrize(
        ("einsum", "down", "up"),
        [
            ("btd,df->btf", "btd,dz->btz", "btz,zf->btf"),
            ("btd,dnh->btnh", "btd,dz->btz", "btz,znh->btnh"),
            ("btnh,nhd->btd", "btnh,nhz->btz", "btz,zd->btd"),
            ("btc,cd->btd", "btc,cz->btz", "btz,zd->btd"),
        ],
    )
    def test_einsums_by_hand(self, einsum, down, up):
        assert lora.factor_einsums(einsum) == (down, up)

    @pytest.mark.parametrize("family", DECODING)
    def test_every_layer_of_every_family(self, family_lm, family):
        """Factors of the shapes that the einsums say compute x A B."""
        lm = family_lm(family)
        for path, (einsum, shape, _) in transformer.linears(lm.config).items():
            spec = transformer.linears(lm.config)[path]
            rng = np.random.default_rng(0)
            x = rng.normal(size=(2, 3, *shape[: spec.inputs]))
            factors = lora.init(rj.LoraConfig(rank=2, targets=(path,)), {path: spec}, jax.random.key(0))[path]
            a, b = np.asarray(factors["a"]), rng.normal(size=factors["b"].shape)
            assert a.shape == (*shape[: spec.inputs], 2)
            assert b.shape == (2, *shape[spec.inputs :])
            down, up = lora.factor_einsums(einsum)
            through = np.einsum(up, np.einsum(down, x, a), b)
            kernel = np.tensordot(a, b, axes=1)
            assert kernel.shape == leaf_at(lm.params, path)["kernel"].shape == shape
            np.testing.assert_allclose(through, np.einsum(einsum, x, kernel), atol=1e-6)


class TestTargets:
    PATHS = ("layers.0.attention.q", "layers.0.attention.k", "layers.1.attention.q", "layers.1.ffn.up", "head")

    def select(self, targets):
        return rj.LoraConfig(targets=targets).select(self.PATHS)

    def test_none_is_everything_but_the_head(self):
        assert self.select(None) == list(self.PATHS[:-1])

    def test_names_match_the_end_of_a_path(self):
        assert self.select(("q",)) == ["layers.0.attention.q", "layers.1.attention.q"]
        assert self.select(("attention.k", "head")) == ["layers.0.attention.k", "head"]
        assert self.select(("layers.1.ffn.up", "up")) == ["layers.1.ffn.up"]

    def test_regular_expressions_match_all_of_it(self):
        assert self.select((r"layers\.0\..*",)) == list(self.PATHS[:2])
        assert self.select((r"layers\.\d\.attention\.[qk]", "up")) == list(self.PATHS[:4])
        assert self.select(EVERY_LAYER) == list(self.PATHS)

    @pytest.mark.parametrize(
        ("targets", "parts"),
        [
            (("q", "q_proj", "layers"), ("['q_proj', 'layers'] match no linear layer", "head, k, q, up")),
            (("tention.q",), ("['tention.q']",)),
            (("(q",), ("not a regular expression",)),
            ("attention.q", ("a tuple of at least one name", "'attention.q'")),
            ((), ("a tuple of at least one name",)),
        ],
    )
    def test_what_matches_nothing_is_refused(self, raises_input_error, targets, parts):
        raises_input_error(lambda: self.select(targets), *parts)

    def test_settings(self, raises_input_error):
        for fields in ({"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}):
            raises_input_error(lambda fields=fields: rj.LoraConfig(**fields), "expected a")


@pytest.fixture(scope="module")
def tiny(make_lm) -> rj.LM:
    return make_lm(0, sharpness=1.0, layers=1)


@pytest.fixture(scope="module")
def trio(tiny) -> list[rj.Adapter]:
    """Three adapters of one rank, of different scales and layers; all layers, the head included, are changed."""
    return [
        random_adapter(tiny, 1, targets=EVERY_LAYER),
        random_adapter(tiny, 2, alpha=1.5, targets=("q", "v", "head")),
        random_adapter(tiny, 3, alpha=6.0, targets=("o", r"layers\.0\.ffn\..*")),
    ]


@pytest.fixture(scope="module")
def stacked(tiny, trio) -> rj.LM:
    return tiny.with_adapters(trio)


B = 4


@pytest.fixture(scope="module")
def text(tiny) -> tuple[np.ndarray, ...]:
    return inputs_of(tiny, batch=B)


class TestArithmetic:
    """Tests share two programs, with adapters and without; nearly all the time is their compilation."""

    def test_rows_of_weights(self, tiny, trio, stacked, text):
        weights = np.array([[1, 0, 0], [0.5, 0.25, -1], [0, 0, 0], [0, 2, 0.3]], np.float32)
        logits = np.asarray(stacked.logits(*text, adapters=weights))
        for b, row in enumerate(weights):
            merged = dataclasses.replace(tiny, params=add_by_hand(tiny, trio, row))
            close(logits[b], merged.logits(*text)[b])
            ours = dataclasses.replace(tiny, params=lora.merge(tiny.params, stacked.stack, row))
            close(logits[b], ours.logits(*text)[b])
        assert np.abs(logits[0] - logits[2]).max() > 0.1 * np.abs(logits).max()

    @pytest.mark.device
    def test_rows_that_use_different_adapters(self, stacked, text):
        """Each row is as if all used its adapter, whatever the others use; numbers, names and weights say the same."""
        mixed = np.asarray(stacked.logits(*text, adapters=[2, 0, 1, 0]))
        for m in range(3):
            rows = np.array([2, 0, 1, 0]) == m
            close(mixed[rows], np.asarray(stacked.logits(*text, adapters=[m] * B))[rows], on_device(1e-6, 2e-5))
        ids, mask = (x.copy() for x in text)
        ids[1:], mask[1:] = 5, 1
        np.testing.assert_array_equal(stacked.logits(ids, mask, adapters=[2, 1, 1, 1])[0], mixed[0])
        names = [stacked.adapters[m] for m in (2, 0, 1, 0)]
        for choice in (
            names,
            np.array(names),
            np.array([2, 0, 1, 0]),
            jnp.array([2, 0, 1, 0]),
            np.eye(3)[[2, 0, 1, 0]],
        ):
            np.testing.assert_array_equal(stacked.logits(*text, adapters=choice), mixed)

    def test_zeros_and_fresh_adapters_leave_the_base(self, tiny, trio, stacked, text):
        plain = tiny.logits(*text)
        close(stacked.logits(*text, adapters=np.zeros((B, 3))), plain, 1e-6)
        fresh = [rj.init_adapter(tiny, trio[0].config, seed=seed) for seed in range(3)]
        close(tiny.with_adapters(fresh).logits(*text, adapters=[0, 1, 2, 0]), plain, 1e-6)
        for leaf in jax.tree.leaves([adapter.params for adapter in fresh]):
            assert leaf.dtype == jnp.float32
        down = [adapter.params["layers.0.ffn.down"]["a"] for adapter in fresh]
        bound = tiny.config.ffn_width**-0.5
        assert 0.8 * bound < np.abs(down).max() <= bound
        assert not np.array_equal(down[0], down[1])
        gate, up = (fresh[0].params[f"layers.0.ffn.{name}"]["a"] for name in ("gate", "up"))
        assert not np.array_equal(gate, up)

    def test_merging_and_its_inverse(self, tiny, trio, stacked):
        weights = np.array([0.7, -0.2, 1.1], np.float32)
        merged = lora.merge(tiny.params, stacked.stack, weights)
        jax.tree.map(lambda one, other: close(one, other, 1e-6), merged, add_by_hand(tiny, trio, weights))
        q, base_q = (params["layers"][0]["attention"]["q"]["kernel"] for params in (merged, tiny.params))
        assert np.abs(q - base_q).max() > 0.1
        back = lora.merge(merged, stacked.stack, -weights)
        jax.tree.map(lambda one, other: close(one, other, 1e-6), back, tiny.params)
        one = tiny.with_adapter(trio[0])
        jax.tree.map(lambda x, y: close(x, y, 1e-6), one.params, add_by_hand(tiny, trio[:1], [1.0]))
        assert (one.name, one.stack, tiny.name) == (trio[0].name, None, "tiny-0")

    def test_adapters_of_different_rank(self, tiny, text, trio):
        """Padded, with a warning that names them; the smaller computes the same."""
        wide = random_adapter(tiny, 9, rank=5, targets=("q", "down"), name=trio[0].name)
        told = f"padded with zeros to 5: {trio[0].name} 3, {trio[0].name} 5, {trio[1].name} 3"
        with pytest.warns(UserWarning, match=told):
            lm = tiny.with_adapters([trio[0], wide, trio[1]])
        assert {leaf["b"].shape[:2] for leaf in lm.stack.params.values()} == {(3, 5)}
        logits = np.asarray(lm.logits(*text, adapters=[0, 1, 2, 1]))
        for rows, adapter in (([0], trio[0]), ([1, 3], wide), ([2], trio[1])):
            merged = dataclasses.replace(tiny, params=add_by_hand(tiny, [adapter], [1.0]))
            close(logits[rows], np.asarray(merged.logits(*text))[rows])

    def test_hidden_states_and_log_probs(self, tiny, trio, stacked, text):
        ids, _ = text
        merged = dataclasses.replace(tiny, params=add_by_hand(tiny, trio[1:2], [1.0]))
        close(real(stacked.hidden(*text, adapters=[1] * B), text), real(merged.hidden(*text), text))
        logits = np.asarray(stacked.logits(*text, adapters=[1] * B))[:, :-1]
        expected = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), ids[:, 1:, None], axis=-1)[..., 0]
        close(stacked.log_probs(*text, adapters=[1] * B), expected)

    @pytest.mark.slow
    def test_a_bfloat16_base(self, make_lm, tiny, trio, text):
        """Rounds the factors' products as it rounds its own, and stays within its own error."""
        half = make_lm(0, sharpness=1.0, layers=1, dtype="bfloat16")
        exact = np.asarray(dataclasses.replace(tiny, params=add_by_hand(tiny, trio[:1], [1.0])).logits(*text))
        merged, unmerged = half.with_adapter(trio[0]), half.with_adapters(trio[:1])
        assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(merged.params))
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(unmerged.stack))
        errors = [np.sqrt(np.mean((np.asarray(lm.logits(*text)) - exact) ** 2)) for lm in (merged, unmerged)]
        scale = np.sqrt(np.mean(exact**2))
        assert 0 < errors[0] < 0.03 * scale
        assert 0 < errors[1] < 1.5 * errors[0]

    @pytest.mark.parametrize("family", slow_but(("opt",), DECODING))
    def test_every_family(self, family_lm, family):
        lm = family_lm(family)
        inputs = inputs_of(lm)
        adapters = [random_adapter(lm, seed, rank=2, targets=EVERY_LAYER) for seed in (1, 2)]
        logits = lm.with_adapters(adapters).logits(*inputs, adapters=[[0.5, 0.5], [-1.0, 1.0]])
        for b, weights in enumerate(([0.5, 0.5], [-1.0, 1.0])):
            merged = dataclasses.replace(lm, params=add_by_hand(lm, adapters, weights))
            kept = slice(None) if len(inputs) == 3 else inputs[1][b] == 1
            close(np.asarray(logits)[b][kept], np.asarray(merged.logits(*inputs))[b][kept])


class TestBlocks:
    """Of M blocks of rows block m uses adapter m: one-hot rows of `for_rows` without the other adapters' products."""

    def test_of_a_decoder(self, tiny, trio, stacked):
        ids, mask = inputs_of(tiny, batch=6)
        blocks = lora.for_blocks(stacked.stack)
        rows = lora.for_rows(stacked.stack, np.repeat(np.eye(3), 2, axis=0))

        @jax.jit
        def hidden(adapters: lora.Adapters) -> Any:
            return transformer.Model(tiny.config, tiny.params, adapters).forward(ids, mask)[0]

        found = np.asarray(hidden(blocks))
        close(found[mask == 1], np.asarray(hidden(rows))[mask == 1], 1e-5)
        for m in range(3):
            merged = dataclasses.replace(tiny, params=add_by_hand(tiny, trio[m : m + 1], [1.0]))
            own = slice(2 * m, 2 * m + 2)
            close(found[own][mask[own] == 1], np.asarray(merged.hidden(ids, mask))[own][mask[own] == 1])
        predicted = [
            transformer.Model(tiny.config, tiny.params, adapters).logits(jnp.asarray(found))
            for adapters in (blocks, rows)
        ]
        close(*predicted, 1e-5)  # adapters may change the head

    def test_dropout(self, tiny, stacked):
        """A key per row draws for the row what it draws in `for_rows`."""
        ids, mask = inputs_of(tiny, batch=6)
        drop = {"dropout": 0.4, "key": jax.random.split(jax.random.key(3), 6)}
        blocks = lora.for_blocks(stacked.stack, **drop)
        rows = lora.for_rows(stacked.stack, np.repeat(np.eye(3), 2, axis=0), **drop)
        hidden = jax.jit(lambda adapters: transformer.Model(tiny.config, tiny.params, adapters).forward(ids, mask)[0])
        one, other, plain = (
            np.asarray(hidden(adapters))[mask == 1] for adapters in (blocks, rows, lora.for_blocks(stacked.stack))
        )
        close(one, other, 1e-5)
        assert np.abs(one - plain).max() > 0.01 * np.abs(plain).max()

    def test_of_an_encoder_decoder(self, family_lm):
        """The encoder reads a prompt once for all decoder rows that answer it."""
        lm = family_lm("t5")
        adapters = [random_adapter(lm, seed, rank=2, targets=EVERY_LAYER) for seed in (1, 2)]
        stack = lm.with_adapters(adapters).stack
        ids, mask, _ = inputs_of(lm, batch=4)
        decoder_ids = np.random.default_rng(1).integers(0, lm.config.vocab, (12, 5))  # three for each prompt

        @jax.jit
        def hidden(used: lora.Adapters, ids: Any, mask: Any) -> Any:
            return transformer.Model(lm.config, lm.params, used).forward(
                ids, mask, decoder_ids=jnp.asarray(decoder_ids)
            )[0]

        found = np.asarray(hidden(lora.for_blocks(stack), ids, mask))
        each = [np.repeat(x, 3, axis=0) for x in (ids, mask)]
        close(found, hidden(lora.for_rows(stack, np.repeat(np.eye(2), 6, axis=0)), *each), 1e-5)
        close(found, hidden(lora.for_blocks(stack), *each), 1e-5)
        for m in range(2):
            merged = dataclasses.replace(lm, params=add_by_hand(lm, adapters[m : m + 1], [1.0]))
            own = slice(6 * m, 6 * m + 6)
            close(found[own], np.asarray(merged.hidden(*each, decoder_ids))[own])


class TestDropout:
    RATE = 0.3

    def factors(self, n: int) -> tuple[lora.Stack, np.ndarray]:
        """Two layers whose adapters are the identity, so that what they add is their input with some entries gone."""
        eye = jnp.eye(n)[None]
        return lora.Stack({path: {"a": eye, "b": eye} for path in ("one", "two")}, jnp.ones(1)), np.ones((2, 1))

    def dropped(self, path: str, key: Any, x: jax.Array) -> jax.Array:
        stack, weights = self.factors(x.shape[-1])
        adapters = lora.for_rows(stack, weights, dropout=self.RATE, key=key)
        return lora.low_rank_delta(adapters, path, "btd,df->btf", None)(x)

    def test_masks(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50, 40)), jnp.float32)
        out = np.asarray(self.dropped("one", jax.random.key(1), x))
        gone = out == 0
        np.testing.assert_allclose(out[~gone], np.asarray(x)[~gone] / (1 - self.RATE), rtol=1e-5)
        assert abs(gone.mean() - self.RATE) < 4 * np.sqrt(self.RATE * (1 - self.RATE) / gone.size)
        np.testing.assert_array_equal(out, self.dropped("one", jax.random.key(1), x))
        expected = self.RATE**2 + (1 - self.RATE) ** 2  # how often two independent masks agree
        for other in (self.dropped("two", jax.random.key(1), x), self.dropped("one", jax.random.key(2), x)):
            agree = ((np.asarray(other) == 0) == gone).mean()
            assert abs(agree - expected) < 4 * np.sqrt(expected * (1 - expected) / gone.size)
        assert abs(((gone[0] == gone[1]).mean()) - expected) < 4 * np.sqrt(expected * (1 - expected) / gone[0].size)

    @pytest.mark.slow
    def test_the_mean_is_preserved(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)
        keys = jax.random.split(jax.random.key(0), 4000)
        many = np.asarray(jax.vmap(lambda key: self.dropped("one", key, x))(keys))
        error = np.abs(many.mean(axis=0) - np.asarray(x)) / (many.std(axis=0) / np.sqrt(len(keys)))
        assert error.max() < 5

    def test_only_with_a_key(self, tiny, trio, stacked, text):
        weights = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
        assert lora.for_rows(stacked.stack, weights, dropout=0.5).dropout == ()
        assert lora.for_rows(stacked.stack, weights, key=jax.random.key(0)).dropout == ()

        @jax.jit
        def hidden(key: Any) -> Any:
            adapters = lora.for_rows(stacked.stack, weights, dropout=0.5, key=key)
            return transformer.Model(tiny.config, tiny.params, adapters).forward(*map(jnp.asarray, text))[0]

        first, again, other = (np.asarray(hidden(jax.random.key(seed))) for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        plain = np.asarray(stacked.hidden(*text, adapters=weights))
        for one, two in ((first, other), (first, plain), (other, plain)):
            assert np.abs(one - two).max() > 0.05 * np.abs(plain).max()


class TestGradients:
    @pytest.fixture(scope="class")
    def loss(self, tiny, stacked, text):
        ids, mask = (jnp.asarray(x) for x in text)

        def mean_log_prob(params):
            log_probs = jax.nn.log_softmax(tiny.apply(params, ids, mask)[:, :-1])
            return -jnp.mean(jnp.take_along_axis(log_probs, ids[:, 1:, None], axis=-1))

        return mean_log_prob

    WEIGHTS = (0.6, 0.0, -0.8)

    @pytest.mark.device
    def test_they_are_the_kernels_gradients_seen_through_the_factors(self, tiny, trio, stacked, text, loss):
        """With G the gradient of the merged kernel, those of A and B are w s G B^T and w s A^T G."""
        weights = jnp.asarray([self.WEIGHTS])

        def of_factors(factors):
            return loss(lora.Adapted(tiny.params, lora.Stack(factors, stacked.stack.scales), weights))

        value, found = jax.jit(jax.value_and_grad(of_factors))(stacked.stack.params)
        merged = add_by_hand(tiny, trio, self.WEIGHTS)
        expected_value, of_kernels = jax.jit(jax.value_and_grad(loss))(merged)
        assert float(value) == pytest.approx(float(expected_value), rel=on_device(1e-5, 2e-4))
        for path, factors in found.items():
            g = np.asarray(leaf_at(of_kernels, path)["kernel"])
            for m, weight in enumerate(self.WEIGHTS):
                a, b = (np.asarray(stacked.stack.params[path][side][m]) for side in "ab")
                scale = weight * float(stacked.stack.scales[m])
                outputs, inputs = range(1, b.ndim), range(a.ndim - 1)
                of_a = scale * np.tensordot(g, b, axes=([a.ndim - 1 + i - 1 for i in outputs], list(outputs)))
                of_b = scale * np.tensordot(a, g, axes=(list(inputs), list(inputs)))
                largest = np.abs(g).max()
                np.testing.assert_allclose(factors["a"][m], of_a, rtol=0, atol=on_device(1e-5, 2e-4) * largest)
                np.testing.assert_allclose(factors["b"][m], of_b, rtol=0, atol=on_device(1e-5, 2e-4) * largest)
                if weight and np.any(b):
                    assert np.abs(of_a).max() > 0

        # And a few entries by finite differences, of the largest gradients, where rounding matters least.
        run = jax.jit(of_factors)
        for path, side in (("layers.0.attention.q", "a"), ("layers.0.ffn.down", "b"), ("head", "b")):
            gradient = np.asarray(found[path][side])
            index = np.unravel_index(np.abs(gradient).argmax(), gradient.shape)
            step = 3e-2

            def moved(by, path=path, side=side, index=index):
                factors = dict(stacked.stack.params)
                factors[path] = factors[path] | {side: factors[path][side].at[index].add(by)}
                return float(run(factors))

            assert (moved(step) - moved(-step)) / (2 * step) == pytest.approx(gradient[index], rel=2e-2)


class TestFingerprint:
    def test_adapters_are_told_apart(self, tiny, trio):
        """Also where only a later adapter of a stack differs, or only a B."""
        other = rj.Adapter(trio[1].config, jax.tree.map(lambda leaf: leaf * 1.5, trio[1].params))
        only_b = rj.Adapter(
            trio[1].config, {p: {"a": leaf["a"], "b": -leaf["b"]} for p, leaf in trio[1].params.items()}
        )
        rescaled = rj.Adapter(dataclasses.replace(trio[1].config, alpha=7.0), trio[1].params)
        lms = [tiny, tiny.with_adapter(trio[0]), tiny.with_adapters(trio[:1]), tiny.with_adapters(trio[:2])]
        lms += [tiny.with_adapters([trio[0], second]) for second in (other, only_b, rescaled)]
        lms += [tiny.with_adapters([trio[1], trio[0]])]
        assert len({lm.fingerprint() for lm in lms}) == len(lms)
        assert tiny.with_adapters(trio[:2]).fingerprint() == lms[3].fingerprint()


class TestBadInput:
    @pytest.fixture
    def broken(self, tmp_path):
        """broken(settings, change) -> a copy of a good adapter with other settings and other tensors."""

        def make(settings: dict[str, Any] | None = None, change: Callable[[dict], dict] | None = None) -> Path:
            directory = tmp_path / "broken"
            shutil.copytree(ADAPTERS / "llama_qv", directory)
            config, file = directory / "adapter_config.json", directory / "adapter_model.safetensors"
            config.write_text(json.dumps(json.loads(config.read_text()) | (settings or {})))
            if change is not None:
                save_file(change(load_file(file)), file)
            return directory

        return make

    def test_no_adapter(self, llama, base, tmp_path, raises_input_error):
        raises_input_error(lambda: rj.load_adapter(tmp_path, llama), "no adapter_config.json", str(tmp_path))
        raises_input_error(lambda: rj.load_adapter(tmp_path / "nowhere", llama), "nowhere does not exist")
        raises_input_error(lambda: rj.load(base("llama_qv"), adapter=tmp_path), "no adapter_config.json")

    @pytest.mark.parametrize(
        ("settings", "parts"),
        [
            ({"peft_type": "IA3"}, ("peft_type IA3", "supported: LORA")),
            ({"peft_type": None}, ("peft_type None",)),
            ({"use_dora": True}, ("use_dora = True",)),
            ({"modules_to_save": ["lm_head"]}, ("modules_to_save = ['lm_head']",)),
            ({"bias": "all", "lora_bias": True}, ("bias = all", "lora_bias = True")),
            ({"bias": "lora_only"}, ("bias = lora_only",)),
            ({"alora_invocation_tokens": [1, 2]}, ("alora_invocation_tokens",)),
            ({"layer_replication": [[0, 1], [0, 1]]}, ("layer_replication",)),
            ({"trainable_token_indices": [3]}, ("trainable_token_indices = [3]",)),
            ({"init_lora_weights": "pissa_niter_4"}, ("init_lora_weights = pissa_niter_4",)),
            ({"init_lora_weights": "olora"}, ("init_lora_weights = olora",)),
            ({"r": 0}, ("r is a number (0); expected int >= 1",)),
            ({"lora_alpha": "big"}, ("lora_alpha is a text", "big")),
            ({"alpha_pattern": {"q_proj": "big"}}, ("alpha_pattern",)),
            ({"alpha_pattern": {"(": 3}}, ("alpha_pattern", "no regular expression")),
            ({"lora_dropout": 1.5}, ("lora_dropout",)),
        ],
        ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
    )
    def test_settings(self, llama, broken, raises_input_error, settings, parts):
        directory = broken(settings)
        raises_input_error(lambda: rj.load_adapter(directory, llama), *parts)

    def test_settings_that_change_nothing_are_read(self, llama, broken):
        directory = broken({"init_lora_weights": "gaussian", "lora_dropout": 0.1, "use_dora": False, "bias": "none"})
        assert rj.load_adapter(directory, llama).config.dropout == 0.1

    def test_files(self, llama, broken, raises_input_error):
        directory = broken()
        file = directory / "adapter_model.safetensors"
        content = file.read_bytes()
        for length in (0, 4, 100, len(content) - 1):
            file.write_bytes(content[:length])
            raises_input_error(lambda: rj.load_adapter(directory, llama), "truncated or corrupt", str(file))
        file.unlink()
        raises_input_error(lambda: rj.load_adapter(directory, llama), "no adapter_model.safetensors")
        (directory / "adapter_model.bin").write_bytes(b"")
        raises_input_error(lambda: rj.load_adapter(directory, llama), "a pickle, which is never read")
        (directory / "adapter_config.json").write_text("[]")
        raises_input_error(lambda: rj.load_adapter(directory, llama), "expected a JSON object")

    def test_an_adapter_of_another_base(self, llama, family_lm, raises_input_error):
        raises_input_error(
            lambda: rj.load_adapter(ADAPTERS / "gpt2", llama),
            "does not fit this base model; it was made for tiny/gpt2",
            "18 unknown: base_model.model.transformer.h.0.attn.c_attn.lora_A.weight; ",
            "the full list is in",
        )
        other = family_lm("mistral")
        assert other.config.width == llama.config.width
        wide = family_lm("olmo2")
        raises_input_error(
            lambda: rj.load_adapter(ADAPTERS / "llama_qv", wide),
            "it was made for tiny/llama",
            "q_proj.lora_A.weight is [3, 12], the base has 24",
            " mis-shaped",
        )

    def test_an_adapter_that_fits_by_shape_alone(self, llama, tmp_path, tiny, trio):
        rj.save_adapter(trio[0], tiny, tmp_path / "adapter")
        tiny.save(tmp_path / "renamed")
        with pytest.warns(UserWarning, match="adapter was made for .*; it fits renamed by its shapes alone"):
            rj.load(tmp_path / "renamed", adapter=tmp_path / "adapter")

    def test_tensors(self, llama, broken, tmp_path, raises_input_error):
        q = "base_model.model.model.layers.0.self_attn.q_proj"

        def without(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {key: x for key, x in tensors.items() if key != f"{q}.lora_B.weight"}

        changes: list[tuple[Callable[[dict], dict], tuple[str, ...]]] = [
            (without, ("1 without its other factor: model.layers.0.self_attn.q_proj",)),
            (lambda t: t | {f"{q}.lora_B.weight": t[f"{q}.lora_B.weight"][:, :2]}, ("1 of unequal rank",)),
            (
                lambda t: t | {f"{q}.lora_A.weight": t[f"{q}.lora_A.weight"][0]},
                ("1 mis-shaped", "lora_A.weight is [12]"),
            ),
            (lambda t: t | {f"{q}.lora_B.weight": t[f"{q}.lora_B.weight"][0]}, ("1 mis-shaped", "1 of unequal rank")),
            (lambda t: t | {f"{q}.lora_A.other.weight": t[f"{q}.lora_A.weight"]}, ("1 given twice",)),
            (
                lambda t: (
                    t
                    | {
                        f"{q}.lora_A.weight": np.ones((5, 12), np.float32),
                        f"{q}.lora_B.weight": t[f"{q}.lora_B.weight"][:, :1] * np.ones((1, 5), np.float32),
                    }
                ),
                ("1 of another rank than adapter_config.json says", "q_proj has 5, not 3"),
            ),
            (lambda t: t | {f"{q}.lora_magnitude_vector": np.ones(40, np.float32)}, ("1 unknown", "magnitude")),
            (lambda t: {}, ("0 factors", "none")[1:]),
        ]
        for change, parts in changes:
            directory = broken(change=change)
            raises_input_error(lambda directory=directory: rj.load_adapter(directory, llama), *parts)
            shutil.rmtree(directory)

    def test_embeddings_and_tied_heads(self, llama, broken, stored_checkpoint, raises_input_error):
        table = "base_model.model.model.embed_tokens.lora_embedding_"
        factors = {f"{table}A": np.ones((3, 41), np.float32), f"{table}B": np.ones((12, 3), np.float32)}
        directory = broken(change=lambda tensors: tensors | factors)
        raises_input_error(
            lambda: rj.load_adapter(directory, llama), "2 on the embedding, where LoRA is not supported", table
        )
        shutil.rmtree(directory)
        head = "base_model.model.lm_head.lora_"
        factors = {f"{head}A.weight": np.ones((3, 12), np.float32), f"{head}B.weight": np.ones((41, 3), np.float32)}
        directory = broken(change=lambda tensors: tensors | factors)
        tied = rj.load(stored_checkpoint("llama3"))
        assert tied.config.tied_head
        raises_input_error(
            lambda: rj.load_adapter(directory, tied), "2 on a tied head, where LoRA is not supported", f"{head}A.weight"
        )

    def test_compiled_models(self, llama, broken):
        plain = rj.load_adapter(ADAPTERS / "llama_qv", llama)
        directory = broken(
            change=lambda t: {key.replace("model.layers", "_orig_mod.model.layers"): x for key, x in t.items()}
        )
        compiled = rj.load_adapter(directory, llama)
        assert compiled.params.keys() == plain.params.keys()

    def test_an_adapter_made_for_another_model(self, tiny, make_lm, trio, tmp_path, raises_input_error):
        wide = make_lm(1, width=20, layers=1, gated=False)
        for use in (
            lambda: wide.with_adapter(trio[0]),
            lambda: wide.with_adapters([trio[0]]),
            lambda: rj.save_adapter(trio[0], wide, tmp_path / "saved"),
        ):
            raises_input_error(use, "adapter-1 does not fit", "1 unknown layers: layers.0.ffn.gate", " mis-shaped: ")
        assert not (tmp_path / "saved").exists()
        raises_input_error(lambda: tiny.with_adapters([]), "at least one adapter")

    def test_saving(self, tiny, trio, stacked, tmp_path, raises_input_error):
        raises_input_error(
            lambda: stacked.save(tmp_path / "model"), "has adapters beside its parameters", "with_adapter"
        )
        (tmp_path / "there").mkdir()
        raises_input_error(lambda: rj.save_adapter(trio[0], tiny, tmp_path / "there"), "there exists already")
        assert os.listdir(tmp_path) == ["there"]

    @pytest.mark.parametrize(
        ("choice", "parts"),
        [
            (None, ("tiny-0 has 3 adapters (adapter-1, adapter-2, adapter-3): say which row uses which",)),
            (["adapter-1", "x", "adapter-2", "y"], ("unknown", "x, y", "adapter-1, adapter-2, adapter-3")),
            ([0, 1, 2, 3], ("numbers from 0 to 2",)),
            ([0, 1, 2, -1], ("numbers from 0 to 2",)),
            ([0, 1, 2], ("[4]", "[4, 3]", "[3]")),
            ([0.0, 1.0, 1.0, 1.0], ("[4, 3]", "float")),
            (np.ones((4, 2)), ("[4, 3]", "[4, 2]")),
            (np.full((4, 3), np.nan), ("finite",)),
            ([[1, 2], [1]], ("one number or name per row",)),
            ("adapter-1", ("one entry per row",)),
            (1, ("one entry per row",)),
        ],
        ids=str,
    )
    def test_choices(self, stacked, text, raises_input_error, choice, parts):
        raises_input_error(lambda: stacked.logits(*text, adapters=choice), *parts)

    def test_a_choice_without_adapters_or_between_namesakes(self, tiny, trio, text, raises_input_error):
        raises_input_error(lambda: tiny.logits(*text, adapters=[0] * B), "tiny-0 has no adapters to choose from")
        twins = tiny.with_adapters([trio[0], dataclasses.replace(trio[1], name=trio[0].name)])
        raises_input_error(lambda: twins.logits(*text, adapters=["adapter-1"] * B), "ambiguous adapters adapter-1")
