"""Low-rank adapters (LoRA, Hu et al., 2021) for any linear layer of any model here.

An adapter adds scale * B(A(x)) to a layer's output, scale = alpha / rank. Its parameters are a tree of their own, one
pair of factors per layer, whose shapes and einsum strings follow from the layer's: for "btd,dnh->btnh"

    A "btd,dr->btr"    [D, R]          B "btr,rnh->btnh"    [R, N, H]

M adapters are stacked on a leading axis and share one pass over the base weights. Which rows of a batch use how much of
which adapter is a matrix Float[B, M]: one-hot rows mix adapters in a batch, any other row is a weighted sum of adapters
("parameter aggregation"), and M adapters on the same prompts are a batch that holds each prompt M times.

    stack (storage, training)        for_rows(stack, weights [B, M])      while a program is traced
    a [M, D, R]  b [M, R, N, H]  ->  a [D, M*R]  b [M*R, N, H]      ->    x A, times rows [B, M*R], times B
"""

import dataclasses
import functools
import math
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlae_jax import ranges, sharding
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.models.quantise import Quantised
from rlae_jax.ranges import Positive, ShareBelow1, Width

HEADS = ("head", "scorer")
Factors = dict[str, dict[str, Array]]  # dotted path of a linear layer -> {"a": [inputs..., R], "b": [R, outputs...]}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which layers an adapter changes, and how."""

    rank: Width = 8
    alpha: Positive = 16.0
    dropout: ShareBelow1 = 0.0  # of the adapter's inputs, in training only
    # Names or regular expressions of layers' dotted paths, e.g. ("q", "v") or (r"layers\.[0-3]\.ffn\..*",); a name
    # matches the end of a path. None: every linear layer but the heads.
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        ranges.check(self)

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def select(self, paths: Iterable[str]) -> list[str]:
        """The paths that the targets match.

        Raises:
          InputError: no target, one that matches nothing, or one that is no regular expression.
        """
        paths = list(paths)
        if isinstance(self.targets, str) or (self.targets is not None and not self.targets):
            raise InputError(f"targets must be a tuple of at least one name, or None, not {self.targets!r}")
        if self.targets is None:
            return [path for path in paths if path.split(".")[0] not in HEADS]
        try:
            matches = {
                target: [p for p in paths if p == target or p.endswith(f".{target}") or re.fullmatch(target, p)]
                for target in self.targets
            }
        except re.error as error:
            raise InputError(f"targets {list(self.targets)}: not a regular expression ({error})") from error
        unmatched = [target for target, found in matches.items() if not found]
        if unmatched:
            names = sorted({path.rsplit(".", 1)[-1] for path in paths})
            raise InputError(f"targets {unmatched} match no linear layer; the layers' names are {', '.join(names)}")
        chosen = {path for found in matches.values() for path in found}
        return [path for path in paths if path in chosen]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter: its settings and factors."""

    config: LoraConfig
    params: Factors = dataclasses.field(repr=False)
    name: str = "adapter"


class Stack(NamedTuple):
    """M adapters of one base model: {path: {"a": [M, inputs..., R], "b": [M, R, outputs...]}} and alpha / rank."""

    params: Factors
    scales: Float[Array, " M"]


class Adapted(NamedTuple):
    """A base model's parameters with a stack of adapters, as `decode` takes them in place of plain parameters."""

    base: dict[Any, Any]
    stack: Stack
    weights: Float[Array, "#B M"]  # how much of each adapter each row takes


class Adapters(NamedTuple):
    """A stack as a batch uses it: what `transformer.Model` takes."""

    # [inputs..., M*R] and [M*R, outputs...]; in blocks of rows [M, inputs..., R] and [M, R, outputs...].
    a: dict[str, Array]
    b: dict[str, Array]
    # What each row takes of each of the M*R directions; in blocks each block's scale, [M].
    rows: Float[Array, "B Z"] | Float[Array, " M"]
    dropout: tuple[Array, Array] | tuple[()] = ()  # (rate, key), in training


def check(adapter: Adapter, linears: Mapping[str, Any]) -> None:
    """Raises an `InputError` unless the adapter's factors fit the linear layers of a base model,
    `transformer.linears(config)`."""
    findings = []
    for path, leaf in adapter.params.items():
        spec = linears.get(path)
        if spec is None:
            findings.append(("unknown layers", path))
            continue
        inputs, outputs = spec.shape[: spec.inputs], spec.shape[spec.inputs :]
        rank = leaf["b"].shape[0]
        if leaf["a"].shape != (*inputs, rank) or leaf["b"].shape != (rank, *outputs):
            shapes = f"{list(leaf['a'].shape)} and {list(leaf['b'].shape)}"
            findings.append(("mis-shaped", f"{path} has {shapes}, the base {list(inputs)} and {list(outputs)}"))
    if findings or not adapter.params:
        raise grouped_error(
            f"the adapter {adapter.name} does not fit this base model", findings or [("layers", "none")]
        )


