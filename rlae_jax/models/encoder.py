"""A loaded encoder: states of every token, and scores of whole texts where the checkpoint has a head for them.

`load_encoder` makes one from a Hugging Face checkpoint of BERT, RoBERTa or DeBERTa. In: token ids [B, T] with a mask
and token types, which `encode` makes from texts. Out: hidden states [B, T, D] or scores [B, labels].
"""

import dataclasses
import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from rlae_jax import sharding
from rlae_jax.compilation import jit
from rlae_jax.errors import InputError
from rlae_jax.models import checkpoint_files, lora, transformer
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.lm import TextIds, check_text, open_checkpoint, require_tokenizer, unchanged

SMALLEST_WIDTH = 8  # of encoded texts


@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
    """An encoder: the static half (`config`), its arrays (`params`) and, if it has one, its tokenizer.

    `apply` and `apply_hidden` are pure: jit, grad, vmap and shard them as you like. `logits` and `hidden` fill in
    `params`.
    """

    config: ModelConfig
    params: transformer.Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)  # of transformers; None for a directory without one
    name: str = "encoder"  # the directory's base name
    path: Path | None = None
    # The checkpoint's own settings; None for a model made here.
    source: checkpoint_files.Source | None = dataclasses.field(default=None, repr=False)
    mesh: Mesh | None = None  # over which the arrays are spread; None: they lie on one device

    @property
    def labels(self) -> tuple[str, ...]:
        """What the columns of `logits` stand for; none without a head."""
        return self.config.scorer.labels if self.config.scorer else ()

    def apply(
        self,
        params: transformer.Params | lora.Adapted,
        ids: TextIds,
        mask: ArrayLike | None,
        token_types: ArrayLike | None = None,
    ) -> Float[Array, "B labels"]:
        """Scores, float32, of whole texts under any parameters of this model's shape, before any softmax.

        Args:
          params: like `self.params`, or a `lora.Adapted`.
          ids: Int[B, T].
          mask: [B, T], 1 where there is a token, 0 for padding on either side; positions follow the mask, and the head
            reads the first token.
          token_types: Int[B, T], which segment a token belongs to, for models that know segments; all 0 if left out.

        Raises:
          InputError: the checkpoint has no head; token types for a model without, or more tokens than positions; ids
            that are no [B, T] of whole numbers, or another shape of the mask or the types.
        """
        if self.config.scorer is None:
            raise InputError(f"{self.path or self.name} is a plain encoder without a head: it has hidden, not logits")
        scores: Array = _logits(self.config, params, *self._inputs(ids, mask, token_types))
        return scores

    def apply_hidden(
        self,
        params: transformer.Params | lora.Adapted,
        ids: TextIds,
        mask: ArrayLike | None,
        token_types: ArrayLike | None = None,
    ) -> Float[Array, "B T D"]:
        """The last layer's states; arguments as in `apply`. What stands in padding means nothing."""
        hidden: Array = _hidden(self.config, params, *self._inputs(ids, mask, token_types))
        return hidden

    def logits(
        self, ids: TextIds, mask: ArrayLike | None = None, token_types: ArrayLike | None = None
    ) -> Float[Array, "B labels"]:
        """`apply` with this model's parameters; no mask means no padding."""
        return self.apply(self.params, *self._inputs(ids, mask, token_types))

    def hidden(
        self, ids: TextIds, mask: ArrayLike | None = None, token_types: ArrayLike | None = None
    ) -> Float[Array, "B T D"]:
        """`apply_hidden` with this model's parameters; no mask means no padding."""
        return self.apply_hidden(self.params, *self._inputs(ids, mask, token_types))

    def _inputs(self, ids: Any, mask: Any, token_types: Any) -> tuple[Array, Array, Array | None]:
        ids, mask = check_text(self.name, ids, mask, self.config.vocab)
        if self.config.learned_positions and ids.shape[1] > self.config.context:
            raise InputError(f"{ids.shape[1]} tokens: {self.name} has {self.config.context} positions")
        ids, mask = sharding.spread(ids, self.mesh), sharding.spread(mask, self.mesh)
        if token_types is None:
            return ids, mask, None
        if not self.config.token_types:
            raise InputError(f"{self.path or self.name} knows no token types: leave token_types out")
        token_types = jnp.asarray(token_types)
        if token_types.shape != ids.shape:
            raise InputError(f"{self.name}: token types {list(token_types.shape)} of ids {list(ids.shape)}")
        return ids, mask, sharding.spread(token_types, self.mesh)

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None
    ) -> tuple[Int[Array, "B T"], Int[Array, "B T"], Int[Array, "B T"] | None]:
        """(ids, mask, token types) of texts, or of texts and their second halves, as `hidden` and `logits` take them.

        What is longer than the context is cut off at its end, for pairs at the end of the longer half. Rows are padded
        on the right to a power of two, or the context, so that compiled programs are used again. The token types are
        None if the model knows at most one.

        Raises:
          InputError: no texts, a single string, another number of pairs, no tokenizer.
        """
        tokenizer = require_tokenizer(self.tokenizer, self.path or self.name)
        if isinstance(texts, str) or isinstance(pairs, str):
            raise InputError("texts and pairs must be lists of strings; put a single text in a list")
        if not len(texts):
            raise InputError("no texts: give at least one")
        if pairs is not None and len(pairs) != len(texts):
            raise InputError(f"{len(texts)} texts and {len(pairs)} pairs: give one for each")
        context = self.config.context
        rows = tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation="longest_first",
            max_length=context,
            return_token_type_ids=True,
        )
        longest = max(map(len, rows["input_ids"]))
        width = min(context, max(SMALLEST_WIDTH, 1 << (longest - 1).bit_length()))

        def padded(rows: Sequence[Sequence[int]]) -> Array:
            return jnp.asarray([[*row, *[0] * (width - len(row))] for row in rows], jnp.int32)

        types = padded(rows["token_type_ids"]) if self.config.token_types > 1 else None
        return padded(rows["input_ids"]), padded([[1] * len(row) for row in rows["input_ids"]]), types

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face directory that `load_encoder` and transformers read, in the layout of the checkpoint
        that this model came from. A head over the vocabulary or a pooler that was not loaded is not written."""
        checkpoint_files.write_model(Path(directory), self.config, self.params, self.source, self.tokenizer)


@functools.partial(jit, static_argnums=0)
def _hidden(config: ModelConfig, params: Any, ids: Array, mask: Array, types: Any) -> Array:
    return transformer.Model.bind(config, params, len(ids)).forward(ids, mask, types_bt=types)[0]


@functools.partial(jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, ids: Array, mask: Array, types: Any) -> Array:
    hidden = _hidden(config, params, ids, mask, types)
    return transformer.Model.bind(config, params, len(ids)).scores(hidden, mask)


def load_encoder(
    name: str | os.PathLike[str],
    dtype: str = "float32",
    *,
    precision: str | None = "highest",
    mesh: Mesh | None = None,
    check_finite: bool = True,
) -> Encoder:
    """Loads an encoder: a Hugging Face directory, or a Hub id through huggingface_hub's cache.

    Which head it has is told by the architecture in config.json: a classifier's, the next-sentence head of BERT (also
    of its pretraining checkpoints), or none. Heads over the vocabulary and poolers that no head reads are left out.

    Args:
      name: a local directory with config.json and safetensors, or a Hub id like "microsoft/deberta-v3-base".
      dtype: of parameters and activations: "float32", "bfloat16" or "float16".
      precision: of float32 products, as in `load`.
      mesh: over which the arrays are spread, as in `load`; by default the one in force.
      check_finite: whether weights with a NaN or an infinity are refused, as in `load`.

    Raises:
      InputError: whatever is wrong with the checkpoint, in one message, before any tensor is placed; weights that are
        not finite.
    """
    with unchanged(name):
        opened = open_checkpoint(name, encoder=True, dtype=dtype, precision=precision)
        (params, _), mesh = opened.read_params(mesh, None, check_finite)
    return Encoder(params=params, mesh=mesh, **opened._asdict())
