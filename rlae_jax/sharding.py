"""Meshes: which axis of a mesh each axis of an array lies on, and functions that devices run on rows of their own.

A mesh has two axes. Rows of a batch are spread over `data`, the parameters of every member over `model`:

    mesh = make_mesh(data=4, model=2)        rows 0-7 | 8-15 | 16-23 | 24-31      one of four groups of two devices each
                                             heads, feed-forward and vocabulary   halves, one on each device of a group

Arrays know their axes by name (`transformer.logical_axes`), and `RULES` is the one table from those names to the mesh.
Nothing here is passed along: programs ask for the mesh in force, under which `use` has them traced. Without one
`constrain` gives back its argument and `by_rows` the function, so that a program is what it would be without them.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Bool, Int

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count

DATA, MODEL = "data", "model"
RULES: Mapping[str, str] = {
    "batch": DATA,
    "vocab": MODEL,
    "heads": MODEL,
    "kv_heads": MODEL,
    "mlp": MODEL,
    "experts": MODEL,
}
# Where an argument of `by_rows` lies: rows are its first axis, its second (after agents or adapters), or it has none.
ROWS, BLOCKS, WHOLE = PartitionSpec(DATA), PartitionSpec(None, DATA), PartitionSpec()

T = TypeVar("T")


def make_mesh(data: int = 1, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, of all processes where there are several.

    Args:
      data: groups of devices, each with rows of its own.
      model: devices of a group, each with a part of every member. One of the two may be -1: what is left.
      devices: by default all there are, in the order that suits their connections. A mesh of one process may be
        smaller than they are many, if it divides them.

    Raises:
      InputError: sizes that do not divide the devices.
    """
    n = len(jax.devices() if devices is None else devices)
    sizes = {DATA: data, MODEL: model}
    left = [name for name, size in sizes.items() if size == -1]
    given = [size for size in sizes.values() if size != -1]
    if len(left) > 1 or not all(within.fits(size) for size in given for within in ranges.ranges_in(Count)):
        raise InputError(f"a mesh's sizes are whole numbers of at least 1, one of them may be -1; not {as_text(sizes)}")
    known = data * model if not left else model if left[0] == DATA else data
    if n % known or (not left and known < n and jax.process_count() > 1):
        fitting = ", ".join(f"{DATA}={n // m},{MODEL}={m}" for m in range(1, n + 1) if n % m == 0)
        raise InputError(f"the mesh {as_text(sizes)} does not divide the {n} devices; these do: {fitting}")
    if left:
        sizes[left[0]] = n // known
    shape = tuple(sizes.values())
    kinds = (AxisType.Auto,) * len(shape)
    used = math.prod(shape)
    if devices is None:
        return jax.make_mesh(shape, tuple(sizes), axis_types=kinds, devices=jax.devices()[:used])
    return Mesh(np.asarray(devices[:used]).reshape(shape), tuple(sizes), axis_types=kinds)


def groups_of(mesh: Mesh | None) -> int:
    """How many groups of devices have rows of their own; 1 without a mesh."""
    return 1 if mesh is None else int(mesh.shape[DATA])


