"""`gateway.client` against a real gateway process: sessions, the whole way of a rollout, operation, a restart."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import openai
import pytest

from gateway.client import GatewayClient
from gateway.client_calls import path_segment
from gateway.contracts.errors import Conflict, InvalidRequest, NotFound, Unauthorized

AWKWARD_ID = "train/4/späß 🙂 ?#%2F"


async def ask(url: str, session_id: str, content: str) -> dict[str, Any]:
    """One call of an agent, by the stock client."""
    async with GatewayClient(url) as gateway:
        handle = await gateway.create_session(session_id=session_id, labels={"asked": session_id})
    async with openai.AsyncOpenAI(base_url=handle.base_url, api_key=handle.api_key, max_retries=0) as agent:
        reply = await agent.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}])
    return reply.model_dump()


async def test_a_rollout_goes_from_an_agent_to_a_trainer(gateway: Any) -> None:
    """I1, I3: what the trainer reads is what the session's turns hold; acknowledged, it is never lent again."""
    await ask(gateway.url, AWKWARD_ID, "quick")
    async with GatewayClient(gateway.url) as client:
        assert (await client.session(AWKWARD_ID))["session_id"] == AWKWARD_ID
        first = await client.finish_session(AWKWARD_ID, reward=0.25, metadata={"checked": True})
        assert await client.finish_session(AWKWARD_ID, reward=0.25, metadata={"checked": True}) == first
        with pytest.raises(Conflict):
            await client.finish_session(AWKWARD_ID, reward=1.0)
        with pytest.raises(openai.ConflictError, match="finished"):
            await ask(gateway.url, AWKWARD_ID, "more")

        own = {"asked": AWKWARD_ID}  # other tests finish sessions in this gateway, too
        lease = await client.lease(consumer="rollout-test", limit=100, wait_seconds=5.0, labels=own)
        assert lease is not None
        lent = next(rollout for rollout in lease.rollouts if rollout.session_id == AWKWARD_ID)
        assert (lent.snapshot, lent.reward) == (first["snapshot"], 0.25)
        rollout = await client.rollout(AWKWARD_ID, lent.snapshot)
        (segment,) = rollout.segments
        (turn,) = gateway.turns(path_segment(AWKWARD_ID))
        assert segment.token_ids.tolist() == turn["prompt_token_ids"] + turn["output_token_ids"]
        assert rollout.num_sampled_tokens == lent.num_sampled_tokens == len(turn["output_token_ids"])
        assert rollout.finish.metadata == {"checked": True}

        with pytest.raises(Conflict):
            await client.delete_session(AWKWARD_ID)
        assert AWKWARD_ID in await client.acknowledge(lease.lease_id)
        again = await client.lease(consumer="rollout-test", limit=100, labels=own)
        assert again is None or AWKWARD_ID not in [rollout.session_id for rollout in again.rollouts]
        await client.drop(AWKWARD_ID, lent.snapshot)
        await client.delete_session(AWKWARD_ID)
        with pytest.raises(NotFound):
            await client.session(AWKWARD_ID)


async def test_sessions_are_listed_by_label(gateway: Any) -> None:
    labels = {"suite": "client test", "k:ey": "v:alue é"}
    async with GatewayClient(gateway.url) as client:
        for name in ("listed/b", "listed/a"):
            await client.create_session(session_id=name, labels={"suite": labels["suite"]})
        found = await client.sessions(labels={"suite": labels["suite"]}, limit=1)
        assert [session["session_id"] for session in found] == ["listed/a"]
        found = await client.sessions(labels={"suite": labels["suite"]}, after="listed/a")
        assert [session["session_id"] for session in found] == ["listed/b"]
        with pytest.raises(Conflict):
            await client.create_session(session_id="listed/a", group="another")


async def test_engines_pause_resume_and_policy(start_gateway: Any, tmp_path: Path) -> None:
    running = start_gateway(tmp_path / "data")
    async with GatewayClient(running.url) as client:
        assert isinstance(await client.health(), dict)
        (engine,) = await client.engines()
        assert engine
        await client.set_policy(3, "weights-3")
        await client.pause("keep")
        await client.resume()
        with pytest.raises(InvalidRequest):
            await client.pause("sideways")


async def test_leases_and_rollouts_outlive_a_killed_gateway(start_gateway: Any, tmp_path: Path) -> None:
    """I4: the trainer goes on with the lease that it had."""
    running = start_gateway(tmp_path / "data")
    await ask(running.url, "s", "quick")
    async with GatewayClient(running.url) as client:
        finish = await client.finish_session("s", reward=None, outcome="failed")
        lease = await client.lease(consumer="trainer", limit=1)
        assert lease is not None
        before = await client.rollout("s", finish["snapshot"])
    running.stop(signal.SIGKILL)
    running = start_gateway(tmp_path / "data")
    async with GatewayClient(running.url) as client:
        after = await client.rollout("s", finish["snapshot"])
        assert after.segments[0].token_ids.tolist() == before.segments[0].token_ids.tolist()
        assert after.finish == before.finish
        assert await client.lease(consumer="trainer", limit=1) is None
        assert await client.acknowledge(lease.lease_id) == ["s"]


async def test_with_keys_on_the_feed_wants_the_operators_key(start_gateway: Any, tmp_path: Path) -> None:
    running = start_gateway(tmp_path / "data", environment={"VERBATIM_OPERATOR_KEY": "secret"})
    async with GatewayClient(running.url) as stranger:
        with pytest.raises(Unauthorized):
            await stranger.counts("trainer")
    async with GatewayClient(running.url, api_key="secret") as client:
        assert (await client.counts("trainer")).finished == 0
        handle = await client.create_session(session_id="s")
        assert handle.api_key
        with pytest.raises(Conflict, match="key"):
            await client.create_session(session_id="s")
