"""Routed experts and policy versions: the smallest type, no wrapping, rows that were never captured are found."""

from __future__ import annotations

import numpy as np
import pytest

from gateway.contracts.errors import ExpertsMismatch
from gateway.contracts.experts import RoutedExperts, RoutingShape, expert_dtype, narrow, valid_row_bits, valid_rows


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(1, np.uint8), (256, np.uint8), (257, np.uint16), (65_536, np.uint16)]
)
def test_ids_are_stored_in_the_smallest_type_that_holds_them(num_experts: int, dtype: type) -> None:
    assert expert_dtype(num_experts) == np.dtype(dtype)


def test_more_experts_than_sixteen_bits_are_refused() -> None:
    with pytest.raises(ExpertsMismatch, match="65537"):
        expert_dtype(65_537)


@pytest.mark.parametrize("shape", [(0, 8, 2), (4, 0, 2), (4, 8, 0), (4, 8, 9)])
def test_impossible_routing_shapes_are_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ExpertsMismatch):
        RoutingShape(*shape)


def test_narrowing_keeps_every_id_and_never_wraps() -> None:
    """I9: a row with an id out of range is invalid, not of another expert."""
    shape = RoutingShape(num_layers=1, num_experts=256, top_k=2)
    ids = np.array([[[0, 255]], [[128, 7]]], dtype=np.int32)
    stored = narrow(ids, shape)
    assert stored.dtype == np.uint8
    np.testing.assert_array_equal(stored, ids)
    for wrong in (256, -2):
        assert not valid_rows(narrow(np.array([[[0, wrong]]], dtype=np.int32), shape), 256).any()


def test_what_an_engine_marks_as_not_captured_is_stored_as_an_invalid_row() -> None:
    """I9: of that layer and token only; and refused where one id a row leaves no way to mark it."""
    ids = np.array([[[4, 2], [3, -1]], [[-1, -1], [5, 1]]], dtype=np.int32)
    stored = narrow(ids, RoutingShape(num_layers=2, num_experts=8, top_k=2))
    assert stored.tolist() == [[[4, 2], [0, 0]], [[0, 0], [5, 1]]]
    assert valid_rows(stored, 8, (0,)).tolist() == [True, False]
    assert valid_rows(stored, 8, (1,)).tolist() == [False, True]
    with pytest.raises(ExpertsMismatch, match="-1"):
        narrow(np.array([[[-1]]]), RoutingShape(num_layers=1, num_experts=8, top_k=1))


def test_narrowing_no_rows_gives_no_rows() -> None:
    shape = RoutingShape(num_layers=4, num_experts=300, top_k=2)
    assert narrow(np.empty((0, 4, 2), dtype=np.int32), shape).dtype == np.uint16


def test_rows_are_valid_where_ids_are_distinct_and_in_range() -> None:
    """I9: zero-filled rows (an uncaptured slot), repeated ids and ids out of range are found."""
    ids = np.array([[[0, 1], [3, 2]], [[0, 0], [0, 0]], [[0, 1], [5, 5]], [[0, 1], [2, 8]]], dtype=np.uint8)
    assert valid_rows(ids, 8).tolist() == [True, False, False, False]


def test_layers_without_experts_are_not_looked_at() -> None:
    ids = np.array([[[0, 0], [3, 2]], [[0, 0], [0, 0]]], dtype=np.uint8)
    assert valid_rows(ids, 8, routed_layers=(1,)).tolist() == [True, False]


@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (300, 3), (6, 1), (40, 40)])
def test_bits_say_by_layer_what_sorting_each_row_says_whatever_the_blocks(num_experts: int, top_k: int) -> None:
    """I9: 3,001 rows are several blocks of uneven length; some rows repeat an id, some hold one out of range."""
    random = np.random.default_rng(0)
    shape = RoutingShape(num_layers=11, num_experts=num_experts, top_k=top_k)
    ids = narrow(random.random((3_001, 11, num_experts)).argsort(-1)[..., :top_k], shape)
    ids[random.random((3_001, 11)) < 0.1, 0] = ids[0, 0, -1]
    if num_experts not in (256, 65_536):
        ids[random.random((3_001, 11)) < 0.1, -1] = num_experts
    recorded, routed_layers = random.random(3_001) < 0.9, (0, 2, 3, 9, 10)
    wanted = recorded[:, None] & np.isin(np.arange(11), routed_layers)
    ordered = np.sort(ids, axis=-1)
    expected = (ids < num_experts).all(-1) & (ordered[..., 1:] != ordered[..., :-1]).all(-1)
    bits = valid_row_bits(ids, num_experts, recorded=recorded, routed_layers=routed_layers)
    np.testing.assert_array_equal(np.unpackbits(bits, axis=1, count=11).astype(bool), expected & wanted)
    np.testing.assert_array_equal(valid_rows(ids, num_experts, (2, 10)), expected[:, [2, 10]].all(1))


def test_rows_say_where_they_start_and_end() -> None:
    rows = RoutedExperts(np.zeros((3, 2, 2), dtype=np.uint8), start=4)
    assert (rows.start, rows.stop) == (4, 7)


@pytest.mark.parametrize("ids", [np.zeros((3, 2), dtype=np.uint8), np.zeros((3, 2, 2), dtype=np.int32)])
def test_rows_of_another_shape_or_type_are_refused(ids: np.ndarray) -> None:  # type: ignore[type-arg]
    with pytest.raises(ExpertsMismatch):
        RoutedExperts(ids, start=0)


def test_rows_before_the_first_token_are_refused() -> None:
    with pytest.raises(ExpertsMismatch, match="-1"):
        RoutedExperts(np.zeros((1, 2, 2), dtype=np.uint8), start=-1)
