"""Which messages count as the same, and in which tier (design 4)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gateway.contracts.records import MatchTier, RootContext
from gateway.sessions.messages import (
    NO_CALLS,
    CallPositions,
    MessageKey,
    calls_behind,
    compare,
    is_surely,
    message_key,
    reasoning_of,
    root_digest,
)

USER = {"role": "user", "content": "x"}
REPLY = {"role": "assistant", "content": "x"}


def key(message: dict[str, Any]) -> MessageKey:
    return message_key(message, NO_CALLS)


def read(messages: list[dict[str, Any]]) -> tuple[list[MessageKey], CallPositions]:
    """Keys of a conversation's messages, and the calls that hold behind them."""
    keys, calls = [], NO_CALLS
    for message in messages:
        keys.append(message_key(message, calls))
        calls = calls_behind(message, calls)
    return keys, calls


def tier(recorded: dict[str, Any], sent: dict[str, Any]) -> MatchTier | None:
    return compare(key(recorded), key(sent))


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function, **fields}]}


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"role": "assistant", "content": None}, {"role": "assistant"}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": None, "refusal": None}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": []}),
        ({"role": "assistant", "content": ""}, {"role": "assistant", "content": [{"type": "text", "text": ""}]}),
        (REPLY, REPLY | {"tool_calls": []}),
        (REPLY, REPLY | {"tool_calls": None, "function_call": None, "reasoning_content": ""}),
        (USER, {"role": "user", "content": [{"type": "text", "text": "x"}]}),
        (USER, {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}),
        (USER, USER | {"cache_control": {"type": "ephemeral"}}),
        (call('{"a": 1, "b": 2}'), call('{"b":2,"a":1}')),
        (call('{"a": 1}'), call('{"a": 1.0}')),
        (call('{"a": 1e2}'), call('{"a": 100}')),
        (call('{"a": 1e23}'), call('{"a": 100000000000000000000000}')),
        (call('{"a": 3.14159265358979323846}'), call('{"a": 3.141592653589793}')),
        (call('{"a": -0.0}'), call('{"a": 0}')),
        (call('{"a": "\\u00e9"}'), call('{"a": "é"}')),
        (call('{"a": 1}'), call({"a": 1})),
        (call("{}"), call("{}", index=0, id="other")),
        (call("{}"), call("{}", id=None)),
        (call("{}"), call("")),
        (call("{}"), call(None)),
        (call("{}"), call("{}", provider_specific_fields={"x": 1})),
        (call("not json"), call("not json", index=3)),
        (call(nested(60)), call(" " + nested(60))),
    ],
)
def test_spellings_of_one_message_are_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """I3: a client's spelling is no reason to lose a turn."""
    assert tier(one, other) is tier(other, one) is MatchTier.SEMANTIC
    assert tier(one, one) is MatchTier.EXACT


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (USER, {"role": "user", "content": "x "}),
        (USER, {"role": "system", "content": "x"}),
        (USER, USER | {"name": "n"}),
        (USER, {"role": "user", "content": {"text": "x"}}),
        (USER, {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}),
        ({"role": "user", "content": "1"}, {"role": "user", "content": 1}),
        (call('{"a": 1}'), call('{"a": true}')),
        (call('{"a": 1}'), call('{"a": "1"}')),
        (call('{"a": 1}'), call('{"a": {"number": "1e0"}}')),
        (call('{"a": null}'), call("{}")),
        (call('{"a": 10}'), call('{"a": 1}')),
        (call('{"a": -1}'), call('{"a": 1}')),
        (call('{"a": 9007199254740993}'), call('{"a": 9007199254740992}')),
        (call('{"a": 1, "a": 1}'), call('{"a": 1}')),
        (call("not json"), call("not  json")),
        (call('"x"'), call("x")),
        (call("{}"), call("{}", type="custom")),
        (call("{}"), REPLY),
        (call(nested(10_000)), call(" " + nested(10_000))),
    ],
)
def test_different_messages_stay_different(one: dict[str, Any], other: dict[str, Any]) -> None:
    """I1: recorded tokens never stand for a message that the agent changed."""
    assert tier(one, other) is tier(other, one) is None


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_may_be_echoed_under_any_name_or_left_out_but_not_changed(name: str) -> None:
    """I3: what most agents do by default costs no turn."""
    recorded = REPLY | {"reasoning_content": "r"}
    echoed = tier(recorded, REPLY | {name: "r"})
    assert echoed is (MatchTier.EXACT if name == "reasoning_content" else MatchTier.SEMANTIC)
    assert tier(recorded, REPLY) is MatchTier.PROJECTION
    assert tier(recorded, REPLY | {name: ""}) is MatchTier.PROJECTION
    assert tier(recorded, REPLY | {name: "s"}) is None
    assert tier(REPLY, REPLY | {name: "r"}) is None


def test_unknown_keys_on_an_assistant_message_never_count() -> None:
    """I3: the model wrote none of them."""
    for extra in ({"refusal": "no"}, {"annotations": [1]}, {"name": "n"}, {"id": 7}, {"vendor": {"a": 1}}):
        assert tier(REPLY, REPLY | extra) is MatchTier.SEMANTIC
        assert tier(REPLY | extra, REPLY) is MatchTier.SEMANTIC
    assert tier(REPLY | {"vendor": 1}, REPLY | {"vendor": 2}) is MatchTier.SEMANTIC


