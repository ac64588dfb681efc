"""`rlae-jax generate`."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import OmitArgPrefixes, arg

from rlae_jax.commands.options import ModelOptions
from rlae_jax.errors import InputError
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.ranges import Weight

if TYPE_CHECKING:
    from rlae_jax.fusion.ensemble import Ensemble
    from rlae_jax.fusion.generation import Generation
    from rlae_jax.fusion.weights import Weights


_WRITING = "writing; a program that is new here is compiled first, which takes up to minutes"


def generate(
    *,
    model: Annotated[ModelOptions, OmitArgPrefixes],
    prompt: Annotated[tuple[str, ...], arg(metavar="TEXT [TEXT ...]")],
    weights: Annotated[tuple[Weight, ...] | None, arg(metavar="W [W ...]")] = None,
    policy: Annotated[str | None, arg(metavar="RUN|NAME")] = None,
    sampling: Annotated[SamplingOptions, OmitArgPrefixes],
    stream: bool = False,
    show_weights: bool = False,
    html: Annotated[Path | None, arg(metavar="FILE.html")] = None,
) -> None:
    """Let several language models write one answer together.

    Models with different tokenizers write over the union of their vocabularies. Then steps, spans and --max-new-tokens
    count entries of that union: tokens of any of them. `rlae-jax inspect` says how well models fit together.

    Args:
        model: which models, and how they are fused.
        prompt: one or more prompts; each is answered.
        weights: one per model, e.g. 1 2 (scaled to sum to 1). Default: equal weights.
        policy: a run directory whose trained agent sets the weights, span by span; or a policy that needs no training:
            perplexity (of the prompt), confidence (the most certain member), consistency (agreement with the others),
            gate (the first member alone where it is certain), draw (one member per step), online (exponentiated
            gradient, anew in every text), bayes (by the likelihood of the text so far), selective (the first member
            alone where members agree).
        sampling: how answers are written.
        stream: print the answer span by span, while it is written; for one prompt and one sample.
        show_weights: print the weights of each span under each answer.
        html: also draw the answers into a file for browsers: each token coloured by the member that favoured it, the
            weights by span underneath.
    """
    from rlae_jax import files, report
    from rlae_jax.ppo.policies import get_policy
    from rlae_jax.ppo.train import check_members
    from rlae_jax.serving.html import generation_html

    if not prompt:
        raise InputError("no prompts: give at least one with --prompt")
    if stream and (len(prompt) > 1 or sampling.samples > 1):
        raise InputError(f"--stream needs one prompt and one sample, not {len(prompt)} and {sampling.samples}")
    if stream and (show_weights or sampling.scores or html):
        raise InputError("--stream prints text only; leave out --show-weights, --scores and --html, or --stream")
    sampling.check()
    if weights is not None and policy is not None:
        raise InputError("give either --weights or --policy")
    members = len(model.adapters or model.models)
    if weights is not None and members and len(weights) != members:
        raise InputError(f"--weights has {len(weights)} numbers for {members} members; give one for each")
    if html is not None:
        files.require_place(html, "file")
    used: Weights = None if weights is None else list(weights)
    if policy is not None:
        used = get_policy(policy)
    with report.waiting(f"loading {', '.join(model.models)}"):
        ensemble = model.load()
    if policy is not None and Path(policy).is_dir():
        check_members(policy, ensemble)
    options = dataclasses.asdict(sampling)
    if stream:
        del options["scores"]
        pieces = ensemble.stream(list(prompt), used, **options)
        with report.waiting(_WRITING):
            first = next(pieces, ("",))
        print((prompt[0] if ensemble.continues else "") + first[0], end="", flush=True)
        for (piece,) in pieces:
            print(piece, end="", flush=True)
        print()
        return
    with report.waiting(_WRITING):
        generation = ensemble.generate(list(prompt), used, **options | {"scores": sampling.scores or html is not None})
    names = [lm.name for lm in ensemble.members]
    for b, text in enumerate(generation.texts):
        print(f"{prompt[b // sampling.samples]}{text}" if ensemble.continues else text)
        if sampling.scores:
            print(_scores_line(generation, names, b))
        if show_weights:
            print(f"  weights of {', '.join(names)}:")
            for p, row in enumerate(generation.weights[b]):
                if row[0] == row[0]:
                    print(f"    span {p + 1}: " + " ".join(f"{weight:.3f}" for weight in row))
    if html is not None:
        files.write_text(html, generation_html(ensemble, generation, prompt, chat=sampling.chat))
        print(f"drawn in {report.quoted(html)}", file=sys.stderr)
    _hint_where_a_member_was_full(ensemble, generation, list(prompt), sampling)
    _tell_failed(generation.finish_reasons)


def _tell_failed(reasons: Sequence[str]) -> None:
    """Says which answers ended since a prediction was not finite.

    Raises:
      InputError: all of them.
    """
    failed = [str(i + 1) for i, reason in enumerate(reasons) if reason == "error"]
    if not failed:
        return
    which = f"answers {', '.join(failed[:10])}{', ...' if len(failed) > 10 else ''} of {len(reasons)}"
    said = f"{which} ended early: a prediction was not finite (NaN or infinite)"
    if len(failed) == len(reasons):
        raise InputError(f"{said}; weights may be damaged or too large for --dtype")
    print(f"warning: {said}", file=sys.stderr)


def _scores_line(generation: "Generation", names: list[str], row: int) -> str:
    assert generation.scores is not None
    assert generation.member_scores is not None
    steps = generation.steps[row]
    if not steps:
        return "  mean log-probability: nothing was written"
    fused, members = generation.scores[row, :steps].mean(), generation.member_scores[row, :steps].mean(axis=0)
    each = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(names, members, strict=True))
    return f"  mean log-probability: {fused:.3f} ({each})"


def _hint_where_a_member_was_full(
    ensemble: "Ensemble", generation: "Generation", prompts: list[str], sampling: SamplingOptions
) -> None:
    """A hint on standard error if answers ended before their longest length for want of room."""
    longest = sampling.max_new_tokens
    ends = zip(generation.finish_reasons, generation.steps, strict=True)
    early = sum(reason == "length" and steps < longest for reason, steps in ends)
    if not early:
        return
    room = sampling.member_tokens
    if room is None:
        room = ensemble.spec(max_new_tokens=longest, member_tokens=None, chat=sampling.chat).member_tokens
    allowed = ensemble.context - max(ensemble.lengths(ensemble.encode(prompts, chat=sampling.chat)))
    way_out = f"--member-tokens gives them more, up to {allowed}"
    if room >= allowed:
        way_out = f"the shortest context, of {ensemble.context} tokens, allows no more"
    print(
        f"hint: {early} of {len(generation.steps)} answers ended before {longest} steps, because the next entry did "
        f"not fit into the {min(room, allowed)} tokens that each member has for an answer; {way_out}",
        file=sys.stderr,
    )
