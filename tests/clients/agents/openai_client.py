"""The OpenAI client: chat completions (sync, async, streamed), structured outputs, responses."""

from __future__ import annotations

from typing import Any

import openai
from job import TOOL, Job, look, run
from pydantic import BaseModel

FLAT_TOOL = {"type": "function", "strict": False, **TOOL["function"]}


class Place(BaseModel):
    """What structured outputs are parsed into."""

    step: int


def client(job: Job) -> openai.OpenAI:
    """As an agent makes it."""
    return openai.OpenAI(
        base_url=job.base_url, api_key=job.api_key, max_retries=job.retries, timeout=job.timeout_seconds
    )


def chat(job: Job) -> str:
    """A tool loop that replays the reply objects as they came."""
    messages: list[Any] = [{"role": "user", "content": job.ask}]
    with client(job) as openai_client:
        while True:
            reply = openai_client.chat.completions.create(model="any", messages=messages, tools=[TOOL], **job.limit)
            message = reply.choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message, *results(message.tool_calls)]


async def chat_async(job: Job) -> str:
    """The same with the async client, replaying plain dictionaries."""
    messages: list[Any] = [{"role": "user", "content": job.ask}]
    async with openai.AsyncOpenAI(base_url=job.base_url, api_key=job.api_key, max_retries=job.retries) as talker:
        while True:
            reply = await talker.chat.completions.create(model="any", messages=messages, tools=[TOOL], **job.limit)
            message = reply.choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message.model_dump(exclude_none=True), *results(message.tool_calls)]


def chat_stream(job: Job) -> str:
    """The client's own accumulation of a stream."""
    messages: list[Any] = [{"role": "user", "content": job.ask}]
    with client(job) as openai_client:
        while True:
            with openai_client.chat.completions.stream(
                model="any", messages=messages, tools=[TOOL], **job.limit
            ) as stream:
                message = stream.get_final_completion().choices[0].message
            if not message.tool_calls:
                return message.content
            messages += [message, *results(message.tool_calls)]


def raw_stream(job: Job) -> str:
    """Chunks as they come, put together by the agent, which keeps text and calls only."""
    messages: list[Any] = [{"role": "user", "content": job.ask}]
    with client(job) as openai_client:
        while True:
            text, calls = "", {}
            chunks = openai_client.chat.completions.create(
                model="any", messages=messages, tools=[TOOL], stream=True, **job.limit
            )
            for chunk in chunks:
                delta = chunk.choices[0].delta
                text += delta.content or ""
                for piece in delta.tool_calls or []:
                    call = calls.setdefault(piece.index, {"id": piece.id, "name": piece.function.name, "arguments": ""})
                    call["arguments"] += piece.function.arguments or ""
            if not calls:
                return text
            said = [
                {
                    "id": call["id"],
                    "type": "function",
                    "function": {"name": call["name"], "arguments": call["arguments"]},
                }
                for call in calls.values()
            ]
            found = [
                {"role": "tool", "tool_call_id": call["id"], "content": look(call["arguments"])}
                for call in calls.values()
            ]
            messages += [{"role": "assistant", "content": text, "tool_calls": said}, *found]


def parse(job: Job) -> list[int]:
    """Structured outputs: chat completions, a stream of them, and responses."""
    messages: list[Any] = [{"role": "user", "content": job.ask}]
    with client(job) as openai_client:
        chat_reply = openai_client.chat.completions.parse(model="any", messages=messages, response_format=Place)
        with openai_client.chat.completions.stream(model="any", messages=messages, response_format=Place) as stream:
            streamed = stream.get_final_completion()
        response = openai_client.responses.parse(model="any", input=job.ask, text_format=Place)
    parsed = [chat_reply.choices[0].message.parsed, streamed.choices[0].message.parsed, response.output_parsed]
    return [place.step for place in parsed]


def responses(job: Job) -> str:
    """Items of the replies are replayed."""
    items: list[Any] = [{"role": "user", "content": job.ask}]
    with client(job) as openai_client:
        while True:
            response = openai_client.responses.create(model="any", input=items, tools=[FLAT_TOOL])
            found = [
                {"type": "function_call_output", "call_id": item.call_id, "output": look(item.arguments)}
                for item in response.output
                if item.type == "function_call"
            ]
            if not found:
                return response.output_text
            items += [*response.output, *found]


def responses_stream(job: Job) -> str:
    """Only what is new is sent, behind `previous_response_id`; replies are streamed."""
    items: list[Any] = [{"role": "user", "content": job.ask}]
    previous = openai.omit
    with client(job) as openai_client:
        while True:
            with openai_client.responses.stream(
                model="any", input=items, tools=[FLAT_TOOL], previous_response_id=previous
            ) as stream:
                response = stream.get_final_response()
            items = [
                {"type": "function_call_output", "call_id": item.call_id, "output": look(item.arguments)}
                for item in response.output
                if item.type == "function_call"
            ]
            if not items:
                return response.output_text
            previous = response.id


def embeddings(job: Job) -> str:
    """A part of the API that a chat model does not serve."""
    with client(job) as openai_client:
        return str(openai_client.embeddings.create(model="any", input=job.ask))


def results(calls: list[Any]) -> list[dict[str, str]]:
    """Tool messages for the calls of a reply."""
    return [{"role": "tool", "tool_call_id": call.id, "content": look(call.function.arguments)} for call in calls]


if __name__ == "__main__":
    run(
        {
            "chat": chat,
            "chat_async": chat_async,
            "chat_stream": chat_stream,
            "raw_stream": raw_stream,
            "parse": parse,
            "responses": responses,
            "responses_stream": responses_stream,
            "embeddings": embeddings,
        }
    )
