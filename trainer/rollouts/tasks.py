"""What one attempt is about, and what it was worth, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.contracts.generation import JsonValue


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to attempt: the messages that an agent starts with, and what the reward compares with.

    `task_id` is stable across runs; `facts` is the recipe's own JSON and is recorded with each session.

    >>> Task("train/17", ({"role": "user", "content": "48/2"},), {"answer": "24"}).task_id
    'train/17'
    """

    task_id: str
    messages: tuple[JsonValue, ...]
    facts: JsonValue


class Verdict(StrEnum):
    """Kinds of right and wrong that several recipes share; a recipe may have words of its own beside them.

    CORRECT is what pass@1 counts. WRONG_ANSWER: readable, and another than the true one (an error of logic).
    FORMAT_ERROR: an answer stands where one is asked for, but nothing in it can be compared. NO_ANSWER: none stands.
    TOOL_ERROR: not correct, and the last tool call was answered with an error. TRUNCATED: not correct, and cut at its
    limit of tokens or turns (given by the controller, whatever the recipe says).
    """

    CORRECT = "correct"
    WRONG_ANSWER = "wrong_answer"
    FORMAT_ERROR = "format_error"
    NO_ANSWER = "no_answer"
    TOOL_ERROR = "tool_error"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True)
class Score:
    """What a conversation is worth to the trainer, and which kind of right or wrong it is (a `Verdict`, or a word).

    >>> Score(1.0, Verdict.CORRECT).verdict
    <Verdict.CORRECT: 'correct'>
    """

    reward: float
    verdict: str
