"""Two processes of four simulated devices each, through the command line: what they do is what one process does, they
stop together, and what is left of them goes on elsewhere."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import rlae_jax as rj
from rlae_jax import hosts
from rlae_jax.commands import main as commands
from rlae_jax.specialists import make_pair_tokenizer
from rlae_jax.tasks import skills

pytestmark = pytest.mark.slow

ROOT = Path(rj.__file__).parents[1]
FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count={}"
SECONDS = 240  # until what hangs is ended; a run takes a tenth of it
GENERATE = ["generate", "--prompt", "rs4821=", "ic0990=", "--max-new-tokens", "4", "--ignore-eos", "--scores"]
RUN_AGAIN = 75
# What the runtime writes of every connection, piece by piece.
GLOO = r"\[Gloo\] Rank | is connected to | peer ranks\. |Expected number of connected peer ranks is : "


class Command:
    """A command in a process of its own."""

    def __init__(self, directory, name, arguments, devices, cwd=None):
        self.paths = [directory / f"{name}.{kind}" for kind in ("out", "err")]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": FLAGS.format(devices),
            commands.CACHE_VARIABLE: str(directory / "programs"),
            hosts.HEARTBEAT_VARIABLE: "10",
        }
        with self.paths[0].open("w") as out, self.paths[1].open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlae_jax", *map(str, arguments)],
                env=environment,
                cwd=cwd or directory,
                stdout=out,
                stderr=errors,
            )

    def end(self):
        """(exit status, standard output, standard error without the runtime's own lines)."""
        try:
            status = self.process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        out, errors = (path.read_text() for path in self.paths)
        return status, _own_lines(out), _own_lines(errors)


def _own_lines(text):
    """Without the runtime's, whose threads write into each other's so that numbers stay behind, and empty ones."""
    lines = re.sub(GLOO, "", text).splitlines(keepends=True)
    return "".join(line for line in lines if line.strip() and not line.strip().isdecimal())


@pytest.fixture(scope="module")
def directory(tmp_path_factory, make_wide):
    """With two untrained members, a user's prompts and a user's reward."""
    path = tmp_path_factory.mktemp("hosts")
    for k, name in enumerate(("alpha", "beta")):
        fields = {"vocab": len(skills.TOKENS), "layers": 1, "context": 40, "end_ids": (1,)}
        make_wide(k, sharpness=2.0, tokenizer=make_pair_tokenizer(), **fields).save(path / name)
    (path / "mine.jsonl").write_text("".join(json.dumps({"q": f"r{i:04d}=", "a": i % 10}) + "\n" for i in range(60)))
    (path / "reward.py").write_text(
        "def digits(text, reference):\n    return sum(c.isdigit() for c in text) / max(len(text), 1)\n"
    )
    return path


def models(directory):
    return ["--models", directory / "alpha", directory / "beta"]


def training(directory, out, iterations, *more):
    data = ["--data", directory / "mine.jsonl", "--prompt-field", "q", "--answer-field", "a", "--max-new-tokens", "4"]
    how = ["--reward", f"{directory / 'reward.py'}:digits", "--prompts", "8", "--eval-every", "2"]
    how += ["--learning-rate", "0.001", "--iterations", iterations]
    return ["train", *models(directory), *data, *how, "--out", directory / out, *more]


@pytest.fixture(scope="module")
def start(directory):
    """start(arguments) -> two processes that run a command together; what still runs at the end is ended."""
    started = []

    def start(arguments, of_each=((), ()), places=(None, None)):
        with socket.socket() as one:
            one.bind(("localhost", 0))
            port = one.getsockname()[1]
        own = [["--coordinator", f"localhost:{port}", "--processes", 2, "--process-id", i] for i in range(2)]
        pair = [
            Command(directory, f"{len(started)}-{i}", [*arguments, *of_each[i], *own[i]], 4, places[i])
            for i in range(2)
        ]
        started.extend(pair)
        return pair

    yield start
    for command in started:
        command.process.kill()
        command.process.wait()


@pytest.fixture(scope="module")
def run_alone(directory):
    """run_alone(arguments) -> what one process of eight devices gives."""
    return lambda name, arguments: Command(directory, name, arguments, 8).end()


@pytest.fixture(scope="module")
def uninterrupted(directory, run_alone):
    """A run of six iterations of one process on the mesh that two have by default."""
    status, _, errors = run_alone("alone", training(directory, "alone", 6, "--mesh", "data=8"))
    assert (status, errors) == (0, "")
    return directory / "alone"


def lines(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def wait_for(run, iterations, pair):
    """Until a run has this many iterations."""
    late = time.monotonic() + SECONDS
    while len(lines(run)) < iterations:
        assert all(command.process.poll() is None for command in pair), pair[0].end()
        assert time.monotonic() < late
        time.sleep(0.02)


def difference(run, other):
    """The largest between the newest parameters of two runs."""
    pairs = zip(*(jax.tree.leaves(rj.load_policy(one, newest=True).params) for one in (run, other)), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - np.asarray(b)))) for a, b in pairs)


def test_training_is_that_of_one_process(directory, start, uninterrupted):
    first, second = (command.end() for command in start(training(directory, "two", 6)))
    assert (first[0], first[2]) == (0, "")
    assert "the trained policy is in" in first[1]
    assert second == (0, "", "")
    assert difference(directory / "two", uninterrupted) < 1e-6
    assert [row["reward"] for row in lines(directory / "two")] == pytest.approx(
        [row["reward"] for row in lines(uninterrupted)], abs=1e-6
    )
    results = [json.loads((run / "results.json").read_text()) for run in (directory / "two", uninterrupted)]
    scores = [{name: row["score"] for name, row in one["methods"].items()} for one in results]
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert {path.name for path in (directory / "two").iterdir()} == {path.name for path in uninterrupted.iterdir()}


