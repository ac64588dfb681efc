"""lm-evaluation-harness as a client: `local-completions` against the server gives the numbers of the direct class."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import rlae_jax as rj
from rlae_jax.serving.api import Catalogue
from tests.helpers.serving import serving

harness = pytest.importorskip("lm_eval", reason="lm-eval is not installed")
pytest.importorskip("tenacity", reason="lm-eval[api] is not installed")
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from rlae_jax.lm_eval import EnsembleLM  # noqa: E402

DATA = Path(__file__).parents[1] / "data" / "lm_eval"
TASKS = ["animals", "ways"]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A directory with two tasks, whose data are beside them."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    shutil.copytree(DATA, tmp_path / "tasks")
    for path in (tmp_path / "tasks").glob("*.yaml"):
        path.write_text(path.read_text().replace("DIRECTORY", str(tmp_path / "tasks")))
    return tmp_path / "tasks"


def test_two_tasks(shared, make_lm, tasks):
    where = shared / "models" / "stories260K"
    tokenizer = AutoTokenizer.from_pretrained(where)
    fields = {"vocab": 512, "layers": 1, "context": 96, "end_ids": (2,), "bos_id": 1}
    ensemble = rj.Ensemble([make_lm(k, tokenizer=tokenizer, **fields) for k in range(2)])
    engine = rj.Engine(ensemble, slots=4)
    catalogue = Catalogue.create(engine, name="pair", fusion="linear", policies={}, created=1)

    def run(lm):
        manager = TaskManager(include_path=str(tasks), include_defaults=False)
        return harness.simple_evaluate(lm, tasks=TASKS, task_manager=manager, bootstrap_iters=0)

    with serving(engine, catalogue) as (url, *_):
        client = get_model("local-completions")(
            model="pair",
            base_url=f"{url}/v1/completions",
            tokenizer=str(where),
            tokenizer_backend="huggingface",
            add_bos_token=True,  # as the model's own tokenizer does
            batch_size=4,
            max_length=96,
        )
        served = run(client)
    direct = run(EnsembleLM(ensemble))
    for name in TASKS:
        assert served["results"][name]["acc,none"] == direct["results"][name]["acc,none"]
        for one, other in zip(served["samples"][name], direct["samples"][name], strict=True):
            assert one["doc_id"] == other["doc_id"]
            found, expected = ([resp[0] for resp in sample["resps"]] for sample in (one, other))
            np.testing.assert_allclose([score for score, _ in found], [score for score, _ in expected], atol=1e-4)
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
