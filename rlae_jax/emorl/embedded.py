"""The embedded run's parts: a small T5 that imitates mediocre responses, and what its adapters are taught.

In: a directory and a seed. Out: a Hugging Face directory with the base model, the objectives, the prompts.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlae_jax import files, report
from rlae_jax.emorl import scorers
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.models import LM, LoraConfig, ModelConfig, transformer
from rlae_jax.models.config import RelativeBias
from rlae_jax.models.pretrain import PretrainConfig, Source, pretrain
from rlae_jax.models.tokenizer import fast_tokenizer
from rlae_jax.tasks import reflections

MAX_NEW_TOKENS = 28
_SIZES: dict[str, Any] = {
    "vocab": len(reflections.tokens()),
    "width": 64,
    "layers": 2,
    "heads": 4,
    "kv_heads": 4,
    "head_width": 16,
    "ffn_width": 128,
    "attention_scale": 1.0,
    "rope": None,
    "relative_bias": RelativeBias(32, 128),
    "gated": False,
    "activation": "relu",
    "context": 1 << 20,
}
MODEL = ModelConfig(
    **_SIZES,
    encoder=ModelConfig(**_SIZES, causal=False, has_head=False),
    tied_head=True,
    head_scale=64**-0.5,
    start_id=0,
    pad_id=0,
    end_ids=(1,),
)
ROWS, STEPS = 16_000, 1_400  # of the base model
OBJECTIVES = ("coverage", "brevity", "warmth")
LATER = "fluency"  # the objective that comes when the others have been learnt
ALL = (*OBJECTIVES, LATER)


def objective(name: str) -> scorers.Objective:
    """One of the embedded objectives: "coverage" of the five keywords, "brevity", "warmth", "fluency"."""
    return {
        "coverage": lambda: scorers.coverage(reflections.keywords),
        "brevity": lambda: scorers.brevity(3, reflections.MOST_WORDS),
        "warmth": lambda: scorers.of_words("warmth", reflections.WARM, enough=2),
        "fluency": lambda: scorers.Objective("fluency", lambda prompts, texts: reflections.trigram_fluency(texts)),
    }[name]()


def settings(**changes: Any) -> EMORLConfig:
    """How its adapters are fine-tuned."""
    defaults: dict[str, Any] = {
        "lora": LoraConfig(rank=8, alpha=32.0, dropout=0.0),
        "steps": 480,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "batch": 16,
        "samples": 3,
        "accumulate": 4,  # faster: what a part reads and writes stays in a processor's cache
        "kl_weight": 0.01,
        "max_new_tokens": MAX_NEW_TOKENS,
    }
    return EMORLConfig(**defaults | changes)


def make_tokenizer() -> Any:
    """One token per word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: i for i, word in enumerate(reflections.tokens())}
    backend = Tokenizer(models.WordLevel(words, reflections.UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = reflections.END
    backend.post_processor = processors.TemplateProcessing(f"$A {end}", f"$A {end} $B {end}", [(end, words[end])])
    return fast_tokenizer(backend, eos_token=end, pad_token=reflections.PAD, unk_token=reflections.UNKNOWN)


def _initial(seed: int) -> Any:
    """Parameters as T5 begins: embeddings of size 1, so that a token is not lost among what layers add to it, and small
    queries in place of a division by H^1/2."""
    params = transformer.init_params(MODEL, jax.random.key(seed))
    params["embedding"] = params["embedding"] * MODEL.width**0.5

    def smaller(path: Any, leaf: Any) -> Any:
        return leaf * MODEL.head_width**-0.5 if ".q." in f".{'.'.join(str(key.key) for key in path)}." else leaf

    return jax.tree_util.tree_map_with_path(smaller, params)


def make_base(seed: int, steps: int) -> LM:
    """Pretrains the base model."""
    tokenizer = make_tokenizer()
    prompts, responses = zip(*reflections.pairs(ROWS, seed), strict=True)
    asked, written = (tokenizer(list(texts))["input_ids"] for texts in (prompts, responses))
    source = Source(*map(jnp.asarray, pad_rows(asked, max(map(len, asked)))))
    width = max(map(len, written)) + 1
    ids, predicted = np.zeros((ROWS, width), np.int32), np.zeros((ROWS, width), bool)
    for row, text in enumerate(written):
        ids[row, 1 : len(text) + 1], predicted[row, 1 : len(text) + 1] = text, True
    train = PretrainConfig(steps=steps, batch=64, learning_rate=3e-3)
    with report.progress("base model", steps, "steps") as update:
        params = pretrain(
            MODEL,
            ids,
            predicted,
            train,
            seed=seed,
            params=_initial(seed),
            source=source,
            on_progress=lambda step, loss: update(step, f"loss {loss:.3f}"),
        )
    return LM(MODEL, params, tokenizer, name="base")


def build_base(directory: Path, seed: int, steps: int = STEPS) -> Path:
    """The base model's directory under `directory`; it is trained if it is not there."""
    path = directory / f"seed-{seed}-steps-{steps}" / "base"
    if path.is_dir():
        report.say(f"base model: reusing {report.quoted(path)}")
        return path
    files.require_place(directory)
    make_base(seed, steps).save(path)
    return path
