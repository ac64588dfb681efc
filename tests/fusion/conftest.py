"""Models that several tests of this folder share."""

import json

import pytest

import rlae_jax as rj
from tests.data import hf


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> rj.LM:
    stored = hf.Stored(**json.loads((hf.REFERENCE / "t5.json").read_text())["untied"])
    directory = tmp_path_factory.mktemp("t5") / "t5"
    hf.write_checkpoint(directory, stored.config, stored.tensors, stored.seed)
    return rj.load(directory)
