"""`verbatim serve --replace`: a new gateway process takes over under load, and what happens if either process fails."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import sqlite3
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from engines.launch import free_port
from gateway.client import SyncGatewayClient
from gateway.contracts.errors import VerbatimError
from tests.integration.gateway.conftest import RULES, RunningGateway, close, spawn, wait_ready

SLOW = {"role": "user", "content": "count slowly"}
FOR_LONG = {"role": "user", "content": "count for long"}  # longer than a gateway takes to start on a busy machine
FOR_AGES = {"role": "user", "content": "count for ages"}
VERY_SLOW = {"role": "user", "content": "count very slowly"}
QUICK = {"role": "user", "content": "quick"}
REQUEST = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Operator:
    """Starts gateways on one folder and one port."""

    def __init__(self, stack: ExitStack, model: Path, rules: Path, data: Path) -> None:
        self.data = data
        self.control = data / "control.sock"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._stack = stack
        self._flags = ["--model", str(model), "--data", str(data), "--port", str(self.port)]
        self._engine = ["--engine", f"scripted={rules}"]

    def spawn(self, *flags: str, engine: list[str] | None = None) -> subprocess.Popen[str]:
        process = spawn([*self._flags, *(self._engine if engine is None else engine), *flags])
        self._stack.callback(close, process)
        return process

    def start(self, *flags: str, engine: list[str] | None = None) -> RunningGateway:
        process = self.spawn(*flags, engine=engine)
        return RunningGateway(process, wait_ready(process))

    def replace(self, *flags: str, engine: list[str] | None = None) -> RunningGateway:
        return self.start("--replace", *flags, engine=engine)

    def pid(self) -> int:
        """Of the process that writes the ledger."""
        return int((self.data / "ledger.lock").read_text())


@pytest.fixture
def operator(tiny_model: Path, rules_file: Path, tmp_path: Path) -> Iterator[Operator]:
    with ExitStack() as stack:
        yield Operator(stack, tiny_model, rules_file, tmp_path)


NUM_AGENTS = 50
NUM_REPLACEMENTS = 3


class Load:
    """Agents of several turns, until told to stop; `failures` holds whatever went wrong, with no client retrying."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.failures: list[str] = []
        self.replies: dict[str, list[str]] = {}
        self.finished: list[str] = []
        self.acknowledged: list[str] = []
        self.num_probes = 0
        self.longest_connect = 0.0
        self._stopped = threading.Event()

    @contextmanager
    def running(self) -> Iterator[None]:
        work = [
            lambda: asyncio.run(self._agents()),
            self._raw_agent,
            self._raw_agent,
            self._probe,
            self._train,
        ]
        with ThreadPoolExecutor(len(work)) as pool:
            tasks = [pool.submit(each) for each in work]
            try:
                yield
            finally:
                self._stopped.set()
            for task in tasks:
                task.result()

    async def _agents(self) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(limits=limits, timeout=120) as http:
            await asyncio.gather(*(self._agent(http, f"agent-{i}", streams=i % 2 == 0) for i in range(NUM_AGENTS)))

    async def _agent(self, http: httpx.AsyncClient, name: str, *, streams: bool) -> None:
        """Sessions of four turns, one after the other."""
        for number in count():
            if self._stopped.is_set():
                return
            session_id = f"{name}-{number}"
            url = f"{self.url}/sessions/{session_id}/v1"
            client = openai.AsyncOpenAI(base_url=url, api_key="unused", max_retries=0, http_client=http)
            messages: list[Any] = []
            texts = self.replies[session_id] = []
            for _ in range(4):
                messages.append(SLOW)
                try:
                    text = await self._ask(client, messages, streams=streams)
                except (openai.OpenAIError, httpx.HTTPError, AssertionError) as error:
                    self.failures.append(f"{session_id} turn {len(texts)}: {error!r} {error.__cause__!r}")
                    return
                texts.append(text)
                messages.append({"role": "assistant", "content": text})
            await http.post(f"{self.url}/sessions/{session_id}/finish", json={"reward": 1.0})
            self.finished.append(session_id)

    async def _ask(self, client: openai.AsyncOpenAI, messages: list[Any], *, streams: bool) -> str:
        if not streams:
            reply = await client.chat.completions.create(model="m", messages=messages)
            assert reply.choices[0].finish_reason == "stop"
            return str(reply.choices[0].message.content)
        pieces, finish = [], None
        async with await client.chat.completions.create(model="m", messages=messages, stream=True) as stream:
            async for chunk in stream:
                pieces.append(chunk.choices[0].delta.content or "")
                finish = chunk.choices[0].finish_reason or finish
        assert finish == "stop"
        return "".join(pieces)

    def _train(self) -> None:
        """A consumer that waits for rollouts, and never asks twice."""
        with SyncGatewayClient(self.url, retry_seconds=0.0) as gateway:
            try:
                while not self._stopped.is_set():
                    lease = gateway.lease(consumer="trainer", limit=3, wait_seconds=2.0)
                    if lease is not None:
                        self.acknowledged += gateway.acknowledge(lease.lease_id)
            except (VerbatimError, httpx.HTTPError) as error:
                self.failures.append(f"trainer: {error!r}")

    def _raw_agent(self) -> None:
        """One connection for all requests, each as soon as the reply before it is read; never connects again."""
        connection = http.client.HTTPConnection("127.0.0.1", int(self.url.rpartition(":")[2]), timeout=120)
        connection.connect()
        connection.auto_open = 0
        try:
            while not self._stopped.is_set():
                connection.request("GET", "/health")
                reply = connection.getresponse()
                assert reply.status == 200
                reply.read()
        except (OSError, http.client.HTTPException, AssertionError) as error:
            self.failures.append(f"keep-alive: {error!r}")
        finally:
            connection.close()

    def _probe(self) -> None:
        """New connections every few milliseconds; each fourth asks something."""
        address = ("127.0.0.1", int(self.url.rpartition(":")[2]))
        while not self._stopped.wait(0.005):
            self.num_probes += 1
            begin = time.monotonic()
            try:
                with socket.create_connection(address, timeout=30) as probe:
                    self.longest_connect = max(self.longest_connect, time.monotonic() - begin)
                    if self.num_probes % 4 == 0:
                        probe.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                        assert probe.recv(12) == b"HTTP/1.1 200"
            except (OSError, AssertionError) as error:
                self.failures.append(f"probe: {error!r}")


