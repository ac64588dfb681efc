"""What transformers computes from a checkpoint: the reference of every comparison. All of it needs torch."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tests.data.hf.cases import Case, Kind
from tests.data.hf.checkpoints import Stored, write_checkpoint
from tests.data.hf.families import FAMILIES

NEW_TOKENS = 64


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def from_pretrained(architecture: str, directory: Path, dtype: str = "float32") -> Any:
    """The torch model in a directory, with the attention that spells every operation out."""
    import transformers

    _quiet()
    cls = getattr(transformers, architecture)
    return cls.from_pretrained(
        directory, attn_implementation="eager", experts_implementation="eager", dtype=dtype
    ).eval()


def build(family: str, case: Case, seed: int, directory: Path) -> tuple[Any, Stored]:
    """Writes a case's checkpoint into `directory`; returns the torch model that transformers reads from it, in float32.

    The names and shapes are those of `save_pretrained`, so that what torch computes is what can be written without it.
    """
    import transformers

    _quiet()
    scratch = directory / "scratch"
    scratch.mkdir(parents=True)
    raw = {"architectures": [case.architecture], "model_type": FAMILIES[family].model_type, **case.fields}
    (scratch / "config.json").write_text(json.dumps(raw))
    cls = getattr(transformers, case.architecture)
    model = cls(transformers.AutoConfig.from_pretrained(scratch))
    model.save_pretrained(scratch)
    with safe_open(scratch / "model.safetensors", "np") as file:
        tensors = {name: list(file.get_slice(name).get_shape()) for name in sorted(file.keys())}
    config = raw
    if not case.hub:
        config = json.loads((scratch / "config.json").read_text())
        config.pop("transformers_version")
        if "decoder_start_token_id" in raw:
            config.setdefault("decoder_start_token_id", raw["decoder_start_token_id"])
    if case.bare:
        tensors = {name.removeprefix(f"{model.base_model_prefix}."): shape for name, shape in tensors.items()}
    tensors |= {name: list(shape) for name, shape in case.extra.items()}
    shutil.rmtree(scratch)
    stored = Stored(config, tensors, seed, case.load, case.token_types)
    write_checkpoint(directory, config, tensors, seed)
    return from_pretrained(case.architecture, directory), stored


def _positions(model: Any, mask: np.ndarray) -> np.ndarray:
    """Positions follow the mask in every family; RoBERTa's table starts behind its padding row."""
    offset = model.config.pad_token_id + 1 if model.config.model_type == "roberta" else 0
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0) + offset


def _counts_slots(model: Any) -> bool:
    """Whether queries grow with slots, padding included: Llama 4's, which grow with positions in the published code, so
    that its rows are computed alone."""
    return bool(getattr(model.config, "attn_temperature_tuning", False))


