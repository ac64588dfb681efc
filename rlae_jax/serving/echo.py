"""How likely the tokens of given prompts are, for `echo` with `logprobs`: each is read once, whole."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlae_jax.fusion.ensemble import Ensemble
from rlae_jax.fusion.prompts import Row
from rlae_jax.serving.answers import Scored, TokenText
from rlae_jax.serving.engine import Engine
from rlae_jax.serving.requests import Request


def prompt_text(prompt: Any, bytes_of: TokenText) -> str:
    """A prompt as a text: itself, or what its ids stand for."""
    if isinstance(prompt, str):
        return prompt
    return b"".join(map(bytes_of, prompt)).decode(errors="replace")


def score_prompts(engine: Engine, requests: Sequence[Request]) -> list[Scored]:
    """The scores of requests' prompts, which are alike in everything else.

    Raises:
      InputError: what cannot be read.
    """
    ensemble, first = engine.ensemble, requests[0]
    weights = engine.weights_of(first)
    rows, tokens = zip(*(_split(ensemble, request.prompt) for request in requests), strict=True)
    found = ensemble.score_tokens(rows, tokens, weights, first.options.span_length, top=first.top)
    scored = []
    for row, rest, one in zip(rows, tokens, found, strict=True):
        given = _entries(ensemble, row)
        best = [
            dict(zip(ids.tolist(), scores.tolist(), strict=True))
            for ids, scores in zip(one.top_tokens, one.top, strict=True)
        ]
        nothing = [None] * len(given)
        scored.append(Scored([*given, *rest], [*nothing, *one.fused.tolist()], [*nothing, *best]))
    return scored


def _split(ensemble: Ensemble, prompt: Any) -> tuple[Row, list[int]]:
    """A prompt's beginning, which must be given, and the tokens after it."""
    if isinstance(prompt, str):
        return ensemble.split_text(prompt)
    return list(prompt[:1]), list(prompt[1:])


def _entries(ensemble: Ensemble, row: Row) -> list[int]:
    """A row in the tokens that texts are written in: ids, or entries of the union, of which some ids have none."""
    if isinstance(row[0], int | np.integer):
        return [int(i) for i in row]
    if ensemble.union is None:
        return list(row[0])
    return [e for i in row[0] if (e := int(ensemble.union.own[0][i])) >= 0]
