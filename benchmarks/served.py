"""Histories over real HTTP: a gateway process that is killed and started again half-way through every history.

Half of the requests stream; what an agent gathers from the deltas is held against the record like any other reply.
"""

from __future__ import annotations

import asyncio
import json
import random
import selectors
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from benchmarks.agents import Agent, Answer, Answered, Message, Refused, Vanished
from benchmarks.histories import Judged
from benchmarks.judge import History, Judge
from benchmarks.models.families import FAMILIES, write_model
from benchmarks.policy import SEED_FIELD
from benchmarks.witness import Served, joined
from benchmarks.workshop import ModelChoice
from engines.launch import free_port
from gateway.client import GatewayClient
from gateway.client_calls import path_segment
from gateway.contracts.errors import EngineUnavailable
from gateway.contracts.rollouts import FinishedRollout
from gateway.ledger.sqlite import SqliteLedger
from gateway.tito.template import ChatTemplate

_PROGRAM = Path(__file__).parent / "gateway_process.py"
_READY_SECONDS = 60.0
_LEAVES_AFTER_SECONDS = 0.004


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one model's gateway lives; the same before and after a restart."""

    choice: ModelChoice
    folder: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def witness_file(self) -> Path:
        return self.folder / "witness.jsonl"


async def run_served_histories(choice: ModelChoice, seeds: Sequence[int]) -> list[Judged]:
    """Play the histories of `seeds` at once against one gateway, kill it when each is half done, and judge them."""
    with tempfile.TemporaryDirectory(prefix="verbatim-bench-") as folder:
        place = _Place(choice, Path(folder), free_port())
        write_model(place.model, family=FAMILIES[choice.family], vocabulary=choice.vocabulary)
        async with aiohttp.ClientSession() as http:
            agents = {_session_id(seed): _agent(seed, place, http) for seed in seeds}
            async with _gateway(place, kill=True):
                await asyncio.gather(*(agent.play() for agent in agents.values()))
                await asyncio.gather(*(_noted(place, http, session_id) for session_id in agents))
            async with _gateway(place, kill=False), GatewayClient(place.url) as client:
                await asyncio.gather(*(_play_on(agent) for agent in agents.values()))
                rollouts = await asyncio.gather(*(_finished(client, session_id) for session_id in agents))
        return await _judge(place, dict(zip(seeds, zip(agents.values(), rollouts, strict=True), strict=True)))


@dataclass(frozen=True, slots=True, eq=False)
class _HttpChat:
    """`agents.Chat` as a plain HTTP client."""

    http: aiohttp.ClientSession
    url: str

    async def __call__(self, body: Message, *, leave_early: bool) -> Answer:
        streams = body[SEED_FIELD] % 2 == 0
        try:
            async with asyncio.timeout(_LEAVES_AFTER_SECONDS if leave_early else None):
                async with self.http.post(self.url, json={**body, "stream": streams}) as reply:
                    if reply.status != 200:
                        return Refused(reply.status, (await reply.json())["error"]["message"])
                    choice = await _gathered(reply) if streams else (await reply.json())["choices"][0]
        except TimeoutError:
            return Vanished()
        # A null that OpenAI's shape requires; the record holds what was sampled.
        message = {name: value for name, value in choice["message"].items() if name != "refusal"}
        return Answered(message, choice["finish_reason"])


async def _gathered(reply: aiohttp.ClientResponse) -> dict[str, Any]:
    """A streamed reply as one choice."""
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": []}
    calls: list[Message] = []
    finish_reason = None
    async for line in reply.content:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        for choice in json.loads(line[6:])["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            for name, pieces in texts.items():
                pieces.append(choice["delta"].get(name) or "")
            for delta in choice["delta"].get("tool_calls") or ():
                _add_call(calls, delta)
    message: Message = {"role": "assistant", "content": "".join(texts["content"]) or None}
    if reasoning := "".join(texts["reasoning_content"]):
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return {"message": message, "finish_reason": finish_reason}


def _add_call(calls: list[Message], delta: Message) -> None:
    if "id" in delta:
        function = {"name": delta["function"]["name"], "arguments": ""}
        calls.append({"id": delta["id"], "type": delta["type"], "function": function})
    calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]


def _session_id(seed: int) -> str:
    return f"history-{seed}"


def _agent(seed: int, place: _Place, http: aiohttp.ClientSession) -> Agent:
    url = f"{place.url}/sessions/{path_segment(_session_id(seed))}/v1/chat/completions"
    return Agent(random.Random(seed), _HttpChat(http, url), max_requests=4)


async def _noted(place: _Place, http: aiohttp.ClientSession, session_id: str) -> None:
    """Wait until deliveries are on disk. A gateway that dies between a reply's last byte and that note has the reply,
    and does not know that it was seen, until a later turn goes on from it."""
    async with http.get(f"{place.url}/sessions/{path_segment(session_id)}/turns") as reply:
        await reply.read()


async def _play_on(agent: Agent) -> None:
    agent.max_requests *= 2
    await agent.play_on()


async def _finished(client: GatewayClient, session_id: str) -> FinishedRollout:
    end = await client.finish_session(session_id, reward=1.0)
    return await client.rollout(session_id, end["snapshot"])


@asynccontextmanager
async def _gateway(place: _Place, *, kill: bool) -> AsyncIterator[None]:
    """A gateway process; it ends by SIGKILL or by SIGTERM."""
    arguments = (
        place.choice.family,
        place.choice.history_policy,
        place.data,
        place.model,
        place.port,
        place.witness_file,
    )
    process = await asyncio.to_thread(_start, [str(argument) for argument in arguments])
    try:
        yield
    finally:
        (process.kill if kill else process.terminate)()
        await asyncio.to_thread(process.communicate)


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, str(_PROGRAM), *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]  # a pipe was asked for
        if not selector.select(_READY_SECONDS) or process.poll() is not None:
            process.kill()
            raise EngineUnavailable("the gateway process did not become ready")
    return process


async def _judge(place: _Place, played: dict[int, tuple[Agent, FinishedRollout]]) -> list[Judged]:
    """After the end, from the files that are left."""
    template = ChatTemplate.load(place.model)
    judge = Judge(place.model, FAMILIES[place.choice.family], template, place.choice.history_policy)
    sampled = {seed: joined(served) for seed, served in _witnessed(place.witness_file).items()}
    ledger = SqliteLedger.open(place.data, read_only=True)
    verdicts: list[Judged] = []
    for seed, (agent, rollout) in played.items():
        turns = await ledger.turns(_session_id(seed))
        findings = judge.judge(History(agent.asked, sampled, turns, rollout.segments))
        verdicts.append(Judged(seed, place.choice, findings.failures, findings.counts))
    await ledger.aclose()
    return verdicts


def _witnessed(file: Path) -> dict[int, list[Served]]:
    found: dict[int, list[Served]] = {}
    for line in file.read_text().splitlines():
        entry = json.loads(line)
        served = Served(np.asarray(entry["prompt"], dtype=np.int32), entry["ids"], entry["logprobs"])
        found.setdefault(entry["seed"], []).append(served)
    return found