def _row_by_row(model: Any, ids: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """`compute`, without padding."""
    result: dict[str, np.ndarray] = {}
    for b, real in enumerate(mask.astype(bool)):
        for name, values in compute(model, ids[b : b + 1, real], mask[b : b + 1, real]).items():
            result.setdefault(name, np.zeros((*ids.shape, values.shape[-1]), np.float32))[b, real] = values[0]
    return result


def compute(
    model: Any,
    ids: np.ndarray,
    mask: np.ndarray,
    decoder_ids: np.ndarray | None = None,
    token_types: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """float32 `hidden`, transformers' last_hidden_state, and `logits` of the whole text, or of a classifier.

    A plain encoder, or one with a head over the vocabulary, has no `logits`.
    """
    import torch

    if _counts_slots(model) and not mask.all():
        return _row_by_row(model, ids, mask)

    def tensor(x: np.ndarray) -> Any:
        return torch.from_numpy(np.ascontiguousarray(x))

    arguments = {"input_ids": tensor(ids), "attention_mask": tensor(mask)}
    if token_types is not None:
        arguments["token_type_ids"] = tensor(token_types)
    with torch.no_grad():
        if decoder_ids is not None:
            hidden = model.encoder(**arguments).last_hidden_state
            hidden = model.decoder(
                input_ids=tensor(decoder_ids),
                encoder_hidden_states=hidden,
                encoder_attention_mask=arguments["attention_mask"],
            ).last_hidden_state
            arguments["decoder_input_ids"] = tensor(decoder_ids)
        else:
            arguments["position_ids"] = tensor(_positions(model, mask))
            # Llama 4's is the whole, and so is a bare encoder's, which has no other.
            base = getattr(model, "model", model) if model.base_model is model else model.base_model
            hidden = base(**arguments).last_hidden_state
        out = model(**arguments)
    result = {"hidden": hidden.float().numpy()}
    if "logits" in out and not type(model).__name__.endswith("MaskedLM"):
        result["logits"] = out.logits.float().numpy()
    return result


def greedy(model: Any, ids: np.ndarray, mask: np.ndarray, steps: int = NEW_TOKENS) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [B, steps], the logits [B, steps, V] they are the largest of), end tokens ignored; padding on the left.

    An encoder-decoder's text starts behind decoder_start_token_id.
    """
    import torch
    from transformers import GenerationConfig

    if _counts_slots(model) and not mask.all():
        rows = [
            greedy(model, row[None, real], real[None, real].astype(int), steps)
            for row, real in zip(ids, mask > 0, strict=True)
        ]
        tokens, logits = zip(*rows, strict=True)
        return np.concatenate(tokens), np.concatenate(logits)
    settings = {"do_sample": False, "max_new_tokens": steps, "eos_token_id": None, "pad_token_id": 0}
    # What is unset here would be filled in from the model's own.
    model.generation_config = GenerationConfig(**settings)
    model.config.eos_token_id = None
    start = getattr(model.config, "decoder_start_token_id", None)
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            generation_config=GenerationConfig(**settings, decoder_start_token_id=start),
            output_logits=True,
            # The cache of a T5 has as many layers as its encoder, whatever the decoder has.
            use_cache=not model.config.is_encoder_decoder,
            return_dict_in_generate=True,
        )
    tokens = out.sequences.numpy()[:, -steps:]
    assert out.sequences.shape[1] == steps + (1 if model.config.is_encoder_decoder else ids.shape[1])
    return tokens, torch.stack(out.logits, dim=1).float().numpy()


def refer(model: Any, kind: Kind, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What to compare with, from transformers.

    `hidden` [n, D] and `logits` [n, V] of the n real tokens, row by row (of all decoder tokens for an encoder-decoder);
    `logits` [B, labels] for a classifier; `tokens` [B, 64] and `gaps` [B, 64], by how much each was the likeliest,
    over the largest logit. Both paddings give the same, which is asserted, so that one is returned.
    """
    by_side = []
    for side in ("left", "right"):
        mask = inputs[f"{side}_mask"]
        out = compute(model, inputs[f"{side}_ids"], mask, inputs.get("decoder_ids"), inputs.get(f"{side}_types"))
        real = np.ones(out["hidden"].shape[:2], bool) if kind == "encoder_decoder" else mask.astype(bool)
        # A classifier reads the first column, which is padding on the left.
        by_side.append({key: value if value.ndim == 2 else value[real] for key, value in out.items()})
    left, right = by_side
    for key in left.keys() - ({"logits"} if kind == "encoder" else set()):
        scale = np.abs(left[key]).max()
        assert np.isfinite(left[key]).all()
        assert np.abs(left[key] - right[key]).max() <= 5e-6 * scale, f"transformers' {key} depends on the padding"
    if kind == "encoder":
        return right
    tokens, logits = greedy(model, inputs["left_ids"], inputs["left_mask"])
    largest = np.sort(logits, axis=-1)[..., -2:]
    return left | {"tokens": tokens, "gaps": (largest[..., 1] - largest[..., 0]) / np.abs(logits).max()}
