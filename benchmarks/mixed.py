"""What different tokenizers cost: against members with one tokenizer, and against GaC in torch.

Two questions. (1) 134M members with vocabularies of 50k and 32k tokens write gsm8k answers: the entries are forced, so
that both sides do the work of a real text, once in the second member's own segmentation and once in a random mix of
both. Seconds per fused step, prefill left out, against the mean of the two pairs that share a tokenizer, with equal
numbers of cache slots. (2) Two 0.3M members write freely, against the published GaC algorithm (one prompt at a time)
and against the best that torch can do (batched, tables, compiled where that helps). Everything is timed from texts to
texts.
"""

import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rlae_jax as rj
from benchmarks import common
from rlae_jax.fusion.operators import linear
from rlae_jax.fusion.policy import Deterministic, Dims, Observation

PROMPT_TOKENS = 64  # of cache; prompts are shorter
SLOTS = 192  # of cache beyond the prompt, on both sides
STEPS = 64
ROUNDS, QUICK_ROUNDS = 9, 3
BUDGET_SECONDS = 60.0
REQUIRED = {1: 1.2, 8: 1.3}

GAC_STEPS = 64
GAC_CASES = (  # name, batch, required against the reference, prompts that the reference is timed on
    ("gac_512", 1, 8.0, 1),
    ("gac_512", 64, 25.0, 4),
    ("gac_32k", 1, 5.0, 1),
    ("gac_32k", 64, 12.0, 4),
)


# --- (1) forced entries ---


@dataclasses.dataclass(frozen=True)
class Forced:
    """A policy whose "weights" are what is to be written: its parameters are Float[P, B], an entry per step and row."""

    members: int
    reads: tuple[str, ...] = ("span",)

    def init(self, key: Any, dims: Dims) -> Any:
        return jnp.zeros((dims.spans, 1))

    def apply(self, params: Any, observation: Observation) -> tuple[Deterministic, Any]:
        entries_b = params[observation.span[0]]
        return Deterministic(jnp.tile(entries_b[:, None], (1, self.members))), jnp.zeros(entries_b.shape)


def forced(log_probs: tuple[Any, ...], weights: Any) -> Any:
    """The uniform linear fusion, of which then one entry is lifted above all others."""
    fused = linear(log_probs, jnp.full((1, len(log_probs)), 1 / len(log_probs)))
    return jnp.where(jnp.arange(fused.shape[1], dtype=weights.dtype)[None] == weights[:, :1], 1.0, fused)


def member_entries(ensemble: rj.Ensemble, k: int, text: str) -> list[tuple[int, int]]:
    """(entry, bytes) of each token of member k's own segmentation of a text."""
    union = ensemble.union
    assert union is not None
    ids = ensemble.members[k].tokenizer(text, add_special_tokens=False)["input_ids"]
    entries = [int(union.own[k][i]) for i in ids]
    data = b"".join(map(union.entry_bytes, entries))
    if data == b" " + text.encode():  # SentencePiece's first space
        first = union.entry_bytes(entries[0])[1:]
        again = [int(union.own[k][i]) for i in ensemble.members[k].tokenizer("\n" + text)["input_ids"]]
        tail = [e for e in again if not union.control[e]]
        while b"".join(map(union.entry_bytes, tail)) != text.encode() and tail:
            tail = tail[1:]
        entries = tail or [int(np.flatnonzero([union.entry_bytes(e) == first for e in range(union.size)])[0])]
        data = b"".join(map(union.entry_bytes, entries))
    assert data == text.encode(), "the segmentation must spell the text"
    return [(e, len(union.entry_bytes(e))) for e in entries]


