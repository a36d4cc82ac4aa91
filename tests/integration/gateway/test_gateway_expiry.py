"""Sessions past their time to live end as abandoned rollouts; nobody who uses one, or may come back, is cut off."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.contracts.records import SessionOrigin
from gateway.ledger.sqlite import SqliteLedger
from gateway.sessions.expiry import SessionExpiry
from gateway.sessions.registry import SessionRegistry, new_session
from gateway.sessions.turns import TurnSettings
from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.waiting import until

QUICK = {"messages": [{"role": "user", "content": "quick"}]}
GRACE_SECONDS = 4.0
TTL_SECONDS = 1.5  # a slow machine makes a session and asks within it
EAGER = ("--set", "expiry_sweep_seconds=0.05")


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("script") / "rules.json"
    rules: list[dict[str, Any]] = [
        {"after": "\0", "reply": "hello"},
        {"after": "slowly", "reply": "one two three four five six", "delay_seconds": 0.12},
        {"after": "broken", "reply": "one two", "delay_seconds": 0.02},
        {"after": "quick", "reply": "the quick answer", "chunk_size": 100},
    ]
    file.write_text(json.dumps(rules))
    return f"scripted={file}"


@pytest.fixture(scope="module")
def eager(start_gateway: StartGateway, script: str, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    grace = ("--set", f"turns.disconnect_grace_seconds={GRACE_SECONDS}")
    gateway = start_gateway(tmp_path_factory.mktemp("ledger"), *EAGER, *grace, engine=script)
    make(gateway, "first", ttl_seconds=0.1)
    until(lambda: finish_of(gateway, "first") is not None)  # its sweeps begin after a grace
    return gateway


def make(gateway: RunningGateway, session_id: str, **facts: Any) -> str:
    gateway.post("/sessions", {"session_id": session_id, **facts})
    return f"{gateway.url}/sessions/{session_id}/v1/chat/completions"


def finish_of(gateway: RunningGateway, session_id: str) -> Any:
    return gateway.get(f"/sessions/{session_id}")["finish"]


def test_an_idle_session_past_its_ttl_ends_as_abandoned_and_enters_the_feed(eager: RunningGateway) -> None:
    url = make(eager, "idle", ttl_seconds=TTL_SECONDS, labels={"run": "idle"})
    assert httpx.post(url, json=QUICK, timeout=30).status_code == 200
    until(lambda: finish_of(eager, "idle") is not None)
    finish = finish_of(eager, "idle")
    assert (finish["outcome"], finish["reward"]) == ("abandoned", None)
    assert finish["metadata"] == {"reason": "ttl", "ttl_seconds": TTL_SECONDS}
    late = httpx.post(url, json=QUICK, timeout=30)
    assert (late.status_code, late.json()["error"]["code"]) == (409, "session_finished")
    lease = eager.post("/feed/leases", {"consumer": "c", "limit": 1, "labels": {"run": "idle"}})
    assert [rollout["outcome"] for rollout in lease["rollouts"]] == ["abandoned"]
    assert len(eager.turns("idle")) == 1


def test_who_waits_for_a_rollout_is_told_at_once(eager: RunningGateway) -> None:
    make(eager, "awaited", ttl_seconds=0.5, labels={"run": "awaited"})
    wanted = {"consumer": "c", "limit": 1, "labels": {"run": "awaited"}, "wait_seconds": 20}
    assert eager.post("/feed/leases", wanted)["rollouts"][0]["session_id"] == "awaited"


def test_a_session_whose_turn_runs_is_not_ended_and_counts_from_its_reply(eager: RunningGateway) -> None:
    url = make(eager, "running", ttl_seconds=TTL_SECONDS)
    began = time.monotonic()
    reply = httpx.post(url, json={"messages": [{"role": "user", "content": "slowly"}]}, timeout=30)
    assert time.monotonic() - began > TTL_SECONDS + 0.3, "the reply came too soon for this test"
    assert reply.status_code == 200
    assert httpx.post(url, json=QUICK, timeout=30).status_code == 200
    until(lambda: finish_of(eager, "running") is not None)


def test_a_session_whose_client_was_lost_waits_for_it_for_the_grace(eager: RunningGateway) -> None:
    """The retry gets the reply that was sampled meanwhile, although the time to live was over long before."""
    url = make(eager, "lost", ttl_seconds=TTL_SECONDS)
    body = {"messages": [{"role": "user", "content": "broken"}], "stream": True}
    with httpx.stream("POST", url, json=body, timeout=30) as reply:
        assert reply.status_code == 200
        left = time.monotonic()
    until(lambda: len(eager.turns("lost")) == 1)
    time.sleep(max(0.0, left + GRACE_SECONDS - 1.0 - time.monotonic()))
    assert finish_of(eager, "lost") is None
    assert httpx.post(url, json=body, timeout=30).status_code == 200
    assert len(eager.turns("lost")) == 1
    until(lambda: finish_of(eager, "lost") is not None)


def test_a_client_that_reads_slowly_is_still_waited_for(eager: RunningGateway) -> None:
    url = make(eager, "slow", ttl_seconds=TTL_SECONDS)
    body = {"messages": [{"role": "user", "content": "slowly"}], "stream": True}
    with httpx.stream("POST", url, json=body, timeout=30) as reply:
        pieces = reply.iter_bytes()
        next(pieces)
        time.sleep(TTL_SECONDS + 0.3)
        assert finish_of(eager, "slow") is None
        assert b"[DONE]" in b"".join(pieces)


def test_a_session_without_a_ttl_or_with_0_never_ends_by_itself(eager: RunningGateway) -> None:
    make(eager, "for-ever", ttl_seconds=0)
    make(eager, "unlimited")
    make(eager, "probe", ttl_seconds=0.1)
    until(lambda: finish_of(eager, "probe") is not None)
    time.sleep(0.2)
    assert finish_of(eager, "for-ever") is finish_of(eager, "unlimited") is None


@pytest.mark.parametrize("ttl_seconds", [-1, -0.5, 1e9, "soon", True])
def test_a_ttl_that_is_none_is_refused_by_name(eager: RunningGateway, ttl_seconds: Any) -> None:
    reply = httpx.post(f"{eager.url}/sessions", json={"ttl_seconds": ttl_seconds})
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith("ttl_seconds: ")


def test_agents_that_come_back_after_a_restart_find_their_sessions_open(
    start_gateway: StartGateway, script: str, tmp_path: Path
) -> None:
    """A gateway that was down for longer than the time to live has lost all clients at its start and waits for them."""
    flags = (*EAGER, "--set", "turns.disconnect_grace_seconds=3.0")
    gateway = start_gateway(tmp_path, *flags, engine=script)
    make(gateway, "s", ttl_seconds=1.0)
    gateway.stop(9)
    time.sleep(1.0)
    gateway = start_gateway(tmp_path, *flags, engine=script)
    url = f"{gateway.url}/sessions/s/v1/chat/completions"
    assert httpx.post(url, json=QUICK, timeout=30).status_code == 200
    until(lambda: finish_of(gateway, "s") is not None)


def test_two_gateways_on_one_ledger_end_the_same_sessions_without_error(
    start_gateway: StartGateway, script: str, postgres_dsn: str, tmp_path: Path
) -> None:
    flags = (
        *("--ledger", postgres_dsn, "--objects", (tmp_path / "objects").as_uri(), *EAGER),
        *("--set", "turns.disconnect_grace_seconds=0.1", "--set", "turns.timeout_seconds=1.0"),
    )
    gateways = [start_gateway(tmp_path / name, *flags, engine=script) for name in ("a", "b")]
    names = [f"s{i}" for i in range(12)]
    for i, name in enumerate(names):
        make(gateways[i % 2], name, ttl_seconds=0.5)
    until(lambda: all(finish_of(gateways[0], name) is not None for name in names))
    for name in names:
        first, second = (finish_of(gateway, name) for gateway in gateways)
        assert first == second
        assert first["outcome"] == "abandoned"
    for gateway in gateways:
        gateway.stop()
        assert gateway.process.stderr is not None
        assert "time to live" not in gateway.process.stderr.read()


def test_a_turn_and_the_end_of_its_session_never_meet(tmp_path: Path) -> None:
    """What is refused is refused from the moment the session begins to close, and the sweep gets past what it keeps."""

    async def script() -> None:
        ledger = SqliteLedger.open(tmp_path)
        try:
            registry = SessionRegistry(ledger)
            expiry = SessionExpiry(registry, ledger, TurnSettings(), sweep_seconds=1.0)
            for i in range(250):
                record = new_session(f"s{i:03}", key_hash="", origin=SessionOrigin.CREATED, ttl_seconds=1.0)
                session, _ = await registry.create(record)
                if i < 120:
                    session.hold(60.0)
            assert await expiry.sweep(time.time()) == 0
            assert await expiry.sweep(time.time() + 5.0) == 130
            assert not any(session.closing for session in registry.loaded)
            (await registry.get("s000")).held_until = 0.0
            others = [SessionExpiry(SessionRegistry(ledger), ledger, TurnSettings(), sweep_seconds=1.0) for _ in "ab"]
            ended = await asyncio.gather(*(each.sweep(time.time() + 5.0) for each in (expiry, *others)))
            assert ended[0] <= 1
            assert sum(ended) >= 120
            assert await ledger.sessions_past_ttl(time.time() + 5.0, limit=300) == []
        finally:
            await ledger.aclose()

    asyncio.run(script())
