"""What processes exchange, as far as one process can tell, and the parent that says how a process was ended."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from rlae_jax import hosts
from rlae_jax.commands import watch

SAME = {"version": "1", "option": {"training": {"learning_rate": 0.001, "seeds": [1, 2]}, "out": "runs/x"}}
OTHER_RATE = {"version": "1", "option": {"training": {"learning_rate": 0.003, "seeds": [1, 3]}, "out": "runs/x"}}
OTHER_VERSION = SAME | {"version": "2"}


def test_what_differs_is_named_with_both_values_and_the_process():
    assert hosts.differences([SAME, SAME, SAME]) == ""
    assert hosts.differences([SAME, SAME, OTHER_RATE]) == (
        "option.training.learning_rate is 0.003 on process 2 and 0.001 on process 0; "
        "option.training.seeds[1] is 3 on process 2 and 2 on process 0"
    )
    assert hosts.differences([SAME, OTHER_VERSION]) == "version is 2 on process 1 and 1 on process 0"
    many = {str(i): i for i in range(9)}
    assert hosts.differences([many, {}]).count("process 1") == 3
    assert len(hosts.differences([{"a": "x" * 500}, {"a": "y" * 500}])) < 200


def test_alone_there_is_nothing_to_exchange(raises_input_error):
    assert hosts.is_first()
    assert hosts.gather({"a": 1}) == [{"a": 1}]
    hosts.agree({"a": 1})
    np.testing.assert_array_equal(hosts.share(5), np.arange(5))
    own = np.array([0.1, 0.2])
    assert hosts.join(own, hosts.share(2), 2) is own
    assert not hosts.preempted()

    def refuse():
        raise hosts.InputError("not here")

    raises_input_error(lambda: hosts.first(refuse), "not here")


def test_shares_are_everything_once_and_rows_of_several_are_the_first_ones(monkeypatch):
    run = hosts._Run(count=3)
    monkeypatch.setattr(hosts, "_run", run)
    shares = []
    for run.index in range(3):
        shares.append(hosts.share(8))
    np.testing.assert_array_equal(np.concatenate(shares), np.arange(8))
    told = [[[0, 1], [0.1, 0.2]], [[0, 1], [7.0, 7.0]], [[3, 2], [0.4, 0.3]]]
    monkeypatch.setattr(hosts, "gather", lambda value: told)
    got = hosts.join(np.zeros(2, np.float32), np.arange(2), 4)
    np.testing.assert_array_equal(got, np.array([0.1, 0.2, 0.3, 0.4], np.float32))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("localhost:7000", None, None), ("--processes", "--process-id", "auto")),
        (("localhost:7000", 2, None), ("--process-id",)),
        (("localhost:7000", 2, 2), ("--process-id", "2 of 2")),
        (("localhost", 2, 1), ("HOST:PORT",)),
        (("localhost:0", 2, 1), ("localhost:0", "1 to 65535")),
        (("auto", 2, None), ("leave them out",)),
    ],
)
def test_flags_that_do_not_fit(raises_input_error, arguments, parts):
    raises_input_error(lambda: hosts.initialise(*arguments), *parts)


def test_nobody_answers_and_a_port_that_is_taken(raises_input_error, monkeypatch):
    monkeypatch.setenv(hosts.CONNECT_VARIABLE, "0")
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        raises_input_error(lambda: hosts.initialise(f"localhost:{port}", 2, 1), f"localhost:{port}", "nobody answers")
        taken.listen()
        raises_input_error(lambda: hosts.initialise(f"localhost:{port}", 2, 0), "cannot listen", "--process-id 0")


class TestTheParent:
    def run(self, code, **options):
        command = [sys.executable, "-I", watch.__file__, "-c", code]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, **options)

    CONNECTED = f"import os, signal, sys; os.write(int(os.environ['{watch.VARIABLE}']), b'1'); "

    @pytest.mark.parametrize("status", [0, 2, 75])
    def test_hands_on_the_status(self, status):
        done = self.run(f"import sys; print('out'); sys.exit({status})")
        assert (done.returncode, done.stdout, done.stderr) == (status, "out\n", "")

    def test_a_lost_process(self):
        done = self.run(self.CONNECTED + "os.abort()")
        assert done.returncode == 75
        assert done.stderr.splitlines()[-1].startswith("a process of this run was lost")
        assert "--resume" in done.stderr

    def test_processes_that_never_met(self):
        done = self.run("import os; os.abort()")
        assert done.returncode == 2
        assert done.stderr.splitlines()[-1].startswith("error: the processes of this run did not come together")

    def test_a_killed_child(self):
        done = self.run(self.CONNECTED + "os.kill(os.getpid(), signal.SIGKILL)")
        assert (done.returncode, done.stderr) == (137, "this process of the run was ended by SIGKILL\n")

    def test_signals_are_handed_on(self):
        code = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75)); print('ready', flush=True); signal.pause()"
        command = [sys.executable, "-I", watch.__file__, "-c", self.CONNECTED + code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout.readline() == "ready\n"
            parent.terminate()
            assert parent.wait(30) == 75

    @pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends children with their parent")
    def test_the_child_ends_with_it(self):
        code = "import signal; print('ready', flush=True); signal.pause()"
        command = [sys.executable, "-I", watch.__file__, "-c", code]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout.readline() == "ready\n"
            parent.kill()
            assert parent.stdout.read() == ""  # closed by the child's end
