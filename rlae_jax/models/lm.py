"""A loaded language model: configuration, arrays, tokenizer. `load` makes one from a Hugging Face checkpoint."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Array, Float
from tokenizers import Tokenizer

from rlae_jax import digests, files, ranges, records, sharding
from rlae_jax.compilation import jit
from rlae_jax.errors import InputError
from rlae_jax.files import check_fetched
from rlae_jax.models import (
    checkpoint_files,
    finite,
    gguf_files,
    gguf_tokenizer,
    hub,
    hugging_face,
    lora,
    peft_files,
    transformer,
)
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.quantise import Quantisation, logical_axes
from rlae_jax.models.tokenizer import check_usable, import_transformers, told
from rlae_jax.ranges import Seed

# Each row's adapter by number or name, or Float[B, M] weights of the adapters.
AdapterChoice = Sequence[Any] | ArrayLike | None
TextIds = Sequence[Sequence[int]] | ArrayLike  # Int[B, T]; `check_text` tells what is none
# Any of them makes a tokenizer; the first is what the fast ones are kept in.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "spm.model", "vocab.json", "vocab.txt")
CHAT_TEMPLATE = "chat_template.json"
# Texts that tokenizers split differently: digits, contractions, white space, accents, scripts, symbols.
_PROBES = (
    "In 2024 it's 1234567.89, they'LL say; don't.",
    "  two spaces,\n\n\ttabs and\r\nlines  ",
    "def f(x_1):\n    return {'a': x_1 ** 2}  # ok?!",
    "Caf\u00e9 cafe\u0301 na\u00efve \u00dcber Stra\u00dfe",
    "\u4f60\u597d\uff0c\u4e16\u754c \u043f\u0440\u0438\u0432\u0435\u0442 \u0e44\u0e17\u0e22 \U0001f600",
)


@dataclasses.dataclass(frozen=True, eq=False)
class LM:
    """A language model: the static half (`config`), its arrays (`params`) and, if it has one, its tokenizer.

    `apply` is pure: jit, grad, vmap and shard it as you like. `logits` and `hidden` fill in `params`.
    """

    config: ModelConfig
    params: transformer.Params = dataclasses.field(repr=False)
    tokenizer: Any = dataclasses.field(default=None, repr=False)  # of transformers; None for a directory without one
    name: str = "model"  # the directory's base name; what results call this member
    path: Path | None = None
    # The checkpoint's own settings; None for a model made here.
    source: checkpoint_files.Source | None = dataclasses.field(default=None, repr=False)
    stack: lora.Stack | None = dataclasses.field(
        default=None, repr=False
    )  # adapters that are kept apart from the parameters, see `with_adapters`
    adapters: tuple[str, ...] = ()  # their names
    mesh: Mesh | None = None  # over which the arrays are spread; None: they lie on one device
    quantisation: Quantisation | None = None  # how `load` was asked to hold the weights
    # Of every array of `params` its first entries, where they were noted when it was read: on a mesh to look at them
    # again would bring whole arrays together.
    starts: bytes | None = dataclasses.field(default=None, repr=False)
    check_finite: bool = True  # as `load` was told; of adapters, too

    def __repr__(self) -> str:
        sizes = (math.prod(leaf.shape) for leaf in jax.tree.leaves(transformer.abstract_params(self.config)))
        held = self.config.dtype if self.quantisation is None else self.quantisation.kind
        return f"LM({self.name}, {sum(sizes) / 1e6:,.1f}M parameters, {held})"

    def apply(
        self,
        params: transformer.Params | lora.Adapted,
        ids: TextIds,
        mask: ArrayLike | None,
        decoder_ids: TextIds | None = None,
    ) -> Float[Array, "B T V"]:
        """Logits, float32, of `ids` under any parameters of this model's shape.

        Args:
          params: like `self.params`, or a `lora.Adapted` with any stack of adapters.
          ids: Int[B, T].
          mask: [B, T], 1 where there is a token, 0 for padding on either side; positions follow the mask.
          decoder_ids: Int[R, T] of an encoder-decoder, whose `ids` go to the encoder; the first is the start token.

        Raises:
          InputError: ids that are no [B, T] of whole numbers, another shape of the mask, decoder ids missing or in the
            way.
        """
        logits: Array = _logits(self.config, params, *self._inputs(ids, mask, decoder_ids))
        return logits

    def logits(
        self,
        ids: TextIds,
        mask: ArrayLike | None = None,
        decoder_ids: TextIds | None = None,
        *,
        adapters: AdapterChoice = None,
    ) -> Float[Array, "B T V"]:
        """`apply` with this model's parameters; no mask means no padding, `adapters` as in `adapted`."""
        inputs = self._inputs(ids, mask, decoder_ids)
        logits: Array = _logits(self.config, self.adapted(adapters, len(inputs[0])), *inputs)
        return logits

    def hidden(
        self,
        ids: TextIds,
        mask: ArrayLike | None = None,
        decoder_ids: TextIds | None = None,
        *,
        adapters: AdapterChoice = None,
    ) -> Float[Array, "B T D"]:
        """Last hidden states after the final norm: what the output head reads."""
        inputs = self._inputs(ids, mask, decoder_ids)
        hidden: Array = _hidden(self.config, self.adapted(adapters, len(inputs[0])), *inputs)
        return hidden

    def log_probs(
        self,
        ids: TextIds,
        mask: ArrayLike | None = None,
        decoder_ids: TextIds | None = None,
        *,
        adapters: AdapterChoice = None,
    ) -> Float[Array, "B _"]:
        """log p(token t + 1 | tokens up to t) of the text (the decoder's, if there are two), without [B, T, V]."""
        inputs = self._inputs(ids, mask, decoder_ids)
        log_probs: Array = _log_probs(self.config, self.adapted(adapters, len(inputs[0])), *inputs)
        return log_probs

    def adapted(self, adapters: AdapterChoice, batch: int) -> transformer.Params | lora.Adapted:
        """The parameters with which a batch runs: `params` alone, or with the stack of adapters.

        Args:
          adapters: for a model with a stack, each row's adapter by number or name, or Float[B, M] weights. None takes
            the only adapter there is.

        Raises:
          InputError: a choice without a stack, or a stack of several without a choice; an unknown adapter.
        """
        if self.stack is None:
            if adapters is not None:
                raise InputError(f"{self.name} has no adapters to choose from; load some with with_adapters")
            return self.params
        m = len(self.adapters)
        if adapters is None:
            if m > 1:
                raise InputError(f"{self.name} has {m} adapters ({', '.join(self.adapters)}): say which row uses which")
            return lora.Adapted(self.params, self.stack, jnp.ones((1, 1)))
        if isinstance(adapters, str | int):
            raise InputError(f"adapters must have one entry per row, not {adapters!r}")
        try:
            weights = np.asarray(adapters)
        except ValueError as error:
            raise InputError(f"adapters must be one number or name per row, or weights ({error})") from error
        if weights.dtype.kind == "U":
            names = weights.ravel().tolist()
            wrong = sorted({name for name in names if self.adapters.count(name) != 1})
            if wrong:
                raise InputError(
                    f"unknown or ambiguous adapters {', '.join(wrong)}; {self.name} has {', '.join(self.adapters)}"
                )
            weights = np.array([self.adapters.index(name) for name in names]).reshape(weights.shape)
        if weights.shape == (batch,) and weights.dtype.kind in "iu":
            if weights.min() < 0 or weights.max() >= m:
                raise InputError(f"adapters must be numbers from 0 to {m - 1}, not {weights.tolist()}")
            weights = np.eye(m, dtype=np.float32)[weights]
        if weights.shape != (batch, m) or weights.dtype.kind not in "iuf" or not np.all(np.isfinite(weights)):
            raise InputError(
                f"adapters must be one number or name per row ([{batch}]) or finite weights [{batch}, {m}], not "
                f"{weights.dtype} of shape {list(weights.shape)}"
            )
        return lora.Adapted(self.params, self.stack, jnp.asarray(weights, jnp.float32))

    def _inputs(self, ids: Any, mask: Any, decoder_ids: Any) -> tuple[Array, Array, Array | None]:
        if (decoder_ids is None) != (self.config.encoder is None):
            needs = "is an encoder-decoder: give" if decoder_ids is None else "is no encoder-decoder: do not give"
            raise InputError(f"{self.name} {needs} decoder_ids")
        vocab = self.config.vocab
        ids, mask = check_text(self.name, ids, mask, vocab)
        if decoder_ids is not None:
            decoder_ids, _ = check_text(self.name, decoder_ids, None, vocab, "decoder_ids")
            if len(decoder_ids) % len(ids):
                raise InputError(f"{self.name}: {len(decoder_ids)} rows of decoder_ids for {len(ids)} rows of ids")
            decoder_ids = sharding.spread(decoder_ids, self.mesh)
        return sharding.spread(ids, self.mesh), sharding.spread(mask, self.mesh), decoder_ids

    def fingerprint(self) -> str:
        """A hash by which a run knows its members again: the configuration and the start of every tensor."""
        digest = hashlib.sha256(repr(_stated(self.config)).encode())
        n = checkpoint_files.START
        noted = None if self.mesh is None else self.starts
        starts = [leaf.reshape(-1)[:n] for leaf in jax.tree.leaves(self.params)] if noted is None else []
        # Of every adapter, whose axis is the first.
        starts += [leaf.reshape(len(leaf), -1)[:, :n] for leaf in jax.tree.leaves(self.stack)]
        digest.update(noted or b"")
        for start in sharding.to_host(starts):
            digest.update(start.tobytes())
        return digest.hexdigest()

    def require_tokenizer(self) -> Any:
        """The tokenizer, or an `InputError` that says where one was looked for."""
        return require_tokenizer(self.tokenizer, self.path or self.name)

    def with_adapter(self, adapter: str | os.PathLike[str] | lora.Adapter) -> "LM":
        """This model with an adapter merged into its parameters; see `lora.merge` for its inverse.

        Raises:
          InputError: an adapter for another base, or with values that are not finite, or that are not when merged.
        """
        adapter = load_adapter(adapter, self)
        params = lora.merge(self.params, lora.stack([adapter]), [1.0])
        if self.check_finite:
            finite.check(
                f"the adapter {adapter.name}",
                {path: lora.layer_at(params, path)["kernel"] for path in adapter.params},
                f"beyond {self.config.dtype} when merged",
            )
        return dataclasses.replace(self, params=params, name=adapter.name, starts=None)

    def on_mesh(self, mesh: Mesh) -> "LM":
        """This model with its arrays spread over a mesh. To load one use `load(mesh=...)`, which never holds it whole.

        Raises:
          InputError: heads that the mesh does not divide.
        """
        sharding.check_model(self.name, self.config, mesh)
        axes = logical_axes(transformer.logical_axes(self.config), self.params)
        places = sharding.shardings(axes, self.params, mesh)
        params = jax.tree.map(lambda leaf, where: sharding.place(np.asarray(leaf), where), self.params, places)
        placed = dataclasses.replace(self, params=params, mesh=mesh)
        return placed if self.stack is None else dataclasses.replace(placed, stack=sharding.whole(self.stack, mesh))

    def with_adapters(self, adapters: Sequence[str | os.PathLike[str] | lora.Adapter]) -> "LM":
        """This model with M adapters beside its parameters: the rows of a batch may use different ones.

        Raises:
          InputError: no adapters, or one for another base.
        """
        loaded = load_adapters(adapters, self)
        names = tuple(adapter.name for adapter in loaded)
        name = names[0] if len(names) == 1 else self.name
        return dataclasses.replace(self, stack=sharding.whole(lora.stack(loaded), self.mesh), adapters=names, name=name)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face directory that `load` and transformers read: in the layout of the checkpoint that this
        model came from; for a model made here in Llama's, or in T5's if it is an encoder-decoder."""
        if self.stack is not None:
            raise InputError(f"{self.name} has adapters beside its parameters; merge one with with_adapter, then save")
        checkpoint_files.write_model(Path(directory), self.config, self.params, self.source, self.tokenizer)


def _stated(value: Any) -> Any:
    """What a configuration says beyond the defaults: fields that are added to it later change nothing of it."""
    if not dataclasses.is_dataclass(value):
        return value
    pairs = [(field, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return type(value).__name__, {field.name: _stated(given) for field, given in pairs if given != field.default}


def check_text(model: str, ids: Any, mask: Any, vocab: int, what: str = "ids") -> tuple[Array, Array]:
    """Token ids [B, T] and their mask as arrays; no mask means no padding.

    Args:
      vocab: V, the rows of the embedding. Traced ids, and those of other processes, are not looked at.

    Raises:
      InputError: ids of another rank or no whole numbers, ids outside the vocabulary where the mask has a token, or a
        mask of another shape.
    """
    ids = jnp.asarray(ids)
    if ids.ndim != 2 or not ids.size or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise InputError(
            f"{model}: {what} must be whole numbers [B, T], a row per text, not {ids.dtype} of shape {list(ids.shape)}"
        )
    mask = jnp.ones_like(ids) if mask is None else jnp.asarray(mask)
    if mask.shape != ids.shape:
        raise InputError(f"{model}: the mask has the shape {list(mask.shape)}, {what} have {list(ids.shape)}")
    if all(not isinstance(array, jax.core.Tracer) and array.is_fully_addressable for array in (ids, mask)):
        read = np.asarray(ids)[np.asarray(mask).astype(bool)]
        outside = read[(read < 0) | (read >= vocab)]
        if outside.size:
            raise InputError(f"{model}: {what} have {outside[0]}; ids from 0 to {vocab} - 1 exist")
    return ids, mask


def save(lm: LM, directory: str | os.PathLike[str]) -> None:
    """`lm.save(directory)`."""
    lm.save(directory)


@functools.partial(jit, static_argnums=0)
def _hidden(config: ModelConfig, params: Any, ids: Array, mask: Array, decoder_ids: Any) -> Array:
    model = transformer.Model.bind(config, params, len(ids))
    return model.forward(ids, mask, decoder_ids=decoder_ids)[0]


@functools.partial(jit, static_argnums=0)
def _logits(config: ModelConfig, params: Any, ids: Array, mask: Array, decoder_ids: Any) -> Array:
    model = transformer.Model.bind(config, params, len(ids))
    return model.logits(model.forward(ids, mask, decoder_ids=decoder_ids)[0])


@functools.partial(jit, static_argnums=0)
def _log_probs(config: ModelConfig, params: Any, ids: Array, mask: Array, decoder_ids: Any) -> Array:
    model = transformer.Model.bind(config, params, len(ids))
    hidden, _ = model.forward(ids, mask, decoder_ids=decoder_ids)
    text = ids if decoder_ids is None else decoder_ids
    return model.target_log_probs(hidden[:, :-1], text[:, 1:])


def load(
    model: str | os.PathLike[str],
    dtype: str = "float32",
    adapter: str | os.PathLike[str] | lora.Adapter | None = None,
    *,
    context: int | None = None,
    precision: str | None = "highest",
    mesh: Mesh | None = None,
    quantise: str | None = None,
    quantise_head: bool = False,
    quantise_group: int = 32,
    kv_dtype: str | None = None,
    check_finite: bool = True,
) -> LM:
    """Loads a checkpoint: a Hugging Face directory, a GGUF file, or a Hub id through huggingface_hub's cache.

    Args:
      model: a local directory with config.json and safetensors; a .gguf file, one part of a split one, or a directory
        that holds one (its tensors are dequantised; needs the `gguf` package); or a Hub id like
        "Qwen/Qwen2.5-0.5B-Instruct". With HF_HUB_OFFLINE=1 only what is cached is used. Tensors are read and placed on
        the default device one at a time.
      dtype: of parameters and activations: "float32", "bfloat16" or "float16".
      adapter: a PEFT adapter's directory or Hub id; it is merged into the parameters and names the model.
      context: the longest text in tokens, prompt and answer, if not what the checkpoint says. A model whose rotary
        positions depend on the text's length (Phi-3's long variants) is loaded for its original length unless this
        says more.
      precision: of float32 products, as in `jax.lax.Precision`. The default keeps them float32 on TPUs and GPUs, whose
        own default rounds operands; None takes the backend's default.
      mesh: of `make_mesh`, over which the arrays are spread; every device is given its own parts and no other. By
        default the mesh in force (`jax.set_mesh`), if there is one.
      quantise: "int8" (a scale per output channel), "int4" (a scale per group of inputs) or "fp8" (e4m3, per channel):
        how the kernels of linear layers are held, see `quantise.py`. Activations keep `dtype`.
      quantise_head: the output head and the embedding table, too, with a scale per token (int8 with int4).
      quantise_group: inputs that share a scale of int4: 32, 64 or 128. A layer whose inputs it does not divide takes
        the next smaller.
      kv_dtype: "int8" or "fp8" (e4m3): how keys and values are kept while a text is written, with a scale per head and
        token. None: in `dtype`. Prompts are read with their keys and values as they are.
      check_finite: whether weights with a NaN or an infinity are refused, also those that `dtype` makes so, and those
        of adapters given now or later. Each array is read once on its devices for this.

    Raises:
      InputError: whatever is wrong with the checkpoint, in one message, before any tensor is placed; heads that the
        mesh does not divide; weights that are not finite.
    """
    quantisation = Quantisation.of(quantise, group=quantise_group, head=quantise_head)
    if quantisation is not None and adapter is not None:
        raise InputError(
            "an adapter cannot be merged into a quantised base: load the base with quantise, then keep the adapter "
            "beside it (with_adapters)"
        )
    with unchanged(model):
        opened = open_checkpoint(model, encoder=False, dtype=dtype, context=context, precision=precision)
        opened = opened._replace(config=hold_cache_in(opened.config, kv_dtype))
        if isinstance(adapter, str | os.PathLike):
            peft_files.read_settings(hub.resolve(adapter))  # an unusable adapter is told before the base is read
        (params, starts), mesh = opened.read_params(mesh, quantisation, check_finite)
    lm = LM(
        params=params,
        starts=starts,
        mesh=mesh,
        quantisation=quantisation,
        check_finite=check_finite,
        **opened._asdict(),
    )
    return lm if adapter is None else lm.with_adapter(adapter)


def unchanged(model: str | os.PathLike[str]) -> contextlib.AbstractContextManager[None]:
    """Makes sure that a directory which `save` wrote is as it was then, while it is read."""
    path = os.path.expanduser(os.fsdecode(model))  # no error for what is no path, as in `hub.resolve`
    return digests.checking(Path(path)) if os.path.isdir(path) else contextlib.nullcontext()


def hold_cache_in(config: ModelConfig, kv_dtype: str | None) -> ModelConfig:
    """The model with a cache of another dtype.

    Raises:
      InputError: an unknown one; an encoder-decoder, whose cache holds what its encoder read.
    """
    if kv_dtype is None:
        return config
    if kv_dtype not in ("int8", "fp8"):
        raise InputError(f"kv_dtype {kv_dtype!r} is not supported; use int8 or fp8")
    if config.encoder is not None:
        raise InputError(f"kv_dtype {kv_dtype} is for decoders; an encoder-decoder keeps its cache in {config.dtype}")
    return dataclasses.replace(config, kv_dtype=kv_dtype)  # type: ignore[arg-type]


class Opened(NamedTuple):
    """A checkpoint of which all but the tensors has been read. The fields are those of `LM` and `Encoder`."""

    config: ModelConfig
    tokenizer: Any
    name: str
    path: Path
    source: checkpoint_files.Source

    def read_params(
        self, mesh: Mesh | None, quantisation: Quantisation | None = None, check_finite: bool = True
    ) -> tuple[checkpoint_files.Tensors, Mesh | None]:
        """The tensors, and the mesh on which they lie: the one given, or else the one in force."""
        mesh = sharding.mesh_in_force() if mesh is None else mesh
        if mesh is not None:
            # Encoders, which score or are read, are small; of members nothing large is to be held whole unsaid.
            sharding.check_model(self.name, self.config, mesh, strict=self.config.has_head)
        tensors = checkpoint_files.open_tensors(self.path, self.source, self.config)
        kept = (mesh, quantisation, check_finite)
        return checkpoint_files.read_params(tensors, self.source, self.config, self.path, *kept), mesh


def open_checkpoint(
    model: str | os.PathLike[str],
    *,
    encoder: bool,
    dtype: str,
    precision: str | None,
    context: int | None = None,
) -> Opened:
    """What `load` and `load_encoder` have in common.

    Raises:
      InputError: whatever is wrong with the checkpoint's settings, or a model of the other kind.
    """
    path = hub.resolve(model)
    source = checkpoint_files.read_source(path)
    config = checkpoint_files.read_config(source, path, dtype=dtype, precision=precision, context=context)
    if config.has_head == encoder:
        kind, function = ("a language model", "load") if config.has_head else ("an encoder", "load_encoder")
        raise InputError(f"{path} is {kind} ({source.family.model_type}): load it with {function}")
    tokenizer = read_tokenizer(path)
    return Opened(fit_tokenizer(config, tokenizer, path), tokenizer, _base_name(model, path), path, source)


def _base_name(asked: str | os.PathLike[str], path: Path) -> str:
    """What a file or a directory is called: the end of a Hub id, whose snapshot has a commit's name."""
    if path.is_file():
        return gguf_files.stem(path)
    return Path(asked).name if path != Path(asked).expanduser() else path.resolve().name


