"""What a developer message says reaches the model under every template, as engines have it."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.models.families import FAMILIES
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate

WORDS = "Answer in rhymes only."
USER: dict[str, Any] = {"role": "user", "content": "What is 48/2?"}
SYSTEM: dict[str, Any] = {"role": "system", "content": "Be careful."}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "It is 24."}
DEVELOPER: dict[str, Any] = {"role": "developer", "content": WORDS}
PARTS: dict[str, Any] = {"role": "developer", "content": [{"type": "text", "text": WORDS}]}
WITHOUT_DEVELOPERS = (
    "chatml_folds", "chatml_thinks", "openers", "inst_strict", "hoists_system", "drops_system", "raises"
)  # fmt: skip
HISTORIES = {
    "first": [DEVELOPER, USER],
    "first, as parts": [PARTS, USER],
    "behind the system": [SYSTEM, DEVELOPER, USER],
    "parts behind the system": [SYSTEM, PARTS, USER],
    "later": [USER, ANSWER, DEVELOPER, USER],
    "later, with a system": [SYSTEM, USER, ANSWER, PARTS, USER],
    "twice": [DEVELOPER, USER, ANSWER, {**DEVELOPER, "content": "And briefly."}, USER],
}


def template_of(family: str) -> ChatTemplate:
    return ChatTemplate({"default": FAMILIES[family].template}, special_tokens={"bos_token": "", "eos_token": "</s>"})


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_developer_says_is_shown_by_every_template(family: str, history: str) -> None:
    """I6: in its place as the template has it, as a system's words where it has no developers."""
    template = template_of(family)
    text = template.render(Conversation(tuple(HISTORIES[history])))
    assert text.count(WORDS) == 1
    if history == "twice":
        assert text.count("And briefly.") == 1


@pytest.mark.parametrize("family", WITHOUT_DEVELOPERS)
def test_a_first_developer_is_the_first_system_where_there_are_no_developers(family: str) -> None:
    """What engines do with such a template."""
    template = template_of(family)
    assert not any(template.content_forms("developer"))
    renders = [template.render(Conversation(({**DEVELOPER, "role": role}, USER))) for role in ("developer", "system")]
    assert renders[0] == renders[1]


def test_a_template_that_knows_developers_is_given_them() -> None:
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template = ChatTemplate({"default": source}, special_tokens={})
    assert template.render(Conversation((SYSTEM, DEVELOPER, USER))) == (
        "<system>Be careful.<developer>Answer in rhymes only.<user>What is 48/2?"
    )


def test_the_conversation_itself_is_left_alone() -> None:
    """The record keeps the role that was sent."""
    messages = (SYSTEM, dict(DEVELOPER), USER)
    template_of("drops_system").render(Conversation(messages))
    assert [message["role"] for message in messages] == ["system", "developer", "user"]
    assert messages[0] == {"role": "system", "content": "Be careful."}
