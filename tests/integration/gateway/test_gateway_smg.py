"""Agents, gateway, a real smg router and workers behind it: nothing is dropped, and whatever dies, no agent notices."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from engines.echo import EchoServer
from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, close
from tests.integration.gateway.field_fuzz import (
    QUESTION,
    ROUTES,
    Route,
    check_sampling_fields,
    check_unknown_fields,
    serving_echo,
)
from tests.smg_router import RouterProcess, running_router
from tests.waiting import until

PROGRAM = Path(__file__).parent / "echo_worker.py"
REPLY = "It is 24, and I have counted it twice to be sure of it."
DELAY_SECONDS = 0.03
ENGINE_KEY = "engine-secret-9"
StartGateway = Callable[..., RunningGateway]


def reply_ids(tiny_model: Path) -> list[int]:
    """What every worker samples: one reply, token by token."""
    tokenizer = Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    return [*tokenizer.encode(REPLY, add_special_tokens=False).ids, tokenizer.token_to_id("<|im_end|>")]


@dataclass(frozen=True, slots=True)
class Worker:
    """One echo server as a process."""

    process: subprocess.Popen[bytes]
    url: str

    @property
    def seen(self) -> Any:
        return httpx.get(self.url + "/seen", timeout=10).json()

    @property
    def num_requests(self) -> int:
        return len(self.seen["requests"])

    def wait_ready(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            try:
                httpx.get(self.url + "/ping", timeout=5)
                return
            except httpx.TransportError:
                assert time.monotonic() < deadline, "the worker did not start"
                time.sleep(0.05)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_worker(token_ids: list[int]) -> Worker:
    port = free_port()
    command = [sys.executable, str(PROGRAM), str(port), str(DELAY_SECONDS), *map(str, token_ids)]
    worker = Worker(subprocess.Popen(command), f"http://127.0.0.1:{port}")
    worker.wait_ready()  # the router tries a worker that is not up again only after many seconds
    return worker


@dataclass(frozen=True, slots=True)
class Fleet:
    """A gateway whose one engine is a router with two workers."""

    gateway: RunningGateway
    router: RouterProcess
    workers: list[Worker]
    token_ids: list[int]

    def chat(self, session_id: str, **options: Any) -> Any:
        body = {"messages": [QUESTION], "return_token_ids": True}
        return self.gateway.post(f"/sessions/{session_id}/v1/chat/completions", body, **options)

    def whole_turn(self, session_id: str) -> Any:
        """The session's one turn, which must hold the reply with no token lost and none twice (I3)."""
        [turn] = self.gateway.turns(session_id)
        assert turn["output_token_ids"] == self.token_ids
        assert len(turn["output_logprobs"]) == len(self.token_ids)
        return turn


@pytest.fixture
def fleet(
    tiny_model: Path,
    start_gateway: StartGateway,
    tmp_path: Path,
) -> Iterator[Fleet]:
    token_ids = reply_ids(tiny_model)
    with ExitStack() as stack:
        workers = [start_worker(token_ids), start_worker(token_ids)]
        for worker in workers:
            stack.callback(worker.kill)
        router = stack.enter_context(running_router(*(worker.url for worker in workers)))
        gateway = start_gateway(tmp_path, engine=f"smg={router.url}")
        stack.callback(close, gateway.process)
        yield Fleet(gateway, router, workers, token_ids)


@dataclass(slots=True)
class Chat:
    """One reply that is asked for in another thread, and what came of it."""

    fleet: Fleet
    session_id: str
    text: str = ""
    finish_reason: str | None = None
    error: Exception | None = None

    def start(self) -> threading.Thread:
        thread = threading.Thread(target=self._run)
        thread.start()
        return thread

    def _run(self) -> None:
        url = f"{self.fleet.gateway.url}/sessions/{self.session_id}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json={"messages": [QUESTION], "stream": True}, timeout=60) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        [choice] = json.loads(line.removeprefix("data: "))["choices"]
                        self.text += choice["delta"].get("content") or ""
                        self.finish_reason = choice["finish_reason"] or self.finish_reason
        except Exception as error:  # noqa: BLE001 (shown by the test's own assertion)
            self.error = error

    def wait_begun(self) -> None:
        until(lambda: self.text)


def test_a_session_stays_at_one_worker(fleet: Fleet, session_id: str) -> None:
    for _ in range(4):
        fleet.chat(session_id)
    assert sorted(worker.num_requests for worker in fleet.workers) == [0, 4]
    [turn, *_] = fleet.gateway.turns(session_id)
    assert turn["output_token_ids"] == fleet.token_ids


def test_a_worker_killed_in_a_stream_is_not_noticed(fleet: Fleet, session_id: str) -> None:
    """I3: the reply goes on at the other worker, from the tokens that came."""
    chat = Chat(fleet, session_id)
    thread = chat.start()
    chat.wait_begun()
    [busy] = [worker for worker in fleet.workers if worker.num_requests]
    busy.kill()
    thread.join(60)
    assert (chat.text, chat.finish_reason, chat.error) == (REPLY, "stop", None)
    turn = fleet.whole_turn(session_id)
    [other] = [worker for worker in fleet.workers if worker is not busy]
    [continued] = other.seen["requests"]
    prompt = turn["prompt_token_ids"]
    begun = continued["input_ids"][len(prompt) :]
    assert begun == fleet.token_ids[: len(begun)]
    assert begun


