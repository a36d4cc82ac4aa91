"""What every agent program shares: the jobs on its command line, run side by side, and one line of JSON about them.

A program is started as `python PROGRAM.py '[{"mode": …, "base_url": …, "api_key": …, "ask": …}, …]'` in the environment of
its client. For every job the line says what the mode saw, or the error that it raised as its client shows errors.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Job:
    """One conversation. retries: how often the client may try again by itself; None leaves the client's default."""

    mode: str
    base_url: str
    api_key: str
    ask: str
    max_tokens: int | None = None
    retries: int = 0
    timeout_seconds: float = 60.0

    @property
    def limit(self) -> dict[str, int]:
        """`max_tokens` as a keyword, where there is a limit."""
        return {} if self.max_tokens is None else {"max_tokens": self.max_tokens}


Mode = Callable[[Job], Any]


def run(modes: Mapping[str, Mode]) -> None:
    """Run all jobs of the command line, each in a thread of its own."""
    jobs = [Job(**fields) for fields in json.loads(sys.argv[1])]
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [pool.submit(modes[job.mode], job) for job in jobs]
    sys.stdout.write(json.dumps([outcome(future) for future in futures]) + "\n")


def outcome(future: Future[Any]) -> dict[str, Any]:
    """What was seen, or what was raised: the names of its classes, its text, and what clients add to it."""
    error = future.exception()
    if error is None:
        return {"saw": future.result()}
    told = {name: getattr(error, name, None) for name in ("status_code", "code")}
    return {
        "raised": [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(error).__mro__],
        "message": str(error),
        **{name: value for name, value in told.items() if isinstance(value, int | str)},
    }


PARAMETERS = {"type": "object", "properties": {"step": {"type": "integer"}}, "required": ["step"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PARAMETERS}}


def look(arguments: str) -> str:
    """What the tool finds, for the JSON text of a call's arguments."""
    return f"found-{json.loads(arguments)['step']}"
