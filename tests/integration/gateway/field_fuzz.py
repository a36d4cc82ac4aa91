"""The round trip of fields that nobody here knows: agent → gateway → engine → gateway → agent, equal both ways (I8).

The engine behind the gateway is an `engines.echo.EchoServer`, directly or behind whatever stands between: what it gets
is compared with what was sent, and so is what it sends back. `check_unknown_fields` and `check_sampling_fields` take
any gateway in front of any such engine; `ROUTES` are all ways to ask.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
from aiohttp import web
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines.echo import EchoServer
from engines.launch import free_port

QUESTION = {"role": "user", "content": "What is 48/2?"}
ANSWER = "It is 24."
BODIES: Mapping[str, Mapping[str, Any]] = {
    "/v1/chat/completions": {"messages": [QUESTION]},
    "/v1/completions": {"prompt": "What is 48/2?"},
    "/generate": {"input_ids": [5, 6]},
    "/v1/responses": {"input": "What is 48/2?"},
    "/v1/messages": {"messages": [QUESTION], "max_tokens": 16},
}
"""Endpoint → the smallest request that it takes."""

SINGLE_REPLY = ("/v1/responses", "/v1/messages")
CAPTURED = frozenset(("output_ids", "output_token_logprobs", "input_token_logprobs", "routed_experts"))

SAMPLING_FIELDS: Mapping[str, Any] = {
    "allowed_token_ids": [1, 2, 3],
    "bad_words": ["x"],
    "custom_params": {"mine": [1, 1.0, None, 2**70]},
    "ebnf": 'root ::= "a"',
    "frequency_penalty": 0.5,
    "json_schema": '{"type": "object"}',
    "logit_bias": {"5": 1.5},
    "min_new_tokens": 1,
    "no_stop_trim": True,
    "presence_penalty": 0.5,
    "regex": "[a-z]+",
    "repetition_detection": {"min_count": 2},
    "repetition_penalty": 1.1,
    "spaces_between_special_tokens": False,
    "stop_regex": "a+",
    "stream_interval": 3,
    "structural_tag": '{"type": "structural_tag"}',
    "structured_outputs": {"regex": "[a-z]"},
    "thinking_token_budget": 12,
    "vllm_xargs": {"mine": 1},
    "watermarking": False,
}
"""Sampling fields of SGLang and vLLM that the gateway does not interpret, with a value of their kind."""


@dataclass(frozen=True, slots=True)
class Route:
    """One way to ask: where, streamed or not, how many replies, and how the session is named."""

    endpoint: str
    stream: bool
    num_choices: int
    session: Literal["path", "header", "none"]

    def __str__(self) -> str:
        shape = "stream" if self.stream else "whole"
        return f"{self.endpoint.rpartition('/')[2]}-{shape}-n{self.num_choices}-{self.session}"


ROUTES = [
    Route(endpoint, stream, num_choices, session)
    for endpoint in BODIES
    for stream in (False, True)
    for num_choices in (1, 2)
    for session in ("path", "header", "none")
    if num_choices == 1 or (endpoint not in SINGLE_REPLY and session == "path")
]

numbers = st.one_of(
    st.integers(-(2**90), 2**90),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([1, 1.0, -0.0, 0, 0.1 + 0.2, 5e-324, 1.7976931348623157e308, 2**63, 2**64, -(2**63) - 1, 1e16]),
)
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    st.sampled_from(["\u2028\u2029", "\x00\x1f", "data: [DONE]\n\n", "\r\n\r\n", "🦉", "\ufeff", "<|im_end|>", '"\\']),
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, texts),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(texts, inner, max_size=3)),
    max_leaves=8,
)
names = st.text("xyzäß. -", min_size=1, max_size=6).map(lambda name: f"x_{name}")
unknown_fields = st.dictionaries(names, values, max_size=4)


def nested(depth: int) -> Any:
    """Lists and objects in turn, one in the other."""
    value: Any = 1.0
    for level in range(depth):
        value = [value] if level % 2 else {"in": value}
    return value


NAMED_CASES: Mapping[str, Any] = {
    "x_beyond": [2**64, 2**200, -(2**64), 18446744073709551616.0],
    "x_floats": [0.1, 0.30000000000000004, 123456789.12345678, 1.0, 1, -0.0, 1e-7, 1e22, 1e23],
    "x_order": {"b": 1, "a": 2, "": None, "aa": {"z": [], "y": {}}},
    "x_text": "line\u2028separator\u2029 nul\x00 owl🦉 data: [DONE]\n\nevent: x\n\n",
    "x_deep": nested(190),
}
"""What went wrong elsewhere once, every time."""


def check_unknown_fields(
    gateway_url: str, requests: Sequence[Mapping[str, Any]], route: Route, *, max_examples: int = 6
) -> None:
    """Raise AssertionError for a field that is lost or changed. requests: what the echo server got, newest last."""

    @settings(
        max_examples=max_examples,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(unknown=unknown_fields)
    @example(unknown=dict(NAMED_CASES))
    @example(unknown={})
    def check(unknown: dict[str, Any]) -> None:
        replies = ask(gateway_url, route, unknown)
        assert len(replies) == route.num_choices
        for request in requests[-route.num_choices :]:
            assert sent({k: v for k, v in request.items() if k.startswith("x_")}) == sent(unknown)
        for reply in replies:
            assert sent({k: v for k, v in reply.fields.items() if k in unknown}) == sent(unknown)
            assert sent(reply.meta_info["echo"]) == sent(unknown)
            assert CAPTURED.isdisjoint(reply.meta_info)

    check()


def check_sampling_fields(gateway_url: str, requests: Sequence[Mapping[str, Any]], route: Route) -> None:
    """Raise AssertionError for a sampling field that is not among the engine's sampling parameters, as it was sent."""
    is_native = route.endpoint == "/generate"
    fields = {"sampling_params": dict(SAMPLING_FIELDS)} if is_native else dict(SAMPLING_FIELDS)
    ask(gateway_url, route, fields)
    for request in requests[-route.num_choices :]:
        parameters = {k: v for k, v in request["sampling_params"].items() if k in SAMPLING_FIELDS}
        assert parameters == SAMPLING_FIELDS
        assert sent(parameters["custom_params"]) == sent(SAMPLING_FIELDS["custom_params"])
        assert SAMPLING_FIELDS.keys().isdisjoint(request)


