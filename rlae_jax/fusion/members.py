"""Members inside the decoding loop: what reads prompts, predicts the next token and takes in the one that was chosen.

There are two kinds. `Lockstep` is for members with one tokenizer: a chosen token is one token for each of them.
`Ragged` is for the rest: a chosen entry of their union vocabulary is spelled in each member's own tokens. Both are
states of the loop with the same few functions (`Members`); the loop does not know which it has.
"""

import dataclasses
from typing import NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from rlae_jax.fusion.prompts import Prompts
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import lora, transformer
from rlae_jax.models.cache import Cache, extend_cache
from rlae_jax.sharding import constrain

MemberParams = transformer.Params | lora.Adapted
# Prompts are read in groups of rows of about this many tokens: activations stay small, and on the CPU inside its cache
# (half the time of one pass at 256 prompts of 64 tokens).
_PREFILL_TOKENS = 2048


class Prediction(NamedTuple):
    """What the members say about the next token of every row. Of members that were skipped it has no meaning."""

    hidden: tuple[Float[Array, "B D"], ...]  # each member's last hidden state
    own: tuple[Float[Array, "B V"], ...]  # log-probabilities of each member's own tokens
    log_probs: tuple[Float[Array, "B V"], ...]  # of the common vocabulary; -inf where a member lacks an entry


@runtime_checkable
class Members(Protocol):
    """What the loop asks of its members. `token` is Int[B], an id or an entry of the union vocabulary."""

    @property
    def caches(self) -> tuple[Cache, ...]:
        """Each forward pass's keys and values."""
        ...

    def rows(self, members: int) -> int:
        """How many rows each member runs."""
        ...

    def read(
        self,
        passes: tuple["ForwardPass", ...],
        step: Int[Array, ""],
        needed: Bool[Array, " B"],
        weights: Float[Array, "B K"],
        spec: DecodeSpec,
    ) -> tuple[Self, Prediction]:
        """Feeds what is pending in the rows whose prediction is needed."""
        ...

    def allowed(self, log_probs: Float[Array, "B V"], spec: DecodeSpec) -> Float[Array, "B V"]:
        """-inf where a token may not follow the text so far."""
        ...

    def through_first_token(self, prediction: Prediction, spec: DecodeSpec) -> tuple[Float[Array, "B V"], ...] | None:
        """`prediction.log_probs` with entries that a member lacks read through the first token of their spelling; None
        where every member has every token."""
        ...

    def stuck(self, scores: Float[Array, "B V"], token: Int[Array, " B"], forced: bool, spec: DecodeSpec) -> Array:
        """Bool[B], rows that cannot go on: nothing may be written, or there is no room for the token."""
        ...

    def append(self, token: Int[Array, " B"], rows: Bool[Array, " B"], spec: DecodeSpec) -> Self:
        """The token becomes pending in some rows."""
        ...

    def token_log_probs(self, prediction: Prediction, token: Int[Array, " B"], spec: DecodeSpec) -> Float[Array, "B K"]:
        """The token's log-probability under each member, -inf where it cannot read it."""
        ...

    def observed(self, token_log_probs: Float[Array, "B K"]) -> Float[Array, "B K"]:
        """As a policy sees it: finite."""
        ...

    def repeat(self, batch: int, times: int) -> Self:
        """Every row `times` times, one after another. What an encoder read stays as it is, for all of them."""
        ...

    def lengthen(self, old: DecodeSpec, longer: DecodeSpec) -> Self:
        """Room for the further steps of a longer spec."""
        ...


class ForwardPass(NamedTuple):
    """One forward pass of the loop: a member, or all members over one base."""

    model: transformer.Model
    members: int  # whose rows it runs, one batch after another

    def tile(self, array: Array) -> Array:
        """An array of rows, once per member."""
        return jnp.concatenate([array] * self.members) if self.members > 1 else array

    def of_rows(self, rows_r: Int[Array, " R"]) -> "ForwardPass":
        """The pass of some of the rows that it runs, for the head."""
        adapters = self.model.adapters
        if adapters is None:
            return self
        chosen = adapters._replace(rows=adapters.rows[rows_r])
        return self._replace(model=dataclasses.replace(self.model, adapters=chosen))

    def log_probs(self, hidden: Float[Array, "R D"], vocab: int) -> Float[Array, "R V"]:
        """The members' log-probabilities of their first `vocab` tokens, from states of the rows that they run."""
        return jax.nn.log_softmax(_first(self.model.logits(hidden), vocab), axis=-1)

    def chosen_log_probs(
        self, hidden: Float[Array, "R D"], token_r: Int[Array, " R"], vocab: int
    ) -> Float[Array, " R"]:
        """Of `log_probs`, each row's own token's."""
        logits = _first(self.model.logits(hidden), vocab)
        return jnp.take_along_axis(logits, token_r[:, None], axis=1)[:, 0] - jax.nn.logsumexp(logits, axis=-1)

    def base_logits(self, hidden: Float[Array, "B D"], vocab: int) -> Float[Array, "B V"]:
        """What the head without adapters predicts from states of one batch, up to each row's normaliser."""
        return _first(dataclasses.replace(self.model, adapters=None).logits(hidden), vocab)


