"""Ablations: what can be varied and how it is written, grids with cells that fail, going on, tables and pictures."""

import dataclasses
import itertools
import json
import signal

import numpy as np
import pytest
from scipy import stats

import rlae_jax as rj
from rlae_jax import ablate as ablation
from rlae_jax import files, report
from rlae_jax.ablate import ablate, configured, make_cells, parse_settings, parse_vary
from rlae_jax.config import ALGORITHMS, MAPPOConfig, PPOConfig
from rlae_jax.errors import Interrupted
from rlae_jax.runs.metrics import read_metrics
from tests.helpers import toys

BASE = dataclasses.replace(toys.SETTINGS, iterations=2, prompts=16, epochs=1, eval_every=2, eval_prompts=8, seeds=2)
# Without a text encoder the second cell is none.
VARY = {"agent.projection": [4], "encoder": ["hidden", "text", "none"]}


@pytest.fixture(scope="module")
def ensemble(make_chain_lm, make_tokenizer):
    return rj.Ensemble(toys.members(make_chain_lm, make_tokenizer))


@pytest.fixture(scope="module")
def finished(ensemble, tmp_path_factory):
    """(directory, returned results, what was printed) of a grid; do not write into it."""
    out = tmp_path_factory.mktemp("ablation") / "grid"
    with report.console.capture() as printed:
        results = ablate(ensemble, toys.task(), BASE, VARY, out)
    return out, results, printed.get()


class TestFields:
    def test_every_field_of_the_settings_can_be_varied(self):
        names = set(ablation.variable_fields(PPOConfig()))
        own = {field.name for field in dataclasses.fields(PPOConfig)} - {"agent"}
        of_agent = {f"agent.{field.name}" for field in dataclasses.fields(PPOConfig().agent)}
        assert names == own | of_agent | {"algo", "encoder"}

    @pytest.mark.parametrize(
        ("text", "values"),
        [
            ("span_length=2,none", [2, None]),
            ("learning_rate=1e-3,0.5", [1e-3, 0.5]),
            ("schedule=linear,cosine", ["linear", "cosine"]),
            ("agent.share_actors=true,false", [True, False]),
            ("agent.reads=hidden+stats,span", [("hidden", "stats"), ("span",)]),
            ("agent.span_lengths=none,1+2+4", [(), (1, 2, 4)]),
            ("agent.encoder=none,a/b", [None, "a/b"]),
            ("target_kl=none,1", [None, 1.0]),
            ("algo=ppo,mappo", ["ppo", "mappo"]),
            ("encoder=hidden,text:x/y", ["hidden", "text:x/y"]),
        ],
    )
    def test_values_are_read_by_the_fields_type_and_written_back(self, text, values):
        (found,) = parse_vary([text], PPOConfig()).items()
        assert found == (text.partition("=")[0], values)
        assert [type(value) for value in found[1]] == [type(value) for value in values]
        again = parse_vary([f"{found[0]}={','.join(map(ablation.as_text, values))}"], PPOConfig())
        assert again == dict([found])

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("span_lenght=2", ("'span_lenght'", "span_length", "agent.span_lengths")),
            ("reads=span", ("'reads'", "agent.reads")),
            ("agent=1", ("'agent'",)),
            ("agent.span_length=1", ("'agent.span_length'", "agent.span_lengths", "span_length")),
            ("span_length=x", ("span_length=x", "a whole number or none")),
            ("span_length=2.5", ("span_length=2.5", "a whole number")),
            ("iterations=none", ("iterations=none", "a whole number")),
            ("learning_rate=nan", ("learning_rate=nan", "a finite number")),
            ("agent.share_actors=yes", ("true or false",)),
            ("agent.span_lengths=1+x", ("agent.span_lengths=x", "a whole number")),
            ("schedule=", ("schedule=",)),
            ("span_length", ("'span_length'", "FIELD=VALUE")),
            ("=3", ("'=3'", "FIELD=VALUE")),
        ],
    )
    def test_what_cannot_be_read(self, raises_input_error, text, parts):
        raises_input_error(lambda: parse_vary([text], PPOConfig()), *parts)
        raises_input_error(lambda: parse_settings([text], PPOConfig()), *parts)

    def test_a_field_given_twice(self, raises_input_error):
        texts = ["seed=1", "seed=2"]
        raises_input_error(lambda: parse_vary(texts, PPOConfig()), "seed is given twice", "seed=V1,V2")

    def test_changes_apply_all_at_once(self):
        base = PPOConfig.paper()
        found = configured(base, {"algo": "mappo", "agent.projection": 3, "clip": 0.1, "agent.reads": ("stats",)})
        agent = dataclasses.replace(base.agent, projection=3, reads=("stats",))
        assert found == MAPPOConfig.paper(clip=0.1, agent=agent)
        assert configured(found, {"algo": "ppo"}) == PPOConfig.paper(clip=0.1, agent=agent)
        assert configured(base, {}) == base

    @pytest.mark.parametrize(
        ("value", "reads", "encoder"),
        [
            ("hidden", ("hidden", "stats", "span"), None),
            ("text", ("text", "stats", "span"), "base"),
            ("both:other", ("hidden", "text", "stats", "span"), "other"),
            ("none", ("stats", "span"), None),
        ],
    )
    def test_an_encoder_is_what_is_read(self, value, reads, encoder):
        base = configured(PPOConfig(), {"agent.encoder": "base", "agent.reads": ("text",)})
        agent = configured(base, {"encoder": value}).agent
        assert (agent.reads, agent.encoder) == (reads, encoder)

    def test_what_does_not_go_together(self, raises_input_error):
        base = PPOConfig()
        raises_input_error(lambda: configured(base, {"encoder": "txt"}), "'txt'", "hidden, text, both, none")
        raises_input_error(lambda: configured(base, {"algo": "a2c"}), "'a2c'", "ppo, mappo")
        raises_input_error(lambda: configured(base, {"encoder": "hidden", "agent.reads": ("span",)}), "agent.reads")
        raises_input_error(lambda: configured(base, {"encoder": "text"}), "needs an encoder")


