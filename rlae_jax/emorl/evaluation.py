"""Everything that a run has, on the same held-out prompts: base, adapters, fusions that were searched, the agent."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlae_jax.emorl.agent import AGENT

if TYPE_CHECKING:
    from rlae_jax.emorl.run import Run


def evaluate_run(
    run: "Run", split: str, limit: int | None, temperature: float, seed: int, out: Path | None
) -> dict[str, Any]:
    """Evaluates everything that a run has. Returns the content of results.json."""
    from rlae_jax import files, report
    from rlae_jax.emorl import evaluate as evaluation
    from rlae_jax.emorl.fused import MODES, Fused
    from rlae_jax.emorl.search import SEARCH_FILE
    from rlae_jax.emorl.train import OBJECTIVES, TRAINING_FILE
    from rlae_jax.ppo.train import load_policy
    from rlae_jax.runs.directory import CONFIG_FILE

    singles = run.singles()
    every = {name: run.adapter(name) for name in run.targets()}
    writers = {}
    for name, writer in evaluation.adapted(run.base, list(every.values())).items():
        known = run.directory / OBJECTIVES / name / TRAINING_FILE
        cost = {"data_points": files.read_json(known)["data_points"]} if known.is_file() else {}
        writers[f"single:{name}" if name in singles else name] = writer._replace(found=cost)
    fused = Fused(run.base, [every[name] for name in singles])
    m = len(singles)
    trained = sum(writers[f"single:{name}"].found["data_points"] for name in singles)
    writers["equal"] = evaluation.fusion(fused, [1.0] * m, {"data_points": trained})
    for mode in MODES:
        path = run.search_directory(mode) / SEARCH_FILE
        if path.is_file():
            found = files.read_json(path)
            names = list(found["weights"])
            weights = list(found["weights"].values())
            cost = {"weights": found["weights"], "data_points": trained + found["answers"]}
            if others := ", ".join(name for name in singles if name not in names):
                report.console.print(
                    f"{mode}: its weights were searched for {', '.join(names)} alone, without {others}; search again",
                    highlight=False,
                    soft_wrap=True,
                )
            made = Fused(run.base, [run.adapter(name) for name in names], mode)
            writers[mode] = evaluation.fusion(made, weights, cost)
    if (agent := run.search_directory(AGENT) / CONFIG_FILE).is_file():
        members = [member["name"] for member in files.read_json(agent)["members"]]
        made = Fused(run.base, [run.adapter(name) for name in members])
        writers["rlae_ppo"] = evaluation.fusion(made, load_policy(agent.parent))
    prompts = run.prompts.split(split)[:limit]
    return evaluation.evaluate(
        writers,
        prompts,
        run.scorers(singles),
        task=run.prompts.name,
        split=split,
        max_new_tokens=run.config["settings"]["max_new_tokens"],
        temperature=temperature,
        seed=seed,
        out=out,
    )
