"""Checkpoints from names and shapes alone, and inputs for them; needs no torch.

`draw` makes every tensor from its name, so that a test without torch writes the same checkpoint to disk that
transformers read where the reference values were made.
"""

import dataclasses
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from tests.data.hf.cases import Fields, Kind

REFERENCE = Path(__file__).parents[1] / "reference"
LENGTH = 13  # tokens of the longest prompt; windows are about 5
DECODER_LENGTH = 11
BATCH = 3


@dataclasses.dataclass(frozen=True)
class Stored:
    """All that it takes to write a checkpoint; reference/<family>.json holds it."""

    config: Fields
    tensors: dict[str, list[int]]
    seed: int
    load: Fields
    token_types: bool


# Names of tables that are looked up in. Positions relative to one another speak to attention alone and keep unit size.
_TABLES = ("embed_tokens", "embed_in", "embeddings", "positions", "wte", "wpe", "shared", "relative_attention_bias")
_RELATIVE = ("rel_embeddings", "relative_attention_bias")


def draw(seed: int, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of that name. Large enough that a wrong detail shows; RandomState's streams never change."""
    x = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(shape)
    if name.endswith("bias"):
        x *= 0.2
    elif len(shape) == 1:
        x = 1 + 0.2 * x
    elif any(part in name for part in _TABLES):
        # Smaller than what the layers add: a tied head would repeat the last token for ever.
        x *= 1.0 if any(part in name for part in _RELATIVE) else 0.25
    else:
        # GPT-2's kernels are [inputs, outputs], gpt-oss's [experts, inputs, outputs], all others [outputs, inputs...].
        transposed = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
        experts = name.endswith(("experts.gate_up_proj", "experts.down_proj"))
        of_granite = "block_sparse_moe" in name  # [experts, outputs, inputs]
        inputs = shape[0] if transposed else shape[1] if experts else shape[-1] if of_granite else math.prod(shape[1:])
        x *= inputs**-0.5
    return x.astype(np.float32)


def read_stored(family: str, case: str) -> Stored:
    """How to write a stored case's checkpoint."""
    return Stored(**json.loads((REFERENCE / f"{family}.json").read_text())[case])


def read_reference(family: str, case: str) -> dict[str, np.ndarray]:
    """The inputs of a stored case and what `torch_models.refer` gave for them."""
    with np.load(REFERENCE / f"{family}.npz") as file:
        arrays = {name.removeprefix(f"{case}."): file[name] for name in file.files if name.startswith(f"{case}.")}
    return {name: value.astype(np.int64) if value.dtype == np.int8 else value for name, value in arrays.items()}


def write_checkpoint(directory: Path, config: Fields, tensors: dict[str, Any], seed: int) -> None:
    """config.json and model.safetensors; needs no torch."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    drawn = {name: draw(seed, name, tuple(shape)) for name, shape in tensors.items()}
    save_file(drawn, directory / "model.safetensors", metadata={"format": "pt"})


def make_inputs(seed: int, kind: Kind, config: Fields, token_types: bool) -> dict[str, np.ndarray]:
    """The same texts padded left and right, garbage in the padding. The first fills its row.

    `left_ids`, `right_ids`, `left_mask`, `right_mask` [B, T]; `decoder_ids` [B, U] for an encoder-decoder, the first of
    them the start token; `left_types`, `right_types` [B, T] if the case has token types.
    """
    rng = np.random.default_rng(seed)
    vocab = config["vocab_size"]
    counts = np.array([LENGTH, LENGTH - 4, 2])[:BATCH]
    inputs: dict[str, np.ndarray] = {}
    for side in ("left", "right"):
        inputs[f"{side}_ids"] = rng.integers(0, vocab, (BATCH, LENGTH))
        inputs[f"{side}_mask"] = np.zeros((BATCH, LENGTH), np.int64)
        if token_types:
            inputs[f"{side}_types"] = rng.integers(0, config["type_vocab_size"], (BATCH, LENGTH))
    for b, n in enumerate(counts):
        inputs["left_mask"][b, LENGTH - n :] = 1
        inputs["right_mask"][b, :n] = 1
        for what in ("ids", "types") if token_types else ("ids",):
            inputs[f"right_{what}"][b, :n] = inputs[f"left_{what}"][b, LENGTH - n :]
    if kind == "encoder_decoder":
        inputs["decoder_ids"] = rng.integers(0, vocab, (BATCH, DECODER_LENGTH))
        inputs["decoder_ids"][:, 0] = config["decoder_start_token_id"]
    return inputs
