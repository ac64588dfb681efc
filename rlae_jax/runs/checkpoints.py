"""Checkpoints of a run through Orbax: atomic, the newest two kept, each with the digests of its files."""

import contextlib
import logging
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN

from rlae_jax import digests, files, hosts, signals
from rlae_jax.errors import InputError, one_line

DIRECTORY_NAME = "checkpoints"
_SHOWN = 3  # differences in a message
_KEPT = 2  # the newest, and what is gone back to if that is damaged
_AGAIN = "going on with the run (--resume) makes it again from the one before"


def require_place(at: str) -> None:
    """Makes sure that checkpoints can go to a directory, or that a URL is of a bucket; nothing is made, or asked there.

    Raises:
      InputError: they cannot.
    """
    if not at:
        raise InputError("no place is named for the checkpoints: a directory, or a bucket that begins with gs://")
    if "://" not in at:
        files.require_place(at)
        return
    try:
        epath.Path(at)
    except KeyError:
        raise InputError(f"{at}: no checkpoints can go there; a bucket begins with gs:// or s3://") from None


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Of a tree's arrays, by names that do not depend on what kind of tree it is."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape) for path, leaf in leaves}


class Checkpoints:
    """The checkpoints of a run.

    Args:
      run: its directory, in whose `checkpoints/` they lie by default.
      at: elsewhere: a directory, or a bucket's URL (gs://, s3://) that Orbax writes to.
      reading: only what is there is wanted: no directory is made for more.

    Raises:
      InputError: what is there cannot be read, or the package for such URLs is not installed.
    """

    def __init__(self, run: Path, at: str | None = None, *, reading: bool = False):
        # Orbax reports every step of every save; a failure still raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(n=_KEPT),
            enable_async_checkpointing=False,
            read_only=reading,
            create=not reading,
        )
        try:
            self.path = epath.Path(run / DIRECTORY_NAME if at is None else at)
            if at is None or "://" not in at:
                self.path = self.path.resolve()
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            where = run / DIRECTORY_NAME if at is None else at
            raise InputError(f"{where}: the checkpoints cannot be read ({one_line(error)})") from error

    def newest(self) -> int | None:
        """The iteration of the newest complete checkpoint."""
        step: int | None = self._manager.latest_step()
        return step

    def go_back(self, iteration: int | None) -> None:
        """Forgets the checkpoints after an iteration; None: all."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if iteration is None or step > iteration:
                self._manager.delete(step)

    def save(self, iteration: int, state: Any) -> None:
        """Writes a checkpoint; all but the one before go once it is complete.

        Raises:
          OutputError: it cannot be written; the newest one is the one before, and nothing is left of this one.
        """
        if iteration == self.newest():
            return
        self._remove_incomplete()  # of a process that was killed
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            with signals.delayed(), files.library_write(self.path / str(iteration), needed):
                self._manager.save(iteration, args=ocp.args.StandardSave(state), force=True)
                if hosts.is_first():
                    digests.seal(self.path / str(iteration))
        except BaseException:
            self._remove_incomplete()
            raise

    def _remove_incomplete(self) -> None:
        """What saves that did not end have left."""
        if hosts.is_first():
            for left in self.path.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    left.rmtree()

    def restore(self, abstract: Any, *, going_on: bool = False) -> tuple[int, Any]:
        """The newest iteration and its state. There must be one.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` that says what is expected.
          going_on: where the newest checkpoint is damaged, the one before is taken, which is said, and from there on
            the run makes it again.

        Raises:
          InputError: the checkpoint is damaged, with none before it that is not, or holds something of another shape.
        """
        damaged: list[tuple[int, str]] = []
        for step in sorted(self._manager.all_steps(), reverse=True):
            where = self.path / str(step)
            (found,) = hosts.gather([digests.damage(where) if hosts.is_first() else None])[0]
            if found is None:
                try:
                    state = self._restore(step, abstract)
                except InputError as error:
                    if digests.has_digests(where) or not going_on:
                        raise
                    found = str(error)  # of an older version, without digests: it may be damaged
                else:
                    break
            damaged.append((step, found))
            if not going_on:
                raise InputError(f"{where}: this checkpoint is damaged ({found}); {_AGAIN}")
        else:
            told = "; ".join(f"{step}: {found}" for step, found in damaged)
            raise InputError(f"{self.path}: no checkpoint is whole ({told}); begin the run anew in another directory")
        for number, found in damaged:
            warnings.warn(f"{self.path}: checkpoint {number} is damaged ({found}); going on from {step}", stacklevel=2)
            self._manager.delete(number)
        return step, state

    def _restore(self, iteration: int, abstract: Any) -> Any:
        where = self.path / str(iteration)
        self._require_shapes(where, abstract)
        try:
            state = self._manager.restore(iteration, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds for missing, damaged or foreign files
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise InputError(f"{where}: this checkpoint cannot be restored for this run ({reason})") from error
        return state

    def _require_shapes(self, where: epath.Path, abstract: Any) -> None:
        """Raises an `InputError` for arrays of other names or shapes, before anything is read: Orbax ends some of what
        it has begun with tracebacks of its own."""
        try:
            stored = getattr(ocp.StandardCheckpointHandler().metadata(where / "default"), "tree", None)
        except Exception:  # of many kinds, where files are missing or foreign: restoring says which
            return
        found = _shapes(stored)
        differing = [
            f"{name} is {found[name]}, expected {shape}"
            for name, shape in _shapes(abstract).items()
            if found.get(name, shape) != shape
        ]
        if differing:
            more = ", ..." if len(differing) > _SHOWN else ""
            raise InputError(
                f"{where}: this checkpoint is of something else than the run's config.json says: "
                f"{', '.join(differing[:_SHOWN])}{more}"
            )

    def close(self) -> None:
        self._manager.close()
