"""Parts of messages that are no text: one spelling, their bytes taken out, a reference in their place."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.media import MEDIA_KEYS, Blob, blob_name, placed_media
from gateway.contracts.records import MatchTier
from gateway.sessions.messages import NO_CALLS, compare, message_key
from gateway.wire import media
from gateway.wire.generate import parse_sglang_request
from gateway.wire.media import TakenMedia, take_engine_media, take_media
from gateway.wire.openai import parse_chat_request

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
BLOB = Blob.of(PIXEL, "image/png")
REFERENCE = {"url": BLOB.url, "media_type": "image/png", "num_bytes": len(PIXEL)}


def data_url(content: bytes = PIXEL, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def taken(*parts: Any) -> TakenMedia:
    return take_media([{"role": "user", "content": [*parts]}])


def one_part(part: Any) -> Any:
    return taken(part).messages[0]["content"][0]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": data_url()}},
        {"type": "image_url", "image_url": data_url()},
        {"type": "input_image", "image_url": data_url()},
        {"type": "image", "image": data_url()},
        {"type": "image", "url": data_url()},
        {"type": "image", "image": {"url": data_url()}},
        {"type": "image_url", "image_url": {"url": data_url().replace("image/png", "IMAGE/PNG;name=x")}},
        {"type": "image_url", "image_url": {"url": data_url()}, "image": data_url(), "url": data_url()},
    ],
)
def test_every_spelling_of_an_image_becomes_one_reference(part: Any) -> None:
    """I4: what is recorded never holds the bytes, also not under a second name."""
    found = taken(part)
    assert found.messages[0]["content"] == [{"type": "image_url", "image_url": REFERENCE}]
    assert found.blobs == {BLOB.sha256: BLOB}


def test_unknown_keys_of_a_part_stay_at_their_level() -> None:
    """I8."""
    part = {"type": "image_url", "image_url": {"url": data_url(), "detail": "low", "x": 1.0}, "y": None, "z": 2**70}
    assert one_part(part) == {
        "type": "image_url",
        "image_url": {"detail": "low", "x": 1.0, **REFERENCE},
        "y": None,
        "z": 2**70,
    }


def test_recordings_of_chat_completions_are_references_too() -> None:
    part = one_part(
        {"type": "input_audio", "input_audio": {"data": base64.b64encode(b"RIFF").decode(), "format": "wav"}}
    )
    wav = Blob.of(b"RIFF", "audio/wav")
    assert part == {
        "type": "audio_url",
        "audio_url": {"format": "wav", "url": wav.url, "media_type": "audio/wav", "num_bytes": 4},
    }


def test_urls_stay_and_text_that_looks_like_data_stays_text() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png?x=1"}},
        {"type": "text", "text": data_url()},
        {"type": "tool_reference", "name": "x"},
    ]
    found = taken(*parts)
    assert list(found.messages[0]["content"]) == parts
    assert not found.blobs


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "image_url"}, "image without a URL"),
        ({"type": "image"}, "image without a URL"),
        ({"type": "image_url", "image_url": {"url": None}}, "image_url.url: expected .* got null"),
        ({"type": "image_url", "image_url": {"url": ["x"]}}, "got a list"),
        (
            {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
            "expected a data: URL .* 'file:///etc/passwd'",
        ),
        ({"type": "image_url", "image_url": {"url": "/srv/picture.png"}}, "expected a data: URL"),
        ({"type": "image_url", "image_url": {"url": "HTTP://x/picture.png"}}, "expected a data: URL"),
        ({"type": "image_url", "image_url": {"url": "verbatim-blob:sha256-abc"}}, "expected a data: URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/svg+xml,%3Csvg/%3E"}}, "must say ;base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,A"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAéA"}}, "not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "empty"),
        (
            {"type": "image_url", "image_url": {"url": data_url(media_type="text/html")}},
            "expected image/… as media type",
        ),
        ({"type": "image_url", "image_url": {"url": data_url(media_type="image/x y")}}, "as media type"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, "input_audio.format: expected a name such as wav"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "w,av"}}, "format: expected"),
        ({"type": "video_url", "video_url": {"url": data_url()}}, "expected video/… as media type"),
        ({"type": "file", "file": {"file_data": data_url()}}, "takes no files"),
    ],
)
def test_a_part_that_cannot_be_read_is_named(part: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"^messages\[0\].content\[1\].*{message}"):
        taken({"type": "text", "text": "look"}, part)


def test_parts_that_are_too_many_or_too_large_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_BLOB_BYTES", 30)
    assert taken({"type": "image", "image": data_url(bytes(30))}).blobs
    with pytest.raises(InvalidRequest, match="longer than 30 bytes"):
        taken({"type": "image", "image": data_url(bytes(36))})
    with pytest.raises(InvalidRequest, match=r"content\[512\].*at most 512"):
        taken(*[{"type": "image", "image": "http://x"}] * 513)


def test_blocks_that_stay_beside_a_message_lose_their_bytes_as_well() -> None:
    block = {
        "type": "image",
        "source": {"type": "base64", "media_type": "image/png", "data": data_url().partition(",")[2]},
    }
    found = take_media([{"role": "assistant", "content": "see", "anthropic_content": [block, {"type": "text"}]}])
    assert found.messages[0]["anthropic_content"][0]["source"]["data"] == BLOB.url
    assert found.blobs == {BLOB.sha256: BLOB}


@given(content=st.binary(min_size=1, max_size=200), subtype=st.sampled_from(["png", "jpeg", "webp"]))
@settings(max_examples=100)
def test_bytes_come_back_from_any_data_url_and_a_replay_is_the_same_message(content: bytes, subtype: str) -> None:
    """I3: the exact tier; nothing of the bytes stands in the message."""
    part = {"type": "image_url", "image_url": {"url": data_url(content, f"image/{subtype}")}}
    found, again = taken(part), taken(part)
    [placed] = placed_media(found.messages)
    name = blob_name(placed.media.url)
    assert name is not None
    assert found.blobs[name].content == content
    assert found.blobs[name].media_type == f"image/{subtype}"
    keys = [message_key(each.messages[0], NO_CALLS) for each in (found, again)]
    assert compare(keys[0], keys[1]) is MatchTier.EXACT
    assert base64.b64encode(content).decode() not in json.dumps(found.messages) or len(content) < 4


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.sampled_from(["data:image/png;base64,AAAA", "http://x", "data:"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*sorted(MEDIA_KEYS), "type", "url", "data", "format", "source"]),
            inner | st.sampled_from(sorted(MEDIA_KEYS)),
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(content=JUNK, beside=JUNK)
@settings(max_examples=300)
def test_parts_of_any_shape_are_read_or_refused(content: Any, beside: Any) -> None:
    """I6: and what is read holds references and URLs only."""
    try:
        found = take_media([{"role": "user", "content": content, "anthropic_content": beside}])
    except InvalidRequest:
        return
    for placed in placed_media(found.messages):
        assert placed.media.url.startswith("http") or blob_name(placed.media.url) in found.blobs


def test_media_beside_messages_reach_no_engine() -> None:
    """I1: an engine that reads more than its prompt's ids must be known to do so."""
    body = {"messages": [{"role": "user", "content": "x"}], "image_data": ["http://x"], "mm_hashes": ["00"]}
    request = parse_chat_request(json.dumps(body).encode())
    assert request.ignored_fields == ("image_data", "mm_hashes")
    assert not request.passthrough


