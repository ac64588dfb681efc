"""Weights in fewer bits: kernels that are held as int8, int4 or fp8 and become numbers again inside a product.

    weight = (values - zero) * scale

by broadcasting: a scale has the axes of its values, of size 1 where weights share it.

    kernel of a linear layer, per output channel    values [inputs..., outputs...]    scale [1..., outputs...]
    the same, in groups of g inputs                 values [G, g, outputs...]         scale [G, 1, outputs...]
    embedding table, whose rows are the outputs     values [V, D]                     scale [V, 1]
    of a tied head

int8 and fp8 are symmetric: the largest weight of a channel becomes the largest value (absmax: Dettmers et al., 2022,
section 2). int4 is affine (Jacob et al., 2018, section 2.1, with a zero point that is no whole number): its sixteen
values lie evenly between about the least and the largest weight of a group, so that the squared error is small; the
kernels of values are int8 there. Only weights are quantised: activations keep their dtype, and sums are float32.

No converted copy of a kernel is made in memory. Compilers for GPUs and TPUs convert while a product reads its operand;
where they cannot, and on a CPU, a block of the kernel is converted at a time, which stays in the processor's cache.
"""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rlae_jax.compilation import jit
from rlae_jax.errors import InputError

Kind = Literal["int8", "int4", "fp8"]
KINDS: dict[str, Any] = {"int8": jnp.int8, "int4": jnp.int4, "fp8": jnp.float8_e4m3fn}
GROUPS = (32, 64, 128)
TABLE, HEAD = ("embedding",), ("head", "kernel")  # where they stand among the parameters
# Kernels of values, which int4 leaves in int8: they are small where heads share them. In int4 they would
# add much to what `benchmarks/real_models.py` says that Gemma 3 270M loses.
_VALUES = (("attention", "v"), ("cross", "v"))
ROUTER = "router"  # of experts: its scores decide, so that it is not quantised
_LARGEST = {"int8": 127.0, "fp8": 448.0}
# Weights converted at a time: on a CPU what its caches hold. Smaller blocks stay nearer, but every loop over blocks is
# compiled for itself, and most kernels of small models need none.
_BLOCK = {"cpu": 2**20, "accelerator": 2**22}


