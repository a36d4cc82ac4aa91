"""The benchmarks' compiled load generator: it counts what the engine saw, and replays what it read."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from benchmarks.load.programs import FakeEngine, Generator, play, running_engine
from benchmarks.load.script import Model, Workload, replies, write_conversation, write_script
from tests.waiting import until

TURNS = 4
WORKLOAD = Workload(turns=TURNS, message_bytes=200)
PATH = ("--path", "/v1/chat/completions", "--turns", str(TURNS))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model.made(tmp_path_factory.mktemp("load-model"))


@contextmanager
def engine_of(model: Model, *flags: str) -> Iterator[FakeEngine]:
    with running_engine(write_script(model.folder.parent / "script", model, WORKLOAD), *flags) as engine:
        yield engine


def conversation_of(model: Model, *, stream: bool = False, workload: Workload = WORKLOAD) -> Path:
    file = model.folder.parent / f"conversation-{stream}-{workload.tools}"
    return write_conversation(file, model, workload, served_name="fake", stream=stream)


@pytest.mark.parametrize("stream", [False, True])
def test_turns_are_counted_as_the_engine_saw_them(model: Model, stream: bool) -> None:
    flags = ["--stream"] if stream else []
    with engine_of(model, "--delay-ms", "30") as engine:
        played = play(
            conversation_of(model, stream=stream),
            engine.port,
            *(*PATH, "--tools", "--sessions", "7", "--conversations", "20", *flags),
        )
        seen = engine.statistics()
    assert (played.account["turns"], played.account["errors"]) == (20 * TURNS, 0)
    assert (played.account["finished"], played.account["abandoned"]) == (20, 0)
    assert seen["requests"] == seen["chats"] == len(played.records) == 20 * TURNS
    assert (seen["peak_connections"], seen["peak_in_flight"]) == (7, 7)
    assert Counter(played.records["turn"].tolist()) == dict.fromkeys(range(1, TURNS + 1), 20)
    assert (played.records["status"] == 200).all()
    assert (played.records["latency"] >= 0.030).all()
    assert (played.records["first_byte"] <= played.records["latency"]).all()
    assert (played.records["start"] + played.records["latency"] <= played.account["seconds"]).all()


@pytest.mark.parametrize("stream", [False, True])
def test_the_history_grows_by_what_was_said_and_what_the_tool_answered(
    model: Model, tmp_path: Path, stream: bool
) -> None:
    with engine_of(model) as engine:
        flags = ["--stream"] if stream else []
        play(
            conversation_of(model, stream=stream),
            engine.port,
            *(*PATH, "--tools", "--sessions", "1", "--conversations", "3", "--dump", str(tmp_path / "body"), *flags),
        )
    body = json.loads((tmp_path / "body").read_bytes())
    system, user, *rest = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "Question 00000002" in user["content"]
    assert body["tools"][0]["function"]["name"] == "calculator"
    assert len(rest) == 2 * (TURNS - 1)
    ids = set()
    for reply, said, result in zip(replies(model, WORKLOAD), rest[::2], rest[1::2], strict=False):
        (call,) = said["tool_calls"]
        assert (said["role"], said["content"]) == ("assistant", reply.text or None)
        assert json.loads(call["function"]["arguments"]) == reply.calls[0].arguments
        assert (result["role"], result["tool_call_id"]) == ("tool", call["id"])
        assert len(result["content"].encode()) == 200
        ids.add(call["id"])
    assert len(ids) == TURNS - 1


def test_without_tools_the_user_goes_on(model: Model, tmp_path: Path) -> None:
    workload = Workload(turns=3, tools=False)
    script = write_script(tmp_path / "script", model, workload)
    with running_engine(script) as engine:
        flags = ("--path", "/v1/chat/completions", "--turns", "3", "--dump", str(tmp_path / "body"))
        played = play(
            conversation_of(model, workload=workload), engine.port, *flags, "--sessions", "1", "--conversations", "1"
        )
    assert played.account["errors"] == 0
    body = json.loads((tmp_path / "body").read_bytes())
    assert [message["role"] for message in body["messages"]][2:] == ["assistant", "user", "assistant", "user"]
    assert "tools" not in body


def test_refused_turns_are_errors_and_end_their_conversation(model: Model, capfd: pytest.CaptureFixture[str]) -> None:
    with engine_of(model) as engine:
        flags = ("--path", "/nowhere/{id}", "--turns", "3", "--sessions", "2", "--conversations", "5")
        played = play(conversation_of(model), engine.port, *flags)
    assert (played.account["errors"], played.account["abandoned"], played.account["finished"]) == (5, 5, 0)
    assert set(played.records["status"].tolist()) == {404}
    assert "HTTP 404" in capfd.readouterr().err


def test_a_reply_without_the_call_that_is_due_is_an_error(model: Model) -> None:
    """A gateway whose parser misses calls must not look fast."""
    with engine_of(model) as engine:
        flags = ("--path", "/v1/chat/completions", "--turns", str(TURNS + 1), "--sessions", "1", "--conversations", "2")
        played = play(conversation_of(model), engine.port, *flags, "--tools")
    assert played.account["errors"] == 2
    assert Counter(played.records["status"].tolist()) == {200: 2 * (TURNS - 1), -1: 2}


def test_turns_of_an_engine_that_dies_are_broken(model: Model) -> None:
    with engine_of(model, "--delay-ms", "60000") as engine:
        flags = (*PATH, "--tools", "--sessions", "3", "--conversations", "3")
        generator = Generator(conversation_of(model), engine.port, *flags)
        with closing(generator):
            until(lambda: engine.statistics()["in_flight"] >= 3)
            engine.process.kill()
            played = generator.result(timeout_seconds=20)
    assert played.account["errors"] == 3
    assert played.records["status"].tolist() == [0, 0, 0]


def test_open_loop_conversations_come_at_their_rate_however_slow_replies_are(model: Model) -> None:
    """Latency counts from when a conversation was due: two sessions cannot hide that twenty want to begin."""
    with engine_of(model, "--delay-ms", "20") as engine:
        flags = (*PATH, "--tools", "--sessions", "2", "--conversations", "20", "--rate", "1000")
        played = play(conversation_of(model), engine.port, *flags)
    first = played.records[played.records["turn"] == 1]
    later = played.records[played.records["turn"] == 2]
    assert len(first) == 20
    assert first["latency"].max() > 0.5 * 9 * TURNS * 0.020  # nine others played before it
    assert later["latency"].max() < first["latency"].max()


def test_conversations_wait_where_they_are_told_to(model: Model) -> None:
    with engine_of(model) as engine:
        flags = (*PATH, "--tools", "--sessions", "3", "--conversations", "3", "--wait-after", "1")
        with closing(Generator(conversation_of(model), engine.port, *flags)) as generator:
            generator.wait_until_waiting()
            assert engine.statistics()["requests"] == 3
            generator.go_on()
            played = generator.result(timeout_seconds=20)
    assert played.account["turns"] == 3 * TURNS


def test_an_engine_takes_the_time_that_the_limit_of_tokens_says(model: Model) -> None:
    with engine_of(model, "--ms-per-max-token", "0.5") as engine:
        flags = (*PATH, "--tools", "--sessions", "8", "--conversations", "8", "--max-tokens", "40-80")
        played = play(conversation_of(model), engine.port, *flags)
    asked = played.records["max_tokens"]
    assert asked.min() >= 40
    assert asked.max() <= 80
    assert len(set(asked.tolist())) > 3
    assert (played.records["latency"] >= asked * 0.0005).all()


def test_replies_are_read_however_they_are_cut_and_framed(model: Model, tmp_path: Path) -> None:
    """Chunked or with a length, in pieces cut anywhere, with strings that look like the end of something."""
    nasty = {
        "role": "assistant",
        "content": 'she said \\"}]\\" {[ \\\\ é \u2028 "tool_calls":[{"id":"no"}]',
        "refusal": None,
        "extra": {"a": [1, {"b": "]}"}], "c": -1.5e3},
    }
    conversation = conversation_of(model, workload=Workload(turns=30, tools=False))
    with _CuttingServer(nasty, seed=7) as server:
        flags = ("--path", "/x", "--turns", "30", "--sessions", "1", "--conversations", "1")
        played = play(conversation, server.port, *flags, "--dump", str(tmp_path / "body"))
    assert played.account["errors"] == 0
    assert server.bodies[-1] == (tmp_path / "body").read_bytes()
    body = json.loads(server.bodies[-1])
    said = [message for message in body["messages"] if message["role"] == "assistant"]
    assert said == [nasty] * 29


class _CuttingServer:
    """Answers every request with one message, each time framed and cut differently."""

    def __init__(self, message: dict[str, Any], *, seed: int) -> None:
        self._choices = random.Random(seed)
        self._message = message
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self.port = self._listener.getsockname()[1]
        self.bodies: list[bytes] = []

    def __enter__(self) -> _CuttingServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rb") as requests:
            while requests.readline():
                length = 0
                while (line := requests.readline()) != b"\r\n":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.partition(b":")[2])
                self.bodies.append(requests.read(length))
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        reply = {"id": 'x"}', "choices": [{"index": 0, "message": self._message, "finish_reason": "stop"}], "usage": {}}
        indent = self._choices.choice([None, 2])
        body = json.dumps(reply, indent=indent, ensure_ascii=self._choices.random() < 0.5).encode()
        if self._choices.random() < 0.5:
            head = b"HTTP/1.1 200 OK\r\ncontent-length:%d\r\n\r\n" % len(body)
        else:
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: b\r\n\r\n"
            cuts = [0, *sorted(self._choices.sample(range(1, len(body)), 3)), len(body)]
            parts = [body[start:stop] for start, stop in pairwise(cuts)]
            body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
        answer = head + body
        at = 0
        while at < len(answer):
            step = self._choices.choice([1, 2, 3, 17, 400])
            connection.sendall(answer[at : at + step])
            at += step
