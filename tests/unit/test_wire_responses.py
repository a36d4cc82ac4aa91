"""Responses on the wire: several items are one message, unknown fields stay, and a stream adds up to its response."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import EngineUnavailable, InvalidRequest
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.media import Blob
from gateway.contracts.replies import ContentDelta, ParsedReply, ReasoningDelta, ReplyDelta, ToolCall, ToolCallDelta
from gateway.wire.json_text import dump_json
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.request import TurnRequest, Wanted
from gateway.wire.responses import ResponsesRequest, parse_responses_request
from gateway.wire.responses_reply import Asked, ResponsesWriter

USER = {"role": "user", "content": "x"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "seen"}
CHAT_CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
NOTHING_WANTED = Wanted(token_ids=False, routed_experts=False, logprobs=False, usage_chunk=False)


def read(**fields: Any) -> ResponsesRequest:
    return parse_responses_request(json.dumps({"input": "x", **fields}).encode())


def turn(**fields: Any) -> TurnRequest:
    return read(**fields).turn()


def messages(*items: Any) -> list[Any]:
    return list(turn(input=list(items)).messages)


def text(value: str, **more: Any) -> dict[str, Any]:
    part = {"type": "output_text", "text": value, "annotations": [], "logprobs": []}
    return {"type": "message", "role": "assistant", "content": [part], "status": "completed", **more}


def thought(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": value}], **more}


def choice(
    reply: ParsedReply,
    *,
    reason: FinishReason = FinishReason.STOP,
    tokens: Sequence[str] = ("a",),
    num_reasoning: int = 0,
) -> FinishedChoice:
    ids = np.arange(len(tokens), dtype=np.int32)
    captured = ReplyTokens(ids, -ids.astype(np.float32), tokens)
    usage = Usage(3, len(tokens), 1, num_reasoning)
    prompt = np.array([7, 8, 9], dtype=np.int32)
    return FinishedChoice(reply, Finish(reason), prompt, captured, None, {"seen": 2**70}, {"top": None}, usage)


def writer(*, wanted: Wanted = NOTHING_WANTED, turn_id: str = "turn-0a", **fields: Any) -> ResponsesWriter:
    return ResponsesWriter(Asked(None, fields, (), wanted), turn_id, "m")


def events(frames: Iterable[bytes]) -> list[Any]:
    """The events of frames, each of which has its name in front."""
    read_events = []
    for frame in frames:
        name, data = frame.decode().removesuffix("\n\n").split("\n", 1)
        read_events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {read_events[-1]['type']}"
    return read_events


def streamed(made: ResponsesWriter, deltas: Iterable[ReplyDelta], finished: FinishedChoice) -> list[Any]:
    none = ReplyTokens(np.zeros(0, np.int32), np.zeros(0, np.float32), [])
    frames = list(made.opening(0, finished.prompt_token_ids))
    for delta in deltas:
        frames += made.progress(0, [delta], none)
    return events([*frames, *made.closing(0, finished), *made.end([finished])])


def test_input_text_is_a_user_message_behind_the_instructions() -> None:
    request = turn(instructions="Be brief.")
    assert request.messages == ({"role": "system", "content": "Be brief."}, USER)


def test_history_stands_between_instructions_and_input() -> None:
    request = read(instructions="Be brief.", previous_response_id="resp_turn-1")
    assert request.previous_turn_id == "turn-1"
    continued = request.turn([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    assert [message["content"] for message in continued.messages] == ["Be brief.", "a", "b", "x"]


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([thought("t"), text("a"), CALL], [("t", "a", 1)]),
        ([CALL, text("a")], [(None, "a", 1)]),
        ([CALL, {**CALL, "call_id": "c2"}], [(None, None, 2)]),
        ([thought("t"), thought("u"), CALL], [("tu", None, 1)]),
        ([text("a"), text("b")], [(None, "a", 0), (None, "b", 0)]),
        ([text("a", id="msg_turn-1_0"), text("b", id="msg_turn-1_2")], [(None, "ab", 0)]),
        ([text("a", id="msg_turn-1_0"), {**CALL, "id": "fc_turn-2_0"}], [(None, "a", 0), (None, None, 1)]),
        ([text("a"), thought("t"), text("b")], [(None, "a", 0), ("t", "b", 0)]),
        ([thought("t")], [("t", None, 0)]),
        ([{"type": "reasoning", "summary": [], "encrypted_content": "of another server"}, text("a")], [(None, "a", 0)]),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, text("a")], [("s", "a", 0)]),
    ],
)
def test_items_of_one_reply_are_one_message(items: list[Any], expected: list[Any]) -> None:
    """I3: what was sampled as one message is found again as one."""
    found = [(m.get("reasoning_content"), m["content"], len(m.get("tool_calls", ()))) for m in messages(*items)]
    assert found == expected


def test_call_and_output_keep_their_id() -> None:
    assert messages(USER, CALL, OUTPUT)[1:] == [
        {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
    ]


def test_outputs_between_calls_of_one_reply_leave_it_one_message() -> None:
    """I3: the ids of the items say so; without them it is two replies."""
    first, second = {**CALL, "id": "fc_turn-1_0"}, {**CALL, "id": "fc_turn-1_1", "call_id": "c2"}
    read_back = messages(first, OUTPUT, second, {**OUTPUT, "call_id": "c2"})
    assert [message["role"] for message in read_back] == ["assistant", "tool", "tool"]
    without_ids = messages(CALL, OUTPUT, {**CALL, "call_id": "c2"}, {**OUTPUT, "call_id": "c2"})
    assert [message["role"] for message in without_ids] == ["assistant", "tool", "assistant", "tool"]


def test_parts_are_spelled_as_chat_completions_spell_them() -> None:
    parts = [
        {"type": "input_text", "text": "see", "mark": 1},
        {"type": "input_image", "image_url": "http://image", "detail": "low"},
        {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}},
    ]
    blob = Blob.of(bytes(3), "audio/wav")
    [message] = messages({"role": "user", "content": parts})
    assert message["content"] == [
        {"type": "text", "text": "see", "mark": 1},
        {"type": "image_url", "image_url": {"url": "http://image", "detail": "low"}},
        {
            "type": "audio_url",
            "audio_url": {"url": blob.url, "format": "wav", "media_type": "audio/wav", "num_bytes": 3},
        },
    ]
    for nameless in ({"type": "input_file", "file_id": "f"}, {"type": "input_image", "file_id": "f"}):
        with pytest.raises(InvalidRequest, match=r"content\[0\]: (this model takes no files|image without)"):
            messages({"role": "user", "content": [nameless]})
    assert messages({"role": "user", "content": [{"type": "input_text", "text": "x"}]}) == [USER]
    assert messages(text("", content=[{"type": "refusal", "refusal": "no"}]))[0]["content"] == "no"


@pytest.mark.parametrize("value", [2**70, 1.0, None, {"b": 1, "a": [None]}, "ü"])
def test_unknown_fields_pass_at_every_level(value: Any) -> None:
    """I8: top-level ones to the engine, others stay on their message, call, output or tool."""
    request = turn(
        input=[{**USER, "new": value}, {**CALL, "new": value}, {**OUTPUT, "new": value}],
        tools=[{"type": "function", "name": "look", "parameters": {}, "new": value}],
        unheard_of=value,
    )
    user, assistant, tool = request.messages
    holders = [user, assistant["tool_calls"][0], tool, request.tools[0]["function"]]
    assert [json.dumps(holder["new"]) for holder in holders] == [json.dumps(value)] * 4
    assert json.dumps(request.passthrough) == json.dumps({"unheard_of": value})


def test_fields_of_the_api_do_not_reach_the_engine() -> None:
    """I7: `text` and `input` would be prompts there."""
    request = turn(text={"verbosity": "low"}, store=False, metadata={"a": "b"}, include=[], truncation="auto")
    assert request.passthrough == {}
    assert request.ignored_fields == ()


def test_fields_mean_what_they_mean_in_chat_completions() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    request = turn(
        max_output_tokens=9,
        temperature=0,
        reasoning={"effort": "low"},
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        tools=[{"type": "function", "name": "look", "description": None, "parameters": {}, "strict": None}],
        include=["message.output_text.logprobs", "of_tomorrow"],
        top_k=3,
    )
    assert request.sampling["max_new_tokens"] == 9
    assert request.sampling["top_k"] == 3
    assert json.loads(request.sampling["json_schema"]) == schema
    assert request.template_arguments == {"reasoning_effort": "low"}
    assert request.tools == ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    assert request.calls_tools
    assert request.wanted.logprobs
    assert not turn(tools=[{"type": "function", "name": "look"}], tool_choice="none").calls_tools


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"input": None}, "input:"),
        ({"input": []}, "input:"),
        ({"input": 1}, "input:"),
        ({"input": [1]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [USER, {"type": "computer_call"}]}, "input[1].type"),
        ({"input": [{}]}, "input[0].type"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": None, "content": "x"}]}, "input[0].role"),
        ({"input": [{**CALL, "arguments": {}}]}, "input[0].arguments"),
        ({"input": [{**OUTPUT, "call_id": None}]}, "input[0].call_id"),
        ({"input": [{**OUTPUT, "output": 1}]}, "input[0].output"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0]"),
        ({"input": [{"type": "reasoning", "summary": [{}]}]}, "input[0].summary"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"reasoning": {"effort": 1}}, "reasoning.effort"),
        ({"reasoning": "low"}, "reasoning:"),
        ({"metadata": []}, "metadata:"),
        ({"include": "all"}, "include"),
        ({"store": 1}, "store"),
        ({"truncation": "some"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens: expected at least 1"),
        ({"max_output_tokens": "9"}, "max_output_tokens"),
        ({"instructions": []}, "instructions"),
        ({"previous_response_id": 1}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"n": 2}, "n:"),
    ],
)
def test_wrong_or_unserved_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        turn(**fields)
    assert named in caught.value.message


def test_whole_response_says_what_was_asked_and_sampled() -> None:
    """I8: what we do not know of the engine's reply is there too."""
    reply = ParsedReply("hi", "hm", (ToolCall("c1", "look", "{}"),), (), 1)
    body = writer(temperature=0.5, metadata={"a": "b"}).whole([choice(reply)])
    assert [(item["type"], item["status"]) for item in body["output"]] == [
        ("reasoning", "completed"), ("message", "completed"), ("function_call", "completed")
    ]  # fmt: skip
    assert (body["id"], body["status"], body["temperature"]) == ("resp_turn-0a", "completed", 0.5)
    assert (body["meta_info"], body["top"]) == ({"seen": 2**70}, None)
    assert body["usage"]["input_tokens_details"]["cached_tokens"] == 1
    assert not {"token_ids", "prompt_token_ids", "routed_experts", "logprobs"} & body.keys()


