"""What a turn takes in Python at least: a straight line from socket to socket, to measure a gateway against.

    request ─▶ what is new of it ─▶ template's texts around it ─▶ ids ─▶ engine ─▶ text, call ─▶ row, fsync ─▶ reply

It does what every turn of a token-exact gateway must: reads HTTP and JSON, spells only what is new, samples by ids with
log-probs, parses the call, and has the turn on disk before the reply leaves (group commit, as in the ledger). It is no
gateway: no retry, fork, key, stream, other dialect or engine, no metrics, and nothing that arrives otherwise than from
the load generator is understood. What `verbatim serve` takes more is the price of all that.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import queue
import secrets
import sqlite3
import threading
import time
import traceback
import zlib
from pathlib import Path
from typing import Any, NamedTuple, cast

import httptools
import msgspec
import numpy as np
import orjson
import uvloop

from gateway.tito.backends import BackendChoice
from gateway.tito.conversation import Conversation
from gateway.tito.template import ChatTemplate
from gateway.tito.tokenizer import ChatTokenizer

_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_ASK = b"POST /generate HTTP/1.1\r\nHost: %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_WANTED = (
    b'{"rid":"%b","input_ids":[%b],"sampling_params":{"max_new_tokens":4096,"temperature":1.0,"stream_interval":128},'
    b'"return_logprob":true,"stream":true}'
)
_REPLY = (
    b'{"id":"chatcmpl-%b","created":%d,"model":"floor","object":"chat.completion","choices":[{"index":0,"message":%b,'
    b'"logprobs":null,"finish_reason":"%b"}],"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
)
_TABLE = (
    "create table turns (turn_id text primary key, session_id text, parent_id text, number int, messages blob,"
    " prompt_ids blob, output_ids blob, logprobs blob, meta blob, checksum int) without rowid"
)
_INSERT = "insert into turns values (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REPLY_TEXT, _RESULT_TEXT = "stands-for-a-reply", "stands-for-a-result"
_OPENS, _CLOSES = b"<tool_call>", b"</tool_call>"

Row = tuple[Any, ...]
_values = msgspec.json.Decoder().decode


class _Meta(msgspec.Struct):
    prompt_tokens: int
    weight_version: str
    cached_tokens: int
    output_token_logprobs: list[tuple[float, int, None]]


class _Event(msgspec.Struct):
    output_ids: list[int]
    meta_info: _Meta


class _First(msgspec.Struct):
    messages: list[msgspec.Raw]
    tools: list[dict[str, Any]] = []


_event = msgspec.json.Decoder(_Event).decode
_first = msgspec.json.Decoder(_First).decode


class Store:
    """One thread writes what one turn of the event loop gathered, and commits it with an fsync."""

    def __init__(self, file: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._gathered: list[tuple[Row, asyncio.Future[None]]] = []
        self._queue: queue.SimpleQueue[list[tuple[Row, asyncio.Future[None]]]] = queue.SimpleQueue()
        self._connection = sqlite3.connect(file, check_same_thread=False, isolation_level=None)
        for pragma in ("page_size=8192", "journal_mode=wal", "synchronous=full"):
            self._connection.execute(f"pragma {pragma}")
        self._connection.execute(_TABLE)
        threading.Thread(target=self._run, daemon=True).start()

    def append(self, row: Row) -> asyncio.Future[None]:
        """Done when it is durable."""
        done = self._loop.create_future()
        if not self._gathered:
            self._loop.call_soon(self._hand_over)
        self._gathered.append((row, done))
        return done

    def _hand_over(self) -> None:
        gathered, self._gathered = self._gathered, []
        self._queue.put(gathered)

    def _run(self) -> None:
        while True:
            batch = self._queue.get()
            while not self._queue.empty():
                batch += self._queue.get()
            self._connection.execute("begin immediate")
            self._connection.executemany(_INSERT, [row for row, _ in batch])
            self._connection.execute("commit")
            self._loop.call_soon_threadsafe(_tell, [done for _, done in batch])


def _tell(waiting: list[asyncio.Future[None]]) -> None:
    for done in waiting:
        done.set_result(None)


class Engine:
    """Connections to the engine, each for one answer at a time."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self.idle: list[Answer] = []

    async def answer(self, body: bytes) -> bytes:
        """The whole body of the answer."""
        if self.idle:
            answer = self.idle.pop()
        else:
            loop = asyncio.get_running_loop()
            _, answer = await loop.create_connection(lambda: Answer(self), self._host, self._port)
        return await answer.to(_ASK % (self._host.encode(), len(body)) + body)


