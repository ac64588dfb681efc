"""What a language model is made of, as one frozen (hashable) record: the static half of every model.

The other half, its arrays, is a plain nested dictionary (see `transformer.py`). Two models with equal configurations
share every compiled program.
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. The letters are the axis names used in shapes and einsum strings."""

    vocab: int  # V: rows of the output head
    width: int  # D
    layers: int
    heads: int  # N: query heads
    kv_heads: int  # G: key/value heads, a divisor of N
    head_width: int  # H
    ffn_width: int  # F
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    tied_head: bool = False  # the output head reads the embedding table
    context: int = 2048  # positions the model was made for
    bos_id: int | None = None
    end_ids: tuple[int, ...] = ()  # any of these ends a text
    dtype: str = "float32"  # of parameters and activations; norms, rotary angles and softmax are float32 always
    # TPUs (and TF32 GPUs) round float32 operands of a product unless told otherwise. Without effect on bfloat16.
    precision: str | None = "highest"
