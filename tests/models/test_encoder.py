"""Encoders: what loads as what, texts to ids, padding, gradients, adapters, saving, and DeBERTa's scores by hand.

That hidden states and logits equal transformers' is tested in test_families.py. The checkpoints here are the stored
cases of `tests.data.hf`, written from their tensors' names.
"""

import dataclasses
import functools
import json
import math

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import rlae_jax as rj
from rlae_jax.models import ModelConfig, lora, transformer
from rlae_jax.models.config import Disentangled
from rlae_jax.models.disentangled import DisentangledAttention, RelativeEmbeddings, by_distance, relative_rows
from tests.data import hf

CLASSIFIERS = [("bert", "three_labels"), ("roberta", "three_labels"), ("deberta_v2", "conv"), ("deberta_v2", "v3")]
PLATFORMS = ("cpu", "cuda", "tpu")


def write(directory, family, case, **fields):
    """The stored case's checkpoint, with other fields in its config.json where given."""
    stored = hf.read_stored(family, case)
    hf.write_checkpoint(directory, stored.config | fields, stored.tensors, stored.seed)
    return directory


@pytest.fixture(scope="module")
def load(stored_checkpoint):
    """load(family, case) -> the encoder, read once."""
    return functools.cache(lambda family, case: rj.load_encoder(stored_checkpoint(case, family)))


def text(encoder, seed=0, lengths=(6, 3)):
    """Ids, mask and token types of random texts, padded right."""
    rng = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int32)
    types = rng.integers(0, encoder.config.token_types, shape) if encoder.config.token_types else None
    return rng.integers(0, encoder.config.vocab, shape), mask, types


class TestKinds:
    def test_an_encoder_is_no_language_model(self, tmp_path, raises_input_error):
        directory = write(tmp_path / "bert", "bert", "masked")
        raises_input_error(lambda: rj.load(directory), str(directory), "encoder", "bert", "load_encoder")

    @pytest.mark.parametrize(("family", "case"), [("gpt2", "inner"), ("t5", "tied")])
    def test_a_language_model_is_no_encoder(self, tmp_path, raises_input_error, family, case):
        directory = write(tmp_path / family, family, case)
        message = raises_input_error(lambda: rj.load_encoder(directory), str(directory), "language model", family)
        assert message.endswith("load it with load")

    @pytest.mark.parametrize(("family", "case"), [("bert", "masked"), ("roberta", "base"), ("deberta_v2", "v3_base")])
    def test_plain_encoders_have_no_logits(self, load, raises_input_error, family, case):
        encoder = load(family, case)
        assert encoder.labels == ()
        raises_input_error(lambda: encoder.logits(*text(encoder)), str(encoder.path), "plain encoder", "hidden")

    def test_labels_are_in_the_order_of_the_logits(self, tmp_path):
        names = {"2": "good", "0": "bad", "1": "fair"}
        directory = write(tmp_path / "bert", "bert", "three_labels", id2label=names, label2id={})
        encoder = rj.load_encoder(directory)
        assert encoder.labels == ("bad", "fair", "good")
        assert encoder.logits(*text(encoder)).shape == (2, 3)

    def test_next_sentence(self, load):
        encoder = load("bert", "next_sentence")
        assert encoder.labels == ("IsNext", "NotNext")

    def test_another_number_of_labels_than_the_head_has(self, tmp_path, raises_input_error):
        directory = write(tmp_path / "bert", "bert", "three_labels", id2label={"0": "a", "1": "b"})
        raises_input_error(lambda: rj.load_encoder(directory), "classifier.weight is [3, 20], expected [2, 20]")

    @pytest.mark.parametrize(
        ("family", "case", "fields", "part"),
        [
            ("bert", "base", {"is_decoder": True}, "is_decoder"),
            ("bert", "base", {"position_embedding_type": "relative_key"}, "relative_key"),
            ("bert", "base", {"architectures": ["BertForQuestionAnswering"]}, "BertForQuestionAnswering"),
            ("deberta_v2", "conv", {"conv_kernel_size": 4}, "conv_kernel_size = 4"),
            ("deberta_v2", "conv", {"attention_head_size": 4}, "attention_head_size = 4"),
            ("deberta_v2", "v3", {"pooler_hidden_size": 8}, "pooler_hidden_size = 8"),
            ("deberta_v2", "v3", {"position_buckets": 70}, "position_buckets = 70"),
        ],
    )
    def test_unsupported_settings(self, tmp_path, raises_input_error, family, case, fields, part):
        directory = write(tmp_path / family, family, case, **fields)
        raises_input_error(lambda: rj.load_encoder(directory), str(directory), part, "not supported")


