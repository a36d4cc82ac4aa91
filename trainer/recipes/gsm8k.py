r"""The GSM8K recipe: word problems with worked answers, from the user's folder of `train.jsonl` and `test.jsonl`.

Each line is `{"question": …, "answer": …}` with the final number after `####`. The agent answers in one turn, without
tools, and ends with `\boxed{number}`; how that is read and compared stands in `final_number.py`. A final `####`,
GSM8K's own mark, is not read: prompt and examples ask for a box, and so do those of the project it is compared with.

    train.jsonl   the first `max(train_shots, eval_shots)`: examples  |  training problems  |  the last: validation
    test.jsonl    evaluation (`split = "test"`), never trained on

Examples are the training problems' own worked answers, shown as turns of the chat before the question.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from gateway.contracts.errors import ConfigurationError, SandboxLost
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import Sandbox
from gateway.contracts.settings import build_settings
from trainer.recipes.final_number import equal_in_value, final_answer, number_text
from trainer.rollouts.tasks import Score, Task, Verdict

SYSTEM_PROMPT = (
    "You solve word problems. Work out the solution step by step, then give the result, a single number, as \\boxed{…}."
)
REQUEST = "Show each step, and end with \\boxed{number}."

_ANSWER = re.compile(r"####[ \t]*(\S[^\n]*)")
_ANNOTATION = re.compile(r"<<[^<>\n]*>>")


class Split(StrEnum):
    """What an evaluation asks: the test problems, or those of the training problems that are held out."""

    TEST = "test"
    VALIDATION = "validation"


class Equality(StrEnum):
    """When two numbers are the same: as texts (`42` is not `42.0`; comparable with grpo-gsm8k), or as values."""

    TEXT = "text"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Gsm8kSettings:
    """The table `[rollouts.recipe_settings]`: examples shown before a question, which problems an evaluation asks, how
    numbers are compared, and how many training problems are held out for validation."""

    train_shots: int = 0
    eval_shots: int = 8
    split: Split = Split.TEST
    equality: Equality = Equality.TEXT
    validation_size: int = 512

    def __post_init__(self) -> None:
        for name in ("train_shots", "eval_shots", "validation_size"):
            if getattr(self, name) < 0:
                raise ConfigurationError(
                    f"rollouts.recipe_settings.{name} is {getattr(self, name)}; it must not be negative"
                )


class Problem(NamedTuple):
    """One line: the worked answer without GSM8K's marks, and the final number as GSM8K writes it ("1,200")."""

    problem_id: str
    question: str
    solution: str
    answer: str


