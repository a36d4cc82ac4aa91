"""Each outsider's client, as it is, holds its conversation through a gateway with keys; the ledger proves I1 to I3."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.fleet import Door, Task
from tests.clients.proof import Witnesses, prove
from tests.clients.script import ANSWER, NUM_TURNS, SEARCH, SHELL_TEXT, SHELL_TOOLS


def search(program: str, mode: str, **options: Any) -> Task:
    """The conversation that every chat client holds: four calls of its tool, two of them at once, and an answer."""
    return Task(program, mode, SEARCH, saw=ANSWER, num_turns=NUM_TURNS, **options)


CONVERSATIONS = [
    *(
        search("openai_client", mode, environment=environment)
        for environment in ("ours", "clients")
        for mode in ("chat", "chat_async", "chat_stream", "raw_stream", "responses", "responses_stream")
    ),
    search("openai_client", "chat", environment="ours", door=Door.KEY),
    *(
        search("anthropic_client", mode, environment=environment)
        for environment in ("ours", "clients")
        for mode in ("messages", "stream")
    ),
    search("anthropic_client", "messages", environment="ours", door=Door.KEY),
    *(
        search("litellm_client", f"{kind}:{prefix}")
        for prefix in ("openai", "hosted_vllm")
        for kind in ("completion", "acompletion", "stream")
    ),
    search("litellm_client", "completion:anthropic"),
    search("litellm_client", "acompletion:anthropic"),
    # Putting a stream together, LiteLLM makes "" of a text that is missing, and sends a sentence of its own in place of
    # "" to Anthropic's route: three of the replies come back edited, and each is the end of a segment.
    search("litellm_client", "stream:anthropic", num_segments=4),
    *(
        search("openai_agents", mode, environment=environment)
        for environment in ("ours", "clients")
        for mode in ("chat", "chat_stream", "responses", "responses_stream")
    ),
    *(search("pydantic_agent", mode) for mode in ("chat", "chat_stream", "responses", "messages")),
    *(search("langchain_agent", mode) for mode in ("chat", "chat_stream", "responses")),
]


@pytest.mark.parametrize("task", CONVERSATIONS, ids=lambda task: task.name)
def test_client_holds_its_conversation_in_one_segment(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I1, I2, I3: the engine was sent the recorded ids, arrays line up, each sampled token trains once."""
    assert outcome == {"saw": task.saw}
    prove(witnesses, task.name, num_turns=task.num_turns, num_segments=task.num_segments)


SHELLS = [
    Task("mini_swe", "tools", SHELL_TOOLS, saw=["tool-a", "tool-b", "tool-c", "note\ntool-d"], num_turns=NUM_TURNS),
    Task("mini_swe", "text", SHELL_TEXT, saw=["text-a", "text-b", "text-c", "note\ntext-d"], num_turns=NUM_TURNS),
]


@pytest.mark.parametrize("task", SHELLS, ids=lambda task: task.name)
def test_mini_swe_agent_solves_its_task_in_one_segment(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """I1, I2, I3, with real commands in between."""
    seen = {"exit_status": "Submitted", "calls": NUM_TURNS, "printed": task.saw, "left": {"note": task.saw[2]}}
    assert outcome == {"saw": seen}
    prove(witnesses, task.name, num_turns=task.num_turns, num_segments=task.num_segments)


STRUCTURED = [Task("openai_client", "parse", "as an object", environment=place) for place in ("ours", "clients")]


@pytest.mark.parametrize("task", STRUCTURED, ids=lambda task: task.name)
def test_structured_outputs_are_parsed_and_constrain_the_engine(
    task: Task, outcome: dict[str, Any], witnesses: Witnesses
) -> None:
    """Chat completions, their stream, and responses: three samples under one prompt each of its own dialect."""
    assert outcome == {"saw": [7, 7, 7]}
    prove(witnesses, task.name, num_turns=3, num_segments=3)
    for request in witnesses.engine_requests(task.name):
        assert '"step"' in request["sampling"]["extra"]["json_schema"]
