"""The families of models that can be loaded: one small file each, data only."""

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families import (
    bert,
    deberta_v2,
    gemma2,
    gemma3,
    gpt2,
    gpt_neox,
    llama,
    mistral,
    olmo2,
    opt,
    phi3,
    qwen2,
    qwen3,
    roberta,
    t5,
)
from rlae_jax.models.families.base import Family as Family

_MODULES = (
    *(llama, mistral, qwen2, qwen3, gemma2, gemma3, phi3, olmo2, gpt2, gpt_neox, opt, t5),
    *(bert, roberta, deberta_v2),
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def made_family(config: ModelConfig) -> Family:
    """Whose layout a model has that was made here and not loaded: Llama's, or T5's for an encoder-decoder."""
    return FAMILIES["llama" if config.encoder is None else "t5"]