def fill(n: int, mesh: Mesh | None) -> int:
    """The next number of rows, from n on, that every group of devices has an equal part of."""
    groups = groups_of(mesh)
    return -(-n // groups) * groups


def as_text(sizes: Mapping[str, int]) -> str:
    """A mesh's sizes, as `read_mesh` reads them."""
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def read_mesh(text: str) -> tuple[int, int]:
    """(data, model) of "data=4,model=2"; what is not named is 1.

    Raises:
      InputError: anything else.
    """
    sizes = {DATA: 1, MODEL: 1}
    wanted = f"mesh {text!r}: expected sizes such as data=4,model=2 or data=-1 (what is left)"
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in sizes or not size:
            raise InputError(wanted)
        sizes[name] = -1 if size == "-1" else ranges.read(size, Count, f"{wanted}; {name}=")
    return sizes[DATA], sizes[MODEL]


def describe(mesh: Mesh | None) -> dict[str, int] | None:
    """A mesh's sizes, for files and messages."""
    return None if mesh is None else {str(name): int(size) for name, size in mesh.shape.items()}


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Puts a mesh in force for the programs that are called inside; None leaves things as they are."""
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def mesh_in_force() -> Mesh | None:
    """The mesh under which a program called now would run; None without one."""
    mesh = jax.sharding.get_mesh()
    return None if mesh.empty else mesh


def _in_force() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def platform() -> str:
    """What the programs that are traced now will run on: the mesh in force knows, which may be of devices that are not
    there, else it is the default backend."""
    device = getattr(_in_force(), "abstract_device", None)
    name: str = jax.default_backend() if device is None else device.platform
    return name


def _auto(mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """The axes that are the compiler's to use, and their sizes."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto}


def partition(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh, *, fsdp: bool = False
) -> PartitionSpec:
    """How an array lies on a mesh, by the names of its axes.

    An axis stays whole whose size the mesh axis does not divide, or whose mesh axis an earlier axis of the array has
    taken.

    Args:
      fsdp: for what is trained: the largest axis that is whole is spread over `data` as well.
    """
    sizes = _auto(mesh)
    places: list[str | None] = []
    for name, size in zip(axes, shape, strict=True):
        place = RULES.get(name or "")
        fits = place in sizes and place not in places and size % sizes[place] == 0
        places.append(place if fits else None)
    if fsdp and DATA in sizes and DATA not in places:
        whole = [i for i, place in enumerate(places) if place is None and shape[i] % sizes[DATA] == 0]
        if whole:
            places[max(whole, key=lambda i: shape[i])] = DATA
    return PartitionSpec(*places)


def shardings(axes: Any, shapes: Any, mesh: Mesh, *, fsdp: bool = False) -> Any:
    """`partition` of every array of a tree.

    Args:
      axes: a tree of tuples of names, such as `transformer.logical_axes`.
      shapes: the same tree of arrays or `jax.ShapeDtypeStruct`s.
    """

    def one(names: tuple[str, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(names, leaf.shape, mesh, fsdp=fsdp))

    return jax.tree.map(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def constrain(x: T, *axes: str | None, fsdp: bool = False) -> T:
    """The array, laid out by the names of its first axes on the mesh in force; the others are whole. Axes of the mesh
    that are run by hand (`by_rows`) do not count. `fsdp` as in `partition`."""
    mesh = _in_force()
    if mesh.empty:
        return x
    shape = x.shape  # type: ignore[attr-defined]
    names = (*axes, *[None] * (len(shape) - len(axes)))
    constrained: T = lax.with_sharding_constraint(x, partition(names, shape, mesh, fsdp=fsdp))
    return constrained


def rows_apart() -> int:
    """Over how many devices the rows of a batch are spread by the mesh in force: 1 without one, and in `by_rows`."""
    mesh = _in_force()
    return 1 if mesh.empty else _auto(mesh).get(DATA, 1)


def by_rows(function: Callable[..., Any], places: Sequence[Any], out: Any = ROWS) -> Callable[..., Any]:
    """The function, run by every group of devices on its own rows.

    What the compiler would have to find out (groups of rows one after another, rows at places of their own, repeated
    rows) then needs no exchange between devices. The axis `model` stays the compiler's.

    Args:
      places: of every argument, `ROWS`, `BLOCKS` or `WHOLE`, or a tree of them that begins like the argument.
      out: the same of the result. What is `WHOLE` must come out alike everywhere (`mean_over_rows`).
    """
    if rows_apart() == 1:
        return function
    return jax.shard_map(function, in_specs=tuple(places), out_specs=out, axis_names={DATA}, check_vma=False)


def sum_of_parts(function: Callable[[Any, Any, Any], Any], rows: Any, parts: Any, axes: Any) -> Any:
    """function(rows, parts, device), run by every device of a group on its own part of some parameters, and summed over
    the group: for what the compiler would bring together to take a piece at a place that only the data tell.

    Args:
      function: gives rows; `device` is its number in the group, 0 where nothing is split.
      rows: arrays with rows first, which all devices of a group have.
      parts, axes: a tree of parameters and the names of their axes, which say how they lie.
    """
    mesh = _in_force()
    if mesh.empty:
        return function(rows, parts, 0)
    places = jax.tree.map(lambda names, leaf: partition(names, leaf.shape, mesh), axes, parts, is_leaf=_is_names)
    split = any(MODEL in place for place in jax.tree.leaves(places, is_leaf=lambda x: isinstance(x, PartitionSpec)))
    n = len(jax.tree.leaves(rows)[0])
    spread = rows_apart() > 1 and n % rows_apart() == 0
    by_hand = {name for name, used in ((MODEL, split), (DATA, spread)) if used}
    if not by_hand:
        return function(rows, parts, 0)

    def own(rows: Any, parts: Any) -> Any:
        out = function(rows, parts, lax.axis_index(MODEL) if split else 0)
        return lax.psum(out, MODEL) if split else out

    of_rows = ROWS if spread else WHOLE
    specs = (jax.tree.map(lambda _: of_rows, rows), places)
    return jax.shard_map(own, in_specs=specs, out_specs=of_rows, axis_names=by_hand, check_vma=False)(rows, parts)


def _is_names(axes: Any) -> bool:
    return isinstance(axes, tuple)


def groups() -> int:
    """Inside `by_rows`, how many groups of devices there are; else 1."""
    mesh = _in_force()
    kinds = {} if mesh.empty else dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return mesh.shape[DATA] if kinds.get(DATA) == AxisType.Manual else 1


def _over_groups(function: Callable[[Any], Any], tree: T) -> T:
    """Inside `by_rows`, every leaf's; else the tree."""
    done: T = tree if groups() == 1 else jax.tree.map(function, tree)
    return done


def split_blocks(tree: T, n: int) -> T:
    """Arrays of n blocks of rows, one after another, as [n, B, ...]: on a mesh each group of devices then has rows of
    all blocks (`BLOCKS`)."""
    blocks: T = jax.tree.map(lambda leaf: leaf.reshape(n, -1, *leaf.shape[1:]), tree)
    return blocks


def join_blocks(blocks: T) -> T:
    """The inverse of `split_blocks`."""
    joined: T = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), blocks)
    return joined


def bring_together(tree: T, n: int) -> T:
    """Small arrays of n blocks of rows, on every device: where there are several blocks their rows change places."""
    together: T = tree if n == 1 else jax.tree.map(constrain, tree)
    return together


def mean_over_rows(tree: T) -> T:
    """The mean of every leaf over the groups of devices."""
    return _over_groups(lambda leaf: lax.pmean(leaf, DATA), tree)


def sum_over_rows(tree: T) -> T:
    """The sum of every leaf over the groups of devices."""
    return _over_groups(lambda leaf: lax.psum(leaf, DATA), tree)


def gather_rows(tree: T, axis: int = 0) -> T:
    """Everybody's rows, on every group of devices."""
    return _over_groups(lambda leaf: lax.all_gather(leaf, DATA, axis=axis, tiled=True), tree)


def own_share(array: jax.Array) -> jax.Array:
    """This group's part of an array that all have, along its first axis, which must be divisible."""
    n = len(array) // groups()
    return array if groups() == 1 else lax.dynamic_slice_in_dim(array, lax.axis_index(DATA) * n, n)


def place(array: np.ndarray, sharding: NamedSharding, dtype: Any = None) -> jax.Array:
    """A host's array on a mesh: every device gets its own part and no other. With several processes each of them must
    hold the array, or at least the parts of its own devices."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index], dtype, order="C"))


def place_like(array: np.ndarray, like: Any) -> Any:
    """A host's array, lying as another one does; as it is where that one is on a single device, or traced."""
    where = getattr(like, "sharding", None)
    return place(array, where) if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh) else array


