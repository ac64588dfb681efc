"""The names of the parameters' axes, which tables of sharding rules are written for."""

import jax
import pytest

from rlae_jax.models import LoraConfig, checkpoint_files, lora, transformer
from tests.data import hf

# What a mesh may divide, and what it leaves whole.
DIVIDED = {"vocab", "embed", "heads", "kv_heads", "mlp", "experts"}
WHOLE = {"head", "norm", "head_norm", "labels", "positions", "types", "buckets", "window", "layers"}
WHOLE |= {"router", "shared_gate", "channels", "group"}


def is_names(leaf):
    return isinstance(leaf, tuple)


def by_path(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in tree}


def named(axes, arrays):
    """{path: (names, array)}, after checking that one tree is the other's."""
    assert jax.tree.structure(axes, is_leaf=is_names) == jax.tree.structure(arrays)
    names = by_path(jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_names))
    return {path: (names[path], leaf) for path, leaf in by_path(jax.tree_util.tree_leaves_with_path(arrays)).items()}


@pytest.fixture(scope="module")
def config_of(stored_checkpoint):
    def read(family, case):
        directory = stored_checkpoint(case, family)
        source = checkpoint_files.read_source(directory)
        return checkpoint_files.read_config(source, directory, dtype="float32", precision=None)

    return read


@pytest.mark.parametrize("family", hf.FAMILIES)
def test_every_array_has_a_name_for_each_axis(config_of, family):
    for case in hf.FAMILIES[family].cases:
        config = config_of(family, case)
        for path, (names, leaf) in named(transformer.logical_axes(config), transformer.abstract_params(config)).items():
            where = f"{case}: {path} {names}"
            assert len(names) == len(leaf.shape), where
            assert set(names) <= DIVIDED | WHOLE, where
            assert all(names.count(name) == 1 for name in names if name != "embed"), where
            of_norm = "." in path and path.split(".")[-2].endswith("norm")
            assert of_norm == bool({"norm", "head_norm"} & set(names)), where


def test_the_names_of_a_decoder(config_of):
    axes = transformer.logical_axes(config_of("qwen3", "wide_heads"))
    layer = axes["layers"][0]
    assert axes["embedding"] == ("vocab", "embed")
    assert axes["head"]["kernel"] == ("embed", "vocab")
    assert {name: part["kernel"] for name, part in layer["attention"].items() if "kernel" in part} == {
        "q": ("embed", "heads", "head"),
        "k": ("embed", "kv_heads", "head"),
        "v": ("embed", "kv_heads", "head"),
        "o": ("heads", "head", "embed"),
    }
    assert layer["attention"]["q_norm"]["scale"] == layer["attention"]["k_norm"]["scale"] == ("head_norm",)
    assert layer["attention_norm"]["scale"] == axes["norm"]["scale"] == ("norm",)
    assert layer["ffn"]["up"]["kernel"] == layer["ffn"]["gate"]["kernel"] == ("embed", "mlp")
    assert layer["ffn"]["down"]["kernel"] == ("mlp", "embed")


def test_the_tree_is_the_callers_own(config_of):
    config = config_of("llama", "grouped")
    transformer.logical_axes(config)["layers"][0].clear()
    assert transformer.logical_axes(config)["layers"][0]


@pytest.mark.parametrize("stacked", [False, True], ids=["one", "stack"])
def test_the_axes_of_adapters_are_those_of_their_layers(config_of, stacked):
    specs = transformer.linears(config_of("llama", "grouped"))
    settings = LoraConfig(rank=2, targets=(r".*",))
    factors = lora.init(settings, specs, jax.random.key(0))
    lead = ()
    if stacked:
        factors, lead = lora.stack([lora.Adapter(settings, factors)] * 3).params, ("adapters",)
    axes = lora.logical_axes(factors, specs)
    for path, (names, leaf) in named(axes, factors).items():
        assert len(names) == leaf.ndim, path
    assert axes["layers.0.attention.q"] == {"a": (*lead, "embed", "rank"), "b": (*lead, "rank", "heads", "head")}
    assert axes["layers.0.attention.o"] == {"a": (*lead, "heads", "head", "rank"), "b": (*lead, "rank", "embed")}
    assert axes["head"] == {"a": (*lead, "embed", "rank"), "b": (*lead, "rank", "vocab")}
