"""Version spans: they cover every sampled token once, whatever updates fell into the turn (I5)."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import LengthMismatch
from gateway.contracts.versions import VersionSpan, check_spans, expand_spans, join_spans


@st.composite
def covering_spans(draw: st.DrawFn) -> tuple[list[VersionSpan], int]:
    """Spans that cover a turn, empty ones among them, and the turn's number of tokens."""
    spans: list[VersionSpan] = []
    at = 0
    for length, version in draw(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=8)):
        spans.append(VersionSpan(at, at + length, version))
        at += length
    return spans, at


@given(covering_spans())
def test_joining_spans_changes_no_token(drawn: tuple[list[VersionSpan], int]) -> None:
    """I5: the version of each token stays; neighbours of one version become one span."""
    spans, num_tokens = drawn
    joined = join_spans(spans)
    assert expand_spans(joined, num_tokens).tolist() == expand_spans(spans, num_tokens).tolist()
    assert all(one.policy_version != next_one.policy_version for one, next_one in pairwise(joined))
    assert all(span.start < span.stop for span in joined)


def test_each_token_gets_the_version_of_its_span() -> None:
    assert expand_spans([VersionSpan(0, 2, 4), VersionSpan(2, 3, 5)], 3).tolist() == [4, 4, 5]


@pytest.mark.parametrize(
    "spans",
    [
        [],
        [VersionSpan(0, 2, 1)],
        [VersionSpan(0, 4, 1)],
        [VersionSpan(1, 3, 1)],
        [VersionSpan(0, 1, 1), VersionSpan(2, 3, 1)],
        [VersionSpan(0, 2, 1), VersionSpan(1, 3, 1)],
    ],
)
def test_spans_with_a_gap_an_overlap_or_another_length_are_refused(spans: list[VersionSpan]) -> None:
    with pytest.raises(LengthMismatch):
        check_spans(spans, 3)


@pytest.mark.parametrize(("start", "stop", "version"), [(2, 1, 0), (-1, 1, 0), (0, 1, -1)])
def test_impossible_spans_cannot_be_made(start: int, stop: int, version: int) -> None:
    with pytest.raises(LengthMismatch):
        VersionSpan(start, stop, version)
