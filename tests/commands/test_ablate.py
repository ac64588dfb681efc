"""`rlae-jax ablate` as a user meets it: a grid, mistakes that are told before models are read, how to go on."""

import json
import sys

import pytest

import rlae_jax as rj
from rlae_jax import ablate as ablation
from rlae_jax.commands import main as commands
from rlae_jax.commands.options import ModelOptions, TaskOptions
from tests.helpers import toys


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture
def call(monkeypatch, capsys, ensemble):
    """call(*arguments) -> (exit status, standard output, standard error), with the toys in place of any models."""
    monkeypatch.setenv(commands.CACHE_VARIABLE, "off")
    monkeypatch.setattr(ModelOptions, "load", lambda self: ensemble)
    monkeypatch.setattr(TaskOptions, "load", lambda self: toys.task())

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", "ablate", "--models", "a", "b", *map(str, arguments)])
        capsys.readouterr()
        try:
            commands.main()
        except SystemExit as ending:
            return (ending.code or 0, *capsys.readouterr())
        return (0, *capsys.readouterr())

    return run


SMALL = ("--iterations", 1, "--set", "prompts=8", "epochs=1", "--set", "agent.ffn_width=8", "span_length=1")


@pytest.mark.rare  # the library's ablations are in tests/test_ablate.py
def test_a_grid(call, tmp_path):
    out = tmp_path / "out"
    vary = ("--vary", "agent.projection=4", "--vary", "algo=ppo")
    status, printed, errors = call("--out", out, *SMALL, *vary, "--seeds", 2)
    assert status == 0, errors
    assert "agent.projection" in printed
    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [0, 1]
    assert (results["base"]["prompts"], results["base"]["agent"]["ffn_width"]) == (8, 8)
    assert [cell["error"] for cell in results["cells"]] == [None]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ("nothing to vary",)),
        (("--vary", "span_lenght=2"), ("'span_lenght'", "span_length")),
        (("--vary", "seed=1", "--set", "promts=2"), ("'promts'", "prompts")),
        (("--vary", "prompts=0"), ("every cell failed", "prompts is 0; expected a whole number of at least 1")),
        (("--vary", "seed=1", "--limit", "0"), ("--limit",)),
        (("--vary", "seed=1", "--iterations", "0"), ("--iterations 0: expected a whole number of at least 1",)),
    ],
)
def test_what_is_wrong_is_told_before_models_are_read(call, tmp_path, monkeypatch, options, parts):
    monkeypatch.setattr(ModelOptions, "load", None)
    status, out, errors = call("--out", tmp_path / "out", *options)
    assert (status, out) == (2, "")
    assert [part for part in parts if part not in errors] == []
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(call, tmp_path, monkeypatch):
    def stop(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "train_seeds", stop)
    status, _, errors = call("--out", tmp_path / "out", "--vary", "encoder=text:a b,hidden", "--seeds", 1)
    assert status == 130
    assert "Go on with:\n  rlae-jax ablate --models a b" in errors
    assert errors.rstrip().endswith("--vary 'encoder=text:a b,hidden' --seeds 1 --resume")
