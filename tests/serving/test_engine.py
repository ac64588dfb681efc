"""The engine: whatever runs beside it, and whenever it comes, a request's answer is `Ensemble.generate`'s for it."""

import dataclasses
import itertools
import threading
import time

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax import compilation
from rlae_jax.fusion import programs, slots
from rlae_jax.fusion.policy import BoundPolicy, Dims
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.models.config import Rope
from rlae_jax.serving import engine as engines
from rlae_jax.serving.requests import Busy, Failed, Request
from tests.helpers.adapters import random_adapter
from tests.helpers.policies import Reader
from tests.helpers.recurrent import recurrent_lm
from tests.helpers.tokenizers import byte_level, sentencepiece

V, CONTEXT, N = 23, 48, 24
WINDOWS = {"local_layers": (0, 1), "window": 5, "layers": 3, "local_rope": Rope(100.0), "query_key_norm": "head"}
WORDS = ["the", "ab", "é", "x", "th", "xx", "thé"]
# Of many, so that `generate` compiles little.
OPTIONS = [
    {},
    {"temperature": 1.3, "seed": 7, "samples": 2},
    {"temperature": 0.9, "top_k": 5, "top_p": 0.9, "min_p": 0.02, "seed": 3, "repetition_penalty": 1.4, "scores": True},
    {"min_new_tokens": 6, "span_length": 3, "scores": True},
    {"ignore_eos": True, "repetition_penalty": 1.3},
]


def ids_of(rng):
    return rng.integers(0, V, rng.integers(1, 16)).tolist()


def text_of(rng):
    return " ".join(rng.choice(WORDS, rng.integers(1, 5)))


def same_tokens(make_lm, **fields):
    fields = {"context": CONTEXT} | fields
    pair = [make_lm(2, sharpness=3.0, **fields), make_lm(3, sharpness=3.0, **fields)]
    return rj.Ensemble(pair, end_ids=(7, 18)), ids_of


def lockstep(make_lm):
    return same_tokens(make_lm, layers=1)


def windows(make_lm):
    return same_tokens(make_lm, **WINDOWS)


def recurrent(make_lm):
    pair = [recurrent_lm(make_lm, kind, 2 + k, context=CONTEXT) for k, kind in enumerate(("short", "delta"))]
    return rj.Ensemble(pair, end_ids=(7, 18)), ids_of


def adapters(make_lm):
    base = make_lm(2, layers=1, context=CONTEXT)
    return rj.Ensemble.from_adapters(base, [random_adapter(base, seed) for seed in range(3)], end_ids=(7, 18)), ids_of


def union(make_lm):
    tokenizers = byte_level([b" the", b" ab", b"x"]), sentencepiece(["▁the", "▁ab", "é", "x"])
    own = ({}, {"local_layers": (0,), "window": 5})
    pair = [
        make_lm(k, vocab=len(its), tokenizer=its, end_ids=(its.eos_token_id,), layers=1, context=CONTEXT, **fields)
        for k, (its, fields) in enumerate(zip(tokenizers, own, strict=True))
    ]
    return rj.Ensemble(pair), text_of


MEMBERS = {kind.__name__: kind for kind in (lockstep, windows, union, recurrent, adapters)}
RARE = {"recurrent", "adapters"}


def agent(ensemble, length=4):
    dims = Dims(ensemble.widths, 16)
    return BoundPolicy(Reader(), Reader().init(jax.random.key(5), dims), dims, length)


