"""The OpenAI Agents SDK: an agent with one tool, over chat completions and over responses."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import agents
import openai
from job import Job, run


@agents.function_tool
def look(step: int) -> str:
    """Look there."""
    return f"found-{step}"


def runner(model: type[agents.Model], *, streamed: bool) -> Callable[[Job], Awaitable[str]]:
    """The SDK's own loop."""

    async def converse(job: Job) -> str:
        async with openai.AsyncOpenAI(base_url=job.base_url, api_key=job.api_key, max_retries=job.retries) as client:
            agent: agents.Agent[None] = agents.Agent(
                name="seeker",
                instructions="Look around.",
                tools=[look],
                model=model(model="any", openai_client=client),
                model_settings=agents.ModelSettings(max_tokens=job.max_tokens),
            )
            if not streamed:
                return str((await agents.Runner.run(agent, job.ask)).final_output)
            result = agents.Runner.run_streamed(agent, job.ask)
            async for _ in result.stream_events():
                pass
            return str(result.final_output)

    return converse


if __name__ == "__main__":
    agents.set_tracing_disabled(True)
    run(
        {
            "chat": runner(agents.OpenAIChatCompletionsModel, streamed=False),
            "chat_stream": runner(agents.OpenAIChatCompletionsModel, streamed=True),
            "responses": runner(agents.OpenAIResponsesModel, streamed=False),
            "responses_stream": runner(agents.OpenAIResponsesModel, streamed=True),
        }
    )
