"""Agents with the real OpenAI client against a real gateway process: what they see and what is recorded."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from gateway.contracts.codec import decode_rollout
from tests.integration.gateway.conftest import TOOLS, RunningGateway
from tests.waiting import until

QUESTION = {"role": "user", "content": "What is 48/2?"}
CAPTURE = {"return_token_ids": True, "return_routed_experts": True}


def ask(gateway: RunningGateway, session_id: str, messages: list[Any], **options: Any) -> Any:
    options.setdefault("tools", TOOLS)
    return gateway.client(session_id).chat.completions.create(model="any", messages=messages, **options)


def test_tool_conversation_extends_recorded_tokens_turn_by_turn(gateway: RunningGateway, session_id: str) -> None:
    """I1: each prompt is the recorded ids plus what the template adds; I2: rows are asked from the parent's last."""
    first = ask(gateway, session_id, [QUESTION], extra_body=CAPTURE)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    assert json.loads(message.tool_calls[0].function.arguments) == {"expression": "48/2"}
    assert message.reasoning_content == "let me see"
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "24"}
    second = ask(gateway, session_id, [QUESTION, message, result], extra_body=CAPTURE)
    assert second.choices[0].message.content == "The answer is 24."
    recorded = first.prompt_token_ids + first.choices[0].token_ids
    assert second.prompt_token_ids[: len(recorded)] == recorded
    turns = gateway.turns(session_id)
    assert [turn["attachment"]["parent_id"] for turn in turns] == [None, turns[0]["turn_id"]]
    assert turns[1]["prompt_token_ids"] == second.prompt_token_ids[len(recorded) :]
    assert turns[1]["output_token_ids"] == second.choices[0].token_ids
    assert turns[1]["experts_start"] == len(recorded) - 1
    assert turns[1]["experts_stop"] == len(second.prompt_token_ids) + len(second.choices[0].token_ids) - 1
    assert all(turn["delivered_at"] for turn in turns)


def test_captured_arrays_have_one_entry_a_token(gateway: RunningGateway, session_id: str) -> None:
    reply = ask(gateway, session_id, [QUESTION], extra_body=CAPTURE).model_dump()
    choice = reply["choices"][0]
    num_tokens = len(choice["token_ids"])
    assert num_tokens == reply["usage"]["completion_tokens"] == len(choice["logprobs"]["content"])
    experts = choice["routed_experts"]
    rows = np.frombuffer(base64.b64decode(experts["data"]), dtype=experts["dtype"]).reshape(experts["shape"])
    assert rows.shape == (len(reply["prompt_token_ids"]) + num_tokens - 1, 4, 2)
    assert rows.dtype == np.uint8


def test_what_was_not_asked_for_is_not_in_the_reply_but_is_recorded(gateway: RunningGateway, session_id: str) -> None:
    """I7: `logprobs: false`, forged ids and labels change nothing of the record."""
    forged = {"input_ids": [1, 2], "weight_version": "forged", "return_logprob": False, "return_routed_experts": False}
    reply = ask(gateway, session_id, [QUESTION], logprobs=False, extra_body=forged).model_dump()
    assert "prompt_token_ids" not in reply
    assert not {"token_ids", "routed_experts"} & reply["choices"][0].keys()
    assert reply["choices"][0]["logprobs"] is None
    [turn] = gateway.turns(session_id)
    assert len(turn["output_logprobs"]) == len(turn["output_token_ids"]) > 0
    assert turn["experts_stop"] == len(turn["prompt_token_ids"]) + len(turn["output_token_ids"]) - 1
    assert turn["meta"]["ignored_fields"] == ["input_ids", "return_logprob", "weight_version"]


async def test_async_stream_delivers_deltas_that_add_up_to_the_record(gateway: RunningGateway, session_id: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/sessions/{session_id}/v1", api_key="k") as client:
        stream = await client.chat.completions.create(
            model="any",
            messages=[QUESTION],  # type: ignore[list-item]
            tools=TOOLS,  # type: ignore[arg-type]
            stream=True,
            stream_options={"include_usage": True},
            extra_body=CAPTURE,
        )
        chunks = [chunk.model_dump() async for chunk in stream]
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    token_ids = [token for choice in choices for token in choice.get("token_ids", [])]
    reasoning = "".join(choice["delta"].get("reasoning_content", "") for choice in choices)
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or []]
    [turn] = gateway.turns(session_id)
    assert token_ids == turn["output_token_ids"]
    assert chunks[0]["prompt_token_ids"] == turn["prompt_token_ids"]
    assert reasoning == turn["reply"]["reasoning_content"]
    assert calls[0]["function"]["name"] == "calculator"
    assert calls[0]["id"] == turn["reply"]["tool_calls"][0]["id"]
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert choices[-1]["routed_experts"]["start"] == 0
    assert chunks[-1]["usage"]["completion_tokens"] == len(token_ids)


