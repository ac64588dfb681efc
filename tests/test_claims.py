"""Verdicts and checks of the study of RLAE's claims, on results made by hand."""

import json

import numpy as np
import pytest

from benchmarks import claims_rlae as study
from rlae_jax import statistics

SEEDS, PROMPTS = 5, 200
BASELINES = ("single:a", "uniform", "static", "schedule", "router", "shuffled", "oracle")


def results(task, scores, seed=0):
    """A results.json of methods with these chances to be right; the same prompts are hard for all."""
    rng = np.random.default_rng(seed)
    luck = rng.random((SEEDS, PROMPTS))
    rewards = {name: (luck < chance).astype(float) for name, chance in scores.items()}
    methods = {}
    for name, table in rewards.items():
        methods[name] = {
            "score": table.mean(),
            "ci95": list(statistics.interval95(table)),
            "per_seed": table.mean(axis=1).tolist(),
        }
    methods["oracle"]["reference"] = True
    agents = [name for name in rewards if name.startswith("rlae_")]
    pairs = [(a, b) for i, a in enumerate(agents) for b in rewards if b not in agents[: i + 1] and b != "oracle"]
    found = [statistics.paired_difference(rewards[a], rewards[b]) for a, b in pairs]
    corrected = statistics.holm([one.p for one in found])
    rows = [
        {"a": a, "b": b, "difference": one.difference, "ci95": list(one.ci95), "p": one.p, "p_holm": p}
        for (a, b), one, p in zip(pairs, found, corrected, strict=True)
    ]
    return {"task": task, "methods": methods, "differences": rows}


def chances(agent, other=0.3, **more):
    return dict.fromkeys(BASELINES, other) | {"oracle": 0.9} | more | {"rlae_ppo": agent, "rlae_mappo": agent}


@pytest.fixture(scope="module")
def tables():
    return {
        "skills3": results("skills3", chances(0.7, schedule=0.5)),
        "noisy": results("noisy", chances(0.5, router=0.52)),
        "twins": results("twins", chances(0.3)),
        "dominant": results("dominant", chances(0.4)),
    }


def verdicts(tables):
    return {row["claim"]: row["verdict"] for row in study.score_claims(tables)}


def test_verdicts_as_they_come_out(tables):
    found = verdicts(tables)
    assert found["R1 rlae_ppo above the best baseline, skills3"] == "holds"
    assert found["R1 rlae_ppo above the best baseline, noisy"] == "fails"  # by the router
    assert found["R1 rlae_ppo above every baseline on every task"] == "fails"
    assert found["R1 dynamic weights help rlae_ppo, skills3"] == "holds"
    assert found["R1 dynamic weights help rlae_ppo, noisy"] == "fails"
    assert found["R2 rlae_mappo works"] == "holds"
    assert found["R2 which is better, skills3"] == "no difference shown"
    assert found["control: no gain for rlae_ppo, twins"] == "holds"
    assert found["control: no gain for rlae_ppo, dominant"] == "fails"
    assert not any("oracle" in row["measurement"] for row in study.score_claims(tables))


def test_the_best_baseline_is_no_reference_and_no_agent(tables):
    assert study.best_baseline(tables["skills3"]) == "schedule"
    assert study.best_baseline(tables["noisy"]) == "router"


@pytest.mark.parametrize(
    ("of", "verdict"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "undecided"], "undecided"),
        (["undecided", "fails"], "fails"),
    ],
)
def test_several_claims_at_once(of, verdict):
    assert study.all_of(of) == verdict


def test_signs():
    assert [study.sign_verdict(i) for i in ((0.1, 0.2), (-0.1, 0.1), (-0.2, -0.1))] == ["holds", "undecided", "fails"]
    small = {"difference": 0.1, "p_holm": 0.2, "ci95": [0.01, 0.2]}
    assert study.better(small) == "undecided"  # an interval alone is not corrected for the number of comparisons


def test_checks_need_gain_and_certainty(tables):
    times = [{"method": "rlae_ppo", "ratio_per_token": 1.1}, {"method": "rlae_mappo", "ratio_per_token": 1.3}]
    checks = {check["name"]: check for check in study.make_checks(tables, times)}
    assert checks["ppo_skills3_gain"]["value"] == pytest.approx(
        min(study.difference(tables["skills3"], "rlae_ppo", other)["difference"] for other in ("uniform", "static"))
    )
    assert checks["ppo_skills3_gain"]["ok"]
    assert checks["ppo_skills3_gain_p"]["ok"]
    assert checks["twins_bound"]["value"] == 0
    assert not checks["dominant_bound"]["ok"]
    assert checks["shuffled_loss"]["value"] == pytest.approx(1.0)
    assert checks["ms_ratio"]["value"] == 1.3
    assert not checks["ms_ratio"]["ok"]


def test_transfer_leaves_out_the_diagonal_and_the_controls(tables):
    columns = ["skills3", "noisy", "twins"]
    static = {task: tables[task]["methods"]["static"]["per_seed"] for task in columns}
    per_seed = [
        [[s + (0.5 if r == c else 0.1 if (r, c) == ("noisy", "skills3") else -0.3) for s in static[c]] for c in columns]
        for r in columns
    ]
    matrix = {"rows": columns, "columns": columns, "per_seed": per_seed}
    (row,) = study.transfer_claims(tables, {"rlae_ppo": matrix})
    assert row["value"] == pytest.approx((0.1 - 0.3) / 2)
    assert "-20% of the gain at home" in row["measurement"]
    assert "1 of 2 cells" in row["measurement"]
    assert row["verdict"] == "fails"


def test_how_long_training_took_to_reach_a_score(tmp_path):
    rows = [{"iteration": i, "seconds": 2.0} | ({"dev": i / 10} if i % 2 == 0 else {}) for i in range(1, 7)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert study.seconds_to(tmp_path, 0.3) == 8.0
    assert study.seconds_to(tmp_path, 0.7) is None
    assert study.seconds_to(tmp_path, float("inf")) == 12.0


def test_another_plan_takes_another_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(study.specialists, "fingerprint", lambda name, seed, quick: name)
    study.claim_directory(tmp_path / "out", study.QUICK)
    study.claim_directory(tmp_path / "out", study.QUICK)
    with pytest.raises(SystemExit, match="other settings"):
        study.claim_directory(tmp_path / "out", study.FULL)
