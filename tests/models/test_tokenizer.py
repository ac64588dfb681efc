"""What the import of transformers says to a user."""

import subprocess
import sys

CODE = """
import logging
from rlae_jax.models.tokenizer import import_transformers

import_transformers()
logging.getLogger("transformers").warning("a real warning")
logging.getLogger("transformers.modeling").warning("PyTorch was not found here either")
"""


def test_the_advice_to_install_torch_alone_is_left_out():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "[transformers] a real warning",
        "[transformers] PyTorch was not found here either",
    ]
