"""What was delivered, what is picked and what a session's report says, over real HTTP against real processes."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

import httpx
import pytest

from gateway.cli import main
from gateway.client import GatewayClient
from gateway.contracts.codec import decode_rollout
from gateway.contracts.errors import InvalidRequest
from gateway.contracts.rollouts import FinishedRollout
from tests.waiting import until

OWN_PICK = "def longest(turns):\n    return [max(turns, key=lambda turn: len(turn.output_token_ids)).turn_id]\n"


class Gateway(Protocol):
    url: str

    def get(self, path: str, **options: Any) -> Any: ...
    def post(self, path: str, body: Any = None, **options: Any) -> Any: ...
    def turns(self, session_id: str) -> list[dict[str, Any]]: ...
    def stop(self, number: int = signal.SIGTERM) -> int: ...


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def chat(gateway: Gateway, session_id: str, *messages: Any, **fields: Any) -> Any:
    reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", {"messages": list(messages), **fields})
    return reply["choices"][0]["message"]


def rollout_of(gateway: Gateway, session_id: str, **query: str) -> FinishedRollout:
    finish = gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    reply = httpx.get(
        f"{gateway.url}/feed/rollouts/{session_id}", params={"snapshot": finish["snapshot"], **query}, timeout=30
    )
    reply.raise_for_status()
    return decode_rollout(reply.content)


class RawClient:
    """An HTTP client that sees bytes as they come and decides itself when it closes."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        assert address.port is not None
        self._socket = socket.create_connection((address.hostname, address.port), timeout=20)

    def send(self, method: str, path: str, body: Any) -> None:
        content = json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(content)}\r\n\r\n"
        self._socket.sendall(head.encode() + content)

    def read_until(self, is_enough: Callable[[bytes], bool]) -> bytes:
        seen = b""
        while not is_enough(seen):
            piece = self._socket.recv(65536)
            assert piece, f"closed after {seen[-200:]!r}"
            seen += piece
        return seen

    def close(self) -> None:
        self._socket.close()


def has_done(seen: bytes) -> bool:
    return b"data: [DONE]" in seen


def has_whole_body(seen: bytes) -> bool:
    head, blank, body = seen.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().splitlines() if line.startswith(b"content-length")]
    return bool(blank) and len(body) == int(lengths[0])


@pytest.mark.parametrize("stream", [True, False])
def test_a_reply_read_to_its_end_was_delivered_although_its_client_closes_and_finishes_at_once(
    gateway: Gateway, session_id: str, stream: bool
) -> None:
    """I3, I4: the last turn of a session has nothing after it that would show that it was seen."""
    for attempt in range(40):
        name = f"{session_id}-{attempt}"
        with closing(RawClient(gateway.url)) as agent, closing(RawClient(gateway.url)) as operator:
            agent.send("POST", f"/sessions/{name}/v1/chat/completions", {"messages": [user("quick")], "stream": stream})
            agent.read_until(has_done if stream else has_whole_body)
            operator.send("POST", f"/sessions/{name}/finish", {"reward": 1.0})
            agent.close()
            answer = operator.read_until(has_whole_body)
            snapshot = json.loads(answer.partition(b"\r\n\r\n")[2])["snapshot"]
            operator.send("GET", f"/feed/rollouts/{name}?snapshot={snapshot}", None)
            body = operator.read_until(has_whole_body).partition(b"\r\n\r\n")[2]
        account = decode_rollout(body).pick
        assert account.pick == "delivered"
        assert account.left_out == (), f"attempt {attempt}"
        assert account.num_trained_tokens == account.num_sampled_tokens > 0


def test_every_choice_of_one_reply_was_delivered(gateway: Gateway, session_id: str) -> None:
    """I3."""
    chat(gateway, session_id, user("quick"), n=4)
    rollout = rollout_of(gateway, session_id)
    assert len(rollout.segments) == 4
    assert rollout.pick.left_out == ()


def wait_for_turns(gateway: Gateway, session_id: str, count: int) -> list[dict[str, Any]]:
    until(lambda: len(gateway.turns(session_id)) >= count)
    turns = gateway.turns(session_id)
    assert len(turns) == count
    return turns


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_went_away_leaves_tokens_that_only_the_pick_all_trains(
    gateway: Gateway, session_id: str, stream: bool
) -> None:
    """I3: recorded, told, and left out by default, because nobody saw them."""
    first = chat(gateway, session_id, user("quick"))
    with closing(RawClient(gateway.url)) as agent:
        messages = [user("quick"), first, user("count slowly")]
        agent.send("POST", f"/sessions/{session_id}/v1/chat/completions", {"messages": messages, "stream": stream})
        if stream:
            agent.read_until(lambda seen: b'"content":"' in seen)
        else:
            time.sleep(0.15)
    seen, unseen = wait_for_turns(gateway, session_id, 2)
    assert unseen["delivered_at"] is None
    rollout = rollout_of(gateway, session_id)
    num_unseen = len(unseen["output_token_ids"])
    assert rollout.pick.left_out_tokens == {"undelivered": num_unseen}
    assert rollout.num_trained_tokens == len(seen["output_token_ids"])
    assert rollout.num_sampled_tokens == rollout.num_trained_tokens + num_unseen
    whole = rollout_of(gateway, session_id, pick="all")
    assert whole.pick.left_out == ()
    assert whole.num_trained_tokens == rollout.num_sampled_tokens


