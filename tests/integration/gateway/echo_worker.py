"""An echo server as a process of its own, which can be killed: `python echo_worker.py PORT DELAY_SECONDS ID…`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from aiohttp import web

from engines.echo import EchoServer

if __name__ == "__main__":
    port, delay_seconds, *token_ids = sys.argv[1:]
    server = EchoServer([int(token_id) for token_id in token_ids], delay_seconds=float(delay_seconds))
    web.run_app(server.app(), host="127.0.0.1", port=int(port), print=None, access_log=None)
