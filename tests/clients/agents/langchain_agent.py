"""LangChain: its agent with one tool over langchain-openai's ChatOpenAI, whole, streamed and over responses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from job import Job, run
from langchain.agents import create_agent
from langchain_openai import ChatOpenAI


def look(step: int) -> str:
    """Look there."""
    return f"found-{step}"


def agent(**options: Any) -> Callable[[Job], str]:
    """The agent's own loop."""

    def converse(job: Job) -> str:
        model = ChatOpenAI(
            model="any",
            base_url=job.base_url,
            api_key=job.api_key,
            max_retries=job.retries,
            timeout=job.timeout_seconds,
            **job.limit,
            **options,
        )
        graph = create_agent(model, tools=[look], system_prompt="Look around.")
        state = graph.invoke({"messages": [{"role": "user", "content": job.ask}]})
        return str(state["messages"][-1].text)

    return converse


if __name__ == "__main__":
    run({"chat": agent(), "chat_stream": agent(streaming=True), "responses": agent(use_responses_api=True)})
