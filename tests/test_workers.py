"""Workers: what a function may do to its process, and what it cannot do to ours."""

import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlae_jax import workers
from rlae_jax.workers import Limits, Lost, Pool, Worker

SMALL = Limits(seconds=5.0, start_seconds=20.0, memory=200_000_000, processes=12, answer=1_000_000)
FUNCTION = '''
import os, signal, sys, threading, time

def act(what):
    """Does what it is told."""
    return globals()[what]()

def fine():
    return os.getpid()

def fork_bomb():
    while True:
        os.fork()

def forks_and_returns():
    os.fork()
    return 1

def daemon():
    if not os.fork():
        os.setsid()
        if os.fork():
            os._exit(0)
        time.sleep(1000)
    return 1

def eats():
    kept = []
    while True:
        kept.append(bytearray(10_000_000))

def eats_at_once():
    return len("x" * 10**12)

def prints():
    while True:
        os.write(1, b"printed for ever\\n" * 1000)

def prints_some():
    print("out"), print("err", file=sys.stderr), os.system("echo child")
    return 1

def long():
    return "x" * 2_000_000

def closes():
    os.closerange(0, 1000)

def answers_nonsense():
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b"\\0\\0\\0\\3abc")
        except OSError:
            pass
    return 1

def kills_its_parent():
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(1000)

def stops_itself():
    os.kill(os.getpid(), signal.SIGSTOP)

def no_json():
    return object()

def bad_error():
    class Bad(Exception):
        def __str__(self):
            raise self
    raise Bad

def interrupt():
    raise KeyboardInterrupt

def leaves_a_thread():
    threading.Thread(target=time.sleep, args=(1000,)).start()
    return 1
'''
PROBLEMS = {
    "fork_bomb": "started more than 12 processes",
    "eats": "used more than 0.2 GB of memory",
    "eats_at_once": "raised MemoryError",
    "long": "gave more than 1 MB",
    "closes": "ended its process (exit status 1)",
    "no_json": "raised TypeError: Object of type object is not JSON serializable",
    "bad_error": "raised Bad",
    "interrupt": "raised KeyboardInterrupt",
}


