"""One step cut in many ways: packing, micro-batches and ranks may change loss and gradient by rounding only.

The step's rollouts are made here: conversations of random tokens with the routing that other routers chose, so that
replay matters, and old log-probs that stand off the live ones, so that clips and ratios are at work.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.replaying.checkpoints import MoeShape, make_moe, perturbed_routers
from trainer.algorithms.policy_objective import PolicyObjective
from trainer.algorithms.settings import LossSettings
from trainer.backends.hf import HFBackend
from trainer.backends.protocol import TrainBackend, Update
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings, ParallelSettings
from trainer.data.assemble import TrainSample
from trainer.data.layout import TokenLayout
from trainer.data.packing import PackedBatch, SampleWeights, ScoredBatch, pack
from trainer.settings import ReplayMode

ROUNDING = 1e-5
"""Largest relative difference of loss, gradient norm or gradient that counts as rounding in float32."""
_OLD_NOISE = 0.1
_ROUTER_NOISE = 0.05

_TOKENS_OF_A_RANK = 256

RANKS = ((1, 1), (2, 1), (4, 1), (2, 2))
"""Processes, and over how many of them a layer's experts are spread."""

Logprobs = npt.NDArray[np.float32]

LOSSES: Mapping[str, LossSettings] = {
    "ppo": LossSettings(),
    "gspo": LossSettings(policy="gspo", clip_low=0.05, clip_high=0.05, correction="off"),
    "cispo with tis": LossSettings(policy="cispo", correction="tis"),
}
"""A clip a token with tokens masked, ratios of whole sequences, and weights that carry no gradient."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step's samples, what each counts with, and the old log-probs of each sample's trained tokens."""

    samples: tuple[TrainSample, ...]
    weights: tuple[SampleWeights, ...]
    old_logprobs: tuple[Logprobs, ...]

    def cut(self, *, tokens_per_microbatch: int) -> list[ScoredBatch]:
        """As micro-batches of at most so many tokens."""
        batches = pack(self.samples, self.weights, tokens_per_microbatch=tokens_per_microbatch)
        return [ScoredBatch(batch, self._old_of(batch)) for batch in batches]

    def shuffled(self, seed: int) -> Step:
        """The same step in another order of samples."""
        order = np.random.default_rng(seed).permutation(len(self.samples))
        return Step(
            tuple(self.samples[i] for i in order),
            tuple(self.weights[i] for i in order),
            tuple(self.old_logprobs[i] for i in order),
        )

    def _old_of(self, batch: PackedBatch) -> Logprobs:
        old_of = {sample.segment_id: old for sample, old in zip(self.samples, self.old_logprobs, strict=True)}
        return np.concatenate([old_of[origin.segment_id] for origin in batch.origins])


@dataclass(frozen=True, slots=True)
class Cut:
    """One way of cutting the step. Differences are relative to the first way; gradient: of the whole vector, by its
    norm, None where a backend keeps it elsewhere."""

    name: str
    microbatches: int
    loss: float
    grad_norm: float
    loss_difference: float
    grad_norm_difference: float
    gradient_difference: float | None

    @property
    def holds(self) -> bool:
        """Whether all differences are rounding."""
        differences = (self.loss_difference, self.grad_norm_difference, self.gradient_difference or 0.0)
        return max(differences) <= ROUNDING

    def line(self) -> str:
        """For people."""
        gradient = "" if self.gradient_difference is None else f", gradient {self.gradient_difference:.1e}"
        return (
            f"{'' if self.holds else 'MORE THAN ROUNDING '}{self.name:44} loss {self.loss:.9f} "
            f"({self.loss_difference:.1e}), norm {self.grad_norm:.7f} ({self.grad_norm_difference:.1e}{gradient})\n"
        )

    def figures(self) -> dict[str, Any]:
        """For the results file."""
        return asdict(self)


def run_cuts(folder: Path, *, seed: int, ranks: Sequence[tuple[int, int]] = RANKS) -> Iterator[Cut]:
    """Every way, of one step on one model."""
    model = make_moe(folder / "model", "qwen3_moe", seed=seed, shape=MoeShape(num_experts=16, top_k=4))
    step = make_step(model, folder, seed=seed)
    ways: list[tuple[str, Step, int]] = [
        ("one micro-batch", step, 1 << 20),
        ("one sample a micro-batch", step, 1),
        ("256 tokens a micro-batch", step, 256),
        ("512 tokens, samples shuffled", step.shuffled(seed + 1), 512),
        ("one sample a micro-batch, shuffled", step.shuffled(seed + 2), 1),
    ]
    references: dict[str, _Stepped] = {}
    for loss_name, loss in LOSSES.items():
        for name, cut_step, tokens in ways:
            stepped = _stepped(_hf_backend(model), cut_step, tokens, PolicyObjective(loss))
            first = references.setdefault(loss_name, stepped)
            yield _against(first, stepped, f"{loss_name}, {name}")
    for processes, expert_parallel in ranks:
        name = f"{processes} ranks" + (f", experts over {expert_parallel}" if expert_parallel > 1 else "")
        backend = _cluster(model, processes, expert_parallel)
        try:
            batches = step.cut(tokens_per_microbatch=_TOKENS_OF_A_RANK)
            for loss_name, loss in LOSSES.items():
                stepped = _Stepped(len(batches), backend.update(batches, PolicyObjective(loss)), None)
                yield _against(references[loss_name], stepped, f"{loss_name}, {name}")
        finally:
            backend.close()