def load_adapter(adapter: str | os.PathLike[str] | lora.Adapter, lm: LM) -> lora.Adapter:
    """Reads a PEFT adapter (`adapter_config.json`, `adapter_model.safetensors`) for a base model.

    Raises:
      InputError: a directory that holds no LoRA adapter, or one for another base; values that are not finite, unless
        the base was loaded without a check of them.
    """
    if isinstance(adapter, lora.Adapter):
        lora.check(adapter, transformer.linears(lm.config))
        if lm.check_finite:
            factors = {f"{path}.{side}": leaf for path, pair in adapter.params.items() for side, leaf in pair.items()}
            finite.check(f"the adapter {adapter.name}", factors)
        return adapter
    family = lm.source.family if lm.source is not None else None
    path = hub.resolve(adapter)
    name = _base_name(adapter, path)
    loaded = peft_files.read_adapter(path, name, family, lm.config, lm.params, check_finite=lm.check_finite)
    made_for = peft_files.read_settings(path).get("base_model_name_or_path")
    if lm.path is not None and made_for and Path(made_for).name not in (lm.name, lm.path.name):
        warnings.warn(f"{path} was made for {made_for}; it fits {lm.name} by its shapes alone", stacklevel=2)
    return loaded


def load_adapters(adapters: Sequence[str | os.PathLike[str] | lora.Adapter], lm: LM) -> list[lora.Adapter]:
    """`load_adapter` of each; an `InputError` for one that is not in a list. Directories or Hub ids whose names are
    alike (a/adapter, b/adapter) are called by their last two parts."""
    if isinstance(adapters, str | os.PathLike | lora.Adapter):
        raise InputError("adapters must be a list; put a single adapter in a list")
    loaded = [load_adapter(adapter, lm) for adapter in adapters]
    names = [adapter.name for adapter in loaded]
    return [
        one if isinstance(asked, lora.Adapter) or names.count(one.name) == 1 else dataclasses.replace(one, name=longer)
        for asked, one in zip(adapters, loaded, strict=True)
        for longer in ["/".join(Path(os.path.abspath(Path(str(asked)).expanduser())).parts[-2:])]
    ]


