"""The bounded cache of compiled programs: what goes, what stays, what is compiled again, and what a call costs."""

import dataclasses
import functools
import gc
import threading
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rlae_jax as rj
from benchmarks import shapes
from rlae_jax import compilation
from rlae_jax.fusion import programs


@pytest.fixture(autouse=True)
def own_cache(monkeypatch):
    """A cache of four programs; what others have compiled stays where it is."""
    monkeypatch.setattr(compilation, "MOST_PROGRAMS", 4)
    monkeypatch.setattr(compilation, "_programs", compilation._Programs())


def counted(**options):
    """A jitted function, and how often it was traced for which shape."""
    traced = []

    @functools.partial(compilation.jit, **options)
    def double(x, times=2):
        traced.append(x.shape)
        return x * times

    return double, traced


def test_the_least_recently_used_goes():
    double, traced = counted()
    for n in (1, 2, 3, 4, 1, 5):
        np.testing.assert_array_equal(double(jnp.ones(n)), np.full(n, 2.0))
    assert traced == [(1,), (2,), (3,), (4,), (5,)]
    assert compilation.count() == double.cache_size() == 4
    double(jnp.ones(1))  # was used after 2, which went
    assert len(traced) == 5
    np.testing.assert_array_equal(double(jnp.ones(2)), np.full(2, 2.0))
    assert traced[5:] == [(2,)]


def test_one_order_over_all_functions():
    (one, traced), (other, _) = counted(), counted()
    one(jnp.ones(1))
    for n in range(1, 5):
        other(jnp.ones(n))
    assert one.cache_size() == 0
    one(jnp.ones(1))
    assert len(traced) == 2


def test_mappings_fall_and_answers_stay(make_lm):
    if not compilation.mappings():
        pytest.skip("the system does not tell its mappings")
    ensemble = rj.Ensemble([make_lm(0, layers=1)])
    ids = np.ones((1, 3), int)
    found, written = [], []
    for n in (*range(1, 8), 1, 2):
        written.append(ensemble.generate(prompt_ids=ids, max_new_tokens=n).tokens[0])
        found.append(compilation.mappings())
    assert written[7:] == written[:2]
    assert programs.decode_batch.cache_size() <= 4
    each = found[2] - found[1]
    assert each > 50
    assert max(found[5:]) < found[3] + 3 * each


def test_mappings_are_a_bound_of_their_own(monkeypatch):
    monkeypatch.setattr(compilation, "MOST_PROGRAMS", 256)
    held = iter([10, 10, 10, 900, 400, *[10] * 20])
    monkeypatch.setattr(compilation, "mappings", lambda: next(held))
    monkeypatch.setattr(compilation, "most_mappings", lambda: 500)
    double, traced = counted()
    for n in range(1, 5):
        double(jnp.ones(n))
    assert compilation.count() == 3
    double(jnp.ones(4))
    double(jnp.ones(1))
    assert traced[4:] == [(1,)]


def test_traces_of_inner_functions_go_with_their_programs(monkeypatch):
    monkeypatch.setattr(compilation, "_TRACES", 3)
    inner = jax.jit(lambda x: x + 1)
    outer = compilation.jit(lambda x: inner(x) * 2)
    for n in range(1, 8):
        known = outer(np.ones(n))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiled.append(event))
    compilation._forget_traces()
    np.testing.assert_array_equal(outer(np.ones(7)), known)
    assert "/jax/core/compile/backend_compile_duration" not in compiled


def test_what_is_kept_stays_until_it_is_released():
    class Keeper:
        pass

    double, traced = counted()
    keeper = Keeper()
    with compilation.kept_for(keeper):
        double(jnp.ones(1))
        other = threading.Thread(target=double, args=(jnp.ones(2),))  # which keeps nothing
        other.start()
        other.join()
    for n in range(3, 10):
        double(jnp.ones(n))
    traced.clear()
    double(jnp.ones(1))
    assert traced == []
    compilation.release(keeper)
    for n in range(3, 10):
        double(jnp.ones(n))
    double(jnp.ones(1))
    assert traced[-1] == (1,)
    with compilation.kept_for(keeper):
        double(jnp.ones(1))
    del keeper
    gc.collect()
    for n in range(3, 10):
        double(jnp.ones(n))
    double(jnp.ones(1))
    assert traced[-1] == (1,)


