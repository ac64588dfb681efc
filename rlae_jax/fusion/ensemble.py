"""`Ensemble`: text or ids and weights in, texts and what was decided out.

It keeps the verbs and checks everything that a user can get wrong before anything is compiled. Ids and texts are the
codec's (`codec.py`), batches `prompts.py`'s, weights `weights.py`'s, programs `programs.py`'s, results
`generation.py`'s.
"""

import dataclasses
import functools
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from rlae_jax import memory, ranges, sharding
from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion import likelihood, programs, vocabulary
from rlae_jax.fusion.codec import Codec, make_codec
from rlae_jax.fusion.generation import Continuation, Generation, read_answers
from rlae_jax.fusion.likelihood import Likelihood, Spans
from rlae_jax.fusion.operators import FusionOperator, Hidden, get_operator, linear
from rlae_jax.fusion.policy import BoundPolicy, Dims, Fixed, Policy
from rlae_jax.fusion.programs import Job
from rlae_jax.fusion.prompts import Prompts, Row, batch_bucket, bucket, make_prompts, read_ids
from rlae_jax.fusion.reading import Text, TextReader, make_reader, read_prompts
from rlae_jax.fusion.sampling import DEFAULT_SPAN_LENGTH, Sampling, SamplingOptions
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import Answers
from rlae_jax.fusion.weights import PolicyForBatch, Weights, bind_weights, span_length_of
from rlae_jax.models import LM, Adapter, Encoder, lora
from rlae_jax.models.cache import place_bytes, places
from rlae_jax.models.lm import AdapterChoice, load_adapters
from rlae_jax.ranges import Count

# Steps between two looks at what was written, where stop strings may end a row.
_STOP_STEPS = 16


