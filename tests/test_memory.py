"""Work is counted before it is begun: points, combinations, bytes."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import ablate, memory
from rlae_jax.emorl.search import SearchConfig, require_points
from rlae_jax.errors import InputError
from rlae_jax.fusion import search
from rlae_jax.ppo.train import train_seeds
from rlae_jax.tasks import skills


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 20 MB."""
    monkeypatch.setattr(memory, "of_host", lambda: 20_000_000)


@pytest.fixture(scope="module")
def pair(make_lm: Any) -> rj.Ensemble:
    return rj.Ensemble([make_lm(k, layers=1, context=64) for k in range(2)], end_ids=())


def test_bytes_are_compared_with_what_there_is(little: None) -> None:
    memory.require(20_000_000, "this", "less")
    with pytest.raises(InputError, match=r"this: at least 20\.1 MB of memory, and there are 20 MB; less"):
        memory.require(20_100_000, "this", "less")


def test_this_machine_says_how_much_it_has() -> None:
    there = memory.of_host()
    assert there is not None
    assert 2**28 < there < 2**50


def test_answers_are_counted_before_they_are_written(little: None, pair: rj.Ensemble) -> None:
    prompts = np.ones((2, 4), np.int32)
    with pytest.raises(InputError, match=r"2,000,000 answers at once, of 12 tokens: at least .* give fewer"):
        pair.generate(prompt_ids=prompts, samples=1_000_000, temperature=1.0, max_new_tokens=8)
    assert pair.generate(prompt_ids=prompts, max_new_tokens=2).steps == [2, 2]


def test_slots_of_an_engine_are_counted(little: None, pair: rj.Ensemble) -> None:
    with pytest.raises(InputError, match="1,000,000,000 answers at once, of 64 tokens"):
        rj.Engine(pair, slots=10**9)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"prompts": 2**31 - 1}, "answers at once"),
        ({"seeds": 10**9}, "answers at once"),
        ({"prompts": 8, "epochs": 10_000, "samples": 100}, "decisions of an iteration"),
        ({"prompts": 1, "agent": rj.AgentConfig(projection=60_000, ffn_width=60_000)}, "agents of these widths"),
    ],
)
def test_training_is_counted_before_it_begins(
    little: None, pair: rj.Ensemble, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    config = dataclasses.replace(rj.PPOConfig(span_length=1, max_new_tokens=8), **settings)
    with pytest.raises(InputError, match=told):
        train_seeds(pair, skills.skills(), config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "dimensions", "told"),
    [
        ({"method": "grid", "step": 1e-9}, 3, r"about 10^27 points, of which 100,000 can be tried; a step of 0.0222"),
        ({"method": "grid", "step": 0.1, "budget": 100}, 3, "1,331 points, of which 100 can be tried; a step of 0.333"),
        ({"method": "grid", "step": 1.0, "budget": 3}, 2, "4 points, of which 3 can be tried; give a larger budget"),
        ({"method": "grid", "step": 0.5}, 300, "about 10^143 points, of which 100,000 can be tried; try fewer weights"),
        ({"method": "grid", "step": 1e-5, "space": "simplex"}, 3, "5,000,150,001 points"),
        ({"method": "random", "budget": 10**9}, 2, "1,000,000,000 points"),
        ({"method": "halving"}, 40, "points, of which 100,000"),
        ({"levels": 100}, 12, "a search of 100 levels"),
    ],
)
def test_points_are_counted_before_they_are_made(settings: dict[str, Any], dimensions: int, told: str) -> None:
    with pytest.raises(InputError, match=re.escape(told)):
        require_points(SearchConfig(**settings), dimensions)


def test_functions_of_a_search_count_theirs() -> None:
    known = search.Scores(lambda points: points)
    for call in (
        lambda: search.grid(known, 3, 1e-9),
        lambda: search.grid(known, 3, 1e-9, "simplex"),
        lambda: search.draw(3, 10**10),
        lambda: search.hierarchical(known, 14),
        lambda: search.hierarchical(known, 14, space="simplex"),
    ):
        with pytest.raises(InputError, match="100,000 can be tried"):
            call()


def test_a_smaller_step_that_is_told_is_one_that_goes() -> None:
    for dimensions in (2, 3, 5):
        for space in search.SPACES:
            with pytest.raises(InputError, match="a step of") as caught:
                search.require_grid(dimensions, 1e-7, space)
            told = re.search(r"a step of (\S+) gives", str(caught.value))
            assert told
            search.require_grid(dimensions, 1 / round(1 / float(told[1])), space)


def test_combinations_are_counted() -> None:
    values = {name: list(range(1, 12)) for name in ("prompts", "samples", "epochs", "seeds")}
    with pytest.raises(InputError, match="14,641 combinations, of which 1,000 can be trained"):
        ablate.make_cells(rj.PPOConfig(), values)
