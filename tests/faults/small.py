"""Everything that commands make of their own, small enough for a second or two; and what they are given."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

from rlae_jax import demo, specialists
from rlae_jax.emorl import agent, embedded
from rlae_jax.emorl import demo as emorl_demo
from rlae_jax.emorl import train as emorl_train
from rlae_jax.evaluation import searches
from rlae_jax.models.config import ModelConfig
from rlae_jax.tasks import reflections, skills

TINY: dict[str, Any] = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 2, "head_width": 8, "ffn_width": 16}


def shrink() -> None:
    """Models, tasks and settings that have no option of a command."""
    specialists.PAIR_MODEL = dataclasses.replace(specialists.PAIR_MODEL, **TINY)
    specialists.MODEL = dataclasses.replace(specialists.MODEL, **TINY)
    specialists.ROWS = 64
    specialists.RECIPES = {name: dataclasses.replace(one, steps=6) for name, one in specialists.RECIPES.items()}
    skills.EXAMPLES = {"train": 24, "dev": 8, "test": 8}
    whole_sequences = skills.specialist_sequences
    skills.specialist_sequences = lambda *args: tuple(part[::100] for part in whole_sequences(*args))
    searches.SEARCH_PROMPTS, searches.STATIC_STEP = 8, 0.5
    demo.QUICK = demo.DemoSettings(specialist_steps=52, iterations=3, test_prompts=8)
    whole_demo = demo.PPOConfig.demo

    def few_prompts(**changes: Any) -> Any:
        few = {"prompts": 8, "epochs": 1, "minibatches": 1, "eval_every": 2}
        return whole_demo(**few | changes)

    demo.PPOConfig.demo = few_prompts  # type: ignore[method-assign]
    reflections.SIZES = {"train": 24, "dev": 4, "test": 4}
    encoder = dataclasses.replace(embedded.MODEL.encoder, **TINY)
    embedded.MODEL = dataclasses.replace(embedded.MODEL, **TINY, encoder=encoder, head_scale=16**-0.5)
    embedded.ROWS = 64
    build_base = embedded.build_base
    emorl_demo.embedded.build_base = lambda directory, seed, steps: build_base(directory, seed, 52)
    settings = embedded.settings
    few_steps = {"steps": 4, "batch": 4, "samples": 2, "accumulate": 1, "max_new_tokens": 6, "validate_every": 2}
    emorl_demo.embedded.settings = lambda seed, **_: settings(seed=seed, **few_steps, validation_prompts=4)
    emorl_demo.SearchConfig = functools.partial(_one_level, emorl_demo.SearchConfig)
    agent.PPOConfig = functools.partial(_few_iterations, agent.PPOConfig)
    often()


def often() -> None:
    """A checkpoint of adapters whenever there may be one."""
    emorl_train._SECONDS_BETWEEN_CHECKPOINTS = 0.0


def _one_level(config: Any, **given: Any) -> Any:
    return config(**given | {"levels": 1})


def _few_iterations(config: Any, **given: Any) -> Any:
    return config(**given | {"iterations": 2, "prompts": 8, "eval_prompts": 4, "epochs": 1, "minibatches": 1})


def build() -> None:
    """In the working directory: members, a base of adapters, a user's data and reward."""
    import jax

    from rlae_jax.models import LM, transformer

    def save(name: str, config: ModelConfig, tokenizer: Any, seed: int) -> None:
        LM(config, transformer.init_params(config, jax.random.key(seed)), tokenizer).save(Path(name))

    for seed, name in enumerate(("alpha", "beta")):
        config = dataclasses.replace(specialists.PAIR_MODEL, **TINY)
        save(name, config, specialists.make_pair_tokenizer(), seed)
    for seed, (name, digits) in enumerate({"ones": 1, "pairs": 2}.items()):
        recipe = dataclasses.replace(specialists.RECIPES["double_turn"], digits_per_token=digits)
        config = dataclasses.replace(specialists.model_config(recipe), **TINY)
        save(name, config, specialists.make_tokenizer(digits), 10 + seed)
    encoder = dataclasses.replace(embedded.MODEL.encoder, **TINY)
    base = dataclasses.replace(embedded.MODEL, **TINY, encoder=encoder, head_scale=16**-0.5)
    save("base", base, embedded.make_tokenizer(), 20)
    rows = [{"q": f"r{i:04d}=", "a": str(i % 10)} for i in range(60)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [{"prompt": prompt} for prompt in reflections.prompts().splits["test"][:60]]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    Path("reward.py").write_text(
        "def digits(text, reference):\n    return sum(c.isdigit() for c in text) / max(len(text), 1)\n"
    )
