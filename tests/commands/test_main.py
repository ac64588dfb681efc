"""The commands: help, what they leave behind, and one clear line for everything that can be wrong with a call."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.evaluation import baselines
from rlae_jax.models.families import FAMILIES
from rlae_jax.specialists import make_pair_tokenizer
from rlae_jax.tasks import skills
from tests.helpers.tokenizers import byte_level, sentencepiece

TRAIN = ["--iterations", "2", "--prompts", "8", "--eval-every", "1", "--eval-prompts", "3"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A home directory, where union vocabularies are kept."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def call(monkeypatch, capsys, home):
    """call(*arguments) -> (exit status, standard output, standard error)."""
    monkeypatch.setenv(commands.CACHE_VARIABLE, "off")
    monkeypatch.setenv("HOME", str(home))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *map(str, arguments)])
        capsys.readouterr()
        try:
            commands.main()
        except SystemExit as ending:
            status = ending.code or 0
        else:
            status = 0
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory, make_lm):
    """Two untrained members in directories of their own."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = make_pair_tokenizer()
    for k, name in enumerate(("alpha", "beta")):
        make_lm(k, vocab=len(skills.TOKENS), layers=1, context=40, end_ids=(1,), tokenizer=tokenizer).save(root / name)
    return [root / "alpha", root / "beta"]


