"""Bytes and seconds by formula: what each device holds, and how fast its memory and its products allow it to be.

Parameters, caches and what is trained are exact: their shapes are known, and `sharding.partition` says how they lie on
a mesh. Temporaries are what the largest moments of a program must hold, worked out below and tested against compiled
programs. Seconds are a limit: bytes read by the memory's bandwidth, or operations by the rate of products, whichever
takes longer; exchanges between devices and kernels that do not reach either are left out.
"""

import dataclasses
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, AxisType

from rlae_jax import sharding
from rlae_jax.fusion.members import _PREFILL_TOKENS
from rlae_jax.fusion.policy import Dims
from rlae_jax.fusion.ragged import WIDEST
from rlae_jax.models import ModelConfig, cache, experts, lora, transformer
from rlae_jax.models.config import GatedDelta
from rlae_jax.models.recurrent import CHUNK
from rlae_jax.planning.devices import Device
from rlae_jax.planning.workload import Workload
from rlae_jax.ppo import iteration as ppo

Quantised = Literal["int8", "int4", "fp8"]
_BITS: dict[str, int] = {"int8": 8, "int4": 4, "fp8": 8}
_GROUP = 32  # inputs that share a scale and a zero point of an int4 kernel; an output channel has one of the others
FLOAT = 4  # bytes of what is computed in float32 whatever the dtype


def abstract_mesh(data: int = 1, model: int = 1) -> AbstractMesh:
    """A mesh of any number of devices, none of which need be there."""
    names = (sharding.DATA, sharding.MODEL)
    return AbstractMesh((data, model), names, axis_types=(AxisType.Auto,) * 2)


class Moment(NamedTuple):
    """A part of a program, in bytes beside the parameters and the agent."""

    held: int  # of what it is about: keys and values, or observations
    temporaries: int  # the most that is alive at once beside that

    @property
    def total(self) -> int:
        """Both."""
        return self.held + self.temporaries


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on each device.

    Attributes:
      parameters: of the members, with the tables of a union.
      agent: the weight agent with its optimiser.
      cache: keys and values of whole answers, and recurrent states.
      observations: what decisions were taken on, gathered whole by every device before minibatches are drawn.
      reading, writing, learning: the program's moments, one after another; each begins with less than it ends with.
    """

    parameters: int
    agent: int
    cache: int
    observations: int
    reading: Moment
    writing: Moment
    learning: Moment

    @property
    def moments(self) -> dict[str, Moment]:
        """By name, those that there are."""
        found = {"reading prompts": self.reading, "writing answers": self.writing, "learning": self.learning}
        return {name: moment for name, moment in found.items() if moment.total}

    @property
    def total(self) -> int:
        """At the largest moment."""
        return self.parameters + self.agent + max(moment.total for moment in self.moments.values())


def _size(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: AbstractMesh) -> int:
    """Elements of an array on one device."""
    places = sharding.partition(axes, shape, mesh)
    return math.prod(
        size // (1 if place is None else mesh.shape[place]) for size, place in zip(shape, places, strict=True)
    )


def _itemsize(config: ModelConfig) -> int:
    return int(jnp.dtype(config.dtype).itemsize)


def _leaves(config: ModelConfig) -> list[tuple[str, tuple[str, ...], Any]]:
    """(dotted path, names of axes, shape and dtype) of every parameter."""
    shapes = jax.tree_util.tree_flatten_with_path(transformer.abstract_params(config))[0]
    axes = jax.tree.leaves(transformer.logical_axes(config), is_leaf=lambda x: isinstance(x, tuple))
    paths = [".".join(str(key.key) for key in path) for path, _ in shapes]
    return [(path, names, leaf) for path, names, (_, leaf) in zip(paths, axes, shapes, strict=True)]


def _parameter_bytes(config: ModelConfig, mesh: AbstractMesh, quantise: Quantised | None) -> dict[str, int]:
    """Of every parameter on one device, by path."""
    linears = transformer.linears(config) | transformer.mixture_linears(config) if quantise else {}
    found = {}
    for path, axes, leaf in _leaves(config):
        n = _size(axes, leaf.shape, mesh)
        linear = linears.get(path.removesuffix(".kernel"))
        exact = path == "head.kernel" or path.endswith(".router.kernel")
        if quantise is None or linear is None or not path.endswith(".kernel") or exact:
            found[path] = n * leaf.dtype.itemsize
            continue
        inputs = math.prod(linear.shape[: linear.inputs])
        scales = 2 * -(-inputs // _GROUP) if quantise == "int4" else 1  # and zero points
        found[path] = n * _BITS[quantise] // 8 + FLOAT * scales * -(-n // inputs)
    return found


def forms(workload: Workload, quantise: Quantised | None) -> tuple[Quantised | None, ...]:
    """How each member's kernels are held: as its checkpoint has them, or as is asked."""
    return tuple(stored or quantise for stored in workload.stored or [None] * len(workload.members))


