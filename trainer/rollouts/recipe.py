"""What a recipe brings to rollouts: tasks, tools, and a reward; and how to find one by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox
from trainer.recipes.calculator import CalculatorRecipe
from trainer.recipes.gsm8k import Gsm8kRecipe
from trainer.rollouts.tasks import Task


class Recipe(Protocol):
    """One kind of task. Stateless: equal arguments give equal tasks, in every process."""

    @property
    def name(self) -> str: ...

    @property
    def tools(self) -> Sequence[JsonValue]:
        """OpenAI tool definitions; empty where the agent has none."""
        ...

    @property
    def sandbox_files(self) -> Mapping[str, bytes]:
        """What lies in each rollout's sandbox before it starts."""
        ...

    def train_tasks(self, seed: int, step: int, count: int) -> Sequence[Task]:
        """The tasks of one training step, one for each group."""
        ...

    def eval_tasks(self, count: int) -> Sequence[Task]:
        """The first `count` held-out tasks, always the same."""
        ...

    async def run_tool(self, sandbox: Sandbox, name: str, arguments: JsonValue) -> str:
        """Run one tool call and return what the tool message says; a wrong call is answered with "error: …".

        Raises SandboxError if the sandbox itself failed.
        """
        ...

    def reward(self, task: Task, messages: Sequence[JsonValue]) -> float:
        """Score an ended conversation; raises RewardError where no score can be computed."""
        ...


RECIPES: Mapping[str, Callable[[Path | None], Recipe]] = {
    "calculator": lambda data: CalculatorRecipe(),
    "gsm8k": Gsm8kRecipe,
}
"""name → class, given the folder of the user's data."""


def load_recipe(name: str, data: Path | None = None) -> Recipe:
    """The recipe of that name; `data` is the folder of recipes whose tasks the user brings.

    Raises ConfigurationError for an unknown name, or data that is missing.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name](data)
