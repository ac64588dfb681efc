"""What a family of models is: how to read its configuration, and where its tensors live.

A family is data. `read` turns the fields of a checkpoint's config.json, over the `defaults` of what it may leave out,
into those of a `ModelConfig`; `modules` is the table of names. To add one, write a file like `llama.py`, add it to the
list in `__init__.py`, and give it cases in `tests/data/hf/`. transformers' own configuration classes would fill in
the defaults too, but where torch is installed their import takes seconds and more memory than reading a model may.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models import hugging_face, rope
from rlae_jax.models.config import Experts, HeadKind, ModelConfig, Rope
from rlae_jax.models.layers import ACTIVATIONS

Modules = Mapping[str, str | tuple[str, ...]]
Heads = Mapping[str, HeadKind]
LOCAL = "sliding_attention"  # the layer type whose attention has a window


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One family of checkpoints.

    `modules` maps a checkpoint's module names to ours, {i} standing for the layer's number and {e} for an expert's,
    whose tensors are each a slice of ours. A module has the leaves that our tree has there: `kernel` is its ".weight"
    [outputs, inputs] transposed, `bias` its ".bias", `scale` and tables its ".weight". A tuple of ours is a fused
    checkpoint module, split along its outputs.
    """

    model_type: str  # as config.json names it
    architectures: tuple[str, ...]  # class names that can be loaded; the first is what is written
    # What config.json may leave out, as transformers fills it in. Sizes it may not: a model without them is broken.
    defaults: Mapping[str, Any]
    read: Callable[[Any], dict[str, Any]]  # config.json's fields, as attributes -> fields of ModelConfig
    modules: Modules | Callable[[ModelConfig], Modules]
    prefix: str = "model."  # of the base model's tensors; checkpoints of the bare model lack it
    # Of families whose checkpoints hold a layer's experts in either way: the modules of those that have one tensor for
    # all experts, [experts, outputs, inputs], in the place of a module for each.
    stacked: Modules = dataclasses.field(default_factory=dict)
    inputs_first: tuple[str, ...] = ()  # modules whose ".weight" is [inputs, outputs]
    fused_by_head: tuple[str, ...] = ()  # fused modules that hold all parts of one head after another
    interleaved: tuple[str, ...] = ()  # fused modules whose outputs alternate
    unsuffixed: tuple[str, ...] = ()  # modules whose tensors are called as they are, and their biases with "_bias"
    ignored: tuple[str, ...] = ()  # regular expressions of tensors that nothing here needs
    head_decides_tie: bool = False  # the head is tied if and only if the checkpoint has none
    # The fields of config.json of a model that was made here; None where none is written in this family's layout.
    write: Callable[[ModelConfig], dict[str, Any]] | None = None
    # Of encoders: the architectures with a head for whole texts, and its `TextHead.kind`. Others are plain encoders.
    heads: Heads = dataclasses.field(default_factory=dict)

    def as_stored(self, names: Iterable[str]) -> "Family":
        """The same, as a checkpoint with these tensors holds its experts."""
        ends = tuple(module.split("{i}")[1] for module in self.stacked)
        if callable(self.modules) or not any(name.endswith(ends) for name in names):
            return self
        others = {module: ours for module, ours in self.modules.items() if "{e}" not in module}
        return dataclasses.replace(
            self, modules=others | dict(self.stacked), unsuffixed=(*self.unsuffixed, *self.stacked)
        )

    def architecture(self, config: ModelConfig) -> str:
        """The class name under which a model is written."""
        kind = config.scorer.kind if config.scorer else None
        return next(name for name in self.architectures if self.heads.get(name) == kind)


def settings(family: Family, raw: Mapping[str, Any], used_context: int | None) -> hugging_face.Fields:
    """The fields of config.json, as `Family.read` takes them.

    Args:
      used_context: the longest text that the model is loaded for, if the user says so.
    """
    return hugging_face.Fields(raw, family.defaults, used_context=used_context)


