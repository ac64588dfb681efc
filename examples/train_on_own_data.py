"""Trains a weight agent on a JSON lines file and compares it with equal weights on prompts it has not seen.

    python examples/train_on_own_data.py DIR_A DIR_B data.jsonl runs/own

Each line of the file is an object with "prompt" and "answer"; the reward is the last number written.
"""

import sys

import rlae_jax as rj
from rlae_jax.evaluation import Method, evaluate
from rlae_jax.tasks import jsonl


def main(first: str, second: str, data: str, out: str) -> None:
    ensemble = rj.Ensemble([rj.load(first), rj.load(second)])
    task = jsonl(data, reward="last_number", max_new_tokens=64)
    config = rj.PPOConfig.demo(iterations=50, prompts=64)
    policy = rj.train(
        ensemble, task, config, out, resume=True, on_progress=lambda p: print(p.iteration, p.metrics["reward"])
    )
    results = evaluate({"uniform": Method(ensemble), "rlae_ppo": Method(ensemble, policy)}, task, "test")
    for name, method in results["methods"].items():
        print(f"{name}: {method['score']:.3f}, 95% interval {method['ci95']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
