"""Compiles programs of many shapes for the CPU and prints the bytes that each needs, a JSON object per line.

A program of its own, since XLA reads how it schedules when it starts: here one operation after another, as on
accelerators, where by default a CPU's operations overlap and hold more.
"""

import dataclasses
import json
import sys

from rlae_jax.config import MAPPOConfig, PPOConfig
from rlae_jax.fusion import decode
from rlae_jax.models import ModelConfig
from rlae_jax.models.config import Experts, GatedDelta, RelativeBias, Rope
from rlae_jax.planning.workload import Workload

LLAMA = ModelConfig(vocab=4096, width=256, layers=4, heads=8, kv_heads=4, head_width=32, ffn_width=1024)
SMALL = dataclasses.replace(LLAMA, layers=2)
GPT2 = ModelConfig(
    vocab=3000,
    width=192,
    layers=3,
    heads=6,
    kv_heads=6,
    head_width=32,
    ffn_width=768,
    norm="layer",
    gated=False,
    activation="gelu",
    rope=None,
    learned_positions=512,
    qkv_bias=True,
    attention_out_bias=True,
    ffn_bias=True,
    tied_head=True,
)
NEOX = dataclasses.replace(GPT2, rope=Rope(fraction=0.25), learned_positions=0, parallel_branches=True, tied_head=False)
ENCODER = ModelConfig(
    vocab=2000,
    width=192,
    layers=3,
    heads=6,
    kv_heads=6,
    head_width=32,
    ffn_width=512,
    causal=False,
    has_head=False,
    rope=None,
    relative_bias=RelativeBias(32, 128),
)
T5 = dataclasses.replace(ENCODER, causal=True, has_head=True, tied_head=True, encoder=ENCODER, start_id=0)

MIXTURE = dataclasses.replace(LLAMA, experts=Experts(number=8, active=2, width=512, layers=(0, 1, 2, 3)))
DELTA = dataclasses.replace(
    LLAMA,
    recurrent=GatedDelta(layers=(0, 1, 2), taps=4, key_heads=4, heads=8, key_width=32, value_width=32),
)

CASES = {
    "linear attention": Workload(members=(DELTA,), batch=16, prompt=257, new=64),
    "experts": Workload(members=(MIXTURE,), batch=4, prompt=256, new=32),
    "pair": Workload(members=(LLAMA, LLAMA), batch=16, prompt=128, new=128),
    "one member": Workload(members=(LLAMA,), batch=4, prompt=64, new=32),
    "long prompts": Workload(members=(LLAMA, LLAMA), batch=4, prompt=1024, new=64),
    "large vocabulary": Workload(
        members=(dataclasses.replace(LLAMA, vocab=32_000, tied_head=True),) * 2, batch=64, prompt=32, new=32
    ),
    "large batch": Workload(members=(LLAMA, LLAMA), batch=256, prompt=64, new=64),
    "union": Workload(
        members=(LLAMA, dataclasses.replace(LLAMA, vocab=3000)), batch=16, prompt=128, new=128, union=6000
    ),
    "shared base": Workload(members=(LLAMA,), adapters=3, batch=16, prompt=64, new=64),
    "gpt2": Workload(members=(GPT2, GPT2, GPT2), batch=24, prompt=96, new=100),
    "neox": Workload(members=(NEOX, NEOX), batch=40, prompt=48, new=20),
    "t5": Workload(members=(T5, T5), batch=16, prompt=128, new=64),
    "ppo": Workload(members=(LLAMA, SMALL), batch=64, prompt=32, new=64, train=PPOConfig(prompts=64)),
    "mappo": Workload(members=(SMALL, SMALL, SMALL), batch=128, prompt=32, new=32, train=MAPPOConfig(prompts=128)),
    "many observations": Workload(
        members=(dataclasses.replace(LLAMA, layers=1, kv_heads=1, width=512, vocab=512),) * 2,
        batch=512,
        prompt=16,
        new=16,
        span_length=1,
        train=PPOConfig(prompts=512),
    ),
}


def main() -> None:
    decode._CACHED_BYTES = 1 << 60  # no groups of rows, which are for CPUs alone
    for name in sys.argv[1:]:
        workload = CASES[name]
        lower = workload.lower_generate if workload.train is None else workload.lower_iterate
        memory = lower(None).compile().memory_analysis()
        assert memory is not None
        figures = {
            "arguments": memory.argument_size_in_bytes,
            "fresh": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
        }
        print(json.dumps({"name": name, **figures}), flush=True)


if __name__ == "__main__":
    main()
