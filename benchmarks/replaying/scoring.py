"""What the trainer's own forward says of recorded rollouts: assembled, packed and measured as in `verbatim train`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gateway.contracts.rollouts import FinishedRollout
from trainer.algorithms.kl import extreme_share, k3
from trainer.backends.hf import HFBackend
from trainer.backends.protocol import Measured
from trainer.backends.settings import ModelSettings, OptimizerSettings
from trainer.data.assemble import TrainSample, assemble
from trainer.data.packing import PackedBatch, SampleWeights, pack
from trainer.settings import ReplayMode

TOKENS_PER_MICROBATCH = 1024


@dataclass(frozen=True, slots=True)
class Gap:
    """Between rollout and training, over `tokens` trained tokens.

    max_difference, mean_difference: |train - rollout log-prob|, nats. kl: k3 of rollout‖train, nats a token.
    f2, f1_2: shares F(2) and F(1.2) of extreme tokens. rows: routing rows, one a position and routed layer;
    verified: rows that used exactly what was recorded; fallback: rows that the live router decided because they were
    not valid; compared, flipped: recorded rows that a live router was held against, and where it chose another set.
    """

    tokens: int
    max_difference: float
    mean_difference: float
    kl: float
    f2: float
    f1_2: float
    rows: int
    replayed: int
    verified: int
    fallback: int
    compared: int
    flipped: int

    @property
    def verified_share(self) -> float:
        """Of all rows."""
        return self.verified / self.rows if self.rows else 0.0

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The same rollouts through a trainer that replays, and through one that does not."""

    replay: Gap
    live: Gap

    @property
    def times_less_kl(self) -> float:
        """KL without replay over KL with it."""
        return self.live.kl / self.replay.kl if self.replay.kl else float("inf")

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return {
            "with_replay": self.replay.figures(),
            "without_replay": self.live.figures(),
            "times_less_kl": self.times_less_kl,
        }

    def lines(self, name: str) -> str:
        """For people."""
        return f"{name}: {self.times_less_kl:.2f} times less KL with replay\n" + "".join(
            f"    {way:14} KL {gap.kl:.3e}  F(2) {gap.f2:.2e}  F(1.2) {gap.f1_2:.2e}  "
            f"|difference| {gap.max_difference:.1e} at most, {gap.mean_difference:.1e} on average  {gap.tokens} tokens"
            f"  {gap.verified} of {gap.rows} rows verified, {gap.flipped} of {gap.compared} flipped\n"
            for way, gap in (("with replay", self.replay), ("without", self.live))
        )


class Scorer:
    """A float32 trainer of one checkpoint that never steps."""

    def __init__(self, model: Path) -> None:
        self._backend = HFBackend(ModelSettings(path=model), OptimizerSettings(), replay=ReplayMode.R3, seed=0)

    @property
    def backend(self) -> HFBackend:
        """The trainer's."""
        return self._backend

    def samples(self, rollouts: Sequence[FinishedRollout]) -> list[TrainSample]:
        """Raises ExpertsMismatch, IntegrityError as the trainer would."""
        return [sample for rollout in rollouts for sample in assemble(rollout, self._backend.routed)]

    def batches(
        self, samples: Sequence[TrainSample], *, tokens_per_microbatch: int = TOKENS_PER_MICROBATCH
    ) -> tuple[PackedBatch, ...]:
        """Packed, each token with the weight of a mean."""
        trained = sum(sample.layout.num_trained for sample in samples)
        weights = [SampleWeights(advantage=1.0 if i % 2 else -1.0, weight=1.0 / trained) for i in range(len(samples))]
        return pack(samples, weights, tokens_per_microbatch=tokens_per_microbatch)

    def gap(self, rollouts: Sequence[FinishedRollout], *, replay: bool) -> Gap:
        """Of these rollouts."""
        return gap_of(self._backend.measure(self.batches(self.samples(rollouts)), replay=replay))

    def compare(self, rollouts: Sequence[FinishedRollout]) -> Comparison:
        """With replay and without."""
        return Comparison(self.gap(rollouts, replay=True), self.gap(rollouts, replay=False))


def gap_of(measured: Measured) -> Gap:
    """The figures of one measurement."""
    logratio = (measured.logprobs - measured.rollout_logprobs).double()
    routing = measured.routing
    return Gap(
        tokens=logratio.numel(),
        max_difference=float(logratio.abs().max()),
        mean_difference=float(logratio.abs().mean()),
        kl=float(k3(logratio).mean()),
        f2=extreme_share(logratio),
        f1_2=extreme_share(logratio, tau=1.2),
        rows=routing.total,
        replayed=routing.replayed,
        verified=routing.verified,
        fallback=routing.fallback,
        compared=routing.compared,
        flipped=routing.flipped,
    )
