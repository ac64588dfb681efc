"""The model of lm-evaluation-harness: its numbers are those of `log_likelihoods`, `generate` and `evaluate`."""

import sys

import numpy as np
import pytest
from transformers import AutoTokenizer

import rlae_jax as rj
from rlae_jax.commands import main as commands
from rlae_jax.evaluation import baseline_methods, evaluate
from rlae_jax.tasks import Examples, Task, get_reward
from tests.helpers.harness import TASKS, asked_and_told, copy_tasks, run
from tests.helpers.tokenizers import byte_level

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from rlae_jax.lm_eval import EnsembleLM

WEIGHTS = [0.3, 0.7]


@pytest.fixture(scope="module")
def models(shared, make_lm, tmp_path_factory):
    """Two members with one tokenizer, in directories of their own."""
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    root = tmp_path_factory.mktemp("models")
    for k, name in enumerate(("alpha", "beta")):
        fields = {"vocab": 512, "layers": 1, "context": 96, "end_ids": (2,), "bos_id": 1}
        make_lm(k, tokenizer=stories, **fields).save(root / name)
    return [root / "alpha", root / "beta"]


@pytest.fixture(scope="module")
def ensemble(models):
    return rj.Ensemble([rj.load(path) for path in models])


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    return copy_tasks(tmp_path / "tasks")


def instances(kind, *arguments):
    return [Instance(kind, {}, own, i) for i, own in enumerate(arguments)]


def test_two_tasks(ensemble, tasks):
    """Each option's likelihood, and what `evaluate` makes of them."""
    results, even = (run(EnsembleLM(ensemble, weights=weights), tasks) for weights in (WEIGHTS, None))
    for name in TASKS:
        prompts, options, letters, told = asked_and_told(results, name)
        np.testing.assert_allclose(told, ensemble.log_likelihoods(prompts, options, WEIGHTS), rtol=1e-5)
        examples = Examples(prompts, letters, options)
        task = Task(name, {"train": examples, "test": examples}, get_reward("multiple_choice"), by_likelihood=True)
        methods = baseline_methods(rj.Ensemble(ensemble.members), task, ["uniform"])
        score = evaluate(methods, task)["methods"]["uniform"]["score"]
        assert score == pytest.approx(even["results"][name]["acc,none"])


def test_a_text_without_context(ensemble):
    """The rest of it, and what is put before it, as the harness does for its other models."""
    lm = EnsembleLM(ensemble, weights=WEIGHTS)
    (found, greedy), (empty, _), _ = lm.loglikelihood(
        instances("loglikelihood", ("Once upon ", "a time"), ("", "Once upon"), ("a" * 300, " b"))
    )
    (expected,) = ensemble.log_likelihoods(["Once upon"], [[" a time"]], WEIGHTS)
    assert found == pytest.approx(float(expected[0]), rel=1e-5)
    assert not greedy
    ids = ensemble.tokenizer("Once upon", add_special_tokens=False)["input_ids"]
    (one,) = ensemble.score_tokens([[1]], [ids], WEIGHTS)
    assert empty == pytest.approx(float(one.fused.sum()), rel=1e-5)


def test_what_is_written_greedily_is_greedy(ensemble):
    lm = EnsembleLM(ensemble)
    (text,) = lm.generate_until(instances("generate_until", ("Once upon", {"until": ["</s>"], "max_gen_toks": 6})))
    out = ensemble.generate(["Once upon"], max_new_tokens=6)
    assert text == out.texts[0]
    row, tokens = ensemble.encode(["Once upon"]), out.tokens
    keys = ["one", "other"]
    other = [(tokens[0][0] + 1) % 512, *tokens[0][1:]]
    assert [greedy for _, greedy in lm._score(row * 2, [tokens[0], other], keys=keys)] == [True, False]


def test_generation(ensemble):
    """Requests of different options, contexts that are too long, stop strings."""
    lm = EnsembleLM(ensemble, weights=WEIGHTS, batch_size=2)
    long = "a big dog " * 60
    asked = [("The cat", 5), (long, 5), ("Lily", 9), ("Tim", 5)]
    requests = instances("generate_until", *((text, {"until": ["\n"], "max_gen_toks": n}) for text, n in asked))
    found = lm.generate_until(requests)
    for (text, n), one in zip(asked, found, strict=True):
        ids = [ensemble.tokenizer(text)["input_ids"][-(96 - n) :]]
        options = {"prompt_ids": ids, "prompt_mask": np.ones_like(ids), "stop": ["\n"], "max_new_tokens": n}
        assert one == ensemble.generate(weights=WEIGHTS, **options).texts[0]


