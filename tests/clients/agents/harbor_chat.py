"""Harbor's chat layer: its LiteLLM class and its Chat, collecting rollout details as its trainers' integrations do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from harbor.llms.chat import Chat
from harbor.llms.lite_llm import LiteLLM
from job import Job, run

LIMITS = {"max_input_tokens": 16_384, "max_output_tokens": 1_024}
COSTS = {"input_cost_per_token": 0.0, "output_cost_per_token": 0.0}
PROMPTS = ("Say one.", "Say two.", "Say three.", "Say four.", "Say five.")


def converse(model: str, **options: Any) -> Callable[[Job], Awaitable[dict[str, Any]]]:
    """The job's question, then PROMPTS; what was said, and the rollout details."""

    async def chat(job: Job) -> dict[str, Any]:
        llm = LiteLLM(
            model_name=model,
            api_base=job.base_url,
            api_key=job.api_key,
            collect_rollout_details=True,
            model_info={**LIMITS, **COSTS},
            **options,
        )
        talk = Chat(llm, interleaved_thinking=options.get("interleaved_thinking", False))
        extra = {} if options.get("use_responses_api") else {"extra_body": {"return_routed_experts": True}}
        replies = [await talk.chat(prompt, **extra, **job.limit) for prompt in (job.ask, *PROMPTS[1:])]
        return {"said": [reply.content for reply in replies], "rollout_details": talk.rollout_details}

    return chat


if __name__ == "__main__":
    run(
        {
            "openai": converse("openai/any"),
            "hosted_vllm": converse("hosted_vllm/any"),
            "responses": converse("openai/any", use_responses_api=True),
        },
        one_by_one=True,
    )