def test_media_of_generate_belong_to_their_prompts() -> None:
    encoded = base64.b64encode(PIXEL).decode()
    parts, blobs = take_engine_media({"image_data": encoded}, 1)
    assert parts == [[{"type": "image_url", "image_url": {**REFERENCE, "media_type": "application/octet-stream"}}]]
    assert [blob.content for blob in blobs.values()] == [PIXEL]
    assert [len(own) for own in take_engine_media({"image_data": ["http://a", "http://b"]}, 1)[0]] == [2]
    assert [len(own) for own in take_engine_media({"image_data": [["http://a", "http://b"]]}, 1)[0]] == [2]
    assert [
        len(own)
        for own in take_engine_media({"image_data": ["http://a", None, ["http://a", {"url": "http://b"}]]}, 3)[0]
    ] == [1, 0, 2]
    with pytest.raises(InvalidRequest, match="image_data: expected an entry for each of 2 prompts"):
        take_engine_media({"image_data": "http://a"}, 2)
    with pytest.raises(InvalidRequest, match=r"image_data\[0\]\[0\]: the data is not base64"):
        take_engine_media({"image_data": "/etc/passwd.png"}, 1)


def test_generate_keeps_its_media_with_the_prompt_and_not_for_passing_on() -> None:
    body = {"text": "look", "image_data": data_url(), "audio_data": "http://a", "sampling_params": {}}
    [turn] = parse_sglang_request(json.dumps(body).encode()).turns
    assert turn.prompt is not None
    assert [part["type"] for part in turn.prompt.media] == ["image_url", "audio_url"]
    assert turn.blobs.keys() == {BLOB.sha256}
    assert not turn.passthrough
