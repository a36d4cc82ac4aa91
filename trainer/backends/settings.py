"""The `[model]`, `[lora]`, `[optimizer]` and `[parallel]` tables of a recipe file. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gateway.contracts.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """`path`: a Hugging Face folder. `experts`: transformers' expert implementation (grouped_mm, eager, batched_mm);
    `attention`: its attention implementation (sdpa, eager, flash_attention_2, flex_attention, …). auto: the first of
    these that the model has.

    `device`: cpu, cuda, or auto (cuda where there is one). `dtype`: in which forwards compute, float32 or bfloat16;
    parameters and optimiser stay float32. `checkpoint_activations`: layers are computed again in the backward pass.
    `reference`: folder of the policy that KL is taken against; without it the model as it was loaded.
    """

    path: Path
    experts: str = "auto"
    attention: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    checkpoint_activations: bool = False
    reference: Path | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigurationError(f"model.dtype {self.dtype!r} is neither float32 nor bfloat16")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters (peft) on the modules named in `targets`, all else frozen. `rank` 0: every parameter trains."""

    rank: int = 0
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ConfigurationError(f"lora.rank is {self.rank}; it must not be negative")
        if self.rank and not self.targets:
            raise ConfigurationError("lora.targets is empty: nothing would train")


@dataclass(frozen=True, slots=True)
class OptimizerSettings:
    """AdamW, gradient clipping (`grad_clip`: the largest global norm; 0 leaves gradients alone) and the learning rate's
    course: `schedule` is one of transformers' (constant, linear, cosine, …) with `warmup_steps` before it."""

    learning_rate: float = 1e-6
    betas: tuple[float, ...] = (0.9, 0.95)
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: str = "constant"
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        for holds, message in (
            (self.learning_rate > 0, f"learning_rate is {self.learning_rate}; it must be positive"),
            (len(self.betas) == 2, f"betas needs two numbers, got {list(self.betas)}"),
            (self.grad_clip >= 0, f"grad_clip is {self.grad_clip}; it must not be negative"),
            (self.warmup_steps >= 0, f"warmup_steps is {self.warmup_steps}; it must not be negative"),
        ):
            if not holds:
                raise ConfigurationError(f"optimizer.{message}")


@dataclass(frozen=True, slots=True)
class ParallelSettings:
    """`processes`: ranks of one model, each a Ray actor; 1 needs no Ray. `expert_parallel`: of these, over how many a
    layer's experts are spread; it divides `processes`. `address`: of a Ray cluster; without it one is started here."""

    processes: int = 1
    expert_parallel: int = 1
    address: str | None = None

    def __post_init__(self) -> None:
        if self.processes < 1 or self.expert_parallel < 1 or self.processes % self.expert_parallel:
            raise ConfigurationError(
                f"parallel.processes {self.processes} must be a multiple of parallel.expert_parallel "
                f"{self.expert_parallel}"
            )