@dataclass(frozen=True, slots=True)
class EchoedReply:
    """One choice as the agent sees it: the object at whose top the engine's own fields stand, and its meta_info."""

    fields: Mapping[str, Any]
    meta_info: Mapping[str, Any]


def ask(gateway_url: str, route: Route, fields: Mapping[str, Any]) -> list[EchoedReply]:
    """Send a request with these fields on top of the smallest one; the choices of its reply."""
    body: dict[str, Any] = {**BODIES[route.endpoint], **fields}
    if route.num_choices > 1 and route.endpoint == "/generate":
        body["sampling_params"] = {**body.get("sampling_params", {}), "n": route.num_choices}
    elif route.num_choices > 1:
        body["n"] = route.num_choices
    prefix = "/sessions/fields%2F%C3%BC" if route.session == "path" else ""
    headers = {"X-Session-ID": "fields%2F%C3%BC"} if route.session == "header" else {}
    content = json.dumps(body | ({"stream": True} if route.stream else {}))
    reply = httpx.post(gateway_url + prefix + route.endpoint, content=content, headers=headers, timeout=60)
    assert reply.status_code == 200, reply.text
    return _streamed(reply.text) if route.stream else _whole(json.loads(reply.content))


def sent(value: Any) -> str:
    """Numbers, nesting, order of keys and nulls, all of which count."""
    return json.dumps(value)


def _whole(reply: Any) -> list[EchoedReply]:
    if isinstance(reply, list):
        return [EchoedReply(each, each["meta_info"]) for each in reply]
    if "choices" in reply:
        return [EchoedReply(reply, choice["meta_info"]) for choice in reply["choices"]]
    return [EchoedReply(reply, reply["meta_info"])]


def _streamed(text: str) -> list[EchoedReply]:
    """What the last events of the choices hold; SSE's own line ends are the only ones."""
    lines = text.replace("\r\n", "\n").split("\n")
    payloads = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    events = [json.loads(payload) for payload in payloads if payload != "[DONE]"]
    return [reply for event in events if _is_last(event) for reply in _whole(event.get("response", event))]


def _is_last(event: Mapping[str, Any]) -> bool:
    """Whether an event ends a choice, in the way of its dialect."""
    if "choices" in event:
        return any(choice["finish_reason"] for choice in event["choices"])
    if "output_ids" in event:
        return event["meta_info"]["finish_reason"] is not None
    return event["type"] in ("response.completed", "message_delta")


@contextmanager
def serving_echo(
    model: Path, *, context_length: int = 4096, port: int | None = None
) -> Iterator[tuple[EchoServer, str]]:
    """An echo server for a model's tokenizer and its URL, on `port` or a free one, in a thread of its own."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    ids = [*tokenizer.encode(ANSWER, add_special_tokens=False).ids, tokenizer.token_to_id("<|im_end|>")]
    server = EchoServer(ids, context_length=context_length)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.app())

    async def start() -> str:
        await runner.setup()
        chosen = port or free_port()
        await web.TCPSite(runner, "127.0.0.1", chosen).start()
        return f"http://127.0.0.1:{chosen}"

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server, asyncio.run_coroutine_threadsafe(start(), loop).result(20)
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(20)
        loop.close()
