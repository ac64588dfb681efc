"""What the models in GGUF files are: llama.cpp's architectures in the words of Hugging Face.

In: a `GgufFile`. Out: what its metadata say as config.json and generation_config.json would, which the families read as
they do any other, and its tensors under their Hugging Face names and in their layout, a `TensorSource`.

Names are translated by the `gguf` package's map, which the conversion to GGUF uses too; what the conversion does to
tensors is undone here (llama.cpp, conversion/*.py: `modify_tensors`). To add an architecture whose family is there, add
a line to `ARCHITECTURES`, a function for the settings that are not Llama's, and a case to tests/models/test_gguf_files.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.models import hugging_face
from rlae_jax.models.families import FAMILIES
from rlae_jax.models.gguf_files import PLAIN, Extent, GgufFile, Metadata, import_gguf, read_extent
from rlae_jax.models.stored import Header


class Keys(NamedTuple):
    """A file's settings, without the architecture's name before each."""

    path: Path
    architecture: str
    metadata: Metadata
    extents: Mapping[str, Extent]

    def get(self, key: str, default: Any = None) -> Any:
        value = self.metadata.get(f"{self.architecture}.{key}", default)
        if isinstance(value, np.ndarray):
            value = value.tolist()
            # Some files give every layer its own, even where all are alike.
            return value[0] if value and value == [value[0]] * len(value) else value
        return value

    def number(self, key: str, default: Any = None) -> Any:
        """A number that the model cannot do without."""
        value = self.get(key, default)
        if isinstance(value, list):
            raise InputError(f"{self.path}: {self.architecture}.{key} differs from layer to layer: not supported")
        if isinstance(value, bool) or not isinstance(value, int | float):
            found = "is missing" if value is None else f"is {value!r}, no number"
            raise InputError(f"{self.path}: {self.architecture}.{key} {found}")
        return value

    def tensor(self, name: str) -> np.ndarray:
        return read_extent(self.extents[name])

    def some(self, **names: str) -> dict[str, Any]:
        """The settings under config.json's names that the file has."""
        return {name: value for name, key in names.items() if (value := self.get(key)) is not None}

    @property
    def layers(self) -> int:
        """Without those that predict several tokens ahead, which come last."""
        layers = self.number("block_count") - self.number("nextn_predict_layers", 0)
        if not isinstance(layers, int) or not 1 <= layers <= min(hugging_face.MOST_LAYERS, len(self.extents)):
            raise InputError(
                f"{self.path}: {self.architecture}.block_count says {layers} layers, with {len(self.extents)} tensors"
            )
        return layers

    @property
    def kv_heads(self) -> int:
        """Of the layers with attention. A file may give every layer its own, 0 where there is none."""
        given = self.get("attention.head_count_kv")
        if isinstance(given, list) and len(found := set(given) - {0}) == 1:
            return int(found.pop())
        return int(self.number("attention.head_count_kv", self.number("attention.head_count")))

    @property
    def head_width(self) -> int:
        width = self.number("embedding_length") // self.number("attention.head_count")
        return int(self.number("attention.key_length", width))


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One of llama.cpp's architectures: how its settings are called in config.json, and what the conversion did to its
    tensors."""

    model_type: str
    read: Callable[[Keys], dict[str, Any]] = lambda keys: {}  # what is not as in Llama
    permuted: bool = False  # rows of queries and keys, a pair of rotated entries beside one another
    norm_offset: float = 0.0  # added to the scales of norms
    delta: bool = False  # some layers have linear attention with the gated delta rule


def _settings(keys: Keys) -> dict[str, Any]:
    """What nearly all architectures have under the same names, as Llama's config.json has it."""
    heads = keys.number("attention.head_count")
    return {
        "vocab_size": keys.extents["token_embd.weight"].shape[0],
        "hidden_size": keys.number("embedding_length"),
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.kv_heads,
        "head_dim": keys.head_width,
        "max_position_embeddings": keys.number("context_length"),
        "tie_word_embeddings": "output.weight" not in keys.extents,
        "rope_parameters": _rope(keys),
        **keys.some(
            intermediate_size="feed_forward_length",
            rms_norm_eps="attention.layer_norm_rms_epsilon",
            layer_norm_eps="attention.layer_norm_epsilon",
        ),
    }


