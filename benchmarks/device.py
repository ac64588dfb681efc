"""What a benchmark asks of an accelerator: random members made on it, the speed of a copy, a compiled decoding loop.

In: configurations and an ensemble. Out: models without a file, bytes per second, and `Decoding`, which runs one program
for any number of steps and says what a step of it reads and launches.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import rlae_jax as rj
from rlae_jax import hlo
from rlae_jax.fusion import programs
from rlae_jax.fusion.programs import Job
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.models import ModelConfig, transformer

COPIES = 8  # of a call: beside them its overhead is small

# Instructions that run nothing on a device, or whose beginning is counted.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier", "partition-id"),
    *("copy-done", "async-done", "async-update"),
}


# --- members ---


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(seed: Array, scale: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return (jax.random.normal(jax.random.key(seed), shape, dtype) * scale.astype(dtype)).astype(dtype)


def random_params(config: ModelConfig, seed: int) -> transformer.Params:
    """As `init_params`, made on the device by one program per shape; of a billion numbers in seconds."""
    inputs = {path: spec.inputs for path, spec in transformer.linears(config).items()}
    leaves, tree = jax.tree_util.tree_flatten_with_path(transformer.abstract_params(config))
    made = []
    for i, (path, leaf) in enumerate(leaves):
        names = [str(getattr(part, "key", part)) for part in path]
        if len(leaf.shape) == 1:
            made.append(jnp.ones(leaf.shape, leaf.dtype))
            continue
        axes = leaf.shape[: inputs[".".join(names[:-1])]] if names[-1] == "kernel" else leaf.shape[-1:]
        scale = np.float32(np.prod(axes) ** -0.5)
        made.append(_normal(np.uint32(1000 * seed + i), scale, leaf.shape, leaf.dtype))
    params: transformer.Params = jax.tree.unflatten(tree, made)
    return params


def random_lm(config: ModelConfig, seed: int, tokenizer: Any = None) -> rj.LM:
    """A model of these sizes."""
    return rj.LM(config, random_params(config, seed), tokenizer, name=f"random-{seed}")


# --- memory ---


def copy_call(size: int) -> Callable[[], Any]:
    """`COPIES` passes over `size` bytes, each of which reads and writes all of them."""
    passes = jax.jit(lambda x: lax.fori_loop(0, COPIES, lambda i, x: x ^ i.astype(jnp.uint32), x), donate_argnums=0)
    held = [jnp.zeros(size // 4, jnp.uint32)]

    def call() -> None:
        held[0] = passes(held[0]).block_until_ready()

    return call


def peak_bytes() -> int | None:
    """The most memory that this process has had in use on the device; None where it does not tell."""
    stats = jax.devices()[0].memory_stats()
    return None if stats is None else stats.get("peak_bytes_in_use")


def step_bytes(members: Sequence[rj.LM], rows: int, slots: float) -> int:
    """What a step has to read: all weights but those of an embedding table that is no head, of which it reads a row or
    two, and the keys and values of `slots` tokens in each row."""
    total = 0.0
    for lm in members:
        config = lm.config
        total += sum(leaf.nbytes for leaf in jax.tree.leaves((lm.params, lm.stack)))
        if not config.tied_head:
            total -= lm.params["embedding"].nbytes
        of_token = 2 * config.layers * config.kv_heads * config.head_width * lm.params["embedding"].dtype.itemsize
        total += of_token * rows * slots
    return int(total)


# --- decoding ---


def limit_steps(prompts: Prompts, steps: int) -> Prompts:
    """The prompts, each with an answer of so many tokens at most."""
    limits: Any = np.full(prompts.batch, steps, np.int32)
    return prompts._replace(limits=limits)


@dataclasses.dataclass(frozen=True)
class Decoding:
    """A compiled `decode_batch`. How many steps it makes is data: a step's time is a difference of two calls."""

    job: Job
    compiled: Any
    compile_seconds: float
    kernels: int

    def write(self, steps: int) -> np.ndarray:
        """Int[B, N]: as many tokens per row as there are steps."""
        job = self.job
        prompts = limit_steps(job.prompts, steps)
        answers = programs.on_host(self.compiled(job.params, prompts, job.policy_params, job.spec), job.answers)
        assert np.all(answers.steps == steps), "a row ended early"
        return np.asarray(answers.tokens[:, :steps])


def compile_decoding(
    ensemble: rj.Ensemble,
    rows: Sequence[Any],
    spec: rj.DecodeSpec,
    policy_params: Any = None,
    *,
    params: tuple[Any, ...] | None = None,
) -> Decoding:
    """The program that answers these prompts.

    Args:
      policy_params: of the spec's policy; by default uniform weights.
      params: from `Ensemble.params_for`; by default `Ensemble.params`.
    """
    if policy_params is None:
        policy_params = np.full((len(rows), len(ensemble.members)), 1 / len(ensemble.members), np.float32)
    prompts = ensemble.prompts(rows, spec, seed=0)
    params = ensemble.params if params is None else params
    job = Job(list(rows), prompts, policy_params, spec, params, 1, ()).fill()
    begin = time.perf_counter()
    lowered = programs.decode_batch.lower(job.params, job.prompts, job.policy_params, job.spec, samples=job.samples)
    compiled = lowered.compile()
    seconds = time.perf_counter() - begin
    return Decoding(job, compiled, seconds, loop_kernels(compiled.as_text() or ""))


# --- what was compiled ---


def program_bytes(compiled: Any) -> int:
    """Arguments, results and what a program needs besides, by the compiler's account."""
    memory = compiled.memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return int(sizes - memory.alias_size_in_bytes)


def loop_kernels(text: str) -> int:
    """The instructions that run in one turn of the largest loop of a compiled module: fusions, calls of libraries,
    copies and what stands alone. Of a branch the longest side counts, of a loop inside one turn."""
    module = hlo.parse(text)

    @functools.cache
    def kernels(name: str) -> int:
        count = 0
        for i in module.computations[name]:
            if i.opcode == "while" and i.body is not None:
                count += kernels(i.body)
            elif i.opcode in ("call", "conditional"):
                count += (sum if i.opcode == "call" else max)(map(kernels, i.calls))
            else:
                count += i.opcode not in _FREE
        return count

    return max((kernels(loop.body) for loop in module.loops() if loop.body is not None), default=0)
