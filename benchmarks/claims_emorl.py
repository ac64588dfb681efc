"""The claims of EMORL's abstract on the embedded task: what was measured, its interval, and a verdict as it comes out.

    python -m benchmarks.claims_emorl [--quick] [--json PATH] [--out DIR]

For every seed the base is pretrained anew, and adapters of one rank, learning rate, stopping rule and longest answer
are fine-tuned from it: one per objective, one for all three at once (uniform_reward), and two whose weights a bandit
sets (dynaopt, and dynaopt_reference as its published code has it). Weights are searched on dev prompts; test prompts
are read once. Greedy and sampled answers have tables of their own.

- E1: data points and seconds, and how steady they are, against training on all objectives at once.
- E2: a fourth objective, without training the others again.
- E3: the weights can be read: the rank correlation of w_m and score m over the searched points.
- E4: the score, against the baselines.
- E5: fused hidden states against fused probabilities, log-probabilities and parameters.
- E6: what the hierarchical search costs and finds, against a full grid.

Everything goes into DIR, a piece at a time: after an interruption the same command goes on. Two seeds are run side by
side on one core each; only the times of E1 are taken alone, on all cores.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE, Target, Training, train_adapters
from rlae_jax.evaluation.results import read_results
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import reflections

THREE, FOUR = embedded.OBJECTIVES, embedded.ALL
UNIFORM_FOUR = "uniform_four"  # one adapter for all four objectives
COMPARABLE = 0.05  # "comparable" reward: at most this much below
BEST_SINGLE, AGENT, GRID, FUSED_FOUR = "best single", "rlae_ppo", "grid", "hidden, four"
DATA = Data(reflections.NAME)

HISTORY = (
    "The task, the settings of training and how long agents train were chosen before this study while looking at other "
    "seeds, 100 to 103, at their test scores, too. With a first form of the task, in which a list of keywords "
    "had no end of its own, five seeds had missed single_low (0.755), hidden_gain (0.068) and search_gap (0.086)."
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
      steps: of fine-tuning at most.
      search_prompts: dev prompts of every search; a grid has points at multiples of `grid_step`.
    """

    seeds: int = 5
    base_steps: int = embedded.STEPS
    steps: int = 480
    levels: int = 5
    search_prompts: int = 64
    grid_step: float = 0.125
    iterations: int = 80
    test_prompts: int = 512
    timed_rounds: int = 8


FULL = Plan()
QUICK = Plan(
    *(1, 700, 120, 2, 32, 0.25),
    iterations=20,
    test_prompts=128,
    timed_rounds=3,
)


# --- pieces of work; each leaves files behind, and is done if they exist ---


def cell(out: Path, seed: int) -> Path:
    """Where a seed's run lies."""
    return out / "seeds" / f"seed-{seed}"


def settings(plan: Plan, seed: int) -> Any:
    """The same for all adapters."""
    return embedded.settings(steps=plan.steps, seed=seed)


def base_of(out: Path, plan: Plan, seed: int) -> rj.LM:
    return rj.load(embedded.build_base(out / "models", seed, plan.base_steps))


def train_base(out: Path, plan: Plan, seed: int) -> None:
    base_of(out, plan, seed)


def fine_tune(out: Path, plan: Plan, seed: int, part: str) -> None:
    """Part "three": the objectives that there are at first, and what is taught all of them. "four": the one that comes
    later, and what is taught all four."""
    if part == "three":
        targets = make_targets(THREE, list(BASELINES), DATA)
    else:
        every = tuple(embedded.objective(name) for name in FOUR)
        targets = [*make_targets([embedded.LATER], [], DATA), Target(UNIFORM_FOUR, every, specs=FOUR)]
    train_adapters(
        *(base_of(out, plan, seed), targets, DATA.read(), settings(plan, seed), cell(out, seed)),
        resume=True,
        data=dataclasses.asdict(DATA),
    )


# What is searched: adapters, mode, method.
SEARCHES = {
    **{mode: (THREE, mode, "hierarchical") for mode in MODES},
    **{f"{GRID}-{mode}": (THREE, mode, "grid") for mode in ("hidden", "probs")},
    "four": (FOUR, "hidden", "hierarchical"),
}


def find_weights(out: Path, plan: Plan, seed: int, name: str) -> None:
    """A search, or "agent", which sets weights for every token."""
    run = Run(cell(out, seed))
    where = run.search_directory(name)
    if name == "agent":
        ppo = PPOConfig(iterations=plan.iterations, prompts=128, eval_prompts=64, eval_every=20, seed=seed)
        train_agent(
            *(fused_of(out, plan, seed), run.prompts, run.objectives(THREE), ppo, where),
            max_new_tokens=embedded.MAX_NEW_TOKENS,
            span_length=1,
            resume=True,
        )
    elif not (where / SEARCH_FILE).is_file():
        adapters, mode, method = SEARCHES[name]
        config = SearchConfig(
            method=method,
            levels=plan.levels if adapters == THREE else min(plan.levels, 3),
            step=plan.grid_step,
            max_new_tokens=embedded.MAX_NEW_TOKENS,
            seed=seed,
        )
        dev = run.prompts.split("dev")[: plan.search_prompts]
        search(fused_of(out, plan, seed, mode, adapters), dev, run.objectives(adapters), config, where, resume=True)


