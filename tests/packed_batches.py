"""Packed batches of random tokens with everything that a real one has, for tests of what is done with them."""

from __future__ import annotations

import numpy as np

from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleOrigin
from trainer.replay.rows import RoutingRows


def a_batch(
    lengths: tuple[int, ...], *, seed: int = 0, layers: int = 4, experts: int = 8, rows: bool = True
) -> PackedBatch:
    """Random tokens; every second one is trained."""
    random = np.random.default_rng(seed)
    num = sum(lengths)
    trained = np.arange(num) % 2 == 1
    chunks = tuple(np.argsort(random.random((n, layers, experts)), axis=-1)[:, :, :2].astype(np.uint8) for n in lengths)
    routing = RoutingRows.join([RoutingRows.of(chunk, random.random(chunk.shape[:2]) < 0.9) for chunk in chunks])
    sample_index = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    layout = TokenLayout(
        input_ids=random.integers(5, 300, num, dtype=np.int32),
        labels=random.integers(5, 300, num, dtype=np.int32),
        position_ids=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        trained=trained,
        rollout_logprobs=np.where(trained, -random.random(num) * 6, np.nan).astype(np.float32),
        policy_version=np.where(trained, 0, -1).astype(np.int32),
        temperature=np.ones(num, dtype=np.float32),
        top_p=np.ones(num, dtype=np.float32),
        top_k=np.zeros(num, dtype=np.int32),
        routing=routing if rows else None,
    )
    return PackedBatch(
        layout=layout,
        sample_starts=tuple(int(start) for start in np.cumsum([0, *lengths[:-1]])),
        sample_index=sample_index,
        advantages=np.where(trained, 1.0, 0.0).astype(np.float32),
        weights=np.where(trained, 1.0 / max(int(trained.sum()), 1), 0.0).astype(np.float32),
        origins=tuple(SampleOrigin(f"s/{i} ü", f"seg-{i}") for i in range(len(lengths))),
    )
