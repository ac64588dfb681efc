"""The text as an encoder reads it, inside the decoding loop: what an observation's "text" is.

Prompts come in the encoder's own ids. A chosen token, or entry, is a byte string, whose ids in the encoder's vocabulary
stand in a table; they are appended as the text grows, a row at its own pace. The buffer holds as many ids as the
encoder takes, right-aligned: when the text outgrows it, the oldest text goes.

    text     . . . how many are 2 and 2 ? four        C ids
    reads    . . [CLS] how many are 2 and 2 ? four [SEP]

These ids are those of the pieces, one after another; a tokenizer that saw the whole text might join some of them.
`make_reader` and `read_prompts` make both halves on the host.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.errors import InputError
from rlae_jax.fusion import vocabulary as vocabularies
from rlae_jax.models import Encoder, ModelConfig, transformer
from rlae_jax.models.lm import require_tokenizer


class Text(NamedTuple):
    """The ids of each row's text so far."""

    ids: Int[Array, "B C"]  # right-aligned
    lengths: Int[Array, " B"]  # how many there are


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReader:
    """An encoder, and how the written tokens are spelled in its vocabulary."""

    params: transformer.Params
    ids: Int[Array, " N"]  # all spellings, one after another
    offsets: Int[Array, " O"]  # where each token's begins, of V tokens of the members or entries of their union; V + 1
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    before: tuple[int, ...] = dataclasses.field(metadata={"static": True})  # the ids around a text
    after: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def append(self, text: Text, tokens_b: Int[Array, " B"], rows: Bool[Array, " B"]) -> Text:
        """The text with one more token in some rows."""
        c = text.ids.shape[1]
        first = self.offsets[tokens_b]
        added = jnp.where(rows, self.offsets[tokens_b + 1] - first, 0)
        source = jnp.arange(c)[None] + added[:, None]  # the place in old text and new ids together
        kept = jnp.take_along_axis(text.ids, jnp.minimum(source, c - 1), axis=1)
        place = jnp.clip(first[:, None] + source - c, 0, self.ids.shape[0] - 1)
        return Text(jnp.where(source < c, kept, self.ids[place]), jnp.minimum(text.lengths + added, c))

    def read(self, text: Text) -> Float[Array, "B D"]:
        """The encoder's state of the first token of each row's text."""
        b, c = text.ids.shape
        n = len(self.before)
        ids = jnp.concatenate(
            [jnp.zeros((b, n), jnp.int32), text.ids, jnp.tile(jnp.array(self.after, jnp.int32), (b, 1))], axis=1
        )
        start = c - text.lengths
        columns = start[:, None] + jnp.arange(n)[None]
        ids = ids.at[jnp.arange(b)[:, None], columns].set(jnp.array(self.before, jnp.int32))
        mask = jnp.arange(ids.shape[1])[None] >= start[:, None]
        types = jnp.zeros_like(ids) if self.config.token_types > 1 else None
        hidden = transformer.Model(self.config, self.params).forward(ids, mask, types_bt=types)[0]
        return jnp.take_along_axis(hidden, start[:, None, None], axis=1)[:, 0].astype(jnp.float32)


def make_reader(encoder: Encoder, pieces: Sequence[bytes | None], vocab: int) -> TextReader:
    """What lets a policy read the text through an encoder.

    Args:
      pieces: the bytes that each token, or entry, stands for.
      vocab: V; rows of a head beyond `pieces` stand for no token.

    Raises:
      InputError: an encoder whose tokens stand for no bytes (WordPiece).
    """
    tokenizer = require_tokenizer(encoder.tokenizer, encoder.path or encoder.name)
    ids, offsets = vocabularies.spell_texts(pieces, tokenizer, encoder.name, encoder.config.usable_vocab)
    missing = max(vocab + 1 - len(offsets), 0)
    offsets = np.concatenate([offsets, np.full(missing, offsets[-1])])
    probe = tokenizer("a", add_special_tokens=True)["input_ids"]
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    n = next(i for i in range(len(probe)) if probe[i : i + len(inner)] == inner)
    return TextReader(
        params=encoder.params,
        ids=jnp.asarray(ids),
        offsets=jnp.asarray(offsets),
        config=encoder.config,
        before=tuple(probe[:n]),
        after=tuple(probe[n + len(inner) :]),
    )


def read_prompts(prompts: Sequence[str], encoder: Encoder, reader: TextReader, tokens: int) -> Text:
    """Prompts in the encoder's ids: of each the last, at most `tokens` with those around them.

    Raises:
      InputError: so few tokens that none of them is text; a token that the encoder has no embedding of.
    """
    c = min(tokens, encoder.config.context) - len(reader.before) - len(reader.after)
    if c < 1:
        raise InputError(f"{encoder.name} would read {tokens} tokens, and none of them is text")
    rows = require_tokenizer(encoder.tokenizer, encoder.name)(list(prompts), add_special_tokens=False)["input_ids"]
    ids = np.zeros((len(rows), c), np.int32)
    for b, row in enumerate(rows):
        if max(row, default=0) >= encoder.config.vocab:
            raise InputError(f"{encoder.name} has no embedding of {max(row)}, a token of prompt {b}")
        if row:
            ids[b, -min(len(row), c) :] = row[-c:]
    return Text(ids, np.array([min(len(row), c) for row in rows], np.int32))  # type: ignore[arg-type]
