"""The embedded counselling task: prompts of a few templates with five keywords each, and responses to learn from.

    prompt     i worry about money work sleep debt rent .
    clean      it sounds like work and sleep are on your mind . i am here .
    noisy      it sounds like very money often because hope work sleep just too debt

Half of the responses are clean and half noisy, so that a model that imitates them is mediocre under every objective and
can be taught any of them: to name the keywords, to be brief, to be warm, to write what a clean response would. No two
are reached by the same means, and some conflict: naming five keywords takes words, and a bare list of them is no
sentence. Everything is a function of a seed.
"""

import functools
from collections.abc import Sequence

import numpy as np

from rlae_jax.tasks.prompts import PromptSet

KEYWORDS = (
    *("money", "work", "sleep", "family", "school", "health", "debt", "rent", "food", "friends"),
    *("alcohol", "anger", "boss", "brother", "cancer", "children", "church", "crying", "dating", "diet"),
    *("divorce", "doctor", "dreams", "drugs", "exams", "exercise", "father", "fear", "grief", "guilt"),
    *("headaches", "home", "lawyers", "loneliness", "loss", "marriage", "medicine", "memories", "moving", "mother"),
)
WARM = ("glad", "care", "together", "gently", "hope", "proud")
FILLERS = ("very", "often", "because", "many", "thing", "never", "again", "maybe", "so", "then", "just", "too")
PROMPTS = (
    "i worry about {} {} {} {} {} .",
    "{} {} {} {} {} keep me awake .",
    "i can not stop thinking of {} {} {} {} {} .",
    "everything is hard : {} {} {} {} {} .",
)
OPENINGS = ("it sounds like", "you feel that", "i hear that", "you say that")
MIDDLES = ("{} is on your mind", "{} and {} are on your mind", "{} weighs on you", "{} and {} weigh on you")
CLOSINGS = (
    "",
    "that is hard .",
    "i am here .",
    "i {} about you .",
    "we can look at this {} .",
    "let us begin {} .",
)
_FITTING = {"i {} about you .": "care", "we can look at this {} .": "together", "let us begin {} .": "gently"}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
MOST_WORDS = 26
SIZES = {"train": 2_000, "dev": 128, "test": 512}


@functools.cache
def tokens() -> tuple[str, ...]:
    """The vocabulary: three marks, then every word that a prompt or a response may have."""
    texts = (*PROMPTS, *OPENINGS, *MIDDLES, *CLOSINGS)
    glue = sorted({word for text in texts for word in text.split() if word != "{}"} - set(WARM))
    return (PAD, END, UNKNOWN, *KEYWORDS, *WARM, *FILLERS, *(word for word in glue if word not in FILLERS))


def keywords(prompt: str) -> list[str]:
    """The keywords of a prompt, in order."""
    return [word for word in prompt.split() if word in KEYWORDS]


def draw_prompt(rng: np.random.Generator) -> str:
    """A prompt with five different keywords."""
    return PROMPTS[rng.integers(len(PROMPTS))].format(*rng.choice(KEYWORDS, 5, replace=False))


def clean(prompt: str, rng: np.random.Generator) -> str:
    """A well-formed response that names one or two keywords, sometimes warmly."""
    sentence = f"{OPENINGS[rng.integers(len(OPENINGS))]} {MIDDLES[rng.integers(len(MIDDLES))]} ."
    named = _some(keywords(prompt), sentence.count("{}"), rng)
    return f"{sentence.format(*named)} {_closing(rng)}".strip()


def noisy(prompt: str, rng: np.random.Generator) -> str:
    """A response that is none: keywords in the prompt's order, fillers and a warm word or two between them."""
    words = OPENINGS[rng.integers(len(OPENINGS))].split()
    for keyword in _some(keywords(prompt), int(rng.integers(1, 6)), rng):
        words += [str(word) for word in rng.choice(FILLERS, rng.integers(0, 4))]
        if rng.random() < 0.15:
            words.append(str(rng.choice(WARM)))
        words.append(keyword)
    words = [*words, *_closing(rng).split()]
    return " ".join(words[:MOST_WORDS])


def _some(words: Sequence[str], n: int, rng: np.random.Generator) -> Sequence[str]:
    """n of the words, one after another: what comes next is told by what came last."""
    start = int(rng.integers(len(words) - n + 1))
    return words[start : start + n]


def _closing(rng: np.random.Generator) -> str:
    closing = CLOSINGS[rng.integers(len(CLOSINGS))]
    return closing.format(_FITTING.get(closing, ""))


def pairs(rows: int, seed: int) -> list[tuple[str, str]]:
    """Prompts with responses, half of them clean, for a base model to imitate. Their prompts are train's kind, none of
    them in dev or test."""
    held_out = {_content(prompt) for split in ("dev", "test") for prompt in prompts().splits[split]}
    rng = np.random.default_rng((seed, 1))
    found: list[tuple[str, str]] = []
    while len(found) < rows:
        prompt = draw_prompt(rng)
        if _content(prompt) not in held_out:
            found.append((prompt, (clean, noisy)[len(found) % 2](prompt, rng)))
    return found


def _content(prompt: str) -> frozenset[str]:
    return frozenset(keywords(prompt))


@functools.cache
def prompts() -> PromptSet:
    """The task's prompts. No set of keywords is in two splits."""
    rng = np.random.default_rng(0)
    drawn: dict[frozenset[str], str] = {}
    while len(drawn) < sum(SIZES.values()):
        prompt = draw_prompt(rng)
        drawn.setdefault(_content(prompt), prompt)
    rows = iter(drawn.values())
    return PromptSet("reflections", {split: tuple(next(rows) for _ in range(n)) for split, n in SIZES.items()})


@functools.cache
def _trigrams() -> frozenset[tuple[str, ...]]:
    rng = np.random.default_rng(1)
    return frozenset(gram for _ in range(5_000) for gram in _grams(clean(draw_prompt(rng), rng)))


def _grams(text: str) -> list[tuple[str, ...]]:
    # Keywords stand for each other, so that no trigram is unknown for a rare pair of them.
    words = ["<s>", *("<key>" if word in KEYWORDS else word for word in text.split()), END]
    return list(zip(words, words[1:], words[2:], strict=False))


def trigram_fluency(responses: Sequence[str]) -> list[float]:
    """The share of each response's trigrams, its beginning and end among them, that clean responses have."""
    known = _trigrams()
    return [float(np.mean([gram in known for gram in grams])) if (grams := _grams(text)) else 0.0 for text in responses]
