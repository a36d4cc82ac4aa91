"""Calls under ids that nobody made: what the record of such a session lacks is marked wherever a rollout is shown."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.client import SyncGatewayClient
from tests.integration.gateway.conftest import RunningGateway, StartGateway

SYSTEM = {"role": "system", "content": "be brief"}
QUICK = {"role": "user", "content": "quick"}
PAST = {"role": "assistant", "content": "what another gateway sampled"}
HISTORY = [SYSTEM, QUICK, PAST, QUICK, PAST, QUICK]
GAPS = [2, 4]


def ask(gateway: RunningGateway, session_id: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    reply = httpx.post(f"{gateway.url}/sessions/{session_id}{path}", json=body, timeout=30)
    assert reply.status_code == 200, reply.text
    return dict(reply.json())


def facts(gateway: RunningGateway, session_id: str) -> tuple[str, bool, list[int]]:
    session = gateway.get(f"/sessions/{session_id}")
    return session["origin"], session["complete"], session["gaps"]


def test_a_first_request_with_replies_that_nobody_here_sampled_marks_its_session(
    gateway: RunningGateway, session_id: str
) -> None:
    ask(gateway, session_id, "/v1/chat/completions", {"messages": HISTORY})
    assert facts(gateway, session_id) == ("recreated", False, GAPS)
    [listed] = [s for s in gateway.get("/sessions?limit=1000")["sessions"] if s["session_id"] == session_id]
    assert (listed["origin"], listed["complete"], listed["gaps"]) == ("recreated", False, GAPS)


@pytest.mark.parametrize(
    ("path", "body", "gaps"),
    [
        ("/v1/messages", {"max_tokens": 9, "system": "s", "messages": [QUICK, PAST, QUICK]}, [2]),
        ("/v1/responses", {"input": [QUICK, PAST, QUICK, PAST, QUICK]}, [1, 3]),
        ("/v1/chat/completions", {"messages": [QUICK]}, []),
        ("/v1/completions", {"prompt": "quick"}, []),
    ],
    ids=["messages", "responses", "chat", "completions"],
)
def test_positions_are_those_of_the_conversation_in_every_dialect(
    gateway: RunningGateway, session_id: str, path: str, body: dict[str, Any], gaps: list[int]
) -> None:
    ask(gateway, session_id, path, body)
    assert facts(gateway, session_id) == ("recreated" if gaps else "on_the_spot", not gaps, gaps)


def test_what_a_made_session_or_a_later_request_brings_along_is_no_gap(
    gateway: RunningGateway, session_id: str
) -> None:
    """Examples in a prompt are the harness's own; a rewritten history opens a segment, and is not lost."""
    gateway.post("/sessions", {"session_id": session_id})
    ask(gateway, session_id, "/v1/chat/completions", {"messages": HISTORY})
    assert facts(gateway, session_id) == ("created", True, [])
    ask(gateway, f"{session_id}-other", "/v1/chat/completions", {"messages": [QUICK]})
    ask(gateway, f"{session_id}-other", "/v1/chat/completions", {"messages": HISTORY})
    assert facts(gateway, f"{session_id}-other") == ("on_the_spot", True, [])


@pytest.mark.parametrize("labels", [{}, {"task": "made"}], ids=["as_on_the_spot", "otherwise"])
def test_a_call_that_might_be_a_first_one_finds_a_session_that_is_not_in_memory(
    start_gateway: StartGateway, tmp_path: Path, labels: dict[str, str]
) -> None:
    """Nobody looks before such a session is made; the one that is there keeps its record and its turns."""
    first = start_gateway(tmp_path)
    first.post("/sessions", {"session_id": "made", "labels": labels})
    for name in ("made", "met"):
        ask(first, name, "/v1/chat/completions", {"messages": [QUICK]})
    before = [first.get(f"/sessions/{name}") for name in ("made", "met")]
    first.stop()
    second = start_gateway(tmp_path)
    for name in ("made", "met"):
        ask(second, name, "/v1/chat/completions", {"messages": [SYSTEM, QUICK]})
    after = [second.get(f"/sessions/{name}") for name in ("made", "met")]
    assert [second.get(f"/sessions/{name}/report")["num_turns"] for name in ("made", "met")] == [2, 2]
    assert [(one["origin"], one["labels"]) for one in after] == [("created", labels), ("on_the_spot", {})]
    assert [one["created_at"] for one in after] == [one["created_at"] for one in before]
    assert second.get("/sessions?limit=9")["sessions"][2:] == []


def verbatim(*arguments: str) -> str:
    program = "import sys; from gateway.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def feed(gateway: RunningGateway, *arguments: str) -> list[dict[str, Any]]:
    output = verbatim("feed", *arguments, "--url", gateway.url, "--json")
    return [json.loads(line) for line in output.splitlines()]


def test_a_session_whose_ledger_is_gone_goes_on_and_says_so_to_trainers_and_operators(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """Also after a restart; its new turns are whole, and what was sampled before is nobody's loss."""
    first = start_gateway(tmp_path / "lost")
    reply = ask(first, "agent", "/v1/chat/completions", {"messages": [QUICK]})
    past = [QUICK, reply["choices"][0]["message"], QUICK]
    first.stop()
    second = start_gateway(tmp_path / "new")
    ask(second, "agent", "/v1/chat/completions", {"messages": past})
    ask(second, "whole", "/v1/chat/completions", {"messages": [QUICK]})
    second.stop(9)
    third = start_gateway(tmp_path / "new")
    for name in ("agent", "whole"):
        third.post(f"/sessions/{name}/finish", {"reward": 1.0})
    assert facts(third, "agent") == ("recreated", False, [1])
    report = third.get("/sessions/agent/report")
    assert (report["origin"], report["complete"], report["gaps"]) == ("recreated", False, [1])
    assert {row["session_id"]: (row["origin"], row["complete"]) for row in feed(third, "rollouts")} == {
        "agent": ("recreated", False),
        "whole": ("on_the_spot", True),
    }
    with SyncGatewayClient(third.url, retry_seconds=0) as client:
        lease = client.lease(consumer="c", limit=9)
        assert lease is not None
        assert {each.session_id: each.complete for each in lease.rollouts} == {"agent": False, "whole": True}
        rollout = client.rollout("agent", lease.rollouts[0].snapshot)
    assert (rollout.session.complete, rollout.session.gaps) == (False, (1,))
    assert rollout.num_trained_tokens == rollout.num_sampled_tokens > 0
    [held] = feed(third, "leases")
    assert (held["rollouts"], held["incomplete"]) == (2, 1)
    feed(third, "export", "--to", str(tmp_path / "exported"))
    index = json.loads((tmp_path / "exported/index.json").read_text())
    assert {e["session_id"]: (e["complete"], e["gaps"]) for e in index["rollouts"]} == {
        "agent": (False, [1]),
        "whole": (True, []),
    }
    third.stop()
    page = verbatim("sessions", "agent", "--data", str(tmp_path / "new"), "--report")
    assert "no (recreated; not sampled here: messages 1 of" in page
