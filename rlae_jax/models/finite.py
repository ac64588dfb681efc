"""Whether weights are numbers: a NaN or an infinity among them makes every answer garbage without an error.

In: leaves of a parameter tree as they are placed, each of which `flag` reads once on its devices while the next one
comes from the disk. Out of `not_finite`: which of them failed; `told` and `refusal` say it in the names of the file.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool

from rlae_jax import sharding
from rlae_jax.compilation import jit
from rlae_jax.errors import InputError, grouped_error

Key = TypeVar("Key")

_DAMAGED = "the file is damaged or its training diverged; --no-check-finite (check_finite=False) loads it all the same"
_TOO_LARGE = "bfloat16 and float32 hold larger numbers"


def flag(leaf: Any) -> Bool[Array, " devices"]:
    """Whether all numbers of a leaf, an array or a quantised kernel with its scales, are finite; on a mesh every device
    answers for its own part.

    Devices exchange nothing: many small programs in which processes wait for one another, all under way at once, can
    wait for ever.
    """
    parts = [part for part in jax.tree.leaves(leaf) if jnp.issubdtype(part.dtype, jnp.inexact)]
    places = [getattr(part, "sharding", None) for part in parts]
    mesh = next((place.mesh for place in places if isinstance(place, NamedSharding)), None)
    specs = tuple(place.spec if isinstance(place, NamedSharding) else sharding.WHOLE for place in places)
    flags: Array = flag_parts(parts, mesh, specs if mesh else ())
    return flags


@functools.partial(jit, static_argnames=("mesh", "specs"))
def flag_parts(parts: Sequence[Array], mesh: Mesh | None, specs: tuple[PartitionSpec, ...]) -> Bool[Array, " devices"]:
    """`flag` of arrays: a finite number times 0 is 0, any other one NaN, and this sum is three times as fast on a CPU
    as to ask each number."""

    def own(parts: Sequence[Array]) -> Bool[Array, " 1"]:
        wide = [part.astype(jnp.float32) if part.dtype.itemsize == 1 else part for part in parts]
        sums = [jnp.sum(part * jnp.zeros((), part.dtype), dtype=jnp.float32) for part in wide]
        return jnp.all(jnp.isfinite(jnp.array(sums)))[None]

    if mesh is None:
        return own(parts)
    every = PartitionSpec(mesh.axis_names)
    return jax.shard_map(own, mesh=mesh, in_specs=(list(specs),), out_specs=every, check_vma=False)(parts)


def not_finite(flags: Mapping[Key, Bool[Array, " devices"]]) -> list[Key]:
    """The keys of the leaves that are not finite, on whichever process."""
    found = np.array([own.all() for own in sharding.fetch_own_rows(list(flags.values()))])
    return [key for key, finite in zip(flags, sharding.on_every_process(found), strict=True) if not finite]


def check(where: object, leaves: Mapping[str, Any], kind: str = "not finite") -> None:
    """Raises an `InputError` for leaves in memory of which one is not finite."""
    if wrong := not_finite({name: flag(leaf) for name, leaf in leaves.items()}):
        raise refusal(where, [(kind, f"{name} is {kind}") for name in wrong])


def check_trained(params: Any, names: Sequence[str], when: str, unchecked: bool = False) -> None:
    """Raises an `InputError` where training has diverged: one line that names whose parameters are not finite.

    Args:
      params: of all that are trained side by side, leaves [N, ...].
      names: of the N.
      unchecked: whether members' weights may themselves be no numbers (`check_finite=False`).
    """
    if not_finite({"": flag(params)}):
        host = sharding.to_host(jax.tree.leaves(params))
        wrong = [name for i, name in enumerate(names) if not all(np.isfinite(leaf[i]).all() for leaf in host)]
        remedy = "a smaller learning rate may help"
        if unchecked:
            remedy = "the members' weights were not checked (--no-check-finite), and may be the reason"
        raise InputError(
            f"training diverged: the parameters of {', '.join(wrong)} are not finite after {when}; {remedy}; what was "
            "saved before is kept"
        )


def told(name: str, stored: np.ndarray, dtype: Any) -> tuple[str, str] | None:
    """What is wrong with a stored array, as `grouped_error` takes it; None if it is finite in a dtype."""
    with np.errstate(over="ignore"):
        held = stored.astype(dtype)
    for kind, array in (("not finite", stored), (f"beyond {np.dtype(dtype).name}", held)):
        wide = array if array.dtype == np.float64 else array.astype(np.float32)
        if n := int(np.count_nonzero(~np.isfinite(wide))):
            return kind, f"{name}: {n} of {array.size} values are {kind}"
    return None


def refusal(where: object, findings: Sequence[tuple[str, str]]) -> InputError:
    """The error for weights that are not finite: one line for one of them."""
    kinds = {kind for kind, _ in findings}
    remedy = _TOO_LARGE if all(kind.startswith("beyond") for kind in kinds) else _DAMAGED
    if len(findings) == 1:
        return InputError(f"{where}: {findings[0][1]}; {remedy}")
    return grouped_error(f"{where}: weights are no numbers", findings, remedy)