def segmentations(ensemble: rj.Ensemble, texts: Sequence[str], steps: int) -> dict[str, np.ndarray]:
    """Int[steps, B] entries per text: in the second member's own segmentation, and in a random mix of both."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[list[int]]] = {"second member's": [], "random mix": []}
    for text in texts:
        own = [member_entries(ensemble, k, text) for k in range(2)]
        columns["second member's"].append([e for e, _ in own[1]][:steps])
        starts: list[dict[int, tuple[int, int]]] = []
        for pieces in own:
            places = np.cumsum([0] + [n for _, n in pieces])
            starts.append(dict(zip(places.tolist(), pieces, strict=False)))
        place = 0
        mix: list[int] = []
        while len(mix) < steps:
            k = int(rng.integers(2))
            entry, n = starts[k].get(place) or starts[1 - k][place]
            mix.append(entry)
            place += n
        columns["random mix"].append(mix)
    return {name: np.array(rows, np.float32).T for name, rows in columns.items()}


def answers(directory: Path, count: int, characters: int) -> tuple[list[str], list[str]]:
    """gsm8k questions, cut, and long texts of answers."""
    with open(directory / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(50 * count), lines, strict=False)]
    prompts = [row["question"] for row in rows[:count]]
    texts = []
    for b in range(count):
        text = ""
        for row in rows[b::count]:
            text += row["answer"] + "\n"
            if len(text) > characters:
                break
        texts.append(text)
    return prompts, texts


def forced_call(
    ensemble: rj.Ensemble, prompts: list[str], entries: np.ndarray
) -> tuple[list[Any], np.ndarray, rj.DecodeSpec]:
    """The rows, the policy's parameters and the spec with which an ensemble writes these entries."""
    mixed = ensemble.union is not None
    # Slots beyond the prompt: a member's room, a pending token and the filling of its widest pass; or the steps.
    limit = SLOTS - 8 if mixed else SLOTS
    spec = ensemble.spec(
        policy=Forced(len(ensemble.members)),
        span_length=1,
        max_new_tokens=STEPS if mixed else limit,
        ignore_eos=True,
        member_tokens=limit if mixed else None,
    )
    padded = np.zeros((spec.spans, entries.shape[1]), np.float32)
    padded[: len(entries)] = entries
    rows = ensemble.encode(prompts)
    widest = max(ensemble.lengths(rows))
    assert PROMPT_TOKENS * 3 // 4 < widest <= PROMPT_TOKENS, "both sides read prompts of one bucket"
    return rows, padded, spec


def stepper(ensemble: rj.Ensemble, prompts: list[str], entries: np.ndarray) -> Callable[[int], Any]:
    """A function that writes the first n of the forced entries and returns what was written."""
    rows, padded, spec = forced_call(ensemble, prompts, entries)

    def run(n: int) -> np.ndarray:
        state = ensemble.run(rows, padded, 0, spec, limits=np.full(len(rows), n, np.int32))
        np.testing.assert_array_equal(state.tokens[:, :n].T, entries[:n])
        return np.asarray(state.steps)

    return run