def spread(array: Any, mesh: Mesh | None) -> Any:
    """An array's rows over a mesh, if it divides them; traced ones stay as they are."""
    if mesh is None or isinstance(array, jax.core.Tracer):
        return array
    names = ("batch", *[None] * (array.ndim - 1))
    return place(np.asarray(array), NamedSharding(mesh, partition(names, array.shape, mesh)))


def whole(tree: T, mesh: Mesh | None) -> T:
    """Small arrays, held by every device of a mesh."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, WHOLE)
    placed: T = jax.tree.map(lambda leaf: place(np.asarray(leaf), sharding), tree)
    return placed


def check_model(name: str, config: Any, mesh: Mesh, *, strict: bool = True) -> None:
    """Says how a model lies on a mesh where that is not as one would expect.

    Key/value and recurrent heads, feed-forward entries and vocabularies that the mesh does not divide are held whole
    by every device, which is said in a warning.

    Args:
      strict: whether query heads that the mesh does not divide are an error, or held whole, too.

    Raises:
      InputError: such heads.
    """
    size = mesh.shape[MODEL]
    if config.encoder is not None:
        check_model(f"{name} (encoder)", config.encoder, mesh, strict=strict)
    if size == 1:
        return
    if strict and config.heads % size:
        fitting = [n for n in range(1, config.heads + 1) if config.heads % n == 0]
        raise InputError(
            f"{name} has {config.heads} heads, which {MODEL}={size} does not divide; these sizes do: "
            f"{', '.join(map(str, fitting))}"
        )
    sizes = {"heads": config.heads, "key/value heads": config.kv_heads}
    if hasattr(config.recurrent, "key_heads"):
        sizes |= {"recurrent heads": config.recurrent.heads, "recurrent key heads": config.recurrent.key_heads}
    elif config.recurrent is not None:
        sizes["channels"] = config.width
    experts = config.experts
    sizes["tokens"] = config.vocab
    if experts is None or len(experts.layers) < config.layers:
        sizes["feed-forward entries"] = config.ffn_width
    if experts is not None and experts.number % size:  # then a part of each
        sizes["entries of an expert"] = experts.width
    whole = [f"{count} {what}" for what, count in sizes.items() if count % size]
    if whole:
        warnings.warn(
            f"{name}: {', '.join(whole)} are not divided by {MODEL}={size}, and every device holds them whole",
            stacklevel=2,
        )


def place_rows(tree: T, mesh: Mesh | None) -> T:
    """Host arrays with rows first, spread over a mesh; as they are without one. Of several processes each takes its
    share of what all of them hold."""
    if mesh is None:
        return tree
    sharding = NamedSharding(mesh, ROWS)

    def one(leaf: np.ndarray) -> Any:
        return jax.make_array_from_process_local_data(sharding, leaf[own_rows(len(leaf), mesh)], leaf.shape)

    placed: T = jax.tree.map(one, tree)
    return placed


def own_rows(n: int, mesh: Mesh | None) -> Int[np.ndarray, " n"]:
    """Which rows of a batch of n lie on this process's devices."""
    if mesh is None:
        return np.arange(n)
    parts = NamedSharding(mesh, ROWS).addressable_devices_indices_map((n,)).values()
    return np.unique(np.concatenate([np.arange(n)[part] for part in parts]))


