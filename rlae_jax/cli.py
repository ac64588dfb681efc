"""The commands: `rlae-jax demo | generate | train | evaluate | ablate | inspect | emorl`. Parses, calls the library,
prints.

A command bears the name of the library function behind it, which it therefore imports inside.
"""

import dataclasses
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from rlae_jax.errors import InputError, Interrupted

if TYPE_CHECKING:
    from rlae_jax.fusion.ensemble import Ensemble, Generation, Weights
    from rlae_jax.tasks import Task

CACHE_VARIABLE = "RLAE_JAX_COMPILATION_CACHE"
Models = Annotated[tuple[str, ...], arg(metavar="MODEL [MODEL ...]")]
Adapters = Annotated[tuple[str, ...], arg(metavar="ADAPTER [ADAPTER ...]")]
EndIds = Annotated[tuple[str, ...], arg(metavar="IDS [IDS ...]")]
Dtype = Literal["float32", "bfloat16", "float16"]
Assignments = Annotated[tuple[tuple[str, ...], ...], UseAppendAction]  # --vary A --vary B C
INSPECTED_TOKENS = 1024  # or the shortest context


def _turn_on_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache directory, so that a second call does not compile again."""
    import jax

    place = os.environ.get(CACHE_VARIABLE)
    if place == "off" or getattr(jax.config, "jax_compilation_cache_dir", None):
        return
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", place or str(base / "rlae_jax" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _read_end_ids(end_ids: tuple[str, ...], members: int) -> list[list[int]] | None:
    """--end-ids as lists of ids; None where there are none.

    Raises:
      InputError: what is no id; neither one list nor one per member.
    """
    if not end_ids:
        return None
    lists = []
    for text in end_ids:
        if not all(part.isdecimal() for part in text.split(",")):
            raise InputError(f"--end-ids {text!r}: expected ids with commas between them, such as 50256 or 1,2")
        lists.append([int(part) for part in text.split(",")])
    if len(lists) not in (1, members):
        raise InputError(
            f"--end-ids: {len(lists)} lists for {members} members; give one per member, such as "
            f"--end-ids {' '.join(['1,2', *['0'] * (members - 1)])}"
        )
    return lists


def _load_ensemble(
    models: tuple[str, ...], adapters: tuple[str, ...], fusion: str, dtype: str, end_ids: tuple[str, ...] = ()
) -> "Ensemble":
    from rlae_jax.fusion.codec import same_tokenizer
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.fusion.operators import get_operator
    from rlae_jax.models import load

    if not models:
        raise InputError("no models: give at least one directory or Hub id with --models")
    if adapters and len(models) > 1:
        raise InputError(f"--adapters needs one base model, not {len(models)}")
    count = len(adapters or models)
    lists = _read_end_ids(end_ids, count)
    get_operator(fusion, count)  # tells now, not after reading gigabytes
    of_all = None if lists is None else [i for ids in lists for i in ids]
    if adapters:
        return Ensemble.from_adapters(load(models[0], dtype=dtype), adapters, fusion, end_ids=of_all)
    members = [load(model, dtype=dtype) for model in models]
    return Ensemble(members, fusion, end_ids=of_all if same_tokenizer(members) else lists)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Prompts, references and reward."""

    task: str | None = None
    """An embedded task (skills, overlap, skills3, mixed, noisy, twins, dominant) or a benchmark (gsm8k, mmlu,
    arc_challenge, piqa, triviaqa, natural_questions)."""
    data: Path | None = None
    """A file instead: one JSON object per line, or .csv; split 80/10/10 by the prompts' content."""
    prompt_field: str = "prompt"
    """The prompt's field in the file."""
    answer_field: str = "answer"
    """The answer's field in the file; in JSON it may be a list, of which any counts."""
    reward: str | None = None
    """exact_match, last_number, gsm8k, multiple_choice, token_f1, squad_match, triviaqa_match, math_equivalence, or
    your own module:function (or file.py:function) of a text and a reference; to evaluate multiple choice also
    likelihood: the likeliest option is the answer. Default: the benchmark's; exact_match for a file."""
    data_dir: Path | None = None
    """A directory with the benchmark's files, NAME/SPLIT.jsonl; otherwise it comes from the Hub."""
    shots: int | None = None
    """Examples before each question of a benchmark. Default: what suits it."""
    chat: bool = False
    """Prompts go through the models' chat templates."""
    max_new_tokens: int | None = None
    """The longest answer. Default: the task's."""
    max_prompt_tokens: int | None = None
    """Leave out prompts that have more tokens for some model, and say how many. Default: none is left out, and one
    that does not fit is an error."""

    def load(self) -> "Task":
        """The task, with what was given changed."""
        from rlae_jax.tasks import get_task, jsonl

        if (self.task is None) == (self.data is None):
            both = "" if self.task is None else ", not both"
            raise InputError(f"give either --task NAME (try skills) or --data FILE.jsonl{both}")
        if self.data is not None:
            foreign = [name for name in ("data_dir", "shots") if getattr(self, name) is not None]
            if foreign:
                raise InputError(f"--{foreign[0].replace('_', '-')} belongs to a benchmark, not to --data")
            found = jsonl(
                self.data,
                prompt_field=self.prompt_field,
                answer_field=self.answer_field,
                reward=self.reward or "exact_match",
                chat=self.chat,
            )
        else:
            assert self.task is not None
            options = {name: getattr(self, name) for name in ("reward", "data_dir", "shots")}
            options = {name: value for name, value in options.items() if value is not None}
            found = get_task(self.task, **options | ({"chat": True} if self.chat else {}))
        if self.max_new_tokens is not None:
            found = dataclasses.replace(found, max_new_tokens=self.max_new_tokens)
        return found

    def fit(self, task: "Task", ensemble: "Ensemble") -> "Task":
        """The task without prompts that are too long."""
        from rlae_jax import report

        most = self.max_prompt_tokens
        if most is None:
            return task
        rows = {}
        for split, examples in task.splits.items():
            lengths = ensemble.lengths(ensemble.encode(examples.prompts, chat=task.chat)) if len(examples) else []
            rows[split] = [i for i, length in enumerate(lengths) if length <= most]
        for split, kept in rows.items():
            if task.splits[split].prompts and not kept:
                raise InputError(f"no {split} prompt has at most {most} tokens; give a larger number, or fewer --shots")
        counts = [(len(task.splits[split]), len(kept), split) for split, kept in rows.items()]
        told = [f"{n - kept} of {n} {split}" for n, kept, split in counts]
        if any(n > kept for n, kept, _ in counts):
            report.console.print(f"left out, as longer than {most} tokens: {', '.join(told)} prompts", highlight=False)
        return task.select(rows)


