"""`verbatim serve --workers 2`: one gateway of several processes, and what happens when one of them dies."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, StartGateway, close, spawn, wait_ready
from tests.waiting import until

QUICK = {"role": "user", "content": "quick"}
SLOW = {"role": "user", "content": "count slowly"}
FOR_AGES = {"role": "user", "content": "count for ages"}
NUM_WORKERS = 2
NUM_CONNECTIONS = 32
NUM_BURSTS = 5


class Caller:
    """One connection, kept open, and the worker at its other end."""

    def __init__(self, gateway: RunningGateway, stack: ExitStack) -> None:
        limits = httpx.Limits(max_connections=1)
        self.http = stack.enter_context(httpx.Client(base_url=gateway.url, timeout=60, limits=limits))
        with self.http.stream("GET", "/health") as reply:
            reply.raise_for_status()
            reply.read()
            stream = reply.extensions["network_stream"]
            self.port = stream.get_extra_info("client_addr")[1]
        self.worker = worker_of(gateway, self.port)

    def get(self, path: str) -> Any:
        return self.http.get(path).raise_for_status().json()

    def post(self, path: str, body: Any = None) -> Any:
        return self.http.post(path, json=body or {}).raise_for_status().json()

    def turn(self, session_id: str, messages: list[Any]) -> str:
        reply = self.post(f"/sessions/{session_id}/v1/chat/completions", {"model": "m", "messages": messages})
        return str(reply["choices"][0]["message"]["content"])


def workers(gateway: RunningGateway) -> list[int]:
    pid = gateway.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def worker_of(gateway: RunningGateway, client_port: int) -> int:
    """The process that has the other end of a connection from `client_port`."""
    server_port = int(gateway.url.rpartition(":")[2])
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        local, remote = (int(address.rpartition(":")[2], 16) for address in fields[1:3])
        if (local, remote) == (server_port, client_port):
            name = f"socket:[{fields[9]}]"
            for pid in workers(gateway):
                if any(link == name for link in descriptors(pid)):
                    return pid
    raise AssertionError(f"nobody has the connection from {client_port}")


def descriptors(pid: int) -> Iterator[str]:
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            yield os.readlink(descriptor)
        except FileNotFoundError:
            continue


@pytest.fixture(scope="module")
def crew(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """A gateway of two workers that the tests share, each with sessions of its own."""
    return start_gateway(tmp_path_factory.mktemp("crew"), "--workers", str(NUM_WORKERS))


@pytest.fixture
def both(crew: RunningGateway) -> Iterator[tuple[Caller, Caller]]:
    """A connection to each worker."""
    with pair(crew) as callers:
        yield callers


@contextmanager
def pair(gateway: RunningGateway) -> Iterator[tuple[Caller, Caller]]:
    """A connection to each worker, as soon as both serve."""
    with ExitStack() as stack:
        one = other = Caller(gateway, stack)
        deadline = time.monotonic() + 60.0
        while other.worker == one.worker:
            assert time.monotonic() < deadline
            other = Caller(gateway, stack)
        yield one, other


def test_connections_are_shared_evenly(crew: RunningGateway) -> None:
    """In one of a few bursts, since a worker whose core was taken away has its part accepted by the other."""
    assert len(workers(crew)) == NUM_WORKERS
    least = []
    for _ in range(NUM_BURSTS):
        with ExitStack() as stack:
            with ThreadPoolExecutor(NUM_CONNECTIONS) as pool:  # the first to wake must not take them all
                callers = list(pool.map(lambda _: Caller(crew, stack), range(NUM_CONNECTIONS)))
            least.append(min(sum(caller.worker == pid for caller in callers) for pid in workers(crew)))
        if least[-1] >= NUM_CONNECTIONS // NUM_WORKERS - 4:
            return
    raise AssertionError(f"of {NUM_CONNECTIONS} connections one worker got {least}")


def test_a_session_goes_from_worker_to_worker(both: tuple[Caller, Caller], session_id: str) -> None:
    """I2, I4: what one worker answered is on disk, and the prefix of the next turn at the other."""
    messages: list[Any] = []
    for number in range(6):
        messages.append(QUICK)
        text = both[number % 2].turn(session_id, messages)
        messages.append({"role": "assistant", "content": text})
    for caller in both:
        turns = caller.get(f"/sessions/{session_id}/turns")["turns"]
        assert [turn["index"] for turn in turns] == list(range(6))
        assert len(caller.get(f"/sessions/{session_id}/segments")["segments"]) == 1
    both[1].post(f"/sessions/{session_id}/finish", {"reward": 1.0})
    refused = both[0].http.post(
        f"/sessions/{session_id}/v1/chat/completions", json={"model": "m", "messages": messages}
    )
    assert refused.status_code == 409


def test_finish_at_one_worker_ends_the_turn_that_another_runs(both: tuple[Caller, Caller], session_id: str) -> None:
    """I3: the rollout holds what was sampled until then; no turn comes late."""
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "m", "messages": [FOR_AGES]}
        asked = pool.submit(both[0].http.post, f"/sessions/{session_id}/v1/chat/completions", json=body)
        until(lambda: both[1].get("/health")["turns_running"] == 1)
        time.sleep(0.7)
        finish = both[1].post(f"/sessions/{session_id}/finish", {"reward": 1.0})
        assert asked.result().status_code >= 400
    [turn] = both[1].get(f"/sessions/{session_id}/turns?arrays=1")["turns"]
    assert turn["finish"]["reason"] == "abort"
    assert len(turn["output_token_ids"]) > 0
    assert both[1].get(f"/sessions/{session_id}")["finish"]["snapshot"] == finish["snapshot"]


def test_operators_changes_are_made_by_all(
    crew: RunningGateway, both: tuple[Caller, Caller], rules_file: Path, session_id: str
) -> None:
    """Whichever worker is asked; refusals are those of one process."""
    for number, (asked, other) in enumerate((both, both[::-1])):
        name = f"added-{number}"
        asked.post("/admin/engines", {"kind": "scripted", "url": str(rules_file), "engine_id": name})
        assert name in engine_ids(other)
        again = {"kind": "scripted", "url": str(rules_file), "engine_id": name}
        assert [caller.http.post("/admin/engines", json=again).status_code for caller in both] == [409, 409]
        other.http.delete(f"/admin/engines/{name}").raise_for_status()
        assert name not in engine_ids(asked)
        assert other.http.delete(f"/admin/engines/{name}").status_code == 404
        asked.post("/admin/policy", {"policy_version": 7 + number, "weight_version": f"step-{number}"})
        asked.post("/admin/generation/pause", {"mode": "drain"})
        assert [caller.get("/admin/generation")["paused"] for caller in both] == ["drain", "drain"]
        with ThreadPoolExecutor(2) as pool:
            held = [pool.submit(caller.turn, f"{session_id}-{caller.worker}", [QUICK]) for caller in both]
            time.sleep(0.3)
            assert not any(each.done() for each in held)
            crew.post("/admin/generation/resume")
            assert [each.result() for each in held] == ["the quick answer"] * 2
        assert [caller.get("/admin/generation")["paused"] for caller in both] == [None, None]


def engine_ids(caller: Caller) -> list[str]:
    return [engine["engine_id"] for engine in caller.get("/admin/engines")["engines"]]


def test_one_scrape_counts_what_all_workers_did(both: tuple[Caller, Caller], session_id: str) -> None:
    before = num_turns(both[0])
    for caller in (*both, *both, both[0]):
        caller.turn(f"{session_id}-{caller.worker}", [QUICK])
    assert [num_turns(caller) - before for caller in both] == [5, 5]


def num_turns(caller: Caller) -> int:
    text = caller.http.get("/metrics").raise_for_status().text
    return sum(int(float(value)) for value in re.findall(r"^verbatim_turns_total\{.*\} (\S+)$", text, re.MULTILINE))


def test_waiting_lease_is_woken_by_a_finish_at_another_worker(both: tuple[Caller, Caller], session_id: str) -> None:
    both[1].turn(session_id, [QUICK])
    body = {"consumer": session_id, "limit": 1, "wait_seconds": 30.0, "labels": {"name": session_id}}
    both[1].post("/sessions", {"session_id": f"{session_id}-l", "labels": {"name": session_id}})
    both[1].turn(f"{session_id}-l", [QUICK])
    with ThreadPoolExecutor(1) as pool:
        lease = pool.submit(both[0].post, "/feed/leases", body)
        time.sleep(0.2)
        both[1].post(f"/sessions/{session_id}-l/finish", {"reward": 1.0})
        [rollout] = lease.result()["rollouts"]
    assert rollout["session_id"] == f"{session_id}-l"


def test_killed_worker_takes_nothing_along_and_comes_back(start_gateway: StartGateway, tmp_path: Path) -> None:
    """I3, I4, I6: agents with their client's own retries notice nothing; each reply that they got is on disk, once."""
    gateway = start_gateway(tmp_path, "--workers", str(NUM_WORKERS))
    stopped = threading.Event()

    def agent(number: int) -> dict[str, list[str]]:
        sessions: dict[str, list[str]] = {}
        while not stopped.is_set():
            session_id = f"agent-{number}-{len(sessions)}"
            client = openai.OpenAI(base_url=f"{gateway.url}/sessions/{session_id}/v1", api_key="unused", max_retries=8)
            messages: list[Any] = []
            sessions[session_id] = []
            for _ in range(3):
                messages.append(SLOW)
                reply = client.chat.completions.create(model="m", messages=messages)
                text = str(reply.choices[0].message.content)
                sessions[session_id].append(text)
                messages.append({"role": "assistant", "content": text})
            client.close()
        return sessions

    with ThreadPoolExecutor(12) as pool:
        agents = [pool.submit(agent, number) for number in range(12)]
        killed = []
        for number in range(3):
            time.sleep(1.0)
            killed.append(workers(gateway)[number % NUM_WORKERS])  # the one that leads among them
            os.kill(killed[-1], signal.SIGKILL)
            until(lambda: len(set(workers(gateway)) - set(killed)) == NUM_WORKERS)
            with pair(gateway):  # both serve
                pass
        stopped.set()
        replies = {name: texts for each in agents for name, texts in each.result().items()}
    assert set(workers(gateway)).isdisjoint(killed)
    for session_id, texts in replies.items():
        turns = gateway.turns(session_id)
        answered = [turn for turn in turns if turn["finish"]["reason"] != "abort"]
        assert len(answered) == len(texts) == 3
        assert len(gateway.get(f"/sessions/{session_id}/segments")["segments"]) == 1
    with pair(gateway) as (one, other):
        one.post("/admin/generation/pause", {"mode": "drain"})  # somebody leads
        assert other.get("/admin/generation")["paused"] == "drain"
        other.post("/admin/generation/resume")
    assert gateway.stop() == 0
    connection = sqlite3.connect(tmp_path / "ledger.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_new_worker_knows_what_operators_changed_before_it(
    start_gateway: StartGateway, rules_file: Path, tmp_path: Path
) -> None:
    gateway = start_gateway(tmp_path, "--workers", str(NUM_WORKERS))
    gateway.post("/admin/engines", {"kind": "scripted", "url": str(rules_file), "engine_id": "added"})
    gateway.post("/admin/generation/pause", {"mode": "drain"})
    old = workers(gateway)
    for pid in old:  # both: nothing of it is left in any worker
        os.kill(pid, signal.SIGKILL)
    until(lambda: len(set(workers(gateway)) - set(old)) == NUM_WORKERS)
    with pair(gateway) as callers:
        for caller in callers:
            assert "added" in engine_ids(caller)
            assert caller.get("/admin/generation")["paused"] == "drain"
    assert gateway.stop() == 0


