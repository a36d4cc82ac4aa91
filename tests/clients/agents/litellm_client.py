"""LiteLLM: completion, acompletion and streams, for both OpenAI-like prefixes and for Anthropic's route."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import litellm
from job import TOOL, Job, look, run


def completion(prefix: str) -> Callable[[Job], str]:
    """A tool loop that replays LiteLLM's own message objects."""

    def converse(job: Job) -> str:
        messages: list[Any] = [{"role": "user", "content": job.ask}]
        while True:
            message = litellm.completion(**fields(job, prefix, messages)).choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message, *results(message)]

    return converse


def acompletion(prefix: str) -> Callable[[Job], Awaitable[str]]:
    """The same, async, replaying dictionaries."""

    async def converse(job: Job) -> str:
        messages: list[Any] = [{"role": "user", "content": job.ask}]
        while True:
            reply = await litellm.acompletion(**fields(job, prefix, messages))
            message = reply.choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message.model_dump(), *results(message)]

    return converse


def stream(prefix: str) -> Callable[[Job], str]:
    """Streams, put together by LiteLLM's own builder."""

    def converse(job: Job) -> str:
        messages: list[Any] = [{"role": "user", "content": job.ask}]
        while True:
            chunks = list(litellm.completion(**fields(job, prefix, messages), stream=True))
            message = litellm.stream_chunk_builder(chunks, messages=messages).choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message, *results(message)]

    return converse


def fields(job: Job, prefix: str, messages: list[Any]) -> dict[str, Any]:
    """Of a call; the rest is LiteLLM's default."""
    return {
        "model": f"{prefix}/any",
        "api_base": job.base_url,
        "api_key": job.api_key,
        "messages": messages,
        "tools": [TOOL],
        "num_retries": job.retries,
        "timeout": job.timeout_seconds,
        **job.limit,
    }


def results(message: Any) -> list[dict[str, str]]:
    """Tool messages for the calls of a reply."""
    return [
        {"role": "tool", "tool_call_id": call.id, "content": look(call.function.arguments)}
        for call in message.tool_calls
    ]


if __name__ == "__main__":
    run(
        {
            f"{name}:{prefix}": make(prefix)
            for name, make in (("completion", completion), ("acompletion", acompletion), ("stream", stream))
            for prefix in ("openai", "hosted_vllm", "anthropic")
        }
    )
