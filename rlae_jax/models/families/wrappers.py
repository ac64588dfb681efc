"""Multimodal models, of which the language model alone is read: where it lies in config.json and among the tensors.

A wrapper's `text_config` is the configuration of a family here, and its tensors are that family's, under longer names.
What reads them sees a checkpoint of the language model, and what is saved is one. Positions in several dimensions
(mrope) are those of plain rotary positions where there is only text.
"""

import re
from collections.abc import Mapping
from typing import Any

from rlae_jax.errors import InputError

# A wrapper's model_type, and the language model that it has unless its text_config names another.
WRAPPERS = {
    "gemma3": "gemma3_text",
    "gemma4": "gemma4_text",
    "mistral3": "mistral",
    "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "llava": "llama",
    "llama4": "llama4_text",
}
# Language models that are those of a family but for positions in several dimensions.
_SAME = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
# What published wrappers leave out, as transformers fills it in.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_vl_text": {"rope_theta": 1_000_000.0},
    "qwen2_5_vl_text": {"rope_theta": 1_000_000.0},
    "qwen3_vl_text": {"rope_theta": 500_000.0},
    "gemma3_text": {
        "vocab_size": 262_208,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
    },
    "llama": {
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
}
_TIED = "tie_word_embeddings"
_QUANTISED = ("quantization_config", "compression_config")
_OF_ALL = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", _TIED, *_QUANTISED)


def family_of(model_type: str) -> str:
    """The family of a language model, by its own model_type."""
    return _SAME.get(model_type, model_type)


def language_model(raw: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """(model_type, config.json) of the language model in a wrapper, without `architectures`; None for what is none.

    Raises:
      InputError: its text_config is no JSON object.
    """
    default = WRAPPERS.get(str(raw.get("model_type")))
    if default is None:
        return None
    text = raw.get("text_config", raw)  # the first Qwen2.5-VL have the fields of both side by side
    if not isinstance(text, Mapping):
        raise InputError("text_config is no JSON object")
    own = default if text is raw else str(text.get("model_type", default))
    model_type = _SAME.get(own, own)
    fields = {name: raw[name] for name in _OF_ALL if name in raw} | dict(text)
    # Releases before transformers 5 say this of the text alone.
    given = [part[_TIED] for part in (raw, text) if part.get(_TIED) is not None]
    fields |= {_TIED: any(given)} if given else {}
    for name in {"rope_scaling", "rope_parameters"} & fields.keys():
        if isinstance(fields[name], Mapping):
            fields[name] = {key: value for key, value in fields[name].items() if "mrope" not in (value, key[:5])}
    return model_type, {**_DEFAULTS.get(own, {}), **fields, "model_type": model_type}


_PREFIX = re.compile(r"^(model\.)?language_model\.(model\.)?")
_HEAD = re.compile(r"^(model\.)?(language_model\.)?(?=lm_head\.)")


def text_names(names: Any) -> dict[str, str]:
    """The name that each tensor of the language model has in a checkpoint of its own -> its name in the wrapper's.

    transformers 4 wrote language_model.model.layers..., 5 writes model.language_model.layers..., and the first
    Qwen2.5-VL have model.layers... beside visual....
    """
    nested = any(_PREFIX.match(name) for name in names)
    found = {}
    for name in names:
        if _HEAD.match(name):
            found[_HEAD.sub("", name)] = name
        elif nested and _PREFIX.match(name):
            found[_PREFIX.sub("model.", name)] = name
        elif not nested and name.startswith("model.") and not name.startswith("model.visual."):
            found[name] = name
    return found
