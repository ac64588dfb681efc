"""Tiny Hugging Face checkpoints of every supported family, and what transformers computes from them.

A family is a handful of hand-picked cases, stored under tests/data/reference, and `sample`, which draws a random case
for live comparisons. A case is a `config.json` as one finds it (either as transformers saves it or, with `hub`, as old
repositories spell it), and tensors that `draw` makes from their names alone: a test without torch writes the same
checkpoint to disk that transformers read. Only `build`, `compute` and `greedy` need torch.
"""

import dataclasses
import functools
import json
import math
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

REFERENCE = Path(__file__).parent / "reference"
NEW_TOKENS = 64
LENGTH = 13  # tokens of the longest prompt; windows are about 5
DECODER_LENGTH = 11
BATCH = 3

Fields = dict[str, Any]
Kind = Literal["decoder", "encoder_decoder", "encoder"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration and how its checkpoint is written."""

    architecture: str
    fields: Fields
    hub: bool = False  # config.json holds `fields` only, as given: what is absent must be known by the loader
    load: Fields = dataclasses.field(default_factory=dict)  # further arguments of `rlae_jax.load`
    token_types: bool = False  # inputs have token types; without, they are left out everywhere
    extra: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)  # tensors besides the model's own
    bare: bool = False  # names lack the base model's prefix, as in the oldest repositories


@dataclasses.dataclass(frozen=True)
class Family:
    kind: Kind
    model_type: str
    cases: dict[str, Case]
    sample: Callable[[np.random.Generator], Case]


@dataclasses.dataclass(frozen=True)
class Stored:
    """All that it takes to write a checkpoint; reference/<family>.json holds it."""

    config: Fields
    tensors: dict[str, list[int]]
    seed: int
    load: Fields
    token_types: bool


# Names of tables that are looked up in. Positions relative to one another speak to attention alone and keep unit size.
_TABLES = ("embed_tokens", "embed_in", "embeddings", "positions", "wte", "wpe", "shared", "relative_attention_bias")
_RELATIVE = ("rel_embeddings", "relative_attention_bias")


def draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of that name. Large enough that a wrong detail shows; RandomState's streams never change."""
    x = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
    if name.endswith("bias"):
        x *= 0.2
    elif len(shape) == 1:
        x = 1 + 0.2 * x
    elif any(part in name for part in _TABLES):
        # Smaller than what the layers add: a tied head would repeat the last token for ever.
        x *= 1.0 if any(part in name for part in _RELATIVE) else 0.25
    else:
        # GPT-2's kernels are [inputs, outputs], all others [outputs, inputs...].
        transposed = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        x *= (shape[0] if transposed else math.prod(shape[1:])) ** -0.5
    return x.astype(np.float32)


def read_stored(family: str, case: str) -> Stored:
    """How to write a stored case's checkpoint."""
    return Stored(**json.loads((REFERENCE / f"{family}.json").read_text())[case])


def write_checkpoint(directory: Path, config: Fields, tensors: dict[str, Any], seed: int) -> None:
    """config.json and model.safetensors; needs no torch."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    drawn = {name: draw(seed, name, tuple(shape)) for name, shape in tensors.items()}
    save_file(drawn, directory / "model.safetensors", metadata={"format": "pt"})


def make_inputs(seed: int, kind: Kind, config: Fields, token_types: bool) -> dict[str, np.ndarray]:
    """The same texts padded left and right, garbage in the padding. The first fills its row.

    `left_ids`, `right_ids`, `left_mask`, `right_mask` [B, T]; `decoder_ids` [B, U] for an encoder-decoder, the first of
    them the start token; `left_types`, `right_types` [B, T] if the case has token types.
    """
    rng = np.random.default_rng(seed)
    vocab = config["vocab_size"]
    counts = np.array([LENGTH, LENGTH - 4, 2])[:BATCH]
    inputs: dict[str, np.ndarray] = {}
    for side in ("left", "right"):
        inputs[f"{side}_ids"] = rng.integers(0, vocab, (BATCH, LENGTH))
        inputs[f"{side}_mask"] = np.zeros((BATCH, LENGTH), np.int64)
        if token_types:
            inputs[f"{side}_types"] = rng.integers(0, config["type_vocab_size"], (BATCH, LENGTH))
    for b, n in enumerate(counts):
        inputs["left_mask"][b, LENGTH - n :] = 1
        inputs["right_mask"][b, :n] = 1
        for what in ("ids", "types") if token_types else ("ids",):
            inputs[f"right_{what}"][b, :n] = inputs[f"left_{what}"][b, LENGTH - n :]
    if kind == "encoder_decoder":
        inputs["decoder_ids"] = rng.integers(0, vocab, (BATCH, DECODER_LENGTH))
        inputs["decoder_ids"][:, 0] = config["decoder_start_token_id"]
    return inputs


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def from_pretrained(architecture: str, directory: Path, dtype: str = "float32") -> Any:
    """The torch model in a directory, with the attention that spells every operation out."""
    import transformers

    _quiet()
    cls = getattr(transformers, architecture)
    return cls.from_pretrained(directory, attn_implementation="eager", dtype=dtype).eval()


def build(family: str, case: Case, seed: int, directory: Path) -> tuple[Any, Stored]:
    """Writes a case's checkpoint into `directory`; returns the torch model that transformers reads from it, in float32.

    The names and shapes are those of `save_pretrained`, so that what torch computes is what can be written without it.
    """
    import transformers

    _quiet()
    scratch = directory / "scratch"
    scratch.mkdir(parents=True)
    raw = {"architectures": [case.architecture], "model_type": FAMILIES[family].model_type, **case.fields}
    (scratch / "config.json").write_text(json.dumps(raw))
    cls = getattr(transformers, case.architecture)
    model = cls(transformers.AutoConfig.from_pretrained(scratch))
    model.save_pretrained(scratch)
    with safe_open(scratch / "model.safetensors", "np") as file:
        tensors = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    config = raw
    if not case.hub:
        config = json.loads((scratch / "config.json").read_text())
        config.pop("transformers_version")
        if "decoder_start_token_id" in raw:
            config.setdefault("decoder_start_token_id", raw["decoder_start_token_id"])
    if case.bare:
        tensors = {name.removeprefix(f"{model.base_model_prefix}."): shape for name, shape in tensors.items()}
    tensors |= {name: list(shape) for name, shape in case.extra.items()}
    shutil.rmtree(scratch)
    stored = Stored(config, tensors, seed, case.load, case.token_types)
    write_checkpoint(directory, config, tensors, seed)
    return from_pretrained(case.architecture, directory), stored


def _positions(model: Any, mask: np.ndarray) -> np.ndarray:
    """Positions follow the mask in every family; RoBERTa's table starts behind its padding row."""
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0) + offset


