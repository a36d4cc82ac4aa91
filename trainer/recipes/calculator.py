"""The calculator recipe: one or two calculations of a GSM8K answer, to be worked out with a tool in a sandbox.

A rollout: the user writes `48/2, then 48+x`; the agent calls the calculator with `48/2`, reads 24, calls it with
`48+24`, reads 72, and answers `#### 72`. The reward is 1.0 if the answer is the true result and the calculator gave at
least one result, else 0.0 (a right guess has the verdict `tool_unused`).
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from gateway.contracts.errors import ConfigurationError, SandboxLost
from gateway.contracts.generation import JsonValue
from gateway.contracts.ports import ExecOutcome, Sandbox
from trainer.rollouts.tasks import Score, Task, Verdict

QUESTIONS_FILE = Path(__file__).parent / "data" / "calculations.jsonl.gz"
TOOL_FILE = Path(__file__).parent / "calculator_tool.py"

SYSTEM_PROMPT = "Use the calculator. Then answer after ####."
TOOL_NAME = "calculator"
TOOL_UNUSED = "tool_unused"
"""Verdict: the right result, guessed."""
CARELESS_SHARE = 0.45
PAIR_SHARE = 0.6
"""Of demonstrations: two calculations, the harder kind. Practice can mend a habit, hardly teach a skill never shown."""
TOOL: JsonValue = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}},
    },
}

_ANSWER = re.compile(r"####\s*(-?[0-9.]+)\s*$")
_TOOL_SECONDS = 10.0
_CORPUS_SIZE = 2000


class Question(NamedTuple):
    """Calculations in order; a second expression may use the first's result as x. All as text."""

    question_id: str
    expressions: tuple[str, ...]
    results: tuple[str, ...]


class CalculatorRecipe:
    """Tasks, tool and reward of the demo (a `trainer.rollouts.recipe.Recipe`)."""

    name = "calculator"
    tools: Sequence[JsonValue] = (TOOL,)
    settings: Mapping[str, JsonValue] = {}

    def __init__(self, data: Path | None = None, settings: Mapping[str, Any] | None = None) -> None:
        """Its questions are shipped: raises ConfigurationError for data or settings that nothing would read."""
        if data is not None or settings:
            given = "rollouts.data" if data is not None else "rollouts.recipe_settings"
            raise ConfigurationError(f"recipe calculator has questions and settings of its own: leave out {given}")

    @property
    def sandbox_files(self) -> Mapping[str, bytes]:
        """The calculator script."""
        return {"calculator.py": TOOL_FILE.read_bytes()}

    def train_tasks(self, seed: int, step: int, count: int) -> Sequence[Task]:
        """`count` questions drawn with seed and step alone, so that a step taken again draws the same."""
        draw = random.Random(f"train/{seed}/{step}")
        return [_task(_draw(draw, questions("train"))) for _ in range(count)]

    def eval_tasks(self, count: int) -> Sequence[Task]:
        """`count` held-out questions, the same in every run."""
        draw = random.Random("heldout")
        return [_task(_draw(draw, questions("heldout"))) for _ in range(count)]

    async def run_tool(self, sandbox: Sandbox, name: str, arguments: JsonValue) -> str:
        """Run the calculator script in the sandbox."""
        if name != TOOL_NAME:
            return f"error: no tool {name!r}"
        if not isinstance(arguments, dict) or not isinstance(arguments.get("expression"), str):
            return 'error: call it with {"expression": "…"}'
        command = ("python3", "-I", "-S", "calculator.py", arguments["expression"])
        result = await sandbox.execute(command, timeout_seconds=_TOOL_SECONDS)
        if result.outcome is not ExecOutcome.EXITED or result.exit_code != 0:
            # The script itself always exits with 0, so this is the sandbox's doing and not an answer.
            raise SandboxLost(f"calculator ended as {result.outcome} {result.exit_code}: {result.stderr[-200:]!r}")
        return result.stdout.decode().strip()

    def score(self, task: Task, messages: Sequence[JsonValue]) -> Score:
        """1.0 iff the last message's answer is the true result and the calculator gave at least one result."""
        last = messages[-1]
        said = last.get("content") or "" if last["role"] == "assistant" else ""
        answer = _ANSWER.search(said)
        results = [message["content"] for message in messages if message["role"] == "tool"]
        if answer is not None and answer.group(1) == task.facts["answer"]:
            if any(not result.startswith("error") for result in results):
                return Score(1.0, Verdict.CORRECT)
            return Score(0.0, TOOL_UNUSED)
        if results and results[-1].startswith("error"):
            return Score(0.0, Verdict.TOOL_ERROR)
        if answer is not None:
            return Score(0.0, Verdict.WRONG_ANSWER)
        return Score(0.0, Verdict.FORMAT_ERROR if "####" in said else Verdict.NO_ANSWER)


def demonstrations(seed: int, count: int) -> list[list[JsonValue]]:
    """Conversations on training questions for the supervised warm-up, in order.

    First faultless ones, which teach form and copying. Of the last sixth some are careless: they guess without the
    calculator, or answer a question of two calculations with the first's result; habits that the reward can break.
    """
    draw = random.Random(f"demonstrations/{seed}")
    num_faultless = count - count // 6
    by_length = [[q for q in questions("train") if len(q.expressions) == n] for n in (1, 2)]
    return [
        _careless(_draw(draw, questions("train")), draw)
        if i >= num_faultless and draw.random() < CARELESS_SHARE
        else _faultless(_draw(draw, by_length[draw.random() < PAIR_SHARE]))
        for i in range(count)
    ]


def corpus() -> list[str]:
    """Text to train a tokenizer on: what these conversations are made of."""
    return [json.dumps(conversation) for conversation in demonstrations(0, _CORPUS_SIZE)]


@cache
def questions(split: str) -> tuple[Question, ...]:
    """All questions of a split ("train" or "heldout") in the file's order."""
    with gzip.open(QUESTIONS_FILE, "rt") as lines:
        rows = [row for line in lines if (row := json.loads(line))["split"] == split]
    return tuple(
        Question(f"{split}/{i}", tuple(row["expressions"]), tuple(row["results"])) for i, row in enumerate(rows)
    )


def _draw(draw: random.Random, rows: Sequence[Question]) -> Question:
    return rows[draw.randrange(len(rows))]


def _task(question: Question) -> Task:
    messages = ({"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": _wording(question)})
    return Task(question.question_id, messages, {"answer": question.results[-1]})


def _wording(question: Question) -> str:
    return ", then ".join(question.expressions)


def _faultless(question: Question) -> list[JsonValue]:
    messages: list[JsonValue] = list(_task(question).messages)
    for expression, result in zip(question.expressions, question.results, strict=True):
        messages += _calculation(expression.replace("x", question.results[0]), result)
    return [*messages, _answer(question.results[-1])]


def _careless(question: Question, draw: random.Random) -> list[JsonValue]:
    messages = list(_task(question).messages)
    if len(question.expressions) == 1:
        digits = len(question.results[0])
        return [*messages, _answer(str(draw.randrange(10**digits)))]
    first = question.results[0]
    return [*messages, *_calculation(question.expressions[0], first), _answer(first)]


def _calculation(expression: str, result: str) -> list[JsonValue]:
    """A call of the calculator and its result."""
    function = {"name": TOOL_NAME, "arguments": json.dumps({"expression": expression})}
    return [
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": result},
    ]


def _answer(result: str) -> JsonValue:
    return {"role": "assistant", "content": f"#### {result}"}
