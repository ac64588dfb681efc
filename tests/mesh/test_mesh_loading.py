"""Loading onto a mesh: every device is given its parts and no more, and no host holds more than it must."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import rlae_jax as rj
from benchmarks import load as load_benchmark
from rlae_jax import sharding
from rlae_jax.models import transformer
from rlae_jax.models.config import GatedDelta
from rlae_jax.models.pretrain import PretrainConfig, pretrain
from tests.helpers.adapters import random_adapter


def test_every_tensor_lies_where_the_table_says(make_wide, tmp_path):
    make_wide(0).save(tmp_path / "m")
    alone, spread = rj.load(tmp_path / "m"), rj.load(tmp_path / "m", mesh=rj.make_mesh(2, 4))
    where = {"embedding": ("model", None), "attention.q": (None, "model", None), "attention.o": ("model", None, None)}
    where |= {"ffn.up": (None, "model"), "ffn.down": ("model", None), "head": (None, "model"), "norm": (None,)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(spread.params):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        expected = next((axes for part, axes in where.items() if f"{part}." in f"{name}."), None)
        if expected is not None and "norm" not in name.rsplit(".", 2)[0]:
            assert tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec)) == expected, name
        assert {shard.data.shape for shard in leaf.addressable_shards} == {leaf.sharding.shard_shape(leaf.shape)}
    for one, other in zip(jax.tree.leaves(alone.params), jax.tree.leaves(spread.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert spread.fingerprint() == alone.fingerprint()
    assert spread.mesh == rj.make_mesh(2, 4)


def test_no_device_is_given_a_whole_tensor(make_wide, tmp_path, monkeypatch):
    """What goes to devices are the parts themselves."""
    make_wide(0).save(tmp_path / "m")
    monkeypatch.setattr(jax, "device_put", lambda *args, **kwargs: pytest.fail("a tensor was put as a whole"))
    sizes = []
    make = jax.make_array_from_callback

    def recording(shape, where, part):
        return make(shape, where, lambda index: sizes.append(part(index).nbytes) or part(index))

    monkeypatch.setattr(jax, "make_array_from_callback", recording)
    lm = rj.load(tmp_path / "m", mesh=rj.make_mesh(1, 8))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert sizes
    assert max(sizes) == largest // 8


def test_the_mesh_in_force_is_the_default(make_wide, tmp_path):
    make_wide(0).save(tmp_path / "m")
    mesh = rj.make_mesh(4, 2)
    with jax.set_mesh(mesh):
        lm = rj.load(tmp_path / "m")
    assert lm.mesh == mesh
    assert rj.load(tmp_path / "m").mesh is None


def test_key_value_heads_that_do_not_divide_are_held_whole(make_wide, tmp_path):
    make_wide(0, kv_heads=2).save(tmp_path / "m")
    with pytest.warns(UserWarning, match=r"2 key/value heads are not divided by model=4"):
        lm = rj.load(tmp_path / "m", mesh=rj.make_mesh(2, 4))
    assert lm.params["layers"][0]["attention"]["k"]["kernel"].sharding.spec == PartitionSpec(None, None, None)
    assert lm.params["layers"][0]["attention"]["q"]["kernel"].sharding.spec == PartitionSpec(None, "model", None)


def test_recurrent_heads_that_do_not_divide_are_told(make_wide):
    delta = GatedDelta(layers=(0,), taps=2, key_heads=2, heads=4, key_width=4, value_width=4)
    with pytest.warns(UserWarning, match=r"2 recurrent key heads are not divided by model=4"):
        make_wide(0, recurrent=delta).on_mesh(rj.make_mesh(2, 4))


def test_a_merged_adapter_lies_like_its_base(make_wide):
    lm = make_wide(0)
    adapter = random_adapter(lm, 0)
    spread = lm.on_mesh(rj.make_mesh(2, 4)).with_adapter(adapter)
    kernel = spread.params["layers"][0]["attention"]["q"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "model", None)
    np.testing.assert_allclose(
        kernel, lm.with_adapter(adapter).params["layers"][0]["attention"]["q"]["kernel"], atol=1e-6
    )
    assert spread.fingerprint() == lm.with_adapter(adapter).fingerprint()


class TestBadInput:
    def test_a_mesh_that_does_not_divide_the_devices(self, raises_input_error):
        raises_input_error(lambda: rj.make_mesh(3, 2), "data=3,model=2", "8 devices", "data=4,model=2")
        raises_input_error(lambda: rj.make_mesh(-1, -1), "one of them may be -1")
        raises_input_error(lambda: rj.make_mesh(0, 2), "at least 1")
        raises_input_error(lambda: rj.make_mesh(-1, 3), "does not divide")

    def test_what_is_left_goes_to_the_other_axis(self):
        assert dict(rj.make_mesh(-1, 2).shape) == {"data": 4, "model": 2}
        assert dict(rj.make_mesh(data=2, model=-1).shape) == {"data": 2, "model": 4}
        assert dict(rj.make_mesh(2, 2).shape) == {"data": 2, "model": 2}  # of eight devices four

    @pytest.mark.parametrize("text", ["data", "data=x", "rows=2", "data=2;model=4", ""])
    def test_sizes_that_cannot_be_read(self, raises_input_error, text):
        raises_input_error(lambda: sharding.read_mesh(text), "data=4,model=2")

    def test_heads_that_the_mesh_does_not_divide(self, make_wide, tmp_path, raises_input_error):
        make_wide(0, heads=4, kv_heads=4).save(tmp_path / "m")
        raises_input_error(lambda: rj.load(tmp_path / "m", mesh=rj.make_mesh(1, 8)), "4 heads", "model=8", "1, 2, 4")

    def test_members_on_different_meshes(self, make_wide, raises_input_error):
        lm = make_wide(0)
        members = [lm.on_mesh(rj.make_mesh(2, 4)), lm.on_mesh(rj.make_mesh(4, 2))]
        raises_input_error(lambda: rj.Ensemble(members), "one mesh")

    def test_rows_that_the_mesh_does_not_divide(self, raises_input_error):
        raises_input_error(lambda: sharding.check_rows("prompts", 6, rj.make_mesh(4, 2)), "prompts 6", "4 or 8")


def test_pretraining_in_parts_over_all_devices(make_wide):
    """The same parameters as on one device; each device holds an eighth of them and of what the optimiser keeps."""
    config = make_wide(0).config
    ids = np.random.default_rng(0).integers(0, 24, (16, 9)).astype(np.int32)
    settings = PretrainConfig(steps=3, batch=8, warmup=1, report_every=3)

    def train():
        return pretrain(config, ids, np.ones(ids.shape, bool), settings, seed=0)

    expected = train()
    with sharding.use(rj.make_mesh(2, 4)):
        spread = train()
    for one, other in zip(jax.tree.leaves(spread), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for (path, leaf), names in zip(
        jax.tree_util.tree_leaves_with_path(spread),
        jax.tree.leaves(transformer.logical_axes(config), is_leaf=lambda x: isinstance(x, tuple)),
        strict=True,
    ):
        whole = leaf.size // int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        assert whole == (2 if len(names) == 1 else 8), path


PROCESS = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
directory, port, process = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
import rlae_jax as rj
from benchmarks.load import memory
jax.numpy.zeros(3).block_until_ready()
before = memory()
lm = rj.load(directory, mesh=rj.make_mesh(1, 8))
held = sum(shard.data.nbytes for leaf in jax.tree.leaves(lm.params) for shard in leaf.addressable_shards)
largest = max(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
print(json.dumps({"before": before, "after": memory(), "held": held, "largest": largest}))
"""


