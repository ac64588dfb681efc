"""The same ensemble in torch: what this program's decoding is compared with.

In: Llama members with one vocabulary, as Hugging Face directories or as LMs whose arrays lie on a device, and unpadded
prompts Int[B, T]. Out: Int[B, N] greedy tokens under the uniform mean of the members' probabilities. End tokens are
ignored: every row writes N tokens.

Two peers, each as fast as we could make it:

- The loop, what people run: transformers models with a key/value cache in a Python loop.
- `BestPeer`, what torch can do: a hand-written forward with stacked projections (q, k and v are one product, gate and
  up another), a preallocated cache, `torch.compile` where it wins, and on a GPU the whole step as one CUDA graph that
  feeds itself. (`torch.compile(mode="reduce-overhead")` of a whole step makes the same kernels and such a graph, but
  compiles every layer anew.)

Both choose among their variants by measuring on the case at hand, because none wins everywhere: compiling pays where
the products are tiny, and fused attention (sdpa) loses to plain products for one query per row.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.common import cores, seconds_of
from rlae_jax.models import LM, ModelConfig

SELECTION_ROUNDS = 2
Generate = Callable[[Any, int], Any]  # prompts, here ids Int[B, T], and N -> what was written, here tokens Int[B, N]


def setup() -> None:
    """All cores for torch, and no chatter from transformers."""
    torch.set_num_threads(cores())
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@dataclasses.dataclass(frozen=True)
class Peer:
    """The fastest of some variants, and what each of them took."""

    generate: Generate
    variant: str
    seconds: dict[str, float]  # the best call, per variant
    failed: dict[str, str]  # variants that this machine cannot run (no C++ compiler, say), and why


def fastest(variants: dict[str, Generate], prompts: Any, new_tokens: int) -> Peer:
    """Times every variant on the case itself, compilation excluded, and keeps the fastest."""
    seconds: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, generate in variants.items():
        try:
            generate(prompts, 3)  # the first step compiles, the third runs what was compiled
            seconds[name] = float("inf")
        except Exception as error:  # compiler back ends raise many kinds
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
    for _ in range(SELECTION_ROUNDS if len(seconds) > 1 else 1):  # in turn, so that a busy moment hits all alike
        for name in seconds:
            took = seconds_of(functools.partial(variants[name], prompts, new_tokens))
            seconds[name] = min(seconds[name], took)
    if not seconds:
        raise RuntimeError(f"no variant of the peer runs here: {failed}")
    best = min(seconds, key=lambda name: seconds[name])
    return Peer(variants[best], best, seconds, failed)


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The uniform linear fusion Float[B, V], up to the factor K that an argmax does not see."""
    total = torch.softmax(logits[0], dim=-1, dtype=torch.float32)
    for more in logits[1:]:
        total = total + torch.softmax(more, dim=-1, dtype=torch.float32)
    return total


# --- the transformers loop ---


def loop_peer(
    directories: Sequence[Path], prompt_ids: np.ndarray, new_tokens: int, *, attentions: Sequence[str]
) -> Peer:
    """transformers models, their own `DynamicCache`, batched, last position's logits only."""
    variants = {}
    for attention in attentions:
        models = [
            transformers.LlamaForCausalLM.from_pretrained(
                directory, dtype=torch.float32, attn_implementation=attention
            ).eval()
            for directory in directories
        ]
        variants[attention] = transformers_loop(models)
    return fastest(variants, prompt_ids, new_tokens)


