"""The likeliest tokens in every dialect: how they are asked for and shown, and that nobody sees them unasked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter
from tokenizers import Tokenizer, decoders, models

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import Finish, FinishReason, TopLogprob
from gateway.contracts.replies import ContentDelta, ParsedReply
from gateway.tito.tokenizer import ChatTokenizer
from gateway.wire import sse
from gateway.wire.completions import CompletionsWriter, parse_completions_request
from gateway.wire.generate import SglangWriter, parse_sglang_request
from gateway.wire.json_text import dump_json
from gateway.wire.openai import ChatWriter, parse_chat_request
from gateway.wire.reply import FinishedChoice, ReplyTokens, ReplyWriter, Usage
from gateway.wire.request import TurnRequest
from gateway.wire.responses import LOGPROBS, parse_responses_request
from gateway.wire.responses_reply import Asked, ResponsesWriter
from gateway.wire.token_texts import Spelling, spelling

SPELLINGS = {1: b"a", 2: b"b", 3: "ü".encode()[:1], 4: "é".encode()[:1], 5: "ü".encode()[1:], 6: b"a"}
TOPS = ((TopLogprob(1, -0.5), TopLogprob(3, -1.0)), (TopLogprob(4, -0.25), TopLogprob(1, -3.0), TopLogprob(6, -3.5)))


def spell(token_id: int) -> Spelling:
    raw = SPELLINGS[token_id]
    return Spelling(raw.decode(errors="replace"), raw)


def tokens(start: int = 0, stop: int = 2, *, with_tops: bool = True) -> ReplyTokens:
    ids, logprobs = np.array([1, 2], dtype=np.int32), np.array([-0.5, -4.0], dtype=np.float32)
    tops = TOPS[start:stop] if with_tops else ()
    return ReplyTokens(ids[start:stop], logprobs[start:stop], ["a", "b"][start:stop], tops, spell)


def choice(*, with_tops: bool = True) -> FinishedChoice:
    reply, prompt = ParsedReply("ab", None, (), (), 0), np.array([2, 2], dtype=np.int32)
    finish, usage = Finish(FinishReason.STOP), Usage(2, 2, 0, 0)
    return FinishedChoice(reply, finish, prompt, tokens(with_tops=with_tops), None, {}, {}, usage)


def body(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


def chat(**fields: Any) -> TurnRequest:
    return parse_chat_request(body(messages=[{"role": "user", "content": "x"}], **fields))


def responses(**fields: Any) -> TurnRequest:
    return parse_responses_request(body(input="x", **fields)).turn()


def completions(**fields: Any) -> TurnRequest:
    return parse_completions_request(body(prompt="x", **fields)).turns[0]


def sglang(**fields: Any) -> TurnRequest:
    return parse_sglang_request(body(text="x", **fields)).turns[0]


def values(frames: Iterable[bytes]) -> list[Any]:
    return [json.loads(frame.split(b"data: ", 1)[1]) for frame in frames if frame != sse.DONE]


def streamed(writer: ReplyWriter) -> list[Any]:
    """The frames of two tokens, one after the other."""
    done = choice()
    return values(
        [
            *writer.opening(0, done.prompt_token_ids),
            *writer.progress(0, [ContentDelta("a")], tokens(0, 1)),
            *writer.progress(0, [ContentDelta("b")], tokens(1, 2)),
            *writer.closing(0, done),
            *writer.end([done]),
        ]
    )


@pytest.mark.parametrize(
    ("ask", "fields", "number"),
    [
        (chat, {"logprobs": True, "top_logprobs": 20}, 20),
        (chat, {"logprobs": True, "top_logprobs": None}, 0),
        (chat, {"top_logprobs": 0}, 0),
        (chat, {"return_token_ids": True, "top_logprobs": 3}, 3),
        (responses, {"include": [LOGPROBS], "top_logprobs": 4}, 4),
        (responses, {"top_logprobs": 4}, 0),
        (responses, {"return_token_ids": True, "top_logprobs": 4}, 4),
        (completions, {"logprobs": 5}, 5),
        (completions, {"logprobs": 0}, 0),
        (completions, {}, 0),
        (sglang, {"return_logprob": True, "top_logprobs_num": 7}, 7),
        (sglang, {"return_logprob": True, "top_logprobs_num": [7]}, 7),
        (sglang, {"return_logprob": True, "top_logprobs_num": []}, 0),
        (sglang, {"top_logprobs_num": 7}, 0),
        (sglang, {"token_ids_logprob": []}, 0),
    ],
)
def test_every_dialect_asks_in_its_own_words(
    ask: Callable[..., TurnRequest], fields: dict[str, Any], number: int
) -> None:
    request = ask(**fields)
    assert request.wanted.num_top_logprobs == number
    assert "top_logprobs" not in request.passthrough
    assert request.ignored_fields == ()


@pytest.mark.parametrize(
    ("ask", "fields", "named"),
    [
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs: expected 0 to 20, got 21"),
        (chat, {"logprobs": True, "top_logprobs": -1}, "top_logprobs:"),
        (chat, {"logprobs": True, "top_logprobs": True}, "top_logprobs: expected an integer, got a boolean"),
        (chat, {"logprobs": True, "top_logprobs": 1.5}, "top_logprobs:"),
        (chat, {"logprobs": False, "top_logprobs": 2}, "top_logprobs: come with log-probs only"),
        (chat, {"logprobs": False, "top_logprobs": 2, "return_token_ids": True}, "top_logprobs: come with"),
        (chat, {"logprobs": 3}, "logprobs: expected true or false"),
        (responses, {"top_logprobs": 21}, "top_logprobs:"),
        (responses, {"top_logprobs": "4", "include": [LOGPROBS]}, "top_logprobs:"),
        (completions, {"logprobs": 21}, "logprobs:"),
        (completions, {"logprobs": -1}, "logprobs:"),
        (completions, {"logprobs": True}, "logprobs:"),
        (sglang, {"return_logprob": True, "top_logprobs_num": -1}, "top_logprobs_num:"),
        (sglang, {"top_logprobs_num": 10**6}, "top_logprobs_num:"),
        (sglang, {"top_logprobs_num": [1, 2]}, "top_logprobs_num:"),
        (sglang, {"top_logprobs_num": [1, True]}, "top_logprobs_num:"),
        (sglang, {"token_ids_logprob": [5]}, "token_ids_logprob: is not served"),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(
    ask: Callable[..., TurnRequest], fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        ask(**fields)
    assert caught.value.message.startswith(named)


def sent(reply: Any) -> Any:
    """As its client reads it."""
    return json.loads(dump_json(reply))


def test_chat_shows_them_with_the_bytes_that_tokens_really_are() -> None:
    """A token that is only a part of a character reads U+FFFD; its bytes say which part."""
    wanted = chat(logprobs=True, top_logprobs=3).wanted
    [whole] = sent(ChatWriter(wanted, "id", "m").whole([choice()]))["choices"]
    first, second = whole["logprobs"]["content"]
    assert first == {
        "token": "a",
        "logprob": -0.5,
        "bytes": [0x61],
        "top_logprobs": [
            {"token": "a", "logprob": -0.5, "bytes": [0x61]},
            {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -1.0, "bytes": [0xC3]},
        ],
    }
    assert [top["logprob"] for top in second["top_logprobs"]] == [-0.25, -3.0, -3.5]
    pieces = [frame["choices"][0]["logprobs"] for frame in streamed(ChatWriter(wanted, "id", "m"))]
    assert [entry for piece in pieces if piece for entry in piece["content"]] == whole["logprobs"]["content"]


def test_completions_name_each_token_once_and_add_the_sampled_one() -> None:
    """OpenAI's legacy dict: tokens that read the same keep names of their own, and none is lost."""
    asked = parse_completions_request(body(prompt=[2, 2], logprobs=3, echo=True))
    decode: Callable[[Iterable[int]], str] = lambda ids: b"".join(SPELLINGS[i] for i in ids).decode()  # noqa: E731
    make = lambda: CompletionsWriter(asked, decode, "t", "m")  # noqa: E731
    [whole] = make().whole([choice()])["choices"]
    assert whole["logprobs"]["top_logprobs"] == [
        None,
        None,
        {"a": -0.5, "bytes:\\xc3": -1.0},
        {"bytes:\\xc3": -0.25, "a": -3.0, "token_id:6": -3.5, "b": -4.0},
    ]
    pieces = [frame["choices"][0]["logprobs"] for frame in streamed(make())]
    assert [row for piece in pieces if piece for row in piece["top_logprobs"]] == whole["logprobs"]["top_logprobs"]