class Answer(asyncio.Protocol):
    """One connection, and the answer that it reads."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def to(self, request: bytes) -> asyncio.Future[bytes]:
        """Ask."""
        self._parser = httptools.HttpResponseParser(self)
        self._pieces: list[bytes] = []
        self._whole: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return self._whole

    def data_received(self, data: bytes) -> None:
        """Bytes of the answer."""
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        """A piece of it."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """All of it."""
        self._engine.idle.append(self)
        self._whole.set_result(b"".join(self._pieces))


class Model:
    """Texts to ids and ids to text. Raises ValueError for a template that this program does not do for."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer, self._template = ChatTokenizer.load(folder), ChatTemplate.load(folder)
        self._tokenizer.prove_backend(BackendChoice.AUTO)
        self._around = {role: self._texts_around(role) for role in ("tool", "user")}

    def _texts_around(self, role: str) -> tuple[str, str]:
        """What the template writes behind a sampled stop token up to a message's text, and behind that."""
        told = ({"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY_TEXT})
        rendered = self._template.render(Conversation((*told, {"role": role, "content": _RESULT_TEXT})))
        between, found, behind = rendered.partition(_REPLY_TEXT)[2].partition(_RESULT_TEXT)
        stops = [self._tokenizer.token_text(token_id) for token_id in self._tokenizer.eos_token_ids]
        stop = next((stop for stop in stops if between.startswith(stop)), None)
        if stop is None or not found:
            raise ValueError(f"the template does not show a {role}'s message behind a stop token")
        return between.removeprefix(stop), behind

    def first_ids(self, request: _First) -> list[int]:
        """Of a whole prompt."""
        messages = tuple(_values(message) for message in request.messages)
        return self._ids(self._template.render(Conversation(messages, tuple(request.tools))))

    def next_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """Of what a turn adds: one message behind the reply."""
        (message,) = messages
        before, behind = self._around[message["role"]]
        return self._ids(before + message["content"] + behind)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).tolist()
        return ids

    def text(self, token_ids: list[int]) -> bytes:
        """Of sampled ids, control tokens as they are spelled."""
        known = self._tokenizer.bytes_by_id
        return b"".join([known[token_id] or b"" for token_id in token_ids])


class Session(NamedTuple):
    """What the next turn of a conversation needs. known: its body begins so; ids: of the prompt and the reply, as
    JSON; tail: what follows a body's messages."""

    known: bytes
    tail: bytes
    ids: bytes
    parent_id: str
    number: int


class Line:
    """All sessions."""

    def __init__(self, model: Model, engine: Engine, store: Store) -> None:
        self._model, self._engine, self._store = model, engine, store
        self._sessions: dict[str, Session] = {}

    async def turn(self, session_id: str, body: bytes) -> bytes:
        """A reply, which is on disk."""
        before = self._sessions.get(session_id)
        if before is not None and body.startswith(before.known):
            start, tail = len(before.known) + 1, before.tail
            stop = body.index(tail, start)
            added = self._model.next_ids(_values(b"[%b]" % body[start:stop]))
            ids = before.ids + b"," + _numbers(added)
        else:
            before, request = None, _first(body)
            start = body.index(b'"messages":[') + len(b'"messages":[')
            last = bytes(request.messages[-1])
            stop = body.index(last, start) + len(last)
            tail, added = body[stop:], self._model.first_ids(request)
            ids = _numbers(added)
        answer = await self._engine.answer(_WANTED % (secrets.token_hex(16).encode(), ids))
        event = _event(answer.rstrip().removesuffix(b"data: [DONE]").rstrip().rpartition(b"\n\n")[2][len(b"data: ") :])
        sampled, meta = event.output_ids, event.meta_info
        if [token_id for _, token_id, _ in meta.output_token_logprobs] != sampled:
            raise ValueError("log-probs of other tokens")
        message, is_call = self._message(sampled)
        turn_id = "turn-" + secrets.token_hex(12)
        facts = orjson.dumps({"version": meta.weight_version, "cached": meta.cached_tokens, "created": time.time()})
        prompt_ids, output_ids = np.array(added, np.int32).tobytes(), np.array(sampled, np.int32).tobytes()
        logprobs = np.array([value for value, _, _ in meta.output_token_logprobs], np.float32).tobytes()
        checksum = zlib.crc32(facts, zlib.crc32(logprobs, zlib.crc32(output_ids, zlib.crc32(prompt_ids))))
        parent_id, number = (None, 0) if before is None else (before.parent_id, before.number)
        row = (turn_id, session_id, parent_id, number, body[start:stop], prompt_ids, output_ids, logprobs, facts)
        await self._store.append((*row, checksum))
        known = body[:stop] + b"," + message
        self._sessions[session_id] = Session(known, tail, ids + b"," + _numbers(sampled), turn_id, number + 1)
        size, length = meta.prompt_tokens, len(sampled)
        reason = b"tool_calls" if is_call else b"stop"
        return _REPLY % (turn_id.encode(), int(time.time()), message, reason, size, length, size + length)

    def _message(self, token_ids: list[int]) -> tuple[bytes, bool]:
        text, _, call = self._model.text(token_ids[:-1]).partition(_OPENS)
        message: dict[str, Any] = {"role": "assistant", "content": text.decode("utf-8", "replace").strip() or None}
        if call:
            told = _values(call.partition(_CLOSES)[0])
            function = {"name": told["name"], "arguments": json.dumps(told["arguments"])}
            called = {"id": "call_" + secrets.token_hex(16), "type": "function", "function": function}
            message["tool_calls"] = [called]
        return orjson.dumps(message | {"refusal": None}), bool(call)


def _numbers(ids: list[int]) -> bytes:
    return orjson.dumps(ids)[1:-1]


class Agent(asyncio.Protocol):
    """One connection of the load generator."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._parser = httptools.HttpRequestParser(self)
        self._path, self._pieces = b"", list[bytes]()
        self._tasks = set[asyncio.Task[None]]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Connected."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        self._parser.feed_data(data)

    def on_url(self, path: bytes) -> None:
        """Where it goes."""
        self._path = path

    def on_body(self, body: bytes) -> None:
        """A piece of it."""
        self._pieces.append(body)

    def on_message_complete(self) -> None:
        """All of it."""
        body, self._pieces = b"".join(self._pieces), []
        task = asyncio.get_running_loop().create_task(self._reply(self._path.decode(), body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reply(self, path: str, body: bytes) -> None:
        try:
            reply = b"{}" if path == "/ready" else await self._line.turn(path.split("/")[2], body)
            self._transport.write(_HEAD % len(reply) + reply)
        except Exception:  # noqa: BLE001  # whatever it is, the load generator counts a failed turn
            traceback.print_exc()
            self._transport.close()


async def _serve(arguments: argparse.Namespace) -> None:
    host, _, port = arguments.engine.removeprefix("http://").partition(":")
    arguments.data.mkdir(parents=True, exist_ok=True)
    loop = asyncio.get_running_loop()
    line = Line(Model(arguments.model), Engine(host, int(port)), Store(arguments.data / "floor.sqlite", loop))
    gc.freeze()
    gc.set_threshold(20_000, 1_000, 1_000)
    server = await loop.create_server(lambda: Agent(line), "127.0.0.1", arguments.port)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", required=True, help="http://host:port of the fake engine")
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--port", required=True, type=int)
    uvloop.run(_serve(parser.parse_args()))
