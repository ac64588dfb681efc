"""Bytes and seconds by formula, against programs that are compiled and against figures worked out by hand."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlae_jax.models import ModelConfig
from rlae_jax.planning import formula
from rlae_jax.planning.devices import Device
from rlae_jax.planning.workload import Workload
from tests.planning.compile_cases import CASES, DELTA, LLAMA

ONE = formula.abstract_mesh()
ROOT = Path(__file__).resolve().parents[2]
FLAGS = "--xla_cpu_enable_concurrency_optimized_scheduler=false --xla_backend_optimization_level=0"


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, int]]:
    """The bytes of every case's program, from a process that schedules as accelerators do."""
    environment = os.environ | {"XLA_FLAGS": FLAGS, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.planning.compile_cases", *CASES]
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    rows = [json.loads(line) for line in ran.stdout.splitlines()]
    return {row.pop("name"): row for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_compiled_programs_need(compiled: dict[str, dict[str, int]], case: str) -> None:
    """Within 10%; what a program is given within 1%, prompts and the like left out, and the rest within 15%."""
    figures = compiled[case]
    memory = formula.memory(CASES[case], ONE)
    assert memory.parameters + memory.agent == pytest.approx(figures["arguments"], rel=0.01)
    assert memory.total == pytest.approx(sum(figures.values()), rel=0.1)
    temporaries = memory.total - memory.parameters - memory.agent
    assert temporaries == pytest.approx(figures["temporaries"], rel=0.15)


def by_hand(config: ModelConfig) -> int:
    """The parameters of a Llama."""
    attention = config.width * config.head_width * (2 * config.heads + 2 * config.kv_heads)
    layer = attention + 3 * config.width * config.ffn_width + 2 * config.width
    return config.layers * layer + config.width + 2 * config.vocab * config.width


def test_parameters_and_caches_of_a_llama() -> None:
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    memory = formula.memory(Workload(members=(config,), batch=8, prompt=100, new=28), ONE)
    assert memory.parameters == 2 * by_hand(config)
    assert memory.cache == memory.writing.held == 2 * 2 * 4 * 8 * 4 * 32 * 128
    assert memory.agent == memory.observations == memory.learning.total == 0
    assert set(memory.moments) == {"reading prompts", "writing answers"}


def test_a_mesh_divides_heads_feed_forward_vocabulary_and_rows() -> None:
    workload = Workload(members=(LLAMA, LLAMA), batch=8, prompt=100, new=28)
    whole = formula.memory(workload, ONE)
    sharded = formula.memory(workload, formula.abstract_mesh(data=2, model=4))
    norms = 2 * 4 * (LLAMA.width * (2 * LLAMA.layers + 1))
    assert sharded.parameters == (whole.parameters - norms) // 4 + norms
    assert sharded.cache == whole.cache // 8


def test_key_value_heads_that_a_mesh_does_not_divide_are_held_whole() -> None:
    workload = Workload(members=(LLAMA,), batch=8, prompt=100, new=28)
    four, eight = (formula.memory(workload, formula.abstract_mesh(model=n)) for n in (4, 8))
    assert formula.memory(workload, ONE).cache == 4 * four.cache == eight.cache


def test_states_are_of_one_size_and_divided_by_heads() -> None:
    config = dataclasses.replace(DELTA, dtype="bfloat16")
    short, long = (formula.memory(Workload(members=(config,), batch=8, prompt=n, new=28), ONE) for n in (100, 200))
    spec = config.recurrent
    state = 3 * (2 * 3 * (2 * 4 + 8) * 32 + 4 * 8 * 32 * 32)  # layers; last inputs of q, k and v, and memories
    assert (spec.taps, spec.key_heads, spec.heads) == (4, 4, 8)
    assert [memory.cache for memory in (short, long)] == [8 * (2 * 2 * 4 * 32 * n + state) for n in (128, 228)]
    mesh = formula.abstract_mesh(model=4)
    assert short.cache == 4 * formula.memory(Workload(members=(config,), batch=8, prompt=100, new=28), mesh).cache


def test_observations_are_gathered_by_every_device() -> None:
    one, mesh = (formula.memory(CASES["ppo"], formula.abstract_mesh(data=n)) for n in (1, 4))
    assert one.observations == mesh.observations == 16 * 64 * 2 * 256 * 4
    assert one.agent == mesh.agent > 0


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4)])
def test_quantised_kernels(kind: Any, bits: int) -> None:
    """Those of linear layers, with scales; the embedding, the head and the norms stay."""
    config = dataclasses.replace(LLAMA, dtype="bfloat16")
    workload = Workload(members=(config,), batch=1, prompt=16, new=16)
    stored = formula.memory(workload, ONE, kind).parameters
    stay = config.width * (2 * config.vocab + 2 * config.layers + 1)
    kernels = by_hand(config) - stay
    n, g, h, d, f = config.heads, config.kv_heads, config.head_width, config.width, config.ffn_width
    # Outputs times the scales of each: one, or one and a zero point for 32 inputs.
    per = (lambda inputs: 2 * -(-inputs // 32)) if kind == "int4" else (lambda inputs: 1)
    layer = (n + 2 * g) * h * per(d) + d * per(n * h) + 2 * f * per(d) + d * per(f)
    scales = config.layers * layer
    assert stored == 2 * stay + kernels * bits // 8 + 4 * scales


def test_limits_by_hand() -> None:
    """One layer without attention's work to speak of: every step reads each weight once, and multiplies each once."""
    config = dataclasses.replace(LLAMA, layers=1, dtype="bfloat16")
    device = Device(name="any", memory=1, bandwidth=1.0, flops=1000.0)
    workload = Workload(members=(config,), batch=1, prompt=16, new=16)
    limits = formula.limits(workload, ONE, device)
    memory = formula.memory(workload, ONE)
    read = memory.parameters - 2 * config.vocab * config.width + memory.cache  # of its embedding it looks up a row
    assert limits.step == (pytest.approx(read / 1e9), "memory")
    assert limits.seconds == pytest.approx(limits.reading.seconds + 16 * limits.step.seconds)
    many = dataclasses.replace(workload, batch=10_000)
    fast_memory = dataclasses.replace(device, bandwidth=1e6)
    assert formula.limits(many, ONE, fast_memory).step.bound == "products"


def test_more_devices_are_faster_and_float32_slower() -> None:
    device = Device(name="any", memory=1, bandwidth=1.0, flops=0.01)
    workload = Workload(members=(LLAMA,), batch=64, prompt=16, new=16)
    one = formula.limits(workload, ONE, device)
    spread = formula.limits(workload, formula.abstract_mesh(data=4), device)
    assert spread.step.seconds == pytest.approx(one.step.seconds / 4)
    half = dataclasses.replace(workload, members=(dataclasses.replace(LLAMA, dtype="bfloat16"),))
    assert one.step.seconds == pytest.approx(6 * formula.limits(half, ONE, device).step.seconds)