def test_replacements_under_load_fail_no_request_and_refuse_no_connection(operator: Operator) -> None:
    """I3, I4: every agent gets every reply with retries off; each turn is recorded once, in one segment."""
    gateway, replaced = operator.start(), []
    load = Load(operator.url)
    with load.running():
        for _ in range(NUM_REPLACEMENTS):
            replaced.append(gateway)
            gateway = operator.replace()
            assert operator.pid() == gateway.process.pid
    assert not load.failures
    assert [old.process.wait(60) for old in replaced] == [0] * NUM_REPLACEMENTS
    assert load.num_probes > 100
    with SyncGatewayClient(operator.url) as client:
        while (lease := client.lease(consumer="trainer", limit=100)) is not None:
            load.acknowledged += client.acknowledge(lease.lease_id)
    assert sorted(load.acknowledged) == sorted(load.finished)
    assert len(load.finished) > NUM_AGENTS
    for session_id, texts in load.replies.items():
        check_session(gateway, session_id, texts)
    assert gateway.stop() == 0
    assert_intact(operator.data)


def check_session(gateway: RunningGateway, session_id: str, texts: list[str]) -> None:
    turns = gateway.turns(session_id)
    assert [turn["index"] for turn in turns] == list(range(len(texts)))
    assert all(turn["delivered_at"] is not None for turn in turns)
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    sampled = [token for turn in turns for token in turn["output_token_ids"]]
    trained = [
        token for token, is_trained in zip(segment["token_ids"], segment["loss_mask"], strict=True) if is_trained
    ]
    assert trained == sampled
    assert all(segment["routed_valid"])


