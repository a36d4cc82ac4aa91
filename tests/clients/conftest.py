"""A gateway with keys on, whose engine notes what it is asked, and the fleet of clients that talk to it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.launch import free_port

pytest.register_assert_rewrite("tests.clients.proof")  # before its first import: a failed proof shows both sides

from tests.clients.fleet import Door, Fleet, Placed, Task, require  # noqa: E402
from tests.clients.proof import Witnesses  # noqa: E402
from tests.clients.script import RULES  # noqa: E402
from tests.integration.gateway.conftest import close, spawn, wait_ready  # noqa: E402

OPERATOR_KEY = "operators-only"
CONTEXT_LENGTH = 16_384
"""Tokens: room for the longest prompts that the agents ship, and soon full where a test wants that."""


@pytest.fixture(scope="session")
def roomy_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint, told that its context is CONTEXT_LENGTH."""
    folder = tmp_path_factory.mktemp("roomy") / "tiny"
    shutil.copytree(tiny_model, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_LENGTH}))
    return folder


@pytest.fixture(scope="session")
def witnesses(roomy_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Witnesses]:
    """A running gateway: unknown sessions are refused, a failing engine is given up at once and back at once."""
    folder = tmp_path_factory.mktemp("clients")
    rules, requests = folder / "rules.json", folder / "requests.jsonl"
    rules.write_text(json.dumps(RULES))
    settings = {
        "unknown_sessions": "reject",
        "replicas.max_fruitless_attempts": 1,
        "replicas.retry_delay_seconds": 0.01,
        "replicas.health_interval_seconds": 0.05,
    }
    process = spawn(
        [
            *("--engine", f"scripted={rules}", "--model", str(roomy_model), "--data", str(folder / "ledger")),
            *("--port", str(free_port())),
            *(word for name, value in settings.items() for word in ("--set", f"{name}={value}")),
        ],
        environment={"VERBATIM_OPERATOR_KEY": OPERATOR_KEY, "SCRIPT_REQUESTS": str(requests)},
    )
    try:
        yield Witnesses(wait_ready(process), folder / "ledger", requests, OPERATOR_KEY)
    finally:
        close(process)


@pytest.fixture(scope="session")
def fleet(
    request: pytest.FixtureRequest,
    witnesses: Witnesses,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Fleet]:
    """All tasks of the tests that were chosen, under way; a task's session has its name."""
    fleet = Fleet(tmp_path_factory.mktemp("fleet"))
    tasks = [item.callspec.params["task"] for item in request.session.items if has_task(item)]
    fleet.send([placed(task, witnesses) for task in tasks])
    yield fleet
    fleet.close()


def has_task(item: pytest.Item) -> bool:
    """Whether a test is of one client's task."""
    return isinstance(item, pytest.Function) and hasattr(item, "callspec") and "task" in item.callspec.params


def placed(task: Task, witnesses: Witnesses) -> Placed:
    """A task with a session of its own, made as an operator does, and the way in that it is to take."""
    session = witnesses.post("/sessions", {"session_id": task.name})
    base_url, api_key = session["base_url"], session["api_key"]
    if task.door in (Door.KEY, Door.STRANGER):
        base_url = f"{witnesses.url}/v1"
    if task.door is Door.STRANGER:
        api_key = "nobody-gave-it"
    if task.door is Door.OTHER:
        api_key = witnesses.post("/sessions", {})["api_key"]
    if task.door is Door.UNKNOWN:
        base_url, api_key = f"{witnesses.url}/sessions/nobody-made-it/v1", witnesses.key
    if task.door is Door.FINISHED:
        witnesses.post(f"/sessions/{task.name}/finish", {"reward": 1.0})
    return Placed(task, task.name, base_url, api_key)


@pytest.fixture
def outcome(task: Task, fleet: Fleet) -> dict[str, Any]:
    """What came of this test's task."""
    require(task.environment)
    return fleet.outcome(task.name)
