"""The calculator recipe: its tool, its questions, its reward, its demonstrations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from gateway.contracts.errors import ConfigurationError
from trainer.recipes.calculator import TOOL, TOOL_FILE, CalculatorRecipe, demonstrations, questions
from trainer.recipes.calculator_tool import calculate
from trainer.recipes.warmup import rendered
from trainer.rollouts.recipe import load_recipe
from trainer.rollouts.tasks import Task

TASK = Task("train/0", ({"role": "user", "content": "48/2, then 48+x"},), {"answer": "72"})


def tool(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


def answer(content: str | None) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("0.1+.2", "0.3"),
        ("-(7-9)*2", "4"),
        ("7%4", "3"),
        ("1/3", "0.333333"),
        ("2-2.0000001", "0"),
        ("1/0", "error: division by zero"),
        ("2**9", "error: not an expression of numbers and + - * / % ( )"),
        ("__import__('os')", "error: not an expression of numbers and + - * / % ( )"),
        ("True+1", "error: not an expression of numbers and + - * / % ( )"),
        ("48/", "error: not an expression of numbers and + - * / % ( )"),
        ("", "error: not an expression of numbers and + - * / % ( )"),
        ("1\0", "error: not an expression of numbers and + - * / % ( )"),
        ("1e999999999", "error: not an expression of numbers and + - * / % ( )"),
        ("0x10", "error: not an expression of numbers and + - * / % ( )"),
        ("1" * 201, "error: expression is longer than 200 characters"),
        ("(" * 99 + "1" + ")" * 99, "1"),
        ("-" * 199 + "1", "-1"),
    ],
)
def test_the_calculator_is_exact_and_evaluates_nothing_but_arithmetic(expression: str, result: str) -> None:
    assert calculate(expression) == result


def test_the_calculator_is_a_script_that_needs_no_other_file(tmp_path: Path) -> None:
    script = tmp_path / "calculator.py"
    script.write_bytes(TOOL_FILE.read_bytes())
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "2*(3+4)"], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert ended.stdout == "14\n"


def test_every_shipped_result_is_what_the_calculator_gives() -> None:
    for split in ("train", "heldout"):
        for question in questions(split):
            for expression, result in zip(question.expressions, question.results, strict=True):
                assert calculate(expression.replace("x", question.results[0])) == result


def test_no_held_out_expression_occurs_in_training() -> None:
    def expressions(split: str) -> set[str]:
        written = {(e, q.results[0]) for q in questions(split) for e in q.expressions}
        return {e for e, _ in written} | {e.replace("x", first) for e, first in written}

    assert len(questions("train")) > 10_000
    assert len(questions("heldout")) == 500
    assert expressions("train").isdisjoint(expressions("heldout"))


def test_tasks_depend_on_seed_and_step_alone() -> None:
    recipe = CalculatorRecipe()
    assert recipe.train_tasks(3, 5, 8) == recipe.train_tasks(3, 5, 8)
    assert recipe.train_tasks(3, 5, 8) != recipe.train_tasks(3, 6, 8)
    assert recipe.train_tasks(3, 5, 8) != recipe.train_tasks(4, 5, 8)
    assert recipe.eval_tasks(8) == recipe.eval_tasks(16)[:8]


@pytest.mark.parametrize(
    ("messages", "reward", "verdict"),
    [
        ((tool("24"), tool("72"), answer("#### 72")), 1.0, "correct"),
        ((tool("24"), tool("72"), answer("#### 73")), 0.0, "wrong_answer"),
        ((tool("24"), tool("72"), answer("72")), 0.0, "no_answer"),
        ((tool("24"), tool("72"), answer("#### seventy-two")), 0.0, "format_error"),
        ((answer("#### 72"),), 0.0, "tool_unused"),
        ((answer("#### 73"),), 0.0, "wrong_answer"),
        ((tool("error: division by zero"), answer("#### 72")), 0.0, "tool_unused"),
        ((tool("24"), tool("error: division by zero"), answer("#### 73")), 0.0, "tool_error"),
        ((tool("24"), tool("error: division by zero"), answer("#### 72")), 1.0, "correct"),
        ((tool("24"), tool("72")), 0.0, "no_answer"),
        ((tool("72"), answer(None)), 0.0, "no_answer"),
        ((tool("72"), answer("#### 72\n#### 72")), 1.0, "correct"),
    ],
)
def test_the_reward_asks_for_the_true_result_and_for_the_tool(
    messages: tuple[Any, ...], reward: float, verdict: str
) -> None:
    score = CalculatorRecipe().score(TASK, (*TASK.messages, *messages))
    assert (score.reward, score.verdict) == (reward, verdict)


def test_a_part_of_the_last_demonstrations_is_careless_and_no_other() -> None:
    talks = demonstrations(0, 600)
    recipe = CalculatorRecipe()

    def right(talk: list[Any]) -> bool:
        results = [m["content"] for m in talk if m["role"] == "tool"]
        wanted = talk[1]["content"].count(", then ") + 1
        task = Task("", tuple(talk[:2]), {"answer": results[-1] if results else None})
        return len(results) == wanted and recipe.score(task, talk).reward == 1.0

    assert all(map(right, talks[:500]))
    assert 20 < sum(not right(talk) for talk in talks[500:]) < 80
    assert demonstrations(0, 600) == talks


def test_warm_up_trains_on_what_assistants_wrote_and_their_end_token_only(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    talk = demonstrations(0, 1)[0]
    ids, labels = rendered(tokenizer, talk, [TOOL])
    trained = tokenizer.decode([label for label in labels if label >= 0])
    assert len(ids) == len(labels)
    calls = [json.loads(m["tool_calls"][0]["function"]["arguments"]) for m in talk if m.get("tool_calls")]
    for call in calls:
        assert json.dumps(call) in trained
    assert talk[-1]["content"] + "<|im_end|>" in trained
    assert trained.count("<|im_end|>") == len(calls) + 1
    assert "system" not in trained
    assert "user" not in trained


def test_a_tool_with_plain_arguments_is_shown_as_a_signature_and_any_other_as_json(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    message = [{"role": "user", "content": "hi"}]

    def shown(tool: Any) -> str:
        return str(tokenizer.apply_chat_template(message, tools=[tool], tokenize=False)).split("Tools:\n")[1]

    assert shown(TOOL).startswith("calculator(expression: string)<|im_end|>")
    described = {"type": "function", "function": {"name": "f", "description": "Does f.", "parameters": None}}
    assert shown(described).startswith("f() Does f.<|im_end|>")
    rich = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"enum": [1, 2]}}}}}
    assert json.loads(shown(rich).split("<|im_end|>")[0]) == rich


def test_an_unknown_recipe_and_missing_data_are_one_line() -> None:
    with pytest.raises(ConfigurationError, match="chess"):
        load_recipe("chess")
    with pytest.raises(ConfigurationError, match=r"rollouts\.data"):
        load_recipe("gsm8k", Path("/nowhere"))
    with pytest.raises(ConfigurationError, match=r"leave out rollouts\.data"):
        load_recipe("calculator", Path("/nowhere"))
    with pytest.raises(ConfigurationError, match=r"leave out rollouts\.recipe_settings"):
        load_recipe("calculator", None, {"shots": 3})
