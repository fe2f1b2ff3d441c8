"""Chat templates: the shapes of real families, what the sandbox refuses, and bounds on time, memory and size."""

import os
import signal
import threading
import time
from typing import Any

import pytest

from realm_jax.errors import ChatTemplateError, InvalidRequestError
from realm_jax.text import ChatTemplate, load_chat_template
from realm_jax.text.chat_template import MAX_SOURCE

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEADERS = """
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- set text = '<|header|>' ~ message['role'] ~ '<|/header|>\\n\\n' ~ message['content'] | trim ~ '<|eot|>' %}
    {%- if ns.first %}{% set text = bos_token + text %}{% set ns.first = false %}{% endif %}
    {{- text }}
{%- endfor %}
{%- if tools %}{{- tools | tojson(indent=2) }}{% endif %}
{%- if add_generation_prompt %}{{- '<|header|>assistant<|/header|>\\n\\n' }}{% endif %}
"""
INSTRUCT = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate user/assistant/user/assistant') }}
{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% endif %}
{% endfor %}"""
TURNS = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{% set system, messages = messages[0]['content'] + '\\n\\n', messages[1:] %}
{%- else %}{% set system = '' %}{% endif %}
{%- for message in messages %}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<turn>' + role + '\\n' + (system if loop.first else '') }}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}{% for part in message['content'] %}{% if part['type'] != 'text' %}{% continue %}{% endif %}
{{- part['text'] }}{% endfor %}{% endif %}
{{- '</turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<turn>model\\n' }}{% endif %}"""

ONE = [{"role": "user", "content": "Hi "}]
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
SYSTEM = [{"role": "system", "content": "S"}, *ONE]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "t"}]}]


@pytest.mark.parametrize(
    ("source", "messages", "extra", "expected"),
    [
        (
            CHATML,
            SYSTEM,
            {},
            "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
        ),
        (CHATML, ONE, {"add_generation_prompt": False}, "<|im_start|>user\nHi<|im_end|>\n"),
        (HEADERS, ONE, {}, "<s><|header|>user<|/header|>\n\nHi<|eot|><|header|>assistant<|/header|>\n\n"),
        (
            HEADERS,
            ONE,
            {"add_generation_prompt": False, "tools": [{"name": "é", "x": None}]},
            '<s><|header|>user<|/header|>\n\nHi<|eot|>[\n  {\n    "name": "é",\n    "x": null\n  }\n]',
        ),
        (INSTRUCT, TALK, {}, "<s>[INST] a [/INST]b</s>[INST] c [/INST]"),
        (TURNS, SYSTEM, {}, "<s><turn>user\nS\n\nHi </turn>\n<turn>model\n"),
        (TURNS, PARTS, {"add_generation_prompt": False}, "<s><turn>user\nt</turn>\n"),
        ("{{ date_string }}|{{ documents }}|{{ missing }}|", ONE, {"date_string": "today"}, "today|None||"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", ONE, {}, "012"),
        ("{{ {'a': '<ü>', 'b': true} | tojson }}", ONE, {}, '{"a": "<ü>", "b": true}'),
        (
            "{{ messages[0].content }}",
            [{"role": "user", "content": "<b>&\"'\x00 😀\u200d"}],
            {},
            "<b>&\"'\x00 😀\u200d",
        ),
    ],
)
def test_rendering(source: str, messages: list[Any], extra: dict[str, Any], expected: str) -> None:
    assert ChatTemplate(source, "<s>", "</s>").render(messages, **extra) == expected


def test_time_is_the_machine_s() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(ONE) == time.strftime("%Y")


def test_the_template_s_own_refusal_is_told() -> None:
    messages = [{"role": "assistant", "content": "x"}]
    with pytest.raises(ChatTemplateError, match="Roles must alternate"):
        ChatTemplate(INSTRUCT).render(messages)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ lipsum.__globals__ }}",
        "{{ cycler.__init__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ self.__init__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{% include 'x' %}",
        "{% import 'os' as os %}",
        "{% if %}",
        "{{ 'a",
        "{% for x in 5 %}{% endfor %}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ '\\ud800' }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    ],
)
def test_refused_by_the_sandbox(source: str) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render(ONE)


