"""The real SGLang 0.5.23 behind a real gateway: whole tool conversations, held against a transformers forward.

Runs where `tests/real_engines/install.sh sglang` has made `.venv-sglang` (`make test-engines`); fails where it has not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.gateway.conftest import RunningGateway
from tests.real_engines.conftest import gateway_before
from tests.real_engines.servers import real_sglang
from tests.real_engines.transcripts import TRANSCRIPTS, Reference, repeat_transcript

pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def gateway(memorised: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    log = tmp_path_factory.mktemp("log") / "sglang.log"
    with (
        real_sglang(memorised, log) as url,
        gateway_before(f"sglang={url}", memorised, tmp_path_factory.mktemp("ledger")) as running,
    ):
        yield running


@pytest.mark.parametrize("number", range(len(TRANSCRIPTS)))
def test_a_tool_conversation_is_captured_as_the_model_computes_it(
    gateway: RunningGateway, reference: Reference, session_id: str, number: int
) -> None:
    """I1, I2, I3: reasoning, calls and answers parsed; one segment, log-probs and incremental experts as computed."""
    repeat_transcript(gateway, session_id, TRANSCRIPTS[number])
    assert {turn["untrainable_reason"] for turn in gateway.turns(session_id)} == {None}
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    reference.check_segment(segment)


def test_a_sampled_conversation_cut_by_length_trains_every_token(
    gateway: RunningGateway, reference: Reference, session_id: str
) -> None:
    """I1, I2: three turns at a temperature, each cut short: log-probs of the scaled distribution, one segment."""
    messages: list[Any] = [{"role": "user", "content": "What is 12*7?"}]
    for i in range(3):
        body = {"messages": messages, "max_tokens": 9, "temperature": 0.7, "ignore_eos": True}
        choice = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body)["choices"][0]
        assert choice["finish_reason"] == "length"
        messages = [*messages, choice["message"], {"role": "user", "content": f"again {i}"}]
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    assert segment["num_trained_tokens"] == 27
    assert segment["logprob_kind"] == "temperature_scaled"
    reference.check_segment(segment, temperature=0.7)


@pytest.mark.parametrize("number", [1, 5, 20])
def test_top_logprobs_are_those_of_the_models_own_softmax(
    gateway: RunningGateway, reference: Reference, session_id: str, number: int
) -> None:
    """I2: of the scaled distribution, as the record's log-probs are; as many as were asked for, at every position."""
    body = {"messages": [{"role": "user", "content": "What is 12*7?"}], "max_tokens": 24, "temperature": 0.7}
    wanted = {"ignore_eos": True, "logprobs": True, "top_logprobs": number, "return_token_ids": True}
    reply = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body | wanted)
    [turn] = gateway.turns(session_id)
    rows = [list(zip(row[::2], row[1::2], strict=True)) for row in turn["meta"]["top_logprobs"]]
    reference.check_likeliest(reply["prompt_token_ids"], turn["output_token_ids"], rows, temperature=0.7)
    assert {len(row) for row in rows} == {number}
    shown = reply["choices"][0]["logprobs"]["content"]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in shown] == [
        [p for _, p in row] for row in rows
    ]
