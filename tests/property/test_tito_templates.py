"""Our rendering equals transformers' `apply_chat_template` on templates and conversations of many kinds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate

FOLDERS = (
    Path(__file__).parents[1] / "unit" / "test_tito_templates",
    Path(__file__).parents[2] / "trainer" / "recipes" / "data",
)
FEATURES = {
    "trimmed blocks": "  {% if true %}\n  a\n  {% endif %}\n{%- for m in messages %}\n {{ m.role }} \n{% endfor %}\n",
    "tojson options": (
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}"
        "{{ messages | tojson(sort_keys=true, ensure_ascii=true) }}"
    ),
    "generation blocks": (
        "{% for m in messages %}{% generation %}{% set x = m.content %}{{ x }}{% endgeneration %}{{ x }}{% endfor %}"
    ),
    "loop controls": (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{% if loop.index > 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "namespaces and macros": (
        "{% macro f(x, y='-') %}{{ x }}{{ y }}{% endmacro %}{% set ns = namespace(n=0, s='') %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ f(m.role) }}{% endfor %}{{ ns.n }}"
    ),
    "reasoning names": (
        "{% for m in messages %}[{{ m.reasoning_content }}|{{ m.thinking }}|{{ m.reasoning }}]{% endfor %}"
    ),
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}",
    "arguments and documents": (
        "{{ enable_thinking }}{{ documents }}{{ reasoning_effort is defined }}{{ tools }}{{ tools is none }}"
    ),
    "content must be there": "{% for m in messages %}{{ m['content'] + m.role }}{% endfor %}",
    "date": "{{ strftime_now('%Y') }}",
    "raises": "{% if messages | length > 2 %}{{ raise_exception('too many') }}{% endif %}ok",
    "undefined": "{{ messages[0].nothing.more }}",
    "python methods": (
        "{% for m in messages %}{{ m.items() | list | length }}"
        "{{ (m.content or '') | string | trim | upper }}{% endfor %}"
    ),
    "dict": "{{ dict(a=1) }}{{ {'a': 1} | items | list }}",
    "whitespace": "{{- '\\n' -}}\n\n  x  {{ ' y ' }}\n",
}
TEMPLATES = {file.stem: file.read_text() for folder in FOLDERS for file in sorted(folder.glob("*.jinja"))} | FEATURES
SPECIAL_TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<img>"}


@pytest.fixture(scope="module")
def reference() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), **SPECIAL_TOKENS)


texts = st.text(max_size=8) | st.sampled_from(["<think>a</think>b", " x\n", "<|im_end|>", '{"a": "<é>"}', ""])
calls = st.lists(
    st.fixed_dictionaries(
        {
            "id": st.just("call_1"),
            "type": st.just("function"),
            "function": st.fixed_dictionaries(
                {"name": st.just("f"), "arguments": st.dictionaries(st.sampled_from("ab"), st.integers() | texts)}
            ),
        }
    ),
    min_size=1,
    max_size=2,
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": texts})
    | st.fixed_dictionaries({"role": st.just("system"), "content": texts})
    | st.fixed_dictionaries({"role": st.just("tool"), "content": texts, "tool_call_id": st.just("call_1")})
    | st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": texts | st.none()},
        optional={"reasoning_content": texts | st.none(), "thinking": texts, "tool_calls": calls, "extra": st.none()},
    ),
    min_size=1,
    max_size=5,
)
tools = st.lists(
    st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": texts, "description": texts})}
    ),
    max_size=2,
)
arguments = st.dictionaries(
    st.sampled_from(["enable_thinking", "reasoning_effort", "bos_token"]), st.booleans() | texts
)


@pytest.mark.parametrize("name", TEMPLATES)
def test_rendering_equals_transformers(name: str, reference: PreTrainedTokenizerFast) -> None:
    """The same text, or both refuse (I1: the engine's own template is the truth)."""
    template = ChatTemplate({"default": TEMPLATES[name]}, special_tokens=SPECIAL_TOKENS)

    @settings(max_examples=40, derandomize=True)
    @given(messages=messages, tools=tools, arguments=arguments, generation_prompt=st.booleans())
    def check(messages: JsonValue, tools: JsonValue, arguments: JsonValue, generation_prompt: bool) -> None:
        conversation = Conversation(tuple(messages), tuple(tools), arguments)
        expected = transformers_render(reference, TEMPLATES[name], conversation, generation_prompt)
        if expected is None:  # absent content of an assistant is "" for engines, and for us where it must be
            expected = transformers_render(reference, TEMPLATES[name], with_content(conversation), generation_prompt)
        assert our_render(template, conversation, generation_prompt) == expected

    check()


def with_content(conversation: Conversation) -> Conversation:
    filled = (
        {**m, "content": ""} if m["role"] == "assistant" and m["content"] is None else m for m in conversation.messages
    )
    return replace(conversation, messages=tuple(filled))


def transformers_render(
    tokenizer: PreTrainedTokenizerFast, template: str, conversation: Conversation, generation_prompt: bool
) -> str | None:
    try:
        return str(
            tokenizer.apply_chat_template(
                list(conversation.messages),
                tools=list(conversation.tools) or None,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **conversation.template_arguments,
            )
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None


def our_render(template: ChatTemplate, conversation: Conversation, generation_prompt: bool) -> str | None:
    try:
        return template.render(conversation, add_generation_prompt=generation_prompt)
    except TemplateRaised:
        return None
