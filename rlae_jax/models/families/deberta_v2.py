"""DeBERTa v2 and v3 (He et al., 2021, 2023): attention to content and to relative positions, and their variants."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import Convolution, Disentangled
from rlae_jax.models.families.base import Family, Heads, activation
from rlae_jax.models.families.bert import DEFAULTS as BERT_DEFAULTS
from rlae_jax.models.families.bert import encoder, encoder_modules, scorer

HEADS: Heads = {"DebertaV2ForSequenceClassification": "classifier"}
_SELF = "deberta.encoder.layer.{i}.attention.self"
DEFAULTS = BERT_DEFAULTS | {
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "relative_attention": False,
    "max_relative_positions": -1,
    "position_biased_input": True,
    "pos_att_type": None,
    "pooler_hidden_act": "gelu",
}
MODULES = {
    **encoder_modules("deberta.", ("query_proj", "key_proj", "value_proj")),
    "deberta.embeddings.embed_proj": "project_in",
    "deberta.encoder.rel_embeddings": "relative_embeddings.table",
    "deberta.encoder.LayerNorm": "relative_embeddings.norm",
    f"{_SELF}.pos_key_proj": "layers.{i}.attention.position_k",
    f"{_SELF}.pos_query_proj": "layers.{i}.attention.position_q",
    "deberta.encoder.conv.conv": "convolution",
    "deberta.encoder.conv.LayerNorm": "convolution_norm",
    "pooler.dense": "scorer.dense",
    "classifier": "scorer.out",
}


def _attention(hf: Any, kinds: list[str], head_width: int) -> dict[str, Any]:
    """Disentangled attention, or plain attention whose scale counts the kinds of scores all the same."""
    if not hf.relative_attention:
        terms = 1 + len({"c2p", "p2c"} & set(kinds))
        return {"attention_scale": (head_width * terms) ** -0.5}
    buckets = max(getattr(hf, "position_buckets", -1), 0)
    max_position = hf.max_relative_positions if hf.max_relative_positions > 0 else hf.max_position_embeddings
    if buckets and not 0 < buckets // 2 < max_position - 1:
        raise InputError(f"position_buckets = {buckets} is not supported with {max_position} relative positions")
    disentangled = Disentangled(
        span=buckets or max_position,
        buckets=buckets,
        max_position=max_position,
        content_to_position="c2p" in kinds,
        position_to_content="p2c" in kinds,
        shared_projections=bool(getattr(hf, "share_att_key", False)),
        norm_embeddings="layer_norm" in getattr(hf, "norm_rel_ebd", "none").lower(),
    )
    return {"disentangled": disentangled}


def _convolution(hf: Any) -> Convolution | None:
    width, groups = getattr(hf, "conv_kernel_size", 0), getattr(hf, "conv_groups", 1)
    if width <= 0:
        return None
    if width % 2 == 0 or hf.hidden_size % groups:
        raise InputError(f"conv_kernel_size = {width} with conv_groups = {groups} is not supported")
    return Convolution(width=width, groups=groups, activation=activation(getattr(hf, "conv_act", "tanh")))


def read(hf: Any) -> dict[str, Any]:
    """DeBERTa's configuration."""
    kinds = hf.pos_att_type or []
    if isinstance(kinds, str):
        kinds = [kind.strip() for kind in kinds.lower().split("|")]
    heads, width = hf.num_attention_heads, hf.hidden_size
    head_width = getattr(hf, "attention_head_size", width // heads)
    if head_width * heads != width:
        raise InputError(f"attention_head_size = {head_width} is not supported: {heads} heads make up {width}")
    act, pooled = hf.pooler_hidden_act, getattr(hf, "pooler_hidden_size", width)
    head = scorer(hf, HEADS, act)
    if head is not None and pooled != width:
        raise InputError(f"pooler_hidden_size = {pooled} is not supported: it must be hidden_size, {width}")
    embedding_width = getattr(hf, "embedding_size", width)
    return encoder(
        hf,
        **_attention(hf, kinds, head_width),
        head_width=head_width,
        learned_positions=hf.max_position_embeddings if hf.position_biased_input else 0,
        embedding_width=None if embedding_width == width else embedding_width,
        narrow_positions=True,
        convolution=_convolution(hf),
        scorer=head,
    )


FAMILY = Family(
    model_type="deberta-v2",
    architectures=("DebertaV2Model", "DebertaV2ForMaskedLM", *HEADS),
    heads=HEADS,
    defaults=DEFAULTS,
    read=read,
    modules=MODULES,
    prefix="deberta.",
    ignored=(
        r"^(deberta\.)?(cls|lm_predictions|mask_predictions|lm_head)\.",
        r"^(deberta\.)?pooler\.",
        r"\.position_ids$",
        # Some checkpoints hold what their own configuration switches off.
        r"^deberta\.embeddings\.position_embeddings\.",
        r"^deberta\.encoder\.LayerNorm\.",
    ),
)
