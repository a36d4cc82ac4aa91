"""Gateway and embedded engine as real processes: `verbatim engine` behind `verbatim serve`, over HTTP."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.gateway.conftest import RunningGateway, close, unused_port, wait_ready

QUESTION = {"role": "user", "content": "What is 48/2?"}


def verbatim(command: str, *flags: str) -> subprocess.Popen[str]:
    program = "from gateway.cli import main; raise SystemExit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def started(command: str, *flags: str) -> tuple[subprocess.Popen[str], str]:
    process = verbatim(command, *flags)
    return process, wait_ready(process, name=command)


@pytest.fixture(scope="module")
def served(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, RunningGateway]]:
    """The engine's address and the gateway in front of it."""
    engine, engine_url = started("engine", "--model", str(tiny_model), "--port", str(unused_port()))
    try:
        data = tmp_path_factory.mktemp("ledger")
        flags = ["--model", str(tiny_model), "--port", str(unused_port()), "--data", str(data)]
        process, url = started("serve", "--engine", f"sglang={engine_url}", *flags)
        try:
            yield engine_url, RunningGateway(process, url)
        finally:
            close(process)
    finally:
        close(engine)


def test_conversation_trains_every_sampled_token_with_its_experts(
    served: tuple[str, RunningGateway], session_id: str
) -> None:
    """I1, I2, I3 through both real processes."""
    _, gateway = served
    messages: list[Any] = [QUESTION]
    recorded: list[int] = []
    for i in range(3):
        body = {"messages": messages, "max_tokens": 12, "return_token_ids": True}
        reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body)
        assert reply["prompt_token_ids"][: len(recorded)] == recorded
        recorded = reply["prompt_token_ids"] + reply["choices"][0]["token_ids"]
        messages = [*messages, reply["choices"][0]["message"], {"role": "user", "content": f"again {i}"}]
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    assert segment["token_ids"] == recorded
    assert segment["num_routed_rows"] == len(recorded) - 1
    assert segment["num_trained_tokens"] == sum(len(turn["output_token_ids"]) for turn in gateway.turns(session_id))


async def test_weights_change_inside_a_turn_and_the_agent_sees_one_reply(
    served: tuple[str, RunningGateway], session_id: str, tiny_model: Path
) -> None:
    """I5: abort, update from disk, resume; versions are exact per token and no row is missing or double."""
    engine_url, gateway = served
    body = {"messages": [QUESTION], "max_tokens": 600, "ignore_eos": True, "stream": True, "return_token_ids": True}
    update = {"model_path": str(tiny_model), "weight_version": "policy-000007"}
    url = f"{gateway.url}/sessions/{session_id}/v1/chat/completions"
    async with httpx.AsyncClient(timeout=60) as client, client.stream("POST", url, json=body) as reply:
        lines = reply.aiter_lines()
        await anext(lines)  # comes with the first tokens
        await client.post(f"{gateway.url}/admin/generation/pause", json={"mode": "abort"})
        assert (await client.post(f"{engine_url}/update_weights_from_disk", json=update)).json()["success"]
        await client.post(f"{gateway.url}/admin/policy", json={"policy_version": 7, "weight_version": "policy-000007"})
        await client.post(f"{gateway.url}/admin/generation/resume")
        assert [line async for line in lines if line][-1] == "data: [DONE]"
    [turn] = gateway.turns(session_id)
    assert [span["policy_version"] for span in turn["version_spans"]] == [0, 7]
    assert turn["experts_stop"] == len(turn["prompt_token_ids"]) + 600 - 1
    assert turn["untrainable_reason"] is None
