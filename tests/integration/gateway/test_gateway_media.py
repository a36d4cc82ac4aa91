"""Images in conversations, over real HTTP with the clients' SDKs: passed on, recorded by reference, never trained."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.integration.gateway.conftest import RunningGateway, StartGateway

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
SHA256 = hashlib.sha256(PIXEL).hexdigest()
ENCODED = base64.b64encode(PIXEL).decode()
DATA_URL = f"data:image/png;base64,{ENCODED}"
IMAGE = {"type": "image_url", "image_url": {"url": DATA_URL}}
REFERENCE = {"url": f"verbatim-blob:sha256-{SHA256}", "media_type": "image/png", "num_bytes": len(PIXEL)}
EXTRA_TOKENS = 15
"""Of each image, beyond its placeholder."""

_TEXT_PART = '{%- if part.type == "text" -%}{{- part.text -}}'
_IMAGE_PART = '{%- elif part.type == "image" -%}{{- "<|vision_start|><|image_pad|><|vision_end|>" -}}'


@pytest.fixture(scope="module")
def seeing_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a placeholder for images in its template and vocabulary."""
    folder = tmp_path_factory.mktemp("seeing") / "model"
    shutil.copytree(tiny_model, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (folder / "chat_template.jinja").read_text()
    assert _TEXT_PART in template
    (folder / "chat_template.jinja").write_text(template.replace(_TEXT_PART, _TEXT_PART + _IMAGE_PART))
    return folder


StartSeeing = Callable[..., RunningGateway]


@pytest.fixture(scope="module")
def start_seeing(start_gateway: StartGateway, seeing_model: Path, rules_file: Path) -> StartSeeing:
    def start(data: Path, *flags: str, kind: str = "seeing", **options: Any) -> RunningGateway:
        return start_gateway(data, "--model", str(seeing_model), *flags, engine=f"{kind}={rules_file}", **options)

    return start


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("media") / "data"


@pytest.fixture(scope="module")
def seeing(start_seeing: StartSeeing, data: Path) -> RunningGateway:
    return start_seeing(data)


def ask(gateway: RunningGateway, session_id: str, *messages: Any, **options: Any) -> Any:
    return gateway.client(session_id).chat.completions.create(model="tiny", messages=list(messages), **options)


def user(text: str, *parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": text}, *parts]}


def text_of(reply: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": reply.choices[0].message.content}


def test_an_image_reaches_the_engine_and_is_recorded_by_reference(
    seeing: RunningGateway, session_id: str, data: Path
) -> None:
    """I4, I9: the record names the bytes and never holds them; the turn is answered and cannot train."""
    reply = ask(seeing, session_id, user("quick", IMAGE))
    assert reply.choices[0].message.content == "the quick answer"
    assert reply.saw == [SHA256]
    [turn] = seeing.turns(session_id)
    assert turn["added_messages"] == [user("quick", {"type": "image_url", "image_url": REFERENCE})]
    assert ENCODED not in json.dumps(turn)
    assert (turn["untrainable_reason"], turn["experts_stop"]) == ("media", 0)
    assert len(turn["output_logprobs"]) == len(turn["output_token_ids"]) > 0
    assert reply.usage.prompt_tokens == len(turn["prompt_token_ids"]) + EXTRA_TOKENS
    blob = httpx.get(f"{seeing.url}/sessions/{session_id}/blobs/{SHA256}")
    assert (blob.content, blob.headers["content-type"]) == (PIXEL, "image/png")
    assert blob.headers["content-disposition"] == "attachment"
    assert not any(ENCODED.encode() in file.read_bytes() for file in data.iterdir() if file.is_file())


def test_a_replay_of_the_image_goes_on_from_the_recorded_turn(seeing: RunningGateway, session_id: str) -> None:
    """I3: the same data URL is the same message, in the exact tier; what goes on from it never trains."""
    question = user("quick", IMAGE)
    first = ask(seeing, session_id, question)
    second = ask(seeing, session_id, question, text_of(first), {"role": "user", "content": "count slowly"})
    assert second.saw == [SHA256]
    turns = seeing.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert turns[1]["attachment"]["tier"] == "exact"
    assert turns[1]["added_messages"] == [{"role": "user", "content": "count slowly"}]
    assert [turn["untrainable_reason"] for turn in turns] == ["media", "media"]


def test_another_image_is_another_message(seeing: RunningGateway, session_id: str) -> None:
    first = ask(seeing, session_id, user("quick", IMAGE))
    other = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(b'x').decode()}"}}
    ask(seeing, session_id, user("quick", other), text_of(first), user("quick"))
    turns = seeing.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] is None
    assert turns[1]["attachment"]["segment_reason"] == "no_match"


def test_turns_before_the_first_image_train_and_the_account_names_the_others(
    seeing: RunningGateway, session_id: str
) -> None:
    """I9: a session with images is text-complete, and every sampled token is accounted for."""
    first = ask(seeing, session_id, user("quick"))
    history = [user("quick"), text_of(first), user("quick", IMAGE, IMAGE)]
    second = ask(seeing, session_id, *history, stream=False)
    ask(seeing, session_id, *history, text_of(second), user("quick"))
    turns = seeing.turns(session_id)
    assert [turn["untrainable_reason"] for turn in turns] == [None, "media", "media"]
    assert [turn["attachment"]["parent_id"] for turn in turns[1:]] == [turn["turn_id"] for turn in turns[:2]]
    assert all(turn["reply"]["content"] == "the quick answer" for turn in turns)
    found = seeing.get(f"/sessions/{session_id}/segments?arrays=1")
    [segment] = found["segments"]
    assert [span["turn_id"] for span in segment["turns"]] == [turns[0]["turn_id"]]
    assert sum(segment["loss_mask"]) == len(turns[0]["output_token_ids"])
    report = seeing.get(f"/sessions/{session_id}/report")
    num_left_out = sum(len(turn["output_token_ids"]) for turn in turns[1:])
    assert report["pick"]["left_out"] == [{"reason": "media", "num_turns": 2, "num_tokens": num_left_out}]
    assert report["num_hidden_messages"] == 0


def test_an_image_that_lives_elsewhere_is_named_and_never_fetched(seeing: RunningGateway, session_id: str) -> None:
    """Nobody listens there: a gateway that fetched it would fail."""
    url = "http://127.0.0.1:9/picture.png"
    reply = ask(seeing, session_id, user("quick", {"type": "image_url", "image_url": {"url": url, "detail": "low"}}))
    assert reply.saw == [url]
    [turn] = seeing.turns(session_id)
    assert turn["added_messages"][0]["content"][1] == {"type": "image_url", "image_url": {"url": url, "detail": "low"}}
    assert turn["untrainable_reason"] == "media"


def test_an_image_streams_as_text_does(seeing: RunningGateway, session_id: str) -> None:
    chunks = list(ask(seeing, session_id, user("quick", IMAGE), stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "the quick answer"
    assert chunks[-1].usage.prompt_tokens == len(seeing.turns(session_id)[0]["prompt_token_ids"]) + EXTRA_TOKENS


def test_images_of_anthropics_client_in_questions_and_tool_results(seeing: RunningGateway, session_id: str) -> None:
    """One spelling for all dialects: a chat completion goes on where Anthropic's client stopped."""
    client = anthropic.Anthropic(base_url=f"{seeing.url}/sessions/{session_id}", api_key="unused", max_retries=0)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ENCODED}}
    question = {"role": "user", "content": [image, {"type": "text", "text": "What is 48/2?"}]}
    tools = [{"name": "calculator", "input_schema": {"type": "object"}}]
    options: Any = {"model": "tiny", "max_tokens": 200, "tools": tools}
    first = client.messages.create(messages=[question], **options)
    call = next(block for block in first.content if block.type == "tool_use")
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "24"}, image]}
    history: Any = [
        question,
        {"role": "assistant", "content": [block.model_dump() for block in first.content]},
        {"role": "user", "content": [result]},
    ]
    second = client.messages.create(messages=history, **options)
    assert second.content[-1].text == "The answer is 24."
    turns = seeing.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert turns[1]["added_messages"][0]["content"][1] == {"type": "image_url", "image_url": REFERENCE}
    assert turns[1]["meta"]["media"]["num_media"] == 2
    assert ENCODED not in json.dumps(turns)
    counted = client.messages.count_tokens(model="tiny", messages=history, tools=tools)  # type: ignore[arg-type]
    assert counted.input_tokens == second.usage.input_tokens - 2 * EXTRA_TOKENS


