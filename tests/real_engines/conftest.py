"""What the suites of both real engines share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, close, wait_ready
from tests.integration.gateway.test_gateway_embedded_engine import verbatim
from tests.real_engines.transcripts import Reference, memorised_checkpoint


@pytest.fixture(scope="session")
def memorised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that knows its transcripts by heart, made once."""
    return memorised_checkpoint(tmp_path_factory.mktemp("model") / "memorised")


@pytest.fixture(scope="session")
def reference(memorised: Path) -> Reference:
    """The same weights in transformers."""
    return Reference(memorised)


@pytest.fixture
def session_id(request: pytest.FixtureRequest) -> str:
    """Of this test only."""
    return f"{request.node.name}-{time.monotonic_ns()}".replace("[", "-").replace("]", "")


@contextmanager
def gateway_before(engine: str, model: Path, data: Path) -> Iterator[RunningGateway]:
    """A real gateway process whose one engine is `KIND=URL`."""
    flags = ["--model", str(model), "--port", str(free_port()), "--data", str(data)]
    process = verbatim("serve", "--engine", engine, *flags)
    try:
        yield RunningGateway(process, wait_ready(process))
    finally:
        close(process)