def test_killed_supervisor_leaves_nothing_in_the_way(start_gateway: StartGateway, tmp_path: Path) -> None:
    """Its workers end with it, as one process would; port and folder are free."""
    port = free_port()
    gateway = start_gateway(tmp_path, "--workers", str(NUM_WORKERS), port=port)
    with pair(gateway) as (one, _):
        one.turn("s", [QUICK])
    pids = workers(gateway)
    gateway.process.kill()
    gateway.process.wait()
    until(lambda: not any(is_alive(pid) for pid in pids))
    again = start_gateway(tmp_path, "--workers", str(NUM_WORKERS), port=port)
    assert len(again.turns("s")) == 1
    assert again.stop() == 0


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_a_worker_cannot_start_with_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    """As of one process: the same words, the same exit code, and no worker stays behind."""
    flags = ["--workers", "2", "--model", str(tiny_model), "--port", str(free_port())]
    with ExitStack() as stack:
        process = spawn([*flags, "--data", str(tmp_path / "data"), "--engine", "nonsense=http://127.0.0.1:1"])
        stack.callback(close, process)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 2
        assert [line for line in errors.splitlines() if line.startswith("verbatim: ")] == errors.splitlines()[-1:]
        assert "nonsense" in errors.splitlines()[-1]


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2)])
def test_gateways_of_any_number_of_workers_replace_each_other(
    tiny_model: Path, rules_file: Path, tmp_path: Path, before: int, after: int
) -> None:
    """I3: a reply that runs ends whole, connections live on, the session goes on at the new gateway."""
    flags = ["--model", str(tiny_model), "--data", str(tmp_path), "--port", str(free_port())]
    flags += ["--engine", f"scripted={rules_file}", "--replace"]

    def start(num_workers: int) -> RunningGateway:
        process = spawn([*flags, "--workers", str(num_workers)])
        stack.callback(close, process)
        return RunningGateway(process, wait_ready(process))

    with ExitStack() as stack:
        old = start(before)
        kept = [stack.enter_context(httpx.Client(base_url=old.url, timeout=60)) for _ in range(4)]
        for client in kept:
            client.get("/health").raise_for_status()
        old.post("/admin/generation/pause", {"mode": "drain"})
        with ThreadPoolExecutor(1) as pool:
            body = {"model": "m", "messages": [SLOW]}
            asked = pool.submit(kept[0].post, "/sessions/s/v1/chat/completions", json=body)
            until(lambda: old.get("/health")["turns_running"] == 1)
            new = start(after)
            assert old.process.poll() is None
            assert new.get("/admin/generation")["paused"] == "drain"
            new.post("/admin/generation/resume")
            text = asked.result().raise_for_status().json()["choices"][0]["message"]["content"]
        assert text == "one two three four five six"
        assert old.process.wait(30) == 0
        for client in kept:
            client.get("/health").raise_for_status()
        messages = [SLOW, {"role": "assistant", "content": text}, QUICK]
        new.client("s").chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
        assert len(new.get("/sessions/s/segments")["segments"]) == 1
        assert new.stop() == 0