def _rope(keys: Keys) -> dict[str, Any]:
    """The field `rope_parameters`.

    A file has the factors of Llama 3's and of longrope's pairs as tensors, one for each pair, by which its frequency is
    divided. Both are written as longrope, which is just that.
    """
    context = keys.number("context_length")
    fields = {"rope_theta": float(keys.number("rope.freq_base", 10_000.0)), "rope_type": "default"}
    lists = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
    old = keys.get("rope.scaling.original_context_length", context)
    if "rope_freqs.weight" in keys.extents:
        lists, old = dict.fromkeys(lists, "rope_freqs.weight"), context  # the same at every length
    if all(name in keys.extents for name in lists.values()):
        return fields | {
            "rope_type": "longrope",
            **{name: keys.tensor(own).astype(float).tolist() for name, own in lists.items()},
            "attention_factor": float(keys.get("rope.scaling.attn_factor", 1.0)),
            "original_max_position_embeddings": old,
        }
    kind, factor = keys.get("rope.scaling.type", "none"), keys.get("rope.scaling.factor", keys.get("rope.scale_linear"))
    if kind in ("none", "longrope") or not factor:
        return fields
    return fields | {
        "rope_type": kind,
        "factor": float(factor),
        **keys.some(
            original_max_position_embeddings="rope.scaling.original_context_length",
            attention_factor="rope.scaling.yarn_attn_factor",
            beta_fast="rope.scaling.yarn_beta_fast",
            beta_slow="rope.scaling.yarn_beta_slow",
        ),
    }


def _rotated(keys: Keys) -> dict[str, float]:
    """The share of a head that is rotated."""
    width = keys.head_width
    return {"partial_rotary_factor": keys.number("rope.dimension_count", width) / width}


def _has_bias(keys: Keys, module: str) -> bool:
    return f"blk.0.{module}.bias" in keys.extents


def _biases(keys: Keys) -> dict[str, Any]:
    return {"attention_bias": _has_bias(keys, "attn_q"), "mlp_bias": _has_bias(keys, "ffn_up")}


def _llama(keys: Keys) -> dict[str, Any]:
    if keys.get("expert_count"):  # Mixtral is one of llama.cpp's Llamas
        return {"model_type": "mixtral", **_experts(keys, "num_local_experts")}
    return _biases(keys)


def _experts(keys: Keys, number: str = "num_experts") -> dict[str, Any]:
    names = {number: "expert_count", "num_experts_per_tok": "expert_used_count"}
    return {name: keys.number(key) for name, key in names.items()}


def _small_experts(keys: Keys) -> dict[str, Any]:
    """Qwen's, which are not as wide as a dense block. Whether the weights of those taken sum to 1 is llama.cpp's
    knowledge (src/models/qwen2moe.cpp and qwen3moe.cpp)."""
    width = keys.number("expert_feed_forward_length")
    return {
        "norm_topk_prob": keys.architecture == "qwen3moe",
        "moe_intermediate_size": width,
        "intermediate_size": keys.get("feed_forward_length", width),  # no layer has such a block
        **keys.some(shared_expert_intermediate_size="expert_shared_feed_forward_length"),
        **_experts(keys),
    }


def _rotated_in_part(keys: Keys) -> dict[str, Any]:
    return {"rope_parameters": _rope(keys) | _rotated(keys)}


def _qwen2(keys: Keys) -> dict[str, Any]:
    return {"use_sliding_window": False}  # the conversion leaves windows out