def assert_intact(data: Path) -> None:
    connection = sqlite3.connect(data / "ledger.sqlite")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


def test_connections_that_idle_or_are_half_through_a_request_live_on(operator: Operator) -> None:
    """No client meets a closing connection: unused, used and begun ones are answered, wherever they end up."""
    old = operator.start()
    unused, used, begun = (socket.create_connection(("127.0.0.1", operator.port), timeout=60) for _ in range(3))
    used.sendall(REQUEST)
    assert_answered(used)
    begun.sendall(REQUEST[:20])
    new = operator.replace()
    for connection in (unused, used):
        connection.sendall(REQUEST)
        assert_answered(connection)
    assert old.process.poll() is None  # the third one is its own until the request has come
    begun.sendall(REQUEST[20:])
    assert_answered(begun)
    assert old.process.wait(30) == 0
    begun.sendall(REQUEST)
    assert_answered(begun)
    for connection in (unused, used, begun):
        connection.close()
    assert new.stop() == 0


def assert_answered(connection: socket.socket) -> None:
    reply = http.client.HTTPResponse(connection)
    reply.begin()
    assert reply.status == 200
    assert reply.read()
    assert not reply.will_close


def test_stream_that_runs_ends_whole_and_the_session_goes_on_in_one_segment(operator: Operator) -> None:
    """I3: the old process ends its replies; the next turn finds the record at the new one."""
    old = operator.start()
    with ask(old, "s", [FOR_LONG], stream=True) as reply:
        new = operator.replace()
        assert old.process.poll() is None
    assert reply.chunks[-1].choices[0].finish_reason == "stop"
    assert old.process.wait(30) == 0
    text = "".join(chunk.choices[0].delta.content or "" for chunk in reply.chunks)
    following = [FOR_LONG, {"role": "assistant", "content": text}, QUICK]
    new.client("s").chat.completions.create(model="m", messages=following)
    check_session(new, "s", [text, "the quick answer"])


def test_replace_without_a_gateway_simply_starts(operator: Operator) -> None:
    """Also where a gateway died and left its control socket behind."""
    first = operator.replace()
    first.client("s").chat.completions.create(model="m", messages=[QUICK])
    first.process.kill()
    first.process.wait()
    assert operator.control.exists()
    assert len(operator.replace().turns("s")) == 1


def test_pause_and_engines_of_operators_carry_over(operator: Operator, rules_file: Path) -> None:
    """A turn that waits in the old process goes on when the new one is told to resume."""
    old = operator.start()
    [engine] = old.get("/admin/engines")["engines"]
    old.post("/admin/engines", {"kind": "scripted", "url": str(rules_file), "engine_id": "added"})
    httpx.delete(f"{operator.url}/admin/engines/{engine['engine_id']}").raise_for_status()
    old.post("/admin/policy", {"policy_version": 7, "weight_version": "step-7"})
    old.post("/admin/generation/pause", {"mode": "drain"})
    with ask(old, "held", [QUICK]) as held:
        new = operator.replace()
        shown = new.get("/admin/engines")
        assert shown["paused"] == "drain"
        assert [engine["engine_id"] for engine in shown["engines"]] == ["added"]
        with ask(new, "later", [QUICK]) as later:
            time.sleep(0.3)
            assert not held.chunks
            assert not later.chunks
            new.post("/admin/generation/resume")
    assert [reply.chunks[0].choices[0].finish_reason for reply in (held, later)] == ["stop", "stop"]
    assert old.process.wait(30) == 0


def test_pause_waits_for_replies_that_the_old_process_still_ends(operator: Operator) -> None:
    old = operator.start()
    with ask(old, "s", [FOR_LONG], stream=True) as reply:
        new = operator.replace()
        assert not has_ended(reply)
        new.post("/admin/generation/pause", {"mode": "drain"})
        [turn] = new.turns("s")
        assert turn["finish"]["reason"] == "stop"
        new.post("/admin/generation/resume")
    assert old.process.wait(30) == 0


