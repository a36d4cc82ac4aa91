"""The Responses API with the real OpenAI client and the real Agents SDK against a real gateway process."""

from __future__ import annotations

import json
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import agents
import httpx
import numpy as np
import openai
import pytest
from pydantic import BaseModel

from engines.launch import free_port
from tests.integration.gateway.conftest import RunningGateway, StartGateway, close, spawn, wait_ready


def thought(text: str, reply: str) -> str:
    return f"<think>\n{text}\n</think>\n{reply}"


def call(step: int) -> str:
    return f'<tool_call>\n{{"name": "look", "arguments": {{"step": {step}}}}}\n</tool_call>'


RULES: list[dict[str, Any]] = [
    {"after": "\0", "reply": "hello"},
    {"after": "Search.", "reply": thought("begin", call(1))},
    {"after": "found-1", "reply": thought("on", "Two at once.\n" + call(2) + "\n" + call(3))},
    {"after": "found-3", "reply": thought("more", call(4))},
    {"after": "found-4", "reply": call(5)},
    {"after": "found-5", "reply": thought("done", "It is behind step 5.")},
    {"after": "as an object", "reply": thought("so", '{"step": 7}')},
    {"after": "count slowly", "reply": "one two three four five six", "delay_seconds": 0.03},
]
NUM_TURNS = 5
PARAMETERS = {"type": "object", "properties": {"step": {"type": "integer"}}, "required": ["step"]}
TOOL = {"type": "function", "name": "look", "description": "Look there.", "parameters": PARAMETERS, "strict": False}
QUESTION = {"role": "user", "content": "Search."}


