"""Completions and /generate on the wire: prompts of every shape, whole and streamed replies that agree."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from gateway.contracts.errors import EngineUnavailable, InvalidRequest
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason
from gateway.contracts.replies import ContentDelta, ParsedReply
from gateway.contracts.versions import VersionSpan
from gateway.wire import sse
from gateway.wire.completions import CompletionsWriter, parse_completions_request
from gateway.wire.generate import SglangWriter, parse_sglang_request
from gateway.wire.json_text import dump_json
from gateway.wire.reply import FinishedChoice, ReplyTokens, Usage
from gateway.wire.sampling import DEFAULT_LENGTH
from gateway.wire.tokenization import parse_detokenize_request, parse_tokenize_request

LETTERS = "abcdefgh"


def decode(ids: Iterable[int]) -> str:
    return "".join(LETTERS[i] for i in ids)


def tokens(*ids: int) -> ReplyTokens:
    logprobs = np.array([np.nan if i == 7 else -0.5 * i for i in ids], dtype=np.float32)
    return ReplyTokens(np.array(ids, dtype=np.int32), logprobs, [LETTERS[i] for i in ids])


def choice(text: str | None, *ids: int, finish: Finish | None = None, **fields: Any) -> FinishedChoice:
    return FinishedChoice(
        reply=ParsedReply(text, None, (), (), 0),
        finish=finish or Finish(FinishReason.STOP, 4),
        prompt_token_ids=np.array([0, 1], dtype=np.int32),
        tokens=tokens(*ids),
        experts=RoutedExperts(np.arange(6, dtype=np.uint8).reshape(3, 1, 2), 1),
        meta_info={"seen": 2**70},
        reply_fields={"more": [1.0]},
        usage=Usage(2, len(ids), 1, 0),
        version_spans=(VersionSpan(0, 1, 3), VersionSpan(1, len(ids), 4)),
        **fields,
    )


def values(frames: Iterable[bytes]) -> list[Any]:
    return [json.loads(frame.removeprefix(b"data: ")) for frame in frames if frame != sse.DONE]


def completions(**fields: Any) -> CompletionsWriter:
    request = parse_completions_request(json.dumps({"prompt": [0, 1], **fields}).encode())
    return CompletionsWriter(request, decode, "turn-1", "model")


def sglang(**fields: Any) -> SglangWriter:
    request = parse_sglang_request(json.dumps({"input_ids": [0, 1], **fields}).encode())
    return SglangWriter(request, lambda version: f"v{version}", "turn-1", "model")


@pytest.mark.parametrize("echo", [False, True])
def test_a_streamed_completion_is_the_whole_one_in_pieces(echo: bool) -> None:
    """I2, I9: one log-prob and one offset a token, missing ones null; text held back comes with later tokens."""
    options = {"echo": echo, "logprobs": 0, "return_token_ids": True, "return_routed_experts": True}
    done = choice("cdh", 2, 3, 7, 4)
    [whole] = json.loads(dump_json(completions(**options).whole([done])))["choices"]
    writer = completions(stream=True, **options)
    frames = [
        *writer.opening(0, done.prompt_token_ids),
        *writer.progress(0, [], tokens(2)),
        *writer.progress(0, [ContentDelta("cd")], tokens(3)),
        *writer.progress(0, [ContentDelta("h")], tokens(7, 4)),
        *writer.progress(0, [], tokens()),
        *writer.closing(0, done),
        *writer.end([done]),
    ]
    pieces = [value["choices"][0] for value in values(frames)]
    assert "".join(piece["text"] for piece in pieces) == whole["text"] == ("ab" if echo else "") + "cdh"
    for name in ("tokens", "token_logprobs", "text_offset"):
        joined = [item for piece in pieces if piece["logprobs"] for item in piece["logprobs"][name]]
        assert joined == whole["logprobs"][name]
    assert whole["logprobs"]["token_logprobs"] == [None, None] * echo + [-1.0, -1.5, None, -2.0]
    assert whole["logprobs"]["text_offset"] == list(range(6 if echo else 4))
    assert [i for piece in pieces for i in piece.get("token_ids", [])] == whole["token_ids"] == [2, 3, 7, 4]
    assert pieces[0]["prompt_token_ids"] == whole["prompt_token_ids"] == [0, 1]
    assert pieces[-1]["routed_experts"] == whole["routed_experts"]
    assert [piece["finish_reason"] for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert values(frames)[-1]["more"] == [1.0]


def test_usage_counts_a_prompt_once_and_every_choice() -> None:
    writer = completions(prompt=[[0, 1], [2]], n=2)
    body = writer.whole([choice("c", 2, 4)] * 4)
    assert body["usage"]["prompt_tokens"] == 4
    assert body["usage"]["completion_tokens"] == 8


def test_what_was_not_asked_for_is_not_in_a_completion() -> None:
    """I7."""
    [body] = completions().whole([choice(None, 2, 4, finish=Finish(FinishReason.LENGTH))])["choices"]
    assert body == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "length",
        "meta_info": {"seen": 2**70},
    }
    assert list(completions().opening(0, np.array([0, 1], dtype=np.int32))) == []


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_prompts_are_read_in_every_shape(prompt: Any, expected: list[Any]) -> None:
    turns = parse_completions_request(json.dumps({"prompt": prompt}).encode()).turns
    read = [
        turn.prompt.text if turn.prompt.token_ids is None else turn.prompt.token_ids.tolist()
        for turn in turns
        if turn.prompt is not None
    ]
    assert read == expected
    assert all(turn.messages == () and turn.sampling[DEFAULT_LENGTH] == 16 for turn in turns)


def test_versions_and_rows_of_a_generation_are_told_as_sglang_does() -> None:
    """I5, I9: who sampled which tokens; rows from where the client wants them, as far as there are any."""
    writer = sglang(return_routed_experts=True, routed_experts_start_len=2, return_logprob=True)
    body = json.loads(dump_json(writer.whole([choice("cdh", 2, 3, 7)])))
    meta = body["meta_info"]
    assert meta["weight_version"] == "v4"
    assert meta["weight_versions"] == [
        {"version": "v3", "start": 0, "end": 1},
        {"version": "v4", "start": 1, "end": 3},
    ]
    rows = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype="<i4").reshape(-1, 1, 2)
    assert rows.tolist() == [[[2, 3]], [[4, 5]]]
    assert meta["routed_experts_start_len"] == 2
    assert meta["output_token_logprobs"] == [[-1.0, 2, None], [-1.5, 3, None], [None, 7, None]]
    assert (meta["seen"], body["more"]) == (2**70, [1.0])


@pytest.mark.parametrize(
    ("finish", "told"),
    [
        (Finish(FinishReason.STOP, 4), {"type": "stop", "matched": 4}),
        (Finish(FinishReason.STOP, "x"), {"type": "stop", "matched": "x"}),
        (Finish(FinishReason.LENGTH), {"type": "length", "length": 2}),
        (Finish(FinishReason.ABORT), {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}),
    ],
)
def test_a_generation_ends_as_its_engine_said(finish: Finish, told: Any) -> None:
    assert sglang().whole([choice("c", 2, 3, finish=finish)])["meta_info"]["finish_reason"] == told


def test_a_generation_names_its_replies_as_the_client_did() -> None:
    writer = sglang(input_ids=[[0], [1]], rid=["x", "y"], sampling_params={"n": 2})
    names = [body["meta_info"]["id"] for body in writer.whole([choice("c", 2, 3)] * 4)]
    assert names == ["x", "x-1", "y", "y-1"]


def test_a_failure_after_the_first_token_ends_the_stream_without_done() -> None:
    for writer in (completions(), sglang()):
        [frame] = writer.failure(EngineUnavailable("gone"))
        assert json.loads(frame.removeprefix(b"data: "))["error"]["message"] == "gone"


def test_a_frame_is_one_line_to_every_reader() -> None:
    """Clients that split text at Unicode's line ends see whole frames, with equal values (I8)."""
    value = {"a\u2028": "b\u0085c\u2029\x1c\n\r\v"}
    frame = sse.event(value)
    assert len(frame.decode().splitlines()) == 2  # the frame, and the empty line that ends it
    assert values([frame]) == [value]


@pytest.mark.parametrize("fields", [{"text": 5}, {"prompt": [1, 2]}, {}, {"messages": [], "prompt": "x"}])
def test_an_impossible_tokenization_is_refused(fields: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_tokenize_request(json.dumps(fields).encode())


@pytest.mark.parametrize("tokens", ["x", [], ["x"], [[]], None])
def test_an_impossible_detokenization_is_refused(tokens: Any) -> None:
    with pytest.raises(InvalidRequest):
        parse_detokenize_request(json.dumps({"tokens": tokens}).encode())
