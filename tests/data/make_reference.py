"""Writes tests/data/reference: random tiny Llama checkpoints and the logits that transformers computes from them.

Run it where torch is installed: `python -m tests.data.make_reference`. The files are part of the repository, so that
the tests themselves need no torch. Each case is a directory as `save_pretrained` writes it, and `reference.npz` with
`ids`, `left_mask`, `right_mask` [B, T] and, for either padding, the logits [B, T, V].
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np

REFERENCE = Path(__file__).parent / "reference"

# Each case is one thing that a loader gets wrong easily.
CASES: dict[str, dict[str, Any]] = {
    "grouped_keys": {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "vocab_size": 41},
    "wide_heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 12, "head_dim": 10},
    "rope_base": {"num_attention_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "tied_head": {"num_attention_heads": 4, "tie_word_embeddings": True, "vocab_size": 37},
    "deep": {"num_attention_heads": 3, "hidden_size": 24, "num_hidden_layers": 4, "rms_norm_eps": 1e-3},
}


def make_model(seed: int, **fields: Any) -> Any:
    """A random LlamaForCausalLM in float32, weights large enough that a wrong detail shows in the logits."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{
            "vocab_size": 29,
            "hidden_size": 16,
            "intermediate_size": 20,
            "num_hidden_layers": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        | fields
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, 1.0 if "embed" in name else parameter.shape[1] ** -0.5)
    return model


def make_inputs(seed: int, vocab: int, batch: int = 3, length: int = 11) -> dict[str, np.ndarray]:
    """Ids and a mask for either padding; the first row is full."""
    rng = np.random.default_rng(seed)
    counts = np.concatenate([[length], rng.integers(1, length, batch - 1)])
    right = (np.arange(length) < counts[:, None]).astype(np.int64)
    return {
        "ids": rng.integers(0, vocab, (batch, length)),
        "left_mask": np.ascontiguousarray(right[:, ::-1]),
        "right_mask": right,
    }


def compute_logits(model: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What transformers gives; it takes positions as an argument, we take them from the mask."""
    import torch

    positions = np.maximum(np.cumsum(mask, axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
        )
    return out.logits.numpy()


def main() -> None:
    shutil.rmtree(REFERENCE, ignore_errors=True)
    for seed, (name, fields) in enumerate(CASES.items()):
        model = make_model(seed, **fields)
        directory = REFERENCE / name
        model.save_pretrained(directory)
        inputs = make_inputs(seed, model.config.vocab_size)
        logits = {
            f"{side}_logits": compute_logits(model, inputs["ids"], inputs[f"{side}_mask"]) for side in ("left", "right")
        }
        np.savez_compressed(directory / "reference.npz", **inputs, **logits)
    size = sum(path.stat().st_size for path in REFERENCE.rglob("*") if path.is_file())
    print(f"{len(CASES)} cases, {size / 1000:.0f} kB in {REFERENCE}")


if __name__ == "__main__":
    main()
