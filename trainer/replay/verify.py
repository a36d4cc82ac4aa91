"""I10: the expert ids really used, taken from the routers' outputs, against the ids recorded; row by row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trainer.replay.rows import RoutingRows
from trainer.replay.validate import RoutedLayers


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Counts of routing rows, one for each position and routed layer.

    total = replayed + fallback; `verified` of the replayed rows used exactly the recorded ids. `compared` and
    `flipped`: recorded rows that a live router was compared with, and those for which it chose another set of experts.
    """

    total: int = 0
    replayed: int = 0
    verified: int = 0
    fallback: int = 0
    compared: int = 0
    flipped: int = 0

    def __add__(self, other: RoutingReport) -> RoutingReport:
        return RoutingReport(
            self.total + other.total,
            self.replayed + other.replayed,
            self.verified + other.verified,
            self.fallback + other.fallback,
            self.compared + other.compared,
            self.flipped + other.flipped,
        )


class RoutingCheck:
    """Compares as the layers run. Layers may run again (recomputation): a row stays verified only if all runs agree."""

    def __init__(self, rows: RoutingRows, routed: RoutedLayers) -> None:
        self._rows = rows
        self._routed = routed
        self._agrees: dict[int, npt.NDArray[np.bool_]] = {}

    def observe(self, layer: int, used_NK: Tensor) -> None:
        """Compare what `layer` used with what was recorded for it."""
        rows = self._rows.layer(layer)
        agrees_N = (used_NK.detach().cpu().numpy() == rows.ids).all(axis=1) & rows.valid
        self._agrees[layer] = agrees_N & self._agrees.get(layer, agrees_N)

    def report(self) -> RoutingReport:
        """Counts so far; nothing of a layer is verified before it ran."""
        total = self._rows.num_positions * len(self._routed.layers)
        replayed = self._rows.num_valid(self._routed.layers)
        verified = sum(int(agrees_N.sum()) for agrees_N in self._agrees.values())
        return RoutingReport(total=total, replayed=replayed, verified=verified, fallback=total - replayed)