def init(config: LoraConfig, linears: Mapping[str, Any], key: Key[Array, ""], dtype: str = "float32") -> Factors:
    """A fresh adapter: A uniform in +-fan_in^-1/2 (as PEFT draws it), B zero, so that it changes nothing yet.

    Args:
      linears: of the base model, `transformer.linears(config)`.
    """
    params: Factors = {}
    for path in config.select(linears):
        spec = linears[path]
        inputs, outputs = spec.shape[: spec.inputs], spec.shape[spec.inputs :]
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(_path_key(key, path), (*inputs, config.rank), minval=-bound, maxval=bound)
        params[path] = {"a": a.astype(dtype), "b": jnp.zeros((config.rank, *outputs), dtype)}
    return params


def logical_axes(factors: Factors, linears: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, ...]]]:
    """The names of the factors' axes, as `transformer.logical_axes` gives those of the parameters: the layer's own,
    "rank", and "adapters" where the factors are those of a stack."""
    names = {}
    for path, leaf in factors.items():
        axes, inputs = linears[path].axes, linears[path].inputs
        lead = ("adapters",) * (leaf["a"].ndim - inputs - 1)
        names[path] = {"a": (*lead, *axes[:inputs], "rank"), "b": (*lead, "rank", *axes[inputs:])}
    return names


def _path_key(key: Array, path: str) -> Array:
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def stack(adapters: Sequence[Adapter]) -> Stack:
    """Stacks adapters of one base. A layer that only some of them change gets zeros from the others, and so do the
    ranks that a smaller adapter lacks, which is said in a warning.

    Raises:
      InputError: no adapters; a layer whose shapes differ between adapters (they belong to different bases).
    """
    if not adapters:
        raise InputError("a stack needs at least one adapter")
    ranks = [max(leaf["b"].shape[0] for leaf in adapter.params.values()) for adapter in adapters]
    rank = max(ranks)
    if len(set(ranks)) > 1:
        told = ", ".join(f"{adapter.name} {r}" for adapter, r in zip(adapters, ranks, strict=True))
        warnings.warn(f"adapters of different rank are padded with zeros to {rank}: {told}", stacklevel=2)
    params: Factors = {}
    for path in sorted({path for adapter in adapters for path in adapter.params}):
        like = next(adapter.params[path] for adapter in adapters if path in adapter.params)
        padded: dict[str, list[Array]] = {"a": [], "b": []}
        for adapter in adapters:
            factors = adapter.params.get(path) or jax.tree.map(jnp.zeros_like, like)
            a, b = factors["a"], factors["b"]
            if a.shape[:-1] != like["a"].shape[:-1] or b.shape[1:] != like["b"].shape[1:]:
                raise InputError(f"{adapter.name} and {adapters[0].name} differ in the shape of {path}: other bases")
            grow = rank - b.shape[0]
            padded["a"].append(jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, grow)]))
            padded["b"].append(jnp.pad(b, [(0, grow)] + [(0, 0)] * (b.ndim - 1)))
        params[path] = {side: jnp.stack(leaves) for side, leaves in padded.items()}
    return Stack(params, jnp.asarray([adapter.config.scale for adapter in adapters], jnp.float32))


def for_rows(
    stack: Stack,
    weights: Float[Array | np.ndarray, "B M"],
    *,
    dropout: float = 0.0,
    key: Key[Array, ""] | Key[Array, " B"] | None = None,
) -> Adapters:
    """The stack as a batch of B rows uses it, each its own sum of adapters.

    Args:
      weights: how much of each adapter each row takes; one-hot rows pick one, zeros leave the base as it is.
      dropout, key: for training; the inputs of every adapter are dropped with this probability. With a key per row a
        row's draws do not depend on what else is in the batch.
    """
    rank = next(iter(stack.params.values()))["b"].shape[1]
    a = {p: jnp.moveaxis(leaf["a"], 0, -2).reshape(*leaf["a"].shape[1:-1], -1) for p, leaf in stack.params.items()}
    b = {p: leaf["b"].reshape(-1, *leaf["b"].shape[2:]) for p, leaf in stack.params.items()}
    rows = jnp.repeat(jnp.asarray(weights, jnp.float32) * stack.scales[None], rank, axis=1)
    return Adapters(a, b, rows, () if key is None or not dropout else (jnp.float32(dropout), key))