class Gsm8kRecipe:
    """Tasks from a GSM8K folder (a `trainer.rollouts.recipe.Recipe`)."""

    name = "gsm8k"
    tools: Sequence[JsonValue] = ()
    sandbox_files: Mapping[str, bytes] = {}

    def __init__(self, data: Path | None, settings: Mapping[str, Any] | None = None) -> None:
        """Raises ConfigurationError unless `data` holds train.jsonl and test.jsonl."""
        self._settings = build_settings(Gsm8kSettings, settings or {}, where="rollouts.recipe_settings")
        missing = [name for name in ("train.jsonl", "test.jsonl") if data is None or not (data / name).is_file()]
        if data is None or missing:
            raise ConfigurationError(
                f"recipe gsm8k: {data or 'no folder'} lacks {' and '.join(missing)}; "
                "set rollouts.data to a folder of GSM8K's train.jsonl and test.jsonl"
            )
        self._data = data

    @property
    def settings(self) -> Mapping[str, JsonValue]:
        """Those given, and the defaults of the rest."""
        return asdict(self._settings)

    def train_tasks(self, seed: int, step: int, count: int) -> Sequence[Task]:
        """`count` training problems. Each comes once an epoch, in an order that depends on seed and epoch alone."""
        problems = self._train.practice
        orders: dict[int, list[Problem]] = {}
        tasks = []
        for index in range(step * count, (step + 1) * count):
            epoch, place = divmod(index, len(problems))
            if epoch not in orders:
                order = random.Random(f"gsm8k/{seed}/{epoch}")
                orders[epoch] = order.sample(problems, len(problems))
            tasks.append(self._task(orders[epoch][place], shots=self._settings.train_shots))
        return tasks

    def eval_tasks(self, count: int) -> Sequence[Task]:
        """The first `count` problems of the split that the settings name."""
        problems = self._test if self._settings.split is Split.TEST else self._train.validation
        return [self._task(problem, shots=self._settings.eval_shots) for problem in problems[:count]]

    async def run_tool(self, sandbox: Sandbox, name: str, arguments: JsonValue) -> str:
        """Never called: there are no tools."""
        raise SandboxLost(f"recipe gsm8k has no tool {name!r}")

    def score(self, task: Task, messages: Sequence[JsonValue]) -> Score:
        """1.0 iff the last message is an answer whose number is the problem's."""
        last = messages[-1]
        answer = final_answer(last.get("content") or "") if last["role"] == "assistant" else None
        if answer is None:
            return Score(0.0, Verdict.NO_ANSWER)
        number = number_text(answer)
        if number is None:
            return Score(0.0, Verdict.FORMAT_ERROR)
        return Score(1.0, Verdict.CORRECT) if self._is_equal(number, task) else Score(0.0, Verdict.WRONG_ANSWER)

    def _is_equal(self, number: str, task: Task) -> bool:
        true_number = number_text(task.facts["answer"])
        assert true_number is not None, "checked when the file was read"
        if self._settings.equality is Equality.VALUE:
            return equal_in_value(number, true_number)
        return number == true_number

    @cached_property
    def _train(self) -> _TrainSplit:
        problems = _problems(self._data / "train.jsonl", "train")
        num_shots = max(self._settings.train_shots, self._settings.eval_shots)
        held_out = len(problems) - self._settings.validation_size
        if held_out <= num_shots:
            raise ConfigurationError(
                f"{self._data / 'train.jsonl'} has {len(problems)} problems, of which {num_shots} are examples and "
                f"{self._settings.validation_size} validation: none is left to train on; lower "
                "rollouts.recipe_settings.validation_size or the shots"
            )
        return _TrainSplit(problems[:num_shots], problems[num_shots:held_out], problems[held_out:])

    @cached_property
    def _test(self) -> list[Problem]:
        return _problems(self._data / "test.jsonl", "test")

    def _task(self, problem: Problem, *, shots: int) -> Task:
        messages: list[JsonValue] = [{"role": "system", "content": SYSTEM_PROMPT}]
        for example in self._train.examples[:shots] if shots else ():
            messages += (_asked(example), {"role": "assistant", "content": worked_answer(example)})
        return Task(problem.problem_id, (*messages, _asked(problem)), {"answer": problem.answer})


class _TrainSplit(NamedTuple):
    """What the training file is used for, in its order."""

    examples: list[Problem]
    practice: list[Problem]
    validation: list[Problem]


def worked_answer(problem: Problem) -> str:
    r"""A problem's own solution in the form that is asked for: its steps, then `\boxed{number}`."""
    return f"{problem.solution}\nThe result is \\boxed{{{problem.answer}}}."


def _asked(problem: Problem) -> JsonValue:
    return {"role": "user", "content": f"{problem.question}\n\n{REQUEST}"}


def _problems(file: Path, split: str) -> list[Problem]:
    """Raises ConfigurationError naming the line that is no problem."""
    try:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from error
    return [_problem(line, f"{split}/{index}", f"{file}: line {index + 1}") for index, line in enumerate(lines)]


def _problem(line: str, problem_id: str, where: str) -> Problem:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigurationError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("question", "answer")):
        raise ConfigurationError(f"{where} lacks the texts question and answer")
    answer = _ANSWER.search(row["answer"])
    if answer is None or number_text(answer[1]) is None:
        raise ConfigurationError(f"{where} has no number after ####")
    solution = _ANNOTATION.sub("", row["answer"][: answer.start()]).strip()
    return Problem(problem_id, row["question"].strip(), solution, answer[1].strip())