@dataclasses.dataclass(frozen=True, eq=False, init=False)
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

    members: tuple[LM, ...]
    fusion: FusionOperator
    codec: Codec
    shared: lora.Stack | None  # the members' adapters, where they are all of one base

    def __init__(self, members: Sequence[LM], fusion: str | FusionOperator = "linear", *, end_ids: Any = None):
        if isinstance(members, LM):
            raise InputError("members must be a list; put a single model in a list")
        if not members:
            raise InputError("an ensemble needs at least one member")
        if any(lm.mesh != members[0].mesh for lm in members):
            raise InputError("the members of an ensemble must be loaded on one mesh")
        operator = get_operator(fusion, len(members))
        if isinstance(operator, Hidden):
            raise InputError("fusion hidden needs members that share a head: adapters of one base (from_adapters)")
        self._set(members=tuple(members), fusion=operator, codec=make_codec(members, end_ids), shared=None)

    def __repr__(self) -> str:
        return f"Ensemble({', '.join(map(repr, self.members))})"

    def _set(self, **fields: Any) -> "Ensemble":
        """Fills in the fields of a new object."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        return self

    def _changed(self, **changes: Any) -> "Ensemble":
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return object.__new__(Ensemble)._set(**fields | changes)

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
        return ensemble._changed(shared=sharding.whole(lora.stack(loaded), lm.mesh)).with_fusion(fusion)

    def with_fusion(self, fusion: str | FusionOperator) -> "Ensemble":
        """The same members under another operator.

        Raises:
          InputError: an unknown operator, or one that does not fit the members.
        """
        operator = get_operator(fusion, len(self.members))
        if isinstance(operator, Hidden):
            if self.shared is None:
                raise InputError("fusion hidden needs members that share a head: adapters of one base (from_adapters)")
            if any(path.split(".")[0] in lora.HEADS for path in self.shared.params):
                raise InputError("fusion hidden needs one head for all members, and these adapters change it")
        return self._changed(fusion=operator)

    @property
    def union(self) -> "vocabulary.UnionVocabulary | None":
        """The members' union vocabulary; None where they have one tokenizer."""
        return self.codec.union

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The tokens, or entries of the union, that end a text."""
        return self.codec.end_ids

    @property
    def member_ends(self) -> tuple[tuple[int, ...], ...]:
        """Each member's own ids that end a text."""
        return self.codec.member_ends

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
    def mesh(self) -> Mesh | None:
        """The mesh over which the members are spread; None where they lie on one device."""
        return self.members[0].mesh

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

    @property
    def continues(self) -> bool:
        """Whether an answer continues its prompt; an encoder-decoder's is a text of its own."""
        return self.members[0].config.encoder is None

    def spec(
        self,
        options: SamplingOptions | None = None,
        *,
        policy: Policy | None = None,
        sample_weights: bool = False,
        record: bool = False,
        reader: TextReader | None = None,
        **fields: Any,
    ) -> DecodeSpec:
        """The `DecodeSpec` of this ensemble.

        Args:
          options: how answers are written; or give its fields as keywords.
          sample_weights: draw actions from the policy instead of taking modes.
          record: keep observations, for training.
          reader: for policies that read "text".

        Raises:
          InputError: an option outside its range.
        """
        options = dataclasses.replace(options or SamplingOptions(), **fields)
        options.check()
        alone = self.shared is not None or any(lm.config.encoder is not None for lm in self.members)
        apart = self.codec.own_prompts(options.chat)
        if apart and alone:
            names = ", ".join(lm.name for lm in self.members)
            raise InputError(f"{names} have different chat templates, which an encoder-decoder cannot take part in")
        ragged = apart or (getattr(policy, "draws_members", False) and not alone)
        room = options.member_tokens
        if room is None:
            room = self.codec.room(options.max_new_tokens)
        return DecodeSpec(
            sampling=Sampling.create(options),
            min_new_tokens=options.min_new_tokens,
            members=tuple(lm.config for lm in self.members),
            shared_base=self.shared is not None,
            fusion=self.fusion,
            policy=Fixed() if policy is None else policy,
            sample_weights=sample_weights,
            record=record,
            span_length=DEFAULT_SPAN_LENGTH if options.span_length is None else options.span_length,
            max_new_tokens=options.max_new_tokens,
            end_ids=() if options.ignore_eos else self.end_ids,
            scores=options.scores,
            union=self.codec.tables if ragged else None,
            member_tokens=room if ragged else 0,
            reader=reader,
        )

    def encode(self, prompts: Sequence[str], *, chat: bool = False) -> list[Row]:
        """Token ids of each prompt; `chat` puts each into the tokenizer's chat template as a user's message. With
        different tokenizers, or chat templates that differ, each prompt's ids are a tuple, every member's own.

        Raises:
          InputError: no prompts, a single string, an empty prompt, one that is no text, no chat template or one that
            fails, a token that some member has no embedding of.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings; put a single prompt in a list")
        if not len(prompts):
            raise InputError("no prompts: give at least one")
        odd = [("prompts", f"prompt {b} is {prompt!r:.60}") for b, prompt in enumerate(prompts) if not _is_text(prompt)]
        if odd:
            raise grouped_error("prompts that are no text", odd, "strings without halves of characters (surrogates)")
        rows = self.codec.encode(prompts, chat)
        self.codec.check_ids(rows)
        return rows

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> Row:
        """The ids of a chat, whose next message the answer is.

        Raises:
          InputError: messages without a role and a content that are text; what `encode` raises.
        """
        for i, message in enumerate(messages):
            if not (_is_text(message.get("role")) and _is_text(message.get("content"))):
                raise InputError(f"message {i} needs a role and a content that are text, not {message!r:.80}")
        (row,) = self.codec.encode([messages], True)
        self.codec.check_ids([row])
        return row

    def decode(self, prompts: Sequence[Row], tokens: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row's tokens, or union entries.

        Raises:
          InputError: the members have no tokenizer.
        """
        return self.codec.decode(prompts, tokens)

    def split_text(self, text: str) -> tuple[Row, list[int]]:
        """A text as `score_tokens` takes it: what must be given, at least one token of every member, and the tokens
        behind it, in the first member's segmentation. With one tokenizer these are its first id and the others.

        Raises:
          InputError: what `encode` raises.
        """
        self.encode([text])
        return self.codec.split(text)

    def lengths(self, rows: Sequence[Row]) -> list[int]:
        """The number of tokens of each prompt, of the member that needs most."""
        return self.codec.lengths(rows)

    def check_lengths(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Raises an `InputError` for prompts that do not fit the context together with the answer."""
        long = [("prompts", f"prompt {b} has {n}") for b, n in enumerate(lengths) if n + max_new_tokens > self.context]
        if long:
            raise grouped_error(
                f"too long: the context is {self.context} tokens, of which max_new_tokens takes {max_new_tokens}",
                long,
                f"prompts of at most {max(self.context - max_new_tokens, 0)} tokens fit",
            )

    def require_memory(self, answers: int, tokens: int, remedy: str) -> None:
        """Raises an `InputError` where so many answers, written together, cannot be held.

        Args:
          tokens: of each, and of its prompt where that is read into the same cache.
          remedy: what would need less.
        """
        configs = [lm.config for lm in self.members]
        a_row = sum(places(config, tokens) * place_bytes(config) + 4 * config.usable_vocab for config in configs)
        memory.require(answers * a_row, f"{answers:,} answers at once, of {tokens:,} tokens", remedy, self.mesh)

    def prompts(self, rows: Sequence[Row], spec: DecodeSpec, **fields: Any) -> Prompts:
        """Rows of ids as a batch of this ensemble; see `prompts.make_prompts` for the fields."""
        members = 1 if spec.union is None else len(self.members)
        batch = fields.pop("batch", None) or batch_bucket(len(rows), self.mesh)
        return make_prompts(rows, members, spec.max_new_tokens, batch=batch, **fields)

    def reader(self, encoder: Encoder) -> TextReader:
        """What lets a policy read the text through an encoder: how this ensemble's tokens are spelled in its ids.

        Raises:
          InputError: an encoder, or a member, whose tokens stand for no bytes (WordPiece).
        """
        if encoder not in self._readers:
            self._readers[encoder] = make_reader(encoder, self.codec.pieces(), self.codec.vocab)
        return self._readers[encoder]

    @functools.cached_property
    def _readers(self) -> "weakref.WeakKeyDictionary[Encoder, TextReader]":
        return weakref.WeakKeyDictionary()

    def bind(self, weights: Weights, batch: int, spans: int, span_length: int | None = None) -> PolicyForBatch:
        """The policy, and its parameters for this batch, that any of `generate`'s weights are.

        Raises:
          InputError: see `weights.bind_weights`.
        """
        dims = Dims(self.widths, spans)
        return bind_weights(
            *(weights, batch, dims, span_length),
            fusion=self.fusion,
            continues=self.continues,
            fingerprints=lambda: self.fingerprints,
        )

    @functools.cached_property
    def fingerprints(self) -> tuple[str, ...]:
        """The members'."""
        return tuple(lm.fingerprint() for lm in self.members)

    def _read_text(
        self, weights: Weights, prompts: Sequence[str] | None, rows: Sequence[Row]
    ) -> tuple[TextReader | None, Text | None]:
        """For a policy that reads the text, its reader and the prompts in its encoder's ids."""
        if not (isinstance(weights, BoundPolicy) and "text" in weights.policy.reads):
            return None, None
        if weights.encoder is None:
            raise InputError("the policy reads the text and has no encoder; load it with load_policy")
        reader = self.reader(weights.encoder)
        if prompts is None:
            prompts = self.tokenizer.batch_decode(rows)
        return reader, read_prompts(prompts, weights.encoder, reader, weights.text_tokens)

    def _job(
        self,
        prompts: Sequence[str] | None,
        weights: Weights,
        options: SamplingOptions,
        *,
        seed: Any,
        limits: Int[np.ndarray, " B"] | None = None,
        forced: Sequence[Sequence[int]] | None = None,
        rows: Sequence[Row] | None = None,
        prompt_ids: Any = None,
        prompt_mask: Any = None,
        adapters: AdapterChoice = None,
    ) -> Job:
        """Everything of a call before anything is compiled; `rows` where prompts were read into ids before."""
        if rows is None and (prompts is None) == (prompt_ids is None):
            raise InputError("give either prompts or prompt_ids")
        options.check()
        stop = self._check_stop(options.stop)
        if rows is not None:
            rows = list(rows)
        elif prompts is not None:
            rows = self.encode(prompts, chat=options.chat)
        elif self.union is not None:
            raise InputError("the members have different tokenizers: give prompts as text")
        else:
            rows = list(read_ids(prompt_ids, prompt_mask))
            self.codec.check_ids(rows)
        batch, longest = len(rows), options.max_new_tokens
        lengths = self.lengths(rows)
        self.check_lengths(lengths, longest)
        span_length = span_length_of(weights, options.span_length)
        policy, policy_params, sample = self.bind(weights, batch, -(-longest // span_length), span_length)
        reader, text = self._read_text(weights, prompts, rows)
        options = dataclasses.replace(options, span_length=span_length)
        spec = self.spec(options, policy=policy, reader=reader, sample_weights=sample)
        spec = dataclasses.replace(spec, end_ids=(*spec.end_ids, *self._stop_ids(stop, spec.end_ids)))
        if spec.union is not None:  # no member is led beyond what it was made for
            room = min(spec.member_tokens, self.context - max(lengths))
            spec = dataclasses.replace(spec, member_tokens=room)
        held = longest if spec.union is None else spec.member_tokens
        held += 0 if any(config.encoder is not None for config in spec.members) else max(lengths)
        self.require_memory(batch * options.samples, held, "give fewer prompts or samples, or a lower max_new_tokens")
        filled = self.prompts(rows, spec, seed=seed, limits=limits, forced=forced, text=text)
        params = self.params_for(adapters, batch)
        return Job(rows, filled, policy_params, spec, params, options.samples, stop, self.mesh).fill()

    def _check_stop(self, stop: Sequence[str]) -> tuple[str, ...]:
        """The stop strings; raises an `InputError` for a bare string, empty strings, or members without a tokenizer."""
        if isinstance(stop, str) or not all(isinstance(s, str) and s for s in stop):
            raise InputError(f"stop must be a list of strings that are not empty, not {stop!r}")
        if stop and self.members[0].tokenizer is None:
            raise InputError(f"stop strings need a tokenizer, and {self.members[0].name} has none")
        return tuple(stop)

    def _stop_ids(self, stop: Sequence[str], ends: Sequence[int]) -> list[int]:
        """The special tokens that are stop strings: texts do not show them, so that they end an answer as end tokens
        do, which a warning says."""
        special = self.codec.special_tokens if stop else {}
        found = {i: text for i, text in special.items() if text in stop and i not in ends}
        if found:
            told = ", ".join(f"{text} ({i})" for i, text in found.items())
            warnings.warn(f"stop strings that are special tokens end answers as end tokens do: {told}", stacklevel=4)
        return list(found)

    def _options(
        self, max_new_tokens: int | Sequence[int], batch: int, fields: dict[str, Any]
    ) -> tuple[SamplingOptions, Int[np.ndarray, " B"] | None]:
        """The options of a call, and each row's own limit if there is one per row."""
        limits = np.asarray(max_new_tokens)
        if limits.dtype.kind not in "iu" or limits.shape not in ((), (batch,)):
            raise InputError(
                f"max_new_tokens must be a whole number or one per prompt ([{batch}]), not {max_new_tokens}"
            )
        if np.any(limits < 1):
            raise InputError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        options = SamplingOptions(**fields, max_new_tokens=int(limits.max()))
        return options, limits.astype(np.int32) if limits.ndim else None

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        weights: Weights = None,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        seed: int | Sequence[int] | ArrayLike = 0,
        keep: bool = False,
        prompt_ids: ArrayLike | Sequence[Sequence[int]] | None = None,
        prompt_mask: ArrayLike | Sequence[Sequence[int]] | None = None,
        adapters: AdapterChoice = None,
        **options: Any,
    ) -> Generation:
        """Writes answers to prompts.

        With different tokenizers a step writes one entry of the union vocabulary, and steps, spans, `max_new_tokens`
        and scores count entries.

        Args:
          prompts: texts; or give `prompt_ids` and `prompt_mask` (1 where there is a token, padding on either side).
          weights: None (uniform), [K], Float[B, K] (each row is scaled to sum to 1), or a policy: a trained one, one of
            `rlae_jax.fusion.policy`, or the name of one of `NAMED_POLICIES` there ("confidence", "online", ...).
          max_new_tokens: the longest answer, or one number per prompt.
          seed: row b draws from fold_in(key(seed), b); or one seed per row.
          keep: keep caches on the device, so that `extend` can go on.
          adapters: for members with several adapters (`LM.with_adapters`), each row's by number or name, or weights
            Float[B, M] of a sum of adapters.
          options: the fields of `SamplingOptions`: min_new_tokens, member_tokens, span_length, temperature (0 is
            greedy), top_k, top_p, min_p, repetition_penalty, samples, stop, chat, ignore_eos, scores.

        Raises:
          InputError: unusable prompts, weights or options, told before anything is compiled.
        """
        batch = _batch(prompts, prompt_ids)
        checked, limits = self._options(max_new_tokens, batch, options)
        job = self._job(
            *(prompts, weights, checked),
            seed=seed,
            limits=limits,
            prompt_ids=prompt_ids,
            prompt_mask=prompt_mask,
            adapters=adapters,
        )
        if not (job.stop or keep):
            return read_answers(self.codec, job, programs.run(job))
        return self._finish(job, keep)

    def _finish(self, job: Job, keep: bool, start: Any = None) -> Generation:
        """Runs a job in chunks, looking for stop strings, to its end."""
        steps = _STOP_STEPS if job.stop else job.spec.max_new_tokens
        *_, (answers, state) = programs.run_in_chunks(job, steps, self._stopped(job), start)
        generation = read_answers(self.codec, job, answers)
        if not keep:
            return generation
        return dataclasses.replace(generation, continuation=Continuation(job, state))

    def _stopped(self, job: Job) -> Callable[[Answers], Bool[np.ndarray, " B"]] | None:
        """What tells which rows a stop string has ended; None without stop strings."""

        def stopped(answers: Answers) -> Bool[np.ndarray, " B"]:
            return np.array([reason == "stop" for reason in read_answers(self.codec, job, answers).finish_reasons])

        return stopped if job.stop else None

    def extend(self, generation: Generation, max_new_tokens: Count = 64) -> Generation:
        """Goes on from where answers ended for want of room, without reading anything again.

        The result is what one call with the longer limit gives. Rows that ended otherwise stay as they are, also by a
        limit of their own or for want of a member's room. `generation` can be extended once; its result again.

        Raises:
          InputError: a generation without `keep=True`, or that was extended already; no room in the context.
        """
        start = generation.continuation
        if start is None or start.used:
            raise InputError("only what generate(keep=True) or extend returned can be extended, and once")
        ranges.check_arguments(Ensemble.extend, max_new_tokens=max_new_tokens)
        old = start.job.spec
        longest = old.max_new_tokens + max_new_tokens
        lengths = self.lengths(start.job.rows)
        self.check_lengths(lengths, longest)
        room = old.member_tokens
        if old.union is not None:
            room = min(room + self.codec.room(max_new_tokens), self.context - max(lengths))
        spec = dataclasses.replace(old, max_new_tokens=longest, member_tokens=room)
        start.used = True
        stopped = np.ones(len(start.state.done), bool)  # and so is the filling of the batch
        stopped[: len(generation.steps)] = [reason == "stop" for reason in generation.finish_reasons]
        with sharding.use(self.mesh):
            state = programs.lengthen(start.state, stopped, old, spec)
        return self._finish(dataclasses.replace(start.job, spec=spec), True, state)

    def stream(
        self,
        prompts: Sequence[str],
        weights: Weights = None,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        seed: int | Sequence[int] = 0,
        adapters: AdapterChoice = None,
        **options: Any,
    ) -> Iterator[list[str]]:
        """Writes answers as `generate` does, and yields what each of them gains by every span.

        Joined, the pieces are `generate`'s texts: what may still become part of a stop string or of a broken character
        is held back.

        Args:
          options: as `generate`'s, but for `scores`.

        Raises:
          InputError: as `generate`, at the call; at the end, if a prediction of some answer was not finite.
        """
        if "scores" in options:
            raise TypeError("stream() takes no scores")
        self.members[0].require_tokenizer()
        checked, limits = self._options(max_new_tokens, len(prompts), options)
        job = self._job(prompts, weights, checked, seed=seed, limits=limits, adapters=adapters)

        def pieces() -> Iterator[list[str]]:
            given = [""] * job.answers
            failed: list[int] = []
            for answers, _ in programs.run_in_chunks(job, job.spec.span_length, self._stopped(job)):
                failed = np.flatnonzero(answers.failed).tolist()
                ready = read_answers(self.codec, job, answers, settled=True).texts
                yield [text[len(before) :] for text, before in zip(ready, given, strict=True)]
                given = ready
            if failed:
                raise InputError(f"answers {failed} ended early: a prediction was not finite (NaN or infinite)")

        return pieces()

    def log_likelihoods(
        self,
        prompts: Sequence[str],
        options: Sequence[Sequence[str]],
        weights: Weights = None,
        span_length: int | None = None,
        *,
        chat: bool = False,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Float[np.ndarray, " O"]]:
        """How likely the ensemble finds each of several continuations of each prompt: the sum of the log-probabilities
        of its tokens (entries, in the first member's segmentation) under the fused distribution. Nothing is sampled.

        Each member reads a prompt and its options once, in whole sequences (see `score_tokens`).

        Args:
          options: per prompt, texts that continue it; each begins as a continuation does, mostly with a space.
          weights, span_length, chat: as in `generate`; weights [B, K] are one row per prompt.
          on_progress: called with the number of prompts that are done.

        Raises:
          InputError: another number of lists than prompts, an option without a token; what `generate` raises.
        """
        if len(options) != len(prompts):
            raise InputError(f"{len(prompts)} prompts and {len(options)} lists of options: give one for each")
        rows = self.encode(prompts, chat=chat)
        counts = [len(own) for own in options]
        prompt_of = np.repeat(np.arange(len(prompts)), counts).tolist()
        texts = [text for own in options for text in own]
        joined = not chat and self.continues
        pairs = zip(prompt_of, texts, strict=True)
        tokens = [self.codec.continuation(prompts[b], text, joined) for b, text in pairs]
        empty = [("options without a token", repr(text)) for text, ids in zip(texts, tokens, strict=True) if not ids]
        if empty:
            raise grouped_error("options that cannot be scored", empty, "each must have at least one token")
        if isinstance(weights, Sequence | np.ndarray | jax.Array) and not isinstance(weights, str):
            weights = np.asarray(weights)
            weights = weights[prompt_of] if weights.ndim == 2 and len(weights) == len(prompts) else weights
        scores = self.score_tokens(
            *([rows[b] for b in prompt_of], tokens, weights, span_length),
            prompts=[prompts[b] for b in prompt_of],
            chat=chat,
            on_progress=lambda done: on_progress(done * len(prompts) // len(tokens)),
        )
        totals = np.array([one.fused.sum(dtype=np.float64) for one in scores], np.float32)
        return np.split(totals, np.cumsum(counts)[:-1])

    def score_tokens(
        self,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        weights: Weights = None,
        span_length: int | None = None,
        *,
        prompts: Sequence[str] | None = None,
        chat: bool = False,
        top: int = 0,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Likelihood]:
        """The log-probabilities of given tokens, each behind its row and those before it, as decoding them would give
        them (`SamplingOptions.scores`), but read in whole sequences: one forward per member and text.

        Rows that are equal are read once, as far as every member can (`ModelConfig.takes_branches`), and several stand
        in one row of a program: one call for many is faster than many. The decoding loop is left to policies that
        choose how long spans are, to those whose rows stand in blocks, and to members with keys and values in 8 bits,
        which only a cache holds.

        Args:
          rows: ids, as `encode` gives them; several may be the same.
          tokens: for every row the ids, or entries of the union, that continue it.
          weights, span_length: as in `generate`; weights [B, K] are one row per row.
          prompts: the rows as texts, where a policy reads them.
          chat: the rows are of chat templates.
          top: how many of the likeliest tokens of each place are told; 0 spares `linear` the whole distributions.
          on_progress: called with the number of rows that are done.

        Raises:
          InputError: unusable rows or weights, tokens that do not exist, what does not fit the members' context; a
            prediction that is not finite.
        """
        rows, tokens = list(rows), [list(own) for own in tokens]
        if len(rows) != len(tokens):
            raise InputError(f"{len(rows)} rows and {len(tokens)} lists of tokens: give one for each")
        given = self._given(rows, tokens)
        longest, length = max(map(len, tokens), default=0), span_length_of(weights, span_length)
        if not longest:
            return [likelihood.nothing(len(self.members), top)] * len(rows)
        policy, policy_params, sample = self.bind(weights, len(rows), -(-longest // length), length)
        reader, text = self._read_text(weights, prompts, rows)
        options = SamplingOptions(max_new_tokens=longest, span_length=length, scores=True, ignore_eos=True, chat=chat)
        spec = self.spec(options, policy=policy, sample_weights=sample, reader=reader)
        by_row = getattr(policy, "params_per_row", False)
        cached = any(config.kv_dtype is not None for config in spec.members)
        if spec.span_lengths or cached or (hasattr(policy, "slice_rows") and not by_row):
            return self._score_written(rows, tokens, weights, options, prompts, top)
        # Calls that differ in nothing that shapes the program share it.
        counts_steps = not spec.decides_once or not self.continues
        spec = dataclasses.replace(spec, max_new_tokens=bucket(longest) if counts_steps else 1, member_tokens=0)
        found = [likelihood.nothing(len(self.members), top)] * len(rows)
        done, params = 0, self.params_for(None, 1)
        for batch in likelihood.plan(given, spec, text, sharding.groups_of(self.mesh)):
            own = policy_params[batch.pairs] if by_row and len(policy_params) == len(rows) > 1 else policy_params
            with sharding.use(self.mesh):
                scores = programs.read_given(params, batch.texts, sharding.whole(own, self.mesh), spec, top)
                likelihood.put_back(batch, sharding.to_host(scores), given, found)
            done += len(batch.slots)
            on_progress(done)
        # A token that cannot be has -inf, which is one's own to sum.
        _check_predictions([bool(np.any(np.isnan(one.fused) | (one.fused == np.inf))) for one in found])
        return found

    def read_spans(
        self,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        reads: Sequence[str],
        span_length: int = DEFAULT_SPAN_LENGTH,
        *,
        longest: int | None = None,
        prompts: Sequence[str] | None = None,
        encoder: Encoder | None = None,
        text_tokens: int = 512,
        chat: bool = False,
    ) -> list[Spans]:
        """What given texts are to the members, whatever the weights: each token's log-probability under each of them,
        and what a policy would observe at the beginning of each span. From this `likelihood.fused_by` has the
        log-probabilities of `score_tokens` under any weights of `linear`, without the members.

        Args:
          rows, tokens, prompts, chat: as in `score_tokens`.
          reads: the parts of the observation, see `policy.OBSERVATION_PARTS`.
          longest: calls that name the same number of tokens share their programs.
          encoder, text_tokens: of a policy that reads "text".

        Raises:
          InputError: an operator other than linear, keys and values in 8 bits; what `score_tokens` raises.
        """
        if self.fusion is not linear:
            raise InputError(
                "what is read once serves all weights of fusion linear alone: under another operator each weights' "
                "normaliser takes the log-probabilities of all tokens"
            )
        if any(lm.config.kv_dtype is not None for lm in self.members):
            raise InputError("texts are read without a cache, so that there are no keys in 8 bits; leave kv_dtype out")
        rows, tokens = list(rows), [list(own) for own in tokens]
        given = self._given(rows, tokens)
        if any(not own for own in tokens):
            raise InputError("a text without a token has no span")
        reader, text = None, None
        if "text" in reads:
            if encoder is None or prompts is None:
                raise InputError("to observe the text give an encoder and the prompts as texts")
            reader = self.reader(encoder)
            text = read_prompts(prompts, encoder, reader, text_tokens)
        most = bucket(max(max(map(len, tokens), default=1), longest or 1))
        options = SamplingOptions(max_new_tokens=most, span_length=span_length, ignore_eos=True, chat=chat)
        spec = self.spec(options, policy=likelihood.Reads(tuple(reads)), reader=reader)
        spec = dataclasses.replace(spec, member_tokens=0)
        found: dict[int, Spans] = {}
        params, groups = self.params_for(None, 1), sharding.groups_of(self.mesh)
        for batch in likelihood.plan(given, spec, text, groups):
            begins = likelihood.span_begins(batch, span_length, groups)
            with sharding.use(self.mesh):
                spans = sharding.to_host(programs.observe_given(params, batch.texts, begins, spec))
            found |= likelihood.put_spans_back(batch, begins, spans, given, spec, groups)
        _check_predictions([bool(np.any(np.isnan(found[i].log_probs))) for i in range(len(rows))])
        return [found[i] for i in range(len(rows))]

    def _given(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> list[likelihood.Given]:
        """Pairs of a row and the tokens that continue it, checked."""
        self.codec.check_ids(rows)
        wrong = [(b, i) for b, own in enumerate(tokens) for i in own if not 0 <= i < self.codec.vocab]
        if wrong:
            findings = [("tokens", f"row {b} has {i}") for b, i in wrong]
            raise grouped_error(
                "tokens that cannot be written", findings, f"those from 0 to {self.codec.vocab} - 1 can"
            )
        given = []
        for row, own in zip(rows, tokens, strict=True):
            prompt = (row,) if isinstance(row[0], int | np.integer) else tuple(row)
            given.append(likelihood.Given(prompt, own, self.codec.spell(own)[: len(prompt)]))
        # The last token is not read.
        lengths = [
            max(len(ids) + sum(counts[:-1]) for ids, (_, counts) in zip(one.prompt, one.spelled, strict=True))
            for one in given
        ]
        long = [("texts", f"text {b} has {n}") for b, n in enumerate(lengths) if n > self.context]
        if long:
            raise grouped_error(f"too long: the context is {self.context} tokens", long)
        return given

    def _score_written(
        self,
        rows: Sequence[Row],
        tokens: Sequence[Sequence[int]],
        weights: Weights,
        options: SamplingOptions,
        prompts: Sequence[str] | None,
        top: int,
    ) -> list[Likelihood]:
        """`score_tokens` by the decoding loop, which writes the tokens one by one."""
        limits = np.array(list(map(len, tokens)), np.int32)
        job = self._job(prompts, weights, options, seed=0, limits=limits, forced=tokens, rows=rows)
        answers = programs.run(dataclasses.replace(job, spec=dataclasses.replace(job.spec, top=top)))
        _check_predictions(np.asarray(answers.failed))
        if np.any(answers.steps != limits):
            raise InputError("a text does not fit into the members' room")
        assert answers.scores is not None
        spans = answers.trajectory
        held = np.full(spans.value.shape, job.spec.span_length) if spans.length is None else spans.length
        held = np.where(answers.span_mask(), held, 0)
        found = []
        for b, n in enumerate(limits):
            used = np.repeat(spans.weights[b], held[b], axis=0)[:n]
            fused, members = (np.asarray(leaf[b, :n]) for leaf in answers.scores[:2])
            one = likelihood.nothing(len(self.members), top)._replace(fused=fused, members=members, weights=used)
            if answers.scores.top is not None:
                told = (np.asarray(leaf[b, :n]) for leaf in answers.scores.top)
                one = one._replace(**dict(zip(("top_tokens", "top"), told, strict=True)))
            found.append(one)
        return found

    def run(
        self,
        rows: Sequence[Row],
        policy_params: Any,
        seed: Any,
        spec: DecodeSpec,
        *,
        params: tuple[Any, ...] | None = None,
        samples: int = 1,
        limits: Int[np.ndarray, " B"] | None = None,
        text: Text | None = None,
    ) -> Answers:
        """Decodes rows of ids under a spec and returns the answers as host arrays.

        Args:
          params: from `params_for`; by default `params`.
          samples: answers per row, which share its prefill.
          limits: each row's longest answer.
          text: the prompts in an encoder's ids, for a policy that reads them.

        Raises:
          InputError: seeds that are neither one integer nor one per row.
        """
        prompts = self.prompts(rows, spec, seed=seed, limits=limits, text=text)
        params = self.params if params is None else params
        return programs.run(Job(list(rows), prompts, policy_params, spec, params, samples, (), self.mesh).fill())


def _is_text(prompt: Any) -> bool:
    """Whether it is a string that can be written as UTF-8: halves of UTF-16 characters cannot."""
    if not isinstance(prompt, str):
        return False
    try:
        prompt.encode()
    except UnicodeEncodeError:
        return False
    return True


def _batch(prompts: Sequence[str] | None, prompt_ids: Any) -> int:
    """How many prompts there seem to be, before they are checked."""
    given = prompt_ids if prompts is None else prompts
    return len(given) if given is not None else 0


def _check_predictions(failed: Sequence[bool] | np.ndarray) -> None:
    """Texts that are read in one row share its fault."""
    if n := int(np.sum(failed)):
        raise InputError(
            f"{n} of {len(failed)} texts cannot be scored: in what was read with them a prediction was not finite (NaN "
            "or infinite)"
        )