def test_reply_beyond_the_limit_is_cut_and_its_retry_goes_on_from_there(operator: Operator, tmp_path: Path) -> None:
    """I3: an honest error, the partial turn kept, and no token of it sampled again."""
    old = operator.start("--set", "replaced_drain_seconds=0.1")
    fast = tmp_path / "fast.json"
    fast.write_text(json.dumps([{**rule, "delay_seconds": 0.0} for rule in RULES]))
    with ask(old, "s", [FOR_AGES]) as reply:
        new = operator.replace(engine=["--engine", f"scripted={fast}"])
    assert isinstance(reply.error, openai.InternalServerError)
    assert "replaced" in str(reply.error)
    assert old.process.wait(30) == 0
    [partial] = new.turns("s")
    assert partial["finish"]["reason"] == "abort"
    whole = new.client("s").chat.completions.create(model="m", messages=[FOR_AGES], stream=False)
    assert whole.choices[0].message.content == "one two three four five six " * 9
    first, second = new.turns("s")
    assert len(first["output_token_ids"]) > 0
    assert second["attachment"]["continues"]


def test_sigterm_of_the_new_process_drains_the_old_one_too(operator: Operator) -> None:
    old = operator.start()
    with ask(old, "s", [FOR_LONG], stream=True) as reply:
        new = operator.replace()
        assert new.stop() == 0
        assert old.process.wait(30) == 0
    assert reply.chunks[-1].choices[0].finish_reason == "stop"


def test_sigterm_without_a_successor_ends_streams_and_refuses_what_comes_later(operator: Operator) -> None:
    gateway = operator.start()
    with ask(gateway, "s", [VERY_SLOW], stream=True) as reply:
        socket.create_connection(("127.0.0.1", operator.port), timeout=10).close()
        gateway.process.send_signal(signal.SIGTERM)
        assert gateway.process.wait(30) == 0
    assert reply.chunks[-1].choices[0].finish_reason == "stop"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", operator.port), timeout=10)


def test_hanging_gateway_is_named_and_nothing_is_taken(operator: Operator) -> None:
    gateway = operator.start()
    gateway.process.send_signal(signal.SIGSTOP)
    try:
        assert_fails(operator.spawn("--replace"), 1, f"process {gateway.process.pid}) hangs")
    finally:
        gateway.process.send_signal(signal.SIGCONT)
    assert_serves(gateway)


def test_refused_replacers_take_nothing(operator: Operator) -> None:
    """Another address, another version of the messages, a second one at once: one line each, and the old one serves."""
    gateway = operator.start()
    assert stat.S_IMODE(operator.control.stat().st_mode) == 0o600
    assert_fails(operator.spawn("--replace", "--port", str(operator.port + 1)), 2, "takes over the same address")
    with Replacer(operator.control) as replacer:
        answer = replacer.ask("hello", protocol=99, pid=os.getpid())
        assert answer["type"] == "refused"
        assert "version" in answer["reason"]
    with Replacer(operator.control) as first:
        first.begin()
        assert_fails(operator.spawn("--replace"), 1, f"is being replaced by process {os.getpid()}")
    assert_serves(gateway)


def test_replacer_that_dies_or_hangs_leaves_the_gateway_serving(operator: Operator) -> None:
    """Before, during and just after the hand-over; streams that run and connections that idle notice nothing."""
    gateway = operator.start()
    idle = http.client.HTTPConnection("127.0.0.1", operator.port, timeout=60)
    idle.connect()
    idle.auto_open = 0
    for words in ([], ["take"], ["take", "ready"]):
        with ask(gateway, f"s{len(words)}", [SLOW], stream=True) as reply:
            with Replacer(operator.control) as replacer:
                replacer.begin()
                answers = [replacer.ask(word)["type"] for word in words]
                assert answers == ["given", "leaving"][: len(words)]
            assert_serves(gateway)
        assert has_ended(reply)
        idle.request("GET", "/health")
        assert idle.getresponse().read()
    with ask(gateway, "s", [VERY_SLOW], stream=True) as reply:
        with Replacer(operator.control) as replacer:
            replacer.begin()
            replacer.ask("take")
            replacer.ask("ready")
            replacer.send("serving")
            assert replacer.receive()["type"] == "connections"  # `idle`, which dies with whom it was given to
        assert_serves(gateway)
    assert has_ended(reply)
    idle.close()
    with Replacer(operator.control) as replacer:
        replacer.begin()
        replacer.ask("take")
        replacer.ask("ready")
        assert replacer.receive()["type"] == "withdrawn"
        assert_serves(gateway)
    assert_serves(gateway)
    operator.replace()
    assert gateway.process.wait(30) == 0