def _qwen3(keys: Keys) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": _has_bias(keys, "attn_q")}


def _caps(keys: Keys) -> dict[str, Any]:
    return {
        "attn_logit_softcapping": keys.get("attn_logit_softcapping"),
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


def _query_scale(keys: Keys, of_largest: int) -> dict[str, Any]:
    """The largest Gemma of a generation, known by its layers, divides queries by the root of another number than the
    width of a head, and no file says so (llama.cpp, src/models/gemma2.cpp and gemma3.cpp)."""
    width = keys.number("embedding_length") // keys.number("attention.head_count")
    return {"query_pre_attn_scalar": width if keys.layers == of_largest else keys.head_width}


def _gemma2(keys: Keys) -> dict[str, Any]:
    return _caps(keys) | _query_scale(keys, 46) | keys.some(sliding_window="attention.sliding_window")


def _pattern(keys: Keys, period: int) -> list[str]:
    """The kinds of the layers: by the file's own list, by its period, or every `period`th of them global."""
    given = keys.get("attention.sliding_window_pattern", period)
    if isinstance(given, bool):
        given = [given] * keys.layers
    local = given if isinstance(given, list) else [(i + 1) % given != 0 for i in range(keys.layers)]
    return ["sliding_attention" if is_local else "full_attention" for is_local in local]


def _gemma3(keys: Keys) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa", 10_000.0))}
    return {
        **_caps(keys),
        **_query_scale(keys, 62),
        "sliding_window": window,
        "layer_types": _pattern(keys, 6) if window else ["full_attention"] * keys.layers,
        "rope_parameters": {
            "full_attention": _rope(keys) | {"rope_theta": float(keys.get("rope.freq_base", 1_000_000.0))},
            "sliding_attention": local,
        },
    }


def _phi3(keys: Keys) -> dict[str, Any]:
    rope = _rope(keys) | _rotated(keys)
    return {
        "sliding_window": keys.get("attention.sliding_window") or None,
        "rope_parameters": rope,
        "original_max_position_embeddings": rope.get("original_max_position_embeddings", keys.number("context_length")),
    }


def _olmo2(keys: Keys) -> dict[str, Any]:
    window = keys.get("attention.sliding_window")
    if not window:
        return {}
    rope = {"full_attention": _rope(keys), "sliding_attention": {"rope_type": "default"}}
    rope["sliding_attention"]["rope_theta"] = rope["full_attention"]["rope_theta"]
    kinds = {"sliding_window": window, "layer_types": _pattern(keys, 4)}
    return {"model_type": "olmo3", "rope_parameters": rope, **kinds}  # which llama.cpp tells from OLMo 2 by its windows


def _windows(period: int) -> Callable[[Keys], dict[str, Any]]:
    """Every `period`th layer has none, unless the file says otherwise."""

    def read(keys: Keys) -> dict[str, Any]:
        window = keys.get("attention.sliding_window")
        return {"sliding_window": window, "layer_types": _pattern(keys, period) if window else None}

    return read


def _cohere(keys: Keys) -> dict[str, Any]:
    kinds = _windows(4)(keys) if keys.architecture == "cohere2" else {}
    return {
        "logit_scale": keys.number("logit_scale"),
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.extents,
        **kinds,
    }


def _falcon(keys: Keys) -> dict[str, Any]:
    kv_heads = keys.number("attention.head_count_kv", 1)
    return {
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
        "num_kv_heads": kv_heads,
        "new_decoder_architecture": kv_heads > 1,
        "num_ln_in_parallel_attn": 2 if "blk.0.attn_norm_2.weight" in keys.extents else 1,
        "ffn_hidden_size": keys.number("feed_forward_length"),
        "bias": _has_bias(keys, "attn_qkv"),
    }


def _glm(keys: Keys) -> dict[str, Any]:
    return _rotated_in_part(keys) | {"attention_bias": _has_bias(keys, "attn_q")}


def _gpt2(keys: Keys) -> dict[str, Any]:
    return {
        "n_embd": keys.number("embedding_length"),
        "n_head": keys.number("attention.head_count"),
        "n_layer": keys.layers,
        "n_positions": keys.number("context_length"),
        "n_inner": keys.number("feed_forward_length"),
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon"),
    }


def _gpt_neox(keys: Keys) -> dict[str, Any]:
    rotated = _rotated(keys)["partial_rotary_factor"]
    return {
        "rotary_pct": rotated,
        "use_parallel_residual": keys.get("use_parallel_residual", True),
        **_rotated_in_part(keys),
    }


def _gpt_oss(keys: Keys) -> dict[str, Any]:
    width = keys.number("expert_feed_forward_length")
    rope = _rope(keys) | {"truncate": False}  # of yarn's limits, as published
    every_other = ["full_attention" if i % 2 else "sliding_attention" for i in range(keys.layers)]
    return {
        "intermediate_size": width,
        "sliding_window": keys.number("attention.sliding_window"),
        "layer_types": every_other,
        "rope_parameters": rope,
        **_experts(keys, "num_local_experts"),
    }


def _llama4(keys: Keys) -> dict[str, Any]:
    """How long chunks are, how queries grow and which model normalises them is llama.cpp's knowledge
    (src/models/llama4.cpp), and as published; a window of 0 says that there are no chunks."""
    whole = {"attention_chunk_size": None, "no_rope_layers": [1] * keys.layers}
    return {
        "intermediate_size": keys.number("expert_feed_forward_length"),
        "intermediate_size_mlp": keys.number("feed_forward_length"),
        "interleave_moe_layer_step": keys.number("interleave_moe_layer_step"),
        "use_qk_norm": keys.number("expert_count") != 128,
        "attention_bias": _has_bias(keys, "attn_q"),
        **_experts(keys, "num_local_experts"),
        **(whole if keys.get("attention.sliding_window") == 0 else {}),
    }


def _granite(keys: Keys) -> dict[str, Any]:
    return _biases(keys) | keys.some(
        embedding_multiplier="embedding_scale",
        attention_multiplier="attention.scale",
        residual_multiplier="residual_scale",
        logits_scaling="logit_scale",
    )


def _lfm2(keys: Keys) -> dict[str, Any]:
    if not keys.get("attention.causal", True):
        raise InputError(f"{keys.path}: {keys.architecture}.attention.causal = False is not supported")
    heads = keys.get("attention.head_count_kv")
    heads = heads if isinstance(heads, list) else [heads] * keys.layers
    return {
        "norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "conv_L_cache": keys.number("shortconv.l_cache"),
        "layer_types": ["full_attention" if number else "conv" for number in heads],
        "block_auto_adjust_ff_dim": False,  # the file has the width after it was rounded
    }


def _lfm2_moe(keys: Keys) -> dict[str, Any]:
    return _lfm2(keys) | {
        "moe_intermediate_size": keys.number("expert_feed_forward_length"),
        "num_dense_layers": keys.number("leading_dense_block_count"),
        **_experts(keys),
    }


def _mistral3(keys: Keys) -> dict[str, Any]:
    """Mistral Small 3 without a growth of its queries, Ministral 3 with one."""
    growth = keys.get("attention.temperature_scale")
    if growth is None:
        return {"model_type": "mistral", "sliding_window": None}
    whole = {"mscale": 1.0, "mscale_all_dim": keys.get("rope.scaling.yarn_log_multiplier", 1.0)}  # as published
    return {"sliding_window": None, "rope_parameters": _rope(keys) | whole | {"llama_4_scaling_beta": growth}}


def _nemotron(keys: Keys) -> dict[str, Any]:
    return _rotated_in_part(keys) | _biases(keys) | keys.some(norm_eps="attention.layer_norm_epsilon")


def _olmo(keys: Keys) -> dict[str, Any]:
    return keys.some(clip_qkv="attention.clamp_kqv")


def _qwen3_5(keys: Keys) -> dict[str, Any]:
    heads, each = keys.number("ssm.time_step_rank"), keys.number("full_attention_interval", 4)
    linear = keys.get("attention.recurrent_layers")
    if linear is None:
        linear = [(i + 1) % each != 0 for i in range(keys.layers)]
    linear = linear if isinstance(linear, list) else [linear] * keys.layers
    kinds = ["linear_attention" if one else "full_attention" for one in linear[: keys.layers]]
    return _rotated_in_part(keys) | {
        "attention_bias": any(f"blk.{i}.attn_q.bias" in keys.extents for i in range(keys.layers)),
        "layer_types": kinds,
        "linear_conv_kernel_dim": keys.number("ssm.conv_kernel"),
        "linear_num_key_heads": keys.number("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.number("ssm.state_size"),
        "linear_value_head_dim": keys.number("ssm.inner_size") // heads,
    }


def _seed_oss(keys: Keys) -> dict[str, Any]:
    return _biases(keys) | {"attention_out_bias": _has_bias(keys, "attn_output")}


def _stablelm(keys: Keys) -> dict[str, Any]:
    return _rotated_in_part(keys) | {
        "use_qkv_bias": _has_bias(keys, "attn_q"),
        "qk_layernorm": "blk.0.attn_q_norm.weight" in keys.extents,
        "use_parallel_residual": "blk.0.ffn_norm.weight" not in keys.extents,
    }


def _starcoder2(keys: Keys) -> dict[str, Any]:
    return keys.some(norm_epsilon="attention.layer_norm_epsilon") | {"use_bias": _has_bias(keys, "attn_q")}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", _llama, permuted=True),
    "mistral3": Architecture("ministral3", _mistral3, permuted=True),
    "qwen2": Architecture("qwen2", _qwen2),
    "qwen3": Architecture("qwen3", _qwen3),
    "gemma": Architecture("gemma", norm_offset=1.0),
    "gemma2": Architecture("gemma2", _gemma2, norm_offset=1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, norm_offset=1.0),
    "phi3": Architecture("phi3", _phi3),
    "olmo2": Architecture("olmo2", _olmo2),
    "qwen2moe": Architecture("qwen2_moe", lambda keys: _qwen2(keys) | _small_experts(keys)),
    "qwen3moe": Architecture("qwen3_moe", lambda keys: _qwen3(keys) | _small_experts(keys)),
    "olmoe": Architecture("olmoe", _experts),
    "gpt-oss": Architecture("gpt_oss", _gpt_oss),
    "llama4": Architecture("llama4_text", _llama4),
    "lfm2": Architecture("lfm2", _lfm2),
    "lfm2moe": Architecture("lfm2_moe", _lfm2_moe),
    "qwen35": Architecture("qwen3_5_text", _qwen3_5, norm_offset=1.0, delta=True),
    "qwen35moe": Architecture(
        "qwen3_5_moe_text", lambda keys: _qwen3_5(keys) | _small_experts(keys), norm_offset=1.0, delta=True
    ),
    "smollm3": Architecture("smollm3", _biases, permuted=True),
    "granite": Architecture("granite", _granite, permuted=True),
    "arcee": Architecture("arcee", _biases, permuted=True),
    "olmo": Architecture("olmo", _olmo, permuted=True),
    "seed_oss": Architecture("seed_oss", _seed_oss),
    "ernie4_5": Architecture("ernie4_5"),
    "glm4": Architecture("glm4", _glm),
    "exaone4": Architecture("exaone4", _windows(4)),
    "command-r": Architecture("cohere", _cohere),
    "cohere2": Architecture("cohere2", _cohere),
    "stablelm": Architecture("stablelm", _stablelm),
    "nemotron": Architecture("nemotron", _nemotron, norm_offset=1.0),
    "phi2": Architecture("phi", _rotated_in_part),
    "falcon": Architecture("falcon", _falcon),
    "starcoder2": Architecture("starcoder2", _starcoder2),
    "gpt2": Architecture("gpt2", _gpt2),
    "gptneox": Architecture("gpt_neox", _gpt_neox),
}


def _architecture(keys: Keys) -> Architecture:
    found = ARCHITECTURES.get(keys.architecture)
    if found is None or found.model_type not in FAMILIES:
        known = ", ".join(name for name, one in ARCHITECTURES.items() if one.model_type in FAMILIES)
        raise InputError(
            f"{keys.path}: the architecture {keys.architecture} is not supported; of GGUF files supported: {known}"
        )
    return found


_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<turn|>", "<|endofturn|>", "[|endofturn|]")


def read_generation(file: GgufFile) -> dict[str, Any]:
    """What generation_config.json would say."""
    ids = {"bos_token_id": _token(file, "bos"), "pad_token_id": _token(file, "padding"), "eos_token_id": _ends(file)}
    return {name: value for name, value in ids.items() if value not in (None, [])}


def _token(file: GgufFile, name: str) -> int | None:
    value = file.metadata.get(f"tokenizer.ggml.{name}_token_id")
    return value if isinstance(value, int) else None


def _ends(file: GgufFile) -> list[int]:
    """What ends a text (eos), a turn (eot) and a message (eom); where a chat template ends turns with a token that is
    none of them, that token too, which older files do not name."""
    ends = [id for name in ("eos", "eot", "eom") if (id := _token(file, name)) is not None]
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str) and _token(file, "eot") is None:
        tokens = file.metadata.get("tokenizer.ggml.tokens", [])
        ends += [tokens.index(end) for end in _TURN_ENDS if end in template and end in tokens]
    return list(dict.fromkeys(ends))