def transformers_loop(models: Sequence[Any]) -> Generate:
    """The loop over models that are loaded, on their device."""

    @torch.inference_mode()
    def generate(prompt_ids: np.ndarray, new_tokens: int) -> np.ndarray:
        caches = [transformers.DynamicCache(config=model.config) for model in models]
        feed = torch.from_numpy(prompt_ids).long().to(models[0].device)
        tokens = []
        for _ in range(new_tokens):
            logits = [
                model(feed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
                for model, cache in zip(models, caches, strict=True)
            ]
            feed = mean_probabilities(logits).argmax(dim=-1, keepdim=True)
            tokens.append(feed)
        return torch.cat(tokens, dim=1).cpu().numpy()

    return generate


# --- as well as torch can ---


@dataclasses.dataclass(frozen=True)
class Dims:
    """A member's sizes; letters as in the package: G key/value heads, M query heads per G, H head width."""

    groups: int
    per_group: int
    head: int
    eps: float


# Per layer: input norm, qkv [(N + 2G) H, D], o [D, N H], ffn norm, gate and up [2F, D], down [D, F].
LayerWeights = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
LayerCache = tuple[Tensor, Tensor]  # keys and values [B, G, S, H]


@dataclasses.dataclass(frozen=True)
class Member:
    """One model as plain tensors."""

    dims: Dims
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor
    frequencies: Tensor  # of the rotary angles, float32 [H / 2]


def read_member(directory: Path) -> Member:
    """A Hugging Face directory's weights, with the projections that read the same input stacked."""
    model = transformers.LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32)
    config: Any = model.config
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    layers = []
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}."
        projections = [weights[f"{at}self_attn.{name}_proj.weight"] for name in "qkv"]
        layers.append(
            (
                weights[f"{at}input_layernorm.weight"],
                torch.cat(projections),
                weights[f"{at}self_attn.o_proj.weight"],
                weights[f"{at}post_attention_layernorm.weight"],
                torch.cat([weights[f"{at}mlp.gate_proj.weight"], weights[f"{at}mlp.up_proj.weight"]]),
                weights[f"{at}mlp.down_proj.weight"],
            )
        )
    head = weights["model.embed_tokens.weight"] if config.tie_word_embeddings else weights["lm_head.weight"]
    groups = config.num_key_value_heads
    dims = Dims(groups, config.num_attention_heads // groups, config.head_dim, config.rms_norm_eps)
    frequencies = model.model.rotary_emb.inv_freq.detach()
    return Member(
        dims, weights["model.embed_tokens.weight"], tuple(layers), weights["model.norm.weight"], head, frequencies
    )


def member_on_device(lm: LM) -> Member:
    """An LM's weights in torch's layout, copied on the device where its arrays lie."""
    config = lm.config

    def tensor(leaf: Any) -> Tensor:
        return torch.from_dlpack(leaf)

    def outputs_first(kernel: Any, inputs: int = 1) -> Tensor:
        width = int(np.prod(kernel.shape[:inputs]))
        return tensor(kernel).reshape(width, -1).T.contiguous()

    layers = []
    for i in range(config.layers):
        layer = lm.params["layers"][i]
        attention, ffn = layer["attention"], layer["ffn"]
        layers.append(
            (
                tensor(layer["attention_norm"]["scale"]),
                torch.cat([outputs_first(attention[which]["kernel"]) for which in "qkv"]),
                outputs_first(attention["o"]["kernel"], inputs=2),
                tensor(layer["ffn_norm"]["scale"]),
                torch.cat([outputs_first(ffn[which]["kernel"]) for which in ("gate", "up")]),
                outputs_first(ffn["down"]["kernel"]),
            )
        )
    embedding = tensor(lm.params["embedding"])
    head = embedding if config.tied_head else outputs_first(lm.params["head"]["kernel"])
    assert config.rope is not None
    steps = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=embedding.device)
    dims = Dims(config.kv_heads, config.heads // config.kv_heads, config.head_width, config.norm_eps)
    frequencies = config.rope.base ** (-steps / config.head_width)
    return Member(dims, embedding, tuple(layers), tensor(lm.params["norm"]["scale"]), head, frequencies)


def transformers_model(member: Member, config: ModelConfig) -> Any:
    """The member as a transformers model, which shares its memory."""
    assert config.rope is not None
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab,
        hidden_size=config.width,
        intermediate_size=config.ffn_width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope.base},
        max_position_embeddings=config.context,
        tie_word_embeddings=config.tied_head,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(settings)
    n, g = config.heads * config.head_width, config.kv_heads * config.head_width
    weights = {"model.embed_tokens.weight": member.embedding, "model.norm.weight": member.norm}
    weights["lm_head.weight"] = member.head
    for i, (input_norm, qkv, o, ffn_norm, gate_up, down) in enumerate(member.layers):
        named = {"input_layernorm": input_norm, "post_attention_layernorm": ffn_norm}
        named |= {f"self_attn.{which}_proj": part for which, part in zip("qkv", qkv.split([n, g, g]), strict=True)}
        gate, up = gate_up.chunk(2)
        named |= {"self_attn.o_proj": o, "mlp.gate_proj": gate, "mlp.up_proj": up, "mlp.down_proj": down}
        weights |= {f"model.layers.{i}.{name}.weight": tensor for name, tensor in named.items()}
    model.load_state_dict(weights, assign=True)
    # Its frequencies are no part of the state.
    with member.embedding.device:
        model.model.rotary_emb = type(model.model.rotary_emb)(settings)
    return model.eval()


def norm(x: Tensor, scale: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def feed_forward(x: Tensor, layer: LayerWeights, eps: float) -> Tensor:
    gate, up = F.linear(norm(x, layer[3], eps), layer[4]).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, layer[5])