def save_adapter(adapter: lora.Adapter, lm: LM, directory: str | os.PathLike[str]) -> None:
    """Writes an adapter in PEFT's format, under the names that the base model has in transformers.

    Raises:
      InputError: the directory exists already, or the adapter is for another base.
    """
    lora.check(adapter, transformer.linears(lm.config))
    family = lm.source.family if lm.source is not None else None
    peft_files.write_adapter(Path(directory), adapter, family, lm.config, base=str(lm.path or lm.name))


def init_adapter(lm: LM, config: lora.LoraConfig, *, seed: Seed = 0, name: str = "adapter") -> lora.Adapter:
    """A fresh adapter for a model, which changes nothing until it is trained.

    Raises:
      InputError: a seed that is none, targets that are no layers.
    """
    ranges.check_arguments(init_adapter, seed=seed)
    specs = transformer.linears(lm.config)
    return lora.Adapter(config, lora.init(config, specs, jax.random.key(seed)), name)


def fit_tokenizer(config: ModelConfig, tokenizer: Any, directory: Path) -> ModelConfig:
    """The configuration with what only the tokenizer knows: how many ids it has, and its own end token.

    Tokens that were added to a tokenizer may lie beyond the embedding (Gemma 3's <image_soft_token>, a [PAD]): nobody
    writes them, and texts with them are refused when they are read.

    Raises:
      InputError: the tokenizer's own vocabulary has ids that the model's embedding lacks.
    """
    if tokenizer is None:
        return config
    vocab, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    tokens = max(vocab.values()) + 1
    own = max((i for i in vocab.values() if i not in added), default=-1)
    if own >= config.vocab:
        raise InputError(
            f"{directory}: the tokenizer has ids up to {tokens - 1}, config.json says vocab_size = {config.vocab}; the "
            "tokenizer belongs to another model"
        )
    own_end = tokenizer.eos_token_id
    ends = config.end_ids if own_end is None or own_end >= config.vocab else (*config.end_ids, own_end)
    return dataclasses.replace(config, tokens=tokens, end_ids=tuple(dict.fromkeys(ends)))


