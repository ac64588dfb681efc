"""The fields of requests' bodies, as tables: what each may hold, and what is wrong where it holds something else.

A field's kind says what fits in words, as a JSON schema and as a function; reading a body and describing it
(`openapi.py`) both go by the tables. Unknown fields are ignored, as the API does; under `rlae`, which is ours, they are
told, and so are known ones that would change an answer and that the engine cannot do (`REFUSED`).
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from rlae_jax.errors import shortened

MOST_PROMPTS, MOST_SAMPLES, MOST_CHOICES, MOST_TOP = 2048, 128, 4096, 20
MOST_STOPS, LONGEST_STOP = 16, 256  # every text that is written is compared with their beginnings
COMPLETION_TOKENS = 16  # the API's own default
INT32, INT64 = 2**31 - 1, 2**63 - 1


class ApiError(Exception):
    """What is wrong with a request, or with the server, as a client of the API is told it.

    Args:
      status: of HTTP.
      param: the field.
      code: what programs read.
      retry_after: seconds after which it may go better.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    def body(self) -> dict[str, Any]:
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
        kind = "server_error" if self.status >= 500 else kind
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a field may hold: in words ("a whole number from 0 to 20"), as a JSON schema, and as a function that gives
    the value that is meant, or raises."""

    says: str
    schema: dict[str, Any]
    read: Callable[[Any], Any]


class Field(NamedTuple):
    """A field of a body: null is as good as not there."""

    kind: Kind
    about: str
    default: Any = None
    required: bool = False


class _Misfit(ValueError):
    """A value that does not fit its field; with a text, what is wrong in it."""


def _accept(fits: bool, value: Any) -> Any:
    if not fits:
        raise _Misfit
    return value


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON makes no difference between 1 and 1.0."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def _is_text(value: Any) -> bool:
    """Whether it is a string without halves of characters, which JSON can spell and UTF-8 cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _list_of(fits: Callable[[Any], bool], value: Any, most: int | None = None) -> bool:
    return isinstance(value, list) and 0 < len(value) <= (most or len(value)) and all(map(fits, value))


def whole(low: int, high: int) -> Kind:
    limit = f"at least {low}" if high >= INT32 else f"from {low} to {high}"
    return Kind(
        f"a whole number {limit}",
        {"type": "integer", "minimum": low, "maximum": high},
        lambda value: int(_accept(_is_whole(value) and low <= value <= high, value)),
    )


def number(low: float, high: float, *, above: bool = False) -> Kind:
    """From `low`, or with `above` from beyond it, to `high`."""

    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return Kind(
        f"a number above {low:g} and at most {high:g}" if above else f"a number from {low:g} to {high:g}",
        {"type": "number", "exclusiveMinimum" if above else "minimum": low, "maximum": high},
        lambda value: float(_accept(fits(value) and not (above and value == low), value)),
    )


def _read_prompts(value: Any) -> list[str | list[int]]:
    """One prompt or several, each a text or ids, as a list."""

    def is_id(one: Any) -> bool:
        return _is_whole(one) and 0 <= one <= INT32

    def one_prompt(one: Any) -> str | list[int]:
        return one if isinstance(one, str) else [int(i) for i in one]

    if _is_text(value) or _list_of(is_id, value):
        return [one_prompt(value)]
    fits = _list_of(_is_text, value, MOST_PROMPTS)
    fits = fits or _list_of(lambda one: _list_of(is_id, one), value, MOST_PROMPTS)
    return [one_prompt(one) for one in _accept(fits, value)]


def _read_stop(value: Any) -> tuple[str, ...]:
    """Stop strings; an empty list is none, and so is an empty string, which some clients send."""
    if value in ("", []):
        return ()
    several = [value] if isinstance(value, str) else value
    return tuple(
        _accept(_list_of(lambda one: _is_text(one) and 0 < len(one) <= LONGEST_STOP, several, MOST_STOPS), several)
    )


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


