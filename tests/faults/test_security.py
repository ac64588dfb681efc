"""A directory from a stranger is data: whatever its files name, no command runs it."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import pytest

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.emorl.run import Run
from rlae_jax.models import load_encoder

EVIL = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
def score(*arguments):
    return 0.5
class Evil:
    pass
"""


@pytest.fixture
def call(monkeypatch, capsys):
    """call(arguments...) -> (exit status, what it told)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["rlae-jax", *map(str, arguments)])
        monkeypatch.setenv(commands.CACHE_VARIABLE, "off")
        try:
            commands.main()
            status = 0
        except SystemExit as ended:
            status = ended.code
        told = capsys.readouterr()
        return status, told.out + told.err

    return run


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def evil(tmp_path):
    path = tmp_path / "evil.py"
    path.write_text(EVIL)
    yield path
    assert not (tmp_path / "ran").exists(), "code of a directory was run"


def finished(directory, config):
    """What is there of an adapter that is done, as far as a run looks for its objectives."""
    write_json(directory / "config.json", config)
    write_json(directory / "training.json", {})
    (directory / "adapter").mkdir()


def stranger(directory, specs):
    """What `emorl train` would have left, as far as commands look before they load a model."""
    config = {
        "schema": 1,
        "command": "emorl train",
        "base": {"name": "base", "path": str(directory / "base"), "sha256": "0" * 64},
        "prompts": {"name": "reflections", "sha256": {"train": "0" * 64}},
        "data": {"path": "reflections", "layout": "auto", "prompt_field": "prompt"},
        "settings": dataclasses.asdict(EMORLConfig(max_new_tokens=8)),
    }
    write_json(directory / "config.json", config)
    for spec in specs:
        name = spec.rpartition(":")[2]
        target = {"command": "emorl train", "objectives": [name], "weighting": "equal", "specs": [spec]}
        finished(directory / "objectives" / name, target)
    return directory


class TestARun:
    @pytest.fixture
    def run(self, tmp_path, evil):
        return stranger(tmp_path / "run", [f"{evil}:score", "coverage"])

    @pytest.mark.parametrize(
        "command",
        [
            ["emorl", "evaluate", "--run", "RUN"],
            ["emorl", "search", "--run", "RUN"],
            ["emorl", "search", "--run", "RUN", "--method", "agent"],
            ["emorl", "search", "--run", "RUN", "--adapters", "score"],
        ],
    )
    def test_says_which_code_it_asks_for(self, call, run, evil, command):
        status, told = call(*(run if part == "RUN" else part for part in command))
        assert status == 2
        assert f"asks to run code: {evil}:score" in told
        assert "--allow-code" in told
        assert f"--objective {evil}:score" in told
        assert len(told.splitlines()) == 1

    @pytest.mark.parametrize(
        "command",
        [
            ["emorl", "export", "--run", "RUN", "--out", "OUT"],
            ["emorl", "train", "--out", "RUN", "--objective", "coverage", "--resume"],
            ["emorl", "demo", "--out", "RUN", "--seed", "3"],
            ["demo", "--out", "RUN", "--seed", "3"],
            ["ablate", "--grid", "RUN", "--out", "OUT"],
            ["generate", "--models", "RUN", "--prompt", "a"],
            ["generate", "--models", "RUN/base", "--policy", "RUN", "--prompt", "a"],
            ["evaluate", "--models", "RUN/base", "--policy", "RUN", "--task", "gsm8k"],
            ["inspect", "--models", "RUN"],
        ],
    )
    def test_no_command_runs_it(self, call, run, tmp_path, command):
        places = {"RUN": run, "RUN/base": run / "base", "OUT": tmp_path / "out"}
        status, told = call(*(places.get(part, part) for part in command))
        assert status == 2
        assert "Traceback" not in told

    def test_other_names_for_code(self, tmp_path, evil, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for spec in ("evil:score", "./evil.py:score", "evil.py:score", "os:system", "a=b:score"):
            run = stranger(tmp_path / spec.replace("/", "_"), [spec, "coverage"])
            with pytest.raises(rj.InputError, match="asks to run code"):
                Run(run).objectives(["score"] if "score" in spec else ["system"])

    def test_baselines_too(self, tmp_path, evil):
        run = stranger(tmp_path / "run", ["coverage", "brevity"])
        specs = ["coverage", f"{evil}:score"]
        target = {"command": "emorl train", "objectives": ["a", "b"], "weighting": "equal", "specs": specs}
        finished(run / "objectives" / "uniform_reward", target)
        with pytest.raises(rj.InputError, match="asks to run code"):
            Run(run).objectives(["uniform_reward"])


class TestGivenAgain:
    """What the user names, or allows, runs."""

    def test_named_or_allowed(self, tmp_path, raises_input_error):
        own, run = tmp_path / "own.py", tmp_path / "run"
        own.write_text(EVIL)
        stranger(run, [f"{own}:score", "coverage"])
        names = ["score", "coverage"]
        assert [one.name for one in Run(run, [f"{own}:score"]).objectives(names)] == names
        assert [one.name for one in Run(run, allow_code=True).objectives(names)] == names
        assert (tmp_path / "ran").exists()
        raises_input_error(lambda: Run(run, [f"{own}:other"]).objectives(names), "other", "its own are score")
        raises_input_error(lambda: Run(run, ["brevity"]).objectives(names), "brevity", "its own are score")

    def test_the_users_file_stands_for_the_directorys(self, tmp_path, evil):
        run = stranger(tmp_path / "run", [f"{evil}:score", "coverage"])
        mine = tmp_path / "mine.py"
        mine.write_text("def score(prompt, answer): return 0.25\n")
        [objective] = Run(run, [f"{mine}:score"]).objectives(["score"])
        assert objective(["a"], ["b"]).tolist() == [0.25]


def test_what_is_promised_names_its_tests():
    root = Path(__file__).parents[2]
    named = re.findall(r"`(tests/[^`]*)`", (root / "SECURITY.md").read_text())
    assert len(named) > 8
    assert [path for path in named if not (root / path).is_file()] == []


class TestAModel:
    """Code beside weights is for other libraries, whose users trust it; here it is never run."""

    def test_its_modules_are_left_alone(self, tmp_path, evil, stored_checkpoint, make_tokenizer):
        directory = tmp_path / "model"
        stored = Path(stored_checkpoint("one_label", "bert"))
        make_tokenizer("abcdefgh").save_pretrained(directory)
        for path in stored.iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
        (directory / "modeling.py").write_text(EVIL.replace("ran", "../ran"))
        classes = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForCausalLM"), "modeling.Evil")
        tokenizers = {"AutoTokenizer": ["modeling.Evil", "modeling.Evil"]}
        for name, auto in (("config.json", classes), ("tokenizer_config.json", tokenizers)):
            path = directory / name
            write_json(path, json.loads(path.read_text()) | {"auto_map": auto})
        load_encoder(directory)
