"""OpenAI's wire format: what is known is typed, what is not stays as it is, what would forge the record is left out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from gateway.contracts.errors import ContextOverflow, EngineUnavailable, InvalidRequest, Unauthorized
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.replies import ContentDelta, ParsedReply, ToolCall
from gateway.wire.errors import error_body, error_headers
from gateway.wire.json_text import dump_json, load_json_object
from gateway.wire.openai import ChatWriter, parse_chat_request
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.request import TurnRequest
from gateway.wire.sampling import sampling_params

USER = {"role": "user", "content": "x"}


def parse(**fields: Any) -> TurnRequest:
    return parse_chat_request(json.dumps({"messages": [USER], **fields}).encode())


def choice() -> FinishedChoice:
    tokens = ReplyTokens(np.array([5, 6], dtype=np.int32), np.array([-0.5, np.nan], dtype=np.float32), ["a", "b"])
    experts = RoutedExperts(np.zeros((3, 4, 2), dtype=np.uint8), 1)
    reply = ParsedReply("ab", None, (), (), 0)
    prompt = np.array([1, 2, 3], dtype=np.int32)
    finish = Finish(FinishReason.STOP)
    return FinishedChoice(reply, finish, prompt, tokens, experts, {"seen": 2**70}, {}, Usage(3, 2, 1, 0))


def values(frames: Iterable[bytes]) -> list[Any]:
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames]


@pytest.mark.parametrize("value", [2**70, 1.0, 1, None, {"b": 1, "a": [None, {"c": -0.0}]}, "ü", True])
def test_unknown_fields_pass_with_equal_value(value: Any) -> None:
    """I8: same numbers, same nesting, same nulls, same order of keys."""
    passed = parse(unheard_of=value).passthrough["unheard_of"]
    assert json.dumps(passed) == json.dumps(value)
    assert dump_json(passed) == json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def test_unknown_keys_of_messages_and_tools_stay_in_place() -> None:
    request = parse(messages=[USER | {"cache_control": {"n": 1.0}}], tools=[{"type": "function", "x": [None]}])
    assert request.messages == ({"role": "user", "content": "x", "cache_control": {"n": 1.0}},)
    assert request.tools == ({"type": "function", "x": [None]},)


def test_fields_that_would_forge_the_record_do_not_reach_the_engine() -> None:
    """I7."""
    request = parse(input_ids=[1], lora_path="x", weight_version="9", rid="r", return_logprob=False, sampling_params={})
    assert request.passthrough == {}
    assert request.ignored_fields == (
        "input_ids", "lora_path", "return_logprob", "rid", "sampling_params", "weight_version",
    )  # fmt: skip


def test_sampling_fields_come_under_one_name() -> None:
    request = parse(max_completion_tokens=7, temperature=0, top_k=5, stop="x", seed=3, min_new_tokens=2)
    params = sampling_params(request.sampling, max_new_tokens=7)
    assert (params.max_new_tokens, params.temperature, params.top_k, params.stop) == (7, 0.0, 5, ("x",))
    assert params.extra == {"min_new_tokens": 2}
    assert request.passthrough == {}


def test_response_format_becomes_a_constraint() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    request = parse(response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}})
    assert json.loads(request.sampling["json_schema"]) == schema


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": {}}, "tools"),
        ({"tools": [1]}, "tools[0]"),
        ({"stream": "yes"}, "stream"),
        ({"n": 0}, "n:"),
        ({"n": True}, "n:"),
        ({"seed": 2**64}, "seed"),
        ({"stop": [1]}, "stop"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stream_options": []}, "stream_options"),
        ({"max_tokens": 0}, "max_tokens: expected at least 1"),
        ({"max_completion_tokens": -3}, "max_completion_tokens: expected at least 1"),
        ({"stop": ["x"] * 17}, "stop: at most 16"),
        ({"logit_bias": [5]}, "logit_bias: expected an object"),
        ({"logit_bias": {"five": 1}}, "logit_bias: expected token ids as keys"),
        ({"logit_bias": {"-5": 1}}, "logit_bias: expected token ids as keys"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: expected -100 to 100"),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5: expected a number"),
        ({"logit_bias": {"5": None}}, "logit_bias.5:"),
        ({"frequency_penalty": "x"}, "frequency_penalty: expected a number"),
        ({"min_tokens": 1.5}, "min_tokens: expected an integer"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"messages": [USER, 1]}, "messages[1]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 1}]}, "messages[0].role"),
        ({"messages": [USER | {"x": json.loads("[" * 300 + "]" * 300)}]}, "nested too deeply"),
    ],
)
def test_wrong_field_is_named(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**fields)
    assert named in caught.value.message


@pytest.mark.parametrize(
    "body", [b"", b"NaN", b'{"a": NaN}', b'{"a": Infinity}', b"\xff{}", b'{"a": ' + b"7" * 5000 + b"}"]
)
def test_what_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        load_json_object(body)


def sent(reply: Any) -> Any:
    """As its client reads it."""
    return json.loads(dump_json(reply))


def test_reply_holds_captured_arrays_only_where_asked_for() -> None:
    """I7; a missing log-prob is null, never a number (I9)."""
    plain = ChatWriter(parse().wanted, "id", "m").whole([choice()])
    assert "prompt_token_ids" not in plain
    assert not {"token_ids", "routed_experts"} & plain["choices"][0].keys()
    assert plain["choices"][0]["meta_info"] == {"seen": 2**70}
    asked = parse(return_token_ids=True, return_routed_experts=True).wanted
    full = sent(ChatWriter(asked, "id", "m").whole([choice()]))
    assert full["prompt_token_ids"] == [1, 2, 3]
    assert full["choices"][0]["token_ids"] == [5, 6]
    assert [entry["logprob"] for entry in full["choices"][0]["logprobs"]["content"]] == [-0.5, None]
    assert full["choices"][0]["routed_experts"]["shape"] == [3, 4, 2]
    assert full["choices"][0]["routed_experts"]["start"] == 1


def test_a_reply_has_the_fields_that_clients_require() -> None:
    """`refusal` is null in every message, and `usage` in every chunk but the one that holds it."""
    [whole] = ChatWriter(parse().wanted, "id", "m").whole([choice()])["choices"]
    assert whole["message"] == {"role": "assistant", "content": "ab", "refusal": None}
    writer, done = ChatWriter(parse(stream_options={"include_usage": True}).wanted, "id", "m"), choice()
    frames = [*writer.opening(0, done.prompt_token_ids), *writer.closing(0, done), *writer.end([done])]
    chunks = values(frames[:-1])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert [chunk["usage"] is None for chunk in chunks] == [True, True, False]
    [opening] = values(ChatWriter(parse().wanted, "id", "m").opening(0, done.prompt_token_ids))
    assert "usage" not in opening


@pytest.mark.parametrize(
    ("reason", "calls", "told"),
    [
        (FinishReason.STOP, 1, "tool_calls"),
        (FinishReason.STOP, 0, "stop"),
        (FinishReason.LENGTH, 1, "length"),
        (FinishReason.LENGTH, 0, "length"),
    ],
)
def test_calls_that_were_cut_by_length_are_told_as_cut(reason: FinishReason, calls: int, told: str) -> None:
    reply = ParsedReply(None, None, (ToolCall("c", "f", '{"a"'),) * calls, (), 0)
    done = replace(choice(), reply=reply, finish=Finish(reason))
    assert ChatWriter(parse().wanted, "id", "m").whole([done])["choices"][0]["finish_reason"] == told


def test_chunks_carry_each_token_once_even_where_text_is_held_back() -> None:
    writer = ChatWriter(parse(return_token_ids=True).wanted, "id", "m")
    tokens = choice().tokens
    held = values(writer.progress(0, [], tokens))
    shown = values(writer.progress(0, [ContentDelta("a"), ContentDelta("b")], tokens))
    assert [chunk["choices"][0].get("token_ids") for chunk in (*held, *shown)] == [[5, 6], [5, 6], None]
    assert list(ChatWriter(parse().wanted, "id", "m").progress(0, [], tokens)) == []


def test_errors_take_openai_shape() -> None:
    overflow = error_body(ContextOverflow("maximum context length"))["error"]
    assert overflow == {
        "message": "maximum context length",
        "type": "invalid_request_error",
        "param": None,
        "code": "context_length_exceeded",
    }
    assert error_headers(EngineUnavailable("x")) == {"Retry-After": "1"}
    assert error_headers(Unauthorized("x")) == {"WWW-Authenticate": "Bearer"}


def test_halves_of_surrogate_pairs_become_replacement_characters() -> None:
    """I6: tools that read bytes as text make them; no text holds them, and the agent still gets its answer."""
    body = b'{"a\\ud800b": ["x\\ud83d\\ude00y\\udc00", {"k": "\\ud83d"}]}'
    assert load_json_object(body) == {
        "a\N{REPLACEMENT CHARACTER}b": ["x😀y\N{REPLACEMENT CHARACTER}", {"k": "\N{REPLACEMENT CHARACTER}"}]
    }


def test_what_a_template_may_read_is_given_to_it() -> None:
    """`reasoning_effort` and `documents` under their names, `chat_template_kwargs` as they are, and before both."""
    request = parse(
        reasoning_effort="low", documents=[{"title": "t"}], chat_template_kwargs={"reasoning_effort": "high"}
    )
    assert request.template_arguments == {"reasoning_effort": "high", "documents": [{"title": "t"}]}
    assert "documents" not in request.passthrough
