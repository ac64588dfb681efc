"""How likely given texts are, to each member and under their fusion, read in whole sequences: what is written is known
beforehand, so that a member makes one forward for a text and not one per token.

    prompt a b, continued by c d and by e        row        a b c      no token's state beyond these is asked for
                                                 asked      c d e
                                                 read at    b c b

In: rows of ids and the tokens that continue each. `plan` shares what begins alike, packs short texts into rows of one
length (`transformer.Branches`) and makes batches of few sizes; `read_given` is the program; `put_back` brings what it
gives back into the order of the call. The policy acts on what it would have seen in the decoding loop, whose operators,
masks and observations these are. States are kept for all tokens of a batch, distributions for some of them at a time.
"""

import collections
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from rlae_jax.fusion.decode import act, action_keys, fuse, member_agreement, member_stats
from rlae_jax.fusion.lockstep import Lockstep
from rlae_jax.fusion.members import ForwardPass, MemberParams, Prediction, bind_members
from rlae_jax.fusion.operators import linear
from rlae_jax.fusion.policy import STATS, Observation, SoFar
from rlae_jax.fusion.prompts import SMALLEST_PROMPT_BUCKET, bucket, smallest_batch
from rlae_jax.fusion.ragged import Ragged, to_union
from rlae_jax.fusion.reading import Text
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.models import ModelConfig
from rlae_jax.models.transformer import Branches, active_bytes
from rlae_jax.sharding import constrain, platform

# Tokens of a batch, and on a CPU pairs of tokens that the members' heads score: more would leave the processor's cache,
# which takes half as long again.
_TOKENS = 2048
_PAIRS = 2**21
# Where the branches of a text take more room than this, and than the prompt itself, the prompt is read again: what a
# token sees is computed for all pairs of a row's tokens.
_BRANCH_TOKENS = 512
_ALIVE = 2**24  # log-probabilities in memory at a time, about: 64 MiB


class Likelihood(NamedTuple):
    """Of N given tokens that continue a prompt."""

    fused: Float[np.ndarray, " N"]  # log-probabilities under the fused distribution
    # Under each member; of a token that a member lacks, through the first token of its spelling, -inf if there is none.
    members: Float[np.ndarray, "N K"]
    weights: Float[np.ndarray, "N K"]  # in force at each token
    top_tokens: Int[np.ndarray, "N n"]  # the likeliest tokens in each place, the best first
    top: Float[np.ndarray, "N n"]  # and their log-probabilities


class Spans(NamedTuple):
    """What a text of N given tokens in P spans is to the members, or all texts of a batch: what any policy would see of
    it, and what any weights of `linear` would make of it (`fused_by`). Nothing here has the size of a vocabulary."""

    log_probs: Float[Array, "N K"]  # of each token under each member; -inf where it lacks the token
    # The logarithm of what each member gives to all tokens that may stand there together; () where that is 0: with one
    # tokenizer all may.
    mass: Any
    observation: Observation  # at each span's beginning; leaves [P, ...]


@dataclasses.dataclass(frozen=True)
class Reads:
    """A policy that only says what it would look at."""

    reads: tuple[str, ...]

    def init(self, key: Any, dims: Any) -> tuple[()]:
        """Nothing."""
        return ()

    def apply(self, params: Any, observation: Observation) -> Any:
        """Decides nothing."""
        raise NotImplementedError("this policy only looks")


class Asked(NamedTuple):
    """The tokens of a batch whose log-probabilities are asked for; every leaf has N first."""

    row: Int[Array, " N"]
    places: tuple[Int[Array, " N"], ...]  # in the row of each array of ids, of the state that predicts it
    token: Int[Array, " N"]
    character: Int[Array, " N"]  # the state of the UTF-8 automaton before it
    answer: Int[Array, " N"]  # whose it is
    step: Int[Array, " N"]  # and its number there; -1 is filling


class Answer(NamedTuple):
    """What continues a prompt; every leaf has R first."""

    pair: Int[Array, " R"]  # its number in the call, on which its draws depend
    text: Int[Array, " R"]  # its prompt, as in `Texts.text`
    prompt_tokens: Int[Array, " R"]  # of member 0
    first: Int[Array, " R"]  # where its first token is among those asked for
    length: Int[Array, " R"]
    seen: Text | None  # the prompt in an encoder's ids


