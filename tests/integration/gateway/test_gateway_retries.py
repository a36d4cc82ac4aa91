"""Retries that need no header (design 4): joined, answered from the record, or gone on with; never sampled twice."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.waiting import until

SLOW = {"messages": [{"role": "user", "content": "count slowly"}], "return_token_ids": True}
VERY_SLOW = {"messages": [{"role": "user", "content": "count very slowly"}], "return_token_ids": True}
GRACELESS = ("--set", "turns.disconnect_grace_seconds=0.0")
QUICK = {"role": "user", "content": "quick"}
WHOLE = "one two three four five six"


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Slow enough to be left in time, and no slower."""
    file = tmp_path_factory.mktemp("script") / "rules.json"
    rules: list[dict[str, Any]] = [
        {"after": "\0", "reply": "hello"},
        {"after": "count slowly", "reply": WHOLE, "delay_seconds": 0.01},
        {"after": "count very slowly", "reply": WHOLE, "delay_seconds": 0.1},
        {"after": "quick", "reply": "the quick answer", "chunk_size": 100},
    ]
    file.write_text(json.dumps(rules))
    return f"scripted={file}"


@pytest.fixture(scope="module")
def gateway(start_gateway: StartGateway, script: str, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    return start_gateway(tmp_path_factory.mktemp("ledger"), engine=script)


def url_of(gateway: RunningGateway, session_id: str, endpoint: str = "/v1/chat/completions") -> str:
    return f"{gateway.url}/sessions/{session_id}{endpoint}"


def leave_after(url: str, body: dict[str, Any], *, tokens: int, headers: dict[str, str] | None = None) -> None:
    """Begin a streamed call and close its connection after so many chunks with tokens."""
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=30) as reply:
        assert reply.status_code == 200
        for line in reply.iter_lines():
            tokens -= '"token_ids"' in line
            if tokens <= 0:
                return


def ask(url: str, body: dict[str, Any], **headers: str) -> dict[str, Any]:
    reply = httpx.post(url, json=body, headers=headers, timeout=30)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def streamed(url: str, body: dict[str, Any], **headers: str) -> tuple[str, list[int]]:
    """Text and token ids of a streamed reply, joined."""
    text, token_ids = "", list[int]()
    with httpx.stream("POST", url, json=body | {"stream": True}, headers=headers, timeout=30) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    for chunk in map(json.loads, lines[:-1]):
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            token_ids += choice.get("token_ids", [])
    return text, token_ids


def idle(gateway: RunningGateway) -> Callable[[], bool]:
    return lambda: bool(gateway.get("/health")["turns_running"] == 0)


def test_retry_within_the_grace_joins_the_running_turn_from_its_first_token(
    gateway: RunningGateway, session_id: str
) -> None:
    """I3: one turn, sampled once, whichever connection its reply leaves by."""
    url = url_of(gateway, session_id)
    leave_after(url, VERY_SLOW, tokens=2)
    text, token_ids = streamed(url, VERY_SLOW)
    [turn] = gateway.turns(session_id)
    assert text == WHOLE
    assert token_ids == turn["output_token_ids"]
    assert turn["delivered_at"] is not None


def test_retry_of_a_whole_reply_joins_after_the_clients_own_timeout(gateway: RunningGateway, session_id: str) -> None:
    """What an SDK does whose timeout is shorter than a turn."""
    url = url_of(gateway, session_id)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json=VERY_SLOW, timeout=0.4)
    reply = ask(url, VERY_SLOW)
    [turn] = gateway.turns(session_id)
    assert reply["choices"][0]["message"]["content"] == WHOLE
    assert reply["choices"][0]["token_ids"] == turn["output_token_ids"]


def test_retry_after_the_turn_was_recorded_gets_that_very_reply(gateway: RunningGateway, session_id: str) -> None:
    """I4: what is on disk and was not delivered is not sampled again."""
    url = url_of(gateway, session_id)
    leave_after(url, SLOW, tokens=1)
    until(idle(gateway))
    [before] = gateway.turns(session_id)
    assert before["delivered_at"] is None
    text, token_ids = streamed(url, SLOW)
    [turn] = gateway.turns(session_id)
    assert (text, token_ids) == (WHOLE, turn["output_token_ids"])
    assert turn["turn_id"] == before["turn_id"]
    assert turn["delivered_at"] is not None