class TestCheckpoints:
    def test_the_first_spelling_of_names_and_a_pretraining_head(self, tmp_path, load):
        """gamma and beta, what only other heads need, and `cls.seq_relationship` of a pretraining checkpoint."""
        encoder = load("bert", "next_sentence")
        architecture = ["BertForPreTraining"]
        directory = write(tmp_path / "old", "bert", "next_sentence", architectures=architecture)
        tensors = load_file(directory / "model.safetensors")
        old = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for key, value in tensors.items()
        }
        assert any(key.endswith("gamma") for key in old)
        old |= {"cls.predictions.bias": np.zeros(41, np.float32), "bert.embeddings.position_ids": np.arange(32)}
        save_file(old, directory / "model.safetensors")
        again = rj.load_encoder(directory)
        assert again.labels == encoder.labels
        chex.assert_trees_all_equal(again.params, encoder.params)

    def test_a_head_beside_a_base_without_its_prefix(self, tmp_path, load):
        directory = write(tmp_path / "bare", "deberta_v2", "v3")
        tensors = load_file(directory / "model.safetensors")
        save_file({k.removeprefix("deberta."): v for k, v in tensors.items()}, directory / "model.safetensors")
        again = rj.load_encoder(directory)
        chex.assert_trees_all_equal(again.params, load("deberta_v2", "v3").params)

    def test_no_architecture_is_a_plain_encoder(self, tmp_path, load):
        directory = write(tmp_path / "deberta", "deberta_v2", "v3_base", architectures=None)
        again = rj.load_encoder(directory)
        assert again.labels == ()
        chex.assert_trees_all_equal(again.params, load("deberta_v2", "v3_base").params)

    @pytest.mark.parametrize(
        ("family", "case", "architecture"),
        [
            ("bert", "next_sentence", "BertForNextSentencePrediction"),
            ("bert", "masked", "BertModel"),
            ("roberta", "three_labels", "RobertaForSequenceClassification"),
            ("deberta_v2", "conv", "DebertaV2ForSequenceClassification"),
        ],
    )
    def test_saved_and_loaded_again(self, tmp_path, load, family, case, architecture):
        encoder = load(family, case)
        encoder.save(tmp_path / "saved")
        assert json.loads((tmp_path / "saved" / "config.json").read_text())["architectures"] == [architecture]
        again = rj.load_encoder(tmp_path / "saved")
        assert dataclasses.replace(again.config, end_ids=encoder.config.end_ids) == encoder.config
        chex.assert_trees_all_equal(again.params, encoder.params)

    @pytest.mark.parametrize(("family", "case"), CLASSIFIERS)
    def test_transformers_reads_what_is_saved(self, torch, tmp_path, load, family, case):
        encoder = load(family, case)
        encoder.save(tmp_path / "saved")
        model = hf.from_pretrained(hf.FAMILIES[family].cases[case].architecture, tmp_path / "saved")
        ids, mask, types = text(encoder)
        expected = hf.compute(model, ids, mask, token_types=types)["logits"]
        np.testing.assert_allclose(encoder.logits(ids, mask, types), expected, rtol=2e-5, atol=2e-5)