def test_reply_without_text_and_calls_has_an_empty_message() -> None:
    """A client that keeps no reasoning would otherwise replay nothing of the turn."""
    body = writer().whole([choice(ParsedReply(None, "hm", (), (), 1))])
    assert [item["type"] for item in body["output"]] == ["reasoning", "message"]
    finished = choice(ParsedReply(None, "hm", (), (), 1), reason=FinishReason.LENGTH)
    *_, last = streamed(writer(), [ReasoningDelta("hm")], finished)
    assert last["type"] == "response.incomplete"
    assert [item["status"] for item in last["response"]["output"]] == ["completed", "incomplete"]


def test_sealed_reasoning_is_read_back_where_a_client_keeps_nothing_else() -> None:
    body = writer(include=["reasoning.encrypted_content"]).whole([choice(ParsedReply("a", "ü\n?", (), (), 1))])
    reasoning, message = body["output"]
    del reasoning["content"]
    assert messages(reasoning, message)[0]["reasoning_content"] == "ü\n?"


def sent(reply: Any) -> Any:
    """As its client reads it."""
    return json.loads(dump_json(reply))


@pytest.mark.parametrize("content", ["ab", "th"])
def test_logprobs_are_those_of_the_text(content: str) -> None:
    """Neither reasoning that says the same nor markup with the same letters in it is part of the text."""
    asked = Wanted(token_ids=False, routed_experts=False, logprobs=True, usage_chunk=False)
    tokens = ["<think>", "ab", "</think>", "\n", *content, "<end>"]
    finished = choice(ParsedReply(content, "ab", (), (), 2), tokens=tokens, num_reasoning=2)
    [part] = sent(writer(wanted=asked).whole([finished]))["output"][1]["content"]
    assert [entry["logprob"] for entry in part["logprobs"]] == [-4.0, -5.0]
    made = writer(wanted=asked)
    frames = [*made.progress(0, [ReasoningDelta("ab")], cut(finished, 0, 2))]
    frames += made.progress(0, [], cut(finished, 2, 4))
    frames += made.progress(0, [ContentDelta(content[0])], cut(finished, 4, 5))
    frames += made.progress(0, [ContentDelta(content[1])], cut(finished, 5, 7))
    frames += made.closing(0, finished)
    done = [event for event in events(frames) if event["type"] == "response.output_text.done"]
    assert [entry["logprob"] for entry in done[0]["logprobs"]] == [-4.0, -5.0]


