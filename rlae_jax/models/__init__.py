"""Language models as Flax NNX modules, loaded from Hugging Face checkpoints. Knows nothing of ensembles."""

from rlae_jax.models.config import ModelConfig as ModelConfig
from rlae_jax.models.encoder import Encoder as Encoder
from rlae_jax.models.encoder import load_encoder as load_encoder
from rlae_jax.models.lm import LM as LM
from rlae_jax.models.lm import init_adapter as init_adapter
from rlae_jax.models.lm import load as load
from rlae_jax.models.lm import load_adapter as load_adapter
from rlae_jax.models.lm import save as save
from rlae_jax.models.lm import save_adapter as save_adapter
from rlae_jax.models.lora import Adapter as Adapter
from rlae_jax.models.lora import LoraConfig as LoraConfig
