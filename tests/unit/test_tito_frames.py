"""Frames say what the template says, whatever the texts, and are silent where it might say something else."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.models.families import FAMILIES
from gateway.contracts.generation import JsonValue
from gateway.tito.certificate import ShapeKey, stand_in_tools
from gateway.tito.conversation import Conversation
from gateway.tito.frames import Counts, Frame, counts_of, learn_frame
from gateway.tito.junction import local_suffix
from gateway.tito.shapes import ContentKind, MessageForm, Shape, example_tools
from gateway.tito.template import ChatTemplate

USER, TOOL, SECOND = MessageForm("user"), MessageForm("tool", answers=0), MessageForm("tool", answers=1)
TEXT_REPLY = MessageForm("assistant")
CALL = MessageForm("assistant", ContentKind.ABSENT, num_calls=1)
TWO_CALLS = MessageForm("assistant", ContentKind.ABSENT, num_calls=2)
SHAPES = {
    "a user": Shape(True, True, "user", TEXT_REPLY, (USER,)),
    "a result": Shape(True, True, "user", CALL, (TOOL,)),
    "a result and a user": Shape(False, True, "tool", CALL, (TOOL, USER)),
    "two results": Shape(True, True, "user", TWO_CALLS, (TOOL, SECOND)),
    "parts": Shape(True, True, "user", TEXT_REPLY, (MessageForm("user", ContentKind.PARTS),)),
    "several parts": Shape(True, True, "user", TEXT_REPLY, (MessageForm("user", ContentKind.PARTS, num_parts=3),)),
    "a result of parts": Shape(
        False, True, "user", CALL, (MessageForm("tool", ContentKind.PARTS, answers=0, num_parts=2),)
    ),
}
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' ~ message.role ~ '\\n' ~ CONTENT ~ '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


@cache
def template_of(family: str) -> ChatTemplate:
    return ChatTemplate({"default": FAMILIES[family].template}, special_tokens={})


def chatml(content: str) -> ChatTemplate:
    return ChatTemplate({"default": CHATML.replace("CONTENT", content)}, special_tokens={})


def frame_of(template: ChatTemplate, shape: Shape, stop: str) -> Frame | None:
    return learn_frame(template, ShapeKey(shape, "{}"), {}, stop)


def after(shape: Shape, texts: list[str], names: list[str]) -> list[JsonValue]:
    """A reply of a shape and what follows it, with these texts."""
    reply: dict[str, JsonValue] = {"role": "assistant", "content": "Said." if not shape.reply.num_calls else None}
    if shape.reply.num_calls:
        reply["tool_calls"] = [
            {"id": f"call{i:05}", "type": "function", "function": {"name": names[i], "arguments": "{}"}}
            for i in range(shape.reply.num_calls)
        ]
    messages: list[JsonValue] = [reply]
    for form, text in zip(shape.appended, texts, strict=False):
        content: JsonValue = text
        if form.content is ContentKind.PARTS:
            content = [{"type": "text", "text": text if k == 0 else f"{text}{k}"} for k in range(form.num_parts)]
        message: dict[str, JsonValue] = {"role": form.role, "content": content}
        messages.append(message | ({"tool_call_id": f"call{form.answers:05}"} if form.answers is not None else {}))
    return messages


def rendered(template: ChatTemplate, shape: Shape, messages: list[JsonValue], stop: str) -> str | None:
    opening: list[JsonValue] = [{"role": "system", "content": "s"}] if shape.starts_with_system else []
    opening.append({"role": "user", "content": "q"})
    conversation = Conversation((*opening, *messages), example_tools(1))
    tools = stand_in_tools(conversation)
    return local_suffix(template, conversation, num_messages=len(opening) + 1, stop=stop, tools=tools)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frame_says_what_the_template_says(family: str, shape: Shape) -> None:
    """For texts that are not blank (another shape) and hold none of the template's markup (the long way)."""
    template, stop = template_of(family), FAMILIES[family].stops[0]
    frame = frame_of(template, shape, stop)
    if frame is None:
        return
    texts = st.text(min_size=1) | st.sampled_from(
        ["user", "tool", "a\n b \n", '{"x": "é\\n"}', "<b>", "0", " \u00a0x "]
    )

    @settings(max_examples=40, derandomize=True)
    @given(
        texts=st.lists(texts, min_size=2, max_size=2),
        names=st.lists(st.text("abc_", min_size=1), min_size=2, max_size=2),
    )
    def check(texts: list[str], names: list[str]) -> None:
        assume(all(text.strip() and not any(mark in text for mark in template.looked_for) for text in texts))
        messages = after(shape, texts, names)
        filled = frame.fill(messages)
        assert filled is None or filled == rendered(template, shape, messages, stop)

    check()


@pytest.mark.parametrize("family", ["chatml_folds", "chatml_thinks", "xml_calls", "between_turns"])
def test_ordinary_shapes_have_frames(family: str) -> None:
    """Otherwise the test above would pass with nothing in it."""
    frame = frame_of(template_of(family), SHAPES["a result"], FAMILIES[family].stops[0])
    assert frame is not None
    assert frame.fill(after(SHAPES["a result"], ["It is 42."], ["f"])) is not None


