"""Fine-tuning in rounds: its directories, going on after an interruption, adapters that know nothing of the others."""

import dataclasses
import errno
import itertools
import json
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import rlae_jax as rj
from rlae_jax import files
from rlae_jax.emorl import embedded, fine_tune, scorers
from rlae_jax.emorl import train as train_module
from rlae_jax.emorl.run import Run
from rlae_jax.emorl.scorers import Objective
from rlae_jax.emorl.train import Target, converged, own_seed, train_adapters
from rlae_jax.errors import OutputError
from rlae_jax.models import LM, LoraConfig, transformer
from rlae_jax.runs.metrics import read_metrics
from rlae_jax.tasks import reflections
from rlae_jax.tasks.prompts import PromptSet

# What the random base writes greedily to the dev prompts; whoever learns anything writes something else.
UNTAUGHT = {"work", "guilt", "keep", "often", "feel", "just"}
NOVELTY = Objective("novelty", lambda prompts, texts: [len(set(text.split()) - UNTAUGHT) / 6 for text in texts])
WORDS = scorers.of_words("words", reflections.tokens()[40:], enough=3)
ONE = Target.of(NOVELTY)
BOTH = Target("both", (NOVELTY, WORDS), "dynaopt_reference")
TIMES = {"seconds", "seconds_shared"}
PROMPTS = PromptSet(
    "few", {split: reflections.prompts().split(split)[:n] for split, n in (("train", 5), ("dev", 3), ("test", 1))}
)


