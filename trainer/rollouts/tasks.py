"""What one attempt is about, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

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