def prefill_layer(x: Tensor, layer: LayerWeights, cache: LayerCache, cos: Tensor, sin: Tensor, dims: Dims) -> Tensor:
    """Whole prompts [B, T, D]; fills the first T slots of the cache."""
    b, t, _ = x.shape
    g, m, h = dims.groups, dims.per_group, dims.head
    heads = F.linear(norm(x, layer[0], dims.eps), layer[1]).view(b, t, g * m + 2 * g, h).transpose(1, 2)
    rotated = rotate(heads[:, : g * m + g], cos, sin)
    q, k, v = rotated[:, : g * m], rotated[:, g * m :], heads[:, g * m + g :]
    cache[0][:, :, :t] = k
    cache[1][:, :, :t] = v
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=m > 1)
    x = x + F.linear(out.transpose(1, 2).reshape(b, t, g * m * h), layer[2])
    return feed_forward(x, layer, dims.eps)


def _step_layer(
    x: Tensor,
    layer: LayerWeights,
    cache: LayerCache,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    used: int | None,
    hidden: Tensor | None,
    dims: Dims,
) -> Tensor:
    """One token per row [B, D], written to slot `position`.

    Attention reads the first `used` slots; or, where shapes must not change (compiled), all of them but the `hidden`.
    All rows are at one position, which the prompts of this benchmark allow.
    """
    b = x.shape[0]
    g, m, h = dims.groups, dims.per_group, dims.head
    heads = F.linear(norm(x, layer[0], dims.eps), layer[1]).view(b, g * m + 2 * g, h)
    rotated = rotate(heads[:, : g * m + g], cos, sin)
    keys, values = cache
    keys.index_copy_(2, position, rotated[:, g * m :, None])
    values.index_copy_(2, position, heads[:, g * m + g :, None])
    if used is not None:
        keys, values = keys[:, :, :used], values[:, :, :used]
    # The query heads of a group are rows of one product, so that keys and values are read once and never repeated.
    scores = rotated[:, : g * m].reshape(b, g, m, h) @ keys.transpose(-1, -2) * h**-0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    out = scores.softmax(dim=-1) @ values
    x = x + F.linear(out.reshape(b, g * m * h), layer[2])
    return feed_forward(x, layer, dims.eps)


class BestPeer:
    """The ensemble with preallocated caches of `slots` slots, used again at every call.

    Args:
      compiled: what `torch.compile` gets: nothing, each layer, or the whole step of all members, fusion and argmax
        included.
      graph: on a GPU, the whole step is one CUDA graph, so that neither Python nor the driver stands between kernels.
    """

    def __init__(
        self,
        members: Sequence[Member],
        batch: int,
        slots: int,
        compiled: str | None = None,
        *,
        graph: bool = False,
    ):
        device, dtype = members[0].embedding.device, members[0].embedding.dtype
        self.members = members
        self.slots = torch.arange(slots, device=device)

        def zeros(member: Member) -> Tensor:
            shape = (batch, member.dims.groups, slots, member.dims.head)
            return torch.zeros(shape, dtype=dtype, device=device)

        # Zeros rather than anything: a slot that is masked still takes part in a product, where NaN would spread.
        self.caches = [[(zeros(member), zeros(member)) for _ in member.layers] for member in members]
        angles = [self.slots[:, None] * member.frequencies for member in members]
        self.rotations = [(angle.cos().to(dtype), angle.sin().to(dtype)) for angle in angles]
        self.static = compiled is not None or graph
        self.layer: Callable[..., Tensor] = _step_layer
        self.step: Callable[..., Tensor] = self._step
        # Inductor's C++ wrapper keeps Python out of a compiled call. Its kernels for one row read as fast as memory
        # gives only if they are tuned.
        options: dict[str, Any] = {"cpp_wrapper": True}
        if device.type == "cuda":
            options = {"coordinate_descent_tuning": batch == 1}
        if compiled == "layer":
            self.layer = torch.compile(_step_layer, dynamic=False, fullgraph=True, options=options)
        elif compiled == "step":
            self.step = torch.compile(self._step, dynamic=False, fullgraph=True, options=options)
        self.graph = _Graph(self, batch) if graph else None

    def _step(
        self,
        feed: Tensor,
        caches: Sequence[Sequence[LayerCache]],
        position: Tensor,
        used: int | None,
        hidden: Tensor | None,
    ) -> Tensor:
        logits = []
        for member, cache, (cos, sin) in zip(self.members, caches, self.rotations, strict=True):
            x = F.embedding(feed, member.embedding)
            cos_now, sin_now = cos.index_select(0, position), sin.index_select(0, position)
            for layer, layer_cache in zip(member.layers, cache, strict=True):
                x = self.layer(x, layer, layer_cache, cos_now, sin_now, position, used, hidden, member.dims)
            logits.append(F.linear(norm(x, member.norm, member.dims.eps), member.head))
        return mean_probabilities(logits).argmax(dim=-1)

    @torch.inference_mode()
    def generate(self, prompt_ids: np.ndarray, new_tokens: int) -> np.ndarray:
        ids = torch.from_numpy(prompt_ids).long().to(self.slots.device)
        t = ids.shape[1]
        logits = []
        for member, cache, (cos, sin) in zip(self.members, self.caches, self.rotations, strict=True):
            x = F.embedding(ids, member.embedding)
            for layer, layer_cache in zip(member.layers, cache, strict=True):
                x = prefill_layer(x, layer, layer_cache, cos[:t], sin[:t], member.dims)
            logits.append(F.linear(norm(x[:, -1], member.norm, member.dims.eps), member.head))
        feed = mean_probabilities(logits).argmax(dim=-1)
        if self.graph is not None:
            return self.graph.go_on(feed, t, new_tokens).cpu().numpy()
        tokens = [feed]
        for i in range(t, t + new_tokens - 1):
            hidden = self.slots > i if self.static else None
            feed = self.step(feed, self.caches, self.slots[i : i + 1], None if self.static else i + 1, hidden)
            tokens.append(feed)
        return torch.stack(tokens, dim=1).cpu().numpy()


