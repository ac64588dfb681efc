"""Many weightings decoded at once: each answers as the ensemble of its adapters does alone under these weights."""

import dataclasses

import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.emorl import fused as fused_module
from rlae_jax.emorl.fused import MODES, Fused, _batch_size
from rlae_jax.fusion import programs
from rlae_jax.fusion.prompts import pad_rows
from tests.helpers.adapters import EVERY_LAYER, add_by_hand, random_adapter

N = 7
ROWS = [[3, 1, 4, 1, 5], [9], [2, 6, 5, 3, 5, 8, 9, 7]]
IDS, MASK = pad_rows(ROWS, 8)
POINTS = np.array([[0.2, 0.9, 0.4], [1.0, 0.0, 0.3], [0.5, 0.5, 0.5], [0.0, 0.7, 0.1], [1.0, 1.0, 0.0]])
SAMPLED = {"temperature": 1.0, "samples": 2, "seed": 5}
TARGETS = ("q", "k", "v", "o", "up", "down")


@pytest.fixture(scope="module", params=["decoder", pytest.param("t5", marks=pytest.mark.rare)])
def lm(request, make_lm, stored_checkpoint):
    if request.param == "decoder":
        return make_lm(0, layers=1, sharpness=3.0, end_ids=(6, 18))
    return rj.load(stored_checkpoint("untied", "t5"))


@pytest.fixture(scope="module")
def trio(lm):
    names = TARGETS if lm.config.encoder is None else None
    return [random_adapter(lm, m, rank=2, alpha=1.5, targets=names, name=f"a{m}") for m in range(3)]


@pytest.fixture(scope="module", params=sorted(MODES))
def fused(request, lm, trio):
    return Fused(lm, trio, request.param)


@pytest.fixture(scope="module")
def decoded(fused):
    points = fused.prepare(ROWS, max_new_tokens=N)
    return points, points.decode(POINTS)


def alone(lm, adapters, mode, point, **options):
    """The tokens of the ensemble under one point, end tokens left out, and whether each answer ended."""
    given = {"prompt_ids": IDS, "prompt_mask": MASK, "max_new_tokens": N} | options
    if mode == "params":
        ensemble = rj.Ensemble([lm.with_adapters(adapters)])
        out = ensemble.generate(adapters=np.tile(point, (len(ROWS), 1)), **given)
    else:
        ensemble = rj.Ensemble.from_adapters(lm, adapters, {"probs": "linear"}.get(mode, mode))
        out = ensemble.generate(weights=point, **given)
    return out.tokens, [reason == "stop" for reason in out.finish_reasons]


def tokens_of(answers, n):
    """Of point n, end tokens left out."""
    lengths = answers.steps[n] - answers.ended[n]
    return [row[:k].tolist() for row, k in zip(answers.tokens[n], lengths, strict=True)]


def assert_same(one, other):
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


@pytest.mark.device
def test_each_point_answers_as_an_ensemble_does(lm, trio, fused, decoded):
    points, answers = decoded
    assert points.at_once >= len(POINTS)  # all of them in one batch
    for n, point in enumerate(POINTS):
        tokens, ended = alone(lm, trio, fused.mode, point)
        assert tokens_of(answers, n) == tokens
        assert answers.ended[n].tolist() == ended
    assert len({str(tokens_of(answers, n)) for n in range(len(POINTS))}) > 2


def test_little_memory_gives_the_same_answers(lm, fused, decoded):
    """Point after point, and in batches of which the last one is smaller."""
    whole, answers = decoded
    of_a_point = whole.memory / whole.at_once  # a little more, at most
    shares = {1: 0.0, 2: 2.5} if lm.config.encoder is None else {1: 0.0}
    for at_once, share in shares.items():
        points = fused.prepare(ROWS, max_new_tokens=N, memory=int(share * of_a_point))
        assert points.at_once == at_once
        assert_same(points.decode(POINTS), answers)


