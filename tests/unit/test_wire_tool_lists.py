"""Equal lists of tools are one object; lists that a template might show in another way are not."""

from __future__ import annotations

import json

from gateway.contracts.generation import JsonValue
from gateway.wire.tool_lists import shared_tools


def tools(text: str) -> tuple[JsonValue, ...]:
    return tuple(json.loads(text))


def test_equal_tools_of_two_sessions_are_kept_once() -> None:
    text = '[{"type": "function", "function": {"name": "look", "parameters": {"minimum": 1}}}]'
    assert shared_tools(tools(text)) is shared_tools(tools(text))


def test_tools_that_differ_in_the_order_of_keys_or_the_kind_of_a_number_stay_as_they_are() -> None:
    spellings = ('[{"a": 1, "b": 2}]', '[{"b": 2, "a": 1}]', '[{"a": 1.0, "b": 2}]', '[{"a": true, "b": 2}]')
    assert [json.dumps(shared_tools(tools(text))) for text in spellings] == list(spellings)


def test_what_cannot_be_compared_is_kept_as_it_came() -> None:
    beyond_64_bits = tools('[{"maximum": 123456789012345678901234567890}]')
    long = tools(json.dumps([{"description": "x" * 100_000}]))
    assert shared_tools(beyond_64_bits) is beyond_64_bits
    assert shared_tools(long) is long


def test_only_the_lists_that_were_used_last_are_held() -> None:
    first = shared_tools(tools('[{"name": "the first"}]'))
    for number in range(100):
        shared_tools(({"name": f"another {number}"},))
    assert shared_tools(tools('[{"name": "the first"}]')) is not first
