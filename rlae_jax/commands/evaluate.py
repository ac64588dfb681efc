"""`rlae-jax evaluate`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import Dtype, ModelOptions, Models, TaskFlags
from rlae_jax.errors import InputError
from rlae_jax.ranges import Count
from rlae_jax.runs import lock


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateModels(ModelOptions):
    """Which models, and how they are fused: by operators that all methods can share."""

    models: Models
    """Hugging Face directories, GGUF files or Hub ids (org/name). With different tokenizers, steps, spans and
    --max-new-tokens count entries of the union of their vocabularies."""
    fusion: Literal["linear", "loglinear", "hidden"] = "linear"
    """linear = mean of probabilities, loglinear = weighted mean of log-probabilities, hidden = sum of last hidden
    states, for --adapters."""
    dtype: Dtype = "float32"
    """of the members' parameters."""


@lock.writes("out")
def evaluate(
    *,
    model: Annotated[EvaluateModels, OmitArgPrefixes],
    out: Path,
    task: TaskFlags,
    split: Literal["train", "dev", "test"] = "test",
    policy: Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]")] = (),
    methods: Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]")] = None,
    limit: Count | None = None,
    search_prompts: Count | None = None,
) -> None:
    """Compare each member alone, mixtures and trained agents on the same prompts.

    Prints scores with 95% intervals and milliseconds, and how surely agents differ from everything else (p-values
    corrected for the number of comparisons). What a method needs to have chosen is chosen on the training prompts.

    Args:
        model: which models, and how they are fused.
        out: a new directory for config.json, results.json, predictions.jsonl, scores.png and the router's run.
        task: what is asked.
        split: which prompts. Choices are made on train and dev; read test once.
        policy: run directories of trained agents; several of one kind are its seeds.
        methods: of single:NAME, uniform, static (best fixed weights), schedule (best weights per span index), router
            (an agent, trained here, with one action for the whole answer), confidence (at each step the most certain
            member), perplexity (by how well a member predicts the prompt), consistency (by agreement with the others),
            gate (one member alone where it is certain), topk (over each member's k best tokens), online (exponentiated
            gradient with fixed share, anew in every text), bayes (by the likelihood of the text so far), draw (one
            member per step, drawn), selective (one member alone where the members agree), regression (of who is better
            on the members' statistics), dllg (the agent's network, fitted to who was right), fusionroute (the member
            that such a network finds best, with logits added), random (weights drawn anew for each span), shuffled (the
            agent's weights for another prompt), vote (the members' most frequent answer), oracle (whether any member's
            answer is right: a reference line); all is all of them. Default: single:NAME, uniform, static, confidence
            and schedule. With --reward likelihood: single:NAME, uniform, static, oracle (the best weights in each span)
            and, under their own settings, perplexity, confidence, consistency, gate, online, bayes and selective;
            default: the first four.
        limit: only the first so many prompts of the split. Searches on train are not bounded by it.
        search_prompts: training prompts that searches read. Default: 1024, or more where an agent saw more answers in
            training. They take the most time; an evaluation cannot be resumed, one that was stopped begins anew.
    """
    from rlae_jax import files, report
    from rlae_jax.evaluation import baseline_methods, check_names, evaluate_rules, load_agents, router_config
    from rlae_jax.evaluation import evaluate as evaluate_methods
    from rlae_jax.ppo.train import read_run
    from rlae_jax.runs.directory import CONFIG_FILE, made_by

    files.require_place(out)
    config, finished = out / CONFIG_FILE, all((out / name).exists() for name in ("results.json", "scores.png"))
    if config.exists() or (out / "results.json").exists():
        begun = config.exists() and not finished and made_by(out) == "evaluate"
        if not begun:  # an evaluation that was killed is made anew
            raise InputError(f"{out} holds a run already; choose a new directory for this evaluation")
    check_names(methods)  # before models are read
    names = {run: read_run(run).settings.method for run in policy}
    asked = task.load()
    ensemble = model.load()
    asked = task.select(asked, ensemble)
    examples = asked.split(split)  # told now, not after a search
    examples = examples if limit is None else examples.take(limit)
    by_likelihood = asked.reads_texts
    if not by_likelihood:
        lengths = ensemble.lengths(ensemble.encode(examples.prompts, chat=asked.chat))
        ensemble.check_lengths(lengths, asked.max_new_tokens)
    agents = load_agents(ensemble, asked, policy)
    baselines = {}
    if not by_likelihood:
        baselines = baseline_methods(
            *(ensemble, asked, methods),
            agents=agents,
            config=router_config(policy),
            runs=out,
            search_prompts=search_prompts,
        )
    files.write_json(
        config,
        {
            "schema": 1,
            "command": "evaluate",
            "task": asked.name,
            "split": split,
            "members": [lm.name for lm in ensemble.members],
            "fusion": model.fusion,
            "end_ids": list(model.end_ids),
            "policies": {name: [str(run) for run in policy if names[run] == name] for name in agents},
        },
    )
    if by_likelihood:
        results = evaluate_rules(
            *(ensemble, asked, split, methods, agents),
            cuts=None if task.cut is None else [task.cut],
            out=out,
            limit=limit,
            search_prompts=search_prompts,
        )
    else:
        results = evaluate_methods({**baselines, **agents}, asked, split, limit=limit, out=out)
    report.scores_chart(out / "scores.png", results)
    report.console.print(report.results_table(results))
    if results["differences"]:
        report.console.print(report.differences_table(results))
