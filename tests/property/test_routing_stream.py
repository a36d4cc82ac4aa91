"""Routing rows out of a stream of events, cut anywhere: the same rows and the same rest as of the whole (I2, I9)."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.event_stream import EventReader
from engines.routing_rows import Int32Layout, Layout, NpyLayout, RoutingRows, decode_routing
from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import ExpertIds, RoutingShape, narrow, valid_rows

START = 3
shapes = st.builds(
    RoutingShape, num_layers=st.integers(1, 3), num_experts=st.sampled_from([5, 128, 256, 300]), top_k=st.integers(2, 4)
)
layouts = st.sampled_from([Int32Layout, NpyLayout])


def encoded(ids: np.ndarray[Any, Any], layout: type[Layout], dtype: str, *, columns_first: bool = False) -> str:
    """Ids as an engine sends them."""
    if layout is Int32Layout:
        return base64.b64encode(ids.astype("<i4").tobytes()).decode()
    file = io.BytesIO()
    np.save(file, np.asarray(ids, dtype, order="F" if columns_first else "C"))
    return base64.b64encode(file.getvalue()).decode()


@st.composite
def some_ids(draw: st.DrawFn, shape: RoutingShape, *, min_rows: int = 0) -> np.ndarray[Any, Any]:
    """int32 [rows, layers, top_k], some of them none of the model's."""
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    ids = generator.integers(
        0, shape.num_experts, (draw(st.integers(min_rows, 40)), shape.num_layers, shape.top_k), np.int32
    )
    for flat in draw(st.lists(st.integers(0, max(ids.size - 1, 0)), max_size=3)) if ids.size else ():
        ids.reshape(-1)[flat] = draw(st.sampled_from([-1, -7, shape.num_experts, 32_000]))
    return ids


def cut(raw: bytes, data: st.DataObject) -> list[bytes]:
    """Pieces of a stream."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=12)))
    return [raw[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(raw)], strict=True)]


def read(pieces: list[bytes], rows: RoutingRows, *, big_line_bytes: int) -> list[Any]:
    """The events of a stream, rows left out."""
    reader = EventReader(rows, big_line_bytes=big_line_bytes)
    return [orjson.loads(payload) for piece in pieces for payload in reader.read(piece)]


def rows_of(event: Any, rows: RoutingRows, shape: RoutingShape, layout: type[Layout], stop: int) -> ExpertIds:
    """As a client does it: of a string that was streamed, or that stayed in the event."""
    value = event["meta_info"]["routed_experts"]
    if rows.stand_in is not None:
        rows.note(value)
        assert not rows.strayed
        return rows.rows(stop).ids
    return decode_routing(value, shape, layout, start=START, stop=stop).ids


@given(data=st.data(), shape=shapes, layout=layouts)
def test_a_stream_cut_anywhere_gives_the_rows_and_the_rest_of_the_whole(
    data: st.DataObject, shape: RoutingShape, layout: type[Layout]
) -> None:
    """I2, I8, I9: any cut, any whitespace, escapes in the base64, fields around it, ids that the model has not."""
    ids = data.draw(some_ids(shape))
    text = encoded(
        ids, layout, data.draw(st.sampled_from(["<i4", ">i4", "<i2", "<i8"])), columns_first=data.draw(st.booleans())
    )
    written = json.dumps(text)
    match data.draw(st.sampled_from(["plain", "slashes", "all"])):
        case "slashes":
            written = written.replace("/", r"\/")
        case "all":
            written = '"' + "".join(rf"\u{ord(character):04x}" for character in text) + '"'
    before, after = data.draw(st.tuples(st.text(max_size=20), st.text(max_size=20)))
    colon = data.draw(st.sampled_from([":", " : ", ":\t", ":" + " " * 40]))
    meta = f'{{"x": {json.dumps(after)}, "routed_experts"{colon}{written}, "y": [1]}}'
    rest = f'"text": {json.dumps(before)}, "meta_info": {meta}'
    first = json.dumps({"text": 'say "routed_experts": "AAAA"', "meta_info": {"routed_experts": None}})
    stream = f"data: {first}\n\n: alive\n\ndata: {{{rest}}}\n\ndata: [1]\r\n\r\n".encode()
    rows = RoutingRows(shape, layout, start=START, num_rows=data.draw(st.sampled_from([1, len(ids)])))
    events = read(cut(stream, data), rows, big_line_bytes=data.draw(st.sampled_from([1, 60, 10**6])))
    assert events[0] == json.loads(first)
    assert events[2] == [1]
    assert {**events[1], "meta_info": {**events[1]["meta_info"], "routed_experts": text}} == {
        "text": before,
        "meta_info": {"x": after, "routed_experts": text, "y": [1]},
    }
    found = rows_of(events[1], rows, shape, layout, START + len(ids))
    expected = narrow(ids, shape)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@given(data=st.data(), shape=shapes, layout=layouts)
def test_damage_is_found_however_the_stream_is_cut(
    data: st.DataObject, shape: RoutingShape, layout: type[Layout]
) -> None:
    """I9: characters that are no base64, padding in the middle, bytes too few or too many: never other rows."""
    ids = data.draw(some_ids(shape, min_rows=1))
    text = encoded(ids, layout, "<i4")
    place = data.draw(st.integers(0, len(text)))
    match data.draw(st.sampled_from(["cut", "strange", "padded", "rows"])):
        case "cut":
            text = text[: max(place - 1, 0)]
        case "strange":
            text = text[:place] + data.draw(st.sampled_from(["§", "-", " ", "\\\\"])) + text[place:]
        case "padded":
            text = "AA==" + text
        case "rows":
            text = encoded(np.concatenate([ids, ids[:1], np.zeros_like(ids, shape=(1, *ids.shape[1:]))]), layout, "<i4")
    rows = RoutingRows(shape, layout, start=START, num_rows=len(ids))
    event = f'data: {{"meta_info": {{"routed_experts": "{text}"}}}}\n\n'.encode()
    (read_event,) = read(cut(event, data), rows, big_line_bytes=1)
    with pytest.raises(ExpertsMismatch):
        rows_of(read_event, rows, shape, layout, START + len(ids))


@given(data=st.data())
def test_an_event_that_is_no_json_stays_none_however_it_is_cut(data: st.DataObject) -> None:
    """A line's end or an unknown escape inside the string: nothing is made up in its place."""
    wrong = data.draw(st.sampled_from(["AA\nAA", r"AA\xAA", r"AA\u12", r"AA\u12zzAA", "AAAA\\"]))
    event = f'data: {{"meta_info": {{"routed_experts": "{wrong}"}}}}\n\n'.encode()
    rows = RoutingRows(RoutingShape(1, 8, 2), Int32Layout, start=0, num_rows=1)
    reader = EventReader(rows, big_line_bytes=1)
    (payload,) = [payload for piece in cut(event, data) for payload in reader.read(piece)]
    with pytest.raises(orjson.JSONDecodeError):
        orjson.loads(payload)


