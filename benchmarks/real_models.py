"""What fewer bits cost two real models, and what they are worth together: bits per byte of five kinds of text.

SmolLM2-135M-Instruct and Gemma 3 270M (`real_models_files`) read texts of word problems, code, counselling, exams and
everyday advice, alone, each in its own tokens, and as an ensemble over the union of their tokens: at equal weights, and
at the fixed weights that would have been best for all the texts. All of it with weights as the files have them, in
float32, and quantised on loading. A text's first words are given; of the rest the bits are counted.

Over the union a text is read in the first member's tokens, of which the second lacks a few: an ensemble that is worse
than a member is a finding.
"""

import csv
import gzip
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.real_models_files import GEMMA3, SMOLLM2, Unavailable, find

GIVEN, TEXT = 60, 500  # characters of a text that are given, and of all of it
TEXTS, QUICK_TEXTS = 6, 2  # of every kind
WEIGHTS = np.linspace(0, 1, 21)  # of the first member
FORMS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"quantise": "int8"},
    "int4, groups of 32": {"quantise": "int4", "quantise_group": 32},
    "int8 cache": {"kv_dtype": "int8"},
}
REQUIRED = {"int8": ("int8_bpb", 0.005), "int4, groups of 32": ("int4_bpb", 0.04)}  # a share more than float32


