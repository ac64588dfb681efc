"""What renders chat templates, in a process of its own (`chat_templates.py`): jinja2 and the standard library alone.

A template is a program of whoever made the model. Its names, filters and blocks are those that transformers gives it,
in jinja's sandbox, which keeps it from files and processes; time and memory are limited from outside.
"""

import functools
import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

_LONGEST = 1 << 20  # characters of a text
_OF_INPUT = 16  # further ones for each character of the messages


class _Generation(Extension):
    """{% generation %}...{% endgeneration %}, which marks what a model wrote; here just its content."""

    tags = {"generation"}  # noqa: RUF012  # as jinja has it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict`, of which a template can only make some."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace` without names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a namespace may have a `self`
        self, *given = args
        names = dict(*given, **kwargs)
        for name in names:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no names that begin with _, as {name!r}")


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _compiled(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment.from_string(template)


def render(template: str, names: dict[str, Any], chats: list[list[dict[str, Any]]]) -> list[str]:
    """The text of each chat.

    Args:
      names: what the template knows besides `messages`.

    Raises:
      Exception: whatever the template raises, or its text is too long.
    """
    return [_text(_compiled(template), names, messages) for messages in chats]


def _text(template: Any, names: dict[str, Any], messages: list[dict[str, Any]]) -> str:
    most = _LONGEST + _OF_INPUT * len(json.dumps(messages))
    parts, length = [], 0
    for part in template.generate(messages=messages, **names):
        parts.append(part)
        length += len(part)
        if length > most:
            raise OverflowError(f"its text has more than {most} characters")
    return "".join(parts)
