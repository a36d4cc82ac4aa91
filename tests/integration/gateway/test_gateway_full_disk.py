"""A gateway whose disk fills up: agents get 503 before anything is lost, and all goes on when there is room again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import PROGRAM, RunningGateway, close, wait_ready
from tests.small_disk import SmallDisk, fill, small_disk
from tests.waiting import until

MIB = 2**20
SLOW = {"role": "user", "content": "count very slowly"}
QUICK = {"role": "user", "content": "quick"}


Start = Callable[..., RunningGateway]


@pytest.fixture
def disk() -> Iterator[SmallDisk]:
    with small_disk(24 * MIB) as made:
        yield made


@pytest.fixture
def start(disk: SmallDisk, tiny_model: Path, rules_file: Path) -> Iterator[Start]:
    """Starts gateways whose data folder is on the small disk."""
    with ExitStack() as stack:

        def start(*flags: str) -> RunningGateway:
            words = [*disk.enter, sys.executable, str(PROGRAM), "--engine", f"scripted={rules_file}"]
            words += ["--model", str(tiny_model), "--data", str(disk.inside / "data"), "--port", str(free_port())]
            process = subprocess.Popen([*words, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(close, process)
            return RunningGateway(process, wait_ready(process))

        yield start


def doctor(disk: SmallDisk) -> dict[str, Any]:
    program = "from gateway.cli import main; raise SystemExit(main())"
    words = [*disk.enter, sys.executable, "-c", program, "doctor", "--data", str(disk.inside / "data"), "--json"]
    return dict(json.loads(subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout))


def flags(*, reserve_bytes: int = 4 * MIB, wait_seconds: float = 20.0) -> list[str]:
    values = {"min_free_bytes": 2 * MIB, "reserve_bytes": reserve_bytes, "full_wait_seconds": wait_seconds}
    return [word for name, value in values.items() for word in ("--set", f"storage.{name}={value}")]


def ask(gateway: RunningGateway, session_id: str, message: dict[str, Any], **fields: Any) -> httpx.Response:
    body = {"messages": [message], **fields}
    return httpx.post(f"{gateway.url}/sessions/{session_id}/v1/chat/completions", json=body, timeout=60)


def storage(gateway: RunningGateway) -> str:
    return str(gateway.get("/health")["storage"])


def assert_whole(disk: SmallDisk, gateway: RunningGateway, answered: dict[str, int]) -> None:
    """Every turn that was answered is recorded, nothing is damaged, and nothing of it when the gateway has ended."""
    for session_id, num_turns in answered.items():
        assert len(gateway.turns(session_id)) == num_turns
    assert doctor(disk)["damages"] == []
    gateway.stop()
    assert doctor(disk)["damages"] == []


def test_turns_fill_the_disk_until_503_and_go_on_when_there_is_room(start: Start, disk: SmallDisk) -> None:
    """I4: what was answered is on disk; what cannot be recorded is refused before an engine is asked."""
    gateway = start(*flags())
    fill(disk.folder / "other", leave_bytes=5 * MIB)
    answered: dict[str, int] = {}
    for i in range(60):
        reply = ask(gateway, f"s{i}", QUICK, note="x" * 200_000)
        if reply.status_code != 200:
            break
        answered[f"s{i}"] = 1
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "storage_full"
    assert int(reply.headers["Retry-After"]) > 0
    assert len(answered) > 2
    assert httpx.get(f"{gateway.url}/ready", timeout=10).status_code == 503
    assert 'verbatim_storage_state{state="open"} 0.0' in httpx.get(f"{gateway.url}/metrics", timeout=10).text
    os.unlink(disk.folder / "other")
    until(lambda: ask(gateway, "later", QUICK).status_code == 200)
    assert_whole(disk, gateway, answered | {"later": 1})


def test_turns_under_way_are_answered_from_the_reserve_and_drops_free_room(start: Start, disk: SmallDisk) -> None:
    """I3: the disk is full to the last byte while they are sampled."""
    gateway = start(*flags())
    gateway.post("/sessions", {"session_id": "done"})
    assert ask(gateway, "done", QUICK).status_code == 200
    gateway.post("/sessions/done/finish", {"reward": 1.0})
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(ask, gateway, f"s{i}", SLOW) for i in range(8)]
        until(lambda: gateway.get("/health")["turns_running"] == 8)
        fill(disk.folder / "other")
        assert [one.result().status_code for one in slow] == [200] * 8
    until(lambda: storage(gateway) in ("reserve", "full"))
    assert ask(gateway, "new", QUICK).status_code == 503
    fill(disk.folder / "more")  # what the reserve gave back, too: the last one is there for what frees room
    lease = gateway.post("/feed/leases", {"consumer": "t", "limit": 1})
    [rollout] = lease["rollouts"]
    gateway.post(f"/feed/leases/{lease['lease_id']}/ack")
    dropped = httpx.delete(f"{gateway.url}/feed/rollouts/done?snapshot={rollout['snapshot']}", timeout=10)
    assert dropped.status_code == 200
    os.unlink(disk.folder / "other")
    os.unlink(disk.folder / "more")
    until(lambda: storage(gateway) == "open")
    assert ask(gateway, "new", QUICK).status_code == 200
    assert gateway.get("/admin/storage")["space"]["reserve_bytes"] == 4 * MIB
    assert_whole(disk, gateway, {f"s{i}": 1 for i in range(8)} | {"new": 1})


def test_a_sampled_turn_waits_for_room_when_there_is_no_reserve(start: Start, disk: SmallDisk) -> None:
    """I3: nothing sampled is thrown away while somebody may still make room."""
    gateway = start(*flags(reserve_bytes=0))
    answered: dict[str, int] = {}
    with ThreadPoolExecutor(1) as pool:
        for number in range(5):  # a stalled machine may let a turn end before the disk is full
            slow = pool.submit(ask, gateway, f"s{number}", SLOW, note="x" * 300_000)
            answered[f"s{number}"] = 1
            until(lambda: gateway.get("/health")["turns_running"] == 1 or slow.done())  # noqa: B023 - of this round
            fill(disk.folder / "other")
            until(lambda: storage(gateway) == "full" or slow.done())  # noqa: B023
            if not slow.done():
                break
            os.unlink(disk.folder / "other")
            until(lambda: storage(gateway) == "open")
        assert not slow.done()
        os.unlink(disk.folder / "other")
        assert slow.result().status_code == 200
    assert_whole(disk, gateway, answered)


def test_a_gateway_that_was_killed_on_a_full_disk_starts_there_again(start: Start, disk: SmallDisk) -> None:
    gateway = start(*flags())
    assert ask(gateway, "s", QUICK).status_code == 200
    until(lambda: gateway.turns("s")[0]["delivered_at"] is not None)  # else the same again is given from the record
    fill(disk.folder / "other")
    gateway.process.kill()
    gateway.process.wait(20)
    second = start(*flags())
    assert ask(second, "s", QUICK).status_code == 503
    os.unlink(disk.folder / "other")
    until(lambda: ask(second, "s", QUICK).status_code == 200)
    assert_whole(disk, second, {"s": 2})
