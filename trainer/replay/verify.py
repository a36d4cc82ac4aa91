"""I10: the expert ids really used, taken from the routers' outputs, against the ids recorded; row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.replay.validate import RoutedLayers


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Counts of routing rows (one a position, over all routed layers).

    total = replayed + fallback; `verified` of the replayed rows had, in every routed layer, exactly the recorded ids.
    """

    total: int
    replayed: int
    verified: int
    fallback: int


class RoutingCheck:
    """Compares as the layers run. Layers may run again (recomputation): a row stays verified only if all runs agree."""

    def __init__(self, ids_NLK: Tensor, valid_N: Tensor, routed: RoutedLayers) -> None:
        self._ids_NLK = ids_NLK
        self._valid_N = valid_N
        self._agrees_N = valid_N.clone()
        self._awaited = set(routed.layers)

    def observe(self, layer: int, used_NK: Tensor) -> None:
        """Compare what `layer` used with what was recorded for it."""
        self._agrees_N &= (used_NK == self._ids_NLK[:, layer].to(used_NK.dtype)).all(dim=-1)
        self._awaited.discard(layer)

    def report(self) -> RoutingReport:
        """Counts so far; nothing is verified before every routed layer was seen."""
        total, replayed = len(self._valid_N), int(self._valid_N.sum())
        verified = 0 if self._awaited else int(torch.count_nonzero(self._agrees_N))
        return RoutingReport(total=total, replayed=replayed, verified=verified, fallback=total - replayed)


def total_report(reports: Iterable[RoutingReport]) -> RoutingReport:
    """The sum over micro-batches."""
    listed = list(reports)
    return RoutingReport(
        total=sum(report.total for report in listed),
        replayed=sum(report.replayed for report in listed),
        verified=sum(report.verified for report in listed),
        fallback=sum(report.fallback for report in listed),
    )