Prompted = Annotated[TaskOptions, OmitArgPrefixes]


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    """What was given on the command line."""
    return {name: value for name, value in options.items() if value is not None}


def demo(*, seed: int = 0, out: Path = Path("runs/demo"), quick: bool = False) -> None:
    """Train two small specialists and an agent that learns when to trust which; compare with every baseline.

    Takes a few minutes on two CPU cores. What is already in OUT for this seed (specialists, agents, also half-trained
    ones) is reused; remove the directory to begin anew.

    Args:
        seed: of the specialists and of the agents.
        out: directory for everything: models, checkpoints, results.json, curve.png, weights.png.
        quick: fewer training steps, to see that everything works; scores are lower.
    """
    from rlae_jax.demo import QUICK, DemoSettings, run_demo

    run_demo(seed, out, QUICK if quick else DemoSettings())


def _choose_weights(weights: tuple[float, ...] | None, policy: str | None) -> "Weights":
    from rlae_jax.fusion.policy import NAMED_POLICIES
    from rlae_jax.ppo.train import load_policy

    if weights is not None and policy is not None:
        raise InputError("give either --weights or --policy")
    if policy is None:
        return None if weights is None else list(weights)
    if policy in NAMED_POLICIES and not Path(policy).is_dir():
        return policy
    if not Path(policy).is_dir():
        raise InputError(f"{policy} is not a run directory, and no policy either; known: {', '.join(NAMED_POLICIES)}")
    return load_policy(policy)


