"""Language models as Flax NNX modules, loaded from Hugging Face directories. Knows nothing of ensembles."""

from rlae_jax.models.config import ModelConfig as ModelConfig
from rlae_jax.models.lm import LM as LM
from rlae_jax.models.lm import load as load