@pytest.mark.parametrize("role", ["user", "system", "developer", "tool"])
def test_unknown_keys_on_other_messages_may_come_and_go_but_not_change(role: str) -> None:
    message = {"role": role, "content": "x"}
    assert tier(message, message | {"vendor": 1}) is MatchTier.SEMANTIC
    assert tier(message | {"vendor": 1}, message) is MatchTier.SEMANTIC
    assert tier(message | {"vendor": 1}, message | {"vendor": 1, "at": 5}) is MatchTier.SEMANTIC
    assert tier(message | {"vendor": 1}, message | {"vendor": 2}) is None


def test_tool_results_name_calls_by_position_so_that_ids_may_be_rewritten() -> None:
    two = call("{}")
    two["tool_calls"] *= 2

    def result(first_id: str, second_id: str, *, of: Any) -> MessageKey:
        first, second = (entry | {"id": i} for entry, i in zip(two["tool_calls"], (first_id, second_id), strict=True))
        named = {} if of is None else {"tool_call_id": of}
        messages = [two | {"tool_calls": [first, second]}, {"role": "tool", "content": "1", **named}]
        return read(messages)[0][1]

    recorded = result("a", "b", of="b")
    assert compare(recorded, result("c", "d", of="d")) is MatchTier.SEMANTIC
    assert compare(recorded, result("a", "b", of=None)) is MatchTier.SEMANTIC
    assert compare(recorded, result("", "", of="b")) is MatchTier.EXACT
    assert compare(recorded, result("c", "d", of="c")) is None


def test_calls_stay_known_behind_an_inserted_assistant_message() -> None:
    keys, calls = read([call("{}"), REPLY, {"role": "tool", "tool_call_id": "c", "content": "1"}])
    assert calls == {"c": 0}
    assert keys[2].result_of == 0


ODD: list[dict[str, Any]] = [
    {},
    {"role": None},
    {"role": 5, "content": 5},
    {"role": "user", "content": True},
    {"role": "user", "content": [None, 5, "x", [], {"type": "text", "text": 5}]},
    {"role": "user", "content": "half \ud83d a pair"},
    {"role": "user", "content": "y", "n": 10**4000, "f": float("nan"), "": []},
    {"role": "assistant", "tool_calls": "x"},
    {"role": "assistant", "tool_calls": {"a": 1}},
    {"role": "assistant", "tool_calls": 5},
    {"role": "assistant", "tool_calls": [1, None, "x", [], {}, {"function": "f"}, {"id": {"a": 1}}]},
    {"role": "assistant", "function_call": {"arguments": "{"}},
    {"role": "assistant", "reasoning_content": ["a"], "thinking": 5, "reasoning": {"effort": "high"}},
    {"role": "tool", "tool_call_id": {"a": 1}, "content": None},
    {"role": "tool", "tool_call_id": 5},
    call("[" * 10_000),
    call('{"a": NaN}'),
    call('{"a": 1e999999999999999999999, "b": ' + "9" * 6000 + "}"),
    call('{"a": "\\ud83d"}'),
    call(5, id=5),
    call(True, id=True),
    call("{}", type=None, function=None),
]


@pytest.mark.parametrize("message", ODD)
def test_a_message_of_any_shape_is_itself_and_no_other(message: dict[str, Any]) -> None:
    """I6: nothing that JSON can say crashes the gateway."""
    assert tier(message, message) is MatchTier.EXACT
    assert tier(message, USER) is tier(USER, message) is None
    reasoning_of(message)


def test_keys_do_not_depend_on_how_deep_the_caller_stands() -> None:
    """A tree rebuilt from the ledger has the keys that the live one had."""

    def deeper(levels: int, message: dict[str, Any]) -> MessageKey:
        return deeper(levels - 1, message) if levels else key(message)

    for levels in (50, 99, 101, 150, 300, 2000):
        message = call(" " + nested(levels))
        assert deeper(400, message) == key(message)
        spelled_alike = tier(message, call(nested(levels))) is MatchTier.SEMANTIC
        assert spelled_alike == (levels <= 200)


def test_root_depends_on_tools_and_arguments_not_on_key_order() -> None:
    tools = ({"a": 1, "b": 2},)
    assert root_digest(RootContext(tools, {"x": 1})) == root_digest(RootContext(({"b": 2, "a": 1},), {"x": 1}))
    assert root_digest(RootContext(tools, {"x": 1})) != root_digest(RootContext(tools, {"x": 2}))
    assert root_digest(RootContext(tools, {})) != root_digest(RootContext((), {}))
    both = (json.loads('{"name": "a"}'), {"name": "b"})
    assert root_digest(RootContext(both, {})) != root_digest(RootContext(both[::-1], {}))


def test_the_null_refusal_of_our_own_replies_leaves_a_replay_exact() -> None:
    """A text there is something that a client has put on the message."""
    assert tier(REPLY, REPLY | {"refusal": None}) is MatchTier.EXACT
    assert tier(REPLY, REPLY | {"refusal": "no"}) is MatchTier.SEMANTIC


def test_messages_are_surely_the_same_only_where_their_keys_are() -> None:
    counted = {"role": "user", "content": "y", "n": 1}
    said = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]}
    messages = [counted, {**counted, "n": True}, {**counted, "n": 1.0}, said, {**said, "content": ""}, *ODD]
    for one in messages:
        assert is_surely(one, one)
        for other in messages:
            copy = json.loads(json.dumps(other))
            assert not is_surely(copy, one) or key(copy).exact == key(one).exact
    assert is_surely(json.loads(json.dumps(said)), said)
    assert is_surely({**said, "refusal": None}, said)
    assert not is_surely({**counted, "n": True}, counted)
