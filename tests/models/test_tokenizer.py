"""What the import of transformers says to a user."""

import os
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
    # Where CI is set, transformers sends its records to the root logger as well.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "[transformers] a real warning",
        "[transformers] PyTorch was not found here either",
    ]
