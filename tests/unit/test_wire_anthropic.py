"""Anthropic's wire format: what is sent back is the message that was recorded, whatever way it was delivered."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import (
    ContextOverflow,
    EngineTimeout,
    EngineUnavailable,
    Forbidden,
    IntegrityError,
    InvalidRequest,
    NotFound,
    SessionSealed,
    TooManyRequests,
    Unauthorized,
    UnknownPrevious,
    VerbatimError,
)
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.media import Blob
from gateway.contracts.records import MatchTier
from gateway.contracts.replies import ContentDelta, ParsedReply, ReasoningDelta, ReplyDelta, ToolCall, ToolCallDelta
from gateway.sessions.messages import NO_CALLS, compare, message_key
from gateway.wire.anthropic import Earlier, parse_count_request, parse_messages_request
from gateway.wire.anthropic_blocks import SENT_BLOCKS
from gateway.wire.anthropic_reply import MessagesWriter, error_body, error_status
from gateway.wire.openai import parse_chat_request
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.request import TurnRequest, Wanted
from gateway.wire.sampling import sampling_params

USER = {"role": "user", "content": "x"}
SCHEMA = {"type": "object", "properties": {"b": {}, "a": {}}}
NOTHING_CAPTURED = Wanted(token_ids=False, routed_experts=False, logprobs=False, usage_chunk=False)
ALL_CAPTURED = Wanted(token_ids=True, routed_experts=True, logprobs=False, usage_chunk=False)
NO_TOKENS = ReplyTokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), [])
CACHED = {"cache_control": {"type": "ephemeral"}}


def parse(**fields: Any) -> TurnRequest:
    return parse_messages_request(json.dumps({"max_tokens": 9, "messages": [USER], **fields}).encode()).turn()


def spelt(*messages: Any) -> tuple[Any, ...]:
    return parse(messages=list(messages)).messages


def choice(
    reply: ParsedReply, finish: Finish | None = None, *, usage: Usage | None = None, **fields: Any
) -> FinishedChoice:
    tokens = ReplyTokens(np.array([5, 6], dtype=np.int32), np.array([-0.5, -1.0], dtype=np.float32), [])
    experts = RoutedExperts(np.zeros((4, 4, 2), dtype=np.uint8), 0)
    known = {"meta_info": {}, "reply_fields": {}} | fields
    return FinishedChoice(
        reply=reply,
        finish=finish or Finish(FinishReason.STOP, 7),
        prompt_token_ids=np.array([1, 2, 3], dtype=np.int32),
        tokens=tokens,
        experts=experts,
        usage=usage or Usage(3, 2, 1, 0),
        **known,
    )


def events(frames: Iterable[bytes]) -> list[dict[str, Any]]:
    """Values of named frames; the name and the type of each must be one."""
    values = []
    for frame in frames:
        name, data = frame.decode().removesuffix("\n\n").split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        values.append(value)
    return values


def stream(writer: MessagesWriter, pieces: Sequence[Sequence[ReplyDelta]], end: FinishedChoice) -> list[dict[str, Any]]:
    frames = list(writer.opening(0, end.prompt_token_ids))
    for deltas in pieces:
        frames += writer.progress(0, deltas, NO_TOKENS)
    return events([*frames, *writer.closing(0, end), *writer.end([end])])


def accumulated(values: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of a stream; blocks come one after the other, none is touched once stopped."""
    message, open_index, written = values[0]["message"], None, ""
    for value in values[1:]:
        if value["type"] == "content_block_start":
            assert open_index is None
            assert value["index"] == len(message["content"])
            open_index, written = value["index"], ""
            message["content"].append(value["content_block"])
        elif value["type"] == "content_block_delta":
            assert value["index"] == open_index
            kind, block = value["delta"]["type"], message["content"][-1]
            if kind == "input_json_delta":
                written += value["delta"]["partial_json"]
            else:
                key = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}[kind]
                block[key] += value["delta"][key]
        elif value["type"] == "content_block_stop":
            assert value["index"] == open_index
            open_index = None
            if written:
                message["content"][-1]["input"] = json.loads(written)
        elif value["type"] == "message_delta":
            message |= value["delta"] | {"usage": value["usage"]}
    assert open_index is None
    assert values[-1]["type"] == "message_stop"
    return dict(message)


