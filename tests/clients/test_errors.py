"""What goes wrong reaches every client as an error of its own; its retries and time limits work; nothing is lost."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.clients.fleet import Door, Task
from tests.clients.proof import StoredTurn, Witnesses, prove
from tests.clients.script import ANSWER, SEARCH
from tests.waiting import until


class Refusal(NamedTuple):
    """Why a call is refused; `code` is ours, which clients that keep it show."""

    status: int
    code: str
    ask: str = SEARCH
    door: Door = Door.OWN
    max_tokens: int | None = None


OVERFLOW = Refusal(400, "context_length_exceeded", max_tokens=100_000)
REFUSALS = (
    OVERFLOW,
    Refusal(401, "invalid_api_key", door=Door.STRANGER),
    Refusal(403, "permission_denied", door=Door.OTHER),
    Refusal(404, "not_found", door=Door.UNKNOWN),
    Refusal(409, "session_finished", door=Door.FINISHED),
    Refusal(429, "rate_limit_exceeded", ask="too many"),
)
OWN_CLASSES = {
    "openai": (
        "openai.BadRequestError",
        "openai.AuthenticationError",
        "openai.PermissionDeniedError",
        "openai.NotFoundError",
        "openai.ConflictError",
        "openai.RateLimitError",
    ),
    "anthropic": (
        "anthropic.BadRequestError",
        "anthropic.AuthenticationError",
        "anthropic.PermissionDeniedError",
        "anthropic.NotFoundError",
        "anthropic.ConflictError",
        "anthropic.RateLimitError",
    ),
    # LiteLLM has no class for 409, and none for OpenAI's 403.
    "litellm": (
        "litellm.ContextWindowExceededError",
        "litellm.AuthenticationError",
        "openai.APIError",
        "litellm.NotFoundError",
        "litellm.BadRequestError",
        "litellm.RateLimitError",
    ),
    "langchain": (
        "langchain_core.ContextOverflowError",
        "langchain_openai.OpenAIAuthenticationError",
        "langchain_openai.OpenAIPermissionDeniedError",
        "langchain_openai.OpenAIModelNotFoundError",
        "openai.ConflictError",
        "langchain_openai.OpenAIRateLimitError",
    ),
    "pydantic": ("pydantic_ai.ModelHTTPError",) * len(REFUSALS),
}
"""What each client makes of each refusal, in the same order."""

REFUSED = [
    ("openai", "openai_client", "chat", "ours"),
    ("openai", "openai_client", "chat_stream", "clients"),
    ("anthropic", "anthropic_client", "messages", "ours"),
    ("anthropic", "anthropic_client", "stream", "clients"),
    ("litellm", "litellm_client", "completion:openai", "clients"),
    ("litellm", "litellm_client", "acompletion:hosted_vllm", "clients"),
    ("litellm", "litellm_client", "stream:openai", "clients"),
    ("litellm", "litellm_client", "completion:anthropic", "clients"),
    ("litellm", "mini_swe", "tools", "clients"),
    ("openai", "openai_agents", "chat", "clients"),
    ("openai", "openai_agents", "responses", "clients"),
    ("langchain", "langchain_agent", "chat", "clients"),
    ("pydantic", "pydantic_agent", "chat", "clients"),
    ("pydantic", "pydantic_agent", "messages", "clients"),
]
REFUSAL_CASES = [
    pytest.param(
        task := Task(
            program,
            mode,
            refusal.ask,
            environment,
            door=refusal.door,
            about=str(refusal.status),
            options={"max_tokens": refusal.max_tokens},
        ),
        refusal,
        raised,
        id=task.name,
    )
    for client, program, mode, environment in REFUSED
    for refusal, raised in zip(REFUSALS, OWN_CLASSES[client], strict=True)
]


@pytest.mark.parametrize(("task", "refusal", "raised"), REFUSAL_CASES)
def test_refusal_is_an_error_of_the_clients_own_and_records_nothing(
    task: Task, refusal: Refusal, raised: str, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    assert raised in outcome["raised"]
    assert outcome["status_code"] == refusal.status
    if raised.startswith("openai.") and task.program.startswith("openai"):
        assert outcome["code"] == refusal.code
    if refusal is OVERFLOW:
        assert "maximum context length" in outcome["message"]
    assert witnesses.stored_turns(task.name) == []


RETRIES = [
    Task(program, mode, "fails once", environment, saw=ANSWER, about="retried", options={"retries": 2})
    for program, mode, environment in (
        ("openai_client", "chat", "ours"),
        ("openai_client", "chat_stream", "clients"),
        ("anthropic_client", "messages", "ours"),
        ("litellm_client", "completion:openai", "clients"),
        ("litellm_client", "acompletion:hosted_vllm", "clients"),
        ("litellm_client", "completion:anthropic", "clients"),
        ("langchain_agent", "chat", "clients"),
    )
]


@pytest.mark.parametrize("task", RETRIES, ids=lambda task: task.name)
def test_clients_own_retry_after_a_503_gets_the_reply(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I1, I2, I3: the attempt that broke left nothing, the retry is the one turn."""
    assert outcome == {"saw": task.saw}
    prove(witnesses, task.name, num_turns=1, num_fruitless_requests=1)