def test_images_of_responses_are_read_from_the_record_when_it_goes_on(seeing: RunningGateway, session_id: str) -> None:
    client = seeing.client(session_id)
    parts: Any = [
        {"type": "input_text", "text": "quick"},
        {"type": "input_image", "image_url": DATA_URL, "detail": "low"},
    ]
    first = client.responses.create(model="tiny", input=[{"role": "user", "content": parts}])
    second = client.responses.create(model="tiny", input="quick", previous_response_id=first.id)
    assert second.model_extra is not None
    turns = seeing.turns(session_id)
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert turns[1]["meta"]["engine_reply"] == {"saw": [SHA256]}


def test_images_of_generate_are_recorded_with_their_prompt(seeing: RunningGateway, session_id: str) -> None:
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    body = {"text": f"{placeholder}quick", "image_data": DATA_URL, "sampling_params": {"max_new_tokens": 8}}
    first = seeing.post(f"/sessions/{session_id}/generate", body)
    assert first["text"] == "the quick answer"
    seeing.post(f"/sessions/{session_id}/generate", {"text": body["text"] + first["text"] + "<|im_end|>quick"})
    turns = seeing.turns(session_id)
    assert turns[0]["added_messages"][0]["media"] == [{"type": "image_url", "image_url": REFERENCE}]
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
    assert [turn["untrainable_reason"] for turn in turns] == ["media", "media"]