def tier_of(recorded: Any, sent: Any) -> MatchTier | None:
    ours, theirs = message_key(recorded, NO_CALLS), message_key(sent, NO_CALLS)
    return compare(ours, theirs)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**80), 2**80), st.floats(allow_nan=False, allow_infinity=False),
              st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("abü"), inner, max_size=2)),
    max_leaves=4,
)  # fmt: skip
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
pieces_of_reply = st.lists(
    st.one_of(
        st.builds(ReasoningDelta, texts),
        st.builds(ContentDelta, texts),
        st.dictionaries(st.sampled_from("abü"), json_values, max_size=3),
    ),
    max_size=8,
)


def deltas_of(pieces: Sequence[Any], *, cut: int) -> tuple[list[ReplyDelta], ParsedReply]:
    """Deltas in any order (calls written in two pieces), and the reply that they add up to."""
    deltas: list[ReplyDelta] = []
    calls: list[ToolCall] = []
    for piece in pieces:
        if isinstance(piece, ReasoningDelta | ContentDelta):
            deltas.append(piece)
            continue
        written = json.dumps(piece)
        call = ToolCall(f"call_{len(calls)}", "f", written)
        split = min(cut, len(written))
        deltas.append(ToolCallDelta(len(calls), call.call_id, call.name, written[:split]))
        deltas.append(ToolCallDelta(len(calls), None, None, written[split:]))
        calls.append(call)
    content = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    return deltas, ParsedReply(content or None, reasoning or None, tuple(calls), (), 0)


@given(pieces=pieces_of_reply, cut=st.integers(0, 9))
def test_a_reply_sent_back_is_the_recorded_message_however_it_was_delivered(pieces: list[Any], cut: int) -> None:
    """I3: text, thinking and calls in any order, whole or streamed in any pieces, attach to their own record."""
    deltas, reply = deltas_of(pieces, cut=cut)
    end = choice(reply)
    streamed = accumulated(stream(MessagesWriter(NOTHING_CAPTURED, "t", "m"), [[delta] for delta in deltas], end))
    whole = json.loads(json.dumps(MessagesWriter(NOTHING_CAPTURED, "t", "m").whole([end])))
    for message in (streamed, whole):
        [sent] = spelt({"role": "assistant", "content": message["content"]})
        assert SENT_BLOCKS not in sent
        assert tier_of(reply.message(), sent) in (MatchTier.EXACT, MatchTier.SEMANTIC)
    assert {k: v for k, v in streamed.items() if k != "content"} == {k: v for k, v in whole.items() if k != "content"}
    kinds = [type(delta) for delta in deltas]
    if kinds == sorted(kinds, key=[ReasoningDelta, ContentDelta, ToolCallDelta].index):  # the order models write in
        assert streamed == whole


def test_thinking_that_was_left_out_or_not_shown_is_forgiven_and_another_thought_is_not() -> None:
    """Design 4: absence is projection, a different value is another message."""
    reply = ParsedReply("ab", "thought", (), (), 1)
    hidden = MessagesWriter(NOTHING_CAPTURED, "t", "m", shows_thinking=False)
    blocks = hidden.whole([choice(reply)])["content"]
    assert blocks[0]["thinking"] == ""
    assert blocks[0]["signature"]
    deltas = [[ReasoningDelta("thought")], [ContentDelta("ab")]]
    assert accumulated(stream(hidden, deltas, choice(reply)))["content"] == blocks
    for content in (blocks, blocks[1:], "ab"):
        [sent] = spelt({"role": "assistant", "content": content})
        assert tier_of(reply.message(), sent) is MatchTier.PROJECTION
    [edited] = spelt({"role": "assistant", "content": [blocks[0] | {"thinking": "other"}, blocks[1]]})
    assert tier_of(reply.message(), edited) is None


def test_both_dialects_spell_one_conversation_alike() -> None:
    """A session may mix them: same messages, same tools."""
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1.0}'}}
    function = {"name": "f", "description": "d", "parameters": SCHEMA}
    body = {
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": "24"},
            {"role": "user", "content": "go on"},
        ],
        "tools": [{"type": "function", "function": function}],
    }
    chat = parse_chat_request(json.dumps(body).encode())
    assistant = [
        {"type": "thinking", "thinking": "r", "signature": "s"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"a": 1.0}, **CACHED},
    ]
    result = [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "24"}], "is_error": False},
        {"type": "text", "text": "go on", **CACHED},
    ]
    ours = parse(
        system=[{"type": "text", "text": "s", **CACHED}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "q"}]},
            {"role": "assistant", "content": assistant},
            {"role": "user", "content": result},
        ],
        tools=[{"type": "custom", "name": "f", "description": "d", "input_schema": SCHEMA, **CACHED}],
    )
    assert ours.messages == chat.messages
    assert ours.tools == chat.tools
    assert ours.template_arguments == chat.template_arguments == {}
    assert (ours.calls_tools, chat.calls_tools) == (True, True)


