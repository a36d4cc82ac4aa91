"""A program: uvicorn with one static reply, the most that a Python server can be asked for.

Usage: `static_reply.py PORT BYTES`.
"""

from __future__ import annotations

import sys
from typing import Any

import uvicorn

_PIECE_BYTES = 2**20


def main(port: str, num_bytes: str) -> None:
    """Serve until SIGTERM."""
    body = memoryview(bytes(int(num_bytes)))
    headers = [(b"content-length", num_bytes.encode()), (b"content-type", b"application/octet-stream")]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for start in range(0, len(body), _PIECE_BYTES):
            piece = body[start : start + _PIECE_BYTES]
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="error", lifespan="off")


if __name__ == "__main__":
    main(*sys.argv[1:])
