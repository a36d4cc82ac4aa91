"""The feed of a real gateway and its clients: who waits, who is gone, who comes back after a restart."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.numpy

from engines.launch import free_port
from gateway.cli import main
from gateway.client import GatewayClient, SyncGatewayClient
from gateway.contracts.errors import Conflict, LedgerError, NotFound
from tests.integration.gateway.conftest import RunningGateway, StartGateway

ROOT = Path(__file__).parents[3]
COUNTING_TRAINER = Path(__file__).parent / "counting_trainer.py"
POLL = (
    "import httpx, sys; print('asking', flush=True);"
    "httpx.post(sys.argv[1] + '/feed/leases', json={'consumer': sys.argv[2], 'limit': 1, 'wait_seconds': 60,"
    " 'labels': {'suite': sys.argv[2]}}, timeout=90)"
)


@pytest.fixture
def client(gateway: RunningGateway) -> Iterator[SyncGatewayClient]:
    with SyncGatewayClient(gateway.url, timeout_seconds=20.0) as client:
        yield client


@pytest.fixture
def suite(session_id: str) -> str:
    """A label, and a consumer, of one test's own."""
    return session_id


def finish_rollout(
    gateway: SyncGatewayClient, session_id: str, *, labels: Mapping[str, str], finish: bool = True, **fields: Any
) -> None:
    """One conversation of one turn, as an agent and who runs it would have it."""
    handle = gateway.create_session(session_id=session_id, labels=labels, **fields)
    body = {"model": "m", "messages": [{"role": "user", "content": "quick"}]}
    headers = {"Authorization": f"Bearer {handle.api_key}"}
    httpx.post(f"{handle.base_url}/chat/completions", json=body, headers=headers, timeout=30).raise_for_status()
    if finish:
        gateway.finish_session(session_id, reward=1.0)


def lent(lease: Any) -> list[str]:
    return [] if lease is None else [rollout.session_id for rollout in lease.rollouts]


