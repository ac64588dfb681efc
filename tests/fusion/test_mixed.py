"""Members with different tokenizers: the compiled loop against a plain reference without a cache.

Rows of a batch may wait for each other's long entries, so that the widths of the forward passes, and with them the last
bits of a logit, depend on the batch: entries are equal but for ties within 1e-5 of a logit, which these models do not
have.
"""

import dataclasses

import jax
import numpy as np
import pytest
from transformers import AutoTokenizer

import rlae_jax as rj
from rlae_jax.fusion.policy import BoundPolicy, Dims, Draw
from tests.helpers.mixed_reference import Mixed

PROMPTS = ["Once upon a time", "x", "Żółw 你好, мир", "\tdef f(x):\n        return"]
N = 8


@pytest.fixture(scope="module")
def pair(shared, make_lm):
    """A byte-level BPE of 50,257 tokens and a SentencePiece of 512 with byte fallback."""
    gpt2 = AutoTokenizer.from_pretrained(shared / "tokenizers" / "gpt2")
    stories = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    return (
        make_lm(0, vocab=50_257, tokenizer=gpt2, name="gpt2", end_ids=(50_256,), sharpness=8.0),
        make_lm(
            *(1,), vocab=520, tokens=512, tokenizer=stories, name="stories", end_ids=(1, 2), sharpness=8.0, layers=1
        ),
    )


@pytest.fixture(scope="module")
def mixed(pair):
    return Mixed(pair, rj.Ensemble(pair).union)


def expect(mixed, weights, prompts=PROMPTS, seed=0, **options):
    """The reference's rows; `weights` are one row per prompt."""
    rows = []
    for b, prompt in enumerate(prompts):
        ids = [lm.tokenizer(prompt)["input_ids"] for lm in mixed.members]
        key = jax.random.fold_in(jax.random.key(seed), b)
        rows.append(mixed.decode_row(ids, key, lambda span, b=b: weights[b], **{"max_new_tokens": N} | options))
    return rows


def check(out, rows, mixed):
    for b, row in enumerate(rows):
        assert out.texts[b] == row.text.decode("utf-8", errors="ignore")
        assert out.steps[b] == len(row.entries)
        assert out.finish_reasons[b] == ("stop" if row.ended else "length")
        entries = row.entries[:-1] if row.ended else row.entries
        assert out.tokens[b] == [i for entry in entries for i in mixed.spell(0, entry)]


@pytest.fixture(scope="module")
def weights():
    return np.random.default_rng(5).dirichlet(np.ones(2), len(PROMPTS)).astype(np.float32)


def topk(mixed, k, primary=None):
    def fuse(exact, own, weights):
        named = set()
        for m, log_p in enumerate(exact):
            if m == primary or (primary is None and weights[m] > 0):
                named |= set(np.argsort(-log_p, kind="stable")[:k].tolist())
        total = np.zeros(mixed.union.size)
        for m, log_p in enumerate(own):
            read = np.zeros(mixed.union.size)
            for entry in named:
                spelled = mixed.spell(m, entry)
                read[entry] = np.exp(log_p[spelled[0]]) if spelled else 0.0
            total += weights[m] * read / read.sum()
        return np.log(total)

    return fuse


def loglinear(exact, own, weights):
    return sum(w * log_p for w, log_p in zip(weights, exact, strict=True) if w > 0)


