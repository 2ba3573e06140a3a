"""Chat templates: what transformers renders, and bounded time and memory for hostile ones."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from engine.errors import FailedPreconditionError, FormatError, InvalidArgumentError
from engine.tokenizer import Tokenizer
from engine.tokenizer.chat_template import ChatTemplate
from engine.tokenizer.template_sandbox import MAX_SECONDS
from tests.unit.loading_files import sentencepiece_metadata, write_gguf

USER = {"role": "user", "content": "Hi é"}


def render(source: str, messages: list[dict[str, Any]] | None = None, **tokens: str) -> str:
    template = ChatTemplate(source, "model/chat_template.jinja")
    given = [USER] if messages is None else messages
    return template.render(given, add_generation_prompt=True, tools=None, special_tokens=tokens)


FEATURES = {
    "{{ messages[0]['content'] ~ 1 ~ bos_token }}": "Hi é1<s>",
    "{% for m in messages %}{{ loop.index }}{{ m.role }}{% if loop.last %}!{% endif %}{% endfor %}": "1user!",
    "{% generation %}{{ messages[0].role }}{% endgeneration %}": "user",
    "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}": "01",
    "{% set ns = namespace(a=0) %}{% for i in [1, 2, 3] %}{% set ns.a = ns.a + i %}{% endfor %}{{ ns.a }}": "6",
    "{{ messages[0] | tojson }}": '{"role": "user", "content": "Hi é"}',
    "{{ {'a': [1, '<']} | tojson(indent=2) }}": '{\n  "a": [\n    1,\n    "<"\n  ]\n}',
    "{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m('a') }}{{ m('b') }}": "<a><b>",
    "{%- set x %}a{{ 1 + 1 }}{% endset -%}{{ x | upper | trim }}": "A2",
    "{{ messages | map(attribute='role') | join(',') }}": "user",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}": "1",
    "{{ '%s-%02d' % ('a', 7) }}{{ '{:>3}'.format('b') }}{{ 'x'.split('y')[0].strip().startswith('x') }}": "a-07  bTrue",
    "{% if add_generation_prompt and tools is none %}yes{% endif %}{{ undefined_name }}": "yes",
    "{{ strftime_now('%Y') | length }}": "4",
    "{{ (messages + [{'role': 'x'}])[1].role }}{{ messages[::-1][0].role }}": "xuser",
}


@pytest.mark.parametrize("source", FEATURES)
def test_features_that_templates_use(source: str) -> None:
    assert render(source, bos_token="<s>") == FEATURES[source]


@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "f", "parameters": {}}}]])
def test_renders_what_transformers_renders(shared: Path, tools: list[dict[str, Any]] | None) -> None:
    """The Qwen3.5 template, one of the longest there are, over several turns."""
    from transformers.utils.chat_template_utils import render_jinja_template

    tokenizer = Tokenizer.from_path(shared / "tokenizers/qwen3.5")
    messages = [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello 世界"},
        {"role": "user", "content": "again"},
    ]
    source = (shared / "tokenizers/qwen3.5/chat_template.jinja").read_text()
    theirs = render_jinja_template([messages], tools=tools, chat_template=source, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(messages, tools=tools) == theirs[0][0]


HOSTILE = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(s) %}"
    + "{{ s }}" * 10
    + "{% endmacro %}"
    + "{{ f(" * 11
    + "'aaa'"
    + ") }}".replace("}}", "") * 11
    + " }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 10 ** 12 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (999999999, 1) }}",
    "{{ '{:>999999999}'.format(1) }}",
    "{{ '{:>{}}'.format(1, 999999999) }}",
    "{{ 'x'.zfill(10 ** 10) }}",
    "{{ messages | tojson(indent=10 ** 9) }}",
    "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "{{ ('a' * 100000) | join('b' * 1000000) }}",
    "{{ ('b' * 1000000).join('a' * 100000) }}",
    "{{ ('\\n' * 1000000) | indent('a' * 1000000) }}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='aaaaaaaa') %}{% for i in range(60) %}{% set t %}{{ ns.s }}{{ ns.s }}{% endset %}"
    "{% set ns.s = t %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(d=[1]) %}{% for i in range(60) %}{% set ns.d = [ns.d, ns.d] %}{% endfor %}{{ ns.d }}",
    "{% set ns = namespace(d=1) %}{% for i in range(60) %}{% set ns.d = {1: ns.d, 2: ns.d} %}{% endfor %}{{ ns.d }}",
    "{% set ns = namespace(d=1) %}{% for i in range(60) %}{% set ns.d = dict(a=ns.d, b=ns.d) %}{% endfor %}{{ ns.d }}",
    "{% set ns = namespace(x=3) %}{% for i in range(90) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{% set x = 'a' * 8000000 %}{% set y = [x] * 1000000 %}{{ y }}",
    "{% filter upper %}{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}{% endfilter %}",
    "{% for i in range(90000) %}{{ 'a' * 1000 }}{% endfor %}",
    "{{ strftime_now('%999999999d') }}",
    "{{ messages.__class__.__mro__ }}{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages.append(1) }}",
    "{% set ns = namespace(__class__=1) %}{% set ns.__init__ = 2 %}",
    "{{ lipsum.__globals__ }}",
    "{{ raise_exception.__globals__.os }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{% include '/etc/passwd' %}",
    "{{ 'x' | center(10 ** 10) }}",
    "{% if %}",
    "{{" + "(" * 5000 + ")" * 5000 + "}}",
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
    "{{ 1" + " + 1" * 20000 + " }}",
    "a" * ((1 << 20) + 1),
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_templates_end_in_a_typed_error_soon(source: str) -> None:
    """FormatError (or InvalidArgumentError, of which it is one), within a bounded time of this process."""
    started = time.process_time()
    with pytest.raises(InvalidArgumentError):
        render(source)
    assert time.process_time() - started < 3 * MAX_SECONDS


def test_a_refusal_reaches_the_caller_with_its_words() -> None:
    with pytest.raises(InvalidArgumentError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert not isinstance(caught.value, FormatError)
    assert caught.value.field == "messages"


def test_limits_are_per_rendering() -> None:
    """A long conversation, rendered often, is not turned away."""
    template = ChatTemplate("{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}", "o")
    messages = [USER] * 2000
    for _ in range(5):
        text = template.render(messages, add_generation_prompt=True, tools=None, special_tokens={})
        assert text == "userHi é" * 2000


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "wizard", "content": "x"}],
        [{"role": "", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": 3}],
        [{"role": "user", "content": "\ud800"}],
        ["user"],
        [{"role": "user", "content": "x", "extra": object()}],
    ],
)
def test_malformed_messages_are_refused(smollm2_gguf: Path, messages: Any) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Tokenizer.from_path(smollm2_gguf).apply_chat_template(messages)
    assert caught.value.field.startswith("messages")


def test_chat_has_one_beginning_of_sequence(tmp_path: Path) -> None:
    """The template writes <s> itself, so encoding adds no second one; plain text gets its one."""
    metadata = {**sentencepiece_metadata(), "tokenizer.chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    tokenizer = Tokenizer.from_path(write_gguf(tmp_path / "c.gguf", {}, metadata=metadata))
    ids = tokenizer.encode_chat([{"role": "user", "content": "ab"}])[0]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("ab").count(tokenizer.bos_token_id) == 1


def test_no_template_is_a_failed_precondition(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_path(write_gguf(tmp_path / "n.gguf", {}, metadata=sentencepiece_metadata()))
    with pytest.raises(FailedPreconditionError, match="no chat template") as caught:
        tokenizer.apply_chat_template([USER])
    assert caught.value.reason == "NO_CHAT_TEMPLATE"
