"""The families of models that can be loaded: one small file each, data only."""

import difflib

from rlae_jax.models.config import ModelConfig
from rlae_jax.models.families import (
    arcee,
    bert,
    cohere,
    cohere2,
    cwm,
    deberta_v2,
    ernie4_5,
    exaone4,
    falcon,
    gemma,
    gemma2,
    gemma3,
    gemma4,
    glm,
    glm4,
    glm4_moe,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gpt_oss,
    gptj,
    granite,
    granitemoe,
    granitemoehybrid,
    helium,
    hunyuan_v1_dense,
    lfm2,
    lfm2_moe,
    llama,
    llama4,
    ministral,
    ministral3,
    mistral,
    mixtral,
    nemotron,
    olmo,
    olmo2,
    olmo3,
    olmoe,
    opt,
    phi,
    phi3,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_5,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    roberta,
    seed_oss,
    smollm3,
    stablelm,
    starcoder2,
    t5,
    vaultgemma,
)
from rlae_jax.models.families.base import Family as Family

_MODULES = (
    *(llama, mistral, ministral, ministral3, qwen2, qwen3, qwen3_5, gemma, gemma2, gemma3, gemma4, phi, phi3, smollm3),
    *(olmo, olmo2, olmo3, granite, granitemoehybrid, glm, glm4, exaone4, cohere, cohere2, seed_oss, helium),
    *(lfm2, arcee, ernie4_5, hunyuan_v1_dense, vaultgemma, cwm, nemotron, stablelm, starcoder2, falcon),
    *(mixtral, qwen2_moe, qwen3_moe, qwen3_next, qwen3_5_moe, lfm2_moe, olmoe, gpt_oss, granitemoe, glm4_moe, llama4),
    *(gpt2, gpt_bigcode, gpt_neo, gptj, gpt_neox, opt, t5),
    *(bert, roberta, deberta_v2),
)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}

# Of models that are asked for and cannot be loaded, the reason.
REASONS = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "its layers carry four streams of activations (AltUp)"),
}


def made_family(config: ModelConfig) -> Family:
    """Whose layout a model has that was made here and not loaded: Llama's, or T5's for an encoder-decoder."""
    return FAMILIES["llama" if config.encoder is None else "t5"]


def nearest(*names: str, most: int = 3) -> list[str]:
    """The architectures whose names are most like those of a model that cannot be loaded, likeliest first."""
    known = {_stem(name): family for family in FAMILIES.values() for name in (family.model_type, *family.architectures)}
    close = [difflib.get_close_matches(_stem(name), known, n=most, cutoff=0.6) for name in names]
    return list(dict.fromkeys(known[stem].architectures[0] for stems in close for stem in stems))[:most]


def _stem(name: str) -> str:
    """A family's name without what it is for: "qwen3" of Qwen3ForCausalLM and qwen3_text."""
    return name.split("For")[0].removesuffix("_text").removesuffix("Model").replace("_", "").lower()