class TestCells:
    def test_they_are_the_product_of_the_values(self):
        vary = {"span_length": [1, 2], "algo": ["ppo", "mappo"], "agent.reads": [("hidden", "span")]}
        cells = make_cells(BASE, vary)
        assert [cell.name for cell in cells] == [
            f"span_length={n},algo={algo},agent.reads=hidden+span" for n in (1, 2) for algo in ("ppo", "mappo")
        ]
        for cell, (n, algo) in zip(cells, itertools.product((1, 2), ("ppo", "mappo")), strict=True):
            assert type(cell.config) is ALGORITHMS[algo]
            assert (cell.config.span_length, cell.config.agent.reads) == (n, ("hidden", "span"))
            assert cell.config.learning_rate == BASE.learning_rate

    def test_a_combination_that_there_is_not_is_a_cell_with_an_error(self):
        cells = make_cells(BASE, {"algo": ["ppo", "mappo"], "encoder": ["none"], "agent.distribution": ["dirichlet"]})
        assert [cell.error for cell in cells] == [None, None]
        ppo, mappo = make_cells(BASE, {"algo": ["ppo", "mappo"], "agent.distribution": ["logistic_normal"]})
        assert (ppo.error, mappo.config) == (None, None)
        assert "Dirichlet" in mappo.error

    def test_names_are_names_of_directories(self):
        (cell,) = make_cells(BASE, {"encoder": ["text:a/b c"]})
        assert cell.name == "encoder=text_a_b_c"

    def test_grids_that_cannot_be(self, raises_input_error):
        raises_input_error(lambda: make_cells(BASE, {}), "nothing to vary", "--vary span_length=2,4,8")
        raises_input_error(lambda: make_cells(BASE, {"seed": [1, 2, 1]}), "seed", "different values", "1,2,1")
        raises_input_error(lambda: make_cells(BASE, {"seed": []}), "seed")
        raises_input_error(lambda: make_cells(BASE, {"sead": [1]}), "'sead'", "seed")
        raises_input_error(
            lambda: make_cells(BASE, {"prompts": [0, -1]}), "every cell failed", "2 cells", "prompts=0: prompts is 0"
        )


def test_the_interval_is_students():
    scores = [0.2, 0.5, 0.9, 0.4]
    expected = stats.t.interval(0.95, 3, loc=np.mean(scores), scale=stats.sem(scores))
    np.testing.assert_allclose(ablation.interval_over_seeds(scores), expected, rtol=1e-9)
    assert ablation.interval_over_seeds([0.5, 0.5]) == (0.5, 0.5)
    assert ablation.interval_over_seeds([0.0, 1.0]) == (0.0, 1.0)  # as far as rewards go