def test_results_of_several_tools_stand_before_what_the_user_says_besides() -> None:
    blocks = [
        {"type": "text", "text": "also"},
        {"type": "tool_result", "tool_use_id": "a", "content": "1"},
        {"type": "tool_result", "tool_use_id": "b", "content": "no", "is_error": True},
        {"type": "tool_result", "tool_use_id": "c"},
        {"type": "text", "text": "this"},
    ]
    assert spelt({"role": "user", "content": blocks}) == (
        {"role": "tool", "tool_call_id": "a", "content": "1"},
        {"role": "tool", "tool_call_id": "b", "content": "no", "is_error": True},
        {"role": "tool", "tool_call_id": "c", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "also"}, {"type": "text", "text": "this"}]},
    )


def test_images_become_parts_that_name_their_source_or_refer_to_their_bytes() -> None:
    images = [
        {"type": "image", "source": {"type": "url", "url": "http://x/y.png"}, **CACHED},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}, "x": 1.0},
    ]
    [message] = spelt({"role": "user", "content": images})
    blob = Blob.of(bytes(3), "image/png")
    assert message["content"] == [
        {"type": "image_url", "image_url": {"url": "http://x/y.png"}},
        {"type": "image_url", "image_url": {"url": blob.url, "media_type": "image/png", "num_bytes": 3}, "x": 1.0},
    ]
    with pytest.raises(InvalidRequest, match=r"messages\[0\].content\[0\]: image without a URL; source cannot be read"):
        spelt({"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "f"}}]})


def test_documents_of_plain_text_are_shown_to_the_model_as_text() -> None:
    document = {
        "type": "document",
        "title": "T",
        "source": {"type": "text", "media_type": "text/plain", "data": "a\nb"},
    }
    found = {
        "type": "search_result",
        "source": "http://x",
        "title": "T",
        "content": [{"type": "text", "text": "c"}],
        "y": 1,
    }
    [message] = spelt({"role": "user", "content": [document, found]})
    assert message["content"] == [
        {"type": "text", "text": "T\na\nb"},
        {"type": "text", "text": "T\nhttp://x\nc", "y": 1},
    ]
    assert spelt({"role": "user", "content": [document]})[0]["content"] == "T\na\nb"
    pdf = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "AAAA"}}
    with pytest.raises(InvalidRequest, match=r"content\[1\]: this model takes no files"):
        spelt({"role": "user", "content": [document, pdf]})


def test_what_chat_messages_cannot_say_stays_beside_them() -> None:
    """I8: unknown keys on messages, blocks, calls and tools, and blocks of other servers, are not lost."""
    odd = {"type": "redacted_thinking", "data": "?"}
    user, assistant = spelt(
        {"role": "user", "content": [{"type": "text", "text": "q", "x": [None, 2**70]}], "m": 1},
        {"role": "assistant", "content": [odd, {"type": "tool_use", "id": "c", "name": "f", "input": {}, "x": 1.0}]},
    )
    assert user == {"role": "user", "content": [{"type": "text", "text": "q", "x": [None, 2**70]}], "m": 1}
    assert assistant[SENT_BLOCKS][0] == odd
    assert json.dumps(assistant["tool_calls"][0]["x"]) == "1.0"
    [tool] = parse(tools=[{"name": "f", "input_schema": {}, "strict": True, "x": None}]).tools
    assert tool["function"] == {"name": "f", "parameters": {}, "strict": True, "x": None}


@pytest.mark.parametrize("value", [2**70, 1.0, 1, None, {"b": 1, "a": [None, {"c": -0.0}]}, "ü", True])
def test_unknown_fields_pass_with_equal_value(value: Any) -> None:
    """I8: same numbers, same nesting, same nulls, same order of keys."""
    passed = parse(unheard_of=value, metadata={"user_id": "u"}).passthrough
    assert json.dumps(passed) == json.dumps({"unheard_of": value, "metadata": {"user_id": "u"}})


def test_fields_that_would_forge_the_record_do_not_reach_the_engine() -> None:
    """I7: nor do those that ask other dialects for other replies."""
    request = parse(input_ids=[1], weight_version="9", return_logprob=False, n=3, logprobs=5, stop="x")
    assert request.passthrough == {}
    assert request.num_choices == 1
    assert "stop" not in request.sampling
    assert request.ignored_fields == (
        "input_ids", "logprobs", "n", "return_logprob", "stop", "weight_version",
    )  # fmt: skip


