"""The processes of a chaos run: started, killed with SIGKILL, hung with SIGSTOP, restarted; each keeps its port."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import aiohttp

from benchmarks.custody.place import Place
from engines.launch import free_port
from engines.weights.names import weight_label

_ROOT = Path(__file__).resolve().parents[2]
_READY_SECONDS = 60.0
_GATEWAY = "from gateway.cli import main; raise SystemExit(main())"
_ROUTER_FLAGS = (
    *("--disable-retries", "--policy", "consistent_hashing", "--disable-tokenizer-autoload", "--log-level", "error"),
    *("--health-check-endpoint", "/ping", "--health-check-interval-secs", "2", "--health-check-timeout-secs", "2"),
    *("--health-failure-threshold", "1", "--health-success-threshold", "1"),
)


@dataclass(slots=True)
class Member:
    """One process. command: made anew for every start. is_ready: whether it does its work."""

    name: str
    command: Callable[..., Sequence[str]]
    log: Path
    is_ready: Callable[[], Awaitable[bool]]
    process: subprocess.Popen[bytes] | None = None
    starts: int = 0
    _log: BinaryIO | None = field(default=None, repr=False)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self.process is not None and self.process.poll() is None

    def start(self, *flags: str) -> None:
        """Start it, with more flags than usual; it is not ready yet."""
        self._log = self._log or self.log.open("ab")
        self.process = subprocess.Popen(
            [*self.command(), *flags],
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            cwd=_ROOT,
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)},
        )
        self.starts += 1

    async def wait_ready(self) -> None:
        """Until it works; one that ended by itself meanwhile is started again, as a supervisor would."""
        deadline = time.monotonic() + _READY_SECONDS
        while not await self.is_ready():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name} does not become ready; see {self.log}")
            if not self.running:
                await asyncio.sleep(0.2)
                self.start()
            await asyncio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if there is a process."""
        if self.process is not None and self.running:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL; it is gone when this returns."""
        self.signal(signal.SIGKILL)
        await self._gone()

    async def stop(self, *, timeout_seconds: float = 90.0) -> int:
        """SIGTERM, and SIGKILL if that does not help; its exit code."""
        self.signal(signal.SIGTERM)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_seconds):
                return await self._gone()
        await self.kill()
        return -signal.SIGKILL

    async def replace(self, *, timeout_seconds: float = 90.0) -> str:
        """Start another with `--replace` beside it, which takes over; returns what went wrong, "" for nothing."""
        old = self.process
        assert old is not None
        self.start("--replace")
        deadline = time.monotonic() + timeout_seconds
        while old.poll() is None and self.running and time.monotonic() < deadline:  # noqa: ASYNC110 (processes)
            await asyncio.sleep(0.01)
        if old.poll() is None:
            new, self.process = self.process, old
            if new is not None and new.poll() is None:
                new.kill()
            return f"not replaced within {timeout_seconds:g} s" if new is None else f"the new one: {new.wait()}"
        return f"the old one ended with {old.returncode}" if old.returncode else ""

    async def replace_and_kill(self, after_seconds: float) -> None:
        """As `replace`, but the old one is killed meanwhile."""
        old = self.process
        assert old is not None
        self.start("--replace")
        await asyncio.sleep(after_seconds)
        old.kill()
        old.wait()

    async def _gone(self) -> int:
        while self.process is not None and self.process.poll() is None:  # noqa: ASYNC110 (a process)
            await asyncio.sleep(0.01)
        return self.process.returncode if self.process is not None else 0

    def close(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.running:
            self.process.kill()
            self.process.wait()
        if self._log is not None:
            self._log.close()


class Fleet:
    """Gateway, router, engines and trainer of one place. policy_version: of the engines that start from now on."""

    def __init__(
        self,
        place: Place,
        http: aiohttp.ClientSession,
        *,
        group_size: int,
        num_engines: int = 2,
        gateway_settings: Sequence[str] = (),
        trainer: Sequence[str] = ("-m", "benchmarks.custody.trainer"),
    ) -> None:
        self._place = place
        self._http = http
        self._settings = tuple(gateway_settings)
        self._group_size = group_size
        self._trainer = tuple(trainer)
        self.policy_version = 0
        gateway, router, metrics, *engines = _ports(3 + num_engines)
        self.gateway_url, self.router_url = _url(gateway), _url(router)
        self.engine_urls = [_url(port) for port in engines]
        self.engines = [self._engine(i, port) for i, port in enumerate(engines)]
        self.router = Member("router", lambda: self._router_command(router, metrics), place.log("router"), self._routed)
        self.gateway = Member("gateway", lambda: self._gateway_command(gateway), place.log("gateway"), self._served)
        self.trainer = Member("trainer", self._trainer_command, place.log("trainer"), self._started)

    @property
    def members(self) -> dict[str, Member]:
        """All of them by name."""
        return {m.name: m for m in (*self.engines, self.router, self.gateway, self.trainer)}

    async def start(self) -> None:
        """All, in the order in which they need each other."""
        for engine in self.engines:
            engine.start()
        for member in (*self.engines, self.router, self.gateway, self.trainer):
            if not member.running:
                member.start()
            await member.wait_ready()

    def close(self) -> None:
        """Kill what is left."""
        for member in self.members.values():
            member.close()

    def _engine(self, number: int, port: int) -> Member:
        place = self._place

        def command() -> Sequence[str]:
            return (
                *(sys.executable, "-m", "benchmarks.custody.engine", "--port", str(port), "--model", str(place.model)),
                *("--script", str(place.script), "--journal", str(place.sampled(number))),
                *("--weight-version", weight_label(self.policy_version)),
            )

        return Member(f"engine-{number}", command, place.log(f"engine-{number}"), self._answers(_url(port) + "/ping"))

    def _router_command(self, port: int, metrics: int) -> Sequence[str]:
        return (
            *(sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
            *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics), *_ROUTER_FLAGS),
            *("--worker-urls", *self.engine_urls),
        )

    def _gateway_command(self, port: int) -> Sequence[str]:
        return (
            *(sys.executable, "-c", _GATEWAY, "serve", "--port", str(port), "--model", str(self._place.model)),
            *("--data", str(self._place.data), "--engine", f"smg={self.router_url}"),
            *(word for setting in self._settings for word in ("--set", setting)),
        )

    def _trainer_command(self) -> Sequence[str]:
        return (
            *(sys.executable, *self._trainer, "--url", self.gateway_url),
            *("--journal", str(self._place.trained), "--group-size", str(self._group_size)),
        )

    def _answers(self, url: str) -> Callable[[], Awaitable[bool]]:
        async def answers() -> bool:
            try:
                async with self._http.get(url, timeout=aiohttp.ClientTimeout(total=2)) as reply:
                    return reply.status == 200
            except (aiohttp.ClientError, TimeoutError):
                return False

        return answers

    async def _routed(self) -> bool:
        return await self._answers(self.router_url + "/readiness")()

    async def _served(self) -> bool:
        return await self._answers(self.gateway_url + "/health")()

    async def _started(self) -> bool:
        return self.trainer.running


def _ports(number: int) -> list[int]:
    ports: set[int] = set()
    while len(ports) < number:
        ports.add(free_port())
    return list(ports)


def _url(port: int) -> str:
    return f"http://127.0.0.1:{port}"
