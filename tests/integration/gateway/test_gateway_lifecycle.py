"""Starting, stopping, dying and being misconfigured: the gateway as an operator meets it."""

from __future__ import annotations

import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import TOOLS, StartGateway
from tests.integration.gateway.field_fuzz import serving_echo

QUESTION = {"role": "user", "content": "What is 48/2?"}
SLOW = {"role": "user", "content": "count slowly"}
VERY_SLOW = {"role": "user", "content": "count very slowly"}
KEY = "operator-secret"
CHAT = "/sessions/s/v1/chat/completions"
DRAIN_SECONDS = 30


def test_killed_gateway_continues_the_session_token_for_token(start_gateway: StartGateway, tmp_path: Path) -> None:
    """I4 and I1: a reply that was seen is on disk; the next prompt extends it after SIGKILL."""
    first_life = start_gateway(tmp_path)
    reply = first_life.client("s").chat.completions.create(
        model="m", messages=[QUESTION], tools=TOOLS, extra_body={"return_token_ids": True}
    )
    first_life.stop(signal.SIGKILL)
    second_life = start_gateway(tmp_path)
    message = reply.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "24"}
    following = second_life.client("s").chat.completions.create(
        model="m", messages=[QUESTION, message, result], tools=TOOLS, extra_body={"return_token_ids": True}
    )
    recorded = reply.prompt_token_ids + reply.choices[0].token_ids
    assert following.prompt_token_ids[: len(recorded)] == recorded
    turns = second_life.turns("s")
    assert [turn["index"] for turn in turns] == [0, 1]
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]


def test_sigterm_drains_the_running_stream_and_exits_with_0(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path)
    seen: list[Any] = []

    def stream() -> None:
        seen.extend(gateway.client("s").chat.completions.create(model="m", messages=[SLOW], stream=True))

    thread = threading.Thread(target=stream)
    thread.start()
    while gateway.get("/health")["turns_running"] == 0:
        time.sleep(0.01)
    assert gateway.stop(signal.SIGTERM) == 0
    assert not (tmp_path / "control.sock").exists()  # nothing is left that a copy of the folder would stumble over
    thread.join(20)
    assert seen[-1].choices[0].finish_reason == "stop"


def test_turn_that_outlives_the_drain_is_recorded_as_partial(start_gateway: StartGateway, tmp_path: Path) -> None:
    """I3: what was sampled before the stop is kept."""
    gateway = start_gateway(tmp_path, "--set", "drain_seconds=0", "--set", "turns.disconnect_grace_seconds=0.0")
    url = f"{gateway.url}/sessions/s/v1/chat/completions"
    with httpx.stream("POST", url, json={"messages": [VERY_SLOW], "stream": True}, timeout=30) as reply:
        next(reply.iter_lines())
        assert gateway.stop(signal.SIGTERM) == 0
    [turn] = start_gateway(tmp_path).turns("s")
    assert turn["finish"]["reason"] == "abort"
    assert turn["delivered_at"] is None
    assert 0 < len(turn["output_token_ids"]) < 20


def test_a_reply_whose_gateway_died_with_its_last_byte_is_trained(start_gateway: StartGateway, tmp_path: Path) -> None:
    """I3: nobody asks again for what it has read, so at the end of the session it counts as delivered."""
    first_life = start_gateway(tmp_path)
    read = first_life.client("read").chat.completions.create(model="m", messages=[QUESTION], tools=TOOLS)
    assert read.choices[0].finish_reason == "tool_calls"
    url = f"{first_life.url}/sessions/left/v1/chat/completions"
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(url, json={"messages": [SLOW]}, timeout=0.2)
    while first_life.get("/health")["turns_running"]:
        time.sleep(0.01)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:  # until what became of both replies is on disk
        while ledger.execute(
            "SELECT COUNT(*) FROM turns WHERE delivered_at IS NOT NULL OR lost_at IS NOT NULL"
        ).fetchone() != (2,):
            time.sleep(0.01)
    ledger.close()
    first_life.stop(signal.SIGKILL)
    with sqlite3.connect(tmp_path / "ledger.sqlite") as ledger:  # as if the kill had come before the note
        assert ledger.execute("UPDATE turns SET delivered_at = NULL WHERE session_id = 'read'").rowcount == 1
    ledger.close()
    second_life = start_gateway(tmp_path)
    assert second_life.turns("read")[0]["delivered_at"] is None
    for session_id, trained in (("read", True), ("left", False)):
        second_life.post(f"/sessions/{session_id}/finish", {"reward": 1.0})
        [turn] = second_life.turns(session_id)
        assert turn["finish"]["reason"] == "stop"
        assert (turn["delivered_at"] is not None) == trained
        picked = second_life.get(f"/sessions/{session_id}/segments")["pick"]
        assert (picked["num_trained_tokens"] == len(turn["output_token_ids"])) == trained


@pytest.mark.parametrize("mode", ["abort", "drain"])
def test_a_stop_during_a_pause_tells_the_turns_that_it_holds_to_come_again(
    start_gateway: StartGateway, tmp_path: Path, mode: str
) -> None:
    """Nobody could end the pause any more; a client's plain retry is answered by the next process."""
    port = free_port()
    gateway = start_gateway(tmp_path, port=port)
    gateway.post("/admin/generation/pause", {"mode": mode})
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(httpx.post, gateway.url + CHAT, json={"messages": [QUESTION]}, timeout=30)
        while gateway.get("/health")["turns_running"] == 0:
            time.sleep(0.01)
        started = time.monotonic()
        assert gateway.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < DRAIN_SECONDS
        assert held.result().status_code == 503
        assert held.result().headers["retry-after"]
    again = httpx.post(start_gateway(tmp_path, port=port).url + CHAT, json={"messages": [QUESTION]}, timeout=30)
    assert again.status_code == 200


