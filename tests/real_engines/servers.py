"""The real engines as processes on loopback: ready when they are handed out, gone with all that they started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from engines.launch import free_port

HERE = Path(__file__).resolve().parent
START_SECONDS = 240.0
VLLM_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_SERVER_DEV_MODE": "1",  # pauses, weight labels, the configuration
}


@contextmanager
def real_sglang(checkpoint: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of SGLang 0.5.23 serving `checkpoint` in float32 with routing, with `flags` on top."""
    fixed = [
        "--model-path", str(checkpoint), "--served-model-name", "tiny", "--device", "cpu", "--attention-backend",
        "torch_native", "--sampling-backend", "pytorch", "--disable-overlap-schedule", "--disable-cuda-graph",
        "--max-total-tokens", "20000", "--dtype", "float32", "--enable-return-routed-experts",
    ]  # fmt: skip
    with _serving("sglang", [str(HERE / "launch_sglang.py"), *fixed, *flags], {}, log) as url:
        yield url


@contextmanager
def real_vllm(checkpoint: Path, log: Path, *flags: str) -> Iterator[str]:
    """The address of vLLM 0.30.0 serving `checkpoint` in float32, with `flags` on top."""
    # Not the `vllm` command: it looks for a distribution of that name, and this one is called vllm-cpu.
    fixed = [
        "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--served-model-name", "tiny",
        "--dtype", "float32", "--max-num-seqs", "16", "--enforce-eager", "--disable-log-stats",
    ]  # fmt: skip
    with _serving("vllm", [*fixed, *flags], VLLM_ENVIRONMENT, log) as url:
        yield url


@contextmanager
def _serving(name: str, arguments: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[str]:
    python = HERE.parents[1] / f".venv-{name}" / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run tests/real_engines/install.sh {name} (make test-engines does)")
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(python), *arguments, "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
            start_new_session=True,
        )
    try:
        _wait_ready(f"http://127.0.0.1:{port}", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its own group: the server and all that it started
        process.wait()


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(url + "/health", timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"the engine did not start:\n{log.read_text(errors='replace')[-3000:]}")
