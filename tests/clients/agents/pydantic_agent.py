"""Pydantic AI: an agent with one tool, over chat completions, responses and Anthropic's messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anthropic
import openai
from job import Job, run
from pydantic_ai import Agent
from pydantic_ai.models import Model
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


def look(step: int) -> str:
    """Look there."""
    return f"found-{step}"


def chat(job: Job) -> Model:
    """Chat completions."""
    return OpenAIChatModel("any", provider=OpenAIProvider(openai_client=openai_client(job)))


def responses(job: Job) -> Model:
    """Responses."""
    return OpenAIResponsesModel("any", provider=OpenAIProvider(openai_client=openai_client(job)))


def messages(job: Job) -> Model:
    """Anthropic's messages."""
    client = anthropic.AsyncAnthropic(base_url=job.base_url, api_key=job.api_key, max_retries=job.retries)
    return AnthropicModel("any", provider=AnthropicProvider(anthropic_client=client))


def openai_client(job: Job) -> openai.AsyncOpenAI:
    """Both of OpenAI's models take this one."""
    return openai.AsyncOpenAI(base_url=job.base_url, api_key=job.api_key, max_retries=job.retries)


def whole(make: Callable[[Job], Model]) -> Callable[[Job], Awaitable[str]]:
    """The agent's own loop, on whole replies."""

    async def converse(job: Job) -> str:
        agent = Agent(make(job), tools=[look], instructions="Look around.", model_settings=job.limit)
        return (await agent.run(job.ask)).output

    return converse


def streamed(make: Callable[[Job], Model]) -> Callable[[Job], Awaitable[str]]:
    """The agent's own loop, on streams."""

    async def converse(job: Job) -> str:
        agent = Agent(make(job), tools=[look], instructions="Look around.", model_settings=job.limit)
        said = []

        async def watch(context: object, events: object) -> None:
            async for event in events:  # type: ignore[attr-defined]
                said.append(type(event).__name__)

        result = await agent.run(job.ask, event_stream_handler=watch)
        return result.output if "PartDeltaEvent" in said else "nothing was streamed"

    return converse


if __name__ == "__main__":
    run(
        {
            "chat": whole(chat),
            "chat_stream": streamed(chat),
            "responses": whole(responses),
            "messages": whole(messages),
        }
    )
