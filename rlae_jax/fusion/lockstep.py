"""Members with one tokenizer: every chosen token is one token for each of them, all rows write the same slot of a
cache, and a step is one forward."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.fusion.members import ForwardPass, Prediction, aligned, prompt_cache
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models.cache import Cache, LayerCache, extend_cache, put_row, resize_rings, visible

_LARGE = 2**29  # slots are numbered anew beyond, before they would overflow


class RowSubsets(NamedTuple):
    """What the members of a shared base run, where no member has a say in all rows: R rows each."""

    rows: Int[Array | np.ndarray, " MR"]  # which of the batch's B rows each of them is
    # Where each member's rows of the batch are among them; anywhere for those in which it has no say.
    places: Int[Array | np.ndarray, " MB"]


class Lockstep(NamedTuple):
    """See the module's text, and `members.Members` for what the functions are for."""

    pending: Int[Array, " B"]  # the token that each row feeds next
    lengths: Int[Array, " B"]  # tokens fed so far, which is the pending token's position
    starts: Int[Array, " B"]  # first slot in use: rows are padded on the left
    slot: Int[Array, " B"]  # the next one to be written, alike in all rows; where there are no more it goes round
    caches: tuple[Cache, ...]  # of a shared base M batches of rows, one after another
    subsets: RowSubsets | None = None  # None: every member runs every row

    @classmethod
    def start(cls, passes: tuple[ForwardPass, ...], prompts: Prompts, spec: DecodeSpec) -> "Lockstep":
        """Runs the members over all but the last token of each prompt, an encoder over all of it."""
        ids, real = aligned(prompts.ids[0], prompts.mask[0])
        t = ids.shape[1]
        caches = []
        for run in passes:
            # An encoder reads the whole prompt, and its decoder starts from a token of its own.
            is_encoder = run.model.config.encoder is not None
            read = slice(None) if is_encoder else slice(-1)
            cache = prompt_cache(run, ids[:, read], real[:, read])
            caches.append(extend_cache(cache, run.model.config, (1 if is_encoder else t) + spec.max_new_tokens))
        counts = jnp.sum(real, axis=1, dtype=jnp.int32)
        return cls(ids[:, -1], counts - 1, t - counts, jnp.full_like(counts, t - 1), tuple(caches))

    def admit(
        self, row: Int[Array, ""], ids: Array, mask: Array, read: tuple[Cache, ...], passes: tuple[ForwardPass, ...]
    ) -> "Lockstep":
        """One row begins anew, with a prompt right behind the slot that all write next.

        Args:
          ids, mask: the prompt, [1, T].
          read: caches of this prompt alone, whose first slots hold all but its last token.
        """
        ids, real = aligned(ids, mask)
        count = jnp.sum(real, dtype=jnp.int32) - 1
        slot = self.slot[0]
        batch, caches = len(self.pending), []
        for run, cache, own in zip(passes, self.caches, read, strict=True):
            for k in range(run.members):
                of_member = dataclasses.replace(own, layers=jax.tree.map(lambda x, k=k: x[k : k + 1], own.layers))
                cache = put_row(cache, run.model.config, of_member, row + k * batch, slot - count, count)
            caches.append(cache)
        return self._replace(
            pending=self.pending.at[row].set(ids[0, -1]),
            lengths=self.lengths.at[row].set(count),
            starts=self.starts.at[row].set(slot - count),
            caches=tuple(caches),
        )

    def resize(self, slots: int, spec: DecodeSpec) -> "Lockstep":
        """The same with caches of so many slots, which must hold what rows have to see."""
        pairs = zip(self.caches, spec.members, strict=not spec.shared_base)
        newest = self.slot[0] - 1
        resized = [resize_rings(cache, config, slots, newest) for cache, config in pairs]
        more = resized[0][1] - newest  # alike for all, which have as many slots
        return self._replace(
            slot=self.slot + more, starts=self.starts + more, caches=tuple(cache for cache, _ in resized)
        )

    def rebase(self) -> "Lockstep":
        """The same, with smaller numbers of slots, where they have grown so large that they would overflow one day."""
        period = math.lcm(
            *(held.slots for cache in self.caches for held in cache.layers if isinstance(held, LayerCache))
        )
        beyond = jnp.maximum(self.slot - _LARGE, 0) // period * period  # every slot keeps its place
        return self._replace(slot=self.slot - beyond, starts=self.starts - beyond)

    def rows(self, members: int) -> int:
        return len(self.pending) if self.subsets is None else len(self.subsets.rows) // members

    def read(
        self,
        passes: tuple[ForwardPass, ...],
        step: Int[Array, ""],
        needed: Bool[Array, " B"],
        weights: Float[Array, "B K"],
        spec: DecodeSpec,
    ) -> tuple["Lockstep", Prediction]:
        del needed, weights  # one forward for all
        caches, hidden, log_probs = [], [], []
        for run, cache in zip(passes, self.caches, strict=True):
            config = run.model.config
            pending, position, starts = self.pending, self.lengths, self.starts
            if config.encoder is not None:  # its slots hold no prompt, and it starts from a token of its own
                pending = jnp.where(step == 0, config.start_id or 0, pending)
                position, starts = jnp.full_like(position, step), jnp.zeros_like(starts)
            slot = self.slot[0] if config.encoder is None else step
            of_rows = (pending, position, visible(cache, config, starts, slot))
            own = jax.tree.map(functools.partial(self._of_members, run), of_rows)
            pending, position, seen = own
            h, cache = run.model.decode_step(pending, position, cache, slot, seen)
            caches.append(cache)
            hidden += self._by_member(run, h)
            log_probs += self._by_member(run, run.log_probs(h, spec.vocab))
        state = self._replace(lengths=self.lengths + 1, slot=self.slot + 1, caches=tuple(caches))
        return state, Prediction(tuple(hidden), tuple(log_probs), tuple(log_probs))

    def _of_members(self, run: ForwardPass, array: Array) -> Array:
        """From the batch's rows to those that the members run."""
        return run.tile(array) if self.subsets is None else array[self.subsets.rows]

    def _by_member(self, run: ForwardPass, array: Array) -> list[Array]:
        """From the rows that the members run to each member's batch, in which rows without its say are filling."""
        return jnp.split(array if self.subsets is None else array[self.subsets.places], run.members)

    def allowed(self, log_probs: Float[Array, "B V"], spec: DecodeSpec) -> Float[Array, "B V"]:
        del spec
        return log_probs

    def through_first_token(self, prediction: Prediction, spec: DecodeSpec) -> None:
        del prediction, spec

    def stuck(self, scores: Float[Array, "B V"], token: Int[Array, " B"], forced: bool, spec: DecodeSpec) -> Array:
        del scores, forced, spec
        return jnp.zeros(token.shape, bool)

    def append(self, token: Int[Array, " B"], rows: Bool[Array, " B"], spec: DecodeSpec) -> "Lockstep":
        del rows, spec
        return self._replace(pending=token)

    def token_log_probs(self, prediction: Prediction, token: Int[Array, " B"], spec: DecodeSpec) -> Float[Array, "B K"]:
        del spec
        return jnp.stack([jnp.take_along_axis(p, token[:, None], axis=1)[:, 0] for p in prediction.log_probs], axis=1)

    def observed(self, token_log_probs: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return token_log_probs

    def repeat(self, batch: int, times: int) -> "Lockstep":
        def repeat(leaf: Array) -> Array:
            split = leaf.reshape(-1, batch, *leaf.shape[1:])  # one batch of rows per member of a shared base
            return jnp.repeat(split, times, axis=1).reshape(-1, *leaf.shape[1:])

        return Lockstep(
            pending=repeat(self.pending),
            lengths=repeat(self.lengths),
            starts=repeat(self.starts),
            slot=repeat(self.slot),
            caches=tuple(
                dataclasses.replace(cache, layers=jax.tree.map(repeat, cache.layers)) for cache in self.caches
            ),
        )

    def lengthen(self, old: DecodeSpec, longer: DecodeSpec) -> "Lockstep":
        steps = longer.max_new_tokens - old.max_new_tokens
        pairs = zip(self.caches, old.members, strict=not old.shared_base)
        caches = tuple(extend_cache(cache, config, cache.slots + steps) for cache, config in pairs)
        return self._replace(caches=caches)