def test_rolling_windows(ensemble):
    """Each token once, in windows of the context's length."""
    lm = EnsembleLM(ensemble, weights=WEIGHTS)
    text = "Once upon a time there was a dog and a cat. " * 15
    long, none = lm.loglikelihood_rolling(instances("loglikelihood_rolling", (text,), ("",)))
    ids = ensemble.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > 2 * 96
    total = 0.0
    for start in range(0, len(ids), 96):
        end = min(start + 96, len(ids))
        row = [1] if not start else ids[end - 97 : start]
        total += float(ensemble.score_tokens([row], [ids[start:end]], WEIGHTS)[0].fused.sum())
    assert long == pytest.approx(total, rel=1e-5)
    assert none == 0


class TestDifferentTokenizers:
    @pytest.fixture(scope="class")
    def mixed(self, ensemble, make_lm):
        tokenizer = byte_level([b" the", b" a", b"on"])
        fields = {"vocab": len(tokenizer), "layers": 1, "context": 96, "end_ids": (tokenizer.eos_token_id,)}
        return rj.Ensemble([ensemble.members[0], make_lm(5, tokenizer=tokenizer, name="bytes", **fields)])

    def test_likelihoods(self, mixed):
        lm = EnsembleLM(mixed, weights=WEIGHTS)
        asked = ("Once upon ", "a time"), ("", "Once")
        (found, _), (empty, _) = lm.loglikelihood(instances("loglikelihood", *asked))
        (expected,) = mixed.log_likelihoods(["Once upon"], [[" a time"]], WEIGHTS)
        assert found == pytest.approx(float(expected[0]), rel=1e-5)
        assert np.isfinite(empty)
        (text,) = lm.generate_until(instances("generate_until", ("Once upon", {"until": [], "max_gen_toks": 4})))
        assert text == mixed.generate(["Once upon"], WEIGHTS, max_new_tokens=4).texts[0]

    def test_windows_hold_every_entry_once(self, mixed, raises_input_error):
        lm = EnsembleLM(mixed)
        text = "Once upon a time there was a dog. " * 9
        windows = lm._windows(text)
        entries = mixed.codec.continuation("", text, False)
        assert [entry for _, own in windows for entry in own] == entries
        for row, own in windows:
            spelled = mixed.codec.spell(own)
            assert all(len(ids) + sum(counts) <= 96 for ids, (_, counts) in zip(row, spelled, strict=True))
        assert len(windows) > 2
        raises_input_error(lambda: lm.apply_chat_template([{"role": "user", "content": "a"}]), "different")


def test_chat(models, ensemble):
    members = [rj.load(path) for path in models]
    for lm in members:
        lm.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lm = EnsembleLM(rj.Ensemble(members))
    text = lm.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text == "<s>user: hello\n"
    assert lm.chat_template(True) == members[0].tokenizer.chat_template
    assert lm.tok_encode(text).count(1) == 1
    assert lm.tokenizer_name == "alpha+beta"


def test_by_its_name(models, raises_input_error):
    names = ";".join(map(str, models))
    lm = get_model("rlae_jax").create_from_arg_string(f"models={names},weights=1;3,fusion=loglinear", {"device": "cpu"})
    assert isinstance(lm, EnsembleLM)
    assert lm.weights == [1, 3]
    assert lm.batch_size == 32
    made = EnsembleLM.create_from_arg_obj({"models": list(map(str, models)), "policy": "confidence"}, {"batch_size": 4})
    assert (made.weights, made.batch_size) == ("confidence", 4)
    raises_input_error(lambda: EnsembleLM(lm.ensemble, weights=[1, 2], policy="gate"), "either")


def test_the_command(models, tasks, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(commands.CACHE_VARIABLE, "off")

    class Few(TaskManager):
        def __init__(self, **given):
            super().__init__(include_defaults=False, **given)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)

    def call(*arguments):
        given = ["rlae-jax", "lm-eval", "--models", *models, "--include-path", tasks, "--tasks", *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, given)))
        try:
            commands.main()
        except SystemExit as ending:
            return ending.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    status, out, _ = call("animals", "--weights", 1, 2, "--limit", 3, "--out", tmp_path / "found.json")
    assert (status, "animals" in out, "|acc" in out.replace(" ", "")) == (0, True, True)
    assert '"n-samples"' in (tmp_path / "found.json").read_text()
    assert "left" not in out  # too quick
    status, _, err = call("nothing")
    assert (status, err) == (2, "error: unknown tasks: nothing; lm-eval ls tasks lists them\n")
    assert call("ways", "--limit", "0")[0] == 2
    broken = tasks / "broken.yaml"
    broken.write_text("task: broken\noutput_type: nonesuch\n")
    try:
        status, _, err = call("broken")
    finally:
        broken.unlink()
    assert (status, err.splitlines()[-1].startswith("error: the tasks broken cannot be made: ")) == (2, True)
