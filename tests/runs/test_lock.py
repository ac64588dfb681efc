"""Of two writers of a directory one is told about the other; a lock that a killed process left is recognised."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from rlae_jax import files
from rlae_jax.errors import InputError
from rlae_jax.evaluation.engine import evaluate
from rlae_jax.runs import lock

HOLD = """
import sys, time
from pathlib import Path
from rlae_jax.runs import lock
with lock.writing(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held_elsewhere(path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def leave(path, **changes):
    """A record as a process leaves it that is killed."""
    path.mkdir(exist_ok=True)
    record = {"pid": 1, "host": socket.gethostname(), "started": "x", "since": time.time(), "command": "rlae-jax train"}
    (path / lock.NAME).write_text(json.dumps(record | changes))


def refused(path):
    with pytest.raises(InputError) as raised, lock.writing(path):
        pass
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_a_second_writer_is_refused_and_a_killed_one_taken_over(tmp_path):
    run = tmp_path / "runs" / "x"
    with held_elsewhere(run) as process:
        told = refused(run)
        assert told.startswith(f"{run} is being written by process {process.pid} on {socket.gethostname()} (")
        assert time.strftime(", since %H:") in told
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (run / lock.NAME).is_file()
    gone = f"process {process.pid} on .* is gone; its lock is taken over"
    with pytest.warns(UserWarning, match=gone), lock.writing(run):
        assert json.loads((run / lock.NAME).read_text())["pid"] == os.getpid()
    assert not run.exists() or not list(run.iterdir())


def test_it_is_gone_at_the_end_and_after_errors_and_so_is_what_was_made_for_it(tmp_path):
    run = tmp_path / "a" / "b"
    with lock.writing(run), lock.writing(run):
        assert [path.name for path in run.iterdir()] == [lock.NAME]
    assert not (tmp_path / "a").exists()
    for error in (KeyboardInterrupt, InputError):
        with contextlib.suppress(error), lock.writing(run):
            (run / "kept").touch()
            raise error
        assert [path.name for path in run.iterdir()] == ["kept"]
    with lock.writing(tmp_path / "out", beside=True):
        assert {path.name for path in tmp_path.iterdir()} == {"a", f".out{lock.NAME}"}
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_lock_goes_with_a_directory_that_is_renamed(tmp_path):
    (tmp_path / "old").mkdir()
    with lock.writing(tmp_path / "old"):
        (tmp_path / "old").rename(tmp_path / "new")
        with lock.writing(tmp_path / "old"):
            pass
    assert not list((tmp_path / "new").iterdir())


def test_two_threads_of_a_process(tmp_path):
    told = []
    with lock.writing(tmp_path):
        thread = threading.Thread(target=lambda: told.append(refused(tmp_path / "." / "")))
        thread.start()
        thread.join()
    assert told == [f"{tmp_path} is being written by another thread of this process"]


def test_every_api_that_writes_a_directory_is_refused(tmp_path, monkeypatch):
    from rlae_jax import ablate, demo, specialists
    from rlae_jax.commands import evaluate as evaluate_command
    from rlae_jax.commands import lm_eval, train
    from rlae_jax.commands.emorl import train as emorl_train
    from rlae_jax.config import PPOConfig
    from rlae_jax.emorl import demo as emorl_demo
    from rlae_jax.emorl import evaluation, export, ranker, search
    from rlae_jax.emorl import train as adapters
    from rlae_jax.ppo.train import train as ppo_train

    out, none = tmp_path / "out", None
    calls = [
        lambda: ppo_train(none, none, PPOConfig(), out),
        lambda: ablate.ablate(none, none, none, {}, out),
        lambda: demo.run_demo(0, out, none),
        lambda: emorl_demo.run_demo(0, out),
        lambda: adapters.train_adapters(none, [], none, none, out),
        lambda: search.search(none, none, none, none, out),
        lambda: evaluation.evaluate_run(none, "test", None, 1.0, 0, out),
        lambda: specialists.build_pool(out, 0),
        lambda: evaluate(none, none, out=out),
        lambda: train.train(model=none, out=out, task=none, training=none),
        lambda: evaluate_command.evaluate(model=none, out=out, task=none),
        lambda: emorl_train.train(objective=(), out=out, held=none, training=none),
        lambda: export.export_run(none, out),
        lambda: ranker.train_ranker(none, out),
        lambda: lm_eval.lm_eval(model=none, tasks=(), out=out),
    ]
    with held_elsewhere(out):
        for call in calls[:-3]:
            with pytest.raises(InputError, match="is being written by process"):
                call()
    with lock.writing(out, beside=True):
        for call in calls[-3:]:
            told = []
            thread = threading.Thread(target=lambda call=call, told=told: told.append(_raised(call)))
            thread.start()
            thread.join()
            assert "is being written by another thread" in told[0]
    assert not list(tmp_path.glob(".*"))


def _raised(call):
    try:
        call()
    except InputError as error:
        return str(error)
    return "nothing"


class TestWithoutFlock:
    """Where the file system has no locks, or may not tell other hosts of them, the record decides."""

    @pytest.fixture(params=["no flock", "shared"], autouse=True)
    def file_system(self, request, monkeypatch):
        def flock(*args):
            raise OSError(95, "Operation not supported")

        if request.param == "shared":
            monkeypatch.setattr(lock, "_may_be_shared", lambda path: True)
        else:
            monkeypatch.setattr(lock.fcntl, "flock", flock)
            monkeypatch.setattr(lock, "_SECONDS_TO_SETTLE", 0.01)

    def test_a_process_that_lives(self, tmp_path):
        leave(tmp_path / "run", pid=os.getppid(), started=lock._started(os.getppid()))
        assert f"process {os.getppid()} on " in refused(tmp_path / "run")
        assert (tmp_path / "run" / lock.NAME).is_file()

    @pytest.mark.parametrize("gone", [{"pid": 2**22 + 1}, {"pid": os.getppid(), "started": "other 1"}])
    def test_a_process_that_is_gone(self, tmp_path, gone):
        leave(tmp_path / "run", **gone)
        with pytest.warns(UserWarning, match="is gone; its lock is taken over"), lock.writing(tmp_path / "run"):
            pass
        assert not list((tmp_path / "run").iterdir())

    def test_a_process_of_another_host(self, tmp_path):
        leave(tmp_path / "run", host="elsewhere")
        assert refused(tmp_path / "run").endswith(f"if it has ended, remove {tmp_path / 'run' / lock.NAME}")

    def test_a_record_that_says_nothing(self, tmp_path):
        leave(tmp_path / "run")
        for text in ("{", "[]", "{}", '{"host": 3, "pid": "x"}'):
            (tmp_path / "run" / lock.NAME).write_text(text)
            assert "another process, which cannot be asked from here; if it has ended, remove" in refused(
                tmp_path / "run"
            )


def test_on_a_disk_of_this_host_a_free_lock_is_free_whoever_had_it(tmp_path, monkeypatch):
    """As where each start of a container has another name."""
    monkeypatch.setattr(lock, "_may_be_shared", lambda path: False)
    leave(tmp_path / "run", host="elsewhere")
    with pytest.warns(UserWarning, match="on elsewhere .* is gone"), lock.writing(tmp_path / "run"):
        pass


def test_which_file_systems_are_shared(monkeypatch, tmp_path):
    mounts = (
        "1 0 0:1 / / rw - ext4 /dev/x rw\n"
        "2 1 0:2 / /data rw shared:1 - nfs4 host:/x rw\n"
        "3 2 0:3 / /data/a\\040b rw - tmpfs t rw\n"
    )
    monkeypatch.setattr(lock.Path, "read_text", lambda self: mounts)
    assert [lock._may_be_shared(path) for path in ("/home/x", "/data/x", "/database", "/data/a b/c")] == [
        False,
        True,
        False,
        False,
    ]


def test_a_directory_that_cannot_be_made(tmp_path, raises_input_error):
    (tmp_path / "file").touch()
    raises_input_error(lambda: lock.writing(tmp_path / "file" / "run").__enter__(), "is a file")
    raises_input_error(lambda: lock.writing(tmp_path / "file").__enter__(), "is a file")


def test_what_killed_writers_left_goes_when_the_next_one_comes(tmp_path):
    left, mine = tmp_path / "run/deep/.chart.png.partial-0123456789abcdef", tmp_path / "run/.notes.partial-x"
    left.parent.mkdir(parents=True)
    left.touch()
    mine.touch()
    with files.writing(tmp_path / "run/deep/other") as file:
        with lock.writing(tmp_path / "run"):
            assert not left.exists()
            assert mine.exists()
        file.write("of somebody who lives")
    assert (tmp_path / "run/deep/other").read_text()