OPTIONS = {
    "greedy": ({}, "linear", None),
    "sampled": ({"temperature": 1.0}, "linear", None),
    "cut": ({"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "min_new_tokens": 5}, "linear", None),
    "penalty": ({"repetition_penalty": 2.0}, "linear", None),
    "loglinear": ({"temperature": 1.0}, "loglinear", loglinear),
    "topk": ({}, "topk:3", "topk"),
    "topk-sampled": ({"temperature": 2.0}, "topk", "topk"),
    "primary": ({"temperature": 2.0}, "primary:1", "primary"),
}


FAST = ("greedy",)
NAMES = [pytest.param(name, marks=pytest.mark.device if name in FAST else pytest.mark.slow) for name in OPTIONS]


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_loop_equals_the_reference(pair, mixed, weights, name):
    options, fusion, fuse = OPTIONS[name]
    if fuse == "topk":
        fuse = topk(mixed, 3 if fusion == "topk:3" else 10)
    elif fuse == "primary":
        fuse = topk(mixed, 10, primary=1)
    rows = expect(mixed, weights, fuse=fuse, **options)
    out = rj.Ensemble(pair, fusion).generate(PROMPTS, weights, max_new_tokens=N, scores=True, **options)
    check(out, rows, mixed)
    for b, row in enumerate(rows):
        n = len(row.entries)
        np.testing.assert_allclose(out.scores[b, :n], row.scores, rtol=0, atol=1e-3)
        np.testing.assert_allclose(out.member_scores[b, :n], row.attribution, rtol=0, atol=1e-3)
        assert np.all(np.isnan(out.scores[b, n:]))


def test_the_references_rows_are_worth_comparing(mixed, weights):
    """Some entries cost several tokens, some belong to one member only, some rows end."""
    rows = [row for name in ("greedy", "sampled") for row in expect(mixed, weights, **OPTIONS[name][0])]
    lengths = [mixed.union.lengths(k)[row.entries] for row in rows for k in range(2)]
    assert max(map(max, lengths)) >= 4
    partners = np.stack([partner >= 0 for partner in mixed.union.partner])
    alone = {tuple(partners[:, entry]) for row in rows for entry in row.entries}
    assert {(True, False), (False, True)} <= alone


@pytest.mark.parametrize("member", range(2))
def test_one_hot_weights_are_the_members_own_greedy_text(pair, mixed, member):
    """Under the same validity mask."""
    out = rj.Ensemble(pair).generate(PROMPTS, np.eye(2)[member], max_new_tokens=N)
    for b, prompt in enumerate(PROMPTS):
        lm, ids = pair[member], pair[member].tokenizer(prompt)["input_ids"]
        pending = b""
        text = b""
        for _ in range(N):
            log_p = mixed.read(member, ids)
            own = mixed.union.own[member]
            log_p = np.where((own >= 0) & mixed.allowed(pending)[np.maximum(own, 0)], log_p, -np.inf)
            token = int(np.argmax(log_p))
            if token in lm.config.end_ids:
                break
            ids = [*ids, token]
            text += mixed.bytes[own[token]]
            pending += mixed.bytes[own[token]]
            try:
                pending.decode()
                pending = b""
            except UnicodeDecodeError as error:
                pending = pending[error.start :]
        assert out.texts[b] == text.decode("utf-8", errors="ignore")


@pytest.mark.slow
def test_rows_limits_and_samples(pair, mixed, weights):
    limits = [3, 8, 1, 5]
    out = rj.Ensemble(pair).generate(PROMPTS, weights, max_new_tokens=limits)
    rows = expect(mixed, weights)
    for b, limit in enumerate(limits):
        assert out.steps[b] == min(limit, len(rows[b].entries))
        expected = b"".join(mixed.bytes[e] for e in rows[b].entries[: out.steps[b]])
        assert out.texts[b] == expected.decode("utf-8", errors="ignore")
    many = rj.Ensemble(pair).generate(PROMPTS[:2], [1, 1], temperature=1.0, samples=3, max_new_tokens=4)
    assert len(many.texts) == 6
    assert len(set(many.texts)) > 3


@pytest.mark.slow
def test_a_row_ends_where_a_member_is_full(pair, mixed, weights):
    rows = expect(mixed, weights, member_tokens=9, temperature=1.0)
    out = rj.Ensemble(pair).generate(PROMPTS, weights, max_new_tokens=N, member_tokens=9, temperature=1.0)
    check(out, rows, mixed)
    assert any(len(row.entries) < N and not row.ended for row in rows)


@pytest.mark.slow
def test_going_on_and_streaming_write_what_one_call_writes(pair, weights):
    ensemble = rj.Ensemble(pair)
    options = {"weights": weights, "temperature": 1.0, "seed": 3}
    whole = ensemble.generate(PROMPTS, max_new_tokens=12, **options)
    part = ensemble.generate(PROMPTS, max_new_tokens=4, keep=True, **options)
    assert part.texts != whole.texts
    longer = ensemble.extend(part, 8)
    assert (longer.texts, longer.steps, longer.tokens) == (whole.texts, whole.steps, whole.tokens)
    np.testing.assert_array_equal(longer.weights, whole.weights)
    pieces = list(ensemble.stream(PROMPTS, max_new_tokens=12, **options))
    assert len(pieces) == 3
    assert list(map("".join, zip(*pieces, strict=True))) == whole.texts


@pytest.mark.slow
def test_a_drawn_member_writes_and_the_others_catch_up(pair, mixed):
    """Weights drawn per step; whoever was not drawn reads what it missed before it is next."""
    probs = np.array([[0.4, 0.6]] * len(PROMPTS), np.float32)
    ensemble = rj.Ensemble(pair)
    policy = BoundPolicy(Draw(), probs, Dims(ensemble.widths, N), 1, sample=True)
    out = ensemble.generate(PROMPTS, policy, max_new_tokens=N, temperature=1.0)
    drawn = np.nan_to_num(out.weights)
    assert set(drawn[0, : out.steps[0]].max(axis=1)) == {1.0}
    assert 0 < drawn[..., 0].sum() < drawn.sum()
    for b, prompt in enumerate(PROMPTS):
        ids = [lm.tokenizer(prompt)["input_ids"] for lm in pair]
        key = jax.random.fold_in(jax.random.key(0), b)
        row = mixed.decode_row(
            ids, key, lambda span, b=b: drawn[b, span], span_length=1, max_new_tokens=N, temperature=1.0
        )
        assert out.texts[b] == row.text.decode("utf-8", errors="ignore")


@pytest.mark.slow
def test_drawing_needs_one_forward_where_tokenizers_are_the_same(make_lm):
    """Members that nobody drew are not run, and what they read later is the same."""
    members = [make_lm(seed, layers=1) for seed in range(2)]
    ids = np.arange(12).reshape(3, 4)
    drawn = rj.Ensemble(members).generate(prompt_ids=ids, weights="draw", temperature=1.0, max_new_tokens=9)
    w = np.nan_to_num(drawn.weights)
    assert 0 < w[..., 0].sum() < w.sum()
    policy = BoundPolicy(_Replay(), np.swapaxes(w, 0, 1), Dims(rj.Ensemble(members).widths, 9), 1)
    again = rj.Ensemble(members).generate(prompt_ids=ids, weights=policy, temperature=1.0, max_new_tokens=9)
    assert drawn.tokens == again.tokens


@dataclasses.dataclass(frozen=True)
class _Replay:
    """Weights Float[P, B, K] that were drawn before; reads the statistics, so that every member is run."""

    reads: tuple[str, ...] = ("span", "stats")

    def init(self, key, dims):
        return jax.numpy.ones((dims.spans, 1, dims.members)) / dims.members

    def apply(self, params, observation):
        from rlae_jax.fusion.policy import Deterministic

        b = observation.span.shape[0]
        weights = jax.numpy.asarray(params)[observation.span[0]]
        weights = jax.numpy.concatenate([weights, jax.numpy.ones((b - len(weights), weights.shape[1])) / 2])
        return Deterministic(weights), jax.numpy.zeros(b)


@pytest.mark.slow
def test_stop_strings_may_span_entries(pair, weights):
    ensemble = rj.Ensemble(pair)
    options = {"weights": weights, "max_new_tokens": 12, "temperature": 1.0}
    whole = ensemble.generate(PROMPTS, **options)
    b = max(range(len(PROMPTS)), key=lambda b: len(whole.texts[b]))
    stop = whole.texts[b][3:7]
    out = ensemble.generate(PROMPTS, stop=[stop], **options)
    assert out.texts[b] == whole.texts[b][: whole.texts[b].index(stop)]
    assert out.finish_reasons[b] == "stop"


@pytest.mark.device
def test_no_cache_is_copied_inside_the_loop(pair):
    """The caches are loop-carried, read by branches and written in place: no copy of their shape."""
    import jax.numpy as jnp

    from rlae_jax.fusion.decode import decode_spans, prefill
    from rlae_jax.fusion.prompts import prompts_from_arrays

    ensemble = rj.Ensemble(pair)
    spec = ensemble.spec(max_new_tokens=256)
    ids = tuple(np.ones((8, 256), np.int32) for _ in pair)
    prompts = prompts_from_arrays(ids, ids, 256, jax.random.key(0))
    state = jax.eval_shape(lambda: prefill(ensemble.params, prompts, spec))
    weights = jnp.full((8, 2), 0.5)
    compiled = jax.jit(decode_spans, donate_argnums=1).lower(ensemble.params, state, weights, spec).compile()
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.caches))
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    shapes = {f"f32[{','.join(map(str, leaf.shape))}]" for leaf in jax.tree.leaves(state.caches)}
    copies = [line for line in compiled.as_text().splitlines() if " copy(" in line and any(s in line for s in shapes)]
    assert not copies


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perplexity", "confidence", "consistency", "gate"])
def test_untrained_policies_run(pair, name):
    out = rj.Ensemble(pair).generate(PROMPTS, name, max_new_tokens=4)
    used = out.weights[~np.isnan(out.weights[..., 0])]
    np.testing.assert_allclose(used.sum(axis=1), 1, rtol=1e-5)


