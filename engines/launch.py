"""Start an engine server as a process of its own and stop it again."""

from __future__ import annotations

import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.errors import ConfigurationError, EngineTimeout, EngineUnavailable

_READY = "verbatim engine ready at "
_ENTRY = "from gateway.cli import main; raise SystemExit(main())"


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A running `verbatim engine`."""

    url: str
    process: subprocess.Popen[bytes]

    def stop(self, *, timeout_seconds: float = 20.0) -> int:
        """Ask it to end and return its exit code; kill it if it does not end in time."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


def free_port() -> int:
    """A loopback port that nothing listens on, below the range from which outgoing connections take theirs."""
    for port in random.sample(range(20_000, 32_000), 200):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise EngineUnavailable("found no free port between 20000 and 32000")


@contextmanager
def running_engine(
    model: Path,
    *,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    timeout_seconds: float = 120.0,
) -> Iterator[EngineProcess]:
    """`verbatim engine --model MODEL` on a free port, ready for requests; ended on leaving.

    Raises ConfigurationError if it refused its settings, EngineUnavailable or EngineTimeout if it did not come up.
    """
    command = [sys.executable, "-c", _ENTRY, "engine", "--model", str(model), "--port", str(free_port()), *flags]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {})
    )
    try:
        engine = EngineProcess(_url_when_ready(process, time.monotonic() + timeout_seconds), process)
        yield engine
        engine.stop()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _url_when_ready(process: subprocess.Popen[bytes], deadline: float) -> str:
    output = process.stdout
    if output is None:
        raise EngineUnavailable("the engine process has no standard output")
    os.set_blocking(output.fileno(), False)
    text = ""
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        while selector.select(max(0.0, deadline - time.monotonic())):
            piece = output.read()
            if piece == b"":
                raise _did_not_start(process.wait())
            text += (piece or b"").decode()
            for line in text.splitlines(keepends=True):
                if line.startswith(_READY) and line.endswith("\n"):
                    return line.removeprefix(_READY).strip()
    raise EngineTimeout("the engine process did not become ready in time")


def _did_not_start(exit_code: int) -> ConfigurationError | EngineUnavailable:
    if exit_code == 2:
        return ConfigurationError("the engine refused its settings (see its message)")
    return EngineUnavailable(f"the engine process ended with exit code {exit_code} before it was ready")