class _Pass(NamedTuple):
    """A forward pass on one device: a member's, or that of all adapters over one base."""

    config: ModelConfig
    rows: int
    rows_at_once: int  # of prompts, see `members.prompt_cache`
    tokens: int  # of a prompt that are read
    slots: int
    heads: int
    ffn_width: int
    vocab: int
    ahead: int  # see `cache.layer_slots`
    per_place: int  # bytes of all rows' keys and values of one layer
    states: int  # bytes of all rows' recurrent states
    recurrent_heads: int

    @property
    def cache(self) -> int:
        """Keys and values of whole answers, and states; an encoder's are kept beside the decoder's."""
        source = self.config.layers * self.tokens if self.config.encoder else 0
        return self.per_place * (cache.places(self.config, self.slots, self.ahead) + source) + self.states

    @property
    def widest(self) -> int:
        """The most slots that a layer keeps."""
        attending = set(range(self.config.layers)) - set(self.config.recurrent_layers)
        return max((cache.layer_slots(self.config, i, self.slots, self.ahead) for i in attending), default=0)

    @property
    def prompt_cache(self) -> int:
        """What reading the prompts leaves."""
        return self.per_place * cache.places(self.config, self.tokens, self.ahead) + self.states

    @property
    def read_cache(self) -> int:
        """All keys and values, and states, of the prompts that are read together, before layers forget what is beyond
        their windows."""
        attending = self.config.layers - len(self.config.recurrent_layers)
        return (self.per_place * attending * self.tokens + self.states) * self.rows_at_once // self.rows


def _state_bytes(config: ModelConfig, mesh: AbstractMesh) -> int:
    """The states of one row on one device."""
    state = jax.eval_shape(lambda: cache.zero_state(config, 1))

    def one(part: Any, names: tuple[str | None, ...]) -> int:
        axes = (None, *names[1:], *[None] * (part.ndim - len(names)))
        return _size(axes, part.shape, mesh) * int(part.dtype.itemsize)

    sizes = jax.tree.leaves(jax.tree.map(one, state, cache.state_axes(config)))
    return len(config.recurrent_layers) * sum(sizes)


