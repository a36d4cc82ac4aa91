"""What every agent program shares: the jobs on its command line, run side by side, and one line of JSON about them.

A program is started as `python PROGRAM.py '[{"mode": …, "base_url": …, "api_key": …, "ask": …}, …]'` in the
environment of its client. For every job the line says what the mode saw, or the error that it raised as its client
shows errors.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
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


MARK = "outcomes: "
"""Before the line, which clients' own talk may surround."""

Mode = Callable[[Job], Any]
"""What a client does with a job: a function, which gets a thread, or a coroutine function."""


def run(modes: Mapping[str, Mode], *, one_by_one: bool = False) -> None:
    """Run all jobs of the command line side by side, those of coroutine functions in one event loop.

    one_by_one: in turn, for a client that imports parts of itself while it works, in several threads at once, and asks
    again where that fails.
    """
    import_openai_whole()
    jobs = [Job(**fields) for fields in json.loads(sys.argv[1])]
    groups = [[job] for job in jobs] if one_by_one else [jobs]
    outcomes = [outcome for group in groups for outcome in asyncio.run(run_all(modes, group))]
    sys.stdout.write(MARK + json.dumps([told(outcome) for outcome in outcomes]) + "\n")
    sys.stdout.flush()
    os._exit(0)  # what clients' background threads still do or say is not waited for


def import_openai_whole() -> None:
    """Import what OpenAI's client, where a program has it, would import in the threads of several jobs at once."""
    # Its resources import one another, which ends in a deadlock error where threads begin at different ones; and it
    # takes httpx2 from sys.modules while another thread (LiteLLM's first call with tools) is still importing it.
    if "openai" in sys.modules:
        for name in ("openai.resources.chat", "openai.resources.responses", "httpx2"):
            if importlib.util.find_spec(name) is not None:
                importlib.import_module(name)


async def run_all(modes: Mapping[str, Mode], jobs: list[Job]) -> list[Any]:
    """What each job returned or raised."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        loop = asyncio.get_running_loop()
        return await asyncio.gather(
            *(
                mode(job) if inspect.iscoroutinefunction(mode) else loop.run_in_executor(pool, mode, job)
                for job, mode in ((job, modes[job.mode]) for job in jobs)
            ),
            return_exceptions=True,
        )


def told(outcome: Any) -> dict[str, Any]:
    """What was seen, or what was raised: the names of its classes, its text, and what clients add to it."""
    if not isinstance(outcome, BaseException):
        return {"saw": outcome}
    added = {name: getattr(outcome, name, None) for name in ("status_code", "code")}
    return {
        "raised": [f"{kind.__module__.partition('.')[0]}.{kind.__name__}" for kind in type(outcome).__mro__],
        "message": str(outcome),
        **{name: value for name, value in added.items() if isinstance(value, int | str)},
    }


PARAMETERS = {"type": "object", "properties": {"step": {"type": "integer"}}, "required": ["step"]}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look there.", "parameters": PARAMETERS}}


def look(arguments: str) -> str:
    """What the tool finds, for the JSON text of a call's arguments."""
    return f"found-{json.loads(arguments)['step']}"
