"""Routed experts: which experts computed each input token, in the smallest integer type that holds them.

Row i of a sequence is the routing of *input* token i, the one that produced the log-prob of token i+1 (I2);
a sequence of T tokens has T-1 rows, because its last token was never an input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import ExpertsMismatch

ExpertIds: TypeAlias = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""Expert ids as stored."""


@dataclass(frozen=True, slots=True)
class RoutingShape:
    """What must be known about a model to read its routing rows.

    `num_layers` counts every decoder layer as SGLang does (layers without experts have zero rows),
    `num_experts` the routed experts of a layer, `top_k` how many of them a token takes.
    """

    num_layers: int
    num_experts: int
    top_k: int

    def __post_init__(self) -> None:
        if min(self.num_layers, self.num_experts, self.top_k) < 1 or self.top_k > self.num_experts:
            raise ExpertsMismatch(f"impossible routing shape {self}")

    @property
    def dtype(self) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
        """uint8 for up to 256 experts, uint16 above."""
        return expert_dtype(self.num_experts)


@dataclass(frozen=True, slots=True, eq=False)
class RoutedExperts:
    """Routing rows `[start, start + rows)` of one token sequence.

    ids: uint8 or uint16, shape [rows, num_layers, top_k], in the engine's order of columns.
    start: index of the input token that row 0 belongs to.
    """

    ids: ExpertIds
    start: int

    def __post_init__(self) -> None:
        if self.ids.ndim != 3 or self.ids.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16)):
            raise ExpertsMismatch(
                f"routed experts must be uint8 or uint16 [rows, layers, top_k], not {self.ids.dtype} {self.ids.shape}"
            )
        if self.start < 0:
            raise ExpertsMismatch(f"routed experts start at row {self.start}")

    @property
    def stop(self) -> int:
        """One past the last row."""
        return self.start + len(self.ids)


def expert_dtype(num_experts: int) -> np.dtype[np.uint8] | np.dtype[np.uint16]:
    """The type expert ids are stored in: uint8 up to 256 experts, uint16 up to 65,536."""
    if num_experts <= 256:
        return np.dtype(np.uint8)
    if num_experts <= 65_536:
        return np.dtype(np.uint16)
    raise ExpertsMismatch(f"{num_experts} experts do not fit the 16-bit format")


def narrow(ids: npt.NDArray[np.integer], shape: RoutingShape) -> ExpertIds:
    """Ids of any integer type as the stored type; raises ExpertsMismatch on an id out of range (never wraps)."""
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= shape.num_experts):
        raise ExpertsMismatch(
            f"expert ids span [{int(ids.min())}, {int(ids.max())}], the model has {shape.num_experts} experts"
        )
    return ids.astype(np.uint8) if shape.dtype == np.uint8 else ids.astype(np.uint16)


def valid_rows(ids: ExpertIds, num_experts: int, routed_layers: tuple[int, ...] | None = None) -> npt.NDArray[np.bool_]:
    """bool[rows]: True where, in every routed layer, all ids are in range and distinct.

    Distinctness also finds zero-filled rows, which is what an uncaptured slot leaves (reference: replay 2.1).
    `routed_layers` names the layers that route (None: all); others are not looked at. With top_k 1 only the
    range can be checked.
    """
    looked_at = ids if routed_layers is None else ids[:, list(routed_layers), :]
    if not looked_at.size:
        return np.ones(len(ids), dtype=np.bool_)
    in_range = (looked_at < num_experts).all(axis=(1, 2))
    ordered = np.sort(looked_at, axis=-1)
    distinct = (ordered[..., 1:] != ordered[..., :-1]).all(axis=(1, 2))
    return np.asarray(in_range & distinct, dtype=np.bool_)
