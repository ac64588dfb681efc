"""Training runs: learning, directories, checkpoints, and going on after an interruption at any moment."""

import dataclasses
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import files
from rlae_jax.errors import Interrupted, Preempted
from rlae_jax.ppo import train as train_module
from rlae_jax.runs.checkpoints import Checkpoints
from rlae_jax.runs.directory import epoch_rows
from rlae_jax.runs.metrics import MetricsLog, read_metrics
from rlae_jax.specialists import make_pair_tokenizer as make_skills_tokenizer
from rlae_jax.tasks import Examples, Task, skills
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="module")
def finished(ensemble, tmp_path_factory):
    """(directory, returned policy, task) of a run that nobody disturbed; do not write into it."""
    out = tmp_path_factory.mktemp("finished") / "run"
    task = toys.task()
    return out, rj.train(ensemble, task, toys.SETTINGS, out), task


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run, free to be spoilt."""
    return Path(shutil.copytree(finished[0], tmp_path / "copied"))


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def assert_same_params(one, other):
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def iterations(out):
    return [row["iteration"] for row in read_metrics(out)]


class TestARun:
    def test_it_learns_whom_to_trust_when(self, finished, ensemble):
        out, policy, task = finished
        test = task.splits["test"]
        answers = ensemble.generate(test.prompts, policy, max_new_tokens=2).texts
        assert answers == test.references
        rows = read_metrics(out)
        assert rows[0]["reward"] < 0.7
        assert max(row.get("dev", 0) for row in rows) == 1.0

    def test_it_never_reads_the_test_split(self, finished):
        assert set(finished[2].splits.names) == {"train", "dev"}

    def test_what_its_directory_holds(self, finished):
        out, _, _ = finished
        config = json.loads((out / "config.json").read_text())
        assert config["schema"] == 1
        assert config["task"] == "toy"
        assert config["settings"]["learning_rate"] == toys.SETTINGS.learning_rate
        assert [member["name"] for member in config["members"]] == ["left", "right"]
        assert iterations(out) == list(range(1, toys.SETTINGS.iterations + 1))
        for row in read_metrics(out):
            assert ("dev" in row) == (row["iteration"] % toys.SETTINGS.eval_every == 0)
            assert {"reward", "policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction"} <= set(row)
        assert {path.name for path in (out / "checkpoints").iterdir() if path.is_dir()} == {"20", "24"}

    def test_load_policy_takes_the_best_or_the_newest(self, finished, copied):
        _, returned, _ = finished
        assert_same_params(rj.load_policy(copied), returned)
        assert rj.load_policy(copied).span_length == 1
        state = json.loads((copied / "config.json").read_text())
        newest = rj.load_policy(copied, newest=True)
        assert state["spans"] == newest.dims.spans == 2
        # A worse one on top is the newest, but not the best.
        before = restore(copied)
        worse = before.learner._replace(params=jax.tree.map(lambda leaf: leaf + 1, before.learner.params))
        after = train_module._keep_best(before._replace(learner=worse), np.zeros(1, np.float32))
        checkpoints = Checkpoints(copied)
        checkpoints.save(25, after)
        checkpoints.close()
        assert_same_params(rj.load_policy(copied), returned)
        expected = dataclasses.replace(newest, params=jax.tree.map(lambda leaf: leaf[0], worse.params))
        assert_same_params(rj.load_policy(copied, newest=True), expected)

    def test_checkpoints_elsewhere_survive_the_directory(self, finished, ensemble, tmp_path, raises_input_error):
        """As in a bucket, where a machine is lost with its disk: another one goes on from the newest checkpoint."""
        _, returned, task = finished
        half = dataclasses.replace(toys.SETTINGS, iterations=12)
        kept = {"checkpoints": str(tmp_path / "bucket")}
        rj.train(ensemble, task, half, tmp_path / "first", **kept)
        assert not (tmp_path / "first" / "checkpoints").exists()
        assert rj.load_policy(tmp_path / "first").span_length == 1
        raises_input_error(lambda: rj.train(ensemble, task, half, tmp_path / "new", **kept), "resume")
        gone_on = rj.train(ensemble, task, toys.SETTINGS, tmp_path / "second", resume=True, **kept)
        assert_same_params(gone_on, returned)
        assert iterations(tmp_path / "second") == list(range(13, toys.SETTINGS.iterations + 1))
        assert_same_params(rj.load_policy(tmp_path / "second"), returned)

    def test_one_that_diverges_ends_in_a_line_and_keeps_what_was_saved(self, finished, ensemble, tmp_path, monkeypatch):
        iterate, calls = train_module._iterate, iter(range(100))

        def diverging(*args):
            learner, *others = iterate(*args)
            params = jax.tree.map(lambda leaf: leaf * np.nan, learner.params) if next(calls) == 2 else learner.params
            return learner._replace(params=params), *others

        monkeypatch.setattr(train_module, "_iterate", diverging)
        config = dataclasses.replace(toys.SETTINGS, eval_every=2)
        with pytest.raises(rj.InputError, match=r"the agent of seed \d+ are not finite after iteration 3 in .*run; a"):
            rj.train(ensemble, finished[2], config, tmp_path / "run")
        assert iterations(tmp_path / "run") == [1, 2]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rj.load_policy(tmp_path / "run").params))

    def test_metrics_say_how_many_dev_prompts_there_were_and_what_phases_took(self, ensemble, tmp_path):
        """By default they go by an iteration's answers: 8 x 4 of the 64."""
        config = dataclasses.replace(toys.SETTINGS, iterations=2, eval_every=2, prompts=8, eval_prompts=None)
        for kind in (True, False):
            task = toys.task(token_reward=kind)
            task.splits["dev"] = task.splits["test"]
            rj.train(ensemble, task, config, tmp_path / str(kind))
            first, last = read_metrics(tmp_path / str(kind))
            assert {"dev", "dev_prompts", "dev_seconds"} & first.keys() == set()
            assert last["dev_prompts"] == 32
            assert last["dev_seconds"] > 0
            # In one program the phases are not apart.
            phases = [first.get(f"{phase}_seconds") for phase in ("rollout", "reward", "update")]
            assert phases == [None] * 3 if kind else sum(phases) == pytest.approx(first["seconds"])
        assert json.loads((tmp_path / "True" / "config.json").read_text())["settings"]["eval_prompts"] == 32

    @pytest.mark.slow
    def test_rewards_from_text_train_as_rewards_from_tokens(self, ensemble, tmp_path):
        config = dataclasses.replace(toys.SETTINGS, iterations=3, eval_every=3)
        policies = [
            rj.train(ensemble, toys.task(token_reward=kind), config, tmp_path / str(kind)) for kind in (True, False)
        ]
        for one, two in zip(*(jax.tree.leaves(policy.params) for policy in policies), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
        rewards = [[row["reward"] for row in read_metrics(tmp_path / str(kind))] for kind in (True, False)]
        np.testing.assert_allclose(*rewards, rtol=1e-6)


def restore(run):
    """The state of a run's newest checkpoint."""
    policy = rj.load_policy(run)
    config = dataclasses.replace(toys.SETTINGS, span_length=1)
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.restore(jax.eval_shape(lambda: train_module._fresh(config, policy.dims)))[1]
    finally:
        checkpoints.close()


class Killed(BaseException):
    """Stands for SIGKILL: nothing may tidy up after it that would not have run."""


class TestGoingOn:
    @pytest.mark.parametrize(
        ("owner", "method", "nth", "after"),
        [
            pytest.param(MetricsLog, "write", 3, False, marks=pytest.mark.slow),
            (MetricsLog, "write", 4, True),  # the line of a checkpoint, but not the checkpoint
            pytest.param(Checkpoints, "save", 2, False, marks=pytest.mark.slow),
            (Checkpoints, "save", 2, True),  # the checkpoint, and nothing after it
            pytest.param(MetricsLog, "write", 23, True, marks=pytest.mark.slow),
        ],
        ids=["before-a-line", "after-a-line", "before-a-checkpoint", "after-a-checkpoint", "near-the-end"],
    )
    def test_a_run_that_died_ends_as_if_it_had_not(
        self, finished, ensemble, tmp_path, monkeypatch, owner, method, nth, after
    ):
        out = tmp_path / "run"
        original = getattr(owner, method)
        calls = 0

        def dying(*args):
            nonlocal calls
            calls += 1
            if calls == nth and not after:
                raise Killed
            original(*args)
            if calls == nth:
                raise Killed

        with monkeypatch.context() as patched:
            patched.setattr(owner, method, dying)
            with pytest.raises(Killed):
                rj.train(ensemble, toys.task(), toys.SETTINGS, out)
        policy = rj.train(ensemble, toys.task(), toys.SETTINGS, out, resume=True)
        assert_same_params(policy, finished[1])
        assert_same_params(rj.load_policy(out, newest=True), rj.load_policy(finished[0], newest=True))
        assert iterations(out) == list(range(1, toys.SETTINGS.iterations + 1))
        ours, theirs = ([row.get("dev") for row in read_metrics(run)] for run in (out, finished[0]))
        assert ours == theirs

    def test_a_half_written_line_of_metrics_is_dropped(self, copied, ensemble):
        before = read_metrics(copied)
        with (copied / "metrics.jsonl").open("a") as file:
            file.write('{"iteration": 25, "rew')
        rj.train(ensemble, toys.task(), toys.SETTINGS, copied, resume=True)
        assert read_metrics(copied) == before

    def test_lines_of_metrics_that_are_missing_are_told(self, copied, ensemble):
        path = copied / "metrics.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:7]) + '{"iteration": 8, "rew')
        with pytest.warns(
            UserWarning, match=rf"metrics.jsonl: lines of iterations 8 to {toys.SETTINGS.iterations} are"
        ):
            rj.train(ensemble, toys.task(), toys.SETTINGS, copied, resume=True)

    def test_a_longer_run_goes_on_from_a_shorter_one(self, finished, ensemble, tmp_path):
        half = dataclasses.replace(toys.SETTINGS, iterations=12)
        rj.train(ensemble, toys.task(), half, tmp_path / "run")
        rj.train(ensemble, toys.task(), toys.SETTINGS, tmp_path / "run", resume=True)
        assert_same_params(rj.load_policy(tmp_path / "run", newest=True), rj.load_policy(finished[0], newest=True))

    def test_resuming_begins_a_run_where_there_is_none(self, ensemble, tmp_path):
        config = dataclasses.replace(toys.SETTINGS, iterations=1)
        rj.train(ensemble, toys.task(), config, tmp_path / "run", resume=True)
        assert iterations(tmp_path / "run") == [1]

    @pytest.mark.parametrize(
        ("number", "after", "raised", "told"),
        [(signal.SIGINT, 3, Interrupted, "^stopped"), (signal.SIGTERM, 7, Preempted, "^preempted")],
    )
    def test_ctrl_c_and_sigterm_save(self, number, after, raised, told, finished, ensemble, tmp_path):
        """What is stopped is scored when it would have been anyway, so that going on ends with the same best agent."""
        out = tmp_path / "run"
        assert threading.current_thread() is threading.main_thread()
        handler = signal.getsignal(number)

        def interrupt(progress):
            if progress.iteration == after - 1:
                signal.raise_signal(number)

        with pytest.raises(raised, match=f"{told} after iteration {after} of 24"):
            rj.train(ensemble, toys.task(), toys.SETTINGS, out, on_progress=interrupt)
        assert signal.getsignal(number) is handler
        assert [row["iteration"] for row in read_metrics(out) if "dev" in row] == list(range(4, after, 4))
        assert iterations(out) == list(range(1, after + 1))
        assert (out / "checkpoints" / str(after)).is_dir()
        if after < toys.SETTINGS.eval_every:
            assert_same_params(rj.load_policy(out), rj.load_policy(out, newest=True))
        rj.train(ensemble, toys.task(), toys.SETTINGS, out, resume=True)
        for newest in (False, True):
            assert_same_params(rj.load_policy(out, newest=newest), rj.load_policy(finished[0], newest=newest))
        assert [row.get("dev") for row in read_metrics(out)] == [row.get("dev") for row in read_metrics(finished[0])]

    def test_a_second_ctrl_c_stops_at_once(self, finished, ensemble, tmp_path):
        """Nothing is saved; going on ends with the same parameters and lines."""
        out = tmp_path / "run"

        def interrupt(progress):
            if progress.iteration == 10:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            rj.train(ensemble, toys.task(), toys.SETTINGS, out, on_progress=interrupt)
        assert not (out / "checkpoints" / "10").exists()
        rj.train(ensemble, toys.task(), toys.SETTINGS, out, resume=True)
        for newest in (False, True):
            assert_same_params(rj.load_policy(out, newest=newest), rj.load_policy(finished[0], newest=newest))
        assert [row.get("dev") for row in read_metrics(out)] == [row.get("dev") for row in read_metrics(finished[0])]


class TestRefusals:
    def unchanged(self, raises_input_error, directory, call, *parts):
        before = contents(directory)
        raises_input_error(call, *parts)
        assert contents(directory) == before

    def test_an_existing_run(self, copied, ensemble, raises_input_error):
        self.unchanged(
            raises_input_error,
            copied,
            lambda: rj.train(ensemble, toys.task(), toys.SETTINGS, copied),
            "copied",
            "resume",
        )

    @pytest.mark.parametrize("resume", [False, True])
    def test_another_configuration(self, copied, ensemble, raises_input_error, resume):
        config = dataclasses.replace(toys.SETTINGS, learning_rate=0.5, seed=3)
        self.unchanged(
            raises_input_error,
            copied,
            lambda: rj.train(ensemble, toys.task(), config, copied, resume=resume),
            "another configuration",
            "2 settings differ",
            "settings.learning_rate is 0.02 there and 0.5 here",
            "settings.seed is 0 there and 3 here",
            "another directory",
        )

    def test_other_members_and_another_task(self, copied, ensemble, raises_input_error):
        turned = rj.Ensemble(ensemble.members[::-1])
        task = dataclasses.replace(toys.task(), name="other")
        self.unchanged(
            raises_input_error,
            copied,
            lambda: rj.train(turned, task, toys.SETTINGS, copied, resume=True),
            "members",
            "task is 'toy' there and 'other' here",
        )

    def test_a_directory_of_something_else(self, tmp_path, ensemble, raises_input_error):
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "precious.jsonl").write_text("{}\n")
        self.unchanged(
            raises_input_error,
            tmp_path,
            lambda: rj.train(ensemble, toys.task(), toys.SETTINGS, tmp_path / "mine"),
            "something else",
        )

    def test_a_file_in_the_directorys_place(self, tmp_path, ensemble, raises_input_error):
        (tmp_path / "file").write_text("precious")
        self.unchanged(
            raises_input_error,
            tmp_path,
            lambda: rj.train(ensemble, toys.task(), toys.SETTINGS, tmp_path / "file" / "run"),
            "is a file",
        )

    def test_prompts_that_do_not_fit(self, tmp_path, ensemble, raises_input_error):
        task = toys.task()
        task.splits["dev"] = Examples(["a" * 63], ["0"])
        raises_input_error(
            lambda: rj.train(ensemble, task, toys.SETTINGS, tmp_path / "run"), "context is 64", "prompt 0 has 63"
        )
        assert not (tmp_path / "run").exists()

    def test_an_empty_split(self, tmp_path, ensemble, raises_input_error):
        task = Task("small", {"train": toys.examples(["a"]), "dev": toys.examples([])}, exact_match)
        raises_input_error(lambda: rj.train(ensemble, task, toys.SETTINGS, tmp_path / "run"), "'dev'", "empty")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(("name", "value"), [("span_length", 0), ("max_new_tokens", 0), ("temperature", -1.0)])
    def test_settings_outside_their_range(self, tmp_path, ensemble, raises_input_error, name, value):
        def train():
            rj.train(ensemble, toys.task(), dataclasses.replace(toys.SETTINGS, **{name: value}), tmp_path / "run")

        raises_input_error(train, name)
        assert not (tmp_path / "run").exists()


