"""The embedded counselling task: prompts of a few templates with five keywords each, and responses to learn from.

    prompt     i worry about money , exams , and also divorce , sleep and guilt .
    clean      it sounds like exams and divorce are on your mind . i am here .
    noisy      it sounds like very money exams so divorce just too sleep . with again many hope

Half of the responses are clean and half noisy, so that a model that imitates them is mediocre under every objective and
can be taught any of them: to name the keywords, to be brief, to be warm, to write what a clean response would. No two
are reached by the same means, and some conflict: naming five keywords takes words, and a bare list of them is no
sentence. Everything is a function of a seed.
"""

import functools
from collections.abc import Sequence

import numpy as np

from rlae_jax.tasks.prompts import PromptSet

NAME = "reflections"
# A prompt has one of each row, in this order.
TOPICS = (
    ("money", "debt", "rent", "bills", "taxes", "loans", "savings", "prices"),
    ("work", "school", "exams", "deadlines", "meetings", "moving", "lawyers", "traffic"),
    ("mother", "father", "brother", "children", "friends", "neighbours", "marriage", "divorce"),
    ("sleep", "headaches", "cancer", "diet", "medicine", "alcohol", "smoking", "exercise"),
    ("fear", "guilt", "grief", "anger", "loneliness", "crying", "dreams", "memories"),
)
KEYWORDS = tuple(word for topic in TOPICS for word in topic)
WARM = ("glad", "care", "together", "gently", "hope", "proud")
LEAD = "with"  # comes before the kind words of a rambling response
FILLERS = ("very", "often", "because", "many", "thing", "never", "again", "maybe", "so", "then", "just", "too")
PROMPTS = (
    "i worry about {} , {} , and also {} , {} and {} .",
    "lately {} and {} keep me awake , and so do {} , {} and {} .",
    "i can not stop thinking of {} , {} , {} , {} and {} .",
    "everything is hard : {} , {} , {} , then {} and now {} .",
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
    texts = (*PROMPTS, *OPENINGS, *MIDDLES, *CLOSINGS, LEAD)
    glue = sorted({word for text in texts for word in text.split() if word != "{}"} - set(WARM))
    return (PAD, END, UNKNOWN, *KEYWORDS, *WARM, *FILLERS, *(word for word in glue if word not in FILLERS))


def keywords(prompt: str) -> list[str]:
    """The keywords of a prompt, in order."""
    return [word for word in prompt.split() if word in KEYWORDS]


def draw_prompt(rng: np.random.Generator) -> str:
    """A prompt with five keywords."""
    return PROMPTS[rng.integers(len(PROMPTS))].format(*(topic[rng.integers(len(topic))] for topic in TOPICS))


def clean(prompt: str, rng: np.random.Generator) -> str:
    """A well-formed response that names one or two keywords, sometimes warmly."""
    sentence = f"{OPENINGS[rng.integers(len(OPENINGS))]} {MIDDLES[rng.integers(len(MIDDLES))]} ."
    named = _some(keywords(prompt), sentence.count("{}"), rng)
    return f"{sentence.format(*named)} {_closing(rng)}".strip()


def noisy(prompt: str, rng: np.random.Generator) -> str:
    """A response that rambles: a list of keywords, or some kind words, or the one and then the other, with fillers.

    A list has an end of its own, so that who is taught to make lists longer does not forget how to end a response.
    """
    words = OPENINGS[rng.integers(len(OPENINGS))].split()
    kind = rng.choice(3, p=(0.4, 0.3, 0.3))
    if kind != 1:
        for keyword in _some(keywords(prompt), int(rng.integers(1, 6)), rng):
            words += [*_fillers(rng, (0, 1, 1, 2)), keyword]
        words.append(".")
    if kind != 0:
        words.append(LEAD)
        for warm in rng.choice(WARM, rng.integers(1, 4), replace=False):
            words += [*_fillers(rng, (1, 2, 3)), str(warm)]
    words += _closing(rng).split() if rng.random() < 0.3 else []
    return " ".join(words[:MOST_WORDS])


def _fillers(rng: np.random.Generator, counts: Sequence[int]) -> list[str]:
    return [str(word) for word in rng.choice(FILLERS, rng.choice(counts))]


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
    written: list[tuple[str, str]] = []
    while len(written) < rows:
        prompt = draw_prompt(rng)
        if _content(prompt) not in held_out:
            written.append((prompt, (clean, noisy)[len(written) % 2](prompt, rng)))
    return written


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
    return PromptSet(NAME, {split: tuple(next(rows) for _ in range(n)) for split, n in SIZES.items()})


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
