"""What devices of a mesh say to each other in the decoding loop, and that without a mesh nothing is different."""

import collections
import sys
import warnings

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import hlo, sharding
from rlae_jax.config import AgentConfig, PPOConfig
from rlae_jax.emorl.fused import Fused
from rlae_jax.fusion import programs
from rlae_jax.fusion.prompts import prompts_from_arrays
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.fusion.state import Answers
from rlae_jax.ppo import iteration as ppo
from tests.helpers.adapters import random_adapter
from tests.helpers.tokenizers import byte_level, sentencepiece

B, T, N = 8, 16, 6
IDS = np.random.default_rng(0).integers(4, 24, (B, T)).astype(np.int32)
SMALL = 16  # entries that rows exchange besides activations: maxima, sums, indices


def job(ensemble, **options):
    """A call's program and arguments."""
    prompts = options.pop("prompts", None)
    given = {} if prompts is not None else {"prompt_ids": IDS}
    weights = options.pop("weights", None)
    return ensemble._job(prompts, weights, SamplingOptions(max_new_tokens=N, **options), seed=0, **given)


def lower(job):
    return programs.decode_batch.lower(job.params, job.prompts, job.policy_params, job.spec, job.samples)


def decoding_loop(job):
    """The instructions inside the loop over steps, compiled for the job's mesh."""
    with sharding.use(job.mesh):
        module = hlo.parse(lower(job).compile().as_text())
    outermost = [loop for loop in module.loops() if "while" in loop.op_name and len(loop.shapes) > 20]
    return module, module.inside(outermost[0])


def spread(members, mesh):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [lm.on_mesh(mesh) for lm in members]


@pytest.fixture(scope="module")
def pair(make_wide):
    return make_wide(0, layers=2), make_wide(1, layers=1)


