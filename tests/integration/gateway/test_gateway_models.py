"""`/v1/models` as OpenAI's and Anthropic's clients read it; every name is served and comes back in the reply."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import anthropic
import httpx
import openai
import pytest

from tests.integration.gateway.conftest import RunningGateway

NAMES = ["any-name", "org/model:v1@é", "tiny", "ft:gpt/x y", "a%2Fb"]
QUESTION = {"role": "user", "content": "quick"}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [QUESTION]},
    "/v1/completions": {"prompt": "quick"},
    "/v1/responses": {"input": "quick"},
    "/v1/messages": {"messages": [QUESTION], "max_tokens": 16},
}


def test_openais_client_lists_and_retrieves_the_model(gateway: RunningGateway, session_id: str) -> None:
    client = gateway.client(session_id)
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "verbatim")
    assert 0 <= time.time() - model.created < 3600
    for name in NAMES[:-1]:
        assert client.models.retrieve(name).id == name
    assert isinstance(client.models.retrieve("org/model"), openai.types.Model)


def test_anthropics_client_lists_and_retrieves_the_model(gateway: RunningGateway, session_id: str) -> None:
    client = anthropic.Anthropic(base_url=f"{gateway.url}/sessions/{session_id}", api_key="unused", max_retries=0)
    page = client.models.list()
    [model] = page.data
    assert (model.type, model.id, page.has_more, page.first_id, page.last_id) == (
        "model",
        "tiny",
        False,
        "tiny",
        "tiny",
    )
    assert 0 <= (datetime.now(UTC) - model.created_at).total_seconds() < 3600
    assert client.models.retrieve("org/model").id == "org/model"
    assert [each.id for each in client.models.list()] == ["tiny"]


def test_models_are_listed_without_a_session_too(gateway: RunningGateway) -> None:
    assert gateway.get("/v1/models")["data"][0]["id"] == "tiny"
    assert gateway.get("/v1/models/org/model")["id"] == "org/model"
    assert gateway.get("/v1/models", headers={"anthropic-version": "2023-06-01"})["first_id"] == "tiny"


@pytest.mark.parametrize("endpoint", BODIES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["org/other:v1", None])
def test_the_reply_names_the_model_that_the_agent_asked_for(
    name: str | None, stream: bool, endpoint: str, gateway: RunningGateway
) -> None:
    """Every name is served; who names none is told the model's own."""
    session_id = f"models-{time.monotonic_ns()}"
    body = BODIES[endpoint] | {"stream": stream} | ({"model": name} if name else {})
    text = httpx.post(f"{gateway.url}/sessions/{session_id}{endpoint}", json=body, timeout=30).text
    lines = text.split("\n") if stream else [f"data: {text}"]
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    named = [e.get("model") or e.get("response", {}).get("model") or e.get("message", {}).get("model") for e in events]
    assert {model for model in named if model} == {name or "tiny"}
    if "responses" not in endpoint and "messages" not in endpoint:
        assert all(named)
    assert {turn["model"] for turn in gateway.turns(session_id)} == {"tiny"}
