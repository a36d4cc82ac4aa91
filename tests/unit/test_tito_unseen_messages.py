"""Messages that a template hides are found, with a second render or without one."""

from __future__ import annotations

from typing import Any

from gateway.tito.conversation import Conversation
from gateway.tito.junction import unseen_messages
from gateway.tito.template import ChatTemplate

SHOWS_ONE_SYSTEM = (
    "{% if tools %}Tools: {{ tools | tojson }}{% endif %}"
    "{% for m in messages %}{% if loop.first or m.role != 'system' %}<{{ m.role }}>{{ m.content | trim }}{% endif %}"
    "{% endfor %}<You may think before you answer.>"
)
RULES = "Answer in one sentence, please."
QUESTION = "How much is three and four?"


def unseen(*contents: str, tools: tuple[Any, ...] = ()) -> tuple[int, ...]:
    """Of a conversation of system messages with these contents behind a first one, and a question."""
    template = ChatTemplate({"default": SHOWS_ONE_SYSTEM}, special_tokens={})
    systems = [{"role": "system", "content": content} for content in ("You are a careful assistant.", *contents)]
    conversation = Conversation((*systems, {"role": "user", "content": QUESTION}), tools)
    return unseen_messages(template, conversation, template.render(conversation))


def test_a_conversation_that_is_shown_hides_nothing() -> None:
    assert unseen() == ()


def test_a_hidden_message_is_found() -> None:
    assert unseen(RULES) == (1,)


def test_a_hidden_message_is_found_although_its_text_stands_elsewhere_too() -> None:
    assert unseen(QUESTION) == (1,)
    assert unseen("three and four") == (1,)
    assert unseen(RULES, tools=({"name": "f", "description": f"Careful: {RULES}"},)) == (1,)
    assert unseen("You may think before you answer.") == (1,)
    assert unseen("system") == (1,)


def test_a_hidden_message_is_found_although_a_key_spells_it() -> None:
    assert unseen("additionalProperties", tools=({"name": "f", "additionalProperties": False},)) == (1,)