@pytest.mark.slow
class TestAGrid:
    def test_results(self, finished):
        out, results, _ = finished
        assert files.read_json(out / "results.json") == json.loads(json.dumps(results))
        assert (results["task"], results["split"], results["n"], results["seeds"]) == ("toy", "dev", 32, [0, 1])
        assert results["vary"] == VARY
        cells = results["cells"]
        assert [cell["settings"] for cell in cells] == [
            {"agent.projection": 4, "encoder": encoder} for encoder in VARY["encoder"]
        ]
        for cell in cells:
            if cell["settings"]["encoder"] == "text":
                assert "needs an encoder" in cell["error"]
                assert (cell["score"], cell["ci95"], cell["per_seed"]) == (None, None, [])
                assert not (out / cell["directory"]).exists()
                continue
            assert cell["error"] is None
            assert len(cell["per_seed"]) == 2
            assert cell["score"] == pytest.approx(np.mean(cell["per_seed"]))
            np.testing.assert_allclose(cell["ci95"], ablation.interval_over_seeds(cell["per_seed"]))
            assert cell["seconds"] > 0

    def test_a_cell_is_a_run_that_the_score_belongs_to(self, finished, ensemble):
        out, results, _ = finished
        for cell in results["cells"]:
            if cell["error"] is None:
                policies = [rj.load_policy(out / cell["directory"], seed=seed) for seed in (0, 1)]
                dev = toys.task().splits["dev"]
                texts = [ensemble.generate(dev.prompts, policy, max_new_tokens=2).texts for policy in policies]
                right = [np.mean(np.array(written) == np.array(dev.references)) for written in texts]
                np.testing.assert_allclose(cell["per_seed"], right)
                rows = read_metrics(out / cell["directory"])
                assert [row["iteration"] for row in rows] == [1, 2]

    def test_tables_and_pictures(self, finished):
        out, results, printed = finished
        head, sides, *rest = (out / "table.md").read_text().splitlines()
        assert head == "| agent.projection | encoder | score | 95% interval | seconds |"
        assert sides == "| :-- | :-- | --: | --: | --: |"
        rows = [line for line in rest if line.startswith("|")]
        assert len(rows) == 3
        assert rows[0].startswith(f"| 4 | hidden | {results['cells'][0]['score']:.3f} |")
        assert rows[1].startswith("| 4 | text | failed |")
        assert "mean of 2 seeds" in (out / "table.md").read_text()
        assert "agent.projection=4,encoder=text failed: to read" in (out / "table.md").read_text()
        for field in VARY:
            assert (out / f"{field}.png").read_bytes().startswith(b"\x89PNG")
        with report.console.capture() as shown:
            report.console.print(ablation.table(results))
        assert shown.get().count("failed") == 2  # the score and the reason
        assert "agent.projection=4,encoder=text cannot run: to read" in printed
        assert "2 more to run" not in printed
        assert "1 more to run, about" in printed

    def test_lines_of_a_picture(self, finished):
        _, results, _ = finished
        hidden, _, none = ((cell["score"], *(cell["ci95"] or ())) for cell in results["cells"])
        assert ablation.lines_over(results, "encoder") == {"agent.projection=4": [hidden, None, none]}
        lines = {"encoder=hidden": [hidden], "encoder=text": [None], "encoder=none": [none]}
        assert ablation.lines_over(results, "agent.projection") == lines

    def test_many_lines_become_their_mean_and_range(self, tmp_path):
        vary = {"seed": [1, 2], "prompts": list(range(1, 11))}
        cells = [
            {"settings": {"seed": s, "prompts": p}, "score": s + p, "ci95": [0, 1], "error": "x" if p == s else None}
            for s in vary["seed"]
            for p in vary["prompts"]
        ]
        results = {"vary": vary, "cells": cells}
        (line,) = ablation.lines_over(results, "seed").values()
        assert line == [(1 + np.mean(range(2, 11)), 3, 11), (2 + (55 - 2) / 9, 3, 12)]
        report.scores_over(tmp_path / "x.png", ["1", "2"], ablation.lines_over(results, "seed"), "seed", "title")
        assert (tmp_path / "x.png").is_file()

    @pytest.mark.slow
    @pytest.mark.rare
    def test_a_cells_own_answer_length_is_scored(self, ensemble, tmp_path):
        # An answer is a digit and the end; after one step it has no end, but its text is right all the same.
        base = dataclasses.replace(BASE, seeds=1)
        vary = {"max_new_tokens": [1, 3]}
        results = ablate(ensemble, toys.task(token_reward=False), base, vary, tmp_path / "out", split="test", limit=5)
        assert results["n"] == 5
        for cell, steps in zip(results["cells"], (1, 3), strict=True):
            predictions = (tmp_path / "out" / cell["directory"] / "predictions.jsonl").read_text().splitlines()
            rows = list(map(json.loads, predictions))
            assert len(rows) == 5
            assert {row["finish_reason"] for row in rows} == ({"length"} if steps == 1 else {"stop"})
            assert len(cell["ci95"]) == 2  # over the prompts