@pytest.mark.rare
def test_stopped_and_lost_runs_go_on(directory, start, run_alone, uninterrupted):
    """SIGTERM to one stops both; then one is killed; what is left goes on without a mesh and on another one."""
    out = directory / "lost"
    pair = start(training(directory, "lost", 60))
    wait_for(out, 1, pair)
    pair[1].process.send_signal(signal.SIGTERM)
    first, second = (command.end() for command in pair)
    stopped = lines(out)[-1]["iteration"]
    assert (first[0], second[0]) == (RUN_AGAIN, RUN_AGAIN)
    told = f"preempted after iteration {stopped} of 60; saved in {out}. Go on with:\n  rlae-jax train"
    assert first[2].startswith(told)
    assert first[2].endswith("--resume\n")
    assert second[2] == "SIGTERM: stopping after this iteration\n"
    assert (out / "checkpoints" / str(stopped)).is_dir()
    assert stopped < 5

    pair = start(training(directory, "lost", 60, "--resume"))
    wait_for(out, stopped + 1, pair)
    pair[1].process.kill()
    began = time.monotonic()
    status, _, errors = pair[0].end()
    assert status == RUN_AGAIN
    assert errors.splitlines()[-1].startswith("a process of this run was lost")
    assert time.monotonic() - began < 60

    shutil.copytree(out, directory / "moved")
    if (iterations := lines(out)[-1]["iteration"]) > 6:  # before it was lost it went on beyond the other run
        assert run_alone("longer", training(directory, "alone", iterations, "--resume", "--mesh", "data=8"))[0] == 0
    iterations = max(6, iterations)
    meshes = {"lost": [], "moved": ["--mesh", "data=2,model=2"]}
    runs = {
        run: Command(directory, run, training(directory, run, iterations, "--resume", *mesh), 8)
        for run, mesh in meshes.items()
    }
    for run, command in runs.items():
        status, _, errors = command.end()
        assert status == 0, errors
        where = "the mesh data=2,model=2" if meshes[run] else "one device"
        assert errors.startswith(
            f"warning: {directory / run} was on the mesh data=8,model=1 of 2 processes and goes on on {where}"
        )
        assert difference(directory / run, uninterrupted) < 1e-5


@pytest.mark.rare
def test_sigterm_on_one_host(directory, uninterrupted):
    """Also where it reaches the workers of a reward, as a scheduler sends it to all."""
    out = directory / "preempted"
    command = Command(directory, "preempted", training(directory, "preempted", 60), 1)
    wait_for(out, 1, [command])
    command.process.send_signal(signal.SIGTERM)
    status, _, errors = command.end()
    assert status == RUN_AGAIN
    assert f"saved in {out}. Go on with:\n  rlae-jax train" in errors
    assert errors.endswith("--resume\n")
    assert difference(out, out) == 0  # it has a checkpoint


def test_processes_that_were_told_different_things(directory, start):
    pair = start([*GENERATE, *models(directory)], (["--seed", "1"], ["--seed", "2"]))
    told = "error: the processes of this run differ: option.sampling.seed is 2 on process 1 and 1 on process 0\n"
    assert [command.end() for command in pair] == [(2, "", told)] * 2


def test_what_one_process_cannot_do_ends_all(directory, start, tmp_path):
    """A model that is missing where one of them runs."""
    pair = start([*GENERATE, "--models", "alpha", "beta"], places=(directory, tmp_path))
    first, second = (command.end() for command in pair)
    assert second[0] == first[0] == 2
    assert second[2].startswith("error: alpha")
    assert first[2] == f"process 1 of this run: {second[2]}"


def test_answers_are_those_of_one_process_and_told_once(directory, start, run_alone):
    pair = start([*GENERATE, *models(directory)])
    first, second = (command.end() for command in pair)
    assert second == (0, "", "")
    assert first == run_alone("generate", [*GENERATE, *models(directory), "--mesh", "data=8"])
    assert first[1].startswith("rs4821=")


@pytest.mark.rare
def test_adapters_learn_what_they_learn_in_one_process(directory, start, run_alone):
    """With objectives that texts and a model decide, and weights that the host chooses."""
    objectives = ["--objective", "brevity", f"fluency={directory / 'beta'}", "--baselines", "dynaopt"]
    data = ["--base", directory / "alpha", "--data", directory / "mine.jsonl", "--prompt-field", "q"]
    how = ["--steps", 4, "--validate-every", 2, "--batch", 8, "--samples", 2, "--max-new-tokens", 6]
    how += ["--validation-prompts", 6, "--learning-rate", 0.01]
    call = ["emorl", "train", *objectives, *data, *how, "--out"]
    first, second = (command.end() for command in start([*call, directory / "adapters"]))
    assert (first[0], first[2]) == (0, "")
    assert second == (0, "", "")
    assert run_alone("adapters-alone", [*call, directory / "adapters-alone", "--mesh", "data=8"])[0] == 0
    for name in ("brevity", "fluency", "dynaopt"):
        runs = [directory / run / "objectives" / name for run in ("adapters", "adapters-alone")]
        tensors = [load_file(run / "adapter" / "adapter_model.safetensors") for run in runs]
        for key in tensors[0]:
            np.testing.assert_allclose(tensors[0][key], tensors[1][key], atol=1e-5)
        for ours, theirs in zip(*map(lines, runs), strict=True):
            for key in ("iteration", "dev", "weights", "policy_loss"):
                assert ours.get(key) == pytest.approx(theirs.get(key), abs=1e-5)
