"""What is shown while something takes long, on a terminal and elsewhere, under a clock that the test moves."""

import io
import types

import pytest
import rich.console

from rlae_jax import report
from rlae_jax.report import terminal


class Clock:
    """Seconds, and at most one function that is called once so many have gone by."""

    def __init__(self):
        self.now, self._due = 1000.0, None

    def __call__(self):
        return self.now

    def start_timer(self, seconds, call):
        self._due = (self.now + seconds, call)
        return self.cancel

    def cancel(self):
        self._due = None

    def sleep(self, seconds):
        self.now += seconds
        if self._due is not None and self.now >= self._due[0]:
            call, self._due = self._due[1], None
            call()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def shown(clock):
    """shown(description, total, unit): the progress under this clock."""
    return lambda *arguments: report.progress(*arguments, clock=clock, start_timer=clock.start_timer)


class TestLines:
    """Not on a terminal, as under pytest."""

    def test_compilation_is_told_and_counts_neither_for_the_rate_nor_for_the_time_left(self, clock, shown, capsys):
        with shown("training", 100, "iterations") as update:
            clock.sleep(2)
            assert capsys.readouterr().out == ""
            clock.sleep(58)
            assert capsys.readouterr().out == "training: compiling\n"
            update(10, "reward 0.1")
            assert capsys.readouterr().out == "training: 10/100 iterations reward 0.1\n"
            clock.sleep(5)
            update(15, "reward 0.2")
            assert capsys.readouterr().out == ""  # a line was printed 5 seconds ago
            clock.sleep(15)
            update(50, "reward 0.3")
            assert capsys.readouterr().out == "training: 50/100 iterations, 2 iterations/s, 25 s left reward 0.3\n"
            clock.sleep(25)
            update(100, "reward 0.9")
        assert capsys.readouterr().out == "training: 100/100 iterations, 2 iterations/s, 105.0 s reward 0.9\n"

    def test_a_run_that_goes_on_counts_what_this_call_did(self, clock, shown, capsys):
        with shown("training", 200, "iterations") as update:
            clock.sleep(20)
            update(101, "")
            clock.sleep(10)
            update(111, "")
        assert capsys.readouterr().out.splitlines()[-1] == "training: 111/200 iterations, 1 iterations/s, 89 s left"

    def test_what_is_soon_over_says_nothing_of_compilation(self, clock, shown, capsys):
        with shown("search", 8, "points") as update:
            clock.sleep(0.5)
            update(8, "")
        clock.sleep(60)
        assert capsys.readouterr().out == "search: 8/8 points, 16 points/s, 0.5 s\n"

    def test_what_is_refused_says_nothing_later(self, clock, shown, capsys):
        with pytest.raises(ValueError, match="refused"), shown("search", 8, "points"):
            raise ValueError("refused")
        clock.sleep(60)
        assert capsys.readouterr().out == ""

    def test_a_note_before_anything_is_done_is_still_compilation(self, clock, shown, capsys):
        with shown("search", 8, "points") as update:
            update(0, "reading")
            clock.sleep(60)
        assert capsys.readouterr().out == "search: compiling\n"

    def test_the_timer_is_a_real_one_by_default(self, capsys):
        with report.progress("search", 2, "points") as update:
            update(2, "")
        assert capsys.readouterr().out.startswith("search: 2/2 points")


class TestBar:
    @pytest.fixture
    def screen(self, monkeypatch):
        """What a terminal got since the last call."""
        console = rich.console.Console(file=io.StringIO(), force_terminal=True, width=200, color_system=None)
        monkeypatch.setattr(terminal, "console", console)

        def read():
            text = console.file.getvalue()
            console.file.seek(0)
            console.file.truncate()
            return text

        return read

    def last_line(self, text):
        return [line for line in text.replace("\r", "\n").splitlines() if "training" in line][-1]

    def test_a_bar(self, clock, shown, screen):
        with shown("training", 100, "iterations") as update:
            pass
        assert "compiling" in self.last_line(screen())
        with shown("training", 100, "iterations") as update:
            clock.sleep(60)
            update(10, "reward 0.1")
        line = self.last_line(screen())
        assert "10/100" in line
        assert "reward 0.1" in line
        assert "compiling" not in line
        assert "left" not in line  # nothing is known of the rate
        with shown("training", 100, "iterations") as update:
            clock.sleep(60)
            update(10, "")
            clock.sleep(1)
            update(11, "reward 0.2")
        line = self.last_line(screen())
        assert "1 iterations/s" in line
        assert "1:29 left" in line
        with shown("training", 100, "iterations") as update:
            update(10, "")
            clock.sleep(9)
            update(100, "reward 0.9")
        line = self.last_line(screen())
        assert "10 iterations/s" in line
        assert "left" not in line


class TestTraining:
    def iteration(self, i, problems="", **metrics):
        return types.SimpleNamespace(iteration=i, metrics=metrics, problems=problems)

    def test_the_newest_score_on_dev_stays(self, capsys):
        with report.training_progress("training", 2) as display:
            assert display.last is None
            display(self.iteration(1, reward=0.25, dev=0.5))
            display(self.iteration(2, reward=0.75))
        assert "2/2 iterations" in (line := capsys.readouterr().out)
        assert line.rstrip().endswith("reward 0.750, dev 0.500")
        assert display.last.iteration == 2

    def test_what_went_wrong_is_said_at_once_and_at_the_end(self, capsys):
        def stopped():
            with report.training_progress("training", 9) as display:
                display(self.iteration(1, reward=0.0))
                assert "failed" not in capsys.readouterr().out
                display(self.iteration(2, "1 answer failed", reward=0.0, failed_rewards=1))
                assert capsys.readouterr().out.count("1 answer failed") == 1
                display(self.iteration(3, "2 answers failed", reward=0.0, failed_rewards=2))
                assert "2 answers failed" not in capsys.readouterr().out
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            stopped()
        assert "2 answers failed" in capsys.readouterr().out

    def test_where_it_goes_on(self, capsys):
        with report.training_progress("training", 9) as display:
            display(self.iteration(4, reward=0.0))
        assert "going on from iteration 3" in capsys.readouterr().out

    def test_what_phases_took_last(self, capsys):
        with report.training_progress("training", 2) as display:
            phases = {"rollout_seconds": 4.0, "update_seconds": 0.5, "dev_seconds": 20.0}
            display(self.iteration(1, reward=0.25, dev=0.5, dev_prompts=32, **phases))
            display(self.iteration(2, reward=0.75, rollout_seconds=3.0, update_seconds=0.25))
        line = capsys.readouterr().out.rstrip()
        assert line.endswith("reward 0.750, dev 0.500 of 32 prompts (rollout 3 s, update 0.25 s, dev 20 s)")

    def test_without_a_score_on_dev(self, capsys):
        with report.training_progress("training", 1) as display:
            display(self.iteration(1, reward=0.25))
        assert capsys.readouterr().out.rstrip().endswith("s reward 0.250")
