"""Chats to texts by a model's own template, which is a program of whoever made the model.

    messages ─plain values─► a worker process, `chat_script.py`: jinja2's sandbox, limits of time and memory ─► texts

The one place that renders; what templates see is what transformers shows them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlae_jax.errors import InputError
from rlae_jax.models.tokenizer import told
from rlae_jax.workers import Limits, Lost, Worker

SECONDS = 5.0  # for at most so many chats, of so many characters
_CHATS, _CHARACTERS = 256, 1 << 20
# Names that a message's reasoning is found under; templates read the first, gpt-oss' the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


def encode(tokenizer: Any, name: str, chats: Sequence[Sequence[Mapping[str, Any]]]) -> list[list[int]]:
    """The ids of chats, up to where the model's answer begins.

    Args:
      name: the model's, for messages.

    Raises:
      InputError: no template; one that cannot take these messages, takes too long, or writes too much.
    """
    texts = render(tokenizer, name, chats)
    with told(name, "its tokenizer cannot take the text of its chat template"):
        ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def render(
    tokenizer: Any, name: str, chats: Sequence[Sequence[Mapping[str, Any]]], *, goes_on: bool = False
) -> list[str]:
    """The texts of chats.

    Args:
      goes_on: the last message is the model's own and not finished; else a text ends where the model's answer begins.

    Raises:
      InputError: as `encode`.
    """
    template = _template(tokenizer, name)
    try:
        plain = [_messages(chat) for chat in chats]
        names = {**_plain(tokenizer.special_tokens_map), "tools": None, "documents": None}
        if goes_on:
            for messages in plain:
                messages[-1]["content"] += _TAG
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise _error(name, f"{type(error).__name__}: {error}") from error
    names["add_generation_prompt"] = not goes_on
    texts: list[str] = []
    for part in _parts(plain):
        try:
            outcome = _worker().call(template, names, part)
        except Lost as error:
            raise InputError(f"{name}: chat templates cannot be rendered ({error})") from error
        if outcome.problem:
            raise _error(name, outcome.problem.removeprefix("raised "))
        texts += outcome.value
    return [_before_tag(name, text) for text in texts] if goes_on else texts


@functools.cache
def _worker() -> Worker:
    source = Path(__file__).with_name("chat_script.py")
    return Worker(f"{source}:render", limits=Limits(seconds=SECONDS, memory=1 << 30, processes=4))


def _error(name: str, why: str) -> InputError:
    return InputError(f"{name}: its chat template cannot take these messages ({why}); leave out chat")


def _template(tokenizer: Any, name: str) -> str:
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise InputError(f"{name} has no chat template; leave out chat")
    if isinstance(template, dict):
        if "default" not in template:
            raise InputError(
                f"{name} has chat templates for {', '.join(template)} and none called default; set "
                "tokenizer.chat_template, or leave out chat"
            )
        template = template["default"]
    if not isinstance(template, str):
        raise InputError(f"{name}: its chat template is no text; leave out chat")
    return template


def _messages(chat: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a template sees of a chat: fields without a value are left out, and reasoning has all of its names."""
    if not chat:
        raise ValueError("there is no message")
    messages = []
    for given in chat:
        message = _plain(given)
        if not isinstance(message, dict):
            raise TypeError(f"a message must have fields, as role and content, and not be {given!r:.60}")
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[key] for key in _REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        messages.append(message)
    return messages


def _plain(value: Any) -> Any:
    """Values of JSON; of others (images, arrays) their kind's name, since templates only ask whether they are there."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    return f"<{type(value).__name__}>"


def _parts(chats: list[list[dict[str, Any]]]) -> list[list[list[dict[str, Any]]]]:
    """The chats in parts that render within the limit of time."""
    parts: list[list[list[dict[str, Any]]]] = []
    size = 0
    for chat in chats:
        length = len(str(chat))
        if not parts or len(parts[-1]) == _CHATS or size + length > _CHARACTERS:
            parts.append([])
            size = 0
        parts[-1].append(chat)
        size += length
    return parts


def _before_tag(name: str, text: str) -> str:
    """A text up to where its last message was cut; templates may strip the space behind the tag."""
    before, tag, after = text.rpartition(_TAG.strip())
    if not tag:
        raise _error(name, "it leaves out the end of the last message")
    return before if after.startswith(" ") else before.rstrip()
