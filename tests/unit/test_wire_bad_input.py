"""Whatever stands where a field is expected, a reader takes it or names it in an InvalidRequest; nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import InvalidRequest
from gateway.wire.anthropic import parse_count_request, parse_messages_request
from gateway.wire.completions import parse_completions_request
from gateway.wire.generate import parse_sglang_request
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import parse_chat_request
from gateway.wire.responses import parse_responses_request
from gateway.wire.sampling import sampling_params
from gateway.wire.tokenization import parse_detokenize_request, parse_tokenize_request

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True},
}
SAMPLING: dict[str, Any] = {
    "temperature": 1.0,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "stop": ["x"],
    "stop_token_ids": [1],
    "seed": 3,
    "ignore_eos": False,
    "min_new_tokens": 1,
    "regex": "a",
    "logit_bias": {"1": 2},
    "presence_penalty": 0.5,
}
CHAT: dict[str, Any] = {
    **SAMPLING,
    "model": "m",
    "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "name": "n", "content": [{"type": "text", "text": "t"}]},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://h/p", "detail": "low"}}]},
        {"role": "assistant", "content": None, "reasoning_content": "r", "refusal": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "x"},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": True,
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "n": 2,
    "logprobs": True,
    "top_logprobs": 2,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "reasoning_effort": "low",
    "documents": [{"title": "t"}],
    "chat_template_kwargs": {"enable_thinking": True},
    "return_token_ids": True,
    "return_routed_experts": True,
}
COMPLETIONS: dict[str, Any] = {
    **SAMPLING,
    "prompt": [[1, 2], [3]],
    "echo": True,
    "logprobs": 1,
    "n": 1,
    "best_of": 1,
    "suffix": None,
    "add_special_tokens": True,
    "max_tokens": 3,
    "stream": False,
    "stream_options": {"include_usage": True},
    "response_format": {"type": "text"},
}
GENERATE: dict[str, Any] = {
    "input_ids": [[1, 2], [3]],
    "sampling_params": {**SAMPLING, "n": 1, "max_new_tokens": 3, "sampling_seed": 1},
    "rid": ["a", "b"],
    "return_logprob": True,
    "return_text_in_logprobs": True,
    "routed_experts_start_len": 0,
    "stream": False,
}
RESPONSES: dict[str, Any] = {
    "model": "m",
    "instructions": "i",
    "input": [
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "t"}]},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_image", "image_url": "http://h/p", "detail": "low"}],
        },
        {"type": "reasoning", "id": "rs_turn-a_0", "summary": [{"type": "summary_text", "text": "t"}]},
        {
            "type": "reasoning",
            "content": [{"type": "reasoning_text", "text": "t"}],
            "encrypted_content": "verbatim.eA==",
        },
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "t", "annotations": []}]},
        {"type": "function_call", "id": "fc_turn-a_1", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "o"}]},
        {"role": "user", "content": "plain"},
    ],
    "tools": [{"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}],
    "tool_choice": {"type": "function", "name": "f"},
    "text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
    "truncation": "auto",
    "max_output_tokens": 5,
    "store": True,
    "background": False,
    "stream": True,
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "top_logprobs": 2,
}
MESSAGES: dict[str, Any] = {
    "model": "m",
    "max_tokens": 5,
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "t", "citations": None}]},
        {
            "role": "user",
            "content": [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "eA=="}}],
        },
        {
            "role": "user",
            "content": [{"type": "document", "title": "t", "source": {"type": "text", "data": "d"}, "context": "c"}],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "t", "signature": "s"},
                {"type": "text", "text": "t"},
                {"type": "tool_use", "id": "i", "name": "f", "input": {"a": 1}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "i",
                    "content": [{"type": "text", "text": "r"}],
                    "is_error": True,
                },
                {"type": "search_result", "title": "t", "source": "s", "content": [{"type": "text", "text": "x"}]},
            ],
        },
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": {"type": "object"}, "type": "custom"}],
    "tool_choice": {"type": "tool", "name": "f", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 5, "display": "omitted"},
    "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    "stop_sequences": ["x"],
    "top_k": 5,
    "top_p": 0.5,
    "temperature": 0.5,
    "stream": True,
    "metadata": {"user_id": "u"},
    "thread": {"type": "create"},
    "chat_template_kwargs": {},
}
TOKENIZE: dict[str, Any] = {"prompt": ["a", "b"], "add_special_tokens": True, "return_token_strs": True, "model": "m"}
TOKENIZE_CHAT: dict[str, Any] = {**CHAT, "add_generation_prompt": True, "continue_final_message": False}
DETOKENIZE: dict[str, Any] = {"tokens": [[1], [2, 3]], "skip_special_tokens": True}

Read = Callable[[bytes], object]


def _read_chat(body: bytes) -> object:
    """As far as a call's fields are read before its prompt is built."""
    request = parse_chat_request(body)
    return sampling_params(request.sampling, max_new_tokens=request.sampling.get("max_new_tokens", 1))


def _read_turns(parse: Callable[[bytes], Any]) -> Read:
    def read(body: bytes) -> object:
        return [
            sampling_params(turn.sampling, max_new_tokens=turn.sampling.get("max_new_tokens", 1))
            for turn in parse(body).turns
        ]

    return read