def for_blocks(stack: Stack, *, dropout: float = 0.0, key: Key[Array, " B"] | None = None) -> Adapters:
    """As `for_rows` for a batch of M blocks of rows, of which block m uses adapter m alone: each row is multiplied with
    its own adapter's factors only, not with all adapters' side by side."""
    a, b = ({path: leaf[side] for path, leaf in stack.params.items()} for side in ("a", "b"))
    return Adapters(a, b, stack.scales, () if key is None or not dropout else (jnp.float32(dropout), key))


def one_hot(indices: Any, adapters: int) -> Float[Array, "B M"]:
    """Weights of rows that each use one adapter, by number."""
    return jax.nn.one_hot(jnp.asarray(indices), adapters, dtype=jnp.float32)


def factor_einsums(einsum: str) -> tuple[str, str]:
    """The einsum strings of the two factors: "btd,dnh->btnh" gives ("btd,dz->btz", "btz,znh->btnh")."""
    operands, output = einsum.split("->")
    activations, kernel = operands.split(",")
    inputs = "".join(letter for letter in kernel if letter not in output)
    outputs = "".join(letter for letter in kernel if letter in output)
    batch = "".join(letter for letter in activations if letter not in kernel)
    return f"{activations},{inputs}z->{batch}z", f"{batch}z,z{outputs}->{output}"


def low_rank_delta(adapters: Adapters, path: str, einsum: str, precision: str | None) -> Callable[[Array], Array]:
    """What the adapters add to the output of the linear layer at `path`, as a function of its input [B, T, ...], or
    [B, ...] where one token per row goes into the output head."""
    down, up = factor_einsums(einsum)

    def delta(x: Array) -> Array:
        if x.ndim < len(down.split(",")[0]):
            return delta(x[:, None])[:, 0]
        if adapters.dropout:
            rate, key = adapters.dropout
            if key.ndim:

                def draw(own: Array) -> Array:
                    return jax.random.bernoulli(_path_key(own, path), 1 - rate, x.shape[1:])

                # An encoder may read one row for several of its decoder.
                kept = jax.vmap(draw)(key[:: len(key) // len(x)])
            else:
                kept = jax.random.bernoulli(_path_key(key, path), 1 - rate, x.shape)
            x = jnp.where(kept, x / (1 - rate).astype(x.dtype), 0)
        a, b, rows = (leaf.astype(x.dtype) for leaf in (adapters.a[path], adapters.b[path], adapters.rows))
        first = functools.partial(jnp.einsum, down, precision=precision)
        second = functools.partial(jnp.einsum, up, precision=precision)
        if rows.ndim == 2:
            return second(first(x, a) * rows[:, None], b)
        blocks = x.reshape(len(rows), -1, *x.shape[1:])
        out = jax.vmap(lambda x, a, b, scale: second(first(x, a) * scale, b))(blocks, a, b, rows)
        return out.reshape(len(x), *out.shape[2:])

    return delta


def layer_at(params: dict[Any, Any], path: str) -> dict[str, Any]:
    """The parameters of the layer at a dotted path."""
    for name in path.split("."):
        params = params[int(name) if name.isdigit() else name]
    return params


def merge(
    params: dict[Any, Any], stack: Stack, weights: Sequence[float] | Float[Array | np.ndarray, " M"]
) -> dict[Any, Any]:
    """The base parameters with sum_m weights[m] * scale_m * A_m B_m added to each kernel. Negative weights undo it."""
    merged: dict[Any, Any] = jax.tree.map(lambda leaf: leaf, params)  # new dictionaries, the same arrays
    scaled = jnp.asarray(weights, jnp.float32) * stack.scales
    for path, leaf in stack.params.items():
        layer = layer_at(merged, path)
        a, b = (np.asarray(leaf[side], np.float32) for side in ("a", "b"))
        a, b = a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1)
        change = np.einsum("m,mir,mro->io", np.asarray(scaled), a, b, optimize=True)
        kernel = layer["kernel"]
        if isinstance(kernel, Quantised):
            raise InputError(
                f"{path} is quantised: adapters stay beside such a base (with_adapters, from_adapters); to merge one, "
                "load the base without quantise"
            )
        change = sharding.place_like(change.reshape(kernel.shape), kernel)
        layer["kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return merged
