"""`Ensemble`: the host's side of decoding. Text or ids and weights in, texts and what was decided out.

Checks everything a user can get wrong, pads the batch into buckets so that programs are reused, calls the compiled
loop once, and turns ids into text.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion import vocabulary as vocabularies
from rlae_jax.fusion.feed import Lockstep, Spelling
from rlae_jax.fusion.operators import FusionOperator, Hidden, get_operator
from rlae_jax.fusion.policy import EVERY_STEP, UNTRAINED, BoundPolicy, Dims, Draw, Fixed, Policy
from rlae_jax.fusion.reading import Text, TextReader
from rlae_jax.fusion.sampling import Sampling
from rlae_jax.models import LM, Adapter, Encoder, lora, transformer
from rlae_jax.models.lm import AdapterChoice, load_adapters, require_tokenizer

SMALLEST_PROMPT_BUCKET = 16
DEFAULT_SPAN_LENGTH = 4
# Steps between two looks at what was written, where stop strings may end a row.
_STOP_STEPS = 16

Weights = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Array | str | Policy | BoundPolicy | None
# A prompt's ids; of members with different tokenizers, each member's own.
Row = Any


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Ensemble.generate` returns, one entry per prompt."""

    decoded: list[str] | None  # None without a tokenizer; read `texts`
    tokens: list[list[int]]  # the first member's ids, end token excluded
    weights: Float[np.ndarray, "B P K"]  # used in each span; NaN after a row's end
    finish_reasons: list[str]  # "stop" | "length"
    steps: list[int]  # fused steps, the one that chose the end token included
    # With `scores=True`, the chosen tokens' log-probabilities under the fused distribution and under each member (of a
    # token that a member lacks, through the first token of its spelling, -inf if there is none); NaN after a row's end.
    scores: Float[np.ndarray, "B T"] | None = None
    attribution: Float[np.ndarray, "B T K"] | None = None
    kept: "_Kept | None" = dataclasses.field(default=None, repr=False)  # with `keep=True`, for `Ensemble.extend`

    @property
    def texts(self) -> list[str]:
        """Each prompt's answer: prompt + text is what decoding the whole sequence gives.

        Raises:
          InputError: the members have no tokenizer.
        """
        if self.decoded is None:
            raise InputError("the members have no tokenizer, so there are no texts; read tokens")
        return self.decoded


def bucket(n: int, smallest: int = 1) -> int:
    """The next size in 1, 2, 3, 4, 6, 8, 12, 16, ... (2^i and 3 * 2^i) that holds n: at most half is wasted."""
    size = smallest
    while size < n:
        if 3 * size % 2 == 0 and 3 * size // 2 >= n:
            return 3 * size // 2
        size *= 2
    return size


def normalise_weights(weights: Any, batch: int, members: int, *, given: bool = False) -> Float[np.ndarray, "B K"]:
    """Checks [K] or [B, K] weights and scales each row to sum to 1, or leaves them as they are given.

    Raises:
      InputError: a wrong shape, or a row that is negative, not finite or all zero.
    """
    try:
        array = np.asarray(weights, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"weights must be numbers, [K] or [B, K], or a policy ({error})") from error
    if array.shape not in ((members,), (batch, members)):
        raise InputError(
            f"weights have shape {list(array.shape)}; expected [{members}] (one per member) or [{batch}, {members}] "
            "(one row per prompt)"
        )
    rows = np.broadcast_to(array, (batch, members))
    findings = []
    for b, row in enumerate(rows if array.ndim == 2 else rows[:1]):
        where = f"prompt {b}: {row.tolist()}" if array.ndim == 2 else str(row.tolist())
        if not np.all(np.isfinite(row)):
            findings.append(("not finite", where))
        elif np.any(row < 0):
            findings.append(("negative", where))
        elif not np.any(row > 0):
            findings.append(("all zero", where))
    if findings:
        raise grouped_error("unusable weights", findings, "each row needs weights >= 0, at least one of them > 0")
    return rows if given else rows / rows.sum(axis=1, keepdims=True)


def same_tokenizer(members: Sequence[LM]) -> bool:
    """Whether all members read and write the same ids.

    Raises:
      InputError: members that cannot be told: some or all without a tokenizer, and vocabularies that differ.
    """
    first = members[0]
    same = True
    for other in members[1:]:
        if (first.tokenizer is None) != (other.tokenizer is None):
            raise InputError(f"{first.name} and {other.name}: one has a tokenizer and the other has none")
        if first.tokenizer is not None:
            same = same and first.tokenizer.get_vocab() == other.tokenizer.get_vocab()
        elif first.config.vocab != other.config.vocab:
            raise InputError(
                f"{first.name} and {other.name} have no tokenizers and differ in vocabulary "
                f"({first.config.vocab} and {other.config.vocab}): without tokenizers their ids must be the same"
            )
    return same


def device_tables(union: vocabularies.UnionVocabulary) -> decoding.UnionTables:
    """What the compiled loop reads of a union vocabulary."""
    spellings = tuple(
        Spelling(
            partner=jnp.asarray(union.partner[k]),
            first=jnp.asarray(union.first(k)),
            own=jnp.asarray(union.own[k]),
            ids=jnp.asarray(union.spell_ids[k]),
            offsets=jnp.asarray(union.spell_offsets[k]),
        )
        for k in range(union.members)
    )
    return decoding.UnionTables(spellings, jnp.asarray(np.where(union.choosable, union.utf8, -1).astype(np.int8)))


def same_tables(vocab: int, members: int) -> decoding.UnionTables:
    """The tables of members with one tokenizer, for decoding in which some may be skipped."""
    ids = jnp.arange(vocab, dtype=jnp.int32)
    spelling = Spelling(ids, ids, ids, ids, jnp.arange(vocab + 1, dtype=jnp.int32))
    return decoding.UnionTables((spelling,) * members, jnp.zeros((8, vocab), jnp.int8))


