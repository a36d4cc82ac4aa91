"""How soon new tokens are told: at once to who is shown them, else several together; what came counts either way."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from engines.launch import free_port
from engines.sglang import SglangEngine
from gateway.contracts.errors import EngineRejected, EngineUnavailable
from gateway.contracts.generation import GenerateChunk, GenerateEnd, GenerateRequest, Pace, SamplingParams
from tests.waiting import until_async

PROMPT = np.array([1, 2, 3], dtype=np.int32)
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(number: int, *, last: bool = False) -> bytes:
    """The chunk of an event with all of the tokens 1 to `number`, one of them new."""
    meta = {
        "id": "r",
        "finish_reason": {"type": "length"} if last else None,
        "prompt_tokens": len(PROMPT),
        "completion_tokens": number,
        "weight_version": "3",
        "output_token_logprobs": [[-0.5, i + 1, None] for i in range(number)],
    }
    said = {"text": 'so "finish_reason":null\n\n', "output_ids": [i + 1 for i in range(number)], "meta_info": meta}
    body = b"data: %s\n\n" % json.dumps(said, separators=(",", ":")).encode()
    return b"%x\r\n%s\r\n" % (len(body), body)


class Streaming:
    """An engine of one connection at a time, which sends what the test has it send."""

    def __init__(self, head: bytes = HEAD) -> None:
        self.asked = asyncio.Event()
        self._head = head
        self.aborted = asyncio.Event()
        self._writer: asyncio.StreamWriter | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        head = await reader.readuntil(b"\r\n\r\n")
        if b"/abort_request" in head:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            self.aborted.set()
            return
        writer.write(self._head)
        self._writer = writer
        self.asked.set()

    async def send(self, *pieces: bytes) -> None:
        assert self._writer is not None
        for piece in pieces:
            self._writer.write(piece)
            await self._writer.drain()
            await asyncio.sleep(0.005)

    async def aclose(self) -> None:
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0)

    def break_off(self) -> None:
        assert self._writer is not None
        self._writer.transport.abort()


@asynccontextmanager
async def engine(
    pace: Pace, *, head: bytes = HEAD
) -> AsyncIterator[tuple[Streaming, list[list[int]], asyncio.Task[GenerateEnd | None]]]:
    """A stream under way: who sends it, the chunks that came of it, and the task that reads it."""
    port, streaming = free_port(), Streaming(head)
    client = SglangEngine(
        f"http://127.0.0.1:{port}",
        engine_id="e0",
        routing=None,
        policy_version_of=int,
        stall_timeout_seconds=0.0,
    )
    request = GenerateRequest("r", PROMPT, SamplingParams(max_new_tokens=99), pace=pace)
    heard: list[list[int]] = []

    async def read() -> GenerateEnd | None:
        end = None
        async for item in client.generate(request):
            if isinstance(item, GenerateChunk):
                heard.append(item.token_ids.tolist())
            else:
                end = item
        return end

    server = await asyncio.start_server(streaming.serve, "127.0.0.1", port)
    reading = asyncio.create_task(read())
    try:
        await asyncio.wait_for(streaming.asked.wait(), 5)
        yield streaming, heard, reading
    finally:
        reading.cancel()
        await asyncio.wait([reading])
        server.close()
        await streaming.aclose()
        await client.aclose()


async def until_last(heard: list[list[int]], token_id: int) -> None:
    """Until this is the last token that was heard."""
    await until_async(lambda: bool(heard) and heard[-1][-1] == token_id)


async def test_who_is_shown_tokens_hears_each_event() -> None:
    async with engine(Pace(is_live=True)) as (streaming, heard, _):
        for number in range(1, 5):
            await streaming.send(event(number))
            await until_last(heard, number)
        assert heard == [[1], [2], [3], [4]]


async def test_what_comes_before_the_end_is_heard_with_it() -> None:
    """When the first token came is noted; who waits for the end hears it at once."""
    pace = Pace(is_live=False)
    async with engine(pace) as (streaming, heard, reading):
        began = time.monotonic()
        await streaming.send(event(1))
        await until_async(lambda: pace.first_at is not None)
        first_at = pace.first_at
        await streaming.send(*map(event, range(2, 20)))
        await asyncio.sleep(0.02)
        assert heard == []
        await streaming.send(event(20, last=True))
        end = await asyncio.wait_for(reading, 0.15)  # sooner than what waits would be given, and without [DONE]
        assert end is not None
        assert end.completion_tokens == 20
        assert [token for chunk in heard for token in chunk] == list(range(1, 21))
        assert len(heard) <= 2
        assert pace.first_at == first_at
        assert first_at is not None
        assert began - 0.01 < first_at <= time.monotonic()


async def test_a_refusal_is_heard_at_once() -> None:
    refusal = HEAD.replace(b"200 OK", b"400 Bad Request")
    async with engine(Pace(is_live=False), head=refusal) as (streaming, heard, reading):
        await streaming.send(b"2\r\nno\r\n0\r\n\r\n")
        with pytest.raises(EngineRejected, match="no"):
            await asyncio.wait_for(reading, 2)
        assert heard == []


async def test_what_waits_is_given_after_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of a turn that takes minutes are not kept unread: their memory is bounded, and they are parsed."""
    monkeypatch.setattr("engines.http1._GATHER_SECONDS", 0.2)
    async with engine(Pace(is_live=False)) as (streaming, heard, _):
        await streaming.send(event(1), event(2), event(3))
        await until_async(lambda: sum(map(len, heard)) == 3)


async def test_who_comes_later_hears_each_event_from_then_on() -> None:
    pace = Pace(is_live=False)
    async with engine(pace) as (streaming, heard, _):
        await streaming.send(event(1), event(2))
        await until_async(lambda: pace.first_at is not None)
        assert heard == []
        pace.quicken()
        await until_async(lambda: heard == [[1, 2]])
        for number in range(3, 6):
            await streaming.send(event(number))
            await until_last(heard, number)
        assert heard == [[1, 2], [3], [4], [5]]


async def test_much_that_waits_is_read_at_once() -> None:
    """Flow control as ever: what nobody reads is bounded."""
    async with engine(Pace(is_live=False)) as (streaming, heard, _):
        await streaming.send(event(1))
        await asyncio.sleep(0.02)
        assert heard == []
        await streaming.send(event(4000))
        await until_async(lambda: sum(map(len, heard)) == 4000)


async def test_what_came_counts_where_the_turn_is_cut() -> None:
    """I3: it was sampled, and had arrived; whether its head was looked at yet or not."""
    pace = Pace(is_live=False)
    async with engine(pace) as (streaming, heard, reading):
        await streaming.send(*map(event, range(1, 6)))
        await until_async(lambda: pace.first_at is not None)
        await asyncio.sleep(0.01)
        assert heard == []
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        assert heard == [[1, 2, 3, 4, 5]]
        await asyncio.wait_for(streaming.aborted.wait(), 5)


async def test_what_came_counts_where_the_engine_breaks_off() -> None:
    """I3, I5."""
    async with engine(Pace(is_live=False)) as (streaming, heard, reading):
        await streaming.send(*map(event, range(1, 6)))
        await asyncio.sleep(0.02)
        streaming.break_off()
        with pytest.raises(EngineUnavailable):
            await asyncio.wait_for(reading, 0.15)
        assert [token for chunk in heard for token in chunk] == [1, 2, 3, 4, 5]
