"""Tiny Hugging Face checkpoints of every supported family, and what transformers computes from them.

A family (`llama_like`, `gpt_like`, `t5`, `encoders`) is a handful of hand-picked cases, stored under
tests/data/reference, and `sample`, which draws a random case for live comparisons. `checkpoints` writes a case to disk
without torch; `torch_models` builds and runs it with transformers.
"""

from tests.data.hf.cases import Fields as Fields
from tests.data.hf.cases import Kind as Kind
from tests.data.hf.checkpoints import DECODER_LENGTH as DECODER_LENGTH
from tests.data.hf.checkpoints import REFERENCE as REFERENCE
from tests.data.hf.checkpoints import Stored as Stored
from tests.data.hf.checkpoints import make_inputs as make_inputs
from tests.data.hf.checkpoints import read_reference as read_reference
from tests.data.hf.checkpoints import read_stored as read_stored
from tests.data.hf.checkpoints import write_checkpoint as write_checkpoint
from tests.data.hf.families import FAMILIES as FAMILIES
from tests.data.hf.torch_models import NEW_TOKENS as NEW_TOKENS
from tests.data.hf.torch_models import build as build
from tests.data.hf.torch_models import compute as compute
from tests.data.hf.torch_models import from_pretrained as from_pretrained
from tests.data.hf.torch_models import refer as refer
