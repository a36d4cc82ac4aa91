"""Random agents over every tokenizer and template: every sampled token kept, and trained exactly once (I1-I4, I6).

The generator and the judge are `benchmarks/`; a failure names a seed: `verbatim bench tokens --seed N --histories 1`.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.tokens import report, run_many, run_many_served
from benchmarks.workshop import all_choices

NUM_MODELS = len(all_choices())


async def test_random_agents_lose_no_token_and_are_never_refused() -> None:
    """I1, I2, I3, I4, I6 over two histories of every model."""
    tally = await run_many(range(2 * NUM_MODELS))
    assert not tally.failures, report(tally)
    assert tally.counts["trained tokens"] > 40_000


async def test_random_agents_of_a_fresh_seed_lose_no_token() -> None:
    """I1, I2, I3, I4, I6 where nobody has looked before."""
    seed = random.SystemRandom().randrange(1 << 31)
    tally = await run_many(range(seed, seed + NUM_MODELS))
    assert not tally.failures, f"seed {seed}\n{report(tally)}"


async def test_random_agents_lose_no_token_whichever_of_several_gateways_they_ask() -> None:
    """I1, I2, I3, I4, I6 where each request goes to one of three gateways that share a ledger."""
    tally = await run_many(range(0, NUM_MODELS, 3), num_gateways=3)
    assert not tally.failures, report(tally)


async def test_random_agents_over_http_lose_no_token_when_the_gateway_is_killed() -> None:
    """I1, I3, I4, I6 over real HTTP: kill -9 half-way through every history, then the same place again."""
    tally = await run_many_served(range(20))
    assert not tally.failures, report(tally)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_ten_thousand_random_histories_lose_no_token() -> None:
    """I1, I2, I3, I4, I6 as `verbatim bench tokens` runs it."""
    seed = random.SystemRandom().randrange(1 << 31)
    tally = await run_many(range(seed, seed + 10_000))
    assert not tally.failures, f"seed {seed}\n{report(tally)}"
