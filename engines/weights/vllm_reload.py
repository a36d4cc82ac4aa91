"""Weights by way of a folder that vLLM and trainer both see: vLLM reloads it in place (`reload_weights`).

vLLM itself checks nothing, so this does before anything is touched: a folder that is not there, or of another model,
leaves the server dead, and a mixture of experts on a CPU is answered with 200 and served wrong (measured with 0.30 and
0.32: log-probs off by 5 and more). Its server needs `VLLM_SERVER_DEV_MODE=1`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.connection import EngineHttp
from engines.identity import routing_of
from engines.weights.names import weight_label
from gateway.contracts.errors import EngineError, EngineRejected, RequestError, TransportError

_MUST_AGREE = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)


class VllmReloadTransport:
    """Has vLLM servers reload a checkpoint folder (implements `gateway.contracts.ports.WeightTransport`).

    Requests that run meanwhile wait and go on under the new weights with their cache computed anew. vLLM 0.30 does not
    say from which token on, so such turns are recorded as uncertain and do not train: drain the gateway first.
    api_key: of servers that were started with one.
    """

    def __init__(self, *, timeout_seconds: float = 600.0, api_key: str | None = None) -> None:
        self._timeout_seconds = timeout_seconds
        self._api_key = api_key

    async def publish(self, checkpoint: Path, *, policy_version: int, engine_urls: Sequence[str]) -> str:
        """Load `checkpoint` into every server at once and return their new label.

        Raises TransportError naming the first server that failed or must not be asked, when all have answered.
        """
        label = weight_label(policy_version)
        folder = _absolute(checkpoint)
        outcomes = await asyncio.gather(
            *(self._load(url, folder, label) for url in engine_urls), return_exceptions=True
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
        return label

    async def aclose(self) -> None:
        """Nothing is kept open between two publications."""

    async def _load(self, url: str, folder: Path, label: str) -> None:
        server = EngineHttp(
            url,
            engine_id=url,
            connect_timeout_seconds=10.0,
            idle_timeout_seconds=self._timeout_seconds,
            api_key=self._api_key,
        )
        try:
            info = await server.get_object("/server_info?config_format=json", timeout_seconds=self._timeout_seconds)
            await asyncio.to_thread(_check_sound, info.get("vllm_config"), folder, url)
            await self._reload(server, folder, label)
        except (EngineError, RequestError) as error:
            raise TransportError(f"weights {label} did not reach {url}: {error.message}") from error
        finally:
            await server.aclose()

    async def _reload(self, server: EngineHttp, folder: Path, label: str) -> None:
        await self._post(server, "/pause?mode=keep", {})
        try:
            await self._post(
                server, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
            )
            # Prefixes and running requests were computed by the old weights.
            await self._post(server, "/reset_prefix_cache?reset_running_requests=true", {})
            await self._post(server, "/update_weight_version", {"new_version": label})
        finally:
            await self._post(server, "/resume", {})
        served = (await server.get_object("/weight_info", timeout_seconds=self._timeout_seconds)).get("weight_version")
        if served != label:
            raise EngineRejected(f"{server.url} serves {served} after it was given {label}")

    async def _post(self, server: EngineHttp, path: str, body: Mapping[str, Any]) -> None:
        await server.post(path, body, timeout_seconds=self._timeout_seconds)


def _check_sound(vllm_config: Any, folder: Path, url: str) -> None:
    """Raise TransportError for a reload that vLLM would not survive, or would get wrong."""
    if not isinstance(vllm_config, dict):
        raise TransportError(f"{url} does not show its configuration: this needs a vLLM that does")
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise TransportError(f"{folder} is no checkpoint folder, and vLLM would die of it")
    config = json.loads((folder / "config.json").read_text())
    if routing_of(config.get("text_config", config)) is not None and vllm_config["device_config"]["device"] == "cpu":
        raise TransportError(
            f"{url} runs on a CPU, where vLLM answers 200 to a reload of a mixture of experts and then serves wrong "
            "weights: start it anew with the checkpoint instead"
        )
    served = Path(str(vllm_config["model_config"]["model"])) / "config.json"
    if served.is_file():  # else it is on another machine
        theirs = json.loads(served.read_text())
        differing = [name for name in _MUST_AGREE if theirs.get(name) != config.get(name)]
        if differing:
            raise TransportError(
                f"{folder} is another model than {url} serves ({', '.join(differing)} differ), and vLLM would die of it"
            )


def _absolute(folder: Path) -> Path:
    """Servers do not share this process's working directory."""
    return Path(os.path.abspath(folder))
