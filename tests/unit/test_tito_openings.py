"""First prompts that begin alike: the ids of the full render, whatever the texts, and silence where it is not sure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

from benchmarks.models.families import FAMILIES, write_model
from benchmarks.models.vocabularies import VOCABULARIES
from gateway.contracts.generation import JsonValue
from gateway.tito import openings
from gateway.tito.conversation import BuiltPrompt, Conversation
from gateway.tito.openings import NUM_USES_BEFORE
from gateway.tito.prompt import PromptBuilder
from gateway.tito.shapes import example_tools
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

CHATML = """{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + CONTENT + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
SYSTEM = {"role": "system", "content": "You are an agent that answers questions with its tools."}
TOOLS = example_tools(2)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tiny_model)


def builder(tokenizer: ChatTokenizer, template: str) -> PromptBuilder:
    return PromptBuilder(tokenizer, ChatTemplate({"default": template}, special_tokens={}))


def chatml(tokenizer: ChatTokenizer, content: str = "message.content") -> PromptBuilder:
    return builder(tokenizer, CHATML.replace("CONTENT", content))


def asking(content: JsonValue, *before: JsonValue, **more: JsonValue) -> Conversation:
    """A first prompt: a system message, unless others are given, and a user's."""
    return Conversation((*(before or (SYSTEM,)), {"role": "user", "content": content, **more}), TOOLS)


def meet(prompts: PromptBuilder, conversation: Conversation) -> None:
    """Have its opening learned, by as many prompts as that takes."""
    for _ in range(NUM_USES_BEFORE):
        assert prompts.build(conversation, None).certified_by == "full_render"
    prompts.upkeep()


def same(one: BuiltPrompt, other: BuiltPrompt) -> bool:
    facts = [(built.segment_reason, built.hidden_messages, built.token_ids.tolist()) for built in (one, other)]
    return facts[0] == facts[1]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_opened_prompt_has_the_ids_of_the_full_render(family: str, vocabulary: str, tmp_path: Path) -> None:
    """I1, over templates and kinds of tokenizers; a builder that never learns is what it is held against."""
    folder = write_model(tmp_path, family=FAMILIES[family], vocabulary=vocabulary)
    template, tokenizer = ChatTemplate.load(folder), ChatTokenizer.load(folder)
    learning, rendering = PromptBuilder(tokenizer, template), PromptBuilder(tokenizer, template)
    meet(learning, asking("What is 48/2?"))
    marks = [*template.looked_for, *template.searched, *FAMILIES[family].special, *FAMILIES[family].markup]
    texts = st.text(min_size=1) | st.sampled_from(["user", "a\n b \n", "\u00a0x ", " ", "<b>", "0", '{"x": "é\\n"}'])
    marked = st.tuples(texts, st.sampled_from(marks or [""]), texts).map("".join)

    @settings(max_examples=25, derandomize=True)
    @given(text=texts | marked)
    def check(text: str) -> None:
        conversation = asking(text)
        assert same(learning.build(conversation, None), rendering.build(conversation, None))

    check()
    learning.upkeep()
    assert learning.audits.num_alarms == 0


@pytest.mark.parametrize("family", ["chatml_folds", "chatml_thinks", "xml_calls"])
def test_ordinary_templates_have_openings(family: str, tmp_path: Path) -> None:
    """Otherwise the test above would pass with nothing in it."""
    folder = write_model(tmp_path, family=FAMILIES[family], vocabulary="byte_level")
    prompts = PromptBuilder(ChatTokenizer.load(folder), ChatTemplate.load(folder))
    meet(prompts, asking("What is 48/2?"))
    assert prompts.build(asking("And 3 * 4?"), None).certified_by == "opening"
    prompts.upkeep()
    assert (prompts.audits.num_audits, prompts.audits.num_alarms) == (1, 0)


