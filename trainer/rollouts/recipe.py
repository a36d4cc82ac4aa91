"""What a recipe brings to rollouts: tasks, tools, and a score; and how to find one by name.

A recipe of your own is a class in a file of yours, named in the settings as `rollouts.recipe = "FILE.py:NAME"`; see the
README of this folder for one of ten lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox
from trainer.extension import load_extension
from trainer.recipes.calculator import CalculatorRecipe
from trainer.recipes.gsm8k import Gsm8kRecipe
from trainer.rollouts.tasks import Score, Task


class Recipe(Protocol):
    """One kind of task. Stateless: equal arguments give equal tasks, in every process."""

    @property
    def name(self) -> str: ...

    @property
    def settings(self) -> Mapping[str, JsonValue]:
        """What it was made with, defaults included, as an evaluation's file records it."""
        ...

    @property
    def tools(self) -> Sequence[JsonValue]:
        """OpenAI tool definitions; empty where the agent has none (then no sandbox is made)."""
        ...

    @property
    def sandbox_files(self) -> Mapping[str, bytes]:
        """What lies in each rollout's sandbox before it starts."""
        ...

    def train_tasks(self, seed: int, step: int, count: int) -> Sequence[Task]:
        """The tasks of one training step, one for each group."""
        ...

    def eval_tasks(self, count: int) -> Sequence[Task]:
        """The first `count` held-out tasks, always the same; fewer where there are no more."""
        ...

    async def run_tool(self, sandbox: Sandbox, name: str, arguments: JsonValue) -> str:
        """Run one tool call and return what the tool message says; a wrong call is answered with "error: …".

        Raises SandboxError if the sandbox itself failed. Never called where `tools` is empty.
        """
        ...

    def score(self, task: Task, messages: Sequence[JsonValue]) -> Score:
        """Score an ended conversation (`task.messages` and what followed); raises RewardError where none can be."""
        ...


MakeRecipe = Callable[[Path | None, Mapping[str, Any]], Recipe]
"""A recipe's class, or a function: called with `rollouts.data` and the table `rollouts.recipe_settings`."""

RECIPES: Mapping[str, MakeRecipe] = {"calculator": CalculatorRecipe, "gsm8k": Gsm8kRecipe}
"""name → class."""

_MEMBERS = ("name", "settings", "tools", "sandbox_files", "train_tasks", "eval_tasks", "run_tool", "score")


def load_recipe(name: str, data: Path | None = None, settings: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of that name, or the one at `FILE.py:NAME`.

    data: the folder of recipes whose tasks the user brings; settings: the recipe's own.
    Raises ConfigurationError for an unknown name, a file that cannot be loaded, or data that is missing.
    """
    if ":" in name:
        return _own(name)(data, settings or {})
    if name not in RECIPES:
        raise ConfigurationError(
            f"rollouts.recipe: there is no {name!r}; there are {', '.join(RECIPES)}, or one of yours as FILE.py:NAME"
        )
    return RECIPES[name](data, settings or {})


def _own(reference: str) -> MakeRecipe:
    """What `FILE.py:NAME` names; what it makes is checked to have a recipe's members before anything is sampled."""
    make = load_extension(reference, key="rollouts.recipe", takes=("data", "settings"))

    def checked(data: Path | None, settings: Mapping[str, Any]) -> Recipe:
        recipe: Recipe = make(data, settings)
        missing = [member for member in _MEMBERS if not hasattr(recipe, member)]
        if missing:
            raise ConfigurationError(f"rollouts.recipe {reference!r}: a recipe needs {', '.join(missing)} too")
        return recipe

    return checked
