"""Settings of `verbatim train`: the tables of a recipe file (`trainer/recipes/*.toml`), as frozen dataclasses.

Only names, defaults and ranges; no torch. `[rollouts]` lives beside the controller that it configures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gateway.contracts.errors import ConfigurationError
from trainer.rollouts.settings import RolloutSettings


@dataclass(frozen=True, slots=True)
class RunSettings:
    """`name` labels the run's sessions and is its consumer group at the feed; `dir` holds checkpoints and metrics.

    `threads`: of torch. More than one only on a machine that runs nothing else: OpenMP threads spin on shared cores.
    """

    dir: Path
    name: str
    steps: int
    seed: int = 0
    threads: int = 1

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"run.steps is {self.steps}; it must be at least 1")
        _require(bool(self.name), "run.name is empty")


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """`path`: a Hugging Face folder. `experts`: transformers' expert implementation (grouped_mm, eager, batched_mm)."""

    path: Path
    experts: str = "grouped_mm"


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Where the gateway answers, and how long it may be away in the middle of a run (`retry_seconds`).

    Its operator's key comes from the environment, never from a file.
    """

    url: str = "http://127.0.0.1:8600"
    retry_seconds: float = 300.0

    def __post_init__(self) -> None:
        _require(self.retry_seconds >= 0, f"gateway.retry_seconds is {self.retry_seconds}; it must not be negative")


_PAUSES = ("abort", "keep", "retract", "drain")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How weights reach the engines.

    transport: "disk" (a folder that engines see too) or "distributed" (broadcast over torch.distributed, for SGLang).
    pause: what becomes of running requests, as in `gateway.replicas.pause`: abort, keep, retract or drain.
    pause_seconds: after which the gateway lets generation go on by itself, should this trainer die in between.
    """

    transport: str = "disk"
    pause: str = "abort"
    pause_seconds: float = 900.0

    def __post_init__(self) -> None:
        if self.pause not in _PAUSES:
            raise ConfigurationError(f"engines.pause {self.pause!r} is none of {', '.join(_PAUSES)}")
        if not self.pause_seconds > 0:
            raise ConfigurationError(f"engines.pause_seconds is {self.pause_seconds:g}; it must be above 0")


@dataclass(frozen=True, slots=True)
class SandboxSettings:
    """`driver`: by which means rollouts are isolated."""

    driver: str = "local"


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW and gradient clipping (`grad_clip`: the largest global norm; 0 leaves gradients alone)."""

    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, f"optimizer.learning_rate is {self.learning_rate}; it must be positive")
        _require(len(self.betas) == 2, f"optimizer.betas needs two numbers, got {list(self.betas)}")
        _require(self.grad_clip >= 0, f"optimizer.grad_clip is {self.grad_clip}; it must not be negative")


class OldPolicy(StrEnum):
    """Whose log-probs stand below the ratio: the trainer's own before the update, or the engine's as recorded."""

    TRAIN = "train"
    ROLLOUT = "rollout"


@dataclass(frozen=True, slots=True)
class LossSettings:
    """PPO-clip over GRPO advantages; `normalize` divides advantages by the group's standard deviation."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    normalize: bool = True
    old_policy: OldPolicy = OldPolicy.TRAIN

    def __post_init__(self) -> None:
        _require(0 < self.clip_low < 1, f"loss.clip_low is {self.clip_low}; it must be in (0, 1)")
        _require(self.clip_high > 0, f"loss.clip_high is {self.clip_high}; it must be positive")


class ReplayMode(StrEnum):
    """`off`: the live router. `r3`: the experts that the engine recorded (arXiv 2510.11370)."""

    OFF = "off"
    R3 = "r3"


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """`measure_without_replay`: one more forward a step, without gradient, to report what replay is worth."""

    mode: ReplayMode = ReplayMode.R3
    measure_without_replay: bool = True


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """`tokens_per_microbatch`: input tokens packed into one forward; attention costs their square on CPU, where about
    the length of the longest sample is best. `max_staleness`: policy versions a trained token may be behind the
    trainer; older rollouts are dropped and counted. `pick`: which sampled turns of a rollout train (all, delivered,
    final-path, or the gateway operator's own); without it the gateway's default. `train_incomplete`: also rollouts
    whose conversation was sampled in part elsewhere, or whose record lost a turn (`complete: false`); else they are
    dropped and counted."""

    tokens_per_microbatch: int = 2048
    max_staleness: int = 1
    pick: str | None = None
    train_incomplete: bool = False

    def __post_init__(self) -> None:
        _require(self.tokens_per_microbatch >= 1, "batch.tokens_per_microbatch must be at least 1")
        _require(self.max_staleness >= 0, "batch.max_staleness must not be negative")


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """`keep`: how many of the newest checkpoints stay on disk."""

    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.keep >= 1, f"checkpoint.keep is {self.keep}; at least one must stay")


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Held-out tasks: `num_tasks` 0 means none; `every` 0 means only at start and end."""

    num_tasks: int = 0
    every: int = 0
    at_start: bool = True
    at_end: bool = True


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Everything `verbatim train` reads from its file."""

    run: RunSettings
    model: ModelSettings
    rollouts: RolloutSettings
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    engines: EngineSettings = field(default_factory=EngineSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigurationError(message)
