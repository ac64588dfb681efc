"""The Dirichlet against numerical integration and scipy, and its behaviour at the corners of the simplex."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from rlae_jax.ppo.dirichlet import SMALLEST_WEIGHT, Dirichlet, clamp_to_simplex

TINY = 0.02
PAIRS = [(1.0, 1.0), (2.5, 0.7), (30.0, 4.0), (0.3, 0.3), (0.05, 0.2), (TINY, TINY)]
TRIPLES = [(1.0, 1.0, 1.0), (2.0, 0.5, 3.5), (0.3, 0.2, 0.4), (5.0, 1.0, 0.25)]


# Compiling the sampler takes seconds for every shape, so all tests draw as many rows.
N = 4000


def keys(seed=0):
    return jax.random.split(jax.random.key(seed), N)


@jax.jit
def sample(concentration, row_keys):
    return Dirichlet(concentration).sample(row_keys)


def log_weights_of_pair():
    """The line that w1 = 1 / (1 + exp(-t)) maps to the simplex: (log w [N, 2], dt). Its Jacobian is w1 w2."""
    step = 0.05
    t = np.arange(-2200.0, 2200.0, step)
    return -np.logaddexp(0.0, np.stack([-t, t], axis=-1)), step


def log_weights_of_triple():
    """Stick breaking, w1 = s(u), w2 = (1 - w1) s(v), w3 = (1 - w1) (1 - s(v)): its Jacobian is w1 w2 w3."""
    step = 0.25
    t = np.arange(-140.0, 140.0, step)
    u, v = np.meshgrid(t, t, indexing="ij")
    rest = -np.logaddexp(0.0, u)
    log_w = np.stack([-np.logaddexp(0.0, -u), rest - np.logaddexp(0.0, -v), rest - np.logaddexp(0.0, v)], axis=-1)
    return log_w.reshape(-1, 3), step * step


@pytest.fixture(scope="module")
def grids():
    return {2: log_weights_of_pair(), 3: log_weights_of_triple()}


def integrate(alpha, log_w, volume):
    """(log of the normaliser, entropy) by the trapezoid rule, which is exact to rounding for such integrands."""
    mass = np.exp(log_w @ alpha)
    log_z = np.log(np.sum(mass) * volume)
    mean_log_density = np.sum(mass * (log_w @ (alpha - 1.0))) * volume / np.exp(log_z) - log_z
    return log_z, -mean_log_density


@pytest.mark.parametrize("alpha", PAIRS + TRIPLES, ids=str)
class TestNumericalIntegration:
    def test_entropy(self, grids, alpha):
        _, entropy = integrate(np.array(alpha), *grids[len(alpha)])
        ours = float(Dirichlet(jnp.array(alpha)).entropy())
        np.testing.assert_allclose(ours, entropy, rtol=2e-5, atol=2e-4)

    def test_log_prob(self, grids, alpha):
        log_z, _ = integrate(np.array(alpha), *grids[len(alpha)])
        w = np.random.default_rng(0).dirichlet(np.ones(len(alpha)), 50)
        w = (w + 1e-3) / (w + 1e-3).sum(axis=1, keepdims=True)
        expected = np.log(w) @ (np.array(alpha) - 1.0) - log_z
        ours = Dirichlet(jnp.array([alpha])).log_prob(jnp.asarray(w))
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=2e-4)


@pytest.mark.parametrize("alpha", PAIRS, ids=str)
def test_the_density_of_pairs_integrates_to_the_mass_between_the_clamps(alpha):
    t = np.linspace(-13.8, 13.8, 20_001)
    w = 1 / (1 + np.exp(-t))
    points = jnp.asarray(np.stack([w, 1 - w], axis=-1), jnp.float32)
    density = np.exp(np.asarray(Dirichlet(jnp.array([alpha])).log_prob(points), np.float64))
    mass = np.trapezoid(density * w * (1 - w), t)
    first, last = scipy.special.betainc(*alpha, w[[0, -1]])
    np.testing.assert_allclose(mass, last - first, rtol=2e-3)


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_scipy_agrees_row_by_row(k):
    rng = np.random.default_rng(k)
    alpha = np.exp(rng.uniform(np.log(0.1), np.log(50.0), (20, k)))
    w = (rng.dirichlet(np.ones(k), 20) + 1e-3).astype(np.float64)
    w /= w.sum(axis=1, keepdims=True)
    ours = Dirichlet(jnp.asarray(alpha, jnp.float32))
    expected = [scipy.stats.dirichlet(a).logpdf(x) for a, x in zip(alpha, w, strict=True)] if k > 1 else np.zeros(20)
    np.testing.assert_allclose(ours.log_prob(jnp.asarray(w, jnp.float32)), expected, rtol=1e-4, atol=2e-3)
    if k > 1:
        expected = [scipy.stats.dirichlet(a).entropy() for a in alpha]
        np.testing.assert_allclose(ours.entropy(), expected, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("alpha", [[TINY] * 2, [TINY] * 3, [TINY, 5.0], [1e-4, 1e-4], [1e-3, 300.0, 0.05]], ids=str)
@pytest.mark.device
def test_samples_lie_on_the_simplex_and_have_finite_densities_and_gradients(alpha):
    concentration = jnp.tile(jnp.array(alpha), (N, 1))
    w = sample(concentration, keys())
    assert w.shape == concentration.shape
    assert float(jnp.min(w)) >= SMALLEST_WEIGHT * 0.99
    np.testing.assert_allclose(jnp.sum(w, axis=1), 1.0, rtol=1e-6)
    log_prob, gradient = jax.value_and_grad(lambda a: jnp.sum(Dirichlet(a).log_prob(w)))(concentration)
    assert np.isfinite(log_prob)
    assert np.all(np.isfinite(Dirichlet(concentration).log_prob(w)))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.isfinite(Dirichlet(concentration).entropy()))


@pytest.mark.parametrize("alpha", [[TINY, TINY], [TINY, 0.06], [0.5, 1.5, 3.0], [20.0, 5.0]], ids=str)
def test_moments_of_samples(alpha):
    w = np.asarray(sample(jnp.tile(jnp.array(alpha), (N, 1)), keys(seed=3)), np.float64)
    reference = scipy.stats.dirichlet(alpha)
    error = np.sqrt(reference.var() / N)
    assert np.all(np.abs(w.mean(axis=0) - reference.mean()) < 4 * error)
    np.testing.assert_allclose(w.var(axis=0), reference.var(), rtol=0.12)


def test_a_rows_sample_depends_on_its_key_and_concentration_alone():
    concentration = jnp.asarray(np.random.default_rng(0).uniform(0.1, 4.0, (N, 3)), jnp.float32)
    row_keys = keys()
    together = sample(concentration, row_keys)
    order = np.random.default_rng(1).integers(0, N, N)
    np.testing.assert_array_equal(sample(concentration[order], row_keys[order]), together[order])
    other = sample(concentration, keys(seed=1))
    assert np.all(np.any(np.asarray(other != together), axis=1))


def test_mode_is_the_mean():
    np.testing.assert_allclose(Dirichlet(jnp.array([[1.0, 3.0], [0.1, 0.1]])).mode(), [[0.25, 0.75], [0.5, 0.5]])


def test_log_prob_at_a_corner_is_that_of_the_clamped_weights():
    distribution = Dirichlet(jnp.array([[0.5, 2.0]]))
    corner = jnp.array([[0.0, 1.0]])
    assert np.isfinite(distribution.log_prob(corner)[0])
    clamped = distribution.log_prob(clamp_to_simplex(corner))
    np.testing.assert_allclose(distribution.log_prob(corner), clamped, rtol=1e-6)
    np.testing.assert_allclose(clamp_to_simplex(corner)[0, 0], SMALLEST_WEIGHT, rtol=1e-4)