NUMBERS = {
    "messages": "loop.index",
    "users": "messages[:loop.index0]|selectattr('role', 'equalto', 'user')|list|length",
    "replies": "messages[:loop.index]|selectattr('role', 'equalto', 'assistant')|list|length",
    "results": "messages[:loop.index0]|selectattr('role', 'equalto', 'tool')|list|length + 7",
    "calls": "messages[:loop.index]|selectattr('tool_calls')|map(attribute='tool_calls')|sum(start=[])|length",
}
"""What a template may put before a message's text, by what it counts."""


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("counted", NUMBERS)
def test_a_frame_counts_as_the_template_does(counted: str, shape: Shape) -> None:
    """Behind any history; where two counts that went together no longer do, it is silent."""
    template = ChatTemplate({"default": CHATML.replace("CONTENT", _numbered(counted))}, special_tokens={})
    frame = frame_of(template, shape, "<|im_end|>")
    assert frame is not None
    assert frame.is_numbered
    kinds = st.sampled_from(["user", "reply", "call", "calls", "lost"])
    told: list[bool] = []

    @settings(max_examples=40, derandomize=True)
    @given(words=st.lists(kinds, max_size=12), has_system=st.booleans())
    def check(words: list[str], has_system: bool) -> None:
        history = past(words, has_system=has_system)
        messages = after(shape, ["It is 42.", "And 43?"], ["one", "two"])
        conversation = Conversation((*history, *messages), example_tools(1))
        tools = stand_in_tools(conversation)
        num_messages = len(history) + 1
        shown = local_suffix(
            template, conversation, num_messages=num_messages, stop="<|im_end|>", tools=tools, history=history
        )
        filled = frame.fill(messages, counts_of(history))
        told.append(filled is not None)
        assert filled in (None, shown)
        if "lost" not in words:
            assert filled == shown

    check()
    assert True in told


def _numbered(counted: str) -> str:
    return f"({NUMBERS[counted]})|string ~ ': ' ~ (message.content if message.content is string else '')"


def past(words: list[str], *, has_system: bool) -> list[JsonValue]:
    """A history; "lost" is a call that nobody answered."""
    messages: list[JsonValue] = [{"role": "system", "content": "s"}] if has_system else []
    for word in (*words, "user"):
        num_calls = {"call": 1, "calls": 2, "lost": 1}.get(word, 0)
        calls = [
            {"id": f"past{i:05}", "type": "function", "function": {"name": "probe", "arguments": "{}"}}
            for i in range(num_calls)
        ]
        if word == "user":
            messages.append({"role": "user", "content": "3 questions"})
        elif word == "reply":
            messages.append({"role": "assistant", "content": "12"})
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": calls})
            answered = calls if word != "lost" else []
            messages += [{"role": "tool", "tool_call_id": call["id"], "content": "5"} for call in answered]
    return messages


def test_counts_are_of_histories_that_every_template_counts_alike() -> None:
    history = past(["calls", "reply", "lost"], has_system=True)
    assert counts_of(history) == Counts(messages=7, users=1, replies=3, results=2, calls=3)
    assert counts_of([*history, {"role": "system", "content": "again"}]) is None
    assert counts_of([{"role": "developer", "content": "s"}, *history[1:]]) is None
    assert counts_of([*history, "no message"]) is None
    assert counts_of([*history, {"role": "assistant", "tool_calls": {"id": "call00001"}}]) is None
    frame = frame_of(template_of("counts_calls"), SHAPES["a result"], "<|im_end|>")
    assert frame is not None
    assert frame.fill(after(SHAPES["a result"], ["42"], ["f"])) is None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("('gone' if message.content == 'plum' else message.content)", "plum"),
        ("('gone' if message.content|trim|lower == 'plum' else message.content)", " Plum\n"),
        ("('gone' if 'plum' in message.content else message.content)", "a plum tree"),
        ("('gone' if message.content.startswith('plum') else message.content)", "plums"),
        ("message.content.replace('plum', 'pear')", "two plums"),
        ("(message.content.split('plum')|last)", "one plum two"),
    ],
)
def test_a_frame_is_silent_about_texts_that_the_template_names(content: str, text: str) -> None:
    template = chatml(content)
    frame = frame_of(template, SHAPES["a user"], "<|im_end|>")
    assert frame is not None
    other, named = (after(SHAPES["a user"], [words], []) for words in ("An apple.", text))
    assert frame.fill(other) == rendered(template, SHAPES["a user"], other, "<|im_end|>")
    assert frame.fill(named) is None


@pytest.mark.parametrize(
    "content",
    [
        "(message.content[:100] if message.content|length > 1000 else message.content)",
        "message.content|upper",
        "message.content.replace('\\n', ' ')",
        "message.content|length",
        "(message.content ~ strftime_now('%d'))",
    ],
)
def test_a_template_that_changes_texts_has_no_frame(content: str) -> None:
    assert frame_of(chatml(content), SHAPES["a user"], "<|im_end|>") is None


def test_what_a_template_does_to_every_text_is_part_of_the_frame() -> None:
    for content, expected in (("message.content|trim", "a"), ("(message.content|tojson)", '" a\\n"')):
        frame = frame_of(chatml(content), SHAPES["a user"], "<|im_end|>")
        assert frame is not None
        filled = frame.fill(after(SHAPES["a user"], [" a\n"], []))
        assert filled == f"\n<|im_start|>user\n{expected}<|im_end|>\n<|im_start|>assistant\n"