def _cluster(model: Path, processes: int, expert_parallel: int) -> TrainBackend:
    """Ranks as Ray actors that talk over gloo."""
    from trainer.backends.ranks import PolicySettings
    from trainer.cluster import ClusterBackend

    return ClusterBackend(
        PolicySettings(
            model=ModelSettings(path=model, device="cpu"),
            # So small a step changes no float32 weight: one set of ranks serves all losses.
            optimizer=OptimizerSettings(learning_rate=1e-12, grad_clip=0.0),
            parallel=ParallelSettings(processes=processes, expert_parallel=expert_parallel),
            replay=ReplayMode.R3,
            seed=0,
            lora=LoraSettings(),
            num_updates=1,
            needs_reference=False,
        )
    )


def make_step(model: Path, folder: Path, *, seed: int, num_samples: int = 24) -> Step:
    """Random conversations with foreign routing; advantages of both signs; the step's token mean as weights."""
    rng = np.random.default_rng(seed)
    layouts = [_conversation(rng) for _ in range(num_samples)]
    trained = sum(layout.num_trained for layout in layouts)
    weights = tuple(SampleWeights(float(rng.normal()), 1.0 / trained) for _ in layouts)
    other = _hf_backend(perturbed_routers(model, folder / "other-routers", noise=_ROUTER_NOISE, seed=seed))
    samples = []
    for i, layout in enumerate(layouts):
        sample = TrainSample(f"session-{i}", f"segment-{i}", layout)
        (recorded,), _ = other.record(pack([sample], [weights[i]], tokens_per_microbatch=1))
        samples.append(replace(sample, layout=recorded.layout))
    live = _hf_backend(model)
    old, with_rollout = [], []
    for sample, weight in zip(samples, weights, strict=True):
        logprobs = live.measure(pack([sample], [weight], tokens_per_microbatch=1), replay=True).logprobs.numpy()
        old.append(_off(logprobs, rng))
        rollout_logprobs = np.full(sample.layout.num_positions, np.nan, np.float32)
        rollout_logprobs[sample.layout.trained] = _off(old[-1], rng)
        with_rollout.append(replace(sample, layout=replace(sample.layout, rollout_logprobs=rollout_logprobs)))
    return Step(tuple(with_rollout), weights, tuple(old))


def _off(logprobs_S: Logprobs, rng: np.random.Generator) -> Logprobs:
    return (logprobs_S + _OLD_NOISE * rng.normal(size=logprobs_S.shape)).astype(np.float32)


def _conversation(rng: np.random.Generator) -> TokenLayout:
    """Turns of 5 to 30 prompt tokens and 5 to 40 sampled ones."""
    mask = np.concatenate(
        [np.repeat([False, True], [rng.integers(5, 30), rng.integers(5, 40)]) for _ in range(int(rng.integers(1, 5)))]
    )
    ids = rng.integers(8, 300, len(mask)).astype(np.int32)
    trained, num = mask[1:], len(mask) - 1
    return TokenLayout(
        input_ids=ids[:-1],
        labels=ids[1:],
        position_ids=np.arange(num, dtype=np.int32),
        trained=trained,
        rollout_logprobs=np.where(trained, np.float32(-5.5), np.float32(np.nan)).astype(np.float32),
        policy_version=np.where(trained, 0, -1).astype(np.int32),
        temperature=np.ones(num, dtype=np.float32),
        top_p=np.ones(num, dtype=np.float32),
        top_k=np.zeros(num, dtype=np.int32),
        routing=None,
    )


def _hf_backend(model: Path) -> HFBackend:
    return HFBackend(
        ModelSettings(path=model, device="cpu"), OptimizerSettings(grad_clip=0.0), replay=ReplayMode.R3, seed=0
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Stepped:
    microbatches: int
    update: Update
    gradient: torch.Tensor | None


def _stepped(backend: TrainBackend, step: Step, tokens: int, objective: PolicyObjective) -> _Stepped:
    batches = step.cut(tokens_per_microbatch=tokens)
    update = backend.update(batches, objective)
    try:
        return _Stepped(len(batches), update, _gradient(backend))
    finally:
        backend.close()


def _gradient(backend: TrainBackend) -> torch.Tensor | None:
    """From AdamW's first moment, which after one step is (1 - beta1) times the gradient; float64[all parameters]."""
    with tempfile.TemporaryDirectory() as folder:
        backend.save(Path(folder))
        file = Path(folder) / "backend.pt"
        if not file.exists():
            return None
        moments = torch.load(file, weights_only=True)["optimizer"]["state"]
    beta1 = OptimizerSettings().betas[0]
    return torch.cat([moments[i]["exp_avg"].double().flatten() for i in sorted(moments)]) / (1 - beta1)


def _against(first: _Stepped, stepped: _Stepped, name: str) -> Cut:
    gradient_difference = None
    if first.gradient is not None and stepped.gradient is not None:
        gradient_difference = float((stepped.gradient - first.gradient).norm() / first.gradient.norm())
    one, other = first.update, stepped.update
    return Cut(
        name=name,
        microbatches=stepped.microbatches,
        loss=other.loss,
        grad_norm=other.grad_norm,
        loss_difference=abs(other.loss - one.loss) / abs(one.loss),
        grad_norm_difference=abs(other.grad_norm - one.grad_norm) / one.grad_norm,
        gradient_difference=gradient_difference,
    )
