"""Recorded routing harmed on purpose: what validation finds, and what only the measured gap shows.

A row whose ids are out of range or not distinct is found when it comes in, and the live router decides for it. A row
that looks like one and is of another token, layer or expert is replayed and verified (those *are* the recorded ids);
KL and the share of flipped rows (recorded against live choice) give it away.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.replaying.scoring import Gap, Scorer
from gateway.contracts.rollouts import FinishedRollout
from gateway.contracts.samples import Segment

HARMED_SHARE = 0.1
"""Of rows, where a corruption takes single rows."""
SHOWN_TIMES = 10.0
"""By which KL must grow where only KL can tell."""

Rows = npt.NDArray[Any]
Harm = Callable[[Rows, npt.NDArray[np.bool_], int], Rows]
"""From rows [T-1, L, K], which of them are chosen, and the number of experts, to harmed rows."""


class Expected(StrEnum):
    """How a corruption must come to light."""

    HARMLESS = "harmless"
    CAUGHT = "caught by validation"
    SHOWN = "shown by KL"


def _as_recorded(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return rows


def _columns_reversed(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return rows[:, :, ::-1]


def _filled(value: int) -> Harm:
    def fill(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
        rows[chosen] = value
        return rows

    return fill


def _first_twice(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    rows[chosen, :, 1] = rows[chosen, :, 0]
    return rows


def _first_out_of_range(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    rows[chosen, :, 0] = num_experts
    return rows


def _late(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return np.roll(rows, 1, axis=0)


def _early(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return np.roll(rows, -1, axis=0)


def _layers_swapped(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return rows[:, ::-1]


def _next_expert(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    return ((rows.astype(np.int64) + 1) % num_experts).astype(rows.dtype)


def _counted_up(rows: Rows, chosen: npt.NDArray[np.bool_], num_experts: int) -> Rows:
    """0, 1, 2, …: how padding is written elsewhere; it has the form of a row."""
    rows[chosen] = np.arange(rows.shape[2])
    return rows


CORRUPTIONS: Mapping[str, tuple[Expected, Harm]] = {
    "as recorded": (Expected.HARMLESS, _as_recorded),
    "columns reversed": (Expected.HARMLESS, _columns_reversed),
    "zero-filled": (Expected.CAUGHT, _filled(0)),
    "255-filled": (Expected.CAUGHT, _filled(255)),
    "first id twice": (Expected.CAUGHT, _first_twice),
    "one id out of range": (Expected.CAUGHT, _first_out_of_range),
    "one row late": (Expected.SHOWN, _late),
    "one row early": (Expected.SHOWN, _early),
    "layers swapped": (Expected.SHOWN, _layers_swapped),
    "next expert": (Expected.SHOWN, _next_expert),
    "padding 0, 1, 2, …": (Expected.SHOWN, _counted_up),
}
"""By name. Those of single rows take `HARMED_SHARE` of them, the others all."""


@dataclass(frozen=True, slots=True)
class Examined:
    """One corruption: what was measured with replay, how many rows the live router then chose otherwise, and whether
    it came to light as it must. rows_found: of all rows, those that validation left to the live router."""

    name: str
    expected: Expected
    rows_harmed: int
    gap: Gap
    flipped_share: float
    times_kl: float
    holds: bool

    def line(self) -> str:
        """For people."""
        verdict = "" if self.holds else "NOT SEEN "
        return (
            f"{verdict}{self.name:20} {self.expected:20} fallback {self.gap.fallback:6} of {self.gap.rows}, "
            f"verified {self.gap.verified:6}, flipped {self.flipped_share:6.1%}, KL {self.gap.kl:.2e} "
            f"({self.times_kl:.3g} times)\n"
        )

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "expected": self.expected.value,
            "rows_harmed": self.rows_harmed,
            "fallback": self.gap.fallback,
            "verified": self.gap.verified,
            "rows": self.gap.rows,
            "kl": self.gap.kl,
            "f2": self.gap.f2,
            "flipped_share": self.flipped_share,
            "times_kl": self.times_kl,
            "holds": self.holds,
        }


def examine(scorer: Scorer, rollouts: Sequence[FinishedRollout], *, seed: int) -> list[Examined]:
    """Each corruption of these rollouts."""
    routed = scorer.backend.routed
    if routed is None:
        raise ValueError("the model routes nothing")
    clean = scorer.gap(rollouts, replay=True)
    found = []
    for name, (expected, harm) in CORRUPTIONS.items():
        rng = np.random.default_rng(seed)
        harmed, rows = [], 0
        for rollout in rollouts:
            segments = []
            for segment in rollout.segments:
                chosen = rng.random(segment.num_tokens - 1) < HARMED_SHARE
                rows += int(chosen.sum()) * len(routed.layers)
                segments.append(_harmed(segment, harm, chosen, routed.shape.num_experts))
            harmed.append(replace(rollout, segments=tuple(segments)))
        gap, live = scorer.gap(harmed, replay=True), scorer.gap(harmed, replay=False)
        flipped_share = live.flipped / live.compared if live.compared else float("nan")
        found.append(_judged(name, expected, rows, gap, flipped_share, clean))
    return found


def _harmed(segment: Segment, harm: Harm, chosen: npt.NDArray[np.bool_], num_experts: int) -> Segment:
    if segment.routed_experts is None:
        return segment
    rows = harm(segment.routed_experts.copy(), chosen, num_experts)
    return replace(segment, routed_experts=np.ascontiguousarray(rows))


def _judged(name: str, expected: Expected, rows: int, gap: Gap, flipped_share: float, clean: Gap) -> Examined:
    times = gap.kl / clean.kl
    match expected:
        case Expected.HARMLESS:
            holds = gap.fallback == clean.fallback and times < 1.1
        case Expected.CAUGHT:
            holds = gap.fallback >= 0.5 * rows and gap.verified + gap.fallback == gap.rows and times < SHOWN_TIMES
        case Expected.SHOWN:
            holds = times >= SHOWN_TIMES
    return Examined(name, expected, rows, gap, flipped_share, times, holds)
