"""The slotted KV cache: one slot a sequence, keys and values written at (slot, position), attention over slots.

`SlotCache` is a transformers `Cache`, and `slot_attention` a transformers attention function: the model's own modules
project, normalise and rotate; this file only says where keys and values live and which of them a token looks at.
Tokens of all sequences of a step are packed into one row of length N (no padding): first one token for each decoding
sequence, then the chunks of prompts. `StepPlan` says which is which.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION_NAME = "verbatim_slots"
"""The name under which transformers finds `slot_attention`."""


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """Packed tokens [row_start, row_stop) are positions [first, first + n) of the sequence in `slot`.

    mask: bool[n, first + n], True where a token may look; None where the chunk begins its sequence (plain causal).
    """

    slot: int
    row_start: int
    row_stop: int
    first: int
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Where the N packed tokens of one step belong.

    slots, positions: int64[N] of each packed token. num_decode: how many leading rows are single tokens.
    decode_slots: int64[num_decode], or None where they are the neighbours [decode_first, decode_first + num_decode).
    decode_mask: float[num_decode, 1, 1, longest], 0 where a token may look and -inf elsewhere.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    num_decode: int
    decode_first: int
    decode_slots: torch.Tensor | None
    decode_longest: int
    decode_mask: torch.Tensor | None
    chunks: tuple[PromptChunk, ...]


def plan_step(
    *,
    decode: Sequence[tuple[int, int]],
    prompts: Sequence[tuple[int, int, int]],
    dtype: torch.dtype,
) -> StepPlan:
    """Lay out a step: `decode` holds (slot, position) by rising slot, `prompts` (slot, first, stop)."""
    slots = np.array([slot for slot, _ in decode], dtype=np.int64)
    positions = np.array([position for _, position in decode], dtype=np.int64)
    row = num_decode = len(decode)
    all_slots: list[npt.NDArray[np.int64]] = [slots]
    all_positions: list[npt.NDArray[np.int64]] = [positions]
    chunks: list[PromptChunk] = []
    for slot, first, stop in prompts:
        count = stop - first
        all_slots.append(np.full(count, slot, dtype=np.int64))
        all_positions.append(np.arange(first, stop, dtype=np.int64))
        chunks.append(PromptChunk(slot, row, row + count, first, _chunk_mask(first, stop)))
        row += count
    longest = int(positions.max()) + 1 if num_decode else 0
    neighbours = bool(num_decode) and int(slots[-1]) - int(slots[0]) + 1 == num_decode
    return StepPlan(
        slots=torch.from_numpy(np.concatenate(all_slots) if chunks else slots),
        positions=torch.from_numpy(np.concatenate(all_positions) if chunks else positions),
        num_decode=num_decode,
        decode_first=int(slots[0]) if num_decode else 0,
        decode_slots=None if neighbours else torch.from_numpy(slots),
        decode_longest=longest,
        decode_mask=_decode_mask(positions, longest, dtype) if num_decode else None,
        chunks=tuple(chunks),
    )


def _chunk_mask(first: int, stop: int) -> torch.Tensor | None:
    if first == 0:
        return None
    return torch.ones(stop - first, stop, dtype=torch.bool).tril_(first)


def _decode_mask(positions: npt.NDArray[np.int64], longest: int, dtype: torch.dtype) -> torch.Tensor:
    hidden = np.arange(longest)[None, :] > positions[:, None]
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(torch.from_numpy(hidden), float("-inf"))
    return mask[:, None, None, :]


class SlotCache(Cache):
    """Keys and values of all slots: per layer [num_slots, kv_heads, context_length, head_dim].

    Memory is taken when first written (the operating system backs untouched pages with nothing).
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_slots: int,
        num_kv_heads: int,
        context_length: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(layers=[DynamicLayer() for _ in range(num_layers)])
        shape = (num_slots, num_kv_heads, context_length, head_dim)
        self.slot_keys = [_lazy_zeros(shape, dtype) for _ in range(num_layers)]
        self.slot_values = [_lazy_zeros(shape, dtype) for _ in range(num_layers)]
        self.plan: StepPlan | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values [1, kv_heads, N, head_dim] and return all slots of that layer."""
        plan = self.plan
        if plan is None:
            raise RuntimeError("SlotCache.update outside of a planned step")
        keys, values = self.slot_keys[layer_idx], self.slot_values[layer_idx]
        keys[plan.slots, :, plan.positions] = key_states[0].transpose(0, 1)
        values[plan.slots, :, plan.positions] = value_states[0].transpose(0, 1)
        return keys, values

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Give slot `target` the first `length` positions of slot `source`."""
        for stored in (*self.slot_keys, *self.slot_values):
            stored[target, :, :length] = stored[source, :, :length]


def _lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros that take no memory until written: torch.zeros writes, numpy's take huge pages. Not torch.empty, where a
    masked position could hold a NaN, and zero times NaN is NaN."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def slot_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    plan: StepPlan,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed tokens over their slots.

    query [1, heads, N, head_dim]; key, value: all slots as `SlotCache.update` returns them.
    Result [1, N, heads, head_dim].
    """
    num_heads, num_tokens, head_dim = query.shape[1:]
    packed = query[0].transpose(0, 1)
    if not plan.chunks:
        return _decode_attention(packed, key, value, plan, scaling).view(1, num_tokens, num_heads, head_dim), None
    output = query.new_empty(1, num_tokens, num_heads, head_dim)
    if plan.num_decode:
        output[0, : plan.num_decode] = _decode_attention(packed[: plan.num_decode], key, value, plan, scaling)
    for chunk in plan.chunks:
        stop = chunk.first + chunk.row_stop - chunk.row_start
        attended = scaled_dot_product_attention(
            query[:, :, chunk.row_start : chunk.row_stop],
            key[chunk.slot : chunk.slot + 1, :, :stop],
            value[chunk.slot : chunk.slot + 1, :, :stop],
            attn_mask=chunk.mask,
            is_causal=chunk.mask is None,
            scale=scaling,
            enable_gqa=True,
        )
        output[0, chunk.row_start : chunk.row_stop] = attended[0].transpose(0, 1)
    return output, None


def _decode_attention(
    packed: torch.Tensor, key: torch.Tensor, value: torch.Tensor, plan: StepPlan, scaling: float | None
) -> torch.Tensor:
    """One query token for each sequence: packed [B, heads, head_dim] → the same shape."""
    batch, num_heads, head_dim = packed.shape
    num_kv_heads = key.shape[1]
    if plan.decode_slots is None:
        rows = slice(plan.decode_first, plan.decode_first + plan.num_decode)
        keys, values = key[rows, :, : plan.decode_longest], value[rows, :, : plan.decode_longest]
    else:
        keys = key[:, :, : plan.decode_longest].index_select(0, plan.decode_slots)
        values = value[:, :, : plan.decode_longest].index_select(0, plan.decode_slots)
    # Heads that share a key/value head become query rows of it, so that keys and values are not repeated.
    grouped = packed.reshape(batch, num_kv_heads, num_heads // num_kv_heads, head_dim)
    attended = scaled_dot_product_attention(grouped, keys, values, attn_mask=plan.decode_mask, scale=scaling)
    return attended.reshape(batch, num_heads, head_dim)


ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, slot_attention)
