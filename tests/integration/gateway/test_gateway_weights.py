"""Weights change under running agents, on the embedded engine: nobody notices, and every token's version is exact.

The checkpoints are made so that each token can be sampled by one version only, and every record is held against the
engine's own words at its door and against plain forwards (`benchmarks/weights`).
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.updates import MODES, Run, Stage, UpdateSettings, run_updates, staged
from benchmarks.weights.agents import Load, Seen, agents_under_way
from benchmarks.weights.door import Served
from benchmarks.weights.judge import Evidence, Verdict, judge
from benchmarks.weights.telling import Scored, TellingWeights, Tie, forward_of, make_telling
from engines.launch import running_engine
from engines.weights.disk import DiskTransport
from engines.weights.names import LOADING, weight_label
from tests.waiting import until_async

pytestmark = pytest.mark.timeout(180)

NUM_UPDATES = 10
LONGEST_PAUSE = 1.5
_PROMPT = 40
FEW = Load(agents=4, turns=2, tokens=(160, 240), seed=1)
QUICK = ("replicas.health_interval_seconds=0.2", "replicas.found_pause_seconds=1.0")
PUBLISHER = """
import asyncio, sys
from pathlib import Path
from engines.weights.disk import DiskTransport
from gateway.client import GatewayClient

async def main(gateway, engine, checkpoint, version, mode, seconds):
    async with GatewayClient(gateway) as client:
        print("here", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        await client.pause(mode, max_seconds=float(seconds))
        transport = DiskTransport(pause=None, flush_cache=mode != "keep")
        await transport.publish(Path(checkpoint), policy_version=int(version), engine_urls=[engine])
        print("now", flush=True)
        await asyncio.sleep(600)

asyncio.run(main(*sys.argv[1:]))
"""
"""A trainer's publisher, which begins at a line of its input and never comes to resuming: it is killed."""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> TellingWeights:
    return make_telling(tmp_path_factory.mktemp("policies"), num_versions=NUM_UPDATES + 1, seed=1)


@pytest.fixture(scope="module")
def engine_url(weights: TellingWeights) -> Iterator[str]:
    with running_engine(weights.folders[0], flags=("--dtype", "float32")) as engine:
        yield engine.url


@pytest.fixture(scope="module")
def ten_updates(weights: TellingWeights, engine_url: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Ten updates, in each of the four modes in turn, under 10 agents."""
    settings = UpdateSettings(updates=NUM_UPDATES, every_seconds=0.2, load=Load(agents=10, turns=3, tokens=(30, 70)))
    return asyncio.run(run_updates(tmp_path_factory.mktemp("run"), engine_url, weights, settings))


def test_ten_updates_under_load_are_seen_by_no_agent_and_recorded_by_token(ten_updates: Run) -> None:
    """I5, I9: no error; every token's version, flag, log-prob and row as the engine, the token and a forward say."""
    assert [update.policy_version for update in ten_updates.made] == list(range(1, NUM_UPDATES + 1))
    assert ten_updates.seen.errors == []
    assert ten_updates.verdict.faults == []
    assert ten_updates.verdict.turns == ten_updates.seen.num_replies > 10
    assert ten_updates.verdict.rows_differing == 0


def test_updates_came_into_running_turns_in_every_mode_but_drain(ten_updates: Run) -> None:
    """I5: what was judged is what it is about; a drained engine gives one version a turn."""
    turns_by_mode: Counter[str] = Counter()
    for update in ten_updates.made:
        turns_by_mode[update.pause] += ten_updates.verdict.changes[update.policy_version]
    assert turns_by_mode["drain"] == 0
    assert all(turns_by_mode[mode] for mode in MODES if mode != "drain"), turns_by_mode
    assert ten_updates.verdict.flags["recomputed"] > 0 < ten_updates.verdict.flags["older"]


async def test_a_publisher_killed_mid_update_leaves_a_gateway_that_goes_on(
    weights: TellingWeights, engine_url: str, tmp_path: Path
) -> None:
    """I5: its pause ends by itself; tokens name the weights that it had brought, though nobody told the gateway."""
    async with fresh_stage(tmp_path, engine_url, weights) as stage:
        async with agents_under_way(stage.url, FEW) as seen:
            for version, mode in enumerate(("abort", "keep", "retract"), start=1):
                async with killed_publisher(stage, version, mode):
                    assert (await stage.gateway.generation())["paused"] == mode
                    await until_paused(stage, None)
                await until_more_replies(seen, FEW.agents)
        verdict = await checked(stage, seen)
    assert all(verdict.changes[version] for version in (1, 2, 3))


async def test_a_pause_with_a_longest_time_ends_by_itself_and_not_before(
    weights: TellingWeights, engine_url: str, tmp_path: Path
) -> None:
    """I5: nothing is sampled meanwhile; turns go on as one reply each, and a mere pause flags none of them."""
    async with fresh_stage(tmp_path, engine_url, weights) as stage:
        async with agents_under_way(stage.url, FEW) as seen:
            for mode in ("keep", "retract", "abort"):
                await until_busy(stage)
                began = time.monotonic()
                await stage.gateway.pause(mode, max_seconds=LONGEST_PAUSE)
                await asyncio.sleep(0.2)  # what was on its way has arrived
                sampled = [len(one.token_ids) for one in stage.door.served]
                await asyncio.sleep(0.2)
                assert [len(one.token_ids) for one in stage.door.served] == sampled
                assert (await stage.gateway.generation())["max_seconds"] == LONGEST_PAUSE
                await until_paused(stage, None)
                assert time.monotonic() - began >= LONGEST_PAUSE
        verdict = await checked(stage, seen)
    assert (verdict.changed, verdict.flags) == (0, {})


async def test_an_engine_that_a_dead_publisher_paused_itself_is_found_and_resumed(
    weights: TellingWeights, engine_url: str, tmp_path: Path
) -> None:
    """I5: the engine is shown as found paused, its turns wait, and go on under what it holds after so long."""
    async with fresh_stage(tmp_path, engine_url, weights) as stage:
        async with agents_under_way(stage.url, FEW) as seen:
            await until_busy(stage)
            async with stage.http.post(f"{engine_url}/pause_generation", json={"mode": "retract"}) as answer:
                answer.raise_for_status()
            await DiskTransport(pause=None).publish(weights.folders[1], policy_version=1, engine_urls=[engine_url])
            await until_paused(stage, "found")
            async with stage.http.get(f"{stage.url}/ready") as answer:
                assert (await answer.json())["engines_found_paused"] == 1
            await until_paused(stage, None)
            await until_more_replies(seen, FEW.agents)
        verdict = await checked(stage, seen)
    assert verdict.changes[1] > 0


async def test_tokens_of_half_loaded_weights_are_never_trained(
    weights: TellingWeights, engine_url: str, tmp_path: Path
) -> None:
    """I9: a trainer died while it loaded, and somebody resumed the engine; the next publication makes it whole."""
    async with fresh_stage(tmp_path, engine_url, weights) as stage:
        body = {"messages": [{"role": "user", "content": "Go on."}], "max_tokens": 200, "ignore_eos": True}
        body["stream_interval"] = 1  # the door is to see how far it is
        url = f"{stage.url}/sessions/half-loaded/v1/chat/completions"
        asked = asyncio.create_task(stage.http.post(url, json=body))
        await until_async(lambda: stage.door.num_sampling > 0)
        loading = {"new_version": weight_label(1) + LOADING, "abort_all_requests": False}
        async with stage.http.post(f"{engine_url}/update_weight_version", json=loading) as answer:
            answer.raise_for_status()
        async with asyncio.timeout(30):
            while (engine := (await stage.gateway.engines())[0])["healthy"]:  # noqa: ASYNC110 (of another process)
                await asyncio.sleep(0.05)
        assert "holds a part of the weights policy-000001" in engine["last_error"]
        await until_async(lambda: stage.door.served[0].whole)
        await DiskTransport().publish(weights.folders[1], policy_version=1, engine_urls=[engine_url])
        async with await asked as answer:
            assert answer.status == 200
        async with stage.http.get(f"{stage.url}/sessions/half-loaded/turns") as answer:
            [turn] = (await answer.json())["turns"]
        assert turn["num_output_tokens"] == 200
        assert turn["untrainable_reason"] == "policy_version_uncertain"


def test_the_judge_finds_what_is_wrong(ten_updates: Run) -> None:
    """The checks above can fail: a version, a flag or a token that is off by one is told."""
    evidence = _few_sessions(ten_updates.evidence)
    assert judge(evidence).faults == []
    for harm in (_shifted_version, _dropped_flag, _added_flag, _dropped_request):
        segments, served = harm(dict(evidence.segments), list(evidence.served))
        assert judge(replace(evidence, segments=segments, served=served)).faults, harm.__name__


def test_the_judge_settles_ties_of_experts_and_nothing_else(weights: TellingWeights) -> None:
    """An engine that took the other of two experts that weigh the same is right; it is wrong anywhere else."""
    forward, randomness, share = forward_of(weights), np.random.default_rng(0), sorted(weights.shares[0])
    scored = None
    while scored is None or not scored.ties or scored.ties[0].position < _PROMPT:
        token_ids = [int(token_id) for token_id in randomness.choice(share, 300)]
        scored = forward.score(0, token_ids)
    tie = scored.ties[0]
    other = forward.score(0, token_ids, frozenset([tie]))
    assert (other.experts != scored.experts).any()
    for said, is_right in ((scored, True), (other, True), (forward.score(0, token_ids, _elsewhere(tie)), False)):
        verdict = judge(_evidence(weights, token_ids, said))
        assert verdict.rows == len(token_ids) - _PROMPT
        assert (verdict.rows_differing == 0, verdict.strays == 0) == (is_right, is_right)
        assert verdict.faults == [] or not is_right


def _elsewhere(tie: Tie) -> frozenset[Tie]:
    """In the first layers, so that what follows sees it."""
    return frozenset(Tie(layer, tie.position - 1) for layer in (0, 1))


def _evidence(weights: TellingWeights, token_ids: list[int], said: Scored) -> Evidence:
    """One turn, as an engine would say it that computed this."""
    num_output = len(token_ids) - _PROMPT
    turn = {"turn_id": "turn-0", "output_start": _PROMPT, "stop": len(token_ids), "cache_flags": []}
    segment = {
        "token_ids": token_ids,
        "policy_version": [0] * len(token_ids),
        "rollout_logprobs": [0.0, *said.logprobs.tolist()],
        "routed_experts": [*said.experts.tolist(), said.experts[-1].tolist()],
        "routed_valid": [True] * (len(token_ids) - 1) + [False],
        "turns": [turn],
    }
    served = Served("one", tuple(token_ids[:_PROMPT]), begun=0.0, token_ids=token_ids[_PROMPT:], finish="length")
    served.labels = [weight_label(0)] * num_output
    return Evidence({"session": [segment]}, [served], weights, 1)


def _few_sessions(evidence: Evidence) -> Evidence:
    """The first sessions that have what is harmed: a flagged turn, and one that is not."""
    chosen: dict[str, Any] = {}
    are_flagged: set[bool] = set()
    for session_id, [segment] in evidence.segments.items():
        if len(are_flagged) < 2:
            chosen[session_id] = [segment]
            are_flagged |= {"recomputed" in span["cache_flags"] for span in segment["turns"]}
    sequences = [segment["token_ids"] for [segment] in chosen.values()]
    served = [one for one in evidence.served if any(ids[: len(one.prompt)] == [*one.prompt] for ids in sequences)]
    num_turns = sum(len(segment["turns"]) for [segment] in chosen.values())
    return Evidence(chosen, served, evidence.weights, num_turns)


def _harmed(segments: dict[str, Any], choose: Any, change: Any) -> dict[str, Any]:
    """A copy in which the first turn that is `choose`n is changed."""
    for session_id, [segment] in segments.items():
        for i, span in enumerate(segment["turns"]):
            versions = segment["policy_version"][span["output_start"] : span["stop"]]
            if choose(span, versions):
                changed = {**segment, "turns": [*segment["turns"]], "policy_version": [*segment["policy_version"]]}
                change(changed, i)
                return {**segments, session_id: [changed]}
    raise AssertionError("there is no such turn")


def _shifted_version(segments: dict[str, Any], served: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    def shift(segment: dict[str, Any], i: int) -> None:
        span = segment["turns"][i]
        versions = segment["policy_version"]
        at = next(t for t in range(span["output_start"] + 1, span["stop"]) if versions[t] != versions[t - 1])
        versions[at] = versions[at - 1]

    return _harmed(segments, lambda span, versions: len(set(versions)) > 1, shift), served


def _dropped_flag(segments: dict[str, Any], served: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    def drop(segment: dict[str, Any], i: int) -> None:
        flags = [flag for flag in segment["turns"][i]["cache_flags"] if flag != "recomputed"]
        segment["turns"][i] = {**segment["turns"][i], "cache_flags": flags}

    return _harmed(segments, lambda span, versions: "recomputed" in span["cache_flags"], drop), served


def _added_flag(segments: dict[str, Any], served: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    def add(segment: dict[str, Any], i: int) -> None:
        span = segment["turns"][i]
        segment["turns"][i] = {**span, "cache_flags": [*span["cache_flags"], "recomputed"]}

    return _harmed(segments, lambda span, versions: "recomputed" not in span["cache_flags"], add), served


def _dropped_request(segments: dict[str, Any], served: list[Any]) -> tuple[dict[str, Any], list[Any]]:
    last = max(range(len(served)), key=lambda i: len(served[i].token_ids))
    return segments, [one if i != last else replace(one, token_ids=[], labels=[]) for i, one in enumerate(served)]


@asynccontextmanager
async def fresh_stage(folder: Path, engine_url: str, weights: TellingWeights) -> AsyncIterator[Stage]:
    """A gateway that looks often, before the engine with its first weights again."""
    await DiskTransport().publish(weights.folders[0], policy_version=0, engine_urls=[engine_url])
    async with staged(folder, engine_url, weights, gateway_settings=QUICK) as stage:
        yield stage


@asynccontextmanager
async def killed_publisher(stage: Stage, version: int, mode: str) -> AsyncIterator[None]:
    """One that paused while turns were under way, brought weights, and is killed before it tells the gateway."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PUBLISHER, stage.url, stage.door.engine_url),
        *(str(stage.weights.folders[version]), str(version), mode, "3.0"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        assert await process.stdout.readline() == b"here\n"
        await until_busy(stage)
        process.stdin.write(b"\n")
        assert await process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
        yield
    finally:
        if process.returncode is None:
            await process.wait()


async def checked(stage: Stage, seen: Seen) -> Verdict:
    """No agent saw an error, and nothing is wrong with the records."""
    assert seen.errors == []
    verdict = judge(await stage.evidence(seen))
    assert verdict.faults == []
    return verdict


async def until_busy(stage: Stage) -> None:
    await until_async(lambda: stage.door.num_sampling >= FEW.agents // 2)


async def until_more_replies(seen: Seen, number: int) -> None:
    wanted = seen.num_replies + number
    await until_async(lambda: seen.num_replies >= wanted or bool(seen.errors))


async def until_paused(stage: Stage, mode: str | None) -> None:
    async with asyncio.timeout(20):
        while (await stage.gateway.generation())["paused"] != mode:  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.05)