def test_an_id_of_one_byte_that_is_negative_is_none_of_256_experts() -> None:
    """I9: -1 in int8 has the bits of 255."""
    shape = RoutingShape(num_layers=1, num_experts=256, top_k=2)
    ids = np.array([[[1, 2]], [[-1, 5]]])
    rows = decode_routing(encoded(ids, NpyLayout, "i1"), shape, NpyLayout, start=0, stop=2)
    assert valid_rows(rows.ids, 256).tolist() == [True, False]


def test_an_unknown_id_of_a_model_with_one_expert_a_token_costs_all_rows() -> None:
    """I9: a row of one id can hold no mark."""
    shape = RoutingShape(num_layers=1, num_experts=4, top_k=1)
    for layout in (Int32Layout, NpyLayout):
        with pytest.raises(ExpertsMismatch, match="4"):
            decode_routing(encoded(np.array([[[9]]]), layout, "<i4"), shape, layout, start=0, stop=1)


def test_of_two_strings_the_later_one_counts_and_one_elsewhere_is_told() -> None:
    """I8: what is taken for rows and is none is not lost in silence."""
    shape = RoutingShape(num_layers=1, num_experts=4, top_k=2)
    rows = RoutingRows(shape, Int32Layout, start=0, num_rows=1)
    text = encoded(np.array([[[2, 3]]]), Int32Layout, "<i4")
    (first,) = read([b'data: {"meta_info": {"routed_experts": "!', b'"}}\n\n'], rows, big_line_bytes=1)
    rows.note(first["meta_info"]["routed_experts"])
    whole = f'data: {{"meta_info": {{"routed_experts": "{text}"}}}}\n\n'.encode()
    (second,) = read([whole[:50], whole[50:]], rows, big_line_bytes=1)
    rows.note(second["meta_info"]["routed_experts"])
    assert not rows.strayed
    assert rows.rows(1).ids.tolist() == [[[2, 3]]]
    elsewhere = f'data: {{"custom": {{"routed_experts": "{text}"}}, "meta_info": {{}}}}\n\n'.encode()
    (third,) = read([elsewhere[:50], elsewhere[50:]], rows, big_line_bytes=1)
    rows.note(third["meta_info"].get("routed_experts"))
    assert rows.strayed
