"""T5, an encoder-decoder."""

from typing import Any

import numpy as np

from tests.data.hf.cases import Case, Family, Fields, between, chance, pick, vocabulary_fields


def _t5_case(fields: Fields, *, tied: bool, **options: Any) -> Case:
    """Transformers writes a tied T5 whatever the configuration says; a head of its own is told by its tensor."""
    head = {} if tied else {"lm_head.weight": (fields["vocab_size"], fields["d_model"])}
    return Case("T5ForConditionalGeneration", fields, extra=head, **options)


def sample_t5(rng: np.random.Generator) -> Case:
    vocabulary = vocabulary_fields(rng)
    buckets = between(rng, 5, 12)
    tied = chance(rng)
    fields = {
        **vocabulary,
        "d_model": between(rng, 8, 24),
        "d_kv": between(rng, 3, 10),
        "d_ff": between(rng, 9, 40),
        "num_heads": between(rng, 2, 4),
        "num_layers": between(rng, 2, 3),
        "num_decoder_layers": between(rng, 1, 3),
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": buckets + between(rng, 0, 8),
        "layer_norm_epsilon": pick(rng, 1e-6, 1e-3),
        "feed_forward_proj": pick(rng, "relu", "gated-gelu", "gated-silu"),
        "tie_word_embeddings": tied,
        "decoder_start_token_id": pick(rng, vocabulary["pad_token_id"], between(rng, 0, 22)),
    }
    return _t5_case(fields, tied=tied, hub=chance(rng))


_T5_TINY: Fields = {
    "vocab_size": 41,
    "d_model": 20,
    "d_kv": 6,
    "d_ff": 27,
    "num_heads": 2,
    "num_layers": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 7,
    "relative_attention_max_distance": 9,
}
_T5 = {
    "tied": _t5_case(_T5_TINY | {"num_decoder_layers": 3}, tied=True, hub=True),
    "untied": _t5_case(
        _T5_TINY | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
        tied=False,
        hub=True,
    ),
    # As transformers saves it now: tie_word_embeddings true, scale_decoder_outputs false, and a head.
    "untied_saved": _t5_case(
        _T5_TINY
        | {
            "feed_forward_proj": "gated-silu",
            "tie_word_embeddings": False,
            "num_heads": 3,
            "num_layers": 3,
            "num_decoder_layers": 1,
            "decoder_start_token_id": 5,
            "relative_attention_num_buckets": 12,
            "relative_attention_max_distance": 20,
        },
        tied=False,
    ),
    # A head that is tied and yet not scaled: what transformers makes of tie_word_embeddings false without a head.
    "tied_unscaled": _t5_case(
        _T5_TINY | {"tie_word_embeddings": False, "vocab_size": 29, "d_kv": 10}, tied=True, hub=True
    ),
}


FAMILIES = {
    "t5": Family("encoder_decoder", "t5", _T5, sample_t5),
}
