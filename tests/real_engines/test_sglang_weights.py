"""The real SGLang 0.5.23 under running agents while weights change: by disk and by broadcast, in each pause.

Every token's version, as the gateway recorded it, is held against SGLang's own `weight_versions` at its door, against
the token itself (each can be said by one version only) and against a transformers forward (`benchmarks/weights`).
Runs where `tests/real_engines/install.sh sglang` has made `.venv-sglang` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator

import pytest

from benchmarks.updates import Run, UpdateSettings, run_updates, shown
from benchmarks.weights.agents import Load
from benchmarks.weights.telling import TellingWeights, make_telling
from tests.real_engines.servers import real_sglang

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]

NUM_UPDATES = 10
SETTINGS = UpdateSettings(
    updates=NUM_UPDATES,
    modes=("abort", "keep", "retract"),
    transports=("disk", "gloo"),
    every_seconds=0.5,
    load=Load(agents=8, turns=3, tokens=(120, 240)),
)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> TellingWeights:
    return make_telling(tmp_path_factory.mktemp("policies"), num_versions=NUM_UPDATES + 1, seed=1)


@pytest.fixture(scope="module")
def sglang_url(weights: TellingWeights, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with real_sglang(weights.folders[0], tmp_path_factory.mktemp("log") / "sglang.log") as url:
        yield url


@pytest.fixture(scope="module")
def ten_updates(weights: TellingWeights, sglang_url: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return asyncio.run(run_updates(tmp_path_factory.mktemp("run"), sglang_url, weights, SETTINGS))


def test_ten_updates_under_load_are_seen_by_no_agent_and_recorded_by_token(ten_updates: Run) -> None:
    """I5, I9: no error; every token's version, flag, log-prob and row as SGLang, the token and a forward say."""
    assert [update.policy_version for update in ten_updates.made] == list(range(1, NUM_UPDATES + 1))
    assert ten_updates.seen.errors == []
    assert ten_updates.verdict.faults == [], shown(ten_updates)
    assert ten_updates.verdict.turns == ten_updates.seen.num_replies > 8


def test_updates_of_every_kind_came_into_running_turns(ten_updates: Run) -> None:
    """I5: abort, in place and retract, each from disk and by broadcast, changed weights inside turns."""
    turns_by_kind: Counter[tuple[str, str]] = Counter()
    for update in ten_updates.made:
        turns_by_kind[update.pause, update.transport_name] += ten_updates.verdict.changes[update.policy_version]
    assert all(turns_by_kind[mode, carrier] for mode in SETTINGS.modes for carrier in SETTINGS.transports), (
        turns_by_kind
    )
    assert ten_updates.verdict.flags["recomputed"] > 0 < ten_updates.verdict.flags["older"]
