"""Every family that has tiny checkpoints, by the name of its reference files."""

from tests.data.hf import encoders, gpt_like, llama_like, recent, t5

FAMILIES = llama_like.FAMILIES | recent.FAMILIES | gpt_like.FAMILIES | t5.FAMILIES | encoders.FAMILIES
