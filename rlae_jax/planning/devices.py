"""What accelerators can do: memory, its bandwidth, products of matrices. One row per device as JAX counts devices."""

import dataclasses
import difflib

from rlae_jax.errors import InputError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """An accelerator's published figures.

    Attributes:
      memory: GiB.
      bandwidth: of the memory, 10^9 bytes per second.
      flops: of dense bfloat16 products, 10^12 per second.
      clock: 10^9 cycles per second, of TPUs, whose compiler tells cycles; 0 where that is not known.
    """

    name: str
    memory: float
    bandwidth: float
    flops: float
    clock: float = 0.0

    @property
    def is_tpu(self) -> bool:
        return self.name.startswith("v") and self.clock > 0


def _table(*devices: Device) -> dict[str, Device]:
    return {device.name: device for device in devices}


# NVIDIA's memory is what nvidia-smi tells, which is a little less than the number in a card's name. Its products are
# those without sparsity. A TPU's clock is its products' rate divided by what its matrix units do in a cycle.
DEVICES = _table(
    # cloud.google.com/tpu/docs: v4, v5e, v5p, v6e (system architecture), per chip
    Device(name="v4", memory=32, bandwidth=1228, flops=275, clock=1.05),
    Device(name="v5e", memory=16, bandwidth=819, flops=197, clock=1.5),
    Device(name="v5p", memory=95, bandwidth=2765, flops=459, clock=1.75),
    Device(name="v6e", memory=32, bandwidth=1640, flops=918, clock=1.75),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM
    Device(name="A100-40", memory=39.5, bandwidth=1555, flops=312),
    Device(name="A100-80", memory=79.2, bandwidth=2039, flops=312),
    # NVIDIA H100 and H200 Tensor Core GPU data sheets, SXM
    Device(name="H100", memory=79.6, bandwidth=3350, flops=989),
    Device(name="H200", memory=140.4, bandwidth=4800, flops=989),
    # NVIDIA HGX B200 data sheet, one GPU of eight
    Device(name="B200", memory=179.0, bandwidth=7700, flops=2250),
    # NVIDIA L4 data sheet
    Device(name="L4", memory=22.5, bandwidth=300, flops=121),
    # NVIDIA Ada GPU architecture white paper; products summed in float32
    Device(name="RTX4090", memory=24.0, bandwidth=1008, flops=165),
)


def find_device(name: str) -> Device:
    """The device of this name, in capitals or not.

    Raises:
      InputError: an unknown name.
    """
    by_name = {known.lower(): device for known, device in DEVICES.items()}
    if name.lower() in by_name:
        return by_name[name.lower()]
    close = difflib.get_close_matches(name.lower(), by_name, n=1)
    hint = f" (did you mean {by_name[close[0]].name}?)" if close else ""
    raise InputError(
        f"device {name!r} is not known{hint}; known: {', '.join(DEVICES)}. For another give its --memory, --bandwidth "
        "and --flops"
    )