def test_new_process_that_is_killed_under_load_gives_the_place_back(operator: Operator) -> None:
    """While the old process still ends a reply it stands in for a successor that dies."""
    old = operator.start("--set", "replaced_drain_seconds=8")
    with ask(old, "s", [FOR_AGES], stream=True) as reply:
        new = operator.replace()
        new.process.kill()
        new.process.wait()
        assert_serves(old)
        assert not has_ended(reply)
        operator.replace()
        assert old.process.wait(30) == 0
    assert isinstance(reply.error, openai.APIError)
    assert "replaced" in str(reply.error)


class Replacer:
    """A process that asks for the place of a gateway, message by message."""

    def __init__(self, control: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(60)
        folder = os.open(control.parent, os.O_RDONLY)
        self._socket.connect(f"/proc/self/fd/{folder}/{control.name}")
        os.close(folder)
        self._descriptors: list[int] = []

    def __enter__(self) -> Replacer:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        for descriptor in self._descriptors:
            os.close(descriptor)

    def begin(self) -> None:
        assert self.ask("hello", protocol=1, pid=os.getpid())["type"] == "state"

    def ask(self, kind: str, **fields: Any) -> dict[str, Any]:
        self.send(kind, **fields)
        return self.receive()

    def send(self, kind: str, **fields: Any) -> None:
        self._socket.send(json.dumps({"type": kind, **fields}).encode())

    def receive(self) -> dict[str, Any]:
        data, descriptors, _, _ = socket.recv_fds(self._socket, 2**17, 253)
        self._descriptors += descriptors
        return dict(json.loads(data))


class Asked:
    """A reply as far as it has come: its chunks (one, the whole, where it is not streamed), or the error."""

    def __init__(self) -> None:
        self.chunks: list[Any] = []
        self.error: Exception | None = None


@contextmanager
def ask(gateway: RunningGateway, session_id: str, messages: list[Any], *, stream: bool = False) -> Iterator[Asked]:
    """Ask from a thread, begin the body once the turn runs, and wait for its end afterwards."""
    asked = Asked()

    def work() -> None:
        try:
            with gateway.client(session_id) as client:
                reply = client.chat.completions.create(model="m", messages=messages, stream=stream)
                asked.chunks.extend(reply if stream else [reply])
        except openai.OpenAIError as error:
            asked.error = error

    thread = threading.Thread(target=work)
    running = gateway.get("/health")["turns_running"]
    thread.start()
    while gateway.get("/health")["turns_running"] == running:
        time.sleep(0.01)
    try:
        yield asked
    finally:
        thread.join(60)
    assert not thread.is_alive()


def has_ended(reply: Asked) -> bool:
    return bool(reply.chunks) and reply.chunks[-1].choices[0].finish_reason is not None


def assert_serves(gateway: RunningGateway) -> None:
    """On new connections, and with sampling."""
    session_id = f"check-{time.monotonic_ns()}"
    with gateway.client(session_id) as client:
        assert client.chat.completions.create(model="m", messages=[QUICK]).choices[0].finish_reason == "stop"
    assert gateway.process.poll() is None


def assert_fails(process: subprocess.Popen[str], exit_code: int, message: str) -> None:
    _, errors = process.communicate(timeout=60)
    assert process.returncode == exit_code, errors
    assert message in errors
    assert len(errors.strip().splitlines()) == 1
