"""What a plan is made for, and the programs that would run it, with arguments that are shapes alone.

In: configurations, a batch, lengths, a mesh whose devices need not be there. Out: programs ready to be compiled for
them. They are the ones that `generate` and `train` run, so that a compiler's answer is about those.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlae_jax import hlo, sharding
from rlae_jax.config import PPOConfig
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion import programs
from rlae_jax.fusion.policy import Fixed, Policy
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.sampling import Sampling, SamplingOptions
from rlae_jax.fusion.spec import DecodeSpec, Spelling, UnionTables
from rlae_jax.models import LoraConfig, ModelConfig, lora, transformer
from rlae_jax.models.quantise import Kind
from rlae_jax.ppo import iteration as ppo

REFERENCE = 16  # tokens of a reference answer: they are as good as nothing beside the rest
# Of a union: tokens that an entry takes at most but for one in ten, which decides the members' room in an answer, and
# the mean that sizes its tables (gpt2 with mistral_v3).
TOKENS_PER_ENTRY, SPELLED = 2, 1.5
_LORA = LoraConfig()
SLACK = 8  # further tokens of room, see `UnionCodec.room`


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """A batch of answers of an ensemble, and with `train` an iteration of PPO or MAPPO on them.

    Attributes:
      members: one configuration per member; with `adapters` the base's alone.
      batch: answers decoded together, B.
      prompt, new: tokens of a prompt, as padded, and of an answer.
      union: entries of the members' common vocabulary where their tokenizers differ; 0 where there is one tokenizer.
      adapters: so many adapters of the base are the members, on one shared pass.
      train: settings of the weight agent, if one is trained.
      stored: of each member how its checkpoint holds its kernels, where that is quantised; () for none.
    """

    members: tuple[ModelConfig, ...]
    batch: int = 1
    prompt: int = 512
    new: int = 256
    span_length: int = 4
    union: int = 0
    adapters: int = 0
    lora: LoraConfig = _LORA
    train: PPOConfig | None = None
    stored: tuple[Kind | None, ...] = ()

    @property
    def count(self) -> int:
        """K, the members that an agent weights."""
        return self.adapters or len(self.members)

    @property
    def spans(self) -> int:
        """P."""
        return -(-self.new // self.span_length)

    def slots(self, config: ModelConfig) -> int:
        """S: of a member's cache."""
        if config.encoder is not None:
            return 1 + self.new
        if not self.union:
            return self.prompt + self.new
        from rlae_jax.fusion.ragged import WIDEST

        return self.prompt - 1 + 1 + self.member_tokens + WIDEST

    @property
    def member_tokens(self) -> int:
        """Room for an answer in each member's own tokens."""
        return TOKENS_PER_ENTRY * self.new + SLACK if self.union else 0

    def spec(self, policy: Policy | None = None, *, temperature: float = 0.0, record: bool = False) -> DecodeSpec:
        """The spec that a command would make; tables of a union are shapes."""
        return DecodeSpec(
            members=self.members * (self.adapters or 1),
            sampling=Sampling.create(SamplingOptions(temperature=temperature)),
            shared_base=bool(self.adapters),
            policy=policy or Fixed(),
            sample_weights=record,
            record=record,
            span_length=self.span_length,
            max_new_tokens=self.new,
            union=self._union_tables() if self.union else None,
            member_tokens=self.member_tokens,
        )

    def _union_tables(self) -> UnionTables:
        u = self.union
        spelled = int(SPELLED * u)

        def shapes(*sizes: int) -> Any:
            return (jax.ShapeDtypeStruct((n,), jnp.int32) for n in sizes)

        spellings = tuple(Spelling(*shapes(u, u, c.usable_vocab, spelled, u + 1)) for c in self.members)
        utf8: Any = jax.ShapeDtypeStruct((8, u), jnp.int8)
        return UnionTables(spellings, utf8)

    # --- arguments ---

    def params(self, mesh: Mesh | None) -> tuple[Any, ...]:
        """The members' parameters, as a loaded ensemble has them."""
        bases = tuple(place_params(config, mesh) for config in self.members)
        if not self.adapters:
            return bases
        (base,), config = bases, self.members[0]
        linears = transformer.linears(config)
        factors = jax.eval_shape(lambda: lora.init(self.lora, linears, jax.random.key(0)))
        stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((self.adapters, *leaf.shape), leaf.dtype), factors)
        axes = lora.logical_axes(stacked, linears)
        stack = lora.Stack(_placed(stacked, axes, mesh), place_whole(jnp.zeros(self.adapters), mesh))
        return (lora.Adapted(base, stack, place_whole(jnp.zeros((1, self.adapters)), mesh)),)

    def prompts(self, mesh: Mesh | None, *, keys: bool = True) -> Prompts:
        """The batch's rows."""
        b = self.batch
        arrays = len(self.members) if self.union else 1
        ids: Any = (jax.ShapeDtypeStruct((b, self.prompt), jnp.int32),) * arrays
        made = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), b)) if keys else None
        active: Any = jax.ShapeDtypeStruct((b,), bool)
        limits: Any = jax.ShapeDtypeStruct((b,), jnp.int32)
        prompts: Prompts = place_rows(Prompts(ids, ids, made, active, limits), mesh)
        return prompts

    def state(self, mesh: Mesh | None) -> Any:
        """The state before the first token."""
        spec = place_whole(self.spec(), None)
        state = jax.eval_shape(decoding.prefill, self.params(None), self.prompts(None), spec)
        members = jax.tree_util.tree_map_with_path(lambda path, leaf: _place_cache(path, leaf, mesh), state.members)
        return place_rows(state, mesh)._replace(members=members)

    def cache_shapes(self, mesh: Mesh) -> tuple[hlo.Shape, ...]:
        """The caches as one device holds them."""
        names = {"bfloat16": "bf16", "float16": "f16", "float32": "f32", "int8": "s8", "uint8": "u8"}
        leaves = [leaf for cache in self.state(mesh).caches for leaf in jax.tree.leaves(cache.layers)]
        return tuple(hlo.Shape(names[leaf.dtype.name], leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)

    def weights(self, mesh: Mesh | None) -> Any:
        """Fixed weights of every row."""
        return place_rows(jax.ShapeDtypeStruct((self.batch, self.count), jnp.float32), mesh)

    # --- programs ---

    def lower_prefill(self, mesh: Mesh | None) -> jax.stages.Lowered:
        """Reading the prompts."""
        return _lower(programs.prefill, mesh, self.params(mesh), self.prompts(mesh), self._spec(mesh), 1)

    def lower_loop(self, mesh: Mesh | None) -> jax.stages.Lowered:
        """The decoding loop alone, whose state is donated."""
        args = self.params(mesh), self.state(mesh), self.weights(mesh), self._spec(mesh)
        return _lower(programs.decode_until, mesh, *args, place_whole(np.int32(0), mesh))

    def lower_generate(self, mesh: Mesh | None) -> jax.stages.Lowered:
        """From prompts to answers."""
        args = self.params(mesh), self.prompts(mesh), self.weights(mesh), self._spec(mesh)
        return _lower(programs.decode_batch, mesh, *args, 1)

    def _spec(self, mesh: Mesh | None) -> DecodeSpec:
        spec: DecodeSpec = place_whole(self.spec(), mesh)
        return spec

    def lower_iterate(self, mesh: Mesh | None) -> jax.stages.Lowered:
        """An iteration of training, from prompts to the updated agent."""
        config = self.train
        assert config is not None
        policy, seeds = ppo.make_policy(config), jax.ShapeDtypeStruct((1,), jnp.uint32)
        spec = self.spec(policy, temperature=config.temperature, record=True)
        states = jax.eval_shape(lambda s: ppo.init_learners(s, policy, spec.dims, config), seeds)
        references = jax.ShapeDtypeStruct((self.batch, REFERENCE), jnp.int32)
        lengths = jax.ShapeDtypeStruct((self.batch,), jnp.int32)
        batch = ppo.Batch(self.prompts(mesh, keys=False), *place_rows((references, lengths), mesh))
        states, seeds, spec = place_whole((states, seeds, spec), mesh)
        return _lower(ppo.iterate, mesh, states, self.params(mesh), batch, seeds, spec, config)


def _lower(program: Any, mesh: Mesh | None, *args: Any) -> jax.stages.Lowered:
    with sharding.use(mesh):
        lowered: jax.stages.Lowered = program.lower(*args)
    return lowered


def _shape(leaf: Any, place: NamedSharding | None) -> jax.ShapeDtypeStruct:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jax.ShapeDtypeStruct(jnp.shape(leaf), dtype, sharding=place)


def _placed(tree: Any, axes: Any, mesh: Mesh | None, *, fsdp: bool = False) -> Any:
    """Shapes laid out by the names of their axes."""
    if mesh is None:
        return tree
    return jax.tree.map(_shape, tree, sharding.shardings(axes, tree, mesh, fsdp=fsdp))


def place_params(config: ModelConfig, mesh: Mesh | None, *, fsdp: bool = False) -> Any:
    """A model's parameters on a mesh, as shapes."""
    return _placed(transformer.abstract_params(config), transformer.logical_axes(config), mesh, fsdp=fsdp)


def place_whole(tree: Any, mesh: Mesh | None) -> Any:
    """A tree's shapes, held whole by every device."""
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda leaf: _shape(leaf, place), tree)


def _place(leaf: Any, axes: Sequence[str | None], mesh: Mesh | None) -> Any:
    if mesh is None:
        return _shape(leaf, None)
    names = (*axes, *[None] * (len(leaf.shape) - len(axes)))
    return _shape(leaf, NamedSharding(mesh, sharding.partition(names, leaf.shape, mesh)))


def place_rows(tree: Any, mesh: Mesh | None) -> Any:
    """A tree's shapes, rows of a batch spread over `data`."""
    return jax.tree.map(lambda leaf: _place(leaf, ("batch",), mesh), tree)


def _place_cache(path: Any, leaf: Any, mesh: Mesh | None) -> Any:
    """Keys and values have the heads that they are of on `model`."""
    names = ("batch", "kv_heads") if ".layers" in jax.tree_util.keystr(path) else ("batch",)
    return _place(leaf, names, mesh)
