"""Settings of `verbatim train`: the tables of a recipe file (`trainer/recipes/*.toml`), as frozen dataclasses.

Only names, defaults and ranges; no torch. Tables of one folder live in its own `settings.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from gateway.contracts.errors import ConfigurationError
from trainer.algorithms.settings import AdvantageSettings, LossSettings
from trainer.backends.settings import LoraSettings, ModelSettings, OptimizerSettings, ParallelSettings
from trainer.data.settings import BatchSettings
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


class ReplayMode(StrEnum):
    """`off`: the live router. `r2`: the experts of the trainer's own forward before the step's first update (GSPO,
    arXiv 2507.18071, section 5.3). `r3`: those that the engine recorded (arXiv 2510.11370)."""

    OFF = "off"
    R2 = "r2"
    R3 = "r3"


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """`measure_without_replay`: one more forward a step, without gradient, to report what replay is worth."""

    mode: ReplayMode = ReplayMode.R3
    measure_without_replay: bool = True


@dataclass(frozen=True, slots=True)
class MetricsSettings:
    """Where steps are written besides metrics.jsonl: `sinks` of tensorboard and wandb (extras of that name)."""

    sinks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckpointSettings:
    """`keep`: how many of the newest checkpoints stay on disk; `keep_every`: those of every so many steps stay besides
    (0: none)."""

    keep: int = 2
    keep_every: int = 0

    def __post_init__(self) -> None:
        _require(self.keep >= 1, f"checkpoint.keep is {self.keep}; at least one must stay")
        _require(self.keep_every >= 0, f"checkpoint.keep_every is {self.keep_every}; it must not be negative")


@dataclass(frozen=True, slots=True)
class EvaluationSettings:
    """Held-out tasks: `num_tasks` 0 means none; `every` 0 means only at start and end.

    `samples` attempts each, at a `temperature` (0: greedy) and `top_p` of their own; `max_new_tokens` 0 is as in
    `[rollouts]`, as is everything else.
    """

    num_tasks: int = 0
    every: int = 0
    at_start: bool = True
    at_end: bool = True
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 0

    def __post_init__(self) -> None:
        _require(self.num_tasks >= 0, f"evaluation.num_tasks is {self.num_tasks}; it must not be negative")
        _require(self.every >= 0, f"evaluation.every is {self.every}; it must not be negative")
        _require(self.samples >= 1, f"evaluation.samples is {self.samples}; it must be at least 1")
        _require(self.temperature >= 0, f"evaluation.temperature is {self.temperature}; it must not be negative")
        _require(0 < self.top_p <= 1, f"evaluation.top_p is {self.top_p}; it must be above 0 and at most 1")
        _require(
            self.max_new_tokens >= 0, f"evaluation.max_new_tokens is {self.max_new_tokens}; it must not be negative"
        )


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """Everything `verbatim train` reads from its file."""

    run: RunSettings
    model: ModelSettings
    rollouts: RolloutSettings
    gateway: GatewaySettings = field(default_factory=GatewaySettings)
    engines: EngineSettings = field(default_factory=EngineSettings)
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    metrics: MetricsSettings = field(default_factory=MetricsSettings)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ConfigurationError(message)
