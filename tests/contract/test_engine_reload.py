"""Reloading vLLM in place: what it would die of, or get wrong without a word, is refused before anything is touched."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from engines.launch import EngineProcess, free_port
from engines.weights.vllm_reload import VllmReloadTransport
from gateway.contracts.errors import TransportError


@dataclass
class Upstream:
    """A server that keeps what it is asked, in order."""

    model: Path
    device: str = "cuda"
    reload_status: int = 200
    keeps_label: bool = False
    label: str = "default"
    calls: list[str] = field(default_factory=list)

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes(
            [web.get("/server_info", self.info), web.get("/weight_info", self.weight), web.post("/{name}", self.post)]
        )
        return app

    async def info(self, request: web.Request) -> web.Response:
        config = {"model_config": {"model": str(self.model)}, "device_config": {"device": self.device}}
        return web.json_response({"vllm_config": config})

    async def weight(self, request: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.label})

    async def post(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        self.calls.append(name)
        body = await request.json()
        if name == "update_weight_version" and not self.keeps_label:
            self.label = body["new_version"]
        return web.json_response({}, status=self.reload_status if name == "collective_rpc" else 200)


@asynccontextmanager
async def served(upstream: Upstream) -> AsyncIterator[str]:
    runner = web.AppRunner(upstream.app())
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


async def publish(upstream: Upstream, checkpoint: Path) -> str:
    async with served(upstream) as url:
        return await VllmReloadTransport().publish(checkpoint, policy_version=4, engine_urls=[url])


async def test_weights_are_loaded_while_nothing_is_generated_and_no_prefix_survives(tiny_model: Path) -> None:
    """I5: label and weights change together, behind a pause, with the cache emptied between."""
    upstream = Upstream(tiny_model)
    assert await publish(upstream, tiny_model) == "policy-000004"
    assert upstream.calls == ["pause", "collective_rpc", "reset_prefix_cache", "update_weight_version", "resume"]


async def test_a_mixture_of_experts_on_a_cpu_is_refused(engine_process: EngineProcess, tiny_model: Path) -> None:
    """I5, I9: it would answer 200 and serve wrong weights; nothing is touched."""
    async with httpx.AsyncClient(base_url=engine_process.url) as client:
        before = (await client.get("/weight_info")).json()
        with pytest.raises(TransportError, match="wrong weights"):
            await VllmReloadTransport().publish(tiny_model, policy_version=4, engine_urls=[engine_process.url])
        assert (await client.get("/is_paused")).json() == {"is_paused": False}
        assert (await client.get("/weight_info")).json() == before
        assert before["weight_version"] != "policy-000004"


@pytest.mark.parametrize(
    ("changes", "words"),
    [(None, "no checkpoint folder"), ({"hidden_size": 96}, "hidden_size differ"), ({"vocab_size": 7}, "vocab_size")],
)
async def test_what_would_kill_the_server_is_refused(
    tiny_model: Path, tmp_path: Path, changes: dict[str, Any] | None, words: str
) -> None:
    """I3: a folder that is not there, or of another model, ends vLLM and everybody's requests."""
    if changes is not None:
        config = json.loads((tiny_model / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        (tmp_path / "model.safetensors").touch()
    upstream = Upstream(tiny_model)
    with pytest.raises(TransportError, match=words):
        await publish(upstream, tmp_path)
    assert upstream.calls == []


@pytest.mark.parametrize("trouble", [{"reload_status": 500}, {"keeps_label": True}])
async def test_a_load_that_failed_is_told_and_the_pause_is_lifted(tiny_model: Path, trouble: dict[str, Any]) -> None:
    """I5: no label is believed that the server does not show itself."""
    upstream = Upstream(tiny_model, **trouble)
    with pytest.raises(TransportError, match="policy-000004"):
        await publish(upstream, tiny_model)
    assert upstream.calls[-1] == "resume"