@pytest.mark.parametrize("size", [(4, 2), (2, 4)], ids=["4x2", "2x4"])
def test_members_with_one_tokenizer_exchange_activations_only(pair, size):
    """Two all-reduces a layer and one for each embedding, and a few numbers a row to find the largest of a vocabulary:
    neither caches nor logits."""
    ensemble = rj.Ensemble(spread(pair, rj.make_mesh(*size)))
    module, inside = decoding_loop(job(ensemble))
    found = hlo.collectives(inside)
    assert {kind for kind, _ in found} == {"all-reduce"}
    rows, width = B // size[0], 32
    activations = found.pop(("all-reduce", (f"f32[{rows},1,{width}]",)))
    assert activations == 2 * 3 + 2  # three layers of two members, two embeddings
    assert sum(found.values()) <= 5
    for _, shapes in found:
        assert all(_entries(shape) <= SMALL for shape in shapes), shapes
    caches = job(ensemble).spec.members[0]
    assert not module.copies(inside, at_least=rows * caches.kv_heads // size[1] * caches.head_width * (T + N) * 4)


def _entries(shape):
    dims = shape[shape.index("[") + 1 : shape.index("]")]
    return int(np.prod([int(d) for d in dims.split(",") if d]))


def test_devices_with_whole_members_say_nothing(pair):
    """Rows over all devices: the loop has no collective at all."""
    ensemble = rj.Ensemble(spread(pair, rj.make_mesh(8, 1)))
    assert not hlo.collectives(decoding_loop(job(ensemble))[1])


def test_members_with_different_tokenizers(make_wide):
    """No permutes, for which groups of devices would wait for each other; each member's log-probabilities are brought
    together once."""
    members = []
    for seed, tokenizer in enumerate([byte_level([b" the", b"th"], ["</s>"]), sentencepiece(["▁the", "é"])]):
        size = -(-len(tokenizer) // 8) * 8
        members.append(
            make_wide(
                seed,
                layers=1,
                vocab=size,
                tokens=len(tokenizer),
                tokenizer=tokenizer,
                end_ids=(tokenizer.eos_token_id,),
            )
        )
    ensemble = rj.Ensemble(spread(members, rj.make_mesh(2, 4)))
    found = hlo.collectives(decoding_loop(job(ensemble, prompts=["the other", "é", "th", "x"]))[1])
    kinds = collections.Counter(kind for kind, _ in found.elements())
    assert set(kinds) == {"all-reduce", "all-gather"}
    assert kinds["all-gather"] == 2
    # A forward of each of four sizes for each member.
    assert kinds["all-reduce"] <= 2 * 4 * 3 + 8


def programs_of(make_wide):
    """name -> (function, arguments), of every kind of program."""
    lm, other = make_wide(0, layers=1), make_wide(1, layers=1)
    config = PPOConfig(prompts=B, epochs=1, minibatches=2, agent=AgentConfig(projection=4, ffn_width=8))
    policy = ppo.make_policy(config)
    ensemble = rj.Ensemble([lm, other])
    spec = ensemble.spec(policy=policy, max_new_tokens=N, sample_weights=True, record=True, temperature=1.0)
    seeds = np.zeros(2, np.uint32)
    states = ppo.init_learners(seeds, policy, spec.dims, config)
    both = np.concatenate([IDS, IDS])
    batch = ppo.Batch(
        prompts_from_arrays(both, np.ones_like(both), N), np.ones((2 * B, 2), np.int32), np.ones(2 * B, np.int32)
    )
    shared = rj.Ensemble.from_adapters(lm, [random_adapter(lm, m) for m in range(2)], "hidden")
    found = {"iterate": (ppo.iterate, (states, ensemble.params, batch, seeds, spec, config))}
    for name, one in (("decode", job(ensemble, temperature=1.0, top_k=3)), ("shared", job(shared))):
        found[name] = (programs.decode_batch, (one.params, one.prompts, one.policy_params, one.spec, one.samples))
        found[f"{name}-prefill"] = (programs.prefill, (one.params, one.prompts, one.spec, 1))
    return found


def test_without_a_mesh_nothing_is_different(make_wide, monkeypatch):
    """The lowered text of each program is that of the same program whose constraints are the identity."""
    texts = {}
    for kind in ("as it is", "without"):
        jax.clear_caches()  # both begin alike, whatever was traced before
        if kind == "without":
            for module in (m for m in _modules() if hasattr(m, "constrain")):
                monkeypatch.setattr(module, "constrain", lambda x, *axes: x)
            for module in (m for m in _modules() if hasattr(m, "by_rows")):
                monkeypatch.setattr(module, "by_rows", lambda function, places, out=None: function)
        texts[kind] = {name: f.lower(*args).as_text() for name, (f, args) in programs_of(make_wide).items()}
    assert texts["as it is"] == texts["without"]
    lines = [line for text in texts["as it is"].values() for line in text.splitlines()]
    # JAX marks arrays of keys itself, with a mesh that is empty.
    assert not [line for line in lines if "sharding" in line and "@empty_mesh" not in line]


def _modules():
    return [module for name, module in sys.modules.items() if name.startswith("rlae_jax")]


@pytest.mark.parametrize("backend", ["tpu", "cuda"])
def test_never_one_row_on_an_accelerator(pair, monkeypatch, backend):
    """The smallest batch has two rows there, of which one writes nothing: no product of the loop is of one row."""
    ensemble = rj.Ensemble(pair)
    alone = ensemble._job(None, None, SamplingOptions(max_new_tokens=N), seed=0, prompt_ids=IDS[:1])
    assert alone.prompts.batch == 1
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    both = ensemble._job(None, None, SamplingOptions(max_new_tokens=N), seed=0, prompt_ids=IDS[:1])
    assert both.prompts.batch == 2
    assert both.prompts.active.tolist() == [True, False]
    for one, rows in ((alone, 1), (both, 2)):
        args = (one.params, one.prompts, one.policy_params, one.spec)
        function = jax.jit(lambda *args: programs.decode_batch(*args, 1).tokens)
        exported = jax.export.export(function, platforms=[backend])(*args)
        lines = [line for line in exported.mlir_module().splitlines() if "dot_general" in line and "x1x32xf32" in line]
        assert lines
        assert all(f"tensor<{rows}x1x" in line for line in lines)


def test_points_of_a_search_are_never_one_row(make_wide, monkeypatch):
    lm = make_wide(0, layers=1)
    fused = Fused(lm, [random_adapter(lm, m) for m in range(2)], "params")
    ran = []
    monkeypatch.setattr("rlae_jax.emorl.fused.smallest_batch", lambda: 2)
    monkeypatch.setattr(
        "rlae_jax.emorl.fused._answer_each",
        lambda params, prompts, spec, samples, points: ran.append(points) or _none(points),
    )
    fused.prepare([[1, 2, 3]], max_new_tokens=2).decode(np.ones((1, 2), np.float32))
    assert ran == [2]


def _none(points):
    steps, tokens = np.ones(points, np.int32), np.zeros((points, 2), np.int32)
    return Answers(None, np.zeros(points, bool), steps, tokens, None, None, None, np.zeros(points, bool))
