"""The Anthropic client: messages, whole and streamed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
from job import PARAMETERS, Job, look, run

TOOL = {"name": "look", "description": "Look there.", "input_schema": PARAMETERS}


def messages(job: Job) -> str:
    """Whole messages."""
    return converse(job, lambda client, **fields: client.messages.create(**fields))


def stream(job: Job) -> str:
    """The client's own accumulation of a stream."""

    def streamed(client: anthropic.Anthropic, **fields: Any) -> Any:
        with client.messages.stream(**fields) as events:
            return events.get_final_message()

    return converse(job, streamed)


def converse(job: Job, create: Callable[..., Any]) -> str:
    """A tool loop that replays content blocks as they came."""
    history: list[Any] = [{"role": "user", "content": job.ask}]
    with anthropic.Anthropic(
        base_url=job.base_url, api_key=job.api_key, max_retries=job.retries, timeout=job.timeout_seconds
    ) as client:
        while True:
            limit = job.max_tokens or 300
            message = create(client, model="any", max_tokens=limit, messages=history, tools=[TOOL])
            found = [
                {"type": "tool_result", "tool_use_id": block.id, "content": look(json.dumps(block.input))}
                for block in message.content
                if block.type == "tool_use"
            ]
            if not found:
                return message.content[-1].text
            history += [{"role": "assistant", "content": message.content}, {"role": "user", "content": found}]


if __name__ == "__main__":
    run({"messages": messages, "stream": stream})