SLOW = [
    pytest.param(task := Task(*client, about="slow", options={"timeout_seconds": 3.0}), raised, id=task.name)
    for raised, *client in (
        ("openai.APITimeoutError", "openai_client", "chat", "takes its time", "ours"),
        ("anthropic.APITimeoutError", "anthropic_client", "messages", "takes its time", "ours"),
        ("litellm.Timeout", "litellm_client", "completion:openai", "takes its time"),
        ("litellm.Timeout", "litellm_client", "acompletion:hosted_vllm", "takes its time"),
        ("openai.APITimeoutError", "langchain_agent", "chat", "takes its time"),
    )
]


@pytest.mark.parametrize(("task", "raised"), SLOW)
def test_clients_time_limit_is_its_own_error_and_what_was_sampled_is_kept(
    task: Task, raised: str, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I3: the turn is recorded, as not delivered."""
    assert raised in outcome["raised"]
    turn = recorded_turn(witnesses, task.name)
    assert turn.delivered_at is None
    [request] = witnesses.engine_requests(task.name)
    assert turn.output_token_ids.tolist() == request["token_ids"] != []


def recorded_turn(witnesses: Witnesses, session_id: str) -> StoredTurn:
    """The one turn of a session, once it is recorded."""
    [turn] = until(lambda: witnesses.stored_turns(session_id))
    return turn


BROKEN = [
    pytest.param(task := Task(*client, about="broken"), raised, id=task.name)
    for raised, *client in (
        ("openai.APIError", "openai_client", "chat_stream", "breaks midway", "ours"),
        ("openai.APIError", "openai_client", "raw_stream", "breaks midway", "clients"),
        # The client's own way to say that `response.failed` came in the place of `response.completed`.
        ("builtins.RuntimeError", "openai_client", "responses_stream", "breaks midway", "ours"),
        ("anthropic.APIStatusError", "anthropic_client", "stream", "breaks midway", "ours"),
        ("litellm.ServiceUnavailableError", "litellm_client", "stream:openai", "breaks midway"),
        ("litellm.ServiceUnavailableError", "litellm_client", "stream:hosted_vllm", "breaks midway"),
        ("litellm.ServiceUnavailableError", "litellm_client", "stream:anthropic", "breaks midway"),
        ("openai.APIError", "openai_agents", "chat_stream", "breaks midway"),
        ("agents.ModelBehaviorError", "openai_agents", "responses_stream", "breaks midway"),
        ("openai.APIError", "langchain_agent", "chat_stream", "breaks midway"),
        ("openai.APIError", "pydantic_agent", "chat_stream", "breaks midway"),
    )
]


@pytest.mark.parametrize(("task", "raised"), BROKEN)
def test_stream_that_breaks_raises_in_the_client_and_keeps_its_tokens(
    task: Task, raised: str, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I3: a reply that broke off never looks whole, and its tokens stay."""
    turn = recorded_turn(witnesses, task.name)
    assert turn.delivered_at is None
    sampled, nothing = witnesses.engine_requests(task.name)
    assert turn.output_token_ids.tolist() == sampled["token_ids"]
    assert len(sampled["token_ids"]) == 4
    assert nothing["token_ids"] == []
    assert nothing["prompt_token_ids"] == sampled["prompt_token_ids"] + sampled["token_ids"]
    assert raised in outcome["raised"]
