"""A file of every kind that we write and read again, and what reads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rlae_jax import ablate, records
from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.emorl import display, export
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.search import Found, FoundPoint, SearchConfig, SearchRun, read_found
from rlae_jax.emorl.train import (
    AdapterRun,
    AdaptersRun,
    BaseMark,
    PromptsMark,
    Stack,
    Training,
    ValidationLine,
    read_stack,
)
from rlae_jax.evaluation.results import Prediction, join_results
from rlae_jax.fusion.search import ScoredPoint, Scores
from rlae_jax.ppo.train import AgentRun, MemberMark, RewardLine, SplitMark, load_policy, read_run
from rlae_jax.runs.directory import claim_directory
from rlae_jax.runs.metrics import MetricsLog, WandbRun, read_metrics

SETUP: dict[str, Any] = {
    "algorithm": "ppo",
    "task": "toy",
    "examples": {"train": SplitMark(n=2, sha256="0a")},
    "members": [MemberMark(name="left", width=8, sha256="0b"), MemberMark(name="right", width=8, sha256="0c")],
    "fusion": "linear",
    "end_ids": [[3], [3]],
    "spans": 2,
    "text_width": 0,
    "preset": "custom",
    "mesh": {"data": 2, "model": 1},
    "processes": 1,
}
SETTINGS = PPOConfig(agent=AgentConfig(span_lengths=(1, 2)), span_length=1, max_new_tokens=2, eval_prompts=4)
AGENT = AgentRun(**SETUP, settings=SETTINGS)
ABLATION = ablate.AblationRun(**SETUP, base=SETTINGS)
ADAPTERS = AdaptersRun(
    base=BaseMark(name="base", path="nowhere", sha256="0d", quantise="int8", quantise_head=True, quantise_group=32),
    prompts=PromptsMark(name="few", sha256={"train": "0e"}),
    data={"path": "reflections", "layout": "auto", "prompt_field": "prompt"},
    settings=EMORLConfig(),
)
SEARCH = SearchRun(
    mode="hidden",
    adapters=["brevity", "coverage"],
    members=["0f"],
    objectives=["a"],
    prompts="10",
    settings=SearchConfig(),
)
FOUND = Found(
    weights={"brevity": 0.5, "coverage": 1.0},
    score=0.5,
    scores={"brevity": 0.5},
    points=1,
    evaluations=1,
    answers=3,
    pareto=[FoundPoint(weights=[0.5, 1.0], scores=[0.5])],
    hypervolume=0.25,
    rank_correlations={"brevity": None},
    seconds=1.5,
    mode="hidden",
)
TRAINING = Training(
    steps=4,
    converged=False,
    best_step=2,
    best_dev=0.5,
    data_points=8,
    validation_points=6,
    points_to_95_percent=4,
    stopping_floor=4,
    seconds=1.0,
    seconds_shared=0.5,
)
RESULTS = {
    "schema": 1,
    "task": "toy",
    "split": "test",
    "objectives": ["reward"],
    "methods": {
        "rlae_ppo": {
            "score": 0.5,
            "accuracy": None,
            "n": 2,
            "ci95": [0.0, 1.0],
            "per_seed": [0.5],
            "scores": {"reward": 0.5},
            "ms_per_token": 1.0,
            "ms_per_answer": 2.0,
            "reference": False,
            "searched": 3,
        }
    },
    "differences": [],
    "sampled": {"temperature": 1.0},
    "seconds": {"evaluation": 1.0, "total": 2.0},
    "environment": {"jax": "1"},
    "verdict": "good",
}
PREDICTIONS = [
    records.plain(
        Prediction(
            method="rlae_ppo",
            seed=0,
            decoding="greedy",
            index=i,
            prompt="a",
            reference="b",
            text="b",
            reward=i / 2,
            scores={"reward": 0.5},
            finish_reason="stop",
            weights=[[0.5, 0.5]],
        )
    )
    for i in range(2)
]
VALIDATIONS = [
    {
        **{"iteration": i, "dev": 0.5, "scores": {"brevity": 0.5}, "reward": 0.5, "weights": [0.5, 0.5]},
        **{"seconds": 1.0, "adapters": 1, "validated": 3, "trained": i > 0},
    }
    for i in (0, 2)
]


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in value))
    else:
        path.write_text(json.dumps(value))


def make(root: Path) -> None:
    """Files of every kind in a directory, in which runs lie as commands leave them."""
    write(root / "agent" / "config.json", records.plain(AGENT))
    write(root / "agent" / "metrics.jsonl", VALIDATIONS)
    write(root / "agent" / "wandb-run.json", records.plain(WandbRun(id="abc")))
    write(root / "evaluated" / "results.json", RESULTS)
    write(root / "evaluated" / "predictions.jsonl", PREDICTIONS)
    write(root / "adapters" / "config.json", records.plain(ADAPTERS))
    write(root / "adapters" / "stack.json", records.plain(Stack(steps={"brevity": 2, "coverage": None})))
    for name in ("brevity", "coverage"):
        directory = root / "adapters" / "objectives" / name
        write(directory / "config.json", records.plain(AdapterRun(objectives=[name], weighting="equal", specs=[name])))
        write(directory / "metrics.jsonl", VALIDATIONS)
        write(directory / "training.json", records.plain(TRAINING))
        (directory / "adapter").mkdir()
    search = root / "adapters" / "search"
    write(search / "hidden" / "config.json", records.plain(SEARCH))
    write(search / "hidden" / "search.json", records.plain(FOUND))
    points = [ScoredPoint(point=[i / 2, 1.0], scores=[0.5, 0.25]) for i in range(3)]
    write(search / "hidden" / "points.jsonl", list(map(records.plain, points)))
    members = [MemberMark(name=name, width=8, sha256="0a") for name in ("brevity", "coverage")]
    write(search / "agent" / "config.json", records.plain(AGENT) | {"members": [records.plain(one) for one in members]})
    write(root / "ablation" / "config.json", records.plain(ABLATION))


def adapters(root: Path) -> Run:
    return Run(root / "adapters")


def scored(root: Path) -> Any:
    known = Scores(lambda points: np.ones((len(points), 2)), path=root, sizes=(2, 2), scale_invariant=True)
    return known(np.array([[0.5, 1.0], [0.25, 0.5]]))


def room(root: Path, name: str, names: list[str]) -> None:
    """Makes room for a search, and undoes it."""
    path, kept = adapters(root).room_for_search(name, names)
    assert path == root / "adapters" / "search" / name
    if kept is not None:
        assert kept.parent == path.parent
        kept.rename(path)


def log(directory: Path) -> None:
    MetricsLog(directory, 2).close()


# File -> what reads it, of the root, in every way in which a command does.
READERS: dict[str, list[Callable[[Path], Any]]] = {
    "agent/config.json": [
        lambda root: load_policy(root / "agent"),
        lambda root: load_policy(root / "agent", seed=0),
        lambda root: claim_directory(root / "agent", SEARCH, resume=True),
        lambda root: claim_directory(root / "agent", AGENT, resume=True),
    ],
    "agent/metrics.jsonl": [lambda root: read_metrics(root / "agent", RewardLine), lambda root: log(root / "agent")],
    "agent/wandb-run.json": [lambda root: records.read(root / "agent" / "wandb-run.json", WandbRun)],
    "ablation/config.json": [lambda root: claim_directory(root / "ablation", ABLATION, resume=True)],
    "evaluated/results.json": [
        lambda root: join_results([root / "evaluated"]),
        lambda root: join_results([root / "evaluated", root / "evaluated"]),
        lambda root: (found := ablate._finished(root / "evaluated", "test", 2)) and ablate._scores(found),
    ],
    "evaluated/predictions.jsonl": [lambda root: join_results([root / "evaluated", root / "evaluated"])],
    "adapters/config.json": [
        lambda root: adapters(root).data.read().split("dev"),
        lambda root: adapters(root).base,
        lambda root: adapters(root).prompts,
        lambda root: adapters(root).objectives(["brevity"]),
        lambda root: claim_directory(root / "adapters", ADAPTERS, resume=True),
    ],
    "adapters/stack.json": [lambda root: read_stack(root / "adapters")],
    "adapters/objectives/brevity/config.json": [
        lambda root: adapters(root).singles(),
        lambda root: adapters(root).objectives(adapters(root).singles()),
        lambda root: claim_directory(
            root / "adapters" / "objectives" / "brevity",
            AdapterRun(objectives=["brevity"], weighting="equal", specs=["brevity"]),
            resume=True,
        ),
    ],
    "adapters/objectives/brevity/metrics.jsonl": [
        lambda root: read_metrics(root / "adapters" / "objectives" / "brevity", ValidationLine),
        lambda root: log(root / "adapters" / "objectives" / "brevity"),
    ],
    "adapters/objectives/brevity/training.json": [lambda root: display.show_training(adapters(root))],
    "adapters/search/hidden/config.json": [
        lambda root: room(root, "hidden", ["brevity", "coverage"]),
        lambda root: room(root, "hidden", ["brevity"]),
        lambda root: claim_directory(root / "adapters" / "search" / "hidden", SEARCH, resume=True),
    ],
    "adapters/search/hidden/search.json": [
        lambda root: read_found(root / "adapters" / "search" / "hidden", adapters(root).targets()),
        lambda root: export._chosen(adapters(root), "hidden", None, ()),
        lambda root: export._chosen(adapters(root), "hidden", [0.5, 0.5], ()),
    ],
    "adapters/search/hidden/points.jsonl": [
        lambda root: scored(root / "adapters" / "search" / "hidden" / "points.jsonl")
    ],
    "adapters/search/agent/config.json": [
        lambda root: read_run(root / "adapters" / "search" / "agent").members,
        lambda root: room(root, "agent", ["brevity", "coverage"]),
    ],
}