def cut(finished: FinishedChoice, start: int, stop: int) -> ReplyTokens:
    tokens = finished.tokens
    return ReplyTokens(tokens.token_ids[start:stop], tokens.logprobs[start:stop], tokens.texts[start:stop])


def test_failure_closes_the_item_and_says_why() -> None:
    made, none = writer(), choice(ParsedReply(None, None, (), (), 0), tokens=()).tokens
    frames = [*made.opening(0, none.token_ids), *made.progress(0, [ContentDelta("ab")], none)]
    frames += made.failure(EngineUnavailable("gone"))
    told = events(frames)
    assert [event["type"] for event in told[-3:]] == ["response.output_item.done", "error", "response.failed"]
    assert told[-1]["response"]["error"] == {"code": "server_error", "message": "gone"}
    assert told[-1]["response"]["output"][0]["status"] == "incomplete"


def test_assistant_message_as_chat_completions_write_it_stays_whole() -> None:
    """I6: agents mix what they have."""
    chat = {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]}
    assert messages(USER, chat, {"role": "tool", "tool_call_id": "c1", "content": "seen"}, CALL)[1:] == [
        {**chat, "content": ""},
        {"role": "tool", "tool_call_id": "c1", "content": "seen"},
        {"role": "assistant", "content": None, "tool_calls": [CHAT_CALL]},
    ]


