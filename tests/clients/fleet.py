"""Agent programs as processes in the environments of their clients, a few at a time, each with jobs of its own.

Where an environment is missing the tests that need it fail and say how to install it; only Harbor's are skipped, and
only where there is no Python that it runs on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
AGENTS = Path(__file__).parent / "agents"
MARK = "outcomes: "
"""Before the line of JSON that a program prints (`agents/job.py`)."""

TIMEOUT_SECONDS = 240
PROCESSES_AT_ONCE = 3
ENVIRONMENTS = {
    "ours": Path(sys.executable),
    "clients": ROOT / ".venv-clients" / "bin" / "python",
    "harbor": ROOT / ".venv-harbor" / "bin" / "python",
}
"""Name → interpreter: `ours` has the newest clients, the others what `install.sh` has put there."""


class Door(StrEnum):
    """How a client comes to the gateway: with which URL, and with which key."""

    OWN = "own"
    """Its session's URL and key."""

    KEY = "key"
    """A URL that names no session, and the session's key."""

    STRANGER = "stranger"
    """A URL that names no session, and a key that nobody gave it."""

    OTHER = "other"
    """Its session's URL, and another session's key."""

    UNKNOWN = "unknown"
    """The URL of a session that nobody made, and the operator's key: another key opens it no more than any other."""

    FINISHED = "finished"
    """Its session's URL and key, but the session is finished."""


@dataclass(frozen=True, slots=True)
class Task:
    """One conversation of one client, and what should come of it.

    program, mode: of `agents/`. environment: a name of ENVIRONMENTS. about: sets its session apart from others of the
    same mode. options: fields of `agents/job.py`'s Job.
    """

    program: str
    mode: str
    ask: str
    environment: str = "clients"
    saw: Any = None
    num_turns: int = 1
    num_segments: int = 1
    door: Door = Door.OWN
    about: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For test ids and session ids."""
        words = (self.program, self.environment, self.mode.replace(":", "-"), self.door, self.about)
        return "-".join(word for word in words if word and word != Door.OWN)


@dataclass(frozen=True, slots=True)
class Placed:
    """A task with its session: what `agents/job.py` reads as one job, its session and its task."""

    task: Task
    session_id: str
    base_url: str
    api_key: str

    @property
    def job(self) -> dict[str, Any]:
        """As JSON."""
        seen = {"mode": self.task.mode, "base_url": self.base_url, "api_key": self.api_key, "ask": self.task.ask}
        return {**seen, **self.task.options}


class Fleet:
    """Runs programs in the background; `outcome` waits for one task's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(PROCESSES_AT_ONCE)
        self._outcomes: dict[str, tuple[Future[list[dict[str, Any]]], int]] = {}

    def send(self, placed: Iterable[Placed]) -> None:
        """Start one process for every program and environment among the tasks."""
        crews: dict[tuple[str, str], list[Placed]] = {}
        for one in placed:
            crews.setdefault((one.task.environment, one.task.program), []).append(one)
        for (environment, program), crew in crews.items():
            if missing(environment) is None:
                line = json.dumps([one.job for one in crew])
                future = self._pool.submit(run_program, program, environment, line, self._folder)
                for i, one in enumerate(crew):
                    self._outcomes[one.session_id] = (future, i)

    def outcome(self, session_id: str) -> dict[str, Any]:
        """What the program said of this session's job."""
        future, i = self._outcomes[session_id]
        return future.result(TIMEOUT_SECONDS)[i]

    def close(self) -> None:
        """Wait for what runs."""
        self._pool.shutdown(cancel_futures=True)


def run_program(program: str, environment: str, jobs: str, folder: Path) -> list[dict[str, Any]]:
    """One process; its line of JSON. Raises AssertionError with its complaint if it failed."""
    home = folder / f"home-{program}-{environment}"
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [ENVIRONMENTS[environment], AGENTS / f"{program}.py", jobs],
        capture_output=True,
        encoding="utf-8",
        errors="replace",  # of what libraries print, which need not be text
        timeout=TIMEOUT_SECONDS,
        cwd=home,
        env=client_environment(home),
        check=False,
    )
    # Libraries print too, from threads of their own: their words may stand before or behind ours on one line.
    lines = done.stdout.split(MARK)[1:]
    said = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert len(lines) == 1, f"{program} ended with {done.returncode} and {len(lines)} lines of outcomes:\n{said}"
    outcomes, _rest = json.JSONDecoder().raw_decode(lines[0])
    return list(outcomes)


def client_environment(home: Path) -> dict[str, str]:
    """Nothing of ours but the path, a home of its own, and the clients' own switches against calling home."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_LOG": "ERROR",
        "LANGSMITH_TRACING": "false",
        "MSWEA_COST_TRACKING": "ignore_errors",
        "MSWEA_GLOBAL_CONFIG_DIR": str(home / "mini-swe-agent"),
        "MSWEA_MODEL_RETRY_STOP_AFTER_ATTEMPT": "1",
        "MSWEA_SILENT_STARTUP": "1",
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
    }


def missing(environment: str) -> str | None:
    """Why an environment cannot be used, None if it can."""
    if ENVIRONMENTS[environment].exists():
        return None
    return f"{ENVIRONMENTS[environment]} is not there; run tests/clients/install.sh"


def require(environment: str) -> None:
    """Skip where there is no Python for Harbor; fail where an environment is only not installed."""
    if (why := missing(environment)) is None:
        return
    if environment == "harbor" and not has_python_312():
        pytest.skip("Harbor 0.25 needs Python 3.12 or newer, and there is none on this machine")
    pytest.fail(why)


def has_python_312() -> bool:
    """Whether `install.sh` would find one; it decides, so that there is one rule."""
    found = subprocess.run([AGENTS.parent / "install.sh", "--has-python-312"], check=False)
    return found.returncode == 0
