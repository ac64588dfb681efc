"""A loaded language model: configuration, arrays, tokenizer. `load` makes one from a Hugging Face checkpoint."""

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
from rlae_jax.models import checkpoint_files, hub, lora, peft_files, transformer
from rlae_jax.models.config import ModelConfig

# Any of them makes a tokenizer; the first is what the fast ones are kept in.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "vocab.json", "vocab.txt")


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
    source: checkpoint_files.Source | None = None  # the checkpoint's own settings; None for a model made here

    def apply(
        self,
        params: transformer.Params,
        ids: Int[Array, "B T"],
        mask: Array,
        decoder_ids: Int[Array, "B T"] | None = None,
        adapters: lora.Adapters | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of `ids` under any parameters of this model's shape.

        Args:
          mask: 1 where there is a token, 0 for padding on either side; positions follow the mask.
          decoder_ids: of an encoder-decoder, whose `ids` go to the encoder; the first is the start token.
          adapters: see `lora.use`.
        """
        return _logits(self.config, params, ids, mask, decoder_ids, adapters)

    def logits(
        self, ids: Int[Array, "B T"], mask: Array | None = None, decoder_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"]:
        """`apply` with this model's parameters; no mask means no padding."""
        return self.apply(self.params, *self._inputs(ids, mask, decoder_ids))

    def hidden(
        self, ids: Int[Array, "B T"], mask: Array | None = None, decoder_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Last hidden states after the final norm: what the output head reads."""
        return _hidden(self.config, self.params, *self._inputs(ids, mask, decoder_ids))

    def _inputs(self, ids: Any, mask: Any, decoder_ids: Any) -> tuple[Array, Array, Array | None]:
        if (decoder_ids is None) != (self.config.encoder is None):
            needs = "is an encoder-decoder: give" if decoder_ids is None else "is no encoder-decoder: do not give"
            raise InputError(f"{self.name} {needs} decoder_ids")
        ids = jnp.asarray(ids)
        mask = jnp.ones_like(ids) if mask is None else jnp.asarray(mask)
        return ids, mask, None if decoder_ids is None else jnp.asarray(decoder_ids)

    def fingerprint(self) -> str:
        """A hash by which a run knows its members again: the configuration and the start of every tensor."""
        digest = hashlib.sha256(repr(self.config).encode())
        for leaf in jax.device_get([leaf.reshape(-1)[:16] for leaf in jax.tree.leaves(self.params)]):
            digest.update(leaf.tobytes())
        return digest.hexdigest()

    def require_tokenizer(self) -> Any:
        """The tokenizer, or an `InputError` that says where one was looked for."""
        if self.tokenizer is None:
            raise InputError(
                f"{self.path or self.name} has no tokenizer ({TOKENIZER_FILES[0]}): text methods need one (ids work)"
            )
        return self.tokenizer

    def with_adapter(self, adapter: str | os.PathLike[str] | lora.Adapter) -> "LM":
        """This model with an adapter merged into its parameters; see `lora.merge` for its inverse.

        Raises:
          InputError: an adapter for another base.
        """
        adapter = load_adapter(adapter, self)
        params = lora.merge(self.params, lora.stack([adapter]), [1.0])
        return dataclasses.replace(self, params=params, name=adapter.name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face directory that `load` and transformers read: in the layout of the checkpoint that this
        model came from, or in Llama's for a model made here."""
        checkpoint_files.write_model(Path(directory), self.config, self.params, self.source, self.tokenizer)


def save(lm: LM, directory: str | os.PathLike[str]) -> None:
    """`lm.save(directory)`."""
    lm.save(directory)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(config: ModelConfig, params: transformer.Params, ids: Array, mask: Array, decoder_ids: Any) -> Array:
    return transformer.forward(config, params, ids, mask, decoder_ids=decoder_ids)[0]


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: ModelConfig, params: transformer.Params, ids: Array, mask: Array, decoder_ids: Any, adapters: Any
) -> Array:
    hidden, _ = transformer.forward(config, params, ids, mask, adapters, decoder_ids=decoder_ids)
    return transformer.output_head(config, params, hidden, adapters)


def load(
    model: str | os.PathLike[str],
    dtype: str = "float32",
    adapter: str | os.PathLike[str] | None = None,
    *,
    context: int | None = None,
    precision: str | None = "highest",
) -> LM:
    """Loads a checkpoint: a Hugging Face directory, or a Hub id through huggingface_hub's cache.

    Args:
      model: a local directory with config.json and safetensors, or a Hub id like "Qwen/Qwen2.5-0.5B-Instruct". With
        HF_HUB_OFFLINE=1 only what is cached is used. Tensors are read and placed on the default device one at a time.
      dtype: of parameters and activations: "float32", "bfloat16" or "float16".
      adapter: a PEFT adapter's directory or Hub id; it is merged into the parameters and names the model.
      context: the longest text in tokens, prompt and answer, if not what the checkpoint says. A model whose rotary
        positions depend on the text's length (Phi-3's long variants) is loaded for its original length unless this
        says more.
      precision: of float32 products, as in `jax.lax.Precision`. The default keeps them float32 on TPUs and GPUs, whose
        own default rounds operands; None takes the backend's default.

    Raises:
      InputError: whatever is wrong with the checkpoint, in one message, before any tensor is placed.
    """
    path = hub.resolve(model)
    source = checkpoint_files.read_source(path)
    config = checkpoint_files.read_config(source, path, dtype=dtype, precision=precision, context=context)
    tokenizer = read_tokenizer(path)
    config = fit_tokenizer(config, tokenizer, path)
    name = Path(model).name if path != Path(model).expanduser() else path.resolve().name
    if adapter is not None:
        peft_files.read_settings(hub.resolve(adapter))  # an unusable adapter is told before the base is read
    lm = LM(config, checkpoint_files.read_params(path, source, config), tokenizer, name, path, source)
    return lm if adapter is None else lm.with_adapter(adapter)


def load_adapter(adapter: str | os.PathLike[str] | lora.Adapter, lm: LM) -> lora.Adapter:
    """Reads a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`) for a base model.

    Raises:
      InputError: a directory that holds no LoRA adapter, or one for another base.
    """
    if isinstance(adapter, lora.Adapter):
        return adapter
    family = lm.source.family if lm.source is not None else None
    return peft_files.read_adapter(hub.resolve(adapter), family, lm.config)


def save_adapter(adapter: lora.Adapter, lm: LM, directory: str | os.PathLike[str]) -> None:
    """Writes an adapter in PEFT's format, under the names that the base model has in transformers.

    Raises:
      InputError: the directory exists already.
    """
    family = lm.source.family if lm.source is not None else None
    peft_files.write_adapter(Path(directory), adapter, family, lm.config, base=str(lm.path or lm.name))


def init_adapter(lm: LM, config: lora.LoraConfig, *, seed: int = 0, name: str = "adapter") -> lora.Adapter:
    """A fresh adapter for a model, which changes nothing until it is trained."""
    specs = transformer.linears(lm.config)
    return lora.Adapter(config, lora.init(config, specs, jax.random.key(seed)), name)


def fit_tokenizer(config: ModelConfig, tokenizer: Any, directory: Path) -> ModelConfig:
    """The configuration with what only the tokenizer knows: how many ids it has, and an end token if no file names one.

    Raises:
      InputError: the tokenizer has ids that the model's embedding lacks.
    """
    if tokenizer is None:
        return config
    tokens = max(tokenizer.get_vocab().values()) + 1
    if tokens > config.vocab:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {tokens - 1}, config.json says vocab_size = {config.vocab}; the "
            "tokenizer belongs to another model, or tokens were added without resizing the embedding"
        )
    ends = config.end_ids
    if not ends and tokenizer.eos_token_id is not None:
        ends = (tokenizer.eos_token_id,)
    return dataclasses.replace(config, tokens=tokens, end_ids=ends)


def read_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer of a directory; None where there is none."""
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return checkpoint_files.import_transformers().AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # the tokenizers library raises bare Exception on a broken file
        raise InputError(f"{directory}: no readable tokenizer ({error})") from error
