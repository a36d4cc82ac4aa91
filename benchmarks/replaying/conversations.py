"""Agents that talk to a gateway, and what the feed then hands to a trainer.

talk ──chat──▶ gateway ──▶ engine          Talk says how; sessions of a group open alike, so prefixes are cached
rollouts ◀──feed── gateway                 as `verbatim train` reads them: leased, whole groups, decoded
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.models.words import SENTENCES
from gateway.client import GatewayClient
from gateway.contracts.rollouts import FinishedRollout
from trainer.data.source import RolloutSource
from trainer.processes import Children, free_port

_READY_SECONDS = 120.0
_FEED_SECONDS = 60.0
_REQUEST_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Talk:
    """What agents do. sampling: sets of request fields that the turns of a session take in turn. edits: sessions that
    rewrite their history before their last turn, so that it opens a new segment."""

    name: str
    seed: int
    groups: int = 3
    group_size: int = 4
    turns: int = 3
    max_tokens: int = 40
    edits: bool = True
    sampling: Sequence[Mapping[str, float]] = field(default=({"temperature": 1.0},))


@dataclass(frozen=True, slots=True, eq=False)
class Heard:
    """What came of a talk: rollouts from the feed, and how many prompt tokens engines found in their caches."""

    rollouts: tuple[FinishedRollout, ...]
    cached_tokens: int

    @property
    def num_segments(self) -> int:
        """Of all rollouts."""
        return sum(len(rollout.segments) for rollout in self.rollouts)


@contextmanager
def serving(model: Path, engine: str, folder: Path) -> Iterator[str]:
    """The address of a gateway process for `model`, in front of one engine (`KIND=URL`); all of it in `folder`."""
    with Children(folder / "logs") as children:
        flags = ["--engine", engine, "--model", str(model), "--port", str(free_port())]
        flags += ["--data", str(folder / "ledger"), "--require", "routed_experts"]
        yield children.start_server("serve", flags, timeout_seconds=_READY_SECONDS)


@contextmanager
def embedded_engine(model: Path, folder: Path, *flags: str) -> Iterator[str]:
    """The address of `verbatim engine` for `model`, with `flags`."""
    with Children(folder / "engine-logs") as children:
        fixed = ["--model", str(model), "--port", str(free_port())]
        yield children.start_server("engine", [*fixed, *flags], timeout_seconds=_READY_SECONDS)


async def converse(gateway_url: str, talk: Talk) -> Heard:
    """All sessions of a talk, one group after the other; then their rollouts from the feed."""
    timeout = aiohttp.ClientTimeout(total=_REQUEST_SECONDS)
    async with GatewayClient(gateway_url) as gateway, aiohttp.ClientSession(timeout=timeout) as http:
        cached = 0
        for group in range(talk.groups):
            agents = [_Agent(talk, group, member, gateway, http) for member in range(talk.group_size)]
            cached += sum(await asyncio.gather(*(agent.run() for agent in agents)))
        source = RolloutSource(gateway, run_name=talk.name, group_size=talk.group_size)
        taken = await source.take(talk.groups, wait_seconds=_FEED_SECONDS)
        await source.acknowledge(taken.lease_ids)
    if len(taken.rollouts) != talk.groups * talk.group_size:
        raise RuntimeError(f"the feed gave {len(taken.rollouts)} of {talk.groups * talk.group_size} rollouts")
    return Heard(taken.rollouts, cached)


@dataclass(frozen=True, slots=True)
class _Agent:
    talk: Talk
    group: int
    member: int
    gateway: GatewayClient
    http: aiohttp.ClientSession

    async def run(self) -> int:
        """Talk, finish with a reward, and return how many prompt tokens were cached."""
        talk, group = self.talk, f"{self.talk.name}-{self.group}"
        session = await self.gateway.create_session(
            session_id=f"{group}.{self.member}",
            group=group,
            group_size=talk.group_size,
            labels={"run": talk.name, "purpose": "train"},
        )
        # Sessions of a group begin with the same words, and then say different things.
        opening, rng = random.Random(f"{talk.seed} {self.group}"), random.Random(f"{talk.seed} {group} {self.member}")
        messages: list[Any] = [{"role": "user", "content": " ".join(opening.sample(SENTENCES, 3))}]
        cached = 0
        for turn in range(talk.turns):
            if talk.edits and self.member % 2 and turn == talk.turns - 1:
                messages[-2] = {"role": "assistant", "content": rng.choice(SENTENCES)}
            fields = {"max_tokens": talk.max_tokens, "ignore_eos": True} | talk.sampling[
                (turn + self.member) % len(talk.sampling)
            ]
            body = {"model": "any", "messages": messages} | fields
            url = f"{session.base_url}/chat/completions"
            headers = {"Authorization": f"Bearer {session.api_key}"}
            async with self.http.post(url, json=body, headers=headers) as reply:
                answer = await reply.json()
                if reply.status != 200:
                    raise RuntimeError(f"session {session.session_id}, turn {turn}: {answer}")
            cached += (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            messages += [answer["choices"][0]["message"], {"role": "user", "content": rng.choice(SENTENCES)}]
        await self.gateway.finish_session(session.session_id, reward=float(rng.random() < 0.5))
        return cached