def _keys(seed: Array) -> Array:
    return jax.random.key(seed) if seed.ndim == 0 else jax.vmap(jax.random.key)(seed)


def _begin(
    params: Any, ids: Any, mask: Any, seed: Array, spec: decoding.DecodeSpec, active: Array, samples: int
) -> decoding.DecodeState:
    state = decoding.prefill(params, ids, mask, _keys(seed), spec, active)
    return state if samples == 1 else decoding.repeat_rows(state, spec, samples)


@functools.partial(jax.jit, static_argnames="samples")
def _decode(
    params: Any, ids: Any, mask: Any, policy_params: Any, seed: Array, spec: Any, active: Array, samples: int
) -> decoding.DecodeState:
    return decoding.answers(params, ids, mask, policy_params, _keys(seed), spec, active, samples)


_start = functools.partial(jax.jit, static_argnames="samples")(_begin)


@functools.partial(jax.jit, donate_argnames="state")
def _advance(
    params: Any, state: decoding.DecodeState, policy_params: Any, spec: Any, until: Array
) -> decoding.DecodeState:
    return decoding.decode_spans(params, state, policy_params, spec, until)


@jax.jit
def _lengthen(
    state: decoding.DecodeState, stopped: Array, old: decoding.DecodeSpec, longer: decoding.DecodeSpec
) -> decoding.DecodeState:
    """Room for more steps, for the rows that wrote up to the last step and did not stop there."""
    steps = longer.max_new_tokens - old.max_new_tokens
    if isinstance(state.feed, Lockstep):
        caches = tuple(transformer.extend_cache(cache, cache.slots + steps) for cache in state.feed.caches)
        feed: Any = state.feed._replace(caches=caches)
    else:
        room = longer.member_tokens - old.member_tokens
        feed = tuple(
            member._replace(
                text=jnp.pad(member.text, ((0, 0), (0, room))),
                cache=transformer.extend_cache(member.cache, member.cache.slots + room),
            )
            for member in state.feed
        )
    # The next token's place is the step's: only rows that wrote up to here go on.
    whole = (state.steps == state.step) & (state.steps > 0)

    def along(axis: int, by: int) -> Any:
        return lambda leaf: jnp.pad(leaf, [(0, by) if i == axis else (0, 0) for i in range(leaf.ndim)])

    return state._replace(
        feed=feed,
        done=stopped | ~whole,
        tokens=along(1, steps)(state.tokens),
        trajectory=jax.tree.map(along(0, longer.spans - old.spans), state.trajectory),
        limits=jnp.full_like(state.limits, longer.max_new_tokens),
        scores=jax.tree.map(along(1, steps), state.scores),
        attribution=jax.tree.map(along(1, steps), state.attribution),
    )


