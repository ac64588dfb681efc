"""Texts cut, read once and kept: the same as reading them under the weights."""

import shutil

import jax
import numpy as np
import pytest

import rlae_jax as rj
from rlae_jax.config import AgentConfig
from rlae_jax.fusion import kept as keeping
from rlae_jax.fusion.cutting import Cut, cut_texts, member_of, rules
from rlae_jax.fusion.kept import Kept, keep
from rlae_jax.fusion.policy import OBSERVATION_PARTS, BoundPolicy, Confidence, Dims, Fixed
from rlae_jax.ppo.agent import PPOAgent
from tests.helpers.policies import Reader
from tests.helpers.tokenizers import byte_level, sentencepiece

L = 3
READS = ("hidden", "stats", "span", "prompt", "agreement")
AGENT = PPOAgent(AgentConfig(reads=READS, projection=4, ffn_width=8, span_embedding=4))


def texts_of(rng, letters, n):
    return ["".join(rng.choice(list(letters), rng.integers(1, 30))) for _ in range(n)]


@pytest.fixture(scope="module")
def alike(make_lm):
    tokenizer = byte_level([b"th", b" the"], ["</s>"])
    shapes = ({}, {"width": 12, "layers": 1, "heads": 2, "kv_heads": 1, "head_width": 6})
    return rj.Ensemble(
        [
            make_lm(k, tokenizer=tokenizer, vocab=len(tokenizer), end_ids=(tokenizer.eos_token_id,), **shape)
            for k, shape in enumerate(shapes)
        ]
    )


@pytest.fixture(scope="module")
def union(make_lm):
    tokenizers = byte_level([b" the", b"th", b" x the th"], ["</s>"]), sentencepiece(["▁the", "é", "th"])
    return rj.Ensemble(
        [
            make_lm(k, tokenizer=t, vocab=len(t), end_ids=(t.eos_token_id,), layers=1 + k)
            for k, t in enumerate(tokenizers)
        ]
    )


@pytest.fixture(scope="module")
def data():
    """Fresh in every run, but the same for all tests, which share their programs."""
    rng = np.random.default_rng()
    texts = texts_of(rng, "théx ", 7)
    return ["".join(rng.choice(list("the x"), rng.integers(1, 12))).strip() or "x" for _ in texts], texts


def bound(ensemble, policy, spans):
    dims = Dims(ensemble.widths, spans)
    return BoundPolicy(policy, policy.init(jax.random.key(3), dims), dims, L)


@pytest.mark.parametrize("name", ["alike", "union"])
@pytest.mark.parametrize("policy", [AGENT, pytest.param(Reader(), marks=pytest.mark.rare)])
def test_an_agent_finds_texts_as_likely_as_reading_them_under_it(request, data, name, policy):
    ensemble = request.getfixturevalue(name)
    prompts, texts = data
    cut = cut_texts(ensemble, prompts, texts)
    agent = bound(ensemble, policy, 32)
    kept = keep(ensemble, cut, policy.reads, L)
    expected = ensemble.log_likelihoods(prompts, [[text] for text in texts], agent)
    np.testing.assert_allclose(kept.log_likelihoods(policy, agent.params), np.concatenate(expected), rtol=1e-5)
    assert kept.tokens.tolist() == [len(own) for own in cut.tokens]