@pytest.mark.parametrize(("with_texts", "text"), [(False, None), (True, "a")])
def test_a_generation_shows_them_as_sglang_does(with_texts: bool, text: str | None) -> None:
    fields = {"return_logprob": True, "top_logprobs_num": 3, "return_text_in_logprobs": with_texts}
    asked = parse_sglang_request(body(input_ids=[2, 2], **fields))
    make = lambda: SglangWriter(asked, str, "t", "m")  # noqa: E731
    meta = make().whole([choice()])["meta_info"]
    assert meta["output_token_logprobs"][0] == [-0.5, 1, text]
    first, second = meta["output_top_logprobs"]
    assert first[0] == [-0.5, 1, text]
    assert [triple[1] for triple in second] == [4, 1, 6]
    frames = [frame["meta_info"].get("output_top_logprobs") for frame in streamed(make())]
    assert frames == [None, None, [first, second]], "they were told more often than once"
    missing = make().whole([choice(with_tops=False)])["meta_info"]
    assert missing["output_top_logprobs"] == [None, None]


def test_a_response_shows_them_in_its_text_and_in_its_deltas() -> None:
    asked = Asked.by(responses(include=[LOGPROBS], top_logprobs=3), None)
    [item] = sent(ResponsesWriter(asked, "turn-1", "m").whole([choice()]))["output"]
    [part] = item["content"]
    assert [[top["bytes"] for top in entry["top_logprobs"]] for entry in part["logprobs"]] == [
        [[0x61], [0xC3]],
        [[0xC3], [0x61], [0x61]],
    ]
    events = streamed(ResponsesWriter(asked, "turn-1", "m"))
    deltas = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [entry for delta in deltas for entry in delta] == part["logprobs"]
    assert events[-1]["response"]["top_logprobs"] == 3