# Orbax leaves coroutines unfinished when a file is damaged; they complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestUnusableRuns:
    @pytest.fixture(autouse=True)
    def _collect(self):
        yield
        gc.collect()

    def test_no_run(self, tmp_path, raises_input_error):
        raises_input_error(lambda: rj.load_policy(tmp_path / "none"), "none is not a run directory", "config.json")

    def test_no_checkpoint_yet(self, copied, raises_input_error):
        shutil.rmtree(copied / "checkpoints")
        raises_input_error(lambda: rj.load_policy(copied), "no checkpoint yet")
        assert not (copied / "checkpoints").exists()

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": 3, "members": []}'])
    def test_a_config_of_something_else(self, copied, raises_input_error, content):
        (copied / "config.json").write_text(content)
        raises_input_error(lambda: rj.load_policy(copied), "config.json")

    def test_a_policy_for_members_of_another_width(self, finished, make_lm, make_tokenizer, raises_input_error):
        policy = rj.load_policy(finished[0])
        tokenizer = make_tokenizer(toys.CHARACTERS)
        others = rj.Ensemble([make_lm(k, vocab=toys.END + 1, tokenizer=tokenizer) for k in range(2)])
        raises_input_error(lambda: others.generate(["ab"], policy), "[13, 13]", "[16, 16]")

    @pytest.mark.parametrize("newest", [False, True])
    def test_a_checkpoint_of_another_shape(self, copied, raises_input_error, newest):
        path = copied / "config.json"
        config = files.read_json(path)
        config["settings"]["agent"]["ffn_width"] = 24
        files.write_json(path, config)
        told = "actor.b1 is (1, 16), expected (1, 24)"
        raises_input_error(lambda: rj.load_policy(copied, newest=newest), str(copied / "checkpoints"), told)

    def test_every_truncated_file_of_a_checkpoint_is_reported_or_harmless(self, finished, copied):
        expected = finished[1]
        step = copied / "checkpoints" / str(newest_step(copied))
        refused = []
        for path in sorted(path for path in step.rglob("*") if path.is_file() and path.stat().st_size > 1):
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            try:
                found = rj.load_policy(copied)
            except rj.InputError as error:
                refused.append(str(error))
            else:
                assert_same_params(found, expected)
            path.write_bytes(whole)
        assert refused
        assert all(str(copied) in message and len(message.splitlines()) <= 10 for message in refused)
        assert_same_params(rj.load_policy(copied), expected)

    def test_resuming_goes_back_to_the_checkpoint_that_is_whole(self, finished, copied, ensemble, raises_input_error):
        newest, before = (copied / "checkpoints" / name for name in ("24", "20"))

        def damage(step):
            path = max((path for path in step.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            return path.relative_to(step)

        changed = damage(newest)
        told = rf"checkpoint 24 is damaged \({changed}: content differs from its digest\); going on from 20"
        raises_input_error(lambda: rj.load_policy(copied), str(newest), str(changed), "--resume")
        with pytest.warns(UserWarning, match=told):
            policy = rj.train(ensemble, toys.task(), toys.SETTINGS, copied, resume=True)
        assert_same_params(policy, finished[1])
        assert_same_params(rj.load_policy(copied, newest=True), rj.load_policy(finished[0], newest=True))
        assert iterations(copied) == iterations(finished[0])

        damage(newest)
        damage(before)
        metrics = (copied / "metrics.jsonl").read_bytes()
        raises_input_error(
            lambda: rj.train(ensemble, toys.task(), toys.SETTINGS, copied, resume=True),
            "no checkpoint is whole",
            "20: ",
        )
        assert (copied / "metrics.jsonl").read_bytes() == metrics

    def test_a_checkpoint_of_an_older_version_has_no_digests(self, finished, copied):
        for path in copied.glob("checkpoints/*/digests.json"):
            path.unlink()
        assert_same_params(rj.load_policy(copied), finished[1])


def newest_step(run):
    checkpoints = Checkpoints(run)
    try:
        return checkpoints.newest()
    finally:
        checkpoints.close()


class TestEpochs:
    @pytest.mark.parametrize(("n", "batch"), [(10, 5), (10, 3), (7, 16), (64, 64), (5, 1)])
    def test_each_pass_reads_every_example_once(self, n, batch):
        read = np.concatenate([epoch_rows(n, batch, 4, i) for i in range(3 * n)])
        passes = read[: len(read) // n * n].reshape(-1, n)
        np.testing.assert_array_equal(np.sort(passes, axis=1), np.tile(np.arange(n), (len(passes), 1)))
        assert len({str(order) for order in passes.tolist()}) > 1

    def test_they_are_a_function_of_the_seed_and_the_iteration(self):
        np.testing.assert_array_equal(epoch_rows(100, 30, 1, 7), epoch_rows(100, 30, 1, 7))
        assert np.any(epoch_rows(100, 30, 1, 7) != epoch_rows(100, 30, 2, 7))


class Command:
    """`rlae-jax train` on the skills task in a process of its own, with tiny untrained members."""

    def __init__(self, directory, make_lm):
        self.directory = directory
        for k, name in enumerate("ab"):
            make_lm(
                k, vocab=len(skills.TOKENS), layers=1, context=64, end_ids=(1,), tokenizer=make_skills_tokenizer()
            ).save(directory / name)

    def start(self, out, *arguments):
        models = [str(self.directory / name) for name in "ab"]
        options = ["--task", "skills", "--iterations", "10", "--prompts", "32", "--eval-every", "2", "--seed", "1"]
        return subprocess.Popen(
            [sys.executable, "-m", "rlae_jax", "train", "--models", *models, "--out", str(out), *options, *arguments],
            env=os.environ | {"RLAE_JAX_COMPILATION_CACHE": str(self.directory / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @staticmethod
    def wait_for_lines(process, out, lines):
        deadline = time.monotonic() + 120
        while len(iterations(out)) < lines:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.002)


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_lm):
    return Command(tmp_path_factory.mktemp("command"), make_lm)


@pytest.mark.slow
@pytest.mark.rare  # the same in one process: test_a_run_that_died_ends_as_if_it_had_not
def test_sigkill_and_resume(command, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = command.start(whole)
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    for lines, arguments in [(1, []), (4, ["--resume"])]:
        process = command.start(killed, *arguments)
        command.wait_for_lines(process, killed, lines)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert len(iterations(killed)) < 10
    process = command.start(killed, "--resume")
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors
    assert_same_params(rj.load_policy(killed, newest=True), rj.load_policy(whole, newest=True))
    assert iterations(killed) == list(range(1, 11))
    assert {path.name for path in killed.iterdir()} == {path.name for path in whole.iterdir()}
    assert {"config.json", "metrics.jsonl", "results.json", "predictions.jsonl", "checkpoints", "curve.png"} <= {
        path.name for path in whole.iterdir()
    }


@pytest.mark.slow
def test_ctrl_c_says_how_to_go_on(command, tmp_path):
    process = command.start(tmp_path / "run", "--iterations", "1000")
    command.wait_for_lines(process, tmp_path / "run", 2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "stopped after iteration" in errors
    assert "--resume" in errors
    done = iterations(tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / str(done[-1])).is_dir()
    assert done == list(range(1, len(done) + 1))