class Texts(NamedTuple):
    """A batch. On a mesh every array holds what each group of devices has, one after another, with numbers of its
    own."""

    # Of each array of ids: of the one tokenizer, or of each member. See `Branches`.
    ids: tuple[Int[Array, "B T"], ...]
    text: tuple[Int[Array, "B T"], ...]
    branch: tuple[Int[Array, "B T"], ...]
    position: tuple[Int[Array, "B T"], ...]
    asked: Asked
    answers: Answer


class Scores(NamedTuple):
    """What a batch gives; see `Likelihood`."""

    fused: Float[Array, " N"]
    members: Float[Array, "N K"]
    weights: Float[Array, "N K"]
    top_tokens: Int[Array, "N n"]
    top: Float[Array, "N n"]


class Given(NamedTuple):
    """One of a call's pairs of a prompt and what continues it."""

    prompt: tuple[Sequence[int], ...]  # of each array of ids
    tokens: Sequence[int]
    # The ids of the tokens in each array, and how many of them each token is.
    spelled: tuple[tuple[Sequence[int], Sequence[int]], ...]


@dataclasses.dataclass
class _Text:
    """A prompt and what is read behind it, for all pairs that begin so."""

    prompt: tuple[Sequence[int], ...]
    branches: dict[tuple[tuple[int, ...], ...], list[int]]  # the ids in each array -> the pairs that they are read for
    sizes: list[int]  # tokens in each array

    @property
    def pairs(self) -> list[int]:
        return [pair for readers in self.branches.values() for pair in readers]

    def add(self, branch: tuple[tuple[int, ...], ...], pair: int) -> None:
        if branch not in self.branches:
            self.branches[branch] = []
            self.sizes = [size + len(ids) for size, ids in zip(self.sizes, branch, strict=True)]
        self.branches[branch].append(pair)

    def has_room(self, branch: tuple[tuple[int, ...], ...]) -> bool:
        """Whether another branch may be read behind the same prompt."""
        sizes = zip(self.prompt, self.sizes, branch, strict=True)
        return branch in self.branches or all(
            size - len(prompt) + len(ids) <= max(_BRANCH_TOKENS, len(prompt)) for prompt, size, ids in sizes
        )


def _texts_of(given: Sequence[Given], shares: bool) -> list[_Text]:
    texts: list[_Text] = []
    latest: dict[tuple[tuple[int, ...], ...], _Text] = {}
    for pair, one in enumerate(given):
        if not one.tokens:
            continue
        # The last token is asked for, but nothing behind it.
        branch = tuple(tuple(ids[: sum(counts[:-1])]) for ids, counts in one.spelled)
        key = tuple(map(tuple, one.prompt))
        text = latest.get(key) if shares else None
        if text is None or not text.has_room(branch):
            text = latest[key] = _Text(one.prompt, {}, [len(ids) for ids in one.prompt])
            texts.append(text)
        text.add(branch, pair)
    return texts