class TestBadInput:
    def test_ids_instead_of_texts(self, pair, raises_input_error):
        ids = np.ones((1, 3), int)
        raises_input_error(lambda: rj.Ensemble(pair).generate(prompt_ids=ids), "different tokenizers", "as text")

    def test_no_end_token(self, pair, raises_input_error):
        endless = dataclasses.replace(pair[0], config=dataclasses.replace(pair[0].config, end_ids=()))
        raises_input_error(lambda: rj.Ensemble([endless, pair[1]]), "gpt2", "end")

    def test_end_ids_are_one_list_per_member(self, pair, raises_input_error):
        raises_input_error(lambda: rj.Ensemble(pair, end_ids=[1, 2]), "2 lists")
        assert rj.Ensemble(pair, end_ids=[[50_256], [1]]).union.own[1][1] == 50_256

    def test_an_empty_stop_string(self, pair, raises_input_error):
        raises_input_error(lambda: rj.Ensemble(pair).generate(PROMPTS, stop=[""]), "not empty")

    @pytest.mark.parametrize("options", [{"samples": 0}, {"member_tokens": 0}, {"max_new_tokens": [1, 2]}])
    def test_options(self, pair, raises_input_error, options):
        raises_input_error(lambda: rj.Ensemble(pair).generate(PROMPTS, **options), next(iter(options)))

    @pytest.mark.slow
    def test_extending_twice(self, pair, raises_input_error):
        ensemble = rj.Ensemble(pair)
        raises_input_error(lambda: ensemble.extend(ensemble.generate(["x"], max_new_tokens=1)), "keep=True")