def test_stream_is_real(gateway: RunningGateway, session_id: str) -> None:
    """The first delta leaves long before the last token is sampled, and the turn is on disk before the end (I4)."""
    started = time.monotonic()
    arrivals: list[float] = []
    for chunk in ask(gateway, session_id, [{"role": "user", "content": "count slowly"}], stream=True):
        if chunk.choices[0].delta.content:
            arrivals.append(time.monotonic() - started)
        if chunk.choices[0].finish_reason:
            assert len(gateway.turns(session_id)) == 1
    assert arrivals[-1] - arrivals[0] > 0.3


def test_choices_of_one_stream_are_siblings_and_each_adds_up(gateway: RunningGateway, session_id: str) -> None:
    """I3: `n` choices stream side by side; each is a turn of its own, whole and once."""
    chunks = list(ask(gateway, session_id, [QUESTION], stream=True, n=3, extra_body=CAPTURE))
    sampled: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for chunk in chunks:
        for choice in chunk.choices:
            sampled[choice.index] += (choice.model_extra or {}).get("token_ids", [])
    ends = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    turns = gateway.turns(session_id)
    assert sorted(turn["output_token_ids"] for turn in turns) == sorted(sampled.values())
    assert all(turn["delivered_at"] for turn in turns)


async def test_concurrent_calls_become_siblings(gateway: RunningGateway, session_id: str) -> None:
    """I3: eight identical calls at once are eight samples under one parent."""
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=30) as client:
        opening = {"messages": [{"role": "user", "content": "quick"}]}
        reply = (await client.post(url, json=opening)).json()
        follow = {"messages": [*opening["messages"], reply["choices"][0]["message"], {"role": "user", "content": "go"}]}
        replies = await asyncio.gather(*(client.post(url, json=follow) for _ in range(8)))
    assert {reply.status_code for reply in replies} == {200}
    turns = gateway.turns(session_id)
    assert [turn["index"] for turn in turns] == list(range(9))
    assert {turn["attachment"]["parent_id"] for turn in turns[1:]} == {turns[0]["turn_id"]}


async def test_first_calls_of_a_new_session_may_come_at_once(gateway: RunningGateway, session_id: str) -> None:
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    past = [{"role": "user", "content": "quick"}, {"role": "assistant", "content": "unknown"}]
    bodies = [{"messages": [*(past if i % 2 else []), {"role": "user", "content": "quick"}]} for i in range(8)]
    async with httpx.AsyncClient(timeout=30) as client:
        replies = await asyncio.gather(*(client.post(url, json=body) for body in bodies))
    assert {reply.status_code for reply in replies} == {200}
    assert len(gateway.turns(session_id)) == 8


def test_choices_of_one_request_become_siblings(gateway: RunningGateway, session_id: str) -> None:
    reply = ask(gateway, session_id, [{"role": "user", "content": "quick"}], n=3, seed=1)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [turn["sampling"]["seed"] for turn in gateway.turns(session_id)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("spelling", "tier"),
    [("same", "exact"), ("nulls", "semantic"), ("no_reasoning", "projection")],
)
def test_replayed_reply_is_found_in_each_spelling(
    gateway: RunningGateway, session_id: str, spelling: str, tier: str
) -> None:
    """Design 4: stored ids stay, whatever the replay's spelling."""
    reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", {"messages": [QUESTION], "tools": TOOLS})[
        "choices"
    ][0]["message"]
    if spelling == "nulls":
        reply |= {"content": "", "refusal": None, "annotations": []}
        reply["tool_calls"][0] |= {"id": "renamed", "index": 0}
        reply["tool_calls"][0]["function"]["arguments"] = '{ "expression":"48/2" }'
    if spelling == "no_reasoning":
        del reply["reasoning_content"]
    result = {"role": "tool", "tool_call_id": reply["tool_calls"][0]["id"], "content": "24"}
    ask(gateway, session_id, [QUESTION, reply, result])
    turns = gateway.turns(session_id)
    assert turns[1]["attachment"] == {
        "parent_id": turns[0]["turn_id"],
        "follows_id": turns[0]["turn_id"],
        "tier": tier,
        "segment_reason": None,
        "continues": False,
    }