def _width(size: int) -> int:
    """The next of 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, ...: a row that holds so many tokens."""
    step = max(1 << max(size.bit_length() - 3, 0), SMALLEST_PROMPT_BUCKET // 4)
    return max(-(-size // step) * step, SMALLEST_PROMPT_BUCKET)


def _even_width(members: Sequence[ModelConfig]) -> float:
    """Of rows so wide, all pairs of tokens cost about as much as all that is done for single ones: where members are
    small, as measured on a CPU, not much more than a sentence."""
    single = sum(active_bytes(config, rows=_TOKENS) / jnp.dtype(config.dtype).itemsize for config in members)
    pairs = sum(config.layers * config.heads * (50 + 3 * config.head_width) for config in members)
    return single / pairs


def _classes(sizes: Sequence[int], even_width: float) -> list[int]:
    """How many of some texts, the longest first, go into rows of one width, how many of the others into those of the
    next, and so on: wide rows are filled better, narrow ones have fewer pairs of tokens, each width is a program."""
    texts = collections.Counter(map(_width, sizes))
    tokens = collections.Counter[int]()
    for size in sizes:
        tokens[_width(size)] += size
    widths = sorted(texts)
    cost, begins = [0.0], [0]
    for j, width in enumerate(widths):
        options = []
        for i in range(j + 1):
            own = widths[i : j + 1]
            alone = sum(texts[w] for w in own if 2 * w > width)
            rows = max(-(-sum(tokens[w] for w in own) // width), alone)
            options.append((cost[i] + (rows * width + _TOKENS / 4) * (1 + width / even_width), i))
        best = min(options)
        cost.append(best[0])
        begins.append(best[1])
    counts, j = [], len(widths)
    while j:
        counts.append(sum(texts[w] for w in widths[begins[j] : j]))
        j = begins[j]
    return counts


def _pack(texts: Sequence[_Text], widths: Sequence[int]) -> list[list[_Text]]:
    """Texts, the longest first, in rows of some widths: each in the first row that has room."""
    smallest = min(min(text.sizes) for text in texts)
    rows: list[list[_Text]] = []
    open_rows: list[tuple[list[int], list[_Text]]] = []  # with what is left of them
    for text in texts:
        fitting = (one for one in open_rows if all(size <= left for size, left in zip(text.sizes, one[0], strict=True)))
        found = next(fitting, None)
        if found is None:
            found = list(widths), []
            rows.append(found[1])
            open_rows.append(found)
        left, row = found
        row.append(text)
        left[:] = [before - size for before, size in zip(left, text.sizes, strict=True)]
        if min(left) < smallest:
            open_rows = [one for one in open_rows if one[1] is not row]
    return rows


def _rows_per_batch(rows: int, widest: int, heads: int, groups: int) -> int:
    """B of each group of devices, for so many rows of texts: with the least filling."""
    room = _TOKENS // widest
    if platform() == "cpu":
        room = min(room, _PAIRS // (heads * widest**2))
    most = 1
    while bucket(most + 1) <= room:
        most = bucket(most + 1)
    of_group = -(-rows // groups)
    most = max(min(most, bucket(of_group)), smallest_batch())
    sizes = [size for size in range(max(most // 2, smallest_batch()), most + 1) if bucket(size) == size]
    return min(sizes, key=lambda size: (-(-of_group // size) * size, -size))


class Batch(NamedTuple):
    """A program's arguments, and what its results are."""

    texts: Texts
    pairs: Int[np.ndarray, " R"]  # each answer's; the first pair's number stands for filling
    slots: list[tuple[int, int]]  # of each answer: its pair, and where its first token is among those asked for


def plan(given: Sequence[Given], spec: DecodeSpec, seen: Text | None, groups: int) -> Iterator[Batch]:
    """All pairs, each with at least one token, in batches.

    Args:
      seen: the prompts of the pairs in an encoder's ids.
      groups: of devices, that have rows of their own.
    """
    shares = all(config.takes_branches for config in spec.members)
    texts = sorted(_texts_of(given, shares), key=lambda text: -max(text.sizes))
    for n in _classes([max(text.sizes) for text in texts], _even_width(spec.members)):
        own, texts = texts[:n], texts[n:]
        widths = [_width(max(sizes)) for sizes in zip(*(text.sizes for text in own), strict=True)]
        rows = _pack(own, widths) if shares else [[text] for text in own]
        size = _rows_per_batch(len(rows), max(widths), sum(config.heads for config in spec.members), groups)
        batches = [rows[i : i + groups * size] for i in range(0, len(rows), groups * size)]
        # Rows of a batch go to the groups in turn, so that all have about as many.
        parts = [[batch[g::groups] for g in range(groups)] for batch in batches]
        pairs = [[pair for row in part for text in row for pair in text.pairs] for batch in parts for part in batch]
        answers = bucket(max(map(len, pairs)))
        asked = bucket(max(sum(len(given[pair].tokens) for pair in part) for part in pairs))
        for batch in parts:
            laid = [_lay_out(part, given, spec, seen, size, widths, answers, asked) for part in batch]
            yield Batch(
                jax.tree.map(lambda *leaves: np.concatenate(leaves), *(one.texts for one in laid)),
                np.concatenate([one.pairs for one in laid]),
                [(pair, g * asked + first) for g, one in enumerate(laid) for pair, first in one.slots],
            )


def _lay_out(
    rows: Sequence[Sequence[_Text]],
    given: Sequence[Given],
    spec: DecodeSpec,
    seen: Text | None,
    size: int,
    widths: Sequence[int],
    answers: int,
    asked: int,
) -> Batch:
    """The arrays of one group of devices: `size` rows of some widths, so many answers and tokens asked for."""
    ids, text, branch, position = ([np.zeros((size, width), np.int32) for width in widths] for _ in range(4))
    row_of, token, character, answer, step, *places = (np.zeros(asked, np.int32) for _ in range(5 + len(widths)))
    step[:] = -1
    pairs, text_of, prompt_tokens, first, length = (np.zeros(answers, np.int32) for _ in range(5))
    utf8 = None if spec.union is None else np.asarray(spec.union.utf8)
    slots: list[tuple[int, int]] = []
    free = texts = 0
    for b, row in enumerate(rows):
        ends = [0] * len(widths)
        for one in row:
            texts += 1
            starts = list(ends)
            for i, own in enumerate(one.prompt):
                ends[i] = _write((ids[i], text[i], branch[i], position[i]), b, ends[i], own, texts, 0, 0)
            for c, (read, readers) in enumerate(one.branches.items(), 1):
                begins = list(ends)
                for i, own in enumerate(read):
                    arrays = ids[i], text[i], branch[i], position[i]
                    ends[i] = _write(arrays, b, ends[i], own, texts, c, len(one.prompt[i]))
                for pair in readers:
                    tokens, n = given[pair].tokens, len(slots)
                    at = slice(free, free + len(tokens))
                    row_of[at], token[at], answer[at], step[at] = b, tokens, n, np.arange(len(tokens))
                    for i, (_, counts) in enumerate(given[pair].spelled):
                        fed = np.cumsum([0, *counts[:-1]])  # before each of the tokens
                        last = starts[i] + len(one.prompt[i]) - 1
                        places[i][at] = np.where(fed == 0, last, begins[i] + fed - 1)
                    if utf8 is not None:
                        character[at] = _characters(utf8, tokens)
                    pairs[n], text_of[n], prompt_tokens[n] = pair, texts, len(one.prompt[0])
                    first[n], length[n] = free, len(tokens)
                    slots.append((pair, free))
                    free += len(tokens)
    whole: Any = jax.tree.map(lambda leaf: np.asarray(leaf)[pairs], seen)
    asked_for: Any = Asked(row_of, tuple(places), token, character, answer, step)  # type: ignore[arg-type]
    answers_to: Any = Answer(pairs, text_of, prompt_tokens, first, length, whole)  # type: ignore[arg-type]
    of_tokens: Any = ids, text, branch, position
    return Batch(Texts(*map(tuple, of_tokens), asked_for, answers_to), pairs, slots)  # type: ignore[call-arg, arg-type]


def _write(
    arrays: Sequence[np.ndarray], row: int, start: int, own: Sequence[int], text: int, branch: int, position: int
) -> int:
    """Writes tokens from a place on, with what they belong to; returns where they end."""
    end = start + len(own)
    for array, value in zip(arrays, (own, text, branch, np.arange(position, position + len(own))), strict=True):
        array[row, start:end] = value
    return end


def _characters(utf8: np.ndarray, tokens: Sequence[int]) -> list[int]:
    """The state of the automaton before each of the tokens."""
    states = [0]
    for token in tokens[:-1]:
        states.append(int(utf8[states[-1], token]))
    return states


def nothing(members: int, top: int) -> Likelihood:
    """Of no tokens."""
    of_members, of_top = (np.zeros((0, n), np.float32) for n in (members, top))
    return Likelihood(np.zeros(0, np.float32), of_members, of_members, of_top.astype(np.int32), of_top)


def put_back(batch: Batch, scores: Scores, given: Sequence[Given], into: list[Likelihood]) -> None:
    """Puts a batch's results, on the host, where the pairs have theirs."""
    for pair, start in batch.slots:
        end = start + len(given[pair].tokens)
        into[pair] = Likelihood(*(np.asarray(leaf[start:end]) for leaf in scores))


def read_given(
    params: tuple[MemberParams, ...], texts: Texts, policy_params: Any, spec: DecodeSpec, top: int = 0
) -> Scores:
    """The log-probabilities of a batch's tokens.

    Args:
      policy_params: as in decoding, rows being answers.
      spec: its `max_new_tokens` bounds the answers, for policies that act more than once and for encoder-decoders.
      top: how many of the likeliest tokens are told.
    """
    asked = texts.asked
    passes = bind_members(params, spec, len(texts.ids[0]))
    hidden = tuple(_states(run, texts, i, spec) for i, run in enumerate(passes))
    predict = functools.partial(_predict, passes, hidden, spec=spec)
    logits = (len(spec.members) + 1) * spec.vocab
    # Of the mean of probabilities over one vocabulary, a token's own are all that is needed.
    alone = spec.fusion is linear and spec.union is None and not top and not hasattr(spec.policy, "complement")

    by_member = stats = agreement = None
    reads = spec.policy.reads
    if {"stats", "agreement"} & set(reads) or ("so_far" in reads and not alone):

        def observe(asked: Asked) -> tuple[Array, Array | None, Array | None]:
            prediction = predict(asked)
            own = _kind(asked, spec).token_log_probs(prediction, asked.token, spec)
            stats = member_stats(prediction.log_probs, jnp.zeros_like(own)) if "stats" in reads else None
            return own, stats, member_agreement(prediction.log_probs) if "agreement" in reads else None

        by_member, stats, agreement = _in_parts(observe, asked, logits)
    elif alone:
        own = functools.partial(_chosen, passes, hidden, vocab=spec.vocab)
        by_member = _in_parts(own, asked, logits)
    weights = _weights(passes, hidden, texts, by_member, stats, agreement, policy_params, spec)
    if alone:
        assert by_member is not None
        fused = linear(tuple(by_member[:, k, None] for k in range(len(spec.members))), weights)[:, 0]
        none = jnp.zeros((len(fused), 0))
        return Scores(fused, by_member, weights, none.astype(jnp.int32), none)

    def score(of: tuple[Asked, Array]) -> Scores:
        asked, weights = of
        members, prediction = _kind(asked, spec), predict(asked)
        fused = fuse(passes, members, prediction, weights, policy_params, spec)
        fused = fused - jax.nn.logsumexp(fused, axis=-1, keepdims=True)
        own = members.token_log_probs(prediction, asked.token, spec)
        best, tokens = lax.top_k(fused, top)
        return Scores(jnp.take_along_axis(fused, asked.token[:, None], axis=1)[:, 0], own, weights, tokens, best)

    scores: Scores = _in_parts(score, (asked, weights), logits)
    return scores


def fused_by(weights: Float[Array, "M K"], log_probs: Float[Array, "M L K"], mass: Any) -> Float[Array, "M L"]:
    """Log-probabilities of tokens under the `linear` mixture of some weights, from what `Spans` keeps of them:

    log sum_k w_k p_k(token) - log sum_k w_k mass_k
    """
    fused = linear(tuple(jnp.moveaxis(log_probs, -1, 0)), weights)
    return fused if isinstance(mass, tuple) else fused - linear(tuple(jnp.moveaxis(mass, -1, 0)), weights)


def observe_given(params: tuple[MemberParams, ...], texts: Texts, begins: Int[Array, " D"], spec: DecodeSpec) -> Spans:
    """What a batch's tokens and spans are to the members.

    Args:
      begins: where the first token of each span is among those asked for.
      spec: whose policy says what is looked at, and whose `max_new_tokens` bounds the answers.
    """
    asked, reads, length = texts.asked, spec.policy.reads, spec.span_length
    passes = bind_members(params, spec, len(texts.ids[0]))
    hidden = tuple(_states(run, texts, i, spec) for i, run in enumerate(passes))
    logits = (len(spec.members) + 1) * spec.vocab

    def look(asked: Asked) -> tuple[Array, Any, Array, Any, Any]:
        members, prediction = _kind(asked, spec), _predict(passes, hidden, asked, spec)
        allowed = tuple(members.allowed(log_p, spec) for log_p in prediction.log_probs)
        log_probs = [jnp.take_along_axis(log_p, asked.token[:, None], axis=1)[:, 0] for log_p in allowed]
        mass = () if spec.union is None else jnp.stack([jax.nn.logsumexp(log_p, axis=1) for log_p in allowed], axis=1)
        own = members.observed(members.token_log_probs(prediction, asked.token, spec))
        stats = member_stats(prediction.log_probs, jnp.zeros_like(own)) if "stats" in reads else None
        agreement = member_agreement(prediction.log_probs) if "agreement" in reads else ()
        return jnp.stack(log_probs, axis=1), mass, own, stats, agreement

    mass: Any = ()
    stats, agreement = None, ()
    if spec.union is None and not {"stats", "agreement"} & set(reads):
        log_probs = own = _in_parts(functools.partial(_chosen, passes, hidden, vocab=spec.vocab), asked, logits)
    else:
        log_probs, mass, own, stats, agreement = _in_parts(look, asked, logits)
    first: Asked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[begins], asked)
    span = first.step // length
    states: list[Array] = []
    if "hidden" in reads:
        for i, run in enumerate(passes):
            states += jnp.split(_at(run, hidden[i], i, first)[1].astype(jnp.float32), run.members)
    seen: Any = ()
    if stats is not None:
        before = jnp.where(span[:, None] == 0, 0.0, _last_span(own, texts, spec)[span, first.answer])
        seen = stats[begins].at[..., STATS.index("span_log_prob")].set(before)
    text: Any = ()
    if spec.reader is not None:
        read = jax.tree.map(lambda leaf: leaf[span, first.answer], _texts_at_spans(texts, spec))
        text = _in_parts(spec.reader.read, read, jax.tree.leaves(read)[0].shape[1] * spec.dims.text)
    observation = Observation(
        hidden=tuple(states),
        stats=seen,
        span=span if "span" in reads else (),
        prompt=_prompt_log_probs(passes, hidden, texts)[first.answer] if "prompt" in reads else (),
        text=text,
        agreement=jax.tree.map(lambda leaf: leaf[begins], agreement),
    )
    return Spans(log_probs, mass, observation)


def span_begins(batch: Batch, span_length: int, groups: int) -> Int[np.ndarray, " D"]:
    """Where the first token of each span of a batch is among those asked for; on a mesh of each group's own. Filled up
    to one number for all groups with the first of them."""
    step = np.asarray(batch.texts.asked.step).reshape(groups, -1)
    found = [np.flatnonzero((own >= 0) & (own % span_length == 0)) for own in step]
    size = bucket(max(map(len, found)))
    return np.concatenate([np.pad(own, (0, size - len(own))) for own in found]).astype(np.int32)


def put_spans_back(
    batch: Batch, begins: Int[np.ndarray, " D"], spans: Spans, given: Sequence[Given], spec: DecodeSpec, groups: int
) -> Iterator[tuple[int, Spans]]:
    """A batch's results, on the host, by pair."""
    asked, size = len(batch.texts.asked.step) // groups, len(begins) // groups
    place: dict[int, int] = {}
    for i, local in enumerate(begins.tolist()):
        place.setdefault(i // size * asked + local, i)
    for pair, start in batch.slots:
        n = len(given[pair].tokens)
        first = place[start]
        of_tokens = operator.itemgetter(slice(start, start + n))
        of_spans = operator.itemgetter(slice(first, first - (-n // spec.span_length)))
        log_probs, mass = jax.tree.map(of_tokens, (spans.log_probs, spans.mass))
        yield pair, Spans(log_probs, mass, jax.tree.map(of_spans, spans.observation))


def _kind(asked: Asked, spec: DecodeSpec) -> Lockstep | Ragged:
    """The members as they are where tokens are asked for, for what of them does not depend on what they have read."""
    if spec.union is None:
        return Lockstep(*(asked.token,) * 4, caches=())
    return Ragged((), asked.character)


def _states(run: ForwardPass, texts: Texts, i: int, spec: DecodeSpec) -> Float[Array, "R T D"]:
    """The states of all tokens of the rows that the i-th pass runs."""
    config, i = run.model.config, i % len(texts.ids)
    ids, text, branch, position = (run.tile(part[i]) for part in texts[:4])
    if config.encoder is not None:  # which has a row for each answer, and reads the prompt alone
        asked = texts.asked
        written = jnp.zeros((len(texts.ids[0]), spec.max_new_tokens), jnp.int32)
        written = written.at[asked.row, asked.step + 1].set(asked.token, mode="drop")
        written = written.at[:, 0].set(config.start_id or 0)
        return run.model.forward(ids, (text > 0) & (branch == 0), decoder_ids=run.tile(written))[0]
    several = Branches(position, text, branch) if all(c.takes_branches for c in spec.members) else None
    return run.model.forward(ids, text > 0, branches=several)[0]


def _at(run: ForwardPass, hidden: Array, i: int, asked: Asked) -> tuple[ForwardPass, Float[Array, "R D"]]:
    """The states that predict some tokens, of all members that a pass runs, and the pass of their rows."""
    batch = len(hidden) // run.members
    rows = jnp.concatenate([asked.row + m * batch for m in range(run.members)])
    encodes = run.model.config.encoder is not None  # its decoder's first token is not the prompt's
    places = jnp.maximum(asked.step, 0) if encodes else asked.places[i % len(asked.places)]
    return run.of_rows(rows), hidden[rows, run.tile(places)]


def _predict(passes: tuple[ForwardPass, ...], hidden: tuple[Array, ...], asked: Asked, spec: DecodeSpec) -> Prediction:
    """What the members say about some tokens' places."""
    states: list[Array] = []
    own: list[Array] = []
    for i, run in enumerate(passes):
        vocab = spec.vocab if spec.union is None else spec.union.spellings[i].own.shape[0]
        of_rows, state = _at(run, hidden[i], i, asked)
        log_probs = of_rows.log_probs(state, vocab)
        if spec.union is not None:  # whole on every device, as in the loop
            log_probs = constrain(log_probs, "batch")
        states += jnp.split(state, run.members)
        own += jnp.split(log_probs, run.members)
    if spec.union is None:
        return Prediction(tuple(states), tuple(own), tuple(own))
    pairs = zip(own, spec.union.spellings, strict=True)
    return Prediction(tuple(states), tuple(own), tuple(to_union(k, *pair) for k, pair in enumerate(pairs)))


def _chosen(
    passes: tuple[ForwardPass, ...], hidden: tuple[Array, ...], asked: Asked, vocab: int
) -> Float[Array, "N K"]:
    """The log-probability of some tokens under each member."""
    columns: list[Array] = []
    for i, run in enumerate(passes):
        of_rows, state = _at(run, hidden[i], i, asked)
        columns += jnp.split(of_rows.chosen_log_probs(state, run.tile(asked.token), vocab), run.members)
    return jnp.stack(columns, axis=1)


T = TypeVar("T")


def _in_parts(function: Callable[[Any], T], tree: Any, width: int) -> T:
    """function(tree), of arrays with N first, for a number of them at a time of which each takes `width` numbers."""
    n = len(jax.tree.leaves(tree)[0])
    parts = -(-n // max(_ALIVE // width, 1))
    if parts == 1:
        return function(tree)
    size = -(-n // parts)

    def split(leaf: Array) -> Array:
        filled = jnp.pad(jnp.asarray(leaf), [(0, parts * size - n), *[(0, 0)] * (leaf.ndim - 1)])
        return filled.reshape(parts, size, *leaf.shape[1:])

    results = lax.map(function, jax.tree.map(split, tree))
    joined: T = jax.tree.map(lambda leaf: leaf.reshape(parts * size, *leaf.shape[2:])[:n], results)
    return joined


def _weights(
    passes: tuple[ForwardPass, ...],
    hidden: tuple[Array, ...],
    texts: Texts,
    by_member: Float[Array, "N K"] | None,
    stats: Float[Array, "N K 4"] | None,
    agreement: Float[Array, "N K K"] | None,
    policy_params: Any,
    spec: DecodeSpec,
) -> Float[Array, "N K"]:
    """The weights in force at each token: what the policy decides at the beginning of its span."""
    asked, answers, length = texts.asked, texts.answers, spec.span_length
    r, reads = len(answers.length), spec.policy.reads
    keys = jax.vmap(lambda pair: jax.random.fold_in(jax.random.key(0), pair))(answers.pair)
    if spec.decides_once:
        weights: Array = act(policy_params, Observation((), (), ()), keys, spec).weights[asked.answer]
        return weights
    prompt = _prompt_log_probs(passes, hidden, texts) if "prompt" in reads else ()
    k, span_log_probs, own = len(spec.members), None, None
    if by_member is not None:
        own = _kind(asked, spec).observed(by_member)
    if own is not None and stats is not None:
        span_log_probs = _last_span(own, texts, spec)
    tokens: Any = ()
    if own is not None and "so_far" in reads:  # the log-probabilities of every span's tokens
        tokens = jnp.zeros((spec.spans + 1, length, r, k))
        tokens = tokens.at[asked.step // length + 1, asked.step % length, asked.answer].set(own)[1:]

    def decide(so_far: SoFar, of_span: tuple[Array, Text | None, Any]) -> tuple[SoFar, Float[Array, "R K"]]:
        span, text, log_probs = of_span
        place = answers.first + jnp.minimum(span * length, jnp.maximum(answers.length - 1, 0))
        begins: Asked = jax.tree.map(lambda leaf: jnp.asarray(leaf)[place], asked)
        states: list[Array] = []
        if "hidden" in reads:
            for i, run in enumerate(passes):
                states += jnp.split(_at(run, hidden[i], i, begins)[1].astype(jnp.float32), run.members)
        observed: Any = ()
        if stats is not None and span_log_probs is not None:
            before = jnp.where(span == 0, 0.0, span_log_probs[span])
            observed = stats[place].at[..., STATS.index("span_log_prob")].set(before)
        observation = Observation(
            hidden=tuple(states),
            stats=observed,
            span=jnp.full((r,), span) if "span" in reads else (),
            prompt=prompt,
            text=() if spec.reader is None or text is None else spec.reader.read(text),
            agreement=() if agreement is None else agreement[place],
            so_far=so_far if "so_far" in reads else (),
        )
        weights: Array = act(policy_params, observation, action_keys(keys, jnp.full((r,), span)), spec).weights

        def write(i: Array, so_far: SoFar) -> SoFar:
            written = span * length + i < answers.length
            return so_far.and_token(log_probs[i], weights, i == 0, written)

        return lax.fori_loop(0, length, write, so_far) if "so_far" in reads else so_far, weights

    every_span = jnp.arange(spec.spans), _texts_at_spans(texts, spec), tokens
    weights_prk = lax.scan(decide, SoFar.nothing(r, k), every_span)[1]
    in_force: Array = weights_prk[asked.step // length, asked.answer]
    return in_force


def _last_span(own: Float[Array, "N K"], texts: Texts, spec: DecodeSpec) -> Float[Array, "P R K"]:
    """Of every answer the mean log-probability of the tokens of the span before each span.

    Args:
      own: of each token asked for, finite.
    """
    asked, length = texts.asked, spec.span_length
    sums = jnp.zeros((spec.spans + 1, len(texts.answers.length), own.shape[1]))
    return sums.at[asked.step // length + 1, asked.answer].add(own) / length


def _texts_at_spans(texts: Texts, spec: DecodeSpec) -> Text | None:
    """What an encoder sees of every answer at the beginning of every span, [P, R, C]; None where none reads."""
    reader, answers = spec.reader, texts.answers
    if reader is None or answers.seen is None:
        return None
    last = jnp.maximum(answers.length - 1, 0)

    def one(step: Array, text: Text) -> Text:
        token = jnp.asarray(texts.asked.token)[answers.first + jnp.minimum(step, last)]
        return reader.append(text, token, step < answers.length)

    def span(text: Text, p: Array) -> tuple[Text, Text]:
        return lax.fori_loop(p * spec.span_length, (p + 1) * spec.span_length, one, text), text

    before = jax.tree.map(jnp.asarray, answers.seen)
    seen: Text = lax.scan(span, before, jnp.arange(spec.spans))[1]
    return seen


def _prompt_log_probs(passes: tuple[ForwardPass, ...], hidden: tuple[Array, ...], texts: Texts) -> Float[Array, "R K"]:
    """`Observation.prompt` of every answer."""
    answers = texts.answers
    columns: list[Array] = []
    for i, run in enumerate(passes):
        ids, text, branch, _ = (jnp.asarray(part[i % len(texts.ids)]) for part in texts[:4])
        log_probs = run.model.target_log_probs(hidden[i][:, :-1], run.tile(ids)[:, 1:])
        of_prompt = (text[:, 1:] == text[:, :-1]) & (branch[:, 1:] == 0)
        for own in jnp.split(log_probs, run.members):
            totals = jnp.zeros(len(answers.text) + 1).at[text[:, 1:]].add(jnp.where(of_prompt, own, 0.0))
            columns.append(totals[answers.text])
    counts = jnp.maximum(answers.prompt_tokens - 1, 1).astype(jnp.float32)
    return jnp.stack(columns, axis=1) / counts[:, None]
