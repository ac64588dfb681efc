"""A small cross-encoder that ranks responses to a prompt, trained from PAIR: a reflection scorer without a download.

In: a file of graded responses (`tasks.prompts`). Out: a Hugging Face directory with a BERT of one output and its
tokenizer, for `load_encoder` and `scorers.regression`, and a report of how often it ranks two responses rightly.

It learns from comparisons alone (Bradley and Terry, 1952): of two responses to one prompt with the grades a > b, the
probability that the first scores higher is sigmoid(s_a - s_b), and its negative logarithm is the loss. That fixes the
scores up to a straight line, which is then chosen so that those of the train split fill [0, 1].
"""

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from rlae_jax import files
from rlae_jax.compilation import jit
from rlae_jax.emorl import scorers
from rlae_jax.errors import InputError
from rlae_jax.models import Encoder, ModelConfig, transformer
from rlae_jax.models.checkpoint_files import Source, read_config
from rlae_jax.models.families import FAMILIES
from rlae_jax.models.tokenizer import import_transformers
from rlae_jax.runs import lock
from rlae_jax.tasks.base import SPLITS
from rlae_jax.tasks.prompts import Graded, graded_responses

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
_UNKNOWN = SPECIAL.index("[UNK]")
MOST_WORDS = 4_000
CONTEXT = 128
BATCH = 8  # prompts, each with all of its responses
HIDDEN_WORDS = 0.15  # share of the words that a step does not see, so that no single one decides
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
REPORT_EVERY = 25
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


@dataclasses.dataclass(frozen=True)
class Report:
    """How a ranker does, per split: the share of pairs of one prompt's responses with different grades in order.

    Attributes:
      accuracy: of the ranker. Chance is 0.5.
      longer: of the rule that the response of more words is better; equal ones count as half.
    """

    accuracy: Mapping[str, float]
    longer: Mapping[str, float]


class _Rows(NamedTuple):
    """G responses to each of P prompts; where a prompt has fewer, one is there again with the grade NaN."""

    ids: Int[Array, "P G T"]
    mask: Int[Array, "P G T"]
    types: Int[Array, "P G T"]
    grades: Float[Array, "P G"]


