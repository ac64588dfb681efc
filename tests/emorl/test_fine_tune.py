"""Stacked adapters: each is trained as it would be alone, on log-probabilities that a plain model gives."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import rlae_jax as rj
from rlae_jax.emorl import fine_tune, losses
from rlae_jax.emorl.fine_tune import EMORLConfig
from rlae_jax.fusion.prompts import pad_rows, prompts_from_arrays
from rlae_jax.models import LoraConfig, lora, transformer
from tests.data import hf
from tests.helpers.adapters import add_by_hand, leaf_at
from tests.helpers.recurrent import recurrent_lm

M, B, K, N = 3, 4, 2, 6
SEEDS = np.array([3, 5, 8], np.uint32)
ADAPTER = LoraConfig(rank=2, alpha=4.0, dropout=0.2)


def settings(**changes):
    return EMORLConfig(
        **{"lora": ADAPTER, "batch": B, "samples": K, "max_new_tokens": N, "learning_rate": 1e-2} | changes
    )


@pytest.fixture(
    scope="module", params=["decoder", *(pytest.param(name, marks=pytest.mark.rare) for name in ("t5", "delta"))]
)
def lm(request, make_lm, tmp_path_factory):
    if request.param == "decoder":
        return make_lm(0, layers=1, sharpness=3.0, end_ids=(6, 18))
    if request.param == "delta":
        return recurrent_lm(make_lm, "delta", layers=1, sharpness=3.0, end_ids=(6, 18))
    stored = hf.read_stored("t5", "untied")
    directory = tmp_path_factory.mktemp("t5") / "t5"
    hf.write_checkpoint(directory, stored.config, stored.tensors, stored.seed)
    return rj.load(directory)


def fresh(lm, config, seeds=SEEDS, noise=0.05):
    """A stack whose adapters change something already."""
    state = fine_tune.join([fine_tune.begin(lm.config, config, int(seed)) for seed in seeds])
    factors = {
        path: leaf | {"b": noise * jax.random.normal(jax.random.key(i), leaf["b"].shape)}
        for i, (path, leaf) in enumerate(state.factors.items())
    }
    return state._replace(factors=factors, step=jnp.array([2, 7, 4], jnp.int32)[: len(seeds)])


def spec_of(lm, config):
    ensemble = rj.Ensemble([lm.with_adapters([rj.init_adapter(lm, config.lora)])])
    return ensemble.spec(max_new_tokens=config.max_new_tokens, temperature=config.temperature)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    ids, mask = pad_rows([rng.integers(0, 23, rng.integers(2, 8)).tolist() for _ in range(M * B)], 8)
    return prompts_from_arrays(ids, mask, N)


def block_of(prompts, m):
    return jax.tree.map(lambda leaf: leaf[m * B : (m + 1) * B], prompts)


def merged(lm, state, m, config):
    adapter = rj.Adapter(config.lora, jax.tree.map(lambda leaf: leaf[m], state.factors))
    return dataclasses.replace(lm, params=add_by_hand(lm, [adapter], [1.0]))


@pytest.fixture(scope="module")
def sampled(lm, prompts):
    config = settings()
    state = fresh(lm, config)
    return state, fine_tune.sample(lm.params, state, prompts, SEEDS, spec_of(lm, config), config)


def test_samples_do_not_depend_on_what_else_is_in_the_stack(lm, prompts, sampled):
    config = settings()
    state, written = sampled
    spec = spec_of(lm, config)
    for m in range(M):
        one = fine_tune.sample(
            lm.params, fine_tune.take(state, m), block_of(prompts, m), SEEDS[m : m + 1], spec, config
        )
        block = slice(m * B * K, (m + 1) * B * K)
        np.testing.assert_array_equal(one.tokens, np.asarray(written.tokens)[block])
        np.testing.assert_array_equal(one.mask, np.asarray(written.mask)[block])
    texts = {tuple(row) for row in np.asarray(written.tokens).tolist()}
    assert len(texts) > M * B  # samples of a prompt differ


@pytest.mark.device
def test_log_probabilities_are_those_of_a_merged_model(lm, prompts, sampled):
    """One row at a time and without padding; the end token counts."""
    config = settings()
    state, written = sampled
    ids, mask = np.asarray(prompts.ids[0]), np.asarray(prompts.mask[0])
    adapters = lora.for_blocks(fine_tune._stack(state.factors, config, M))
    found = fine_tune.read(lm.config, lm.params, adapters, ids, mask, written.tokens)
    base = fine_tune.read(lm.config, lm.params, None, ids, mask, written.tokens)
    for row in range(0, M * B * K, 3):
        n = int(np.sum(written.mask[row]))
        asked = ids[row // K][mask[row // K].astype(bool)]
        tokens = np.asarray(written.tokens)[row, :n]
        for model, expected in ((merged(lm, state, row // (B * K), config), found), (lm, base)):
            if lm.config.encoder is None:
                text = np.concatenate([asked, tokens])[None]
                alone = np.asarray(model.log_probs(text))[0, -n:]
            else:
                start = np.concatenate([[lm.config.start_id or 0], tokens])[None]
                alone = np.asarray(model.log_probs(asked[None], None, start))[0]
            np.testing.assert_allclose(np.asarray(expected.log_probs)[row, :n], alone, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("algorithm", ["scst", "grpo", "ppo"])
def test_a_step_of_the_stack_is_each_adapters_own(lm, prompts, sampled, algorithm):
    # Adam divides by its gradients' size, so that rounding is a share of the step: a small one.
    config = settings(algorithm=algorithm, epochs=1 if algorithm == "scst" else 2, learning_rate=4e-4)
    _, written = sampled
    rewards = jnp.asarray(np.random.default_rng(1).random((M, B * K)), jnp.float32)
    together, told = fine_tune.update(lm.params, fresh(lm, config), prompts, written, rewards, SEEDS, lm.config, config)
    for m in range(M):
        one = slice(m, m + 1)
        own = jax.tree.map(lambda leaf, m=m: leaf.reshape(M, B * K, *leaf.shape[1:])[m], written)
        alone, told_alone = fine_tune.update(
            *(lm.params, fine_tune.take(fresh(lm, config), m), block_of(prompts, m), own, rewards[one], SEEDS[one]),
            *(lm.config, config),
        )
        before, own_of_stack = fine_tune.take(fresh(lm, config), m), fine_tune.take(together, m)
        # After one update the optimiser's first moment is a tenth of each update's gradient.
        moments = [optax.tree.get(state.optimiser, "mu")[0] for state in (alone, own_of_stack)]
        for x, y, start, gradient, of_stack in zip(
            *(jax.tree.leaves(state.factors) for state in (alone, own_of_stack, before)),
            *map(jax.tree.leaves, moments),
            strict=True,
        ):
            np.testing.assert_allclose(gradient, of_stack, atol=1e-5)
            felt = np.abs(gradient) > 1e-6  # of what is 0 but for rounding, Adam makes a whole step
            np.testing.assert_allclose(np.where(felt, x, 0), np.where(felt, y, 0), atol=1e-5)
            assert not np.array_equal(x, start)
            assert felt.mean() > 0.5
        for name, value in told_alone.items():
            np.testing.assert_allclose(value[0], told[name][m], rtol=1e-4, atol=1e-5)
    assert together.step.tolist() == [3, 8, 5]


def test_steps_of_grpo_written_out(lm, prompts, sampled):
    """Two updates from one batch, by loops over tokens, through a model with the adapter added to its kernels."""
    if lm.config.encoder is not None:
        pytest.skip("written out for decoders")
    plain = dataclasses.replace(ADAPTER, dropout=0.0)
    config = settings(algorithm="grpo", epochs=2, lora=plain, learning_rate=3e-3, kl_weight=0.3, clip=0.01)
    _, written = sampled
    seeds = SEEDS[:1]
    rewards = np.random.default_rng(4).random((1, B * K)).astype(np.float32)
    own = jax.tree.map(lambda leaf: leaf[: B * K], written)
    found, told = fine_tune.update(
        *(lm.params, fresh(lm, config, seeds), block_of(prompts, 0), own, jnp.asarray(rewards), seeds),
        *(lm.config, config),
    )

    texts = []
    for row in range(B * K):
        asked = np.asarray(prompts.ids[0])[row // K][np.asarray(prompts.mask[0])[row // K].astype(bool)]
        texts.append((asked, np.asarray(own.tokens)[row, : int(np.sum(own.mask[row]))]))
    ids, real = map(jnp.asarray, pad_rows([[*asked, *tokens] for asked, tokens in texts], 8 + N))
    means = rewards.reshape(B, K).mean(axis=1)
    spreads = np.sqrt(((rewards.reshape(B, K) - means[:, None]) ** 2).mean(axis=1))
    advantages = [(rewards[0, row] - means[row // K]) / (spreads[row // K] + 1e-4) for row in range(B * K)]

    def log_probs(factors):
        params = jax.tree.map(lambda leaf: leaf, lm.params)
        for path, pair in factors.items():
            layer = leaf_at(params, path)
            layer["kernel"] = layer["kernel"] + plain.alpha / plain.rank * jnp.tensordot(pair["a"], pair["b"], axes=1)
        model = transformer.Model(lm.config, params)
        predicted = jax.nn.log_softmax(model.logits(model.forward(ids, real)[0]), axis=-1)
        return [
            jnp.stack([predicted[row, t - len(tokens) - 1, token] for t, token in enumerate(tokens)])
            for row, (_, tokens) in enumerate(texts)
        ]

    factors = jax.tree.map(lambda leaf: leaf[0], fresh(lm, config, seeds).factors)
    base, old = map(jax.jit(log_probs), (jax.tree.map(jnp.zeros_like, factors), factors))

    def loss(factors):
        total = 0.0
        for row, new in enumerate(log_probs(factors)):
            gain = 0.0
            for t in range(len(new)):
                ratio = jnp.exp(new[t] - old[row][t])
                held = jnp.minimum(jnp.maximum(ratio, 1 - 0.01), 1 + 0.01)
                gain += jnp.minimum(ratio * advantages[row], held * advantages[row])
            total += -gain / len(new) + 0.3 * jnp.sum((new - base[row]) ** 2) / 2
        return total / (B * K)

    optimiser = optax.chain(optax.clip_by_global_norm(config.gradient_norm), optax.adam(3e-3))
    gradient = jax.jit(jax.grad(loss))
    kept, expected = optimiser.init(factors), factors
    for _ in range(2):
        changes, kept = optimiser.update(gradient(expected), kept)
        expected = optax.apply_updates(expected, changes)
    assert told["clip_fraction"][0] > 0.05  # the second update leaves the interval
    moved = 0.0
    for path, pair in expected.items():
        for side, leaf in pair.items():
            np.testing.assert_allclose(found.factors[path][side][0], leaf, atol=2e-4)
            moved = max(moved, float(np.abs(leaf - factors[path][side]).max()))
    assert moved > 3e-3


@pytest.mark.parametrize("algorithm", ["scst", "ppo"])
def test_accumulated_gradients_are_those_of_the_whole_batch(lm, prompts, sampled, algorithm):
    _, written = sampled
    rewards = jnp.asarray(np.random.default_rng(2).random((M, B * K)), jnp.float32)
    found = []
    for parts in (1, 2, 4):
        config = settings(algorithm=algorithm, accumulate=parts, learning_rate=1e-4)
        found.append(
            fine_tune.update(lm.params, fresh(lm, config), prompts, written, rewards, SEEDS, lm.config, config)
        )
    for state, told in found[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), state.factors, found[0][0].factors)
        for name, value in told.items():
            np.testing.assert_allclose(value, found[0][1][name], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_changes_nothing_has_no_kl_and_a_changed_one_is_pulled_back(lm, prompts, sampled):
    config = settings(kl_weight=10.0, lora=dataclasses.replace(ADAPTER, dropout=0.0), learning_rate=1e-3)
    _, written = sampled
    rewards = jnp.zeros((M, B * K))
    zero = fine_tune.join([fine_tune.begin(lm.config, config, int(seed)) for seed in SEEDS])
    step = lambda state: fine_tune.update(  # noqa: E731
        lm.params, state, prompts, written, rewards, SEEDS, lm.config, config
    )
    _, nothing = step(zero)
    state, told = step(fresh(lm, config))
    _, after = step(state)
    # Two programs that round otherwise differ by a rounding a token, whose square is the KL.
    np.testing.assert_allclose(nothing["kl"], 0, atol=1e-8)
    assert np.all(np.asarray(told["kl"]) > 1e-5)
    assert np.all(np.asarray(after["kl"]) < np.asarray(told["kl"]))


class TestTokenAdvantages:
    def test_against_loops(self):
        rng = np.random.default_rng(0)
        rewards, values = rng.random(5), rng.random((5, 6))
        mask = np.arange(6) < np.array([6, 1, 3, 4, 2])[:, None]
        found, targets = losses.token_advantages(*map(jnp.asarray, (rewards, values)), jnp.asarray(mask), 0.9)
        for b in range(5):
            n = mask[b].sum()
            advantage = 0.0
            for t in reversed(range(n)):
                last = t == n - 1
                delta = (rewards[b] if last else values[b, t + 1]) - values[b, t]
                advantage = delta + (0.0 if last else 0.9 * advantage)
                np.testing.assert_allclose(found[b, t], advantage, rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(targets[b, t], advantage + values[b, t], rtol=1e-5, atol=1e-6)

    def test_lambda_one_is_the_reward_minus_the_value(self):
        values = jnp.asarray(np.random.default_rng(1).random((2, 4)), jnp.float32)
        mask = jnp.arange(4)[None] < jnp.array([4, 2])[:, None]
        found, _ = losses.token_advantages(jnp.array([1.0, 0.5]), values, mask, 1.0)
        expected = jnp.where(mask, jnp.array([[1.0], [0.5]]) - values, 0.0)
        np.testing.assert_allclose(jnp.where(mask, found, 0.0), expected, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["scst", "grpo", "ppo"])
def test_each_adapter_learns_its_own_objective(make_lm, prompts, algorithm):
    """One wants many tokens of a kind, another few."""
    lm = make_lm(0, layers=1, end_ids=(6, 18))
    config = settings(algorithm=algorithm, samples=8, learning_rate=5e-2, kl_weight=0.0, batch=B, epochs=1)
    seeds = SEEDS[:2]
    state = fine_tune.join([fine_tune.begin(lm.config, config, int(seed)) for seed in seeds])
    spec = spec_of(lm, config)
    prompts = jax.tree.map(lambda leaf: leaf[: 2 * B], prompts)
    history = []
    for _ in range(25):
        written = fine_tune.sample(lm.params, state, prompts, seeds, spec, config)
        tokens, real = np.asarray(written.tokens), np.asarray(written.mask)
        share = (((tokens < 10) & real).sum(axis=1) / real.sum(axis=1)).reshape(2, -1)
        rewards = np.stack([share[0], 1 - share[1]]).astype(np.float32)
        history.append(rewards.mean(axis=1))
        state, _ = fine_tune.update(lm.params, state, prompts, written, jnp.asarray(rewards), seeds, lm.config, config)
    first, last = np.mean(history[:3], axis=0), np.mean(history[-3:], axis=0)
    assert np.all(last > first + 0.15), (first, last)


def test_what_settings_refuse(raises_input_error):
    raises_input_error(lambda: EMORLConfig(algorithm="dpo"), "scst, grpo, ppo", "dpo")
    raises_input_error(lambda: EMORLConfig(samples=1), "at least 2")
    raises_input_error(lambda: EMORLConfig(batch=0), "batch is 0", "at least 1")
    raises_input_error(lambda: EMORLConfig(schedule="steps"), "cosine", "steps")
    assert EMORLConfig(algorithm="ppo", samples=1).samples == 1
