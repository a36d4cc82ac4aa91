"""Which messages count as the same (design 4)."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.contracts.records import RootContext
from gateway.sessions.messages import MessageKey, message_keys, root_digest


def key(message: dict[str, Any]) -> MessageKey:
    return message_keys([message], calls={})[0][0]


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function, **fields}]}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "assistant", "content": None}, {"role": "assistant"}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": None, "refusal": None}),
        ({"role": "user", "content": "x"}, {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        (call('{"a": 1, "b": 2}'), call('{"b":2,"a":1}')),
        (call('{"a": 1}'), call('{"a": 1.0}')),
        (call('{"a": 1e2}'), call('{"a": 100}')),
        (call('{"a": 1}'), call({"a": 1})),
        (call("{}"), call("{}", index=0, id="other")),
        (call("not json"), call("not json", index=3)),
    ],
)
def test_spellings_of_one_message_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(one).exact != key(other).exact
    assert key(one).semantic == key(other).semantic


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "user", "content": "x"}, {"role": "user", "content": "x "}),
        ({"role": "user", "content": "x"}, {"role": "system", "content": "x"}),
        (call('{"a": 1}'), call('{"a": true}')),
        (call('{"a": 1}'), call('{"a": "1"}')),
        (call('{"a": 1}'), call('{"a": {"number": "1e0"}}')),
        (call('{"a": null}'), call("{}")),
        (call('{"a": 9007199254740993}'), call('{"a": 9007199254740992}')),
        (call('{"a": 1, "a": 1}'), call('{"a": 1}')),
        (call("not json"), call("not  json")),
        (call('"x"'), call("x")),
        ({"role": "user", "content": "x"}, {"role": "user", "content": "x", "name": "n"}),
    ],
)
def test_different_messages_stay_different(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert key(one).core != key(other).core


def test_reasoning_is_in_the_semantic_form_under_any_name_and_not_in_the_core() -> None:
    bare = {"role": "assistant", "content": "x"}
    first = key(bare | {"reasoning_content": "r"})
    second = key(bare | {"reasoning": "r"})
    assert first.semantic == second.semantic != key(bare).semantic
    assert first.core == key(bare).core
    assert (first.has_reasoning, key(bare).has_reasoning) == (True, False)


def test_tool_results_name_calls_by_position_so_that_ids_may_be_rewritten() -> None:
    def conversation(call_id: str, result_id: str) -> list[dict[str, Any]]:
        return [call("{}", id=call_id), {"role": "tool", "tool_call_id": result_id, "content": "1"}]

    same, _ = message_keys(conversation("a", "a"), calls={})
    renamed, _ = message_keys(conversation("b", "b"), calls={})
    other, _ = message_keys(conversation("a", "unknown"), calls={})
    assert same[1].semantic == renamed[1].semantic != other[1].semantic


def test_root_depends_on_tools_and_arguments_not_on_key_order() -> None:
    tools = ({"a": 1, "b": 2},)
    assert root_digest(RootContext(tools, {"x": 1})) == root_digest(RootContext(({"b": 2, "a": 1},), {"x": 1}))
    assert root_digest(RootContext(tools, {"x": 1})) != root_digest(RootContext(tools, {"x": 2}))
    assert root_digest(RootContext(tools, {})) != root_digest(RootContext((), {}))