NAMES = st.sampled_from(
    [
        "type",
        "role",
        "content",
        "text",
        "id",
        "call_id",
        "name",
        "arguments",
        "output",
        "summary",
        "function",
        "tools",
        "tool_calls",
        "image_url",
        "reasoning_content",
        "format",
        "schema",
        "effort",
        "mode",
        "encrypted_content",
    ]
)
WORDS = st.sampled_from(
    [
        "message",
        "reasoning",
        "function_call",
        "function_call_output",
        "user",
        "assistant",
        "input_text",
        "output_text",
        "input_image",
        "refusal",
        "function",
        "allowed_tools",
        "json_schema",
        "auto",
        "msg_turn-1_0",
        "fc_turn-1_1",
    ]
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=8,
)
ITEMS = st.lists(
    VALUES
    | st.builds(
        lambda known, more: {**known, **more},
        st.sampled_from([USER, CALL, OUTPUT, text("a", id="msg_turn-1_0"), thought("t")]),
        st.dictionaries(NAMES, VALUES, max_size=2),
    ),
    max_size=5,
)
FIELDS = st.dictionaries(
    st.sampled_from(
        ["tools", "tool_choice", "text", "reasoning", "include", "metadata", "instructions", "store", "stream_options"]
    ),
    VALUES,
    max_size=2,
)


