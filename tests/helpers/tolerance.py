"""How far apart two ways of computing the same float32 numbers may lie."""

import jax


def on_device(cpu: float, device: float) -> float:
    """The first on a CPU, the second on a GPU or TPU.

    There the order of a sum follows from the shape, and exponentials and logarithms are the device's own: some
    roundings more of numbers of size 1 to 10, for which 20 times a CPU's tolerance is enough. Products of models are
    float32 all the same, as `ModelConfig.precision` is "highest": TF32 or one pass of bfloat16 (1e-3 and 1e-2 of such
    numbers) would still be found.
    """
    return cpu if jax.default_backend() == "cpu" else device