class Ensemble:
    """K language models that write one text together.

    Args:
      members: at least one LM. Their tokenizers may differ; then they write over the union of their vocabularies.
      fusion: a name ("linear", "loglinear", "topk[:k]", "primary[:member]", "proxy[:alpha]"), or a pure function like
        the ones in `rlae_jax.fusion.operators`.
      end_ids: ids that end a text; by default every member's own. With different tokenizers one list per member.

    Raises:
      InputError: no members, members that cannot write one text, an unknown operator.
    """

    def __init__(self, members: Sequence[LM], fusion: str | FusionOperator = "linear", *, end_ids: Any = None):
        if isinstance(members, LM):
            raise InputError("members must be a list; put a single model in a list")
        if not members:
            raise InputError("an ensemble needs at least one member")
        self.members = tuple(members)
        self._read_by: tuple[Encoder, TextReader] | None = None  # the last encoder that a policy had
        self.shared: lora.Stack | None = None  # the members' adapters, where they are all of one base
        self.fusion = get_operator(fusion, len(members))
        if isinstance(self.fusion, Hidden):
            raise InputError("fusion hidden needs members that share a head: adapters of one base (from_adapters)")
        self.union: vocabularies.UnionVocabulary | None = None
        if not same_tokenizer(members):
            self._unite(end_ids)
            return
        ids = [i for lm in members for i in lm.config.end_ids] if end_ids is None else end_ids
        self.end_ids = tuple(sorted(set(ids)))
        self.member_ends = (self.end_ids,) * len(members)  # each member's own
        vocab = min(lm.config.usable_vocab for lm in members)
        outside = [i for i in self.end_ids if not 0 <= i < vocab]
        if outside and end_ids is not None:
            raise InputError(f"end_ids {outside} lie outside the vocabulary of {vocab}")

    def _unite(self, end_ids: Any) -> None:
        """The union vocabulary of members with different tokenizers."""
        names = [lm.name for lm in self.members]
        for lm in self.members:
            if lm.config.encoder is not None:
                raise InputError(f"{lm.name} is an encoder-decoder: it needs members with its own tokenizer")
        ends = [lm.config.end_ids for lm in self.members] if end_ids is None else end_ids
        if len(ends) != len(names) or any(isinstance(ids, int | np.integer) for ids in ends):
            raise InputError(f"end_ids of members with different tokenizers must be {len(names)} lists, one per member")
        self.member_ends = tuple(tuple(ids) for ids in ends)
        self.union = vocabularies.load_or_build([lm.tokenizer for lm in self.members], names, ends)
        self.end_ids = tuple(np.flatnonzero(self.union.ends).tolist())

    def _room(self, entries: int) -> int:
        """The tokens that members get room for by default: what 90% of the entries take at most, at least 2 each."""
        if self.union is None:
            return entries
        kept = self.union.choosable
        each = max(2, *(int(np.quantile(self.union.lengths(k)[kept], 0.9)) for k in range(len(self.members))))
        return each * entries + 8

    @functools.cached_property
    def _tables(self) -> decoding.UnionTables:
        if self.union is not None:
            return device_tables(self.union)
        return same_tables(min(lm.config.usable_vocab for lm in self.members), len(self.members))

    @classmethod
    def from_adapters(
        cls,
        lm: LM,
        adapters: Sequence[str | os.PathLike[str] | Adapter],
        fusion: str | FusionOperator = "linear",
        *,
        end_ids: Sequence[int] | None = None,
    ) -> "Ensemble":
        """An ensemble of adapters of one base model: member k is the base under adapter k.

        The members share one pass over the base weights, each prompt being K rows of it.

        Raises:
          InputError: no adapters, or one for another base.
        """
        loaded = load_adapters(adapters, lm)
        ensemble = cls([lm.with_adapters([adapter]) for adapter in loaded], end_ids=end_ids)
        ensemble.fusion = get_operator(fusion, len(loaded))
        ensemble.shared = lora.stack(loaded)
        if isinstance(ensemble.fusion, Hidden) and any(
            path.split(".")[0] in lora.HEADS for path in ensemble.shared.params
        ):
            raise InputError("fusion hidden needs one head for all members, and these adapters change it")
        return ensemble

    @property
    def params(self) -> tuple[Any, ...]:
        """The members' parameters, as `decode` takes them."""
        return self.params_for(None, 1)

    def params_for(self, adapters: AdapterChoice, batch: int) -> tuple[Any, ...]:
        """`params` with the choice of each of `batch` rows, for members with several adapters; see `LM.adapted`.

        Raises:
          InputError: a choice that no member has, or none where one is needed.
        """
        if self.shared is not None:
            if adapters is not None:
                raise InputError("the members are the adapters here: choose among them with weights")
            return (lora.Adapted(self.members[0].params, self.shared, jnp.eye(len(self.members))),)
        if adapters is not None and all(lm.stack is None for lm in self.members):
            raise InputError("no member has adapters to choose from; give members with LM.with_adapters")
        # A choice is for the members that have several to choose from, if any has.
        fewest = 1 if any(len(lm.adapters) > 1 for lm in self.members) else 0
        return tuple(lm.adapted(adapters if len(lm.adapters) > fewest else None, batch) for lm in self.members)

    @property
    def tokenizer(self) -> Any:
        """The members' tokenizer.

        Raises:
          InputError: the members have none.
        """
        return self.members[0].require_tokenizer()

    @property
    def context(self) -> int:
        """The longest text, in tokens, that every member was made for."""
        return min(lm.config.context for lm in self.members)

    @property
    def widths(self) -> tuple[int, ...]:
        """D of each member."""
        return tuple(lm.config.hidden_width for lm in self.members)

    def spec(
        self,
        *,
        policy: Policy | None = None,
        span_length: int = DEFAULT_SPAN_LENGTH,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        ignore_eos: bool = False,
        sample_weights: bool = False,
        record: bool = False,
        scores: bool = False,
        member_tokens: int | None = None,
        reader: TextReader | None = None,
    ) -> decoding.DecodeSpec:
        """The `DecodeSpec` of this ensemble; see `generate` for the options, `reader` for the reader.

        Raises:
          InputError: an option outside its range.
        """
        if span_length < 1 or max_new_tokens < 1:
            raise InputError(
                f"span_length and max_new_tokens must be at least 1, not {span_length} and {max_new_tokens}"
            )
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise InputError(f"min_new_tokens must be between 0 and max_new_tokens, not {min_new_tokens}")
        if member_tokens is not None and member_tokens < 1:
            raise InputError(f"member_tokens must be at least 1, not {member_tokens}")
        alone = self.shared is not None or any(lm.config.encoder is not None for lm in self.members)
        ragged = self.union is not None or (isinstance(policy, Draw) and not alone)
        if member_tokens is None:
            member_tokens = self._room(max_new_tokens)
        return decoding.DecodeSpec(
            sampling=Sampling.create(temperature, top_k, top_p, min_p, repetition_penalty),
            min_new_tokens=min_new_tokens,
            members=tuple(lm.config for lm in self.members),
            shared_base=self.shared is not None,
            fusion=self.fusion,
            policy=Fixed() if policy is None else policy,
            sample_weights=sample_weights,
            record=record,
            span_length=span_length,
            max_new_tokens=max_new_tokens,
            end_ids=() if ignore_eos else self.end_ids,
            scores=scores,
            union=self._tables if ragged else None,
            member_tokens=member_tokens if ragged else 0,
            reader=reader,
        )

    def reader(self, encoder: Encoder) -> TextReader:
        """What lets a policy read the text through an encoder: how this ensemble's tokens are spelled in its ids. The
        prompts are `read_prompts`.

        Raises:
          InputError: an encoder, or a member, whose tokens stand for no bytes (WordPiece).
        """
        tokenizer = require_tokenizer(encoder.tokenizer, encoder.path or encoder.name)
        if self.union is not None:
            pieces: Sequence[bytes | None] = [self.union.entry_bytes(e) for e in range(self.union.size)]
        else:
            pieces = vocabularies.token_bytes(self.tokenizer, self.members[0].name)
        ids, offsets = vocabularies.spell_texts(pieces, tokenizer, encoder.name)
        vocab = min(lm.config.usable_vocab for lm in self.members) if self.union is None else self.union.size
        missing = max(vocab + 1 - len(offsets), 0)  # rows of a head that stand for no token
        offsets = np.concatenate([offsets, np.full(missing, offsets[-1])])
        probe = tokenizer("a", add_special_tokens=True)["input_ids"]
        inner = tokenizer("a", add_special_tokens=False)["input_ids"]
        n = next(i for i in range(len(probe)) if probe[i : i + len(inner)] == inner)
        return TextReader(
            params=encoder.params,
            ids=jnp.asarray(ids),
            offsets=jnp.asarray(offsets),
            config=encoder.config,
            before=tuple(probe[:n]),
            after=tuple(probe[n + len(inner) :]),
        )

    def encode(self, prompts: Sequence[str], *, chat: bool = False) -> list[Row]:
        """Token ids of each prompt; `chat` puts each into the tokenizer's chat template as a user's message. With
        different tokenizers each prompt's ids are a tuple, every member's own.

        Raises:
          InputError: no prompts, a single string, an empty prompt, no chat template.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings; put a single prompt in a list")
        if not len(prompts):
            raise InputError("no prompts: give at least one")
        if self.union is None:
            return list(_encode(self.members[0], prompts, chat))
        return list(zip(*(_encode(lm, prompts, chat) for lm in self.members), strict=True))

    @property
    def continues(self) -> bool:
        """Whether an answer continues its prompt; an encoder-decoder's is a text of its own."""
        return self.members[0].config.encoder is None

    def decode(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row's tokens, or union entries.

        Raises:
          InputError: the members have no tokenizer.
        """
        if self.union is not None:
            return [_whole_characters(b"".join(map(self.union.entry_bytes, row))) for row in tokens]
        return decode_texts(self.tokenizer, prompts if self.continues else [()] * len(tokens), tokens)

    def _cover(self, prompt: Sequence[int], tokens: list[int], text: str) -> list[int]:
        """The fewest tokens whose text holds `text`."""
        for n in range(len(tokens)):
            if self.decode([prompt], [tokens[:n]])[0].startswith(text):
                return tokens[:n]
        return tokens

    def _continuation(self, prompt: str, text: str, joined: bool) -> list[int]:
        """A text's tokens (entries, in the first member's segmentation); `joined`: as they continue the prompt, if the
        tokenizer segments the prompt alike with and without them."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if joined:
            before, whole = (self.tokenizer(t)["input_ids"] for t in (prompt, prompt + text))
            if whole[: len(before)] == before:
                ids = whole[len(before) :]
        return ids if self.union is None else [int(self.union.own[0][i]) for i in ids]

    def check_ids(self, rows: Sequence[Row]) -> None:
        """Raises an `InputError` for ids that some member's embedding does not have: a lookup would clamp them."""
        vocab = min(lm.config.vocab for lm in self.members)
        outside = [
            ("ids", f"prompt {b} has {i}")
            for b, row in enumerate(rows)
            if self.union is None and (min(row) < 0 or max(row) >= vocab)
            for i in row
            if not 0 <= i < vocab
        ]
        if outside:
            raise grouped_error("prompts with ids outside the vocabulary", outside, f"ids from 0 to {vocab} - 1 exist")

    def check_stop(self, stop: Sequence[str]) -> tuple[str, ...]:
        """The stop strings; raises an `InputError` for a bare string, empty strings, or members without a tokenizer."""
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of strings that are not empty, not {stop!r}")
        if stop and self.members[0].tokenizer is None:
            raise InputError(f"stop strings need a tokenizer, and {self.members[0].name} has none")
        return tuple(stop)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of tokens of each prompt, of the member that needs most."""
        if self.union is None:
            return [len(row) for row in rows]
        return [max(map(len, row)) for row in rows]

    def pad(self, rows: Sequence[Row]) -> tuple[Any, Any]:
        """Ids and mask, padded on the left into a bucket; with different tokenizers K of each."""
        if self.union is None:
            return pad_rows(rows, bucket(max(map(len, rows)), SMALLEST_PROMPT_BUCKET))
        members = [pad_rows(own, bucket(max(map(len, own)), SMALLEST_PROMPT_BUCKET)) for own in zip(*rows, strict=True)]
        ids, masks = zip(*members, strict=True)
        return ids, masks

    def check_lengths(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Raises an `InputError` for prompts that do not fit the context together with the answer."""
        long = [("prompts", f"prompt {b} has {n}") for b, n in enumerate(lengths) if n + max_new_tokens > self.context]
        if long:
            raise grouped_error(
                f"too long: the context is {self.context} tokens, of which max_new_tokens takes {max_new_tokens}",
                long,
                f"prompts of at most {max(self.context - max_new_tokens, 0)} tokens fit",
            )

    def bind(
        self, weights: Weights, batch: int, spans: int, span_length: int | None = None
    ) -> tuple[Policy, Any, bool]:
        """(policy, its parameters for this batch, whether to sample) for any of `generate`'s weights.

        Raises:
          InputError: weights of a wrong shape or value, a policy trained for other members, for shorter answers or for
            another span length.
        """
        if isinstance(weights, BoundPolicy):
            if weights.dims.widths != self.widths:
                raise InputError(
                    f"the policy was trained for members of width {list(weights.dims.widths)}; "
                    f"these have {list(self.widths)}"
                )
            if span_length not in (None, weights.span_length):
                raise InputError(
                    f"the policy was trained with spans of {weights.span_length} steps, not {span_length}; "
                    "leave span_length out"
                )
            if "span" in weights.policy.reads and spans > weights.dims.spans:
                raise InputError(
                    f"{spans} spans: the policy was trained for answers of at most {weights.dims.spans}; lower "
                    "max_new_tokens, or train with a larger agent.max_spans"
                )
            return weights.policy, weights.params, weights.sample
        if isinstance(weights, str):
            if weights not in UNTRAINED:
                raise InputError(f"policy {weights!r} is unknown; known: {', '.join(UNTRAINED)}")
            weights = UNTRAINED[weights]
        if weights is None:
            return Fixed(), np.full((batch, len(self.members)), 1 / len(self.members), np.float32), False
        if isinstance(weights, Policy):
            if "prompt" in weights.reads and not self.continues:
                raise InputError(
                    f"{type(weights).__name__} reads how likely a prompt is; an encoder-decoder cannot say"
                )
            params = weights.init(jax.random.key(0), Dims(self.widths, spans))
            return weights, params, isinstance(weights, Draw)
        given = isinstance(self.fusion, Hidden)
        return Fixed(), normalise_weights(weights, batch, len(self.members), given=given), False

    def read_prompts(self, prompts: Sequence[str], encoder: Encoder, reader: TextReader, tokens: int) -> Text:
        """Prompts as `TextReader.prompts`: of each the last ids, at most `tokens` with those around them."""
        c = min(tokens, encoder.config.context) - len(reader.before) - len(reader.after)
        if c < 1:
            raise InputError(f"{encoder.name} would read {tokens} tokens, and none of them is text")
        rows = require_tokenizer(encoder.tokenizer, encoder.name)(list(prompts), add_special_tokens=False)["input_ids"]
        ids = np.zeros((len(rows), c), np.int32)
        for b, row in enumerate(rows):
            if row:
                ids[b, -min(len(row), c) :] = row[-c:]
        return Text(ids, np.array([min(len(row), c) for row in rows], np.int32))  # type: ignore[arg-type]

    def _reader_of(self, weights: Weights, prompts: Sequence[str] | None, rows: Sequence[Row]) -> TextReader | None:
        if not (isinstance(weights, BoundPolicy) and "text" in weights.policy.reads):
            return None
        if weights.encoder is None:
            raise InputError("the policy reads the text and has no encoder; load it with load_policy")
        encoder = weights.encoder
        if self._read_by is None or self._read_by[0] is not encoder:
            self._read_by = encoder, self.reader(encoder)
        if prompts is None:
            prompts = self.tokenizer.batch_decode(rows)
        reader = self._read_by[1]
        text = self.read_prompts(prompts, encoder, reader, weights.text_tokens)
        return dataclasses.replace(reader, prompts=text)

    def _prepare(
        self,
        prompts: Sequence[str] | None,
        weights: Weights,
        span_length: int | None,
        max_new_tokens: int | Sequence[int],
        *,
        seed: Any,
        stop: Sequence[str],
        chat: bool,
        prompt_ids: Any,
        prompt_mask: Any,
        adapters: AdapterChoice,
        samples: int,
        member_tokens: int | None,
        options: dict[str, Any],
    ) -> "_Job":
        """Everything of `generate` before anything is compiled."""
        if (prompts is None) == (prompt_ids is None):
            raise InputError("give either prompts or prompt_ids")
        if samples < 1:
            raise InputError(f"samples must be at least 1, not {samples}")
        stop = self.check_stop(stop)
        if prompts is not None:
            rows = self.encode(prompts, chat=chat)
        elif self.union is not None:
            raise InputError("the members have different tokenizers: give prompts as text")
        else:
            rows = list(_rows(prompt_ids, prompt_mask))
        batch = len(rows)
        longest, limits = _limits(max_new_tokens, batch)
        self.check_ids(rows)
        lengths = self.lengths(rows)
        self.check_lengths(lengths, longest)
        if isinstance(weights, str):
            weights = UNTRAINED.get(weights, weights)
        if span_length is None:
            span_length = 1 if isinstance(weights, EVERY_STEP) else DEFAULT_SPAN_LENGTH
            span_length = weights.span_length if isinstance(weights, BoundPolicy) else span_length
        if span_length < 1:
            raise InputError(f"span_length must be at least 1, not {span_length}")
        policy, policy_params, sample = self.bind(weights, batch, -(-longest // span_length), span_length)
        spec = self.spec(
            policy=policy,
            reader=self._reader_of(weights, prompts, rows),
            sample_weights=sample,
            span_length=span_length,
            max_new_tokens=longest,
            member_tokens=member_tokens,
            **options,
        )
        if spec.union is not None:  # no member is led beyond what it was made for
            room = min(spec.member_tokens, self.context - max(lengths))
            spec = dataclasses.replace(spec, member_tokens=room)
        spec = dataclasses.replace(spec, limits=limits)
        return _Job(rows, policy_params, seed, spec, self.params_for(adapters, batch), samples, stop)

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        weights: Weights = None,
        span_length: int | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | Int[Array, " B"] = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        ignore_eos: bool = False,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        samples: int = 1,
        scores: bool = False,
        keep: bool = False,
        member_tokens: int | None = None,
        prompt_ids: Int[Array, "B T"] | None = None,
        prompt_mask: Array | None = None,
        adapters: AdapterChoice = None,
    ) -> Generation:
        """Writes answers to prompts.

        With different tokenizers a step writes one entry of the union vocabulary, and steps, spans, `max_new_tokens`
        and scores count entries.

        Args:
          prompts: texts; or give `prompt_ids` and `prompt_mask` (1 where there is a token, padding on either side).
          weights: None (uniform), [K], Float[B, K] (each row is scaled to sum to 1), or a policy: a trained one, one of
            `rlae_jax.fusion.policy`, or a name ("perplexity", "confidence", "consistency", "gate", "draw").
          span_length: L, the steps for which weights are held; by default the trained policy's own, 1 for policies that
            decide at every step, else 4.
          max_new_tokens: the longest answer, or one number per prompt.
          min_new_tokens: no end token before this many.
          temperature: 0 is greedy. Then `top_k` (0: no limit), `top_p` (1: no limit) and `min_p` (0: no limit) apply,
            in that order.
          seed: row b draws from fold_in(key(seed), b); or one seed per row.
          stop: strings that end an answer; the text is cut before the first of them.
          chat: put each prompt into the tokenizer's chat template.
          ignore_eos: write max_new_tokens whatever is chosen.
          repetition_penalty: multiplies the log-probabilities of tokens in the prompt and the answer; 1 is none.
          samples: answers per prompt, which share its prefill; they follow one another in the result.
          scores: also return the chosen tokens' log-probabilities, fused and of each member.
          keep: keep caches on the device, so that `extend` can go on.
          member_tokens: with different tokenizers, the tokens that any member has room for in an answer; by default per
            step what 90% of the union's entries take at most. A row ends with "length" before an entry for which some
            member has no room.
          adapters: for members with several adapters (`LM.with_adapters`), each row's by number or name, or weights
            Float[B, M] of a sum of adapters.

        Raises:
          InputError: unusable prompts, weights or options, told before anything is compiled.
        """
        options = {
            "min_new_tokens": min_new_tokens,
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "ignore_eos": ignore_eos,
            "scores": scores,
        }
        job = self._prepare(
            *(prompts, weights, span_length, max_new_tokens),
            seed=seed,
            stop=stop,
            chat=chat,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            adapters=adapters,
            samples=samples,
            member_tokens=member_tokens,
            options=options,
        )
        if not (stop or keep):
            state = self.run(job.rows, job.policy_params, seed, job.spec, job.params, samples)
            return self._collect(job, state)
        on_device: list[decoding.DecodeState] = []
        *_, state = self._chunks(job, _STOP_STEPS if stop else job.spec.max_new_tokens, on_device)
        generation = self._collect(job, state)
        if not keep:
            return generation
        return dataclasses.replace(generation, kept=_Kept(job, on_device[-1]))

    def log_likelihoods(
        self,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        weights: Weights = None,
        span_length: int | None = None,
        *,
        chat: bool = False,
    ) -> list[Float[np.ndarray, " O"]]:
        """How likely the ensemble finds each of several continuations of each prompt: the sum of the log-probabilities
        of its tokens (entries, in the first member's segmentation) under the fused distribution. Nothing is sampled.

        Args:
          options: per prompt, texts that continue it; each begins as a continuation does, mostly with a space.
          weights, span_length, chat: as in `generate`; weights [B, K] are one row per prompt.

        Raises:
          InputError: another number of lists than prompts, an option without a token; what `generate` raises.
        """
        if len(options) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(options)} lists of options: give one for each")
        counts = [len(own) for own in options]
        rows = [prompt for prompt, n in zip(prompts, counts, strict=True) for _ in range(n)]
        texts = [text for own in options for text in own]
        joined = not chat and self.continues
        forced = [self._continuation(row, text, joined) for row, text in zip(rows, texts, strict=True)]
        empty = [("options without a token", repr(text)) for text, ids in zip(texts, forced, strict=True) if not ids]
        if empty:
            raise grouped_error("options that cannot be scored", empty, "each must have at least one token")
        lengths = [len(ids) for ids in forced]
        if isinstance(weights, Sequence | np.ndarray | jax.Array) and not isinstance(weights, str):
            weights = np.asarray(weights)
            weights = np.repeat(weights, counts, axis=0) if weights.ndim == 2 and len(weights) > 1 else weights
        job = self._prepare(
            *(rows, weights, span_length, lengths),
            seed=0,
            stop=(),
            chat=chat,
            prompt_ids=None,
            prompt_mask=None,
            adapters=None,
            samples=1,
            member_tokens=None,
            options={"scores": True, "ignore_eos": True},
        )
        ids = np.zeros((len(forced), max(lengths)), np.int32)
        for b, row in enumerate(forced):
            ids[b, : len(row)] = row
        spec = dataclasses.replace(job.spec, forced=jnp.asarray(ids))
        state = self.run(job.rows, job.policy_params, 0, spec, params=job.params)
        if np.any(state.steps != lengths):
            raise InputError("an option does not fit into the members' room")
        written = np.arange(max(lengths)) < np.array(lengths)[:, None]
        totals = np.sum(np.where(written, state.scores[:, : max(lengths)], 0.0), axis=1)
        return [part.astype(np.float32) for part in np.split(totals, np.cumsum(counts)[:-1])]

    def extend(self, generation: Generation, max_new_tokens: int = 64) -> Generation:
        """Goes on from where answers ended for want of room, without reading anything again.

        The result is what one call with the longer limit gives. Rows that ended otherwise stay as they are, also by a
        limit of their own or for want of a member's room. `generation` can be extended once; its result again.

        Raises:
          InputError: a generation without `keep=True`, or that was extended already; no room in the context.
        """
        if generation.kept is None or generation.kept.used:
            raise InputError("only what generate(keep=True) or extend returned can be extended, and once")
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        job, old = generation.kept.job, generation.kept.job.spec
        longest = old.max_new_tokens + max_new_tokens
        self.check_lengths(self.lengths(job.rows), longest)
        room = old.member_tokens
        if old.union is not None:
            room = min(room + self._room(max_new_tokens), self.context - max(self.lengths(job.rows)))
        spec = dataclasses.replace(old, max_new_tokens=longest, member_tokens=room, limits=None)
        job = dataclasses.replace(job, spec=spec)
        generation.kept.used = True
        stopped = np.ones(len(generation.kept.state.done), bool)  # and so is the filling of the batch
        stopped[: len(generation.steps)] = [reason == "stop" for reason in generation.finish_reasons]
        on_device = [_lengthen(generation.kept.state, stopped, old, spec)]
        *_, state = self._chunks(job, _STOP_STEPS if job.stop else longest, on_device)
        return dataclasses.replace(self._collect(job, state), kept=_Kept(job, on_device[-1]))

    def stream(
        self,
        prompts: Sequence[str],
        weights: Weights = None,
        span_length: int | None = None,
        max_new_tokens: int | Sequence[int] = 64,
        *,
        seed: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        samples: int = 1,
        member_tokens: int | None = None,
        adapters: AdapterChoice = None,
        **options: Any,
    ) -> Iterator[list[str]]:
        """Writes answers as `generate` does, and yields what each of them gains by every span.

        Joined, the pieces are `generate`'s texts: what may still become part of a stop string or of a broken character
        is held back.

        Args:
          options: `generate`'s other options.

        Raises:
          InputError: as `generate`, at the call.
        """
        known = ("min_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "ignore_eos")
        if set(options) - set(known):
            raise TypeError(f"stream() takes no {', '.join(sorted(set(options) - set(known)))}")
        self.members[0].require_tokenizer()
        job = self._prepare(
            *(prompts, weights, span_length, max_new_tokens),
            seed=seed,
            stop=stop,
            chat=chat,
            prompt_ids=None,
            prompt_mask=None,
            adapters=adapters,
            samples=samples,
            member_tokens=member_tokens,
            options=options,
        )

        def pieces() -> Iterator[list[str]]:
            given = [""] * (len(job.rows) * samples)
            for state in self._chunks(job, job.spec.span_length):
                generation = self._collect(job, state)
                ready = [
                    text if done or reason == "stop" else _settled(text, job.stop)
                    for text, done, reason in zip(generation.texts, state.done, generation.finish_reasons, strict=True)
                ]
                yield [text[len(before) :] for text, before in zip(ready, given, strict=True)]
                given = ready

        return pieces()

    def run(
        self,
        rows: Sequence[Row],
        policy_params: Any,
        seed: Any,
        spec: decoding.DecodeSpec,
        params: tuple[Any, ...] | None = None,
        samples: int = 1,
    ) -> decoding.DecodeState:
        """Decodes rows of ids under a spec: pads them into a bucket, calls the compiled loop, cuts the filling off.

        Args:
          params: from `params_for`; by default `params`.
          samples: answers per row, which share its prefill.

        Returns a state of host arrays without caches.

        Raises:
          InputError: seeds that are neither one integer nor one per row.
        """
        arguments = self._arguments(rows, policy_params, seed, spec, params, samples)
        return _rows_of(jax.device_get(_decode(*arguments, samples)), len(rows) * samples)

    def _arguments(
        self,
        rows: Sequence[Row],
        policy_params: Any,
        seed: Any,
        spec: Any,
        params: tuple[Any, ...] | None,
        samples: int,
    ) -> tuple[Any, ...]:
        """What the compiled programs take, with the batch filled up to its bucket."""
        batch = len(rows)
        filling = bucket(batch) - batch

        def fill(array: Any) -> Any:
            return np.concatenate([array, np.repeat(array[:1], filling, axis=0)])

        if spec.union is not None and self.union is None:  # members with one tokenizer, some of which may be skipped
            ids, mask = pad_rows(rows, bucket(max(map(len, rows)), SMALLEST_PROMPT_BUCKET))
            ids, mask = ((fill(array),) * len(self.members) for array in (ids, mask))  # type: ignore[assignment]
        else:
            ids, mask = jax.tree.map(fill, self.pad(rows))
        seed = _seeds(seed, batch)
        if seed.ndim:
            seed = fill(seed)
        if isinstance(spec.policy, Fixed | Draw) and policy_params.shape[0] == batch:
            policy_params = np.repeat(fill(np.asarray(policy_params)), samples, axis=0)
        if spec.limits is not None:
            spec = dataclasses.replace(spec, limits=fill(spec.limits))
        if spec.forced is not None:
            spec = dataclasses.replace(spec, forced=fill(spec.forced))
        if spec.reader is not None:
            prompts = jax.tree.map(fill, spec.reader.prompts)
            spec = dataclasses.replace(spec, reader=dataclasses.replace(spec.reader, prompts=prompts))
        active = np.arange(batch + filling) < batch
        params = self.params if params is None else params
        if self.shared is None:
            params = tuple(_fill(p, batch, filling) for p in params)
        return params, ids, mask, policy_params, seed, spec, active

    def _chunks(
        self, job: "_Job", steps: int, on_device: list[decoding.DecodeState] | None = None
    ) -> Iterator[decoding.DecodeState]:
        """Decodes `steps` steps at a time and yields the state on the host after each.

        Args:
          on_device: holds the state to start from, if there is one, and at the end the last state.
        """
        params, ids, mask, policy_params, seed, spec, active = self._arguments(
            job.rows, job.policy_params, job.seed, job.spec, job.params, job.samples
        )
        start = functools.partial(_start, params, ids, mask, seed, spec, active, job.samples)
        state = on_device.pop() if on_device else start()
        rows = len(job.rows) * job.samples
        spec = dataclasses.replace(spec, limits=None)  # the state has them
        until = int(state.step)
        while True:
            until += steps
            state = _advance(params, state, policy_params, spec, np.int32(until))
            host = _rows_of(jax.device_get(decoding.without_caches(state)), rows)
            if job.stop:
                stopped = np.zeros(len(state.done), bool)
                stopped[:rows] = [reason == "stop" for reason in self._collect(job, host).finish_reasons]
                state = state._replace(done=state.done | stopped)
                host = host._replace(done=host.done | stopped[:rows])
            finished = bool(np.all(host.done))
            if finished and on_device is not None:
                on_device.append(state)
            yield host
            if finished:
                return

    def _collect(self, job: "_Job", state: decoding.DecodeState) -> Generation:
        spec, stop = job.spec, job.stop
        rows = [row for row in job.rows for _ in range(job.samples)]
        chosen = [state.tokens[b, : state.steps[b] - int(state.ended[b])].tolist() for b in range(len(rows))]
        used_bp = np.asarray(state.span_mask()).T
        weights = np.where(used_bp[..., None], np.swapaxes(state.trajectory.weights, 0, 1), np.nan)
        reasons = ["stop" if ended else "length" for ended in state.ended]
        texts = None
        if self.members[0].tokenizer is not None:
            texts = self.decode(rows, chosen)
            if stop:
                for b, text in enumerate(texts):
                    cuts = [text.index(s) for s in stop if s in text]
                    if cuts:
                        texts[b], reasons[b] = text[: min(cuts)], "stop"
                        chosen[b] = self._cover(rows[b], chosen[b], texts[b])
        tokens = chosen
        if self.union is not None:
            ids, offsets = self.union.spell_ids[0], self.union.spell_offsets[0]
            tokens = [[i for e in row for i in ids[offsets[e] : offsets[e + 1]].tolist()] for row in chosen]
        scores = attribution = None
        if spec.scores:
            written = np.arange(spec.max_new_tokens) < state.steps[:, None]
            scores = np.where(written, state.scores, np.nan)
            attribution = np.where(written[..., None], state.attribution, np.nan)
        return Generation(texts, tokens, weights, reasons, state.steps.tolist(), scores, attribution)


@dataclasses.dataclass(frozen=True, eq=False)
class _Job:
    """A checked call: what is decoded, and how."""

    rows: list[Row]
    policy_params: Any
    seed: Any
    spec: decoding.DecodeSpec
    params: tuple[Any, ...]
    samples: int
    stop: tuple[str, ...]


@dataclasses.dataclass(eq=False)
class _Kept:
    """What goes on from where an answer ended; going on uses its state up."""

    job: _Job
    state: decoding.DecodeState
    used: bool = False


def _rows_of(state: decoding.DecodeState, rows: int) -> decoding.DecodeState:
    """A state on the host without the filling of its bucket."""
    whole = {"step": state.step, "trajectory": jax.tree.map(lambda leaf: leaf[:, :rows], state.trajectory)}
    per_row = {name: value for name, value in state._asdict().items() if name not in whole}
    return decoding.DecodeState(**whole, **jax.tree.map(lambda leaf: leaf[:rows], per_row))


def _limits(max_new_tokens: Any, batch: int) -> tuple[int, Any]:
    """The longest answer, and each row's own limit if there is one per row."""
    limits = np.asarray(max_new_tokens)
    if limits.dtype.kind not in "iu" or limits.shape not in ((), (batch,)):
        raise InputError(f"max_new_tokens must be a whole number or one per prompt ([{batch}]), not {max_new_tokens}")
    if np.any(limits < 1):
        raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    return int(limits.max()), limits.astype(np.int32) if limits.ndim else None


def _encode(lm: LM, prompts: Sequence[str], chat: bool) -> list[list[int]]:
    """One member's ids of prompts; see `Ensemble.encode`."""
    tokenizer = lm.require_tokenizer()
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise InputError(f"{lm.name} has no chat template; use chat=False")
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [
            tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]
            for m in messages
        ]
    else:
        ids = tokenizer(list(prompts))["input_ids"]
    empty = [("empty prompts", f"prompt {b}") for b, row in enumerate(ids) if not row]
    if empty:
        raise grouped_error("prompts without a single token", empty, "each prompt needs at least one token")
    return ids