@pytest.mark.parametrize("name", ["alike", "union"])
def test_units_are_those_of_whole_distributions(request, data, name):
    """A slow computation from every member's softmax over all its tokens, and which of them may follow."""
    ensemble = request.getfixturevalue(name)
    prompts, texts = data
    weights = np.random.default_rng().dirichlet(np.ones(2))
    for rule in rules(ensemble)[-2:]:
        cut = cut_texts(ensemble, prompts, texts, rule)
        total = np.zeros(len(texts))
        for i, (row, tokens) in enumerate(zip(cut.rows, cut.tokens, strict=True)):
            rows = (row, row) if ensemble.union is None else row
            spelled = ensemble.codec.spell(tokens)
            each = []
            for k, lm in enumerate(ensemble.members):
                own, counts = spelled[k]
                ids, mask = np.zeros((2, 1, 160), np.int32)
                ids[0, : len(rows[k]) + len(own)], mask[0, : len(rows[k]) + len(own)] = [*rows[k], *own], 1
                logits = np.asarray(lm.logits(ids, mask))[0].astype(np.float64)
                p = np.exp(logits - logits.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                p = p[len(rows[k]) - 1 + np.cumsum([0, *counts[:-1]])]
                if ensemble.union is not None:
                    partner = ensemble.union.partner[k]
                    p = np.where(partner >= 0, p[:, np.maximum(partner, 0)], 0.0)
                each.append(p)
            mixture = weights[0] * each[0] + weights[1] * each[1]
            state = 0
            for n, token in enumerate(tokens):
                if ensemble.union is not None:
                    after = np.asarray(ensemble.codec.tables.utf8)[state]
                    mixture[n] = np.where(after >= 0, mixture[n], 0) / mixture[n][after >= 0].sum()
                    state = int(after[token])
                total[i] += np.log(mixture[n][token])
        kept = keep(ensemble, cut, (), L)
        found = kept.log_likelihoods(Fixed(), weights[None].astype(np.float32))
        np.testing.assert_allclose(found, total, rtol=2e-4)
        assert cut.bytes.tolist() == [len(text.encode()) for text in texts]


def test_policies_without_training_see_every_token(alike, data):
    prompts, texts = data
    kept = keep(alike, cut_texts(alike, prompts, texts), ("stats",), 1)
    expected = alike.log_likelihoods(prompts, [[text] for text in texts], "confidence", span_length=1)
    np.testing.assert_allclose(kept.log_likelihoods(Confidence(), ()), np.concatenate(expected), rtol=1e-5)


class TestCutting:
    def test_rules(self, union, alike, raises_input_error):
        assert rules(alike) == ["own"]
        assert rules(union) == ["own:0", "own:1", "longest"]
        assert [member_of(rule, union) for rule in ("own", "own:1", "longest")] == [0, 1, None]
        for rule in ("own:2", "own:x", "own:", "short", "longest:1"):
            raises_input_error(lambda rule=rule: member_of(rule, union), repr(rule), "own:1", "longest")
        raises_input_error(lambda: member_of("longest", alike), "these members have own")

    def test_entries_spell_the_text(self, union, data):
        prompts, texts = data
        for rule in rules(union):
            cut = cut_texts(union, prompts, texts, rule)
            for text, own in zip(texts, cut.tokens, strict=True):
                assert b"".join(map(union.union.entry_bytes, own)).removeprefix(b" ") == text.encode().removeprefix(
                    b" "
                )

    def test_what_a_tokenizer_would_change_is_cut_by_the_longest_match(self, union):
        """The second one knows no space alone, which it spells by the bytes of another character."""
        one, longest = (cut_texts(union, ["x"], ["th  the"], rule).tokens for rule in ("own:1", "longest"))
        assert one == longest
        assert cut_texts(union, ["x"], ["the the"], "own:1").tokens != longest

    def test_the_longest_entry_from_the_left(self, union, data):
        """Against trying all entries at every place."""
        table = union.union
        pieces = {table.entry_bytes(e) for e in np.flatnonzero(table.choosable & ~table.control)}
        for text in data[1]:
            rest, expected = text.encode(), []
            while rest:
                expected.append(max((piece for piece in pieces if rest.startswith(piece)), key=len))
                rest = rest[len(expected[-1]) :]
            (own,) = cut_texts(union, ["x"], [text], "longest").tokens
            assert [table.entry_bytes(e) for e in own] == expected

    def test_a_text_alone_begins_with_the_token_for_it(self, union, alike):
        cut = cut_texts(union, [""], ["the x"], "longest")
        firsts = [lm.tokenizer.bos_token_id for lm in union.members]
        ends = [own[0] for own in union.member_ends]
        assert list(cut.rows[0]) == [[end if first is None else first] for first, end in zip(firsts, ends, strict=True)]
        assert cut_texts(alike, [""], ["the x"]).rows == [[alike.end_ids[0]]]

    @pytest.mark.parametrize("prompt", ["the x", ""])  # a text alone begins with the token for it
    def test_long_texts_in_windows(self, union, prompt):
        """Every token once, each window within the context and behind the text before it."""
        rng = np.random.default_rng()
        text = "".join(rng.choice(list("théx "), 900))
        context = union.context
        text = " ".join(text.split())
        for rule in rules(union):
            cut = cut_texts(union, [prompt], [text], rule)
            assert len(cut.rows) > 1
            assert set(cut.text.tolist()) == {0}
            before = []
            for row, own in zip(cut.rows, cut.tokens, strict=True):
                past = union.codec.spell(before)
                for k, (ids, (_, counts)) in enumerate(zip(row, union.codec.spell(own), strict=True)):
                    assert len(ids) + sum(counts[:-1]) <= context
                    if before:
                        assert len(ids) == context // 2 or len(past[k][0]) + 5 < context // 2
                        first = cut.rows[0][k]
                        begins = first[0] == union.members[k].tokenizer.bos_token_id
                        assert not begins or ids[0] == first[0]
                        shown = ids[1:] if begins else ids
                        assert ([*first, *past[k][0]])[-len(shown) :] == shown
                before += own
            assert b"".join(map(union.union.entry_bytes, before)).strip() == text.encode()

    def test_windows_of_a_size(self, alike):
        cut = cut_texts(alike, ["the x", "x"], ["hthxhthx the", "th"], most=4)
        assert [len(own) for own in cut.tokens] == [4, 2, 1] or max(map(len, cut.tokens)) == 4
        assert cut.text.tolist() == sorted(cut.text.tolist())
        assert cut.longest == 4

    def test_what_cannot_be_cut(self, alike, raises_input_error):
        raises_input_error(lambda: cut_texts(alike, ["x", "x"], ["", "x"]), "without a token", "text 0")
        raises_input_error(lambda: cut_texts(alike, ["x" * 600], ["x"]), "prompt 0 has 601", "512")


class TestKeeping:
    @pytest.fixture
    def small_parts(self, monkeypatch):
        monkeypatch.setattr(keeping, "_PART_TOKENS", 120)

    def assert_same(self, kept: Kept, other: Kept):
        assert len(kept) == len(other)
        for one, two in zip(jax.tree.leaves(kept.take(np.arange(len(kept)))), self.leaves(other), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)

    def leaves(self, kept):
        return jax.tree.leaves(kept.take(np.arange(len(kept))))

    def test_on_disk_in_parts(self, alike, data, tmp_path, small_parts, monkeypatch):
        cut = cut_texts(alike, *data)
        kept = keep(alike, cut, READS, L, directory=tmp_path)
        assert len(kept.parts) > 1
        assert all(isinstance(array, np.memmap) for part in kept.parts for array in part.values())
        self.assert_same(kept, keep(alike, cut, READS, L))
        rows = np.random.default_rng().permutation(len(kept))
        for one, whole in zip(jax.tree.leaves(kept.take(rows)), self.leaves(kept), strict=True):
            np.testing.assert_array_equal(one, whole[rows])

        def reads(*args, **options):
            raise AssertionError("read again")

        monkeypatch.setattr(rj.Ensemble, "read_spans", reads)
        again = keep(alike, cut, READS, L, directory=tmp_path)
        for one, two in zip(self.leaves(again), self.leaves(kept), strict=True):
            np.testing.assert_array_equal(one, two)

    def test_it_goes_on_where_it_was_stopped(self, alike, data, tmp_path, small_parts):
        cut, done = cut_texts(alike, *data), []
        kept = keep(alike, cut, READS, L, directory=tmp_path)
        whole = [np.array(leaf) for leaf in self.leaves(kept)]
        (place,) = tmp_path.iterdir()
        shutil.rmtree(sorted(place.iterdir())[-1])
        again = keep(alike, cut, READS, L, directory=tmp_path, on_progress=done.append)
        assert done[-1] == len(cut.rows)
        for one, two in zip(self.leaves(again), whole, strict=True):
            np.testing.assert_array_equal(one, two)

    def test_an_altered_part_is_told_and_read_again(self, alike, data, tmp_path, small_parts):
        cut = cut_texts(alike, *data)
        whole = [np.array(leaf) for leaf in self.leaves(keep(alike, cut, READS, L, directory=tmp_path))]
        path = sorted(tmp_path.glob("*/00001/stats.npy"))[0]
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.warns(UserWarning, match="stats.npy: content differs.*read again"):
            again = keep(alike, cut, READS, L, directory=tmp_path)
        for one, two in zip(self.leaves(again), whole, strict=True):
            np.testing.assert_array_equal(one, two)

    def test_others_have_other_places(self, alike, data, tmp_path, monkeypatch):
        def places(ensemble, cut, reads=READS, length=L):
            monkeypatch.setattr(rj.Ensemble, "read_spans", lambda *args, **options: None)
            monkeypatch.setattr(keeping, "_arrays", lambda texts, length: {"log_probs": np.zeros((1, 1, 1))})
            keep(ensemble, cut, reads, length, directory=tmp_path)
            return len(list(tmp_path.iterdir()))

        prompts, texts = data
        one = cut_texts(alike, prompts, texts)
        assert [places(alike, one) for _ in range(2)] == [1, 1]
        assert places(alike, one, length=L + 1) == 2
        assert places(alike, one, READS[1:]) == 3
        assert places(alike, cut_texts(alike, prompts, [*texts[1:], texts[0]])) == 4
        assert places(rj.Ensemble(alike.members[::-1]), one) == 5

    def test_nothing_has_the_size_of_a_vocabulary(self, union, data, tmp_path):
        cut = cut_texts(union, *data)
        kept = keep(union, cut, READS, L, directory=tmp_path)
        written = sum(array.nbytes for part in kept.parts for array in part.values())
        assert written == len(kept) * keeping._span_bytes(union, READS, L, None)
        assert written < len(kept) * 4 * (2 * 2 * L + sum(union.widths) + 2 * (len(OBSERVATION_PARTS) + 6))

    def test_too_much_is_refused_before_it_is_begun(self, alike, data, tmp_path, monkeypatch, raises_input_error):
        cut: Cut = cut_texts(alike, *data)
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
        raises_input_error(lambda: keep(alike, cut, READS, L, directory=tmp_path / "new"), "on disk", "100 bytes left")
        assert not (tmp_path / "new").exists()
        monkeypatch.setattr("rlae_jax.memory.of_devices", lambda mesh=None: 100)
        raises_input_error(lambda: keep(alike, cut, READS, L), "of memory", "100 bytes")

    def test_other_operators_are_refused(self, alike, data, raises_input_error):
        cut = cut_texts(alike, *data)
        raises_input_error(lambda: keep(alike.with_fusion("loglinear"), cut, READS, L), "fusion linear", "normaliser")
