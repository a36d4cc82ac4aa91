"""Limits and the audit over HTTP: what agents are told, what retries cost, and what is written of operators."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest

from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.waiting import until

QUICK = {"messages": [{"role": "user", "content": "quick"}]}
SLOW = {"messages": [{"role": "user", "content": "count very slowly"}]}
KEY = "operator-secret"
OPERATOR = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def narrow(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """Two turns at once in a session."""
    return start_gateway(tmp_path_factory.mktemp("narrow"), "--set", "limits.concurrent_per_session=2")


def chat(gateway: RunningGateway, session: str, body: dict[str, Any], *, timeout: float = 30) -> httpx.Response:
    return httpx.post(f"{gateway.url}/sessions/{session}/v1/chat/completions", json=body, timeout=timeout)


def running(gateway: RunningGateway, num: int) -> None:
    until(lambda: gateway.get("/health")["turns_running"] == num)


def test_reading_what_is_recorded_counts_towards_the_rate(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A reply or an image may be large: reading one without pause would hold the others up."""
    gateway = start_gateway(tmp_path, "--set", "limits.requests_per_second_per_session=0.1")
    response_id = gateway.post("/sessions/s/v1/responses", {"input": "quick"})["id"]
    for path in (f"v1/responses/{response_id}", "blobs/" + "0" * 64):
        read = httpx.get(f"{gateway.url}/sessions/s/{path}")
        assert (read.status_code, read.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert int(read.headers["retry-after"]) >= 1
    gateway.post("/sessions", {"session_id": "other"})
    assert httpx.get(f"{gateway.url}/sessions/other/blobs/{'0' * 64}").status_code == 404


def test_more_turns_than_may_run_are_429_with_a_time_in_each_dialects_words(
    narrow: RunningGateway, session_id: str
) -> None:
    with ThreadPoolExecutor() as threads:
        both = threads.submit(chat, narrow, session_id, SLOW | {"n": 2})
        running(narrow, 2)
        refused = chat(narrow, session_id, QUICK)
        other = chat(narrow, f"{session_id}-other", QUICK)
        anthropic = httpx.post(f"{narrow.url}/sessions/{session_id}/v1/messages", json=QUICK | {"max_tokens": 9})
        assert both.result().status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "rate_limit_error"
    assert "concurrent_per_session" in refused.json()["error"]["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 30
    assert (anthropic.status_code, anthropic.json()["error"]["type"]) == (429, "rate_limit_error")
    assert int(anthropic.headers["retry-after"]) >= 1
    assert other.status_code == 200
    assert chat(narrow, session_id, QUICK).status_code == 200
    metrics = httpx.get(f"{narrow.url}/metrics").text
    assert 'verbatim_refused_calls_total{reason="concurrent_per_session"} 2.0' in metrics


def test_more_choices_than_may_ever_run_are_a_400_that_names_them(narrow: RunningGateway, session_id: str) -> None:
    refused = chat(narrow, session_id, QUICK | {"n": 3})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "n")
    assert narrow.turns(session_id) == []


def test_a_retry_that_joins_costs_nothing(narrow: RunningGateway, session_id: str) -> None:
    """The turn of a client that has gone holds its place, and its own retry needs no other."""
    with pytest.raises(httpx.ReadTimeout):
        chat(narrow, session_id, SLOW | {"n": 2}, timeout=0.5)
    time.sleep(0.1)
    assert chat(narrow, session_id, QUICK).status_code == 429
    assert chat(narrow, session_id, SLOW | {"n": 2}).status_code == 200
    assert len(narrow.turns(session_id)) == 2


def test_an_unmodified_client_waits_and_is_served(narrow: RunningGateway, session_id: str) -> None:
    with (
        openai.OpenAI(base_url=f"{narrow.url}/sessions/{session_id}/v1", api_key="unused", max_retries=8) as client,
        ThreadPoolExecutor(6) as threads,
    ):
        asks = [
            threads.submit(
                client.chat.completions.create, model="m", messages=[{"role": "user", "content": f"quick {i}"}]
            )
            for i in range(6)
        ]
        assert all(ask.result().choices for ask in asks)
    assert len(narrow.turns(session_id)) == 6


def test_rates_hold_for_turns_and_for_what_samples_nothing(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, "--set", "limits.requests_per_second_per_session=0.5")
    assert chat(gateway, "s", QUICK).status_code == 200
    refused = [
        chat(gateway, "s", QUICK), httpx.post(f"{gateway.url}/sessions/s/tokenize", json={"prompt": "a"}),
    ]  # fmt: skip
    for reply in refused:
        assert (reply.status_code, reply.headers["retry-after"]) == (429, "2")
    assert chat(gateway, "t", QUICK).status_code == 200
    time.sleep(2)
    assert chat(gateway, "s", QUICK).status_code == 200


def test_operators_calls_and_attempts_at_them_are_written_down(start_gateway: StartGateway, tmp_path: Path) -> None:
    """No key, no text of a task or a prompt, and one line each whatever is in it."""
    gateway = start_gateway(tmp_path, environment={"VERBATIM_OPERATOR_KEY": KEY})
    name = "s\n\"}{'ü"
    path = f"/sessions/{quote(name, safe='')}"
    wanted = {"session_id": name, "task": "the-task-text"}
    made = gateway.post("/sessions", wanted, headers=OPERATOR | {"X-Request-ID": 'a"b'})
    agent = {"Authorization": f"Bearer {made['api_key']}"}
    gateway.post(f"{path}/v1/chat/completions", QUICK, headers=agent)
    gateway.post(f"{path}/v1/chat/completions", QUICK, headers=OPERATOR)
    gateway.post(f"{path}/finish", {"reward": 0.5}, headers=OPERATOR)
    gateway.post("/admin/policy", {"policy_version": 3, "weight_version": "w"}, headers=OPERATOR)
    assert httpx.delete(f"{gateway.url}{path}?x=%0a1", headers=agent).status_code == 403
    assert httpx.get(f"{gateway.url}/admin/engines").status_code == 401
    gateway.stop()
    text = (tmp_path / "audit.jsonl").read_text()
    for secret in (KEY, made["api_key"], "the-task-text", "quick"):
        assert secret not in text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [(line["method"], line["status"]) for line in lines] == [
        ("POST", 201), ("POST", 200), ("POST", 200), ("POST", 200), ("DELETE", 403), ("GET", 401),
    ]  # fmt: skip
    create, _, finish, policy, delete, engines = lines
    assert (create["request_id"], create["changed"]) == ('a"b', {"session_id": name, "is_new": True})
    assert (finish["changed"]["reward"], finish["path"]) == (0.5, f"{path}/finish")
    assert policy["changed"] == {"policy_version": 3, "weight_version": "w"}
    assert (delete["changed"], delete["query"]) == (None, "x=%0a1")
    assert len({line["key"] for line in lines[:4]}) == 1
    assert delete["key"] not in (None, create["key"])
    assert engines["key"] is None
    assert all(line["peer"].startswith("127.0.0.1:") and line["time"] for line in lines)
    assert (tmp_path / "audit.jsonl").stat().st_mode & 0o777 == 0o600


def test_an_audit_that_cannot_be_written_stops_nothing(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, "--set", "audit=/dev/full")
    gateway.post("/sessions", {"session_id": "s"})
    assert chat(gateway, "s", QUICK).status_code == 200
    until(lambda: 'verbatim_audit_lines_total{state="failed"}' in httpx.get(f"{gateway.url}/metrics").text)
    assert gateway.stop() == 0
