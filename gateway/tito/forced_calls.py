"""`tool_choice` required or named, as a grammar for the engine: the reply must be calls, in this model's own syntax.

How a call is written is learned from the chat template: a call with a sentinel as its argument is rendered, and what
stands before and behind its JSON arguments is what the grammar asks for. Syntaxes whose arguments are no JSON (XML-like
ones) cannot be put that way. The grammar is xgrammar's structural tag (its `triggered_tags`, `at_least_one`), which
SGLang and vLLM take.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from gateway.contracts.errors import TemplateRaised
from gateway.contracts.generation import JsonValue
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate

_SENTINEL = "Sentinel7q"
_ARGUMENTS = re.compile(r'\{\s*"k"\s*:\s*"' + _SENTINEL + r'"\s*\}')
_CALL_ID = "call00001"
_QUESTION: JsonValue = {"role": "user", "content": "q"}


@dataclass(frozen=True, slots=True)
class CallText:
    """What the model writes around the JSON arguments of a call."""

    before: str
    behind: str


def call_text(template: ChatTemplate, name: str, *, stops: Sequence[str]) -> CallText | None:
    """How a call of function `name` is written; None where its arguments are not shown as JSON, or an id with them.

    stops: texts of the tokens that end a turn, which are no part of a call.
    """
    function = {"name": name, "arguments": json.dumps({"k": _SENTINEL})}
    call = {"id": _CALL_ID, "type": "function", "function": function}
    reply = {"role": "assistant", "content": "", "tool_calls": [call]}
    tool = {"type": "function", "function": {"name": name, "description": "", "parameters": _parameters()}}
    try:
        asked = template.render(Conversation((_QUESTION,), (tool,)))
        shown = template.render(Conversation((_QUESTION, reply), (tool,)), add_generation_prompt=False)
    except TemplateRaised:
        return None
    arguments = _ARGUMENTS.search(shown)
    if arguments is None:
        return None
    start = len(_common_beginning((asked, shown)))
    before, behind = _without_reasoning_block(shown[start : arguments.start()]), shown[arguments.end() :]
    ends = [at for stop in stops if stop and (at := behind.find(stop)) >= 0]
    text = CallText(before, behind[: min(ends, default=None)].rstrip())
    # Where the model writes ids of its own, a grammar would give all calls the same one.
    return None if _CALL_ID in text.before + text.behind else text


def forced_calls(
    template: ChatTemplate,
    tools: Sequence[JsonValue],
    names: Sequence[str],
    *,
    stops: Sequence[str],
    several: bool,
) -> JsonValue | None:
    """The structural tag of a reply that calls one of `names` (or `several` of them); None where it cannot be put so.

    tools: the request's definitions, whose parameters are the arguments' schemas.
    """
    schemas = {name: parameters for tool in tools for name, parameters in _signature(tool)}
    tags: list[JsonValue] = []
    for name in names:
        text = call_text(template, name, stops=stops)
        if text is None or not text.before.strip():
            return None
        content = {"type": "json_schema", "json_schema": schemas.get(name) or {"type": "object"}}
        tags.append({"type": "tag", "begin": text.before, "content": content, "end": text.behind})
    trigger = _common_beginning([tag["begin"] for tag in tags])
    if not tags or not trigger:
        return None
    triggered = {"type": "triggered_tags", "triggers": [trigger], "tags": tags}
    return {
        "type": "structural_tag",
        "format": triggered | {"at_least_one": True, "stop_after_first": not several},
    }


def _without_reasoning_block(text: str) -> str:
    """Some templates write an empty block of reasoning ahead of a call; the model's own comes before the grammar."""
    return re.sub(r"^\s*<think>\s*</think>\s*", "", text).lstrip("\n")


def _common_beginning(texts: Sequence[str]) -> str:
    shortest = min(texts, key=len, default="")
    length = next((i for i in range(len(shortest)) if len({text[i] for text in texts}) > 1), len(shortest))
    return shortest[:length]


def _parameters() -> JsonValue:
    return {"type": "object", "properties": {"k": {"type": "string", "description": ""}}, "required": ["k"]}


def _signature(tool: JsonValue) -> list[tuple[str, JsonValue]]:
    function = tool.get("function") if isinstance(tool, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        return []
    return [(function["name"], function.get("parameters"))]
