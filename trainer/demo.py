"""`verbatim demo`: the whole loop on this machine's CPU, each part a process of its own.

    checkpoint → warm-up → [engine] ◀── [gateway] ◀── agents, trainer [train] → report, read back from the ledger

What is finished in the data folder is not done again, so a run that was stopped goes on with `--data`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.settings import load_settings
from trainer.demo_report import make_report, show_report
from trainer.processes import Children, PeakMemory, free_port
from trainer.settings import TrainSettings

DEFAULT_STEPS = 25
DEFAULT_WARMUP_STEPS = 550

_RECIPE = Path(__file__).parent / "recipes" / "calculator.toml"
_DATA_HOME = Path("demo-run")
_READY_SECONDS = 120.0
_PROBE = "from sandbox.local.driver import LocalDriver; LocalDriver().check()"


@dataclass(frozen=True, slots=True)
class DemoRun:
    """What a data folder was made with; a later call with the same folder must agree (steps may grow)."""

    seed: int
    warmup_steps: int


@dataclass(frozen=True, slots=True)
class DemoPlan:
    """One call of the demo. `overrides`: settings of `verbatim train`, as `a.b=c`."""

    folder: Path
    run: DemoRun
    steps: int
    sandbox: str
    overrides: tuple[str, ...]

    @property
    def model(self) -> Path:
        """The warmed-up checkpoint."""
        return self.folder / "model"

    @property
    def run_name(self) -> str:
        """Names the run's sessions in the ledger."""
        return f"demo-{self.run.seed}"


