"""Who is measured: the bare engine, `verbatim serve`, and peers, each a process in front of the same engine."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.load.programs import FakeEngine
from benchmarks.load.usage import Usage, cpu_seconds_of, tree, usage_of
from engines.launch import free_port
from gateway.contracts.errors import ConfigurationError, EngineUnavailable

_ROOT = Path(__file__).resolve().parents[2]
_VERBATIM = "import sys; from gateway.cli import main; raise SystemExit(main())"
_READY_SECONDS = 120.0
SESSION_PATH = "/sessions/{id}/v1/chat/completions"
"""How agents reach the gateway: their session is in the path."""
CHAT_PATH = "/v1/chat/completions"
"""How they reach what knows no sessions."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How a contender is started. ready: the path that answers 200 once it serves. cores: "0,2-3", "" for all.
    num_processes: that stay once helpers of its start have ended, 0 where that is not known."""

    name: str
    command: Sequence[str]
    port: int
    ready: str
    path: str
    environment: Mapping[str, str]
    cores: str = ""
    num_processes: int = 0


@dataclass(frozen=True, slots=True)
class Running:
    """A contender that serves. pid: None for the bare engine, which has no figures of its own here."""

    name: str
    port: int
    path: str
    pid: int | None
    ready_seconds: float = 0.0

    def cpu_seconds(self) -> float:
        """Of all its processes so far."""
        return 0.0 if self.pid is None else cpu_seconds_of(self.pid)

    def usage(self) -> Usage:
        """Of all its processes now."""
        return Usage(0.0, 0, 0, 0, 0) if self.pid is None else usage_of(self.pid)


def bare(engine: FakeEngine) -> Running:
    """The engine itself: what is left to subtract."""
    return Running("engine", engine.port, CHAT_PATH, None)


def verbatim(
    engine: FakeEngine, model: Path, data: Path, *, workers: int = 1, cores: str = "", flags: Sequence[str] = ()
) -> Launch:
    """`verbatim serve` as anybody would start it. flags: more of its own."""
    port = free_port()
    if workers > 1:
        require_workers_flag()
        flags = ("--workers", str(workers), *flags)
    command = (
        *(sys.executable, "-c", _VERBATIM, "serve", "--engine", f"sglang={engine.url}", "--model", str(model)),
        *("--port", str(port), "--data", str(data), *flags),
    )
    name = "verbatim" if workers == 1 else f"verbatim x{workers}"
    is_known = not any(flag.startswith("--workers") for flag in flags) or workers > 1
    num_processes = (1 if workers == 1 else workers + 1) if is_known else 0
    return Launch(name, command, port, "/ready", SESSION_PATH, {"PYTHONPATH": str(_ROOT)}, cores, num_processes)


def smg(engine: FakeEngine, *, cores: str = "", max_requests: int = 20_000) -> Launch:
    """The Shepherd Model Gateway in front of an SGLang worker; as it comes, but for its cap of requests at once."""
    if importlib.util.find_spec("smg") is None:
        raise ConfigurationError("--peers smg: the package `smg` is not installed (pip install smg)")
    port = free_port()
    command = (
        *(sys.executable, "-m", "smg", "launch", "--host", "127.0.0.1", "--port", str(port)),
        *("--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), "--log-level", "error"),
        *("--disable-tokenizer-autoload", "--max-concurrent-requests", str(max_requests)),
        *("--worker-urls", engine.url),
    )
    return Launch("smg", command, port, "/readiness", CHAT_PATH, {"HF_HUB_OFFLINE": "1"}, cores)


def floor(engine: FakeEngine, model: Path, data: Path, *, cores: str = "") -> Launch:
    """The least that a turn takes in Python (`benchmarks.load.floor`)."""
    port = free_port()
    command = (
        *(sys.executable, "-m", "benchmarks.load.floor", "--engine", engine.url, "--model", str(model)),
        *("--port", str(port), "--data", str(data)),
    )
    return Launch("floor", command, port, "/ready", SESSION_PATH, {"PYTHONPATH": str(_ROOT)}, cores)


def litellm(engine: FakeEngine, place: Path, *, program: str | None, cores: str = "") -> Launch:
    """LiteLLM's proxy in front of an OpenAI-compatible server. program: its `litellm`, None: $LITELLM or the PATH."""
    found = program or os.environ.get("LITELLM") or shutil.which("litellm")
    if found is None or not Path(found).is_file():
        raise ConfigurationError(
            f"--peers litellm: no program `{found or 'litellm'}`; "
            "pip install 'litellm[proxy]' into an environment of its own and give --litellm PATH"
        )
    port = free_port()
    config = place / "litellm.yaml"
    config.write_text(
        "model_list:\n"
        "  - model_name: fake\n"
        "    litellm_params:\n"
        f"      model: openai/fake\n      api_base: {engine.url}/v1\n      api_key: none\n"
    )
    command = (str(found), "--config", str(config), "--host", "127.0.0.1", "--port", str(port), "--num_workers", "1")
    # Its prices are in the package; what it would load instead is on the internet.
    environment = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOG": "ERROR",
        # On loopback, without keys, as the others here.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    return Launch("litellm", command, port, "/health/liveliness", CHAT_PATH, environment, cores)


@contextlib.contextmanager
def running(launch: Launch, log: Path) -> Iterator[Running]:
    """Start it, wait until it serves, end it. Raises EngineUnavailable if it does not come up."""
    pinned = ("taskset", "-c", launch.cores) if launch.cores else ()
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*pinned, *launch.command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(launch.environment),
        )
    try:
        _wait_ready(process, launch, log, began + _READY_SECONDS)
        ready = time.monotonic() - began
        _wait_alone(process.pid, launch.num_processes)
        yield Running(launch.name, launch.port, launch.path, process.pid, ready)
    finally:
        _end(process)


def require_workers_flag() -> None:
    """Raises ConfigurationError where `verbatim serve` has no `--workers`."""
    if not has_workers_flag():
        raise ConfigurationError("this `verbatim serve` has no --workers")


def has_workers_flag() -> bool:
    """Whether `verbatim serve` can run as several processes on one port."""
    said = subprocess.run(
        [sys.executable, "-c", _VERBATIM, "serve", "--help"], capture_output=True, text=True, check=True, cwd=_ROOT
    ).stdout
    return "--workers" in said


def raise_descriptor_limit() -> None:
    """As far as this process may; all that it starts inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _wait_alone(pid: int, num_processes: int) -> None:
    """Until helpers of the start have ended, whose CPU and memory are no turn's; not longer than a start takes."""
    deadline = time.monotonic() + _READY_SECONDS
    while 0 < num_processes < sum(1 for _ in tree(pid)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _wait_ready(process: subprocess.Popen[bytes], launch: Launch, log: Path, deadline: float) -> None:
    url = f"http://127.0.0.1:{launch.port}{launch.ready}"
    while True:
        if process.poll() is not None:
            raise EngineUnavailable(f"{launch.name} ended with {process.returncode} before it served: {_tail(log)}")
        if time.monotonic() > deadline:
            raise EngineUnavailable(f"{launch.name} does not serve after {_READY_SECONDS:g} s: {_tail(log)}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            pass
        time.sleep(0.01)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-800:]


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