def test_sessions_of_a_dead_worker_are_served_by_the_others(fleet: Fleet, session_id: str) -> None:
    """The router goes on hashing them to the dead one; the gateway does not, nor does it turn from the router."""
    fleet.workers[0].kill()
    for number in range(5):
        reply = fleet.chat(f"{session_id}-{number}")
        assert reply["choices"][0]["token_ids"] == fleet.token_ids
    [engine] = fleet.gateway.get("/admin/engines")["engines"]
    assert (engine["kind"], engine["healthy"], engine["failures"]) == ("smg", True, 0)


def test_a_router_killed_and_started_again_in_a_turn_is_not_noticed(fleet: Fleet, session_id: str) -> None:
    """I3: the agent sees one whole reply, the record one whole turn."""
    chat = Chat(fleet, session_id)
    thread = chat.start()
    chat.wait_begun()
    fleet.router.kill()
    time.sleep(0.5)
    fleet.router.start()
    thread.join(60)
    assert (chat.text, chat.finish_reason, chat.error) == (REPLY, "stop", None)
    fleet.whole_turn(session_id)
    # Consistent hashing remembers nothing: the session comes back to its worker, whose cache it has filled.
    assert sorted(worker.num_requests for worker in fleet.workers) == [0, 2]


def test_an_agent_that_goes_away_frees_the_worker(
    tiny_model: Path, start_gateway: StartGateway, tmp_path: Path, session_id: str
) -> None:
    """After the grace in which it may come back, both the connection and an abort reach the worker."""
    worker = start_worker(reply_ids(tiny_model) * 50)
    try:
        with running_router(worker.url) as router:
            gateway = start_gateway(tmp_path, "--set", "turns.disconnect_grace_seconds=0.2", engine=f"smg={router.url}")
            url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
            with httpx.stream("POST", url, json={"messages": [QUESTION], "stream": True}, timeout=30) as reply:
                next(reply.iter_lines())
            until(lambda: worker.seen["left"])
            seen = worker.seen
            assert seen["aborted"] == seen["left"] == [seen["requests"][0]["rid"]]
            close(gateway.process)
    finally:
        worker.kill()


@pytest.fixture(scope="module")
def echo(tiny_model: Path) -> Iterator[tuple[EchoServer, str]]:
    """An echo server behind a router: the server, and the router's address."""
    with serving_echo(tiny_model) as (server, worker_url), running_router(worker_url) as router:
        yield server, router.url


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ledger")


@pytest.fixture(scope="module")
def gateway_url(echo: tuple[EchoServer, str], start_gateway: StartGateway, ledger: Path) -> str:
    gateway = start_gateway(ledger, engine=f"smg={echo[1]}", environment={"VERBATIM_ENGINE_KEY": ENGINE_KEY})
    return gateway.url


@pytest.fixture
def url(gateway_url: str) -> str:
    return f"{gateway_url}/sessions/fields"


@pytest.mark.parametrize("route", ROUTES, ids=str)
def test_unknown_fields_pass_through_the_router_and_come_back_equal(
    route: Route, echo: tuple[EchoServer, str], gateway_url: str
) -> None:
    """I8: the same round trip as without a router, at every endpoint, streamed and not."""
    check_unknown_fields(gateway_url, echo[0].requests, route)


@pytest.mark.parametrize("route", [r for r in ROUTES if r.session == "path"], ids=str)
def test_sampling_fields_pass_through_the_router(route: Route, echo: tuple[EchoServer, str], gateway_url: str) -> None:
    """I8: what a router outside verbatim mode drops without a word."""
    check_sampling_fields(gateway_url, echo[0].requests, route)


def test_engines_get_their_key_and_nothing_of_the_agents_headers(
    echo: tuple[EchoServer, str], url: str, ledger: Path
) -> None:
    """The key is in no record; the session's id, percent-encoded, is all that says whose request it is."""
    agents = {"Authorization": "Bearer agent", "Cookie": "a=b", "X-Request-Id": "mine", "X-SMG-Routing-Key": "forged"}
    reply = httpx.post(f"{url}/v1/chat/completions", json={"messages": [QUESTION]}, headers=agents, timeout=30)
    assert reply.status_code == 200
    headers = {name.lower(): value for name, value in echo[0].headers[-1].items()}
    assert headers["authorization"] == f"Bearer {ENGINE_KEY}"
    assert headers["x-smg-routing-key"] == "fields"
    assert "cookie" not in headers
    assert "mine" not in headers.values()
    assert ENGINE_KEY not in reply.text + str(reply.headers)
    assert not [file for file in ledger.rglob("*") if file.is_file() and ENGINE_KEY.encode() in file.read_bytes()]
