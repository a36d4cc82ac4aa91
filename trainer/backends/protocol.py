"""TrainBackend: what the loop needs of whatever holds parameters and optimiser. Values in and out are the whole step's;
how it is cut into devices and processes is the backend's own business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.algorithms.objective import Objective
from trainer.data.packing import PackedBatch, ScoredBatch
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingReport


class Policy(StrEnum):
    """Which policy a forward is of: the one in training, or the frozen one that KL is taken against."""

    ACTOR = "actor"
    REFERENCE = "reference"


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Log-probs of the S trained tokens of a step, in batch order, and what their forward did.

    logprobs, entropy (nats): float32[S], of the distribution that the rollout log-probs are of. rollout_logprobs:
    float32[S].
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    entropy: Tensor
    routing: RoutingReport


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimiser step: the loss it minimised, the gradient norm before clipping, the learning rate, means over
    trained tokens of the objective's `shares`, and the log-probs before the update. device_bytes: the peak of the
    device's memory in this step, None on CPU."""

    loss: float
    grad_norm: float
    learning_rate: float
    shares: Mapping[str, float]
    measured: Measured
    device_bytes: int | None = None


class TrainBackend(Protocol):
    """Parameters, optimiser and random state of one policy."""

    @property
    def routed(self) -> RoutedLayers | None:
        """The routing that recorded rows must fit; None for a dense model, or where nothing is replayed."""
        ...

    @property
    def packs_samples(self) -> bool:
        """Whether several samples may share one micro-batch; False: one sample each."""
        ...

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool, policy: Policy = Policy.ACTOR) -> Measured:
        """Log-probs without gradient, with recorded routing or with the live router, which is then compared with what
        was recorded (`RoutingReport.flipped`)."""
        ...

    def record(self, batches: Sequence[PackedBatch]) -> tuple[tuple[PackedBatch, ...], Measured]:
        """The batches with the live router's choices as their routing rows, and what that forward measured (`r2`)."""
        ...

    def update(self, batches: Sequence[ScoredBatch], objective: Objective) -> Update:
        """One step over all micro-batches under their routing rows.

        Raises NonFiniteLoss before any parameter changes.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on bit-exactly; `folder` exists."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint, tokenizer and template included."""
        ...

    def close(self) -> None:
        """End processes and free devices."""
        ...