def test_openais_own_models_accept_every_reply() -> None:
    """Required fields and their types, as the client library of today declares them; whole replies and frames (but for
    completions' frames, whose null `finish_reason` OpenAI itself sends and does not declare)."""
    asked = {"logprobs": True, "top_logprobs": 3, "stream_options": {"include_usage": True}}
    wanted = chat(**asked).wanted
    ChatCompletion.model_validate(sent(ChatWriter(wanted, "id", "m").whole([choice()])))
    for frame in streamed(ChatWriter(wanted, "id", "m")):
        ChatCompletionChunk.model_validate(frame)
    text = parse_completions_request(body(prompt=[2, 2], logprobs=3))
    Completion.model_validate(CompletionsWriter(text, lambda _: "b", "t", "m").whole([choice()]))
    response = Asked.by(responses(include=[LOGPROBS], top_logprobs=3), None)
    Response.model_validate(sent(ResponsesWriter(response, "turn-1", "m").whole([choice()])))
    for event in streamed(ResponsesWriter(response, "turn-1", "m")):
        TypeAdapter(ResponseStreamEvent).validate_python(event)


def test_nothing_of_them_is_shown_unasked() -> None:
    """I7: not even where the record holds them."""
    for reply in (
        ChatWriter(chat().wanted, "id", "m").whole([choice()]),
        CompletionsWriter(parse_completions_request(body(prompt=[2])), lambda _: "b", "t", "m").whole([choice()]),
        SglangWriter(parse_sglang_request(body(input_ids=[2])), str, "t", "m").whole([choice()]),
        ResponsesWriter(Asked.by(responses(), None), "turn-1", "m").whole([choice()]),
    ):
        assert "-3.5" not in json.dumps(reply)


def test_tokens_are_spelled_by_their_bytes_in_every_kind_of_vocabulary() -> None:
    """Byte-level parts of characters, byte fallback, a space before a word; null where bytes are not known."""
    byte_level = tokenizer({"Ã": 0, "Ġthe": 1}, decoders.ByteLevel())
    assert spelling(byte_level, 0) == ("\N{REPLACEMENT CHARACTER}", b"\xc3")
    assert spelling(byte_level, 1) == (" the", b" the")
    fallback = tokenizer(
        {"<0xC3>": 0, "▁the": 1, "<unk>": 2},
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    assert spelling(fallback, 0) == ("\N{REPLACEMENT CHARACTER}", b"\xc3")
    assert spelling(fallback, 1) == (" the", b" the")
    pieces = tokenizer({"##ing": 0, "run": 1}, decoders.WordPiece())
    assert spelling(pieces, 1) == ("run", None)
    assert spelling(byte_level, 999) == ("", b"")


def tokenizer(vocabulary: dict[str, int], decoder: Any) -> ChatTokenizer:
    made = Tokenizer(models.WordLevel(vocabulary, unk_token=min(vocabulary)))
    made.decoder = decoder
    return ChatTokenizer(made.to_str().encode())
