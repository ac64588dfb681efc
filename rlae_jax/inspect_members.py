"""Whether models fit together and how fast they could be: what `rlae-jax inspect` shows, without running them."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.markup
import rich.table

from rlae_jax import ranges, report
from rlae_jax.errors import InputError
from rlae_jax.fusion.vocabulary import UnionVocabulary, load_or_build
from rlae_jax.models import LM
from rlae_jax.models.cache import cache_bytes, state_bytes
from rlae_jax.models.checkpoint_files import disk_bytes
from rlae_jax.models.config import ModelConfig
from rlae_jax.models.quantise import forms, weight_bytes
from rlae_jax.models.transformer import experts_share
from rlae_jax.ranges import Bandwidth, Count

FEW_PARTNERS = 0.2  # of a vocabulary's texts: with fewer, members seldom write in common tokens
DIFFERENT_CONTEXTS = 4  # times as long
# Any other byte never comes in UTF-8 text (RFC 3629, section 3).
_TEXT_BYTES = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclasses.dataclass(frozen=True)
class MemberFigures:
    """One member. What depends on a union is None without one."""

    name: str
    family: str  # model_type; "made here" without a checkpoint
    weights: str  # the dtype, or the forms of quantised kernels
    windows: str | None  # which layers see how much
    recurrent: str | None  # how many layers have a state, and what that takes
    experts: str | None  # how many, and how much of them a token takes
    not_read: str | None  # what else the checkpoint holds
    vocabulary: int  # ids that may be chosen
    partners: float | None  # share of its distinct texts that another member has as a token too
    mean_tokens: float | None  # per entry of text that can be chosen
    p95_tokens: float | None
    max_tokens: int | None
    unspellable_bytes: int | None  # of the 243 that come in UTF-8 text
    end_tokens: tuple[str, ...]  # the shared one first
    chat_template: bool
    context: int
    parameter_bytes: int
    disk_bytes: int | None  # of the files with weights
    cache_bytes: int  # of one row of so many tokens


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect_members` found; print it with `show`."""

    members: tuple[MemberFigures, ...]
    same_tokenizer: bool
    union_size: int | None
    entries_off: int | None  # entries that some member cannot write
    read_bytes: int  # per step: all weights, and the cache of the batch
    steps_per_second: float  # that the memory's bandwidth allows
    tokens_per_second: float  # over the batch
    bandwidth_gb_s: float
    batch: int
    tokens: int
    warnings: tuple[str, ...]