class TestInputs:
    def test_padding_changes_nothing(self, load):
        """On either side or on both: a text's states and scores stay, also where a convolution runs over it."""
        encoder = load("deberta_v2", "conv")
        rng = np.random.default_rng(0)
        ids = rng.integers(0, encoder.config.vocab, (3, 11))
        mask, types = np.zeros((2, 3, 11), np.int32)
        starts = (0, 2, 6)
        for b, start in enumerate(starts):
            for given, value in ((ids, ids[0, :5]), (mask, 1), (types, [0, 0, 1, 1, 1])):
                given[b, start : start + 5] = value
        hidden = encoder.hidden(ids, mask, types)
        for b, start in enumerate(starts):
            np.testing.assert_allclose(hidden[b, start : start + 5], hidden[0, :5], atol=5e-6)
        scores = encoder.logits(ids, mask, types)
        np.testing.assert_allclose(scores[1:], scores[:1].repeat(2, axis=0), atol=5e-6)

    def test_token_types(self, load):
        encoder = load("bert", "three_labels")
        ids, mask, _ = text(encoder)
        zeros = np.zeros_like(ids)
        np.testing.assert_array_equal(encoder.logits(ids, mask), encoder.logits(ids, mask, zeros))
        assert np.abs(encoder.logits(ids, mask) - encoder.logits(ids, mask, zeros + 1)).max() > 1e-3

    def test_token_types_that_the_model_does_not_know(self, load, raises_input_error):
        encoder = load("deberta_v2", "v3")
        ids, mask, _ = text(encoder)
        raises_input_error(lambda: encoder.logits(ids, mask, np.zeros_like(ids)), str(encoder.path), "token types")

    def test_ids_masks_and_types_of_the_wrong_shape(self, load, raises_input_error):
        encoder = load("bert", "three_labels")
        ids = np.ones((2, 3), np.int32)
        for call in (encoder.logits, encoder.hidden):
            raises_input_error(lambda call=call: call(ids[0]), encoder.name, "ids must be", "[3]")
            raises_input_error(lambda call=call: call(ids, ids[:1]), encoder.name, "mask", "[1, 3]")
            raises_input_error(lambda call=call: call(ids, None, ids[:, :1]), encoder.name, "token types", "[2, 1]")

    @pytest.mark.parametrize(("family", "case", "positions"), [("bert", "masked", 32), ("roberta", "base", 30)])
    def test_more_tokens_than_positions(self, load, raises_input_error, family, case, positions):
        encoder = load(family, case)
        assert encoder.hidden(np.zeros((1, positions), int)).shape == (1, positions, encoder.config.width)
        ids = np.zeros((1, positions + 1), int)
        raises_input_error(lambda: encoder.hidden(ids), f"{positions + 1} tokens", f"{positions} positions")


