"""The GSM8K recipe: whole word problems, read from the user's folder of `train.jsonl` and `test.jsonl`.

Each line is `{"question": …, "answer": …}` with the final number after `####`. The reward is 1.0 iff the number that
follows the last `####` of the agent's answer equals it ("1,200.00" and "1200" do). A calculator in the sandbox helps.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation
from functools import cached_property
from pathlib import Path

from gateway.contracts.errors import ConfigurationError
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox
from trainer.recipes.calculator import TOOL, CalculatorRecipe
from trainer.rollouts.tasks import Task

SYSTEM_PROMPT = (
    "Solve the problem step by step. Use the calculator for arithmetic. End with a line of #### and the number alone."
)

_ANSWER = re.compile(r"####\s*([^\n]+)")
_NOT_NUMERIC = re.compile(r"[\s,$€£%]")


class Gsm8kRecipe:
    """Tasks from a GSM8K folder (a `trainer.rollouts.recipe.Recipe`)."""

    name = "gsm8k"
    tools: Sequence[JsonValue] = (TOOL,)

    def __init__(self, data: Path | None) -> None:
        """Raises ConfigurationError unless `data` holds train.jsonl and test.jsonl."""
        missing = [name for name in ("train.jsonl", "test.jsonl") if data is None or not (data / name).is_file()]
        if data is None or missing:
            raise ConfigurationError(
                f"recipe gsm8k: {data or 'no folder'} lacks {' and '.join(missing)}; "
                "set rollouts.data to a folder of GSM8K's train.jsonl and test.jsonl"
            )
        self._data = data
        self._calculator = CalculatorRecipe()

    @property
    def sandbox_files(self) -> Mapping[str, bytes]:
        """The calculator script."""
        return self._calculator.sandbox_files

    def train_tasks(self, seed: int, step: int, count: int) -> Sequence[Task]:
        """`count` training problems drawn with seed and step alone."""
        return random.Random(f"gsm8k/{seed}/{step}").choices(self._train, k=count)

    def eval_tasks(self, count: int) -> Sequence[Task]:
        """The first `count` test problems."""
        return self._test[:count]

    async def run_tool(self, sandbox: Sandbox, name: str, arguments: JsonValue) -> str:
        """As the calculator recipe does."""
        return await self._calculator.run_tool(sandbox, name, arguments)

    def reward(self, task: Task, messages: Sequence[JsonValue]) -> float:
        """1.0 iff the last message is an answer whose number equals the problem's."""
        last = messages[-1]
        answers = _ANSWER.findall(last.get("content") or "") if last["role"] == "assistant" else []
        return float(bool(answers) and number(answers[-1]) == number(task.facts["answer"]) is not None)

    @cached_property
    def _train(self) -> list[Task]:
        return _tasks(self._data / "train.jsonl", "train")

    @cached_property
    def _test(self) -> list[Task]:
        return _tasks(self._data / "test.jsonl", "test")


def number(text: str) -> Decimal | None:
    """The number that a text writes, without thousands separators, currency and percent signs; None if it is none."""
    try:
        return Decimal(_NOT_NUMERIC.sub("", text).removesuffix("."))
    except InvalidOperation:
        return None


def _tasks(file: Path, split: str) -> list[Task]:
    tasks = []
    with file.open() as lines:
        for index, line in enumerate(lines):
            problem = json.loads(line)
            answer = _ANSWER.search(problem["answer"])
            if answer is None:
                raise ConfigurationError(f"{file}: line {index + 1} has no answer after ####")
            messages = (
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": problem["question"]},
            )
            tasks.append(Task(f"{split}/{index}", messages, {"answer": answer.group(1).strip()}))
    return tasks
