"""Checkpoints of a run through Orbax: atomic, the newest kept."""

import contextlib
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import LatestN

from rlae_jax import files, hosts
from rlae_jax.errors import InputError

DIRECTORY_NAME = "checkpoints"


class Checkpoints:
    """The checkpoints of a run.

    Args:
      run: its directory, in whose `checkpoints/` they lie by default.
      at: elsewhere: a directory, or a bucket's URL (gs://, s3://) that Orbax writes to.

    Raises:
      InputError: what is there cannot be read, or the package for such URLs is not installed.
    """

    def __init__(self, run: Path, at: str | None = None):
        # Orbax reports every step of every save; a failure still raises.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        self.path = epath.Path(run / DIRECTORY_NAME if at is None else at)
        if at is None or "://" not in at:
            self.path = self.path.resolve()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(n=1),
            enable_async_checkpointing=False,
        )
        try:
            self._manager = ocp.CheckpointManager(self.path, options=options)
        except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
            raise InputError(f"{at or self.path}: the checkpoints cannot be read ({error})") from error

    def newest(self) -> int | None:
        """The iteration of the newest complete checkpoint."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, iteration: int, state: Any) -> None:
        """Writes a checkpoint; older ones go once it is complete.

        Raises:
          OutputError: it cannot be written; the newest one is the one before, and nothing is left of this one.
        """
        if iteration == self.newest():
            return
        self._remove_incomplete()  # of a process that was killed
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        try:
            with files.library_write(self.path / str(iteration), needed):
                self._manager.save(iteration, args=ocp.args.StandardSave(state), force=True)
        except BaseException:
            self._remove_incomplete()
            raise

    def _remove_incomplete(self) -> None:
        """What saves that did not end have left."""
        if hosts.is_first():
            for left in self.path.glob("*.orbax-checkpoint-tmp*"):
                with contextlib.suppress(OSError):
                    left.rmtree()

    def restore(self, iteration: int, abstract: Any) -> Any:
        """The state of an iteration.

        Args:
          abstract: a tree of `jax.ShapeDtypeStruct` that says what is expected.

        Raises:
          InputError: the checkpoint is damaged or holds something of another shape.
        """
        where = self.path / str(iteration)
        try:
            state = self._manager.restore(iteration, args=ocp.args.StandardRestore(abstract))
        except Exception as error:  # Orbax raises many kinds for missing, damaged or foreign files
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            raise InputError(f"{where}: this checkpoint cannot be restored for this run ({reason})") from error
        findings = [
            f"{jax.tree_util.keystr(path)} is {leaf.shape}, expected {expected.shape}"
            for (path, expected), leaf in zip(
                jax.tree_util.tree_leaves_with_path(abstract), jax.tree.leaves(state), strict=True
            )
            if expected.shape != leaf.shape
        ]
        if findings:
            raise InputError(f"{where}: this checkpoint does not fit the model: {'; '.join(findings[:5])}")
        return state

    def close(self) -> None:
        self._manager.close()