def common(hf: Any, **fields: Any) -> dict[str, Any]:
    """The sizes that nearly every decoder's configuration has under the same names."""
    heads, width = hf.num_attention_heads, getattr(hf, "head_dim", None)
    if width is None and hf.hidden_size % heads:
        raise InputError(f"num_attention_heads ({heads}) must divide hidden_size ({hf.hidden_size})")
    return {
        "vocab": hf.vocab_size,
        "width": hf.hidden_size,
        "layers": hf.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(hf, "num_key_value_heads", None) or heads,
        "head_width": width or hf.hidden_size // heads,
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


def one_rope(
    hf: Any, fields: Mapping[str, Any] | None = None, *, partial: bool = False, interleaved: bool = False
) -> dict[str, Any]:
    """The fields `rope` and `context` of a model with one kind of rotary positions.

    Args:
      fields: what the family finds under names of its own; by default `rope_theta` and `partial_rotary_factor`.
      partial, interleaved: see `make_rope`.
    """
    own = {name: getattr(hf, name) for name in ("rope_theta", _PARTIAL) if hasattr(hf, name)}
    scaling = getattr(hf, "rope_scaling", None) or getattr(hf, "rope_parameters", None) or {}
    # A length beside the scaling's numbers goes before the one among them (Phi-3 writes it there).
    old = getattr(hf, "original_max_position_embeddings", None)
    given = {**(own if fields is None else fields), **scaling, **({} if old is None else {_OLD: old})}
    context, used = hf.max_position_embeddings, hf.used_context
    if kind(given) == "longrope":
        # Which list of factors applies depends on the text's length; without a word it is the short one.
        context = used = used or int(given.get(_OLD) or context)
    return {"rope": make_rope(hf, given, used, partial=partial, interleaved=interleaved), "context": context}


_OLD, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"


def kind(fields: Mapping[str, Any]) -> str:
    """The kind of rotary scaling, by the name that is current."""
    name = fields.get("rope_type") or fields.get("type") or "default"
    return "longrope" if name == "su" else str(name)


def make_rope(
    hf: Any,
    fields: Mapping[str, Any],
    used_context: int | None = None,
    *,
    partial: bool = False,
    interleaved: bool = False,
) -> Rope:
    """The `Rope` that a configuration's rotary fields describe.

    Args:
      partial: whether the family has partial rotary positions. transformers ignores the fraction that some
        configurations of other families name.
      interleaved: whether its pairs are neighbours.
    """
    fields = {_OLD: hf.max_position_embeddings, "rope_theta": 10_000.0, **fields, "rope_type": kind(fields)}
    if not partial:
        fields.pop(_PARTIAL, None)
    if fields["rope_type"] == "dynamic":
        used_context = hf.used_context
    made = rope.from_fields(fields, context=hf.max_position_embeddings, used_context=used_context)
    return dataclasses.replace(made, interleaved=interleaved)


def windows(hf: Any, layer_types: Sequence[str] | None) -> dict[str, Any]:
    """The fields `window` and `local_layers` from a configuration's layer types; None: as many as there are layers, all
    local.

    Raises:
      InputError: other types.
    """
    kinds = [LOCAL] * hf.num_hidden_layers if layer_types is None else layer_types
    _check_kinds(kinds, LOCAL)
    local = tuple(i for i, name in enumerate(kinds) if name == LOCAL)
    return {"window": hf.sliding_window, "local_layers": local} if local and hf.sliding_window else {}


def layers_of(hf: Any, kind: str, layer_types: Sequence[str]) -> tuple[int, ...]:
    """The layers of one kind, where all others have attention.

    Raises:
      InputError: another number of types than of layers; other types.
    """
    if len(layer_types) != hf.num_hidden_layers:
        raise InputError(f"layer_types has {len(layer_types)} entries for {hf.num_hidden_layers} layers")
    _check_kinds(layer_types, kind)
    return tuple(i for i, name in enumerate(layer_types) if name == kind)


def _check_kinds(layer_types: Sequence[str], kind: str) -> None:
    others = sorted({str(name) for name in layer_types} - {kind, "full_attention"})
    if others:
        raise InputError(f"layer_types {', '.join(others)} are not supported; supported: {kind}, full_attention")


def counted_windows(hf: Any) -> list[str]:
    """The layer types of a configuration that names none: every n-th layer has no window, by `sliding_window_pattern`,
    a number or that many letters ("LLLG")."""
    pattern = hf.sliding_window_pattern
    period = len(pattern) if isinstance(pattern, str) else pattern
    return [LOCAL if period and (i + 1) % period else "full_attention" for i in range(hf.num_hidden_layers)]


def experts_of(hf: Any, **fields: Any) -> Experts:
    """The experts of a configuration, whose number has several names; by default in every layer and as wide as the
    dense block would be."""
    names = [name for name in ("num_local_experts", "n_routed_experts") if hasattr(hf, name)]
    return Experts(
        **{
            "number": getattr(hf, names[0]) if names else hf.num_experts,
            "active": hf.num_experts_per_tok,
            "width": hf.intermediate_size,
            "layers": tuple(range(hf.num_hidden_layers)),
            **fields,
        }
    )


def refuse(**unsupported: Any) -> None:
    """Raises an `InputError` that names every setting which is not None or False."""
    found = [f"{name} = {value}" for name, value in unsupported.items() if value not in (None, False)]
    if found:
        raise InputError(f"{', '.join(found)} is not supported")
