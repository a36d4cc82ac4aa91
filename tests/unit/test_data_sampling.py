"""Of which distribution a token's log-prob is: from the engine's kind and the turn's sampling to the layout."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gateway.contracts.generation import LogprobKind, SamplingParams, kind_under
from tests.tagged_rollouts import Turn, tagged_segment
from trainer.data.layout import TokenLayout, segment_layout

SCALED, RAW, KEPT_SET = LogprobKind.TEMPERATURE_SCALED, LogprobKind.RAW, LogprobKind.KEPT_SET


def layout_of(kind: LogprobKind, *, greedy: bool = False) -> TokenLayout:
    segment = tagged_segment(1, [Turn(2, 2), Turn(1, 2)], kind=kind)
    if greedy:
        segment = replace(segment, turns=tuple(replace(turn, temperature=0.0) for turn in segment.turns))
    return segment_layout(segment, None)


def test_a_layout_says_temperature_and_kept_set_of_each_label_as_far_as_its_kind_has_them() -> None:
    """I2: labels are tokens 1 to 6; 2, 3 and 5, 6 are sampled."""
    plain: dict[str, list[float]] = {"temperature": [1] * 6, "top_p": [1] * 6, "top_k": [0] * 6}
    scaled = plain | {"temperature": [1, 0.5, 0.5, 1, 0.625, 0.625]}
    kept = scaled | {
        "top_p": [1, 1 - 1 / 64, 1 - 1 / 64, 1, 1 - 2 / 64, 1 - 2 / 64],
        "top_k": [0, 5, 5, 0, 6, 6],
    }
    for kind, expected in ((RAW, plain), (SCALED, scaled), (KEPT_SET, kept)):
        layout = layout_of(kind)
        assert {name: getattr(layout, name).tolist() for name in expected} == expected
    for kind in LogprobKind:
        layout = layout_of(kind, greedy=True)
        assert {name: getattr(layout, name).tolist() for name in plain} == plain


def test_no_limit_on_top_k_is_zero_in_a_layout() -> None:
    segment = tagged_segment(1, [Turn(1, 2)])
    unlimited = replace(segment, turns=(replace(segment.turns[0], top_k=-1, top_p=1.0),))
    layout = segment_layout(unlimited, None)
    assert (layout.top_k.tolist(), np.unique(layout.top_p).tolist()) == ([0, 0], [1.0])


@pytest.mark.parametrize(
    ("sampling", "kind"),
    [
        ({}, SCALED),
        ({"temperature": 0.7}, SCALED),
        ({"temperature": 0.0, "top_p": 0.9}, SCALED),
        ({"top_p": 0.9}, KEPT_SET),
        ({"top_k": 50}, KEPT_SET),
        ({"min_p": 0.1}, KEPT_SET),
    ],
)
def test_a_kept_set_of_everything_is_recorded_as_the_scaled_distribution(
    sampling: dict[str, float], kind: LogprobKind
) -> None:
    """So that engines of both kinds serve one rollout; the other two kinds stay what they are."""
    params = SamplingParams(max_new_tokens=1, **sampling)  # type: ignore[arg-type]
    assert kind_under(KEPT_SET, params) is kind
    assert kind_under(SCALED, params) is SCALED
    assert kind_under(RAW, params) is RAW
