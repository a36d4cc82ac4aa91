"""A real server of the S3 protocol as a process: `moto`, which keeps its objects in memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from engines.launch import free_port

BUCKET = "verbatim-tests"


@dataclass(frozen=True, slots=True)
class ObjectServer:
    """One server with one bucket; `environment` is what an S3 client needs to reach it."""

    url: str
    process: subprocess.Popen[bytes]

    @property
    def environment(self) -> dict[str, str]:
        """As an operator sets it."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }

    def bucket_url(self, prefix: str) -> str:
        """What a gateway is given as `--objects`."""
        return f"s3://{BUCKET}/{prefix}"


@contextmanager
def running_object_server() -> Iterator[ObjectServer]:
    """A server with an empty bucket; ended on leaving."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    server = ObjectServer(f"http://127.0.0.1:{port}", process)
    try:
        _make_bucket(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _make_bucket(server: ObjectServer) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert server.process.poll() is None, "the S3 server ended by itself; is the package `moto` installed?"
        assert time.monotonic() < deadline, "the S3 server did not come up"
        try:
            httpx.put(f"{server.url}/{BUCKET}").raise_for_status()
        except httpx.TransportError:
            time.sleep(0.1)
        else:
            return
