"""TPU programs without a TPU: libtpu compiles for chips that are described by name.

In: a name of a topology ("v5e:2x4"), sizes of a mesh. Out: a mesh of devices that are not there, for which programs are
lowered and compiled like for any other. Nothing is run. libtpu comes with `pip install 'rlae-jax[tpu-plan]'`.
"""

import importlib.util
import os
from typing import Any

from jax.sharding import Mesh

from rlae_jax import sharding
from rlae_jax.errors import InputError

# libtpu looks for a machine with chips and waits for it unless it is told not to.
_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
}
# The slices of each kind that there are, by their number of chips.
_SLICES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"},
}


def available() -> bool:
    """Whether programs can be compiled for TPUs here."""
    return importlib.util.find_spec("libtpu") is not None


def make_mesh(kind: str, data: int = 1, model: int = 1) -> Mesh:
    """A mesh of TPUs that need not be there.

    Args:
      kind: v5e, v6e or v5p.

    Raises:
      InputError: another kind, a number of chips that no slice of it has, no libtpu.
    """
    slices = _SLICES.get(kind)
    if slices is None:
        raise InputError(f"programs can be compiled for {', '.join(_SLICES)}, not for {kind}")
    if data * model not in slices:
        sizes = ", ".join(map(str, slices))
        raise InputError(f"{kind} has slices of {sizes} chips, not of the {data * model} of data={data},model={model}")
    if not available():
        raise InputError("compiling for TPUs needs libtpu: pip install 'rlae-jax[tpu-plan]'")
    return sharding.make_mesh(data, model, devices=_devices(f"{kind}:{slices[data * model]}"))


def _devices(topology: str) -> list[Any]:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    bounds: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if topology.endswith(":1x1") else {}
    return list(topologies.get_topology_desc(topology, platform="tpu", **bounds).devices)
