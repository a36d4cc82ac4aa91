"""Ranks: the processes that train one model together. What one of them does, and how a step is dealt to all of them.

    micro-batches ─▶ Deal ─▶ RankBackend of each rank ─▶ scores ─▶ Deal ─▶ Measured, in the order of the micro-batches

All ranks run the same number of forwards: one that was dealt fewer micro-batches fills up with padding, which weighs
nothing. How a call reaches the ranks is not known here (trainer/cluster.py: Ray actors).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from gateway.contracts.errors import TrainingError
from trainer.algorithms.objective import Objective
from trainer.backends.fsdp import FullySharded
from trainer.backends.hf import HFBackend
from trainer.backends.lockstep import deal
from trainer.backends.model import choose_device
from trainer.backends.protocol import Measured, Policy, Update
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings, ParallelSettings
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleOrigin, ScoredBatch
from trainer.replay.padding import padding_rows
from trainer.replay.rows import RoutingRows
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingReport
from trainer.settings import ReplayMode

_LOOPBACK = "127.0.0.1"
_COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another, which may still be loading or computing a longer micro-batch."""

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What makes the same backend on every rank; as `HFBackend` takes them."""

    model: ModelSettings
    optimizer: OptimizerSettings
    parallel: ParallelSettings
    replay: ReplayMode
    seed: int
    lora: LoraSettings
    num_updates: int
    needs_reference: bool


class RankScores(NamedTuple):
    """Of a rank's micro-batches, in the order that it was given: float32[S] each."""

    logprobs: npt.NDArray[np.float32]
    entropy: npt.NDArray[np.float32]
    routing: RoutingReport


class RankUpdate(NamedTuple):
    """One optimiser step: `scores` of the rank's own tokens, `device_bytes` of its device, the rest of all ranks."""

    scores: RankScores
    loss: float
    grad_norm: float
    learning_rate: float
    shares: dict[str, float]
    device_bytes: int | None


class RankFacts(NamedTuple):
    """What the loop asks of a backend; the same on every rank."""

    routed: RoutedLayers | None
    packs_samples: bool