def _passes(workload: Workload, mesh: AbstractMesh) -> list[_Pass]:
    passes = []
    for config in workload.members:
        reader = config.encoder or config
        tokens = workload.prompt - (config.encoder is None)
        rows = workload.batch // mesh.shape[sharding.DATA] * (workload.adapters or 1)
        at_once = max(_PREFILL_TOKENS // max(tokens, 1), 1)

        def local(name: str, size: int) -> int:
            return _size((name,), (size,), mesh)

        kv_heads = local("kv_heads", config.kv_heads)
        passes.append(
            _Pass(
                config=config,
                rows=rows,
                rows_at_once=rows if rows % at_once else min(rows, at_once),
                tokens=tokens,
                slots=workload.slots(config),
                heads=local("heads", reader.heads),
                ffn_width=local("mlp", reader.ffn_width),
                vocab=local("vocab", config.vocab),
                ahead=WIDEST if workload.union else 0,
                per_place=rows * cache.place_bytes(config) * kv_heads // config.kv_heads,
                states=rows * _state_bytes(config, mesh),
                recurrent_heads=local("heads", config.recurrent.heads)
                if isinstance(config.recurrent, GatedDelta)
                else 0,
            )
        )
    return passes


def _reading_one(run: _Pass, adapters: bool) -> Moment:
    """A layer's largest moment is the product of its feed-forward block (two inputs, one result), its scores (before,
    under and after the mask) or its linear attention; adapters add two results of their own. The last layer's keys and
    values are the last that are needed, so that nothing but its norm counts."""
    reader = run.config.encoder or run.config
    group = run.rows_at_once * run.tokens
    width, wide = (group * n * _itemsize(reader) for n in (reader.width, run.ffn_width))
    branch = (3 if reader.gated else 2) * wide + (2 * wide + width if adapters else 0)
    if reader.experts is not None:  # rows of blocks, and twice those of pairs of a token and an expert
        rows = experts.block_rows(group, reader.experts) + 2 * group * reader.experts.active
        branch = max(branch, rows * reader.width * _itemsize(reader))
    attends = len(set(range(reader.layers - 1)) - set(reader.recurrent_layers)) or run.config.encoder is not None
    scores = 3 * run.rows_at_once * run.heads * run.tokens**2 * FLOAT if attends else 0
    if isinstance(reader.recurrent, GatedDelta):
        chunk, keys, values = min(run.tokens, CHUNK), reader.recurrent.key_width, reader.recurrent.value_width
        # What is alive of the rule, as counted in compiled programs.
        of_rule = group * run.recurrent_heads * (4 * chunk + 8 * keys + 5 * values) * FLOAT
        branch = max(branch, of_rule)
    if run.config.encoder is not None:  # whose states are turned into keys and values when they are all there
        return Moment(0, max(branch, scores) + width)
    if reader.layers == 1:
        return Moment(run.prompt_cache, 3 * width)
    if run.rows_at_once == run.rows:
        kept = run.read_cache * (reader.layers - 1) // reader.layers
    else:  # those of the group, and all groups' so far
        kept = run.prompt_cache + run.read_cache
    return Moment(kept, max(branch, scores) + width)


def _reading(workload: Workload, passes: list[_Pass]) -> Moment:
    """The members read one after another, those first that need much and leave little."""
    moments = [(_reading_one(run, bool(workload.adapters)), run.cache) for run in passes]
    moments.sort(key=lambda pair: pair[0].total - pair[1], reverse=True)
    largest, done = Moment(0, 0), 0
    for moment, kept in moments:
        largest = max(largest, Moment(done + moment.held, moment.temporaries), key=lambda m: m.total)
        done += kept
    return largest


def _writing(workload: Workload, passes: list[_Pass], recorded: int) -> Moment:
    """Logits, log-probabilities and their mixture; with an agent that reads statistics those of every member, with
    adapters over one base all members' at once. Members with different tokenizers gather a layer's keys or values for
    a pass's further tokens."""
    rows, k = passes[0].rows // (workload.adapters or 1), workload.count
    vocab = max([workload.union, *(run.vocab for run in passes)])
    arrays = 3 if workload.train is None else 3 * k + 1
    if workload.adapters:
        arrays = max(arrays, 2 * k + 2)
    scores = (3 * run.rows * run.heads * run.widest * FLOAT for run in passes)
    states = (run.states // max(len(run.config.recurrent_layers), 1) for run in passes)  # a layer's next ones
    temporaries = max(arrays * rows * vocab * FLOAT, *scores, *states)
    if workload.union:
        temporaries += max((run.rows + WIDEST) * run.per_place * run.widest // run.rows // 2 for run in passes)
    return Moment(sum(run.cache for run in passes), temporaries + recorded)


def memory(workload: Workload, mesh: AbstractMesh, quantise: Quantised | None = None) -> Memory:
    """What each device of a mesh holds.

    Args:
      mesh: see `abstract_mesh`; it must divide the batch.
      quantise: how the kernels of linear layers are stored; the rest keeps its dtype.
    """
    passes = _passes(workload, mesh)
    held = zip(workload.members, forms(workload, quantise), strict=True)
    parameters = sum(sum(_parameter_bytes(config, mesh, form).values()) for config, form in held)
    parameters += _adapter_bytes(workload, mesh)
    if workload.union:
        tables = jax.tree.leaves(workload.spec().union)
        parameters += sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in tables)
    agent = observations = 0
    learning = Moment(0, 0)
    if workload.train is not None:
        agent = _agent_bytes(workload)
        widths = [config.hidden_width for config in workload.members] * (workload.adapters or 1)
        samples = workload.batch * workload.spans * FLOAT
        observations = samples * sum(widths)
        # A member's are put into the order of time while they still lie as they were recorded; then those of a
        # minibatch are taken out.
        taken = observations // (workload.train.minibatches * mesh.shape[sharding.DATA])
        learning = Moment(observations, samples * max(widths) + taken)
    recorded = observations // mesh.shape[sharding.DATA]
    return Memory(
        parameters=parameters,
        agent=agent,
        cache=sum(run.cache for run in passes),
        observations=observations,
        reading=_reading(workload, passes),
        writing=_writing(workload, passes, recorded),
        learning=learning,
    )


def _adapter_bytes(workload: Workload, mesh: AbstractMesh) -> int:
    """Of a stack of adapters, laid out for storage and once more for a batch."""
    if not workload.adapters:
        return 0
    (config,) = workload.members
    linears = transformer.linears(config)
    factors = jax.eval_shape(lambda: lora.init(workload.lora, linears, jax.random.key(0)))
    axes = lora.logical_axes(factors, linears)
    sizes = jax.tree.map(
        lambda names, leaf: _size(names, leaf.shape, mesh), axes, factors, is_leaf=lambda x: isinstance(x, tuple)
    )
    return workload.adapters * FLOAT * sum(jax.tree.leaves(sizes))


def _agent_bytes(workload: Workload) -> int:
    """The agent and its optimiser, which every device holds whole."""
    config = workload.train
    assert config is not None
    policy = ppo.make_policy(config)
    dims = Dims(tuple(c.hidden_width for c in workload.members) * (workload.adapters or 1), workload.spans)
    state = jax.eval_shape(lambda seeds: ppo.init_learners(seeds, policy, dims, config), np.zeros(1, np.uint32))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


class Limit(NamedTuple):
    """The least time of a piece of work on one device."""

    seconds: float
    bound: Literal["memory", "products"]  # what it waits for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """The least time of each piece of work on a batch of whole answers."""

    reading: Limit  # all prompts
    step: Limit  # a token of every row
    learning: Limit  # nothing without training
    steps: int

    @property
    def seconds(self) -> float:
        """Of it all: with training, of an iteration."""
        return self.reading.seconds + self.steps * self.step.seconds + self.learning.seconds


# A float32 product of full precision is six of bfloat16 (TPUs; other devices are about as much slower).
_FLOAT32_PRODUCTS = 6


def limits(workload: Workload, mesh: AbstractMesh, device: Device, quantise: Quantised | None = None) -> Limits:
    """How fast a device's memory and products allow a batch to be, every answer written to its end."""

    def limit(read: float, operations: float) -> Limit:
        by_memory, by_products = read / (device.bandwidth * 1e9), operations / (device.flops * 1e12)
        return Limit(max(by_memory, by_products), "memory" if by_memory >= by_products else "products")

    reading_bytes = reading_operations = step_bytes = step_operations = 0.0
    for run, form in zip(_passes(workload, mesh), forms(workload, quantise), strict=True):
        config, reader = run.config, run.config.encoder or run.config
        stored, plain = (_parameter_bytes(config, mesh, q) for q in (form, None))
        factor = 2 * (_FLOAT32_PRODUCTS if config.dtype == "float32" else 1)
        in_layers = "encoder.layers" if config.encoder else "layers"
        of_reading = {path for path in plain if path.startswith(in_layers)}
        groups = run.rows // run.rows_at_once
        reading_bytes += groups * sum(stored[path] for path in of_reading) + run.prompt_cache
        tokens = run.rows * run.tokens
        taken = transformer.experts_share(config)
        in_use = sum(plain[path] * (taken if ".ffn.experts." in path else 1) for path in of_reading)
        elements = in_use / _itemsize(config)
        attending = reader.layers - len(reader.recurrent_layers)
        attended = 2 * tokens * run.tokens * run.heads * reader.head_width * attending
        reading_operations += factor * (tokens * elements + attended)
        step_bytes += transformer.active_bytes(config, stored, run.rows) + run.cache
        attended = 2 * run.rows * cache.places(config, run.slots, run.ahead) * run.heads * config.head_width
        step_operations += factor * (run.rows * transformer.active_bytes(config, plain) / _itemsize(config) + attended)
    learning = Limit(0.0, "memory")
    if workload.train is not None:
        held = memory(workload, mesh, quantise)
        samples = workload.batch * workload.spans / mesh.shape[sharding.DATA]
        agent = held.agent / (3 * FLOAT)  # beside two moments of Adam's
        # Observations are taken out of their place, read forward and read for the gradient.
        epochs = workload.train.epochs
        read = 3 * epochs * held.observations / mesh.shape[sharding.DATA]
        learning = limit(read, 6 * _FLOAT32_PRODUCTS * epochs * samples * agent)
    return Limits(
        reading=limit(reading_bytes, reading_operations),
        step=limit(step_bytes, step_operations),
        learning=learning,
        steps=workload.new,
    )