@pytest.fixture(scope="session")
def mixed(tmp_path_factory, make_lm):
    """Two untrained members with different tokenizers: byte-level, whose end is its last id, and SentencePiece."""
    root = tmp_path_factory.mktemp("mixed")
    one, two = byte_level([b"ab", b" a", b"abc"]), sentencepiece(["▁", "a", "b", "c", "ab"])
    fields = {"layers": 1, "context": 200}
    make_lm(0, tokenizer=one, vocab=len(one), end_ids=(one.eos_token_id,), **fields).save(root / "one")
    make_lm(1, tokenizer=two, vocab=len(two), end_ids=(two.eos_token_id,), **fields).save(root / "two")
    return [root / "one", root / "two"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A user's own file: 60 prompts whose answer is their second digit."""
    path = tmp_path_factory.mktemp("data") / "mine.jsonl"
    path.write_text("".join(json.dumps({"q": f"r{i:04d}=", "a": i % 10}) + "\n" for i in range(60)))
    return path


@pytest.fixture
def data_options(data):
    return ["--data", data, "--prompt-field", "q", "--answer-field", "a", "--max-new-tokens", "5"]


@pytest.fixture(scope="session")
def trained(tmp_path_factory, models, data):
    """A run directory of two iterations."""
    out = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["train", "--models", *models, "--data", data, "--prompt-field", "q", "--answer-field", "a"]
    arguments += ["--max-new-tokens", "5", "--reward", "last_number", "--out", out, *TRAIN]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(commands.CACHE_VARIABLE, "off")
        patch.setattr(sys, "argv", ["rlae-jax", *map(str, arguments)])
        commands.main()
    return out


def listing(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in Path(directory).rglob("*") if path.is_file()
    }


def test_families_are_listed(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = call("families")
    assert status == 0
    for family in FAMILIES.values():
        assert family.model_type in out
        assert family.architectures[0] in out
    assert "compressed-tensors" in out
    assert "GGUF" in out


class TestHelp:
    def test_of_the_program(self, call):
        status, out, _ = call("--help")
        assert status == 0
        for command in ("demo", "specialists", "generate", "train", "evaluate", "ablate", "inspect", "families"):
            assert command in out
        assert commands.CACHE_VARIABLE in out

    @pytest.mark.parametrize(
        ("command", "options"),
        [
            ("demo", "--seed --out --quick"),
            ("specialists", "--task --out --seed --quick"),
            ("generate", "--models --prompt --weights --policy --max-new-tokens --span-length --temperature --seed"),
            ("generate", "--min-p --repetition-penalty --samples --stream --scores --end-ids --member-tokens --fusion"),
            ("train", "--models --task --data --out --algo --iterations --seed --resume --end-ids"),
            *(
                (command, "--mesh --coordinator --processes --process-id")
                for command in ("generate", "train", "evaluate")
            ),
            ("train", "--seeds --max-minutes --span-lengths --encoder --log-to --reward --chat --shots --data-dir"),
            ("ablate", "--models --task --out --vary --set --seeds --split --resume"),
            ("transfer", "--models --task --out --set --seeds --prompts --split --limit --resume"),
            ("evaluate", "--models --task --split --policy --methods --out --limit --end-ids"),
            ("inspect", "--models --end-ids --bandwidth --batch --tokens --dtype --quantise --quantise-head"),
        ],
    )
    def test_of_a_command(self, call, command, options):
        status, out, _ = call(command, "--help")
        assert status == 0
        assert [option for option in options.split() if option not in out] == []

    def test_an_unknown_command_or_option(self, call):
        assert call("generat")[0] == 2
        status, _, errors = call("generate", "--modles", "x", "--prompt", "y")
        assert status == 2
        assert "--models" in errors

    def test_as_a_module_in_a_process_of_its_own(self):
        done = subprocess.run(
            [sys.executable, "-m", "rlae_jax", "generate", "--models", "nowhere", "--prompt", "x"],
            capture_output=True,
            text=True,
            env=os.environ | {commands.CACHE_VARIABLE: "off"},
        )
        assert done.returncode == 2
        assert done.stderr.startswith("error: nowhere")
        assert done.stdout == ""


class TestGenerate:
    def test_answers_follow_their_prompts(self, call, models):
        prompts = ["rs4821=", "ic0990="]
        status, out, _ = call("generate", "--models", *models, "--prompt", *prompts, "--max-new-tokens", 6)
        assert status == 0
        lines = out.splitlines()
        assert [line[:7] for line in lines] == prompts
        again = call("generate", "--models", *models, "--prompt", *prompts, "--max-new-tokens", 6, "--weights", 2, 2)
        assert again[1].splitlines() == lines
        other = call("generate", "--models", *models, "--prompt", *prompts, "--max-new-tokens", 6, "--weights", 1, 0)
        assert other[1].splitlines() != lines

    @pytest.mark.slow
    def test_a_trained_policy_and_its_weights(self, call, models, trained):
        arguments = ["generate", "--models", *models, "--policy", trained, "--prompt", "rs4821=", "--max-new-tokens", 6]
        status, out, _ = call(*arguments, "--ignore-eos", "--show-weights")
        assert status == 0
        assert "weights of alpha, beta" in out
        rows = [list(map(float, line.split(":")[1].split())) for line in out.splitlines() if "span " in line]
        assert len(rows) == 2  # the task's span length is 4
        for row in rows:
            assert sum(row) == pytest.approx(1.0, abs=2e-3)

    @pytest.mark.parametrize("fusion", ["linear", "topk:3"])
    def test_streaming_prints_the_same(self, call, models, fusion):
        arguments = ["generate", "--models", *models, "--prompt", "rs4821=", "--max-new-tokens", 6, "--fusion", fusion]
        plain = call(*arguments, "--ignore-eos")
        assert plain[0] == 0
        assert len(plain[1]) > len("rs4821=\n")
        assert call(*arguments, "--ignore-eos", "--stream") == plain

    def test_samples_and_scores(self, call, models):
        arguments = ["generate", "--models", *models, "--prompt", "rs4821=", "ic0990=", "--max-new-tokens", 6]
        sampling = ["--temperature", 1, "--samples", 2, "--seed", 3, "--min-p", 0.01, "--repetition-penalty", 1.2]
        status, out, errors = call(*arguments, *sampling, "--scores")
        assert (status, errors) == (0, "")
        answers, scores = out.splitlines()[::2], out.splitlines()[1::2]
        assert [line[:7] for line in answers] == ["rs4821=", "rs4821=", "ic0990=", "ic0990="]
        ensemble = rj.Ensemble([rj.load(model) for model in models])
        options = {"temperature": 1, "samples": 2, "seed": 3, "min_p": 0.01, "repetition_penalty": 1.2}
        found = ensemble.generate(["rs4821=", "ic0990="], max_new_tokens=6, scores=True, **options)
        assert [line[7:] for line in answers] == found.texts
        for b, line in enumerate(scores):
            steps = found.steps[b]
            alpha, beta = found.member_scores[b, :steps].mean(axis=0)
            mean = found.scores[b, :steps].mean()
            assert line == f"  mean log-probability: {mean:.3f} (alpha {alpha:.3f}, beta {beta:.3f})"

    def test_a_policy_by_name(self, call, models, tmp_path, monkeypatch):
        arguments = ["generate", "--models", *models, "--prompt", "rs4821=", "--max-new-tokens", 3, "--ignore-eos"]
        status, out, errors = call(*arguments, "--policy", "confidence", "--show-weights")
        assert status == 0, errors
        rows = [line.split(":")[1].split() for line in out.splitlines() if "span " in line]
        assert len(rows) == 3  # it decides at every step
        assert {tuple(row) for row in rows} <= {("1.000", "0.000"), ("0.000", "1.000")}
        monkeypatch.chdir(tmp_path)
        (tmp_path / "confidence").mkdir()
        status, _, errors = call(*arguments, "--policy", "confidence")
        assert (status, "confidence is not a run directory: it has no config.json" in errors) == (2, True)

    def test_end_ids_of_members_with_one_tokenizer(self, call, models):
        arguments = ["generate", "--models", *models, "--prompt", "rs4821=", "--max-new-tokens", 6]
        ensemble = rj.Ensemble([rj.load(model) for model in models])
        first = ensemble.generate(["rs4821="], max_new_tokens=6, ignore_eos=True).tokens[0][0]
        for lists in ([first], [f"1,{first}", 1]):
            assert call(*arguments, "--end-ids", *lists)[:2] == (0, "rs4821=\n")


class TestMixed:
    """Members with different tokenizers."""

    @pytest.fixture
    def arguments(self, mixed):
        return ["generate", "--models", *mixed, "--prompt", "ab a", "--max-new-tokens", 6]

    def test_generate_and_stream(self, call, mixed, arguments):
        status, out, errors = call(*arguments, "--weights", 1, 2)
        assert (status, errors) == (0, "")
        ensemble = rj.Ensemble([rj.load(model) for model in mixed])
        assert ensemble.union is not None
        found = ensemble.generate(["ab a"], [1, 2], max_new_tokens=6)
        assert out == f"ab a{found.texts[0]}\n"
        assert call(*arguments, "--weights", 1, 2, "--stream") == (status, out, errors)

    def test_answers_drawn_into_a_file(self, call, mixed, arguments, tmp_path):
        """What the drawing is made of, token by token."""
        path = tmp_path / "new" / "out.html"
        status, out, errors = call(*arguments, "--weights", 1, 2, "--html", path)
        assert (status, errors) == (0, f"drawn in {path}\n")
        ensemble = rj.Ensemble([rj.load(model) for model in mixed])
        found = ensemble.generate(["ab a"], [1, 2], max_new_tokens=6, scores=True)
        assert out == f"ab a{found.texts[0]}\n"
        [data] = re.findall(r'<script type="application/json" id="data">(.*)</script>', path.read_text())
        drawn = json.loads(data)
        assert drawn["members"] == ["one", "two"]
        [answer] = drawn["answers"]
        tokens = answer["tokens"]
        assert answer["prompt"] == "ab a"
        assert "".join(token["text"] for token in tokens) == found.texts[0]
        n = len(tokens)
        assert n == found.steps[0] - (found.finish_reasons[0] == "stop") > 3
        np.testing.assert_allclose([token["logprob"] for token in tokens], found.scores[0, :n], atol=1e-5)
        by_member = np.array([token["member_logprobs"] for token in tokens], float)  # null is NaN
        expected = np.where(np.isfinite(found.member_scores[0, :n]), found.member_scores[0, :n], np.nan)
        np.testing.assert_allclose(by_member, expected, atol=1e-5)
        assert [token["span"] for token in tokens] == [t // 4 for t in range(n)]
        for span, weights in zip(answer["spans"], found.weights[0], strict=False):
            np.testing.assert_allclose(span["weights"], weights, atol=1e-5)

    def test_end_ids_are_lists_per_member(self, call, mixed, arguments):
        ensemble = rj.Ensemble([rj.load(model) for model in mixed])
        first = ensemble.generate(["ab a"], [1, 0], max_new_tokens=6, ignore_eos=True).tokens[0][0]
        ends = ["--end-ids", f"{ensemble.members[0].tokenizer.eos_token_id},{first}", 2]
        assert call(*arguments, "--weights", 1, 0, *ends)[:2] == (0, "ab a\n")
        status, _, errors = call(*arguments, "--end-ids", first)
        assert (status, "one per member" in errors) == (2, True)

    def test_a_full_member_is_told(self, call, arguments):
        status, out, errors = call(*arguments, "--ignore-eos", "--member-tokens", 2)
        assert status == 0
        assert errors.startswith("hint: 1 of 1 answers ended before 6 steps")
        assert "the 2 tokens" in errors
        assert "--member-tokens gives them more" in errors
        status, whole, errors = call(*arguments, "--ignore-eos")
        assert (status, errors) == (0, "")
        assert len(whole) > len(out)

    @pytest.mark.slow
    @pytest.mark.parametrize("policy", ["perplexity", "draw"])
    def test_policies_by_name(self, call, arguments, policy):
        status, out, errors = call(*arguments, "--policy", policy)
        assert status == 0, errors
        assert out.startswith("ab a")


class TestInspect:
    def test_different_tokenizers(self, call, mixed):
        status, out, errors = call("inspect", "--models", *mixed, "--end-ids", 259, "2,1", "--batch", 3)
        assert status == 0, errors
        for part in ("one", "two", "union vocabulary", "texts with an exact partner", "</s> (2)", "<s> (1)"):
            assert part in out
        assert "3 x 200 tokens at 1000 GB/s" in out  # their context

    def test_one_tokenizer_and_one_model(self, call, models):
        status, out, errors = call("inspect", "--models", *models, "--bandwidth", 10, "--tokens", 20)
        assert status == 0, errors
        for part in ("alpha", "beta", "one same tokenizer", "1 x 20 tokens at 10 GB/s"):
            assert part in out
        status, out, errors = call("inspect", "--models", models[0], "--dtype", "bfloat16")
        assert (status, "alpha" in out, "beta" in out) == (0, True, False), errors

    def test_models_that_cannot_write_together(self, call, models, mixed):
        status, out, errors = call("inspect", "--models", models[0], mixed[0])
        assert status == 0, errors
        assert "no union vocabulary" in out
        assert "WordLevel" in out


class TestTrainAndEvaluate:
    def test_what_a_run_leaves(self, trained):
        names = {path.name for path in trained.iterdir()}
        expected = {"config.json", "metrics.jsonl", "results.json", "predictions.jsonl", "checkpoints", "curve.png"}
        assert expected <= names
        results = json.loads((trained / "results.json").read_text())
        assert list(results["methods"]) == ["uniform", "rlae_ppo"]
        assert (results["task"], results["split"]) == ("mine", "dev")
        metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
        assert [row["dev_prompts"] for row in metrics] == [3, 3]
        assert all(row["rollout_seconds"] + row["update_seconds"] <= row["seconds"] for row in metrics)
        assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
        assert not [name for name in listing(trained) if "partial" in name]

    @pytest.mark.slow
    def test_resume(self, call, models, data_options, trained, tmp_path):
        out = Path(shutil.copytree(trained, tmp_path / "run"))
        arguments = ["train", "--models", *models, *data_options, "--reward", "last_number", "--out", out, *TRAIN]
        status, _, errors = call(*arguments)
        assert (status, "--resume" in errors) == (2, True)
        status, _, errors = call(*arguments, "--iterations", 3, "--resume")
        assert status == 0, errors
        assert len((out / "metrics.jsonl").read_text().splitlines()) == 3

    def test_several_tasks(self, call, models, tmp_path):
        out = tmp_path / "several"
        arguments = ["train", "--models", *models, "--task", "skills", "overlap", "--out", out]
        small = ["--prompts", 4, "--iterations", 1, "--eval-prompts", 8]
        status, printed, errors = call(*arguments, *small, "--task-shares", 3, 1)
        assert status == 0, errors
        assert (out / "curve.png").is_file()
        assert not (out / "results.json").exists()
        for name in ("skills", "overlap"):
            results = json.loads((out / "tasks" / name / "results.json").read_text())
            assert (results["task"], set(results["methods"])) == (name, {"uniform", "rlae_ppo"})
            assert f"{name}:" in printed
        config = json.loads((out / "config.json").read_text())
        assert (config["task"], config["settings"]["shares"]) == ("skills + overlap", [3, 1])
        status, printed, _ = call(
            "generate", "--models", *models, "--policy", out, "--prompt", "rs4821=", "--max-new-tokens", 6
        )
        assert status == 0

    def test_evaluate(self, call, models, data_options, trained, tmp_path):
        out = tmp_path / "evaluated"
        arguments = ["evaluate", "--models", *models, *data_options, "--split", "train", "--limit", 6, "--out", out]
        methods = ["--methods", "single:beta", "uniform"]
        status, printed, errors = call(*arguments, *methods, "--policy", trained, trained)
        assert status == 0, errors
        results = json.loads((out / "results.json").read_text())
        assert list(results["methods"]) == ["single:beta", "uniform", "rlae_ppo"]
        assert {method["n"] for method in results["methods"].values()} == {6}
        assert len(results["methods"]["rlae_ppo"]["per_seed"]) == 2  # runs of one algorithm are its seeds
        assert all(name in printed for name in results["methods"])
        assert "p (Holm)" in printed
        assert [(row["a"], row["b"]) for row in results["differences"]] == [
            ("rlae_ppo", "single:beta"),
            ("rlae_ppo", "uniform"),
        ]
        assert len((out / "predictions.jsonl").read_text().splitlines()) == 4 * 6
        assert (out / "scores.png").read_bytes().startswith(b"\x89PNG")
        config = json.loads((out / "config.json").read_text())
        assert config["policies"] == {"rlae_ppo": [str(trained), str(trained)]}
        before = listing(out)
        status, _, errors = call(*arguments, *methods)
        assert (status, errors.startswith(f"error: {out} holds a run already")) == (2, True)
        assert listing(out) == before
        (out / "scores.png").unlink()  # as a killed evaluation leaves it
        status, _, errors = call(*arguments, *methods)
        assert status == 0, errors
        assert (out / "scores.png").is_file()
        (out / "config.json").write_text('{"command": "train"}')
        assert call(*arguments, *methods)[0] == 2

    @pytest.mark.slow
    def test_evaluate_everything(self, call, models, data_options, trained, tmp_path):
        """All baselines from one command; the router is trained as the agent was and lies beside the results."""
        out = tmp_path / "evaluated"
        arguments = ["evaluate", "--models", *models, *data_options, "--reward", "last_number", "--split", "train"]
        status, printed, errors = call(*arguments, "--methods", "all", "--policy", trained, "--limit", 6, "--out", out)
        assert status == 0, errors
        table = json.loads((out / "results.json").read_text())["methods"]
        singles = ["single:alpha", "single:beta"]
        assert list(table) == [*singles, *baselines.ALL, "rlae_ppo"]
        assert all(len(method["per_seed"]) == 1 for method in table.values())
        settings = json.loads((out / "router" / "config.json").read_text())["settings"]
        assert (settings["span_length"], settings["iterations"], settings["prompts"]) == (5, 2, 8)
        assert "left out" not in printed

    def test_the_embedded_task(self, call, models, tmp_path):
        arguments = ["evaluate", "--models", *models, "--task", "skills", "--limit", 6, "--out", tmp_path / "out"]
        assert call(*arguments, "--methods", "uniform")[0] == 0
        assert json.loads((tmp_path / "out" / "results.json").read_text())["task"] == "skills"


class TestBadInput:
    """Status 2, nothing on standard output, `error: ...` of at most ten lines on standard error, nothing written."""

    @pytest.fixture
    def refused(self, call, tmp_path):
        def check(*arguments, parts):
            before = listing(tmp_path)
            status, out, errors = call(*arguments)
            assert status == 2, errors
            assert out == ""
            assert errors.startswith("error: ")
            assert "Traceback" not in errors
            assert len(errors.splitlines()) <= 10
            assert [part for part in parts if part not in errors] == []
            now = listing(tmp_path)
            assert {name: now.get(name) for name in before} == before
            assert [name for name in now if name not in before and not name.startswith("rlae_jax-")] == []

        return check

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["--weights", "1", "2", "3"], ("--weights has 3 numbers for 2 members",)),
            (["--weights", "1", "-2"], ("--weights -2.0: expected a number from 0",)),
            (["--weights", "0", "0"], ("all zero",)),
            (["--weights", "nan", "1"], ("--weights nan: expected a number",)),
            (["--temperature", "-1"], ("temperature",)),
            (["--max-new-tokens", "0"], ("--max-new-tokens 0: expected",)),
            (["--top-p", "0"], ("--top-p 0.0: expected",)),
            (["--span-length", "0"], ("--span-length 0: expected",)),
            (["--seed", "-1"], ("seed",)),
            (["--chat"], ("chat template",)),
            (["--policy", "nowhere"], ("nowhere is not a run directory", "perplexity", "draw")),
            (["--fusion", "best"], ("fusion 'best' is unknown", "loglinear")),
            (["--fusion", "topk:0"], ("topk:0", "at least 1")),
            (["--fusion", "primary:2"], ("primary:2", "0 to 1")),
            (["--fusion", "proxy"], ("three members", "not 2")),
            (["--end-ids", "1", "1", "1"], ("3 lists for 2 members", "one per member")),
            (["--end-ids", "1,x", "1"], ("'1,x'", "50256 or 1,2")),
            (["--end-ids", "999"], ("999", "outside the vocabulary")),
            (["--samples", "0"], ("samples",)),
            (["--min-p", "2"], ("--min-p 2.0: expected",)),
            (["--repetition-penalty", "0"], ("--repetition-penalty 0.0: expected",)),
            (["--member-tokens", "0"], ("--member-tokens 0: expected",)),
            (["--stream", "--samples", "2"], ("one prompt and one sample", "1 and 2")),
            (["--stream", "--scores"], ("--stream prints text only",)),
            (["--stream", "--html", "out.html"], ("--stream prints text only", "--html")),
            (["--html", "."], (".: no file can be made there", "is a directory")),
            (["--policy", "nowhere", "--weights", "1", "1"], ("either --weights or --policy",)),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_generate(self, refused, models, options, parts):
        base = ["generate", "--models", *models, "--prompt", "rs4821=", "--max-new-tokens", "6"]
        refused(*base, *options, parts=parts)

    def test_streaming_of_several_prompts(self, refused, models):
        two = ["generate", "--models", *models, "--prompt", "r1=", "r2=", "--stream"]
        refused(*two, parts=["one prompt and one sample", "2 and 1"])

    def test_inspect(self, refused, mixed):
        base = ["inspect", "--models", *mixed]
        refused(*base, "--end-ids", "1", "2", "3", parts=["3 lists for 2 members"])
        refused(*base, "--end-ids", "1", parts=["1 lists for 2 members"])
        refused(*base, "--bandwidth", "0", parts=["--bandwidth 0.0: expected a number above 0"])
        refused("inspect", "--models", "nowhere", parts=["nowhere"])

    def test_prompts(self, refused, models):
        refused("generate", "--models", *models, "--prompt", "", parts=["1 empty prompts"])
        long = ["generate", "--models", *models, "--max-new-tokens", "9", "--prompt", "rs4821=", "1" * 32]
        refused(*long, parts=["context is 40", "prompt 1 has 32", "at most 31"])

    def test_models(self, refused, models, tmp_path):
        refused("generate", "--models", models[0], tmp_path / "gone", "--prompt", "r", parts=["gone"])
        pickled = tmp_path / "pickled"
        shutil.copytree(models[0], pickled)
        (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
        refused("generate", "--models", pickled, "--prompt", "r", parts=["pickle", "safetensors"])
        cut = tmp_path / "cut"
        shutil.copytree(models[0], cut)
        whole = (cut / "model.safetensors").read_bytes()
        (cut / "model.safetensors").write_bytes(whole[: len(whole) // 2])
        refused("generate", "--models", cut, "--prompt", "r", parts=["model.safetensors"])

    @pytest.mark.parametrize("command", ["train", "evaluate"])
    def test_tasks(self, refused, models, data, tmp_path, command):
        base = [command, "--models", *models, "--out", tmp_path / "out"]
        refused(*base, parts=["either --task", "--data"])
        refused(*base, "--task", "skills", "--data", data, parts=["either --task", "not both"])
        refused(*base, "--task", "skils", parts=["'skils'", "skills"])
        refused(*base, "--data", tmp_path / "gone.jsonl", parts=["gone.jsonl"])
        refused(*base, "--data", data, parts=["60 lines that lack a field", "line 1 has no 'prompt' and no 'answer'"])
        (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "answer": "b"}\n{"prompt": \n')
        refused(*base, "--data", tmp_path / "broken.jsonl", parts=["line 2", "not JSON"])
        (tmp_path / "empty.jsonl").write_text("")
        refused(*base, "--data", tmp_path / "empty.jsonl", parts=["empty"])

    def test_train(self, refused, models, data_options, trained, tmp_path):
        run = Path(shutil.copytree(trained, tmp_path / "run"))
        base = ["train", "--models", *models, *data_options, *TRAIN]
        several = ["train", "--models", *models, *TRAIN, "--out", tmp_path / "new", "--task"]
        refused(*several, "skills", "skills", parts=["skills is given twice"])
        refused(*several, "skills", "overlap", "--task-shares", 1, parts=["1 shares for skills + overlap"])
        refused(*several, "skills", "nonesuch", parts=["nonesuch", "unknown"])
        refused(*several, "skills", "overlap", *data_options, parts=["not both"])
        transfer = ["transfer", "--models", *models, "--out", tmp_path / "new", "--task", "skills"]
        refused(*transfer, parts=["two or more", "--task A B C"])
        refused(*transfer, "overlap", "--set", "promts=2", parts=["'promts'", "prompts"])
        refused(*transfer, "overlap", "--set", "shares=1+2", parts=["equal shares"])
        for resume in ([], ["--resume"]):
            other = [*base, "--reward", "last_number", "--learning-rate", "0.5", "--out", run, *resume]
            refused(*other, parts=["another configuration", "settings.learning_rate"])
        refused(
            *base,
            "--out",
            tmp_path / "new",
            *("--iterations", "0"),
            parts=["--iterations 0: expected"],
        )
        fewer = [*base, "--reward", "last_number", "--out", run, "--resume", "--iterations", "1"]
        refused(*fewer, parts=["done 2 iterations already", "not 1"])
        ablation = ["ablate", "--models", *models, *data_options, "--vary", "span_length=2,4", "--out", run]
        refused(*ablation, parts=["holds what the command train made"])
        long = ["--max-prompt-tokens", "2", "--out", tmp_path / "new"]
        refused(*base, *long, parts=["no train prompt has at most 2 tokens"])
        refused(*base, "--out", run / "config.json" / "x", parts=["is a file"])

    def test_an_agent_is_told_from_its_members(self, models, trained):
        """Weights go by place: other members of the same width, or another order, are not refused, but told."""
        from rlae_jax.ppo.train import check_members

        def told(*directories):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                check_members(trained, rj.Ensemble([rj.load(directory) for directory in directories]))
            return [str(warning.message) for warning in caught]

        assert told(*models) == []
        (other,) = told(models[1], models[0])
        assert "trained with alpha, beta; given are beta, alpha: in another order" in other
        (other,) = told(models[0], models[0])
        assert "these are others" in other
        with pytest.warns(UserWarning, match="trained with fusion linear; here it is loglinear"):
            check_members(trained, rj.Ensemble([rj.load(directory) for directory in models], "loglinear"))

    def test_train_on_prompts_that_do_not_fit(self, refused, models, tmp_path):
        path = tmp_path / "long.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"{i}" * 30, "answer": "1"}) + "\n" for i in range(40)))
        base = ["--models", *models, "--data", path, "--out", tmp_path / "out"]
        refused("train", *base, *TRAIN, parts=["context is 40", "too long"])
        refused("evaluate", *base, parts=["context is 40", "too long"])

    def test_evaluate(self, refused, models, data_options, trained, tmp_path):
        base = ["evaluate", "--models", *models, *data_options, "--out", tmp_path / "out"]
        refused(*base, "--methods", "uniform", "best", parts=["best", "static", "single:MEMBER"])
        refused(*base, "--policy", tmp_path / "gone", parts=["gone is not a run directory"])
        refused(*base, "--limit", "0", parts=["--limit", "0"])
        refused(*base, "--search-prompts", "0", parts=["--search-prompts", "0"])
        refused(*base, "--methods", "uniform", "shuffled", parts=["shuffled", "--policy"])
        alone = ["evaluate", "--models", models[0], *data_options, "--out", tmp_path / "out", "--methods", "uniform"]
        refused(*alone, "--policy", trained, parts=["[16, 16]", "[16]"])

    def test_an_evaluation_that_cannot_work_is_told_before_any_search(self, refused, models, tmp_path, monkeypatch):
        def search(*args, **kwargs):
            raise AssertionError("a search began before the prompts were checked")

        monkeypatch.setattr(baselines, "static_weights", search)
        path = tmp_path / "one.jsonl"
        path.write_text('{"prompt": "question 0", "answer": "1"}\n')
        base = ["evaluate", "--models", *models, "--data", path, "--out", tmp_path / "out"]
        refused(*base, "--split", "test", parts=["'test'", "empty"])
        path.write_text(json.dumps({"prompt": "1" * 39, "answer": "1"}) + "\n")
        from rlae_jax.tasks.jsonl import split_of

        refused(*base, "--split", split_of("1" * 39), parts=["context is 40", "prompt 0 has 39"])


class TestSettings:
    def test_the_import_changes_no_setting_of_jax(self):
        code = (
            "import jax; before = dict(jax.config.values); import rlae_jax, rlae_jax.commands.main, rlae_jax.demo, "
            "rlae_jax.evaluation; after = dict(jax.config.values); assert before == after, (before, after)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)

    @pytest.fixture
    def cache(self, monkeypatch):
        """cache(**environment) -> the directory that the commands choose."""
        names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
        before = {name: getattr(jax.config, name) for name in names}
        jax.config.update("jax_compilation_cache_dir", None)

        def choose(**environment):
            for name in (commands.CACHE_VARIABLE, "XDG_CACHE_HOME"):
                monkeypatch.delenv(name, raising=False)
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            commands.turn_on_compilation_cache()
            return jax.config.jax_compilation_cache_dir

        yield choose
        for name, value in before.items():
            jax.config.update(name, value)

    def test_the_cache_lies_in_the_users_cache_directory(self, cache, tmp_path):
        assert cache(HOME=str(tmp_path)) == str(tmp_path / ".cache" / "rlae_jax" / "programs")

    def test_it_follows_the_desktops_convention(self, cache, tmp_path):
        assert cache(XDG_CACHE_HOME=str(tmp_path)) == str(tmp_path / "rlae_jax" / "programs")

    def test_it_can_be_moved(self, cache, tmp_path):
        assert cache(**{commands.CACHE_VARIABLE: str(tmp_path / "mine")}) == str(tmp_path / "mine")

    def test_it_can_be_switched_off(self, cache):
        assert cache(**{commands.CACHE_VARIABLE: "off"}) is None

    @pytest.mark.slow
    def test_a_users_own_setting_stays(self, cache, tmp_path):
        jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
        assert cache(**{commands.CACHE_VARIABLE: str(tmp_path / "mine")}) == str(tmp_path / "own")
