"""The likeliest tokens through a real gateway process, asked for by OpenAI's own client, whole and streamed."""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engines.scripted import scripted_top_logprobs
from tests.integration.gateway.conftest import RunningGateway

QUESTION: Any = {"role": "user", "content": "quick"}


def expected(turn: dict[str, Any], number: int) -> list[list[tuple[int, float]]]:
    """What the scripted engine has said of a turn's tokens."""
    ids, logprobs = np.array(turn["output_token_ids"]), np.array(turn["output_logprobs"], dtype=np.float32)
    return [[tuple(top) for top in row] for row in scripted_top_logprobs(ids, logprobs, number=number)]


def recorded(turn: dict[str, Any]) -> list[list[tuple[int, float]]]:
    return [list(zip(row[::2], row[1::2], strict=True)) for row in turn["meta"]["top_logprobs"]]


def check_entries(entries: list[Any], turn: dict[str, Any], number: int) -> None:
    """I2: one entry a token; `bytes` are what it stands for, and join to the text."""
    told = expected(turn, number)
    assert [entry.logprob for entry in entries] == turn["output_logprobs"]
    assert [[top.logprob for top in entry.top_logprobs] for entry in entries] == [[p for _, p in row] for row in told]
    assert all(entry.top_logprobs[0].bytes == entry.bytes for entry in entries)
    text = b"".join(bytes(entry.bytes) for entry in entries).decode()
    assert text == "the quick answer<|im_end|>"
    assert text == "".join(entry.token for entry in entries)


@pytest.mark.parametrize("stream", [False, True])
def test_chat_shows_as_many_as_were_asked_for(gateway: RunningGateway, session_id: str, stream: bool) -> None:
    client = gateway.client(session_id)
    asked: Any = {"model": "any", "messages": [QUESTION], "logprobs": True, "top_logprobs": 3}
    entries: list[Any] = []
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                entries += (choice.logprobs and choice.logprobs.content) or []
    else:
        reply = client.chat.completions.create(**asked)
        assert reply.choices[0].logprobs is not None
        entries = reply.choices[0].logprobs.content or []
    [turn] = gateway.turns(session_id)
    check_entries(entries, turn, 3)
    assert recorded(turn) == expected(turn, 3)


def test_a_record_holds_them_only_where_they_were_asked_for(gateway: RunningGateway, session_id: str) -> None:
    """I7: the same tokens, log-probs and rows, whether or not; nothing of them in a list of turns without arrays."""
    client = gateway.client(session_id)
    asked: Any = {"model": "any", "messages": [QUESTION], "logprobs": True}
    plain = client.chat.completions.create(**asked).choices[0].logprobs
    client.chat.completions.create(**asked, top_logprobs=20)
    without, with_tops = gateway.turns(session_id)
    for name in ("output_token_ids", "output_logprobs", "experts_stop", "sampling", "finish"):
        assert without[name] == with_tops[name]
    assert without["meta"].keys() == with_tops["meta"].keys() - {"top_logprobs"}
    assert plain is not None
    assert [entry.top_logprobs for entry in plain.content or []] == [[]] * len(without["output_token_ids"])
    listed = gateway.get(f"/sessions/{session_id}/turns")["turns"]
    assert all("top_logprobs" not in turn["meta"] for turn in listed)


def test_a_response_gives_them_again_from_the_record(gateway: RunningGateway, session_id: str) -> None:
    client = gateway.client(session_id)
    asked: Any = {"model": "any", "input": "quick", "top_logprobs": 2}
    first = client.responses.create(**asked, include=["message.output_text.logprobs"])
    again = client.responses.retrieve(first.id)
    assert again.output == first.output
    shown: Any = first.output[-1]
    [turn] = gateway.turns(session_id)
    told = expected(turn, 2)
    logprobs = shown.content[0].logprobs
    assert [[top.logprob for top in e.top_logprobs] for e in logprobs] == [[p for _, p in r] for r in told][:-1]
    assert not client.responses.create(**asked).output[-1].content[0].logprobs  # type: ignore[union-attr]


def test_completions_show_the_legacy_dicts(gateway: RunningGateway, session_id: str) -> None:
    prompt = "<|im_start|>user\nquick<|im_end|>\n<|im_start|>assistant\n"
    reply = gateway.client(session_id).completions.create(model="any", prompt=prompt, logprobs=4, max_tokens=50)
    logprobs = reply.choices[0].logprobs
    [turn] = gateway.turns(session_id)
    assert logprobs is not None
    assert logprobs.top_logprobs is not None
    assert [list(row.values()) for row in logprobs.top_logprobs] == [[p for _, p in r] for r in expected(turn, 4)]
    assert [next(iter(row)) for row in logprobs.top_logprobs] == logprobs.tokens


@pytest.mark.parametrize(
    ("path", "body", "named"),
    [
        ("v1/chat/completions", {"messages": [QUESTION], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ("v1/chat/completions", {"messages": [QUESTION], "top_logprobs": 2}, "top_logprobs"),
        ("v1/completions", {"prompt": "x", "logprobs": 99}, "logprobs"),
        ("v1/responses", {"input": "x", "top_logprobs": -1}, "top_logprobs"),
        ("generate", {"text": "x", "top_logprobs_num": -1}, "top_logprobs_num"),
        ("generate", {"text": "x", "token_ids_logprob": [1]}, "token_ids_logprob"),
    ],
)
def test_what_is_out_of_range_is_a_400_that_names_the_field(
    gateway: RunningGateway, path: str, body: dict[str, Any], named: str
) -> None:
    reply = httpx.post(f"{gateway.url}/{path}", json=body, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"].startswith(f"{named}:")


async def test_several_choices_have_each_their_own(gateway: RunningGateway, session_id: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/sessions/{session_id}/v1", api_key="k") as client:
        reply = await client.chat.completions.create(
            model="any", messages=[QUESTION], n=3, logprobs=True, top_logprobs=2
        )
    turns = gateway.turns(session_id)
    assert len(turns) == len(reply.choices) == 3
    for choice in reply.choices:
        assert choice.logprobs is not None
        check_entries(choice.logprobs.content or [], turns[0], 2)