class Quantisation(NamedTuple):
    """How a model's weights are to be held."""

    kind: Kind
    group: int = 32  # inputs that share a scale, of int4; the other kinds have a scale per output channel
    head: bool = False  # the output head and the embedding table, too: int8 or fp8, with a scale per token

    @classmethod
    def of(cls, quantise: str | None, *, group: int = 32, head: bool = False) -> "Quantisation | None":
        """What a user asks for; None for nothing.

        Raises:
          InputError: no kind of quantisation, or no size of a group; the head alone.
        """
        if quantise is None and head:
            raise InputError("quantise_head is of quantised models: give quantise, too")
        if quantise is None:
            return None
        if quantise not in KINDS:
            raise InputError(f"quantise {quantise!r} is not supported; use one of {', '.join(KINDS)}")
        if group not in GROUPS:
            raise InputError(f"groups of {group} inputs are not supported; use one of {', '.join(map(str, GROUPS))}")
        return cls(quantise, group, head)  # type: ignore[arg-type]

    def group_of(self, inputs: int) -> int | None:
        """The inputs of a group in a layer of so many: the size asked for or the next smaller one that divides them;
        0 for a scale per channel, None where no size divides."""
        if self.kind != "int4":
            return 0
        return next((size for size in reversed(GROUPS) if size <= self.group and inputs % size == 0), None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantised:
    """A kernel or table in few bits: one leaf to those who look for kernels, three arrays to JAX."""

    # Any: arrays, or in trees like this one shapes, names and places.
    values: Any  # int8, int4 or float8_e4m3fn
    scale: Any  # float32
    zero: Any = None  # like scale; None: 0

    @property
    def kind(self) -> str:
        """ "int8", "int4" or "fp8"."""
        return next(kind for kind, dtype in KINDS.items() if self.values.dtype == dtype)

    @property
    def grouped(self) -> bool:
        """Whether the first two axes are groups of inputs and the inputs of a group."""
        shape = self.values.shape
        return len(shape) > 2 and shape[0] > 1 and tuple(self.scale.shape[:2]) == (shape[0], 1)

    @property
    def form(self) -> str:
        """ "int8", or "int4 in groups of 32"."""
        return self.kind + (f" in groups of {self.values.shape[1]}" if self.grouped else "")

    def weights(self) -> Float[Array, "..."]:
        """(values - zero) * scale, float32, in the shape of the values."""
        wide = self.values.astype(jnp.float32)
        weights: Array = (wide if self.zero is None else wide - self.zero) * self.scale
        return weights


def is_quantised(leaf: Any) -> bool:
    """For `is_leaf`, where whole kernels are wanted."""
    return isinstance(leaf, Quantised)


def weight_bytes(leaf: Any) -> int:
    """What an array takes in memory, where two int4 values share a byte."""
    bits = 4 if leaf.dtype == jnp.int4 else 8 * leaf.dtype.itemsize
    return int(math.prod(leaf.shape) * bits) // 8


def forms(params: Any) -> dict[str, int]:
    """How many of a model's kernels and tables are held in which form: {"int4 in groups of 32": 210}."""
    leaves = jax.tree.leaves(params, is_leaf=is_quantised)
    return dict(Counter(leaf.form for leaf in leaves if isinstance(leaf, Quantised)))


@functools.partial(jit, static_argnames=("kind", "inputs", "group"))
def quantise_kernel(kernel: Array, *, kind: Kind, inputs: int, group: int = 0) -> Quantised:
    """A kernel in fewer bits.

    Args:
      kernel: [inputs..., outputs...].
      inputs: how many of its leading axes are inputs.
      group: inputs that share a scale; 0: all, a scale per output channel.
    """
    wide = kernel.astype(jnp.float32)
    if group:
        wide = wide.reshape(-1, group, *kernel.shape[inputs:])
    axes = (1,) if group else tuple(range(inputs))
    return _affine(wide, axes) if kind == "int4" else absmax(wide, axes, kind)


@functools.partial(jit, static_argnames="kind")
def quantise_table(table: Float[Array, "V D"], *, kind: Kind) -> Quantised:
    """An embedding table with a scale per row."""
    return absmax(table.astype(jnp.float32), (1,), kind)


def absmax(wide: Float[Array, "..."], axes: tuple[int, ...], kind: Kind) -> Quantised:
    """Float32 numbers in fewer bits, with a scale for all that lie along some axes."""
    scale = jnp.max(jnp.abs(wide), axis=axes, keepdims=True) / _LARGEST[kind]
    scaled = wide / jnp.where(scale == 0, 1.0, scale)
    if kind == "int8":
        scaled = jnp.clip(jnp.round(scaled), -_LARGEST[kind], _LARGEST[kind])
    return Quantised(scaled.astype(KINDS[kind]), scale)


_SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # of the way between the extremes that the sixteen values span


def _affine(wide: Float[Array, "..."], axes: tuple[int, ...]) -> Quantised:
    """The least squared error among several spans: an outlier that is cut off may cost less than a coarser step for
    all. The line through what a span gives is then fitted to the weights."""
    mean = functools.partial(jnp.mean, axis=axes, keepdims=True)
    least, most = (extreme(wide, axis=axes, keepdims=True) for extreme in (jnp.min, jnp.max))
    centre, reach = (least + most) / 2, jnp.where(most == least, 15.0, most - least)

    def rounded(scale: Array, zero: Array) -> Array:
        return jnp.clip(jnp.round(wide / scale + zero), -8, 7)

    best: tuple[Array, ...] | None = None
    for shrunk in _SHRUNK:
        scale = shrunk * reach / 15
        values = rounded(scale, -0.5 - centre / scale)
        apart = values - mean(values)
        fitted = mean(apart * wide) / jnp.maximum(mean(apart * apart), 1e-12)
        scale = jnp.where(fitted > 0, fitted, scale)
        zero = mean(values) - mean(wide) / scale
        values = rounded(scale, zero)
        error = mean(((values - zero) * scale - wide) ** 2)
        found = (error, values, scale, zero)
        if best is None:
            best = found
        else:
            best = tuple(jnp.where(error < best[0], new, old) for new, old in zip(found, best, strict=True))
    assert best is not None
    _, values, scale, zero = best
    return Quantised(values.astype(jnp.int4), scale, zero)


def quantise_leaf(leaf: Any, path: Sequence[Any], inputs: int, wanted: Quantisation, *, stacked: bool = False) -> Any:
    """A leaf of the parameter tree in fewer bits, where that is wanted of what stands at its path.

    Args:
      inputs: how many leading axes of a kernel are inputs; 0: it is no kernel of a linear layer.
      stacked: the kernels of several experts, whose axis is the first.
    """
    per_token: Kind = "int8" if wanted.kind == "int4" else wanted.kind
    if tuple(path) == TABLE:
        return quantise_table(leaf, kind=per_token) if wanted.head else leaf
    if not inputs or path[-2] == ROUTER or (tuple(path) == HEAD and not wanted.head):
        return leaf
    if tuple(path) == HEAD or tuple(path[-3:-1]) in _VALUES:
        return quantise_kernel(leaf, kind=per_token, inputs=inputs)
    group = wanted.group_of(math.prod(leaf.shape[stacked : stacked + inputs]))
    assert group is not None
    of_one = functools.partial(quantise_kernel, kind=wanted.kind, inputs=inputs, group=group)
    return jax.vmap(of_one)(leaf) if stacked else of_one(leaf)


def quantise_params(params: Any, linears: Mapping[str, Any], wanted: Quantisation) -> Any:
    """The parameters of a model in memory in fewer bits, as `load(quantise=)` gives those of a checkpoint.

    Args:
      linears: `transformer.linears(config)`, and of a mixture of experts its own.
    """

    def one(path: Any, leaf: Any) -> Any:
        keys = [part.key for part in path]
        spec = linears.get(".".join(map(str, keys[:-1]))) if keys[-1] == "kernel" else None
        if spec is None:
            return quantise_leaf(leaf, keys, 0, wanted)
        return quantise_leaf(leaf, keys, spec.inputs, wanted, stacked=len(leaf.shape) > len(spec.shape))

    return jax.tree_util.tree_map_with_path(one, params)


def dequantised(leaf: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """A kernel or table as an array, whether quantised or not."""
    weights = leaf.weights() if isinstance(leaf, Quantised) else leaf
    array: Array = weights.astype(dtype).reshape(shape)
    return array


def logical_axes(names: Any, params: Any) -> Any:
    """`transformer.logical_axes` for parameters of which some are quantised: a tree like theirs."""

    def one(axes: tuple[str | None, ...], leaf: Any) -> Any:
        if not isinstance(leaf, Quantised):
            return axes
        if axes[0] == "experts":  # each has such a kernel
            slices = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape[1:], part.dtype), leaf)
            of_one = one(axes[1:], slices)
            return Quantised(*(part and ("experts", *part) for part in (of_one.values, of_one.scale, of_one.zero)))
        if leaf.grouped:  # groups of inputs lie where their first axis did
            axes = (axes[0], None, *axes[len(axes) - len(leaf.values.shape) + 2 :])
        return Quantised(axes, axes, None if leaf.zero is None else axes)

    return jax.tree.map(one, names, params, is_leaf=lambda x: isinstance(x, tuple))