def fused_of(out: Path, plan: Plan, seed: int, mode: str = "hidden", adapters: Sequence[str] = THREE) -> Fused:
    run = Run(cell(out, seed))
    return Fused(base_of(out, plan, seed), [run.adapter(name) for name in adapters], mode)


def searched(out: Path, seed: int, name: str) -> Found:
    return records.read(Run(cell(out, seed)).search_directory(name) / SEARCH_FILE, Found)


def answer_tests(out: Path, plan: Plan, seed: int, part: str) -> None:
    """All methods on the test prompts: under three objectives, or those of the fourth under four."""
    run = Run(cell(out, seed))
    directory = run.directory / "test" / part
    if (directory / "results.json").is_file():
        return
    names = THREE if part == "three" else FOUR
    fusions = {mode: mode for mode in MODES} if part == "three" else {FUSED_FOUR: "four"}  # method -> search
    adapted = evaluation.adapted(run.base, [run.adapter(name) for name in run.targets()])
    trained = BASELINES if part == "three" else (UNIFORM_FOUR,)
    methods = {name: adapted[name] for name in ("base", *names, *trained)}
    for method, search_name in fusions.items():
        fused = fused_of(out, plan, seed, SEARCHES[search_name][1], names)
        methods[method] = evaluation.fusion(fused, list(searched(out, seed, search_name).weights.values()))
    if part == "three":
        methods[AGENT] = evaluation.fusion(fused_of(out, plan, seed), rj.load_policy(run.search_directory("agent")))
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
        ("adapters", fine_tune, pieces(("three", "four"))),
        ("weights", find_weights, pieces(("agent", *SEARCHES))),
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
    training = [
        {name: records.plain(records.read(one / OBJECTIVES / name / TRAINING_FILE, Training)) for name in names}
        for one in cells
    ]
    searches = [
        {
            path.parent.name: records.plain(records.read(path, Found))
            for path in (one / "search").glob(f"*/{SEARCH_FILE}")
        }
        for one in cells
    ]
    return Measurements(three, four, training, searches, time_training(out, plan))


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


_EVERY = embedded.settings().validate_every


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


def search_claims(measured: Measurements) -> list[dict[str, Any]]:
    """E6."""
    claims = []
    for mode in ("hidden", "probs"):
        full, fast = ([part[name] for part in measured.searches] for name in (f"{GRID}-{mode}", mode))
        gaps = np.array([a["score"] - b["score"] for a, b in zip(full, fast, strict=True)])
        cost = np.mean([a["evaluations"] / b["evaluations"] for a, b in zip(full, fast, strict=True)])
        interval = _interval(gaps)
        verdict = "holds" if interval[1] <= 0.01 else "fails" if interval[0] > 0.01 else "undecided"
        said = (
            f"dev score below the full grid's, {fast[0]['evaluations']} evaluations against {full[0]['evaluations']} "
            f"({cost:.1f} times)"
        )
        claims.append(claim(f"E6 search as good as the full grid, {mode}", said, float(gaps.mean()), interval, verdict))
    return claims


def make_checks(measured: Measurements) -> list[dict[str, Any]]:
    """What is required of the method itself, means over seeds."""
    uniform, single, hidden = (measured.scores(name).mean() for name in ("uniform_reward", BEST_SINGLE, "hidden"))
    gaps = [
        part[f"{GRID}-{mode}"]["score"] - part[mode]["score"]
        for part in measured.searches
        for mode in ("hidden", "probs")
    ]
    four = measured.scores(FUSED_FOUR, four=True).mean() / measured.scores(UNIFORM_FOUR, four=True).mean()
    return [
        common.check("base_low", measured.scores("base").mean() / uniform, "<=", 0.60),
        common.check("single_low", single / uniform, "<=", 0.75),
        common.check("hidden_gain", hidden - single, ">=", 0.08),
        common.check("fourth_ratio", four, ">=", 0.90),
        common.check("search_gap", max(gaps), "<=", 0.01),
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
    common.print_table("Claims", CLAIM_COLUMNS, claim_cells(claims))
    write_page(out, plan, measured, claims, checks, environment)
    common.finish([{"kind": "claim", **c} for c in claims], checks, environment, options.json_path)
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes; tables and pictures in {out / 'claims.md'}")


if __name__ == "__main__":
    main()