def _say_where_a_member_was_full(
    ensemble: "Ensemble",
    generation: "Generation",
    prompts: list[str],
    *,
    chat: bool,
    max_new_tokens: int,
    member_tokens: int | None,
) -> None:
    """A hint on standard error if answers ended before their longest length for want of room."""
    ends = zip(generation.finish_reasons, generation.steps, strict=True)
    early = sum(reason == "length" and steps < max_new_tokens for reason, steps in ends)
    if not early:
        return
    room = ensemble.spec(max_new_tokens=max_new_tokens, member_tokens=member_tokens).member_tokens
    room = room if member_tokens is None else member_tokens
    allowed = ensemble.context - max(ensemble.lengths(ensemble.encode(prompts, chat=chat)))
    way_out = f"--member-tokens gives them more, up to {allowed}"
    if room >= allowed:
        way_out = f"the shortest context, of {ensemble.context} tokens, allows no more"
    print(
        f"hint: {early} of {len(generation.steps)} answers ended before {max_new_tokens} steps, because the next entry "
        f"did not fit into the {min(room, allowed)} tokens that each member has for an answer; {way_out}",
        file=sys.stderr,
    )


def _scores_line(generation: "Generation", names: list[str], row: int) -> str:
    assert generation.scores is not None
    assert generation.member_scores is not None
    steps = generation.steps[row]
    if not steps:
        return "  mean log-probability: nothing was written"
    fused, members = generation.scores[row, :steps].mean(), generation.member_scores[row, :steps].mean(axis=0)
    each = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(names, members, strict=True))
    return f"  mean log-probability: {fused:.3f} ({each})"


