"""What operators see and do of the store over HTTP, and a gateway that meets a damaged turn."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import httpx

from tests.integration.gateway.conftest import RunningGateway, StartGateway
from tests.waiting import until

QUICK = {"role": "user", "content": "quick"}


def ask(gateway: RunningGateway, session_id: str) -> httpx.Response:
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    return httpx.post(url, json={"messages": [QUICK]}, timeout=30)


def test_a_sweep_says_what_it_would_drop_and_drops_it(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path)
    for name in ("one", "two"):
        assert ask(gateway, name).status_code == 200
    gateway.post("/sessions/one/finish", {"reward": 1.0})
    body = {"older_than_seconds": 0, "acknowledged_only": False}
    dry = gateway.post("/admin/storage/sweep", {**body, "dry_run": True})
    assert [each["session_id"] for each in dry["dropped"]] == ["one"]
    assert len(gateway.turns("one")) == 1
    assert gateway.post("/admin/storage/sweep", {"older_than_seconds": 0})["num_dropped"] == 0, "nobody has read it"
    done = gateway.post("/admin/storage/sweep", body)
    assert (done["num_dropped"], done["dropped"][0]["reason"]) == (1, "age")
    assert gateway.turns("one") == []
    assert len(gateway.turns("two")) == 1
    shown = gateway.get("/admin/storage")
    assert shown["space"]["state"] == "open"
    assert shown["last_sweep"]["num_dropped"] == 1
    assert shown["usage"]["rows_bytes"] > 0


def test_what_is_wrong_in_a_sweep_is_named(gateway: RunningGateway) -> None:
    reply = httpx.post(f"{gateway.url}/admin/storage/sweep", json={"keep_bytes": -1}, timeout=10)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "keep_bytes")


def test_old_rollouts_are_dropped_by_themselves(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, "--set", "storage.keep_seconds=0.5", "--set", "storage.sweep_seconds=0.5")
    assert ask(gateway, "s").status_code == 200
    gateway.post("/sessions/s/finish", {"reward": 1.0})
    until(lambda: not gateway.turns("s"))
    assert gateway.get("/sessions/s")["session_id"] == "s"


def test_a_damaged_turn_is_a_500_that_names_it_and_other_sessions_go_on(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    first = start_gateway(tmp_path)
    for name in ("damaged", "sound"):
        assert ask(first, name).status_code == 200
    [turn] = first.turns("damaged")
    first.stop()
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    with connection:
        connection.execute("UPDATE turns SET output_token_ids = zeroblob(4) WHERE session_id = 'damaged'")
    connection.close()
    second = start_gateway(tmp_path)
    reply = ask(second, "damaged")
    assert (reply.status_code, reply.json()["error"]["code"]) == (500, "ledger_corrupt")
    assert f"session damaged turn {turn['turn_id']}" in reply.json()["error"]["message"]
    assert ask(second, "sound").status_code == 200
    assert ask(second, "another").status_code == 200
