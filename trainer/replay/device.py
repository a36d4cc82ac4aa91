"""Routing rows where a model computes: views of the rows on the CPU, one small upload a micro-batch elsewhere.

What a router reads is one layer at a time, widened to int64 on its device. Nothing here waits for the device.
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from trainer.replay.rows import RoutingRows

_JOINED_BYTES = 1 << 20
"""Rows up to this size are joined on the CPU too: many short samples cost more to visit layer by layer."""


_WIDENED_BYTES = 1 << 17
"""Rows up to this size are widened for all layers at once: of short rows the calls cost, not the bytes."""


class DeviceRows:
    """Rows of one micro-batch on one device."""

    def __init__(self, rows: RoutingRows, device: torch.device) -> None:
        self.num_positions = rows.num_positions
        self._always_valid = rows.always_valid().tolist()
        self.device = device
        self._rows = rows
        self._counted: Tensor | None = None
        is_small = device.type == "cpu" and rows.nbytes <= _JOINED_BYTES
        self._chunks: tuple[Tensor, ...] = tuple(map(_tensor, (rows.joined(),) if is_small else rows.chunks))
        self._bits: tuple[Tensor, ...] = () if all(self._always_valid) else tuple(map(_tensor, rows.valid_bits))
        if device.type != "cpu":
            self._chunks = _uploaded(self._chunks, device)
            self._bits = _uploaded(self._bits, device)
        self._wide: tuple[Tensor, ...] | None = None
        if rows.nbytes <= _WIDENED_BYTES and len(self._chunks) == 1:
            self._wide = (
                self._chunks[0].transpose(0, 1).to(torch.int64, memory_format=torch.contiguous_format).unbind(0)
            )

    def ids(self, layer: int, top_k: int) -> Tensor:
        """int64[N, K] of one layer; a layer may take fewer experts than rows have columns. Not to be written to."""
        if self._wide is not None:
            ids_NK = self._wide[layer]
            return ids_NK if ids_NK.shape[1] == top_k else ids_NK[:, :top_k]
        if len(self._chunks) == 1:
            return self._chunks[0][:, layer, :top_k].to(torch.int64)
        ids_NK = torch.empty(self.num_positions, top_k, dtype=torch.int64, device=self.device)
        start = 0
        for chunk in self._chunks:
            ids_NK[start : start + len(chunk)] = chunk[:, layer, :top_k]
            start += len(chunk)
        return ids_NK

    def valid(self, layer: int) -> Tensor | None:
        """bool[N] of one layer; None where every row may be replayed."""
        if self._always_valid[layer]:
            return None
        byte, bit = divmod(layer, 8)
        return (torch.cat([bits[:, byte] for bits in self._bits]) >> (7 - bit) & 1).to(torch.bool)

    def counted_valid(self, layer: int) -> Tensor:
        """bool[N]: rows of one layer that may be replayed and are no padding."""
        if self._counted is None:
            self._counted = _tensor(self._rows.counted()).to(self.device, non_blocking=True)
        valid = self.valid(layer)
        return self._counted if valid is None else self._counted & valid


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    """A view; DLPack takes read-only arrays too, and nothing here writes."""
    return from_dlpack(array)


def _uploaded(parts: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """The parts one behind the other on the device, copied there without waiting."""
    if not parts:
        return ()
    length = sum(len(part) for part in parts)
    joined = torch.empty((length, *parts[0].shape[1:]), dtype=parts[0].dtype, device=device)
    start = 0
    for part in parts:
        joined[start : start + len(part)].copy_(part, non_blocking=True)
        start += len(part)
    return (joined,)
