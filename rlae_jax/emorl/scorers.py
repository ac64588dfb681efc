"""What objectives measure: scores of responses to prompts, each in a known range.

In: prompts and responses. Out: Float[N] in [low, high], higher is better. Text functions count words; model scorers run
Flax models on the device, a bounded batch at a time; of several processes each has them on a device of its own. An
empty response scores `low` everywhere, whatever a model would make of it.
"""

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from rlae_jax import hosts, sharding, workers
from rlae_jax.errors import InputError
from rlae_jax.models import LM, Encoder, load, load_encoder
from rlae_jax.models.lm import require_tokenizer
from rlae_jax.tasks import reward_worker
from rlae_jax.tasks.reward_worker import number_of
from rlae_jax.tasks.rewards import find_function
from rlae_jax.tasks.scoring import Problems, attempt
from rlae_jax.workers import Outcome

Score = Callable[[Sequence[str], Sequence[str]], Any]  # (prompts, responses) -> N numbers
_ROWS = 64  # texts that a model reads at once
_EDGE = 1e-4  # scores are clipped this far from 0 and 1 before their logarithm is taken (EMORL's code)


@dataclasses.dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
      name: what tables and files call it.
      score: (prompts, responses) -> one number each; see `of_function` for one of your own.
      low, high: the range that its numbers are clipped to.
      problems: what went wrong with a function of one's own, whose answers then scored 0.
    """

    name: str
    score: Score
    low: float = 0.0
    high: float = 1.0
    problems: Problems = dataclasses.field(default_factory=Problems, compare=False)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Scores within the range.

        Raises:
          InputError: other than one finite number per response.
        """
        scores = np.full(len(responses), self.low, np.float64)
        written = [i for i, response in enumerate(responses) if response.strip()]
        if not written:
            return scores
        with sharding.alone():
            given = np.asarray(self.score([prompts[i] for i in written], [responses[i] for i in written]), np.float64)
        if given.shape != (len(written),):
            raise InputError(
                f"scorer {self.name} gave scores of shape {list(given.shape)} for {len(written)} responses; expected "
                "one each"
            )
        wrong = np.flatnonzero(~np.isfinite(given))
        if len(wrong):
            response = responses[written[wrong[0]]]
            raise InputError(f"scorer {self.name} gave {given[wrong[0]]} for the response {response[:60]!r}")
        scores[written] = np.clip(given, self.low, self.high)
        return scores

    def share(self, prompts: Sequence[str], responses: Sequence[str]) -> Float[np.ndarray, " N"]:
        """Scores of what all processes have, each of which scores its share; the whole, and the same, on all."""
        own = hosts.share(len(responses))
        return hosts.join(self([prompts[i] for i in own], [responses[i] for i in own]), own, len(responses))


def words(text: str) -> list[str]:
    """The words of a text in lower case: letters, digits and apostrophes."""
    return re.findall(r"[\w']+", text.lower())


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """All runs of n words."""
    every = words(text)
    return list(zip(*(every[i:] for i in range(n)), strict=False))


def diversity(n: int = 2) -> Objective:
    """Distinct n-grams of a response over all of its n-grams (distinct-n, Li et al., 2016); 0 if it has none."""

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        del prompts
        return [len(set(grams)) / len(grams) if (grams := ngrams(text, n)) else 0.0 for text in responses]

    return Objective(f"diversity_{n}", score)


def levenshtein(a: Sequence[str], b: Sequence[str]) -> int:
    """The fewest insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def edit_rate() -> Objective:
    """How much a response differs from its prompt: the Levenshtein distance of their words over the longer's number."""

    def rate(prompt: str, response: str) -> float:
        a, b = words(prompt), words(response)
        return levenshtein(a, b) / max(len(a), len(b), 1)

    return Objective(
        "edit_rate", lambda prompts, responses: [rate(*pair) for pair in zip(prompts, responses, strict=True)]
    )


