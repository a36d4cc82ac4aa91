"""mini-swe-agent: its own agent, model classes, configurations and local environment, in a folder of its own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from job import Job, run
from minisweagent.agents.default import AgentConfig, DefaultAgent
from minisweagent.config import get_config_from_spec
from minisweagent.environments.local import LocalEnvironment
from minisweagent.models.litellm_model import LitellmModel
from minisweagent.models.litellm_textbased_model import LitellmTextbasedModel


def tools(job: Job) -> dict[str, Any]:
    """Actions are tool calls (the default)."""
    return solve(job, "mini", LitellmModel)


def text(job: Job) -> dict[str, Any]:
    """Actions are code blocks."""
    return solve(job, "mini_textbased", LitellmTextbasedModel)


def solve(job: Job, config_name: str, model_class: type[LitellmModel]) -> dict[str, Any]:
    """One run; what it ended with, what was printed, and what it left in its folder."""
    config = get_config_from_spec(config_name)
    model = config["model"]
    model["model_kwargs"] |= {"api_base": job.base_url, "api_key": job.api_key, **job.limit}
    with tempfile.TemporaryDirectory() as folder:
        environment = LocalEnvironment(cwd=folder, **config["environment"])
        known = {name: value for name, value in config["agent"].items() if name in AgentConfig.model_fields}
        agent = DefaultAgent(model_class(model_name="openai/any", **model), environment, **known)
        ending = agent.run(job.ask)
        left = {path.name: path.read_text() for path in Path(folder).iterdir()}
    printed = [message["extra"]["raw_output"] for message in agent.messages if "raw_output" in message.get("extra", {})]
    return {"exit_status": ending["exit_status"], "calls": agent.n_calls, "printed": printed, "left": left}


if __name__ == "__main__":
    run({"tools": tools, "text": text})
