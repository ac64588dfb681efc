"""Members with different tokenizers: each takes in the text at its own pace.

A chosen union entry costs a member as many tokens as spell it, often one, sometimes none, rarely many. Each member
keeps the tokens of its own text per row, and how many of them it has fed:

    text     d  e0 e1 f .  .        written 4: the last prompt token and two entries, of two tokens and one
    fed      ^^^^^^^^              fed 3: one token is pending

Before a member's prediction is needed, its pending tokens enter in one forward, whose size is chosen among a few while
the program runs; more than the largest holds takes several passes. Few rows have several tokens pending at a time, so a
pass holds one token of every row and a number of further ones, whatever rows they belong to. The forward only reads the
cache, since a cache that passes through a branch is copied; each row's keys and values are then written at its own
length. A member whose prediction is not needed is not run: it catches up later.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.fusion.members import ForwardPass, Prediction, aligned, prompt_cache
from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.spec import DecodeSpec, Spelling, UnionTables
from rlae_jax.models import ModelConfig, transformer
from rlae_jax.models.attention import Packing
from rlae_jax.models.cache import Cache, LayerCache, extend_cache, put_row, visible, write_chunk
from rlae_jax.sharding import constrain

WIDEST = 8  # tokens of a row in one pass
# The least log-probability of a token that a policy sees: a member may be unable to read one.
_UNREADABLE = -30.0


def _pass_sizes(rows: int) -> tuple[int, ...]:
    """How many tokens a pass may take beyond one per row. Each size is a forward of its own in the program, so there
    are few. Most entries of a pair of real vocabularies take one token, 98% at most 3."""
    if rows == 1:
        return (0, 1, 3, WIDEST - 1)
    return (0, rows // 4 + 1, rows // 2 + 2, rows + WIDEST)


class RaggedMember(NamedTuple):
    """One member that takes in the text at its own pace."""

    text: Int[Array, "B C"]  # the last prompt token and everything written since, as this member's tokens
    written: Int[Array, " B"]  # tokens in `text`
    fed: Int[Array, " B"]
    lengths: Int[Array, " B"]  # prompt tokens in the cache
    starts: Int[Array, " B"]  # first slot in use: prompts are padded on the left
    room: Int[Array, " B"]  # the most tokens that `text` may hold
    hidden: Float[Array, "B D"]  # after the last token that was fed
    cache: Cache

    @classmethod
    def start(cls, run: ForwardPass, prompt_ids: Array, prompt_mask: Array, spec: DecodeSpec) -> "RaggedMember":
        """Runs a member over all but the last token of each prompt, which is its first pending token."""
        ids, real = aligned(prompt_ids, prompt_mask)
        b, t = ids.shape
        config = run.model.config
        cache = prompt_cache(run, ids[:, :-1], real[:, :-1], WIDEST)
        capacity = 1 + spec.member_tokens
        counts = jnp.sum(real, axis=1, dtype=jnp.int32)
        return cls(
            text=jnp.zeros((b, capacity), jnp.int32).at[:, 0].set(ids[:, -1]),
            written=jnp.ones((b,), jnp.int32),
            fed=jnp.zeros((b,), jnp.int32),
            lengths=counts - 1,
            starts=t - counts,
            room=jnp.full((b,), capacity, jnp.int32),
            hidden=jnp.zeros((b, config.hidden_width), config.dtype),
            # The filling of a pass lies beyond a row's tokens, so the last row's last pass must fit, too.
            cache=extend_cache(cache, config, t - 1 + capacity + WIDEST, WIDEST),
        )

    def admit(
        self, row: Int[Array, ""], ids: Array, mask: Array, read: Cache, room: Int[Array, ""], config: ModelConfig
    ) -> "RaggedMember":
        """One row begins anew, with a prompt [1, T] of which `read` holds all but the last token in its first slots."""
        ids, real = aligned(ids, mask)
        count = jnp.sum(real, dtype=jnp.int32) - 1
        return RaggedMember(
            text=self.text.at[row].set(jnp.zeros_like(self.text[0]).at[0].set(ids[0, -1])),
            written=self.written.at[row].set(1),
            fed=self.fed.at[row].set(0),
            lengths=self.lengths.at[row].set(count),
            starts=self.starts.at[row].set(0),
            room=self.room.at[row].set(1 + room),
            hidden=self.hidden.at[row].set(0.0),
            cache=put_row(self.cache, config, read, row, jnp.zeros_like(count), count, WIDEST),
        )

    def read(self, model: transformer.Model, needed: Bool[Array, " B"]) -> "RaggedMember":
        """Feeds the pending tokens of the rows whose prediction is needed."""
        b = len(self.fed)
        sizes = _pass_sizes(b)

        def one_pass(state: "RaggedMember") -> "RaggedMember":
            pending = jnp.where(needed, state.written - state.fed, 0)
            slot = state.starts + state.lengths + state.fed
            behind = visible(state.cache, model.config, state.starts, slot - 1)

            def forward(further: int) -> tuple[Array, Array, Any]:
                adapters = model.adapters
                if b == 1:
                    count = jnp.minimum(pending, 1 + further)
                    row, place, packing = jnp.zeros((1, 1), jnp.int32), jnp.arange(1 + further)[None], None
                    width = 1 + further
                elif not further:
                    count = jnp.minimum(pending, 1)
                    row, place, packing = jnp.arange(b)[:, None], jnp.zeros((b, 1), jnp.int32), None
                    width = 1
                else:
                    width = WIDEST
                    want = jnp.clip(pending - 1, 0, width - 1)
                    first = jnp.cumsum(want) - want  # of each row's further tokens among all
                    more = jnp.clip(further - first, 0, want)
                    count = jnp.minimum(pending, 1) + more
                    row = jnp.searchsorted(jnp.cumsum(more), jnp.arange(further), side="right")
                    row = jnp.minimum(row, b - 1)
                    place = jnp.clip(1 + jnp.arange(further) - first[row], 1, width - 1)
                    later = jnp.minimum(b + first[:, None] + jnp.arange(width - 1)[None], b + further - 1)
                    packing = Packing(row, place, jnp.concatenate([jnp.arange(b)[:, None], later], axis=1))
                    row = jnp.concatenate([jnp.arange(b), row])[:, None]
                    place = jnp.pad(place, (b, 0))[:, None]
                    if adapters is not None:
                        adapters = adapters._replace(rows=adapters.rows[row[:, 0]])
                at = state.fed[row] + place
                ids = state.text[row, jnp.minimum(at, state.text.shape[1] - 1)]
                own = dataclasses.replace(model, adapters=adapters)
                hidden, new = own.decode_chunk(ids, state.lengths[row] + at, count, state.cache, behind, slot, packing)

                def pad(array: Array) -> Array:
                    return jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, WIDEST - width)])

                padded = tuple(jax.tree.map(pad, layer) if isinstance(layer, LayerCache) else layer for layer in new)
                return count, hidden, padded

            # The first size that holds everything, or else the last.
            wanted = jnp.sum(jnp.clip(pending - 1, 0, WIDEST - 1))
            choice = jnp.argmin(jnp.stack([*(wanted > size for size in sizes[:-1]), jnp.zeros((), bool)]))
            count, hidden, new = lax.switch(choice, [functools.partial(forward, size) for size in sizes])
            return state._replace(
                fed=state.fed + count,
                hidden=jnp.where((count > 0)[:, None], hidden, state.hidden),
                cache=write_chunk(state.cache, new, slot),
            )

        return lax.while_loop(lambda state: jnp.any(needed & (state.fed < state.written)), one_pass, self)

    def fits(self, spelling: Spelling, entries: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Whether there is room for each row's entry."""
        return self.written + spelling.lengths(entries) <= self.room

    def append(self, spelling: Spelling, entries: Int[Array, " B"], rows: Bool[Array, " B"]) -> "RaggedMember":
        """Adds an entry's tokens to the texts of some rows; they must fit."""
        count = jnp.where(rows, spelling.lengths(entries), 0)
        places = jnp.arange(self.text.shape[1])[None] - self.written[:, None]
        inside = (places >= 0) & (places < count[:, None])
        source = jnp.clip(spelling.offsets[entries][:, None] + places, 0, spelling.ids.shape[0] - 1)
        return self._replace(
            text=jnp.where(inside, spelling.ids[source], self.text),
            written=self.written + count,
        )


