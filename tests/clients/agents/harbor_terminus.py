"""Harbor's terminus-2 agent: its own loop, hand-off and unwinding, on a real shell in a folder of its own.

Terminus-2 types into tmux inside a container; here its session is a shell on a pipe, which needs neither.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from harbor.agents.terminus_2 import Terminus2
from harbor.models.agent.context import AgentContext
from job import Job, run

COSTS = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0, "max_output_tokens": 16_384}
SCREEN_LINES = 5
MAX_TURNS = 20
MARK = "all-that-was-printed"


class Shell:
    """A terminal as terminus-2 uses one: keys in, text out."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._printed: list[str] = []
        self._num_shown = 0

    @classmethod
    async def open(cls, folder: str) -> Shell:
        """A shell in `folder`."""
        pipe = asyncio.subprocess.PIPE
        return cls(
            await asyncio.create_subprocess_exec(
                "sh",
                cwd=folder,
                stdin=pipe,
                stdout=pipe,
                stderr=asyncio.subprocess.STDOUT,
                env={"PATH": os.environ["PATH"]},
            )
        )

    async def send_keys(self, keys: str, *, block: bool, min_timeout_sec: float) -> None:
        """Type, and wait until what was typed has run."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{keys}\necho {MARK}\n".encode())
        while (line := (await self._process.stdout.readline()).decode()) not in ("", f"{MARK}\n"):
            self._printed.append(line)

    async def get_incremental_output(self) -> str:
        """What was printed since the last look."""
        new, self._num_shown = self._printed[self._num_shown :], len(self._printed)
        return "New Terminal Output:\n" + "".join(new)

    async def capture_pane(self, *, capture_entire: bool) -> str:
        """The last lines."""
        return "".join(self._printed if capture_entire else self._printed[-SCREEN_LINES:])

    async def is_session_alive(self) -> bool:
        """Whether the shell still runs."""
        return self._process.returncode is None

    async def close(self) -> None:
        """End it."""
        self._process.terminate()
        await self._process.wait()


def solve(model: str, *, max_input_tokens: int, **options: Any) -> Callable[[Job], Awaitable[dict[str, Any]]]:
    """One run; what it was made of."""

    async def play(job: Job) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            agent = Terminus2(
                logs_dir=Path(folder),
                model_name=model,
                api_base=job.base_url,
                collect_rollout_details=True,
                model_info={**COSTS, "max_input_tokens": max_input_tokens},
                llm_kwargs={"api_key": job.api_key},
                llm_call_kwargs={"extra_body": {"return_routed_experts": True}, **job.limit},
                max_turns=MAX_TURNS,
                suppress_max_turns_warning=True,
                **options,
            )
            shell = await Shell.open(folder)
            agent._session = shell
            context = AgentContext()
            try:
                await agent.run(job.ask, None, context)
            finally:
                await shell.close()
        return {"rollout_details": context.rollout_details, "metadata": context.metadata}

    return play


if __name__ == "__main__":
    # A model has a name of its own in each mode: LiteLLM keeps what it is told of a model for the whole process.
    run(
        {
            "linear": solve("hosted_vllm/linear", max_input_tokens=100_000),
            "interleaved": solve("openai/interleaved", max_input_tokens=100_000, interleaved_thinking=True),
            "handoff": solve("hosted_vllm/handoff", max_input_tokens=10_000),
            "overflow": solve("openai/overflow", max_input_tokens=8_000, proactive_summarization_threshold=0),
        }
    )
