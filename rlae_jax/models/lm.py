"""A loaded language model: configuration, arrays, tokenizer. `load` makes one from a Hugging Face directory."""

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlae_jax.errors import InputError
from rlae_jax.models import checkpoint_files, transformer
from rlae_jax.models.config import ModelConfig

TOKENIZER_FILE = "tokenizer.json"


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A language model: the static half (`config`), its arrays (`params`) and, if it has one, its tokenizer.

    `apply` is pure: jit, grad, vmap and shard it as you like. `logits` and `hidden` fill in `params`.
    """

    config: ModelConfig
    params: transformer.Params
    tokenizer: Any = None  # a transformers tokenizer, or None for a directory without one
    name: str = "model"  # the directory's base name; what results call this member
    path: Path | None = None

    def apply(self, params: transformer.Params, ids: Int[Array, "B T"], mask: Array) -> Float[Array, "B T V"]:
        """Logits, float32, of `ids` under any parameters of this model's shape.

        Args:
          mask: 1 where there is a token, 0 for padding on either side; positions follow the mask.
        """
        return _logits(self.config, params, ids, mask)

    def logits(self, ids: Int[Array, "B T"], mask: Array | None = None) -> Float[Array, "B T V"]:
        """`apply` with this model's parameters; no mask means no padding."""
        ids = jnp.asarray(ids)
        return _logits(self.config, self.params, ids, jnp.ones_like(ids) if mask is None else jnp.asarray(mask))

    def hidden(self, ids: Int[Array, "B T"], mask: Array | None = None) -> Float[Array, "B T D"]:
        """Last hidden states after the final norm: what the output head reads."""
        ids = jnp.asarray(ids)
        return _hidden(self.config, self.params, ids, jnp.ones_like(ids) if mask is None else jnp.asarray(mask))

    def fingerprint(self) -> str:
        """A hash by which a run knows its members again: the configuration and the start of every tensor."""
        digest = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.device_get([leaf.reshape(-1)[:16] for leaf in jax.tree.leaves(self.params)]):
            digest.update(leaf.tobytes())
        return digest.hexdigest()

    def require_tokenizer(self) -> Any:
        """The tokenizer, or an `InputError` that says where one was looked for."""
        if self.tokenizer is None:
            raise InputError(f"{self.path or self.name} has no {TOKENIZER_FILE}: text methods need one (ids work)")
        return self.tokenizer

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face directory (Llama layout) that `load` and transformers read."""
        checkpoint_files.write_model(Path(directory), self.config, self.params, self.tokenizer)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: transformer.Params, ids: Array, mask: Array) -> Array:
    return transformer.forward(config, params, ids, mask)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(config: ModelConfig, params: transformer.Params, ids: Array, mask: Array) -> Array:
    return transformer.output_head(config, params, transformer.forward(config, params, ids, mask)[0])


def load(directory: str | os.PathLike[str], dtype: str = "float32", *, precision: str | None = "highest") -> LM:
    """Loads a Llama-architecture Hugging Face directory (`config.json`, safetensors, `tokenizer.json`).

    Args:
      directory: a local directory. Tensors are read and placed on the default device one at a time.
      dtype: of parameters and activations, "float32" or "bfloat16".
      precision: of float32 products, as in `jax.lax.Precision`. The default keeps them float32 on TPUs and GPUs, whose
        own default rounds operands; None takes the backend's default.

    Raises:
      InputError: whatever is wrong with the directory, in one message, before any tensor is placed.
    """
    path = Path(directory).expanduser()
    config = checkpoint_files.read_config(path, dtype=dtype, precision=precision)
    tokenizer = read_tokenizer(path)
    params = checkpoint_files.read_params(path, config)
    return LM(config, params, tokenizer, name=path.resolve().name, path=path)


def read_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer of a directory; None where there is no tokenizer.json."""
    if not (directory / TOKENIZER_FILE).is_file():
        return None
    from transformers import AutoTokenizer  # takes seconds to import, and arrays alone do not need it

    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise InputError(f"{directory / TOKENIZER_FILE}: not a readable tokenizer ({error})") from error
