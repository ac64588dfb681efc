"""Writes tests/data/reference/adapters: LoRA adapters as PEFT saves them, and what PEFT and transformers compute.

Run it where torch and peft are installed: `python -m tests.data.make_adapters`. Each case is a directory with the two
files of an adapter; `cases.json` says how to write its base checkpoint, and `logits.npz` holds its inputs and the
logits of all real tokens, under names `case.what`.
"""

import dataclasses
import json
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from tests.data import hf

ADAPTERS = Path(__file__).parent / "reference" / "adapters"


@dataclasses.dataclass(frozen=True)
class Case:
    """A family, one of its hand-picked configurations, and the arguments of `peft.LoraConfig`."""

    family: str
    base: str
    lora: hf.Fields

    @property
    def kind(self) -> hf.Kind:
        return hf.FAMILIES[self.family].kind


# Each case is one thing that a loader gets wrong easily. Scales are no powers of two and differ from 1.
CASES = {
    "llama_qv": Case("llama", "grouped", {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"]}),
    "llama_patterns": Case(
        "llama",
        "grouped",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "model.layers.1.mlp.down_proj": 5},
            "alpha_pattern": {"q_proj": 5, r"^model\.layers\.0\.mlp\.(up|gate)_proj": 9, "mlp.down_proj": 3},
        },
    ),
    "llama_rslora": Case(
        "llama",
        "llama3",
        {
            "r": 3,
            "lora_alpha": 2,
            "use_rslora": True,
            "target_modules": ["k_proj", "o_proj", "gate_proj"],
            "rank_pattern": {"k_proj": 5},
            "alpha_pattern": {"gate_proj": 4},
        },
    ),
    # Untied: PEFT then saves the base's own embedding and head beside the factors.
    "llama_head": Case("llama", "grouped", {"r": 3, "lora_alpha": 5, "target_modules": ["o_proj", "lm_head"]}),
    "gpt2": Case(
        "gpt2", "inner", {"r": 3, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    ),
    "gpt_neox": Case("gpt_neox", "parallel", {"r": 3, "lora_alpha": 5, "target_modules": ["query_key_value", "dense"]}),
    "phi3": Case("phi3", "window", {"r": 3, "lora_alpha": 5, "target_modules": ["qkv_proj", "gate_up_proj"]}),
    "t5": Case("t5", "untied", {"r": 2, "lora_alpha": 3, "target_modules": "all-linear", "task_type": "SEQ_2_SEQ_LM"}),
}


def make_adapter(model: Any, directory: Path, seed: int, **fields: Any) -> None:
    """Puts a random adapter into a torch model, and saves it as PEFT does. `fields` are those of `peft.LoraConfig`.

    From then on the model computes with the adapter.
    """
    import peft
    import torch

    with warnings.catch_warnings():
        # Adapters of the head are saved with the embedding, which is meant.
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | fields)).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if ".lora_" in name:
                    drawn = np.random.RandomState(zlib.crc32(name.encode()) ^ seed).standard_normal(parameter.shape)
                    # A as large as PEFT makes it; B so that the sum is about as large as the base's own output.
                    size = (3 * parameter.shape[1]) ** -0.5 if ".lora_A." in name else parameter.shape[1] ** -0.5
                    parameter.copy_(torch.from_numpy(drawn * size))
        wrapped.save_pretrained(directory)
    (directory / "README.md").unlink(missing_ok=True)


def refer(model: Any, kind: hf.Kind, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The logits [n, V] of all real tokens, or of all decoder tokens; prompts are padded left."""
    logits = hf.compute(model, inputs["left_ids"], inputs["left_mask"], inputs.get("decoder_ids"))["logits"]
    return logits.reshape(-1, logits.shape[-1]) if kind == "encoder_decoder" else logits[inputs["left_mask"] == 1]


def main() -> None:
    shutil.rmtree(ADAPTERS, ignore_errors=True)
    bases, arrays = {}, {}
    for seed, (name, case) in enumerate(CASES.items()):
        with tempfile.TemporaryDirectory() as scratch:
            base = hf.FAMILIES[case.family].cases[case.base]
            model, stored = hf.build(case.family, base, seed, Path(scratch) / "base")
            inputs = hf.make_inputs(seed, case.kind, stored.config, stored.token_types)
            plain = refer(model, case.kind, inputs)
            make_adapter(model, ADAPTERS / name, seed, **case.lora)
            logits = refer(model, case.kind, inputs)
        change = np.abs(logits - plain).max() / np.abs(plain).max()
        assert change > 0.1, f"{name}: the adapter changes too little ({change:.2f})"
        path = ADAPTERS / name / "adapter_config.json"
        raw = json.loads(path.read_text())
        raw |= {"base_model_name_or_path": f"tiny/{case.family}", "target_modules": sorted(raw["target_modules"])}
        path.write_text(json.dumps(raw, sort_keys=True) + "\n")
        kept = {key: value.astype(np.int8) for key, value in inputs.items() if not key.startswith("right")}
        arrays |= {f"{name}.{what}": value for what, value in (kept | {"logits": logits}).items()}
        bases[name] = dataclasses.asdict(stored)
        print(f"{name}: changes the logits by {change:.2f} of the largest", flush=True)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(base)}" for name, base in bases.items())
    (ADAPTERS / "cases.json").write_text(f"{{\n{lines}\n}}\n")
    np.savez_compressed(ADAPTERS / "logits.npz", **arrays)
    size = sum(path.stat().st_size for path in ADAPTERS.rglob("*") if path.is_file())
    print(f"{size / 1000:.0f} kB in {ADAPTERS}")


if __name__ == "__main__":
    main()
