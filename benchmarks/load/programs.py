"""The two compiled programs: built on first use, the fake engine kept running, the load generator run.

They are in C because neither may be what is measured: they cost some ten microseconds a turn where the gateway may
cost 250. The binaries lie in `benchmarks/.build`, named by their sources' digest, so an edited source is built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import ConfigurationError, EngineUnavailable

_SOURCES = Path(__file__).resolve().parent
_BUILT = _SOURCES.parent / ".build"
_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra")
_READY_SECONDS = 20.0

RECORD = np.dtype(
    [
        ("start", "<f8"),
        ("latency", "<f8"),
        ("first_byte", "<f8"),
        ("turn", "<i4"),
        ("status", "<i4"),
        ("max_tokens", "<i4"),
        ("unused", "<i4"),
    ]
)
"""One turn of the load generator; seconds since its start, seconds. status: 200, another, 0 broken, -1 wrong."""


@cache
def compiled(name: str) -> Path:
    """The program of `NAME.c`, built if its sources changed; raises ConfigurationError without a C compiler."""
    source = _SOURCES / f"{name}.c"
    digest = hashlib.sha256()
    for part in (source, _SOURCES / "wire.h"):
        digest.update(part.read_bytes())
    program = _BUILT / f"{name}-{digest.hexdigest()[:16]}"
    if program.exists():
        return program
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ConfigurationError("the benchmarks' engine and load generator are in C: install a C compiler (cc)")
    _BUILT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=_BUILT) as place:
        made = Path(place) / name
        command = [compiler, *_FLAGS, "-o", str(made), str(source), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise ConfigurationError(f"{' '.join(command)} failed:\n{result.stderr}")
        made.replace(program)
    return program


@dataclass(frozen=True, slots=True)
class FakeEngine:
    """A running engine.c."""

    url: str
    process: subprocess.Popen[str]

    @property
    def port(self) -> int:
        """Where it listens, on loopback."""
        return int(self.url.rpartition(":")[2])

    def statistics(self) -> dict[str, Any]:
        """What it saw, and its CPU seconds; peaks begin anew with each call."""
        with urllib.request.urlopen(self.url + "/statistics", timeout=30) as answer:
            return dict(json.load(answer))


@contextmanager
def running_engine(script: Path, *flags: str, prefix: Sequence[str] = ()) -> Iterator[FakeEngine]:
    """A fake engine on a free port; flags: as in engine.c. prefix: a command to start it by, as `taskset -c 0`."""
    process = subprocess.Popen(
        [*prefix, str(compiled("engine")), "--script", str(script), *flags], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        said = process.stdout.readline().split()
        if said[:1] != ["ready"]:
            raise EngineUnavailable(f"the fake engine ended with {process.wait()}: see its message")
        yield FakeEngine(f"http://127.0.0.1:{said[1]}", process)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


class Played(NamedTuple):
    """What a run of the load generator came to: its own account, and a record a turn (`RECORD`)."""

    account: dict[str, Any]
    records: npt.NDArray[Any]


class Generator:
    """A running load generator; `flags` as in generator.c."""

    def __init__(self, conversation: Path, port: int, *flags: str, prefix: Sequence[str] = ()) -> None:
        self._place = tempfile.TemporaryDirectory(prefix="verbatim-load-")
        self._records = Path(self._place.name) / "records"
        self.process = subprocess.Popen(
            [
                *(*prefix, str(compiled("generator")), "--conversation", str(conversation), "--port", str(port)),
                *("--records", str(self._records), *flags),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_waiting(self) -> None:
        """Until all conversations have done `--wait-after` turns."""
        assert self.process.stdout is not None
        if self.process.stdout.readline().strip() != "waiting":
            raise EngineUnavailable("the load generator ended before its conversations stood where they should wait")

    def go_on(self) -> None:
        """Let the conversations go on."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def result(self, *, timeout_seconds: float) -> Played:
        """Wait for its end; TimeoutExpired if it takes longer."""
        try:
            said, _ = self.process.communicate(timeout=timeout_seconds)
            if self.process.returncode:
                raise ConfigurationError(f"the load generator ended with {self.process.returncode}: see its message")
            return Played(json.loads(said.splitlines()[-1]), np.fromfile(self._records, dtype=RECORD))
        finally:
            self.close()

    def close(self) -> None:
        """End it, and leave no file."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        self._place.cleanup()


def play(
    conversation: Path, port: int, *flags: str, timeout_seconds: float = 600.0, prefix: Sequence[str] = ()
) -> Played:
    """Run the load generator from its start to its end."""
    return Generator(conversation, port, *flags, prefix=prefix).result(timeout_seconds=timeout_seconds)