@pytest.fixture(scope="module")
def with_texts(load, make_tokenizer):
    """A BERT whose tokenizer has a token per letter, and marks texts and pairs as BERT does."""
    from tokenizers.processors import BertProcessing

    tokenizer = make_tokenizer(["?", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"])
    tokenizer._tokenizer.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return dataclasses.replace(load("bert", "three_labels"), tokenizer=tokenizer)


class TestTexts:
    def test_texts(self, with_texts):
        ids, mask, types = with_texts.encode(["abc", "abcdefg"])
        assert ids.tolist()[0] == [1, 3, 4, 5, 2] + [0] * 11
        assert ids.tolist()[1] == [1, *range(3, 10), 2] + [0] * 7
        assert mask.sum(axis=1).tolist() == [5, 9]
        assert types.shape == ids.shape
        assert not types.any()

    def test_pairs(self, with_texts):
        ids, mask, types = with_texts.encode(["ab", "a"], ["c", "bb"])
        assert ids.tolist() == [[1, 3, 4, 2, 5, 2, 0, 0], [1, 3, 2, 4, 4, 2, 0, 0]]
        assert mask.tolist() == [[1] * 6 + [0] * 2] * 2
        assert types.tolist() == [[0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 0, 0]]
        assert with_texts.logits(ids, mask, types).shape == (2, 3)

    def test_long_texts_are_cut_to_the_context(self, with_texts):
        ids, mask, types = with_texts.encode(["a" * 60], ["b" * 9])
        assert mask.tolist() == [[1] * 32]
        assert types.sum() == 10
        assert ids[0].tolist() == [1] + [3] * 20 + [2] + [4] * 9 + [2]

    def test_the_batch_does_not_change_a_texts_scores(self, with_texts):
        together = with_texts.logits(*with_texts.encode(["hello", "a much longer text"]))
        alone = with_texts.logits(*with_texts.encode(["hello"]))
        np.testing.assert_allclose(together[:1], alone, atol=5e-6)

    def test_no_token_types_for_a_model_without(self, load, with_texts):
        encoder = dataclasses.replace(load("deberta_v2", "v3"), tokenizer=with_texts.tokenizer)
        ids, mask, types = encoder.encode(["ab"], ["c"])
        assert types is None
        assert encoder.logits(ids, mask, types).shape == (1, 1)

    def test_wrong_texts(self, load, with_texts, raises_input_error):
        raises_input_error(lambda: with_texts.encode("one"), "lists of strings")
        raises_input_error(lambda: with_texts.encode([]), "no texts")
        raises_input_error(lambda: with_texts.encode(["a", "b"], ["c"]), "2 texts and 1 pairs")
        raises_input_error(lambda: load("bert", "masked").encode(["a"]), "no tokenizer")

    def test_the_tokenizer_is_saved(self, tmp_path, with_texts):
        with_texts.save(tmp_path / "saved")
        again = rj.load_encoder(tmp_path / "saved")
        assert again.config.tokens == 30
        for actual, expected in zip(again.encode(["ab"], ["c"]), with_texts.encode(["ab"], ["c"]), strict=True):
            np.testing.assert_array_equal(actual, expected)


class TestPure:
    def test_gradients(self, load):
        """Every parameter that is read has one, and along a random direction it is the slope."""
        encoder = load("deberta_v2", "conv")
        batch = text(encoder)
        loss = jax.jit(jax.value_and_grad(lambda params: jnp.sum(jnp.tanh(encoder.apply(params, *batch)))))
        params = jax.tree.map(np.asarray, encoder.params)
        gradient = jax.tree.map(np.asarray, loss(params)[1])
        still = [
            jax.tree_util.keystr(path)
            for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
            if not np.abs(leaf).max() > 0
        ]
        assert not still
        rng = np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), params)
        slope = sum(np.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
        step = np.float32(1e-3)
        ahead, behind = (
            loss(jax.tree.map(lambda leaf, d, s=sign: leaf + s * step * d, params, direction))[0] for sign in (1, -1)
        )
        np.testing.assert_allclose((ahead - behind) / (2 * step), slope, rtol=2e-2)

    def test_vmap_over_parameters(self, load):
        encoder = load("bert", "three_labels")
        batch = text(encoder)
        params = jax.tree.map(np.asarray, encoder.params)
        scaled = [jax.tree.map(lambda leaf, s=s: leaf * np.float32(s), params) for s in (1.0, 0.9)]
        together = jax.vmap(lambda params: encoder.apply(params, *batch))(jax.tree.map(lambda *x: np.stack(x), *scaled))
        for params, scores in zip(scaled, together, strict=True):
            np.testing.assert_allclose(scores, encoder.apply(params, *batch), atol=1e-5)

    def test_adapters_are_the_merged_parameters(self, load):
        """Also where the positions are mapped by the content's matrices: each row's positions differ then."""
        encoder = load("deberta_v2", "v3")
        rng = np.random.default_rng(0)

        def draw(*shape):
            return jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32)

        adapters = []
        for _ in range(2):
            factors = {
                path: {
                    "a": draw(*spec.shape[: spec.inputs], 2),
                    "b": draw(2, *spec.shape[spec.inputs :]),
                }
                for path, spec in transformer.linears(encoder.config).items()
            }
            adapters.append(rj.Adapter(rj.LoraConfig(rank=2), factors))
        stack = lora.stack(adapters)
        ids, mask, types = text(encoder)
        adapted = lora.Adapted(encoder.params, stack, lora.one_hot([1, 0], 2))
        together = encoder.apply(adapted, ids, mask, types)
        for row, weights in ((0, [0.0, 1.0]), (1, [1.0, 0.0])):
            merged = lora.merge(encoder.params, stack, weights)
            expected = encoder.apply(merged, ids, mask, types)
            assert np.abs(expected[row] - encoder.logits(ids, mask, types)[row]).max() > 1e-2
            np.testing.assert_allclose(together[row], expected[row], atol=2e-5)

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_lowers_everywhere(self, load, dtype):
        encoder = load("deberta_v2", "conv")
        encoder = dataclasses.replace(encoder, config=dataclasses.replace(encoder.config, dtype=dtype))
        params = transformer.abstract_params(encoder.config)
        ids = jax.ShapeDtypeStruct((2, 7), jnp.int32)
        exported = jax.export.export(jax.jit(encoder.apply), platforms=PLATFORMS)(params, ids, ids, ids)
        assert exported.platforms == PLATFORMS
        assert exported.out_avals[0].shape == (2, 3)
        assert exported.out_avals[0].dtype == jnp.float32


