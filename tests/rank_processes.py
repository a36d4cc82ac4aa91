"""Batches and processes for tests of several ranks."""

from __future__ import annotations

import multiprocessing
import socket
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer.backends.hf import HFBackend
from trainer.backends.ranks import PolicySettings, join_ranks, listening_socket
from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleWeights, ScoredBatch, pack
from trainer.replay.rows import RoutingRows

LOOPBACK = "127.0.0.1"
NUM_EXPERTS, TOP_K, NUM_LAYERS = 8, 2, 4
"""Of the tiny model."""


def made_batches(*, num_samples: int, tokens: int, seed: int = 0) -> tuple[PackedBatch, ...]:
    """Micro-batches of random samples of several lengths, with random routing, of which a tenth may not be replayed."""
    random = np.random.default_rng(seed)
    samples = [_sample(random, index, 5 + 3 * index) for index in range(num_samples)]
    weights = [SampleWeights(advantage=float(random.normal()), weight=0.02) for _ in samples]
    return pack(samples, weights, tokens_per_microbatch=tokens)


def scored_batches(batches: tuple[PackedBatch, ...]) -> list[ScoredBatch]:
    """With old log-probs as far off as a policy of an earlier step."""
    random = np.random.default_rng(1)
    return [
        ScoredBatch(batch, old_logprobs=random.normal(-6.0, 0.1, batch.layout.num_trained).astype(np.float32))
        for batch in batches
    ]


def _sample(random: np.random.Generator, index: int, num_positions: int) -> TrainSample:
    tokens = random.integers(5, 290, num_positions + 1).astype(np.int32)
    trained = np.arange(num_positions) >= 2
    ids = np.argsort(random.random((num_positions, NUM_LAYERS, NUM_EXPERTS)), axis=-1)[..., :TOP_K].astype(np.uint8)
    layout = TokenLayout(
        input_ids=tokens[:-1],
        labels=tokens[1:],
        position_ids=np.arange(num_positions, dtype=np.int32),
        trained=trained,
        rollout_logprobs=np.where(trained, -6.0, np.nan).astype(np.float32),
        policy_version=np.where(trained, 0, -1).astype(np.int32),
        temperature=np.where(trained, 0.9, 1.0).astype(np.float32),
        top_p=np.ones(num_positions, dtype=np.float32),
        top_k=np.zeros(num_positions, dtype=np.int32),
        routing=RoutingRows.of(ids, random.random((num_positions, NUM_LAYERS)) > 0.1),
    )
    return TrainSample(f"s{index}", f"g{index}", layout)


def one_process(settings: PolicySettings) -> HFBackend:
    """What ranks are compared with."""
    return HFBackend(
        settings.model,
        settings.optimizer,
        replay=settings.replay,
        seed=settings.seed,
        lora=settings.lora,
        num_updates=settings.num_updates,
        needs_reference=settings.needs_reference,
    )


def run_ranks(num_ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """`work(rank, *arguments)` in as many processes, which form the default process group; returns when all ended.

    An exception of any rank is raised here. Processes are forked from a server that has imported this module once.
    """
    with listening_socket(LOOPBACK) as listener:
        port = listener.getsockname()[1]
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(
        _one_rank, (num_ranks, port, work, arguments), nprocs=num_ranks, join=True, start_method="forkserver"
    )


def _one_rank(rank: int, num_ranks: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    listener = socket.create_server((LOOPBACK, port)) if rank == 0 else None
    join_ranks(rank, num_ranks, host=LOOPBACK, port=port, device=torch.device("cpu"), listener=listener)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()
