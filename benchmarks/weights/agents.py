"""Agents of several turns that go on while weights change, and the updates themselves, as a trainer makes them."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from gateway.client import GatewayClient
from gateway.contracts.ports import WeightTransport

_QUESTIONS = ("Say more of the numbers.", "Go on.", "And then?", "What is the sum of these?", "In a few words, please.")
_REQUEST_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Load:
    """How many agents at once, and what each does. tokens: of one reply, fewest and most; turns: of one session."""

    agents: int = 24
    turns: int = 5
    tokens: tuple[int, int] = (30, 90)
    seed: int = 0


@dataclass(slots=True)
class Seen:
    """What the agents saw. errors: each failed request in a line; nothing was tried again."""

    sessions: list[str] = field(default_factory=list)
    num_replies: int = 0
    num_tokens: int = 0
    errors: list[str] = field(default_factory=list)


@asynccontextmanager
async def agents_under_way(url: str, load: Load) -> AsyncIterator[Seen]:
    """Agents talk to the gateway meanwhile; afterwards each finishes the session that it is in."""
    seen, over = Seen(), asyncio.Event()
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as http, asyncio.TaskGroup() as group:
        for number in range(load.agents):
            group.create_task(_agent(number, http, url, load, seen, over))
        try:
            yield seen
        finally:
            over.set()


async def _agent(
    number: int, http: aiohttp.ClientSession, url: str, load: Load, seen: Seen, over: asyncio.Event
) -> None:
    randomness = random.Random(f"{load.seed} {number}")
    life = 0
    while not over.is_set():
        session_id = f"agent-{number}-{life}"
        life += 1
        seen.sessions.append(session_id)
        messages: list[Any] = []
        for _ in range(load.turns):
            # Of one kind: who repeats an undelivered request word for word would be given the reply of the first.
            messages.append({"role": "user", "content": f"{randomness.choice(_QUESTIONS)} {randomness.random()}"})
            most = randomness.randint(*load.tokens)
            body = {"messages": messages, "max_tokens": most, "ignore_eos": True, "temperature": 1.0}
            body["stream_interval"] = 1  # the door is to see how far each reply is
            try:
                reply = await _reply(http, f"{url}/sessions/{session_id}/v1/chat/completions", body, randomness)
            except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
                seen.errors.append(f"{session_id}: {type(error).__name__}: {error}")
                break
            seen.num_replies += 1
            seen.num_tokens += most
            messages.append({"role": "assistant", "content": reply})


async def _reply(http: aiohttp.ClientSession, url: str, body: dict[str, Any], randomness: random.Random) -> str:
    """The reply's text, streamed every other time; raises ValueError for one that is not whole."""
    if randomness.random() < 0.5:
        async with http.post(url, json=body) as answer:
            content = await answer.read()
        if answer.status != 200:
            raise ValueError(f"{answer.status} {content[:300]!r}")
        whole = json.loads(content)
        if whole["usage"]["completion_tokens"] != body["max_tokens"]:
            raise ValueError(f"{whole['usage']} of {body['max_tokens']} tokens")
        return str(whole["choices"][0]["message"]["content"] or "")
    async with http.post(url, json=body | {"stream": True}) as answer:
        lines = [line.strip().removeprefix("data: ") for line in (await answer.text()).split("\n") if line.strip()]
    if answer.status != 200 or lines[-1] != "[DONE]":
        raise ValueError(f"{answer.status}, a stream that ends in {lines[-1]}")
    choices = [choice for line in lines[:-1] for choice in json.loads(line)["choices"]]
    if [choice["finish_reason"] for choice in choices if choice["finish_reason"]] != ["length"]:
        raise ValueError(f"a stream that ends in {choices[-1]}")
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@dataclass(frozen=True, slots=True)
class Update:
    """One update as it is to be made. pause: the gateway's mode; checkpoint: its folder."""

    pause: str
    transport_name: str
    transport: WeightTransport
    checkpoint: Path
    policy_version: int


@dataclass(frozen=True, slots=True)
class Updated:
    """One that was made. pause_seconds: until generation stood still; load_seconds: bringing the weights;
    paused_seconds: until it went on."""

    pause: str
    transport_name: str
    policy_version: int
    pause_seconds: float
    load_seconds: float
    paused_seconds: float


async def make_updates(
    gateway: GatewayClient,
    engine_urls: Sequence[str],
    updates: Sequence[Update],
    *,
    every_seconds: float,
    is_busy: Callable[[], bool],
) -> list[Updated]:
    """One after the other, each as a publisher makes it: pause, bring the weights, name the policy, resume.

    is_busy: each begins when this is so; raises TimeoutError if it never is.
    """
    made = []
    for update in updates:
        await asyncio.sleep(every_seconds)
        await until(is_busy, seconds=_REQUEST_SECONDS)
        made.append(await _made(gateway, engine_urls, update))
    return made


async def until(is_so: Callable[[], bool], *, seconds: float) -> None:
    """Wait until something that other tasks change is so; raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not is_so():  # noqa: ASYNC110 (lists of other tasks grow)
            await asyncio.sleep(0.005)


async def _made(gateway: GatewayClient, engine_urls: Sequence[str], update: Update) -> Updated:
    began = time.monotonic()
    await gateway.pause(update.pause, max_seconds=_REQUEST_SECONDS)
    try:
        still = time.monotonic()
        version = update.policy_version
        label = await update.transport.publish(update.checkpoint, policy_version=version, engine_urls=engine_urls)
        loaded = time.monotonic()
        await gateway.set_policy(version, label)
    finally:
        await gateway.resume()
    return Updated(
        pause=update.pause,
        transport_name=update.transport_name,
        policy_version=version,
        pause_seconds=still - began,
        load_seconds=loaded - still,
        paused_seconds=time.monotonic() - began,
    )
