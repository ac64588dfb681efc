"""Rewards in processes: the same numbers as here, whatever a reward does to its process."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlae_jax.tasks.rewards import REWARDS, NamedReward, exact_match, get_reward
from rlae_jax.tasks.scoring import RewardPool

ROOT = Path(__file__).parents[2]
FUNCTIONS = "tests.tasks.reward_functions"
# What the user's function is told to do, and what is said of it.
BAD = {
    "raise": "raised ZeroDivisionError: division by zero",
    "nan": "gave NaN",
    "inf": "gave inf",
    "two": "gave 2, outside [0, 1]",
    "below": "gave -0.5, outside [0, 1]",
    "list": "gave no number but list",
    "text": "gave no number but str",
    "none": "gave no number but NoneType",
    "array": "gave no number but ndarray of shape (1,)",
    "complex": "gave no number but complex",
}
GOOD = {"0.25": 0.25, "1": 1.0, "0": 0.0, "true": 1.0, "scalar": 0.5, "zero axes": 0.5, "decimal": 0.5}


def named(function):
    return get_reward(f"{FUNCTIONS}:{function}")


def alive(pid):
    """Whether a process exists and has not merely not been waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pid, seconds=10.0):
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        threading.Event().wait(0.01)
    return not alive(pid)


@pytest.fixture(scope="module")
def orders():
    """score(texts, references) -> (scores, problems as (prompt, what)), by `by_order` in two processes."""
    with RewardPool(named("by_order"), workers=2, limit_seconds=20) as pool:

        def score(texts):
            pool.problems.counts.clear()
            pool.problems.shown.clear()
            scores = pool.submit([f"prompt {text}" for text in texts], texts, [""] * len(texts)).result()
            return scores, list(pool.problems.shown)

        yield score


class TestScores:
    def test_in_the_order_of_the_texts(self):
        texts = ["x" * (i * 7 % 40) for i in range(300)]
        reference = "y" * 40
        with RewardPool(named("length"), workers=3) as pool:
            scores = pool.submit(texts, texts, [reference] * 300).result()
        assert scores.dtype == np.float32
        np.testing.assert_array_equal(scores, np.array([len(text) / 40 for text in texts], np.float32))
        assert not len(pool.problems)
        assert str(pool.problems) == ""

    @pytest.mark.parametrize("name", list(REWARDS))
    def test_quick_rewards_take_no_process(self, name, monkeypatch):
        monkeypatch.setattr(subprocess, "Popen", None)
        texts = ["", "42", "#### 42", "(B)", "The answer is B.", "a 4 2", "forty-two", "４２", "\ud800", "B. 42"]
        references = ["42", ("41", "42"), "42", "B", "b", ("4 2", "42"), "Forty two!", "42", "B", "B"]
        with RewardPool(REWARDS[name]) as pool:
            scores = pool.submit(texts, texts, references).result()
        assert not len(pool.problems)
        expected = [REWARDS[name](text, reference) for text, reference in zip(texts, references, strict=True)]
        np.testing.assert_array_equal(scores, np.array(expected, np.float32))

    def test_a_function_here_and_in_processes(self):
        from tests.tasks.reward_functions import by_order

        texts = [*BAD, *GOOD, "raise long"]
        results = []
        for reward in (lambda text, reference: by_order(text, reference), named("by_order")):
            with RewardPool(reward, workers=2) as pool:
                scores = pool.submit(texts, texts, [""] * len(texts)).result()
            results.append((scores.tolist(), pool.problems.counts, pool.problems.shown))
        assert results[0] == results[1]

    def test_any_reference_counts(self):
        with RewardPool(named("same"), workers=1) as pool:
            scores = pool.submit([""] * 3, ["a", "b", "c"], [("x", "a"), "b", ("x", "y")]).result()
        assert scores.tolist() == [1.0, 1.0, 0.0]

    def test_texts_survive_the_way(self):
        texts = ["", "\0", "\n", "é\u2028", "\ud800", "x" * 1_000_000]
        with RewardPool(named("same"), workers=2) as pool:
            assert pool.submit(texts, texts, texts).result().tolist() == [1.0] * 6

    def test_nothing_to_score(self):
        for reward in (exact_match, named("same")):
            with RewardPool(reward, workers=1) as pool:
                assert pool.submit([], [], []).result().shape == (0,)

    def test_batches_overlap(self):
        """A second batch may be handed in before the first is asked for, and asked for first."""
        with RewardPool(named("length"), workers=2) as pool:
            first = pool.submit(["p"], ["x"], ["xx"])
            second = pool.submit(["p"] * 2, ["", "xx"], ["xx"] * 2)
            assert second.result().tolist() == [0.0, 1.0]
            assert first.result().tolist() == [0.5]