def test_prompts_do_not_depend_on_their_batch(fused, decoded):
    _, answers = decoded
    own = fused.prepare([ROWS[2], [7, 7], ROWS[1]], max_new_tokens=N).decode(POINTS)
    for n in range(len(POINTS)):
        tokens = tokens_of(answers, n)
        assert tokens_of(own, n)[::2] == [tokens[2], tokens[1]]


def test_samples(lm, trio, fused):
    """They are those of the ensemble with this seed, and what else is asked for does not matter."""
    points = fused.prepare(ROWS, max_new_tokens=N, **SAMPLED)
    both = points.decode(POINTS[[0, 1, 0]])
    assert both.tokens.shape == (3, 2 * len(ROWS), N)
    # Sampling does not know what a model is: it is compared for one kind of model.
    for n, point in enumerate(POINTS[:2] if lm.config.encoder is None else ()):
        tokens, ended = alone(lm, trio, fused.mode, point, **SAMPLED)
        assert tokens_of(both, n) == tokens
        assert both.ended[n].tolist() == ended
    assert tokens_of(both, 2) == tokens_of(both, 0)  # the keys do not tell points apart
    assert_same(points.decode(POINTS[[0, 1, 0]]), both)
    other = points.decode(POINTS[[4, 3, 0]])
    assert tokens_of(other, 2) == tokens_of(both, 0)
    samples = tokens_of(both, 0)
    assert [a != b for a, b in zip(samples[::2], samples[1::2], strict=True)].count(True) >= 2
    seeded = fused.prepare(ROWS, max_new_tokens=N, **SAMPLED | {"seed": 6}).decode(POINTS[[0, 1, 0]])
    assert tokens_of(seeded, 0) != samples


def test_of_what_weights_only_the_direction_counts(fused, decoded):
    points, answers = decoded
    halved = points.decode(0.5 * POINTS)
    if fused.mode == "params":
        assert not fused.scale_invariant()
        assert not np.array_equal(halved.tokens, answers.tokens)
    else:
        assert fused.scale_invariant()
        assert_same(halved, answers)
    assert fused.scale_invariant(temperature=1.0) == (fused.mode in ("probs", "loglinear"))


def test_no_weight_at_all(lm, fused, decoded):
    """`params` is the base then, and the others predict nothing."""
    points, answers = decoded
    mixed = points.decode(np.concatenate([POINTS[:2], np.zeros((1, 3)), POINTS[3:]]))
    for n in (0, 1, 3, 4):
        assert tokens_of(mixed, n) == tokens_of(answers, n)
    if fused.mode == "params":
        base = rj.Ensemble([lm]).generate(prompt_ids=IDS, prompt_mask=MASK, max_new_tokens=N)
        assert tokens_of(mixed, 2) == base.tokens
    else:
        assert not mixed.steps[2].any()
        assert not mixed.tokens[2].any()
        assert not mixed.ended[2].any()


def test_all_weight_on_one_adapter(lm, trio, fused, decoded):
    answers = decoded[0].decode(np.eye(3)[[0, 1, 2, 1, 0]])
    for n in range(3):
        merged = dataclasses.replace(lm, params=add_by_hand(lm, trio[n : n + 1], [1.0]))
        out = rj.Ensemble([merged]).generate(prompt_ids=IDS, prompt_mask=MASK, max_new_tokens=N)
        assert tokens_of(answers, n) == out.tokens
    assert tokens_of(answers, 3) == tokens_of(answers, 1) != tokens_of(answers, 0)


@pytest.mark.parametrize("mode", ["hidden", "params"])
def test_of_two_adapters(make_lm, mode):
    lm = make_lm(0, layers=1, sharpness=3.0, end_ids=(6, 18))
    pair = [random_adapter(lm, m, rank=2, alpha=1.5, targets=TARGETS) for m in range(2)]
    answers = Fused(lm, pair, mode).prepare(ROWS, max_new_tokens=N).decode([[1.0, 0.0], [0.0, 1.0]])
    for n in range(2):
        out = rj.Ensemble([lm.with_adapters(pair[n : n + 1])]).generate(
            prompt_ids=IDS, prompt_mask=MASK, max_new_tokens=N
        )
        assert tokens_of(answers, n) == out.tokens


