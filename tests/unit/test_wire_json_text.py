"""Arrays in a JSON value are base64 in the text that leaves, piece by piece, and the text is that of the whole."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.contracts.errors import InvalidRequest, NotFound
from gateway.wire import sse
from gateway.wire.errors import error_body
from gateway.wire.json_text import Base64, Spliced, dump_json, json_text, number_texts

SIZES = (0, 1, 2, 3, 1000, 3 * 2**15, 3 * 2**15 + 1, 400_001)


def plain(array: np.ndarray[Any, Any], dtype: str) -> str:
    return base64.b64encode(array.astype(dtype).tobytes()).decode()


@settings(max_examples=40)
@given(
    st.sampled_from(SIZES),
    st.sampled_from(["<u1", "<u2", "<i4"]),
    st.lists(st.one_of(st.text(), st.floats(allow_nan=True), st.integers()), max_size=4),
)
def test_pieces_of_a_value_with_arrays_are_its_text(size: int, dtype: str, others: list[Any]) -> None:
    """I8: what stands beside an array keeps its value; a float without a name is null."""
    array = (np.arange(size) % 251).astype(np.uint8).reshape(size, 1, 1)
    text = json_text([*others, Base64(array, dtype), {"again": Base64(array)}, *others])
    whole = b"".join(text.pieces())
    assert len(whole) == text.num_bytes
    known = [None if isinstance(item, float) and not np.isfinite(item) else item for item in others]
    expected = [*known, plain(array, dtype), {"again": plain(array, "<u1")}, *known]
    assert whole == json.dumps(expected, ensure_ascii=False, separators=(",", ":")).encode()
    assert max(map(len, text.pieces())) < 2**20


def test_a_frame_without_arrays_draws_no_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    """Randomness and an encoder of its own for every token were half of what a streamed frame cost."""
    value = {"text": "ü\u2028", "big": 2**70, "number": 1.0, "null": None, "list": [[], {}]}
    expected = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    monkeypatch.setattr("gateway.wire.json_text.secrets.token_hex", lambda _: pytest.fail("a mark was drawn"))
    assert dump_json(value) == expected
    assert json_text(value).parts == (expected,)


@given(
    st.lists(st.one_of(st.text(), st.floats(), st.integers(-(2**80), 2**80), st.none()), max_size=4),
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5),
    st.booleans(),
)
def test_text_that_is_json_and_arrays_of_numbers_stand_for_what_they_say(
    others: list[Any], numbers: list[int], has_base64: bool
) -> None:
    """I8: whichever encoder takes the value, it is the same value: integers beyond 64 bits are kept, NaN is null."""
    array = np.array(numbers, dtype=np.int32)
    rows = [Base64(np.zeros(3, dtype=np.uint8))] if has_base64 else []
    value = {"a": others, "ids": array, "back": array[::-1], "text": Spliced(b'{"x":[1,"]"]}'), "b": rows, "c": others}
    known = [None if isinstance(item, float) and not np.isfinite(item) else item for item in others]
    expected = {
        "a": known,
        "ids": numbers,
        "back": numbers[::-1],
        "text": {"x": [1, "]"]},
        "b": ["AAAA"] * has_base64,
        "c": known,
    }
    found = json.loads(dump_json(value))
    assert found == expected
    assert list(map(type, found["a"])) == list(map(type, known))


@given(st.lists(st.floats(width=32), max_size=6))
def test_numbers_one_by_one_are_the_array(numbers: list[float]) -> None:
    """I9: a missing log-prob is null."""
    array = np.array(numbers, dtype=np.float32)
    found = [json.loads(text) for text in number_texts(array)]
    assert found == [float(number) if np.isfinite(number) else None for number in array]


def test_rows_that_are_a_part_of_others_are_encoded_in_c_order() -> None:
    rows = np.arange(24, dtype=np.uint16).reshape(4, 3, 2)
    assert json.loads(dump_json(Base64(rows[1:, ::2]))) == plain(rows[1:, ::2], "<u2")


@pytest.mark.parametrize("size", [5, 500_000])
def test_a_frame_of_pieces_is_the_frame(size: int) -> None:
    value = {"text": "a\N{LINE SEPARATOR}b", "rows": Base64(np.zeros(size, dtype=np.uint8))}
    pieces = list(sse.event_pieces(value, kind="x"))
    assert (len(pieces) == 1) == (size == 5)
    frame = b"".join(pieces)
    assert frame == b"event: x\n" + sse.event(value)
    assert len(frame.decode().splitlines()) == 3
    assert json.loads(frame.split(b"data: ", 1)[1])["text"] == "a\N{LINE SEPARATOR}b"


def test_what_is_no_json_is_a_mistake_of_ours() -> None:
    with pytest.raises(TypeError, match="set is no JSON value"):
        dump_json({"x": {1}})


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("messages[0].tool_calls[1].function: expected an object", "messages[0].tool_calls[1].function"),
        ("text, input_ids: give exactly one of them", "text"),
        ("the body is not JSON: Expecting value", None),
        ("http://x: is wrong", None),
        ("n: expected 1", "n"),
    ],
)
def test_the_field_that_a_message_begins_with_is_its_param(message: str, param: str | None) -> None:
    assert error_body(InvalidRequest(message))["error"]["param"] == param
    assert error_body(NotFound(message))["error"]["param"] is None


def test_a_message_that_quotes_a_long_field_is_cut() -> None:
    assert len(error_body(InvalidRequest("x: " + "y" * 10_000))["error"]["message"]) < 5_000