class TestProblems:
    @pytest.mark.parametrize(("text", "said"), BAD.items(), ids=BAD)
    def test_what_is_no_score(self, orders, text, said):
        scores, problems = orders([text, "1"])
        assert scores.tolist() == [0.0, 1.0]
        assert problems == [(f"prompt {text}", said)]

    def test_kinds_of_numbers(self, orders):
        scores, problems = orders(list(GOOD))
        assert scores.tolist() == list(GOOD.values())
        assert not problems

    @pytest.mark.parametrize(
        ("text", "said"),
        [("exit", "exit status 3"), ("vanish", "exit status 3"), ("crash", "signal SIGSEGV")],
    )
    def test_a_process_that_ends(self, orders, text, said):
        scores, problems = orders(["1", text, "1", "1"])
        assert scores.tolist() == [1.0, 0.0, 1.0, 1.0]
        assert problems == [(f"prompt {text}", f"ended its process ({said})")]

    @pytest.mark.parametrize("text", ["hang", "regex"])
    def test_one_that_hangs_does_not_touch_the_others(self, text):
        with RewardPool(named("by_order"), workers=2, limit_seconds=0.3) as pool:
            texts = ["1", text, "0.5", "1", text, "0.5"]
            scores = pool.submit([f"prompt {i}" for i in range(6)], texts, [""] * 6).result()
            assert scores.tolist() == [1.0, 0.0, 0.5, 1.0, 0.0, 0.5]
            said = "took longer than 0.3 s"
            assert pool.problems.shown == [("prompt 1", said), ("prompt 4", said)]
            assert pool.submit(["p"], ["1"], [""]).result().tolist() == [1.0]

    def test_long_messages_are_cut(self, orders):
        _, [(_, said)] = orders(["raise long"])
        assert said.startswith("raised ValueError: x x x")
        assert len(said) < 300
        assert "\n" not in said

    def test_the_summary_is_short(self):
        with RewardPool(lambda text, reference: 1 / int(text)) as pool:
            texts = [str(i % 2) for i in range(30)] + ["many words"] * 9
            prompts = ["shots " * 100 + f"\n\nquestion {i}" for i in range(39)]
            pending = pool.submit(prompts, texts, [""] * 39)
            pending.result()
            pending.result()
        assert len(pool.problems) == 24
        assert pool.problems.counts == {"raised ZeroDivisionError": 15, "raised ValueError": 9}
        assert len(pool.problems.shown) == 5
        lines = str(pool.problems).splitlines()
        assert len(lines) == 6
        assert "24 answers" in lines[0]
        assert "15 raised ZeroDivisionError, 9 raised ValueError" in lines[0]
        assert "question 0" in lines[1]
        assert "division by zero" in lines[1]
        assert max(map(len, lines)) < 200


