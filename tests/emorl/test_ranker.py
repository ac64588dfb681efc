"""The ranker: its loss and accuracy by their definitions, and a tiny training with a plain rule to learn."""

import csv
import functools
import itertools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from rlae_jax import load_encoder
from rlae_jax.emorl import ranker, scorers
from rlae_jax.tasks.prompts import GRADES, Graded, graded_responses

WORDS = ("dog", "house", "rain", "night", "work", "friend", "mother", "sleep")
PLATFORMS = ("cpu", "cuda", "tpu")
OPENINGS = {1.0: "you feel", 0.5: "perhaps the", 0.0: "just stop"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Responses whose first words tell how good they are; how long they are does not."""
    rng, path = np.random.default_rng(0), tmp_path_factory.mktemp("graded") / "pair.csv"

    def some():
        return " ".join(rng.choice(WORDS, rng.integers(2, 6)))

    with path.open("w", newline="") as file:
        for i in range(30):
            responses = [f"{OPENINGS[grade]} {some()}" for grade in GRADES.values()]
            csv.writer(file).writerow([f"my {some()} {i}", *responses, "a topic"])
    return path


@pytest.fixture(scope="module")
def trained(path, tmp_path_factory):
    """(directory, report, what progress was told) of a short training."""
    out, told = tmp_path_factory.mktemp("rankers") / "first", []
    report = ranker.train_ranker(path, out, seed=3, steps=30, on_progress=lambda *said: told.append(said))
    return out, report, told


def test_loss_by_its_definition():
    rng = np.random.default_rng(0)
    scores, grades = rng.normal(size=(3, 5)), rng.choice([0.0, 0.5, 1.0, np.nan], (3, 5))
    losses = [
        np.log1p(np.exp(s[j] - s[i]))
        for s, g in zip(scores, grades, strict=True)
        for i, j in itertools.permutations(range(5), 2)
        if g[i] > g[j]
    ]
    assert losses
    found, gradient = jax.value_and_grad(ranker.ranking_loss)(jnp.asarray(scores), jnp.asarray(grades))
    assert found == pytest.approx(np.mean(losses), rel=1e-5)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[np.isnan(grades)] == 0).all()


def test_accuracy_by_hand():
    graded = [Graded("a", "", 1.0), Graded("b", "", 0.5), Graded("a", "", 0.0), Graded("a", "", 0.0)]
    # Pairs of prompt a alone: 0 with 2, and 0 with 3.
    assert ranker.accuracy([2, 9, 1, 3], graded) == 0.5
    assert ranker.accuracy([2, 9, 1, 2], graded) == 0.75
    assert np.isnan(ranker.accuracy([1, 2], graded[1:3]))


def test_it_learns_what_tells_the_grades_apart(trained):
    _, report, told = trained
    assert report.accuracy["train"] > 0.9
    assert report.accuracy["test"] > 0.8
    assert set(report.accuracy) == set(report.longer) == {"train", "dev", "test"}
    assert abs(report.longer["train"] - 0.5) < 0.15
    assert [step for step, _ in told] == [25, 30]
    assert told[-1][1] < told[0][1]


def test_the_longer_response_as_a_rule(path, trained):
    graded = graded_responses(path)["dev"]
    values = [len(one.response.split()) for one in graded]
    assert trained[1].longer["dev"] == ranker.accuracy(values, graded)


def test_the_directory_scores_as_reported(path, trained):
    out, report, _ = trained
    encoder = load_encoder(out)
    assert encoder.labels == ("reflection",)
    scorer = scorers.get_objective(f"reflection={out}")
    for split, graded in graded_responses(path).items():
        prompts, responses = [one.prompt for one in graded], [one.response for one in graded]
        scores = scorer(prompts, responses)
        assert ranker.accuracy(scores, graded) == report.accuracy[split]
        assert scores.min() >= 0
        assert scores.max() <= 1
        if split == "train":  # the range is filled, and nothing is cut off at its ends
            np.testing.assert_allclose(scorer.score(prompts, responses), scores, atol=1e-5)
            assert (scores.min(), scores.max()) == pytest.approx((0, 1), abs=1e-5)


def test_its_tokenizer_reads_pairs(trained):
    tokenizer = load_encoder(trained[0]).tokenizer
    row = tokenizer("My dog", "You FEEL unheard-of")
    words = tokenizer.convert_ids_to_tokens(row["input_ids"])
    assert words == ["[CLS]", "my", "dog", "[SEP]", "you", "feel", "[UNK]", "[UNK]", "[UNK]", "[SEP]"]
    assert row["token_type_ids"] == [0] * 4 + [1] * 6


def test_training_lowers_for_every_platform(path, trained):
    encoder = load_encoder(trained[0])
    rows = ranker._rows(encoder, graded_responses(path)["dev"])
    state = jax.eval_shape(ranker._optimiser(4).init, encoder.params)
    args = jax.eval_shape(lambda *args: args, encoder.params, state, rows, jax.random.split(jax.random.key(0), 2))
    run = jax.jit(functools.partial(ranker._run_steps, encoder.config, 4))
    exported = jax.export.export(run, platforms=PLATFORMS)(*args)
    assert exported.platforms == PLATFORMS


def test_the_seed_decides(path, trained, tmp_path):
    for name, seed in (("same", 3), ("other", 4)):
        ranker.train_ranker(path, tmp_path / name, seed=seed, steps=30)
    first, same, other = (
        (directory / "model.safetensors").read_bytes()
        for directory in (trained[0], tmp_path / "same", tmp_path / "other")
    )
    assert first == same
    assert first != other


def test_what_it_refuses(path, trained, tmp_path, raises_input_error):
    raises_input_error(lambda: ranker.train_ranker(path, trained[0]), str(trained[0]), "exists already")
    raises_input_error(lambda: ranker.train_ranker(path, tmp_path / "new", steps=0), "steps", "0")
    raises_input_error(lambda: ranker.train_ranker(tmp_path / "absent.csv", tmp_path / "new"), "absent.csv")
    (tmp_path / "file").write_text("")
    raises_input_error(lambda: ranker.train_ranker(path, tmp_path / "file" / "new"), "is a file")
    alike = tmp_path / "alike.csv"
    with alike.open("w", newline="") as file:
        csv.writer(file).writerows([f"a prompt of words {i}", "good", *[""] * 7, "topic"] for i in range(9))
    raises_input_error(lambda: ranker.train_ranker(alike, tmp_path / "new"), str(alike), "different grades")
    assert not (tmp_path / "new").exists()