def _bytes(n: float) -> str:
    units = ["B", "kB", "MB", "GB", "TB"]
    power = min(max(len(str(int(n))) - 1, 0) // 3, len(units) - 1)
    return f"{n / 1000**power:.4g} {units[power]}"


def _weights(lm: LM) -> int:
    return sum(map(weight_bytes, jax.tree.leaves((lm.params, lm.stack))))


def _held(lm: LM) -> str:
    """The dtype of the parameters, and how many kernels are held in which other form."""
    parts = [lm.config.dtype, *(f"{n} x {form}" for form, n in forms(lm.params).items())]
    return ", ".join(parts)


def _windows(config: ModelConfig) -> str | None:
    if not config.local_layers or not config.window:
        return None
    chunks = "chunks of " if config.chunked else ""
    return f"{len(config.local_layers)} of {config.layers} layers: {chunks}{config.window:,}"


def _recurrent(config: ModelConfig) -> str | None:
    if config.recurrent is None:
        return None
    layers = len(config.recurrent_layers)
    return f"{layers} of {config.layers} layers: {_bytes(state_bytes(config))} of states per row"


def _of_experts(lm: LM) -> int:
    """Their bytes."""
    leaves = jax.tree_util.tree_leaves_with_path(lm.params)
    return sum(weight_bytes(leaf) for path, leaf in leaves if "['experts']" in jax.tree_util.keystr(path))


def _experts(lm: LM) -> str | None:
    spec = lm.config.experts
    if spec is None:
        return None
    per_token = _weights(lm) - (1 - experts_share(lm.config)) * _of_experts(lm)
    where = f"in {len(spec.layers)} of {lm.config.layers} layers"
    return f"{spec.active} of {spec.number} per token {where}: {_bytes(per_token)} of weights"


def _end_tokens(lm: LM, ids: Sequence[int]) -> tuple[str, ...]:
    """The end tokens as text, the tokenizer's own first."""
    if lm.tokenizer is None:
        return tuple(map(str, ids))
    ordered = sorted(dict.fromkeys(ids), key=lambda i: i != lm.tokenizer.eos_token_id)
    return tuple(f"{lm.tokenizer.convert_ids_to_tokens(i) or 'no token'} ({i})" for i in ordered)


def _union_figures(union: UnionVocabulary, k: int) -> dict[str, Any]:
    """The fields of `MemberFigures` that say how member k lies in the union."""
    partners = np.sum([ids >= 0 for ids in union.partner], axis=0)
    texts = np.flatnonzero((union.partner[k] >= 0) & ~union.control)
    distinct = {union.entry_bytes(e) for e in texts.tolist()}
    lengths = union.lengths(k)[union.choosable & ~union.control]
    return {
        "partners": float(np.sum(partners[texts] > 1)) / max(len(distinct), 1),
        "mean_tokens": float(lengths.mean()) if lengths.size else 0.0,
        "p95_tokens": float(np.percentile(lengths, 95)) if lengths.size else 0.0,
        "max_tokens": int(lengths.max(initial=0)),
        "unspellable_bytes": len(_TEXT_BYTES - {piece[0] for piece in distinct if len(piece) == 1}),
    }


def _unite(
    members: Sequence[LM], end_ids: Sequence[Sequence[int]], cache: Path | None
) -> tuple[UnionVocabulary | None, bool, list[str]]:
    """(union if there has to be one and can be, whether the ids are the same, warnings)."""
    warnings = [f"{lm.name} has no tokenizer, so that it reads and writes ids, not text" for lm in members]
    warnings = [line for line, lm in zip(warnings, members, strict=True) if lm.tokenizer is None]
    without_end = [lm.name for lm, ids in zip(members, end_ids, strict=True) if not len(ids)]
    warnings += [f"{name} has no end token: its texts only end at the longest length" for name in without_end]
    for lm, ids in zip(members, end_ids, strict=True):
        outside = [i for i in ids if not 0 <= i < lm.config.usable_vocab]
        if outside:
            warnings.append(f"{lm.name} has {lm.config.usable_vocab:,} ids, and end ids {outside} are none of them")
    if any(lm.tokenizer is None for lm in members):
        sizes = {lm.config.vocab for lm in members}
        if all(lm.tokenizer is None for lm in members) and len(sizes) == 1:
            return None, True, warnings
        return None, False, [*warnings, "nothing says which ids mean the same: these members cannot be fused"]
    vocabs = [lm.tokenizer.get_vocab() for lm in members]
    if all(vocab == vocabs[0] for vocab in vocabs[1:]):
        return None, True, warnings
    if without_end:
        return None, False, [*warnings, "members with different tokenizers need an end token each: give end ids"]
    try:
        rows = [lm.config.usable_vocab for lm in members]
        own = [[i for i in ids if i < size] for ids, size in zip(end_ids, rows, strict=True)]
        union = load_or_build([lm.tokenizer for lm in members], [lm.name for lm in members], own, rows, cache)
    except InputError as error:
        return None, False, [*warnings, f"no union vocabulary: {error}"]
    return union, False, warnings


def inspect_members(
    members: Sequence[LM],
    end_ids: Sequence[Sequence[int]] | None = None,
    *,
    bandwidth_gb_s: Bandwidth = 1000.0,
    batch: Count = 1,
    tokens: Count = 1024,
    cache: Path | None = None,
) -> Inspection:
    """What there is to know of an ensemble before it runs.

    Args:
      end_ids: each member's ids that end a text; by default its own.
      bandwidth_gb_s: of the memory that holds weights and caches, in 10^9 bytes per second.
      batch: rows decoded together.
      tokens: length of each row so far, prompt and answer.
      cache: directory of union vocabularies, see `load_or_build`.

    Raises:
      InputError: no members, a number out of range, another number of end id lists than members.
    """
    if not members:
        raise InputError("give at least one model to inspect")
    ranges.check_arguments(inspect_members, bandwidth_gb_s=bandwidth_gb_s, batch=batch, tokens=tokens)
    if end_ids is not None and len(end_ids) != len(members):
        raise InputError(f"end_ids: {len(end_ids)} lists for {len(members)} members; give one list per member")
    ends = [lm.config.end_ids for lm in members] if end_ids is None else end_ids
    union, same, warnings = _unite(members, ends, cache)
    no_union: dict[str, Any] = dict.fromkeys(
        ("partners", "mean_tokens", "p95_tokens", "max_tokens", "unspellable_bytes")
    )
    figures = tuple(
        MemberFigures(
            name=lm.name,
            family="made here" if lm.source is None else lm.source.family.model_type,
            weights=_held(lm),
            windows=_windows(lm.config),
            recurrent=_recurrent(lm.config),
            experts=_experts(lm),
            not_read="all but its language model" if lm.source is not None and lm.source.wrapped else None,
            vocabulary=lm.config.usable_vocab,
            end_tokens=_end_tokens(lm, ids),
            chat_template=bool(getattr(lm.tokenizer, "chat_template", None)),
            context=lm.config.context,
            parameter_bytes=_weights(lm),
            disk_bytes=None if lm.path is None or not lm.path.exists() else disk_bytes(lm.path),
            cache_bytes=cache_bytes(lm.config, tokens),
            **(no_union if union is None else _union_figures(union, k)),
        )
        for k, (lm, ids) in enumerate(zip(members, ends, strict=True))
    )
    read = sum(member.parameter_bytes + batch * member.cache_bytes for member in figures)
    read -= round(sum((1 - experts_share(lm.config, batch)) * _of_experts(lm) for lm in members))
    steps = bandwidth_gb_s * 1e9 / read
    return Inspection(
        members=figures,
        same_tokenizer=same,
        union_size=members[0].config.usable_vocab if same else None if union is None else union.size,
        entries_off=0 if same else None if union is None else _entries_off(union),
        read_bytes=read,
        steps_per_second=steps,
        tokens_per_second=steps * batch,
        bandwidth_gb_s=bandwidth_gb_s,
        batch=batch,
        tokens=tokens,
        warnings=tuple(dict.fromkeys([*warnings, *_mismatches(figures, tokens)])),
    )


def _entries_off(union: UnionVocabulary) -> int:
    """Entries that some member cannot write; the first member's unused ids are nobody's entries."""
    unused = np.all([ids < 0 for ids in union.partner], axis=0)
    return int(np.sum(~union.choosable & ~unused))


def _mismatches(members: Sequence[MemberFigures], tokens: int) -> list[str]:
    """Where members look as if they were not meant for each other."""
    mismatches = []
    with_chat = [member.name for member in members if member.chat_template]
    without_chat = [member.name for member in members if not member.chat_template]
    if with_chat and without_chat:
        mismatches.append(f"{', '.join(with_chat)} has a chat template and {', '.join(without_chat)} has none")
    for member in members:
        if member.partners is not None and member.partners < FEW_PARTNERS:
            mismatches.append(f"only {member.partners:.1%} of {member.name}'s tokens are tokens of another member")
        if member.unspellable_bytes:
            mismatches.append(
                f"{member.name} cannot write {member.unspellable_bytes} of the 243 bytes of UTF-8 text alone"
            )
        if tokens > member.context:
            mismatches.append(f"{member.name} was made for {member.context} tokens, not {tokens}")
    shortest, longest = (choose(members, key=lambda member: member.context) for choose in (min, max))
    if longest.context >= DIFFERENT_CONTEXTS * shortest.context:
        mismatches.append(
            f"{shortest.name} was made for {shortest.context} tokens and {longest.name} for {longest.context}: "
            "texts end at the shorter"
        )
    return mismatches


def tables(inspection: Inspection) -> list[rich.console.RenderableType]:
    """The figures of each member, then those of the ensemble, then warnings."""

    def row(title: str, values: Sequence[Any]) -> None:
        if any(value is not None for value in values):
            table.add_row(title, *("-" if value is None else rich.markup.escape(str(value)) for value in values))

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.1%}"

    members = inspection.members
    table = rich.table.Table(title="members")
    table.add_column("")
    for member in members:
        table.add_column(rich.markup.escape(member.name), justify="right", overflow="fold")
    row("family", [member.family for member in members])
    row("weights", [member.weights for member in members])
    row("windows", [member.windows for member in members])
    row("recurrent", [member.recurrent for member in members])
    row("experts", [member.experts for member in members])
    row("not read", [member.not_read for member in members])
    row("vocabulary", [f"{member.vocabulary:,}" for member in members])
    row("texts with an exact partner", [percent(member.partners) for member in members])
    per_entry = [
        None
        if member.mean_tokens is None
        else f"{member.mean_tokens:.2f} / {member.p95_tokens:g} / {member.max_tokens}"
        for member in members
    ]
    row("tokens per entry: mean / 95% / max", per_entry)
    row("bytes it cannot write", [member.unspellable_bytes for member in members])
    shared = not inspection.same_tokenizer and inspection.union_size is not None
    row("shared end token" if shared else "end tokens", [_ends(member, shared) for member in members])
    if shared:
        row("private end tokens", [", ".join(member.end_tokens[1:]) or None for member in members])
    row("chat template", ["yes" if member.chat_template else "no" for member in members])
    row("context", [f"{member.context:,}" for member in members])
    row("on disk", [None if member.disk_bytes is None else _bytes(member.disk_bytes) for member in members])
    row("parameters", [_bytes(member.parameter_bytes) for member in members])
    row(f"cache of {inspection.tokens:,} tokens", [_bytes(member.cache_bytes) for member in members])

    whole = rich.table.Table(title="together", show_header=False)
    whole.add_column("")
    whole.add_column("", justify="right")
    if inspection.union_size is None:
        whole.add_row("union vocabulary", "none")
    elif inspection.same_tokenizer:
        whole.add_row("one same tokenizer, its vocabulary", f"{inspection.union_size:,}")
    else:
        whole.add_row("union vocabulary", f"{inspection.union_size:,}")
        whole.add_row("entries that some member cannot write (off)", f"{inspection.entries_off:,}")
    whole.add_row("read per step", _bytes(inspection.read_bytes))
    reading = f"{inspection.batch} x {inspection.tokens:,} tokens at {inspection.bandwidth_gb_s:g} GB/s"
    rate = inspection.tokens_per_second
    whole.add_row(f"most tokens per second, {reading}", f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}")
    lines = [f"[yellow]warning:[/yellow] {rich.markup.escape(line)}" for line in inspection.warnings]
    return [table, whole, *lines]


def _ends(member: MemberFigures, shared: bool) -> str:
    return ", ".join(member.end_tokens[:1] if shared else member.end_tokens) or "none"


def show(inspection: Inspection) -> None:
    """Prints `tables` to the console."""
    for part in tables(inspection):
        report.console.print(part)
