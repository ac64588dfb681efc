"""The claims of EMORL's abstract on the embedded task: what was measured, its interval, and a verdict as it comes out.

    python -m benchmarks.claims_emorl [--quick] [--json PATH] [--out DIR]

For every seed the base is pretrained anew, and adapters of one rank, learning rate, stopping rule and longest answer
are fine-tuned from it: one per objective, one for all three at once (uniform_reward), and two whose weights a bandit
sets (dynaopt, and dynaopt_reference as its published code has it). All learn self-critically (SCST); those of one
objective and uniform_reward also by GRPO, from as many samples a step. Weights are searched on dev prompts; test
prompts are read once. Greedy and sampled answers have tables of their own. A picture shows dev scores over the data
points that each method had taken, for which adapters are kept while they learn.

- E1: data points and seconds, and how steady they are, against training on all objectives at once.
- E2: a fourth objective, without training the others again.
- E3: the weights can be read: the rank correlation of w_m and score m over the searched points.
- E4: the score, against the baselines.
- E4': the same of agents over fused adapters, against uniform_reward trained on as many data points as the adapters and
  the agent together; and GRPO against SCST.
- E5: fused hidden states against fused probabilities, log-probabilities and parameters.
- E6: what the hierarchical search costs and finds, against a full grid, with one box and with three.

Everything goes into DIR, a piece at a time: after an interruption the same command goes on. Two seeds are run side by
side on one core each; only the times of E1 are taken alone, on all cores.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rlae_jax as rj
from benchmarks import common, study
from benchmarks.study import CLAIM_COLUMNS, claim, claim_cells, sign_verdict
from rlae_jax import files, records, report, statistics
from rlae_jax.config import PPOConfig
from rlae_jax.emorl import embedded, evaluation
from rlae_jax.emorl.agent import train_agent
from rlae_jax.emorl.fused import MODES, Fused
from rlae_jax.emorl.run import BASELINES, Data, Run, make_targets
from rlae_jax.emorl.search import SEARCH_FILE, Found, SearchConfig, search
from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE, Progress, Target, Training, train_adapters
from rlae_jax.evaluation.results import read_results
from rlae_jax.models import Adapter, load_adapter, save_adapter
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import reflections

THREE, FOUR = embedded.OBJECTIVES, embedded.ALL
_EVERY = embedded.settings().validate_every
_PER_STEP = embedded.settings().batch * embedded.settings().samples  # data points
UNIFORM_FOUR = "uniform_four"  # one adapter for all four objectives
COMPARABLE = 0.05  # "comparable" reward: at most this much below
BEST_SINGLE, AGENT, GRID, FUSED_FOUR = "best single", "rlae_ppo", "grid", "hidden, four"
SCST, GRPO = "seeds", "grpo"  # the directories of the runs by how adapters learn
EQUAL = "uniform_reward, equal data"  # with the adapters' and an agent's data points
HIDDEN_GRPO, UNIFORM_GRPO = "hidden, grpo", "uniform_reward, grpo"
AGENT_SAMPLED, AGENT_GRPO = "rlae_ppo, sampled", "rlae_ppo, grpo"
ROLLOUT = 128  # prompts of an agent's iteration
GAPS = ("hidden", "probs")  # the modes whose searches are compared with a full grid
BEAMS = 3
DATA = Data(reflections.NAME)

HISTORY = (
    "The task, the settings of training and how long agents train were chosen before this study while looking at other "
    "seeds, 100 to 103, at their test scores, too. With a first form of the task, in which a list of keywords "
    "had no end of its own, five seeds had missed single_low (0.755), hidden_gain (0.068) and search_gap (0.086). "
    "After a page with five seeds, one box and agents of 80 iterations had been read, its test scores, too, these were "
    "added: searches with three boxes, GRPO, agents that train on sampled answers, longer training of agents, and "
    "uniform_reward at equal data."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
      steps: of fine-tuning at most.
      search_prompts: dev prompts of every search; a grid has points at multiples of `grid_step`.
      snapshot_every: steps after which adapters are kept for the learning curves.
    """

    seeds: int = 5
    base_steps: int = embedded.STEPS
    steps: int = 480
    levels: int = 5
    search_prompts: int = 64
    grid_step: float = 0.125
    iterations: int = 200
    test_prompts: int = 512
    timed_rounds: int = 8
    snapshot_every: int = 80


FULL = Plan()
QUICK = Plan(
    *(1, 700, 120, 2, 32, 0.25),
    iterations=20,
    test_prompts=128,
    timed_rounds=3,
    snapshot_every=40,
)


# --- pieces of work; each leaves files behind, and is done if they exist ---


