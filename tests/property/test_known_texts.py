"""Requests that begin with the text of an earlier one are read as if nothing was known of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields

from gateway.contracts.errors import InvalidRequest
from gateway.wire.known_texts import KnownTexts
from gateway.wire.openai import parse_chat_request
from gateway.wire.request import TurnRequest

TEXTS = st.text(max_size=12) | st.sampled_from(["]", '"]', "],", '"messages":[', "\\", "😀", "\ud800"])
PART = st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool"]), "content": TEXTS | st.lists(PART, min_size=1, max_size=2)},
    optional={
        "tool_call_id": TEXTS,
        "n": st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    },
)
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "model": TEXTS,
        "temperature": st.floats(0, 2),
        "tools": st.just([{"type": "function", "function": {"name": "messages"}}]),
        "metadata": st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=2)}),
        "extra": st.integers(-(2**70), 2**70),
    },
)
SPACES = st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", " : ")])


def same(one: TurnRequest, other: TurnRequest) -> bool:
    """1, 1.0 and true are not the same."""
    return all(repr(getattr(one, field.name)) == repr(getattr(other, field.name)) for field in fields(TurnRequest))


def read(body: bytes, known: KnownTexts | None) -> TurnRequest | str:
    try:
        return parse_chat_request(body, known)
    except InvalidRequest as error:
        return error.message


def check(body: bytes, known: KnownTexts) -> None:
    quick, whole = read(body, known), read(body, None)
    if isinstance(whole, str) or isinstance(quick, str):
        assert quick == whole
    else:
        assert same(quick, whole)


@settings(max_examples=300)
@given(st.data())
def test_whatever_an_agent_adds_is_read_as_in_a_whole_request(data: st.DataObject) -> None:
    """I6, I8: any order of fields, spacing and content; histories that grow, are cut, edited and taken up again."""
    known = KnownTexts()
    others, separators = data.draw(OTHERS), data.draw(SPACES)
    first = data.draw(st.booleans())
    history: list[Any] = []
    for _ in range(data.draw(st.integers(1, 6))):
        change = data.draw(st.sampled_from(["add", "add", "add", "cut", "other fields", "an image"]))
        if change == "cut":
            history = history[: data.draw(st.integers(0, len(history)))]
        if change == "other fields":
            others = data.draw(OTHERS)
        history = [*history, *data.draw(st.lists(MESSAGE, min_size=1, max_size=3))]
        if change == "an image":
            history = [*history, {"role": "user", "content": [IMAGE]}]
        messages = {"messages": history}
        value = {**messages, **others} if first else {**others, **messages}
        ascii_only = data.draw(st.booleans())
        text = json.dumps(value, separators=separators, ensure_ascii=ascii_only)
        check(text.encode("utf-8", "surrogatepass"), known)


@settings(max_examples=300)
@given(st.data())
def test_whatever_stands_between_known_head_and_tail_is_read_as_in_a_whole_request(data: st.DataObject) -> None:
    """I6, I8: also what is no JSON, ends the list early, or opens another one."""
    known = KnownTexts()
    body = b'{"metadata": {"messages": [1]}, "messages": [{"role": "user", "content": "q"}], "n": 1}'
    check(body, known)
    cut = body.index(b'"q"}') + 4
    pieces = st.sampled_from(
        [
            b",",
            b' {"role": "user", "content": "x"}',
            b"]",
            b"[",
            b'"n": 2',
            b'"messages": [',
            b"null",
            b"}",
            b" ",
            b'{"role": 1}',
        ]
    )
    added = b"".join(data.draw(st.lists(pieces, max_size=6)))
    check(body[:cut] + added + body[cut:], known)


def test_only_what_is_added_is_read() -> None:
    """The known part is compared, not parsed: its messages are the objects that were read before."""
    known = KnownTexts()
    history = [{"role": "user", "content": f"m{i}"} for i in range(20)]
    earlier = parse_chat_request(json.dumps({"messages": history, "model": "m"}).encode(), known)
    history.append({"role": "user", "content": "new"})
    later = parse_chat_request(json.dumps({"messages": history, "model": "m"}).encode(), known)
    assert later.messages == tuple(history)
    assert all(one is other for one, other in zip(earlier.messages, later.messages, strict=False))
    assert later.tools is earlier.tools


def test_two_conversations_of_one_session_are_both_known() -> None:
    """An agent and its sub-agent take turns."""
    known = KnownTexts()
    one = [{"role": "user", "content": "one"}]
    two = [{"role": "user", "content": "two"}]
    for _ in range(3):
        for history in (one, two):
            before = known.num_bytes
            request = parse_chat_request(json.dumps({"messages": history}).encode(), known)
            assert request.messages == tuple(history)
            assert known.num_bytes > before
            history.append({"role": "user", "content": "more"})
    body = json.dumps({"messages": one}).encode()
    found = known.find(body)
    assert found is not None
    assert found[1] == b', {"role": "user", "content": "more"}'


@pytest.mark.parametrize("number", [2, 5])
def test_an_error_names_the_message_by_its_place_in_the_whole_history(number: int) -> None:
    known = KnownTexts()
    history: list[Any] = [{"role": "user", "content": "q"}] * number
    parse_chat_request(json.dumps({"messages": history}).encode(), known)
    body = json.dumps({"messages": [*history, {"role": 7}]}).encode()
    with pytest.raises(InvalidRequest, match=rf"messages\[{number}\]\.role"):
        parse_chat_request(body, known)
