"""T5, T5 1.1 and Flan-T5 (Raffel et al., 2020; Chung et al., 2022): encoder and decoder with relative positions."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import ModelConfig, RelativeBias
from rlae_jax.models.families.base import Family, activation, refuse


def _stack(theirs: str, ours: str, ffn: int, gated: bool) -> dict[str, str]:
    """One of the two stacks; `ffn` is the feed-forward's number among a layer's branches."""
    block, layer = f"{theirs}.block.{{i}}.layer", f"{ours}layers.{{i}}"
    up = {"wi_0": "gate", "wi_1": "up"} if gated else {"wi": "up"}
    return {
        f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias": f"{ours}relative_bias.table",
        f"{block}.0.layer_norm": f"{layer}.attention_norm",
        **{f"{block}.0.SelfAttention.{name}": f"{layer}.attention.{name}" for name in "qkvo"},
        f"{block}.{ffn}.layer_norm": f"{layer}.ffn_norm",
        **{f"{block}.{ffn}.DenseReluDense.{name}": f"{layer}.ffn.{path}" for name, path in up.items()},
        f"{block}.{ffn}.DenseReluDense.wo": f"{layer}.ffn.down",
        f"{theirs}.final_layer_norm": f"{ours}norm",
    }


def modules(config: ModelConfig) -> dict[str, str]:
    """T5's table of names."""
    return {
        "shared": "embedding",
        **_stack("encoder", "encoder.", 1, config.gated),
        **_stack("decoder", "", 2, config.gated),
        "decoder.block.{i}.layer.1.layer_norm": "layers.{i}.cross_norm",
        **{f"decoder.block.{{i}}.layer.1.EncDecAttention.{name}": f"layers.{{i}}.cross.{name}" for name in "qkvo"},
        "lm_head": "head",
    }


DEFAULTS = {
    "d_kv": 64,
    "num_decoder_layers": None,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "scale_decoder_outputs": None,
    "decoder_start_token_id": None,
}


def read(hf: Any) -> dict[str, Any]:
    """T5's configuration. Whether the head is tied is told by the checkpoint's tensors alone: transformers sets
    `tie_word_embeddings` for all, and what the file said about it decides the scale of the hidden states."""
    buckets, farthest = hf.relative_attention_num_buckets, hf.relative_attention_max_distance
    if farthest <= buckets // 2:
        raise InputError(
            f"relative_attention_max_distance ({farthest}) must be more than half of relative_attention_num_buckets "
            f"({buckets})"
        )
    start = hf.decoder_start_token_id
    start = (hf.pad_token_id or 0) if start is None else start
    if not 0 <= start < hf.vocab_size:
        raise InputError(f"decoder_start_token_id is {start}; ids from 0 to {hf.vocab_size} - 1 exist")
    scaled = hf.tie_word_embeddings if hf.scale_decoder_outputs is None else hf.scale_decoder_outputs
    gate, _, act = hf.feed_forward_proj.rpartition("-")
    refuse(feed_forward_proj=hf.feed_forward_proj if gate not in ("", "gated") else None)
    decoder: dict[str, Any] = {
        "vocab": hf.vocab_size,
        "width": hf.d_model,
        "layers": hf.num_layers if hf.num_decoder_layers is None else hf.num_decoder_layers,
        "heads": hf.num_heads,
        "kv_heads": hf.num_heads,
        "head_width": hf.d_kv,
        "ffn_width": hf.d_ff,
        "norm_eps": hf.layer_norm_epsilon,
        "attention_scale": 1.0,
        "rope": None,
        "relative_bias": RelativeBias(buckets, farthest),
        "gated": gate == "gated",
        "activation": activation("gelu_new" if hf.feed_forward_proj == "gated-gelu" else act),
        "context": 1 << 20,  # relative positions have no end
    }
    encoder = ModelConfig(**{**decoder, "layers": hf.num_layers, "causal": False, "has_head": False})
    return {
        **decoder,
        "encoder": encoder,
        "head_scale": hf.d_model**-0.5 if scaled else 1.0,
        "start_id": start,
    }


def write(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model that was made here, in T5's terms."""
    bias = config.relative_bias or RelativeBias(0, 0)
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": config.vocab,
        "d_model": config.width,
        "d_kv": config.head_width,
        "d_ff": config.ffn_width,
        "num_layers": 0 if config.encoder is None else config.encoder.layers,
        "num_decoder_layers": config.layers,
        "num_heads": config.heads,
        "relative_attention_num_buckets": bias.buckets,
        "relative_attention_max_distance": bias.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "feed_forward_proj": f"gated-{config.activation}" if config.gated else config.activation,
        "tie_word_embeddings": config.head_scale != 1.0,
        "decoder_start_token_id": config.start_id,
        "is_encoder_decoder": True,
    }


FAMILY = Family(
    model_type="t5",
    architectures=("T5ForConditionalGeneration", "T5WithLMHeadModel"),
    defaults=DEFAULTS,
    read=read,
    modules=modules,
    prefix="",
    head_decides_tie=True,
    write=write,
    ignored=(r"^(encoder|decoder)\.embed_tokens\.weight$", r"EncDecAttention\.relative_attention_bias\.weight$"),
)