def configure(parser: argparse.ArgumentParser) -> None:
    """The flags of `verbatim demo`."""
    parser.add_argument("--seed", type=int, metavar="N", help="of model, tasks and sampling (0)")
    parser.add_argument("--steps", type=int, default=DEFAULT_STEPS, metavar="N", help=f"training ({DEFAULT_STEPS})")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where all is kept; a run found there goes on")
    parser.add_argument("--keep", action="store_true", help="leave engine and gateway up until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="the last line of standard output is the report as JSON")
    parser.add_argument("--sandbox", choices=("local", "subprocess"), help="how tools are isolated (local)")
    parser.add_argument("--warmup-steps", type=int, metavar="N", help=f"supervised steps ({DEFAULT_WARMUP_STEPS})")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", help="a setting of `verbatim train`")


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; raises ConfigurationError for a folder of another run, ProcessFailed if a part dies."""
    started = time.monotonic()
    plan = _plan(arguments)
    console = Console(stderr=True, highlight=False)
    with _ended_by_signals(), PeakMemory() as memory, Children(plan.folder / "logs") as children:
        _prepare_model(plan, children, console)
        engine_url, gateway_url = _start_servers(plan, children)
        console.print(f"engine {engine_url}, gateway {gateway_url}, all data in {plan.folder}", soft_wrap=True)
        overrides = _overrides(plan, gateway_url)
        children.run("train", ["--config", str(_RECIPE), *(word for o in overrides for word in ("--set", o))])
        report = asyncio.run(
            make_report(
                gateway_url,
                run_name=plan.run_name,
                metrics_file=plan.folder / "run" / "metrics.jsonl",
                seed=plan.run.seed,
                pick=load_settings(TrainSettings, file=_RECIPE, overrides=overrides).batch.pick,
            )
        )
        report = report.with_costs(seconds=time.monotonic() - started, peak_rss_bytes=memory.peak_rss_bytes)
        show_report(report, folder=plan.folder, console=Console(stderr=arguments.json, highlight=False))
        if arguments.json:
            sys.stdout.write(json.dumps(asdict(report)) + "\n")
            sys.stdout.flush()
        if arguments.keep:
            _keep(children, console, engine_url, gateway_url)
    return 0


def _plan(arguments: argparse.Namespace) -> DemoPlan:
    if arguments.steps < 1:
        raise ConfigurationError(f"--steps is {arguments.steps}; it must be at least 1")
    folder = arguments.data or _DATA_HOME / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    recorded = _recorded(folder)
    made_with = recorded or DemoRun(seed=0, warmup_steps=DEFAULT_WARMUP_STEPS)
    asked = {"seed": arguments.seed, "warmup_steps": arguments.warmup_steps}
    made_with = replace(made_with, **{name: value for name, value in asked.items() if value is not None})
    if recorded not in (None, made_with):
        raise ConfigurationError(f"{folder} holds {recorded}, which is not {made_with}; choose another --data")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "demo.json").write_text(json.dumps(asdict(made_with)) + "\n")
    return DemoPlan(folder, made_with, arguments.steps, _usable_sandbox(arguments.sandbox), tuple(arguments.set))


def _recorded(folder: Path) -> DemoRun | None:
    file = folder / "demo.json"
    return DemoRun(**json.loads(file.read_text())) if file.exists() else None


def _usable_sandbox(asked: str | None) -> str:
    """`local`, or where this machine does not permit namespaces and none was asked for, a plain process, loudly."""
    if asked is not None:
        return asked
    probe = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, check=False)
    if probe.returncode == 0:
        return "local"
    reason = (probe.stderr.strip().splitlines() or ["unknown"])[-1]
    sys.stderr.write(f"WARNING: NO ISOLATION: the demo's calculator runs as a plain process, because: {reason}\n")
    return "subprocess"


def _prepare_model(plan: DemoPlan, children: Children, console: Console) -> None:
    """Make and warm up the checkpoint in a process of its own, unless the folder has it."""
    done = plan.folder / "warmed-up"
    if done.exists():
        console.print(f"model found in {plan.model}", soft_wrap=True)
        return
    steps = plan.run.warmup_steps
    words = ("-m", "trainer.recipes.warmup", str(plan.model), str(plan.run.seed), str(steps))
    with _bar(console, "warm-up", steps) as advance:
        for line in children.lines_of("warm-up", words):
            step, loss = line.split()
            advance(int(step), float(loss))
    console.print(f"warmed up in {steps} supervised steps: {plan.model}", soft_wrap=True)
    done.touch()


def _start_servers(plan: DemoPlan, children: Children) -> tuple[str, str]:
    """The engine in bfloat16 (the trainer is in float32, as in real stacks) and the gateway; returns their URLs."""
    port = free_port()
    engine = ["--model", str(plan.model), "--port", str(port), "--dtype", "bfloat16", "--seed", str(plan.run.seed)]
    engine += ["--max-running-requests", "64"]
    # Tokens in small bundles, without repeating those sent before: half the CPU of a reply on two shared cores.
    engine += ["--set", "stream_interval=8", "--set", "incremental_streaming_output=true"]
    engine_url = children.start_server("engine", engine, timeout_seconds=_READY_SECONDS)
    gateway = ["--engine", f"sglang={engine_url}", "--model", str(plan.model), "--port", str(free_port(port))]
    gateway += ["--data", str(plan.folder / "ledger"), "--require", "routed_experts"]
    return engine_url, children.start_server("serve", gateway, timeout_seconds=_READY_SECONDS)


def _overrides(plan: DemoPlan, gateway_url: str) -> tuple[str, ...]:
    """What the trainer of this demo is told beyond its recipe."""
    return (
        f"run.dir='{plan.folder / 'run'}'",
        f"run.name={plan.run_name}",
        f"run.seed={plan.run.seed}",
        f"run.steps={plan.steps}",
        f"model.path='{plan.model}'",
        f"gateway.url={gateway_url}",
        f"sandbox.driver={plan.sandbox}",
        *plan.overrides,
    )


def _keep(children: Children, console: Console, engine_url: str, gateway_url: str) -> None:
    console.print(f"engine {engine_url} and gateway {gateway_url} stay up; Ctrl-C ends them")
    try:
        children.wait()
    except KeyboardInterrupt:
        return


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end us as Ctrl-C does, so that children are stopped."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Advance:
    """Follows the warm-up: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, bars: Progress, name: str, total: int) -> None:
        self._bars = bars
        self._name = name
        self._total = total
        self._task = bars.add_task(name, total=total)

    def __call__(self, done: int, loss: float) -> None:
        self._bars.update(self._task, completed=done, description=f"{self._name}, loss {loss:.3f}")
        if not self._bars.console.is_terminal and (done % 50 == 0 or done == self._total):
            self._bars.console.print(f"{self._name} {done}/{self._total}  loss {loss:.3f}")


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[_Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        yield _Advance(bars, name, total)