@pytest.mark.slow
@pytest.mark.rare
def test_a_host_holds_its_shards_and_little_more(tmp_path):
    """Two processes of four devices load 1 GB: each peaks below its half, twice the largest tensor and 400 MB."""
    directory = load_benchmark.write_checkpoint(tmp_path, load_benchmark.LARGE, ("float32",))["float32"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", PROCESS, str(directory), str(port)]
    environment = {"PYTHONPATH": str(root), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    running = [
        subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True, env=environment) for i in range(2)
    ]
    told = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in running]
    weights = 4 * load_benchmark.LARGE.numbers
    for one in told:
        assert one["held"] == pytest.approx(weights / 2, rel=0.01)
        if one["after"]["peak"] is None:
            pytest.skip("no VmHWM on this system")
        assert one["after"]["peak"] * 1e6 < one["held"] + 2 * one["largest"] + 400e6


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_quantised_kernels_lie_where_whole_ones_do(make_wide, tmp_path, kind):
    make_wide(0, width=64, head_width=32, ffn_width=256).save(tmp_path / "m")
    alone = rj.load(tmp_path / "m", quantise=kind, quantise_head=True)
    for size in ((2, 4), (1, 8)):
        mesh = rj.make_mesh(*size)
        spread, moved = rj.load(tmp_path / "m", quantise=kind, quantise_head=True, mesh=mesh), alone.on_mesh(mesh)
        layer = spread.params["layers"][0]
        split = {name: layer["ffn"][name]["kernel"].values for name in ("up", "down")}
        split |= {"q": layer["attention"]["q"]["kernel"].values, "o": layer["attention"]["o"]["kernel"].values}
        split |= {"table": spread.params["embedding"].values, "scale": spread.params["embedding"].scale}
        for name, values in split.items():
            shard = values.sharding.shard_shape(values.shape)
            assert np.prod(shard) * size[1] == values.size, (name, values.shape, shard)
        for one, other, third in zip(*map(jax.tree.leaves, (alone.params, spread.params, moved.params)), strict=True):
            np.testing.assert_array_equal(one, other)
            assert other.sharding == third.sharding
        assert spread.fingerprint() == alone.fingerprint()
        ids = np.random.default_rng(0).integers(0, 24, (4, 6))
        expected = alone.logits(ids)
        with sharding.use(mesh):
            np.testing.assert_allclose(spread.logits(ids), expected, atol=2e-5 * np.abs(expected).max())
        options = {"prompt_ids": ids, "max_new_tokens": 8, "ignore_eos": True}
        assert rj.Ensemble([spread]).generate(**options).tokens == rj.Ensemble([alone]).generate(**options).tokens