def _first(logits: Float[Array, "R _V"], vocab: int) -> Float[Array, "R V"]:
    """Those of the first ids. On a mesh they are brought together before: parts of other sizes would have to be sent
    from device to device, which all groups of devices, at whatever step they are, would wait for."""
    return constrain(logits, "batch")[:, :vocab] if vocab < logits.shape[-1] else logits


def bind_members(params: tuple[MemberParams, ...], spec: DecodeSpec, batch: int) -> tuple[ForwardPass, ...]:
    """The forward passes of a batch, with its rows' choices of adapters."""
    passes = []
    members = len(spec.members) if spec.shared_base else 1
    for config, p in zip(spec.members, params, strict=not spec.shared_base):
        if spec.shared_base and isinstance(p, lora.Adapted):
            p = p._replace(weights=jnp.repeat(jnp.eye(members), batch, axis=0))  # member k's rows use adapter k
        elif isinstance(p, lora.Adapted) and 1 < len(p.weights) < batch:  # several samples of each row
            p = p._replace(weights=jnp.repeat(p.weights, batch // len(p.weights), axis=0))
        passes.append(ForwardPass(transformer.Model.bind(config, p, members * batch), members))
    return tuple(passes)


def left_align_padding(ids_bt: Int[Array, "B T"], mask_bt: Array) -> tuple[Array, Array]:
    """Moves every row's padding to its left, keeping the order of its tokens."""
    real = mask_bt.astype(bool)
    order = jnp.argsort(real, axis=1, stable=True)
    return jnp.take_along_axis(ids_bt, order, axis=1), jnp.take_along_axis(real, order, axis=1)


def aligned(ids_bt: Array, mask_bt: Array) -> tuple[Array, Array]:
    """Prompts with their padding on the left, of at least two tokens: one to read and one that is pending."""
    ids, real = left_align_padding(ids_bt, mask_bt)
    if ids.shape[1] == 1:
        ids, real = (jnp.pad(array, ((0, 0), (1, 0))) for array in (ids, real))
    return ids, real


def prompt_cache(run: ForwardPass, ids: Array, real: Array, ahead: int = 0) -> Cache:
    """What decoding keeps of whole prompts; `ahead` as in `cache.layer_slots`."""
    model = run.model
    rows = None if model.adapters is None else model.adapters.rows
    inputs = (run.tile(ids), run.tile(real), rows)

    def read(group: tuple[Array, Array, Array | None]) -> Cache:
        ids, real, rows = group
        adapters = None if model.adapters is None or rows is None else model.adapters._replace(rows=rows)
        cache = dataclasses.replace(model, adapters=adapters).read_prompt(ids, real)
        return extend_cache(cache, model.config, cache.slots, ahead)

    b, t = inputs[0].shape
    size = max(_PREFILL_TOKENS // t, 1)
    groups = b // size
    if groups <= 1 or b % size:
        return read(inputs)
    grouped = lax.map(read, jax.tree.map(lambda leaf: leaf.reshape(groups, size, *leaf.shape[1:]), inputs))
    cache: Cache = jax.tree.map(lambda leaf: leaf.reshape(b, *leaf.shape[2:]), grouped)
    return cache


def prompt_log_probs(passes: tuple[ForwardPass, ...], prompts: Prompts) -> Float[Array, "B K"]:
    """Each member's log-probability of the prompt after its first token, per token of member 0."""
    totals = []
    for i, run in enumerate(passes):
        ids, real = aligned(prompts.ids[i % len(prompts.ids)], prompts.mask[i % len(prompts.ids)])
        ids, real = run.tile(ids), run.tile(real)
        hidden = run.model.forward(ids, real)[0]
        log_probs = run.model.target_log_probs(hidden[:, :-1], ids[:, 1:])
        total = jnp.sum(jnp.where(real[:, :-1], log_probs, 0.0), axis=1)
        totals.append(total.reshape(run.members, -1).T)
    counts = jnp.sum(jnp.asarray(prompts.mask[0]).astype(bool), axis=1, keepdims=True)
    return jnp.concatenate(totals, axis=1) / jnp.maximum(counts - 1, 1).astype(jnp.float32)
