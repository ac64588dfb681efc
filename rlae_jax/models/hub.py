"""From what a user calls a model to a directory that can be read: a local directory, or a Hugging Face Hub id.

In: "DIR" or "org/name". Out: the directory itself, or the snapshot in the Hub's own cache that `huggingface_hub` found
there or fetched. Cache, tokens, endpoint, retries, progress bars and offline mode (`HF_HUB_OFFLINE`) are that
library's; decided here is which files are fetched, and what is said when that fails.

Two steps fetch a repository: first its small files, then exactly the weights that they call for. A repository often
holds the same weights several times (another precision, another framework, the original release), and no pattern of
names tells which of them the index means. Pickled weights and code are never fetched: both can run code.
"""

import difflib
import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path

from rlae_jax import records
from rlae_jax.errors import InputError, one_line
from rlae_jax.models import hugging_face
from rlae_jax.models.gguf_files import SUFFIX, part_names

INDEX, SINGLE, ADAPTER = "model.safetensors.index.json", "model.safetensors", "adapter_model.safetensors"
CONFIGS = ("config.json", "adapter_config.json")
# Whole names, no patterns: `huggingface_hub` lets `*` match slashes too, and folders hold duplicates.
SMALL_FILES = (
    *CONFIGS,
    INDEX,
    "generation_config.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "spm.model",
    "spm.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
)
# An index is a stranger's text: nothing in it may act as a pattern, leave the directory or name another kind of file.
SHARD = re.compile(r"\w[\w.-]*\.safetensors", re.ASCII)
# The same of a GGUF file in a repository, which is named whole.
_IN_REPOSITORY = re.compile(r"([\w.-]+/[\w.-]+)/(\w[\w.-]*(?:/\w[\w.-]*)*\.gguf)", re.ASCII)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
EXPECTED = (
    "expected a Hugging Face directory with config.json and safetensors, a GGUF file, or a Hub id such as org/name"
)
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


def resolve(name: str | os.PathLike[str], *, revision: str | None = None, weights: bool = True) -> Path:
    """The directory that holds a model's files, or its GGUF file.

    Args:
      name: a local directory or a GGUF file, returned as it is ("~" expanded); or a Hub id, "org/name" or "name", or a
        GGUF file in such a repository, "org/name/file.gguf". A directory wins over a Hub id of the same name.
      revision: branch, tag or whole commit hash of a Hub repository; None is its main branch.
      weights: False for who reads the configuration alone; a repository's weights are then not fetched.

    Raises:
      InputError: no such directory and no possible Hub id; a file; a repository or revision that is not there, is not
        open to this user, or cannot be reached and is not cached; no safetensors; an unfinished copy; a full disk.
    """
    asked = os.fsdecode(name)
    path = os.path.expanduser(asked)
    if asked and (os.path.isdir(path) or (os.path.isfile(path) and path.endswith(SUFFIX))):
        if revision is not None:
            what = "directory" if os.path.isdir(path) else "file"
            raise InputError(f"{asked} is a local {what} and has no revision {revision!r}; leave the revision out")
        return Path(path)
    if os.path.lexists(path):
        raise InputError(f"{asked} {'is a file' if os.path.exists(path) else 'is a link to nowhere'}; {EXPECTED}")
    in_repository = _IN_REPOSITORY.fullmatch(asked)
    if in_repository and _can_be_hub_id(in_repository[1]):
        return _fetch_gguf(in_repository[1], in_repository[2], revision)
    if asked.endswith(SUFFIX) or not _can_be_hub_id(asked):
        raise InputError(f"{asked or repr(asked)} does not exist{_similar(path)}; {EXPECTED}")
    return _fetch(asked, revision) if weights else _download(asked, revision, SMALL_FILES)


def _can_be_hub_id(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # local directories need not wait for the import
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined,unused-ignore]  # public, but unlisted

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _similar(path: str) -> str:
    """A few words on a model beside `path` that has nearly its name, for a typing error; mostly nothing."""
    parent, base = os.path.split(path.rstrip("/"))
    try:
        with os.scandir(parent or ".") as entries:
            names = [entry.name for entry in entries if entry.is_dir() or entry.name.endswith(SUFFIX)]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(base, names, n=1, cutoff=0.75)
    return f" (there is {os.path.join(parent, close[0])})" if close else ""


def _fetch(repo: str, revision: str | None) -> Path:
    snapshot = _download(repo, revision, SMALL_FILES)
    indexed = _indexed(snapshot)
    weights = [SINGLE] if indexed is None else indexed
    # By the commit, which names the snapshot: the branch may move between the steps. config.json is there already; with
    # it some file always matches, which spares the user a warning of the library's beside the error below.
    _download(repo, snapshot.name, [*weights, ADAPTER, CONFIGS[0]], begun=snapshot)
    missing = [file for file in weights if not (snapshot / file).is_file()]
    if indexed is None:
        if missing and not (snapshot / ADAPTER).is_file():
            raise _no_safetensors(repo, snapshot)
    elif missing:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise _incomplete(repo, f"{len(missing)} of the files that {INDEX} names are not in {snapshot}: {listed}")
    if not any((snapshot / file).is_file() for file in CONFIGS):
        raise _incomplete(repo, f"{snapshot} has no {' and no '.join(CONFIGS)}")
    return snapshot


