"""The GSM8K recipe on a folder in GSM8K's format: what is asked, what is held out, how answers are scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.contracts.errors import ConfigurationError
from trainer.recipes.final_number import equal_in_value, final_answer, number_text
from trainer.recipes.gsm8k import REQUEST, SYSTEM_PROMPT, Gsm8kRecipe
from trainer.rollouts.tasks import Task

TASK = Task("test/0", (), {"answer": "1,200"})


def line(number: int | str) -> str:
    answer = f"He has 1+1=<<1+1=2>>2.\nSo <<2*6=12>>12 left.\n#### {number}"
    return json.dumps({"question": f"How many of {number}?", "answer": answer}) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.jsonl").write_text("".join(map(line, range(12))))
    (tmp_path / "test.jsonl").write_text("".join(map(line, range(100, 105))))
    return tmp_path


def recipe(folder: Path, **settings: object) -> Gsm8kRecipe:
    return Gsm8kRecipe(folder, {"eval_shots": 2, "validation_size": 3, **settings})


def asked(task: Task) -> str:
    return str(task.messages[-1]["content"])


def test_an_evaluation_shows_worked_training_problems_as_turns_and_asks_the_test_problems(folder: Path) -> None:
    tasks = recipe(folder).eval_tasks(4)
    assert [task.task_id for task in tasks] == ["test/0", "test/1", "test/2", "test/3"]
    system, *turns = tasks[1].messages
    assert system == {"role": "system", "content": SYSTEM_PROMPT}
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user", "assistant", "user"]
    assert turns[0]["content"] == f"How many of 0?\n\n{REQUEST}"
    assert turns[1]["content"] == "He has 1+1=2.\nSo 12 left.\nThe result is \\boxed{0}."
    assert (asked(tasks[1]), tasks[1].facts) == (f"How many of 101?\n\n{REQUEST}", {"answer": "101"})


def test_every_example_earns_the_reward_that_it_teaches(folder: Path) -> None:
    for task, number in ((recipe(folder, eval_shots=8).eval_tasks(1)[0], place) for place in range(8)):
        shown = task.messages[2 * number + 2]
        answered = Task("", (), {"answer": str(number)})
        assert recipe(folder).score(answered, [shown]).reward == 1.0


def test_examples_practice_validation_and_test_have_no_problem_in_common(folder: Path) -> None:
    practice = {asked(task) for step in range(7) for task in recipe(folder).train_tasks(0, step, 2)}
    validation = {asked(task) for task in recipe(folder, split="validation").eval_tasks(99)}
    test = {asked(task) for task in recipe(folder).eval_tasks(99)}
    assert practice == {f"How many of {n}?\n\n{REQUEST}" for n in range(2, 9)}
    assert validation == {f"How many of {n}?\n\n{REQUEST}" for n in range(9, 12)}
    assert len(test) == 5
    assert test.isdisjoint(practice | validation)


def test_training_asks_each_problem_once_an_epoch_in_an_order_of_seed_and_epoch_alone(folder: Path) -> None:
    def ids(seed: int, step: int, count: int) -> list[str]:
        return [task.task_id for task in recipe(folder).train_tasks(seed, step, count)]

    first, second = ids(0, 0, 7), ids(0, 1, 7)
    assert sorted(first) == sorted(second) == [f"train/{n}" for n in range(2, 9)]
    assert first != second
    assert ids(0, 0, 7) == first
    assert ids(1, 0, 7) != first
    assert ids(0, 0, 4) + ids(0, 1, 4) + ids(0, 2, 4) == first + second[:5], "a step goes on where the last one ended"


def test_training_prompts_have_no_examples_unless_asked_for(folder: Path) -> None:
    assert len(recipe(folder).train_tasks(0, 0, 1)[0].messages) == 2
    assert len(recipe(folder, train_shots=1).train_tasks(0, 0, 1)[0].messages) == 4


@pytest.mark.parametrize(
    ("content", "reward", "verdict"),
    [
        ("so \\boxed{1200}", 1.0, "correct"),
        ("so \\boxed{1,200}.", 1.0, "correct"),
        ("\\boxed{1{,}200}", 1.0, "correct"),
        ("\\boxed{\\$1\\,200 \\text{ dollars}}", 1.0, "correct"),
        ("\\boxed { 1200 }", 1.0, "correct"),
        ("\\boxed{\\text{1200 eggs}}", 1.0, "correct"),
        ("first \\boxed{7}, no: \\boxed{1200}", 1.0, "correct"),
        ("\\boxed{1200} and again: end with \\boxed{}", 1.0, "correct"),
        ("\\boxed{x = \\boxed{1200}}", 1.0, "correct"),
        ("{1, 2 and \\boxed{1200}", 1.0, "correct"),
        ("\\{ \\boxed{1200} \\}", 1.0, "correct"),
        ("ANSWER: 1200", 1.0, "correct"),
        ("answer: 3\n**Answer:** $1,200", 1.0, "correct"),
        ("ANSWER: 3\n\\boxed{1200}", 1.0, "correct"),
        ("\\boxed{1200}\nANSWER: 3", 1.0, "correct"),
        ("\\boxed{12", 0.0, "no_answer"),
        ("\\boxed{1200}\n\\boxed{3}", 0.0, "wrong_answer"),
        ("\\boxed{1200.0}", 0.0, "wrong_answer"),
        ("\\boxed{+1200}", 0.0, "wrong_answer"),
        ("\\boxed{−1200}", 0.0, "wrong_answer"),
        ("\\boxed{12001}", 0.0, "wrong_answer"),
        ("\\boxed{\\frac{2400}{2}}", 0.0, "wrong_answer"),
        ("\\boxed{many}", 0.0, "format_error"),
        ("\\boxed{１２００}", 0.0, "format_error"),
        ("\\boxed{١٢٠٠}", 0.0, "format_error"),
        ("\\boxed{NaN}", 0.0, "format_error"),
        ("\\boxed{\\infty}", 0.0, "format_error"),
        ("\\boxed{}", 0.0, "no_answer"),
        ("\\fbox{1200}", 0.0, "no_answer"),
        ("#### 1200", 0.0, "no_answer"),
        ("1200", 0.0, "no_answer"),
        ("the answer: is nigh\nThe answer 1200", 0.0, "no_answer"),
        ("", 0.0, "no_answer"),
        (None, 0.0, "no_answer"),
    ],
)
def test_the_last_box_else_the_last_answer_line_decides(
    folder: Path, content: str | None, reward: float, verdict: str
) -> None:
    score = recipe(folder).score(TASK, [{"role": "assistant", "content": content}])
    assert (score.reward, score.verdict) == (reward, verdict)


def test_a_conversation_that_ends_with_another_role_has_no_answer(folder: Path) -> None:
    assert recipe(folder).score(TASK, [{"role": "tool", "content": "\\boxed{1200}"}]).verdict == "no_answer"


@pytest.mark.parametrize(("content", "reward"), [("1200.00", 1.0), ("1.2e3", 1.0), ("+1200", 1.0), ("1201", 0.0)])
def test_numbers_may_be_compared_by_value(folder: Path, content: str, reward: float) -> None:
    by_value = recipe(folder, equality="value")
    assert by_value.score(TASK, [{"role": "assistant", "content": f"\\boxed{{{content}}}"}]).reward == reward


@given(st.text(alphabet="\\boxed{}ANSWER: \n$,.-+eE0123456789٤#*_!;", max_size=400))
def test_whatever_a_reply_holds_has_an_answer_or_none_and_every_number_can_be_compared(reply: str) -> None:
    for text in (reply, f"\\boxed{{{reply}}}", f"ANSWER: {reply}"):
        answer = final_answer(text)
        number = None if answer is None else number_text(answer)
        assert number is None or equal_in_value(number, number)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "reply",
    [
        "\\boxed{" * 200_000,
        "\\boxed{" * 100_000 + "1" + "}" * 100_000,
        ("\\boxed" + " " * 1000) * 1000,
        "\n" * 1_000_000,
        "* " * 500_000,
        "answer" * 200_000,
        "\\" * 1_000_000,
        "ANSWER: " + "1." * 500_000,
        "\\boxed{" + "1" * 1_000_000 + "}",
        "\\boxed{1e" + "9" * 90 + "}",
        ("{ " * 1000 + "} " * 1000) * 200,
    ],
    ids=range(11),
)
def test_a_reply_of_a_million_characters_is_scored_at_once(folder: Path, reply: str) -> None:
    """A form that cost the square of its length would not end within the test's time limit."""
    assert recipe(folder, equality="value").score(TASK, [{"role": "assistant", "content": reply}]).reward == 0.0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("not json\n", "line 1 is not JSON"),
        ('{"question": "?"}\n', "line 1 lacks the texts question and answer"),
        ("[]\n", "line 1 lacks the texts"),
        ('{"question": "?", "answer": "none"}\n', "line 1 has no number after ####"),
        ('{"question": "?", "answer": "#### many"}\n', "line 1 has no number after ####"),
        ("", "line 1 is not JSON"),
        (line(1) + "\n" + line(2), "line 2 is not JSON"),
    ],
)
def test_a_line_that_is_no_problem_is_named(folder: Path, text: str, says: str) -> None:
    (folder / "test.jsonl").write_text(text)
    with pytest.raises(ConfigurationError, match=says) as raised:
        recipe(folder).eval_tasks(1)
    assert "test.jsonl" in raised.value.message
    assert "\n" not in raised.value.message


def test_wrong_folders_and_settings_are_one_line(folder: Path) -> None:
    for data in (None, folder / "nowhere"):
        with pytest.raises(ConfigurationError, match=r"set rollouts\.data to a folder"):
            Gsm8kRecipe(data)
    with pytest.raises(ConfigurationError, match="did you mean 'eval_shots'"):
        Gsm8kRecipe(folder, {"evalshots": 3})
    with pytest.raises(ConfigurationError, match="'train' is none of test, validation"):
        Gsm8kRecipe(folder, {"split": "train"})
    with pytest.raises(ConfigurationError, match="must not be negative"):
        Gsm8kRecipe(folder, {"eval_shots": -1})
    with pytest.raises(ConfigurationError, match="none is left to train on"):
        Gsm8kRecipe(folder).train_tasks(0, 0, 1)
