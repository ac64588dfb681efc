"""On which devices a command runs: the options that every command with models has, put around it in one place."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Which devices, and how they share the work."""

    mesh: Annotated[str | None, arg(metavar="data=N,model=M")] = None
    """Spread the work over N x M devices: N groups with rows of a batch of their own, and in each group M devices with
    a part of every model. -1 is what is left. Default: one device."""


def on_devices(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with `DeviceOptions`, run under the mesh that they name."""

    @functools.wraps(command)
    def run(*, devices: DeviceOptions, **options: Any) -> Any:
        from rlae_jax import sharding

        if devices.mesh is None:
            return command(**options)
        data, model = sharding.read_mesh(devices.mesh)
        with sharding.use(sharding.make_mesh(data, model)):
            return command(**options)

    signature = inspect.signature(command)
    del run.__wrapped__  # which would be asked for its parameters
    flags = Annotated[DeviceOptions, OmitArgPrefixes]
    of_devices = inspect.Parameter("devices", inspect.Parameter.KEYWORD_ONLY, annotation=flags)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), of_devices])  # type: ignore[attr-defined]
    run.__annotations__ = {**inspect.get_annotations(command), "devices": flags}
    return run
