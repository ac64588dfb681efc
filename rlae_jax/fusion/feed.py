"""How the members take in the text: in lockstep, or each at its own pace.

`Lockstep` is for members with one tokenizer: every chosen token is one token for each of them, all rows write the same
slot of a cache, and a step is one forward.

`Ragged` is for the rest. A chosen union entry costs a member as many tokens as spell it, often one, sometimes none,
rarely many. Each member keeps the tokens of its own text per row, and how many of them it has fed:

    text     d  e0 e1 f .  .        written 4: the last prompt token and two entries, of two tokens and one
    fed      ^^^^^^^^              fed 3: one token is pending

Before a member's prediction is needed, its pending tokens enter in one forward, whose size is chosen among a few while
the program runs; more than the largest holds takes several passes. Few rows have several tokens pending at a time, so a
pass holds one token of every row and a number of further ones, whatever rows they belong to. The forward only reads the
cache, since a cache that passes through a branch is copied; each row's keys and values are then written at its own
length. A member whose prediction is not needed is not run: it catches up later.
"""

import functools
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.models import ModelConfig, lora, transformer
from rlae_jax.models.attention import Packing

MemberParams = transformer.Params | lora.Adapted
# Prompts are read in groups of rows of about this many tokens: activations stay small, and on the CPU inside its cache
# (half the time of one pass at 256 prompts of 64 tokens).
_PREFILL_TOKENS = 2048
WIDEST = 8  # tokens of a row in one pass


class Spelling(NamedTuple):
    """One member's view of the union vocabulary."""

    partner: Int[Array, " U"]  # the member's id that is exactly this entry, or -1
    first: Int[Array, " U"]  # its first id of the entry's spelling, or -1 where that has none
    own: Int[Array, " V"]  # the entry that each of its ids is, or -1
    ids: Int[Array, " N"]  # all spellings, one after another
    offsets: Int[Array, " U+1"]

    def lengths(self, entries_b: Int[Array, " B"]) -> Int[Array, " B"]:
        """How many tokens entries cost this member."""
        return self.offsets[entries_b + 1] - self.offsets[entries_b]


@runtime_checkable
class FeedSpec(Protocol):
    """What a `DecodeSpec` tells about feeding."""

    @property
    def members(self) -> tuple[ModelConfig, ...]: ...
    @property
    def shared_base(self) -> bool: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def member_tokens(self) -> int: ...


class Model(NamedTuple):
    """One forward pass of the loop: a member, or all members over one base."""

    config: ModelConfig
    params: transformer.Params
    adapters: lora.Adapters | None
    members: int  # whose rows it runs, one batch after another

    def tile(self, array: Array) -> Array:
        """An array of rows, once per member."""
        return jnp.concatenate([array] * self.members) if self.members > 1 else array

    def log_probs(self, hidden: Float[Array, "R D"], vocab: int) -> Float[Array, "R V"]:
        """The members' log-probabilities of their first `vocab` tokens, from states of the rows that they run."""
        logits = transformer.output_head(self.config, self.params, hidden, self.adapters)[:, :vocab]
        return jax.nn.log_softmax(logits, axis=-1)

    def base_logits(self, hidden: Float[Array, "B D"], vocab: int) -> Float[Array, "B V"]:
        """What the head without adapters predicts from states of one batch, up to each row's normaliser."""
        return transformer.output_head(self.config, self.params, hidden)[:, :vocab]


