"""Gateways as real processes, with scripted engines that answer by rules."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakSet

import httpx
import openai
import pytest

from engines.launch import free_port

PROGRAM = Path(__file__).parent / "gateway_with_script.py"
CALL = '<tool_call>\n{"name": "calculator", "arguments": {"expression": "48/2"}}\n</tool_call>'
RULES: list[dict[str, Any]] = [
    {"after": "\0", "reply": "hello"},
    {"after": "What is 48/2?", "reply": f"<think>\nlet me see\n</think>\n{CALL}"},
    {"after": "<|im_start|>tool", "reply": "<think>\nso\n</think>\nThe answer is 24."},
    {"after": "count slowly", "reply": "one two three four five six", "delay_seconds": 0.03},
    {"after": "count very slowly", "reply": "one two three four five six", "delay_seconds": 0.3},
    {"after": "count for long", "reply": "one two three four five six " * 3, "delay_seconds": 0.3},
    {"after": "count for ages", "reply": "one two three four five six " * 9, "delay_seconds": 0.3},
    {"after": "quick", "reply": "the quick answer", "chunk_size": 100},
]
TOOLS = [{"type": "function", "function": {"name": "calculator", "description": "", "parameters": {"type": "object"}}}]


_clients: WeakSet[openai.OpenAI] = WeakSet()


@pytest.fixture(autouse=True)
def no_client_is_left_to_the_collector() -> Iterator[None]:
    """Clients are rings: their sockets may be found open, and warned of, in whichever test the collector runs."""
    yield
    for client in list(_clients):
        client.close()


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway process and ways to talk to it."""

    process: subprocess.Popen[str]
    url: str

    def client(self, session_id: str) -> openai.OpenAI:
        """Open until the test ends."""
        made = openai.OpenAI(base_url=f"{self.url}/sessions/{session_id}/v1", api_key="unused", max_retries=0)
        _clients.add(made)
        return made

    def get(self, path: str, **options: Any) -> Any:
        reply = httpx.get(self.url + path, timeout=30, **options)
        reply.raise_for_status()
        return reply.json()

    def post(self, path: str, body: Any = None, **options: Any) -> Any:
        reply = httpx.post(self.url + path, json=body or {}, timeout=30, **options)
        reply.raise_for_status()
        return reply.json()

    def turns(self, session_id: str) -> list[dict[str, Any]]:
        return list(self.get(f"/sessions/{session_id}/turns?arrays=1")["turns"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(60)


StartGateway = Callable[..., RunningGateway]


def spawn(flags: Sequence[str], *, environment: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )


def wait_ready(process: subprocess.Popen[str], *, name: str = "serve") -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(60), f"verbatim {name} did not become ready"
    line = process.stdout.readline()
    assert line.startswith(f"verbatim {name} ready at "), f"{line!r}, {process.stderr.read() if process.stderr else ''}"
    return line.split()[-1]


@pytest.fixture(scope="session")
def rules_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("script") / "rules.json"
    file.write_text(json.dumps(RULES))
    return file


@pytest.fixture(scope="session")
def start_gateway(tiny_model: Path, rules_file: Path) -> Iterator[StartGateway]:
    """Starts gateways: `start_gateway(data, *flags, environment=…, engine=…)`; all are ended at the end."""
    with ExitStack() as stack:

        def start(
            data: Path,
            *flags: str,
            environment: Mapping[str, str] | None = None,
            port: int | None = None,
            engine: str = f"scripted={rules_file}",
        ) -> RunningGateway:
            process = spawn(
                [
                    *("--engine", engine, "--model", str(tiny_model), "--data", str(data)),
                    *("--port", str(port or free_port()), *flags),
                ],
                environment=environment,
            )
            stack.callback(close, process)
            return RunningGateway(process, wait_ready(process))

        yield start


def close(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=20)


@pytest.fixture(scope="session")
def gateway(start_gateway: StartGateway, tmp_path_factory: pytest.TempPathFactory) -> RunningGateway:
    """One gateway that many tests share; every test has a session of its own."""
    return start_gateway(tmp_path_factory.mktemp("ledger"))


@pytest.fixture
def session_id(request: pytest.FixtureRequest) -> str:
    return f"{request.node.name}-{time.monotonic_ns()}".replace("[", "-").replace("]", "")
