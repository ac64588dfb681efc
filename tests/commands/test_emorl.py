"""`rlae-jax emorl ...` as a user meets it: a run from its beginning to its export, and what is told about mistakes."""

import json
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.emorl import embedded
from rlae_jax.emorl.run import Run
from rlae_jax.models import LM, quantise, transformer

TINY = ("--steps", "8", "--batch", "4", "--validate-every", "4", "--validation-prompts", "4", "--max-new-tokens", "8")


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command; returns (exit status, standard output, standard error)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", "emorl", *map(str, arguments)])
        monkeypatch.setenv(commands.CACHE_VARIABLE, "off")
        status = 0
        try:
            commands.main()
        except SystemExit as ended:
            status = ended.code
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "base"
    params = transformer.init_params(embedded.MODEL, jax.random.key(0))
    LM(embedded.MODEL, params, embedded.make_tokenizer()).save(path)
    return path


def test_a_whole_run(call, base, tmp_path):
    run, objectives = tmp_path / "run", ["coverage", "brevity"]
    given = ("--base", base, "--data", "reflections", "--out", run, *TINY, "--targets", "q", "v")
    assert call("train", "--objective", *objectives, *given)[0] == 0
    assert call("search", "--run", run, "--levels", 1, "--prompts", 4)[0] == 0
    found = json.loads((run / "search" / "hidden" / "search.json").read_text())
    assert set(found["weights"]) == set(objectives)
    assert found["points"] == 9

    status, told, _ = call("evaluate", "--run", run, "--limit", 8)
    assert status == 0
    assert "greedy" in told
    assert "sampled at temperature 1" in told
    results = json.loads((run / "results.json").read_text())
    assert set(results["methods"]) == {"base", "single:coverage", "single:brevity", "equal", "hidden"}
    for row in results["methods"].values():
        np.testing.assert_allclose(row["score"], np.mean([row["scores"][name] for name in objectives]))
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 5 * 8
    assert {line["decoding"] for line in lines} == {"greedy", "sampled"}

    before = (run / "objectives/coverage/adapter/adapter_model.safetensors").read_bytes()
    assert call("train", "--out", run, "--objective", "warmth")[0] == 0  # base, data and settings are the run's own
    assert (run / "objectives/coverage/adapter/adapter_model.safetensors").read_bytes() == before
    for name in (*objectives, "warmth"):
        changed = load_file(run / "objectives" / name / "adapter" / "adapter_model.safetensors")
        assert {path.split(".")[-3] for path in changed} == {"q", "v"}
    status, told, _ = call("evaluate", "--run", run, "--limit", 4)
    assert "hidden: its weights were searched for coverage, brevity alone, without warmth" in told
    assert call("search", "--run", run, "--budget", 27, "--prompts", 4)[0] == 0
    assert (run / "search/hidden/weights.png").is_file()
    assert json.loads((run / "search/hidden-coverage+brevity/search.json").read_text()) == found
    status, told, _ = call(
        "search", "--run", run, "--method", "random", "--budget", 3, "--mode", "params", "--prompts", 4
    )
    assert "best of 3 points" in told

    out = tmp_path / "export"
    assert call("export", "--run", run, "--out", out, "--weights", 0.5, 1, 0)[0] == 0
    weights = json.loads((out / "weights.json").read_text())["weights"]
    assert weights == {"coverage": 0.5, "brevity": 1.0, "warmth": 0.0}
    fused, prompts = rj.load(out / "model"), ["i worry about money , work , and also mother , sleep and fear ."]
    many = rj.load(base).with_adapters([out / "adapters" / name for name in weights])
    ids = np.array([fused.tokenizer(prompts[0])["input_ids"]])
    start = np.zeros((1, 1), np.int32)
    expected = many.logits(ids, None, start, adapters=np.array([list(weights.values())], np.float32))
    np.testing.assert_allclose(fused.logits(ids, None, start), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.rare
def test_what_failed_at_once_can_be_begun_again(call, base, tmp_path):
    (tmp_path / "broken.py").write_text(
        "import pathlib\nseen = pathlib.Path(__file__).with_suffix('.seen')\n"
        "if seen.exists(): raise ValueError('not twice')\nseen.touch()\ndef score(prompt, answer): return 0.5\n"
    )
    (tmp_path / "mended.py").write_text("def score(prompt, answer):\n    return 0.5\n")
    given = ("train", "--base", base, "--data", "reflections", "--out", tmp_path / "run", *TINY)
    status, _, error = call(*given, "--objective", f"{tmp_path}/broken.py:score")
    assert (status, "not twice" in error) == (2, True)
    assert call(*given, "--objective", f"{tmp_path}/mended.py:score")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["train", "--objective", "brevity", "--out", "RUN"], "--base MODEL and --data FILE"),
        (
            ["train", "--base", "BASE", "--data", "reflections", "--objective", "wit", "--out", "RUN"],
            "'wit' is unknown",
        ),
        (
            ["train", "--base", "BASE", "--data", "reflections", "--objective", "brevity", "brevity", "--out", "RUN"],
            "more than once",
        ),
        (["train", "--base", "BASE", "--data", "no.csv", "--objective", "brevity", "--out", "RUN"], "no.csv"),
        (["search", "--run", "RUN"], "is not there"),
        (["evaluate", "--run", "BASE"], "is no run of emorl train"),
        (["export", "--run", "BASE", "--out", "OUT"], "is no run of emorl train"),
    ],
)
def test_mistakes_are_told_in_one_line(call, base, tmp_path, arguments, told):
    places = {"RUN": tmp_path / "run", "BASE": base, "OUT": tmp_path / "out"}
    status, _, error = call(*(places.get(argument, argument) for argument in arguments))
    assert status == 2
    assert told in error
    assert len(error.splitlines()) == 1


def test_adapters_over_a_quantised_base(call, base, tmp_path):
    """The run remembers how its base is held."""
    run = tmp_path / "run"
    given = ("--base", base, "--data", "reflections", "--out", run, *TINY, "--targets", "q", "v")
    assert call("train", "--objective", "coverage", "brevity", *given, "--quantise", "int8")[0] == 0
    assert json.loads((run / "config.json").read_text())["base"]["quantise"] == "int8"
    held = Run(run).base.params
    assert set(quantise.forms(held)) == {"int8"}
    assert call("search", "--run", run, "--levels", 1, "--prompts", 4)[0] == 0
    status, _, told = call("train", "--objective", "coverage", *given, "--quantise", "int4", "--quantise-group", 5)
    assert status != 0
    assert "quantise-group" in told
