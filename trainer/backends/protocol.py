"""TrainBackend: what the loop needs of whatever holds parameters and optimiser. Values in and out are the whole step's;
how it is cut into micro-batches, devices and processes is the backend's own business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from trainer.algorithms.losses import Objective
from trainer.data.packing import PackedBatch
from trainer.replay.validate import RoutedLayers
from trainer.replay.verify import RoutingReport


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Log-probs of the S trained tokens of a step, in batch order, and what their forward did.

    logprobs, entropy (nats): float32[S], of the temperature-scaled distribution. rollout_logprobs: float32[S].
    """

    logprobs: Tensor
    rollout_logprobs: Tensor
    entropy: Tensor
    routing: RoutingReport


@dataclass(frozen=True, slots=True, eq=False)
class Update:
    """One optimiser step: the loss it minimised, the gradient norm before clipping, the share of clipped tokens, and
    the log-probs before the update."""

    loss: float
    grad_norm: float
    clipped_share: float
    measured: Measured


class TrainBackend(Protocol):
    """Parameters, optimiser and random state of one policy."""

    @property
    def routed(self) -> RoutedLayers | None:
        """The routing that recorded rows must fit; None where nothing is replayed."""
        ...

    @property
    def packs_samples(self) -> bool:
        """Whether several samples may share one micro-batch; False: one sample each."""
        ...

    def measure(self, batches: Sequence[PackedBatch], *, replay: bool) -> Measured:
        """Log-probs without gradient, with recorded routing or with the live router."""
        ...

    def update(self, batches: Sequence[PackedBatch], objective: Objective) -> Update:
        """One step over all micro-batches; raises NonFiniteLoss before any parameter changes."""
        ...

    def save(self, folder: Path) -> None:
        """Write all that `load` needs to go on bit-exactly; `folder` exists."""
        ...

    def load(self, folder: Path) -> None: ...

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face checkpoint, tokenizer and template included."""
        ...
