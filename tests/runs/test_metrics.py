"""The metrics file, and where its lines go besides."""

import json
import sys
import types

import pytest

from rlae_jax.runs import metrics
from rlae_jax.runs.metrics import MetricsLog, read_metrics


class StandIn(types.ModuleType):
    """As much of tensorboardX and of wandb as is used; keeps what it is told."""

    def __init__(self, name):
        super().__init__(name)
        self.written, self.opened, self.closed = [], [], 0

    def SummaryWriter(self, directory, *, purge_step):
        self.opened.append((directory, purge_step))
        return types.SimpleNamespace(
            add_scalar=lambda name, value, step: self.written.append((step, name, value)),
            flush=lambda: None,
            close=self.close,
        )

    def init(self, **options):
        self.opened.append(options)

        def log(values, *, step):
            self.written.extend((step, name, value) for name, value in values.items())

        return types.SimpleNamespace(id=options["id"] or "made-up", log=log, finish=self.close)

    def close(self):
        self.closed += 1


@pytest.fixture(params=["tensorboard", "wandb"])
def sink(request, monkeypatch):
    """(name, stand-in module)."""
    name = metrics.SINKS[request.param][0]
    module = StandIn(name)
    monkeypatch.setitem(sys.modules, name, module)
    return request.param, module


def test_a_log_forgets_what_came_after_the_iteration(tmp_path):
    log = MetricsLog(tmp_path, 0)
    for i in (1, 2, 3):
        log.write(i, {"reward": i / 4})
    log.close()
    with (tmp_path / metrics.FILE_NAME).open("a") as file:
        file.write('{"iteration": 4, "rew')
    MetricsLog(tmp_path, 2).close()
    assert read_metrics(tmp_path) == [{"iteration": 1, "reward": 0.25}, {"iteration": 2, "reward": 0.5}]


def test_lines_go_to_a_sink_as_scalars(tmp_path, sink):
    name, module = sink
    log = MetricsLog(tmp_path, 2, sinks=(name,))
    log.write(3, {"reward": 0.5, "updates": 7, "dev_per_seed": [0.25, 1.0]})
    log.close()
    expected = {"reward": 0.5, "updates": 7.0, "dev_per_seed/0": 0.25, "dev_per_seed/1": 1.0}
    assert module.written == [(3, tag, value) for tag, value in expected.items()]
    assert module.closed == 1
    assert read_metrics(tmp_path) == [{"iteration": 3, "reward": 0.5, "updates": 7, "dev_per_seed": [0.25, 1.0]}]


def test_a_resumed_run_goes_on_in_the_same_place(tmp_path, sink):
    name, module = sink
    (tmp_path / "config.json").write_text(json.dumps({"task": "toy"}))
    for iteration in (0, 5):
        MetricsLog(tmp_path, iteration, sinks=(name,)).close()
    if name == "tensorboard":
        assert module.opened == [(str(tmp_path / "tensorboard"), 1), (str(tmp_path / "tensorboard"), 6)]
    else:
        assert [options["id"] for options in module.opened] == [None, "made-up"]
        assert all(options["config"] == {"task": "toy"} for options in module.opened)
        assert all(options["resume"] == "allow" for options in module.opened)


@pytest.mark.parametrize("name", metrics.SINKS)
def test_a_package_that_is_not_there(tmp_path, monkeypatch, raises_input_error, name):
    monkeypatch.setitem(sys.modules, metrics.SINKS[name][0], None)
    (tmp_path / metrics.FILE_NAME).write_text('{"iteration": 1}\n')
    message = raises_input_error(
        lambda: MetricsLog(tmp_path, 0, sinks=(name,)), name, metrics.SINKS[name][0], "pip install 'rlae_jax[log]'"
    )
    assert len(message.splitlines()) == 1
    assert read_metrics(tmp_path) == [{"iteration": 1}]


def test_an_unknown_sink(tmp_path, raises_input_error):
    raises_input_error(lambda: MetricsLog(tmp_path, 0, sinks=("tensorbord",)), "'tensorbord'", "tensorboard, wandb")


def test_without_sinks_no_package_is_imported(tmp_path, monkeypatch):
    for module, _ in metrics.SINKS.values():
        monkeypatch.setitem(sys.modules, module, None)
    MetricsLog(tmp_path, 0).close()