def generate(
    *,
    models: Models,
    prompt: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]")],
    weights: Annotated[tuple[float, ...] | None, arg(metavar="W [W ...]")] = None,
    policy: Annotated[str | None, arg(metavar="RUN|NAME")] = None,
    adapters: Adapters = (),
    fusion: Annotated[str, arg(metavar="NAME")] = "linear",
    max_new_tokens: int = 64,
    min_new_tokens: int = 0,
    member_tokens: int | None = None,
    span_length: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    samples: int = 1,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    end_ids: EndIds = (),
    chat: bool = False,
    ignore_eos: bool = False,
    dtype: Dtype = "float32",
    stream: bool = False,
    show_weights: bool = False,
    scores: bool = False,
) -> None:
    """Let several language models write one answer together.

    Models with different tokenizers write over the union of their vocabularies. Then steps, spans and --max-new-tokens
    count entries of that union: tokens of any of them. `rlae-jax inspect` says how well models fit together.

    Args:
        models: Hugging Face directories or Hub ids (org/name).
        adapters: PEFT adapters (directories or Hub ids) of the one model given; each becomes a member.
        prompt: one or more prompts; each is answered.
        weights: one per model, e.g. 1 2 (scaled to sum to 1). Default: equal weights.
        policy: a run directory whose trained agent sets the weights, span by span; or a policy that needs no training:
            perplexity (of the prompt), confidence (the most certain member), consistency (agreement with the others),
            gate (the first member alone where it is certain), draw (one member per step).
        fusion: linear = mean of probabilities, loglinear = weighted mean of log-probabilities, topk[:k] = linear over
            each member's k (10) best tokens, primary[:member] = over the best of one member (0), proxy[:alpha] = the
            first of three members + alpha (1) * (second - third), in log-probabilities.
        max_new_tokens: the longest answer, in tokens or, with different tokenizers, in entries of the union vocabulary.
        min_new_tokens: no end before this many.
        member_tokens: with different tokenizers, how many of its own tokens any member has room for in an answer.
            Default: ample for nearly all entries; a hint says when it was too few.
        span_length: steps for which weights are held. Default: the policy's own, else 4.
        temperature: 0 always takes the most probable token.
        top_k: sample among the k most probable tokens only; 0 is no limit.
        top_p: sample within the smallest set of tokens with this probability.
        min_p: sample only tokens at least this often as probable as the most probable one.
        repetition_penalty: multiplies the log-probabilities of tokens that came already; 1 is none.
        samples: answers per prompt.
        seed: of the sampling.
        stop: strings that end an answer.
        end_ids: ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own.
        chat: put each prompt into the tokenizer's chat template.
        ignore_eos: go on after the end token.
        dtype: of the parameters.
        stream: print the answer span by span, while it is written; for one prompt and one sample.
        show_weights: print the weights of each span under each answer.
        scores: print under each answer the mean log-probability of what was chosen, together and of each member.
    """
    if not prompt:
        raise InputError("no prompts: give at least one with --prompt")
    if stream and (len(prompt) > 1 or samples > 1):
        raise InputError(f"--stream needs one prompt and one sample, not {len(prompt)} and {samples}")
    if stream and (show_weights or scores):
        raise InputError("--stream prints text only; leave out --show-weights and --scores, or --stream")
    chosen = _choose_weights(weights, policy)
    ensemble = _load_ensemble(models, adapters, fusion, dtype, end_ids)
    if policy is not None and Path(policy).is_dir():
        from rlae_jax.ppo.train import check_members

        check_members(policy, ensemble)
    options: dict[str, Any] = {
        "span_length": span_length,
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "member_tokens": member_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "samples": samples,
        "seed": seed,
        "stop": stop,
        "chat": chat,
        "ignore_eos": ignore_eos,
    }
    if stream:
        pieces = ensemble.stream(list(prompt), chosen, **options)
        print(prompt[0] if ensemble.continues else "", end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    generation = ensemble.generate(list(prompt), chosen, scores=scores, **options)
    names = [lm.name for lm in ensemble.members]
    for b, text in enumerate(generation.texts):
        print(f"{prompt[b // samples]}{text}" if ensemble.continues else text)
        if scores:
            print(_scores_line(generation, names, b))
        if show_weights:
            print(f"  weights of {', '.join(names)}:")
            for p, row in enumerate(generation.weights[b]):
                if row[0] == row[0]:
                    print(f"    span {p + 1}: " + " ".join(f"{weight:.3f}" for weight in row))
    _say_where_a_member_was_full(
        *(ensemble, generation, list(prompt)),
        chat=chat,
        max_new_tokens=max_new_tokens,
        member_tokens=member_tokens,
    )


def train(
    *,
    models: Models,
    out: Path,
    prompted: Prompted,
    algo: Literal["ppo", "mappo"] = "ppo",
    preset: Literal["demo", "paper"] = "demo",
    iterations: int | None = None,
    max_minutes: float | None = None,
    prompts: int | None = None,
    samples: int | None = None,
    learning_rate: float | None = None,
    schedule: Literal["constant", "linear", "cosine"] | None = None,
    target_kl: float | None = None,
    span_length: int | None = None,
    span_lengths: Annotated[tuple[int, ...] | None, arg(metavar="L [L ...]")] = None,
    temperature: float | None = None,
    reads: tuple[Literal["hidden", "stats", "span", "prompt", "text"], ...] | None = None,
    encoder: str | None = None,
    max_spans: int | None = None,
    distribution: Literal["dirichlet", "logistic_normal"] | None = None,
    share_actors: bool = False,
    member_cost: float | None = None,
    length_cost: float | None = None,
    eval_every: int | None = None,
    seed: int = 0,
    seeds: int | None = None,
    log_to: tuple[Literal["tensorboard", "wandb"], ...] = (),
    resume: bool = False,
    adapters: Adapters = (),
    fusion: Literal["linear", "loglinear", "hidden"] = "linear",
    end_ids: EndIds = (),
    dtype: Dtype = "float32",
) -> None:
    """Train an agent that sets the ensemble's weights, span by span, for the reward of a task.

    Ctrl-C saves and says how to go on. At the end the agent and equal weights are scored on the dev split.

    Args:
        models: Hugging Face directories or Hub ids (org/name). With different tokenizers, steps, spans and
            --max-new-tokens count entries of the union of their vocabularies.
        adapters: PEFT adapters (directories or Hub ids) of the one model given; each becomes a member.
        out: the run's directory (config.json, metrics.jsonl, results.json, predictions.jsonl, checkpoints/, curve.png).
        prompted: what the agent is trained on.
        algo: ppo = one agent sets all weights, mappo = one agent per member sets its own.
        preset: demo = quick steps for small models, paper = the published figures of RLAE.
        iterations: rollouts, each followed by updates. Default: the preset's.
        max_minutes: stop after this long; --resume goes on.
        prompts: prompts per rollout. Default: the preset's.
        samples: answers to each prompt of a rollout. Default: 1.
        learning_rate: of Adam. Default: the preset's.
        schedule: how the learning rate falls over the iterations. Default: constant.
        target_kl: leave out an iteration's remaining updates once the agent has moved this far. Default: never.
        span_length: steps for which weights are held. Default: the task's.
        span_lengths: let the agent choose among these for each span.
        temperature: of the tokens during training; 0 writes the most probable ones. Default: the preset's.
        reads: what the agent sees. Default: hidden stats span.
        encoder: of an agent that reads text: a Hugging Face encoder, such as microsoft/deberta-v3-base.
        max_spans: spans of the longest answers that the agent shall ever set weights for. Default: those of the task.
        distribution: of a single agent's weights. Default: dirichlet.
        share_actors: the agents of mappo are one network.
        member_cost: taken off the reward for each further member in use. Default: 0.
        length_cost: taken off the reward of the longest answer, in proportion of shorter ones. Default: 0.
        eval_every: score dev and write a checkpoint every so many iterations. Default: the preset's.
        seed: of everything random.
        seeds: train this many agents side by side, of seeds SEED, SEED + 1, ... Default: 1.
        log_to: where metrics go besides metrics.jsonl; needs rlae_jax[log].
        resume: go on with the run in OUT.
        fusion: linear = mean of probabilities, loglinear = weighted mean of log-probabilities, hidden = sum of last
            hidden states, for --adapters.
        end_ids: ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own.
        dtype: of the members' parameters.
    """
    from rlae_jax import files, report
    from rlae_jax.config import ALGORITHMS
    from rlae_jax.evaluation import Method, evaluate
    from rlae_jax.ppo.train import TrainProgress, train_seeds
    from rlae_jax.runs.directory import how_to_go_on
    from rlae_jax.runs.metrics import read_metrics

    found = prompted.load()
    changes: dict[str, Any] = {
        "iterations": iterations,
        "prompts": prompts,
        "samples": samples,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "target_kl": target_kl,
        "span_length": span_length,
        "temperature": temperature,
        "member_cost": member_cost,
        "length_cost": length_cost,
        "eval_every": eval_every,
        "seed": seed,
        "seeds": seeds,
    }
    of_agent: dict[str, Any] = {
        "reads": reads,
        "encoder": encoder,
        "span_lengths": span_lengths,
        "max_spans": max_spans,
        "distribution": distribution,
        "share_actors": share_actors or None,
    }
    make = getattr(ALGORITHMS[algo], preset)
    agent = dataclasses.replace(make().agent, **_given(of_agent))
    config = make(**_given(changes), agent=agent)
    ensemble = _load_ensemble(models, adapters, fusion, dtype, end_ids)
    found = prompted.fit(found, ensemble)
    began = time.perf_counter()
    done, problems = config.iterations, ""
    try:
        with report.progress("training", config.iterations, "iterations") as update:

            def show(progress: TrainProgress) -> None:
                nonlocal done, problems
                done, problems = progress.iteration, progress.problems
                dev = f", dev {progress.metrics['dev']:.3f}" if "dev" in progress.metrics else ""
                update(progress.iteration, f"reward {progress.metrics['reward']:.3f}{dev}")

            policies = train_seeds(
                *(ensemble, found, config, out),
                resume=resume,
                max_minutes=max_minutes,
                log_to=log_to,
                on_progress=show,
            )
    except (Interrupted, KeyboardInterrupt) as interrupted:
        raise how_to_go_on(str(interrupted) or "stopped", resume) from None
    if problems:
        report.console.print(problems, highlight=False, markup=False)
    if done < config.iterations:
        report.console.print(f"time is up after iteration {done} of {config.iterations}; --resume goes on")
    name = f"rlae_{algo}"
    uniform = Method(ensemble, None, policies[0].span_length)
    agents = [Method(ensemble, policy) for policy in policies]
    results = evaluate({"uniform": uniform, name: agents}, found, "dev", out=out)
    results["seconds"]["total"] = time.perf_counter() - began
    files.write_json(out / "results.json", results)
    references = {"uniform (dev)": results["methods"]["uniform"]["score"]}
    report.learning_curve(out / "curve.png", {name: read_metrics(out)}, references, f"{found.name}, {algo.upper()}")
    report.console.print(report.results_table(results))
    report.console.print(f"the trained policy is in {out}; use it with --policy {out}", highlight=False, soft_wrap=True)


def evaluate(
    *,
    models: Models,
    out: Path,
    prompted: Prompted,
    split: Literal["train", "dev", "test"] = "test",
    policy: Annotated[tuple[Path, ...], arg(metavar="RUN [RUN ...]")] = (),
    methods: Annotated[tuple[str, ...] | None, arg(metavar="NAME [NAME ...]")] = None,
    limit: int | None = None,
    search_prompts: int | None = None,
    adapters: Adapters = (),
    fusion: Literal["linear", "loglinear"] = "linear",
    end_ids: EndIds = (),
    dtype: Dtype = "float32",
) -> None:
    """Compare each member alone, mixtures and trained agents on the same prompts.

    Prints scores with 95% intervals and milliseconds, and how surely agents differ from everything else (p-values
    corrected for the number of comparisons). What a method needs to have chosen is chosen on the training prompts.

    Args:
        models: Hugging Face directories or Hub ids (org/name). With different tokenizers, steps, spans and
            --max-new-tokens count entries of the union of their vocabularies.
        adapters: PEFT adapters (directories or Hub ids) of the one model given; each becomes a member.
        out: a new directory for config.json, results.json, predictions.jsonl, scores.png and the router's run.
        prompted: what is asked.
        split: which prompts. Choices are made on train and dev; read test once.
        policy: run directories of trained agents; several of one algorithm are its seeds.
        methods: of single:NAME, uniform, static (best fixed weights), schedule (best weights per span index), router
            (an agent, trained here, with one action for the whole answer), confidence (at each step the most certain
            member), perplexity (by how well a member predicts the prompt), consistency (by agreement with the others),
            gate (one member alone where it is certain), topk (over each member's k best tokens), random (weights drawn
            anew for each span), shuffled (the agent's weights for another prompt), vote (the members' most frequent
            answer), oracle (whether any member's answer is right: a reference line); all is all of them. Default:
            single:NAME, uniform, static, confidence and schedule.
        limit: only the first so many prompts of the split. Searches on train are not bounded by it.
        search_prompts: training prompts that searches read. Default: 1024, or more where an agent saw more answers in
            training. They take the most time; an evaluation cannot be resumed.
        fusion: linear = mean of probabilities, loglinear = weighted mean of log-probabilities.
        end_ids: ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own.
        dtype: of the members' parameters.
    """
    from rlae_jax import files, report
    from rlae_jax.evaluation import baseline_methods, load_agents, router_config
    from rlae_jax.evaluation import evaluate as evaluate_methods
    from rlae_jax.ppo.train import read_run
    from rlae_jax.runs.directory import CONFIG_FILE

    files.require_writable_parent(out)
    if (out / CONFIG_FILE).exists() or (out / "results.json").exists():
        raise InputError(f"{out} holds a run already; choose a new directory for this evaluation")
    for name, value in (("limit", limit), ("search-prompts", search_prompts)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    found = prompted.load()
    ensemble = _load_ensemble(models, adapters, fusion, dtype, end_ids)
    found = prompted.fit(found, ensemble)
    examples = found.split(split)  # told now, not after a search
    examples = examples if limit is None else examples.take(limit)
    ensemble.check_lengths(ensemble.lengths(ensemble.encode(examples.prompts, chat=found.chat)), found.max_new_tokens)
    agents = load_agents(ensemble, found, policy)
    chosen = baseline_methods(
        *(ensemble, found, methods),
        agents=agents,
        config=router_config(policy),
        runs=out,
        search_prompts=search_prompts,
    )
    results = evaluate_methods({**chosen, **agents}, found, split, limit=limit, out=out)
    names = {run: f"rlae_{read_run(run)[0].algorithm}" for run in policy}
    files.write_json(
        out / CONFIG_FILE,
        {
            "schema": 1,
            "command": "evaluate",
            "task": found.name,
            "split": split,
            "members": [lm.name for lm in ensemble.members],
            "fusion": fusion,
            "end_ids": list(end_ids),
            "policies": {name: [str(run) for run in policy if names[run] == name] for name in agents},
        },
    )
    report.scores_chart(out / "scores.png", results)
    report.console.print(report.results_table(results))
    if results["differences"]:
        report.console.print(report.differences_table(results))


def ablate(
    *,
    models: Models,
    out: Path,
    prompted: Prompted,
    vary: Annotated[Assignments, arg(metavar="FIELD=V1,V2,... [...]")] = (),
    settings: Annotated[Assignments, arg(name="set", metavar="FIELD=VALUE [...]")] = (),
    algo: Literal["ppo", "mappo"] = "ppo",
    preset: Literal["demo", "paper"] = "demo",
    iterations: int | None = None,
    split: Literal["train", "dev", "test"] = "dev",
    limit: int | None = None,
    seed: int = 0,
    seeds: int = 3,
    resume: bool = False,
    adapters: Adapters = (),
    fusion: Literal["linear", "loglinear"] = "linear",
    end_ids: EndIds = (),
    dtype: Dtype = "float32",
) -> None:
    """Train agents under every combination of some settings, and compare their scores.

    Each combination is a training run of its own (a cell). Afterwards there are one table of the scores with 95%
    intervals and one picture per varied setting. A cell that fails is reported and the others still run. Ctrl-C saves
    and says how to go on. An example: --vary span_length=2,4,8 --vary encoder=hidden,none trains six cells.

    Args:
        models: Hugging Face directories or Hub ids (org/name).
        adapters: PEFT adapters (directories or Hub ids) of the one model given; each becomes a member.
        out: the ablation's directory: results.json, table.md, a picture FIELD.png per setting, a run per cell.
        prompted: what the agents are trained on.
        vary: a setting and its values with commas between them. Any setting of a run's config.json: span_length=2,4,8;
            those of the agent's network as agent.NAME, such as agent.projection=16,64. Parts of one value are joined
            with +, as in agent.reads=hidden+span,stats; none is no value. Also algo=ppo,mappo, and
            encoder=hidden,text:MODEL,both:MODEL,none, what the agent reads: the members' hidden states, a text encoder,
            both, or neither.
        settings: a setting that all cells have, with its value, such as prompts=256.
        algo: ppo = one agent sets all weights, mappo = one agent per member sets its own.
        preset: demo = quick steps for small models, paper = the published figures of RLAE.
        iterations: rollouts, each followed by updates. Default: the preset's.
        split: which prompts are scored. Choices are made on dev; read test once.
        limit: only the first so many prompts of the split.
        seed: of everything random.
        seeds: agents per cell, of seeds SEED, SEED + 1, ..., trained side by side. With two or more, intervals are over
            the seeds; with one, over prompts.
        resume: go on with the ablation in OUT. Finished cells are kept, failed ones tried again; --vary may have
            further values.
        fusion: linear = mean of probabilities, loglinear = weighted mean of log-probabilities.
        end_ids: ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own.
        dtype: of the members' parameters.
    """
    from rlae_jax import report
    from rlae_jax.ablate import ablate, configured, make_cells, parse_settings, parse_vary, table
    from rlae_jax.config import ALGORITHMS
    from rlae_jax.runs.directory import how_to_go_on

    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}")
    base = getattr(ALGORITHMS[algo], preset)(**_given({"iterations": iterations, "seed": seed, "seeds": seeds}))
    base = configured(base, parse_settings([text for texts in settings for text in texts], base))
    values = parse_vary([text for texts in vary for text in texts], base)
    make_cells(base, values)  # tells now, not after reading gigabytes
    found = prompted.load()
    ensemble = _load_ensemble(models, adapters, fusion, dtype, end_ids)
    found = prompted.fit(found, ensemble)
    try:
        results = ablate(ensemble, found, base, values, out, split=split, limit=limit, resume=resume)
    except (Interrupted, KeyboardInterrupt) as interrupted:
        raise how_to_go_on(str(interrupted) or "stopped", resume) from None
    report.console.print(table(results))
    pictures = ", ".join(f"{field}.png" for field in values)
    report.console.print(f"in {out}: table.md, results.json, {pictures}", highlight=False, soft_wrap=True)


def inspect(
    *,
    models: Models,
    end_ids: EndIds = (),
    bandwidth: Annotated[float, arg(metavar="GB/S")] = 1000.0,
    batch: int = 1,
    tokens: int | None = None,
    dtype: Dtype = "float32",
) -> None:
    """Show how models fit together, and how fast they could write, without running them.

    For models with different tokenizers: how many of a vocabulary's texts another member has as one token, how many
    tokens of each member an entry of their union takes, what some member cannot write at all.

    Args:
        models: Hugging Face directories or Hub ids (org/name).
        end_ids: ids that end an answer, a list per model, e.g. 50256 1,2 of two models. Default: the models' own.
        bandwidth: of the memory that holds the weights, in 10^9 bytes per second: the limit of a step is reading all
            weights and the cache once.
        batch: answers written together.
        tokens: length of each text so far. Default: 1024, or the shortest context.
        dtype: of the parameters.
    """
    from rlae_jax.inspect_members import inspect_members, show
    from rlae_jax.models import load

    if not models:
        raise InputError("no models: give at least one directory or Hub id with --models")
    lists = _read_end_ids(end_ids, len(models))
    members = [load(model, dtype=dtype) for model in models]
    if tokens is None:
        tokens = min(INSPECTED_TOKENS, *(lm.config.context for lm in members))
    show(inspect_members(members, lists, bandwidth_gb_s=bandwidth, batch=batch, tokens=tokens))


def specialists(
    *,
    task: Literal["skills", "overlap", "skills3", "mixed", "noisy", "twins", "dominant"],
    out: Path = Path("runs/specialists"),
    seed: int = 0,
    quick: bool = False,
) -> None:
    """Train the three small models that an embedded task is for, in about a minute on two CPU cores.

    Models that are in OUT already are not trained again; tasks share some.

    Args:
        task: skills = each prompt asks for operations of different members; overlap = who is right depends on the
            digits; skills3 = three operations, spans end in the middle of them; mixed = as skills3, members with
            different tokenizers; noisy = one member is surely wrong on odd first digits; twins, dominant = no dynamic
            weights can help.
        out: a directory for the models.
        seed: of everything random.
        quick: half as many steps.
    """
    from rlae_jax import report
    from rlae_jax.specialists import POOL, build_pool

    paths = build_pool(out, seed, POOL[task], quick)
    members = shlex.join(str(paths[name]) for name in POOL[task])
    given, run = f"--task {task} --models {members}", f"runs/{task}"
    report.console.print(
        f"Train an agent for them, and compare it with every baseline:\n"
        f"  rlae-jax train {given} --prompts 256 --iterations 60 --out {run}\n"
        f"  rlae-jax evaluate {given} --policy {run} --methods all --out {run}-test",
        highlight=False,
        soft_wrap=True,
    )


def emorl() -> None:
    """One adapter per objective, fused: demo, train, search, evaluate, export; see rlae-jax emorl --help."""


COMMANDS: dict[str, Callable[..., Any]] = {
    "demo": demo,
    "specialists": specialists,
    "generate": generate,
    "train": train,
    "evaluate": evaluate,
    "ablate": ablate,
    "inspect": inspect,
    "emorl": emorl,
}


def main() -> None:
    """The entry point of `rlae-jax`. Exit status 2: unusable input; 130: stopped by Ctrl-C."""
    _turn_on_compilation_cache()
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        if sys.argv[1:2] == ["emorl"]:
            from rlae_jax.emorl.commands import COMMANDS as EMORL_COMMANDS

            tyro.extras.subcommand_cli_from_dict(
                EMORL_COMMANDS,
                prog="rlae-jax emorl",
                args=sys.argv[2:],
                description="LoRA adapters of one model, each fine-tuned with reinforcement learning for an objective "
                "of its own, write one answer together under weights that are searched.",
            )
            return
        tyro.extras.subcommand_cli_from_dict(
            COMMANDS,
            prog="rlae-jax",
            description="Several language models write one answer together; an agent learns how much to trust each. "
            f"Compiled programs are kept in ~/.cache/rlae_jax (set {CACHE_VARIABLE} to another directory, or to off).",
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as error:
        print(error, file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
