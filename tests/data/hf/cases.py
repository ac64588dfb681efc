"""What a family of tiny checkpoints is: hand-picked cases, and a function that draws random ones.

A case is a `config.json` as one finds it (either as transformers saves it or, with `hub`, as old repositories spell
it); the numbers of random ones come from numpy and are turned into Python's, since JSON and transformers' checks want
these.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import numpy as np

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


def case(architecture: str, common: Fields, hub: bool = False, load: Fields | None = None, **fields: Any) -> Case:
    return Case(architecture, common | fields, hub=hub, load=load or {})


IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TINY: Fields = {
    **IDS,
    "vocab_size": 41,
    "hidden_size": 12,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 160,
}


def pick(rng: np.random.Generator, *options: Any) -> Any:
    return options[rng.integers(len(options))]


def chance(rng: np.random.Generator, p: float = 0.5) -> bool:
    return bool(rng.random() < p)


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """Both ends included."""
    return int(rng.integers(low, high + 1))


def vocabulary_fields(rng: np.random.Generator) -> Fields:
    vocab = between(rng, 23, 61)
    pad, bos, eos = (int(i) for i in rng.choice(vocab, 3, replace=False))
    return {"vocab_size": vocab, "pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}


def head_fields(rng: np.random.Generator) -> Fields:
    """Query heads, key heads that divide them, and a width that they divide."""
    n = between(rng, 2, 4)
    return {
        "num_attention_heads": n,
        "num_key_value_heads": pick(rng, *(g for g in range(1, n + 1) if n % g == 0)),
        # Half of a rotated head is a whole number.
        "hidden_size": n * pick(rng, *(k for k in (4, 6, 8, 10) if n * k <= 32)),
    }


def llama_fields(rng: np.random.Generator) -> Fields:
    return {
        **vocabulary_fields(rng),
        **head_fields(rng),
        "intermediate_size": between(rng, 9, 40),
        "num_hidden_layers": between(rng, 2, 3),
        "max_position_embeddings": between(rng, 128, 200),
        "rms_norm_eps": pick(rng, 1e-6, 1e-5, 1e-3),
        "tie_word_embeddings": chance(rng),
    }


def rope_fields(rng: np.random.Generator, *kinds: str) -> Fields:
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


def head_dim_fields(rng: np.random.Generator) -> Fields:
    """Mostly a width of its own, and at times left to the default."""
    return {"head_dim": pick(rng, 4, 6, 10)} if chance(rng, 0.7) else {}