def brevity(best: int = 3, worst: int = 26) -> Objective:
    """1 for a response of `best` words or fewer, falling to 0 at `worst`."""

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        del prompts
        return [1 - (len(words(text)) - best) / (worst - best) for text in responses]

    return Objective("brevity", score)


def coverage(wanted: Callable[[str], Sequence[str]] = words) -> Objective:
    """The share of a prompt's keywords that the response has.

    Args:
      wanted: the keywords of a prompt; by default all of its words.
    """

    def share(prompt: str, response: str) -> float:
        keywords, written = set(wanted(prompt)), set(words(response))
        return len(keywords & written) / max(len(keywords), 1)

    return Objective(
        "coverage", lambda prompts, responses: [share(*pair) for pair in zip(prompts, responses, strict=True)]
    )


def of_words(name: str, vocabulary: Sequence[str], enough: int = 1) -> Objective:
    """How many different words of a list a response has, `enough` of them scoring 1: warmth, politeness, terms."""
    known = {word.lower() for word in vocabulary}

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        del prompts
        return [len(known & set(words(text))) / enough for text in responses]

    return Objective(name, score)


def of_function(name: str, score: Callable[[str, str], float]) -> Objective:
    """A user's function of one prompt and one response, in [0, 1], called here. What it fails for scores 0."""
    return _of_outcomes(name, lambda pairs: [attempt(number_of, score, *pair) for pair in pairs])


def _of_source(name: str, source: str) -> Objective:
    """A user's function that worker processes import, and never this one. They start with the first batch."""
    pool = workers.Pool(source, f"{reward_worker.__file__}:number_of")

    def call(pairs: Sequence[tuple[str, str]]) -> list[Outcome]:
        try:
            outcomes = pool.submit(pairs).result()
        except workers.Lost as error:
            raise InputError(f"scorer {source!r}: {error}") from None
        objective.problems.printed = pool.printed
        return outcomes

    objective = _of_outcomes(name, call)
    return objective