BOMBS = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9**5) %}{% for j in range(9**5) %}{% endfor %}{% endfor %}",
    "a long string": "{{ 'a' * 10**10 }}",
    "a wide centre": "{{ 'x' | center(10**10) }}",
    "a wide number": "{{ '%01000000000000d' % 1 }}",
    "many bytes": "{{ (1).to_bytes(10**11) }}",
    "long output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "doubling text": "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling lists": "{% set n = namespace(x=1) %}"
    "{% for i in range(60) %}{% set n.x = [n.x] * 2 %}{% endfor %}{{ n.x }}",
    "a large power": "{{ (10**7) ** (10**7) }}",
    "a slow constant": "{{ 'x' | center(10**8) | replace('', 'yyyyyyyyyy') | length }}",
    "a slow sort": "{{ range(99999) | map('string') | map('center', 9999) | sort | join | length }}",
}


@pytest.mark.parametrize("source", BOMBS.values(), ids=BOMBS)
def test_bombs_are_stopped(source: str) -> None:
    template = ChatTemplate(source, time_limit=1.0)
    start = time.monotonic()
    with pytest.raises(ChatTemplateError):
        template.render(ONE)
    assert time.monotonic() - start < 10  # the limit, and starting the process on a busy machine
    template.close()


def test_a_template_works_again_after_a_timeout() -> None:
    template = ChatTemplate(
        "{% if slow %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}{% endif %}fine",
        time_limit=0.5,
    )
    with pytest.raises(ChatTemplateError, match=r"it took longer than 0\.5 s"):
        template.render(ONE, slow=True)
    assert template.render(ONE, slow=False) == "fine"


def test_a_dead_process_is_replaced() -> None:
    template = ChatTemplate("fine")
    assert template.render(ONE) == "fine"
    process = template._worker.process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert template.render(ONE) == "fine"


def test_several_threads_share_a_template() -> None:
    template = ChatTemplate("{{ messages[0].content }}")
    results: dict[int, str] = {}

    def work(i: int) -> None:
        results[i] = template.render([{"role": "user", "content": f"text {i}"}])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: f"text {i}" for i in range(16)}


def test_the_process_ends_with_the_template() -> None:
    template = ChatTemplate("x")
    template.render(ONE)
    process = template._worker.process
    assert process is not None
    del template
    assert process.poll() is not None


def test_the_process_gets_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    template = ChatTemplate("x")
    template.render(ONE)
    assert template._worker.process is not None
    with open(f"/proc/{template._worker.process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()


def test_rendering_is_quick_once_started() -> None:
    template = ChatTemplate(CHATML)
    template.render(ONE)
    start = time.monotonic()
    for _ in range(50):
        template.render(TALK)
    assert (time.monotonic() - start) / 50 < 0.05


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "messages: str is not a list"),
        ({"role": "user", "content": "x"}, "messages: dict is not a list"),
        (None, "messages: NoneType is not a list"),
        ([], "messages is empty"),
        (["hello"], r"messages\[0\]: str is not a dict"),
        ([{"content": "x"}], r"messages\[0\].role: None is not a role"),
        ([{"role": 5, "content": "x"}], r"messages\[0\].role: 5"),
        ([*ONE, {"role": "user"}], r"messages\[1\].content: NoneType is not text"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content: int"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\].content: list"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ([{"role": "user", "content": "x", "extra": {1, 2}}], "JSON"),
    ],
)
def test_messages_of_another_form_are_refused(messages: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        ChatTemplate("x").render(messages)


def test_calls_of_tools_need_no_content() -> None:
    messages = [*ONE, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}]
    source = "{{ messages[1].tool_calls[0].function.arguments | tojson }}"
    assert ChatTemplate(source).render(messages) == '{"a": 1}'


@pytest.mark.parametrize("source", ["", "  \n", 5, "x" * (MAX_SOURCE + 1)])
def test_sources_that_are_no_template(source: Any) -> None:
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source)


METADATA = {
    "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}",
    "tokenizer.chat_template.tool_use": "tools!",
}


def test_templates_come_from_the_file() -> None:
    assert load_chat_template(METADATA).render(ONE) == "<s>Hi </s>"
    assert load_chat_template(METADATA, "tool_use").render(ONE) == "tools!"


def test_a_file_without_a_template_says_what_to_do() -> None:
    with pytest.raises(ChatTemplateError, match=r"no tokenizer\.chat_template: pass a template"):
        load_chat_template({})
    with pytest.raises(ChatTemplateError, match=r"no tokenizer\.chat_template\.rag; it has .*tool_use"):
        load_chat_template(METADATA, "rag")