SEEDS = {"seed": [0, 5], "agent.projection": [4]}


class TestGoingOn:
    @pytest.fixture
    def trained(self, monkeypatch):
        """Names of the cells that were trained."""
        names = []
        original = ablation.train_seeds

        def train_seeds(ensemble, task, config, out, **options):
            names.append(out.name)
            if config.seed == 5 and self.failing:
                raise MemoryError("no\nroom")
            return original(ensemble, task, config, out, **options)

        monkeypatch.setattr(ablation, "train_seeds", train_seeds)
        return names

    failing = False

    @pytest.mark.slow
    def test_a_failed_cell_is_not_fatal_and_is_tried_again(self, ensemble, tmp_path, trained):
        self.failing = True
        first = ablate(ensemble, toys.task(), BASE, SEEDS, tmp_path / "out")
        one, two = first["cells"]
        assert (one["error"], two["error"]) == (None, "MemoryError: no room")
        self.failing = False
        again = ablate(ensemble, toys.task(), BASE, SEEDS, tmp_path / "out", resume=True)
        names = [f"seed={seed},agent.projection=4" for seed in (0, 5)]
        assert trained == [names[0], names[1], names[1]]
        assert again["cells"][0] == one
        assert again["cells"][1]["error"] is None
        # Other prompts are answered by the same agents.
        fewer = {"seed": [5], "agent.projection": [4]}
        other = ablate(ensemble, toys.task(), BASE, fewer, tmp_path / "out", split="train", resume=True)
        assert other["n"] == 64
        assert [row["iteration"] for row in read_metrics(tmp_path / "out" / "cells" / names[1])] == [1, 2]

    def test_when_all_fail(self, ensemble, tmp_path, trained, raises_input_error):
        self.failing = True
        out = tmp_path / "out"
        raises_input_error(
            lambda: ablate(ensemble, toys.task(), BASE, {"seed": [5]}, out), "every cell failed", "MemoryError: no room"
        )
        assert files.read_json(out / "results.json")["cells"][0]["error"] == "MemoryError: no room"

    @pytest.mark.slow
    @pytest.mark.rare  # interrupting and going on are `ppo.train`'s, and tested there
    def test_ctrl_c(self, ensemble, tmp_path):
        out = tmp_path / "out"
        vary = {"agent.projection": [4]}
        config = dataclasses.replace(BASE, iterations=3, eval_every=1)
        original = ablation.train_seeds

        def train_seeds(*args, on_progress, **options):
            def interrupt(progress):
                on_progress(progress)
                if progress.iteration == 1:
                    signal.raise_signal(signal.SIGINT)

            return original(*args, on_progress=interrupt, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ablation, "train_seeds", train_seeds)
            with pytest.raises(Interrupted, match="after iteration 2 of 3"):
                ablate(ensemble, toys.task(), config, vary, out)
        (cell,) = ablate(ensemble, toys.task(), config, vary, out, resume=True)["cells"]
        assert cell["error"] is None
        assert [row["iteration"] for row in read_metrics(out / cell["directory"])] == [1, 2, 3]

    def test_other_settings_and_other_directories(self, finished, ensemble, tmp_path, raises_input_error):
        out = finished[0]
        raises_input_error(lambda: ablate(ensemble, toys.task(), BASE, VARY, out), "holds this run already", "--resume")
        for name, value in (("iterations", 3), ("clip", 0.5), ("max_new_tokens", 3)):
            other = dataclasses.replace(BASE, **{name: value})
            raises_input_error(
                lambda other=other: ablate(ensemble, toys.task(), other, VARY, out, resume=True), f"base.{name} is"
            )
        raises_input_error(lambda: rj.load_policy(out), "not the configuration of a training run")
        raises_input_error(lambda: ablate(ensemble, toys.task(), BASE, VARY, tmp_path, split="tset"), "tset")
        assert not list(tmp_path.iterdir())
