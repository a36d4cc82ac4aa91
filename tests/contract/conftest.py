"""What the suites of engine clients share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from engines.launch import EngineProcess, running_engine


@pytest.fixture(scope="session")
def engine_process(tiny_model: Path) -> Iterator[EngineProcess]:
    """A real `verbatim engine`, which speaks SGLang's protocol and vLLM's."""
    flags = ("--dtype", "float32", "--context-length", "512")
    with running_engine(tiny_model, flags=flags) as process:
        yield process