def fetch_own_rows(tree: T) -> T:
    """The rows of device arrays, first axis, that lie on this process's devices, as host arrays."""

    def one(leaf: Any) -> np.ndarray:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        parts = {shard.index[0].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])

    fetched: T = jax.tree.map(one, tree)
    return fetched


def join_rows(own: np.ndarray, n: int, mesh: Mesh | None) -> Any:
    """The array of n rows of which every process has its own."""
    if mesh is None:
        return own
    return jax.make_array_from_process_local_data(NamedSharding(mesh, ROWS), own, (n, *own.shape[1:]))


def abstract(tree: T, mesh: Mesh | None) -> T:
    """The shapes of small arrays that every device of a mesh, or the only device, is to hold: what a checkpoint is
    restored to, wherever it was written."""
    where = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else NamedSharding(mesh, WHOLE)
    shapes: T = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree)
    return shapes


def check_rows(what: str, n: int, mesh: Mesh | None) -> None:
    """Raises an `InputError` for a number of rows that a mesh does not divide."""
    size = groups_of(mesh)
    if n % size:
        below, above = n // size * size, fill(n, mesh)
        fitting = f"{below} or {above}" if below else str(above)
        raise InputError(f"{what} {n} is not divided by {DATA}={size} of the mesh; {fitting} would be")


def to_host(tree: T) -> T:
    """Arrays of any mesh as host arrays, whole on every process."""
    leaves, structure = jax.tree.flatten(tree)
    apart = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated)
    ]
    if apart:
        from jax.experimental import multihost_utils

        gathered = multihost_utils.process_allgather([leaves[i] for i in apart], tiled=True)
        for i, leaf in zip(apart, gathered, strict=True):
            leaves[i] = leaf
    fetched: T = jax.tree.unflatten(structure, jax.device_get(leaves))
    return fetched


def on_every_process(holds: Bool[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Which of n things hold on all processes."""
    if jax.process_count() == 1:
        return holds
    from jax.experimental import multihost_utils

    everywhere: np.ndarray = np.all(multihost_utils.process_allgather(holds), axis=0, keepdims=True)[0]
    return everywhere


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Of several processes, has each run what is called inside on a device of its own, apart from the others."""
    apart = jax.process_count() > 1
    with jax.set_mesh(Mesh(np.empty((), object), ())) if apart else contextlib.nullcontext():
        yield
