"""Which directory a name means, which files are fetched from the Hub, and what is said when that fails.

There is no network here. What the Hub's cache holds is built in the cache's own layout and read by the real library in
offline mode; what the Hub would answer is put in the place of `huggingface_hub.snapshot_download`.
"""

import errno
import json
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from rlae_jax.commands import plan
from rlae_jax.errors import InputError
from rlae_jax.models import hub, load

COMMIT, OTHER_COMMIT = "a" * 40, "b" * 40
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SINGLE = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors": "weights"}
SHARDED = {"config.json": "{}", INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})} | dict.fromkeys(
    SHARDS, "weights"
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty Hub cache and an empty current directory; the network is forbidden."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, repo, files, *, commit=COMMIT, ref="main", listing=None):
    """Puts a repository into the cache as the library does; `listing` is what it remembers of its files."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for name, content in files.items():
        blob, pointer = folder / "blobs" / f"{commit[:4]}-{name.replace('/', '-')}", snapshot / name
        for path in (blob, pointer):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        pointer.symlink_to(blob)
    if ref is not None:
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
    if listing is not None:
        (folder / "trees").mkdir()
        entries = {name: {"size": 1, "blob_id": "0" * 40} for name in listing}
        (folder / "trees" / f"{commit}.json").write_text(json.dumps({"format_version": 1, "files": entries}))
    return snapshot


class Hub:
    """A Hub with one repository, in the place of `snapshot_download`: writes what was asked for into the cache."""

    def __init__(self, cache, repo, files):
        self.cache, self.repo, self.files = cache, repo, files
        self.calls = []

    def __call__(self, repo, *, revision=None, allow_patterns):
        assert repo == self.repo
        self.calls.append(revision)
        wanted = {
            name: content
            for name, content in self.files.items()
            if any(fnmatchcase(name, pattern) for pattern in allow_patterns)
        }
        snapshot = self.cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        new = {name: content for name, content in wanted.items() if not (snapshot / name).exists()}
        snapshot.mkdir(parents=True, exist_ok=True)
        fill(self.cache, repo, new, ref=None)
        return str(snapshot)


@pytest.fixture
def online(cache, monkeypatch):
    """online(repo, files) -> a `Hub` that `resolve` meets instead of the real one."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def make(repo, files):
        served = Hub(cache, repo, files)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", served)
        monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", lambda *args, **kwargs: list(files))
        return served

    return make


@pytest.fixture
def failing(cache, monkeypatch):
    """failing(error, at=step) makes the first or second download of org/name raise."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def make(error, *, step=1):
        served = Hub(cache, "org/name", SINGLE)

        def download(*args, **kwargs):
            if len(served.calls) == step - 1:
                raise error
            return served(*args, **kwargs)

        monkeypatch.setattr(huggingface_hub, "snapshot_download", download)

    return make


def response(status, url="https://huggingface.co/api/models/org/name"):
    return SimpleNamespace(status_code=status, headers={}, request=None, url=url)


def caused(error, cause):
    error.__cause__ = cause
    return error


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


class TestLocal:
    def test_a_directory_is_returned_as_it_is(self, cache, tmp_path):
        (tmp_path / "model").mkdir()
        assert hub.resolve(tmp_path / "model") == tmp_path / "model"
        assert hub.resolve(str(tmp_path / "model")) == tmp_path / "model"
        assert hub.resolve("../model") == Path("../model")
        assert hub.resolve(".") == Path()

    def test_a_gguf_file_is_returned_as_it_is(self, cache, tmp_path, raises_input_error):
        (tmp_path / "model.gguf").write_text("GGUF")
        assert hub.resolve(tmp_path / "model.gguf") == tmp_path / "model.gguf"
        raises_input_error(lambda: hub.resolve(tmp_path / "model.gguf", revision="v1"), "local file", "v1")

    def test_the_home_directory_is_expanded(self, cache, tmp_path, monkeypatch):
        (tmp_path / "model").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path))
        assert hub.resolve("~/model") == tmp_path / "model"

    def test_a_directory_wins_over_a_cached_repository(self, cache):
        fill(cache, "org/name", SINGLE)
        Path("org/name").mkdir(parents=True)
        assert hub.resolve("org/name") == Path("org/name")

    def test_a_directory_has_no_revisions(self, cache, tmp_path, raises_input_error):
        raises_input_error(lambda: hub.resolve(tmp_path, revision="v1"), str(tmp_path), "local directory", "'v1'")

    @pytest.mark.parametrize(
        "name",
        ["./name", "../name", "/name", "~/name", "~nobody/a", "a/b/c", "name/", "", "a b", "a--b", "a\0b", "n" * 5000],
    )
    def test_what_cannot_be_a_hub_id_does_not_exist(self, cache, name, monkeypatch, raises_input_error):
        monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the Hub"))
        shown = name.replace("\0", "\\x00")[:2000]
        message = raises_input_error(lambda: hub.resolve(name), shown, "does not exist", "config.json", "org/name")
        assert "\n" not in message
        for read in (load, lambda name: plan._read(name, "float32")):
            assert raises_input_error(lambda read=read: read(name)) == message

    def test_a_typing_error_is_met_with_the_directory_beside(self, cache, raises_input_error):
        Path("models/stories260K").mkdir(parents=True)
        raises_input_error(lambda: hub.resolve("./models/storys260K"), "there is ./models/stories260K")
        raises_input_error(lambda: hub.resolve("models/storys260K"), "there is models/stories260K", "Hub's cache")

    @pytest.mark.parametrize("name", ["file", "./file"])
    def test_a_file(self, cache, name, raises_input_error):
        Path("file").write_text("")
        raises_input_error(lambda: hub.resolve(name), f"{name} is a file", "Hugging Face directory")

    def test_a_link_to_nowhere(self, cache, raises_input_error):
        Path("link").symlink_to("nothing")
        raises_input_error(lambda: hub.resolve("link"), "link is a link to nowhere")


class TestOffline:
    """The real library over a cache on disk."""

    @pytest.mark.parametrize("files", [SINGLE, SHARDED], ids=["single", "sharded"])
    @pytest.mark.parametrize("listed", [False, True])
    @pytest.mark.parametrize("repo", ["org/name", "name"])
    def test_hit(self, cache, repo, files, listed):
        listing = [*files, "pytorch_model.bin", "README.md", "onnx/model.safetensors"] if listed else None
        snapshot = fill(cache, repo, files, listing=listing)
        assert hub.resolve(repo) == snapshot
        assert hub.resolve(repo, revision="main") == snapshot
        assert hub.resolve(repo, revision=COMMIT) == snapshot

    def test_an_adapter_alone(self, cache):
        snapshot = fill(cache, "org/name", {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"})
        assert hub.resolve("org/name") == snapshot

    def test_a_revision(self, cache, raises_input_error):
        fill(cache, "org/name", SINGLE)
        snapshot = fill(cache, "org/name", SINGLE, commit=OTHER_COMMIT, ref="v1")
        assert hub.resolve("org/name", revision="v1") == snapshot
        raises_input_error(lambda: hub.resolve("org/name", revision="v2"), "org/name at revision 'v2'", "Hub's cache")

    @pytest.mark.parametrize("repo", ["org/name", "name"])
    def test_miss(self, cache, repo, raises_input_error):
        message = raises_input_error(
            lambda: hub.resolve(repo), repo, "no such directory", "Hub's cache", str(cache), "HF_HUB_OFFLINE"
        )
        assert "\n" not in message

    def test_the_environment_decides(self, tmp_path):
        """The variables as a user sets them, read by the library when it is imported."""
        fill(tmp_path / "hub", "org/name", SINGLE)
        code = "from rlae_jax.models import hub\nprint(hub.resolve('org/name'))\nhub.resolve('org/other')"
        environment = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == str(tmp_path / "hub" / "models--org--name" / "snapshots" / COMMIT)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("rlae_jax.errors.InputError: org/other: no such directory")

    @pytest.mark.parametrize("listed", [False, True])
    @pytest.mark.parametrize(
        ("files", "lost"),
        [(SINGLE, "model.safetensors"), (SHARDED, SHARDS[1]), (SHARDED, INDEX), (SINGLE, "config.json")],
        ids=["weights", "shard", "index", "config"],
    )
    def test_an_unfinished_copy(self, cache, files, lost, listed, raises_input_error):
        held = {name: content for name, content in files.items() if name != lost}
        snapshot = fill(cache, "org/name", held, listing=files if listed else None)
        parts = [str(snapshot)] if listed else [str(snapshot), lost]
        for revision in (None, "main"):
            message = raises_input_error(
                lambda revision=revision: hub.resolve("org/name", revision=revision),
                "org/name",
                "incomplete",
                "again with the network",
                *parts,
            )
            assert "\n" not in message

    def test_a_blob_that_is_gone(self, cache, raises_input_error):
        snapshot = fill(cache, "org/name", SINGLE)
        (snapshot / "model.safetensors").resolve().unlink()
        raises_input_error(lambda: hub.resolve("org/name"), "incomplete", str(snapshot))

    def test_a_file_that_is_still_being_written(self, cache, raises_input_error):
        held = {name: content for name, content in SINGLE.items() if name != "model.safetensors"}
        snapshot = fill(cache, "org/name", held)
        (cache / "models--org--name" / "blobs" / "1234.incomplete").write_text("wei")
        raises_input_error(lambda: hub.resolve("org/name"), "incomplete", str(snapshot))

    def test_only_pickles_cached(self, cache, raises_input_error):
        fill(cache, "org/name", {"config.json": "{}", "pytorch_model.bin": "pickle"})
        raises_input_error(lambda: hub.resolve("org/name"), "only pickled weights", "pytorch_model.bin", "never read")


class TestOnline:
    DUPLICATES = (
        "model.fp16.safetensors",
        "consolidated.safetensors",
        "original/model.safetensors",
        "original/config.json",
        "onnx/model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "modeling_name.py",
        "training_args.bin",
        "flax_model.msgpack",
        "model.gguf",
        "README.md",
    )

    @pytest.mark.parametrize(
        "files",
        [
            SINGLE,
            SHARDED,
            SINGLE | {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"},
            {"adapter_config.json": "{}", "adapter_model.safetensors": "weights"},
            SINGLE | {"generation_config.json": "{}", "chat_template.jinja": "", "merges.txt": "", "vocab.json": "{}"},
        ],
        ids=["single", "sharded", "model-and-adapter", "adapter", "many-small-files"],
    )
    def test_only_what_loading_needs_is_fetched(self, online, files):
        online("org/name", files | dict.fromkeys(self.DUPLICATES, "too much"))
        assert names(hub.resolve("org/name")) == sorted(files)

    def test_an_index_wins_over_a_single_file(self, online):
        online("org/name", SHARDED | {"model.safetensors": "the same again"})
        assert names(hub.resolve("org/name")) == sorted(SHARDED)

    @pytest.mark.parametrize(
        "named", ["*", "*.py", "../x.safetensors", "sub/x.safetensors", "pytorch_model.bin", "[a-z]*.safetensors", 3]
    )
    def test_an_index_cannot_ask_for_anything_else(self, online, named):
        files = SHARDED | dict.fromkeys(["run.py", "sub/x.safetensors", "other.safetensors", "pytorch_model.bin"], "no")
        files[INDEX] = json.dumps({"weight_map": {"a": SHARDS[0], "b": named}})
        online("org/name", files)
        fetched = names(hub.resolve("org/name"))
        assert set(fetched) <= {"config.json", INDEX, SHARDS[0]}

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', "null"])
    def test_an_unusable_index_is_left_to_the_reader_of_the_weights(self, online, content):
        online("org/name", SHARDED | {INDEX: content})
        assert names(hub.resolve("org/name")) == ["config.json", INDEX]

    def test_weights_come_from_the_commit_of_the_small_files(self, online):
        served = online("org/name", SINGLE)
        hub.resolve("org/name", revision="v1")
        assert served.calls == ["v1", COMMIT]

    def test_a_shard_that_the_repository_lacks(self, online, raises_input_error):
        online("org/name", {name: content for name, content in SHARDED.items() if name != SHARDS[1]})
        raises_input_error(lambda: hub.resolve("org/name"), "org/name", "1 of the files", SHARDS[1])

    def test_a_gguf_file_is_fetched_with_all_its_parts_and_nothing_else(self, online, raises_input_error):
        parts = [f"q8/big-0000{i}-of-00002.gguf" for i in (1, 2)]
        files = dict.fromkeys(("a.gguf", "b.gguf", *parts), "GGUF") | {"config.json": "{}"}
        online("org/name", files)
        path = hub.resolve("org/name/a.gguf")
        assert path.name == "a.gguf"
        assert names(path.parent) == ["a.gguf"]
        assert hub.resolve(f"org/name/{parts[1]}") == path.parent / parts[1]
        assert names(path.parent) == ["a.gguf", *parts]
        raises_input_error(lambda: hub.resolve("org/name/c.gguf"), "org/name has no c.gguf", "a.gguf, b.gguf")
        raises_input_error(lambda: hub.resolve("org/name"), "GGUF files (a.gguf, b.gguf", "org/name/a.gguf")

    def test_only_pickles(self, online, raises_input_error):
        online("org/name", {"config.json": "{}", "pytorch_model.bin": "pickle", "sub/other.bin": ""})
        message = raises_input_error(
            lambda: hub.resolve("org/name"), "only pickled weights (pytorch_model.bin)", "never read", "safe_serial"
        )
        assert "\n" not in message

    def test_no_weights_at_all(self, online, raises_input_error):
        online("org/name", {"config.json": "{}", "model.onnx": ""})
        raises_input_error(lambda: hub.resolve("org/name"), "org/name", "no model.safetensors", "adapter_model")

    def test_no_config(self, online, raises_input_error):
        online("org/name", {"model.safetensors": "weights", "model_index.json": "{}"})
        raises_input_error(lambda: hub.resolve("org/name"), "org/name", "no config.json and no adapter_config.json")


OFFLINE = errors.OfflineModeIsEnabled("Cannot reach https://huggingface.co/api/models/org/name: offline mode")


class TestWhatTheHubRefuses:
    @pytest.mark.parametrize("step", [1, 2])
    @pytest.mark.parametrize(
        ("error", "parts"),
        [
            (
                errors.RepositoryNotFoundError("401 Client Error.\n\nLong", response=response(401)),
                ("not found on the Hub", "private", "hf auth login", "HF_TOKEN"),
            ),
            (
                errors.GatedRepoError("403 Client Error.\n\nLong", response=response(403)),
                ("is gated", "https://huggingface.co/org/name", "hf auth login", "HF_TOKEN"),
            ),
            (
                errors.HfHubHTTPError("Invalid credentials in Authorization header", response=response(401)),
                ("refused access", "HF_TOKEN"),
            ),
            (
                caused(
                    errors.LocalEntryNotFoundError("Got: HfHubHTTPError\nAn error happened"),
                    errors.HfHubHTTPError("403 Forbidden", response=response(403)),
                ),
                ("refused access", "HF_TOKEN"),
            ),
            (OSError(errno.ENOSPC, "No space left on device"), ("full", "HF_HOME")),
            (OSError(errno.EDQUOT, "Disk quota exceeded"), ("full", "HF_HOME")),
            (RuntimeError("Data processing error: No space left on device (os error 28)"), ("full", "HF_HOME")),
            (
                caused(RuntimeError("failed"), OSError(errno.ENOSPC, "No space left on device")),
                ("full", "HF_HOME"),
            ),
            (
                caused(errors.LocalEntryNotFoundError("Long\ntext"), ConnectionError("[Errno -2] Name not known")),
                ("the Hub cannot be reached", "ConnectionError: [Errno -2] Name not known"),
            ),
            (PermissionError(errno.EACCES, "Permission denied"), ("cannot be fetched", "Permission denied")),
            (ConnectionError("peer\nclosed " + 100 * "long"), ("cannot be fetched", "ConnectionError: peer closed")),
        ],
        ids=[
            "not-found",
            "gated",
            "bad-token",
            "forbidden",
            "disk-full",
            "quota",
            "disk-full-in-words",
            "disk-full-beneath",
            "no-network",
            "read-only-cache",
            "cut-off",
        ],
    )
    def test_is_told_in_one_line(self, failing, error, parts, step, raises_input_error):
        failing(error, step=step)
        message = raises_input_error(lambda: hub.resolve("org/name"), "org/name", *parts)
        assert "\n" not in message
        assert len(message) < 400

    def test_both_readings_of_a_name_that_is_not_found(self, failing, raises_input_error):
        failing(errors.RepositoryNotFoundError("404", response=response(404)))
        raises_input_error(lambda: hub.resolve("org/name"), "no such directory", "not found on the Hub")

    def test_unknown_revision(self, failing, raises_input_error):
        failing(errors.RevisionNotFoundError("404", response=response(404)))
        raises_input_error(lambda: hub.resolve("org/name", revision="v9"), "org/name has no revision 'v9'", "branch")

    def test_offline(self, failing, cache, monkeypatch, raises_input_error):
        failing(caused(errors.LocalEntryNotFoundError("Long"), OFFLINE))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        raises_input_error(lambda: hub.resolve("org/name"), "no such directory", str(cache), "HF_HUB_OFFLINE")

    def test_the_network_goes_between_the_steps(self, failing, raises_input_error):
        failing(caused(errors.LocalEntryNotFoundError("Long"), ConnectionError("gone")), step=2)
        raises_input_error(lambda: hub.resolve("org/name"), "incomplete", COMMIT, "ConnectionError: gone")

    def test_the_first_error_is_kept_for_a_traceback(self, failing):
        error = ConnectionError("gone")
        failing(error)
        with pytest.raises(InputError) as caught:
            hub.resolve("org/name")
        assert caught.value.__cause__ is error

    def test_an_interrupt_passes(self, failing):
        failing(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            hub.resolve("org/name")


def test_the_package_does_not_import_the_library():
    code = "import rlae_jax, rlae_jax.models.hub, sys; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