def in_background(work: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


# ---- who waits ----


@pytest.mark.parametrize("event", ["finish", "release"])
def test_who_waits_is_woken_by(event: str, client: SyncGatewayClient, suite: str) -> None:
    """Sooner than the poll of each second would tell, which comes 0.8 s after the event."""
    delays = []
    for number in range(3):
        labels = {"suite": f"{suite}-{number}"}
        finish_rollout(client, f"{suite}-{number}", labels=labels, finish=event == "release")
        if event == "release":
            client.lease(consumer=suite, limit=1, labels=labels)
        waiting, leases = in_background(
            partial(client.lease, consumer=suite, limit=1, wait_seconds=20.0, labels=labels)
        )
        time.sleep(1.2)
        assert not leases
        started = time.monotonic()
        if event == "finish":
            client.finish_session(f"{suite}-{number}", reward=1.0)
        else:
            client.release_consumer(suite)
        waiting.join(20)
        delays.append(time.monotonic() - started)
        assert lent(leases[0]) == [f"{suite}-{number}"]
        client.acknowledge(leases[0].lease_id)
    assert min(delays) < 0.5, delays


def test_waiting_consumers_share_what_comes_and_each_rollout_goes_to_one(client: SyncGatewayClient, suite: str) -> None:
    """I3, with many waiters of one name."""
    labels = {"suite": suite}
    waiters = [
        in_background(lambda: client.lease(consumer=suite, limit=1, wait_seconds=30.0, labels=labels)) for _ in range(6)
    ]
    for number in range(6):
        finish_rollout(client, f"{suite}-{number}", labels=labels)
    for thread, _ in waiters:
        thread.join(40)
    got = sorted(session_id for _, leases in waiters for session_id in lent(leases[0]))
    assert got == [f"{suite}-{number}" for number in range(6)]


def test_nothing_is_lent_to_a_client_that_was_killed_while_it_waited(
    gateway: RunningGateway, client: SyncGatewayClient, suite: str
) -> None:
    """I3: a lease of nobody would hide the rollout for ten minutes."""
    process = subprocess.Popen([sys.executable, "-c", POLL, gateway.url, suite], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.5)
        process.kill()
    finish_rollout(client, f"{suite}-0", labels={"suite": suite})
    lease = client.lease(consumer=suite, limit=1, wait_seconds=5.0, labels={"suite": suite})
    assert lent(lease) == [f"{suite}-0"]


def test_a_lease_whose_reply_reached_nobody_goes_back_at_once(
    gateway: RunningGateway, client: SyncGatewayClient, suite: str
) -> None:
    """I3: the connection is reset right behind the request, so the lease may be made and cannot be told."""
    finish_rollout(client, f"{suite}-0", labels={"suite": suite})
    host, port = gateway.url.removeprefix("http://").split(":")
    body = json.dumps({"consumer": suite, "limit": 1, "labels": {"suite": suite}}).encode()
    head = f"POST /feed/leases HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head + body)
        lease = client.lease(consumer=suite, limit=1, wait_seconds=5.0, labels={"suite": suite})
        assert lent(lease) == [f"{suite}-0"]
        client.release(lease.lease_id)  # type: ignore[union-attr]


def test_another_try_of_a_call_finds_the_lease_of_the_first(
    gateway: RunningGateway, client: SyncGatewayClient, suite: str
) -> None:
    """By the id that the caller chose; an id that has ended is a conflict, not another lease."""
    for number in range(2):
        finish_rollout(client, f"{suite}-{number}", labels={"suite": suite})
    body = {"consumer": suite, "limit": 1, "labels": {"suite": suite}, "lease_id": f"lease-{suite}"}
    first, again = gateway.post("/feed/leases", body), gateway.post("/feed/leases", body)
    assert first == again
    assert [rollout["session_id"] for rollout in first["rollouts"]] == [f"{suite}-0"]
    client.acknowledge(first["lease_id"])
    assert httpx.post(f"{gateway.url}/feed/leases", json=body).status_code == 409


# ---- leases, groups, labels, order ----


def test_consumers_see_all_rollouts_each_in_order_of_their_end_within_their_labels(
    client: SyncGatewayClient, suite: str
) -> None:
    for number, colour in enumerate(["red", "blue", "red"]):
        finish_rollout(client, f"{suite}-{number}", labels={"suite": suite, "colour": colour})
    for consumer in ("a", "b"):
        lease = client.lease(consumer=f"{suite}-{consumer}", limit=9, labels={"suite": suite})
        assert lent(lease) == [f"{suite}-{number}" for number in range(3)]
    red = {"suite": suite, "colour": "red"}
    assert lent(client.lease(consumer=f"{suite}-c", limit=9, labels=red)) == [f"{suite}-0", f"{suite}-2"]
    assert client.lease(consumer=f"{suite}-c", limit=9, labels=red) is None


def test_a_group_is_lent_whole_or_after_its_deadline_with_what_is_missing_named(
    client: SyncGatewayClient, suite: str
) -> None:
    labels = {"suite": suite}
    group: dict[str, Any] = {"group": f"g-{suite}", "group_size": 3}
    finish_rollout(client, f"{suite}-0", labels=labels, **group)
    finish_rollout(client, f"{suite}-1", labels=labels, finish=False, **group)
    assert client.lease(consumer=suite, limit=9, labels=labels) is None
    lease = client.lease(consumer=suite, limit=9, labels=labels, wait_seconds=20.0, group_deadline_seconds=0.5)
    assert lease is not None
    assert lent(lease) == [f"{suite}-0"]
    (missing,) = lease.incomplete
    assert (missing.group, missing.expected, missing.unfinished) == (f"g-{suite}", 3, (f"{suite}-1",))
    assert missing.num_not_created == 1
    client.acknowledge(lease.lease_id)
    client.finish_session(f"{suite}-1", reward=0.0)
    later = client.lease(consumer=suite, limit=9, labels=labels, wait_seconds=20.0, group_deadline_seconds=0.0)
    assert later is not None
    assert lent(later) == [f"{suite}-1"]
    assert later.incomplete[0].lent_before == (f"{suite}-0",)


def test_a_held_lease_outlives_its_time_and_ends_as_its_block_ends(client: SyncGatewayClient, suite: str) -> None:
    labels = {"suite": suite}
    finish_rollout(client, f"{suite}-0", labels=labels)
    with suppress(ZeroDivisionError), client.leased(consumer=suite, limit=1, labels=labels) as lease:
        assert lent(lease) == [f"{suite}-0"]
        raise ZeroDivisionError
    with client.leased(consumer=suite, limit=1, labels=labels, lease_seconds=0.6) as lease:
        assert lent(lease) == [f"{suite}-0"], "given back by the block that raised"
        time.sleep(1.5)
        assert client.lease(consumer=suite, limit=1, labels=labels) is None, "extended while the block runs"
        assert [held.lease_id for held in client.leases(consumer=suite)] == [lease.lease_id]  # type: ignore[union-attr]
    assert client.counts(suite).acknowledged == 1
    with client.leased(consumer=suite, limit=1, labels=labels) as nothing:
        assert nothing is None


def test_a_lease_that_has_ended_cannot_be_extended(client: SyncGatewayClient, suite: str) -> None:
    finish_rollout(client, f"{suite}-0", labels={"suite": suite})
    lease = client.lease(consumer=suite, limit=1, labels={"suite": suite}, lease_seconds=60.0)
    assert lease is not None
    assert client.extend(lease.lease_id, lease_seconds=600.0) > lease.expires_at + 500
    client.acknowledge(lease.lease_id)
    with pytest.raises(Conflict):
        client.extend(lease.lease_id, lease_seconds=600.0)
    with pytest.raises(NotFound):
        client.extend("nobody's", lease_seconds=600.0)


async def test_iterating_acknowledges_what_was_gone_through(gateway: RunningGateway, suite: str) -> None:
    def prepare() -> None:
        with SyncGatewayClient(gateway.url) as sync:
            for number in range(3):
                finish_rollout(sync, f"{suite}-{number}", labels={"suite": suite})

    await asyncio.to_thread(prepare)
    async with GatewayClient(gateway.url) as client:
        rollouts = client.iter_rollouts(consumer=suite, labels={"suite": suite})
        assert (await anext(rollouts)).session.session_id == f"{suite}-0"
        assert (await anext(rollouts)).session.session_id == f"{suite}-1"
        await rollouts.aclose()
        counts = await client.counts(suite)
        assert (counts.acknowledged, counts.leased) == (1, 0), "the second was given back"
        left = [rollout async for rollout in client.iter_rollouts(consumer=suite, labels={"suite": suite})]
        assert [rollout.session.session_id for rollout in left] == [f"{suite}-1", f"{suite}-2"]
        assert (await client.counts(suite)).acknowledged == 3


def test_metrics_show_every_consumer(gateway: RunningGateway, client: SyncGatewayClient, suite: str) -> None:
    finish_rollout(client, f"{suite}-0", labels={"suite": suite})
    client.lease(consumer=suite, limit=1, labels={"suite": suite})
    text = httpx.get(f"{gateway.url}/metrics").text
    assert f'verbatim_feed_leased{{consumer="{suite}"}} 1.0' in text
    assert f'verbatim_feed_acknowledged{{consumer="{suite}"}} 0.0' in text
    assert re.search(r'verbatim_feed_unleased{consumer="trainer"} [1-9]', text), "also before its first lease"
    assert re.search(r'verbatim_feed_oldest_seconds{consumer="trainer"} [0-9.]*[1-9]', text)


# ---- restarts ----


def test_every_call_outlives_a_killed_gateway(start_gateway: StartGateway, tmp_path: Path) -> None:
    """I4, and nothing is done twice: each call is made while nobody listens, and answered by the next process."""
    port, data = free_port(), tmp_path / "data"
    running = start_gateway(data, port=port)
    with SyncGatewayClient(running.url, retry_seconds=60.0) as client:
        finish_rollout(client, "s", labels={}, finish=False)
        calls: list[Callable[[], Any]] = [
            lambda: client.finish_session("s", reward=0.5),
            lambda: client.create_session(session_id="t"),
            lambda: client.create_session(),
            lambda: client.lease(consumer="c", limit=1, wait_seconds=30.0),
            lambda: client.counts("c"),
            lambda: client.set_policy(1, "one"),
        ]
        running.stop(signal.SIGKILL)
        made = [in_background(call) for call in calls]
        time.sleep(0.5)
        start_gateway(data, port=port)
        for thread, results in made:
            thread.join(60)
            assert len(results) == 1, "each has its answer"
        assert lent(made[3][1][0]) == ["s"]
        assert len(client.sessions()) == 3


def test_a_long_poll_goes_on_at_the_gateway_that_follows(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A gateway that is told to end does not wait for who waits, and who waits notices nothing."""
    port, data = free_port(), tmp_path / "data"
    running = start_gateway(data, port=port)
    with SyncGatewayClient(running.url, retry_seconds=60.0) as client:
        finish_rollout(client, "s", labels={}, finish=False)
        waiting, leases = in_background(lambda: client.lease(consumer="c", limit=1, wait_seconds=60.0))
        time.sleep(0.7)
        for number in (signal.SIGTERM, signal.SIGKILL):
            started = time.monotonic()
            running.stop(number)
            assert time.monotonic() - started < 8.0
            running = start_gateway(data, port=port)
        assert not leases
        client.finish_session("s", reward=1.0)
        waiting.join(60)
    assert lent(leases[0]) == ["s"]


def test_a_client_without_patience_says_at_once_that_nobody_answers() -> None:
    with SyncGatewayClient(f"http://127.0.0.1:{free_port()}", retry_seconds=0.0) as client:
        started = time.monotonic()
        with pytest.raises(LedgerError, match="cannot reach the gateway"):
            client.health()
        assert time.monotonic() - started < 5.0


def test_a_session_key_is_told_again_to_the_call_that_made_it_only(start_gateway: StartGateway, tmp_path: Path) -> None:
    """A reply that a crash swallowed would leave a session that nobody can use."""
    running = start_gateway(tmp_path / "data", environment={"VERBATIM_OPERATOR_KEY": "secret"})

    def create(key: str) -> httpx.Response:
        headers = {"Authorization": "Bearer secret", "Idempotency-Key": key}
        return httpx.post(f"{running.url}/sessions", json={"session_id": "s"}, headers=headers)

    first, again, other = create("a" * 32), create("a" * 32), create("b" * 32)
    assert (first.status_code, again.status_code, other.status_code) == (201, 200, 200)
    assert first.json()["api_key"] == again.json()["api_key"]
    assert other.json()["api_key"] is None
    assert "Idempotency-Key" in create("short").json()["error"]["message"]
    body = {"model": "m", "messages": [{"role": "user", "content": "quick"}]}
    headers = {"Authorization": f"Bearer {again.json()['api_key']}"}
    assert httpx.post(f"{again.json()['base_url']}/chat/completions", json=body, headers=headers).status_code == 200


def test_trainer_and_gateway_are_killed_again_and_again_and_each_rollout_is_counted_once(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    """I3, I4 with processes: SIGKILL at moments that nobody chose; the gateway's deaths do not end the trainer."""
    port, data, dice = free_port(), tmp_path / "data", random.Random(7)
    running = start_gateway(data, port=port)
    num_rollouts = 24
    with SyncGatewayClient(running.url) as client:
        for number in range(num_rollouts):
            labels = {"run": "counting", "purpose": "train"}
            finish_rollout(client, f"s{number:02}", labels=labels, group=f"g{number // 2}", group_size=2)
    command = [sys.executable, str(COUNTING_TRAINER), running.url, str(tmp_path / "run"), str(num_rollouts)]
    ended_with_gateway_gone = 0
    for death in range(20):
        trainer = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            trainer.wait(0.8 + dice.random())
        if death % 3 == 1 and trainer.poll() is None:
            running.stop(signal.SIGKILL)
            running = start_gateway(data, port=port)
            time.sleep(0.3)
            ended_with_gateway_gone += trainer.poll() not in (None, 0)
        if trainer.poll() is None:
            trainer.kill()
        if trainer.wait(20) == 0:
            break
    else:
        subprocess.run(command, check=True, timeout=60)
    assert not ended_with_gateway_gone
    newest = max((tmp_path / "run").glob("step-*"))
    history = json.loads((newest / "history.json").read_text())
    assert sorted(session_id for session_id, _ in history) == [f"s{number:02}" for number in range(num_rollouts)]
    assert all(num_tokens > 0 for _, num_tokens in history)
    with SyncGatewayClient(running.url) as client:
        counts = client.counts("counting")
    assert (counts.acknowledged, counts.leased, counts.unleased) == (num_rollouts, 0, 0)


# ---- the command and the page ----


def run_feed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    assert main(["feed", *words, "--json"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_command_shows_releases_and_exports(
    gateway: RunningGateway, client: SyncGatewayClient, suite: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """I1: the exported file is the body that a trainer reads; looking takes nothing from anybody."""
    labels = {"suite": suite}
    for number in range(2):
        finish_rollout(client, f"{suite}-{number}", labels=labels)
    lease = client.lease(consumer=suite, limit=1, labels=labels)
    assert lease is not None
    at = ("--url", gateway.url)
    (counts,) = run_feed(capsys, "counts", "--consumer", suite, *at)
    assert (counts["consumer"], counts["leased"]) == (suite, 1)
    assert suite in [row["consumer"] for row in run_feed(capsys, *at)]
    (held,) = run_feed(capsys, "leases", "--consumer", suite, *at)
    assert (held["lease"], held["sessions"]) == (lease.lease_id, [f"{suite}-0"])
    rollouts = run_feed(capsys, "rollouts", "--label", f"suite={suite}", *at)
    assert [row["session_id"] for row in rollouts] == [f"{suite}-0", f"{suite}-1"]

    (done,) = run_feed(capsys, "export", "--to", str(tmp_path / "out"), "--label", f"suite={suite}", *at)
    assert (done["rollouts"], done["dropped"]) == (2, 0)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for entry in index["rollouts"]:
        content = (tmp_path / "out" / entry["file"]).read_bytes()
        assert content == client.rollout_bytes(entry["session_id"], entry["finish"]["snapshot"])
        assert "segments.0.token_ids" in safetensors.numpy.load(content)

    assert run_feed(capsys, "release", lease.lease_id, *at) == [{"lease": lease.lease_id, "state": "released"}]
    assert run_feed(capsys, "leases", "--consumer", suite, *at) == []
    assert client.counts(suite).leased == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["release"], "say what to release"),
        (["export"], "say where to"),
        (["leases", "x"], "takes no lease"),
        (["rollouts", "--label", "x"], "KEY=VALUE"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(
    gateway: RunningGateway, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert main(["feed", *words, "--url", gateway.url]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_the_example_of_the_page_runs(gateway: RunningGateway, client: SyncGatewayClient, suite: str) -> None:
    """gateway/README.md, word by word, but for the address and the run's name."""
    for number in range(2):
        finish_rollout(client, f"{suite}-{number}", labels={"run": suite})
    page = (ROOT / "gateway" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(code.splitlines()) <= 12
    learned: list[Any] = []
    code = code.replace("http://127.0.0.1:8600", gateway.url).replace("my-run", suite).replace("=30.0", "=0.5")
    exec(compile(code, "gateway/README.md", "exec"), {"learn_from": learned.append})
    assert [rollout.session.session_id for rollout in learned] == [f"{suite}-0", f"{suite}-1"]
    assert client.counts(suite).acknowledged == 2
