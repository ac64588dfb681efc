"""Requests in the engine's terms: from checked fields to models, weights and options.

bytes ─read_json─► object ─read_completion, read_chat─► Call(requests for the engine, what the answer is to tell)
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlae_jax.errors import InputError
from rlae_jax.fusion.operators import FusionOperator, get_operator
from rlae_jax.fusion.sampling import SamplingOptions
from rlae_jax.fusion.weights import Weights, span_length_of
from rlae_jax.serving.engine import Engine
from rlae_jax.serving.fields import (
    CHAT,
    COMPLETION,
    INT32,
    MOST_CHOICES,
    RLAE,
    STREAM_OPTIONS,
    ApiError,
    read_fields,
    refuse,
    shown,
)
from rlae_jax.serving.requests import Request

GREEDY_BELOW = 1e-5  # a temperature whose quotients would leave float32


@dataclasses.dataclass(frozen=True)
class Model:
    """What clients name: the ensemble, a member (the ensemble under a one-hot weight), or a policy."""

    name: str
    kind: str  # "ensemble" | "member" | "policy"
    weights: tuple[float, ...] | str | None  # of an engine's request
    span_length: int | None  # L; None where the policy chooses it


@dataclasses.dataclass(frozen=True)
class Catalogue:
    """What a server offers, and what is told of it."""

    models: dict[str, Model]  # the ensemble first
    members: tuple[str, ...]
    fusion: FusionOperator
    fusion_name: str
    policies: Mapping[str, Weights]
    context: int
    chat: bool  # whether there is a chat template
    created: int

    @classmethod
    def create(
        cls, engine: Engine, *, name: str, fusion: str, policies: Mapping[str, Weights], created: int
    ) -> "Catalogue":
        """Of an engine with these policies. Names that are taken get a number."""
        ensemble = engine.ensemble
        k = len(ensemble.members)
        taken: dict[str, Model] = {}

        def offer(wanted: str, kind: str, weights: tuple[float, ...] | str | None, span_length: int | None) -> str:
            numbered = (wanted if i == 1 else f"{wanted}-{i}" for i in range(1, len(taken) + 2))
            free = next(one for one in numbered if one not in taken)
            taken[free] = Model(free, kind, weights, span_length)
            return free

        offer(name, "ensemble", None, span_length_of(None, None))
        members = tuple(
            offer(lm.name, "member", tuple(np.eye(k)[i].tolist()), span_length_of(None, None))
            for i, lm in enumerate(ensemble.members)
        )
        for policy, weights in policies.items():
            offer(policy, "policy", policy, _fixed_span_length(weights))
        template = any(getattr(lm.tokenizer, "chat_template", None) for lm in ensemble.members)
        return cls(taken, members, ensemble.fusion, fusion, policies, engine.context, template, created)

    def described(self, model: Model) -> dict[str, Any]:
        """An entry of /v1/models."""
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "rlae-jax",
            "rlae": {
                "kind": model.kind,
                "members": list(self.members),
                "fusion": self.fusion_name,
                "span_length": model.span_length,
                "context": self.context,
                "chat": self.chat,
            },
        }

    def find(self, name: str) -> Model:
        """Raises an `ApiError` for an unknown model."""
        if name not in self.models:
            known = ", ".join(self.models)
            message = f"the model {shown(name)} does not exist; there are {known}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self.models[name]


def _fixed_span_length(weights: Weights) -> int | None:
    """L of a policy; None where it chooses the length itself."""
    chooses = len(getattr(getattr(weights, "policy", weights), "span_lengths", ())) > 1
    return None if chooses else span_length_of(weights, None)


_NAMES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """A request that has been read: what the engine is to run, and what the answer is to have in it."""

    model: Model
    chat: bool
    requests: tuple[Request, ...]  # one per prompt, each of `samples` samples
    samples: int
    longest: int | None  # tokens of an answer; None is what the context has room for, 0 that nothing is written
    span_length: int | None
    stream: bool
    usage: bool  # whether a stream ends with a count
    echo: bool
    logprobs: bool
    top: int
    rlae: bool
    attribution: bool

    @property
    def prefix(self) -> str:
        return "chatcmpl-" if self.chat else "cmpl-"

    def error(self, error: InputError) -> ApiError:
        """What the engine says of a request, in the API's names."""
        text = str(error)
        for ours, theirs in _NAMES.items():
            text = text.replace(ours, theirs)
        code = "context_length_exceeded" if text.startswith("too long") else None
        return ApiError(400, text, param="messages" if self.chat else "prompt" if code else None, code=code)


def read_completion(body: Mapping[str, Any], catalogue: Catalogue, timeout: float | None = None) -> Call:
    """A body of /v1/completions.

    Args:
      timeout: seconds after which an answer ends, given to the engine.

    Raises:
      ApiError: what is wrong, with the field's name.
    """
    refuse(body)
    fields = read_fields(body, COMPLETION)
    if (fields["best_of"] or 1) > fields["n"]:
        raise ApiError(400, f"best_of must be at most n, {fields['n']}: what is written is returned", param="best_of")
    if fields["max_tokens"] == 0 and not fields["echo"]:
        raise ApiError(400, "max_tokens must be at least 1, or 0 with echo", param="max_tokens")
    logprobs = fields["logprobs"] is not None
    return _call(
        fields,
        catalogue,
        timeout,
        chat=False,
        prompts=fields["prompt"],
        longest=fields["max_tokens"],
        echo=fields["echo"],
        logprobs=logprobs,
        top=fields["logprobs"] if logprobs else 0,
    )