class TestDisentangled:
    def test_rows_of_version_3(self):
        """256 buckets for 512 positions: the nearest 128 distances on either side have rows of their own."""
        spec = Disentangled(span=256, buckets=256, max_position=512)
        rows = relative_rows(700, spec)
        of = dict(zip(range(-699, 700), rows.tolist(), strict=True))
        assert [of[d] for d in (-128, -1, 0, 1, 128)] == [128, 255, 256, 257, 384]
        # Behind: 128 + ceil(127 * log(d / 128) / log(511 / 128)), up to the last bucket at 511.
        expected = {d: 256 + 128 + math.ceil(127 * math.log(d / 128) / math.log(511 / 128)) for d in (129, 200, 400)}
        assert {d: of[d] for d in expected} == expected
        assert of[511] == 511
        assert of[699] == 511
        assert of[-511] == 1
        assert of[-699] == 0
        assert (np.diff(rows) >= 0).all()

    def test_rows_without_buckets(self):
        rows = relative_rows(5, Disentangled(span=3))
        assert rows.tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 5]

    def test_by_distance(self):
        scores = np.random.default_rng(0).normal(size=(2, 3, 5, 9))
        shifted = by_distance(jnp.asarray(scores, jnp.float32))
        for t in range(5):
            for s in range(5):
                np.testing.assert_allclose(shifted[:, :, t, s], scores[:, :, t, 4 - t + s], rtol=1e-6)

    @pytest.mark.parametrize(
        ("buckets", "content_to_position", "position_to_content", "shared"),
        [
            (0, True, True, True),
            (6, True, True, False),
            (6, True, False, False),
            (6, False, True, True),
            (6, False, False, True),
        ],
    )
    def test_attention_score_by_score(self, buckets, content_to_position, position_to_content, shared):
        """Equation 4 and the log buckets written out, for every pair of tokens, in float64."""
        spec = Disentangled(
            span=buckets or 4,
            buckets=buckets,
            max_position=9,
            content_to_position=content_to_position,
            position_to_content=position_to_content,
            shared_projections=shared,
            norm_embeddings=False,
        )
        b, t, d, n, h = 2, 12, 6, 2, 3
        config = ModelConfig(
            vocab=2,
            width=d,
            layers=1,
            heads=n,
            kv_heads=n,
            head_width=h,
            ffn_width=2,
            qkv_bias=True,
            attention_out_bias=True,
            disentangled=spec,
        )
        attention = DisentangledAttention(config, nnx.Rngs(0))
        embeddings = RelativeEmbeddings(config, nnx.Rngs(1))
        rng = np.random.default_rng(0)
        for _, module in attention.iter_modules():
            if hasattr(module, "kernel"):
                module.bias[...] = jnp.asarray(rng.normal(size=module.bias.shape), jnp.float32)
        embeddings.table[...] = jnp.asarray(rng.normal(size=embeddings.table.shape), jnp.float32)
        x = rng.normal(size=(b, t, d)).astype(np.float32)
        mask = np.ones((b, t, t), bool)
        mask[1, :, :4] = False
        actual, _ = attention.sequence(jnp.asarray(x), {}, jnp.asarray(mask), embeddings.sequence(t))

        def project(linear, values):
            kernel, bias = (np.asarray(leaf[...], np.float64) for leaf in (linear.kernel, linear.bias))
            return np.tensordot(values, kernel, (-1, 0)) + bias

        q, k, v = (project(linear, x) for linear in (attention.q, attention.k, attention.v))
        table = np.asarray(embeddings.table[...], np.float64)
        position_k = project(attention.k if shared else attention.position_k, table) if content_to_position else None
        position_q = project(attention.q if shared else attention.position_q, table) if position_to_content else None
        middle = buckets // 2
        scores = np.full((b, n, t, t), -np.inf)
        for row, head, i, j in np.ndindex(scores.shape):
            distance = i - j
            if buckets and abs(distance) > middle:
                share = math.log(abs(distance) / middle) / math.log(8 / middle)
                distance = (middle + math.ceil(share * (middle - 1) - 1e-9)) * (1 if distance > 0 else -1)
            r = min(max(distance + spec.span, 0), 2 * spec.span - 1)
            score = q[row, i, head] @ k[row, j, head]
            if position_k is not None:
                score += q[row, i, head] @ position_k[r, head]
            if position_q is not None:
                score += k[row, j, head] @ position_q[r, head]
            if mask[row, i, j]:
                scores[row, head, i, j] = score / math.sqrt(h * (1 + content_to_position + position_to_content))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        kernel, bias = (np.asarray(leaf[...], np.float64) for leaf in (attention.o.kernel, attention.o.bias))
        expected = np.einsum("bnts,bsnh,nhd->btd", weights, v, kernel) + bias
        np.testing.assert_allclose(actual, expected, atol=1e-5)
