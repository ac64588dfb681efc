"""Members with different tokenizers write whole characters, whatever the script, and rows that know nothing of each
other."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.fusion.prompts import pad_rows
from rlae_jax.fusion.state import answers_of
from rlae_jax.fusion.vocabulary import token_bytes
from rlae_jax.models.lm import read_tokenizer
from tests.helpers.tokenizers import byte_level, sentencepiece

REAL = {
    "gpt2": ("tokenizers/gpt2", (50_256,)),
    "mistral_v3": ("tokenizers/mistral_v3", (2,)),
    "stories": ("models/stories260K", (2,)),
    "neox": ("tokenizers/neox", (0,)),
}
# Letters of six scripts by code points (the CJK ones are few of many), and emoji.
SCRIPTS = {
    "Latin": [*range(0x61, 0x7B), 0xE9, 0xFC, 0xF1, 0x142],
    "Cyrillic": [*range(0x430, 0x450)],
    "Greek": [*range(0x3B1, 0x3CA)],
    "Arabic": [*range(0x627, 0x63B), *range(0x641, 0x64B)],
    "Devanagari": [*range(0x905, 0x90D), *range(0x915, 0x93A), *range(0x93E, 0x945), 0x94D],
    "CJK": [*range(0x4E00, 0x4E40), *range(0x3042, 0x3080)],
    "emoji": [*range(0x1F600, 0x1F640), 0x1F468, 0x200D, 0x1F469],
}
REPLACEMENT = "\ufffd"
N = 12


def make_prompts(n, seed=0):
    """A few words each, of one script or of two."""
    rng = np.random.default_rng(seed)
    prompts = []
    for i in range(n):
        names = [list(SCRIPTS)[i % len(SCRIPTS)], *rng.choice(list(SCRIPTS), int(i % 5 == 0))]
        words = [
            "".join(map(chr, rng.choice(SCRIPTS[name], rng.integers(1, 6))))
            for name in names
            for _ in range(rng.integers(1, 3))
        ]
        prompts.append(" ".join(words))
    return prompts


@pytest.fixture(scope="module")
def make_ensemble(shared, make_lm):
    """Tiny members of the named tokenizers, almost flat, but with spread among the tokens that are parts of characters:
    models that read nothing would rarely write one."""

    def make(*names):
        members = []
        for seed, name in enumerate(names):
            path, ends = REAL[name]
            tokenizer = read_tokenizer(shared / path)
            fields = {"layers": 1, "vocab": len(tokenizer), "tokenizer": tokenizer, "end_ids": ends, "name": name}
            lm = make_lm(seed, sharpness=1.0, **fields)
            pieces = [piece or b"" for piece in token_bytes(tokenizer, name)]
            parts = np.array([piece.decode(errors="ignore").encode() != piece for piece in pieces])
            head = np.asarray(lm.params["head"]["kernel"]) * np.where(parts, 3.0, 1.0).astype(np.float32)
            members.append(dataclasses.replace(lm, params=lm.params | {"head": {"kernel": jnp.asarray(head)}}))
        return rj.Ensemble(members)

    return make


def entries_of(ensemble, prompts, seed=0, **options):
    """(prompts' ids, the entries of every row, ends excluded, which rows ended)."""
    spec = ensemble.spec(max_new_tokens=N, temperature=1.0, **options)
    rows = ensemble.encode(prompts)
    weights = np.full((len(rows), len(ensemble.members)), 1 / len(ensemble.members), np.float32)
    state = ensemble.run(rows, weights, seed, spec)
    chosen = zip(state.tokens, state.steps, state.ended, strict=True)
    return rows, [tokens[: n - ended].tolist() for tokens, n, ended in chosen], state


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(("gpt2", "mistral_v3"), marks=pytest.mark.slow),
        pytest.param(("stories", "neox"), marks=pytest.mark.rare),
    ],
    ids="+".join,
)
def test_every_output_is_valid_text(make_ensemble, names):
    ensemble = make_ensemble(*names)
    union = ensemble.union
    prompts = make_prompts(200)
    assert not any(REPLACEMENT in prompt for prompt in prompts)
    rows, entries, _ = entries_of(ensemble, prompts)
    texts = ensemble.decode(rows, entries)
    seen = collections.Counter()
    for text, chosen in zip(texts, entries, strict=True):
        pieces = [union.entry_bytes(entry) for entry in chosen]
        written, whole = text.encode("utf-8", errors="strict"), b"".join(pieces)
        assert whole.startswith(written)
        cut = whole[len(written) :]  # the beginning of one character
        assert len(cut) < 4
        if cut:
            with pytest.raises(UnicodeDecodeError, match="unexpected end of data"):
                cut.decode()
            seen["cut"] += 1
        assert text.count(REPLACEMENT) == sum(piece.count(REPLACEMENT.encode()) for piece in pieces)
        seen["characters"] += len(text)
        seen["beyond ASCII"] += sum(ord(character) > 127 for character in text)
        seen["parts of characters"] += sum(piece.decode(errors="ignore").encode() != piece for piece in pieces)
        assert not any(union.ends[entry] for entry in chosen)
        assert all(union.choosable[entry] for entry in chosen)
    # What was seen is worth the name: many scripts, characters put together from parts, some cut at the end.
    assert seen["characters"] > 2000
    assert seen["beyond ASCII"] > 50
    assert seen["parts of characters"] > 200
    assert seen["cut"] > 10


