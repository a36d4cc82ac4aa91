"""Runs random histories and judges them: the loop behind `verbatim bench tokens` and the property test."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.agents import Agent
from benchmarks.judge import Failure, Findings, History
from benchmarks.witness import joined
from benchmarks.workshop import Bench, LocalChat, ModelChoice, Workshop
from gateway.sessions.picks import DeliveredTurns
from gateway.sessions.segments import load_segments

_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class Judged:
    """One history's verdict."""

    seed: int
    choice: ModelChoice
    failures: Sequence[Failure]
    counts: Counter[str]


async def run_history(workshop: Workshop, choices: Sequence[ModelChoice], seed: int) -> Judged:
    """Play and judge the history of one seed; the seed decides everything, the model too."""
    rng = random.Random(seed)
    choice = choices[seed % len(choices)]
    bench = await workshop.bench(choice)
    session_id = f"history-{seed}"
    session = await bench.session(session_id)
    agent = Agent(rng, LocalChat(bench, session), max_requests=rng.choice((3, 6, 10, 16)))
    await agent.play()
    findings = await _judge(workshop, bench, session_id, agent)
    bench.scripted.requests.clear()
    return Judged(seed, choice, findings.failures, findings.counts)


async def run_histories(
    workshop: Workshop, choices: Sequence[ModelChoice], seeds: Sequence[int]
) -> AsyncIterator[Judged]:
    """Judge many histories, a few at a time."""
    for start in range(0, len(seeds), _AT_ONCE):
        batch = seeds[start : start + _AT_ONCE]
        for judged in await asyncio.gather(*(run_history(workshop, choices, seed) for seed in batch)):
            yield judged


async def _judge(workshop: Workshop, bench: Bench, session_id: str, agent: Agent) -> Findings:
    turns = await workshop.ledger.turns(session_id)
    _, segments = await load_segments(workshop.ledger, session_id, DeliveredTurns())
    served = {asked.seed: bench.witness.take(asked.seed) for asked in agent.asked}
    sampled = {seed: joined(requests) for seed, requests in served.items() if requests}
    return bench.judge.judge(History(agent.asked, sampled, turns, segments))
