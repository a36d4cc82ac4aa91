"""Where contenders are measured: a model, an engine that says a workload's script, and agents that play it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from benchmarks.load.contenders import Running
from benchmarks.load.figures import Measured, measured
from benchmarks.load.programs import FakeEngine, Generator, Played, running_engine
from benchmarks.load.script import Model, Workload, write_conversation, write_script

SERVED_NAME = "fake"
_SETTLE_SECONDS = 0.2
_GRACE_SECONDS = 120.0
"""For turns that are under way when the time is over."""

_numbers = count()


@dataclass(frozen=True, slots=True)
class Stage:
    """One workload with its engine running. stream: agents ask for streamed replies. tools_on: how to start them."""

    folder: Path
    model: Model
    workload: Workload
    engine: FakeEngine
    stream: bool
    tools_on: Sequence[str]

    def generator(self, contender: Running, *flags: str, workload: Workload | None = None) -> Generator:
        """Agents that play a workload (this stage's) through a contender; sessions are new ones each time."""
        wanted = workload or self.workload
        number = next(_numbers)
        conversation = write_conversation(
            self.folder / f"conversation-{number}", self.model, wanted, served_name=SERVED_NAME, stream=self.stream
        )
        own = ["--path", contender.path, "--turns", str(wanted.turns), "--name", f"s{number}"]
        own += ["--tools"] if wanted.tools else []
        own += ["--stream"] if self.stream else []
        return Generator(conversation, contender.port, *own, *flags, prefix=self.tools_on)

    def play(self, contender: Running, *flags: str, timeout_seconds: float = 600.0) -> Played:
        """Run agents to their end."""
        return self.generator(contender, *flags).result(timeout_seconds=timeout_seconds)

    def warm(self, contender: Running) -> None:
        """What is made once is made, so that no figure holds it."""
        self.play(contender, "--sessions", "8", "--seconds", "1", timeout_seconds=_GRACE_SECONDS)

    def measure(
        self, contender: Running, sessions: int, *, seconds: float, number: int, rate: float | None = None
    ) -> Measured:
        """So many sessions for so long; CPU counts until all that a turn leaves behind is done."""
        engine_before, before = self.engine.statistics(), contender.cpu_seconds()
        played = self.play(
            contender,
            *("--sessions", str(sessions), "--seconds", f"{seconds:g}"),
            *(("--rate", f"{rate:g}") if rate else ()),
            timeout_seconds=seconds + _GRACE_SECONDS,
        )
        time.sleep(_SETTLE_SECONDS)
        after, engine_after = contender.usage(), self.engine.statistics()
        return measured(
            contender.name,
            sessions,
            number,
            played,
            seconds=seconds,
            cpu_seconds=after.cpu_seconds - before,
            engine_seconds=engine_after["cpu_seconds"] - engine_before["cpu_seconds"],
            rss_bytes=after.rss_bytes,
        )


@contextmanager
def staged(
    folder: Path,
    model: Model,
    workload: Workload,
    *engine_flags: str,
    stream: bool = False,
    cores: str = "",
) -> Iterator[Stage]:
    """A stage in `folder`. cores: of engine and agents, "" for all."""
    folder.mkdir(parents=True, exist_ok=True)
    tools_on = ("taskset", "-c", cores) if cores else ()
    script = write_script(folder / "script", model, workload)
    with running_engine(script, *told_flags(model), *engine_flags, prefix=tools_on) as engine:
        yield Stage(folder, model, workload, engine, stream, tools_on)


def told_flags(model: Model) -> tuple[str, ...]:
    """What the engine says of itself: the gateway finds the model's folder by it, as with an engine beside it."""
    told = {"model_path": str(model.folder), "served_model_name": SERVED_NAME, "weight_version": "default"}
    return "--model-info", json.dumps(told)
