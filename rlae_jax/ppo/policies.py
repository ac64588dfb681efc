"""A policy by what it is called on a command line: a name of those that need no training, or a run's directory."""

from pathlib import Path

from rlae_jax.errors import InputError
from rlae_jax.fusion.policy import NAMED_POLICIES
from rlae_jax.fusion.weights import Weights
from rlae_jax.ppo.train import load_policy


def get_policy(name: str) -> Weights:
    """What `Ensemble.generate` takes as weights. A directory of that name goes before a policy without training.

    Raises:
      InputError: neither a known name nor a run with a trained agent.
    """
    if Path(name).is_dir():
        return load_policy(name)
    if name not in NAMED_POLICIES:
        raise InputError(f"{name} is not a run directory, and no policy either; known: {', '.join(NAMED_POLICIES)}")
    return name
