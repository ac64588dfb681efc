"""Encoders, plain and with heads: BERT, RoBERTa, DeBERTa."""

import functools
from typing import Any

import numpy as np

from tests.data.hf.cases import Case, Family, Fields, between, chance, pick, vocabulary_fields


def _encoder(rng: np.random.Generator) -> Fields:
    heads = between(rng, 2, 4)
    return {
        **vocabulary_fields(rng),
        "num_attention_heads": heads,
        "hidden_size": heads * between(rng, 4, 8),
        "intermediate_size": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 40, 60),
        "hidden_act": pick(rng, "gelu", "relu", "gelu_new"),
        "layer_norm_eps": pick(rng, 1e-12, 1e-7, 1e-3),
    }


def _labels(n: int) -> Fields:
    """How config.json says the number of labels."""
    return {
        "id2label": {str(i): f"LABEL_{i}" for i in range(n)},
        "label2id": {f"LABEL_{i}": i for i in range(n)},
    }


def sample_bert(rng: np.random.Generator) -> Case:
    heads = ["BertModel", "BertForMaskedLM", "BertForNextSentencePrediction", "BertForSequenceClassification"]
    architecture = pick(rng, *heads, heads[-1])
    fields = _encoder(rng) | {"type_vocab_size": between(rng, 2, 3)}
    if architecture == heads[-1]:
        fields |= _labels(between(rng, 1, 4))
    return Case(architecture, fields, hub=chance(rng), token_types=chance(rng))


def sample_roberta(rng: np.random.Generator) -> Case:
    architecture = pick(rng, "RobertaModel", "RobertaForSequenceClassification")
    fields = _encoder(rng) | {"type_vocab_size": between(rng, 1, 2), "pad_token_id": between(rng, 0, 3)}
    if architecture != "RobertaModel":
        fields |= _labels(between(rng, 1, 4))
    return Case(architecture, fields, hub=chance(rng), token_types=chance(rng, 0.3))


def sample_deberta_v2(rng: np.random.Generator) -> Case:
    architecture = pick(rng, "DebertaV2Model", *["DebertaV2ForSequenceClassification"] * 2)
    fields = _encoder(rng) | {
        "type_vocab_size": pick(rng, 0, 2),
        "position_biased_input": chance(rng, 0.3),
        "relative_attention": chance(rng, 0.8),
        "max_relative_positions": pick(rng, -1, between(rng, 9, 20)),
        "norm_rel_ebd": pick(rng, "none", "layer_norm"),
        "share_att_key": chance(rng),
    }
    attention = pick(rng, ["p2c", "c2p"], ["c2p"], ["p2c"])
    if fields["relative_attention"]:
        fields["pos_att_type"] = "|".join(attention) if chance(rng) else attention
    if chance(rng, 0.7):
        fields["position_buckets"] = between(rng, 4, 8)
    if chance(rng, 0.4):
        fields |= {"conv_kernel_size": pick(rng, 3, 5), "conv_act": pick(rng, "gelu", "tanh")}
    if chance(rng, 0.3):
        fields["embedding_size"] = between(rng, 5, 20)
    if architecture != "DebertaV2Model":
        fields |= _labels(between(rng, 1, 4)) | {"pooler_hidden_act": pick(rng, "gelu", "tanh")}
    return Case(architecture, fields, hub=chance(rng), token_types=fields["type_vocab_size"] == 2 and chance(rng))


_BERT_TINY: Fields = {
    "vocab_size": 41,
    "hidden_size": 20,
    "intermediate_size": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "type_vocab_size": 2,
    "pad_token_id": 0,
}


def _encoder_case(
    architecture: str, common: Fields, labels: int = 0, hub: bool = False, token_types: bool = False, **fields: Any
) -> Case:
    fields = common | (_labels(labels) if labels else {}) | fields
    return Case(architecture, fields, hub=hub, token_types=token_types)


_BERT = {
    "three_labels": _encoder_case("BertForSequenceClassification", _BERT_TINY, 3, hub=True, token_types=True),
    "one_label": _encoder_case("BertForSequenceClassification", _BERT_TINY, 1, hidden_act="relu", layer_norm_eps=1e-3),
    "next_sentence": _encoder_case("BertForNextSentencePrediction", _BERT_TINY, token_types=True, type_vocab_size=3),
    "masked": _encoder_case("BertForMaskedLM", _BERT_TINY, hub=True, hidden_act="gelu_new"),
    "base": _encoder_case("BertModel", _BERT_TINY, num_hidden_layers=3, num_attention_heads=2, vocab_size=29),
}

_ROBERTA_TINY = _BERT_TINY | {"pad_token_id": 1, "type_vocab_size": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROBERTA = {
    "three_labels": _encoder_case("RobertaForSequenceClassification", _ROBERTA_TINY, 3, hub=True, layer_norm_eps=1e-3),
    "one_label": _encoder_case(
        "RobertaForSequenceClassification", _ROBERTA_TINY, 1, token_types=True, type_vocab_size=2, pad_token_id=3
    ),
    "base": _encoder_case("RobertaModel", _ROBERTA_TINY, num_hidden_layers=3, hidden_act="relu", vocab_size=29),
}

_deberta = functools.partial(_encoder_case, "DebertaV2ForSequenceClassification")
_DEBERTA_V3 = _BERT_TINY | {
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_biased_input": False,
    "position_buckets": 6,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": "p2c|c2p",
    "layer_norm_eps": 1e-7,
    "pooler_hidden_act": "gelu",
    "pooler_hidden_size": 20,
    "pooler_dropout": 0,
}
_DEBERTA_V2 = {
    "v3": _deberta(_DEBERTA_V3, 1, hub=True),
    "v3_base": _encoder_case("DebertaV2Model", _DEBERTA_V3, max_relative_positions=11, num_hidden_layers=3),
    "conv": _deberta(
        _DEBERTA_V3,
        3,
        hub=True,
        token_types=True,
        type_vocab_size=2,
        share_att_key=False,
        conv_kernel_size=3,
        conv_act="gelu",
        layer_norm_eps=1e-3,
        attention_head_size=5,
    ),
    "narrow_embeddings": _deberta(
        _DEBERTA_V3,
        3,
        embedding_size=11,
        type_vocab_size=2,
        position_biased_input=True,
        norm_rel_ebd="none",
        pos_att_type=["c2p"],
        share_att_key=False,
        position_buckets=-1,
        max_relative_positions=5,
        pooler_hidden_act="tanh",
        conv_kernel_size=3,
    ),
    # Absolute positions alone, everything else by default.
    "absolute": _deberta(_BERT_TINY, 3, hub=True, token_types=True),
}


FAMILIES = {
    "bert": Family("encoder", "bert", _BERT, sample_bert),
    "roberta": Family("encoder", "roberta", _ROBERTA, sample_roberta),
    "deberta_v2": Family("encoder", "deberta-v2", _DEBERTA_V2, sample_deberta_v2),
}