def _keys(file: GgufFile) -> Keys:
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise InputError(f"{file.path}: general.architecture, which says what model it is, is missing")
    return Keys(file.path, architecture, file.metadata, file.extents)


def read_config(file: GgufFile) -> dict[str, Any]:
    """What config.json would say.

    Raises:
      InputError: an architecture that is not supported, settings that are missing or of another kind.
    """
    keys = _keys(file)
    architecture = _architecture(keys)
    if "token_embd.weight" not in file.extents:
        raise InputError(f"{file.path}: it has no token_embd.weight, and so no language model")
    try:
        fields = {"model_type": architecture.model_type, **_settings(keys), **architecture.read(keys)}
    except (TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file.path}: a setting has an unusable value ({error})") from error
    family = FAMILIES.get(fields["model_type"])
    if family is None:
        raise InputError(
            f"{keys.path}: {fields['model_type']}, of the architecture {keys.architecture}, is not supported"
        )
    return {"architectures": [family.architectures[0]], **fields, **read_generation(file)}


# What is read as settings, and what may stand in a file beside the model's own tensors.
_NO_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_(long|short)\.weight|.*\.attn_rot_embd.*")


class _Part(NamedTuple):
    """A tensor of the file, or one expert's slice of it."""

    own: str  # llama.cpp's name
    expert: int | None = None


