"""I10: the expert ids really used, taken from the plan's witnesses, against the ids recorded; row by row.

The comparison reads the rows again, by another way than replay does, so that a fault in handing ids out shows. It is
kept off the routers' path: what small forwards used is kept until their context ends and compared together; large ones
are compared at once, one layer at a time, so that ids of all layers never exist side by side. On other devices than the
CPU nothing waits before `report`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gateway.contracts.errors import ExpertsMismatch
from trainer.replay.device import DeviceRows
from trainer.replay.rows import RoutingRows

_PENDING_BYTES = 1 << 19
_JOINED_BYTES = 1 << 17
"""Rows up to this size are joined: of many short samples the calls cost, not the bytes."""


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """Counts of routing rows, one for each position and routed layer; padding is in none of them.

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
            **{field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        )


class RoutingCheck:
    """Compares what layers used with what was recorded. A layer may run again (recomputation, a second forward over the
    same rows): the run with the fewest rows that agree counts."""

    def __init__(self, rows: RoutingRows, layers: tuple[int, ...]) -> None:
        self._rows = rows
        self._layers = layers
        self._pending: list[tuple[int, Tensor]] = []
        self._num_pending = _PENDING_BYTES // max(rows.num_positions * rows.top_k * 8, 1)
        self._agreed: set[int] = set()
        self._verified: dict[int, int] = {}
        self._verified_there: dict[int, Tensor] = {}

    def observe(self, layer: int, used_NK: Tensor, there: DeviceRows) -> None:
        """Note what `layer` used; `there`: the rows on its device."""
        if not used_NK.is_cpu:
            self._compare_there(layer, used_NK, there)
            return
        self._pending.append((layer, used_NK))
        if len(self._pending) > self._num_pending:
            self._compare_pending()

    def report(self) -> RoutingReport:
        """Counts so far; nothing of a layer is verified before it ran. Call it after the backward pass to have
        recomputed layers in it."""
        self._compare_pending()
        total = self._rows.num_real * len(self._layers)
        replayed = self._rows.num_valid(self._layers)
        agreed = tuple(layer for layer in self._layers if layer in self._agreed and layer not in self._verified)
        verified = replayed if len(agreed) == len(self._layers) else self._rows.num_valid(agreed)
        verified += sum(self._verified.values())
        if self._verified_there:
            verified += int(torch.stack(list(self._verified_there.values())).sum())
        return RoutingReport(total=total, replayed=replayed, verified=verified, fallback=total - replayed)

    def _compare_pending(self) -> None:
        """Layers of one width together: where every row agrees, which is the rule, that is all there is to do."""
        pending, self._pending = self._pending, []
        by_width: dict[int, list[tuple[int, Tensor]]] = {}
        for layer, used_NK in pending:
            by_width.setdefault(used_NK.shape[1], []).append((layer, used_NK))
        for same in by_width.values():
            used_PNK = torch.stack([used_NK for _, used_NK in same]).numpy()
            layers = [layer for layer, _ in same]
            for number, (layer, agrees) in enumerate(zip(layers, _agreeing(self._rows, layers, used_PNK), strict=True)):
                if agrees:
                    self._agreed.add(layer)
                    continue
                verified = _num_agreeing(self._rows, layer, used_PNK[number])
                self._verified[layer] = min(verified, self._verified.get(layer, verified))

    def _compare_there(self, layer: int, used_NK: Tensor, there: DeviceRows) -> None:
        agrees_N = (used_NK == there.ids(layer, used_NK.shape[1])).all(dim=1) & there.counted_valid(layer)
        verified = agrees_N.sum()
        earlier = self._verified_there.get(layer)
        self._verified_there[layer] = verified if earlier is None else torch.minimum(verified, earlier)


def _agreeing(rows: RoutingRows, layers: list[int], used_PNK: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool[P]: layers of which every row, valid or not, equals the ids used; in the stored type, chunk by chunk."""
    if used_PNK.shape[1] != rows.num_positions:
        raise ExpertsMismatch(
            f"layers {layers} used {used_PNK.shape[1]} rows of ids, {rows.num_positions} are recorded"
        )
    agrees = np.ones(len(layers), dtype=np.bool_)
    start = 0
    for chunk in (rows.joined(),) if rows.nbytes <= _JOINED_BYTES else rows.chunks:
        used, start = used_PNK[:, start : start + len(chunk)], start + len(chunk)
        is_row = layers == list(range(layers[0], layers[-1] + 1))
        recorded = chunk[:, layers[0] : layers[-1] + 1] if is_row else chunk[:, layers]
        equal = used == recorded[..., : used.shape[2]].swapaxes(0, 1)
        if not equal.all():
            agrees &= equal.all(axis=(1, 2))
    return agrees


def _num_agreeing(rows: RoutingRows, layer: int, used_NK: npt.NDArray[np.int64]) -> int:
    """How many valid rows of a layer, padding left out, equal the ids used; chunk by chunk, in the stored type."""
    byte, bit = divmod(layer, 8)
    count = start = 0
    for chunk, bits, mark in zip(rows.chunks, rows.valid_bits, rows.is_padding, strict=True):
        used, start = used_NK[start : start + len(chunk)], start + len(chunk)
        if not mark:
            agrees = (used == chunk[:, layer, : used.shape[1]]).all(axis=1)
            count += int(np.count_nonzero(agrees & (bits[:, byte] >> (7 - bit) & 1).view(np.bool_)))
    return count
