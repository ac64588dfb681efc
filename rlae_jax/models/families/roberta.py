"""RoBERTa (Liu et al., 2019): BERT with positions from row pad + 1 on and a classifier with a layer of its own."""

from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.families.base import Family, Heads
from rlae_jax.models.families.bert import DEFAULTS, encoder, encoder_modules, scorer

HEADS: Heads = {"RobertaForSequenceClassification": "classifier"}
MODULES = {
    **encoder_modules("roberta."),
    "classifier.dense": "scorer.dense",
    "classifier.out_proj": "scorer.out",
}


def read(hf: Any) -> dict[str, Any]:
    """RoBERTa's configuration. The table's first rows stand for padding, so that a text has fewer positions."""
    if hf.pad_token_id is None:
        raise InputError("pad_token_id is null; positions begin behind it")
    offset = hf.pad_token_id + 1
    return encoder(hf, position_offset=offset, context=hf.max_position_embeddings - offset, scorer=scorer(hf, HEADS))


FAMILY = Family(
    model_type="roberta",
    architectures=("RobertaModel", "RobertaForMaskedLM", *HEADS),
    heads=HEADS,
    defaults=DEFAULTS | {"pad_token_id": 1},
    read=read,
    modules=MODULES,
    prefix="roberta.",
    ignored=(r"^roberta\.pooler\.", r"^(roberta\.)?lm_head\.", r"\.position_ids$"),
)