def test_accounting_texts_that_differ_from_call_to_call_are_no_part_of_the_conversation() -> None:
    """I3: or every call of such an agent would open a new segment."""
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1f3a;"}
    prompt = {"type": "text", "text": "You are careful.", **CACHED}
    request = parse(system=[billing, prompt])
    assert request.messages[0] == {"role": "system", "content": "You are careful."}
    assert request.ignored_fields == ("system.x-anthropic-billing-header",)
    assert parse(system=f"{billing['text']}\nYou are careful.").messages == request.messages
    assert parse(system=[prompt]).ignored_fields == ()


def test_sampling_and_thinking_come_under_the_names_of_chat_completions() -> None:
    request = parse(
        max_tokens=7, temperature=0, top_p=0.5, top_k=5, stop_sequences=["x"], seed=3,
        thinking={"type": "enabled", "budget_tokens": 1024},
        output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}, "new": 1.0},
    )  # fmt: skip
    params = sampling_params(request.sampling, max_new_tokens=7)
    assert (params.max_new_tokens, params.temperature, params.top_p, params.top_k) == (7, 0.0, 0.5, 5)
    assert (params.stop, params.seed) == (("x",), 3)
    assert json.loads(request.sampling["json_schema"]) == SCHEMA
    assert request.template_arguments == {"enable_thinking": True, "reasoning_effort": "high"}
    assert request.passthrough == {"output_config": {"new": 1.0}}
    assert request.kept["thinking"] == {"type": "enabled", "budget_tokens": 1024}
    assert parse(thinking={"type": "disabled"}).template_arguments == {"enable_thinking": False}
    assert parse(thinking={"type": "adaptive"}).template_arguments == {}
    assert "top_k" not in parse(top_k=0).sampling


@pytest.mark.parametrize(
    ("tool_choice", "calls_tools"),
    [
        ({"type": "auto"}, True),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "f"}, True),
        ({"type": "none"}, False),
    ],
)
def test_tool_choice_leaves_the_tools_in_the_prompt(tool_choice: dict[str, Any], calls_tools: bool) -> None:
    request = parse(tools=[{"name": "f", "input_schema": {}}], tool_choice=tool_choice)
    assert len(request.tools) == 1
    assert request.calls_tools is calls_tools
    assert request.kept == {"tool_choice": tool_choice}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "content": 5}]}]}, "tool_result.content"),
        ({"system": 5}, "system"),
        ({"system": [5]}, "system[0]"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "maybe"}}, "tool_choice.type"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "tool", "name": "g"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any", "disable_parallel_tool_use": 1}}, "disable_parallel_tool_use"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"thinking": True}, "thinking"),
        ({"thinking": {"type": ["enabled"]}}, "thinking.type"),
        ({"output_config": {"format": {"type": "text"}}}, "output_config.format"),
        ({"temperature": "hot"}, "temperature"),
        ({"thread": {"type": "fork"}}, "thread.type"),
        ({"thread": {"type": "continue"}}, "thread.previous_message_id"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}, "system": "s"}, "system"),
        ({"thread": {"type": "continue", "previous_message_id": "msg_1"}, "tools": []}, "tools"),
        ({"stream": 1}, "stream"),
    ],
)
def test_wrong_requests_name_the_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert named in caught.value.message


def test_counting_needs_no_limit_of_the_reply() -> None:
    assert parse_count_request(json.dumps({"messages": [USER]}).encode()).turn().messages == (USER,)