def read_chat(body: Mapping[str, Any], catalogue: Catalogue, timeout: float | None = None) -> Call:
    """A body of /v1/chat/completions; see `read_completion`."""
    refuse(body)
    fields = read_fields(body, CHAT)
    if fields["top_logprobs"] and not fields["logprobs"]:
        raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
    if not catalogue.chat:
        raise ApiError(400, "the models have no chat template; use /v1/completions", param="messages")
    return _call(
        fields,
        catalogue,
        timeout,
        chat=True,
        prompts=[fields["messages"]],
        longest=fields["max_completion_tokens"] or fields["max_tokens"],
        echo=False,
        logprobs=fields["logprobs"],
        top=fields["top_logprobs"],
    )


def _call(
    fields: Mapping[str, Any],
    catalogue: Catalogue,
    timeout: float | None,
    *,
    chat: bool,
    prompts: Sequence[Any],
    longest: int | None,
    echo: bool,
    logprobs: bool,
    top: int,
) -> Call:
    """What both endpoints have in common."""
    model = catalogue.find(fields["model"])
    rlae = read_fields(fields["rlae"] or {}, RLAE, "rlae.", closed=True)
    weights, span_length = _weights(model, rlae, catalogue)
    name = "max_completion_tokens" if chat else "max_tokens"
    if longest is not None and longest >= catalogue.context:
        message = f"{name} is {longest}, and the context has {catalogue.context} tokens, the prompt's among them"
        raise ApiError(400, message, param=name, code="context_length_exceeded")
    if longest is not None and fields["min_tokens"] > max(longest, 1):
        raise ApiError(400, f"min_tokens must be at most {name}, {longest}", param="min_tokens")
    if fields["n"] * len(prompts) > MOST_CHOICES:
        message = f"n is {fields['n']} for {len(prompts)} prompts; a request has at most {MOST_CHOICES} answers"
        raise ApiError(400, message, param="n")
    temperature = fields["temperature"]
    options = SamplingOptions(
        max_new_tokens=max(fields["min_tokens"] if longest is None else longest, 1),
        min_new_tokens=fields["min_tokens"],
        span_length=rlae["span_length"],
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_k=max(fields["top_k"], 0),
        top_p=fields["top_p"],
        min_p=fields["min_p"],
        repetition_penalty=fields["repetition_penalty"],
        samples=fields["n"],
        seed=secrets.randbits(31) if fields["seed"] is None else fields["seed"] % (INT32 + 1),
        stop=fields["stop"],
        # After one token it is over anyway, and so an end token is told, too: who reads echoed scores leaves one out.
        ignore_eos=fields["ignore_eos"] or (logprobs and longest == 1),
        scores=logprobs or rlae["attribution"],
    )
    return Call(
        model=model,
        chat=chat,
        requests=tuple(
            Request(prompt=prompt, weights=weights, options=options, top=top, timeout=timeout) for prompt in prompts
        ),
        samples=fields["n"],
        longest=longest,
        span_length=span_length,
        stream=fields["stream"],
        usage=read_fields(fields["stream_options"], STREAM_OPTIONS, "stream_options.")["include_usage"],
        echo=echo,
        logprobs=logprobs,
        top=top,
        rlae=fields["rlae"] is not None,
        attribution=rlae["attribution"],
    )


def _weights(
    model: Model, rlae: Mapping[str, Any], catalogue: Catalogue
) -> tuple[tuple[float, ...] | str | None, int | None]:
    """What sets the weights, and L, which is None where that chooses it."""
    weights, policy, fusion = rlae["weights"], rlae["policy"], rlae["fusion"]
    if fusion is not None:
        _check_fusion(fusion, catalogue)
    given = [name for name in ("weights", "policy") if rlae[name] is not None]
    if len(given) == 2:
        raise ApiError(400, "give either rlae.weights or rlae.policy, not both", param="rlae.policy")
    if given and model.kind != "ensemble":
        ensemble = next(iter(catalogue.models))
        message = f"the model {model.name} has weights of its own; rlae.{given[0]} goes with the model {ensemble}"
        raise ApiError(400, message, param=f"rlae.{given[0]}")
    if weights is not None and len(weights) != len(catalogue.members):
        names = ", ".join(catalogue.members)
        message = f"rlae.weights has {len(weights)} numbers; there are {len(catalogue.members)} members: {names}"
        raise ApiError(400, message, param="rlae.weights")
    if policy is not None and policy not in catalogue.policies:
        known = ", ".join(catalogue.policies) or "none; start the server with --policy"
        raise ApiError(400, f"the policy {shown(policy)} does not exist; there are {known}", param="rlae.policy")
    own = model.span_length if policy is None else _fixed_span_length(catalogue.policies[policy])
    used = weights or policy or model.weights
    return used, own if rlae["span_length"] is None else rlae["span_length"]


def _check_fusion(fusion: str, catalogue: Catalogue) -> None:
    """Raises an `ApiError` for another operator than the server's."""
    try:
        same = get_operator(fusion, len(catalogue.members)) == catalogue.fusion
    except InputError as error:
        raise ApiError(400, str(error), param="rlae.fusion") from None
    if not same:
        message = f"this server fuses by {catalogue.fusion_name}, and a server has one operator; leave rlae.fusion out"
        raise ApiError(400, message, param="rlae.fusion")
