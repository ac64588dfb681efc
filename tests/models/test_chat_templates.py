"""Chat templates: texts as transformers renders them, in a process of its own, with an end to time and output."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from rlae_jax.errors import InputError
from rlae_jax.models import chat_templates

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello, wörld 🎈 <|im_end|>"}],
    [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": "a\n  b"},
        {"role": "assistant", "content": "c", "reasoning": "because", "tool_calls": []},
        {"role": "user", "content": ["d", {"type": "text", "text": "e"}], "n": 3, "x": 0.5, "ok": True},
    ],
]
TEMPLATES = (
    "{% for m in messages %}{{ m.role }}:{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}b:{% endif %}",
    "{{ bos_token }}{% for m in messages -%}\n  {{ m | tojson }}{{ loop.index0 }}\n{% endfor %}{{ eos_token }}",
    "{{ messages | tojson(indent=2) }}{{ tools is none }}{{ documents is defined }}{{ nothing is defined }}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n, dict(a=1) }}",
    "{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(messages[-1].role) }}{{ messages[0]['content'] | trim | upper }}",
    "{{ strftime_now('%Y') }}{% for m in messages %}{{ m.reasoning_content }}{{ m.thinking }}{{ m.name }}{% endfor %}",
    "{%- if messages[0].role == 'system' %}{{- messages[0].content }}{%- endif %}\n   {# a comment #}\n  x",
    "{{ messages[0].content.split(',')[0] }}{{ range(3) | list }}{{ 'a' ~ 1 }}{{ messages | length }}",
)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer: Any) -> Any:
    made = make_tokenizer("ab")
    made.bos_token = "a"
    return made


@pytest.mark.parametrize("template", TEMPLATES)
def test_texts_are_those_of_transformers(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert chat_templates.render(tokenizer, "m", [chat]) == [expected]
    both = chat_templates.render(tokenizer, "m", CHATS)
    assert both == tokenizer.apply_chat_template(CHATS, tokenize=False, add_generation_prompt=True)


def test_ids_and_a_last_message_that_goes_on(tokenizer: Any) -> None:
    for template in TEMPLATES[0], "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}":
        tokenizer.chat_template = template
        chat = [CHATS[0][0], {"role": "assistant", "content": "ab "}]
        expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat_templates.encode(tokenizer, "m", [chat, chat]) == [expected, expected]
        text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert chat_templates.render(tokenizer, "m", [chat], goes_on=True) == [text]
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InputError, match="leaves out the end of the last message"):
        chat_templates.render(tokenizer, "m", [chat], goes_on=True)


BAD = {
    "output": ("{{ 'x' * 10000000000 }}", "MemoryError|OverflowError|memory"),
    "output in loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "text",
    ),
    "time": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", r"longer than \S+ s"),
    "a range": ("{{ range(10**9) | list }}", "OverflowError"),
    "memory": ("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", ""),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "power": ("{{ 9 ** (9 ** 9) }}", ""),
    "deep": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", ""),
    "many blocks": ("{% if 1 %}" * 300 + "{% endif %}" * 300, ""),
    "raises": ("{{ raise_exception('no\nsystem') }}", "TemplateError: no system"),
    "undefined": ("{{ f() }}", "UndefinedError"),
    "syntax": ("{% for %}", "TemplateSyntaxError"),
    "sandbox": ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    "namespace": ("{% set ns = namespace(__class__=1) %}{{ ns }}", "SecurityError"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError"),
    "import": ("{% include '/etc/passwd' %}", "TypeError|no loader|TemplateNotFound"),
}


@pytest.fixture(scope="module")
def _in_a_hurry() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_templates, "SECONDS", 1.0)
        chat_templates._worker.cache_clear()
        yield
    chat_templates._worker.cache_clear()


@pytest.mark.usefixtures("_in_a_hurry")
@pytest.mark.parametrize("name", BAD)
def test_templates_that_take_too_much_or_fail_are_one_line(tokenizer: Any, name: str) -> None:
    template, why = BAD[name]
    tokenizer.chat_template = template
    began = time.monotonic()
    with pytest.raises(InputError, match=f"model-x: its chat template cannot take these messages.*({why})") as told:
        chat_templates.encode(tokenizer, "model-x", CHATS[:1] * 50)
    assert len(str(told.value).splitlines()) == 1
    assert len(str(told.value)) < 500
    assert time.monotonic() - began < chat_templates.SECONDS + 10
    tokenizer.chat_template = TEMPLATES[0]  # the next one is served as ever
    assert chat_templates.render(tokenizer, "m", CHATS[:1])


@pytest.mark.parametrize(
    "chat", [[], ["a"], [None], [{"role": "user", "content": float("nan")}], [{"role": object(), "content": {1: b"x"}}]]
)
def test_odd_messages(tokenizer: Any, chat: Any) -> None:
    tokenizer.chat_template = "{{ messages | tojson }}"
    if chat and isinstance(chat[0], dict):
        assert json.loads(chat_templates.render(tokenizer, "m", [chat])[0])
    else:
        with pytest.raises(InputError, match="cannot take these messages"):
            chat_templates.render(tokenizer, "m", [chat])


def test_many_chats_are_rendered_in_order(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ messages[0].content }}"
    chats = [[{"role": "user", "content": f"{i}" * (1 + 5000 * (i % 100 == 0))}] for i in range(1000)]
    assert chat_templates.render(tokenizer, "m", chats) == [chat[0]["content"] for chat in chats]