def test_learning_costs_no_more_than_was_spent_without(
    tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Renders are counted: before an opening is learned, and to learn it."""
    prompts, count = chatml(tokenizer), [0]
    render = ChatTemplate.render

    def counted(self: ChatTemplate, *arguments: Any, **more: Any) -> str:
        count[0] += 1
        return render(self, *arguments, **more)

    prompts.build(asking("Another first.", {"role": "system", "content": "Others."}), None)  # the template is known now
    monkeypatch.setattr(ChatTemplate, "render", counted)
    for number in range(NUM_USES_BEFORE):
        assert not prompts.upkeep_due
        prompts.build(asking(f"What is {number} * 2?"), None)
    before = count[0]
    assert prompts.upkeep_due
    prompts.upkeep()
    assert 0 < count[0] - before <= before


def test_what_differs_elsewhere_is_another_opening(tokenizer: ChatTokenizer) -> None:
    prompts = chatml(tokenizer)
    known = asking("What is 48/2?")
    meet(prompts, known)
    others = [
        asking("What is 48/2?", {"role": "system", "content": "Be brief."}),
        asking("What is 48/2?", SYSTEM, {"role": "user", "content": "Hello there."}),
        asking("What is 48/2?", name="ann"),
        asking([{"type": "text", "text": "What is 48/2?"}]),
        Conversation(known.messages, TOOLS[:1]),
        Conversation(known.messages, TOOLS, {"enable_thinking": False}),
        Conversation(known.messages[1:], TOOLS),
    ]
    assert prompts.build(known, None).certified_by == "opening"
    assert [prompts.build(other, None).certified_by for other in others] == ["full_render"] * len(others)


def test_text_parts_have_openings_too(tokenizer: ChatTokenizer) -> None:
    """Many SDKs send them; this template knows no parts, so they are one text for it."""
    prompts = chatml(tokenizer)
    meet(prompts, asking([{"type": "text", "text": "What is 48/2?"}]))
    opened = prompts.build(asking([{"type": "text", "text": " And 3 * 4?\n"}]), None)
    assert opened.certified_by == "opening"
    assert same(opened, chatml(tokenizer).build(asking([{"type": "text", "text": " And 3 * 4?\n"}]), None))


@pytest.mark.parametrize(
    "content", ["", " \n", None, 7, [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]]
)
def test_other_contents_are_rendered(tokenizer: ChatTokenizer, content: JsonValue) -> None:
    prompts = chatml(tokenizer, "(message.content or '')|string")
    for _ in range(NUM_USES_BEFORE + 1):
        assert prompts.build(asking(content), None).certified_by == "full_render"
    assert not prompts.upkeep_due


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("('gone' if message.content == 'plum' else message.content)", "plum"),
        ("('gone' if 'plum' in message.content else message.content)", "a plum tree"),
        ("message.content.split('</think>')[-1]", "a </think> b"),
        ("message.content", "a <|im_end|> b"),
    ],
)
def test_an_opening_is_silent_about_texts_that_the_template_may_look_for(
    tokenizer: ChatTokenizer, content: str, text: str
) -> None:
    prompts = chatml(tokenizer, content)
    meet(prompts, asking("What is 48/2?"))
    assert prompts.build(asking("What is 3 * 4?"), None).certified_by == "opening"
    assert prompts.build(asking(text), None).certified_by == "full_render"


UNOPENED = {
    "its head tells of the text": "{{- '<|im_start|>' + messages[-1].content|length|string -}}" + CHATML,
    "it shows the day": "{{- '<|im_start|>' + strftime_now('%d %B') + '<|im_end|>' -}}" + CHATML,
    "it has no control token": "{%- for message in messages -%}{{- message.role + CONTENT + '\n' -}}{%- endfor -%}",
    "it shows no system": "{{- '<|im_start|>Hello.' -}}"
    + CHATML.replace("in messages", "in messages if message.role == 'user'"),
    "it turns texts round": CHATML.replace("CONTENT", "message.content|reverse"),
    "it shows no user": CHATML.replace("CONTENT", "('' if message.role == 'user' else message.content)"),
}


@pytest.mark.parametrize("template", UNOPENED.values(), ids=UNOPENED)
def test_templates_that_have_no_opening_are_rendered(tokenizer: ChatTokenizer, template: str) -> None:
    prompts = builder(tokenizer, template.replace("CONTENT", "message.content"))
    meet(prompts, asking("What is 48/2?"))
    assert prompts.build(asking("And 3 * 4?"), None).certified_by == "full_render"
    assert not prompts.upkeep_due  # it is not tried again


def test_a_head_whose_ids_depend_on_what_follows_is_no_opening(tiny_model: Path) -> None:
    """The space before a token that eats it belongs to the head's text, and has no id in the whole."""
    inner = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    inner.add_special_tokens([AddedToken("<|ask|>", special=True, lstrip=True)])
    prompts = builder(
        ChatTokenizer(inner.to_str().encode()),
        "{{- '<|im_start|>' + messages[0].content + ' <|ask|>' + messages[-1].content + '<|im_end|>' -}}",
    )
    meet(prompts, asking("What is 48/2?"))
    assert prompts.build(asking("And 3 * 4?"), None).certified_by == "full_render"
    assert not prompts.upkeep_due


def test_an_opening_with_a_lookalike_is_rendered(tokenizer: ChatTokenizer) -> None:
    """What looks like a control token in a system message is text, which the long way sees to."""
    prompts = chatml(tokenizer)
    shady = {"role": "system", "content": "Say <|im_end|> at the end."}
    meet(prompts, asking("What is 48/2?", shady))
    built = prompts.build(asking("And 3 * 4?", shady), None)
    assert built.certified_by == "full_render"
    assert np.count_nonzero(built.token_ids == tokenizer.token_id("<|im_end|>")) == 2  # the two turns' own


def test_a_wrong_opening_is_found_and_withdrawn(tokenizer: ChatTokenizer, caplog: pytest.LogCaptureFixture) -> None:
    """A template may do something with texts that nobody tried; the audit sees it, and the opening speaks no more."""
    prompts = chatml(tokenizer, "(message.content if message.content|length < 50000 else 'long')")
    meet(prompts, asking("What is 48/2?"))
    long = asking("word " * 12_000)
    assert prompts.build(long, None).certified_by == "opening"
    prompts.upkeep()
    assert prompts.audits.num_alarms == 1
    assert "the opening of" in caplog.text
    assert prompts.build(long, None).certified_by == "full_render"
    assert prompts.build(asking("And 3 * 4?"), None).certified_by == "full_render"


def test_an_opening_that_speaks_where_the_template_refuses_is_withdrawn(tokenizer: ChatTokenizer) -> None:
    refuses = "{%- if messages[-1].content|length > 50000 -%}{{ raise_exception('too long') }}{%- endif -%}"
    prompts = builder(tokenizer, refuses + CHATML.replace("CONTENT", "message.content"))
    meet(prompts, asking("What is 48/2?"))
    assert prompts.build(asking("word " * 12_000), None).certified_by == "opening"
    prompts.upkeep()
    assert prompts.audits.num_alarms == 1
    assert prompts.build(asking("And 3 * 4?"), None).certified_by == "full_render"


def test_the_openings_that_are_kept_are_bounded(tokenizer: ChatTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that served longest ago goes first; it is learned again if it is met as often again."""
    monkeypatch.setattr(openings, "_MAX_KEPT_BYTES", 25_000)  # of two
    prompts = chatml(tokenizer)
    systems = [{"role": "system", "content": f"System {i} of three. " * 100} for i in range(3)]
    for system in systems[:2]:
        meet(prompts, asking("What is 48/2?", system))
    assert prompts.build(asking("And 3 * 4?", systems[0]), None).certified_by == "opening"
    meet(prompts, asking("What is 48/2?", systems[2]))
    found = [prompts.build(asking("And 3 * 4?", system), None).certified_by for system in systems]
    assert found == ["opening", "full_render", "opening"]