class Deal:
    """Who runs which micro-batch of a step."""

    def __init__(self, batches: Sequence[PackedBatch], num_ranks: int) -> None:
        self._batches = batches
        self._members = [
            [index for index in members if index is not None]
            for members in deal([batch.layout.num_positions for batch in batches], num_ranks)
        ]
        self.num_rounds = -(-len(batches) // num_ranks)

    def of(self, items: Sequence[_Item]) -> list[tuple[_Item, ...]]:
        """`items`, one a micro-batch, as each rank gets them."""
        return [tuple(items[index] for index in members) for members in self._members]

    def gathered(self, parts: Sequence[Sequence[_Item]]) -> tuple[_Item, ...]:
        """The other way round."""
        by_index = {
            index: item
            for members, part in zip(self._members, parts, strict=True)
            for index, item in zip(members, part, strict=True)
        }
        return tuple(by_index[index] for index in range(len(self._batches)))

    def measured(self, scores: Sequence[RankScores]) -> Measured:
        """All ranks' scores in the order of the micro-batches."""
        rollout = [batch.layout.rollout_logprobs[batch.layout.trained] for batch in self._batches]
        return Measured(
            logprobs=self._joined([one.logprobs for one in scores]),
            rollout_logprobs=torch.from_numpy(np.concatenate(rollout)),
            entropy=self._joined([one.entropy for one in scores]),
            routing=sum((one.routing for one in scores), RoutingReport()),
        )

    def update(self, updates: Sequence[RankUpdate]) -> Update:
        """What all ranks agree on, and all ranks' scores."""
        first = updates[0]
        bytes_of_ranks = [one.device_bytes for one in updates if one.device_bytes is not None]
        return Update(
            loss=first.loss,
            grad_norm=first.grad_norm,
            learning_rate=first.learning_rate,
            shares=first.shares,
            measured=self.measured([one.scores for one in updates]),
            device_bytes=max(bytes_of_ranks, default=None),
        )

    def _joined(self, values: Sequence[npt.NDArray[np.float32]]) -> torch.Tensor:
        parts = []
        for members, values_S in zip(self._members, values, strict=True):
            lengths = [self._batches[index].layout.num_trained for index in members]
            if sum(lengths) != len(values_S):
                raise TrainingError(f"a rank scored {len(values_S)} tokens, it was given {sum(lengths)}")
            parts.append(
                [values_S[stop - length : stop] for length, stop in zip(lengths, np.cumsum(lengths), strict=True)]
            )
        return torch.from_numpy(np.concatenate(self.gathered(parts)))


class RankBackend:
    """One rank's part of a policy. Every method is called on all ranks at once, with as many rounds."""

    def __init__(self, settings: PolicySettings) -> None:
        """Load the checkpoint, and keep this rank's share. Needs the default process group.

        Raises what `HFBackend` and `FullySharded` raise.
        """
        self._sharding = FullySharded(
            device=choose_device(settings.model.device),
            compute_dtype=getattr(torch, settings.model.dtype),
            expert_parallel=settings.parallel.expert_parallel,
        )
        self._backend = HFBackend(
            settings.model,
            settings.optimizer,
            replay=settings.replay,
            seed=settings.seed,
            lora=settings.lora,
            num_updates=settings.num_updates,
            needs_reference=settings.needs_reference,
            sharding=self._sharding,
        )
        self.facts = RankFacts(self._backend.routed, self._backend.packs_samples)
        self._padding = padding_batch(self.facts.routed, settings.parallel.expert_parallel)

    def measure(self, batches: Sequence[PackedBatch], num_rounds: int, *, replay: bool, policy: Policy) -> RankScores:
        """As `TrainBackend.measure`, of this rank's micro-batches."""
        scores = _scores(self._backend.measure(batches, replay=replay, policy=policy)) if batches else _NO_SCORES
        for padding in self._fill(batches, num_rounds):
            self._backend.measure([padding], replay=replay, policy=policy)
        return scores

    def record(
        self, batches: Sequence[PackedBatch], num_rounds: int
    ) -> tuple[tuple[RoutingRows | None, ...], RankScores]:
        """As `TrainBackend.record`: the rows alone."""
        recorded: tuple[PackedBatch, ...] = ()
        scores = _NO_SCORES
        if batches:
            recorded, measured = self._backend.record(batches)
            scores = _scores(measured)
        for padding in self._fill(batches, num_rounds):
            self._backend.record([padding])
        return tuple(batch.layout.routing for batch in recorded), scores

    def update(self, batches: Sequence[ScoredBatch], num_rounds: int, objective: Objective) -> RankUpdate:
        """As `TrainBackend.update`; NonFiniteLoss is raised on all ranks or on none."""
        padding = [ScoredBatch(batch) for batch in self._fill(batches, num_rounds)]
        part = self._backend.accumulate([*batches, *padding], objective)
        nothing = torch.zeros_like(part.loss)
        names = self._sharding.union(part.shares)  # a rank that ran nothing but padding knows none
        part = replace(part, shares={name: part.shares.get(name, nothing) for name in names})
        update = self._backend.step(part)
        return RankUpdate(
            scores=_scores(update.measured),
            loss=update.loss,
            grad_norm=update.grad_norm,
            learning_rate=update.learning_rate,
            shares=dict(update.shares),
            device_bytes=update.device_bytes,
        )

    def save(self, folder: Path) -> None:
        """This rank's share, into a folder that all ranks see."""
        self._backend.save(folder)

    def load(self, folder: Path) -> None:
        """What ranks saved, as many or not."""
        self._backend.load(folder)

    def export(self, folder: Path) -> None:
        """Gathered tensor by tensor; rank 0 writes."""
        state = self._backend.policy_state()
        if self._sharding.rank == 0:
            self._backend.write(folder, state)

    def _fill(self, batches: Sequence[object], num_rounds: int) -> list[PackedBatch]:
        return [self._padding] * (num_rounds - len(batches))


def padding_batch(routed: RoutedLayers | None, expert_parallel: int) -> PackedBatch:
    """A small micro-batch that trains nothing, and gives each rank of an expert-parallel group the same work."""
    num_positions = expert_parallel
    zeros, ones = np.zeros(num_positions, dtype=np.int32), np.ones(num_positions, dtype=np.float32)
    layout = TokenLayout(
        input_ids=zeros,
        labels=zeros,
        position_ids=np.arange(num_positions, dtype=np.int32),
        trained=np.zeros(num_positions, dtype=np.bool_),
        rollout_logprobs=ones * np.nan,
        policy_version=zeros - 1,
        temperature=ones,
        top_p=ones,
        top_k=zeros,
        routing=None if routed is None else padding_rows(num_positions, routed.shape, expert_parallel),
    )
    return PackedBatch(
        layout=layout,
        sample_starts=(0,),
        sample_index=zeros,
        advantages=ones * 0.0,
        weights=ones * 0.0,
        origins=(SampleOrigin("", ""),),
    )


def listening_socket(host: str) -> socket.socket:
    """Where rank 0 will wait for the others: on `host` only, at a free port."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen()
    return listener


def join_ranks(
    rank: int, num_ranks: int, *, host: str, port: int, device: torch.device, listener: socket.socket | None = None
) -> None:
    """Make this process `rank` of the default process group; returns when all have come.

    `listener`: on rank 0, the socket at `host` and `port`, which becomes the store's.
    """
    if host == _LOOPBACK:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # gloo would take the address of the host's name
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not named in its __all__
        host,
        port,
        num_ranks,
        is_master=listener is not None,
        timeout=_COLLECTIVE_TIMEOUT,
        wait_for_workers=False,
        master_listen_fd=None if listener is None else listener.detach(),
    )
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=store,
        rank=rank,
        world_size=num_ranks,
        timeout=_COLLECTIVE_TIMEOUT,
    )


def _scores(measured: Measured) -> RankScores:
    return RankScores(measured.logprobs.numpy(), measured.entropy.numpy(), measured.routing)


_NO_SCORES = RankScores(np.zeros(0, dtype=np.float32), np.zeros(0, dtype=np.float32), RoutingReport())