class TestProcesses:
    def test_they_load_neither_jax_nor_the_package(self):
        import jax  # noqa: F401  this process has it

        with RewardPool(named("knows_jax"), workers=1) as pool:
            assert pool.submit(["p"], ["t"], ["r"]).result().tolist() == [0.0]
        assert not len(pool.problems)

    def test_their_own_directory_is_not_on_the_path(self):
        with RewardPool(named("is_path_clean"), workers=1) as pool:
            assert pool.submit(["p"], ["t"], ["r"]).result().tolist() == [1.0]

    def test_what_a_reward_prints_is_kept_apart_and_told(self, capfd):
        with RewardPool(named("by_order"), workers=1) as pool:
            assert pool.submit(["p"], ["print"], [""]).result().tolist() == [1.0]
        assert capfd.readouterr() == ("", "")
        assert not pool.problems.counts
        assert pool.problems
        assert str(pool.problems) == (
            "the reward: it printed 20 bytes, which are not kept; they begin: 'printed by a reward'"
        )

    def test_leaving_the_pool_ends_what_they_do_and_what_they_started(self, tmp_path):
        path = tmp_path / "pids"
        threads = threading.active_count()
        with RewardPool(named("leaves_a_process"), workers=1, limit_seconds=60) as pool:
            pending = pool.submit(["p"], [str(path)], [""])
            while not path.exists() or not path.read_text():
                threading.Event().wait(0.01)
        worker, child = map(int, path.read_text().split())
        assert gone(worker)
        assert gone(child)
        with pytest.raises(RuntimeError, match="closed"):
            pending.result()
        assert threading.active_count() == threads

    def test_ctrl_c_while_waiting(self, tmp_path):
        """Reaches the caller, and leaves no process behind."""
        path = tmp_path / "pids"

        def interrupt():
            while not path.exists() or not path.read_text():
                threading.Event().wait(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        def score():
            with RewardPool(named("leaves_a_process"), workers=1, limit_seconds=60) as pool:
                pool.submit(["p"], [str(path)], [""]).result()

        interrupter = threading.Thread(target=interrupt)
        # A shell's background jobs inherit that the signal is ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupter.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                score()
        finally:
            signal.signal(signal.SIGINT, before)
        interrupter.join()
        assert all(gone(int(pid)) for pid in path.read_text().split())

    @pytest.mark.slow
    @pytest.mark.parametrize("busy", [False, True])
    def test_they_end_when_their_parent_is_killed(self, tmp_path, busy):
        """An idle one at once; one that hangs in C code within seconds of its limit."""
        (tmp_path / "rewards.py").write_text(
            "import os, re\n"
            "def reward(text, reference):\n"
            "    open(text, 'w').write(str(os.getpid()))\n"
            f"    return float(bool({busy} and re.match(r'(a+)+$', 'a' * 60 + 'b')))\n"
        )
        program = (
            "import sys, time\n"
            "from rlae_jax.tasks import RewardPool, get_reward\n"
            "with RewardPool(get_reward('rewards.py:reward'), workers=1, limit_seconds=1.0) as pool:\n"
            "    pool.submit(['p'], ['pid'], ['']); time.sleep(1000)\n"
        )
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, env=environment) as parent:
            while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
                threading.Event().wait(0.01)
            parent.kill()
        assert gone(int((tmp_path / "pid").read_text()), seconds=20.0)

    def test_one_that_cannot_start_is_an_error(self, tmp_path, raises_input_error):
        reward = NamedReward("no_such_module_anywhere:reward")
        with RewardPool(reward, workers=2) as pool:
            pending = pool.submit(["p"] * 3, ["t"] * 3, ["r"] * 3)
            raises_input_error(pending.result, "cannot be loaded in another process", "no_such_module_anywhere")

    def test_use_outside_of_the_block(self):
        pool = RewardPool(named("same"), workers=1)
        with pytest.raises(RuntimeError, match="within"):
            pool.submit(["p"], ["t"], ["r"])
        with pool:
            pass
        with pytest.raises(RuntimeError, match="within"):
            pool.submit(["p"], ["t"], ["r"])

    def test_settings(self, raises_input_error):
        raises_input_error(lambda: RewardPool(exact_match, limit_seconds=0), "time limit", "0")
        raises_input_error(lambda: RewardPool(exact_match, workers=0), "at least 1 worker")


class TestMathEquivalence:
    def test_in_a_process(self):
        pytest.importorskip("math_verify", reason="math-verify is not installed")
        texts = ["so it is $\\frac{2}{4}$", "\\boxed{3}", "no idea"]
        with RewardPool(get_reward("math_equivalence"), workers=1, limit_seconds=60) as pool:
            assert pool.submit(texts, texts, ["1/2", ("4", "3"), "5"]).result().tolist() == [1.0, 1.0, 0.0]
        assert not len(pool.problems)

    def test_what_would_take_for_ever_is_stopped(self):
        """math-verify would compute it; its own limit does not work outside of a main thread."""
        pytest.importorskip("math_verify", reason="math-verify is not installed")
        texts = ["$10^{10^{10}}$", "$\\frac12$"]
        with RewardPool(get_reward("math_equivalence"), workers=1, limit_seconds=2.0) as pool:
            scores = pool.submit(texts, texts, ["5", "0.5"]).result()
        assert scores.tolist() == [0.0, 1.0]
        assert pool.problems.shown == [(texts[0], "took longer than 2 s")]
