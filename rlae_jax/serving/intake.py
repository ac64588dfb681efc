"""What an engine may be asked: its policies, and requests checked and turned into the terms of its programs."""

import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlae_jax import ranges
from rlae_jax.errors import InputError
from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.menu import Menu
from rlae_jax.fusion.operators import Hidden
from rlae_jax.fusion.policy import BoundPolicy, Policy
from rlae_jax.fusion.prompts import Prompts, Row, check_seeds, pad_rows
from rlae_jax.fusion.reading import Text, TextReader, read_prompts
from rlae_jax.fusion.sampling import COLDEST, RowSampling, SamplingOptions
from rlae_jax.fusion.spec import DecodeSpec
from rlae_jax.fusion.state import RowOptions
from rlae_jax.fusion.weights import Weights, named_policy, normalise_weights, span_length_of
from rlae_jax.serving.requests import TOP, Checked, Request


class Intake:
    """An ensemble's requests.

    Args:
      context: the longest prompt and answer together, in tokens.
      policies: what requests may name as their weights.
      default: the weights of a request without any.

    Raises:
      InputError: policies that rows of one batch cannot follow.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        context: int,
        policies: Mapping[str, Weights],
        default: Sequence[float] | str | None,
    ):
        self.ensemble = ensemble
        self.context = context
        self.policies = {name: named_policy(weights) for name, weights in policies.items()}
        self.tokenising = threading.Lock()  # fast tokenizers are not for several threads at a time
        self.ragged = ensemble.codec.own_prompts(True)
        self._default = default
        self._reader: TextReader | None = None
        self._encoder: BoundPolicy | None = None
        of_policies = [self._bind(name, weights) for name, weights in self.policies.items()]
        self.policy_params = tuple(params for _, params, _, _ in of_policies)
        self.menu: Menu | None = None
        if of_policies:
            each, _, drawn, longest = zip(*of_policies, strict=True)
            self.menu = Menu(each, drawn, max(2, *longest))
        if default is not None:
            self._weights(default)

    def _bind(self, name: str, weights: Weights) -> tuple[Policy, Any, bool, int]:
        """A policy, its parameters, whether it is drawn from, and its longest span."""
        ensemble = self.ensemble
        if not isinstance(weights, BoundPolicy | Policy):
            raise InputError(f"policy {name!r}: expected a policy or a policy's name; give fixed weights with requests")
        if getattr(weights, "draws_members", False):
            raise InputError(f"policy {name!r} runs a member at a time, which an engine does not")
        if hasattr(getattr(weights, "policy", weights), "complement"):
            raise InputError(f"policy {name!r} adds logits of its own, which an engine does not")
        if getattr(weights, "params_per_row", False):
            raise InputError(f"policy {name!r} has parameters for every row; give fixed weights with requests")
        length = span_length_of(weights, None)
        policy, params, drawn = ensemble.bind(weights, 1, 1, length)
        if "text" in policy.reads:
            if not isinstance(weights, BoundPolicy) or weights.encoder is None:
                raise InputError(f"policy {name!r} reads the text and has no encoder; load it with load_policy")
            reader = ensemble.reader(weights.encoder)
            if self._reader not in (None, reader):
                raise InputError("policies that read the text through different encoders cannot be served together")
            self._reader, self._encoder = reader, weights
        return policy, params, drawn, max([length, *getattr(policy, "span_lengths", ())])

    def spec(self, steps: int) -> DecodeSpec:
        """Of the program that makes at most so many steps of all rows."""
        spec = self.ensemble.spec(
            SamplingOptions(max_new_tokens=steps, scores=True),
            policy=self.menu,
            sample_weights=self.menu is not None,
            reader=self._reader,
        )
        union = self.ensemble.codec.tables if self.ragged else None
        return dataclasses.replace(spec, top=min(TOP, spec.vocab), union=union)

    def check(self, request: Request) -> Checked:
        """A request in the engine's terms.

        Raises:
          InputError: what cannot be answered, and why.
        """
        ensemble, options = self.ensemble, request.options
        options.check()
        stop = ensemble._check_stop(options.stop)
        ranges.check(request)
        seed = int(check_seeds(options.seed, 1))
        policy, weights = self._weights(self._default if request.weights is None else request.weights)
        followed = list(self.policies.values())[policy] if policy >= 0 else None
        length = span_length_of(followed, options.span_length)
        if followed is not None:
            ensemble.bind(followed, 1, -(-options.max_new_tokens // length), options.span_length)
        with self.tokenising:
            row, text = self._encode(request)
            of_encoder = None if self._reader is None else self._read_text(text)
        ids: tuple[Sequence[int], ...] = (row,) if isinstance(row[0], int | np.integer) else tuple(row)
        if self.ragged and len(ids) == 1:
            ids = ids * len(ensemble.members)
        longest = max(map(len, ids))
        if longest + options.max_new_tokens > self.context:
            left = self.context - longest
            way_out = f"there is room for {left} more" if left > 0 else "shorten the prompt"
            raise InputError(
                f"too long: the context is {self.context} tokens, the prompt has {longest} and max_new_tokens is "
                f"{options.max_new_tokens}; {way_out}"
            )
        room = ensemble.codec.room(options.max_new_tokens) if options.member_tokens is None else options.member_tokens
        special = ensemble.codec.special_tokens if stop else {}
        return Checked(
            row=row,
            ids=ids,
            options=_row_options(options, policy, length, (2 if request.top else 1) if options.scores else 0),
            weights=weights,
            limit=options.max_new_tokens,
            room=min(room, self.context - longest),
            seed=seed,
            stop=stop,
            stop_ids=frozenset(i for i, name in special.items() if name in stop),
            text=of_encoder,
        )

    def weights_of(self, request: Request) -> Weights:
        """A request's weights, or the policy that it follows, as `Ensemble.generate` takes them."""
        named = self._default if request.weights is None else request.weights
        number, fixed = self._weights(named)
        return list(self.policies.values())[number] if number >= 0 else fixed[0]

    def room(self, request: Request) -> int:
        """See `Engine.room`."""
        with self.tokenising:
            row, _ = self._encode(request)
        longest = self.context - max(self.ensemble.lengths([row]))
        return max(min(longest, self.longest(request)), 1)

    def longest(self, request: Request) -> int:
        """See `Engine.longest`."""
        policy = self.weights_of(request)
        if isinstance(policy, BoundPolicy) and "span" in policy.policy.reads:
            return min(policy.dims.spans * policy.span_length, self.context)
        return self.context

    def stand_in(self, tokens: int) -> Checked:
        """A request of so many tokens, for what needs one to be compiled."""
        rows = [[0] * tokens] * len(self.ensemble.members)
        ids = tuple(rows if self.ragged else rows[:1])
        text = None if self._reader is None else self._read_text("")
        options = _row_options(SamplingOptions(), -1, 1, 0)
        return Checked(ids[0], ids, options, self._weights(None)[1], 1, 1, 0, (), frozenset(), text)

    def prompts(self, checked: Checked, width: int) -> Prompts:
        """A batch of one row, of this width and without a key."""
        ids, mask = zip(*(pad_rows([own], width) for own in checked.ids), strict=True)
        active: Any = np.ones(1, bool)
        limits: Any = np.array([checked.limit], np.int32)
        return Prompts(ids, mask, None, active, limits, text=checked.text)

    def _encode(self, request: Request) -> tuple[Row, str]:
        """A prompt's ids, and its text as far as a policy reads it."""
        ensemble = self.ensemble
        if isinstance(request.prompt, str):
            return ensemble.encode([request.prompt], chat=request.options.chat)[0], request.prompt
        prompt: list[Any] = list(request.prompt)
        if not prompt:
            raise InputError("the prompt is empty: give at least one token or message")
        if all(isinstance(part, Mapping) for part in prompt):
            return ensemble.encode_chat(prompt), str(prompt[-1].get("content", ""))
        if not all(isinstance(i, int | np.integer) and not isinstance(i, bool) for i in prompt):
            raise InputError("a prompt is a text, a list of ids or a list of messages")
        if ensemble.union is not None:
            raise InputError("the members have different tokenizers: give the prompt as text")
        ids = [int(i) for i in prompt]
        ensemble.codec.check_ids([ids])
        return ids, ensemble.tokenizer.decode(ids) if self._reader is not None else ""

    def _read_text(self, prompt: str) -> Text:
        assert self._reader is not None
        assert self._encoder is not None
        assert self._encoder.encoder is not None
        return read_prompts([prompt], self._encoder.encoder, self._reader, self._encoder.text_tokens)

    def _weights(self, weights: Sequence[float] | str | None) -> tuple[int, np.ndarray]:
        """The number of a policy, -1 without one, and fixed weights [1, K]."""
        k = len(self.ensemble.members)
        if weights is None or isinstance(weights, str):
            if weights is not None and weights not in self.policies:
                raise InputError(f"policy {weights!r} is unknown here; known: {', '.join(self.policies) or 'none'}")
            number = -1 if weights is None else list(self.policies).index(weights)
            return number, np.full((1, k), 1 / k, np.float32)
        given = isinstance(self.ensemble.fusion, Hidden)
        return -1, np.asarray(normalise_weights(weights, 1, k, given=given), np.float32)


def _row_options(options: SamplingOptions, policy: int, span_length: int, told: int) -> RowOptions:
    def number(value: Any, dtype: Any = np.int32) -> Any:
        return np.asarray([value], dtype)

    return RowOptions(
        sampling=RowSampling(
            temperature=number(0 if options.temperature < COLDEST else options.temperature, np.float32),
            top_k=number(options.top_k),
            top_p=number(options.top_p, np.float32),
            min_p=number(options.min_p, np.float32),
            repetition_penalty=number(options.repetition_penalty, np.float32),
        ),
        min_new_tokens=number(options.min_new_tokens),
        ignore_eos=number(options.ignore_eos, bool),
        told=number(told),
        span_length=number(span_length),
        policy=number(policy),
        steps=number(0),
        spans=number(0),
    )