def _extent(file: GgufFile, part: _Part) -> Extent | None:
    """Where a tensor or an expert's slice lies; None if there is none."""
    whole = file.extents.get(part.own)
    if whole is None or part.expert is None:
        return whole
    experts = whole.shape[0]
    size = whole.bytes // experts
    slice = whole._replace(offset=whole.offset + part.expert * size, bytes=size, shape=whole.shape[1:])
    return slice if part.expert < experts else None


class GgufTensors:
    """The tensors of a GGUF model as Hugging Face has them; a `TensorSource`."""

    def __init__(self, file: GgufFile, names: Iterable[str]) -> None:
        """
        Args:
          names: the tensors that the model should have, as Hugging Face calls them. What the file has besides keeps
            the file's name, so that it is told as unexpected.
        """
        keys = _keys(file)
        self._architecture = _architecture(keys)
        self._family = FAMILIES[read_config(file)["model_type"]]
        self._heads = keys.number("attention.head_count")
        self._kv_heads = keys.kv_heads
        self._delta = _LinearAttention.of(keys) if self._architecture.delta else None
        parts_of = _parts_of_names(keys)
        self._parts: dict[str, list[Extent]] = {}
        self._modules: dict[str, str] = {}
        taken = set()
        for name in names:
            parts = parts_of(name)
            extents = [extent for part in parts if (extent := _extent(file, part)) is not None]
            if len(extents) == len(parts):
                self._parts[name], self._modules[name] = extents, parts[0].own.split(".")[-2]
                taken |= {part.own for part in parts}
        ahead = tuple(f"blk.{i}." for i in range(keys.layers, keys.number("block_count")))
        left_out = [own for own in file.extents if _NO_WEIGHTS.fullmatch(own) or own.startswith(ahead)]
        rest = [own for own in file.extents if own not in taken and own not in left_out]
        self._parts |= {own: [file.extents[own]] for own in rest}
        self.headers: dict[str, Header] = {
            name: Header(self._shape(name), parts[0].kind if parts[0].kind in PLAIN else "F32")
            for name, parts in self._parts.items()
        }

    def _shape(self, name: str) -> tuple[int, ...]:
        """As Hugging Face stores it."""
        first, *others = self._parts[name]
        shape = first.shape if not others else (first.shape[0], 2 * first.shape[1], *first.shape[2:])
        shape = (1, *shape) if _is_shared_gate(name) and len(shape) == 1 else shape
        shape = (shape[0], 1, *shape[1:]) if _is_convolution(name) else shape
        return (*shape[:-2], shape[-1], shape[-2]) if self._is_turned(name) else shape

    def _is_turned(self, name: str) -> bool:
        """Whether Hugging Face has [inputs, outputs]."""
        return not name.endswith(".bias") and self._is_in(name, self._family.inputs_first)

    @staticmethod
    def _is_in(name: str, modules: tuple[str, ...]) -> bool:
        return re.sub(r"\.\d+\.", ".{i}.", re.sub(r"\.(weight|bias)$", "", name)) in modules

    def read(self, name: str) -> np.ndarray:
        """A tensor as Hugging Face stores it."""
        tensor, *others = map(read_extent, self._parts[name])
        module, heads, kv_heads = self._modules[name], self._heads, self._kv_heads
        rest = tensor.shape[1:]
        if others:  # an expert's gate and up, whose outputs alternate in some families
            join = np.stack if self._family.interleaved else np.concatenate
            tensor = join([tensor, *others], axis=2 if self._family.interleaved else 1)
            tensor = tensor.reshape(len(tensor), -1, *rest[1:])
        if self._architecture.permuted and module in ("attn_q", "attn_k"):
            # [heads, width / 2, 2] back to [heads, 2, width / 2]: Hugging Face rotates a head's halves.
            pairs = tensor.reshape(heads if module == "attn_q" else kv_heads, -1, 2, *rest)
            tensor = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
        if module == "attn_qkv" and self._is_in(name, self._family.fused_by_head):
            # All queries, all keys, all values: back to those of one key head after another.
            width = len(tensor) // (heads + 2 * kv_heads)
            blocks = np.split(tensor, [heads * width, (heads + kv_heads) * width])
            by_head = [block.reshape(kv_heads, -1, *rest) for block in blocks]
            tensor = np.concatenate(by_head, axis=1).reshape(tensor.shape)
        if self._delta is not None and ".linear_attn." in name:
            tensor = self._delta.read(name, tensor)
        elif self._architecture.norm_offset and name.endswith("norm.weight"):
            tensor = (tensor.astype(np.float32) - np.float32(self._architecture.norm_offset)).astype(tensor.dtype)
        tensor = tensor.reshape(1, -1) if _is_shared_gate(name) else tensor
        tensor = tensor[:, None] if _is_convolution(name) else tensor
        return tensor.swapaxes(-1, -2) if self._is_turned(name) else tensor


