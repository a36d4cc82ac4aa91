"""Ids for the calls of models that write none, in a form that the model's template accepts."""

from __future__ import annotations

import json
import secrets
import string
from enum import Enum

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.fresh_ids import fresh_hex
from gateway.contracts.generation import JsonValue
from gateway.tito.conversation import Conversation
from gateway.tito.parsing.calls import PROBE_NAME
from gateway.tito.template import ChatTemplate

PROBE_TOOL: JsonValue = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "Probe.",
        "parameters": {
            "type": "object",
            "properties": {"probe_key": {"type": "string", "description": "Probe."}},
            "required": ["probe_key"],
        },
    },
}
"""The tool that is offered when a call is rendered to see how a template writes it."""

PROBE_QUESTION = "Probe question"
_ALPHANUMERICS = string.ascii_letters + string.digits


class CallIdStyle(Enum):
    """How ids look: OpenAI's, or the nine letters and digits that Mistral's templates insist on."""

    CALL_HEX = "call_hex"
    NINE_ALPHANUMERICS = "nine_alphanumerics"

    def new_id(self) -> str:
        """A fresh id."""
        if self is CallIdStyle.CALL_HEX:
            return f"call_{fresh_hex(32)}"
        return "".join(secrets.choice(_ALPHANUMERICS) for _ in range(9))


def learn_call_ids(template: ChatTemplate) -> CallIdStyle:
    """The first style with which the template renders a call and its result; OpenAI's where it renders neither."""
    for style in CallIdStyle:
        try:
            template.render(probe_conversation(style.new_id(), with_result=True))
        except TemplateRaised:
            continue
        return style
    return CallIdStyle.CALL_HEX


def show_call(template: ChatTemplate) -> str:
    """What the template writes for a call behind the user's question; "" where it refuses in every form."""
    for style in CallIdStyle:
        for with_result in (False, True):
            conversation = probe_conversation(style.new_id(), with_result=with_result)
            try:
                text = template.render(conversation, add_generation_prompt=False)
            except TemplateRaised:
                continue
            return text.rpartition(PROBE_QUESTION)[2]
    return ""


def probe_conversation(call_id: str, *, with_result: bool) -> Conversation:
    """A question, a call to `PROBE_NAME`, and its result if wanted."""
    function = {"name": PROBE_NAME, "arguments": json.dumps({"probe_key": "probe value"})}
    call = {"id": call_id, "type": "function", "function": function}
    result = {"role": "tool", "tool_call_id": call_id, "name": PROBE_NAME, "content": "Probe result"}
    messages: tuple[JsonValue, ...] = (
        {"role": "user", "content": PROBE_QUESTION},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    )
    return Conversation((*messages, result) if with_result else messages, (PROBE_TOOL,))