def test_text_that_an_engine_would_take_for_an_image_is_refused_beside_one(
    seeing: RunningGateway, session_id: str
) -> None:
    """An engine that decodes the prompt would count it, and SGLang would never answer; without an image it is text."""
    with pytest.raises(openai.BadRequestError, match=r"<\|image_pad\|>' 2 times, 1 stand for its 1 images"):
        ask(seeing, session_id, user("quick <|image_pad|>", IMAGE))
    assert ask(seeing, session_id, user("quick <|image_pad|>")).choices[0].message.content == "the quick answer"
    body = {"text": "quick", "image_data": DATA_URL}
    reply = httpx.post(f"{seeing.url}/sessions/{session_id}/generate", json=body)
    assert reply.status_code == 400
    assert "0 times, 1 stand for its 1 images" in reply.text


def test_equal_images_of_sessions_are_one_file_until_the_last_of_them_goes(
    seeing: RunningGateway, session_id: str, data: Path
) -> None:
    content = session_id.encode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}
    name = hashlib.sha256(content).hexdigest()
    for each in ("a", "b"):
        ask(seeing, f"{session_id}-{each}", user("quick", part))
    httpx.delete(f"{seeing.url}/sessions/{session_id}-a").raise_for_status()
    assert httpx.get(f"{seeing.url}/sessions/{session_id}-a/blobs/{name}").status_code == 404
    assert httpx.get(f"{seeing.url}/sessions/{session_id}-b/blobs/{name}").content == content
    assert (data / "blobs" / name).is_file()
    httpx.delete(f"{seeing.url}/sessions/{session_id}-b").raise_for_status()
    seeing.post("/sessions", {"session_id": f"{session_id}-c"})  # files go after the commit that freed them
    assert not (data / "blobs" / name).exists()


def test_a_reference_serves_the_session_that_has_its_bytes_and_no_other(
    seeing: RunningGateway, session_id: str
) -> None:
    """What one agent sent, no other agent can have by guessing its name."""
    content = f"secret {session_id}".encode()
    name = hashlib.sha256(content).hexdigest()
    ask(
        seeing,
        session_id,
        user("quick", {"type": "image", "image": f"data:image/png;base64,{base64.b64encode(content).decode()}"}),
    )
    by_name = {"type": "image_url", "image_url": {"url": f"verbatim-blob:sha256-{name}"}}
    again = ask(seeing, session_id, user("quick", by_name))
    assert again.saw == [name]
    with pytest.raises(openai.BadRequestError, match=f"content\\[1\\]: this session has no bytes with sha256 {name}"):
        ask(seeing, f"{session_id}-other", user("quick", by_name))
    assert not seeing.turns(f"{session_id}-other")


def test_a_model_that_is_shown_no_images_says_so(gateway: RunningGateway, session_id: str) -> None:
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[1\]: this model takes no images"):
        ask(gateway, session_id, user("quick", IMAGE))


def test_an_engine_that_takes_no_images_says_so_before_anything_is_sampled(
    start_seeing: StartSeeing, tmp_path: Path, session_id: str
) -> None:
    blind = start_seeing(tmp_path / "data", "--set", "turns.media_urls=false", kind="scripted")
    with pytest.raises(openai.BadRequestError, match=r"image, which this engine does not take"):
        ask(blind, session_id, user("quick", IMAGE))
    with pytest.raises(openai.BadRequestError, match=r"content\[1\]: http\(s\) URLs are not taken here"):
        ask(blind, session_id, user("quick", {"type": "image_url", "image_url": {"url": "http://x"}}))
    assert ask(blind, session_id, user("quick")).choices[0].message.content == "the quick answer"
    assert len(blind.turns(session_id)) == 1
    assert blind.stop() == 0


def test_sigkill_after_a_reply_leaves_the_image_in_place(
    start_seeing: StartSeeing, tmp_path: Path, session_id: str
) -> None:
    """I4: what a durable turn refers to is as durable; with keys on, the session's key opens its images only."""
    environment = {"VERBATIM_OPERATOR_KEY": "operator"}
    operator = {"Authorization": "Bearer operator"}
    running = start_seeing(tmp_path / "data", environment=environment)
    made = [running.post("/sessions", {"session_id": f"{session_id}-{i}"}, headers=operator) for i in range(2)]
    client = openai.OpenAI(base_url=made[0]["base_url"], api_key=made[0]["api_key"], max_retries=0)
    messages: Any = [user("quick", IMAGE)]
    reply = client.chat.completions.create(model="tiny", messages=messages)
    running.stop(signal.SIGKILL)
    again = start_seeing(tmp_path / "data", environment=environment)
    url = f"{again.url}/sessions/{session_id}-0/blobs/{SHA256}"
    own, other = ({"Authorization": f"Bearer {each['api_key']}"} for each in made)
    assert httpx.get(url, headers=own).content == PIXEL
    assert httpx.get(url, headers=operator).content == PIXEL
    assert [httpx.get(url, headers=headers).status_code for headers in (other, {})] == [403, 401]
    client = openai.OpenAI(
        base_url=f"{again.url}/sessions/{session_id}-0/v1", api_key=made[0]["api_key"], max_retries=0
    )
    client.chat.completions.create(model="tiny", messages=[*messages, text_of(reply), user("quick")])
    turns = again.get(f"/sessions/{session_id}-0/turns", headers=operator)["turns"]
    assert turns[1]["attachment"]["parent_id"] == turns[0]["turn_id"]