class _Graph:
    """A peer's step as a CUDA graph: it reads the token that it chose last, and moves on by itself."""

    @torch.inference_mode()
    def __init__(self, peer: BestPeer, batch: int):
        self.peer = peer
        slots = peer.slots
        self.feed = torch.zeros(batch, dtype=torch.long, device=slots.device)
        self.position = torch.zeros(1, dtype=torch.long, device=slots.device)
        self.chosen = torch.zeros(batch, len(slots), dtype=torch.long, device=slots.device)
        # What is compiled, tuned or allocated at a first call must not be captured.
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(aside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.step()

    def step(self) -> None:
        hidden = self.peer.slots > self.position
        chosen = self.peer.step(self.feed, self.peer.caches, self.position, None, hidden)
        self.chosen.index_copy_(1, self.position, chosen[:, None])
        self.feed.copy_(chosen)
        self.position.add_(1)

    def go_on(self, first: Tensor, position: int, new_tokens: int) -> Tensor:
        """Int[B, N]: the first token and those after it."""
        self.feed.copy_(first)
        self.position.fill_(position)
        for _ in range(new_tokens - 1):
            self.graph.replay()
        return torch.cat([first[:, None], self.chosen[:, position : position + new_tokens - 1]], dim=1)


def best_peer(
    directories: Sequence[Path], prompt_ids: np.ndarray, new_tokens: int, *, compiled: Sequence[str | None]
) -> Peer:
    """The fastest `BestPeer`. `compiled` lists what to try, as in `BestPeer`."""
    # Compiled code of earlier cases counts towards a limit beyond which torch silently stops compiling.
    torch.compiler.reset()
    members = [read_member(directory) for directory in directories]
    batch, slots = prompt_ids.shape[0], prompt_ids.shape[1] + new_tokens
    variants: dict[str, Generate] = {
        f"compiled {what}" if what else "eager": BestPeer(members, batch, slots, what).generate for what in compiled
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastest(variants, prompt_ids, new_tokens)


def best_on_device(members: Sequence[Member], prompt_ids: np.ndarray, new_tokens: int) -> Peer:
    """The fastest `BestPeer` of members on a device: on a GPU as a CUDA graph, of plain and of compiled layers."""
    torch.compiler.reset()
    batch, slots = prompt_ids.shape[0], prompt_ids.shape[1] + new_tokens
    graph = members[0].embedding.device.type == "cuda"

    def variant(compiled: str | None) -> Generate:
        peers: list[BestPeer] = []

        def generate(prompt_ids: np.ndarray, new_tokens: int) -> np.ndarray:
            if not peers:  # only now, so that what cannot be compiled or captured is told as any failure
                peers.append(BestPeer(members, batch, slots, compiled, graph=graph))
            return peers[0].generate(prompt_ids, new_tokens)

        return generate

    names = {"graph": None, "graph, compiled layer": "layer"} if graph else {"eager": None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastest({name: variant(compiled) for name, compiled in names.items()}, prompt_ids, new_tokens)