def settings(**changes):
    defaults = {"lora": LoraConfig(rank=2, alpha=4.0, dropout=0.1), "steps": 4, "batch": 2, "samples": 2}
    defaults |= {"accumulate": 1, "max_new_tokens": 6, "validate_every": 2, "validation_prompts": 3}
    return embedded.settings(**defaults | {"learning_rate": 0.05, "schedule": "constant", "window": 9} | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Of the embedded task's architecture and vocabulary, random and smaller, from its directory."""
    small = {"layers": 1, "width": 16, "head_width": 4, "ffn_width": 24}
    encoder = dataclasses.replace(embedded.MODEL.encoder, **small)
    model = dataclasses.replace(embedded.MODEL, **small, encoder=encoder, head_scale=0.25)
    params = transformer.init_params(model, jax.random.key(1))
    params["embedding"] = 2 * params["embedding"]
    directory = tmp_path_factory.mktemp("model") / "base"
    LM(model, params, embedded.make_tokenizer(), name="base").save(directory)
    return rj.load(directory)


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """(directory, adapters, what was reported) of a run that nobody disturbed; do not write into it."""
    out, told = tmp_path_factory.mktemp("finished") / "run", []
    return out, train_adapters(base, [ONE, BOTH], PROMPTS, settings(), out, on_progress=told.append), told


@pytest.fixture(scope="module")
def alone(base, tmp_path_factory):
    """The directory of a run of one of the objectives; do not write into it."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train_adapters(base, [ONE], PROMPTS, settings(), out)
    return out


def rows_of(out, name):
    """Metrics without what time or company decides."""
    rows = read_metrics(out / "objectives" / name)
    return [{key: value for key, value in row.items() if key not in TIMES | {"adapters"}} for row in rows]


def training_of(out, name):
    told = json.loads((out / "objectives" / name / "training.json").read_text())
    return {key: value for key, value in told.items() if key not in TIMES}


def tensors_of(out, name):
    return load_file(out / "objectives" / name / "adapter" / "adapter_model.safetensors")


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def same_adapters(one, other):
    for path, factors in one.params.items():
        for side, factor in factors.items():
            np.testing.assert_array_equal(factor, other.params[path][side])


class TestARun:
    def test_what_its_directory_holds(self, finished, base):
        out, adapters, _ = finished
        config = json.loads((out / "config.json").read_text())
        assert (config["schema"], config["command"]) == (1, "emorl train")
        assert config["base"] == {"name": "base", "path": str(base.path), "sha256": base.fingerprint()}
        assert config["prompts"] == {"name": "few", "sha256": PROMPTS.digest()}
        assert config["settings"]["learning_rate"] == 0.05
        assert sorted(adapters) == ["both", "novelty"]
        assert {path.name for path in (out / "objectives").iterdir()} == set(adapters)
        for name in adapters:
            directory = out / "objectives" / name
            assert {"config.json", "metrics.jsonl", "adapter", "training.json"} <= {p.name for p in directory.iterdir()}
        both = json.loads((out / "objectives" / "both" / "config.json").read_text())
        assert (both["objectives"], both["weighting"]) == (["novelty", "words"], "dynaopt_reference")

    def test_rounds(self, finished):
        out, _, told = finished
        assert [dict(progress.steps) for progress in told] == [{"novelty": n, "both": n} for n in (2, 4)]
        assert [progress.done for progress in told] == [(), ("novelty", "both")]
        for name in ("novelty", "both"):
            rows = rows_of(out, name)
            assert [row["iteration"] for row in rows] == [0, 2, 4]
            assert [row["trained"] for row in rows] == [False, True, True]
            assert [progress.scores[name] for progress in told] == [row["dev"] for row in rows[1:]]
            assert all(row["dev"] == pytest.approx(np.mean(list(row["scores"].values()))) for row in rows)
            assert {"reward", "policy_loss", "kl", "tokens", "ended"} <= set(rows[-1])
        assert [row["adapters"] for row in read_metrics(out / "objectives" / "both")] == [2, 2, 2]
        weights = [row["weights"] for row in rows_of(out, "both")]
        assert weights[0] == [0.5, 0.5]
        assert all(sum(row) == pytest.approx(1) for row in weights)

    def test_what_it_took(self, finished):
        out, _, _ = finished
        for name in ("novelty", "both"):
            rows, told = read_metrics(out / "objectives" / name), training_of(out, name)
            dev = [row["dev"] for row in rows]
            assert (told["steps"], told["data_points"]) == (4, 4 * 2 * 2)
            assert told["validation_points"] == 3 * 3
            assert told["stopping_floor"] == 8 * 2 * 2 * 2
            assert told["converged"] is False
            assert (told["best_dev"], told["best_step"]) == (max(dev), 2 * int(np.argmax(dev)))
            assert (told["best_step"] > 0) == (name == "novelty")
            needed = dev[0] + 0.95 * (max(dev) - dev[0])
            assert told["points_to_95_percent"] == min(2 * i for i, x in enumerate(dev) if x >= needed) * 4
            whole = json.loads((out / "objectives" / name / "training.json").read_text())
            assert whole["seconds"] == pytest.approx(sum(row["seconds"] for row in rows))
            assert whole["seconds_shared"] == pytest.approx(sum(row["seconds"] / 2 for row in rows))

    def test_its_adapters_are_read_by_load(self, finished, base):
        out, adapters, _ = finished
        asked = np.array([base.tokenizer(PROMPTS.split("dev")[0])["input_ids"]])
        texts = np.array([[0, 9, 40, 7]])
        plain = np.asarray(base.logits(asked, None, texts))
        for name, adapter in adapters.items():
            assert adapter.name == name
            stacked = np.asarray(base.with_adapters([adapter]).logits(asked, None, texts))
            directory = out / "objectives" / name / "adapter"
            for loaded in (rj.load(base.path, adapter=directory), rj.load(base.path).with_adapter(directory)):
                np.testing.assert_allclose(loaded.logits(asked, None, texts), stacked, atol=1e-5)
            assert (np.abs(stacked - plain).max() > 1e-3) == (training_of(out, name)["best_step"] > 0)

    def test_one_that_diverges_ends_in_a_line(self, base, tmp_path, monkeypatch):
        update = fine_tune.update

        def diverging(*args):
            stack, metrics = update(*args)
            return stack._replace(value=stack.value.at[0].set(jnp.nan)), metrics

        monkeypatch.setattr(fine_tune, "update", diverging)
        with pytest.raises(rj.InputError, match=rf"the parameters of {ONE.name} are not finite after step \d+"):
            train_adapters(base, [ONE, BOTH], PROMPTS, settings(), tmp_path / "run")

    def test_the_best_on_dev_is_kept(self, finished, base):
        """The adapter that was written scores on dev what was best there."""
        out, adapters, _ = finished
        asked = PROMPTS.split("dev")
        for name, adapter in adapters.items():
            texts = rj.Ensemble([base.with_adapter(adapter)]).generate(asked, max_new_tokens=6).texts
            objectives = (ONE if name == "novelty" else BOTH).objectives
            score = np.mean([objective(asked, texts).mean() for objective in objectives])
            assert score == pytest.approx(training_of(out, name)["best_dev"])


class TestResuming:
    def test_after_a_round(self, finished, base, tmp_path):
        out, adapters, _ = finished
        half = train_adapters(base, [ONE, BOTH], PROMPTS, settings(), tmp_path / "run", max_minutes=0)
        assert half == {}
        assert [row["iteration"] for row in rows_of(tmp_path / "run", "both")] == [0, 2]
        assert not (tmp_path / "run" / "objectives" / "both" / "adapter").exists()
        resumed = train_adapters(base, [ONE, BOTH], PROMPTS, settings(), tmp_path / "run", resume=True)
        for name, adapter in resumed.items():
            same_adapters(adapter, adapters[name])
            one, other = (contents(run / "objectives" / name / "adapter") for run in (tmp_path / "run", out))
            assert one == other
            assert rows_of(tmp_path / "run", name) == rows_of(out, name)
            assert training_of(tmp_path / "run", name) == training_of(out, name)

    @pytest.mark.parametrize("lost", ["both/checkpoints/2", "stack.json", "both/adapter"])
    def test_between_two_adapters_writes(self, finished, base, tmp_path, monkeypatch, lost):
        """One has a checkpoint, or is done, and the other has not: both go on from where both were."""
        out, _, _ = finished
        run = tmp_path / "run"
        monkeypatch.setattr("rlae_jax.emorl.train._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        told = []

        def full(path):
            told.extend([path] if str(path).endswith(lost) else [])
            if len(told) == (5 if lost == "stack.json" else 1):  # not where it is begun, which is four
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(files, "before_write", full)
            with pytest.raises(OutputError):
                train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run)
        train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run, resume=True)
        for name in ("novelty", "both"):
            assert rows_of(run, name) == rows_of(out, name)
            assert contents(run / "objectives" / name / "adapter") == contents(out / "objectives" / name / "adapter")
            assert [row["adapters"] for row in read_metrics(run / "objectives" / name)] == [2] * len(rows_of(out, name))

    def test_metrics_beyond_the_checkpoint_are_written_again(self, finished, base, tmp_path):
        """As after a crash between a validation and the next checkpoint."""
        out, _, _ = finished
        run = tmp_path / "run"
        train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run, max_minutes=0)
        for name in ("novelty", "both"):
            with (run / "objectives" / name / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"iteration": 4, "dev": 0.0, "scores": {}, "trained": True}) + "\n" + '{"itera')
        train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run, resume=True)
        for name in ("novelty", "both"):
            assert rows_of(run, name) == rows_of(out, name)
            assert contents(run / "objectives" / name / "adapter") == contents(out / "objectives" / name / "adapter")

    def test_with_no_more_steps_than_were_done(self, base, tmp_path):
        run = tmp_path / "run"
        train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run, max_minutes=0)
        ended = train_adapters(base, [ONE, BOTH], PROMPTS, settings(steps=2), run, resume=True)
        assert set(ended) == {"novelty", "both"}
        assert [row["iteration"] for row in rows_of(run, "both")] == [0, 2]

    def test_what_is_done_is_read(self, finished, base, tmp_path, monkeypatch):
        run = Path(shutil.copytree(finished[0], tmp_path / "run"))
        monkeypatch.setattr(train_module._Loop, "round", lambda *args: pytest.fail("trained again"))
        again = train_adapters(base, [ONE, BOTH], PROMPTS, settings(), run, resume=True)
        for name, adapter in again.items():
            same_adapters(adapter, finished[1][name])
        assert contents(run) == contents(finished[0])


class TestDamage:
    @pytest.mark.parametrize(
        "lost", ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "training.json"]
    )
    @pytest.mark.parametrize("gone", [True, False])
    def test_an_adapter_that_is_not_whole_is_told_and_trained_again(self, base, finished, tmp_path, lost, gone):
        out = shutil.copytree(finished[0], tmp_path / "run")
        path = out / "objectives" / "novelty" / lost
        if gone:
            path.unlink()
        else:
            content = bytearray(path.read_bytes())
            # Of JSON a letter of the first key: times, which are further on, have no digest.
            content[content.index(b'"') + 1 if path.suffix == ".json" else len(content) // 3] ^= 1
            path.write_bytes(content)
        if lost != "training.json":
            with pytest.raises(rj.InputError, match=r"digest|missing"):
                rj.load_adapter(path.parent, base)
        elif gone:
            assert "novelty" not in Run(out).targets()
        warned = [] if gone and lost == "training.json" else ["novelty is trained again"]
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            train_adapters(base, [ONE, BOTH], PROMPTS, settings(), out, resume=True)
        assert [str(one.message).rpartition("; ")[2] for one in told] == warned
        for name in ("novelty", "both"):
            found, expected = (tensors_of(where, name) for where in (out, finished[0]))
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                np.testing.assert_array_equal(found[key], tensor)
            assert training_of(out, name) == training_of(finished[0], name)


class TestIndependence:
    def test_an_objective_that_comes_later(self, alone, base, tmp_path):
        """It learns what it learns in a run of its own, and the others' files stay as they are."""
        run = tmp_path / "run"
        other = Target.of(WORDS)
        train_adapters(base, [other], PROMPTS, settings(), run)
        before = contents(run / "objectives" / "words")
        later = train_adapters(base, [ONE], PROMPTS, settings(), run)
        assert sorted(later) == ["novelty"]
        assert contents(run / "objectives" / "words") == before
        found, expected = (tensors_of(where, "novelty") for where in (run, alone))
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            np.testing.assert_allclose(found[key], tensor, atol=1e-5)
        assert rows_of(run, "novelty") == rows_of(alone, "novelty")
        assert training_of(run, "novelty") == training_of(alone, "novelty")
        everything = train_adapters(base, [other, ONE], PROMPTS, settings(), run, resume=True)
        assert sorted(everything) == ["novelty", "words"]
        assert contents(run / "objectives" / "words") == before

    def test_company_does_not_matter(self, alone, finished):
        """In one stack with another adapter it learns the same, but for rounding."""
        for own, among in zip(rows_of(alone, "novelty"), rows_of(finished[0], "novelty"), strict=True):
            assert own.keys() == among.keys()
            assert (own["dev"], own["iteration"]) == (among["dev"], among["iteration"])
            for name in own.keys() - {"scores"}:
                assert own[name] == pytest.approx(among[name], rel=1e-3, abs=1e-4), name

    def test_what_has_converged_leaves_the_stack(self, base, tmp_path):
        """A constant objective after `window` validations; the other goes on."""
        constant = Objective("constant", lambda prompts, texts: [1.0] * len(texts), low=1.0)
        calls = iter(range(1_000))
        restless = Objective("restless", lambda prompts, texts: [next(calls) % 7 / 6 for _ in texts])
        told, now = [], []

        def on_progress(progress):
            told.append(progress)
            now.extend(progress.adapter(name) for name in progress.steps)

        config = settings(steps=6, window=2, threshold=0.01)
        train_adapters(
            base, [Target.of(constant), Target.of(restless)], PROMPTS, config, tmp_path, on_progress=on_progress
        )
        assert [dict(progress.steps) for progress in told] == [
            {"constant": 2, "restless": 2},
            {"restless": 4},
            {"restless": 6},
        ]
        assert [progress.done for progress in told] == [("constant",), (), ("restless",)]
        assert [adapter.name for adapter in now] == ["constant", "restless", "restless", "restless"]
        for before, after in itertools.pairwise(now[1:]):
            leaves = zip(*(jax.tree.leaves(adapter.params) for adapter in (before, after)), strict=True)
            assert not all(np.array_equal(x, y) for x, y in leaves)
        one, other = (training_of(tmp_path, name) for name in ("constant", "restless"))
        assert (one["converged"], one["steps"], one["data_points"]) == (True, 2, 8)
        assert (other["steps"], other["data_points"]) == (6, 24)
        assert one["stopping_floor"] == 1 * 2 * 2 * 2
        rows = read_metrics(tmp_path / "objectives" / "restless")
        assert [row["adapters"] for row in rows] == [2, 2, 1, 1]


class TestBadInput:
    def test_names(self, base, tmp_path, raises_input_error):
        twice = [ONE, Target("novelty", (WORDS,)), Target.of(WORDS)]
        raises_input_error(
            lambda: train_adapters(base, twice, PROMPTS, settings(), tmp_path / "run"), "novelty", "once"
        )
        raises_input_error(lambda: train_adapters(base, [], PROMPTS, settings(), tmp_path / "run"), "at least one")
        assert not (tmp_path / "run").exists()

    def test_what_is_there_already(self, alone, base, raises_input_error):
        before = contents(alone)
        raises_input_error(
            lambda: train_adapters(base, [Target.of(WORDS), ONE], PROMPTS, settings(), alone), "novelty", "resume"
        )
        assert contents(alone) == before

    def test_another_run(self, alone, base, raises_input_error):
        before = contents(alone)
        words = Target.of(WORDS)
        fewer = PromptSet("few", PROMPTS.splits | {"train": PROMPTS.split("train")[:4]})
        other = dataclasses.replace(base, params=jax.tree.map(lambda leaf: leaf + 1, base.params))
        for attempt, part in (
            (lambda: train_adapters(base, [words], PROMPTS, settings(batch=1), alone), "settings.batch"),
            (lambda: train_adapters(base, [words], PROMPTS, settings(seed=1), alone, resume=True), "settings.seed"),
            (lambda: train_adapters(base, [words], fewer, settings(), alone), "prompts.sha256.train"),
            (lambda: train_adapters(other, [words], PROMPTS, settings(), alone), "base.sha256"),
            (
                lambda: train_adapters(base, [Target("novelty", (WORDS,))], PROMPTS, settings(), alone, resume=True),
                "objectives",
            ),
        ):
            raises_input_error(attempt, "another configuration", part)
        assert contents(alone) == before

    def test_prompts_and_tokenizers(self, base, tmp_path, raises_input_error):
        bare = dataclasses.replace(base, tokenizer=None)
        raises_input_error(lambda: train_adapters(bare, [ONE], PROMPTS, settings(), tmp_path / "run"), "tokenizer")
        empty = PromptSet("few", PROMPTS.splits | {"dev": ()})
        raises_input_error(lambda: train_adapters(base, [ONE], empty, settings(), tmp_path / "run"), "dev", "empty")
        assert not (tmp_path / "run").exists()


class TestConverged:
    def test_against_numpy(self):
        rng = np.random.default_rng(0)
        for _ in range(50):
            scores = (0.5 + rng.normal(0, 0.01, 30)).tolist()
            for window in (2, 5, 20):
                for threshold in (0.005, 0.015, 0.03):
                    last = np.array(scores)[-window:]
                    assert converged(scores, window, threshold) == (np.std(last) / np.mean(last) < threshold)

    def test_by_hand(self):
        assert not converged([0.5, 0.5], window=3, threshold=0.1)  # too few
        assert converged([0.0, 0.5, 0.5, 0.5], window=3, threshold=0.1)
        assert not converged([0.4, 0.5, 0.6], window=3, threshold=0.1)  # 0.0816 / 0.5 = 0.163
        assert converged([0.4, 0.5, 0.6], window=3, threshold=0.17)
        assert converged([-0.4, -0.5, -0.6], window=3, threshold=0.17)


def test_a_name_has_a_seed_of_its_own():
    names = [f"objective-{n}" for n in range(200)]
    assert len({own_seed(name, 0) for name in names}) == 200
    assert own_seed("warmth", 0) == own_seed("warmth", 0) != own_seed("warmth", 1)
    assert all(0 <= own_seed(name, 5) < 2**31 for name in names)