def compute(
    model: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    decoder_ids: np.ndarray | None = None,
    token_types: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """float32 `hidden`, transformers' last_hidden_state, and `logits` of the whole text, or of a classifier.

    A plain encoder, or one with a head over the vocabulary, has no `logits`.
    """
    import torch

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x))

    arguments = {"input_ids": tensor(ids), "attention_mask": tensor(mask)}
    if token_types is not None:
        arguments["token_type_ids"] = tensor(token_types)
    with torch.no_grad():
        if decoder_ids is not None:
            hidden = model.encoder(**arguments).last_hidden_state
            hidden = model.decoder(
                input_ids=tensor(decoder_ids),
                encoder_hidden_states=hidden,
                encoder_attention_mask=arguments["attention_mask"],
            ).last_hidden_state
            arguments["decoder_input_ids"] = tensor(decoder_ids)
        else:
            arguments["position_ids"] = tensor(_positions(model, mask))
            hidden = model.base_model(**arguments).last_hidden_state
        out = model(**arguments)
    result = {"hidden": hidden.float().numpy()}
    if "logits" in out and not type(model).__name__.endswith("MaskedLM"):
        result["logits"] = out.logits.float().numpy()
    return result


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, steps: int = NEW_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, steps], the logits [B, steps, V] they are the largest of), end tokens ignored; padding on the left.

    An encoder-decoder's text starts behind decoder_start_token_id.
    """
    import torch
    from transformers import GenerationConfig

    settings = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    # What is unset here would be filled in from the model's own.
    model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = None
    start = getattr(model.config, "decoder_start_token_id", None)
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            generation_config=GenerationConfig(**settings, decoder_start_token_id=start),
            output_logits=True,
            # The cache of a T5 has as many layers as its encoder, whatever the decoder has.
            use_cache=not model.config.is_encoder_decoder,
            return_dict_in_generate=True,
        )
    tokens = out.sequences.numpy()[:, -steps:]
    assert out.sequences.shape[1] == steps + (1 if model.config.is_encoder_decoder else ids.shape[1])
    return tokens, torch.stack(out.logits, dim=1).float().numpy()


def refer(model: Any, kind: Kind, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What to compare with, from transformers.

    `hidden` [n, D] and `logits` [n, V] of the n real tokens, row by row (of all decoder tokens for an encoder-decoder);
    `logits` [B, labels] for a classifier; `tokens` [B, 64] and `gaps` [B, 64], by how much each was the likeliest,
    over the largest logit. Both paddings give the same, which is asserted, so that one is returned.
    """
    by_side = []
    for side in ("left", "right"):
        mask = inputs[f"{side}_mask"]
        out = compute(model, inputs[f"{side}_ids"], mask, inputs.get("decoder_ids"), inputs.get(f"{side}_types"))
        real = np.ones(out["hidden"].shape[:2], bool) if kind == "encoder_decoder" else mask.astype(bool)
        # A classifier reads the first column, which is padding on the left.
        by_side.append({key: value if value.ndim == 2 else value[real] for key, value in out.items()})
    left, right = by_side
    for key in left.keys() - ({"logits"} if kind == "encoder" else set()):
        scale = np.abs(left[key]).max()
        assert np.isfinite(left[key]).all()
        assert np.abs(left[key] - right[key]).max() <= 5e-6 * scale, f"transformers' {key} depends on the padding"
    if kind == "encoder":
        return right
    tokens, logits = greedy(model, inputs["left_ids"], inputs["left_mask"])
    largest = np.sort(logits, axis=-1)[..., -2:]
    return left | {"tokens": tokens, "gaps": (largest[..., 1] - largest[..., 0]) / np.abs(logits).max()}