def test_retry_after_the_grace_goes_on_from_the_tokens_that_were_kept(
    start_gateway: StartGateway, script: str, tmp_path: Path
) -> None:
    """I1, I2, I3: no token is sampled twice, both parts train in one segment, every row is there."""
    gateway = start_gateway(tmp_path, *GRACELESS, engine=script)
    url = url_of(gateway, "s")
    leave_after(url, VERY_SLOW, tokens=2)
    until(idle(gateway))
    [cut] = gateway.turns("s")
    assert cut["finish"]["reason"] == "abort"
    text, token_ids = streamed(url, VERY_SLOW)
    cut, rest = gateway.turns("s")
    assert (text, token_ids) == (WHOLE, cut["output_token_ids"] + rest["output_token_ids"])
    assert rest["attachment"]["continues"] is True
    assert rest["attachment"]["parent_id"] == cut["turn_id"]
    assert rest["prompt_token_ids"] == []
    assert rest["reply"]["content"] == WHOLE
    [segment] = gateway.get("/sessions/s/segments?arrays=1")["segments"]
    assert [span["trained"] for span in segment["turns"]] == [True, True]
    assert segment["token_ids"] == cut["prompt_token_ids"] + token_ids
    assert sum(segment["loss_mask"]) == len(token_ids)
    assert all(segment["routed_valid"])


def test_conversation_goes_on_from_a_reply_that_was_sampled_in_parts(
    start_gateway: StartGateway, script: str, tmp_path: Path
) -> None:
    """I1: the next prompt extends all parts as sampled; a cut part alone is never matched, nor gone on with twice."""
    gateway = start_gateway(tmp_path, *GRACELESS, engine=script)
    url = url_of(gateway, "s")
    for _ in range(2):
        leave_after(url, VERY_SLOW, tokens=2)
        until(idle(gateway))
    first = streamed(url, VERY_SLOW)
    reply = {"role": "assistant", "content": first[0]}
    following = ask(url, {"messages": [*VERY_SLOW["messages"], reply, QUICK], "return_token_ids": True})
    cut, again, rest, last = gateway.turns("s")
    parents = [turn["attachment"]["parent_id"] for turn in (cut, again, rest, last)]
    assert parents == [None, cut["turn_id"], again["turn_id"], rest["turn_id"]]
    path = cut["prompt_token_ids"] + first[1]
    assert following["prompt_token_ids"][: len(path)] == path
    assert gateway.get("/sessions/s/report")["num_segments"] == 1


def test_same_request_after_a_delivered_reply_is_a_new_sample(gateway: RunningGateway, session_id: str) -> None:
    """Best-of-n agents ask again on purpose."""
    url = url_of(gateway, session_id)
    replies = [ask(url, SLOW), ask(url, SLOW), streamed(url, SLOW), streamed(url, SLOW)]
    assert len(replies) == len(gateway.turns(session_id)) == 4


async def test_identical_requests_whose_connections_live_are_samples_of_their_own(
    gateway: RunningGateway, session_id: str
) -> None:
    """I3 with siblings: eight asked at once are eight turns; eight that lost their connection are still eight."""
    url = url_of(gateway, session_id)
    async with httpx.AsyncClient(timeout=30) as client:
        await asyncio.gather(*(client.post(url, json=VERY_SLOW) for _ in range(8)))
        assert len(gateway.turns(session_id)) == 8
        lost = [client.post(url, json=VERY_SLOW, timeout=0.4) for _ in range(8)]
        results = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(result, httpx.ReadTimeout) for result in results)
        replies = await asyncio.gather(*(client.post(url, json=VERY_SLOW) for _ in range(8)))
    turns = gateway.turns(session_id)
    assert len(turns) == 16
    assert len({reply.json()["id"] for reply in replies}) == 8
    assert all(turn["delivered_at"] is not None for turn in turns)


def test_all_choices_of_a_call_are_joined(gateway: RunningGateway, session_id: str) -> None:
    """I3 with `n`: each choice of the retry is the same choice of the call before."""
    url = url_of(gateway, session_id)
    body = {**VERY_SLOW, "n": 3}
    leave_after(url, body, tokens=2)
    text, _ = streamed(url, body)
    turns = gateway.turns(session_id)
    assert len(turns) == 3
    assert sorted(turn["meta"]["call"]["choice"] for turn in turns) == [0, 1, 2]
    assert len(text) == 3 * len(WHOLE)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_retry_after_a_restart_of_the_gateway_gets_one_reply(
    number: signal.Signals, start_gateway: StartGateway, script: str, tmp_path: Path
) -> None:
    """Stopped, it goes on from what was kept; killed, nothing was, and the turn is sampled anew."""
    flags = ("--set", "drain_seconds=0")
    first_life = start_gateway(tmp_path, *flags, engine=script)
    with httpx.stream("POST", url_of(first_life, "s"), json=VERY_SLOW | {"stream": True}, timeout=30) as reply:
        lines = reply.iter_lines()
        seen = 0
        while seen < 3:
            seen += '"token_ids"' in next(lines)
        first_life.stop(number)
    second_life = start_gateway(tmp_path, *flags, engine=script)
    assert streamed(url_of(second_life, "s"), VERY_SLOW)[0] == WHOLE
    turns = second_life.turns("s")
    assert len(turns) == (2 if number is signal.SIGTERM else 1)
    assert [turn["attachment"]["continues"] for turn in turns] == [False, True][: len(turns)]


