"""What it costs to score given texts: a hundred questions with four options each, against the members' bare forwards.

    python -m benchmarks.scoring [--quick] [--json PATH]

`bare` is what no way of scoring can do without: every member's last hidden states of the same tokens, a question and
its options once each, in rows of about one length that are padded to a multiple of 16; no head, no fusion. `scored` is
`Ensemble.log_likelihoods` of the texts, with tokenizing and the way to the host and back. The questions are those of
arc_challenge, the members random.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import rlae_jax as rj
from benchmarks import common
from benchmarks.members import llama_134m, tiny_llama

QUESTIONS = 100
# Of a batch of bare forwards: tokens, and pairs of tokens that a layer scores. More take longer.
TOKENS = 2048
PAIRS = 2**21
REQUIRED = 1.5  # score_vs_forward
ROUNDS = 5
BUDGET = 90.0  # seconds for rounds beyond the third


def read_questions(data: Path) -> tuple[list[str], list[list[str]]]:
    """Prompts, and four options of each."""
    lines = (data / "arc_challenge" / "test.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if all(row.get(letter) for letter in "ABCD")][:QUESTIONS]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    return prompts, [[f" {row[letter]}" for letter in "ABCD"] for row in rows]


def bare_forwards(
    lm: rj.LM, prompts: Sequence[str], options: Sequence[Sequence[str]]
) -> tuple[Callable[[], None], int]:
    """What runs one member's forwards of all batches, and of how many tokens."""
    tokenizer = lm.require_tokenizer()
    rows = []
    for prompt, own in zip(prompts, options, strict=True):
        behind = [i for option in own for i in tokenizer(option, add_special_tokens=False)["input_ids"]]
        rows.append([*tokenizer(prompt)["input_ids"], *behind])
    rows.sort(key=len, reverse=True)
    batches = []
    while rows:
        width = -(-len(rows[0]) // 16) * 16
        n = max(min(TOKENS // width, PAIRS // (lm.config.heads * width**2)), 1)
        batch, rows = rows[:n], rows[n:]
        ids, mask = np.zeros((2, len(batch), width), np.int32)
        for b, row in enumerate(batch):
            ids[b, : len(row)], mask[b, : len(row)] = row, 1
        batches.append((ids, mask))

    def run() -> None:
        jax.block_until_ready([lm.hidden(ids, mask) for ids, mask in batches])

    return run, sum(int(mask.sum()) for _, mask in batches)


def measure(name: str, members: Sequence[rj.LM], data: Path) -> dict[str, Any]:
    """Both, alternately."""
    prompts, options = read_questions(data)
    ensemble = rj.Ensemble(members)
    each = [bare_forwards(lm, prompts, options) for lm in members]

    def bare() -> None:
        for run, _ in each:
            run()

    def scored() -> None:
        ensemble.log_likelihoods(prompts, options)

    print(f"compiling {name}", flush=True)
    bare()
    scored()
    timings = common.time_alternating({"bare": bare, "scored": scored}, rounds=ROUNDS, budget_seconds=BUDGET)
    return {
        "members": name,
        "tokens": sum(tokens for _, tokens in each),
        "bare_seconds": timings["bare"].median,
        "scored_seconds": timings["scored"].median,
        "ratio": common.pairwise_ratio(timings["scored"], timings["bare"]),
    }


def main() -> None:
    """The command."""
    options = common.parse_args(__doc__.splitlines()[0])
    shared = common.require_shared("data").parent
    environment = common.environment()
    rows = []
    tokenizers = shared / "tokenizers"
    kinds = {
        "0.3M": (tiny_llama, [shared / "models" / "stories260K"] * 2),
        "134M": (llama_134m, [tokenizers / "gpt2"] * 2),
        "134M, two tokenizers": (llama_134m, [tokenizers / "gpt2", tokenizers / "mistral_v3"]),
    }
    with tempfile.TemporaryDirectory() as work:
        for name, (make, own) in kinds.items():
            if options.quick and "134M" in name:
                continue
            members = [rj.load(make(Path(work) / f"{name} {k}", where, seed=k)) for k, where in enumerate(own)]
            rows.append(measure(name, members, shared / "data"))
    one_tokenizer = [row["ratio"] for row in rows if "two" not in row["members"]]
    checks = [common.check("score_vs_forward", max(one_tokenizer), "<=", REQUIRED)]
    common.print_table(
        f"{QUESTIONS} questions of four options, two members",
        ("members", "tokens", "bare forwards, s", "scored, s", "ratio"),
        [
            (r["members"], r["tokens"], f"{r['bare_seconds']:.2f}", f"{r['scored_seconds']:.2f}", f"{r['ratio']:.2f}")
            for r in rows
        ],
    )
    common.finish(rows, checks, environment, options.json_path)


if __name__ == "__main__":
    main()
