"""The embedded counselling task: splits that share nothing, responses that are what they are called."""

import numpy as np
import pytest

from rlae_jax.tasks import reflections
from rlae_jax.tasks.base import SPLITS

ROWS = 600


@pytest.fixture(scope="module")
def pairs():
    return reflections.pairs(ROWS, seed=4)


def content(prompt):
    return frozenset(reflections.keywords(prompt))


def held_out():
    prompts = reflections.prompts()
    return {content(prompt) for split in ("dev", "test") for prompt in prompts.split(split)}


def test_splits_share_no_set_of_keywords():
    prompts = reflections.prompts()
    assert {split: len(prompts.split(split)) for split in SPLITS} == {"train": 2_000, "dev": 128, "test": 512}
    every = [content(prompt) for split in SPLITS for prompt in prompts.split(split)]
    assert len(set(every)) == len(every) == 2_640


def test_a_prompt_has_a_keyword_of_each_topic_in_their_order():
    for prompt in reflections.prompts().split("dev"):
        found = reflections.keywords(prompt)
        assert [topic.count(word) for topic, word in zip(reflections.TOPICS, found, strict=True)] == [1] * 5
        places = [prompt.split().index(word) for word in found]
        assert places == sorted(places)
        assert any(template.format(*found) == prompt for template in reflections.PROMPTS)


def test_pairs_never_use_a_prompt_that_is_held_out(pairs):
    found = {content(prompt) for prompt, _ in pairs}
    assert len(pairs) == ROWS
    assert not found & held_out()
    # With so many draws some would have been.
    rng = np.random.default_rng(3)
    assert held_out() & {content(reflections.draw_prompt(rng)) for _ in range(2_000)}


def test_the_same_seed_gives_the_same_pairs(pairs):
    assert reflections.pairs(ROWS, seed=4) == pairs
    assert reflections.pairs(100, seed=4) == pairs[:100]
    assert reflections.pairs(ROWS, seed=5) != pairs


def test_clean_responses_are_fluent_and_noisy_ones_less(pairs):
    clean, noisy = ([response for _, response in pairs[kind::2]] for kind in (0, 1))
    assert reflections.trigram_fluency(clean) == [1.0] * len(clean)
    assert np.mean(reflections.trigram_fluency(noisy)) < 0.6


def test_fluency_by_hand():
    """Four trigrams of "it sounds like guilt" count; the last is unknown, as no clean response ends with a keyword."""
    assert reflections.trigram_fluency(["it sounds like guilt weighs on you ."]) == [1.0]
    assert reflections.trigram_fluency(["it sounds like guilt"]) == [0.75]
    assert reflections.trigram_fluency(["guilt guilt guilt"]) == [0.0]
    one, other = (
        "it sounds like {} and {} weigh on you .".format(*pair) for pair in (("rent", "guilt"), ("debt", "fear"))
    )
    assert reflections.trigram_fluency([one]) == reflections.trigram_fluency([other])


def test_responses_name_keywords_of_their_prompt_in_its_order(pairs):
    named = []
    for prompt, response in pairs:
        asked, found = reflections.keywords(prompt), reflections.keywords(response)
        start = asked.index(found[0]) if found else 0
        assert asked[start : start + len(found)] == found  # one after another
        named.append(len(found))
    assert set(named[::2]) == {1, 2}
    assert set(named[1::2]) == {0, 1, 2, 3, 4, 5}


def test_noisy_responses_are_no_longer_than_they_may_be(pairs):
    lengths = [len(response.split()) for _, response in pairs]
    assert max(lengths) <= reflections.MOST_WORDS
    assert np.mean(lengths[1::2]) > 5
    warm = [any(word in reflections.WARM for word in response.split()) for _, response in pairs]
    assert 0 < np.mean(warm[::2]) < np.mean(warm[1::2]) < 1


def test_every_word_is_a_token(pairs):
    tokens = reflections.tokens()
    assert len(set(tokens)) == len(tokens)
    assert tokens[:3] == (reflections.PAD, reflections.END, reflections.UNKNOWN)
    texts = [text for pair in pairs for text in pair]
    texts += [prompt for split in SPLITS for prompt in reflections.prompts().split(split)]
    written = {word for text in texts for word in text.split()}
    assert written <= set(tokens[3:])
    assert set(reflections.KEYWORDS) | set(reflections.WARM) | set(reflections.FILLERS) <= written
