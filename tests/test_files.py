"""Names that come from files stay inside the directory that they are for."""

import json
import types
from pathlib import Path

import pytest

from rlae_jax import files
from rlae_jax.emorl import export
from rlae_jax.emorl import run as emorl_run
from rlae_jax.emorl.run import Run
from rlae_jax.errors import InputError
from rlae_jax.models import stored

OUTSIDE = (
    *("../x", "..", ".", "", "/", "/etc/passwd", "a/../../x", "a/../b", "./a", "a//b", "a/", "//a", "a\\b", "..\\x"),
    *("C:\\x", "\\\\host\\x", "a\0b", "\0", "x" * 256, "d/" * 200 + "x", "\ud800", "loop/a", "out", "out/secret"),
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A directory with links out of it and in a circle."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secrets").mkdir()
    (root / "out").symlink_to(tmp_path / "secrets")
    (root / "loop").symlink_to(root / "loop")
    (root / "near").symlink_to(root / "sub")
    return root


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_leaves_the_directory_is_refused(root: Path, name: str) -> None:
    with pytest.raises(InputError, match="the index: the name ") as told:
        files.inside(root, name, "the index")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    "name", ["a", "sub/a", "near/a", "..a", "a..b", "...", "model-00001-of-2.safetensors", "a:b", "é"]
)
def test_what_stays_is_joined(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.inside(root, name) == root / name
    monkeypatch.chdir(root)
    assert files.inside(Path(), name) == Path(name)


def test_links_of_the_hub_cache_are_followed_to_their_own_blobs(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = snapshot.parents[1] / "blobs"
    for directory in (snapshot, blobs, tmp_path / "blobs"):
        directory.mkdir(parents=True)
    (snapshot / "w").symlink_to(Path("../../blobs/w"))
    (snapshot / "other").symlink_to(tmp_path / "blobs" / "w")
    assert files.inside(snapshot, "w") == snapshot / "w"
    with pytest.raises(InputError, match="leads out"):
        files.inside(snapshot, "other")


@pytest.mark.parametrize("name", ["../model.safetensors", "{}/model.safetensors", "link.safetensors"])
def test_a_weight_index_names_files_beside_it(tmp_path: Path, name: str) -> None:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"")
    (directory / "link.safetensors").symlink_to("../model.safetensors")
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name.format(tmp_path)}}))
    with pytest.raises(InputError, match=r"index\.json: the name "):
        stored.tensor_files(directory)


@pytest.mark.parametrize("name", ["../../x", "/etc", "a/../../../x"])
def test_a_run_names_its_own_adapters(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its files say; how these are checked otherwise is left out."""
    run = object.__new__(Run)
    object.__setattr__(run, "directory", tmp_path / "run")
    files.write_json(tmp_path / "run" / "search" / "params" / "config.json", {})
    with pytest.raises(InputError, match="the name "):
        run.adapter_directory(name)
    monkeypatch.setattr(export, "_chosen", lambda *args: {name: 1.0})
    with pytest.raises(InputError, match="the name "):
        export.export_run(run, tmp_path / "out")
    monkeypatch.setattr(emorl_run, "read_config", lambda *args: types.SimpleNamespace(adapters=[name]))
    with pytest.raises(InputError, match="the name "):
        run.room_for_search("params", ["b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("name", ["a/b", "é" * 100, "a" * 201])
def test_an_earlier_search_stays_beside(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a digest, where its adapters' names make none of a directory."""
    run = object.__new__(Run)
    object.__setattr__(run, "directory", tmp_path)
    files.write_json(tmp_path / "search" / "params" / "config.json", {})
    monkeypatch.setattr(emorl_run, "read_config", lambda *args: types.SimpleNamespace(adapters=[name]))
    path, kept = run.room_for_search("params", ["b"])
    assert kept == path.with_name(f"params-{files.digest([name])[:16]}")
    assert (kept / "config.json").is_file()
