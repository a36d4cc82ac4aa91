"""Unknown fields reach the engine and come back equal, streamed too (I8); nothing forges the record (I7)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.echo import EchoServer
from tests.integration.gateway.field_fuzz import (
    QUESTION,
    ROUTES,
    Route,
    check_sampling_fields,
    check_unknown_fields,
    serving_echo,
)


@pytest.fixture(scope="module")
def echo(tiny_model: Path) -> Iterator[tuple[EchoServer, str]]:
    with serving_echo(tiny_model) as served:
        yield served


@pytest.fixture(scope="module")
def gateway_url(
    echo: tuple[EchoServer, str], start_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> str:
    gateway = start_gateway(tmp_path_factory.mktemp("ledger"), engine=f"sglang={echo[1]}")
    return str(gateway.url)


@pytest.fixture
def url(gateway_url: str) -> str:
    return f"{gateway_url}/sessions/fields/v1/chat/completions"


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_unknown_fields_reach_the_engine_and_come_back_equal(
    route: Route, echo: tuple[EchoServer, str], gateway_url: str
) -> None:
    """I8: integers beyond 64 bits, 1.0 beside 1, order of keys, nulls, any text and nesting; both ways."""
    check_unknown_fields(gateway_url, echo[0].requests, route)


@pytest.mark.parametrize("route", [r for r in ROUTES if r.session == "path"], ids=str)
def test_sampling_fields_of_engines_are_among_their_sampling_parameters(
    route: Route, echo: tuple[EchoServer, str], gateway_url: str
) -> None:
    """I8: what SGLang and vLLM know of sampling is asked of them where they look for it."""
    check_sampling_fields(gateway_url, echo[0].requests, route)


def test_an_agents_fields_cannot_forge_what_is_asked_of_the_engine(echo: tuple[EchoServer, str], url: str) -> None:
    """I7: log-probs are asked for whatever the agent says; ids, labels and adapters are ours."""
    forged = {"return_logprob": False, "input_ids": [1], "rid": "mine", "lora_path": "x", "weight_version": "9"}
    reply = httpx.post(url, json={"messages": [QUESTION], "logprobs": False, **forged}, timeout=30)
    request = echo[0].requests[-1]
    assert reply.status_code == 200
    assert request["return_logprob"] is True
    assert len(request["input_ids"]) > 1
    assert request["rid"] != "mine"
    assert not {"lora_path", "weight_version"} & request.keys()


@pytest.mark.parametrize(
    ("fields", "interval"),
    [({}, 128), ({"stream": True}, 8), ({"stream": True, "stream_interval": 1}, 1), ({"stream_interval": 3}, 3)],
    ids=["whole", "streamed", "streamed-by-token", "own"],
)
def test_engines_tell_several_tokens_together(
    fields: dict[str, Any], interval: int, echo: tuple[EchoServer, str], url: str
) -> None:
    """As many as suits how the agent wants its reply; its own word holds (I8)."""
    httpx.post(url, json={"messages": [QUESTION], **fields}, timeout=30).raise_for_status()
    assert echo[0].requests[-1]["sampling_params"]["stream_interval"] == interval


@pytest.mark.parametrize(("setting", "interval"), [("0", None), ("2", 2)])
def test_an_operator_says_how_many_tokens_streaming_agents_get_together(
    setting: str, interval: int | None, echo: tuple[EchoServer, str], start_gateway: Callable[..., Any], tmp_path: Path
) -> None:
    """0 leaves it to the engine."""
    flags = ("--set", f"turns.stream_interval={setting}")
    gateway = start_gateway(tmp_path, *flags, engine=f"sglang={echo[1]}")
    url = f"{gateway.url}/sessions/streamed/v1/chat/completions"
    httpx.post(url, json={"messages": [QUESTION], "stream": True}, timeout=30).raise_for_status()
    assert echo[0].requests[-1]["sampling_params"].get("stream_interval") == interval


def test_reply_fields_of_the_gateway_are_its_own(url: str) -> None:
    """An engine's field of the same name does not replace what the client needs to read."""
    reply = httpx.post(url, json={"messages": [QUESTION], "usage": "mine", "object": "mine"}, timeout=30).json()
    assert reply["object"] == "chat.completion"
    assert reply["usage"]["completion_tokens"] > 0


def test_a_call_that_the_agent_requires_is_asked_of_the_engine_as_a_grammar(
    echo: tuple[EchoServer, str], url: str
) -> None:
    """The grammar is in the model's own call syntax, and the record says that it was enforced."""
    tools = [{"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")]
    choice = {"type": "function", "function": {"name": "g"}}
    body = {"messages": [QUESTION], "tools": tools, "tool_choice": choice, "parallel_tool_calls": False}
    assert httpx.post(url, json=body, timeout=30).status_code == 200
    tag = json.loads(echo[0].requests[-1]["sampling_params"]["structural_tag"])
    assert [entry["begin"] for entry in tag["format"]["tags"]] == ['<tool_call>\n{"name": "g", "arguments": ']
    assert tag["format"]["stop_after_first"] is True
    turn = httpx.get(url.replace("/v1/chat/completions", "/turns"), timeout=30).json()["turns"][-1]
    assert turn["meta"]["tool_choice_enforced"] is True