def test_more_is_kept_than_there_is_room_for():
    double, traced = counted()
    with compilation.kept_for(double):
        for n in range(1, 8):
            double(jnp.ones(n))
    for n in range(1, 8):
        double(jnp.ones(n))
    assert len(traced) == 7


class Pair(NamedTuple):
    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    scale: Any
    times: int = dataclasses.field(default=1, metadata={"static": True})


@pytest.mark.parametrize(
    "alike",
    [
        (np.ones(3, np.float32), jnp.ones(3)),
        (2.0, 3.0),
        ({"a": np.ones(2), "b": 1.0}, {"a": np.zeros(2), "b": 5.0}),
        (Pair(1, np.ones(2)), Pair(7, np.zeros(2))),
        (Settings(np.float32(1.0), 3), Settings(np.float32(2.0), 3)),
        ([np.ones(2), None], [np.zeros(2), None]),
    ],
)
def test_nothing_is_compiled_that_jax_would_not(alike):
    ours = compilation.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))
    theirs = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree))
    for value in alike:
        jax.tree.map(np.testing.assert_array_equal, ours(value), theirs(value))
    assert compilation.count() == 1
    assert ours.cache_size() == theirs._cache_size()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Pair(np.ones(2), np.ones(2)), Pair(np.ones(2), np.ones(3))),
        (Settings(np.ones(2), 1), Settings(np.ones(2), 2)),
        ((np.ones(2), {"a": np.ones(3)}), (np.ones(2), {"a": np.ones(4)})),
        (Pair(None, np.ones(2)), Pair(np.ones(2), np.ones(2))),
    ],
)
def test_outlines_tell_arguments_apart(one, other):
    assert compilation._outline(one) != compilation._outline(other)


def test_static_arguments_by_place_and_by_name():
    double, traced = counted(static_argnames="times")
    for times in (2, 3, 2, 3):
        np.testing.assert_array_equal(double(jnp.ones(1), times=times), [float(times)])
        np.testing.assert_array_equal(double(jnp.ones(1), times), [float(times)])
    assert len(traced) == 4
    by_place = compilation.jit(lambda n, x: x * n, static_argnums=0)
    np.testing.assert_array_equal(by_place(3, jnp.ones(2)), [3.0, 3.0])


def test_arguments_with_one_outline_do_not_gather(monkeypatch):
    monkeypatch.setattr(compilation, "MOST_PROGRAMS", 256)
    monkeypatch.setattr(compilation, "_MOST_SHARING", 3)
    total = compilation.jit(lambda tree: sum(jnp.sum(leaf) for leaf in tree))
    for n in range(1, 10):
        assert total([jnp.ones(1)] * 4 + [jnp.ones(n)]) == 4 + n
        assert compilation.count() <= 4


def test_inside_of_other_programs_and_transformations():
    double, _ = counted()
    np.testing.assert_array_equal(jax.jit(lambda x: double(x) + 1)(jnp.ones(2)), [3.0, 3.0])
    np.testing.assert_array_equal(jax.grad(lambda x: double(x).sum())(jnp.ones(2)), [2.0, 2.0])
    np.testing.assert_array_equal(jax.vmap(double)(jnp.ones((2, 3))), np.full((2, 3), 2.0))
    assert "double" in double.lower(jnp.ones(2)).as_text()


def test_many_threads():
    double, _ = counted()
    wrong = []

    def work(seed):
        sizes = map(int, np.random.default_rng(seed).integers(1, 9, 40))
        wrong.extend(n for n in sizes if not np.array_equal(double(jnp.ones(n)), np.full(n, 2.0)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert compilation.count() <= 4


@pytest.mark.rare
def test_the_soak_in_short():
    figures = shapes.soak(shapes.tiny(), shapes.shapes(10))
    assert figures["programs"] <= 4
    assert figures["changed"] == 0
    assert figures["calls"] == 20
