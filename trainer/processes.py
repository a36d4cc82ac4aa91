"""Child processes of one command: servers that say when they are ready, one log file each, and an orderly end."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil  # type: ignore[import-untyped]  # has no types of its own

from gateway.contracts.errors import ProcessFailed
from gateway.contracts.telemetry import ready_line

_COMMAND = (sys.executable, "-c", "import sys; from gateway.cli import main; sys.exit(main())")
CHILD_ENVIRONMENT = {
    # One thread each: OpenMP threads of several processes spin on shared cores (60 times slower).
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
}
"""What each child gets on top of our own environment."""
_FIRST_PORT, _LAST_PORT = 20_000, 32_000
"""Below the range from which kernels take ports for outgoing connections."""
_STOP_SECONDS = 20.0
_POLL_SECONDS = 0.05
_LOG_LINES = 5


class Children:
    """Starts `verbatim …` commands as processes; leaving the context stops all, the latest first."""

    def __init__(self, log_folder: Path) -> None:
        self._log_folder = log_folder
        log_folder.mkdir(parents=True, exist_ok=True)
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._running:
            _stop(self._running.pop()[1])

    def start_server(self, name: str, arguments: Sequence[str], *, timeout_seconds: float) -> str:
        """Start `verbatim NAME ARGUMENTS` with its output in a log file; returns its URL once it is ready.

        Raises ProcessFailed if it ends, or is not ready in time.
        """
        log = self._log_folder / f"{name}.log"
        with log.open("ab") as stream:
            begin = stream.tell()
            process = self._start(name, (*_COMMAND, name, *arguments), output=stream.fileno(), errors=stream.fileno())
        deadline = time.monotonic() + timeout_seconds
        ready = re.compile(re.escape(ready_line(name, "")) + r"(\S+)")
        while time.monotonic() < deadline:
            match = ready.search(log.read_bytes()[begin:].decode(errors="replace"))
            if match is not None:
                return match.group(1)
            if process.poll() is not None:
                break
            time.sleep(_POLL_SECONDS)
        raise ProcessFailed(self._obituary(name, process))

    def run(self, name: str, arguments: Sequence[str]) -> None:
        """Run `verbatim NAME ARGUMENTS` to its end, on our standard error; the servers must outlive it.

        Raises ProcessFailed if it fails, or if a server dies meanwhile.
        """
        argv = (*_COMMAND, name, *arguments)
        process = self._start(name, argv, output=sys.stderr.fileno(), errors=sys.stderr.fileno())
        while (status := process.poll()) is None:
            for server, other in self._running[:-1]:
                if other.poll() is not None:
                    raise ProcessFailed(self._obituary(server, other))
            time.sleep(_POLL_SECONDS)
        self._running.pop()
        if status != 0:
            raise ProcessFailed(f"{name} ended with {_status(status)}; what it said stands above")

    def lines_of(self, name: str, words: Sequence[str]) -> Iterator[str]:
        """Run Python with these words to its end and yield the lines of its standard output; the rest goes to its log.

        Raises ProcessFailed if it fails.
        """
        with (self._log_folder / f"{name}.log").open("ab") as log:
            process = self._start(name, (sys.executable, *words), output=subprocess.PIPE, errors=log.fileno())
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                yield line.decode().rstrip("\n")
        process.wait()
        self._running.pop()
        if process.returncode != 0:
            raise ProcessFailed(self._obituary(name, process))

    def wait(self) -> None:
        """Until a server dies; raises ProcessFailed then. Interrupt it to go on."""
        while True:
            for name, process in self._running:
                if process.poll() is not None:
                    raise ProcessFailed(self._obituary(name, process))
            time.sleep(1.0)

    def _start(self, name: str, argv: Sequence[str], *, output: int, errors: int) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            env=os.environ | CHILD_ENVIRONMENT,
            # Ctrl-C reaches us alone; we end our children in order.
            start_new_session=True,
        )
        self._running.append((name, process))
        return process

    def _obituary(self, name: str, process: subprocess.Popen[bytes]) -> str:
        status = process.poll()
        what = "is not ready in time" if status is None else f"ended with {_status(status)}"
        log = self._log_folder / f"{name}.log"
        lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        return f"{name} {what}; the end of {log}: " + " | ".join(lines)


class PeakMemory:
    """Samples the resident memory of this process and all its descendants in a thread; pages that processes share
    count once for each of them, so the figure is an upper bound."""

    def __init__(self, *, every_seconds: float = 0.5) -> None:
        self._every_seconds = every_seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-memory", daemon=True)
        self.peak_rss_bytes = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        own = psutil.Process()
        while True:
            total = sum(_resident_bytes(process) for process in (own, *own.children(recursive=True)))
            self.peak_rss_bytes = max(self.peak_rss_bytes, total)
            if self._ended.wait(self._every_seconds):
                return


def free_port(*taken: int) -> int:
    """A TCP port of loopback that nothing listens on now and that is none of `taken`."""
    for offset in range(_LAST_PORT - _FIRST_PORT):
        port = _FIRST_PORT + (os.getpid() * 7 + offset) % (_LAST_PORT - _FIRST_PORT)
        if port in taken:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise ProcessFailed(f"no free port between {_FIRST_PORT} and {_LAST_PORT}")


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it ended meanwhile
        return 0


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _status(status: int) -> str:
    return f"exit code {status}" if status >= 0 else signal.Signals(-status).name