def require_tokenizer(tokenizer: Any, where: Any) -> Any:
    """The tokenizer of a model, or an `InputError` that says where one was looked for."""
    if tokenizer is None:
        wanted = "tokenizer.ggml metadata" if str(where).endswith(gguf_files.SUFFIX) else TOKENIZER_FILES[0]
        raise InputError(f"{where} has no tokenizer ({wanted}): text methods need one (ids work)")
    return tokenizer


def read_tokenizer(directory: Path) -> Any:
    """The transformers tokenizer of a directory, with the chat template that a file of its own may hold, or of a GGUF
    file; None where there is none.

    Raises:
      InputError: files that cannot be read.
    """
    path = gguf_files.find(directory)
    tokenizer = (
        _read_tokenizer(directory)
        if path is None
        else gguf_tokenizer.read_tokenizer(gguf_files.open_gguf(path).metadata, path)
    )
    if tokenizer is not None:
        with told(path or directory, "its tokenizer cannot be used"):
            check_usable(tokenizer, list(_PROBES))
    return tokenizer


def _read_tokenizer(directory: Path) -> Any:
    """That of a directory."""
    present = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not present:
        return None
    for file in present:
        check_fetched(file)
    beside = {
        name: records.check(files.read_json(directory / name), shape, directory / name)
        for name, shape in hugging_face.TOKENIZER_FILES.items()
        if (directory / name).is_file()
    }
    tokenizers = import_transformers().AutoTokenizer
    try:
        with told(directory):
            tokenizer = tokenizers.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
            tokenizer = _as_its_file_says(tokenizer, directory)
            # Of a processor; transformers reads it for those alone.
            if not tokenizer.chat_template:
                tokenizer.chat_template = beside.get(CHAT_TEMPLATE, {}).get("chat_template")
    except InputError:
        whole = directory / TOKENIZER_FILES[0]  # parsed here only to name what the library does not
        if whole.is_file():
            records.read(whole, hugging_face.TokenizerFile)
        raise
    return tokenizer


def _as_its_file_says(tokenizer: Any, directory: Path) -> Any:
    """The tokenizer, or where it writes other ids than its tokenizer.json the one of that file, which a warning says.

    Classes such as GPT2Tokenizer and Qwen2Tokenizer take the vocabulary of the file and split texts in their own way,
    whatever the file says; models are trained with what the file says.
    """
    path = directory / TOKENIZER_FILES[0]
    generic = import_transformers().PreTrainedTokenizerFast
    if type(tokenizer) is generic or not path.is_file():
        return tokenizer
    own = Tokenizer.from_file(str(path))
    own.no_truncation()
    own.no_padding()
    read = [encoding.ids for encoding in own.encode_batch(list(_PROBES), add_special_tokens=False)]
    if tokenizer(list(_PROBES), add_special_tokens=False)["input_ids"] == read:
        return tokenizer
    warnings.warn(
        f"{directory}: tokenizer_config.json names {type(tokenizer).__name__}, which splits texts in another way than "
        f"{path.name} does; {path.name} is used",
        stacklevel=4,
    )
    return generic.from_pretrained(directory, local_files_only=True)
