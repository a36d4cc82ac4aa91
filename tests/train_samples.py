"""Samples for training steps without rollouts: random tokens, log-probs and routing rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleWeights, ScoredBatch, pack
from trainer.replay.rows import RoutingRows
from trainer.replay.validate import RoutedLayers


def random_samples(lengths: Sequence[int], *, seed: int, routed: RoutedLayers | None) -> tuple[TrainSample, ...]:
    """One sample of each length, about the last two thirds of it trained; every routing row valid."""
    random = np.random.default_rng(seed)
    return tuple(
        TrainSample(f"s{i}", f"s{i}/0", _random_layout(random, length, routed)) for i, length in enumerate(lengths)
    )


def _random_layout(random: np.random.Generator, length: int, routed: RoutedLayers | None) -> TokenLayout:
    tokens = random.integers(5, 300, length + 1, dtype=np.int32)
    trained = np.arange(length) >= length // 3
    return TokenLayout(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        position_ids=np.arange(length, dtype=np.int32),
        trained=trained,
        rollout_logprobs=np.where(trained, -5.9 + 0.1 * random.standard_normal(length), np.nan).astype(np.float32),
        policy_version=np.where(trained, 0, -1).astype(np.int32),
        temperature=np.where(trained, 0.9, 1.0).astype(np.float32),
        top_p=np.ones(length, dtype=np.float32),
        top_k=np.zeros(length, dtype=np.int32),
        routing=None if routed is None else _random_rows(random, length, routed),
    )


def _random_rows(random: np.random.Generator, length: int, routed: RoutedLayers) -> RoutingRows:
    shape = routed.shape
    scores = random.random((length, shape.num_layers, shape.num_experts))
    ids = np.argsort(scores, axis=-1)[..., : shape.top_k].astype(shape.dtype)
    valid = np.zeros((length, shape.num_layers), dtype=np.bool_)
    valid[:, list(routed.layers)] = True
    return RoutingRows.of(ids, valid)


def token_mean_weights(samples: Sequence[TrainSample]) -> tuple[SampleWeights, ...]:
    """Advantages of both signs; every token weighs the same."""
    total = sum(sample.layout.num_trained for sample in samples)
    return tuple(SampleWeights(advantage=1.0 - 0.7 * (i % 3), weight=1 / total) for i in range(len(samples)))


def sequence_mean_weights(samples: Sequence[TrainSample]) -> tuple[SampleWeights, ...]:
    """Every sample weighs the same."""
    return tuple(
        SampleWeights(advantage=1.0 - 0.7 * (i % 3), weight=1 / (len(samples) * sample.layout.num_trained))
        for i, sample in enumerate(samples)
    )


def scored_batches(
    samples: Sequence[TrainSample],
    weights: Sequence[SampleWeights] | None = None,
    *,
    tokens: int = 10_000,
) -> tuple[ScoredBatch, ...]:
    """Packed micro-batches, with old log-probs a little off the rollout's."""
    weights = token_mean_weights(samples) if weights is None else weights
    batches = pack(samples, weights, tokens_per_microbatch=tokens)
    return tuple(ScoredBatch(batch, old_logprobs=_old(batch)) for batch in batches)


def _old(batch: PackedBatch) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    rollout = batch.layout.rollout_logprobs[batch.layout.trained]
    return (rollout + 0.05 * np.cos(100 * rollout)).astype(np.float32)
