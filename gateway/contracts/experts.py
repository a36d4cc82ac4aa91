"""Routed experts: which experts computed each input token, in the smallest integer type that holds them.

Row i of a sequence is the routing of *input* token i, the one that produced the log-prob of token i+1 (I2);
a sequence of T tokens has T-1 rows, because its last token was never an input.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """Ids [rows, layers, top_k] of any integer type as the stored type; nothing wraps.

    A layer's row with an id that the model has not becomes zeros, which `valid_rows` finds (I9: missing stays missing);
    -1 is how engines mark what they did not capture. Raises ExpertsMismatch on such an id where top_k is 1, as a row of
    one id can hold no mark.
    """
    lowest, highest = (int(ids.min()), int(ids.max())) if ids.size else (0, 0)
    if lowest < 0 or highest >= shape.num_experts:
        if shape.top_k == 1:
            raise ExpertsMismatch(f"expert ids span [{lowest}, {highest}], the model has {shape.num_experts} experts")
        known = ((ids >= 0) & (ids < shape.num_experts)).all(axis=-1, keepdims=True)
        ids = np.where(known, ids, 0)
    return ids.astype(np.uint8) if shape.dtype == np.uint8 else ids.astype(np.uint16)


def valid_rows(ids: ExpertIds, num_experts: int, routed_layers: tuple[int, ...] | None = None) -> npt.NDArray[np.bool_]:
    """bool[rows]: True where, in every routed layer, all ids are in range and distinct.

    Distinctness also finds zero-filled rows, which is what an uncaptured slot leaves (reference: replay 2.1).
    `routed_layers` names the layers that route (None: all); others are not looked at. With top_k 1 only the
    range can be checked. What cannot be seen at all: another token's sound row (a stale slot), and holes that an
    engine filled with unused ids.
    """
    layers = slice(None) if routed_layers is None else list(routed_layers)
    valid = np.ones(len(ids), dtype=np.bool_)
    for rows in _blocks(ids, _SHARED_BLOCK_BYTES):
        valid[rows] = _sound(ids[rows], num_experts)[:, layers].all(axis=1)
    return valid


def valid_row_bits(
    ids: ExpertIds, num_experts: int, *, recorded: npt.NDArray[np.bool_], routed_layers: tuple[int, ...]
) -> npt.NDArray[np.uint8]:
    """uint8[rows, ceil(layers / 8)]: as `valid_rows`, by layer, layer 0 in the highest bit of the first byte.

    recorded: bool[rows]; bits of other rows, and of layers that do not route, are 0. Rows are looked at block by block,
    so that nothing of the size of `ids` is made.
    """
    routes = np.zeros(ids.shape[1], dtype=np.bool_)
    routes[list(routed_layers)] = True
    bits = np.empty((len(ids), -(-ids.shape[1] // 8)), dtype=np.uint8)
    for rows in _blocks(ids, _LEAN_BLOCK_BYTES):
        bits[rows] = np.packbits(_sound(ids[rows], num_experts) & recorded[rows, None] & routes, axis=1)
    return bits


_LEAN_BLOCK_BYTES = 1 << 18
"""Of ids that are looked at together: small beside any rollout, and it stays in a core's cache."""
_SHARED_BLOCK_BYTES = 1 << 20
"""The same where several threads look at rollouts: each step over a block hands the interpreter to another one."""


def _blocks(ids: ExpertIds, num_bytes: int) -> Iterator[slice]:
    num_rows = max(num_bytes * len(ids) // max(ids.nbytes, 1), 1)
    return (slice(start, start + num_rows) for start in range(0, len(ids), num_rows))


def _sound(ids: ExpertIds, num_experts: int) -> npt.NDArray[np.bool_]:
    """bool[rows, layers]: all ids in range and distinct. Columns are compared pairwise: experts of a token are few."""
    columns = np.ascontiguousarray(np.moveaxis(ids, -1, 0))
    sound = np.ones(ids.shape[:2], dtype=np.bool_)
    holds = np.empty_like(sound)  # of each step in turn, so that none makes an array
    for i, column in enumerate(columns):
        sound &= np.less(column, num_experts, out=holds)
        for other in columns[:i]:
            sound &= np.not_equal(column, other, out=holds)
    return sound
