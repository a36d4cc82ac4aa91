"""The `[rollouts]` table of a recipe file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.contracts.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How many attempts a step makes, and the limits of each.

    `recipe`: a name, or a class of yours as `FILE.py:NAME`; `recipe_settings`: the recipe's own table. `data`: folder
    of tasks for recipes that ship none. `concurrency`: rollouts under way at once. `max_turns` model calls a rollout,
    `max_new_tokens` each. `model`: the name that agents ask for.
    """

    recipe: str
    groups_per_step: int = 8
    group_size: int = 8
    concurrency: int = 32
    max_turns: int = 4
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    request_timeout_seconds: float = 300.0
    model: str = "policy"
    data: Path | None = None
    recipe_settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("groups_per_step", "group_size", "concurrency", "max_turns", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"rollouts.{name} is {getattr(self, name)}; it must be at least 1")
        if self.temperature < 0:
            raise ConfigurationError(f"rollouts.temperature is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"rollouts.top_p is {self.top_p}; it must be above 0 and at most 1")
