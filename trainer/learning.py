"""One step's learning, from its rollouts to updated parameters; no network, and nothing of it is kept.

    StepBatch ─pack─▶ micro-batches by minibatch
              ─record─▶ the same with the trainer's own routing (r2)
              ─measure─▶ log-probs through the live router · before the first update · of the reference policy
              ─update─▶ one optimiser step a minibatch

Which forwards are made depends on what asks for them: one minibatch without reference and comparison is one forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gateway.contracts.errors import NonFiniteLoss
from trainer.algorithms.objective import Objective
from trainer.backends.protocol import Measured, Policy, TrainBackend, Update
from trainer.data.batch import StepBatch
from trainer.data.packing import PackedBatch, ScoredBatch, pack
from trainer.phases import Phase, PhaseClock
from trainer.settings import ReplayMode

Minibatches = Sequence[Sequence[PackedBatch]]
"""Micro-batches by optimiser step."""


@dataclass(frozen=True, slots=True, eq=False)
class Learned:
    """What a step did. updates: one a minibatch, none for a step without a sample; minibatches: their micro-batches.
    trained: the step's tokens before its first update, under the routing that it trains with, where a forward of its
    own measured that; live: the same through the live router, None where not measured."""

    updates: tuple[Update, ...] = ()
    minibatches: Minibatches = ()
    trained: Measured | None = None
    live: Measured | None = None

    @property
    def batches(self) -> list[PackedBatch]:
        """Micro-batches of all minibatches."""
        return _joined(self.minibatches)

    @property
    def logprobs(self) -> npt.NDArray[np.float32]:
        """float32[S] of the tokens of `batches`, before the first update as far as that was measured."""
        if self.trained is not None:
            return self.trained.logprobs.numpy()
        return np.concatenate([np.empty(0, np.float32), *(update.measured.logprobs.numpy() for update in self.updates)])


class _Old(NamedTuple):
    """What forwards before the first update gave. before: log-probs of the old policy, None where the update's own
    forward is it."""

    minibatches: Minibatches
    before: Measured | None
    live: Measured | None


class Learner:
    """Learns from one step after the other.

    save_batches: keeps a step's minibatches up to the one that could not be learnt from, and says where.
    """

    def __init__(
        self,
        backend: TrainBackend,
        objective: Objective,
        *,
        replay: ReplayMode,
        tokens_per_microbatch: int,
        measure_without_replay: bool,
        save_batches: Callable[[Sequence[Sequence[ScoredBatch]], NonFiniteLoss], Path],
    ) -> None:
        self._backend = backend
        self._objective = objective
        # A dense model has one routing: comparing it with itself would cost a forward of every step.
        self._replay = replay if backend.routed is not None else ReplayMode.OFF
        self._tokens_per_microbatch = tokens_per_microbatch if backend.packs_samples else 1
        self._measures_live = measure_without_replay and self._replay is not ReplayMode.OFF
        self._save_batches = save_batches

    def learn(self, batch: StepBatch, clock: PhaseClock) -> Learned:
        """Make the step's updates; raises NonFiniteLoss, naming the file in which the minibatch was kept."""
        if not batch.minibatches:
            return Learned()
        with clock.phase(Phase.ASSEMBLE):
            packed = self._packed(batch)
        with clock.phase(Phase.MEASURE):
            old = self._before(packed)
        reference = None
        if self._objective.needs_reference:
            with clock.phase(Phase.REFERENCE):
                everything = _joined(old.minibatches)
                reference = self._backend.measure(everything, replay=False, policy=Policy.REFERENCE)
        with clock.phase(Phase.UPDATE):
            scored = _scored(old.minibatches, old.before, reference)
            updates = tuple(self._update(scored[: number + 1]) for number in range(len(scored)))
        return Learned(updates, old.minibatches, old.before, old.live)

    def _packed(self, batch: StepBatch) -> Minibatches:
        return [
            pack(minibatch.samples, minibatch.weights, tokens_per_microbatch=self._tokens_per_microbatch)
            for minibatch in batch.minibatches
        ]

    def _before(self, minibatches: Minibatches) -> _Old:
        """The old policy's log-probs and routing, as far as somebody needs them."""
        everything = _joined(minibatches)
        if self._replay is ReplayMode.R2:
            recorded, measured = self._backend.record(everything)
            return _Old(_cut_like(minibatches, recorded), measured, measured)
        live = self._backend.measure(everything, replay=False) if self._measures_live else None
        if len(minibatches) == 1:
            return _Old(minibatches, None, live)
        return _Old(minibatches, self._backend.measure(everything, replay=self._replay is ReplayMode.R3), live)

    def _update(self, minibatches: Sequence[Sequence[ScoredBatch]]) -> Update:
        """One optimiser step with the last of these."""
        try:
            return self._backend.update(minibatches[-1], self._objective)
        except NonFiniteLoss as error:
            file = self._save_batches(minibatches, error)
            raise NonFiniteLoss(f"{error.message}; the batch is in {file}: --replay-batch shows where") from error


def _joined(minibatches: Minibatches) -> list[PackedBatch]:
    return [batch for minibatch in minibatches for batch in minibatch]


def _cut_like(minibatches: Minibatches, batches: Sequence[PackedBatch]) -> Minibatches:
    remaining = iter(batches)
    return [[next(remaining) for _ in minibatch] for minibatch in minibatches]


def _scored(minibatches: Minibatches, before: Measured | None, reference: Measured | None) -> list[list[ScoredBatch]]:
    """Each micro-batch with its own tokens' part of what was measured of all."""
    scored: list[list[ScoredBatch]] = []
    start = 0
    for minibatch in minibatches:
        scored.append([])
        for batch in minibatch:
            stop = start + batch.layout.num_trained
            scored[-1].append(ScoredBatch(batch, _part(before, start, stop), _part(reference, start, stop)))
            start = stop
    return scored


def _part(measured: Measured | None, start: int, stop: int) -> npt.NDArray[np.float32] | None:
    return None if measured is None else measured.logprobs[start:stop].numpy()
