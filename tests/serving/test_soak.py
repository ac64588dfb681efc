"""The soak test's short form: a server of its own, clients of whom some vanish, and every answer is `generate`'s."""

import asyncio
import sys

import numpy as np
import pytest

import rlae_jax as rj
from benchmarks import soak
from rlae_jax.commands.main import CACHE_VARIABLE
from tests.helpers.tokenizers import byte_level

SECONDS = 4


@pytest.mark.rare
@pytest.mark.skipif(sys.platform != "linux", reason="reads a process's memory in /proc")
def test_a_few_seconds(tmp_path, make_lm, monkeypatch):
    tokenizer = byte_level([b" a", b"bc"])
    models = [str(tmp_path / name) for name in ("one", "two")]
    for k, model in enumerate(models):
        fields = {"vocab": len(tokenizer), "layers": 1, "context": 256, "end_ids": (tokenizer.eos_token_id,)}
        make_lm(k, tokenizer=tokenizer, **fields).save(model)
    pool = soak.draw(rj.Ensemble([rj.load(model) for model in models]), 12, soak.KINDS[1:4])
    monkeypatch.setenv(CACHE_VARIABLE, "off")
    with soak.server(models, "--slots", "2") as (address, process):
        found = asyncio.run(soak.soak(address, process, pool, 2, SECONDS))
        pool[0].texts[0] += "what nobody writes"
        mistaken = asyncio.run(soak.soak(address, process, pool, 2, SECONDS / 4))
    assert found["right"] > found["vanished"] > 0
    assert found["wrong"] == found["lost"] == found["left_in_slots"] == found["compiles"] == 0, found["first_fault"]
    assert found["growth"] < 0.5
    assert mistaken["wrong"] > 0
    assert "what nobody writes" in mistaken["first_fault"]


def test_growth_is_from_a_quarter_of_the_time_to_the_end():
    seconds = np.arange(0.0, 1201.0)
    tally = soak.Tally(memory=[(at, 1000 + int(at > 200) * 100 + int(at > 1000) * 11) for at in seconds])
    assert tally.growth() == pytest.approx(0.01)
