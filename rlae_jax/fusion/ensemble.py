"""`Ensemble`: the host's side of decoding. Text or ids and weights in, texts and what was decided out.

Checks everything a user can get wrong, pads the batch into buckets so that programs are reused, calls the compiled
loop once, and turns ids into text.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlae_jax.errors import InputError, grouped_error
from rlae_jax.fusion import decode as decoding
from rlae_jax.fusion.operators import FusionOperator, get_operator
from rlae_jax.fusion.policy import BoundPolicy, Confidence, Dims, Fixed, Policy
from rlae_jax.fusion.sampling import Sampling
from rlae_jax.models import LM, Adapter, lora
from rlae_jax.models.lm import AdapterChoice, load_adapters

SMALLEST_PROMPT_BUCKET = 16
DEFAULT_SPAN_LENGTH = 4

Weights = Sequence[float] | Sequence[Sequence[float]] | np.ndarray | Array | Policy | BoundPolicy | None


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `Ensemble.generate` returns, one entry per prompt."""

    decoded: list[str] | None  # None without a tokenizer; read `texts`
    tokens: list[list[int]]  # the first member's ids, end token excluded
    weights: Float[np.ndarray, "B P K"]  # used in each span; NaN after a row's end
    finish_reasons: list[str]  # "stop" | "length"
    steps: list[int]  # fused steps, the one that chose the end token included

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