READERS: dict[str, tuple[Read, dict[str, Any]]] = {
    "chat": (_read_chat, CHAT),
    "completions": (_read_turns(parse_completions_request), COMPLETIONS),
    "generate": (_read_turns(parse_sglang_request), GENERATE),
    "responses": (lambda body: parse_responses_request(body).turn(), RESPONSES),
    "messages": (lambda body: parse_messages_request(body).turn(), MESSAGES),
    "count_tokens": (lambda body: parse_count_request(body).turn(), MESSAGES),
    "tokenize": (_read_turns(parse_tokenize_request), TOKENIZE),
    "tokenize_chat": (_read_turns(parse_tokenize_request), TOKENIZE_CHAT),
    "detokenize": (_read_turns(parse_detokenize_request), DETOKENIZE),
}

Path = tuple[str | int, ...]


def paths(value: Any, at: Path = ()) -> Iterator[Path]:
    """Every place of a value below its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from paths(item, (*at, key))


def replaced(value: Any, path: Path, by: Any) -> Any:
    changed = copy.deepcopy(value)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = by
    return changed


PLACES = [(name, path) for name, (_, example) in READERS.items() for path in paths(example)]
wrong = st.one_of(
    st.sampled_from([None, True, 0, -1, 1.5, 2**70, -(2**70), 10**400, "", "x", [], {}, [None], [[]], [{}]]),
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text()),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.one_of(
                    st.text(max_size=3), st.sampled_from(["type", "text", "role", "content", "function", "name"])
                ),
                inner,
                max_size=3,
            ),
        ),
        max_leaves=5,
    ),
)


def refused(read: Read, body: bytes) -> InvalidRequest | None:
    try:
        read(body)
    except InvalidRequest as error:
        return error
    return None


@pytest.mark.parametrize("name", READERS)
def test_the_example_of_every_dialect_is_read(name: str) -> None:
    read, example = READERS[name]
    assert refused(read, json.dumps(example).encode()) is None


@pytest.mark.parametrize(("name", "path"), PLACES, ids=lambda item: ".".join(map(str, item)) if item else "-")
@settings(max_examples=12, suppress_health_check=[HealthCheck.too_slow])
@given(value=wrong)
def test_a_wrong_value_at_any_place_is_taken_or_named(name: str, path: Path, value: Any) -> None:
    """I6: no reader fails on what an agent sends; what it refuses, it names."""
    read, example = READERS[name]
    error = refused(read, json.dumps(replaced(example, path, value)).encode())
    if error is not None:
        assert error.param is not None, error.message


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60)
@given(fields=st.dictionaries(st.sampled_from([*CHAT, *MESSAGES, *RESPONSES, *GENERATE, "prompt", "text"]), wrong))
def test_any_object_is_taken_or_refused_with_a_name(name: str, fields: dict[str, Any]) -> None:
    error = refused(READERS[name][0], json.dumps(fields).encode())
    if error is not None:
        assert error.param is not None, error.message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"temperature": 1e400}', "temperature"),
        (b'{"messages": [{"role": "user", "x": {"y": [1, -1E+999]}}]}', "messages[0].x.y[1]"),
        (b'{"a": ' + b"9" * 400 + b".5}", "a"),
    ],
)
def test_a_number_that_no_float_holds_is_refused_by_name(body: bytes, param: str) -> None:
    """I8: it would leave as another value than it came."""
    error = refused(load_json_object, body)
    assert error is not None
    assert error.param == param


def test_numbers_at_the_edge_of_floats_stay() -> None:
    assert load_json_object(b'{"a": [1.7976931348623157e308, 5e-324, 1e-400, 1e22, -0.0]}') == {
        "a": [1.7976931348623157e308, 5e-324, 0.0, 1e22, -0.0]
    }


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("opening", ['{"a":', "[", '[{"a":['])
@pytest.mark.parametrize("depth", [201, 900, 100_000])
def test_what_is_nested_too_deeply_is_refused(name: str, opening: str, depth: int) -> None:
    closing = {"{": "}", "[": "]"}
    ends = "".join(closing[c] for c in reversed(opening) if c in closing)
    error = refused(READERS[name][0], f'{{"x": {opening * depth}1{ends * depth}}}'.encode())
    assert error is not None
    assert "too deeply" in error.message


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("body", [b"", b"[]", b"1", b"null", b'"x"', b"{", b"\xff", b'{"a": "\xc3"}', b"{}x"])
def test_what_is_no_object_of_utf_8_json_is_refused_in_one_line(name: str, body: bytes) -> None:
    error = refused(READERS[name][0], body)
    assert error is not None
    assert "body" in error.message
    assert "\n" not in error.message


def messages_of(name: str, changed: Sequence[tuple[Path, Any]]) -> Iterator[tuple[str | None, str]]:
    read, example = READERS[name]
    for path, value in changed:
        error = refused(read, json.dumps(replaced(example, path, value)).encode())
        assert error is not None, (path, value)
        yield error.param, error.message


def test_nested_fields_are_named_with_their_whole_path() -> None:
    changed: list[tuple[Path, Any]] = [
        (("messages", 0, "role"), 1),
        (("messages", 1, "content"), 5),
        (("tools", 0), "x"),
        (("stream_options", "include_usage"), "yes"),
        (("response_format", "type"), "xml"),
        (("tool_choice",), "sometimes"),
    ]
    assert [param for param, _ in messages_of("chat", changed)] == [
        "messages[0].role",
        "messages[1].content",
        "tools[0]",
        "stream_options.include_usage",
        "response_format.type",
        "tool_choice",
    ]
    assert [param for param, _ in messages_of("generate", [(("sampling_params", "top_k"), "x")])] == [
        "sampling_params.top_k"
    ]
    assert [param for param, _ in messages_of("messages", [(("output_config", "effort"), 1)])] == [
        "output_config.effort"
    ]