def forced_cases(
    work: Path, shared: Path, *, quick: bool
) -> tuple[list[dict[str, Any]], list[list[Any]], list[dict[str, Any]]]:
    """Rows, table cells and checks of question 1."""
    from benchmarks.members import llama_134m

    lms = []
    for i, name in enumerate(("gpt2", "gpt2", "mistral_v3", "mistral_v3")):
        lms.append(rj.load(llama_134m(work / f"member{i}", shared / "tokenizers" / name, seed=i)))
    mixed = rj.Ensemble([lms[0], lms[2]], forced)
    same = {"gpt2 twice": rj.Ensemble(lms[:2], forced), "mistral twice": rj.Ensemble(lms[2:], forced)}
    assert mixed.union is not None
    rows, cells, checks = [], [], []
    for batch in (1, 8):
        prompts, texts = answers(shared / "data", batch, 6 * STEPS)
        prompts = [cut(mixed, prompt + " " + prompts[0], PROMPT_TOKENS) for prompt in prompts]
        entries = segmentations(mixed, texts, STEPS)
        runs = {name: stepper(mixed, prompts, columns) for name, columns in entries.items()}
        for name, ensemble in same.items():
            ids = [ensemble.tokenizer(text, add_special_tokens=False)["input_ids"][:STEPS] for text in texts]
            runs[name] = stepper(ensemble, prompts, np.array(ids, np.float32).T)
        callables = {f"{name} {n}": functools.partial(run, n) for name, run in runs.items() for n in (STEPS, 1)}
        for name, call in callables.items():
            print(f"compiling 134M, batch {batch}: {name} steps", flush=True)
            call()
        load = common.OtherLoad()
        timings = common.time_alternating(
            callables, rounds=QUICK_ROUNDS if quick else ROUNDS, budget_seconds=BUDGET_SECONDS
        )
        others = load.share()
        per_step = {
            name: np.array(common.step_seconds(timings[f"{name} {STEPS}"], timings[f"{name} 1"], STEPS).seconds)
            for name in runs
        }
        base = np.mean([per_step[name] for name in same], axis=0)
        for name in runs:
            seconds = per_step[name]
            ratio = float(np.median(seconds / base))
            row: dict[str, Any] = {"batch": batch, "case": name, "seconds": seconds.tolist(), "ratio": ratio}
            cell = [f"134M, batch {batch}, {name}", f"{np.median(seconds) * 1e3:.1f}", f"{ratio:.2f}"]
            if name in entries:
                lengths = [mixed.union.lengths(k)[entries[name].astype(int)] for k in range(2)]  # [steps, B] each
                row["tokens_per_step"] = [np.bincount(n.ravel()).tolist() for n in lengths]
                means = " and ".join(f"{n.mean():.2f}" for n in lengths)
                widest = " and ".join(f"{n.max(axis=1).mean():.2f}" for n in lengths)
                counts = "; ".join("/".join(map(str, np.bincount(n.ravel(), minlength=4).tolist())) for n in lengths)
                cell += [means, widest, counts]
            else:
                cell += ["1", "1", ""]
            cell.append("" if others is None else f"{others:.0%}")
            rows.append(row)
            cells.append(cell)
        worst = max(row["ratio"] for row in rows if row["batch"] == batch and row["case"] in entries)
        checks.append(common.check(f"mixed_134M_b{batch}", worst, "<=", REQUIRED[batch]))
    return rows, cells, checks


# --- (2) GaC ---


def cut(ensemble: rj.Ensemble, text: str, tokens: int) -> str:
    """The longest beginning of a text that takes every member at most so many tokens."""
    while max(ensemble.lengths(ensemble.encode([text]))) > tokens:
        text = text[:-1]
    return text


def gac_case(
    name: str, directories: list[Path], batch: int, sample: int, prompts: list[str], *, quick: bool
) -> dict[str, Any]:
    """One row: seconds per fused step and row of ours, the reference and the best peer."""
    from benchmarks.gac_peers import ReferencePeer, best_peer

    ensemble = rj.Ensemble([rj.load(directory) for directory in directories])
    rows = [cut(ensemble, prompt, PROMPT_TOKENS) for prompt in prompts[:batch]]
    print(f"preparing {name}, batch {batch}", flush=True)
    reference = ReferencePeer(directories)
    best = best_peer(directories, rows, GAC_STEPS, compiled=(None,) if quick or batch > 1 else (None, "member"))
    written: dict[str, Any] = {}

    def ours() -> None:
        written["ours"] = ensemble.generate(rows, max_new_tokens=GAC_STEPS, ignore_eos=True)

    def theirs() -> None:
        written["best"] = best.generate(rows, GAC_STEPS)

    def published() -> None:
        written["reference"] = reference.generate(rows[:sample], GAC_STEPS)

    callables = {"ours": ours, "reference": published, "best": theirs}
    for call in callables.values():
        call()
    load = common.OtherLoad()
    timings = common.time_alternating(
        callables, rounds=QUICK_ROUNDS if quick else ROUNDS, budget_seconds=BUDGET_SECONDS / 2
    )
    assert all(steps == GAC_STEPS for steps in written["ours"].steps), "a member ran out of room"
    per_token = {side: np.array(timing.seconds) / GAC_STEPS for side, timing in timings.items()}
    per_token["ours"] /= batch
    per_token["best"] /= batch
    per_token["reference"] /= min(sample, batch)
    fed = {side: written[side].fed.mean(axis=0) / (GAC_STEPS - 1) for side in ("reference", "best")}
    assert ensemble.union is not None
    states = ensemble.run(
        ensemble.encode(rows),
        np.full((batch, 2), 0.5, np.float32),
        0,
        ensemble.spec(max_new_tokens=GAC_STEPS, ignore_eos=True),
    )
    fed["ours"] = np.array([ensemble.union.lengths(k)[states.tokens[:, :-1]].mean() for k in range(2)])
    return {
        "case": name,
        "batch": batch,
        "seconds_per_token": {side: seconds.tolist() for side, seconds in per_token.items()},
        "against_reference": float(np.median(per_token["reference"] / per_token["ours"])),
        "against_best": float(np.median(per_token["best"] / per_token["ours"])),
        "variant": best.variant,
        "tokens_per_step": {side: values.tolist() for side, values in fed.items()},
        "others": load.share(),
    }