def _fetch_gguf(repo: str, file: str, revision: str | None) -> Path:
    """A GGUF file of a repository; all parts of a split one."""
    snapshot = _download(repo, revision, part_names(file))
    if not (snapshot / file).is_file():
        ggufs = [name for name in _names(repo, snapshot)[0] if name.endswith(SUFFIX)]
        raise InputError(f"{repo} has no {file}; its GGUF files: {_shown(ggufs)}")
    return snapshot / file


def _names(repo: str, snapshot: Path) -> tuple[list[str], bool]:
    """The files of a repository and True; where the Hub cannot be asked, those that are cached and False."""
    from huggingface_hub import HfApi

    try:
        return sorted(HfApi().list_repo_files(repo, revision=snapshot.name)), True
    except Exception:  # whatever the reason (see `_download`), the cached files are all that can be named
        return sorted(path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()), False


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "none"


def _indexed(snapshot: Path) -> list[str] | None:
    """The safetensors that the snapshot's index names; None without an index.

    Of an unusable index nothing is taken: the one who reads the weights says what is wrong with it.
    """
    path = snapshot / INDEX
    if not path.is_file():
        return None
    try:
        names = records.read(path, hugging_face.Index)["weight_map"].values()
    except InputError:
        return []
    return sorted({name for name in names if SHARD.fullmatch(name)})


def _download(repo: str, revision: str | None, files: Sequence[str], *, begun: Path | None = None) -> Path:
    """`snapshot_download`, its many errors told as `InputError`. `begun` is the snapshot that the first step made."""
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except Exception as error:  # transport errors are those of whichever HTTP library huggingface_hub is built on
        raise _told(error, repo, revision, begun) from error


def _told(error: Exception, repo: str, revision: str | None, begun: Path | None) -> InputError:
    from huggingface_hub import constants, errors

    named = repo if revision is None or begun else f"{repo} at revision {revision!r}"
    neither = named if begun else f"{named}: no such directory{_similar(repo)}, and it"
    if isinstance(error, errors.GatedRepoError):
        return InputError(f"{repo} is gated: ask for access at {constants.ENDPOINT}/{repo}, then {LOG_IN}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(f"{neither} was not found on the Hub; if it is private there, {LOG_IN}")
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{repo} has no revision {revision!r} on the Hub; give a branch, a tag or a commit hash")
    if _disk_is_full(error):
        return InputError(
            f"{repo}: the disk of the Hub's cache, {constants.HF_HUB_CACHE}, is full; make room or set HF_HOME"
        )
    if any(getattr(getattr(e, "response", None), "status_code", None) in (401, 403) for e in (error, error.__cause__)):
        return InputError(f"{named}: the Hub refused access; {LOG_IN}, with a token that may read it")
    local = isinstance(error, errors.LocalEntryNotFoundError)
    if local and begun:
        return _incomplete(named, f"weights are missing in {begun}, and {_no_network(error)}")
    # Older versions of the library do not have this class, nor raise it.
    if isinstance(error, getattr(errors, "IncompleteSnapshotError", ())):
        return _incomplete(named, f"files are missing in {getattr(error, 'snapshot_path', constants.HF_HUB_CACHE)}")
    if local or isinstance(error, errors.OfflineModeIsEnabled):
        where = f"not, or not wholly, in the Hub's cache, {constants.HF_HUB_CACHE}"
        return InputError(f"{neither} is {where}, and {_no_network(error)}")
    return InputError(f"{neither} cannot be fetched from the Hub ({type(error).__name__}: {one_line(error)})")


def _no_network(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to fetch it"
    cause = error.__cause__ or error
    return f"the Hub cannot be reached ({type(cause).__name__}: {one_line(cause)})"


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, is a full disk; the Hub's fast transfer tells that only in words."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in FULL_DISK) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _incomplete(named: str, detail: str) -> InputError:
    return InputError(f"{named}: the copy in the Hub's cache is incomplete ({detail}); load it again with the network")


def _no_safetensors(repo: str, snapshot: Path) -> InputError:
    """Pickled weights only, no weights at all, or, where the Hub cannot be asked, perhaps an unfinished copy."""
    names, listed = _names(repo, snapshot)
    pickled = [name for name in names if "/" not in name and name.endswith(PICKLED)]
    if pickled:
        return InputError(
            f"{repo}: only pickled weights ({', '.join(pickled[:5])}); pickles can run code and are never read. "
            "Save the model with safe_serialization=True to get model.safetensors"
        )
    ggufs = [name for name in names if name.endswith(SUFFIX)]
    if ggufs:
        return InputError(f"{repo}: no safetensors, but GGUF files ({_shown(ggufs)}); name one: {repo}/{ggufs[0]}")
    if listed:
        return InputError(f"{repo}: the repository has no {SINGLE}, no {INDEX} and no {ADAPTER}")
    return _incomplete(repo, f"{snapshot} has no {SINGLE} and no {INDEX}")