def _whole_characters(data: bytes) -> str:
    """The text of bytes whose last character may have been cut; all others are whole."""
    return data.decode("utf-8", errors="ignore")


def _settled(text: str, stop: Sequence[str]) -> str:
    """The part of a text that further tokens cannot change: without the bytes of an unfinished character and without
    what may be the beginning of a stop string."""
    text = text.rstrip("\ufffd")
    held = max((n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
    return text[: len(text) - held]


def _fill(params: Any, batch: int, filling: int) -> Any:
    """Parameters whose choice of adapters, one per row, covers the rows that fill a bucket."""
    if not isinstance(params, lora.Adapted) or params.weights.shape[0] != batch or batch == 1:
        return params
    return params._replace(weights=jnp.concatenate([params.weights, jnp.repeat(params.weights[:1], filling, axis=0)]))


def _rows(prompt_ids: Any, prompt_mask: Any) -> list[list[int]]:
    ids = np.asarray(prompt_ids)
    mask = np.ones_like(ids) if prompt_mask is None else np.asarray(prompt_mask)
    if ids.ndim != 2 or ids.shape != mask.shape:
        raise InputError(
            f"prompt_ids and prompt_mask must both be [B, T], not {list(ids.shape)} and {list(mask.shape)}"
        )
    if not ids.shape[0]:
        raise InputError("no prompts: give at least one")
    rows = [row[keep].tolist() for row, keep in zip(ids, mask.astype(bool), strict=True)]
    empty = [("empty prompts", f"row {b}") for b, row in enumerate(rows) if not row]
    if empty:
        raise grouped_error("prompt_mask leaves rows without a single token", empty)
    return rows


def _seeds(seed: Any, batch: int) -> np.ndarray:
    seeds = np.asarray(seed)
    if seeds.shape not in ((), (batch,)):
        raise InputError(f"seed must be an integer or one per prompt ([{batch}]), not shape {list(seeds.shape)}")
    if seeds.dtype.kind not in "iu" or np.any(seeds < 0) or np.any(seeds > np.iinfo(np.uint32).max):
        raise InputError(f"seeds must be integers from 0 to 2^32 - 1, not {seed}")
    return seeds.astype(np.uint32)


def pad_rows(rows: Sequence[Sequence[int]], width: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Ids and mask, padded on the left to `width`."""
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        ids[b, width - len(row) :] = row
        mask[b, width - len(row) :] = 1
    return ids, mask


def decode_texts(tokenizer: Any, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[str]:
    """What each row's tokens add to its prompt: decoding ids alone would lose a leading space."""
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.batch_decode([list(prompt) for prompt in prompts], **options)
    whole = tokenizer.batch_decode([[*p, *t] for p, t in zip(prompts, tokens, strict=True)], **options)
    return [text[len(prefix) :] for prefix, text in zip(before, whole, strict=True)]