def _read_messages(value: Any) -> list[dict[str, str]]:
    """Chat messages of text; parts of a message's text are joined."""
    if not _list_of(lambda one: isinstance(one, dict), value):
        raise _Misfit
    messages = []
    for i, message in enumerate(value):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or role not in _ROLES:
            raise _Misfit(f"messages[{i}].role must be one of {', '.join(_ROLES)}, not {shown(role)}")
        if isinstance(content, list):
            parts = [part.get("text") if isinstance(part, dict) else None for part in content]
            if not all(map(_is_text, parts)):
                raise _Misfit(f"messages[{i}].content: only parts with a text can be read")
            content = "".join(map(str, parts))
        if not _is_text(content):
            raise _Misfit(f"messages[{i}].content must be a text or a list of parts with a text, not {shown(content)}")
        messages.append({"role": _ROLES[role], "content": content})
    return messages


def _read_weights(value: Any) -> tuple[float, ...]:
    def fits(one: Any) -> bool:
        return isinstance(one, int | float) and not isinstance(one, bool) and 0 <= one <= 1e6

    return tuple(float(one) for one in _accept(_list_of(fits, value) and any(value), value))


TEXT = Kind("a text", {"type": "string"}, lambda value: _accept(_is_text(value), value))
SWITCH = Kind("true or false", {"type": "boolean"}, lambda value: _accept(isinstance(value, bool), value))
OBJECT = Kind("an object", {"type": "object"}, lambda value: _accept(isinstance(value, dict), value))
_TEXTS = {"type": "array", "items": {"type": "string"}, "minItems": 1}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT32}, "minItems": 1}
PROMPTS = Kind(
    f"a text, a list of token ids, or a list of at most {MOST_PROMPTS} of either, none of them empty",
    {
        "oneOf": [
            {"type": "string"},
            _TEXTS | {"maxItems": MOST_PROMPTS},
            _IDS,
            {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MOST_PROMPTS},
        ]
    },
    _read_prompts,
)
STOP = Kind(
    f"a text, or a list of at most {MOST_STOPS} texts, of 1 to {LONGEST_STOP} characters",
    {
        "oneOf": [
            {"type": "string", "maxLength": LONGEST_STOP},
            {
                "type": "array",
                "items": {"type": "string", "minLength": 1, "maxLength": LONGEST_STOP},
                "maxItems": MOST_STOPS,
            },
        ]
    },
    _read_stop,
)
_PART = {
    "type": "object",
    "properties": {"type": {"type": "string", "enum": ["text"]}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
MESSAGES = Kind(
    "a list of messages, each an object with role and content",
    {
        "type": "array",
        "minItems": 1,
        "items": {
            "type": "object",
            "properties": {
                "role": {"type": "string", "enum": list(_ROLES)},
                "content": {"oneOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
            },
            "required": ["role", "content"],
        },
    },
    _read_messages,
)
WEIGHTS = Kind(
    "a list of numbers from 0 to 1e6, one per member, at least one of them above 0",
    {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1e6}, "minItems": 1},
    _read_weights,
)

RLAE: dict[str, Field] = {
    "weights": Field(WEIGHTS, "The members' weights, of any sum. With the ensemble's model alone."),
    "policy": Field(TEXT, "What sets the weights: one of the server's policies. With the ensemble's model alone."),
    "span_length": Field(whole(1, INT32), "Tokens for which weights are held. Default: the model's own."),
    "fusion": Field(TEXT, "The fusion operator; a server has one, and refuses others."),
    "attribution": Field(SWITCH, "Also tell each member's log-probability of each token.", False),
}
STREAM_OPTIONS: dict[str, Field] = {
    "include_usage": Field(SWITCH, "End the stream with a chunk that counts tokens.", False),
}


def _object_of(fields: Mapping[str, Field], *, closed: bool = False) -> Kind:
    schema: dict[str, Any] = {"type": "object"}
    schema["properties"] = {name: field.kind.schema for name, field in fields.items()}
    return dataclasses.replace(OBJECT, schema=schema | ({"additionalProperties": False} if closed else {}))


_SHARED: dict[str, Field] = {
    "model": Field(TEXT, "One of /v1/models.", required=True),
    "temperature": Field(number(0, 2), "0 always takes the most probable token.", 1.0),
    "top_p": Field(number(0, 1, above=True), "Sample within the smallest set of tokens with this probability.", 1.0),
    "top_k": Field(whole(-1, INT32), "Sample among the k most probable tokens; 0 or -1 is no limit.", 0),
    "min_p": Field(number(0, 1), "Sample tokens at least this often as probable as the most probable one.", 0.0),
    "repetition_penalty": Field(number(0, 100, above=True), "On tokens that came already; 1 is none.", 1.0),
    "n": Field(whole(1, MOST_SAMPLES), "Answers per prompt.", 1),
    "seed": Field(whole(-INT64 - 1, INT64), "Of the sampling. Default: another one each time."),
    "stop": Field(STOP, "Strings that end an answer.", ()),
    "min_tokens": Field(whole(0, INT32), "No end before this many tokens.", 0),
    "ignore_eos": Field(SWITCH, "Go on after the end token.", False),
    "stream": Field(SWITCH, "Send the answer while it is written, as server-sent events.", False),
    "stream_options": Field(_object_of(STREAM_OPTIONS), "With stream.", {}),
    "rlae": Field(_object_of(RLAE, closed=True), "Weights, policy and what the answer tells of them."),
}
COMPLETION: dict[str, Field] = {
    **_SHARED,
    "prompt": Field(PROMPTS, "What is continued.", required=True),
    "max_tokens": Field(whole(0, INT32), "The longest answer; 0 needs echo.", COMPLETION_TOKENS),
    "echo": Field(SWITCH, "Begin the text with the prompt; with logprobs, also its tokens' log-probabilities.", False),
    "logprobs": Field(whole(0, MOST_TOP), "Log-probabilities of the tokens, and so many most likely ones."),
    "best_of": Field(whole(1, MOST_SAMPLES), "No more than n: every answer that is written is returned."),
}
CHAT: dict[str, Field] = {
    **_SHARED,
    "messages": Field(MESSAGES, "The conversation, which goes through the model's chat template.", required=True),
    "max_completion_tokens": Field(whole(1, INT32), "The longest answer. Default: what the context has room for."),
    "max_tokens": Field(whole(1, INT32), "The older name of max_completion_tokens."),
    "logprobs": Field(SWITCH, "Log-probabilities of the tokens.", False),
    "top_logprobs": Field(whole(0, MOST_TOP), "So many most likely tokens; with logprobs.", 0),
}
# Fields of the API that the engine has nothing for, with the values that ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "modalities": (["text"], []),
    "audio": (),
    "prediction": (),
}


def read_json(raw: bytes) -> dict[str, Any]:
    """The object that a body is.

    Raises:
      ApiError: it is no UTF-8, no JSON, or no object.
    """
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise ApiError(400, "the body is not usable: it is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, f"the body must be a JSON object, not {shown(body)}")
    return body


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def shown(value: Any) -> str:
    """A value as a message shows it: short, and with everything escaped that UTF-8 cannot hold."""
    text = (
        json.dumps(value) if not isinstance(value, dict | list) else ("{...}" if isinstance(value, dict) else "[...]")
    )
    return shortened(text, 60)


def read_fields(
    body: Mapping[str, Any], fields: Mapping[str, Field], within: str = "", *, closed: bool = False
) -> dict[str, Any]:
    """The fields of an object that are known, with their defaults.

    Args:
      closed: there are no others: the API's own objects have fields that come and go, ours do not.

    Raises:
      ApiError: one that is missing, does not fit, or in a closed object is unknown.
    """
    if closed and (unknown := next((name for name in body if name not in fields), None)) is not None:
        message = f"{within}{shown(unknown)[1:-1]} does not exist; there are {', '.join(fields)}"
        raise ApiError(400, message, param=within.rstrip("."))
    values = {}
    for name, field in fields.items():
        given, path = body.get(name), within + name
        if given is None:
            if field.required:
                raise ApiError(400, f"{path} is missing: give {field.kind.says}", param=path)
            values[name] = field.default
            continue
        try:
            values[name] = field.kind.read(given)
        except _Misfit as misfit:
            what = str(misfit) or f"{path} must be {field.kind.says}, not {shown(given)}"
            raise ApiError(400, what, param=path) from None
    return values


def refuse(body: Mapping[str, Any]) -> None:
    """Raises an `ApiError` for a field of `REFUSED` that asks for something."""
    for name, nothing in REFUSED.items():
        if body.get(name) is not None and body[name] not in nothing:
            raise ApiError(400, f"{name} is not supported; leave it out", param=name, code="unsupported_parameter")