def _is_shared_gate(name: str) -> bool:
    """A layer with one output, whose weight files have as a row."""
    return name.endswith("shared_expert_gate.weight")


def _is_convolution(name: str) -> bool:
    """A kernel [C, 1, J], which files have without the axis of length 1."""
    return name.endswith((".conv1d.weight", ".conv.conv.weight"))


class _LinearAttention(NamedTuple):
    """What the conversion did to layers with the gated delta rule (conversion/qwen.py: `Qwen3NextModel` and
    `_LinearAttentionVReorderBase`): it has -exp(A_log), and of the value heads of all key heads first every one's
    first, then every one's second."""

    path: Path
    key_heads: int
    heads: int
    key_width: int

    @classmethod
    def of(cls, keys: Keys) -> "_LinearAttention":
        names = ("ssm.group_count", "ssm.time_step_rank", "ssm.state_size")
        return cls(keys.path, *(int(keys.number(name)) for name in names))

    def read(self, name: str, tensor: np.ndarray) -> np.ndarray:
        module = name.split(".linear_attn.")[1]
        if module == "norm.weight":
            return tensor
        if module == "A_log":
            if not (tensor < 0).all():
                raise InputError(f"{self.path}: {name} is stored as -exp of it, and not all of that is below 0")
            tensor = np.log(-tensor)
        axis = 1 if module == "out_proj.weight" else 0
        first = 2 * self.key_heads * self.key_width if module in ("in_proj_qkv.weight", "conv1d.weight") else 0
        rest, values = np.split(tensor, [first], axis)
        lead, (length, *tail) = values.shape[:axis], values.shape[axis:]
        tiled = values.reshape(*lead, self.heads // self.key_heads, self.key_heads, length // self.heads, *tail)
        return np.concatenate([rest, tiled.swapaxes(axis, axis + 1).reshape(values.shape)], axis)


def _parts_of_names(keys: Keys) -> Callable[[str], list[_Part]]:
    """From Hugging Face's names of tensors to the file's, by the map that the conversion uses. It knows a layer's
    experts as one tensor [experts, outputs, inputs]."""
    gguf = import_gguf()
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    if keys.architecture not in numbers:
        raise InputError(
            f"{keys.path}: this gguf package does not know the architecture {keys.architecture}; update it"
        )
    names = gguf.get_tensor_name_map(numbers[keys.architecture], keys.layers)

    def own(name: str) -> str:
        name = re.sub(r"\.dt_bias$", ".dt_proj.bias", re.sub(r"\.expert_bias$", ".expert_bias.bias", name))
        # It knows the experts of some models without the prefix.
        found = (names.get_name(one, try_suffixes=(".weight", ".bias")) for one in (name, name.removeprefix("model.")))
        return next(filter(None, found), name)

    def parts(name: str) -> list[_Part]:
        if (one := _ONE_EXPERT.search(name)) is not None:
            return [_Part(own(_ONE_EXPERT.sub(".experts.", name)), int(one[1]))]
        if (all_of := _ALL_EXPERTS.search(name)) is not None:
            suffix = ".bias" if all_of[2] else ".weight"
            which = ("gate_proj", "up_proj") if all_of[1] == "gate_up_proj" else (all_of[1],)
            return [_Part(own(_ALL_EXPERTS.sub(f".experts.{module}{suffix}", name))) for module in which]
        return [_Part(own(f"{name}.weight" if name.endswith(".sinks") else name))]

    return parts


_ONE_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_ALL_EXPERTS = re.compile(r"\.experts\.(gate_up_proj|down_proj)(_bias)?$")
