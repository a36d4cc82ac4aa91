"""SGLang's streams read event by event say what they would say read as a whole, however they are told and batched."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import orjson
from hypothesis import given
from hypothesis import strategies as st

from engines.sglang_events import EventParser
from engines.sglang_stream import StreamReader
from gateway.contracts.errors import EngineProtocolError
from gateway.contracts.generation import GenerateRequest, SamplingParams
from gateway.contracts.versions import VersionSpan

PROMPT = np.array([1, 2, 3], dtype=np.int32)

ids = st.lists(st.integers(0, 2**31 - 1) | st.integers(0, 120), min_size=1, max_size=12)
logprobs = st.none() | st.floats(-30, 0, width=32)
fields = st.dictionaries(
    st.sampled_from(["decode_throughput", "dp_rank", "e2e", "spec"]),
    st.none() | st.integers(-(2**80), 2**80) | st.text(max_size=3) | st.lists(st.integers(0, 9), max_size=2),
    max_size=3,
)


def reader_of(*, num_top_logprobs: int = 0, worth_cutting: int = 1) -> StreamReader:
    request = GenerateRequest("r", PROMPT, SamplingParams(max_new_tokens=99), num_top_logprobs=num_top_logprobs)
    parser = EventParser(with_top_logprobs=bool(num_top_logprobs), worth_cutting=worth_cutting)
    return StreamReader(request, None, lambda label: int(label), "e0", parser=parser)


def drawn_stream(
    data: st.DataObject, token_ids: Sequence[int], told: Sequence[float | None], *, tops: bool
) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """Events of either kind of stream; what is unknown of them at the end, of `meta_info` and of the reply."""
    stops = sorted({*data.draw(st.lists(st.integers(0, len(token_ids)), max_size=4)), len(token_ids)})
    is_cumulative = data.draw(st.booleans())
    events, meta_info, reply_fields = [], {}, {}
    for start, stop in itertools.pairwise([0, *stops]):
        first = 0 if is_cumulative else start
        unknown, unknown_top = data.draw(fields), data.draw(fields)
        entries = [[value, token_id, None] for token_id, value in zip(token_ids, told, strict=True)]
        meta: dict[str, Any] = {
            "id": "r",
            "finish_reason": {"type": "length"} if stop == len(token_ids) else None,
            "prompt_tokens": len(PROMPT),
            "completion_tokens": stop,
            "weight_version": "3",
            "output_token_logprobs": entries[first:stop],
        }
        if tops:
            meta["output_top_logprobs"] = [None if entry[0] is None else [entry] for entry in entries[first:stop]]
        unknown |= {"rows": entries[:stop]} if data.draw(st.booleans()) else {}
        meta_info = {k: v for k, v in meta_info.items() if k not in unknown} | unknown
        # What looks like the arrays and is not, before them or behind.
        mirror = {"mirror": {"output_token_logprobs": entries[:stop]}} if data.draw(st.booleans()) else {}
        is_before = data.draw(st.booleans())
        unknown_top = mirror | unknown_top if is_before else unknown_top | mirror
        reply_fields = {k: v for k, v in reply_fields.items() if k not in unknown_top} | unknown_top
        events.append(
            {"text": "x" * data.draw(st.sampled_from([0, 5000, 20_000])), "output_ids": token_ids[first:stop]}
        )
        events[-1] |= mirror if is_before else {}
        events[-1] |= {"meta_info": meta | unknown, **unknown_top}
    return events, meta_info, reply_fields


def spelled(event: Mapping[str, Any], *, spaced: bool) -> bytes:
    return json.dumps(event).encode() if spaced else json.dumps(event, separators=(",", ":")).encode()


@given(data=st.data(), token_ids=ids, tops=st.booleans())
def test_a_stream_says_the_same_however_it_is_told_and_batched(
    data: st.DataObject, token_ids: list[int], tops: bool
) -> None:
    """I2, I8, I9: ids, log-probs, likeliest tokens; unknown fields of any event, in order, integers of any size."""
    told = [data.draw(logprobs) for _ in token_ids]
    events, meta_info, reply_fields = drawn_stream(data, token_ids, told, tops=tops)
    worth_cutting = data.draw(st.sampled_from([1, 4, 64]))
    reader, chunks = reader_of(num_top_logprobs=int(tops), worth_cutting=worth_cutting), []
    rest = [spelled(event, spaced=data.draw(st.booleans())) for event in events]
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        batch, rest = rest[:size], rest[size:]
        assert reader.read_all(batch) is None
        if (chunk := reader.take()) is not None:
            chunks.append(chunk)
    assert [token_id for chunk in chunks for token_id in chunk.token_ids.tolist()] == token_ids
    np.testing.assert_array_equal(
        np.concatenate([chunk.logprobs for chunk in chunks]), np.array(told, dtype=np.float32), strict=True
    )
    if tops:
        rows = [row for chunk in chunks for row in chunk.top_logprobs or [()] * len(chunk.token_ids)]
        assert [[top.token_id for top in row] for row in rows] == [
            [] if value is None else [token_id] for token_id, value in zip(token_ids, told, strict=True)
        ]
    assert reader.end is not None
    assert reader.end.version_spans == (VersionSpan(0, len(token_ids), 3),)
    assert list(reader.end.meta_info.items()) == list(meta_info.items())
    assert list(reader.end.reply_fields.items()) == list(reply_fields.items())


@given(data=st.data(), token_ids=ids, broken=st.sampled_from([b"{", b"[1]", b'{"error": "no"}', b'{"meta_info": 7}']))
def test_what_came_before_a_broken_event_stays(data: st.DataObject, token_ids: list[int], broken: bytes) -> None:
    """I3: also of the same batch; of the broken event nothing."""
    events, _, _ = drawn_stream(data, token_ids, [None] * len(token_ids), tops=False)
    at = data.draw(st.integers(0, len(events) - 1))
    reader = reader_of()
    error = reader.read_all([*(spelled(event, spaced=False) for event in events[:at]), broken])
    assert error is not None
    expected = events[at - 1]["meta_info"]["completion_tokens"] if at else 0
    chunk = reader.take()
    assert (0 if chunk is None else len(chunk.token_ids)) == expected
    assert reader.end is None


@given(data=st.data(), token_ids=ids)
def test_a_token_that_changes_afterwards_is_refused(data: st.DataObject, token_ids: list[int]) -> None:
    """I2: wherever it stands; nothing of the event that changes it is kept."""
    at = data.draw(st.integers(0, len(token_ids) - 1))
    changed = [*token_ids, 7]
    changed[at] = (changed[at] + data.draw(st.integers(1, 99))) % 2**31
    reader = reader_of()
    for told in (*[token_ids] * data.draw(st.integers(1, 3)), changed):
        meta: dict[str, Any] = {"finish_reason": None, "completion_tokens": len(told)}
        error = reader.read_all([orjson.dumps({"output_ids": told, "meta_info": meta})])
    assert isinstance(error, EngineProtocolError)
    assert "changed tokens" in error.message
    chunk = reader.take()
    assert chunk is not None
    assert chunk.token_ids.tolist() == token_ids


@given(width=st.integers(0, 60))
def test_a_field_behind_a_shorter_array_is_not_cut_into(width: int) -> None:
    """I8: of a stream that says all ids but new log-probs only, wherever those of the event before had ended."""
    first, second = [[-1.0, n, None] for n in range(10, 15)], [[-1.0, 15, None]]
    rows = [[-1.0, 0, None], [-1.0, int("1" + "0" * width), None], *second]
    reader = reader_of()
    for entries, total in ((first, 5), (first, 5), (second, 6)):
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length"} if total == 6 else None,
            "prompt_tokens": len(PROMPT),
        }
        meta |= {"completion_tokens": total, "weight_version": "3", "output_token_logprobs": entries}
        meta |= {"rows": rows} if total == 6 else {}
        event = {"output_ids": [entry[1] for entry in (first + second)[:total]], "meta_info": meta}
        assert reader.read_all([spelled(event, spaced=False)]) is None
    assert reader.end is not None
    assert reader.end.meta_info["rows"] == rows


@given(data=st.data(), token_ids=ids)
def test_of_a_long_stream_only_what_is_new_is_parsed(data: st.DataObject, token_ids: list[int]) -> None:
    """Each event after the first that said all tokens gives the new ids and log-probs alone, be there none."""
    stops = sorted({*data.draw(st.lists(st.integers(1, len(token_ids)), max_size=4)), len(token_ids)})
    entries = [[-0.5, token_id, None] for token_id in token_ids]
    parser = EventParser(with_top_logprobs=True, worth_cutting=1)
    seen = 0
    for i, stop in enumerate([*stops, *[len(token_ids)] * 3]):
        meta: dict[str, Any] = {
            "finish_reason": None,
            "completion_tokens": stop,
            "output_token_logprobs": entries[:stop],
        }
        meta["output_top_logprobs"] = [[entry] for entry in entries[:stop]]
        event = parser.parse(spelled({"output_ids": token_ids[:stop], "meta_info": meta}, spaced=False), seen)
        # The first is short, the second tells where arrays stand.
        first = seen if i > 1 else 0
        assert event["output_ids"] == token_ids[first:stop]
        assert event["meta_info"]["output_token_logprobs"] == entries[first:stop]
        assert event["meta_info"]["output_top_logprobs"] == [[entry] for entry in entries[first:stop]]
        seen = stop


@given(with_mirror=st.booleans())
def test_log_probs_that_are_told_alone_are_not_cut(with_mirror: bool) -> None:
    """I8, I9: of a stream that says all ids, but log-probs of the new ones only, which are more than there were before;
    nor is another field's array of that name."""
    entries = [[-1.0, n, None] for n in range(10, 23)]
    mirror = {"mirror": {"output_token_logprobs": entries}}
    reader = reader_of()
    for new, total in ((entries[:5], 5), (entries[:5], 5), (entries[5:], 13)):
        meta: dict[str, Any] = {
            "finish_reason": {"type": "length"} if total == 13 else None,
            "prompt_tokens": len(PROMPT),
        }
        meta |= {"completion_tokens": total, "weight_version": "3", "output_token_logprobs": new}
        event = (mirror if with_mirror and total == 13 else {}) | {"output_ids": list(range(10, 10 + total))}
        assert reader.read_all([spelled(event | {"meta_info": meta}, spaced=False)]) is None
    assert reader.end is not None
    assert reader.end.reply_fields == (mirror if with_mirror else {})
    chunk = reader.take()
    assert chunk is not None
    assert chunk.logprobs.tolist() == [-1.0] * 13