def draw(rng, prompt_of, members, n, kinds):
    """Requests of so many kinds."""
    requests = []
    for i in range(n):
        options = OPTIONS[i % kinds]
        weights = [None, rng.random(members).tolist()][rng.integers(2)]
        if not options:
            weights = ["agent", "confidence", weights][i // kinds % 3]
        room = int(rng.integers(options.get("min_new_tokens", 0) + 1, N + 1))
        options = SamplingOptions(max_new_tokens=room, **options)
        requests.append(Request(prompt=prompt_of(rng), weights=weights, options=options))
    return requests


def alone(ensemble, request, policies):
    """By `generate`, as the first of two rows, of which the second has the longest length: little is compiled."""
    asked = dataclasses.asdict(request.options)
    weights = policies.get(request.weights, request.weights) if isinstance(request.weights, str) else request.weights
    text = isinstance(request.prompt, str)
    prompt = {"prompts" if text else "prompt_ids": [request.prompt] * 2}
    limits = [asked.pop("max_new_tokens"), N]
    return ensemble.generate(**prompt, weights=weights, max_new_tokens=limits, **asked)


def check(found, expected, samples, scores):
    n = len(found.tokens)
    assert n == samples
    for name in ("decoded", "tokens", "chosen", "steps", "finish_reasons"):
        assert getattr(found, name) == (getattr(expected, name) and getattr(expected, name)[:n]), name
    spans, steps = found.weights.shape[1], max(found.steps)
    np.testing.assert_allclose(found.weights, expected.weights[:n, :spans], atol=1e-5)
    np.testing.assert_array_equal(found.spans[:, :steps], expected.spans[:n, :steps])
    if scores:
        np.testing.assert_allclose(found.scores[:, :steps], expected.scores[:n, :steps], atol=1e-4)
        np.testing.assert_allclose(found.member_scores[:, :steps], expected.member_scores[:n, :steps], atol=1e-4)
    else:
        assert found.scores is None


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.rare] if k in RARE else []) for k in MEMBERS])
def test_answers_are_those_of_generate_whatever_runs_beside(make_lm, kind, monkeypatch):
    ensemble, prompt_of = MEMBERS[kind](make_lm)
    sizes = []
    if kind == "windows":  # caches that grow and shrink often
        monkeypatch.setattr(engines, "_FEWEST_SLOTS", 16)
        monkeypatch.setattr(engines, "_PATIENCE", 1)
        monkeypatch.setattr(slots, "resize", lambda *args, own=slots.resize: (sizes.append(args[-1]), own(*args))[1])
    policies = {"agent": agent(ensemble), "confidence": "confidence"}
    rng = np.random.default_rng(0)
    requests = draw(rng, prompt_of, len(ensemble.members), 15, 3 if kind == "union" else len(OPTIONS))
    with rj.Engine(ensemble, slots=3, chunk=8, policies=policies) as engine:
        tickets = []
        for i, request in enumerate(requests):
            tickets.append(engine.submit(request))
            if i % 4 == 3:
                tickets[i - 2].result(120)  # so that rows begin and end at different steps
        results = [ticket.result(120) for ticket in tickets]
        told = list(map(list, tickets))
    assert kind != "windows" or {np.sign(b - a) for a, b in itertools.pairwise(sizes)} == {-1, 1}
    for request, found, pieces in zip(requests, results, told, strict=True):
        check(found, alone(ensemble, request, policies), request.options.samples, request.options.scores)
        for i, text in enumerate(found.decoded or []):
            assert "".join(piece.text for piece in pieces if piece.sample == i) == text
        assert sum(piece.finish_reason is not None for piece in pieces) == request.options.samples


@pytest.fixture(scope="module")
def pair(make_lm):
    fields = {"layers": 1, "context": 300}
    return rj.Ensemble([make_lm(2, sharpness=3.0, **fields), make_lm(3, sharpness=3.0, **fields)], end_ids=())


def ask(n, length=6, **fields):
    prompt = fields.pop("prompt", None) or np.random.default_rng(n).integers(0, V, n).tolist()
    options = SamplingOptions(max_new_tokens=length, **fields.pop("options", {}))
    return Request(prompt=prompt, options=options, **fields)


@pytest.mark.rare
def test_rows_keep_account_of_their_own_text(pair):
    """Over several programs, beside rows that began at other times, and after another row in the same slot."""
    names = ("online", "bayes")
    requests = [
        ask(3 + i, 11 + i, weights=[*names, None][i % 3], options={"temperature": 1.0, "seed": i}) for i in range(7)
    ]
    with rj.Engine(pair, slots=2, context=64, policies={name: name for name in names}) as engine:
        tickets = [engine.submit(request) for request in requests]
        results = [ticket.result(120) for ticket in tickets]
    for request, found in zip(requests, results, strict=True):
        options = dataclasses.asdict(request.options)
        expected = pair.generate(prompt_ids=[request.prompt], weights=request.weights, **options)
        assert found.tokens == expected.tokens
        np.testing.assert_allclose(found.weights, expected.weights, atol=1e-5)
        assert request.weights is None or np.ptp(found.weights[0, :, 0]) > 0.01


@pytest.fixture(scope="module")
def engine(pair):
    with rj.Engine(pair, slots=2, chunk=64, queue=3) as engine:
        engine.warm_up()
        yield engine