def test_a_pick_is_chosen_by_name_for_the_feed_segments_and_report(gateway: Gateway, session_id: str) -> None:
    """I3: the account adds up under each of them."""
    first = chat(gateway, session_id, user("quick"))
    chat(gateway, session_id, user("another conversation"))
    chat(gateway, session_id, user("quick"), first, user("quick"))
    sampled = [len(turn["output_token_ids"]) for turn in gateway.turns(session_id)]
    for pick, left_out in (("all", {}), ("delivered", {}), ("final-path", {"not_on_final_path": sampled[1]})):
        rollout = rollout_of(gateway, session_id, pick=pick)
        assert (rollout.pick.pick, rollout.pick.left_out_tokens) == (pick, left_out)
        shown = gateway.get(f"/sessions/{session_id}/segments", params={"pick": pick})
        assert shown["pick"]["num_trained_tokens"] == sum(s["num_trained_tokens"] for s in shown["segments"])
        assert (
            shown["pick"]["num_trained_tokens"] == rollout.num_trained_tokens == sum(sampled) - sum(left_out.values())
        )
        report = gateway.get(f"/sessions/{session_id}/report", params={"pick": pick})
        assert report["pick"] == shown["pick"]
        assert report["num_segments"] == len(shown["segments"])


def test_an_unknown_pick_is_a_400_that_lists_the_names(gateway: Gateway, session_id: str) -> None:
    """I7: nothing that a caller writes is imported."""
    chat(gateway, session_id, user("quick"))
    snapshot = gateway.post(f"/sessions/{session_id}/finish", {"reward": 1.0})["snapshot"]
    for path in ("/sessions/{}/segments?x=1", "/sessions/{}/report?x=1", "/feed/rollouts/{}?snapshot=" + snapshot):
        reply = httpx.get(f"{gateway.url}{path.format(session_id)}&pick=os:getcwd", timeout=30)
        assert reply.status_code == 400
        assert "is none of all, delivered, final-path" in reply.json()["error"]["message"]


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "operators_own.py").write_text(OWN_PICK)
    return folder


async def test_the_operators_pick_is_the_default_and_the_client_asks_for_others(
    start_gateway: Any, tmp_path: Path, own_folder: Path, session_id: str
) -> None:
    """I3: `verbatim serve --pick module:function`."""
    flags = ("--pick", "operators_own:longest")
    running = start_gateway(tmp_path / "data", *flags, environment={"PYTHONPATH": str(own_folder)})
    first = chat(running, session_id, user("quick"))
    chat(running, session_id, user("quick"), first, user("count slowly"))
    short, long = (len(turn["output_token_ids"]) for turn in running.turns(session_id))
    assert short < long
    finish = running.post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    async with GatewayClient(running.url) as client:
        assert await client.picks() == ("all", "delivered", "final-path", "operators_own:longest")
        own = await client.rollout(session_id, finish["snapshot"])
        assert (own.pick.pick, own.num_trained_tokens) == ("operators_own:longest", long)
        assert own.pick.left_out_tokens == {"not_picked": short}
        assert len(own.segments) == 1
        every = await client.rollout(session_id, finish["snapshot"], pick="all")
        assert every.num_trained_tokens == short + long
        with pytest.raises(InvalidRequest, match="operators_own:longest"):
            await client.rollout(session_id, finish["snapshot"], pick="operators_own:shortest")
        report = await client.session_report(session_id, pick="delivered")
        assert report["pick"]["num_trained_tokens"] == short + long
    running.stop()


def test_a_pick_that_cannot_be_loaded_stops_the_start_in_one_line(tiny_model: Path, tmp_path: Path) -> None:
    words = ["serve", "--model", str(tiny_model), "--data", str(tmp_path / "data"), "--port", "0"]
    assert main([*words, "--pick", "nowhere_picks:best"]) == 2


def test_the_report_tells_how_a_session_went_over_http_and_on_the_command_line(
    start_gateway: Any, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I1, I6: the same figures from the gateway, from the ledger's files, and on the page for people."""
    running = start_gateway(tmp_path / "ledger")
    name = "run/1"
    path = "run%2F1"
    first = chat(running, path, user("What is 48/2?"))
    for _ in range(2):
        chat(running, path, user("What is 48/2?"), first, user("quick"))
    chat(running, path, {"role": "system", "content": "Be brief."}, user("quick"))
    report = running.get(f"/sessions/{path}/report")
    assert (report["num_turns"], report["num_roots"], report["num_forks"], report["num_segments"]) == (4, 2, 1, 3)
    assert report["segment_reasons"] == {"first": 1, "no_match": 1}
    assert report["tiers"] == {"exact": 2, "none": 2}
    drift = report["drift"]
    assert drift["num_extending_turns"] == 2
    assert drift["num_compared_tokens"] == len(running.turns(path)[0]["output_token_ids"])
    assert 0 <= drift["num_wrong_tokens"] <= drift["num_compared_tokens"]
    running.stop()
    words = ["sessions", name, "--data", str(tmp_path / "ledger"), "--report", "--model", str(tiny_model)]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == report
    assert main(words) == 0
    page = capsys.readouterr().out
    for text in ("run/1", "1 first, 1 no_match", "at 1 turns that several others extend", "sampled tokens in them"):
        assert text in page
    assert main(words[:-2]) == 0
    assert "give --model PATH" in capsys.readouterr().out
