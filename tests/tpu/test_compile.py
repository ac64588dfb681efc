"""The TPU compiler on every program, for one chip and for eight: `make test-tpu-compile`.

No TPU is needed: libtpu compiles for chips that are not there (`rlae_jax.planning.tpu`). What is asserted is what would
be slow or large on a TPU without being wrong: caches that are copied, exchanged or not donated, exchanges that nobody
meant, temporaries beyond what a step has to hold.
"""

import collections
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from rlae_jax import hlo, sharding
from rlae_jax.models import quantise
from rlae_jax.planning import tpu
from rlae_jax.planning.workload import place_params, place_whole
from tests.tpu import programs
from tests.tpu.programs import BATCH, LOCKSTEP, MODEL, PROMPT, SHARED, TEAM, TRAINED, TRAINING, UNION

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(not tpu.available(), reason="libtpu is not installed; make test-tpu-compile has it"),
]

ONE, BOTH, ROWS = (1, 1), (2, 4), (8, 1)  # data, model
MIB = 2**20


class Compiled(NamedTuple):
    """What the compiler made of a program."""

    module: hlo.Module
    memory: Any
    mesh: Mesh

    @property
    def data(self) -> int:
        return self.mesh.shape[sharding.DATA]

    @property
    def model(self) -> int:
        return self.mesh.shape[sharding.MODEL]

    @property
    def rows(self) -> int:
        """Of the batch, on each group of devices."""
        return BATCH // self.data


def compile_for(lower: Callable[[Any], jax.stages.Lowered], sizes: tuple[int, int]) -> Compiled:
    mesh = tpu.make_mesh("v5e", *sizes)
    compiled = lower(mesh).compile()
    return Compiled(hlo.parse(compiled.as_text()), compiled.memory_analysis(), mesh)


def exchanged(instructions: Iterable[hlo.Instruction]) -> collections.Counter[tuple[str, str]]:
    """(kind, array) of every exchange between devices: the compiler joins several into one."""
    counted: collections.Counter[tuple[str, str]] = collections.Counter()
    for (kind, shapes), n in hlo.collectives(instructions).items():
        for shape in shapes:
            if not shape.startswith("u32["):  # handles of asynchronous ones, and of a barrier
                counted[kind, shape] += n
    return counted


def elements(shape: str) -> int:
    return math.prod(int(size) for size in shape.partition("[")[2].rstrip("]").split(",") if size)


def decoding_loop(compiled: Compiled, workload: Any) -> list[hlo.Instruction]:
    """What a step runs, after checking that it leaves the caches where they are."""
    shapes = workload.cache_shapes(compiled.mesh)
    inside = compiled.module.inside(compiled.module.loop_carrying(*shapes))
    smallest = min(shape.nbytes for shape in shapes)
    assert compiled.module.copies(inside, smallest) == []
    assert hlo.collective_bytes(inside) < smallest
    return inside


def assert_exchanges(compiled: Compiled, inside: list[hlo.Instruction], states: int, rows: int) -> None:
    """Two all-reduces of hidden states per layer and one per embedding, else all-reduces of a few numbers per row; over
    `data` alone nothing.

    Args:
      states: embeddings and layers' branches that are summed in a step, over all passes.
      rows: of a pass.
    """
    counted = exchanged(inside)
    if compiled.model == 1:
        assert not counted
        return
    assert {kind for kind, _ in counted} == {"all-reduce"}
    of_states = {key: n for key, n in counted.items() if elements(key[1]) == rows * MODEL.width}
    assert sum(of_states.values()) == states
    assert all(elements(shape) <= 16 * rows for key in counted if key not in of_states for shape in key[1:])


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_decoding_in_lockstep(sizes: tuple[int, int]) -> None:
    compiled = compile_for(LOCKSTEP.lower_loop, sizes)
    inside = decoding_loop(compiled, LOCKSTEP)
    assert_exchanges(compiled, inside, states=2 * (1 + 2 * MODEL.layers), rows=compiled.rows)
    assert_donated(compiled, programs.cache_bytes(LOCKSTEP, compiled.mesh))
    logits = compiled.rows * MODEL.vocab // compiled.model * 4
    assert compiled.memory.temp_size_in_bytes <= 6 * logits + MIB


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_adapters_over_one_base(sizes: tuple[int, int]) -> None:
    compiled = compile_for(SHARED.lower_loop, sizes)
    inside = decoding_loop(compiled, SHARED)
    assert_exchanges(compiled, inside, states=1 + 2 * MODEL.layers, rows=2 * compiled.rows)
    assert_donated(compiled, programs.cache_bytes(SHARED, compiled.mesh))


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_members_with_different_tokenizers(sizes: tuple[int, int]) -> None:
    """Log-probabilities of the union's entries come from all over a member's vocabulary, so that under `model` they are
    brought together; nothing else of their size moves."""
    compiled = compile_for(UNION.lower_loop, sizes)
    counted = exchanged(decoding_loop(compiled, UNION))
    assert_donated(compiled, programs.cache_bytes(UNION, compiled.mesh))
    if compiled.model == 1:
        assert not counted
        return
    assert {kind for kind, _ in counted} <= {"all-reduce", "all-gather", "collective-permute"}
    large = [key for key, n in counted.items() for _ in range(n) if elements(key[1]) >= compiled.rows * MODEL.vocab]
    assert set(large) == {("all-gather", f"f32[{compiled.rows},{MODEL.vocab}]")}
    assert len(large) <= len(UNION.members)