def rows(table: Array | Quantised, ids: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
    """Rows of an embedding table."""
    if not isinstance(table, Quantised):
        return table[ids]
    chosen: Quantised = jax.tree.map(lambda part: part[ids], table)
    return chosen.weights().astype(dtype)


class _Layout(NamedTuple):
    """What an einsum string says of a kernel."""

    einsum: str
    transposed: str  # output,kernel->activations
    shape: tuple[int, ...]  # of the kernel
    inputs: int  # how many of its axes
    outputs_first: bool  # an embedding table's rows

    @classmethod
    def of(cls, einsum: str, shape: tuple[int, ...]) -> "_Layout":
        operands, out = einsum.split("->")
        x, kernel = operands.split(",")
        inputs = sum(letter not in out for letter in kernel)
        return cls(einsum, f"{out},{kernel}->{x}", shape, inputs, kernel[0] in out)

    def of_product(self, batch: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
        """The shape of the product, or of its transposed, for rows of the shape `batch`."""
        first = self.inputs if not self.outputs_first else len(self.shape) - self.inputs
        parts = (self.shape[:first], self.shape[first:])
        inputs, outputs = parts[::-1] if self.outputs_first else parts
        return (*batch, *(inputs if transposed else outputs))


def product(
    einsum: str,
    x: Array,
    kernel: Array | Quantised,
    precision: str | None,
    shape: tuple[int, ...] | None = None,
    dtype: Any = None,
) -> Float[Array, "..."]:
    """activations,kernel->output, e.g. "btd,dnh->btnh" or "...d,vd->...v", where the kernel may be quantised.

    Args:
      shape: of the kernel, which groups do not show; by default that of its values.
      dtype: of the result; by default that of the activations. Sums are float32 where the kernel is quantised.
    """
    if not isinstance(kernel, Quantised):
        return jnp.einsum(einsum, x, kernel, precision=precision, preferred_element_type=dtype)
    layout = _Layout.of(einsum, kernel.values.shape if shape is None else shape)
    out = _product(layout, precision, x, kernel)
    return out.astype(x.dtype if dtype is None else dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(layout: _Layout, precision: str | None, x: Array, kernel: Quantised) -> Float[Array, "..."]:
    """Float32. Its derivative is defined with respect to the activations alone: weights of few bits are not trained."""
    return _either_way(layout, precision, x, kernel, transposed=False)


def _product_forward(layout: _Layout, precision: str | None, x: Array, kernel: Quantised) -> tuple[Array, Any]:
    return _product(layout, precision, x, kernel), (kernel, jnp.zeros((0,), x.dtype))


def _product_backward(layout: _Layout, precision: str | None, kept: Any, gradient: Array) -> tuple[Array, None]:
    kernel, like = kept
    return _either_way(layout, precision, gradient, kernel, transposed=True).astype(like.dtype), None


_product.defvjp(_product_forward, _product_backward)


def _either_way(layout: _Layout, precision: str | None, x: Array, kernel: Quantised, *, transposed: bool) -> Array:
    spread = not jax.sharding.get_abstract_mesh().empty
    arguments = (layout, precision, transposed)
    fused = functools.partial(_fused, *arguments, spread=spread)
    if spread:
        return fused(x, kernel)
    out: Array = lax.platform_dependent(x, kernel, cpu=functools.partial(_on_cpu, *arguments), default=fused)
    return out


def _fused(
    layout: _Layout, precision: str | None, transposed: bool, x: Array, kernel: Quantised, *, spread: bool = False
) -> Array:
    """Products whose operand is converted as it is read.

    Args:
      spread: over a mesh, whose devices would have to bring a kernel together to take it part by part: many rows meet a
        converted copy of it instead.
    """
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    if kernel.zero is None and not kernel.grouped and not transposed:
        out = einsum(layout.einsum, x, kernel.values.reshape(layout.shape).astype(x.dtype))
        return out * lax.broadcast_to_rank(kernel.scale.reshape(layout.of_product((), False)), out.ndim)
    batch, x_ri, over_a = _rows(layout, transposed, x)
    matrix = _matrix(kernel, layout)
    units, width, _ = matrix.values.shape
    if over_a and kernel.grouped and 2 * len(x_ri) <= width:
        # Compilers for GPUs make a copy of an operand that is scaled, but not of one that is converted: sums of each
        # group are scaled, which for few rows are few.
        x_rgw = x_ri.reshape(len(x_ri), units, width)
        sums = einsum("rgw,gwc->grc", x_rgw, matrix.values.astype(x.dtype))
        if matrix.zero is not None:
            sums = sums - jnp.sum(x_rgw.astype(jnp.float32), axis=2).T[:, :, None] * matrix.zero
        out = jnp.sum(sums * matrix.scale, axis=0)
    elif spread:
        weights = kernel.weights().reshape(layout.shape).astype(x.dtype)
        return einsum(layout.transposed if transposed else layout.einsum, x, weights)
    else:
        out = _in_blocks(x_ri, matrix, over_a, precision, _BLOCK["accelerator"])
    return out.reshape(layout.of_product(batch, transposed))


def _on_cpu(layout: _Layout, precision: str | None, transposed: bool, x: Array, kernel: Quantised) -> Array:
    batch, x_ri, over_a = _rows(layout, transposed, x.astype(jnp.float32))
    out = _in_blocks(x_ri, _matrix(kernel, layout), over_a, precision, _BLOCK["cpu"], packed=True)
    return out.reshape(layout.of_product(batch, transposed))


def _rows(layout: _Layout, transposed: bool, x: Array) -> tuple[tuple[int, ...], Array, bool]:
    """Of a product with a matrix [A, C], where A are the inputs, or of a table the outputs: the shape of the rows, the
    rows as [R, .], and whether it is A over which is summed."""
    contracted = layout.inputs if not transposed else len(layout.shape) - layout.inputs
    batch = x.shape[: x.ndim - contracted]
    return batch, x.reshape(math.prod(batch), -1), transposed == layout.outputs_first


def _matrix(kernel: Quantised, layout: _Layout) -> Quantised:
    """Values [U, W, C] and scales with which they broadcast: U groups of W rows of the matrix [A, C], or its A rows."""
    first = len(layout.shape) - layout.inputs if layout.outputs_first else layout.inputs
    kept = 1 if kernel.grouped else first + kernel.values.ndim - len(layout.shape)

    def flat(part: Array) -> Array:
        return part.reshape(math.prod(part.shape[:kept]), part.shape[1] if kernel.grouped else 1, -1)

    matrix: Quantised = jax.tree.map(flat, kernel)
    return matrix


def _in_blocks(
    x_ri: Array, kernel: Quantised, over_a: bool, precision: str | None, block_size: int, *, packed: bool = False
) -> Array:
    """Some rows of the matrix at a time are converted and multiplied, about `block_size` weights."""
    units, rows, c = kernel.values.shape
    step = min(max(block_size // (rows * c), 1), units)
    whole, rest = divmod(units, step)
    held = _pack(kernel) if packed else kernel
    pairs = held.scale.shape[-1] if held.scale.ndim > kernel.scale.ndim else 1
    r = len(x_ri)
    x_rip = x_ri[..., None] if over_a else x_ri.reshape(r, c // pairs, pairs)
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)

    def block(start: Any, count: int, out_prc: Array) -> Array:
        def own(array: Array) -> Array:
            return array if array.shape[0] == 1 else lax.dynamic_slice_in_dim(array, start, count, axis=0)

        part = jax.tree.map(own, held)
        if packed:
            # Compilers for CPUs convert weights that do not depend on the activations before there are any, those of
            # all layers at once, and before a loop over steps once for all of them: a copy of every kernel. A zero that
            # compilers do not see through makes them depend.
            zero = jnp.isnan(x_ri[0, 0]) & jnp.isinf(x_ri[0, 0])
            part = dataclasses.replace(part, values=part.values ^ zero.astype(part.values.dtype))
        parts = [w.reshape(count * rows, -1).astype(x_ri.dtype) for w in _unpacked(part)]
        if over_a:
            x_ra = lax.dynamic_slice_in_dim(x_ri, start * rows, count * rows, axis=1)
            return out_prc + jnp.stack([einsum("ra,ac->rc", x_ra, w_ac) for w_ac in parts])
        new_pra = jnp.stack([einsum("rc,ac->ra", x_rip[..., p], w_ac) for p, w_ac in enumerate(parts)])
        return lax.dynamic_update_slice_in_dim(out_prc, jnp.sum(new_pra, axis=0, keepdims=True), start * rows, axis=2)

    out = jnp.zeros((pairs, r, c // pairs) if over_a else (1, r, units * rows), jnp.float32)
    out = lax.fori_loop(0, whole, lambda i, out: block(i * step, step, out), out)
    out = block(whole * step, rest, out) if rest else out
    return jnp.moveaxis(out, 0, -1).reshape(r, -1)


def _pack(kernel: Quantised) -> Quantised:
    """An int4 matrix of an even number of columns as the bytes that hold it, with pairs of scales, and fp8 as bytes:
    compilers for CPUs take one value of four bits after the other, but bytes many at a time, and convert an array of
    fp8 as a whole before anything else."""
    if kernel.kind == "fp8":
        return dataclasses.replace(kernel, values=lax.bitcast_convert_type(kernel.values, jnp.uint8))
    c = kernel.values.shape[-1]
    if kernel.kind != "int4" or c % 2:
        return kernel

    def in_pairs(part: Array) -> Array:
        wide = jnp.broadcast_to(part, (*part.shape[:-1], c))
        return wide.reshape(*part.shape[:-1], c // 2, 2)

    zero = None if kernel.zero is None else in_pairs(kernel.zero)
    bytes_ = lax.bitcast_convert_type(in_pairs(kernel.values), jnp.uint8)
    return Quantised(bytes_, in_pairs(kernel.scale), zero)


def _unpacked(kernel: Quantised) -> list[Array]:
    """The weights, or of packed ones those of the even and those of the odd columns."""
    if kernel.values.dtype != jnp.uint8:
        return [kernel.weights()]
    if kernel.scale.ndim == kernel.values.ndim:
        return [dataclasses.replace(kernel, values=_from_e4m3(kernel.values)).weights()]
    halves = (kernel.values << 4, kernel.values)  # arithmetic shifts to the right bring back the sign
    signed = [lax.bitcast_convert_type(half, jnp.int8) >> 4 for half in halves]
    return [
        Quantised(values, kernel.scale[..., i], None if kernel.zero is None else kernel.zero[..., i]).weights()
        for i, values in enumerate(signed)
    ]


def _from_e4m3(bits: Array) -> Float[Array, "..."]:
    """The numbers that bytes stand for (Micikevicius et al., 2022, table 1): a sign, four bits of exponent with bias 7,
    three of mantissa. An exponent of 0 is that of 1 without the leading one. There are no infinities, and no NaN among
    weights."""
    magnitude = (bits & 127).astype(jnp.uint32)
    # The same bits at the place where float32 has them, with its own bias.
    normal = lax.bitcast_convert_type((magnitude << 20) + ((127 - 7) << 23), jnp.float32)
    wide = jnp.where(magnitude < 8, 2 * normal - 2.0**-6, normal)
    return jnp.where(bits > 127, -wide, wide)