@pytest.mark.parametrize(
    ("change", "reason"), [("reply", "no_match"), ("reasoning", "no_match"), ("tools", "tools_changed")]
)
def test_history_that_changed_opens_a_new_segment_and_is_answered(
    gateway: RunningGateway, session_id: str, change: str, reason: str
) -> None:
    """I6: nothing is refused; I3: the first turn stays recorded."""
    reply = ask(gateway, session_id, [QUESTION]).choices[0].message.model_dump(exclude_none=True)
    if change == "reply":
        reply["content"] = "edited"
    if change == "reasoning":
        reply["reasoning_content"] = "another thought"
    tools = [] if change == "tools" else TOOLS
    answer = ask(gateway, session_id, [QUESTION, reply, {"role": "user", "content": "quick"}], tools=tools)
    assert answer.choices[0].message.content
    turns = gateway.turns(session_id)
    assert turns[1]["attachment"]["segment_reason"] == reason
    assert turns[1]["attachment"]["parent_id"] is None
    assert len(turns[0]["output_token_ids"]) > 0


def test_context_overflow_is_told_as_agents_expect_it(gateway: RunningGateway, session_id: str) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        ask(gateway, session_id, [QUESTION], max_tokens=100_000)
    assert caught.value.code == "context_length_exceeded"
    assert gateway.turns(session_id) == []


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"{", "JSON"),
        (b"[]", "object"),
        (b"\xff", "UTF-8"),
        (b'{"messages": []}', "messages"),
        (b'{"messages": [{"content": "x"}]}', "messages[0].role"),
        (b'{"messages": [{"role": "user", "content": 5}]}', "messages[0].content"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": "hot"}', "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', "max_tokens: expected at least 1"),
        (
            b'{"messages": [{"role": "user", "content": "x"}], "stop_token_ids": [99999]}',
            "stop_token_ids: token id 99999 is out of vocabulary",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "logit_bias": {"99999": 1}}', "logit_bias: token id 99999"),
        (b'{"messages": [{"role": "user", "content": "x", "n": ' + b"7" * 5000 + b"}]}", "more than 4300 digits"),
        (b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "deep"),
    ],
)
def test_malformed_request_is_a_400_that_names_the_field(
    gateway: RunningGateway, session_id: str, body: bytes, named: str
) -> None:
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}/v1/chat/completions", content=body, timeout=30)
    assert reply.status_code == 400
    assert named in reply.json()["error"]["message"]


def test_session_comes_from_header_key_or_nowhere(gateway: RunningGateway, session_id: str) -> None:
    body = {"messages": [{"role": "user", "content": "quick"}]}
    made = gateway.post("/sessions", {"session_id": f"{session_id}/ü"})
    url = f"{gateway.url}/v1/chat/completions"
    by_key = httpx.post(url, json=body, headers={"Authorization": f"Bearer {made['api_key']}"})
    by_header = httpx.post(url, json=body, headers={"X-Session-ID": by_key.headers["x-session-id"]})
    by_path = httpx.post(f"{made['base_url']}/chat/completions", json=body)
    on_the_spot = httpx.post(url, json=body)
    own = gateway.get(f"/sessions/{by_key.headers['x-session-id']}")
    assert own["session_id"] == f"{session_id}/ü"
    assert own["reports"]["turns"] == 3
    assert by_key.headers["x-session-id"] == by_header.headers["x-session-id"] == by_path.headers["x-session-id"]
    other = gateway.get(f"/sessions/{on_the_spot.headers['x-session-id']}")
    assert (other["origin"], other["complete"]) == ("on_the_spot", True)


def test_session_overrides_win_over_the_request(gateway: RunningGateway, session_id: str) -> None:
    gateway.post("/sessions", {"session_id": session_id, "sampling": {"temperature": 0.5, "max_tokens": 2}})
    reply = ask(gateway, session_id, [QUESTION], temperature=2.0, max_completion_tokens=50)
    assert reply.choices[0].finish_reason == "length"
    [turn] = gateway.turns(session_id)
    assert (turn["sampling"]["temperature"], turn["sampling"]["max_new_tokens"]) == (0.5, 2)
    assert len(turn["output_token_ids"]) == 2