def cell(out: Path, seed: int, kind: str = SCST) -> Path:
    """Where a seed's run lies."""
    return out / kind / f"seed-{seed}"


def settings(plan: Plan, seed: int, **changes: Any) -> Any:
    """The same for all adapters, but for how they learn."""
    return embedded.settings(**{"steps": plan.steps, "seed": seed} | changes)


def base_of(out: Path, plan: Plan, seed: int) -> rj.LM:
    return rj.load(embedded.build_base(out / "models", seed, plan.base_steps))


def train_base(out: Path, plan: Plan, seed: int) -> None:
    base_of(out, plan, seed)


def fine_tune(out: Path, plan: Plan, seed: int, part: str) -> None:
    """Part "three": the objectives that there are at first, and what is taught all of them. "four": the one that comes
    later, and what is taught all four. "grpo": the three and uniform_reward by GRPO. "equal": uniform_reward without a
    stopping rule, on as many data points as the three adapters took and an agent takes."""
    kind, changes = SCST, {}
    if part == "three":
        targets = make_targets(THREE, list(BASELINES), DATA)
    elif part == "four":
        every = tuple(embedded.objective(name) for name in FOUR)
        targets = [*make_targets([embedded.LATER], [], DATA), Target(UNIFORM_FOUR, every, specs=FOUR)]
    elif part == GRPO:
        kind, changes = GRPO, {"algorithm": "grpo", "epochs": 2}  # with one update the ratio is never clipped
        targets = make_targets(THREE, ["uniform_reward"], DATA)
    else:
        points = data_points(out, seed) + plan.iterations * ROLLOUT
        kind, changes = "equal", {"steps": max(points // _PER_STEP // _EVERY, 1) * _EVERY, "threshold": 0.0}
        targets = [one for one in make_targets(THREE, ["uniform_reward"], DATA) if len(one.objectives) > 1]
    base, directory = base_of(out, plan, seed), cell(out, seed, kind)
    train_adapters(
        *(base, targets, DATA.read(), settings(plan, seed, **changes), directory),
        resume=True,
        data=dataclasses.asdict(DATA),
        on_progress=_keep_snapshots(directory, base, plan.snapshot_every),
    )


def training_of(directory: Path, name: str) -> Training:
    """What an adapter of a run took."""
    return records.read(directory / OBJECTIVES / name / TRAINING_FILE, Training)


def data_points(out: Path, seed: int, kind: str = SCST, steps: int | None = None) -> int:
    """What the three adapters took together, when each had had so many steps at most."""
    taken = (training_of(cell(out, seed, kind), name).steps for name in THREE)
    return sum(one if steps is None else min(one, steps) for one in taken) * _PER_STEP


def snapshot(directory: Path, name: str, step: int) -> Path:
    """Where an adapter is kept as it was after so many steps."""
    return directory / "snapshots" / name / str(step)


def _keep_snapshots(directory: Path, base: rj.LM, every: int) -> Callable[[Progress], None]:
    """What keeps adapters of one objective while they learn."""

    def keep(progress: Progress) -> None:
        for name, step in progress.steps.items():
            path = snapshot(directory, name, step)
            if name in THREE and step % every == 0 and name not in progress.done and not path.is_dir():
                save_adapter(progress.adapter(name), base, path)

    return keep


class Sought(NamedTuple):
    """What is searched, and how."""

    adapters: Sequence[str] = THREE
    mode: str = "hidden"
    method: str = "hierarchical"
    beams: int = 1
    kind: str = SCST


SEARCHES = {
    **{mode: Sought(mode=mode) for mode in MODES},
    **{f"{GRID}-{mode}": Sought(mode=mode, method="grid") for mode in GAPS},
    **{f"{mode}-beams": Sought(mode=mode, beams=BEAMS) for mode in GAPS},
    "four": Sought(FOUR),
    GRPO: Sought(kind=GRPO),
}
# Agents over the three adapters: whose, and the temperature of the answers that they learn from.
AGENTS = {"agent": (SCST, 0.0), "agent-sampled": (SCST, 1.0), "agent-grpo": (GRPO, 0.0)}


def find_weights(out: Path, plan: Plan, seed: int, name: str) -> None:
    """A search, or an agent, which sets weights for every token."""
    if name in AGENTS:
        kind, temperature = AGENTS[name]
        run = Run(cell(out, seed, kind))
        ppo = PPOConfig(
            iterations=plan.iterations,
            prompts=ROLLOUT,
            eval_prompts=64,
            eval_every=max(plan.iterations // 10, 1),
            seed=seed,
            temperature=temperature,
        )
        train_agent(
            *(fused_of(out, plan, seed, Sought(kind=kind)), run.prompts, run.objectives(THREE), ppo),
            out=run.search_directory(name),
            max_new_tokens=embedded.MAX_NEW_TOKENS,
            span_length=1,
            resume=True,
        )
        return
    sought = SEARCHES[name]
    config = SearchConfig(
        method=sought.method,
        levels=plan.levels if sought.adapters == THREE else min(plan.levels, 3),
        beams=sought.beams,
        step=plan.grid_step,
        max_new_tokens=embedded.MAX_NEW_TOKENS,
        seed=seed,
    )
    where = Run(cell(out, seed, sought.kind)).search_directory(name)
    _search(out, plan, seed, sought, fused_of(out, plan, seed, sought), config, where)


def _search(out: Path, plan: Plan, seed: int, sought: Sought, fused: Fused, config: SearchConfig, where: Path) -> None:
    run = Run(cell(out, seed, sought.kind))
    if not (where / SEARCH_FILE).is_file():
        dev = run.prompts.split("dev")[: plan.search_prompts]
        search(fused, dev, run.objectives(sought.adapters), config, where, resume=True)


def search_snapshots(out: Path, plan: Plan, seed: int, kind: str) -> None:
    """What the three adapters are worth together while they learn: one level of a search at every snapshot."""
    directory = cell(out, seed, kind)
    run, base = Run(directory), base_of(out, plan, seed)
    config = SearchConfig(levels=1, max_new_tokens=embedded.MAX_NEW_TOKENS, seed=seed)

    def at(name: str, step: int) -> Adapter:
        if step >= training_of(directory, name).steps:
            return run.adapter(name)
        return dataclasses.replace(load_adapter(snapshot(directory, name, step), base), name=name)

    for step in snapshot_steps(out, plan, seed, kind):
        fused = Fused(base, [at(name, step) for name in THREE])
        _search(out, plan, seed, Sought(kind=kind), fused, config, directory / "snapshots" / "searches" / str(step))


def snapshot_steps(out: Path, plan: Plan, seed: int, kind: str) -> list[int]:
    """After how many steps the adapters were kept, up to when the last one ended."""
    last = max(training_of(cell(out, seed, kind), name).steps for name in THREE)
    return list(range(plan.snapshot_every, last + 1, plan.snapshot_every))


def fused_of(out: Path, plan: Plan, seed: int, sought: Sought) -> Fused:
    run = Run(cell(out, seed, sought.kind))
    return Fused(base_of(out, plan, seed), [run.adapter(name) for name in sought.adapters], sought.mode)


def searched(out: Path, seed: int, name: str) -> Found:
    return records.read(Run(cell(out, seed, SEARCHES[name].kind)).search_directory(name) / SEARCH_FILE, Found)


def answer_tests(out: Path, plan: Plan, seed: int, part: str) -> None:
    """All methods on the test prompts: under three objectives, or those of the fourth under four."""
    run = Run(cell(out, seed))
    directory = run.directory / "test" / part
    if (directory / "results.json").is_file():
        return
    names = THREE if part == "three" else FOUR
    fusions = {mode: mode for mode in MODES} if part == "three" else {FUSED_FOUR: "four"}  # method -> search
    adapters = [run.adapter(name) for name in run.targets()]
    if part == "three":
        fusions[HIDDEN_GRPO] = GRPO
        for name, kind in ((UNIFORM_GRPO, GRPO), (EQUAL, "equal")):
            other = Run(cell(out, seed, kind)).adapter("uniform_reward")
            adapters.append(dataclasses.replace(other, name=name))
    adapted = evaluation.adapted(run.base, adapters)
    trained = (*BASELINES, EQUAL, UNIFORM_GRPO) if part == "three" else (UNIFORM_FOUR,)
    methods = {name: adapted[name] for name in ("base", *names, *trained)}
    for method, search_name in fusions.items():
        fused = fused_of(out, plan, seed, SEARCHES[search_name])
        methods[method] = evaluation.fusion(fused, list(searched(out, seed, search_name).weights.values()))
    if part == "three":
        for method, (name, (kind, _)) in zip((AGENT, AGENT_SAMPLED, AGENT_GRPO), AGENTS.items(), strict=True):
            policy = rj.load_policy(Run(cell(out, seed, kind)).search_directory(name))
            methods[method] = evaluation.fusion(fused_of(out, plan, seed, Sought(kind=kind)), policy)
    evaluation.evaluate(
        *(methods, run.prompts.split("test")[: plan.test_prompts], run.objectives(names)),
        task=run.prompts.name,
        split="test",
        max_new_tokens=embedded.MAX_NEW_TOKENS,
        seed=seed,
        out=directory,
    )


def run_all(out: Path, plan: Plan) -> None:
    """Everything that takes long."""
    seeds = range(plan.seeds)

    def pieces(parts: Sequence[str]) -> list[tuple[Any, ...]]:
        return [(out, plan, seed, part) for part in parts for seed in seeds]

    phases: list[study.Phase] = [
        ("base models", train_base, [(out, plan, seed) for seed in seeds]),
        ("adapters", fine_tune, pieces(("three", GRPO))),
        ("later adapters", fine_tune, pieces(("four", "equal"))),  # into a run, and from what one took
        ("weights", find_weights, pieces((*AGENTS, *SEARCHES))),
        ("snapshots", search_snapshots, pieces((SCST, GRPO))),
        ("test prompts", answer_tests, pieces(("three", "four"))),
    ]
    study.run_phases(out / "workers.log", phases)


def time_training(out: Path, plan: Plan) -> dict[str, float]:
    """Median seconds of a round (`validate_every` steps and a validation): of each adapter alone, one after another,
    and of the three as a stack. All cores, seed 0; rounds of the first run of each kind compile and are not counted."""
    path = out / "times.json"
    if path.is_file():
        return records.read(path, dict[str, records.Seconds])
    base, prompts = base_of(out, plan, 0), DATA.read()
    every = settings(plan, 0).validate_every
    config = dataclasses.replace(settings(plan, 0), steps=every * plan.timed_rounds, window=10_000)
    singles = make_targets(THREE, [], DATA)
    (uniform,) = (target for target in make_targets(THREE, ["uniform_reward"], DATA) if len(target.objectives) > 1)
    kinds = {"stacked": singles, **{target.name: [target] for target in singles}, "uniform_reward": [uniform]}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with report.progress("times of training", 3 * len(kinds), "runs") as update:
        for turn in range(3):  # the first of which compiles
            for i, (name, targets) in enumerate(kinds.items()):
                directory = out / "times" / str(turn) / name
                train_adapters(base, targets, prompts, config, directory, resume=True)
                rows = read_metrics(directory / OBJECTIVES / targets[0].name)
                if turn:
                    seconds[name] += [row["seconds"] for row in rows if row["trained"]]
                update(turn * len(kinds) + i + 1, name)
    medians = {name: float(np.median(own)) for name, own in seconds.items()}
    files.write_json(path, medians)
    return medians


# --- what was measured ---


@dataclasses.dataclass(frozen=True)
class Measurements:
    """All results, a list entry per seed."""

    three: list[dict[str, Any]]  # results.json under three objectives
    four: list[dict[str, Any]]
    training: list[dict[str, dict[str, Any]]]  # adapter -> training.json
    searches: list[dict[str, dict[str, Any]]]  # search -> search.json
    times: Mapping[str, float]
    curves: list[dict[str, dict[str, "Curve"]]] = dataclasses.field(default_factory=list)  # panel -> method

    def scores(self, name: str, way: str = "greedy", four: bool = False) -> np.ndarray:
        """A method's test score of each seed. `BEST_SINGLE` is each seed's best adapter of one objective."""
        tables = [part if way == "greedy" else part["sampled"] for part in (self.four if four else self.three)]
        names = (FOUR if four else THREE) if name == BEST_SINGLE else (name,)
        return np.array([max(table["methods"][one]["score"] for one in names) for table in tables])

    def of_training(self, name: str, key: str) -> np.ndarray:
        return np.array([part[name][key] for part in self.training], np.float64)


def collect(out: Path, plan: Plan) -> Measurements:
    """What the pieces left."""
    cells = [cell(out, seed) for seed in range(plan.seeds)]
    names = (*FOUR, *BASELINES, UNIFORM_FOUR)
    three, four = ([records.plain(read_results(one / "test" / where)) for one in cells] for where in ("three", "four"))
    training = [{name: records.plain(training_of(one, name)) for name in names} for one in cells]
    seeds = range(plan.seeds)
    searches = [{name: records.plain(searched(out, seed, name)) for name in SEARCHES} for seed in seeds]
    curves = [curves_of(out, plan, seed) for seed in seeds]
    return Measurements(three, four, training, searches, time_training(out, plan), curves)


Curve = Sequence[tuple[float, float]]  # data points, score on dev
JOINT, OWN = "mean of the three objectives", "each adapter, its own objective"


def curves_of(out: Path, plan: Plan, seed: int) -> dict[str, dict[str, Curve]]:
    """A seed's dev scores over the data points that had been taken."""

    def learnt(kind: str, name: str) -> Curve:
        rows = read_metrics(cell(out, seed, kind) / OBJECTIVES / name)
        return [(row["iteration"] * _PER_STEP, row["dev"]) for row in rows]

    def fused(kind: str) -> Curve:
        places = [
            (step, cell(out, seed, kind) / "snapshots" / "searches" / str(step) / SEARCH_FILE)
            for step in snapshot_steps(out, plan, seed, kind)
        ]
        found = [(step, records.read(path, Found)) for step, path in places]
        return [(data_points(out, seed, kind, step) + one.answers, one.score) for step, one in found]

    def agent(name: str) -> Curve:
        kind = AGENTS[name][0]
        rows = read_metrics(Run(cell(out, seed, kind)).search_directory(name))
        before = data_points(out, seed, kind)
        return [(before + row["iteration"] * ROLLOUT, row["dev"]) for row in rows if "dev" in row]

    return {
        JOINT: {
            **{name: learnt(SCST, name) for name in BASELINES},
            EQUAL: learnt("equal", "uniform_reward"),
            UNIFORM_GRPO: learnt(GRPO, "uniform_reward"),
            "hidden": fused(SCST),
            HIDDEN_GRPO: fused(GRPO),
            **{label: agent(name) for label, name in zip((AGENT, AGENT_SAMPLED, AGENT_GRPO), AGENTS, strict=True)},
        },
        OWN: {
            **{name: learnt(SCST, name) for name in THREE},
            **{f"{name}, grpo": learnt(GRPO, name) for name in THREE},
        },
    }


def band(curves: Sequence[Curve]) -> tuple[list[float], list[float], list[float], list[float]]:
    """Data points, and the mean over seeds with its interval. A seed that has ended keeps its last score."""
    begin = max(curve[0][0] for curve in curves)
    places = sorted({x for curve in curves for x, _ in curve if x >= begin})
    tables = [np.array(curve, np.float64) for curve in curves]
    values = np.stack([np.interp(np.array(places), table[:, 0], table[:, 1]) for table in tables], axis=1)
    low, high = zip(*map(_interval, values), strict=True)
    return places, values.mean(axis=1).tolist(), list(low), list(high)


def draw_curves(out: Path, measured: Measurements) -> None:
    """curves.png."""
    panels = {
        panel: {name: band([one[panel][name] for one in measured.curves]) for name in lines}
        for panel, lines in measured.curves[0].items()
    }
    title = f"{len(measured.curves)} {'seeds' if len(measured.curves) > 1 else 'seed'}, dev prompts, greedy answers"
    report.curves_with_bands(out / "curves.png", panels, "data points of training (prompts times samples)", title)


def _interval(values: np.ndarray) -> tuple[float, float]:
    return statistics.t_interval(values.tolist()) if len(values) > 1 else (float(values[0]),) * 2


def _difference(name: str, said: str, values: np.ndarray) -> dict[str, Any]:
    """A claim that these differences, one per seed, are above 0."""
    interval = _interval(values)
    return claim(name, said, float(values.mean()), interval, sign_verdict(interval))


def accounts(measured: Measurements) -> dict[str, dict[str, np.ndarray]]:
    """Method -> account -> one number per seed."""

    def of_one(name: str) -> dict[str, np.ndarray]:
        seconds = measured.of_training(name, "steps") * measured.times["uniform_reward"] / _EVERY
        return {
            "training": measured.of_training(name, "data_points"),
            "search": np.zeros(len(measured.training)),
            "largest adapter": measured.of_training(name, "data_points"),
            "to 95%": measured.of_training(name, "points_to_95_percent"),
            "validation": measured.of_training(name, "validation_points"),
            "seconds, one after another": seconds,
            "seconds, stacked": seconds,
        }

    steps = np.stack([measured.of_training(name, "steps") for name in THREE])
    rounds = np.sort(steps, axis=0) / _EVERY
    alone = np.array([measured.times[name] for name in THREE])
    # While n adapters are left a round takes the n-th part between one adapter's time and the whole stack's.
    shares = [measured.times["stacked"], np.mean([measured.times["stacked"], alone.mean()]), alone.mean()]
    stacked = sum(np.diff(rounds, axis=0, prepend=0)[i] * shares[i] for i in range(len(THREE)))
    points = np.stack([measured.of_training(name, "data_points") for name in THREE])
    fused = {
        "training": points.sum(axis=0),
        "search": np.array([part["hidden"]["answers"] for part in measured.searches], np.float64),
        "largest adapter": points.max(axis=0),
        "to 95%": sum(measured.of_training(name, "points_to_95_percent") for name in THREE),
        "validation": sum(measured.of_training(name, "validation_points") for name in THREE),
        "seconds, one after another": (steps / _EVERY * alone[:, None]).sum(axis=0),
        "seconds, stacked": np.asarray(stacked),
    }
    return {"hidden": fused, **{name: of_one(name) for name in BASELINES}}


def cost_claims(measured: Measurements) -> list[dict[str, Any]]:
    """E1, in every account."""
    table = accounts(measured)
    fused = table["hidden"]
    claims = []
    for other in ("uniform_reward", "dynaopt"):
        theirs = table[other]
        ways = {
            "training": (fused["training"], theirs["training"]),
            "training and search": (fused["training"] + fused["search"], theirs["training"]),
            "largest adapter": (fused["largest adapter"], theirs["training"]),
            "to 95% of the final score": (fused["to 95%"], theirs["to 95%"]),
            "seconds, one after another": (fused["seconds, one after another"], theirs["seconds, stacked"]),
            "seconds, stacked": (fused["seconds, stacked"], theirs["seconds, stacked"]),
        }
        for way, (ours, others) in ways.items():
            ratio = ours / np.maximum(others, 1e-9)
            interval = _interval(ratio)
            verdict = "holds" if interval[1] < 1 else "fails" if interval[0] >= 1 else "undecided"
            said = f"{way}: {ours.mean():,.0f} against {others.mean():,.0f}"
            claims.append(claim(f"E1 less than {other}, {way}", said, float(ratio.mean()), interval, verdict, sign=""))
        spreads = [values.std(ddof=1) / values.mean() if len(values) > 1 else 0.0 for values in ways["training"]]
        verdict = "undecided" if len(ratio) < 2 else "holds" if spreads[0] < spreads[1] else "fails"
        said = f"standard deviation over mean of the data points: {spreads[0]:.3f} against {spreads[1]:.3f}"
        claims.append(claim(f"E1 steadier than {other}", said, None, None, verdict))
    return claims


def score_claims(measured: Measurements) -> list[dict[str, Any]]:
    """E2 to E6, and what an agent adds."""
    agent = measured.scores(AGENT) - measured.scores("hidden")
    scores = (f"{measured.scores(name).mean():.3f}" for name in (AGENT, "hidden"))
    said = f"{' against '.join(scores)} under searched fixed weights"
    return [
        fourth_claim(measured),
        *weight_claims(measured),
        *reward_claims(measured, "greedy"),
        *reward_claims(measured, "sampled"),
        *agent_claims(measured, "greedy"),
        *agent_claims(measured, "sampled"),
        *search_claims(measured),
        _difference("an agent's weights above fixed ones", said, agent),
    ]


def fourth_claim(measured: Measurements) -> dict[str, Any]:
    """E2."""
    ours, theirs = measured.scores(FUSED_FOUR, four=True), measured.scores(UNIFORM_FOUR, four=True)
    searched = [part["four"]["answers"] for part in measured.searches]
    cost = measured.of_training(embedded.LATER, "data_points") + searched
    retraining = measured.of_training(UNIFORM_FOUR, "data_points")
    said = (
        f"fused {ours.mean():.3f} against {theirs.mean():.3f} retrained; {cost.mean():,.0f} data points (search "
        f"included) against {retraining.mean():,.0f}"
    )
    return _difference("E2 fourth objective as good as retraining", said, ours - theirs)


def weight_claims(measured: Measurements) -> list[dict[str, Any]]:
    """E3."""
    claims = []
    for mode in ("hidden", "params"):
        for m, name in enumerate(THREE):
            values = np.array([part[mode]["rank_correlations"][name] or 0.0 for part in measured.searches])
            said = f"rank correlation of the share of w_{m + 1} and {name} over the searched points"
            claims.append(_difference(f"E3 weights can be read, {mode}, {name}", said, values))
    return claims


def reward_claims(measured: Measurements, way: str) -> list[dict[str, Any]]:
    """E4 and E5 of greedy or sampled answers."""
    claims = []
    hidden = measured.scores("hidden", way)

    def above(experiment: str, other: str) -> dict[str, Any]:
        theirs = measured.scores(other, way)
        said = f"{hidden.mean():.3f} against {theirs.mean():.3f}, {way}"
        return _difference(f"{experiment} above {other}, {way}", said, hidden - theirs)

    for other in (*BASELINES, "params", BEST_SINGLE, "base"):
        row = above("E4", other)
        if other in BASELINES:
            low, high = row["ci95"]
            verdict = "holds" if low >= -COMPARABLE else "fails" if high < -COMPARABLE else "undecided"
            row |= {"claim": f"E4 comparable to {other} (at most {COMPARABLE} below), {way}", "verdict": verdict}
        claims.append(row)
    return claims + [above("E5 hidden", other) for other in ("probs", "loglinear", "params")]


def agent_claims(measured: Measurements, way: str) -> list[dict[str, Any]]:
    """E4'."""
    pairs = [(ours, EQUAL) for ours in (AGENT, AGENT_SAMPLED, AGENT_GRPO, HIDDEN_GRPO)]
    pairs += [(UNIFORM_GRPO, "uniform_reward"), (HIDDEN_GRPO, "hidden"), (AGENT_GRPO, AGENT)]
    claims = []
    for ours, theirs in pairs:
        a, b = measured.scores(ours, way), measured.scores(theirs, way)
        claims.append(_difference(f"E4' {ours} above {theirs}, {way}", f"{a.mean():.3f} against {b.mean():.3f}", a - b))
    return claims


def search_claims(measured: Measurements) -> list[dict[str, Any]]:
    """E6."""
    claims = []
    for boxes, mode in itertools.product((1, BEAMS), GAPS):
        name, beside = (mode, "") if boxes == 1 else (f"{mode}-beams", f", {boxes} boxes")
        full, fast = ([part[key] for part in measured.searches] for key in (f"{GRID}-{mode}", name))
        gaps = _gaps(measured, mode, name)
        cost = np.mean([a["evaluations"] / b["evaluations"] for a, b in zip(full, fast, strict=True)])
        interval = _interval(gaps)
        verdict = "holds" if interval[1] <= 0.01 else "fails" if interval[0] > 0.01 else "undecided"
        said = (
            f"dev score below the full grid's, {fast[0]['evaluations']} evaluations against {full[0]['evaluations']} "
            f"({cost:.1f} times)"
        )
        title = f"E6 search as good as the full grid, {mode}{beside}"
        claims.append(claim(title, said, float(gaps.mean()), interval, verdict))
    return claims


def _gaps(measured: Measurements, mode: str, name: str) -> np.ndarray:
    """How far a search of a mode is below the full grid, of each seed."""
    return np.array([part[f"{GRID}-{mode}"]["score"] - part[name]["score"] for part in measured.searches])


SEARCH_COLUMNS = (
    "mode",
    "seed",
    "full grid",
    "gap, one box",
    f"gap, {BEAMS} boxes",
    "evaluations of each",
    "extra cost",
)


def search_cells(measured: Measurements) -> list[tuple[str, ...]]:
    """A row per mode and seed: dev scores of the full grid, what less searches found, and what they cost."""
    rows: list[tuple[str, ...]] = []
    for mode in GAPS:
        gaps = zip(*(_gaps(measured, mode, name) for name in (mode, f"{mode}-beams")), strict=True)
        for seed, (part, (one, more)) in enumerate(zip(measured.searches, gaps, strict=True)):
            costs = [part[name]["evaluations"] for name in (f"{GRID}-{mode}", mode, f"{mode}-beams")]
            extra = f"{costs[2] - costs[1]:+d} ({costs[2] / costs[1]:.1f} times)"
            shown = f"{part[f'{GRID}-{mode}']['score']:.3f}", f"{one:+.4f}", f"{more:+.4f}"
            rows.append((mode, str(seed), *shown, " ".join(map(str, costs)), extra))
    return rows


def make_checks(measured: Measurements) -> list[dict[str, Any]]:
    """What is required of the method itself, means over seeds."""
    uniform, single, hidden = (measured.scores(name).mean() for name in ("uniform_reward", BEST_SINGLE, "hidden"))
    one_box = max(_gaps(measured, mode, mode).max() for mode in GAPS)
    more_boxes = max(_gaps(measured, mode, f"{mode}-beams").max() for mode in GAPS)
    four = measured.scores(FUSED_FOUR, four=True).mean() / measured.scores(UNIFORM_FOUR, four=True).mean()
    return [
        common.check("base_low", measured.scores("base").mean() / uniform, "<=", 0.60),
        common.check("single_low", single / uniform, "<=", 0.75),
        common.check("hidden_gain", hidden - single, ">=", 0.08),
        common.check("fourth_ratio", four, ">=", 0.90),
        common.check("search_gap", one_box, "<=", 0.01),
        common.check("search_gap_beams", more_boxes, "<=", 0.01),
        common.check("agent_gain", measured.scores(AGENT).mean() - hidden, ">=", 0.05),
    ]


# --- tables, page ---


def score_cells(measured: Measurements, way: str) -> list[tuple[str, ...]]:
    """A row per method: mean, interval, every seed."""
    rows: list[tuple[str, ...]] = []
    for four, names in ((False, measured.three[0]["methods"]), (True, (UNIFORM_FOUR, FUSED_FOUR))):
        for name in names:
            values = measured.scores(name, way, four)
            low, high = _interval(values)
            seeds = " ".join(f"{value:.3f}" for value in values)
            objectives = "four" if four else "three"
            rows.append((name, objectives, f"{values.mean():.3f} ({low:.3f} to {high:.3f})", seeds))
    return rows


SCORE_COLUMNS = ("method", "objectives", "mean (95% interval)", "each seed")


def cost_cells(measured: Measurements) -> list[tuple[str, ...]]:
    """A row per method: every account, mean and standard deviation over seeds."""

    def shown(values: np.ndarray) -> str:
        spread = f" ± {values.std(ddof=1):,.0f}" if len(values) > 1 else ""
        return f"{values.mean():,.0f}{spread}"

    return [(name, *(shown(values) for values in table.values())) for name, table in accounts(measured).items()]


def cost_columns(measured: Measurements) -> tuple[str, ...]:
    return ("method", *next(iter(accounts(measured).values())))


def write_page(
    out: Path,
    plan: Plan,
    measured: Measurements,
    claims: Sequence[Mapping[str, Any]],
    checks: Sequence[Mapping[str, Any]],
    environment: Mapping[str, Any],
) -> None:
    """`claims.md` and pictures beside it."""
    table = report.markdown_table
    floor = (embedded.settings().window - 1) * _EVERY * embedded.settings().batch * embedded.settings().samples
    times = ", ".join(f"{name} {seconds:.2f}" for name, seconds in measured.times.items())
    draw_curves(out, measured)
    for name in ("weights", "points", "contributions"):
        picture = (cell(out, 0) / "search" / "hidden" / f"{name}.png").read_bytes()
        (out / f"{name}.png").write_bytes(picture)
    parts = [
        "# The claims of EMORL's abstract, measured",
        f"`python -m benchmarks.claims_emorl{' --quick' if plan == QUICK else ''}`: {plan.seeds} seeds, "
        f"{plan.test_prompts} test prompts, {environment['cpu']}, {environment['cores']} cores.",
        HISTORY,
        "## Claims",
        "Intervals are Student's t over seeds.",
        table(CLAIM_COLUMNS, claim_cells(claims), left=2),
        "## Checks",
        table(("check", "value", "required", ""), study.check_cells(checks)),
        "## Scores, greedy answers",
        table(SCORE_COLUMNS, score_cells(measured, "greedy"), left=2),
        "## Scores, sampled at temperature 1",
        table(SCORE_COLUMNS, score_cells(measured, "sampled"), left=2),
        "## Costs",
        "Data points are prompts times samples. `hidden` is three adapters (their sum, or the largest one's) and the "
        "answers that its search decoded; validation is on top, for all. The stopping rule alone takes "
        f"{floor:,} per adapter. Seconds are steps times the median time of a round of {_EVERY} (all cores, no other "
        f"work, compilation left out), in seconds: {times}.",
        table(cost_columns(measured), cost_cells(measured)),
        "## Learning curves",
        "Dev scores over data points, means and Student's t intervals over seeds; a seed that has ended keeps its last "
        f"score. Adapters are scored on {embedded.settings().validation_prompts} dev prompts. `hidden` has the data "
        f"points of all three adapters, kept every {plan.snapshot_every} steps, and of one level of a search, whose "
        f"best score on {plan.search_prompts} dev prompts it shows; `rlae_ppo` begins where the adapters ended, and is "
        f"scored on 64. `rlae_ppo, sampled` learns from answers at temperature 1, and is shown greedily, as all are.",
        "![curves](curves.png)",
        "## Searches",
        f"Against the full grid of step {plan.grid_step:g}, by evaluations. The published rule keeps one box.",
        table(SEARCH_COLUMNS, search_cells(measured), left=2),
        "## A search",
        "Seed 0, mode hidden.",
        *(f"![{name}]({name}.png)" for name in ("weights", "points", "contributions")),
    ]
    files.write_text(out / "claims.md", "\n\n".join(parts) + "\n")


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "", out=Path("runs/claims_emorl"))
    plan = QUICK if options.quick else FULL
    assert options.out is not None
    out = options.out / "quick" if options.quick else options.out
    environment = common.environment()
    study.take_directory(out, dataclasses.asdict(plan) | {"settings": str(settings(plan, 0))})
    began = time.perf_counter()
    try:
        run_all(out, plan)
        study.use_compilation_cache(out)
        measured = collect(out, plan)
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    claims = [*cost_claims(measured), *score_claims(measured)]
    checks = make_checks(measured)
    for way in ("greedy", "sampled"):
        common.print_table(f"Scores, {way}", SCORE_COLUMNS, score_cells(measured, way))
    common.print_table("Costs", cost_columns(measured), cost_cells(measured))
    common.print_table("Searches", SEARCH_COLUMNS, search_cells(measured))
    common.print_table("Claims", CLAIM_COLUMNS, claim_cells(claims))
    write_page(out, plan, measured, claims, checks, environment)
    common.finish([{"kind": "claim", **c} for c in claims], checks, environment, options.json_path)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; tables and pictures in {out / 'claims.md'}")


if __name__ == "__main__":
    main()
