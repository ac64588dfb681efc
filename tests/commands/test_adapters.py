"""An agent over adapters that others made: two PEFT directories of different make, from training to answers."""

import json
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.specialists import make_pair_tokenizer
from rlae_jax.tasks import skills

PROMPTS = ["rs4821=", "d13=", "a"]
TRAIN = ["--iterations", 1, "--prompts", 8, "--eval-every", 1, "--eval-prompts", 3, "--span-length", 2]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a command; returns (exit status, standard output, standard error)."""
    monkeypatch.setenv(commands.CACHE_VARIABLE, "off")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *map(str, arguments)])
        status = 0
        try:
            commands.main()
        except SystemExit as ended:
            status = ended.code or 0
        told = capsys.readouterr()
        return status, told.out, told.err

    return run


def write_peft(directory, base, seed, modules, *, r, alpha, suffix="", stabilised=False, ranks=None, alphas=None):
    """A PEFT adapter with random factors on some modules, and what it adds to the base's kernels, written out."""
    rng, tensors, added = np.random.default_rng(seed), {}, {}
    for key, kernel in load_file(base / "model.safetensors").items():
        name = key.removesuffix(".weight")
        last = name.rsplit(".", 1)[-1]
        if last not in modules:
            continue
        rank = (ranks or {}).get(last, r)
        a, b = rng.normal(size=(rank, kernel.shape[1])), rng.normal(size=(kernel.shape[0], rank)) / 3
        tensors[f"base_model.model.{name}.lora_A{suffix}.weight"] = a.astype(np.float32)
        tensors[f"base_model.model.{name}.lora_B{suffix}.weight"] = b.astype(np.float32)
        scale = (alphas or {}).get(last, alpha) / (rank**0.5 if stabilised else rank)
        added[key] = scale * b @ a
    directory.mkdir(parents=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    settings = {"r": r, "lora_alpha": alpha, "target_modules": modules, "use_rslora": stabilised, "bias": "none"}
    patterns = {"rank_pattern": ranks or {}, "alpha_pattern": alphas or {}}
    made_by = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"someone/{base.name}"}
    (directory / "adapter_config.json").write_text(json.dumps({**made_by, **settings, **patterns}))
    return added


@pytest.fixture(scope="module")
def world(tmp_path_factory, make_lm):
    """(base, adapters, each adapter merged into a model of its own by hand)."""
    root = tmp_path_factory.mktemp("adapters")
    base = root / "base"
    make_lm(0, vocab=len(skills.TOKENS), layers=1, context=40, end_ids=(1,), tokenizer=make_pair_tokenizer()).save(base)
    added = {
        "one": write_peft(root / "one/adapter", base, 1, ["q_proj", "v_proj"], r=4, alpha=8),
        "two": write_peft(
            *(root / "two/adapter", base, 2, ["k_proj", "gate_proj", "down_proj"]),
            **{"r": 2, "alpha": 6, "suffix": ".default", "stabilised": True},
            **{"ranks": {"down_proj": 3}, "alphas": {"gate_proj": 5}},
        ),
    }
    for name, changes in added.items():
        rj.load(base).save(root / "merged" / name)
        path = root / "merged" / name / "model.safetensors"
        tensors = load_file(path)
        save_file({key: (x + changes.get(key, 0)).astype(np.float32) for key, x in tensors.items()}, path)
        (path.parent / "digests.json").unlink()
    data = root / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"rs{i:04d}=", "answer": str(i % 10)}) + "\n" for i in range(60)))
    merged = [rj.load(root / "merged" / name) for name in added]
    return base, [root / name / "adapter" for name in added], merged, data


@pytest.mark.filterwarnings("ignore:adapters of different rank")
@pytest.mark.parametrize(
    "fusion", ["hidden", *(pytest.param(name, marks=pytest.mark.rare) for name in ("linear", "loglinear"))]
)
def test_an_agent_is_trained_evaluated_and_used(world, call, tmp_path, fusion):
    base, adapters, merged, data = world
    run = tmp_path / "run"
    model = ["--models", base, "--adapters", *adapters, "--fusion", fusion]
    task = ["--data", data, "--reward", "token_f1", "--max-new-tokens", 4]
    status, _, told = call("train", *model, *task, *TRAIN, "--out", run)
    assert status == 0, told
    policy = ["--policy", run]
    status, out, told = call(
        "evaluate", *model, *task, *policy, "--methods", "uniform", "--limit", 3, "--out", tmp_path / "e"
    )
    assert status == 0, told
    assert "was trained with" not in told
    assert set(json.loads((tmp_path / "e/results.json").read_text())["methods"]) == {"uniform", "rlae_ppo"}
    status, out, told = call("generate", *model, *policy, "--max-new-tokens", 4, "--prompt", *PROMPTS)
    assert status == 0, told
    # A head without caps: the head of a sum of states is the sum of what it makes of each.
    like = rj.Ensemble(merged, "loglinear" if fusion == "hidden" else fusion)
    expected = like.generate(PROMPTS, rj.load_policy(run), max_new_tokens=4).texts
    assert out.splitlines() == [prompt + text for prompt, text in zip(PROMPTS, expected, strict=True)]
    assert len(set(expected)) > 1
    members = [member["name"] for member in json.loads((run / "config.json").read_text())["members"]]
    assert members == ["one/adapter", "two/adapter"]


def test_members_are_the_adapters_merged_by_hand(world):
    base, adapters, merged, _ = world
    with pytest.warns(UserWarning, match="different rank"):
        ensemble = rj.Ensemble.from_adapters(rj.load(base), adapters)
    ids = np.random.default_rng(0).integers(2, 15, (3, 9))
    for member, alone in zip(ensemble.members, merged, strict=True):
        np.testing.assert_allclose(member.logits(ids), alone.logits(ids), rtol=1e-4, atol=1e-4)
    for weights in ([1, 3], [1, 0], [0, 1]):
        expected = rj.Ensemble(merged).generate(PROMPTS, weights, max_new_tokens=6).texts
        assert ensemble.generate(PROMPTS, weights, max_new_tokens=6).texts == expected


@pytest.mark.filterwarnings("ignore:adapters of different rank")
def test_what_cannot_be_fused_by_states(world, call, tmp_path):
    base, adapters, _, data = world
    status, _, told = call("train", "--models", base, "--fusion", "hidden", "--data", data, "--out", tmp_path / "out")
    assert status == 2
    assert told.count("\n") == 1
    assert "--fusion hidden" in told
    assert "--adapters" in told
    write_peft(tmp_path / "head", base, 3, ["q_proj", "lm_head"], r=2, alpha=2)
    arguments = ["--models", base, "--adapters", adapters[0], tmp_path / "head", "--fusion", "hidden"]
    status, _, told = call("train", *arguments, "--data", data, "--out", tmp_path / "out")
    assert status == 2
    assert "one head for all members" in told
