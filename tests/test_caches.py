"""Caches: where they lie, who may have written them, and that what is altered is made anew."""

import os
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlae_jax import caches
from rlae_jax.commands import main as commands


@pytest.fixture(autouse=True)
def afresh(tmp_path, monkeypatch):
    """Nothing told yet, and a home of its own."""
    caches._warn.cache_clear()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)


class TestThePlace:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            (None, "home/.cache"),
            ("", "home/.cache"),
            ("relative/place", "home/.cache"),
            ("~/place", "home/.cache"),
            ("ABSOLUTE", "ABSOLUTE"),
        ],
    )
    def test_by_xdg(self, tmp_path, monkeypatch, given, expected):
        if given is not None:
            monkeypatch.setenv("XDG_CACHE_HOME", given.replace("ABSOLUTE", str(tmp_path / "ABSOLUTE")))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "home").mkdir()
        assert caches.place("unions") == tmp_path / expected / "rlae_jax" / "unions"
        assert {path.name for path in tmp_path.iterdir()} == {"home", Path(expected).parts[0]}

    def test_is_the_users_alone(self, tmp_path):
        umask = os.umask(0)
        try:
            path = caches.place("unions")
            assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
            path.chmod(0o755)  # as an earlier version left it
            path.parent.chmod(0o775)
            assert caches.place("unions") == path
            assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700
            assert caches.place("x", tmp_path / "given").stat().st_mode & 0o777 == 0o700
        finally:
            os.umask(umask)

    @pytest.mark.parametrize("which", ["rlae_jax", "rlae_jax/unions", "given"])
    def test_that_everybody_can_write_to_is_not_used(self, tmp_path, which):
        path = tmp_path / "home" / ".cache" / which
        path.mkdir(parents=True)
        path.chmod(0o777)
        with pytest.warns(UserWarning, match="can be written by everybody") as told:
            assert [caches.place("unions", path if which == "given" else None) for _ in range(2)] == [None, None]
        assert len(told) == 1
        assert list(path.iterdir()) == []

    def test_of_another_user_is_not_used(self, tmp_path, monkeypatch):
        real = os.geteuid()
        caches.place("unions")
        monkeypatch.setattr(os, "geteuid", lambda: real + 1)
        if real == 0:
            os.chown(tmp_path / "home/.cache/rlae_jax", 12345, -1)
        with pytest.warns(UserWarning, match="belongs to another user"):
            assert caches.place("unions") is None

    @pytest.mark.parametrize("spoil", ["file", "loop"])
    def test_that_cannot_be_made_is_told_once(self, tmp_path, spoil):
        home = tmp_path / "home"
        if spoil == "file":
            home.write_text("")
        else:
            home.symlink_to(home)
        with pytest.warns(UserWarning, match="nothing is kept in") as told:
            assert [caches.place("unions") for _ in range(2)] == [None, None]
        assert len(told) == 1
        assert "\n" not in str(told[0].message)


class TestAFile:
    def test_comes_back_or_is_refused(self, tmp_path, raises_input_error):
        path = tmp_path / "a"
        for content in (b"", b"x", bytes(range(256)) * 10):
            caches.store(path, content)
            assert caches.fetch(path) == content
            assert [one.name for one in tmp_path.iterdir()] == ["a"]
        whole = path.read_bytes()
        for at in range(0, len(whole), 97):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
            raises_input_error(lambda: caches.fetch(path), "is not as it was stored")
        path.write_bytes(whole)
        path.rename(tmp_path / "b")
        raises_input_error(lambda: caches.fetch(tmp_path / "b"), "is not as it was stored")
        raises_input_error(lambda: caches.fetch(path), "cannot be read")


class TestPrograms:
    @pytest.fixture
    def compiled(self, tmp_path, monkeypatch):
        """compiled() compiles a program as in a new process, with the cache that commands have."""
        from jax._src import compilation_cache

        before = {name: getattr(jax.config, name) for name in SETTINGS}
        monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
        monkeypatch.setenv(commands.CACHE_VARIABLE, str(tmp_path / "programs"))
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        commands.turn_on_compilation_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

        def run():
            jax.clear_caches()
            return np.asarray(jax.jit(lambda x: jnp.tanh(x @ x.T).sum(axis=0) * 3.25)(jnp.ones((7, 5))))

        yield run
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    def test_one_that_was_altered_is_compiled_anew(self, compiled, tmp_path):
        expected = compiled()
        paths = list((tmp_path / "programs").iterdir())
        assert paths
        assert (tmp_path / "programs").stat().st_mode & 0o777 == 0o700
        whole = {path: path.read_bytes() for path in paths}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(compiled(), expected)
        for path, content in whole.items():
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        with pytest.warns(UserWarning, match="is not as it was stored; it is compiled anew"):
            np.testing.assert_array_equal(compiled(), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(compiled(), expected)

    def test_a_cache_that_cannot_be_written_is_told_once(self, compiled, monkeypatch):
        def full(path, content):
            raise caches.OutputError(f"{path}: cannot be written (No space left on device)")

        monkeypatch.setattr(caches, "store", full)
        with pytest.warns(UserWarning, match="compiled programs are not kept") as told:
            [compiled() for _ in range(2)]
        assert len(told) == 1


SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