def test_a_continued_thread_stands_behind_what_it_holds() -> None:
    """The recorded conversation as it is, then what is new; tools are those of the thread."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    earlier = Earlier([USER, {"role": "assistant", "content": "y"}], [tool], 100)
    thread = {"type": "continue", "previous_message_id": "msg_turn-1"}
    body = {"max_tokens": 9, "messages": [USER], "thread": thread, "tool_choice": {"type": "tool", "name": "f"}}
    request = parse_messages_request(json.dumps(body).encode())
    assert request.previous_turn_id == "turn-1"
    turn = request.turn(earlier)
    assert turn.messages == (*earlier.messages, USER)
    assert (turn.tools, turn.calls_tools) == ((tool,), True)
    assert turn.passthrough == {}
    assert turn.kept["thread"] == thread
    assert turn.num_bytes > len(json.dumps(body))
    created = parse_messages_request(json.dumps(body | {"thread": {"type": "create"}, "tool_choice": None}).encode())
    assert created.previous_turn_id is None


@pytest.mark.parametrize(
    ("reason", "matched", "calls", "expected"),
    [
        (FinishReason.STOP, 7, False, ("end_turn", None)),
        (FinishReason.STOP, None, False, ("end_turn", None)),
        (FinishReason.STOP, 7, True, ("tool_use", None)),
        (FinishReason.STOP, "END", False, ("stop_sequence", "END")),
        (FinishReason.LENGTH, None, True, ("max_tokens", None)),
        (FinishReason.ABORT, None, False, ("max_tokens", None)),
    ],
)
def test_stop_reason_says_why_the_reply_ended(
    reason: FinishReason, matched: int | str | None, calls: bool, expected: tuple[str, str | None]
) -> None:
    reply = ParsedReply("ab", None, (ToolCall("c", "f", "{}"),) if calls else (), (), 0)
    end = choice(reply, Finish(reason, matched))
    body = MessagesWriter(NOTHING_CAPTURED, "t", "m").whole([end])
    assert (body["stop_reason"], body["stop_sequence"]) == expected
    values = stream(MessagesWriter(NOTHING_CAPTURED, "t", "m"), [], end)
    assert values[-2]["delta"] == {"stop_reason": expected[0], "stop_sequence": expected[1], "stop_details": None}


def test_usage_counts_cached_tokens_apart_and_an_empty_reply_has_no_block() -> None:
    end = choice(ParsedReply(None, None, (), (), 0), usage=Usage(100, 5, 60, 2))
    body = MessagesWriter(NOTHING_CAPTURED, "t", "m").whole([end])
    assert body["content"] == []
    assert body["usage"]["input_tokens"] + body["usage"]["cache_read_input_tokens"] == 100
    assert (body["usage"]["cache_read_input_tokens"], body["usage"]["output_tokens"]) == (60, 5)
    assert body["usage"]["output_tokens_details"] == {"thinking_tokens": 2}
    values = stream(MessagesWriter(NOTHING_CAPTURED, "t", "m"), [[ContentDelta("")]], end)
    assert [value["type"] for value in values] == ["message_start", "ping", "message_delta", "message_stop"]


def test_captured_arrays_are_in_the_reply_only_where_asked_for() -> None:
    """I7; the engine's own fields come back at their level (I8), and none of them replaces ours."""
    fields = {"meta_info": {"seen": 2**70}, "reply_fields": {"extra": 1.0, "type": "mine", "usage": "mine"}}
    end = choice(ParsedReply("ab", None, (), (), 0), **fields)
    for wanted, has_arrays in ((NOTHING_CAPTURED, False), (ALL_CAPTURED, True)):
        body = MessagesWriter(wanted, "t", "m").whole([end])
        start, *_, last, _ = stream(MessagesWriter(wanted, "t", "m"), [], end)
        for reply in (body, last):
            assert (json.dumps(reply["extra"]), reply["meta_info"]) == ("1.0", {"seen": 2**70})
            assert reply["usage"]["output_tokens"] == 2
            assert ("token_ids" in reply) is ("routed_experts" in reply) is has_arrays
        assert ("prompt_token_ids" in body) is ("prompt_token_ids" in start["message"]) is has_arrays
        assert (body["type"], last["type"]) == ("message", "message_delta")
    assert body["token_ids"] == [5, 6]
    assert body["prompt_token_ids"] == [1, 2, 3]
    assert body["routed_experts"]["shape"] == [4, 4, 2]


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("x"), 400, "invalid_request_error"),
        (Unauthorized("x"), 401, "authentication_error"),
        (Forbidden("x"), 403, "permission_error"),
        (NotFound("x"), 404, "not_found_error"),
        (SessionSealed("x"), 409, "conflict_error"),
        (TooManyRequests("x"), 429, "rate_limit_error"),
        (EngineTimeout("x"), 504, "timeout_error"),
        (EngineUnavailable("x"), 529, "overloaded_error"),
        (IntegrityError("x"), 500, "api_error"),
    ],
)
def test_errors_have_the_types_and_statuses_that_anthropics_clients_read(
    error: VerbatimError, status: int, kind: str
) -> None:
    assert error_status(error) == status
    assert error_body(error) == {"type": "error", "error": {"type": kind, "message": "x"}}
    [event] = events(MessagesWriter(NOTHING_CAPTURED, "t", "m").failure(error))
    assert event == error_body(error)


def test_a_thread_that_is_not_here_makes_clients_send_the_whole_conversation() -> None:
    error = UnknownPrevious("x")
    assert error_status(error) == 404
    assert error_body(error)["error"]["details"] == {"error_code": "thread_not_found"}


def test_context_overflow_is_told_in_the_words_that_agents_look_for() -> None:
    message = error_body(ContextOverflow("maximum context length is 5"))["error"]["message"]
    assert message == "prompt is too long: maximum context length is 5"
