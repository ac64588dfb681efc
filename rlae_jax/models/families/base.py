"""What a family of models is: how to read its configuration, and where its tensors live.

A family is data. `read` turns a checkpoint's own configuration (as transformers reads it, defaults filled in) into a
`ModelConfig`; `modules` is the table of names. To add one, write a file like `llama.py`, add it to the list in
`__init__.py`, and give it cases in `tests/data/hf.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models import rope
from rlae_jax.models.config import HeadKind, ModelConfig, Rope
from rlae_jax.models.layers import ACTIVATIONS

Modules = Mapping[str, str | tuple[str, ...]]
Heads = Mapping[str, HeadKind]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints.

    `modules` maps a checkpoint's module names to ours, {i} standing for the layer's number. A module has the leaves
    that our tree has there: `kernel` is its ".weight" [outputs, inputs] transposed, `bias` its ".bias", `scale` and
    tables its ".weight". A tuple of ours is a fused checkpoint module, split along its outputs.
    """

    model_type: str  # as config.json names it
    architectures: tuple[str, ...]  # class names that can be loaded; the first is what is written
    read: Callable[[Any], dict[str, Any]]  # transformers' configuration -> fields of ModelConfig
    modules: Modules | Callable[[ModelConfig], Modules]
    prefix: str = "model."  # of the base model's tensors; checkpoints of the bare model lack it
    inputs_first: tuple[str, ...] = ()  # modules whose ".weight" is [inputs, outputs]
    fused_by_head: tuple[str, ...] = ()  # fused modules that hold q, k, v of one head after another
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that nothing here needs
    head_decides_tie: bool = False  # the head is tied if and only if the checkpoint has none
    # Of encoders: the architectures that have a head for whole texts, and its `Scorer.kind`. Others are plain encoders.
    heads: Heads = dataclasses.field(default_factory=dict)

    def architecture(self, config: ModelConfig) -> str:
        """The class name under which a model is written."""
        kind = config.scorer.kind if config.scorer else None
        return next(name for name in self.architectures if self.heads.get(name) == kind)


def common(hf: Any, **fields: Any) -> dict[str, Any]:
    """The sizes that nearly every decoder's configuration has under the same names."""
    heads = hf.num_attention_heads
    return {
        "vocab": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(hf, "num_key_value_heads", None) or heads,
        "head_width": getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        "tied_head": bool(hf.tie_word_embeddings),
        "context": hf.max_position_embeddings,
        **fields,
    }


def gated_rms(hf: Any, **fields: Any) -> dict[str, Any]:
    """`common`, for the descendants of Llama: RMS norms, gated feed-forward, rotary positions."""
    return common(
        hf,
        **{
            "ffn_width": hf.intermediate_size,
            "norm_eps": hf.rms_norm_eps,
            "activation": activation(getattr(hf, "hidden_act", None) or hf.hidden_activation),
            **fields,
        },
    )


def activation(name: str) -> str:
    """Checks an activation's name.

    Raises:
      InputError: not one of ours.
    """
    if name not in ACTIVATIONS:
        raise InputError(f"activation {name} is not supported; supported: {', '.join(ACTIVATIONS)}")
    return name


def one_rope(hf: Any) -> dict[str, Any]:
    """The fields `rope` and `context` of a model with one kind of rotary positions."""
    context = hf.max_position_embeddings
    used = getattr(hf, "used_context", None)
    fields = hf.rope_parameters
    if (fields.get("rope_type") or "default") == "longrope":
        # Which list of factors applies depends on the text's length; without a word it is the short one.
        used = used or int(fields["original_max_position_embeddings"])
        context = used
    return {"rope": make_rope(hf, fields, used), "context": context}


def make_rope(hf: Any, fields: Mapping[str, Any], used_context: int | None = None) -> Rope:
    """The `Rope` that a configuration's rotary fields describe."""
    return rope.from_fields(fields, context=hf.max_position_embeddings, used_context=used_context)


def windows(hf: Any) -> dict[str, Any]:
    """The fields `window` and `local_layers` from a configuration's layer types."""
    local = tuple(i for i, kind in enumerate(hf.layer_types) if kind == "sliding_attention")
    window = getattr(hf, "sliding_window", None)
    return {"window": window, "local_layers": local} if local and window else {}


def refuse(**unsupported: Any) -> None:
    """Raises an `InputError` that names every setting which is not None or False."""
    found = [f"{name} = {value}" for name, value in unsupported.items() if value not in (None, False)]
    if found:
        raise InputError(f"{', '.join(found)} is not supported")