def test_committed_reply_survives_a_killed_gateway(start_gateway: StartGateway, script: str, tmp_path: Path) -> None:
    """I4: the retry after SIGKILL gets exactly what was recorded."""
    first_life = start_gateway(tmp_path, engine=script)
    leave_after(url_of(first_life, "s"), SLOW, tokens=1)
    until(idle(first_life))
    [before] = first_life.turns("s")
    first_life.stop(signal.SIGKILL)
    second_life = start_gateway(tmp_path, engine=script)
    assert streamed(url_of(second_life, "s"), SLOW) == (WHOLE, before["output_token_ids"])
    assert len(second_life.turns("s")) == 1


def test_idempotency_key_names_one_reply_for_ever(gateway: RunningGateway, session_id: str) -> None:
    """A delivered one too; another body under the same key is a mistake, another key another sample."""
    url = url_of(gateway, session_id)
    key = {"Idempotency-Key": f"key-{session_id}"}
    first, second = ask(url, SLOW, **key), ask(url, SLOW, **key)
    assert first["id"] == second["id"]
    assert first["choices"] == second["choices"]
    assert len(gateway.turns(session_id)) == 1
    other = httpx.post(url, json=VERY_SLOW, headers=key, timeout=30)
    assert other.status_code == 409
    assert "Idempotency-Key" in other.json()["error"]["message"]
    ask(url, SLOW, **{"Idempotency-Key": f"other-{session_id}"})
    assert len(gateway.turns(session_id)) == 2


async def test_retry_that_says_so_joins_while_the_first_connection_seems_alive(
    gateway: RunningGateway, session_id: str
) -> None:
    """Behind a proxy the gateway may not see that a client has gone; between several alike nobody can tell."""
    url = url_of(gateway, session_id)
    retry = {"x-stainless-retry-count": "1"}
    async with httpx.AsyncClient(timeout=30) as client:
        first = asyncio.create_task(client.post(url, json=VERY_SLOW))
        await asyncio.sleep(0.3)
        second = await client.post(url, json=VERY_SLOW, headers=retry)
        assert (await first).json()["id"] == second.json()["id"]
        assert len(gateway.turns(session_id)) == 1
        siblings = [asyncio.create_task(client.post(url, json=VERY_SLOW)) for _ in range(2)]
        await asyncio.sleep(0.3)
        await client.post(url, json=VERY_SLOW, headers=retry)
        await asyncio.gather(*siblings)
    assert len(gateway.turns(session_id)) == 4


def test_anthropics_sdk_joins_its_own_retry(gateway: RunningGateway, session_id: str) -> None:
    """The SDK's own retry after its timeout, unmodified."""
    client = anthropic.Anthropic(
        base_url=f"{gateway.url}/sessions/{session_id}", api_key="unused", timeout=0.5, max_retries=8
    )
    message = client.messages.create(
        model="m", max_tokens=100, messages=[{"role": "user", "content": "count very slowly"}]
    )
    assert message.content[0].text == WHOLE  # type: ignore[union-attr]
    assert len(gateway.turns(session_id)) == 1


def test_response_of_two_parts_is_read_again_whole(start_gateway: StartGateway, script: str, tmp_path: Path) -> None:
    """`GET /v1/responses/{id}` of a reply that went on."""
    gateway = start_gateway(tmp_path, *GRACELESS, engine=script)
    url = url_of(gateway, "s", "/v1/responses")
    body = {"input": "count very slowly"}
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=30) as reply:
        for line in reply.iter_lines():
            if "output_text.delta" in line:
                break
    until(idle(gateway))
    with httpx.stream("POST", url, json=body | {"stream": True}, timeout=30) as reply:
        last = [line for line in reply.iter_lines() if line.startswith("data: ")][-1]
    response = json.loads(last.removeprefix("data: "))["response"]
    again = gateway.get(f"/sessions/s/v1/responses/{response['id']}")
    assert again["output"][0]["content"][0]["text"] == WHOLE
    assert again["usage"] == response["usage"]
    assert again["usage"]["output_tokens"] == sum(turn["num_output_tokens"] for turn in gateway.turns("s"))