# Drawing configurations. Numbers from numpy are turned into Python's, since JSON and transformers' checks want these.


def pick(rng: np.random.Generator, *options: Any) -> Any:
    return options[rng.integers(len(options))]


def chance(rng: np.random.Generator, p: float = 0.5) -> bool:
    return bool(rng.random() < p)


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """Both ends included."""
    return int(rng.integers(low, high + 1))


def _vocabulary(rng: np.random.Generator) -> Fields:
    vocab = between(rng, 23, 61)
    pad, bos, eos = (int(i) for i in rng.choice(vocab, 3, replace=False))
    return {"vocab_size": vocab, "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}


def _heads(rng: np.random.Generator) -> Fields:
    """Query heads, key heads that divide them, and a width that they divide."""
    n = between(rng, 2, 4)
    return {
        "num_attention_heads": n,
        "num_key_value_heads": pick(rng, *(g for g in range(1, n + 1) if n % g == 0)),
        # Half of a rotated head is a whole number.
        "hidden_size": n * pick(rng, *(k for k in (4, 6, 8, 10) if n * k <= 32)),
    }


def _llama_like(rng: np.random.Generator) -> Fields:
    return {
        **_vocabulary(rng),
        **_heads(rng),
        "intermediate_size": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 200),
        "rms_norm_eps": pick(rng, 1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": chance(rng),
    }


def _rope(rng: np.random.Generator, *kinds: str) -> Fields:
    """rope_parameters, as transformers writes them now, or rope_theta and rope_scaling, as repositories have them."""
    theta = float(pick(rng, 50.0, 1000.0, 10000.0, 500000.0))
    kind = pick(rng, *kinds)
    scaling: Fields = {"rope_type": kind}
    if kind != "default":
        scaling["factor"] = pick(rng, 2.0, 4.0, 8.0)
    if kind == "llama3":
        scaling |= {
            "low_freq_factor": pick(rng, 1.0, 1.5),
            "high_freq_factor": pick(rng, 3.0, 4.0),
            "original_max_position_embeddings": pick(rng, 16, 32),
        }
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = pick(rng, 32, 64)
        if chance(rng):
            scaling |= {"beta_fast": pick(rng, 2.0, 4.0), "beta_slow": pick(rng, 0.5, 1.0)}
        if chance(rng, 0.3):
            scaling["attention_factor"] = 0.8
        if chance(rng, 0.3):
            scaling["truncate"] = False
    if chance(rng):
        return {"rope_parameters": {"rope_theta": theta, **scaling}}
    return {"rope_theta": theta} | ({} if kind == "default" else {"rope_scaling": scaling})


def _head_dim(rng: np.random.Generator) -> Fields:
    """Mostly a width of its own, and at times left to the default."""
    return {"head_dim": pick(rng, 4, 6, 10)} if chance(rng, 0.7) else {}


def sample_llama(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng) | _head_dim(rng) | _rope(rng, "default", "llama3", "linear", "yarn")
    fields |= {"attention_bias": chance(rng), "mlp_bias": chance(rng)}
    return Case("LlamaForCausalLM", fields, hub=chance(rng))


def sample_mistral(rng: np.random.Generator) -> Case:
    window = pick(rng, None, between(rng, 3, 7))
    fields = _llama_like(rng) | _head_dim(rng) | _rope(rng, "default") | {"sliding_window": window}
    return Case("MistralForCausalLM", fields, hub=chance(rng))


def _qwen_windows(rng: np.random.Generator, layers: int) -> Fields:
    return {
        "use_sliding_window": chance(rng, 0.7),
        "sliding_window": between(rng, 3, 7),
        "max_window_layers": between(rng, 0, layers),
    }


def sample_qwen2(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng) | _rope(rng, "default", "yarn")
    fields |= _qwen_windows(rng, fields["num_hidden_layers"])
    return Case("Qwen2ForCausalLM", fields, hub=chance(rng))


def sample_qwen3(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng) | {"head_dim": pick(rng, 4, 6, 10)} | _rope(rng, "default", "yarn")
    fields |= _qwen_windows(rng, fields["num_hidden_layers"])
    return Case("Qwen3ForCausalLM", fields, hub=chance(rng))


def sample_gemma2(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng) | _rope(rng, "default")
    fields |= {
        "head_dim": pick(rng, 4, 6, 10),
        "query_pre_attn_scalar": between(rng, 3, 24),
        "sliding_window": between(rng, 3, 7),
        "attn_logit_softcapping": pick(rng, None, 1.5, 50.0),
        "final_logit_softcapping": pick(rng, None, 4.0, 30.0),
    }
    return Case("Gemma2ForCausalLM", fields, hub=chance(rng))


def sample_gemma3_text(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng)
    fields |= {
        "head_dim": pick(rng, 4, 6, 10),
        "query_pre_attn_scalar": between(rng, 3, 24),
        "sliding_window": between(rng, 3, 7),
    }
    theta, local = pick(rng, 5000.0, 1000000.0), pick(rng, 50.0, 10000.0)
    scaling = {"rope_type": "linear", "factor": pick(rng, 2.0, 8.0)} if chance(rng, 0.7) else None
    if chance(rng):
        fields |= {
            "sliding_window_pattern": pick(rng, 2, 3),
            "rope_theta": theta,
            "rope_local_base_freq": local,
            "rope_scaling": scaling,
        }
    else:
        fields |= {
            "layer_types": [pick(rng, "sliding_attention", "full_attention") for _ in range(2)] + ["full_attention"],
            "num_hidden_layers": 3,
            "rope_parameters": {
                "full_attention": {"rope_theta": theta, **(scaling or {"rope_type": "default"})},
                "sliding_attention": {"rope_theta": local, "rope_type": "default"},
            },
        }
    return Case("Gemma3ForCausalLM", fields, hub=chance(rng))


def sample_phi3(rng: np.random.Generator) -> Case:
    fields = _llama_like(rng)
    fields["sliding_window"] = pick(rng, None, between(rng, 3, 7))
    fields["rope_theta"] = pick(rng, 100.0, 10000.0)
    head = fields["hidden_size"] // fields["num_attention_heads"]
    rotated = pick(rng, *(n for n in range(2, head + 1, 2)))
    fields["partial_rotary_factor"] = rotated / head
    load = {}
    if chance(rng, 0.7):
        long = chance(rng)
        fields["original_max_position_embeddings"] = 8 if long else 96
        fields["rope_scaling"] = {
            "type": "longrope",
            "short_factor": [float(f) for f in rng.uniform(1, 1.5, rotated // 2).round(3)],
            "long_factor": [float(f) for f in rng.uniform(2, 6, rotated // 2).round(3)],
        }
        if long:
            load = {"context": fields["max_position_embeddings"]}
    return Case("Phi3ForCausalLM", fields, hub=chance(rng), load=load)


def sample_olmo2(rng: np.random.Generator) -> Case:
    return Case("Olmo2ForCausalLM", _llama_like(rng) | _rope(rng, "default"), hub=chance(rng))


def sample_gpt2(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    fields = {
        **_vocabulary(rng),
        "n_head": heads,
        "n_embd": heads * between(rng, 4, 8),
        "n_layer": between(rng, 2, 3),
        "n_positions": between(rng, 128, 140),
        "n_inner": pick(rng, None, between(rng, 9, 40)),
        "layer_norm_epsilon": pick(rng, 1e-5, 1e-3),
        "activation_function": pick(rng, "gelu_new", "gelu", "relu"),
        "scale_attn_weights": chance(rng),
        "scale_attn_by_inverse_layer_idx": chance(rng),
        "tie_word_embeddings": chance(rng),
    }
    return Case("GPT2LMHeadModel", fields, hub=chance(rng))


def sample_gpt_neox(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    head = pick(rng, 4, 8)
    fields = {
        **_vocabulary(rng),
        "num_attention_heads": heads,
        "hidden_size": heads * head,
        "intermediate_size": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 200),
        "layer_norm_eps": pick(rng, 1e-5, 1e-3),
        "hidden_act": pick(rng, "gelu", "gelu_fast"),
        "use_parallel_residual": chance(rng),
        "attention_bias": chance(rng),
        "rotary_pct": pick(rng, 0.5, 1.0),
        "rotary_emb_base": pick(rng, 100, 10000),
        "tie_word_embeddings": chance(rng),
    }
    return Case("GPTNeoXForCausalLM", fields, hub=chance(rng))


def sample_opt(rng: np.random.Generator) -> Case:
    heads = between(rng, 2, 4)
    width = heads * between(rng, 4, 8)
    fields = {
        **_vocabulary(rng),
        "num_attention_heads": heads,
        "hidden_size": width,
        "word_embed_proj_dim": pick(rng, width, between(rng, 6, 20)),
        "ffn_dim": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 140),
        "activation_function": pick(rng, "relu", "gelu"),
        "do_layer_norm_before": chance(rng),
        "enable_bias": chance(rng),
        "layer_norm_elementwise_affine": chance(rng),
        "tie_word_embeddings": chance(rng),
    }
    return Case("OPTForCausalLM", fields, hub=chance(rng))


def _t5_case(fields: Fields, *, tied: bool, **options: Any) -> Case:
    """Transformers writes a tied T5 whatever the configuration says; a head of its own is told by its tensor."""
    head = {} if tied else {"lm_head.weight": (fields["vocab_size"], fields["d_model"])}
    return Case("T5ForConditionalGeneration", fields, extra=head, **options)


def sample_t5(rng: np.random.Generator) -> Case:
    vocabulary = _vocabulary(rng)
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


def _encoder(rng: np.random.Generator) -> Fields:
    heads = between(rng, 2, 4)
    return {
        **_vocabulary(rng),
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


# The hand-picked cases. Each one's values are unusual in as many ways as fit together.


def _case(architecture: str, common: Fields, hub: bool = False, load: Fields | None = None, **fields: Any) -> Case:
    return Case(architecture, common | fields, hub=hub, load=load or {})


_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_TINY: Fields = {
    **_IDS,
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}

_llama = functools.partial(_case, "LlamaForCausalLM", _TINY)
_LLAMA = {
    "grouped": _llama(head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 500.0}, rms_norm_eps=1e-3),
    "llama3": _llama(
        hub=True,
        head_dim=10,
        num_key_value_heads=1,
        vocab_size=37,
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "linear": _llama(hub=True, head_dim=6, rope_scaling={"type": "linear", "factor": 4.0}, num_key_value_heads=4),
    "yarn": _llama(
        head_dim=16,
        num_hidden_layers=3,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 200.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "attention_factor": 0.8,
            "truncate": False,
        },
    ),
    "biases": _llama(attention_bias=True, mlp_bias=True, tie_word_embeddings=True, head_dim=4),
}

_mistral = functools.partial(_case, "MistralForCausalLM", _TINY)
_MISTRAL = {
    "window": _mistral(hub=True, head_dim=10, sliding_window=5, rope_theta=300.0, rms_norm_eps=1e-3),
    "no_window": _mistral(head_dim=6, sliding_window=None, num_key_value_heads=1, vocab_size=53),
    "tied_window": _mistral(sliding_window=4, hidden_size=24, num_hidden_layers=3, tie_word_embeddings=True),
}

_qwen2 = functools.partial(_case, "Qwen2ForCausalLM", _TINY | {"hidden_size": 24})
_QWEN2 = {
    "window_above": _qwen2(
        hub=True, num_hidden_layers=3, use_sliding_window=True, sliding_window=5, max_window_layers=1, rope_theta=900.0
    ),
    # A window that is configured and not used.
    "unused_window": _qwen2(
        hub=True, use_sliding_window=False, sliding_window=3, max_window_layers=0, tie_word_embeddings=True
    ),
    "window_everywhere": _qwen2(
        head_dim=10,
        num_key_value_heads=1,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=0,
        vocab_size=29,
    ),
}

_qwen3 = functools.partial(_case, "Qwen3ForCausalLM", _TINY)
_QWEN3 = {
    "wide_heads": _qwen3(head_dim=10, rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}),
    "tied_windows": _qwen3(
        head_dim=6,
        num_hidden_layers=3,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "yarn": _qwen3(
        hub=True,
        head_dim=8,
        hidden_size=20,
        rms_norm_eps=1e-3,
        rope_theta=400.0,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 80},
    ),
}

_gemma2 = functools.partial(_case, "Gemma2ForCausalLM", _TINY | {"num_hidden_layers": 3})
_GEMMA2 = {
    # Ties its head and has its activation by default.
    "caps": _gemma2(
        hub=True,
        head_dim=10,
        query_pre_attn_scalar=7,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=6.0,
    ),
    "untied": _gemma2(
        head_dim=6,
        num_key_value_heads=1,
        query_pre_attn_scalar=20,
        sliding_window=4,
        tie_word_embeddings=False,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        rms_norm_eps=1e-3,
    ),
    "default_caps": _gemma2(head_dim=8, vocab_size=31, query_pre_attn_scalar=4, sliding_window=6, num_hidden_layers=2),
}

_gemma3 = functools.partial(_case, "Gemma3ForCausalLM", _TINY | {"num_hidden_layers": 3})
_GEMMA3 = {
    "pattern": _gemma3(
        hub=True,
        head_dim=10,
        query_pre_attn_scalar=12,
        sliding_window=5,
        sliding_window_pattern=2,
        rope_theta=3000.0,
        rope_local_base_freq=60.0,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "layer_types": _gemma3(
        head_dim=6,
        num_key_value_heads=1,
        query_pre_attn_scalar=5,
        sliding_window=4,
        tie_word_embeddings=False,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 20.0},
        },
    ),
    # Bases by default: 1000000 and 10000.
    "default_bases": _gemma3(
        hub=True, head_dim=8, vocab_size=31, query_pre_attn_scalar=8, sliding_window=6, sliding_window_pattern=3
    ),
}

_phi3 = functools.partial(_case, "Phi3ForCausalLM", _TINY | {"hidden_size": 24})
_FACTORS = {"short_factor": [1.0, 1.3], "long_factor": [2.5, 5.0]}
_PHI3 = {
    "window": _phi3(hub=True, sliding_window=5, rope_theta=200.0, rms_norm_eps=1e-3),
    "short": _phi3(
        hub=True,
        num_key_value_heads=1,
        hidden_size=32,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=96,
        rope_theta=500.0,
        rope_scaling={"type": "longrope", **_FACTORS},
    ),
    "long": _phi3(
        load={"context": 160},
        num_key_value_heads=4,
        hidden_size=32,
        num_hidden_layers=3,
        partial_rotary_factor=0.5,
        original_max_position_embeddings=8,
        rope_theta=500.0,
        rope_scaling={"type": "longrope", **_FACTORS},
    ),
    "tied_partial": _phi3(
        head_dim=10,
        vocab_size=53,
        tie_word_embeddings=True,
        sliding_window=7,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.6},
    ),
}

_olmo2 = functools.partial(_case, "Olmo2ForCausalLM", _TINY)
_OLMO2 = {
    "grouped": _olmo2(hub=True, hidden_size=24, rope_theta=500.0, rms_norm_eps=1e-3),
    "multi_query": _olmo2(
        head_dim=10, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    ),
    "tied": _olmo2(hidden_size=24, num_key_value_heads=4, num_hidden_layers=3, tie_word_embeddings=True, vocab_size=29),
}

_GPT2_TINY: Fields = {
    "vocab_size": 41,
    "n_embd": 20,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 128,
    "bos_token_id": 40,
    "eos_token_id": 40,
}
_gpt2 = functools.partial(_case, "GPT2LMHeadModel", _GPT2_TINY)
_GPT2 = {
    # Names without a prefix and causal masks among the tensors, as in the first checkpoints.
    "bare": dataclasses.replace(
        _gpt2(hub=True, layer_norm_epsilon=1e-3),
        bare=True,
        extra={f"h.{i}.attn.bias": (1, 1, 128, 128) for i in range(2)},
    ),
    "inner": _gpt2(n_inner=27, scale_attn_by_inverse_layer_idx=True, n_layer=3, reorder_and_upcast_attn=True),
    "untied_unscaled": _gpt2(
        hub=True, n_head=2, scale_attn_weights=False, tie_word_embeddings=False, activation_function="relu"
    ),
}

_NEOX_TINY: Fields = {key: value for key, value in _TINY.items() if key != "num_key_value_heads"} | {"hidden_size": 32}
_neox = functools.partial(_case, "GPTNeoXForCausalLM", _NEOX_TINY)
_NEOX = {
    # Rotates a quarter of each head by default, 2 of 8.
    "parallel": _neox(hub=True, layer_norm_eps=1e-3),
    "serial": _neox(hub=True, use_parallel_residual=False, rotary_pct=0.5, rotary_emb_base=300),
    "unbiased_tied": _neox(
        hidden_size=24,
        num_hidden_layers=3,
        attention_bias=False,
        tie_word_embeddings=True,
        hidden_act="gelu_fast",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
    ),
}

_OPT_TINY: Fields = {
    **_IDS,
    "vocab_size": 41,
    "hidden_size": 20,
    "ffn_dim": 27,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_opt = functools.partial(_case, "OPTForCausalLM", _OPT_TINY)
_OPT = {
    "norm_before": _opt(hub=True, pad_token_id=1, bos_token_id=2),
    "norm_after": _opt(word_embed_proj_dim=12, do_layer_norm_before=False),
    "plain_norms": _opt(hub=True, enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    "untied": _opt(num_hidden_layers=3, word_embed_proj_dim=26, tie_word_embeddings=False),
}

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
    "llama": Family("decoder", "llama", _LLAMA, sample_llama),
    "mistral": Family("decoder", "mistral", _MISTRAL, sample_mistral),
    "qwen2": Family("decoder", "qwen2", _QWEN2, sample_qwen2),
    "qwen3": Family("decoder", "qwen3", _QWEN3, sample_qwen3),
    "gemma2": Family("decoder", "gemma2", _GEMMA2, sample_gemma2),
    "gemma3_text": Family("decoder", "gemma3_text", _GEMMA3, sample_gemma3_text),
    "phi3": Family("decoder", "phi3", _PHI3, sample_phi3),
    "olmo2": Family("decoder", "olmo2", _OLMO2, sample_olmo2),
    "gpt2": Family("decoder", "gpt2", _GPT2, sample_gpt2),
    "gpt_neox": Family("decoder", "gpt_neox", _NEOX, sample_gpt_neox),
    "opt": Family("decoder", "opt", _OPT, sample_opt),
    "t5": Family("encoder_decoder", "t5", _T5, sample_t5),
    "bert": Family("encoder", "bert", _BERT, sample_bert),
    "roberta": Family("encoder", "roberta", _ROBERTA, sample_roberta),
    "deberta_v2": Family("encoder", "deberta-v2", _DEBERTA_V2, sample_deberta_v2),
}
