"""Verdicts and checks of the study of EMORL's claims, on results made by hand."""

import numpy as np
import pytest

from benchmarks import claims_emorl as study

SEEDS = 5
SCORES = {
    "base": 0.4,
    "coverage": 0.55,
    "brevity": 0.3,
    "warmth": 0.5,
    "uniform_reward": 0.8,
    "dynaopt": 0.7,
    "dynaopt_reference": 0.72,
    "hidden": 0.7,
    "probs": 0.72,
    "loglinear": 0.7,
    "params": 0.71,
    "rlae_ppo": 0.78,
    "uniform_reward, equal data": 0.79,
    "uniform_reward, grpo": 0.8,
    "hidden, grpo": 0.72,
    "rlae_ppo, sampled": 0.76,
    "rlae_ppo, grpo": 0.8,
}


def measured(three=SCORES, fused_four=0.6):
    four = {**dict.fromkeys(study.FOUR, 0.4), "base": 0.4, study.UNIFORM_FOUR: 0.65, study.FUSED_FOUR: fused_four}

    def results(scores, seed):
        rows = {name: {"score": score + 0.004 * seed} for name, score in scores.items()}
        return {"methods": rows, "sampled": {"methods": rows}}

    def training(steps, seed):
        return {
            "steps": steps + 8 * seed,
            "data_points": (steps + 8 * seed) * 48,
            "points_to_95_percent": 1_000,
            "validation_points": 500,
        }

    def searched(score, answers):
        correlations = {"coverage": 0.8, "brevity": 0.7, "warmth": -0.1}
        return {"score": score, "answers": answers, "evaluations": 80, "rank_correlations": correlations}

    names = (*study.FOUR, *study.BASELINES, study.UNIFORM_FOUR)
    searches = {name: searched(0.7, 5_000) for name in ("hidden", "probs", "loglinear", "params", "four")}
    searches |= {f"grid-{mode}": searched(0.705, 40_000) | {"evaluations": 400} for mode in ("hidden", "probs")}
    searches |= {f"{mode}-beams": searched(0.702, 12_000) | {"evaluations": 200} for mode in ("hidden", "probs")}
    return study.Measurements(
        three=[results(three, seed) for seed in range(SEEDS)],
        four=[results(four, seed) for seed in range(SEEDS)],
        training=[{name: training(200, seed) for name in names} for seed in range(SEEDS)],
        searches=[searches] * SEEDS,
        times={"stacked": 2.0, "coverage": 1.0, "brevity": 1.0, "warmth": 1.0, "uniform_reward": 1.0},
    )


def verdicts(results):
    return {row["claim"]: row["verdict"] for row in [*study.cost_claims(results), *study.score_claims(results)]}


def test_verdicts_as_they_come_out():
    told = verdicts(measured())
    assert told["E1 less than uniform_reward, training"] == "fails"  # three adapters of as many steps
    assert told["E1 less than uniform_reward, largest adapter"] == "fails"  # exactly as many
    assert told["E3 weights can be read, hidden, coverage"] == "holds"
    assert told["E3 weights can be read, hidden, warmth"] == "fails"
    assert told["E4 comparable to dynaopt (at most 0.05 below), greedy"] == "holds"
    assert told["E4 comparable to uniform_reward (at most 0.05 below), greedy"] == "fails"
    assert told["E4 above best single, greedy"] == "holds"
    assert told["E5 hidden above probs, greedy"] == "fails"
    assert told["E6 search as good as the full grid, hidden"] == "holds"
    assert told["E6 search as good as the full grid, probs, 3 boxes"] == "holds"
    assert told["E4' rlae_ppo above uniform_reward, equal data, greedy"] == "fails"
    assert told["E4' rlae_ppo, grpo above uniform_reward, equal data, sampled"] == "holds"
    assert told["E4' hidden, grpo above hidden, greedy"] == "holds"
    assert told["an agent's weights above fixed ones"] == "holds"


def test_accounts_count_what_they_say():
    table = study.accounts(measured())
    steps = 200 + 8 * np.arange(SEEDS)
    np.testing.assert_allclose(table["hidden"]["training"], 3 * 48 * steps)
    np.testing.assert_allclose(table["hidden"]["largest adapter"], 48 * steps)
    np.testing.assert_allclose(table["hidden"]["search"], 5_000)
    np.testing.assert_allclose(table["hidden"]["seconds, one after another"], 3 * steps / 8)
    np.testing.assert_allclose(table["hidden"]["seconds, stacked"], 2 * steps / 8)  # all three end together
    np.testing.assert_allclose(table["uniform_reward"]["seconds, stacked"], steps / 8)


def test_checks_can_pass_and_fail():
    passed = {check["name"]: check["ok"] for check in study.make_checks(measured())}
    assert passed == dict.fromkeys(
        (
            *("base_low", "single_low", "hidden_gain", "fourth_ratio"),
            *("search_gap", "search_gap_beams", "agent_gain"),
        ),
        True,
    )
    bad = {**SCORES, "base": 0.6, "brevity": 0.68, "rlae_ppo": 0.71}
    failed = [check["name"] for check in study.make_checks(measured(bad, fused_four=0.5)) if not check["ok"]]
    assert failed == ["base_low", "single_low", "hidden_gain", "fourth_ratio", "agent_gain"]


@pytest.mark.parametrize("way", ["greedy", "sampled"])
def test_every_seed_is_shown(way):
    cells = study.score_cells(measured(), way)
    assert all(len(row[-1].split()) == SEEDS for row in cells)


def test_searches_with_their_cost():
    cells = study.search_cells(measured())
    assert len(cells) == 2 * SEEDS
    assert cells[0] == ("hidden", "0", "0.705", "+0.0050", "+0.0030", "400 80 200", "+120 (2.5 times)")


def test_a_band_carries_what_has_ended():
    """A curve of another length and other places: by hand, between and beyond its points."""
    x, mean, low, high = study.band([[(0, 0.0), (100, 1.0)], [(50, 0.0), (200, 0.6)]])
    assert x == [50, 100, 200]
    np.testing.assert_allclose(mean, [(0.5 + 0.0) / 2, (1.0 + 0.2) / 2, (1.0 + 0.6) / 2])
    assert all(a < b < c for a, b, c in zip(low, mean, high, strict=True))
    assert study.band([[(0, 0.1), (9, 0.2)]]) == ([0, 9], [0.1, 0.2], [0.1, 0.2], [0.1, 0.2])