@lock.writes("out", beside=True)
def train_ranker(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    steps: int = 200,
    on_progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Report:
    """Trains on the train split of `tasks.prompts.read_prompts`; the same seed gives the same weights on one machine.

    Args:
      path: graded responses in the layout of PAIR.
      out: the directory to write, which must not exist.
      on_progress: called with the number of steps done and their mean loss, every `REPORT_EVERY` steps.

    Raises:
      InputError: what `graded_responses` raises; a directory that exists or cannot be made; fewer than one step;
        nothing to compare in the train split.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already; choose another name or remove it")
    files.require_place(out)
    if steps < 1:
        raise InputError(f"steps must be at least 1, not {steps}")
    graded = graded_responses(path)
    if not any(len({graded["train"][i].grade for i in places}) > 1 for places in _by_prompt(graded["train"])):
        raise InputError(f"{path}: no prompt of the train split has responses of different grades to compare")
    init_key, data_key = jax.random.split(jax.random.key(seed))
    encoder = _untrained(_tokenizer([text for one in graded["train"] for text in one[:2]]), out, init_key)
    rows = _rows(encoder, graded["train"])
    params, optimiser_state = encoder.params, _optimiser(steps).init(encoder.params)
    for start in range(0, steps, REPORT_EVERY):
        end = min(start + REPORT_EVERY, steps)
        keys = jax.vmap(functools.partial(jax.random.fold_in, data_key))(jnp.arange(start, end))
        params, optimiser_state, loss = _run_steps(encoder.config, steps, params, optimiser_state, rows, keys)
        on_progress(end, float(loss))
    encoder = _fill_range(dataclasses.replace(encoder, params=params), graded["train"])
    encoder.save(out)
    score = scorers.regression("reflection", encoder)
    return Report(
        {split: accuracy(score(*_texts(graded[split])), graded[split]) for split in SPLITS},
        {
            split: accuracy([len(scorers.words(one.response)) for one in graded[split]], graded[split])
            for split in SPLITS
        },
    )


def accuracy(values: Sequence[float] | Float[np.ndarray, " N"], graded: Sequence[Graded]) -> float:
    """The share of the pairs of one prompt's responses with different grades that the values put in order.

    Equal values count as half; without any such pair it is NaN.
    """
    all_values, all_grades = np.asarray(values, np.float64), np.array([one.grade for one in graded])
    pairs = rightly = 0.0
    for places in _by_prompt(graded):
        value, grade = all_values[places], all_grades[places]
        better = grade[:, None] > grade[None, :]
        pairs += better.sum()
        rightly += np.sum((1 + np.sign(value[:, None] - value[None, :])) / 2, where=better)
    return float(rightly / pairs) if pairs else float("nan")


def ranking_loss(scores: Float[Array, "P G"], grades: Float[Array, "P G"]) -> Float[Array, ""]:
    """Mean of -log sigmoid(s_i - s_j) over the pairs of one prompt's responses with grade i > grade j."""
    better = grades[:, :, None] > grades[:, None, :]  # False where one of them is NaN
    losses = jax.nn.softplus(scores[:, None, :] - scores[:, :, None])
    pairs = jnp.maximum(jnp.sum(better), 1).astype(jnp.float32)
    return jnp.sum(jnp.where(better, losses, 0.0)) / pairs


def _by_prompt(graded: Sequence[Graded]) -> list[list[int]]:
    """The places of each prompt's responses."""
    places: dict[str, list[int]] = {}
    for i, one in enumerate(graded):
        places.setdefault(one.prompt, []).append(i)
    return list(places.values())


def _texts(graded: Sequence[Graded]) -> tuple[list[str], list[str]]:
    return [one.prompt for one in graded], [one.response for one in graded]


def _tokenizer(texts: Sequence[str]) -> Any:
    """A tokenizer of lower-case words and punctuation marks, those that the texts have at least twice."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = collections.Counter(
        word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    # Not by the library's trainer, whose order of the words differs from run to run.
    known = sorted((word for word, n in counts.items() if n > 1), key=lambda word: (-counts[word], word))
    vocab = {word: i for i, word in enumerate([*SPECIAL, *known[: MOST_WORDS - len(SPECIAL)]])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizer, splitter
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    return import_transformers().PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _untrained(tokenizer: Any, out: Path, key: Array) -> Encoder:
    family = FAMILIES["bert"]
    raw = {
        **SIZES,
        "architectures": ["BertForSequenceClassification"],
        "model_type": "bert",
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "id2label": {"0": "reflection"},
        "label2id": {"reflection": 0},
        "problem_type": "regression",
        "pad_token_id": tokenizer.pad_token_id,
    }
    source = Source(family, raw, {})
    config = read_config(source, out, dtype="float32", precision="highest", tensors=False)
    params = transformer.init_params(config, key)
    return Encoder(config, params, tokenizer, name=out.name, source=source)


def _rows(encoder: Encoder, graded: Sequence[Graded]) -> _Rows:
    groups = _by_prompt(graded)
    most = max(map(len, groups))
    filled = [[*places, *places[:1] * (most - len(places))] for places in groups]
    grades = [[graded[i].grade for i in places] + [np.nan] * (most - len(places)) for places in groups]
    parts = encoder.encode(*_texts([graded[i] for places in filled for i in places]))
    ids, mask, types = (jnp.asarray(part).reshape(len(groups), most, -1) for part in parts)
    return _Rows(ids, mask, types, jnp.array(grades))


def _optimiser(steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, min(20, steps // 4), steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY))


@functools.partial(jit, static_argnums=(0, 1))
def _run_steps(
    config: ModelConfig,
    steps: int,
    params: transformer.Params,
    optimiser_state: optax.OptState,
    rows: _Rows,
    keys: Array,
) -> tuple[transformer.Params, optax.OptState, Float[Array, ""]]:
    """One step per key, of `steps` in all."""

    def loss_of(params: transformer.Params, batch: _Rows, key: Array) -> Float[Array, ""]:
        ids, mask, types = (part.reshape(-1, part.shape[-1]) for part in batch[:3])
        hide = jax.random.bernoulli(key, HIDDEN_WORDS, ids.shape) & (ids >= len(SPECIAL))
        model = transformer.Model(config, params)
        hidden, _ = model.forward(jnp.where(hide, _UNKNOWN, ids), mask, types_bt=types)
        scores = model.scores(hidden, mask)[:, 0]
        return ranking_loss(scores.reshape(batch.grades.shape), batch.grades)

    def step(carry: tuple[Any, Any], key: Array) -> tuple[tuple[Any, Any], Array]:
        params, optimiser_state = carry
        prompts_key, words_key = jax.random.split(key)
        drawn = jax.random.randint(prompts_key, (BATCH,), 0, len(rows.grades))
        batch = jax.tree.map(lambda part: part[drawn], rows)
        loss, gradients = jax.value_and_grad(loss_of)(params, batch, words_key)
        updates, optimiser_state = _optimiser(steps).update(gradients, optimiser_state, params)
        return (optax.apply_updates(params, updates), optimiser_state), loss

    (params, optimiser_state), losses = jax.lax.scan(step, (params, optimiser_state), keys)
    return params, optimiser_state, jnp.mean(losses)


def _fill_range(encoder: Encoder, graded: Sequence[Graded]) -> Encoder:
    """The encoder whose scores of these responses go from 0 to 1, in the same order."""
    scores = scorers.regression("reflection", encoder).score(*_texts(graded))
    low, spread = scores.min(), max(scores.max() - scores.min(), 1e-6)
    out = encoder.params["scorer"]["out"]
    scaled = {"kernel": out["kernel"] / spread, "bias": (out["bias"] - low) / spread}
    return dataclasses.replace(encoder, params=encoder.params | {"scorer": encoder.params["scorer"] | {"out": scaled}})