class Text(NamedTuple):
    """What is given, and what is read."""

    kind: str
    given: str
    rest: str


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _counselling(directory: Path) -> Iterator[str]:
    with (directory / "counsel_chat" / "counsel_chat.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield row["answerText"]


KINDS: dict[str, Callable[[Path], Iterator[str]]] = {
    "word problems": lambda data: (
        f"{row['question']}\n{row['answer']}" for row in _json_lines(data / "gsm8k" / "test.jsonl")
    ),
    "code": lambda data: (
        row["prompt"] + row["canonical_solution"] for row in _json_lines(data / "human_eval" / "HumanEval.jsonl.gz")
    ),
    "counselling": _counselling,
    "exams": lambda data: (
        f"{row['question']}\nA. {row['A']}\nB. {row['B']}\nC. {row['C']}\nD. {row['D']}"
        for row in _json_lines(data / "arc_challenge" / "test.jsonl")
    ),
    "everyday": lambda data: (
        f"{row['question']} {row[row['answer']]}" for row in _json_lines(data / "piqa" / "dev.jsonl")
    ),
}


def read_texts(data: Path, count: int) -> list[Text]:
    """`count` texts of every kind, of items one after another."""
    texts = []
    for kind, items in KINDS.items():
        made = 0
        long = ""
        for item in items(data):
            long += item.strip() + "\n\n"
            if len(long) < TEXT:
                continue
            at = long.index(" ", GIVEN)
            texts.append(Text(kind, long[:at], long[at:TEXT].rstrip()))
            made, long = made + 1, ""
            if made == count:
                break
    return texts


class Reading(NamedTuple):
    """Log-probabilities of every token of every text, and of the whole text."""

    members: np.ndarray  # [texts, tokens, members]; 0 beyond a text's end
    fused: np.ndarray  # [texts]

    def of_weights(self, weights: np.ndarray) -> np.ndarray:
        """[texts]: what other weights of the members would have given."""
        with np.errstate(divide="ignore"):
            return np.logaddexp.reduce(self.members + np.log(weights), axis=-1).sum(axis=1)


def read(ensemble: rj.Ensemble, texts: list[Text]) -> Reading:
    """As `Ensemble.log_likelihoods`, with the members' parts."""
    given = [text.given for text in texts]
    tokens = [ensemble.codec.continuation(text.given, text.rest, ensemble.continues) for text in texts]
    scores = ensemble.score_tokens(ensemble.encode(given), tokens)
    members = np.zeros((len(texts), max(map(len, tokens)), len(ensemble.members)))
    for row, one in zip(members, scores, strict=True):
        row[: len(one.members)] = one.members
    return Reading(members, np.array([one.fused.sum(dtype=np.float64) for one in scores]))


def read_alone(lm: rj.LM, texts: list[Text]) -> np.ndarray:
    """[texts]: the log-probability of each text to one model, in its own tokens, in one pass without a cache."""
    alone = rj.Ensemble([lm])
    given = alone.encode([text.given for text in texts])
    rest = [alone.codec.continuation(text.given, text.rest, alone.continues) for text in texts]
    lengths = [len(a) + len(b) for a, b in zip(given, rest, strict=True)]
    ids = np.zeros((len(texts), max(lengths)), np.int32)
    counted = np.zeros(ids.shape, bool)
    for row, (a, b) in enumerate(zip(given, rest, strict=True)):
        ids[row, : len(a) + len(b)] = [*a, *b]
        counted[row, len(a) : len(a) + len(b)] = True
    log_probs = np.asarray(lm.log_probs(ids, np.arange(ids.shape[1]) < np.array(lengths)[:, None]))
    return np.where(counted[:, 1:], log_probs, 0.0).sum(axis=1)


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    data = common.require_shared("data")
    try:
        paths = {"SmolLM2 135M": find(SMOLLM2), "Gemma 3 270M": find(GEMMA3)}
    except Unavailable as error:
        sys.exit(f"error: {error}")
    environment = common.environment()
    texts = read_texts(data, QUICK_TEXTS if options.quick else TEXTS)
    bits_of = {form: measure(form, paths, texts, how) for form, how in FORMS.items()}
    sizes = np.array([len(text.rest.encode()) for text in texts])
    rows = []
    for form, by_reader in bits_of.items():
        for reader, bits in by_reader.items():
            per_kind = {
                kind: float(bits[own].sum() / sizes[own].sum())
                for kind in KINDS
                if (own := np.array([text.kind == kind for text in texts])).any()
            }
            share = bits.sum() / bits_of["float32"][reader].sum() - 1 if reader in bits_of["float32"] else math.nan
            rows.append({"form": form, "reader": reader, **per_kind, "all": bits.sum() / sizes.sum(), "more": share})
    common.print_table(
        f"Bits per byte of {len(texts)} texts, {sizes.sum()} bytes",
        ("weights", "read by", *KINDS, "all", "more than float32"),
        [
            (row["form"], row["reader"], *(f"{row[kind]:.3f}" for kind in (*KINDS, "all")), f"{row['more']:+.2%}")
            for row in rows
        ],
    )
    checks = [
        common.check(name, max(row["more"] for row in rows if row["form"] == form), "<=", most)
        for form, (name, most) in REQUIRED.items()
    ]
    common.finish(rows, checks, environment, options.json_path)


def measure(form: str, paths: dict[str, Path], texts: list[Text], how: dict[str, Any]) -> dict[str, np.ndarray]:
    """Bits [texts] by each reader, of weights in one form."""
    members = {name: rj.load(path, context=512, **how) for name, path in paths.items()}
    bits = {}
    for name, lm in members.items():
        # A pass over a whole text reads no cache.
        by_one = read(rj.Ensemble([lm]), texts).fused if "kv_dtype" in how else read_alone(lm, texts)
        bits[name] = -by_one / math.log(2)
        print(f"{form}: {name} {bits[name].sum() / sum(len(text.rest.encode()) for text in texts):.4f}", flush=True)
    both = read(rj.Ensemble(list(members.values())), texts)
    bits["both, equal weights"] = -both.fused / math.log(2)
    by_weight = [-both.of_weights(np.array([w, 1 - w])) / math.log(2) for w in WEIGHTS]
    best = int(np.argmin([one.sum() for one in by_weight]))
    bits["both, best weights"] = by_weight[best]
    print(f"{form}: best weight of {next(iter(paths))} {WEIGHTS[best]:.2f}", flush=True)
    return bits


if __name__ == "__main__":
    main()
