"""A reply that must be calls: the grammar is in the model's own syntax, or there is none and the record says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gateway.contracts.errors import InvalidRequest
from gateway.tito.forced_calls import call_text, forced_calls
from gateway.tito.template import ChatTemplate
from gateway.wire.openai import parse_chat_request

FAMILIES = Path(__file__).parent / "test_parsing_templates"
STOPS = ("<|im_end|>", "<|call|>", "<｜end▁of▁sentence｜>", "<|eot_id|>", "</s>")
TOOLS = [
    {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "required": ["at"]}}},
    {"type": "function", "function": {"name": "wait"}},
]


def template(family: str) -> ChatTemplate:
    return ChatTemplate({"default": (FAMILIES / f"{family}.jinja").read_text()}, special_tokens={"eos_token": "</s>"})


@pytest.mark.parametrize(
    ("family", "before", "behind"),
    [
        ("hermes", '<tool_call>\n{"name": "look", "arguments": ', "}\n</tool_call>"),
        ("deepseek_v31", "look<｜tool▁sep｜>", "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"),
        ("llama3_json", '{"name": "look", "parameters": ', "}"),
        ("harmony", " to=functions.look<|channel|>commentary json<|message|>", ""),
    ],
)
def test_what_stands_around_a_calls_arguments_is_the_templates(family: str, before: str, behind: str) -> None:
    text = call_text(template(family), "look", stops=STOPS)
    assert text is not None
    assert text.before.endswith(before)
    assert text.behind == behind


@pytest.mark.parametrize("family", ["qwen3_coder", "glm45", "seed_oss", "kimi_k2"])
def test_a_syntax_without_json_arguments_or_with_ids_has_no_grammar(family: str) -> None:
    """It is left to the model, and the record says so."""
    assert call_text(template(family), "look", stops=STOPS) is None
    assert forced_calls(template(family), TOOLS, ["look"], stops=STOPS, several=True) is None


def test_the_grammar_wants_one_of_the_functions_with_its_own_schema() -> None:
    tag: Any = forced_calls(template("hermes"), TOOLS, ["look", "wait"], stops=STOPS, several=False)
    assert tag["format"]["at_least_one"] is True
    assert tag["format"]["stop_after_first"] is True
    schemas = [entry["content"]["json_schema"] for entry in tag["format"]["tags"]]
    assert schemas == [{"type": "object", "required": ["at"]}, {"type": "object"}]
    assert all(entry["begin"].startswith(tag["format"]["triggers"][0]) for entry in tag["format"]["tags"])


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ()),
        ("auto", ()),
        ("none", ()),
        ("required", ("look", "wait")),
        ({"type": "function", "function": {"name": "wait"}}, ("wait",)),
    ],
)
def test_tool_choice_names_what_must_be_called(choice: Any, names: tuple[str, ...]) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": TOOLS, "tool_choice": choice}
    assert parse_chat_request(json.dumps(body).encode()).required_calls == names


@pytest.mark.parametrize(
    ("choice", "tools", "says"),
    [
        ("required", [], "there are no tools"),
        ("sometimes", TOOLS, "expected none, auto, required, allowed_tools, or a function by name"),
        ({"type": "function", "function": {"name": "run"}}, TOOLS, "'run' is none of the tools (look, wait)"),
    ],
)
def test_a_tool_choice_that_cannot_be_met_is_a_400_that_says_why(choice: Any, tools: list[Any], says: str) -> None:
    body = {"messages": [{"role": "user", "content": "x"}], "tools": tools, "tool_choice": choice}
    with pytest.raises(InvalidRequest) as caught:
        parse_chat_request(json.dumps(body).encode())
    assert says in caught.value.message