def _tables(spec: DecodeSpec) -> UnionTables:
    assert spec.union is not None
    return spec.union


def to_union(k: int, log_probs: Float[Array, "B V"], spelling: Spelling) -> Float[Array, "B U"]:
    """A member's log-probabilities as those of the union's entries; -inf where it has no such token."""
    u = spelling.partner.shape[0]
    if k == 0:  # whose ids are the first entries
        return jnp.pad(log_probs, ((0, 0), (0, u - log_probs.shape[1])), constant_values=-jnp.inf)
    return jnp.where(spelling.partner >= 0, log_probs[:, spelling.partner], -jnp.inf)


class Ragged(NamedTuple):
    """All members, and how far the last character of each row is written. See `members.Members` for what the functions
    are for."""

    members: tuple[RaggedMember, ...]
    character: Int[Array, " B"]  # the state of the UTF-8 automaton

    @classmethod
    def start(cls, passes: tuple[ForwardPass, ...], prompts: Prompts, spec: DecodeSpec) -> "Ragged":
        """Runs the members over all but the last token of each prompt, in each member's own tokens."""
        rows = zip(passes, prompts.ids, prompts.mask, strict=True)
        members = tuple(RaggedMember.start(run, ids, mask, spec) for run, ids, mask in rows)
        return cls(members, jnp.zeros((prompts.batch,), jnp.int32))

    def admit(
        self,
        row: Int[Array, ""],
        prompts: Prompts,
        read: tuple[Cache, ...],
        room: Int[Array, ""],
        passes: tuple[ForwardPass, ...],
    ) -> "Ragged":
        """One row begins anew; see `RaggedMember.admit`."""
        own = zip(self.members, prompts.ids, prompts.mask, read, passes, strict=True)
        members = tuple(
            member.admit(row, ids, mask, cache, room, run.model.config) for member, ids, mask, cache, run in own
        )
        return Ragged(members, self.character.at[row].set(0))

    @property
    def caches(self) -> tuple[Cache, ...]:
        return tuple(member.cache for member in self.members)

    def rows(self, members: int) -> int:
        del members
        return len(self.character)

    def read(
        self,
        passes: tuple[ForwardPass, ...],
        step: Int[Array, ""],
        needed: Bool[Array, " B"],
        weights: Float[Array, "B K"],
        spec: DecodeSpec,
    ) -> tuple["Ragged", Prediction]:
        del step
        members: list[RaggedMember] = []
        own: list[Array] = []
        for k, (run, member) in enumerate(zip(passes, self.members, strict=True)):
            vocab = _tables(spec).spellings[k].own.shape[0]
            wanted = needed & (weights[:, k] > 0) if spec.may_skip else needed
            member = member.read(run.model, wanted)

            def predict(run: ForwardPass = run, hidden: Array = member.hidden, vocab: int = vocab) -> Array:
                # Whole on every device of a mesh: each member's part of the union lies elsewhere.
                return constrain(run.log_probs(hidden, vocab), "batch")

            if spec.may_skip:
                skipped = jnp.zeros((len(needed), vocab))
                own.append(lax.cond(jnp.any(wanted), predict, lambda skipped=skipped: skipped))
            else:
                own.append(predict())
            members.append(member)
        pairs = zip(own, _tables(spec).spellings, strict=True)
        log_probs = tuple(to_union(k, *pair) for k, pair in enumerate(pairs))
        hidden = tuple(member.hidden for member in members)
        return self._replace(members=tuple(members)), Prediction(hidden, tuple(own), log_probs)

    def allowed(self, log_probs: Float[Array, "B U"], spec: DecodeSpec) -> Float[Array, "B U"]:
        return jnp.where(_tables(spec).utf8[self.character] >= 0, log_probs, -jnp.inf)

    def through_first_token(self, prediction: Prediction, spec: DecodeSpec) -> tuple[Float[Array, "B U"], ...]:
        pairs = zip(prediction.own, _tables(spec).spellings, strict=True)
        return tuple(jnp.where(s.first >= 0, log_probs[:, s.first], -jnp.inf) for log_probs, s in pairs)

    def stuck(self, scores: Float[Array, "B U"], token: Int[Array, " B"], forced: bool, spec: DecodeSpec) -> Array:
        rows = jnp.zeros(token.shape, bool) if forced else ~jnp.any(jnp.isfinite(scores), axis=-1)
        for member, spelling in zip(self.members, _tables(spec).spellings, strict=True):
            rows = rows | ~member.fits(spelling, token)
        return rows

    def append(self, token: Int[Array, " B"], rows: Bool[Array, " B"], spec: DecodeSpec) -> "Ragged":
        spelled = zip(self.members, _tables(spec).spellings, strict=True)
        after = _tables(spec).utf8[self.character, token].astype(jnp.int32)
        return Ragged(
            tuple(member.append(spelling, token, rows) for member, spelling in spelled),
            jnp.where(rows, after, self.character),
        )

    def token_log_probs(self, prediction: Prediction, token: Int[Array, " B"], spec: DecodeSpec) -> Float[Array, "B K"]:
        columns = []
        for log_probs, spelling in zip(prediction.own, _tables(spec).spellings, strict=True):
            ids = spelling.first[token]
            read = jnp.take_along_axis(log_probs, jnp.maximum(ids, 0)[:, None], axis=1)[:, 0]
            columns.append(jnp.where(ids >= 0, read, -jnp.inf))
        return jnp.stack(columns, axis=1)

    def observed(self, token_log_probs: Float[Array, "B K"]) -> Float[Array, "B K"]:
        return jnp.maximum(token_log_probs, _UNREADABLE)

    def repeat(self, batch: int, times: int) -> "Ragged":
        del batch
        repeated: Ragged = jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), self)
        return repeated

    def lengthen(self, old: DecodeSpec, longer: DecodeSpec) -> "Ragged":
        room = longer.member_tokens - old.member_tokens
        members = tuple(
            member._replace(
                text=jnp.pad(member.text, ((0, 0), (0, room))),
                room=member.room + room,
                cache=extend_cache(member.cache, config, member.cache.slots + room, WIDEST),
            )
            for member, config in zip(self.members, old.members, strict=True)
        )
        return self._replace(members=members)
