"""Which recorded rows may be replayed in models whose layers route differently (I9)."""

from __future__ import annotations

import numpy as np

from gateway.contracts.experts import RoutingShape
from gateway.contracts.generation import LogprobKind
from gateway.contracts.samples import Segment, TurnSpan
from trainer.replay.validate import RoutedLayers, replayable_rows

SHAPE = RoutingShape(num_layers=3, num_experts=8, top_k=4)


def segment(ids_NLK: np.ndarray) -> Segment:
    num_rows = len(ids_NLK)
    mask = np.arange(num_rows + 1) > 0
    return Segment(
        segment_id="s",
        turns=(TurnSpan("t", 0, 1, num_rows + 1, True, "stop", 1.0, 1.0, -1),),
        token_ids=np.arange(num_rows + 1, dtype=np.int32),
        loss_mask=mask,
        rollout_logprobs=np.where(mask, -1.0, np.nan).astype(np.float32),
        policy_version=np.where(mask, 0, -1).astype(np.int32),
        routed_experts=ids_NLK.astype(np.uint8),
        routed_valid=np.ones(num_rows, dtype=np.bool_),
        logprob_kind=LogprobKind.TEMPERATURE_SCALED,
    )


def valid(ids_NLK: np.ndarray, routed: RoutedLayers) -> list[list[bool]]:
    rows = replayable_rows(segment(ids_NLK), routed)
    return [rows.layer(layer).valid.tolist() for layer in range(3)]


def test_a_layer_that_takes_fewer_experts_is_judged_by_its_own_columns_and_its_own_number_of_experts() -> None:
    """I9. What is behind a narrower layer's experts may repeat; they themselves may not, nor be out of range."""
    ids = np.tile(np.array([0, 1, 2, 3]), (4, 3, 1))
    ids[:, 1] = [4, 5, 0, 0]
    ids[1, 1] = [4, 4, 0, 0]
    ids[2, 1] = [4, 6, 0, 0]
    ids[3, 2] = [0, 1, 2, 2]
    by_layer = RoutedLayers(SHAPE, (0, 1, 2), ((8, 4), (6, 2), (8, 4)))
    assert valid(ids, by_layer) == [[True] * 4, [True, False, False, True], [True, True, True, False]]
    assert valid(ids, RoutedLayers(SHAPE, (0, 1, 2)))[1] == [False] * 4


def test_layers_that_do_not_route_are_valid_nowhere() -> None:
    ids = np.tile(np.array([0, 1, 2, 3]), (2, 3, 1))
    assert valid(ids, RoutedLayers(SHAPE, (0, 2))) == [[True] * 2, [False] * 2, [True] * 2]
