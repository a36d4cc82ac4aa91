"""The agent: an ordinary tool loop on an unmodified OpenAI client; it does not know that its tokens are kept.

ask the model → run the tools that it calls → append their results → ask again, until it calls none or may not go on.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from openai import AsyncOpenAI, omit
from openai.types.chat import ChatCompletionMessage

from gateway.contracts.errors import EngineProtocolError
from gateway.contracts.generation import JsonValue
from gateway.contracts.records import Outcome

RunTool = Callable[[str, JsonValue], Awaitable[str]]
"""Tool name and its arguments as JSON → what the tool message says."""


@dataclass(frozen=True, slots=True)
class AgentLimits:
    """Of one conversation: model calls, and sampled tokens in each."""

    max_turns: int
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature 0 is greedy."""

    temperature: float
    top_p: float = 1.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """How it ended: all messages, the outcome, and how many times the model was asked.

    TRUNCATED: the model still wanted a tool after the last turn, or a reply was cut at its token limit.
    """

    messages: tuple[JsonValue, ...]
    outcome: Outcome
    num_turns: int


async def converse(
    client: AsyncOpenAI,
    messages: Sequence[JsonValue],
    *,
    model: str,
    tools: Sequence[JsonValue],
    run_tool: RunTool,
    limits: AgentLimits,
    sampling: Sampling,
) -> Conversation:
    """Run one conversation to its end; `client` points at the rollout's session.

    Raises openai.OpenAIError when the model cannot be asked, and whatever `run_tool` raises.
    """
    history = list(messages)
    for turn in range(1, limits.max_turns + 1):
        completion = await client.chat.completions.create(
            model=model,
            messages=history,
            tools=list(tools) or omit,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_completion_tokens=limits.max_new_tokens,
        )
        if not completion.choices:
            raise EngineProtocolError("the chat reply has no choices")
        choice = completion.choices[0]
        reply = _as_sent_back(choice.message)
        history.append(reply)
        if choice.finish_reason == "length":
            return Conversation(tuple(history), Outcome.TRUNCATED, turn)
        calls = reply.get("tool_calls") or []
        if not calls:
            return Conversation(tuple(history), Outcome.COMPLETED, turn)
        if turn < limits.max_turns:
            history += [await _tool_message(call, run_tool) for call in calls]
    return Conversation(tuple(history), Outcome.TRUNCATED, limits.max_turns)


def _as_sent_back(message: ChatCompletionMessage) -> dict[str, JsonValue]:
    """The reply with every field that came, reasoning and unknown ones too, less those that are null."""
    return message.model_dump(exclude_none=True)


async def _tool_message(call: JsonValue, run_tool: RunTool) -> JsonValue:
    """The result of one tool call; a call that makes no sense is told so and the conversation goes on."""
    function = call.get("function") or {}
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except ValueError:
        content = "error: the arguments are not JSON"
    else:
        content = await run_tool(function.get("name") or "", arguments)
    return {"role": "tool", "tool_call_id": call.get("id"), "content": content}
