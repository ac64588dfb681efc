"""Picked answers, and answers by likelihood."""

import dataclasses

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.evaluation import (
    Method,
    baseline_methods,
    evaluate,
)
from rlae_jax.evaluation import answers as answering
from rlae_jax.evaluation.methods import Pick
from rlae_jax.tasks import Examples, Task
from rlae_jax.tasks.rewards import exact_match
from tests.helpers import toys

SINGLES = ["single:left", "single:right"]


def test_samples_of_a_prompt_do_not_depend_on_its_batch(ensemble):
    """Under two objectives, whose mean is the reward."""
    examples = toys.task().split("test").take(11)

    def start(part, texts):
        scores = np.array([[text == "0", len(text) / 4] for text in texts], float)
        return lambda: scores

    scoring, method = answering.Scoring(("zero", "length"), start), Method(ensemble, [1, 1], 1)
    whole, parts = (
        answering.Answerer(toys.task(), examples, scoring, answering.Decoding(3.0, seed=5, rows=rows)).answers(method)
        for rows in (16, 4)
    )
    assert len(set(whole.texts)) > 4
    assert whole.texts == parts.texts
    np.testing.assert_array_equal(whole.scores, parts.scores)
    assert whole.rewards.tolist() == [((text == "0") + len(text) / 4) / 2 for text in whole.texts]


class TestVote:
    @pytest.fixture(scope="class")
    def writers(self, make_chain_lm, make_tokenizer):
        """writers(*digits) -> the methods of members that write always the same digit."""
        tokenizer = make_tokenizer(toys.CHARACTERS)

        def make(*digits):
            methods = []
            for digit in digits:
                logits = np.zeros((toys.END + 1, toys.END + 1), np.float32)
                logits[: len(toys.LETTERS), len(toys.LETTERS) + digit] = 5.0
                logits[len(toys.LETTERS) :, toys.END] = 5.0
                lm = make_chain_lm(logits, tokenizer=tokenizer, name=f"{digit}", end_ids=(toys.END,), context=64)
                methods.append(Method(rj.Ensemble([lm])))
            return methods

        return make

    def picked(self, writers, reward, *digits, oracle=False):
        task = Task("vote", {"test": Examples(["a"], ["3"])}, reward, max_new_tokens=2)
        row = evaluate({"vote": Pick(tuple(writers(*digits)), oracle)}, task)["methods"]["vote"]
        return row["score"]

    def test_the_majority(self, writers):
        assert self.picked(writers, exact_match, 1, 3, 3) == 1.0
        assert self.picked(writers, exact_match, 3, 1, 1) == 0.0

    def test_of_equally_many_the_first(self, writers):
        assert self.picked(writers, exact_match, 3, 2, 1) == 1.0
        assert self.picked(writers, exact_match, 2, 2, 3, 3) == 0.0

    def test_answers_are_the_same_if_the_reward_takes_one_for_the_other(self, writers):
        def parity(text, reference):
            return float((int(text) - int(reference)) % 2 == 0)

        assert self.picked(writers, parity, 2, 1, 3) == 1.0
        assert self.picked(writers, exact_match, 2, 1, 3) == 0.0

    def test_a_reward_that_compares_no_answers(self, writers, capsys):
        def only_three(text, reference):
            if reference != "3":
                raise ValueError(reference)
            return 0.5

        assert self.picked(writers, only_three, 2, 1, 1) == 0.5
        assert "reward failed" not in capsys.readouterr().out


class TestByLikelihood:
    """The toy task as multiple choice: the options are the four digits."""

    @staticmethod
    def options(examples, more=()):
        n = len(examples)
        letters = ["ABCD"[int(reference)] for reference in examples.references]
        return dataclasses.replace(examples, references=letters, options=[(*toys.DIGITS, *more)] * n)

    def task(self):
        task = toys.task()
        splits = {name: self.options(examples) for name, examples in task.splits.items()}
        return dataclasses.replace(task, splits=splits, by_likelihood=True)

    def test_it_scores_what_writing_scores(self, ensemble, agent, raises_input_error):
        task = self.task()
        names = [*SINGLES, "uniform", "static", "schedule", "confidence", "gate", "random", "vote", "oracle"]
        methods = baseline_methods(ensemble, task, names) | {"rlae_ppo": agent}
        rows = evaluate(methods, task)["methods"]
        scores = {name: row["score"] for name, row in rows.items() if name != "random"}
        assert scores == {
            "single:left": 5 / 8,
            "single:right": 3 / 8,
            "uniform": 3 / 8,
            "static": 5 / 8,
            "schedule": 5 / 8,
            "confidence": 3 / 8,
            "gate": 5 / 8,
            "vote": 5 / 8,
            "oracle": 1,
            "rlae_ppo": 1,
        }
        for name in ("router", "shuffled"):
            raises_input_error(
                lambda name=name: baseline_methods(ensemble, task, [name], agents={"rlae_ppo": [agent]}),
                name,
                "likeliest",
            )

    def test_long_options_are_at_no_disadvantage(self, ensemble):
        """Compared with the likelihoods themselves, per byte; prompts may have options of different number."""
        task = self.task()
        examples = self.options(toys.task().split("test").take(6), more=("00", "123"))
        options = [own if i % 2 else own[2:] for i, own in enumerate(examples.options)]
        task = dataclasses.replace(task, splits={"test": dataclasses.replace(examples, options=options)})
        texts = answering.answer_batch(Method(ensemble, [1, 1]), task, task.split("test")).texts
        for prompt, own, text in zip(examples.prompts, options, texts, strict=True):
            (likely,) = ensemble.log_likelihoods([prompt], [own], [1, 1])
            assert text == "ABCDEF"[int(np.argmax([p / len(option) for p, option in zip(likely, own, strict=True)]))]

    def test_the_longest_option_has_room(self, ensemble):
        examples = self.options(toys.task().split("test"), more=("0123012",))
        task = dataclasses.replace(self.task(), splits={"train": examples, "test": examples})
        methods = baseline_methods(ensemble, task, ["schedule", "random"])
        assert methods["schedule"].weights.params.shape == (7, 2)
        assert evaluate(methods, task)["methods"]["schedule"]["score"] == 5 / 8

    def test_agents_learn_from_the_right_options(self, ensemble, tmp_path):
        """Their texts, not the letters."""
        config = dataclasses.replace(toys.SETTINGS, iterations=12)
        policy = rj.train(ensemble, self.task(), config, tmp_path / "run")
        methods = {"agent": Method(ensemble, policy)}
        assert evaluate(methods, self.task())["methods"]["agent"]["score"] > 5 / 8