@pytest.fixture(scope="module")
def gateway(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    """A gateway whose model looks in five places, one after the other."""
    folder = tmp_path_factory.mktemp("responses")
    rules = folder / "rules.json"
    rules.write_text(json.dumps(RULES))
    flags = ["--engine", f"scripted={rules}", "--model", str(tiny_model), "--data", str(folder / "ledger")]
    process = spawn([*flags, "--port", str(free_port())])
    try:
        yield RunningGateway(process, wait_ready(process))
    finally:
        close(process)


def create(gateway: RunningGateway, session_id: str, **options: Any) -> Any:
    """A response, or its events as they come; the client is closed behind them."""
    client = gateway.client(session_id)
    reply = client.responses.create(**{"model": "any", "tools": [TOOL]} | options)
    if options.get("stream"):
        return events_of(client, reply)
    client.close()
    return reply


def events_of(client: openai.OpenAI, stream: Any) -> Iterator[Any]:
    with client, stream:
        yield from stream


def results(output: list[Any]) -> list[dict[str, Any]]:
    """What the tool says to the calls of a response."""
    return [
        {
            "type": "function_call_output",
            "call_id": item.call_id,
            "output": f"found-{json.loads(item.arguments)['step']}",
        }
        for item in output
        if item.type == "function_call"
    ]


def check_one_segment_in_which_each_token_is_trained_once(
    gateway: RunningGateway, session_id: str, *, num_turns: int = NUM_TURNS, all_delivered: bool = True
) -> None:
    """I1, I2, I3: what was sampled is what is trained, all of it, in one run of tokens."""
    turns = gateway.turns(session_id)
    assert [turn["attachment"]["parent_id"] for turn in turns] == [None, *(turn["turn_id"] for turn in turns[:-1])]
    assert len(turns) == num_turns
    [segment] = gateway.get(f"/sessions/{session_id}/segments?arrays=1")["segments"]
    told = [token for turn in turns for token in turn["prompt_token_ids"] + turn["output_token_ids"]]
    assert segment["token_ids"] == told
    trained = np.array(segment["token_ids"])[np.array(segment["loss_mask"], dtype=bool)].tolist()
    assert trained == [token for turn in turns for token in turn["output_token_ids"]]
    assert not all_delivered or all(turn["delivered_at"] for turn in turns)


def test_five_turns_that_replay_their_items_are_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """I3: several items of a reply become the one message that was sampled."""
    history: list[Any] = [QUESTION]
    for _ in range(NUM_TURNS):
        response = create(gateway, session_id, input=history, instructions="Look around.")
        history += [*response.output, *results(response.output)]
    assert response.output_text == "It is behind step 5."
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert response.output[0].content[0].text == "done"
    assert response.status == "completed"
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.usage.output_tokens_details.reasoning_tokens > 0
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


def test_results_between_the_calls_of_one_reply_leave_it_one_reply(gateway: RunningGateway, session_id: str) -> None:
    """I3: a client that answers each call right behind it still replays what was sampled."""
    history: list[Any] = [QUESTION]
    for _ in range(NUM_TURNS):
        response = create(gateway, session_id, input=history)
        for item in response.output:
            history += [item, *results([item])]
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


def test_five_turns_by_previous_response_id_are_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """The conversation is read from the record; instructions hold for their own call only, so they are sent again."""
    response = create(gateway, session_id, input="Search.", instructions="Look around.")
    while asked := results(response.output):
        response = create(
            gateway, session_id, input=asked, instructions="Look around.", previous_response_id=response.id
        )
    assert response.output_text == "It is behind step 5."
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


def test_instructions_are_not_inherited(gateway: RunningGateway, session_id: str) -> None:
    first = create(gateway, session_id, input="Search.", instructions="Look around.")
    create(gateway, session_id, input=results(first.output), previous_response_id=first.id)
    _, second = gateway.turns(session_id)
    assert [message["role"] for message in second["added_messages"]] == ["user", "assistant", "tool"]
    assert second["attachment"]["segment_reason"] == "no_match"


def test_mixing_responses_and_chat_completions_goes_on_in_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """I3: both dialects mean the same messages, tools and turn tree."""
    chat_tool = {"type": "function", "function": {name: TOOL[name] for name in ("name", "description", "parameters")}}
    client = gateway.client(session_id)
    flat = {**TOOL, "strict": None}
    messages: list[Any] = [QUESTION]
    items: list[Any] = [QUESTION]
    response: Any = None
    for turn in range(NUM_TURNS):
        if turn % 2:
            reply = client.chat.completions.create(model="any", messages=messages, tools=[chat_tool])  # type: ignore[list-item]
            message = reply.choices[0].message
            messages.append(message)
            calls = [(asked.id, asked.function) for asked in message.tool_calls or ()]  # type: ignore[union-attr]
            items += [{"role": "assistant", "content": message.content}] if message.content else []
        else:
            response = create(gateway, session_id, input=items, tools=[flat])
            asked_items = [item for item in response.output if item.type == "function_call"]
            items += response.output
            calls = [(item.call_id, item) for item in asked_items]
            written = [
                {"id": i, "type": "function", "function": {"name": f.name, "arguments": f.arguments}} for i, f in calls
            ]
            messages.append({"role": "assistant", "content": response.output_text, "tool_calls": written or None})
        for call_id, function in calls:
            said = f"found-{json.loads(function.arguments)['step']}"
            messages.append({"role": "tool", "tool_call_id": call_id, "content": said})
            if turn % 2:
                named = {"call_id": call_id, "name": function.name, "arguments": function.arguments}
                items.append({"type": "function_call", **named})
        for call_id, function in calls:
            said = f"found-{json.loads(function.arguments)['step']}"
            items.append({"type": "function_call_output", "call_id": call_id, "output": said})
    assert response.output_text == "It is behind step 5."
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


async def test_async_stream_helper_ends_with_what_is_recorded(gateway: RunningGateway, session_id: str) -> None:
    """Five streamed turns; each stream adds up to the response that can be read again."""
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/sessions/{session_id}/v1", api_key="k") as client:
        history: list[Any] = [QUESTION]
        for _ in range(NUM_TURNS):
            async with client.responses.stream(model="any", input=history, tools=[TOOL]) as stream:  # type: ignore[list-item]
                events = [event async for event in stream]
                final: Any = await stream.get_final_response()
            assert [event.sequence_number for event in events] == list(range(len(events)))
            text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
            assert text == final.output_text
            read = await client.responses.retrieve(final.id)
            assert [plain(item) for item in read.output] == [plain(item) for item in final.output]
            assert read.usage == final.usage
            history += [*(plain(item) for item in final.output), *results(final.output)]
    assert final.output_text == "It is behind step 5."
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


def plain(item: Any) -> dict[str, Any]:
    """A streamed item without what only the helper puts on it."""
    body: dict[str, Any] = item.model_dump(exclude_unset=True)
    body.pop("parsed_arguments", None)
    for part in body.get("content") or ():
        part.pop("parsed", None)
    return body


def test_stream_says_each_item_from_its_beginning_to_its_end(gateway: RunningGateway, session_id: str) -> None:
    history = [QUESTION, {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"step": 1}'}]
    history.append({"type": "function_call_output", "call_id": "c", "output": "found-1"})
    events = list(create(gateway, session_id, input=history, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events if not event.type.endswith(".delta")]
    part = ["output_item.added", "content_part.added"]
    done = ["content_part.done", "output_item.done"]
    arguments = ["output_item.added", "function_call_arguments.done", "output_item.done"]
    assert kinds == [
        *("created", "in_progress"),
        *(*part, "reasoning_text.done", *done),
        *(*part, "output_text.done", *done),
        *(*arguments, *arguments),
        "completed",
    ]
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert events[-1].response.output == items


def test_first_event_leaves_long_before_the_last_token(gateway: RunningGateway, session_id: str) -> None:
    """Streaming is real, and the turn is on disk before the end (I4)."""
    num_turns = []
    for event in create(gateway, session_id, input="count slowly", stream=True):
        if event.type in ("response.output_text.delta", "response.completed"):
            num_turns.append(len(gateway.turns(session_id)))
    assert num_turns[0] == 0
    assert num_turns[-1] == 1


async def test_agents_sdk_runs_five_turns_in_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """I3, with the OpenAI Agents SDK as it is."""
    async with seeker(gateway, session_id) as agent:
        result = await agents.Runner.run(agent, "Search.")
    assert result.final_output == "It is behind step 5."
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


async def test_agents_sdk_streams_and_continues_by_id_in_one_segment(gateway: RunningGateway, session_id: str) -> None:
    """I3: `auto_previous_response_id` sends results only; the conversation is the ledger's."""
    async with seeker(gateway, session_id) as agent:
        result = agents.Runner.run_streamed(agent, "Search.", auto_previous_response_id=True)
        kinds = [event.type async for event in result.stream_events()]
    assert "raw_response_event" in kinds
    assert result.final_output == "It is behind step 5."
    check_one_segment_in_which_each_token_is_trained_once(gateway, session_id)


@asynccontextmanager
async def seeker(gateway: RunningGateway, session_id: str) -> AsyncIterator[agents.Agent[None]]:
    """An agent with one tool."""
    agents.set_tracing_disabled(True)

    @agents.function_tool
    def look(step: int) -> str:
        """Look there."""
        return f"found-{step}"

    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/sessions/{session_id}/v1", api_key="k", max_retries=0
    ) as client:
        model = agents.OpenAIResponsesModel(model="any", openai_client=client)
        yield agents.Agent(name="seeker", instructions="Look around.", tools=[look], model=model)


def test_read_gives_the_response_again_and_delete_hides_it_but_not_its_turn(
    gateway: RunningGateway, session_id: str
) -> None:
    """I3: what is deleted for agents stays for the trainer."""
    client = gateway.client(session_id)
    told = {"metadata": {"a": "b"}, "reasoning": {"effort": "low"}, "instructions": "Be brief.", "temperature": 0.5}
    response = create(gateway, session_id, input="Search.", **told)
    read = client.responses.retrieve(response.id)
    assert read.model_dump(exclude={"created_at"}) == response.model_dump(exclude={"created_at"})
    assert (read.instructions, read.metadata, read.temperature) == ("Be brief.", {"a": "b"}, 0.5)
    answer = httpx.delete(f"{gateway.url}/sessions/{session_id}/v1/responses/{response.id}")
    assert answer.json() == {"id": response.id, "object": "response", "deleted": True}
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    assert len(gateway.turns(session_id)) == 1


def test_another_gateway_on_the_same_ledger_continues_a_response(
    start_gateway: StartGateway, tmp_path: Path, session_id: str
) -> None:
    """I4: what a response was, and what it said, is on disk before its last byte has left."""
    first = start_gateway(tmp_path)
    asked = {"tools": [TOOL], "instructions": "Be brief.", "metadata": {"a": "b"}}
    response = create(first, session_id, input="What is 48/2?", **asked)
    first.stop(signal.SIGKILL)
    second = start_gateway(tmp_path)
    read = second.client(session_id).responses.retrieve(response.id)
    assert read.model_dump(exclude={"created_at"}) == response.model_dump(exclude={"created_at"})
    output = [{"type": "function_call_output", "call_id": response.output[-1].call_id, "output": "24"}]
    last = create(second, session_id, input=output, previous_response_id=response.id, **asked)
    assert last.output_text == "The answer is 24."
    check_one_segment_in_which_each_token_is_trained_once(second, session_id, num_turns=2, all_delivered=False)


def test_a_response_opens_with_the_key_of_its_session_only(start_gateway: StartGateway, tmp_path: Path) -> None:
    gateway = start_gateway(tmp_path, environment={"VERBATIM_OPERATOR_KEY": "operator"})
    operator = {"Authorization": "Bearer operator"}
    mine, other = (gateway.post("/sessions", headers=operator)["api_key"] for _ in range(2))
    response = gateway.post("/v1/responses", {"input": "x"}, headers={"Authorization": f"Bearer {mine}"})
    body = {"input": "y", "previous_response_id": response["id"]}
    wanted = {mine: (200, 200), "operator": (200, 200), other: (404, 400), None: (401, 401)}
    for key, statuses in wanted.items():
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        read = httpx.get(f"{gateway.url}/v1/responses/{response['id']}", headers=headers, timeout=30)
        told = httpx.post(f"{gateway.url}/v1/responses", json=body, headers=headers, timeout=30)
        assert (read.status_code, told.status_code) == statuses, key


def test_what_is_not_stored_is_recorded_but_not_found(gateway: RunningGateway, session_id: str) -> None:
    """I7: `store: false` keeps a response from agents, not from the record."""
    client = gateway.client(session_id)
    response = create(gateway, session_id, input="Search.", store=False)
    assert len(gateway.turns(session_id)) == 1
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    with pytest.raises(openai.BadRequestError) as caught:
        create(gateway, session_id, input="x", previous_response_id=response.id)
    assert caught.value.code == "previous_response_not_found"


def test_without_a_session_in_the_path_the_response_id_finds_its_session(gateway: RunningGateway) -> None:
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="unused", max_retries=0) as client:
        first: Any = client.responses.create(model="any", input="Search.", tools=[TOOL])  # type: ignore[list-item]
        second: Any = client.responses.with_raw_response.create(
            model="any",
            input=results(first.output),  # type: ignore[arg-type]
            tools=[TOOL],  # type: ignore[list-item]
            previous_response_id=first.id,
        )
        assert client.responses.retrieve(first.id).output == first.output
    [one, two] = gateway.turns(second.headers["x-session-id"])
    assert two["attachment"]["parent_id"] == one["turn_id"]


def test_structured_output_is_parsed_and_its_schema_constrains_sampling(
    gateway: RunningGateway, session_id: str
) -> None:
    """`responses.parse` as agents use it; the engine gets the schema."""
    response = gateway.client(session_id).responses.parse(model="any", input="as an object", text_format=Place)
    assert response.output_parsed == Place(step=7)
    [turn] = gateway.turns(session_id)
    assert json.loads(turn["sampling"]["extra"]["json_schema"])["required"] == ["step"]


class Place(BaseModel):
    """What the model is asked for."""

    step: int


def test_length_makes_a_response_incomplete(gateway: RunningGateway, session_id: str) -> None:
    response = create(gateway, session_id, input="count slowly", max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output[-1].status == "incomplete"
    *_, last = create(gateway, session_id, input="count slowly", max_output_tokens=3, stream=True)
    assert (last.type, last.response.status) == ("response.incomplete", "incomplete")


def test_reply_that_breaks_off_ends_with_error_and_failed(gateway: RunningGateway, session_id: str) -> None:
    """An error after the first token is never taken for success; what was sampled is kept (I3)."""
    events = []
    for event in create(gateway, session_id, input="count slowly", stream=True):
        if event.type == "response.output_text.delta" and events[-1].type != event.type:
            gateway.post(f"/sessions/{session_id}/finish")
        events.append(event)
    assert [event.type for event in events[-2:]] == ["error", "response.failed"]
    assert events[-1].response.error.code == events[-2].code == "session_finished"
    [turn] = gateway.turns(session_id)
    assert 0 < len(turn["output_token_ids"]) < 20
    assert events[-1].response.output[0].content[0].text in turn["reply"]["content"]


def test_logprobs_of_the_text_add_up_to_it_and_are_those_recorded(gateway: RunningGateway, session_id: str) -> None:
    """I9; reasoning and markup have tokens too, which are not the text's."""
    history = [QUESTION, {"type": "function_call", "call_id": "c", "name": "look", "arguments": '{"step": 5}'}]
    history.append({"type": "function_call_output", "call_id": "c", "output": "found-5"})
    include = ["message.output_text.logprobs", "reasoning.encrypted_content"]
    response = create(gateway, session_id, input=history, include=include)
    part = response.output[-1].content[0]
    assert "".join(entry.token for entry in part.logprobs) == "It is behind step 5."
    recorded = gateway.turns(session_id)[0]["output_logprobs"]
    assert {entry.logprob for entry in part.logprobs} <= set(recorded)
    assert response.output[0].encrypted_content
    events = list(create(gateway, session_id, input=history, include=include, stream=True))
    streamed = [e for event in events if event.type == "response.output_text.delta" for e in event.logprobs]
    assert "".join(entry.token for entry in streamed) == "It is behind step 5."


def test_captured_arrays_come_where_asked_for(gateway: RunningGateway, session_id: str) -> None:
    """I7."""
    assert not {"token_ids", "routed_experts"} & create(gateway, session_id, input="x").model_dump().keys()
    asked = {"return_token_ids": True, "return_routed_experts": True}
    for stream in (False, True):
        reply = create(gateway, session_id, input="x", extra_body=asked, stream=stream)
        body = (list(reply)[-1].response if stream else reply).model_dump()
        turn = gateway.turns(session_id)[-1]
        assert body["token_ids"] == turn["output_token_ids"]
        assert len(body["logprobs"]["content"]) == len(body["token_ids"])
        assert body["routed_experts"]["shape"][0] == len(body["prompt_token_ids"]) + len(body["token_ids"]) - 1
