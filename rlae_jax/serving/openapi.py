"""The server described in OpenAPI, from the same tables by which bodies are read."""

from collections.abc import Mapping
from typing import Any

from rlae_jax.serving.api import Catalogue
from rlae_jax.serving.fields import CHAT, COMPLETION, Field
from rlae_jax.version import __version__


def _schema(fields: Mapping[str, Field]) -> dict[str, Any]:
    """Of an object with these fields; others are ignored."""
    properties = {}
    for name, field in fields.items():
        kind = field.kind.schema
        if field.required:
            properties[name] = kind | {"description": field.about}
        else:
            properties[name] = {"anyOf": [kind, {"type": "null"}], "description": field.about}
    required = [name for name, field in fields.items() if field.required]
    return {"type": "object", "properties": properties, "required": required}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


_WORD, _COUNT = {"type": "string"}, {"type": "integer"}
_NULL_OR_WORD = {"type": ["string", "null"]}
_USAGE = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
_ERROR = _object(error=_object(message=_WORD, type=_WORD, param=_NULL_OR_WORD, code=_NULL_OR_WORD))
_RLAE = {
    "type": "object",
    "description": "Where the request has an object rlae: the spans that begin in what is told with the members' "
    "weights and, with attribution, each token's log-probability under the fused distribution and under each member.",
    "properties": {
        "spans": {
            "type": "array",
            "items": _object(span=_COUNT, start=_COUNT, weights={"type": "array", "items": {"type": "number"}}),
        },
        "tokens": {
            "type": "array",
            "items": _object(
                text=_WORD,
                span=_COUNT,
                logprob={"type": ["number", "null"]},
                member_logprobs={"type": "array", "items": {"type": ["number", "null"]}},
            ),
        },
    },
}
_MODEL = _object(id=_WORD, object=_WORD, created=_COUNT, owned_by=_WORD, rlae={"type": "object"})


def _answer(**choice: Any) -> dict[str, Any]:
    one = _object(index=_COUNT, finish_reason=_NULL_OR_WORD, logprobs={"type": ["object", "null"]}, **choice)
    one["properties"]["rlae"] = _RLAE
    choices = {"type": "array", "items": one}
    return _object(id=_WORD, object=_WORD, created=_COUNT, model=_WORD, choices=choices, usage=_USAGE)


def _content(schema: dict[str, Any], kind: str = "application/json") -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def describe(catalogue: Catalogue) -> dict[str, Any]:
    """The document of /openapi.json."""
    errors = {
        "400": "What is wrong with the request, and with which field.",
        "401": "The API key is missing or wrong.",
        "404": "No such model.",
        "408": "The body did not arrive in time.",
        "413": "The body is too large.",
        "415": "The body is not declared to be JSON.",
        "429": "Too many wait already; Retry-After says when to come back.",
        "500": "The server failed.",
        "503": "The server is stopping.",
    }
    wrong = {status: {"description": about, **_content(_ref("Error"))} for status, about in errors.items()}

    def post(about: str, request: str, answer: str) -> dict[str, Any]:
        events = {"text/event-stream": {"schema": _WORD}}
        ok = {"description": "The answer, whole or as events.", "content": _content(_ref(answer))["content"] | events}
        body = {"required": True, **_content(_ref(request))}
        return {"post": {"summary": about, "requestBody": body, "responses": {"200": ok, **wrong}}}

    def get(
        about: str, schema: dict[str, Any], kind: str = "application/json", *known: str, **rest: Any
    ) -> dict[str, Any]:
        ok = {"description": about, **_content(schema, kind)}
        return {"get": {"summary": about, "responses": {"200": ok, **{s: wrong[s] for s in known}}, **rest}}

    first = next(iter(catalogue.models))
    name = {"name": "model", "in": "path", "required": True, "schema": _WORD, "example": first}
    models = _object(object=_WORD, data={"type": "array", "items": _ref("Model")})
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "rlae-jax",
            "version": __version__,
            "description": "Several language models write one answer together. The OpenAI API, and under `rlae` what "
            f"it has no words for: weights, policies, and who wrote what. Models: {', '.join(catalogue.models)}.",
        },
        "security": [{}, {"key": []}],
        "paths": {
            "/v1/models": get("The models.", models, "application/json", "401", "503"),
            "/v1/models/{model}": get(
                "One of the models.", _ref("Model"), "application/json", "401", "404", "503", parameters=[name]
            ),
            "/v1/completions": post("Continue a text.", "CompletionRequest", "Completion"),
            "/v1/chat/completions": post("Answer in a conversation.", "ChatRequest", "ChatCompletion"),
            "/health": get("Whether requests are taken.", _object(status=_WORD), "application/json", "503"),
            "/metrics": get("Figures for Prometheus.", _WORD, "text/plain"),
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "CompletionRequest": _schema(COMPLETION),
                "ChatRequest": _schema(CHAT),
                "Completion": _answer(text=_WORD),
                "ChatCompletion": _answer(message=_object(role=_WORD, content=_WORD, refusal=_NULL_OR_WORD)),
                "Model": _MODEL,
                "Error": _ERROR,
            },
        },
    }