def test_a_gateway_starts_while_its_engine_is_away_and_uses_it_when_it_is_there(
    start_gateway: StartGateway, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    gateway = start_gateway(tmp_path, engine=f"sglang=http://127.0.0.1:{port}")
    assert httpx.get(f"{gateway.url}/ready").status_code == 503
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(httpx.post, gateway.url + CHAT, json={"messages": [QUESTION]}, timeout=60)
        while gateway.get("/health")["turns_running"] == 0:
            time.sleep(0.01)
        with serving_echo(tiny_model, port=port):
            assert waiting.result().status_code == 200
            assert httpx.get(f"{gateway.url}/ready").status_code == 200


def test_keys_open_their_own_session_only(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, environment={"VERBATIM_OPERATOR_KEY": KEY})
    operator = {"Authorization": f"Bearer {KEY}"}
    one = gateway.post("/sessions", {"session_id": "one"}, headers=operator)
    two = gateway.post("/sessions", {"session_id": "two"}, headers=operator)
    body = {"messages": [{"role": "user", "content": "quick"}]}

    def status(method: str, path: str, key: str | None) -> int:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.request(method, gateway.url + path, json=body, headers=headers, timeout=30).status_code

    assert status("POST", "/sessions/one/v1/chat/completions", one["api_key"]) == 200
    assert status("POST", "/v1/chat/completions", one["api_key"]) == 200
    assert status("POST", "/sessions/one/v1/chat/completions", KEY) == 200
    assert status("POST", "/sessions/one/v1/chat/completions", two["api_key"]) == 403
    assert status("POST", "/sessions/one/v1/chat/completions", None) == 401
    assert status("POST", "/sessions/new/v1/chat/completions", one["api_key"]) == 403
    assert status("POST", "/sessions/new/v1/chat/completions", None) == 401
    assert status("POST", "/v1/chat/completions", None) == 401
    for method, path in [("GET", "/sessions/one"), ("POST", "/sessions/one/finish"), ("POST", "/feed/leases")]:
        assert status(method, path, one["api_key"]) == 403
        assert status(method, path, None) == 401
    assert status("GET", "/admin/engines", one["api_key"]) == 403
    assert status("GET", "/health", None) == 200
    assert KEY.encode() not in (tmp_path / "ledger.sqlite").read_bytes()
    assert one["api_key"].encode() not in (tmp_path / "ledger.sqlite").read_bytes()


def test_unknown_sessions_can_be_refused(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, "--set", "unknown_sessions=reject")
    with pytest.raises(openai.NotFoundError, match="POST /sessions"):
        gateway.client("nobody").chat.completions.create(model="m", messages=[QUESTION])


def test_paused_generation_holds_and_goes_on_as_one_reply(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Design 4: an abort for a weight update is invisible to the agent."""
    gateway = start_gateway(tmp_path)
    replies: list[Any] = []

    def ask() -> None:
        replies.append(gateway.client("s").chat.completions.create(model="m", messages=[VERY_SLOW]))

    for mode in ("abort", "keep"):
        thread = threading.Thread(target=ask)
        thread.start()
        while gateway.get("/health")["turns_running"] == 0:
            time.sleep(0.01)
        gateway.post("/admin/generation/pause", {"mode": mode})
        gateway.post("/admin/policy", {"policy_version": 3, "weight_version": "step-3"})
        assert gateway.get("/health")["turns_running"] == 1
        gateway.post("/admin/generation/resume")
        thread.join(60)
    assert [reply.choices[0].finish_reason for reply in replies] == ["stop", "stop"]
    turns = gateway.turns("s")
    assert turns[0]["meta"]["num_attempts"] == 2
    assert turns[1]["meta"]["num_attempts"] == 1
    for turn in turns:
        assert turn["experts_stop"] == len(turn["prompt_token_ids"]) + len(turn["output_token_ids"]) - 1


def test_engines_are_added_and_removed_under_way(start_gateway: StartGateway, rules_file: Path, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path)
    added = gateway.post("/admin/engines", {"kind": "scripted", "url": str(rules_file), "engine_id": "second"})
    assert added["healthy"]
    first = gateway.get("/admin/engines")["engines"][0]["engine_id"]
    assert httpx.delete(f"{gateway.url}/admin/engines/{first}?drain=true").status_code == 200
    gateway.client("s").chat.completions.create(model="m", messages=[QUESTION])
    assert gateway.turns("s")[0]["engine_id"] == "second"
    assert httpx.delete(f"{gateway.url}/admin/engines/nobody").status_code == 404


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "MISSING"], "no such model folder"),
        (["--engine", "nonsense"], "KIND=URL"),
        (["--engine", "martian=http://x"], "martian"),
        (["--set", "prot=1"], "did you mean 'port'"),
        (["--host", "0.0.0.0"], "VERBATIM_OPERATOR_KEY"),
        (["--config", "MISSING"], "no such settings file"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    tiny_model: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    flags = [str(tmp_path / "missing") if flag == "MISSING" else flag for flag in flags]
    assert_refused(["--model", str(tiny_model), "--data", str(tmp_path), "--port", str(free_port()), *flags], message)


def test_taken_port_is_one_line_and_exit_code_2(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", port))
        listener.listen()
        flags = ["--model", str(tiny_model), "--data", str(tmp_path), "--port", str(port)]
        assert_refused(flags, f"127.0.0.1:{port}")


def assert_refused(flags: list[str], message: str) -> None:
    command = [sys.executable, "-c", "from gateway.cli import main; raise SystemExit(main())", "serve", *flags]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
