"""Runs random histories and judges them: the loop behind `verbatim bench tokens` and the property test."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from benchmarks.agents import Agent, Asked
from benchmarks.judge import Failure, History
from benchmarks.witness import joined
from benchmarks.workshop import Bench, LocalChat, ManyGateways, ModelChoice, Workshop
from gateway.contracts.errors import VerbatimError
from gateway.contracts.records import Outcome
from gateway.sessions.picks import DeliveredTurns
from gateway.sessions.segments import load_rollout

_AT_ONCE = 24
_RESTART_EVERY = 11
"""Of so many histories one is continued by a gateway that knows it from the ledger only."""


@dataclass(frozen=True, slots=True)
class Judged:
    """One history's verdict."""

    seed: int
    choice: ModelChoice
    failures: Sequence[Failure]
    counts: Counter[str]


async def run_history(
    workshop: Workshop, choices: Sequence[ModelChoice], seed: int, *, num_gateways: int = 1
) -> Judged:
    """Play and judge the history of one seed; the seed decides everything, the model too."""
    rng = random.Random(seed)
    choice = choices[seed % len(choices)]
    benches = [await workshop.bench(choice, number) for number in range(num_gateways)]
    session_id = f"history-{seed}"
    await benches[0].session(session_id)
    agent = Agent(rng, ManyGateways(benches, session_id), max_requests=rng.choice((3, 6, 10, 16)))
    await agent.play()
    repeated: tuple[Asked, Asked] | None = None
    if seed % _RESTART_EVERY == 0:
        # Between replies of the very same words the latest delivery decides, so both have to know the same deliveries.
        await asyncio.gather(*(_deliveries_noted(bench, session_id) for bench in benches))
        benches.append(await workshop.fresh_bench(choice))
        repeated = await agent.repeat_at(LocalChat(benches[-1], await benches[-1].registry.get(session_id)))
    try:
        history = await _history(workshop, benches, session_id, agent)
    except VerbatimError as error:
        return Judged(seed, choice, [Failure("I3 a finished session can be read", str(error))], Counter())
    judge = benches[0].judge
    findings = judge.judge(history)
    if repeated is not None:
        judge.judge_restart(history, *repeated, findings)
    return Judged(seed, choice, findings.failures, findings.counts)


async def run_histories(
    workshop: Workshop, choices: Sequence[ModelChoice], seeds: Sequence[int], *, num_gateways: int = 1
) -> AsyncIterator[Judged]:
    """Judge many histories, a few at a time."""
    for start in range(0, len(seeds), _AT_ONCE):
        batch = seeds[start : start + _AT_ONCE]
        plays = (run_history(workshop, choices, seed, num_gateways=num_gateways) for seed in batch)
        for judged in await asyncio.gather(*plays):
            yield judged


async def _history(workshop: Workshop, benches: Sequence[Bench], session_id: str, agent: Agent) -> History:
    # The last gateway process finishes the session; what the others still had to note is noted by then.
    for bench in benches[:-1]:
        await _deliveries_noted(bench, session_id)
    end = await benches[-1].registry.finish(session_id, reward=1.0, outcome=Outcome.COMPLETED, metadata={})
    turns = await workshop.ledger.turns(session_id)
    rollout = await load_rollout(workshop.ledger, session_id, end.snapshot, DeliveredTurns())
    served = {asked.seed: [s for bench in benches for s in bench.witness.take(asked.seed)] for asked in agent.asked}
    for bench in benches:
        bench.scripted.requests.clear()
    sampled = {seed: joined(requests) for seed, requests in served.items() if requests}
    return History(agent.asked, sampled, turns, rollout.segments)


async def _deliveries_noted(bench: Bench, session_id: str) -> None:
    await (await bench.registry.get(session_id)).deliveries_noted()
