"""Fine-tunes a small model on a task's training prompts with their answers, so that an ensemble has a second member.

    python examples/finetune.py MODEL OUT --task gsm8k [--data-dir DIR] [--steps 200]
    python examples/finetune.py MODEL OUT --data questions.jsonl

Only the answer is learnt. OUT becomes a Hugging Face directory.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

import rlae_jax as rj
from rlae_jax import report
from rlae_jax.models.pretrain import PretrainConfig, pretrain
from rlae_jax.tasks import Examples, get_task, jsonl


def sequences(lm: rj.LM, examples: Examples, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt, answer and end token of each example that fits into `longest` tokens, and which of them are learnt."""
    end = lm.config.end_ids[0]
    rows = []
    for prompt, reference in zip(examples.prompts, examples.references, strict=True):
        asked = lm.tokenizer(prompt)["input_ids"]
        answer = reference if isinstance(reference, str) else reference[0]
        written = lm.tokenizer(" " + answer, add_special_tokens=False)["input_ids"] + [end]
        if len(asked) + len(written) <= longest:
            rows.append((asked + written, len(asked)))
    if not rows:
        raise rj.InputError(f"no example fits into {longest} tokens")
    ids = np.zeros((len(rows), max(len(row) for row, _ in rows)), np.int32)
    learnt = np.zeros(ids.shape, bool)
    for i, (row, start) in enumerate(rows):
        ids[i, : len(row)] = row
        learnt[i, start : len(row)] = True
    return ids, learnt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face directory or Hub id of a decoder")
    parser.add_argument("out", type=Path, help="a new directory")
    parser.add_argument("--task", help="a benchmark, such as gsm8k")
    parser.add_argument("--data-dir", help="a directory with the benchmark's files; otherwise it comes from the Hub")
    parser.add_argument("--data", help="a file instead, with a prompt and an answer in each line")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256, help="tokens of an example; longer ones are left out")
    given = parser.parse_args()
    if (given.task is None) == (given.data is None):
        parser.error("give either --task or --data")
    if given.out.exists():
        parser.error(f"{given.out} exists already")
    task = jsonl(given.data) if given.data else get_task(given.task, shots=0, data_dir=given.data_dir)
    lm = rj.load(given.model)
    ids, learnt = sequences(lm, task.split("train"), given.longest)
    settings = PretrainConfig(
        steps=given.steps, batch=given.batch, learning_rate=1e-3, warmup=min(20, given.steps // 4), report_every=10
    )
    with report.progress(f"fine-tuning on {len(ids)} examples", given.steps, "steps") as update:
        params = pretrain(
            lm.config,
            ids,
            learnt,
            settings,
            seed=0,
            params=lm.params,
            on_progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    rj.save(rj.LM(lm.config, params, lm.tokenizer, name=given.out.name), given.out)


if __name__ == "__main__":
    try:
        main()
    except rj.InputError as error:
        sys.exit(f"error: {error}")
