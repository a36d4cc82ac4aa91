"""The GSM8K recipe on a folder in GSM8K's format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gateway.contracts.errors import ConfigurationError
from trainer.recipes.gsm8k import Gsm8kRecipe
from trainer.rollouts.tasks import Task


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, number in (("train", "1,200"), ("test", "7")):
        problem = {"question": f"How many in {name}?", "answer": f"It is <<1+1=2>>2.\n#### {number}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(problem) + "\n")
    return tmp_path


def test_tasks_come_from_the_users_folder(folder: Path) -> None:
    recipe = Gsm8kRecipe(folder)
    (task,) = recipe.eval_tasks(5)
    assert (task.task_id, task.facts, task.messages[1]["content"]) == ("test/0", {"answer": "7"}, "How many in test?")
    assert len(recipe.train_tasks(0, 0, 4)) == 4


@pytest.mark.parametrize(
    ("content", "reward"),
    [
        ("So it is\n#### 1200", 1.0),
        ("#### 5\nno:\n#### $1,200.00", 1.0),
        ("#### 1200.", 1.0),
        ("#### 120", 0.0),
        ("1200", 0.0),
        ("#### many", 0.0),
        ("#### NaN", 0.0),
        (None, 0.0),
    ],
)
def test_the_reward_compares_numbers_not_their_spelling(folder: Path, content: str | None, reward: float) -> None:
    task = Task("train/0", (), {"answer": "1,200"})
    assert Gsm8kRecipe(folder).reward(task, [{"role": "assistant", "content": content}]) == reward


def test_a_problem_without_an_answer_is_named(folder: Path) -> None:
    (folder / "test.jsonl").write_text('{"question": "?", "answer": "none"}\n')
    with pytest.raises(ConfigurationError, match="line 1 has no answer"):
        Gsm8kRecipe(folder).eval_tasks(1)
