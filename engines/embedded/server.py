"""`verbatim engine`: the embedded engine as a process of its own, speaking SGLang's HTTP protocol and vLLM's."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from engines.embedded.settings import EngineSettings
from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import LogprobKind
from gateway.contracts.settings import load_settings, settings_toml
from gateway.contracts.telemetry import ready_line

if TYPE_CHECKING:
    from engines.embedded.engine import EmbeddedEngine

_FLAGS = (
    ("--model", "model", str, "checkpoint folder in Hugging Face format"),
    ("--host", "host", str, "address to listen on"),
    ("--port", "port", int, "port to listen on; 0 takes a free one"),
    ("--dtype", "dtype", str, "bfloat16 or float32"),
    ("--max-running-requests", "max_running_requests", int, "sequences decoded together"),
    ("--context-length", "context_length", int, "longest sequence; 0 takes the model's own"),
    ("--weight-version", "weight_version", str, "label of the weights loaded at start"),
    ("--served-model-name", "served_model_name", str, "name in /v1/models"),
    ("--seed", "seed", int, "of requests that bring none"),
)
"""flag, setting, type, help"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add this command's flags."""
    for flag, name, kind, text in _FLAGS:
        parser.add_argument(flag, dest=name, type=kind, help=text)
    parser.add_argument("--config", type=Path, help="TOML file with these settings")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--print-config", action="store_true", help="show the settings and stop")


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; raises ConfigurationError for a missing model or a taken port."""
    settings = read_settings(arguments)
    if arguments.print_config:
        sys.stdout.write(settings_toml(settings))
        return 0
    # Before torch is imported: OpenMP reads it once.
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    listener = bind(settings.host, settings.port)
    engine = make_engine(settings)
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(engine, settings, listener))


def read_settings(arguments: argparse.Namespace) -> EngineSettings:
    """Flags over `--set` over the file."""
    given = {name: getattr(arguments, name) for _, name, _, _ in _FLAGS}
    flags = [f"{name}={_toml_text(value)}" for name, value in given.items() if value is not None]
    return load_settings(EngineSettings, file=arguments.config, overrides=[*arguments.overrides, *flags])


def _toml_text(value: str | int) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "") + "'"


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; raises ConfigurationError if the address cannot be had."""
    try:
        return socket.create_server((host, port), backlog=2048, reuse_port=False)
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def make_engine(settings: EngineSettings) -> EmbeddedEngine:
    """Load the model and size the engine for it."""
    import torch

    from engines.embedded.engine import EmbeddedEngine, EngineLimits
    from engines.embedded.model import DTYPES, load_model

    torch.set_num_threads(settings.threads)
    model = load_model(settings.model, DTYPES[settings.dtype.value])
    own_length = int(model.network.config.max_position_embeddings)
    limits = EngineLimits(
        context_length=min(settings.context_length or own_length, own_length),
        max_running=settings.max_running_requests,
        num_slots=settings.max_running_requests + settings.retained_slots,
        chunk_tokens=settings.chunked_prefill_size,
        stream_interval=settings.stream_interval,
    )
    raw = os.environ.get("SGLANG_RETURN_ORIGINAL_LOGPROB", "").lower() in ("1", "true")
    return EmbeddedEngine(
        model,
        limits=limits,
        weight_version=settings.weight_version,
        seed=settings.seed,
        logprob_kind=LogprobKind.RAW if raw else LogprobKind.TEMPERATURE_SCALED,
    )


async def serve(engine: EmbeddedEngine, settings: EngineSettings, listener: socket.socket) -> int:
    """Serve on `listener` until SIGTERM or SIGINT (0) or until the engine's thread fails (1)."""
    import uvicorn

    from engines.embedded.app import EngineServer, build_app
    from engines.embedded.vllm_routes import add_vllm_routes

    class Server(uvicorn.Server):
        """Says when it is ready; leaves signals to us, as uvicorn's own handling ends the process by the signal."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            host, port = listener.getsockname()[:2]
            sys.stdout.write(ready_line("engine", f"http://{host}:{port}") + "\n")
            sys.stdout.flush()

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    shared = EngineServer(engine, settings)
    app = build_app(shared)
    add_vllm_routes(app, shared)
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=5))
    loop = asyncio.get_running_loop()

    def stop_serving() -> None:
        engine.abort("", everything=True)  # open streams end with what they have
        server.should_exit = True

    def failed() -> None:
        loop.call_soon_threadsafe(stop_serving)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop_serving)
    engine.start(on_failure=failed)
    await server.serve(sockets=[listener])
    engine.stop()
    return 0 if engine.failure is None else 1