def test_turn_cut_by_length_goes_on(gateway: RunningGateway, session_id: str) -> None:
    """Design 4: a cut turn is closed with masked tokens and extended."""
    cut = ask(gateway, session_id, [QUESTION], max_tokens=3).choices[0].message.model_dump(exclude_none=True)
    ask(gateway, session_id, [QUESTION, cut, {"role": "user", "content": "quick"}])
    turns = gateway.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert turns[1]["meta"]["certified_by"] == "close"


def test_stop_string_ends_the_visible_text_and_the_record_keeps_the_tokens(
    gateway: RunningGateway, session_id: str
) -> None:
    reply = ask(gateway, session_id, [{"role": "user", "content": "quick"}], stop=["nothing like it"])
    assert reply.choices[0].message.content == "the quick answer"
    [turn] = gateway.turns(session_id)
    assert turn["sampling"]["stop"] == ["nothing like it"]


def test_client_that_goes_away_leaves_an_undelivered_turn(gateway: RunningGateway, session_id: str) -> None:
    """I3: what was sampled is kept although nobody received it."""
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    body = {"messages": [{"role": "user", "content": "count slowly"}], "stream": True}
    with httpx.stream("POST", url, json=body, timeout=30) as reply:
        next(reply.iter_lines())
    turns = until(lambda: gateway.turns(session_id))
    assert len(turns) == 1
    assert turns[0]["delivered_at"] is None
    assert len(turns[0]["output_token_ids"]) > 0


def test_finished_session_takes_no_turn_and_its_rollout_is_in_the_feed(
    gateway: RunningGateway, session_id: str
) -> None:
    """I3: tokens sampled equal tokens to be trained."""
    gateway.post("/sessions", {"session_id": session_id, "labels": {"test": session_id}})
    message = ask(gateway, session_id, [QUESTION]).choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "24"}
    ask(gateway, session_id, [QUESTION, message, result])
    finish = gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    assert gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0}) == finish
    with pytest.raises(openai.ConflictError):
        ask(gateway, session_id, [QUESTION])
    lease = gateway.post("/feed/leases", {"consumer": "test", "limit": 1, "labels": {"test": session_id}})
    [leased] = lease["rollouts"]
    body = httpx.get(f"{gateway.url}/feed/rollouts/{session_id}", params={"snapshot": leased["snapshot"]})
    rollout = decode_rollout(body.content)
    [segment] = rollout.segments
    sampled = sum(len(turn["output_token_ids"]) for turn in gateway.turns(session_id))
    assert rollout.num_sampled_tokens == sampled
    assert segment.routed_valid.all()
    assert rollout.finish.reward == 1.0


def test_creating_a_session_twice_is_safe_and_another_one_under_its_id_is_a_conflict(
    gateway: RunningGateway, session_id: str
) -> None:
    first = gateway.post("/sessions", {"session_id": session_id, "group": "g", "group_size": 4})
    assert gateway.post("/sessions", {"session_id": session_id, "group": "g", "group_size": 4}) == first
    other = httpx.post(f"{gateway.url}/sessions", json={"session_id": session_id, "group": "h"})
    assert other.status_code == 409
    assert gateway.get(f"/sessions/{session_id}")["group_size"] == 4


def test_other_paths_say_so_where_the_engine_takes_turns_only(gateway: RunningGateway, session_id: str) -> None:
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}/v1/embeddings", json={})
    assert reply.status_code == 404
    assert "takes turns only" in reply.json()["error"]["message"]
    assert gateway.client(session_id).models.list().data[0].id == "tiny"


def test_metrics_count_turns_tokens_and_feed(gateway: RunningGateway, session_id: str) -> None:
    ask(gateway, session_id, [{"role": "user", "content": "quick"}])
    text = httpx.get(f"{gateway.url}/metrics").text
    for name in ("verbatim_turns_total", "verbatim_output_tokens_total", "verbatim_feed_unleased", "verbatim_engines"):
        assert name in text
    assert "date" in httpx.get(f"{gateway.url}/health").headers
    assert len(httpx.get(f"{gateway.url}/health").headers.get_list("server")) == 1
