"""BERT (Devlin et al., 2019), and what the encoders that descend from it share."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.config import ModelConfig, TextHead
from rlae_jax.models.families.base import Family, Heads, activation, common, refuse

# The original names of the two labels; checkpoints do not store them.
NEXT_SENTENCE = ("IsNext", "NotNext")
HEADS: Heads = {
    "BertForSequenceClassification": "classifier",
    "BertForNextSentencePrediction": "next_sentence",
    "BertForPreTraining": "next_sentence",
}


DEFAULTS = {
    "architectures": None,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
    "id2label": None,
    "num_labels": None,
}


def encoder_modules(prefix: str, projections: tuple[str, str, str] = ("query", "key", "value")) -> dict[str, str]:
    """The table of names that the descendants share, but for their heads."""
    theirs, embeddings = f"{prefix}encoder.layer.{{i}}", f"{prefix}embeddings"
    return {
        f"{embeddings}.word_embeddings": "embedding",
        f"{embeddings}.position_embeddings": "positions",
        f"{embeddings}.token_type_embeddings": "token_types",
        f"{embeddings}.LayerNorm": "embedding_norm",
        **{
            f"{theirs}.attention.self.{name}": f"layers.{{i}}.attention.{ours}"
            for name, ours in zip(projections, "qkv", strict=True)
        },
        f"{theirs}.attention.output.dense": "layers.{i}.attention.o",
        f"{theirs}.attention.output.LayerNorm": "layers.{i}.attention_sum_norm",
        f"{theirs}.intermediate.dense": "layers.{i}.ffn.up",
        f"{theirs}.output.dense": "layers.{i}.ffn.down",
        f"{theirs}.output.LayerNorm": "layers.{i}.ffn_sum_norm",
    }


def encoder(hf: Any, **fields: Any) -> dict[str, Any]:
    """The fields that the descendants share: norms after the sums, biases everywhere, learned positions."""
    refuse(is_decoder=getattr(hf, "is_decoder", False), add_cross_attention=getattr(hf, "add_cross_attention", False))
    kind = getattr(hf, "position_embedding_type", None) or "absolute"
    refuse(position_embedding_type=None if kind == "absolute" else kind)
    return common(
        hf,
        **{
            "ffn_width": hf.intermediate_size,
            "causal": False,
            "has_head": False,
            "tied_head": False,
            "norm": "layer",
            "norm_eps": hf.layer_norm_eps,
            "norm_places": ("sum",),
            "final_norm": False,
            "embedding_norm": True,
            "rope": None,
            "learned_positions": hf.max_position_embeddings,
            "token_types": hf.type_vocab_size,
            "qkv_bias": True,
            "attention_out_bias": True,
            "ffn_bias": True,
            "gated": False,
            "activation": activation(hf.hidden_act),
            "pad_id": hf.pad_token_id,
            **fields,
        },
    )


def scorer(hf: Any, heads: Heads, act: str = "tanh") -> TextHead | None:
    """The head that the checkpoint's architecture has.

    Raises:
      InputError: a classifier without labels.
    """
    kind = heads.get((hf.architectures or [""])[0])
    if kind is None:
        return None
    named = {int(i): str(label) for i, label in (hf.id2label or {}).items()}
    count = hf.num_labels or len(named) or 2
    labels = tuple(named.get(i, f"LABEL_{i}") for i in range(count)) if kind == "classifier" else NEXT_SENTENCE
    if not labels:
        raise InputError("id2label names no label")
    return TextHead(kind=kind, labels=labels, activation=activation(act))


def modules(config: ModelConfig) -> dict[str, str]:
    """BERT's table of names."""
    next_sentence = config.scorer is not None and config.scorer.kind == "next_sentence"
    return {
        **encoder_modules("bert."),
        "bert.pooler.dense": "scorer.dense",
        "cls.seq_relationship" if next_sentence else "classifier": "scorer.out",
    }


def read(hf: Any) -> dict[str, Any]:
    """BERT's configuration."""
    return encoder(hf, scorer=scorer(hf, HEADS))


FAMILY = Family(
    model_type="bert",
    architectures=("BertModel", "BertForMaskedLM", *HEADS),
    heads=HEADS,
    defaults=DEFAULTS,
    read=read,
    modules=modules,
    prefix="bert.",
    # Plain encoders have no use for a pooler, nor anything here for the head over the vocabulary.
    ignored=(r"^bert\.pooler\.", r"^(bert\.)?cls\.", r"\.position_ids$"),
)
