"""On which devices a command runs: the options that every command with models has, put around it in one place."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax import hosts
from rlae_jax.commands import watch
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count, CountOr0
from rlae_jax.version import __version__


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Which devices, and how they share the work."""

    mesh: Annotated[str | None, arg(metavar="data=N,model=M")] = None
    """Spread the work over N x M devices: N groups with rows of a batch of their own, and in each group M devices with
    a part of every model. -1 is what is left. Default: one device."""

    def connect(self) -> None:
        """Nothing: there is one process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostOptions(DeviceOptions):
    """Which devices, of which processes, and how they share the work."""

    mesh: Annotated[str | None, arg(metavar="data=N,model=M")] = None
    """Spread the work over N x M devices: N groups with rows of a batch of their own, and in each group M devices with
    a part of every model. -1 is what is left. Default: one device; of several processes data=-1."""
    coordinator: Annotated[str | None, arg(metavar="auto|HOST:PORT")] = None
    """Run together with other processes, each started with this same command and with devices of its own: HOST:PORT is
    where process 0 listens; auto asks the cluster (TPU pods, Slurm, Open MPI). OUT is a directory that all share."""
    processes: Count | None = None
    """how many processes there are."""
    process_id: CountOr0 | None = None
    """which of them this is, from 0; the first prints and writes."""

    def connect(self) -> None:
        """Joins the other processes, if there are to be any.

        Raises:
          InputError: see `hosts.initialise`.
        """
        if self.coordinator is not None:
            hosts.initialise(self.coordinator, self.processes, self.process_id)
            watch.tell_connected()
        elif self.processes is not None or self.process_id is not None:
            raise InputError("--processes and --process-id need --coordinator HOST:PORT, where process 0 listens")


def on_devices(command: Callable[..., Any], *, hosts_too: bool = False) -> Callable[..., Any]:
    """The command with `DeviceOptions`, run under the mesh that they name.

    Args:
      hosts_too: with `HostOptions`.
    """

    @functools.wraps(command)
    def run(*, devices: DeviceOptions, **options: Any) -> Any:
        from rlae_jax import sharding

        devices.connect()
        mesh = devices.mesh
        if hosts.count() > 1:
            _agree(command, mesh, options)
            mesh = mesh or f"{sharding.DATA}=-1"
        with hosts.only_first_prints():
            if mesh is None:
                return command(**options)
            with sharding.use(sharding.make_mesh(*sharding.read_mesh(mesh))):
                return command(**options)

    signature = inspect.signature(command)
    del run.__wrapped__  # which would be asked for its parameters
    flags: Any = Annotated[HostOptions if hosts_too else DeviceOptions, OmitArgPrefixes]
    of_devices = inspect.Parameter("devices", inspect.Parameter.KEYWORD_ONLY, annotation=flags)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), of_devices])  # type: ignore[attr-defined]
    run.__annotations__ = {**inspect.get_annotations(command), "devices": flags}
    return run


def _agree(command: Callable[..., Any], mesh: str | None, options: dict[str, Any]) -> None:
    """Raises an `InputError` where processes run other code or were told something else."""
    import jax

    plain = {
        name: dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # type: ignore[arg-type]
        for name, value in options.items()
    }
    hosts.agree(
        {
            "version": f"rlae_jax {__version__}, jax {jax.__version__}",
            "command": command.__name__,
            "mesh": mesh,
            "backend": jax.default_backend(),
            "option": plain,
        }
    )