@pytest.mark.parametrize("sizes", [ONE, BOTH], ids=str)
def test_reading_prompts(sizes: tuple[int, int]) -> None:
    """Groups of rows, one after another, each on the devices that have its rows."""
    compiled = compile_for(LOCKSTEP.lower_prefill, sizes)
    counted = exchanged(i for loop in compiled.module.loops() for i in compiled.module.inside(loop))
    assert {kind for kind, _ in counted} == ({"all-reduce"} if compiled.model > 1 else set())
    group = 2048 // PROMPT
    scores = group * MODEL.heads // compiled.model * PROMPT**2 * 4
    assert compiled.memory.temp_size_in_bytes <= 4 * scores


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_generating_reads_and_writes_in_one_program(sizes: tuple[int, int]) -> None:
    compiled = compile_for(LOCKSTEP.lower_generate, sizes)
    inside = decoding_loop(compiled, LOCKSTEP)
    assert_exchanges(compiled, inside, states=2 * (1 + 2 * MODEL.layers), rows=compiled.rows)
    assert compiled.memory.temp_size_in_bytes <= 2 * programs.cache_bytes(LOCKSTEP, compiled.mesh)


@pytest.mark.parametrize(
    ("workload", "sizes"),
    [(TRAINING, ONE), (TRAINING, BOTH), (TRAINING, ROWS), (TEAM, ONE), (TEAM, BOTH)],
    ids=["ppo-one", "ppo-both", "ppo-rows", "mappo-one", "mappo-both"],
)
def test_an_iteration_of_training(workload: Any, sizes: tuple[int, int]) -> None:
    compiled = compile_for(workload.lower_iterate, sizes)
    inside = decoding_loop(compiled, LOCKSTEP)
    # The agent also reads each member's entropy and the like, which are sums over its vocabulary.
    assert_exchanges(compiled, inside, states=2 * (1 + 2 * MODEL.layers), rows=compiled.rows)
    assert_donated(compiled, compiled.memory.output_size_in_bytes - MIB // 16)
    # Observations are gathered before they are shuffled, and each agent's gradients are a mean over the groups.
    observations = BATCH * workload.spans * 2 * MODEL.width * 4
    largest = hlo.collective_bytes(compiled.module.outside_loops())
    assert largest == (observations // 2 if compiled.data > 1 else 0)
    bound = 2 * programs.cache_bytes(LOCKSTEP, compiled.mesh) + 4 * observations
    assert compiled.memory.temp_size_in_bytes <= bound


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_points_of_a_search(sizes: tuple[int, int]) -> None:
    compiled = compile_for(programs.lower_points, sizes)
    inside = decoding_loop(compiled, SHARED)
    assert_exchanges(compiled, inside, states=1 + 2 * MODEL.layers, rows=2 * compiled.rows)
    assert compiled.memory.temp_size_in_bytes <= 2 * programs.cache_bytes(SHARED, compiled.mesh)


@pytest.mark.parametrize("sizes", [ONE, BOTH, ROWS], ids=str)
def test_fine_tuning_adapters(sizes: tuple[int, int]) -> None:
    """Groups of devices exchange the adapters' gradients, not activations."""
    compiled = compile_for(programs.lower_fine_tune, sizes)
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(programs.fine_tune_state()))
    assert_donated(compiled, state)
    if compiled.model > 1:
        return
    everything = [i for body in compiled.module.computations.values() for i in body]
    reduced = sum(n * elements(shape) for (kind, shape), n in exchanged(everything).items() if kind == "all-reduce")
    factors = sum(leaf.size for leaf in jax.tree.leaves(programs.fine_tune_state().factors))
    assert reduced <= (1.1 * factors if compiled.data > 1 else 0)


@pytest.mark.parametrize("sizes", [ONE, BOTH], ids=str)
def test_steps_of_pretraining(sizes: tuple[int, int]) -> None:
    """All of a step's state is a part of its own on every device, and is donated."""
    compiled = compile_for(programs.lower_pretrain, sizes)
    params, optimiser = (programs.device_bytes(tree) for tree in programs.pretrain_state(compiled.mesh))
    assert_donated(compiled, params + optimiser)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(place_params(TRAINED, None)))
    assert params < 1.05 * whole / (compiled.data * compiled.model)
    assert compiled.memory.temp_size_in_bytes <= 4 * whole


def assert_donated(compiled: Compiled, nbytes: int) -> None:
    """So many bytes of arguments are written over by results."""
    assert compiled.module.aliases
    assert compiled.memory.alias_size_in_bytes >= nbytes


@pytest.mark.parametrize("rows", [2, 8, 512])
@pytest.mark.parametrize(("kind", "group"), [("int8", 0), ("int4", 32), ("int4", 128), ("fp8", 0)])
def test_quantised_kernels_are_converted_as_they_are_read(kind: quantise.Kind, group: int, rows: int) -> None:
    d, f = 4096, 11_008
    mesh = tpu.make_mesh("v5e", *ONE)
    kernel: Any = jax.ShapeDtypeStruct((d, f), jnp.bfloat16)
    held = jax.eval_shape(lambda kernel: quantise.quantise_kernel(kernel, kind=kind, inputs=1, group=group), kernel)
    x, held = place_whole((jax.ShapeDtypeStruct((rows, 1, d), jnp.bfloat16), held), mesh)
    product = jax.jit(lambda x, kernel: quantise.product("btd,df->btf", x, kernel, None, (d, f)))
    module = hlo.parse(product.lower(x, held).compile().as_text() or "")
    assert hlo.largest_float(module) <= max(quantise._BLOCK["accelerator"], d // (group or d) * rows * f)
