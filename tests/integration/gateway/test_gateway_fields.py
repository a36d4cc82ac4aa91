"""Unknown fields reach the engine and come back equal, streamed too (I8); nothing forges the record (I7)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from engines.echo import EchoServer

QUESTION = {"role": "user", "content": "What is 48/2?"}
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [QUESTION]},
    "/v1/completions": {"prompt": "What is 48/2?"},
    "/generate": {"input_ids": [5, 6]},
    "/v1/responses": {"input": "What is 48/2?"},
}
numbers = st.one_of(
    st.integers(-(2**90), 2**90), st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([1, 1.0, -0.0, 0])
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abü", max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
fields = st.dictionaries(st.text("xyz_", min_size=3, max_size=6).map(lambda name: f"x_{name}"), values, max_size=4)


@pytest.fixture(scope="module")
def echo(tiny_model: Path) -> Iterator[tuple[EchoServer, str]]:
    """An echo server on a port of its own, in a thread of its own."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    ids = [*tokenizer.encode("It is 24.", add_special_tokens=False).ids, tokenizer.token_to_id("<|im_end|>")]
    server = EchoServer(ids)
    loop = asyncio.new_event_loop()
    runner = web.AppRunner(server.app())

    async def start() -> str:
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server, asyncio.run_coroutine_threadsafe(start(), loop).result(20)
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(20)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(20)
    loop.close()


@pytest.fixture(scope="module")
def url(
    echo: tuple[EchoServer, str], start_gateway: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> str:
    gateway = start_gateway(tmp_path_factory.mktemp("ledger"), engine=f"sglang={echo[1]}")
    return f"{gateway.url}/sessions/fields/v1/chat/completions"


def sent(value: Any) -> str:
    """Numbers, nesting, order of keys and nulls, all of which count."""
    return json.dumps(value)


def streamed(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """The last chunk of a streamed reply, or the response that the last event holds."""
    with httpx.stream("POST", url, content=json.dumps(body | {"stream": True}), timeout=30) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    if lines[-1] == "[DONE]":
        return dict(json.loads(lines[-2]))
    last = json.loads(lines[-1])
    assert last["type"] == "response.completed"
    return dict(last["response"])


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_reach_the_engine_and_come_back_equal(
    stream: bool, endpoint: str, echo: tuple[EchoServer, str], url: str
) -> None:
    """I8: integers beyond 64 bits, 1.0 beside 1, order of keys, nulls, any nesting; both ways."""
    url = url.replace("/v1/chat/completions", endpoint)

    @settings(
        max_examples=40 if "chat" in endpoint else 15,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )
    @given(unknown=fields)
    def check(unknown: dict[str, Any]) -> None:
        body = {**ENDPOINTS[endpoint], **unknown}
        reply = (
            streamed(url, body) if stream else json.loads(httpx.post(url, content=json.dumps(body), timeout=30).text)
        )
        engine_saw = {name: value for name, value in echo[0].requests[-1].items() if name.startswith("x_")}
        assert sent(engine_saw) == sent(unknown)
        assert sent({name: reply[name] for name in unknown}) == sent(unknown)
        meta_info = (reply["choices"][0] if "choices" in reply else reply)["meta_info"]
        assert sent(meta_info["echo"]) == sent(unknown)
        assert not {"output_token_logprobs", "output_ids"} & meta_info.keys()

    check()


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