def plain(pair, request):
    return pair.generate(prompt_ids=[request.prompt], max_new_tokens=request.options.max_new_tokens).tokens


def test_nothing_is_compiled_after_warm_up(pair, engine):
    """Prompts of every size, with and without a known beginning; everything that rows may ask for."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(0, V, n).tolist() for n in (1, 2, 7, 40, 130, 200, 280)]
    prompts += [[*prompts[3], 3, 4], [*prompts[4], *prompts[3]], prompts[5]]
    asked = [{"scores": True}, {"temperature": 1.0, "top_p": 0.5}, {"repetition_penalty": 2.0}]
    requests = [ask(0, prompt=p, options=asked[i % 3], top=5 * (i % 3 == 0)) for i, p in enumerate(prompts)]
    before = engine.stats()
    for request in requests:
        engine.submit(request).result(60)
    stats = engine.stats()
    assert stats.compiles == before.compiles
    assert stats.prefix_hits - before.prefix_hits == 3
    assert stats.cached_tokens - before.cached_tokens == 39 + 129 + 199
    assert stats.prompt_tokens - before.prompt_tokens == sum(map(len, prompts))


def test_what_an_engine_has_compiled_stays(pair, engine, monkeypatch):
    monkeypatch.setattr(compilation, "MOST_PROGRAMS", 1)
    for n in (1, 2):
        pair.generate(prompt_ids=[[1]], max_new_tokens=n)
    assert programs.decode_batch.cache_size() == 1
    before = engine.stats()
    engine.submit(ask(7, length=2)).result(60)
    assert engine.stats().compiles == before.compiles


def test_a_prediction_that_is_not_finite_ends_its_answer_alone(make_lm):
    lm = make_lm(2, layers=1, context=64, sharpness=3.0)
    broken = dataclasses.replace(lm, params=lm.params | {"embedding": lm.params["embedding"].at[V - 1].set(np.nan)})
    bad, fine = ask(0, prompt=[1, 2, V - 1, 3]), [ask(0, prompt=[4 + i, 2]) for i in range(4)]
    with rj.Engine(rj.Ensemble([broken], end_ids=()), slots=2, chunk=64) as engine:
        tickets = [engine.submit(request) for request in (fine[0], bad, *fine[1:], bad)]
        results = [ticket.result(120) for ticket in tickets]
        assert engine.stats().finished["error"] == 2
    assert [r.finish_reasons for r in results] == [["length"], ["error"], *[["length"]] * 3, ["error"]]
    kept = [results[i].tokens for i in (0, 2, 3, 4)]
    assert kept == [plain(rj.Ensemble([lm], end_ids=()), request) for request in fine]
    assert [results[i].tokens for i in (1, 5)] == [[[]], [[]]]


def test_long_prompts_and_known_beginnings_change_nothing(pair, engine):
    long = ask(250)
    again = ask(0, prompt=[*long.prompt[:180], 1, 2, 3])
    for request in (long, again, ask(0, prompt=long.prompt[:129])):
        assert engine.submit(request).result(60).tokens == plain(pair, request)


def test_years_of_steps_do_not_overflow(make_lm):
    ensemble = same_tokens(make_lm, **WINDOWS)[0]
    with rj.Engine(ensemble, slots=2) as engine:
        running = engine.submit(ask(9, 30))
        next(iter(running))
        running.cancel()
        running.result(60)
        members, far = engine._state.members, CONTEXT * 5 * (2**29 // (CONTEXT * 5) + 1)
        engine._state = engine._state._replace(members=members._replace(slot=members.slot + far))
        requests = [ask(9, 30), ask(14, 20), ask(5, 40)]
        for request, ticket in zip(requests, [engine.submit(request) for request in requests], strict=True):
            assert ticket.result(60).tokens == plain(ensemble, request)
        assert int(engine._state.members.slot[0]) < 2**29 + 2 * CONTEXT * 5


def test_the_likeliest_tokens(pair, engine):
    request = ask(5, options={"scores": True, "temperature": 1.0}, top=3)
    ticket = engine.submit(request)
    tokens, top, scores = [], [], []
    for piece in ticket:
        tokens, top, scores = tokens + piece.tokens, top + piece.top, [*scores, *piece.scores]
    ids = request.prompt
    for i, (token, likeliest, score) in enumerate(zip(tokens, top, scores, strict=True)):
        text = np.array([[*ids, *tokens[:i]]])
        log_probs = [np.asarray(jax.nn.log_softmax(lm.logits(text)[0, -1])) for lm in pair.members]
        fused = np.logaddexp(*log_probs) - np.log(2)
        assert list(likeliest) == np.argsort(-fused)[:3].tolist()
        np.testing.assert_allclose(list(likeliest.values()), np.sort(fused)[::-1][:3], atol=1e-5)
        np.testing.assert_allclose(score, fused[token], atol=1e-5)


def test_busy_beyond_the_queue_and_cancelled_requests_free_their_slots(engine):
    running = [engine.submit(ask(4, 290)) for _ in range(2)]
    for ticket in running:
        next(iter(ticket))
    waiting, told = [], ""
    while not told:
        try:
            waiting.append(engine.submit(ask(4, 290)))
        except Busy as error:
            told = str(error)
    assert told == "3 requests are waiting already"
    assert len(waiting) <= 5
    for ticket in (*running, *waiting):
        ticket.cancel()
    started = time.monotonic()
    assert all(ticket.result(30).finish_reasons == ["cancelled"] for ticket in (*running, *waiting))
    assert engine.submit(ask(4)).result(30).finish_reasons == ["length"]
    assert time.monotonic() - started < 10
    stats = engine.stats()
    assert (stats.waiting, stats.slots_in_use) == (0, 0)


def test_free_slots_count_before_the_queue(pair):
    """Two slots and a queue of one: three requests at once, however late the engine looks."""
    with rj.Engine(pair, slots=2, queue=1) as engine:
        tickets = [engine.submit(ask(4)) for _ in range(3)]
        assert all(ticket.result(60).tokens == plain(pair, ask(4)) for ticket in tickets)


def test_the_room_for_an_answer(pair, engine):
    assert engine.room(ask(4)) == 296
    assert engine.submit(ask(4, 296)).cancel() is None
    with pytest.raises(rj.InputError, match="too long"):
        engine.submit(ask(4, 297))
    assert engine.room(ask(300)) == 1
    agent = BoundPolicy(Reader(), None, Dims(pair.widths, 3), 4)  # was trained for three spans of four
    with rj.Engine(pair, policies={"agent": agent}) as other:
        assert other.room(ask(4, weights="agent")) == 12
        assert other.room(ask(4)) == 296


def test_a_time_limit(engine):
    out = engine.submit(ask(4, 290, timeout=1e-3)).result(30)
    assert out.finish_reasons == ["timeout"]
    assert len(out.tokens[0]) < 290


def test_listeners_hear_everything_in_order(engine):
    heard, over = [], threading.Event()
    ticket = engine.submit(ask(4, 30))
    ticket.listen(lambda piece: over.set() if piece is None else heard.append(piece))
    assert over.wait(30)
    assert [i for piece in heard for i in piece.tokens] == ticket.result().tokens[0]


def test_an_error_on_the_device_fails_what_ran_and_nothing_else(pair, monkeypatch, caplog):
    with rj.Engine(pair, slots=2) as engine:
        with monkeypatch.context() as broken:
            broken.setattr(engine, "_advance", lambda *_: (_ for _ in ()).throw(RuntimeError("out of memory")))
            with pytest.raises(Failed, match="out of memory"):
                engine.submit(ask(4)).result(60)
        assert engine.submit(ask(4)).result(60).tokens == plain(pair, ask(4))
    assert "lost what was running" in caplog.text
    with pytest.raises(Busy, match="closing"):
        engine.submit(ask(4))


@pytest.mark.parametrize(
    ("request_", "told"),
    [
        (ask(280, 30), "too long"),
        (ask(4, weights=[1.0]), r"weights have shape \[1\]"),
        (ask(4, weights="nobody"), "policy 'nobody' is unknown here"),
        (ask(4, top=21), "top is 21; expected a whole number from 0 to 20"),
        (ask(4, timeout=0.0), "timeout is 0.0; expected a number above 0"),
        (ask(4, options={"seed": -1}), "seed is -1; expected a whole number"),
        (ask(0, prompt=[V]), "no embedding of"),
        (ask(0, prompt=[1, "a"]), "a prompt is a text"),
        (Request(prompt=[]), "empty"),
        (Request(prompt="a"), "no tokenizer"),
    ],
)
def test_what_cannot_be_answered_is_told_at_once(engine, request_, told):
    with pytest.raises(rj.InputError, match=told):
        engine.submit(request_)
