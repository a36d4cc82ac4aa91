"""Gateway and embedded engine as real processes: `verbatim engine` behind `verbatim serve`, over HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, close, wait_ready

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
    engine, engine_url = started("engine", "--model", str(tiny_model), "--port", str(free_port()))
    try:
        data = tmp_path_factory.mktemp("ledger")
        flags = ["--model", str(tiny_model), "--port", str(free_port()), "--data", str(data)]
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


@pytest.mark.parametrize("stream", [False, True])
def test_generate_answers_what_the_engine_itself_would(
    stream: bool, served: tuple[str, RunningGateway], session_id: str
) -> None:
    """I1, I8: the same request to the engine and through the gateway; ids, log-probs, rows and labels are equal."""
    engine_url, gateway = served
    request = {
        "input_ids": [40, 41, 42, 43],
        "sampling_params": {"max_new_tokens": 9, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 4,
        "return_routed_experts": True,
        "stream": stream,
    }
    ours, theirs = (
        last_reply(url, request) for url in (f"{gateway.url}/sessions/{session_id}/generate", engine_url + "/generate")
    )
    assert ours["output_ids"] == theirs["output_ids"]
    of_the_moment = {"id", "e2e_latency", "response_sent_to_client_ts", "cached_tokens", "cached_tokens_details"}
    shown = ours["meta_info"].keys() - of_the_moment - {"routed_experts_start_len"}
    left_out = {"input_token_logprobs", "input_top_logprobs", "num_retractions", "response_sent_to_client_ts"}
    assert theirs["meta_info"].keys() - ours["meta_info"].keys() <= left_out
    assert {name: ours["meta_info"][name] for name in shown} == {name: theirs["meta_info"][name] for name in shown}
    assert {
        "output_token_logprobs",
        "output_top_logprobs",
        "routed_experts",
        "weight_version",
        "finish_reason",
    } <= shown


def last_reply(url: str, body: dict[str, Any]) -> Any:
    """A whole reply, or the last frame of a stream."""
    text = httpx.post(url, json=body, timeout=60).text
    return json.loads(text.split("data: ")[-2] if body["stream"] else text)


def test_stop_string_is_cut_from_a_completion_and_its_tokens_stay(
    served: tuple[str, RunningGateway], session_id: str
) -> None:
    """I1: the text ends before the stop string; who writes it back, as an agent does, extends the recorded tokens."""
    _, gateway = served
    path = f"/sessions/{session_id}/v1/completions"
    asked = {"prompt": [40, 41, 42, 43], "max_tokens": 30, "temperature": 0, "ignore_eos": True}
    whole = gateway.post(path, asked)["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:2]
    choice = gateway.post(path, {**asked, "stop": stop, "return_token_ids": True})["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["text"] == whole[: whole.index(stop)]
    recorded = choice["prompt_token_ids"] + choice["token_ids"]
    text = gateway.post("/detokenize", {"tokens": recorded})["text"]
    assert text.startswith(gateway.post("/detokenize", {"tokens": asked["prompt"]})["text"] + choice["text"] + stop)
    gateway.post(path, {**asked, "prompt": f"{text} and"})
    turns = gateway.turns(session_id)
    assert turns[2]["attachment"]["parent_id"] == turns[1]["turn_id"]