def test_sizes_of_batches():
    for n in range(1, 200):
        assert n <= _batch_size(n) <= max(n, 9 * n // 8)
        assert _batch_size(_batch_size(n)) == _batch_size(n)
    assert len({_batch_size(n) for n in range(1, 1025)}) < 70


def test_texts(make_lm, make_tokenizer):
    """Of every point all samples of a prompt one after another."""
    tokenizer = make_tokenizer("abcdefgh")
    lm = make_lm(1, layers=1, vocab=9, end_ids=(8,), tokenizer=tokenizer)
    fused = Fused(lm, [random_adapter(lm, m, rank=2) for m in range(2)], "hidden")
    points = fused.prepare(fused.ensemble.encode(["abc", "d"]), max_new_tokens=4, temperature=1.5, samples=2)
    answers = points.decode([[0.3, 0.6], [1.0, 0.1], [0.0, 0.0]])
    texts = points.texts(answers)
    assert texts == [["".join("abcdefgh"[i] for i in row) for row in tokens_of(answers, n)] for n in range(3)]
    assert texts[2] == [""] * 4
    assert any(answers.ended[:2].ravel())


class TestBadInput:
    @pytest.fixture(scope="class")
    def tiny(self, make_lm):
        return make_lm(0, layers=1)

    @pytest.fixture(scope="class")
    def pair(self, tiny):
        return [random_adapter(tiny, m, rank=2, name=name) for m, name in enumerate(("kind", "brief"))]

    def test_adapters_and_modes(self, tiny, pair, make_lm, raises_input_error):
        raises_input_error(lambda: Fused(tiny, pair[:1]), "at least two", "not 1")
        raises_input_error(lambda: Fused(tiny, []), "at least two")
        raises_input_error(lambda: Fused(tiny, pair, "linear"), "hidden, probs, loglinear, params", "'linear'")
        wider = random_adapter(make_lm(0, layers=1, width=24), 1, name="wider")
        for mode in MODES:
            raises_input_error(lambda mode=mode: Fused(tiny, [*pair, wider], mode), "wider", "does not fit")
        heads = [random_adapter(tiny, m, targets=EVERY_LAYER) for m in range(2)]
        raises_input_error(lambda: Fused(tiny, heads), "head")
        assert Fused(tiny, heads, "probs").names == ("adapter-0", "adapter-1")

    @pytest.mark.parametrize(
        ("points", "parts"),
        [
            ([[0.5, 1.5], [0.1, 0.2], [-0.1, 0.0]], ("outside [0, 1]", "point 0", "point 2")),
            ([[0.5, float("nan")]], ("outside [0, 1]", "point 0")),
            ([[0.5, 0.5, 0.5]], ("[N, 2]", "kind, brief", "[1, 3]")),
            ([0.5, 0.5], ("[N, 2]", "[2]")),
            (np.zeros((0, 2)), ("[N, 2]", "[0, 2]")),
        ],
    )
    def test_points(self, tiny, pair, raises_input_error, points, parts):
        ready = Fused(tiny, pair).prepare(ROWS, max_new_tokens=2)
        raises_input_error(lambda: ready.decode(points), *parts)

    def test_prompts_that_do_not_fit(self, tiny, pair, raises_input_error):
        fused = Fused(tiny, pair)
        raises_input_error(lambda: fused.prepare([[1] * 510], max_new_tokens=9), "512")


def test_programs_are_shared_between_points(make_lm):
    lm = make_lm(0, layers=1)
    points = Fused(lm, [random_adapter(lm, m, rank=2) for m in range(2)]).prepare(ROWS, max_new_tokens=3)
    rng = np.random.default_rng(0)
    points.decode(rng.random((17, 2)))
    before = fused_module._answer.cache_size(), programs.prefill.cache_size()
    points.decode(rng.random((18, 2)))  # 17 were filled up to 18
    assert (fused_module._answer.cache_size(), programs.prefill.cache_size()) == before