def normalise_weights(weights: Any, batch: int, members: int) -> Float[np.ndarray, "B K"]:
    """Checks [K] or [B, K] weights and scales each row to sum to 1.

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
    return rows / rows.sum(axis=1, keepdims=True)


def check_same_tokenizer(members: Sequence[LM]) -> None:
    """Raises an `InputError` unless all members read and write the same ids."""
    first = members[0]
    for other in members[1:]:
        if (first.tokenizer is None) != (other.tokenizer is None):
            raise InputError(f"{first.name} and {other.name}: one has a tokenizer and the other has none")
        if first.tokenizer is None:
            if first.config.vocab != other.config.vocab:
                raise InputError(
                    f"{first.name} and {other.name} have no tokenizers and differ in vocabulary "
                    f"({first.config.vocab} and {other.config.vocab}): this fusion needs one tokenizer"
                )
            continue
        ours, theirs = first.tokenizer.get_vocab(), other.tokenizer.get_vocab()
        differing = [
            f"{token!r} is {ours.get(token, 'absent')} and {theirs.get(token, 'absent')}"
            for token in sorted(ours.keys() | theirs.keys())
            if ours.get(token) != theirs.get(token)
        ]
        if differing:
            raise grouped_error(
                f"{first.name} and {other.name} have different tokenizers; this fusion needs one tokenizer",
                [("tokens with different ids", token) for token in differing],
            )


@jax.jit
def _decode(
    params: Any, ids: Array, mask: Array, policy_params: Any, seed: Array, spec: decoding.DecodeSpec, active: Array
) -> decoding.DecodeState:
    key = jax.random.key(seed) if seed.ndim == 0 else jax.vmap(jax.random.key)(seed)
    state = decoding.decode(params, ids, mask, policy_params, key, spec, active)
    # Returned caches would be copied out of the loop for nobody, and keys have no host form.
    return state._replace(caches=(), row_keys=())


class Ensemble:
    """K language models that write one text together.

    Args:
      members: at least one LM; all with the same tokenizer.
      fusion: a name in `rlae_jax.fusion.operators.OPERATORS`, or a pure function like the ones there.
      end_ids: ids that end a text; by default every member's own.

    Raises:
      InputError: no members, tokenizers that differ, an unknown operator.
    """

    def __init__(
        self, members: Sequence[LM], fusion: str | FusionOperator = "linear", *, end_ids: Sequence[int] | None = None
    ):
        if isinstance(members, LM):
            raise InputError("members must be a list; put a single model in a list")
        if not members:
            raise InputError("an ensemble needs at least one member")
        check_same_tokenizer(members)
        self.members = tuple(members)
        self.shared: lora.Stack | None = None  # the members' adapters, where they are all of one base
        self.fusion = get_operator(fusion)
        ids = [i for lm in members for i in lm.config.end_ids] if end_ids is None else end_ids
        self.end_ids = tuple(sorted(set(ids)))
        vocab = min(lm.config.usable_vocab for lm in members)
        outside = [i for i in self.end_ids if not 0 <= i < vocab]
        if outside and end_ids is not None:
            raise InputError(f"end_ids {outside} lie outside the vocabulary of {vocab}")

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
        ensemble = cls([lm.with_adapters([adapter]) for adapter in loaded], fusion, end_ids=end_ids)
        ensemble.shared = lora.stack(loaded)
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
        ignore_eos: bool = False,
        sample_weights: bool = False,
        record: bool = False,
    ) -> decoding.DecodeSpec:
        """The `DecodeSpec` of this ensemble; see `generate` for the options.

        Raises:
          InputError: an option outside its range.
        """
        if span_length < 1 or max_new_tokens < 1:
            raise InputError(
                f"span_length and max_new_tokens must be at least 1, not {span_length} and {max_new_tokens}"
            )
        if not 0 <= min_new_tokens <= max_new_tokens:
            raise InputError(f"min_new_tokens must be between 0 and max_new_tokens, not {min_new_tokens}")
        return decoding.DecodeSpec(
            sampling=Sampling.create(temperature, top_k, top_p),
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
        )

    def encode(self, prompts: Sequence[str], *, chat: bool = False) -> list[list[int]]:
        """Token ids of each prompt; `chat` puts each into the tokenizer's chat template as a user's message.

        Raises:
          InputError: no prompts, a single string, an empty prompt, no chat template.
        """
        if isinstance(prompts, str):
            raise InputError("prompts must be a list of strings; put a single prompt in a list")
        if not len(prompts):
            raise InputError("no prompts: give at least one")
        if chat:
            if not getattr(self.tokenizer, "chat_template", None):
                raise InputError(f"{self.members[0].name} has no chat template; use chat=False")
            messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
            ids = [
                self.tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True)["input_ids"]
                for m in messages
            ]
        else:
            ids = self.tokenizer(list(prompts))["input_ids"]
        empty = [("empty prompts", f"prompt {b}") for b, row in enumerate(ids) if not row]
        if empty:
            raise grouped_error("prompts without a single token", empty, "each prompt needs at least one token")
        return ids

    @property
    def continues(self) -> bool:
        """Whether an answer continues its prompt; an encoder-decoder's is a text of its own."""
        return self.members[0].config.encoder is None

    def decode(self, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row's tokens.

        Raises:
          InputError: the members have no tokenizer.
        """
        return decode_texts(self.tokenizer, prompts if self.continues else [()] * len(tokens), tokens)

    def _cover(self, prompt: Sequence[int], tokens: list[int], text: str) -> list[int]:
        """The fewest tokens whose text holds `text`."""
        for n in range(len(tokens)):
            if self.decode([prompt], [tokens[:n]])[0].startswith(text):
                return tokens[:n]
        return tokens

    def check_ids(self, rows: Sequence[Sequence[int]]) -> None:
        """Raises an `InputError` for ids that some member's embedding does not have: a lookup would clamp them."""
        vocab = min(lm.config.vocab for lm in self.members)
        outside = [
            ("ids", f"prompt {b} has {i}")
            for b, row in enumerate(rows)
            if min(row) < 0 or max(row) >= vocab
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

    def check_lengths(self, lengths: Sequence[int], max_new_tokens: int) -> None:
        """Raises an `InputError` for prompts that do not fit the context together with the answer."""
        long = [("prompts", f"prompt {b} has {n}") for b, n in enumerate(lengths) if n + max_new_tokens > self.context]
        if long:
            raise grouped_error(
                f"too long: the context is {self.context} tokens, of which max_new_tokens takes {max_new_tokens}",
                long,
                f"prompts of at most {max(self.context - max_new_tokens, 0)} tokens fit",
            )

    def bind(self, weights: Weights, batch: int, spans: int) -> tuple[Policy, Any, bool]:
        """(policy, its parameters for this batch, whether to sample) for any of `generate`'s weights.

        Raises:
          InputError: weights of a wrong shape or value, a policy trained for other members.
        """
        if isinstance(weights, BoundPolicy):
            if weights.dims.widths != self.widths:
                raise InputError(
                    f"the policy was trained for members of width {list(weights.dims.widths)}; "
                    f"these have {list(self.widths)}"
                )
            return weights.policy, weights.params, weights.sample
        if weights is None:
            return Fixed(), np.full((batch, len(self.members)), 1 / len(self.members), np.float32), False
        if isinstance(weights, Policy):
            return weights, weights.init(jax.random.key(0), Dims(self.widths, spans)), False
        return Fixed(), normalise_weights(weights, batch, len(self.members)), False

    def generate(
        self,
        prompts: Sequence[str] | None = None,
        weights: Weights = None,
        span_length: int | None = None,
        max_new_tokens: int = 64,
        min_new_tokens: int = 0,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] | Int[Array, "B"] = 0,
        stop: Sequence[str] = (),
        chat: bool = False,
        ignore_eos: bool = False,
        *,
        prompt_ids: Int[Array, "B T"] | None = None,
        prompt_mask: Array | None = None,
        adapters: AdapterChoice = None,
    ) -> Generation:
        """Writes one answer per prompt.

        Args:
          prompts: texts; or give `prompt_ids` and `prompt_mask` (1 where there is a token, padding on either side).
          weights: None (uniform), [K], Float[B, K] (each row is scaled to sum to 1), or a policy.
          span_length: L, the steps for which weights are held; by default the trained policy's own, else 4.
          temperature: 0 is greedy. Then `top_k` (0: no limit) and `top_p` (1: no limit) apply, in that order.
          min_new_tokens: no end token before this many.
          seed: row b draws from fold_in(key(seed), b); or one seed per row.
          stop: strings that end an answer; the text is cut before the first of them.
          chat: put each prompt into the tokenizer's chat template.
          ignore_eos: write max_new_tokens whatever is chosen.
          adapters: for members with several adapters (`LM.with_adapters`), each row's by number or name, or weights
            Float[B, M] of a sum of adapters.

        Raises:
          InputError: unusable prompts, weights or options, told before anything is compiled.
        """
        if (prompts is None) == (prompt_ids is None):
            raise InputError("give either prompts or prompt_ids")
        stop = self.check_stop(stop)
        rows = _rows(prompt_ids, prompt_mask) if prompts is None else self.encode(prompts, chat=chat)
        self.check_ids(rows)
        self.check_lengths([len(row) for row in rows], max_new_tokens)
        if isinstance(weights, BoundPolicy):
            span_length = weights.span_length if span_length is None else span_length
        elif isinstance(weights, Confidence):
            span_length = 1 if span_length is None else span_length
        span_length = DEFAULT_SPAN_LENGTH if span_length is None else span_length

        batch = len(rows)
        spec = self.spec(
            span_length=span_length,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            ignore_eos=ignore_eos,
        )
        policy, policy_params, sample = self.bind(weights, batch, spec.spans)
        spec = dataclasses.replace(spec, policy=policy, sample_weights=sample)
        state = self.run(rows, policy_params, seed, spec, self.params_for(adapters, batch))
        return self._collect(rows, state, spec, stop)

    def run(
        self,
        rows: Sequence[Sequence[int]],
        policy_params: Any,
        seed: Any,
        spec: decoding.DecodeSpec,
        params: tuple[Any, ...] | None = None,
    ) -> decoding.DecodeState:
        """Decodes rows of ids under a spec: pads them into a bucket, calls the compiled loop, cuts the filling off.

        Args:
          params: from `params_for`; by default `params`.

        Returns a state of host arrays without caches.

        Raises:
          InputError: seeds that are neither one integer nor one per row.
        """
        batch = len(rows)
        ids, mask = pad_rows(rows, bucket(max(map(len, rows)), SMALLEST_PROMPT_BUCKET))
        filling = bucket(batch) - batch
        ids, mask = (np.concatenate([array, np.repeat(array[:1], filling, axis=0)]) for array in (ids, mask))
        seed = _seeds(seed, batch)
        if seed.ndim:
            seed = np.concatenate([seed, np.zeros(filling, np.uint32)])
        if isinstance(spec.policy, Fixed) and policy_params.shape[0] == batch:
            policy_params = np.concatenate([policy_params, np.repeat(policy_params[:1], filling, axis=0)])
        active = np.arange(batch + filling) < batch
        params = self.params if params is None else params
        if self.shared is None:
            params = tuple(_fill(p, batch, filling) for p in params)
        state = jax.device_get(_decode(params, ids, mask, policy_params, seed, spec, active))
        rows_first = state._replace(
            span=jax.tree.map(lambda leaf: leaf[:batch], state.span),
            trajectory=jax.tree.map(lambda leaf: leaf[:, :batch], state.trajectory),
        )
        return rows_first._replace(
            **{
                name: getattr(state, name)[:batch]
                for name in ("pending", "lengths", "starts", "done", "ended", "steps", "tokens")
            }
        )

    def _collect(
        self,
        rows: Sequence[Sequence[int]],
        state: decoding.DecodeState,
        spec: decoding.DecodeSpec,
        stop: Sequence[str],
    ) -> Generation:
        tokens = [state.tokens[b, : state.steps[b] - int(state.ended[b])].tolist() for b in range(len(rows))]
        first_steps = np.arange(spec.spans) * spec.span_length
        used_bp = first_steps[None] < state.steps[:, None]
        weights = np.where(used_bp[..., None], np.swapaxes(state.trajectory.weights, 0, 1), np.nan)
        reasons = ["stop" if ended else "length" for ended in state.ended]
        texts = None
        if self.members[0].tokenizer is not None:
            texts = self.decode(rows, tokens)
            if stop:
                for b, text in enumerate(texts):
                    cuts = [text.index(s) for s in stop if s in text]
                    if cuts:
                        texts[b], reasons[b] = text[: min(cuts)], "stop"
                        tokens[b] = self._cover(rows[b], tokens[b], texts[b])
        return Generation(texts, tokens, weights, reasons, state.steps.tolist())


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