def models_of(params: tuple[MemberParams, ...], spec: FeedSpec, batch: int) -> tuple[Model, ...]:
    """The forward passes of a batch."""
    models = []
    members = len(spec.members) if spec.shared_base else 1
    for config, p in zip(spec.members, params, strict=not spec.shared_base):
        if spec.shared_base and isinstance(p, lora.Adapted):
            p = p._replace(weights=jnp.repeat(jnp.eye(members), batch, axis=0))  # member k's rows use adapter k
        elif isinstance(p, lora.Adapted) and 1 < len(p.weights) < batch:  # several samples of each row
            p = p._replace(weights=jnp.repeat(p.weights, batch // len(p.weights), axis=0))
        models.append(Model(config, *lora.unpack(p, members * batch), members))
    return tuple(models)


def left_align_padding(ids_bt: Int[Array | np.ndarray, "B T"], mask_bt: Array | np.ndarray) -> tuple[Array, Array]:
    """Moves every row's padding to its left, keeping the order of its tokens."""
    real = mask_bt.astype(bool)
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(ids_bt, order, axis=1), jnp.take_along_axis(real, order, axis=1)


def _aligned(ids_bt: Array | np.ndarray, mask_bt: Array | np.ndarray) -> tuple[Array, Array]:
    ids, real = left_align_padding(ids_bt, mask_bt)
    if ids.shape[1] == 1:  # the members need something to read before the pending token
        ids, real = (jnp.pad(array, ((0, 0), (1, 0))) for array in (ids, real))
    return ids, real


def _prompt_cache(model: Model, ids: Array, real: Array) -> transformer.Cache:
    """What decoding keeps of whole prompts."""
    rows = () if model.adapters is None else model.adapters.rows
    inputs = (model.tile(ids), model.tile(real), rows)

    def read(group: Any) -> transformer.Cache:
        ids, real, rows = group
        adapters = None if model.adapters is None else model.adapters._replace(rows=rows)
        return transformer.read_prompt(model.config, model.params, ids, real, adapters)

    b, t = inputs[0].shape
    size = max(_PREFILL_TOKENS // t, 1)
    groups = b // size
    if groups <= 1 or b % size:
        return read(inputs)
    grouped = lax.map(read, jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), inputs))
    return jax.tree.map(lambda leaf: leaf.reshape(b, *leaf.shape[2:]), grouped)


def prompt_log_probs(model: Model, prompt_ids: Array | np.ndarray, prompt_mask: Array | np.ndarray) -> Array:
    """The log-probability of each prompt after its first token, Float[B, members]."""
    ids, real = _aligned(prompt_ids, prompt_mask)
    ids, real = model.tile(ids), model.tile(real)
    hidden = transformer.forward(model.config, model.params, ids, real, model.adapters)[0]
    log_probs = transformer.target_log_probs(model.config, model.params, hidden[:, :-1], ids[:, 1:], model.adapters)
    total = jnp.sum(jnp.where(real[:, :-1], log_probs, 0.0), axis=1)
    return total.reshape(model.members, -1).T


class Runs(NamedTuple):
    """What the members of a shared base run, where no member has a say in all rows: R rows each."""

    rows: Int[Array | np.ndarray, " M*R"]  # which of the batch's B rows each of them is
    # Where each member's rows of the batch are among them; anywhere for those in which it has no say.
    places: Int[Array | np.ndarray, " M*B"]


class Lockstep(NamedTuple):
    """Members with one tokenizer."""

    pending: Int[Array, " B"]  # the token that each row feeds next
    lengths: Int[Array, " B"]  # tokens fed so far, which is the pending token's position
    starts: Int[Array, " B"]  # first slot in use: rows are padded on the left
    caches: tuple[transformer.Cache, ...]
    runs: Runs | None = None  # None: every member runs every row

    @classmethod
    def start(
        cls, models: tuple[Model, ...], prompt_ids: Array | np.ndarray, prompt_mask: Array | np.ndarray, spec: FeedSpec
    ) -> "Lockstep":
        """Runs the members over all but the last token of each prompt, an encoder over all of it."""
        ids, real = _aligned(prompt_ids, prompt_mask)
        t = ids.shape[1]
        caches = []
        for model in models:
            # An encoder reads the whole prompt, and its decoder starts from a token of its own.
            is_encoder = model.config.encoder is not None
            read = slice(None) if is_encoder else slice(-1)
            cache = _prompt_cache(model, ids[:, read], real[:, read])
            caches.append(transformer.extend_cache(cache, (1 if is_encoder else t) + spec.max_new_tokens))
        counts = jnp.sum(real, axis=1, dtype=jnp.int32)
        return cls(ids[:, -1], counts - 1, t - counts, tuple(caches))

    def rows(self, members: int) -> int:
        """How many rows each member runs."""
        return len(self.pending) if self.runs is None else len(self.runs.rows) // members

    def _of_members(self, model: Model, array: Array) -> Array:
        """From the batch's rows to those that the members run."""
        return model.tile(array) if self.runs is None else array[self.runs.rows]

    def batches(self, model: Model, array: Array) -> list[Array]:
        """From the rows that the members run to each member's batch, in which rows without its say are filling."""
        return jnp.split(array if self.runs is None else array[self.runs.places], model.members)

    def read(
        self, models: tuple[Model, ...], step: Int[Array, ""], spec: FeedSpec
    ) -> tuple["Lockstep", tuple[Array, ...]]:
        """Feeds the pending token of step `step`. Returns the new state and each model's hidden states, whose rows are
        those that its members run."""
        caches, hidden = [], []
        for model, cache in zip(models, self.caches, strict=True):
            pending, position, starts = self.pending, self.lengths, self.starts
            if model.config.encoder is not None:  # its slots hold no prompt, and it starts from a token of its own
                pending = jnp.where(step == 0, model.config.start_id or 0, pending)
                position, starts = jnp.full_like(position, step), jnp.zeros_like(starts)
            slot = cache.slots - spec.max_new_tokens - 1 + step
            indices = jnp.arange(cache.slots)[None]
            visible = (indices >= starts[:, None]) & (indices <= slot)
            pending, position, visible = (self._of_members(model, array) for array in (pending, position, visible))
            h, cache = transformer.decode_step(
                model.config, model.params, pending, position, cache, slot, visible, model.adapters
            )
            caches.append(cache)
            hidden.append(h)
        return self._replace(lengths=self.lengths + 1, caches=tuple(caches)), tuple(hidden)


def _pass_sizes(rows: int) -> tuple[int, ...]:
    """How many tokens a pass may take beyond one per row. Each size is a forward of its own in the program, so there
    are few. Most entries of a pair of real vocabularies take one token, 98% at most 3."""
    if rows == 1:
        return (0, 1, 3, WIDEST - 1)
    return (0, rows // 4 + 1, rows // 2 + 2, rows + WIDEST)


class Ragged(NamedTuple):
    """One member that takes in the text at its own pace."""

    text: Int[Array, "B C"]  # the last prompt token and everything written since, as this member's tokens
    written: Int[Array, " B"]  # tokens in `text`
    fed: Int[Array, " B"]
    lengths: Int[Array, " B"]  # prompt tokens in the cache
    starts: Int[Array, " B"]  # first slot in use: prompts are padded on the left
    hidden: Float[Array, "B D"]  # after the last token that was fed
    cache: transformer.Cache

    @classmethod
    def start(
        cls, model: Model, prompt_ids: Array | np.ndarray, prompt_mask: Array | np.ndarray, spec: FeedSpec
    ) -> "Ragged":
        """Runs a member over all but the last token of each prompt, which is its first pending token."""
        ids, real = _aligned(prompt_ids, prompt_mask)
        b, t = ids.shape
        cache = _prompt_cache(model, ids[:, :-1], real[:, :-1])
        capacity = 1 + spec.member_tokens
        counts = jnp.sum(real, axis=1, dtype=jnp.int32)
        return cls(
            text=jnp.zeros((b, capacity), jnp.int32).at[:, 0].set(ids[:, -1]),
            written=jnp.ones((b,), jnp.int32),
            fed=jnp.zeros((b,), jnp.int32),
            lengths=counts - 1,
            starts=t - counts,
            hidden=jnp.zeros((b, model.config.hidden_width), model.config.dtype),
            # The filling of a pass lies beyond a row's tokens, so the last row's last pass must fit, too.
            cache=transformer.extend_cache(cache, t - 1 + capacity + WIDEST),
        )

    def read(self, model: Model, needed: Bool[Array, " B"]) -> "Ragged":
        """Feeds the pending tokens of the rows whose prediction is needed."""
        b = len(self.fed)
        prompt_slots = self.cache.slots - self.text.shape[1] - WIDEST
        slots = jnp.arange(self.cache.slots)[None]
        sizes = _pass_sizes(b)

        def one_pass(state: "Ragged") -> "Ragged":
            pending = jnp.where(needed, state.written - state.fed, 0)
            slot = prompt_slots + state.fed
            behind = (slots >= state.starts[:, None]) & (slots < slot[:, None])

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
                hidden, new = transformer.decode_chunk(
                    *(model.config, model.params, ids, state.lengths[row] + at, count, state.cache, behind, slot),
                    adapters,
                    packing,
                )
                pad = ((0, 0), (0, 0), (0, 0), (0, WIDEST - width))
                return count, hidden, jax.tree.map(lambda array: jnp.pad(array, pad), new)

            # The first size that holds everything, or else the last.
            wanted = jnp.sum(jnp.clip(pending - 1, 0, WIDEST - 1))
            choice = jnp.argmin(jnp.stack([*(wanted > size for size in sizes[:-1]), jnp.zeros((), bool)]))
            count, hidden, new = lax.switch(choice, [functools.partial(forward, size) for size in sizes])
            return state._replace(
                fed=state.fed + count,
                hidden=jnp.where((count > 0)[:, None], hidden, state.hidden),
                cache=transformer.write_chunk(state.cache, new, slot),
            )

        return lax.while_loop(lambda state: jnp.any(needed & (state.fed < state.written)), one_pass, self)

    def fits(self, spelling: Spelling, entries: Int[Array, " B"]) -> Bool[Array, " B"]:
        """Whether there is room for each row's entry."""
        return self.written + spelling.lengths(entries) <= self.text.shape[1]

    def append(self, spelling: Spelling, entries: Int[Array, " B"], rows: Bool[Array, " B"]) -> "Ragged":
        """Adds an entry's tokens to the texts of some rows; they must fit."""
        count = jnp.where(rows, spelling.lengths(entries), 0)
        places = jnp.arange(self.text.shape[1])[None] - self.written[:, None]
        inside = (places >= 0) & (places < count[:, None])
        source = jnp.clip(spelling.offsets[entries][:, None] + places, 0, spelling.ids.shape[0] - 1)
        return self._replace(
            text=jnp.where(inside, spelling.ids[source], self.text),
            written=self.written + count,
        )
