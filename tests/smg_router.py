"""A real smg router as a process: the `smg` package's own program, found by this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from engines.launch import free_port

VERBATIM_MODE = ("--disable-retries", "--policy", "consistent_hashing")
"""How README and client ask operators to start it."""


@dataclass(slots=True)
class RouterProcess:
    """One router; it keeps its port when it is killed and started again."""

    worker_urls: Sequence[str]
    flags: Sequence[str]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it; it does not know its workers yet."""
        command = [
            *(sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())),
            *("--log-level", "error", "--disable-tokenizer-autoload", *self.flags),
            *("--worker-urls", *self.worker_urls),
        ]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )

    def wait_ready(self) -> None:
        """Wait until it has registered its workers."""
        self._wait(lambda workers: sum(worker["is_healthy"] for worker in workers) == len(self.worker_urls))

    def wait_listening(self) -> None:
        """Wait until it answers at all."""
        self._wait(lambda workers: True)

    def _wait(self, enough: Callable[[list[Any]], bool]) -> None:
        deadline = time.monotonic() + 30
        while (workers := self._workers()) is None or not enough(workers):
            assert self.process is not None
            assert self.process.poll() is None, "smg ended by itself; is the package `smg` installed?"
            assert time.monotonic() < deadline, "smg did not come up with its workers"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: nothing is drained."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _workers(self) -> list[Any] | None:
        try:
            return list(httpx.get(self.url + "/workers", timeout=5).json()["workers"])
        except httpx.TransportError:
            return None


@contextmanager
def running_router(*worker_urls: str, flags: Sequence[str] = VERBATIM_MODE) -> Iterator[RouterProcess]:
    """A router in front of workers, ready for requests."""
    router = RouterProcess(worker_urls, flags)
    try:
        router.start()
        router.wait_ready()
        yield router
    finally:
        router.kill()
