"""One engine behind each kind of client, as an agent's conversation sees it: what is captured, what may train."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engines.launch import EngineProcess, free_port, running_engine
from tests.integration.gateway.conftest import RunningGateway, close, wait_ready
from tests.integration.gateway.test_gateway_embedded_engine import verbatim


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator[EngineProcess]:
    with running_engine(tiny_model) as process:
        yield process


@pytest.fixture(scope="module", params=["vllm", "openai"])
def gateway(
    request: pytest.FixtureRequest,
    engine: EngineProcess,
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[str, RunningGateway]]:
    """The kind, and a gateway whose one engine is of it."""
    data = tmp_path_factory.mktemp("ledger")
    flags = ["--model", str(tiny_model), "--port", str(free_port()), "--data", str(data)]
    process = verbatim("serve", "--engine", f"{request.param}={engine.url}", *flags)
    try:
        yield request.param, RunningGateway(process, wait_ready(process))
    finally:
        close(process)


def converse(gateway: RunningGateway, session_id: str, *, num_turns: int, **sampling: float) -> list[dict[str, Any]]:
    """Turns of a conversation whose replies are cut by length."""
    messages: list[Any] = [{"role": "user", "content": "What is 48/2?"}]
    for i in range(num_turns):
        body = {"messages": messages, "max_tokens": 12} | sampling
        reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body)
        messages = [*messages, reply["choices"][0]["message"], {"role": "user", "content": f"again {i}"}]
    return gateway.turns(session_id)


def test_a_conversation_trains_if_and_only_if_its_tokens_are_the_sampled_ones(
    gateway: tuple[str, RunningGateway], session_id: str
) -> None:
    """I1, I2, I9: with vLLM as with SGLang; through text, everything is recorded and nothing trains."""
    kind, running = gateway
    turns = converse(running, session_id, num_turns=3)
    segments = running.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    sampled = sum(len(turn["output_token_ids"]) for turn in turns)
    assert sampled > 0
    if kind == "vllm":
        [segment] = segments
        assert segment["num_trained_tokens"] == sampled
        assert segment["num_routed_rows"] == len(segment["token_ids"]) - 1
        assert {turn["untrainable_reason"] for turn in turns} == {None}
    else:
        assert {turn["untrainable_reason"] for turn in turns} == {"text_only_engine"}
        assert sum(segment["num_trained_tokens"] for segment in segments) == 0


@pytest.mark.parametrize(
    ("sampling", "kind", "reason"),
    [
        ({"temperature": 0.7}, "temperature_scaled", None),
        ({"temperature": 0.7, "top_p": 0.8}, "kept_set", None),
        ({"temperature": 0.7, "top_k": 5}, "kept_set", None),
        ({"temperature": 0.0, "top_p": 0.8}, "temperature_scaled", None),
        ({"min_p": 0.2}, "kept_set", "kept_set_of_min_p"),
    ],
)
def test_a_turn_is_recorded_with_what_its_log_probs_are_of(
    gateway: tuple[str, RunningGateway],
    session_id: str,
    sampling: dict[str, float],
    kind: str,
    reason: str | None,
) -> None:
    """I9: of vLLM's processed log-probs; a set that no segment can describe does not train."""
    engine, running = gateway
    if engine == "openai":
        assert {turn["logprob_kind"] for turn in converse(running, session_id, num_turns=1, **sampling)} == {"raw"}
        return
    turns = converse(running, session_id, num_turns=2, **sampling)
    assert {(turn["logprob_kind"], turn["untrainable_reason"]) for turn in turns} == {(kind, reason)}
    segments = running.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    assert {segment["logprob_kind"] for segment in segments} <= {kind}
    assert (sum(segment["num_trained_tokens"] for segment in segments) > 0) is (reason is None)