def gac_cases(
    work: Path, shared: Path, *, quick: bool
) -> tuple[list[dict[str, Any]], list[list[Any]], list[dict[str, Any]]]:
    """Rows, table cells and checks of question 2."""
    from benchmarks import peers
    from benchmarks.members import tiny_llama, train_small_tokenizer

    peers.setup()
    small = train_small_tokenizer(work / "small", [shared / "data" / "gsm8k" / "train.jsonl"])
    tokenizers = {
        "gac_512": (shared / "models" / "stories260K", small),
        "gac_32k": (shared / "tokenizers" / "mistral_v3", shared / "tokenizers" / "gpt2"),
    }
    members = {
        name: [tiny_llama(work / f"{name}{i}", directory, seed=i) for i, directory in enumerate(pair)]
        for name, pair in tokenizers.items()
    }
    prompts, _ = answers(shared / "data", max(case[1] for case in GAC_CASES), 1)
    rows, cells, checks = [], [], []
    for name, batch, required, sample in GAC_CASES:
        row = gac_case(name, members[name], batch, sample, prompts, quick=quick)
        rows.append(row)
        rates = {side: 1 / np.median(seconds) for side, seconds in row["seconds_per_token"].items()}
        fed = {side: " and ".join(f"{n:.2f}" for n in values) for side, values in row["tokens_per_step"].items()}
        cells.append(
            [
                f"{name}_b{batch}",
                *(f"{rates[side]:,.0f}" for side in ("ours", "reference", "best")),
                f"{row['against_reference']:.1f}",
                f"{row['against_best']:.2f}",
                *(fed[side] for side in ("ours", "reference", "best")),
                row["variant"],
                "" if row["others"] is None else f"{row['others']:.0%}",
            ]
        )
        checks.append(common.check(f"{name}_b{batch}", row["against_reference"], ">=", required))
    return rows, cells, checks


def main() -> None:
    options = common.parse_args(__doc__.splitlines()[0] if __doc__ else "")
    common.require("torch")
    shared = common.require_shared("tokenizers").parent
    environment = common.environment()
    with tempfile.TemporaryDirectory() as directory:
        rows, cells, checks = forced_cases(Path(directory), shared, quick=options.quick)
        jax.clear_caches()
        gac_rows, gac_table, gac_checks = gac_cases(Path(directory), shared, quick=options.quick)
    common.print_table(
        f"Forced gsm8k answers, {STEPS} steps, {SLOTS} slots beyond the prompt; others: share of the cores that other "
        "programs took",
        (
            *("case", "ms/step", "times same", "tokens/step (mean)", "(widest row)"),
            *("steps of 0/1/2/3/... tokens; second member", "others"),
        ),
        cells,
    )
    common.print_table(
        f"GaC: fused tokens per second, all rows together: prompts of up to {PROMPT_TOKENS} tokens, {GAC_STEPS} steps, "
        "greedy, two 0.3M members; fed: tokens per step and member",
        (
            *("case", "ours", "reference", "best peer", "times reference", "times best"),
            *("fed, ours", "reference", "best", "variant", "others"),
        ),
        gac_table,
    )
    common.finish(rows + gac_rows, checks + gac_checks, environment, options.json_path)


if __name__ == "__main__":
    main()