@settings(max_examples=400)
@given(ITEMS, FIELDS)
def test_any_body_is_read_or_refused(items: list[Any], fields: dict[str, Any]) -> None:
    """Wrong types at any depth are the client's error, told as such, and never ours."""
    with suppress(InvalidRequest):
        request = turn(**{"input": items, **fields})
        assert all(isinstance(message["role"], str) for message in request.messages)
        told = ResponsesWriter(Asked.by(request, None), "turn-0a", "m").whole(
            [choice(ParsedReply("a", None, (), (), 0))]
        )
        assert told["status"] == "completed"


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=4)
REPLIES = st.builds(
    lambda content, reasoning, calls: ParsedReply(
        content, reasoning, tuple(ToolCall(f"c{i}", f"f{i}", text) for i, text in enumerate(calls)), (), 0
    ),
    st.none() | TEXTS,
    st.none() | TEXTS,
    st.lists(TEXTS, max_size=3),
)


@given(st.lists(REPLIES, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_replayed_output_is_the_messages_that_were_sampled(
    replies: list[ParsedReply], keeps_ids: bool, seals: bool
) -> None:
    """I3: whatever the replies are, and whether or not a client keeps the ids of their items."""
    items: list[Any] = []
    for i, reply in enumerate(replies):
        fields = {"include": ["reasoning.encrypted_content"]} if seals else {}
        output = writer(turn_id=f"turn-{i}", **fields).whole([choice(reply)])["output"]
        items += [{k: v for k, v in item.items() if keeps_ids or k != "id"} for item in output]
        items += [{**OUTPUT, "call_id": call.call_id} for call in reply.tool_calls] or [USER]
    sampled = [message for message in messages(*items) if message["role"] == "assistant"]
    expected = [reply.message() | {"content": reply.content or None} for reply in replies]
    assert [message | {"content": message["content"] or None} for message in sampled] == expected


DELTAS = st.lists(st.tuples(st.sampled_from("rcn+"), TEXTS), max_size=12)


@given(DELTAS)
def test_stream_adds_up_to_its_response_and_is_replayed_as_one_message(script: list[tuple[str, str]]) -> None:
    """I3: text, reasoning and calls in any order; every item begins once, ends once, and holds its deltas."""
    deltas: list[ReplyDelta] = []
    calls: list[ToolCall] = []
    for kind, value in script:
        if kind == "r":
            deltas.append(ReasoningDelta(value))
        elif kind == "c":
            deltas.append(ContentDelta(value))
        elif kind == "n" or not calls:
            calls.append(ToolCall(f"c{len(calls)}", "look", value))
            deltas.append(ToolCallDelta(len(calls) - 1, calls[-1].call_id, "look", value))
        elif isinstance(deltas[-1], ToolCallDelta):
            calls[-1] = ToolCall(calls[-1].call_id, "look", calls[-1].arguments + value)
            deltas.append(ToolCallDelta(len(calls) - 1, None, None, value))
    content = "".join(d.text for d in deltas if isinstance(d, ContentDelta)) or None
    reasoning = "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) or None
    reply = ParsedReply(content, reasoning, tuple(calls), (), 0)
    told = streamed(writer(), deltas, choice(reply))
    assert [event["sequence_number"] for event in told] == list(range(len(told)))
    output = told[-1]["response"]["output"]
    assert [event["item"] for event in told if event["type"] == "response.output_item.done"] == output
    added = [event["item"]["id"] for event in told if event["type"] == "response.output_item.added"]
    assert added == [item["id"] for item in output]
    for index, item in enumerate(output):
        said = "".join(e["delta"] for e in told if e["type"].endswith(".delta") and e["output_index"] == index)
        assert said == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])
    [message] = messages(*output)
    assert message | {"content": message["content"] or None} == reply.message()
