"""An engine that answers at once: SGLang's `/generate`, its replies made beforehand, sent as fast as they are taken.

Started as a process of its own (`python -m benchmarks.routing.engine PORT ROWS`), so that none of its work is counted
as the gateway's. Each request's ids say what it is about: a prompt of one token is a small turn, any other gets rows
from `routed_experts_start_len` on. As uvicorn does it, an event is one HTTP chunk, whatever its size.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import sys
from typing import Any

import numpy as np

from benchmarks.routing.workload import SHAPE, routing_blocks

_WRITE_BYTES = 2**20
_ROW_BYTES = 4 * SHAPE.num_layers * SHAPE.top_k


class Replies:
    """Routing of all workloads, as raw int32 and (whole) as base64."""

    def __init__(self, workload: str, num_rows: int, seed: int) -> None:
        raw = bytearray()
        digest = hashlib.sha256()
        for block in routing_blocks(workload, num_rows, seed=seed):
            raw += block.astype("<i4").tobytes()
            digest.update(block.astype(np.uint8).tobytes())
        self._raw = bytes(raw)
        self._whole = base64.b64encode(raw)
        self.digest = digest.hexdigest()

    def base64(self, start: int, stop: int) -> bytes:
        """Rows [start, stop)."""
        if (start, stop) == (0, len(self._raw) // _ROW_BYTES):
            return self._whole
        return base64.b64encode(self._raw[start * _ROW_BYTES : stop * _ROW_BYTES])

    def event(self, body: dict[str, Any]) -> list[bytes]:
        """The last event of a reply, in parts."""
        prompt, num_new = body["input_ids"], body["sampling_params"]["max_new_tokens"]
        ids = [(7 * i) % 32_000 for i in range(num_new)]
        meta = {
            "id": body["rid"],
            "finish_reason": {"type": "length", "length": num_new},
            "prompt_tokens": len(prompt),
            "weight_version": "1",
            "output_token_logprobs": [[-0.25, token, None] for token in ids],
            "completion_tokens": num_new,
            "cached_tokens": 0,
        }
        head = json.dumps({"text": "x" * num_new, "output_ids": ids, "meta_info": meta}).encode()
        if not body.get("return_routed_experts"):
            return [b"data: ", head, b"\n\n"]
        rows = self.base64(body["routed_experts_start_len"], len(prompt) + num_new - 1)
        return [b"data: ", head[:-2], b', "routed_experts": "', rows, b'"}}\n\n']


async def serve(port: int, replies: Replies) -> None:
    """Answer until the process is ended."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                lengths = [
                    line.partition(":")[2] for line in head.splitlines() if line.lower().startswith("content-length:")
                ]
                body = await reader.readexactly(int(lengths[0])) if lengths else b""
                if head.startswith("POST /generate"):
                    await _stream(writer, replies.event(json.loads(body)))
                else:
                    told = json.dumps({"digest": replies.digest}).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(told), told))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", port)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    async with server:
        await server.serve_forever()


async def _stream(writer: asyncio.StreamWriter, event: list[bytes]) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"%x\r\n" % sum(map(len, event)))
    for part in event:
        view = memoryview(part)
        for start in range(0, len(view), _WRITE_BYTES):
            writer.write(view[start : start + _WRITE_BYTES])
            await writer.drain()
    writer.write(b"\r\n" + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Replies(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))))