@pytest.mark.slow
def test_a_row_depends_neither_on_the_batch_nor_on_padding(make_lm):
    """Members without near-ties: rows that wait for each other's long entries stay what they are alone."""
    words = ["once upon", " a time", " мир", "你好", "é", "αβγ"]
    members = []
    for seed, tokenizer in enumerate([byte_level([w.encode() for w in words], ["</s>"]), sentencepiece(["▁the", "é"])]):
        fields = {"layers": 1, "vocab": len(tokenizer), "tokenizer": tokenizer, "end_ids": (tokenizer.eos_token_id,)}
        members.append(make_lm(seed, **fields))
    ensemble = rj.Ensemble(members)
    prompts = make_prompts(7)
    seeds = [11, 7, 5, 3, 2, 13, 17]
    rows, together, state = entries_of(ensemble, prompts, seeds)
    assert len({str(row) for row in together}) >= 6
    assert max(ensemble.union.lengths(1)[[entry for row in together for entry in row]]) > 4  # some waiting there was
    order = [6, 2, 2, 0]
    _, part, _ = entries_of(ensemble, [prompts[b] for b in order], [seeds[b] for b in order])
    assert part == [together[b] for b in order]

    # Padding on the right and in other widths, given to the compiled function itself.
    spec = ensemble.spec(max_new_tokens=N, temperature=1.0)
    ids, masks = zip(*(pad_rows(own, max(map(len, own)) + 5) for own in zip(*rows, strict=True)), strict=True)
    ids = tuple(np.where(mask, own, 7) for own, mask in zip(ids, masks, strict=True))
    flipped = []
    for own, mask in zip(ids, masks, strict=True):
        order = np.argsort(mask == 0, axis=1, kind="stable")
        flipped.append([np.take_along_axis(array, order, axis=1) for array in (own, mask)])
    ids, masks = zip(*flipped, strict=True)
    assert masks[0][:, 0].all()
    weights = np.full((len(rows), 2), 0.5, np.float32)
    keys = jax.vmap(jax.random.key)(np.array(seeds, np.uint32))
    right = jax.jit(lambda *args: answers_of(rj.decode(*args)))(ensemble.params, ids, masks, weights, keys, spec)
    np.testing.assert_array_equal(right.tokens, state.tokens)
    np.testing.assert_array_equal(right.steps, state.steps)