def processes_with(text):
    """The processes whose command line or environment has the text."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if text.encode() in (path / "environ").read_bytes() and (path / "cmdline").read_bytes():
                found.append(int(path.name))
    return found


def soon(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        threading.Event().wait(0.01)
    return condition()


@pytest.fixture
def source(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTION)
    return f"{tmp_path / 'own.py'}:act"


@pytest.fixture
def marked(monkeypatch, tmp_path):
    """Processes that are started have this in their environment."""
    mark = f"RLAE_JAX_TEST_MARK={tmp_path}"
    monkeypatch.setenv(*mark.split("="))
    yield mark
    assert soon(lambda: [p for p in processes_with(mark) if p != os.getpid()] == [])


@pytest.fixture
def worker(source, marked):
    with contextlib.closing(Worker(source, limits=SMALL)) as worker:
        yield worker


def test_what_breaks_a_call_is_a_line_and_the_next_call_is_answered(worker, capfd):
    for what, said in PROBLEMS.items():
        began = time.monotonic()
        assert worker.call(what) == (None, said)
        assert time.monotonic() - began < 5
        assert worker.call("fine").value > 0
    assert capfd.readouterr() == ("", "")


def test_processes_that_leave_their_group_are_met(worker, marked):
    first = worker.call("fine").value
    assert len(processes_with(marked)) == 2  # the guard and its new worker
    assert worker.call("daemon").value == 1
    assert len(processes_with(marked)) == 3
    assert worker.call("interrupt").problem
    assert worker.call("fine").value == first


def test_a_fork_that_returns_does_not_answer(worker):
    assert worker.call_many([["forks_and_returns"]] * 3 + [["no_json"], ["fine"]])[:3] == [(1, "")] * 3


def test_those_that_never_answer_take_no_longer_than_their_limit(source, marked, capfd):
    limits = Limits(seconds=0.3)
    with contextlib.closing(Worker(source, limits=limits)) as worker:
        for what in ("prints", "stops_itself"):
            assert worker.call(what) == (None, "took longer than 0.3 s")
        assert worker.printed.size > 100_000
        assert len(worker.printed.beginning) <= 400
        assert worker.call("fine").value
    assert capfd.readouterr() == ("", "")


def test_what_is_printed_is_told_in_a_line(worker, capfd):
    assert worker.call("prints_some").value == 1
    worker.call("fine")
    assert str(worker.printed) == "it printed 14 bytes, which are not kept; they begin: 'out'"
    assert capfd.readouterr() == ("", "")
    assert str(workers.Printed(3, "\x1b[2")) == "it printed 3 bytes, which are not kept; they begin: '?[2'"


def test_whoever_breaks_the_frames_breaks_its_own_call(worker):
    assert worker.call("answers_nonsense").problem == "gave an answer that cannot be read"
    assert worker.call("kills_its_parent").problem == "ended the process that watches it"
    assert worker.call_many([["fine"], ["kills_its_parent"], ["fine"]])[1].problem
    assert worker.call("leaves_a_thread").value == 1
    assert worker.call("fine").value


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("1 / 0", "own.py cannot be imported (ZeroDivisionError: division by zero)"),
        ("{}[1]", "own.py cannot be imported (KeyError: 1)"),
        ("import sys\nsys.exit(3)", "own.py cannot be imported (ended its process (exit status 3))"),
        ("while True: pass", "own.py cannot be imported (took longer than 1 s)"),
        ("import os\nwhile True: os.fork()", "own.py cannot be imported (started more than"),
        ("def act(: pass", "own.py cannot be imported (SyntaxError"),
        ("", "own.py has no 'act'"),
        ("act = 3", "'act' of "),
    ],
)
def test_what_cannot_be_imported_is_told_at_once(tmp_path, marked, content, said):
    (tmp_path / "own.py").write_text(content)
    worker = Worker(f"{tmp_path / 'own.py'}:act", limits=Limits(start_seconds=1.0))
    with pytest.raises(Lost) as caught:
        worker.start()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pool_keeps_the_order_and_survives_all_of_it(source, marked):
    pool = Pool(source, limits=SMALL, n=2)
    pool.start()
    with contextlib.closing(pool):
        outcomes = pool.submit([["fine"], ["no_json"], ["fine"], ["closes"], ["fine"]] * 4).result()
        assert [bool(outcome.problem) for outcome in outcomes] == [False, True, False, True, False] * 4
    with pytest.raises(RuntimeError):
        pool.submit([["fine"]])


def test_a_file_that_cannot_be_imported_any_more(source, worker):
    worker.start()
    Path(source.rpartition(":")[0]).write_text("1 / 0")
    assert worker.call("closes").problem
    with pytest.raises(Lost, match="ZeroDivisionError"):
        worker.call("fine")


def test_a_worker_that_nobody_closed_ends_with_its_object(source, marked):
    worker = Worker(source)
    worker.start()
    del worker


def test_closing_ends_a_call_of_another_thread(source, marked):
    worker, outcomes = Worker(source, limits=Limits(seconds=1000)), []
    worker.start()
    thread = threading.Thread(target=lambda: outcomes.append(worker.call("stops_itself")))
    thread.start()
    worker.close()
    thread.join(10)
    assert outcomes == [(None, "closed")]


def test_the_limit_of_memory_can_be_said(monkeypatch, raises_input_error):
    assert Limits().memory == 2_000_000_000
    monkeypatch.setenv(workers.MEMORY_VARIABLE, "0.5")
    assert Limits().memory == 500_000_000
    for text in ("x", "0", "-1", "nan", "inf"):
        monkeypatch.setenv(workers.MEMORY_VARIABLE, text)
        raises_input_error(Limits, workers.MEMORY_VARIABLE, text)


def test_they_end_when_their_parent_is_killed(source, marked):
    """Also what they started, and while a call is under way."""
    program = (
        "import sys; from rlae_jax.workers import Worker; w = Worker(sys.argv[1]); w.call('daemon')\n"
        "print(w.call('fine').value, flush=True); w.call('stops_itself')"
    )
    root = str(Path(workers.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen([sys.executable, "-c", program, source], env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout.readline()
        parent.kill()
