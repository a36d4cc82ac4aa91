"""The likeliest tokens of an engine: fewer is fine, of another position is not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.likeliest import likeliest
from gateway.contracts.errors import EngineProtocolError
from gateway.contracts.generation import TopLogprob

LOGPROBS = [-0.25, -1.5, -3.0, -4.0]


def read(rows: list[object], sampled: list[int], logprobs: list[float], most: int = 3) -> list[list[int]]:
    told = likeliest(rows, sampled, np.array(logprobs, dtype=np.float32), most=most, named="engine e0")  # type: ignore[arg-type]
    return [[top.token_id for top in row] for row in told]


@given(st.permutations(range(4)), st.integers(0, 3), st.integers(1, 6))
def test_any_order_becomes_the_most_likely_first_and_no_more_than_asked(
    order: list[int], sampled: int, most: int
) -> None:
    """I2: wherever the sampled token stands in an engine's row."""
    row = [(i, LOGPROBS[i]) for i in order]
    assert read([row], [sampled], [LOGPROBS[sampled]], most) == [list(range(4))[:most]]


def test_what_is_missing_stays_missing() -> None:
    """I9: positions without a row, entries without a log-prob, a sampled token without one."""
    rows = [None, [], [(5, None), (6, -math.inf), (7, -0.5)], [(8, -0.5)]]
    assert read(rows, [1, 2, 9, 3], [-0.5, -0.5, -2.0, math.nan]) == [[], [], [7], [8]]


def test_one_token_has_one_logprob_on_both_sides() -> None:
    """As float32, which the record holds."""
    exact = float(np.float32(-1.2345678901))
    [[top]] = likeliest([[(3, -1.2345678901)]], [3], np.array([exact], dtype=np.float32), most=1, named="e")
    assert top == TopLogprob(3, exact)


@pytest.mark.parametrize(
    ("rows", "sampled", "logprobs", "words"),
    [
        ([[(1, -0.5)]], [1, 2], [-0.5, -0.5], "1 positions for 2 tokens"),
        ([[(1, -0.5)], [(2, -0.5)]], [1], [-0.5], "2 positions for 1 tokens"),
        ([[(1, -0.5), (2, -1.0)]], [1], [-0.7], "another position"),
        ([[(1, -0.5), (2, -1.0)]], [3], [-0.7], "another position"),
        ([[(1, -0.5), (1, -1.0)]], [1], [-0.5], "with ids"),
        ([[(-1, -0.5)]], [1], [-0.7], "with ids"),
        ([[(2**31, -0.5)]], [1], [-0.7], "with ids"),
        ([[(True, -0.5)]], [1], [-0.7], "with ids"),
    ],
)
def test_rows_that_do_not_belong_to_their_tokens_are_refused(
    rows: list[object], sampled: list[int], logprobs: list[float], words: str
) -> None:
    """I2: nothing of another position is passed on as this one's."""
    with pytest.raises(EngineProtocolError, match=words):
        read(rows, sampled, logprobs)