def _of_outcomes(name: str, call: Callable[[Sequence[tuple[str, str]]], Sequence[Outcome]]) -> Objective:
    problems = Problems(f"objective {name}")

    def score(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        pairs = list(zip(prompts, responses, strict=True))
        outcomes = call(pairs)
        for (prompt, _), (_, problem) in zip(pairs, outcomes, strict=True):
            if problem and not problems.counts:
                warnings.warn(f"objective {name} failed for an answer, which scores 0: {problem}", stacklevel=2)
            if problem:
                problems.add(prompt, problem)
        return [0.0 if problem else value for value, problem in outcomes]

    return Objective(name, score, problems=problems)


def _in_batches(call: Callable[[Sequence[str], Sequence[str]], Any]) -> Score:
    """A score that a model computes, for any number of texts: batches are filled up, so that they share programs."""

    def score(prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        scores = []
        for start in range(0, len(responses), _ROWS):
            pair = [list(texts[start : start + _ROWS]) for texts in (prompts, responses)]
            n = len(pair[0])
            filled = [texts + texts[:1] * (_ROWS - n) for texts in pair]
            scores.append(np.asarray(call(*filled))[:n])
        return np.concatenate(scores)

    return score


def regression(name: str, encoder: Encoder, low: float = 0.0, high: float = 1.0) -> Objective:
    """A cross-encoder that reads prompt and response and has one output, such as EMORL's reflection scorer (RoBERTa).

    Args:
      low, high: of what the head gives; scaled to [0, 1].

    Raises:
      InputError: a head of several outputs, or none.
    """
    if len(encoder.labels) != 1:
        raise InputError(f"scorer {name}: {encoder.name} has {len(encoder.labels)} outputs; a regression needs one")

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        return (encoder.logits(*encoder.encode(prompts, responses))[:, 0] - low) / (high - low)

    return Objective(name, _in_batches(score))


def classifier(
    name: str, encoder: Encoder, values: Mapping[str, float] | None = None, pairs: bool = False
) -> Objective:
    """The expected value of a classifier's labels, such as EMORL's empathy scorer (BERT).

    Args:
      values: label -> its worth in [0, 1]; by default they rise evenly in the labels' order.
      pairs: it reads the prompt, too.

    Raises:
      InputError: fewer than two labels, or values for others.
    """
    labels = encoder.labels
    if len(labels) < 2:
        raise InputError(f"scorer {name}: {encoder.name} has {len(labels)} labels; a classifier needs two")
    if values is not None and set(values) != set(labels):
        raise InputError(f"scorer {name}: values for {', '.join(values)}; the labels are {', '.join(labels)}")
    worth = np.linspace(0, 1, len(labels)) if values is None else np.array([values[label] for label in labels])

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        inputs = encoder.encode(prompts, responses) if pairs else encoder.encode(responses)
        return jax.nn.softmax(encoder.logits(*inputs), axis=-1) @ jnp.asarray(worth, jnp.float32)

    return Objective(name, _in_batches(score))


def coherence(encoder: Encoder) -> Objective:
    """The probability that the response follows the prompt, by BERT's next-sentence head, whose first label says so."""
    if len(encoder.labels) != 2:
        raise InputError(f"coherence: {encoder.name} has {len(encoder.labels)} labels; a next-sentence head has two")
    return dataclasses.replace(classifier("coherence", encoder, dict(zip(encoder.labels, (1, 0), strict=True)), True))


def specificity(encoder: Encoder) -> Objective:
    """How near the response is to its prompt: the cosine of their mean states, negative ones counting as 0."""

    def mean_state(texts: Sequence[str]) -> Any:
        ids, mask, types = encoder.encode(texts)
        hidden, real = encoder.hidden(ids, mask, types), mask[..., None].astype(jnp.float32)
        return jnp.sum(hidden * real, axis=1) / jnp.sum(real, axis=1)

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        a, b = mean_state(prompts), mean_state(responses)
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        return jnp.sum(a * b, axis=-1) / jnp.maximum(norms, 1e-12)

    return Objective("specificity", _in_batches(score))


def perplexities(lm: LM, texts: Sequence[str]) -> Float[np.ndarray, " N"]:
    """exp of the mean negative log-probability of each text's tokens after the first; texts of one token have inf."""
    rows = [lm.require_tokenizer()(text)["input_ids"][: lm.config.context] for text in texts]
    width = max(8, 1 << (max(map(len, rows)) - 1).bit_length())
    ids = np.zeros((len(rows), min(width, lm.config.context)), np.int32)
    mask = np.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    log_probs = np.asarray(lm.log_probs(jnp.asarray(ids), jnp.asarray(mask)), np.float64)
    counts = mask[:, 1:].sum(axis=1)
    totals = -np.sum(np.where(mask[:, 1:] > 0, log_probs, 0.0), axis=1)
    return np.where(counts > 0, np.exp(totals / np.maximum(counts, 1)), np.inf)


def fluency(lm: LM, worst: float = 50.0) -> Objective:
    """(worst - perplexity) / worst under a causal model, at least 0 (EMORL, section 4.1, with GPT-2 and 50)."""

    def score(prompts: Sequence[str], responses: Sequence[str]) -> Any:
        del prompts
        return np.maximum((worst - np.minimum(perplexities(lm, responses), worst)) / worst, 0.0)

    return Objective("fluency", _in_batches(score))


# What commands name: functions of texts, and models, which are made from a checkpoint.
TEXT_OBJECTIVES: dict[str, Callable[[], Objective]] = {"coverage": coverage, "brevity": brevity, "edit_rate": edit_rate}
MODEL_OBJECTIVES: dict[str, Callable[[Any], Objective]] = {
    "reflection": functools.partial(regression, "reflection"),
    "empathy": functools.partial(classifier, "empathy"),
    "coherence": coherence,
    "specificity": specificity,
    "fluency": fluency,
}
_DIVERSITY = re.compile(r"diversity(?:_([1-9]\d?))?")


def get_objective(text: str) -> Objective:
    """The objective that a command's argument names.

    Args:
      text: "coverage", "brevity", "edit_rate", "diversity" or "diversity_3" (n-grams; 2 by default); "NAME=CHECKPOINT"
        with a name of `MODEL_OBJECTIVES` and what `load_encoder`, or for fluency `load`, takes; or "module:function" or
        "file.py:function", a function of prompt and response that gives a number in [0, 1], after which it is
        named.

    Raises:
      InputError: an unknown name; a checkpoint that cannot be loaded or lacks the head; no such function.
    """
    return _named(text)[1]()


def get_objectives(texts: Sequence[str]) -> list[Objective]:
    """What `get_objective` makes of each text. Names are checked before any model is loaded.

    Raises:
      InputError: no texts, two objectives of one name; what `get_objective` raises.
    """
    if not texts:
        raise InputError(f"no scorers: name at least one of {_KNOWN}")
    named = [_named(text) for text in texts]
    names = [name for name, _ in named]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(
            f"objectives {', '.join(repeated)} are named more than once: name each once, or give functions other names"
        )
    return [make() for _, make in named]


_KNOWN = (
    f"{', '.join(TEXT_OBJECTIVES)}, diversity, diversity_N, NAME=CHECKPOINT with {', '.join(MODEL_OBJECTIVES)}, "
    "MODULE:FUNCTION or FILE.py:FUNCTION"
)


def own_function(text: str) -> str:
    """The name of the user's function that a command's argument names; "" where it names something else."""
    return text.rpartition(":")[2] if text.partition("=")[0] not in MODEL_OBJECTIVES and ":" in text else ""


def _named(text: str) -> tuple[str, Callable[[], Objective]]:
    """An objective's name, and what makes it."""
    name, _, checkpoint = text.partition("=")
    if name in MODEL_OBJECTIVES:
        if not checkpoint:
            raise InputError(f"scorer {name} needs a model: {name}=CHECKPOINT")
        return name, functools.partial(_from_checkpoint, name, checkpoint)
    if text in TEXT_OBJECTIVES:
        return text, TEXT_OBJECTIVES[text]
    if match := _DIVERSITY.fullmatch(text):
        n = int(match[1] or 2)
        return f"diversity_{n}", functools.partial(diversity, n)
    if not own_function(text):
        raise InputError(f"objective {text!r} is unknown; use one of {_KNOWN}")
    name = text.rpartition(":")[2]
    return name, functools.partial(_of_source, name, find_function(text, f"scorer {text!r}"))


def _from_checkpoint(name: str, checkpoint: str) -> Objective:
    with sharding.alone():
        model: LM | Encoder = load(checkpoint) if name == "fluency" else load_encoder(checkpoint)
    require_tokenizer(model.tokenizer, checkpoint)
    return MODEL_OBJECTIVES[name](model)


COMBINATIONS = ("sum", "log", "product")


def combine(
    scores: Float[np.ndarray, "N M"], how: str = "log", weights: Sequence[float] | None = None
) -> Float[np.ndarray, " N"]:
    """One reward of several scores.

    Args:
      how: "sum": sum_m w_m s_m. "log": sum_m w_m log s_m, with scores clipped to [1e-4, 1 - 1e-4] as published.
        "product": prod_m s_m^w_m, of the clipped scores, which is exp of "log".
      weights: of the objectives; equal ones that sum to 1 by default.

    Raises:
      InputError: an unknown way, or another number of weights.
    """
    if how not in COMBINATIONS:
        raise InputError(f"scores are combined by {', '.join(COMBINATIONS)}, not {how!r}")
    m = scores.shape[1]
    w = np.full(m, 1 / m) if weights is None else np.asarray(weights, np.float64)
    if w.shape != (m,):
        raise InputError(f"{len(w)} weights for {m} objectives")
    terms = np.asarray(scores, np.float64) if how == "sum" else np.log(np.clip(scores, _EDGE, 1 - _EDGE))
    total: Float[np.ndarray, " N"] = terms @ w
    return np.exp(total) if how == "product" else total
