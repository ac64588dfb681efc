"""Every family that has tiny checkpoints, by the name of its reference files."""

from tests.data.hf import encoders, gpt_like, llama_like, mixtures, recent, recurrent, t5

_MODULES = (llama_like, recent, mixtures, recurrent, gpt_like, t5, encoders)
FAMILIES = {name: family for module in _MODULES for name, family in module.FAMILIES.items()}
