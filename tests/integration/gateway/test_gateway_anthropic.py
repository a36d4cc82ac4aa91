"""Agents with the real Anthropic client against a real gateway process: what they see and what is recorded."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import numpy as np
import pytest

from gateway.contracts.codec import decode_rollout
from tests.integration.gateway.conftest import TOOLS, RunningGateway, StartGateway

SCHEMA = {"type": "object", "properties": {"expression": {"type": "string"}}}
CALCULATOR: Any = {"name": "calculator", "description": "Works it out.", "input_schema": SCHEMA}
QUESTION: Any = {"role": "user", "content": "What is 48/2?"}
CACHED: Any = {"cache_control": {"type": "ephemeral"}}


def written_call(expression: str) -> str:
    arguments = json.dumps({"expression": expression})
    return f'<tool_call>\n{{"name": "calculator", "arguments": {arguments}}}\n</tool_call>'


RULES: list[dict[str, Any]] = [
    {"after": "\0", "reply": "hello"},
    {"after": "What is 48/2?", "reply": f"<think>\nlet me see\n</think>\nI work it out.\n{written_call('48/2')}"},
    {"after": "it is 24", "reply": f"<think>\ntwo more\n</think>\n{written_call('24+1')}\n{written_call('24+2')}"},
    {"after": "it is 26", "reply": "<think>\nso\n</think>\nThey are 24, 25 and 26."},
    {"after": "once more", "reply": written_call("1 + 1")},
    {"after": "it is two", "reply": "Two, then."},
    {"after": "count slowly", "reply": "one two three four five six", "delay_seconds": 0.03},
]
RESULTS = {"48/2": "it is 24", "24+1": "it is 25", "24+2": "it is 26", "1 + 1": "it is two"}


@pytest.fixture(scope="module")
def messages_gateway(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    folder = tmp_path_factory.mktemp("messages")
    rules = folder / "rules.json"
    rules.write_text(json.dumps(RULES))
    return start_gateway(folder / "ledger", engine=f"scripted={rules}")


@pytest.fixture
def client(messages_gateway: RunningGateway, session_id: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=f"{messages_gateway.url}/sessions/{session_id}", api_key="unused", max_retries=0
    ) as client:
        yield client


def ask(client: anthropic.Anthropic, messages: list[Any], **options: Any) -> Any:
    return client.messages.create(
        **({"model": "any", "max_tokens": 300, "messages": messages, "tools": [CALCULATOR]} | options)
    )


def streamed(client: anthropic.Anthropic, messages: list[Any], **options: Any) -> Any:
    known = {"model": "any", "max_tokens": 300, "messages": messages, "tools": [CALCULATOR]}
    with client.messages.stream(**(known | options)) as stream:
        return stream.get_final_message()


def results_of(message: Any) -> list[Any]:
    calls = [block for block in message.content if block.type == "tool_use"]
    return [
        {"type": "tool_result", "tool_use_id": call.id, "content": RESULTS[call.input["expression"]]} for call in calls
    ]


def without_ids(message: Any) -> dict[str, Any]:
    """What a message says; ids of messages and calls are new each time."""
    body = message.model_dump(exclude_unset=True)
    del body["id"]
    for block in body["content"]:
        block.pop("id", None)
        block.pop("parsed_output", None)
    return dict(body)


@pytest.mark.parametrize("deliver", [ask, streamed])
def test_five_turn_tool_conversation_is_one_segment_and_trains_every_token_once(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str, deliver: Any
) -> None:
    """I1: each prompt is the recorded ids and what the template adds; I2: one length; I3: each token trained once."""
    messages_gateway.post("/sessions", {"session_id": session_id, "labels": {"test": session_id}})
    messages: list[Any] = [QUESTION]
    system = [{"type": "text", "text": "You are careful.", **CACHED}]
    replies = []
    for follow_up in (None, None, "once more", None, None):
        reply = deliver(client, messages, system=system)
        replies.append(reply)
        said = results_of(reply)
        texts = [{"type": "text", "text": follow_up, **CACHED}] if follow_up else []
        messages += [{"role": "assistant", "content": reply.content}, {"role": "user", "content": [*said, *texts]}]
    assert [reply.stop_reason for reply in replies] == ["tool_use", "tool_use", "end_turn", "tool_use", "end_turn"]
    assert [[block.type for block in reply.content] for reply in replies] == [
        ["thinking", "text", "tool_use"],
        ["thinking", "tool_use", "tool_use"],
        ["thinking", "text"],
        ["tool_use"],
        ["text"],
    ]
    assert replies[-1].content[0].text == "Two, then."
    turns = messages_gateway.turns(session_id)
    assert [turn["attachment"]["tier"] for turn in turns[1:]] == ["semantic"] * 4
    assert [turn["attachment"]["parent_id"] for turn in turns] == [None, *[turn["turn_id"] for turn in turns[:-1]]]
    assert [reply.usage.output_tokens for reply in replies] == [len(turn["output_token_ids"]) for turn in turns]
    assert all(turn["delivered_at"] for turn in turns)
    messages_gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    lease = messages_gateway.post("/feed/leases", {"consumer": "test", "limit": 1, "labels": {"test": session_id}})
    [leased] = lease["rollouts"]
    url = f"{messages_gateway.url}/feed/rollouts/{session_id}"
    rollout = decode_rollout(httpx.get(url, params={"snapshot": leased["snapshot"]}).content)
    [segment] = rollout.segments
    sampled = [token for turn in turns for token in turn["output_token_ids"]]
    assert segment.token_ids[segment.loss_mask].tolist() == sampled
    recorded = [token for turn in turns for token in turn["prompt_token_ids"] + turn["output_token_ids"]]
    assert segment.token_ids.tolist() == recorded
    assert np.isfinite(segment.rollout_logprobs[segment.loss_mask]).all()
    assert segment.routed_valid.all()


def test_a_stream_accumulates_to_the_message_that_is_not_streamed(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    messages: list[Any] = [QUESTION]
    for _ in range(3):
        whole, from_stream = ask(client, messages), streamed(client, messages)
        assert without_ids(from_stream) == without_ids(whole)
        messages = [
            *messages,
            {"role": "assistant", "content": from_stream.content},
            {"role": "user", "content": results_of(from_stream)},
        ]
    turns = messages_gateway.turns(session_id)
    parents = [turn["attachment"]["parent_id"] for turn in turns]
    assert parents[2:] == [turns[1]["turn_id"]] * 2 + [turns[3]["turn_id"]] * 2


async def test_async_stream_tells_every_event_in_order(messages_gateway: RunningGateway, session_id: str) -> None:
    """I4: the end of the stream comes after the record."""
    url = f"{messages_gateway.url}/sessions/{session_id}"
    thinking, text, arguments, num_recorded = "", "", "", 0
    async with anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=0) as client:
        whole = await client.messages.create(model="any", max_tokens=300, messages=[QUESTION], tools=[CALCULATOR])
        async with client.messages.stream(
            model="any", max_tokens=300, messages=[QUESTION], tools=[CALCULATOR]
        ) as stream:
            async for event in stream:
                if event.type == "thinking":
                    thinking += event.thinking
                elif event.type == "text":
                    text += event.text
                elif event.type == "input_json":
                    arguments += event.partial_json
                elif event.type == "message_delta":
                    num_recorded = len(messages_gateway.turns(session_id))
            final = await stream.get_final_message()
    assert num_recorded == 2
    assert (thinking, text, json.loads(arguments)) == ("let me see", "I work it out.", {"expression": "48/2"})
    assert without_ids(final) == without_ids(whole)
    assert [turn["attachment"]["parent_id"] for turn in messages_gateway.turns(session_id)] == [None, None]


def test_stream_is_real(messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str) -> None:
    """The first delta leaves long before the last token is sampled."""
    arrivals = []
    with client.messages.stream(
        model="any", max_tokens=300, messages=[{"role": "user", "content": "count slowly"}]
    ) as stream:
        for _ in stream.text_stream:
            arrivals.append(time.monotonic())
    assert arrivals[-1] - arrivals[0] > 0.3


@pytest.mark.parametrize("first", ["chat", "messages"])
def test_a_session_may_mix_dialects_and_stays_one_segment(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str, first: str
) -> None:
    """I3: chat completions, messages, chat completions of one conversation extend the same tokens."""
    openai_client = messages_gateway.client(session_id)
    tools: Any = [
        {"type": "function", "function": {"name": "calculator", "description": "Works it out.", "parameters": SCHEMA}}
    ]
    spelt: list[Any] = [QUESTION]  # as chat completions spell it
    blocks: list[Any] = [QUESTION]  # as Anthropic does
    for i in range(3):
        if (i % 2 == 0) is (first == "chat"):
            reply = openai_client.chat.completions.create(model="any", messages=spelt, tools=tools).choices[0].message
            message = reply.model_dump(exclude_none=True)
        else:
            message = as_chat(ask(client, blocks).content)
        results = [
            {"role": "tool", "tool_call_id": call["id"], "content": result_for(call)}
            for call in message.get("tool_calls", [])
        ]
        spelt += [message, *results]
        blocks += [
            {"role": "assistant", "content": as_blocks(message)},
            {"role": "user", "content": as_results(results)},
        ]
    turns = messages_gateway.turns(session_id)
    assert [turn["attachment"]["parent_id"] for turn in turns] == [None, turns[0]["turn_id"], turns[1]["turn_id"]]
    assert turns[2]["reply"]["content"] == "They are 24, 25 and 26."


def result_for(call: dict[str, Any]) -> str:
    return RESULTS[json.loads(call["function"]["arguments"])["expression"]]


def as_chat(content: list[Any]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    for block in content:
        if block.type == "thinking":
            message["reasoning_content"] = block.thinking
        elif block.type == "text":
            message["content"] = block.text
        else:
            function = {"name": block.name, "arguments": json.dumps(block.input)}
            message.setdefault("tool_calls", []).append({"id": block.id, "type": "function", "function": function})
    return message


def as_blocks(message: dict[str, Any]) -> list[Any]:
    thinking = message.get("reasoning_content")
    blocks: list[Any] = [{"type": "thinking", "thinking": thinking, "signature": ""}] if thinking else []
    blocks += [{"type": "text", "text": message["content"]}] if message.get("content") else []
    for call in message.get("tool_calls", []):
        arguments = json.loads(call["function"]["arguments"])
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["function"]["name"], "input": arguments})
    return blocks


def as_results(results: list[dict[str, Any]]) -> list[Any]:
    return [
        {"type": "tool_result", "tool_use_id": result["tool_call_id"], "content": result["content"]}
        for result in results
    ]


def test_an_agent_that_drops_thinking_and_moves_cache_marks_stays_in_its_segment(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    """Design 4: reasoning that is absent is forgiven and stays in the prompt."""
    marked = {"role": "user", "content": [{"type": "text", "text": QUESTION["content"], **CACHED}]}
    first = ask(client, [marked], tools=[CALCULATOR | CACHED])
    visible = [block for block in first.content if block.type != "thinking"]
    answer = [block | CACHED for block in results_of(first)]
    ask(client, [QUESTION, {"role": "assistant", "content": visible}, {"role": "user", "content": answer}])
    turns = messages_gateway.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert turns[1]["attachment"]["tier"] == "projection"


def test_counted_tokens_are_those_of_the_prompt_that_follows(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    """Of a first turn and of one that extends recorded ids; counting makes no turn and no session."""
    count: dict[str, Any] = {"model": "any", "tools": [CALCULATOR], "system": "You are careful."}
    messages: list[Any] = [QUESTION]
    for _ in range(2):
        counted = client.messages.count_tokens(messages=messages, **count).input_tokens
        reply = ask(client, messages, system=count["system"], extra_body={"return_token_ids": True})
        assert counted == len(reply.prompt_token_ids) == reply.usage.input_tokens
        messages = [
            *messages, {"role": "assistant", "content": reply.content}, {"role": "user", "content": results_of(reply)},
        ]  # fmt: skip
    assert len(messages_gateway.turns(session_id)) == 2
    known = len(messages_gateway.get("/sessions")["sessions"])
    nobody = anthropic.Anthropic(base_url=messages_gateway.url, api_key="unused", max_retries=0)
    with nobody:
        assert nobody.messages.count_tokens(messages=[QUESTION], model="any").input_tokens > 0
    assert len(messages_gateway.get("/sessions")["sessions"]) == known


def test_the_clients_own_tool_loop_runs_on_a_thread_and_stays_one_segment(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    """I3: turns that send only what is new continue the recorded conversation, its system text and its tools."""

    @anthropic.beta_tool
    def calculator(expression: str) -> str:
        """Works it out."""
        return RESULTS[expression]

    runner = client.beta.messages.tool_runner(
        model="any", max_tokens=300, tools=[calculator], messages=[QUESTION], system="You are careful."
    )
    assert [reply.stop_reason for reply in runner] == ["tool_use", "tool_use", "end_turn"]
    turns = messages_gateway.turns(session_id)
    assert [turn["attachment"]["parent_id"] for turn in turns] == [None, turns[0]["turn_id"], turns[1]["turn_id"]]
    assert turns[1]["meta"]["request"]["thread"]["previous_message_id"] == f"msg_{turns[0]['turn_id']}"
    assert [message["role"] for message in turns[1]["added_messages"]] == ["tool"]


def test_a_thread_that_another_session_holds_is_unknown_and_the_client_sends_all_of_it(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    thread = client.beta.messages.thread(model="any", max_tokens=300, messages=[QUESTION], tools=[CALCULATOR])
    first = thread.send()
    elsewhere = f"{messages_gateway.url}/sessions/{session_id}-2"
    with anthropic.Anthropic(base_url=elsewhere, api_key="unused", max_retries=0) as other:
        with pytest.raises(anthropic.NotFoundError) as caught:
            other.beta.messages.create(
                model="any",
                max_tokens=300,
                messages=[{"role": "user", "content": results_of(first)}],
                thread={"type": "continue", "previous_message_id": first.id},
            )
        assert type(caught.value).__name__ == "ThreadNotFoundError"
    second = thread.send({"role": "user", "content": results_of(first)})
    assert second.stop_reason == "tool_use"
    turns = messages_gateway.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]


def test_captured_arrays_are_in_the_reply_where_asked_for_and_recorded_always(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    """I7."""
    plain = ask(client, [QUESTION], extra_body={"input_ids": [1], "return_logprob": False})
    asked = ask(client, [QUESTION], extra_body={"return_token_ids": True, "return_routed_experts": True})
    assert not {"token_ids", "prompt_token_ids", "routed_experts"} & plain.model_dump().keys()
    turns = messages_gateway.turns(session_id)
    assert asked.token_ids == turns[1]["output_token_ids"]
    assert asked.routed_experts["shape"][0] == len(asked.prompt_token_ids) + len(asked.token_ids) - 1
    assert len(turns[0]["output_logprobs"]) == plain.usage.output_tokens
    assert turns[0]["meta"]["ignored_fields"] == ["input_ids", "return_logprob"]


def test_errors_become_the_classes_of_anthropics_client(
    messages_gateway: RunningGateway, client: anthropic.Anthropic, session_id: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long.*maximum context length") as caught:
        ask(client, [QUESTION], max_tokens=20_000)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id
    with pytest.raises(anthropic.BadRequestError, match=r"tools\[0\]"):
        ask(client, [QUESTION], tools=[{"type": "web_search_20250305", "name": "web_search"}])
    assert messages_gateway.turns(session_id) == []
    assert ask(client, [QUESTION])._request_id
    messages_gateway.post(f"/sessions/{session_id}/finish", {})
    for deliver in (ask, streamed):
        with pytest.raises(anthropic.ConflictError, match="finished"):
            deliver(client, [QUESTION])


def test_keys_open_their_session_in_either_header_and_strangers_are_told_so_in_this_shape(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    rules = tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    gateway = start_gateway(
        tmp_path / "ledger", engine=f"scripted={rules}", environment={"VERBATIM_OPERATOR_KEY": "operator"}
    )
    operator = {"Authorization": "Bearer operator"}
    made = gateway.post("/sessions", {"session_id": "own"}, headers=operator)
    gateway.post("/sessions", {"session_id": "other"}, headers=operator)
    for base_url in (gateway.url, f"{gateway.url}/sessions/own", made["base_url"]):
        for credentials in ({"api_key": made["api_key"]}, {"auth_token": made["api_key"], "api_key": None}):
            with anthropic.Anthropic(base_url=base_url, max_retries=0, **credentials) as client:
                assert ask(client, [QUESTION]).stop_reason == "tool_use"
                assert client.messages.count_tokens(model="any", messages=[QUESTION]).input_tokens > 0
    assert gateway.get("/sessions/own", headers=operator)["reports"]["turns"] == 6
    with anthropic.Anthropic(
        base_url=f"{gateway.url}/sessions/other", api_key=made["api_key"], max_retries=0
    ) as client:
        with pytest.raises(anthropic.PermissionDeniedError):
            ask(client, [QUESTION])
        with pytest.raises(anthropic.PermissionDeniedError):
            client.messages.count_tokens(model="any", messages=[QUESTION])
    with anthropic.Anthropic(base_url=gateway.url, api_key="stranger", max_retries=0) as client:
        with pytest.raises(anthropic.AuthenticationError):
            ask(client, [QUESTION])
        with pytest.raises(anthropic.AuthenticationError):
            client.messages.count_tokens(model="any", messages=[QUESTION])


def test_chat_completions_keep_their_own_errors(messages_gateway: RunningGateway, session_id: str) -> None:
    """Anthropic's shape holds on Anthropic's routes only."""
    url = f"{messages_gateway.url}/sessions/{session_id}/v1"
    assert "type" not in httpx.post(f"{url}/chat/completions", json={"tools": TOOLS}).json()
    assert httpx.post(f"{url}/messages", json={"tools": TOOLS}).json()["type"] == "error"
