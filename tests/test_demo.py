"""The demo from end to end, with everything made small: what it leaves, what it reuses, what it never overwrites."""

import dataclasses
import json

import pytest

from rlae_jax import demo, files, specialists
from rlae_jax.config import PPOConfig
from rlae_jax.demo import DemoSettings, run_demo, verdict
from rlae_jax.evaluation import searches
from rlae_jax.tasks import skills

SETTINGS = DemoSettings(specialist_steps=60, iterations=2, test_prompts=12)
METHODS = ["single:reverse_increment", "single:sort_complement", "uniform", "static", "confidence", "schedule"]
METHODS += ["router", "rlae_ppo"]


@pytest.fixture
def small(monkeypatch):
    tiny = dataclasses.replace(
        specialists.PAIR_MODEL, width=16, layers=1, heads=2, kv_heads=2, head_width=8, ffn_width=16
    )
    monkeypatch.setattr(specialists, "PAIR_MODEL", tiny)
    monkeypatch.setattr(searches, "SEARCH_PROMPTS", 12)
    monkeypatch.setattr(searches, "STATIC_STEP", 0.5)
    monkeypatch.setattr(skills, "EXAMPLES", {"train": 40, "dev": 12, "test": 24})
    original = skills.specialist_sequences
    monkeypatch.setattr(skills, "specialist_sequences", lambda *args: tuple(part[::100] for part in original(*args)))
    settings = PPOConfig.demo

    def few_prompts(**changes):
        return settings(prompts=12, epochs=1, minibatches=1, **changes)

    monkeypatch.setattr(demo.PPOConfig, "demo", few_prompts)


@pytest.mark.slow
def test_the_demo(small, tmp_path, monkeypatch, capsys):
    out = tmp_path / "demo"
    results = run_demo(0, out, SETTINGS)
    for name in ("config.json", "metrics.jsonl", "results.json", "predictions.jsonl", "curve.png", "weights.png"):
        assert (out / name).stat().st_size > 0, name
    assert any((out / "checkpoints").iterdir())
    assert files.read_json(out / "results.json") == results
    assert list(results["methods"]) == METHODS
    assert {method["n"] for method in results["methods"].values()} == {12}
    assert {"schema", "task", "split", "methods", "seconds", "environment", "verdict"} <= set(results)
    assert {"specialists", "training", "evaluation", "total"} <= set(results["seconds"])
    assert len((out / "metrics.jsonl").read_text().splitlines()) == SETTINGS.iterations
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 12 * len(METHODS)
    printed = capsys.readouterr().out
    printed = "".join(printed.split())  # lines are wrapped to the terminal
    assert "".join(results["verdict"].split()) in printed
    assert all(name in printed for name in METHODS)
    directories = sorted(out.glob("specialists/*/*"))
    assert [path.name for path in directories] == sorted(skills.SPECIALISTS)
    for path in directories:
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in path.iterdir()}

    # Again: nothing is trained a second time, and the scores are the same.
    with monkeypatch.context() as patched:

        def pretrain(*args, **kwargs):
            raise AssertionError("a specialist was trained again")

        patched.setattr(specialists, "pretrain", pretrain)
        again = run_demo(0, out, SETTINGS)
    assert "reusing" in capsys.readouterr().out
    scores = {name: method["score"] for name, method in results["methods"].items()}
    assert {name: method["score"] for name, method in again["methods"].items()} == scores

    # Another seed takes the directory and moves the first one's files, which come back with their seed.
    first = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other = run_demo(1, out, SETTINGS)
    assert json.loads((out / "config.json").read_text())["settings"]["seed"] == 1
    kept = tmp_path / "demo-seed0"
    assert {p.relative_to(kept): p.read_bytes() for p in kept.rglob("*") if p.is_file()} == first
    assert files.read_json(out / "results.json") == other
    demo._take_directory(out, 0)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == first
    assert (tmp_path / "demo-seed1" / "results.json").is_file()


def test_a_directory_of_another_run_is_refused_before_anything_is_trained(
    small, tmp_path, monkeypatch, raises_input_error
):
    def pretrain(*args, **kwargs):
        raise AssertionError("a specialist was trained for nothing")

    monkeypatch.setattr(specialists, "pretrain", pretrain)
    path = tmp_path / "config.json"
    for seed in (0, 5):
        path.write_text(json.dumps({"schema": 1, "task": "mine", "settings": {"seed": seed}}))
        before = path.read_bytes()
        raises_input_error(lambda: run_demo(0, tmp_path, SETTINGS), str(tmp_path))
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


class TestVerdict:
    def methods(self, agent, best):
        table = {name: {"score": 0.2, "ci95": [0.18, 0.22], "n": 100} for name in METHODS}
        table["schedule"] = {"score": best, "ci95": [best - 0.02, best + 0.02], "n": 100}
        table["rlae_ppo"] = {"score": agent, "ci95": [agent - 0.02, agent + 0.02], "n": 100}
        return table

    @pytest.mark.parametrize(
        ("agent", "best", "part"),
        [(0.9, 0.6, "makes the difference"), (0.6, 0.9, "worse than schedule"), (0.61, 0.6, "does not show")],
    )
    def test_it_says_what_the_intervals_allow(self, agent, best, part):
        sentence = verdict(self.methods(agent, best))
        assert part in sentence
        assert f"{agent:.1%} of 100" in sentence
        assert "(schedule)" in sentence
        assert "\n" not in sentence
