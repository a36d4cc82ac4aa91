"""Conversations that a tiny model learns by heart, and what transformers says of their tokens.

A random model never closes a JSON object; one that was trained on a few transcripts repeats them word for word, so a
whole tool conversation runs on it: reasoning, one call, two calls at once, answers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from gateway.contracts.generation import JsonValue
from tests.integration.gateway.conftest import RunningGateway
from trainer.recipes.checkpoint import TinyMoeShape, make_checkpoint
from trainer.recipes.warmup import WarmupSettings, warm_up

STEPS = 120
ROW_TOLERANCE = 0.005
"""Share of routing rows that may differ: experts of nearly equal weight change places in another summation order."""


def _function(name: str, argument: str) -> JsonValue:
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def _call(name: str, **arguments: str) -> JsonValue:
    return {"type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def _user(text: str) -> JsonValue:
    return {"role": "user", "content": text}


def _tool(text: str) -> JsonValue:
    return {"role": "tool", "content": text}


def _assistant(content: str | None, *calls: JsonValue, reasoning: str | None = None) -> dict[str, JsonValue]:
    message: dict[str, JsonValue] = {"role": "assistant", "content": content}
    if reasoning is not None:
        message["reasoning_content"] = reasoning
    return message | ({"tool_calls": list(calls)} if calls else {})


TOOLS = [_function("weather", "city"), _function("calculator", "expression")]
TRANSCRIPTS: list[list[JsonValue]] = [
    [
        _user("What is the weather in Oslo?"),
        _assistant(None, _call("weather", city="Oslo"), reasoning="I must look."),
        _tool("rain, 7 degrees"),
        _assistant("It rains in Oslo, at 7 degrees.", reasoning="Now I know."),
        _user("And in Rome and Paris?"),
        _assistant(None, _call("weather", city="Rome"), _call("weather", city="Paris")),
        _tool("sun, 21 degrees"),
        _tool("fog, 12 degrees"),
        _assistant("Rome has sun at 21 degrees, Paris fog at 12."),
    ],
    [
        _user("What is 12*7?"),
        _assistant("Let me see.", _call("calculator", expression="12*7")),
        _tool("84"),
        _assistant("12*7 is 84."),
        _user("Thank you!"),
        _assistant("You are welcome.", reasoning="No tool is needed."),
    ],
]


def memorised_checkpoint(folder: Path) -> Path:
    """A small Qwen3-MoE that knows TRANSCRIPTS by heart. Its heads have the 32 dimensions that vLLM needs on a CPU."""
    torch.set_num_threads(1)
    corpus = [json.dumps([transcript, TOOLS], ensure_ascii=False) for transcript in TRANSCRIPTS]
    make_checkpoint(folder, corpus=corpus, seed=0, shape=TinyMoeShape())
    losses: list[float] = []
    settings = WarmupSettings(steps=STEPS, batch_size=len(TRANSCRIPTS))
    warm_up(
        folder,
        TRANSCRIPTS * STEPS,
        tools=TOOLS,
        seed=0,
        settings=settings,
        on_step=lambda _, loss: losses.append(loss),
    )
    assert losses[-1] < 0.02, f"not learnt by heart: loss {losses[-1]:.3f}"
    return folder


def repeat_transcript(gateway: RunningGateway, session_id: str, transcript: Sequence[JsonValue], **fields: Any) -> None:
    """Say the user's and the tools' lines; assert that the model says its own, parsed."""
    messages: list[Any] = []
    calls: list[str] = []
    for expected in transcript:
        if expected["role"] == "assistant":
            body = {"messages": messages, "tools": TOOLS, "temperature": 0} | fields
            choice = gateway.post(f"/sessions/{session_id}/v1/chat/completions", body)["choices"][0]
            message = choice["message"]
            assert spoken(message) == spoken(expected)
            assert choice["finish_reason"] == ("tool_calls" if "tool_calls" in expected else "stop")
            messages.append(message)
            calls = [call["id"] for call in message.get("tool_calls") or []]
        elif expected["role"] == "tool":
            messages.append(expected | {"tool_call_id": calls.pop(0)})
        else:
            messages.append(expected)


def spoken(message: JsonValue) -> JsonValue:
    """What of an assistant's message the model itself wrote."""
    calls = [call["function"] for call in message.get("tool_calls") or []]
    named = [(call["name"], json.loads(call["arguments"])) for call in calls]
    return message["content"] or None, message.get("reasoning_content"), named


class Reference:
    """A plain transformers forward of the same checkpoint, float32."""

    def __init__(self, checkpoint: Path) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def score(
        self, token_ids: Sequence[int], *, temperature: float = 1.0
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
        """Log-probs float32[T-1] of tokens 1 to T-1; experts int64[T-1, layers, top_k] of tokens 0 to T-2, sorted."""
        with torch.inference_mode():
            output = self._model(torch.tensor([list(token_ids)]), output_router_logits=True)
            scaled = torch.log_softmax(output.logits[0, :-1].double() / temperature, dim=-1)
            chosen = scaled.gather(-1, torch.tensor(list(token_ids[1:]))[:, None])[:, 0]
            top_k = self._model.config.num_experts_per_tok
            layers = [logits.reshape(len(token_ids), -1).topk(top_k).indices for logits in output.router_logits]
        return chosen.float().numpy(), np.sort(torch.stack(layers, dim=1)[:-1].numpy(), axis=-1)

    def check_likeliest(
        self, prompt: Sequence[int], output: Sequence[int], rows: Sequence[Sequence[Any]], *, temperature: float = 1.0
    ) -> None:
        """I2: the likeliest tokens of each output position, rows of (id, log-prob), are the model's own within 1e-4."""
        with torch.inference_mode():
            logits = self._model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1].double()
        logprobs = torch.log_softmax(logits / temperature, dim=-1)
        assert len(rows) == len(output) > 0
        for own, row in zip(logprobs, rows, strict=True):
            values = [logprob for _, logprob in row]
            np.testing.assert_allclose(values, own.topk(len(row)).values, atol=1e-4)
            np.testing.assert_allclose(values, own[[token_id for token_id, _ in row]], atol=1e-4)

    def check_segment(self, segment: Any, *, temperature: float = 1.0) -> None:
        """I1, I2: what the gateway would give a trainer is what the model computes on those tokens."""
        token_ids = segment["token_ids"]
        logprobs, experts = self.score(token_ids, temperature=temperature)
        trained = np.array(segment["loss_mask"], dtype=bool)
        recorded = np.array(segment["rollout_logprobs"], dtype=np.float32)
        assert trained.any()
        np.testing.assert_allclose(recorded[trained], logprobs[trained[1:]], atol=1e-4)
        assert segment["num_routed_rows"] == len(token_ids) - 1
        check_rows(np.array(segment["routed_experts"]), experts)


def check_rows(recorded: npt.NDArray[Any], experts: npt.NDArray[np.int64]) -> None:
    """Expert rows equal to the router's, near-ties excepted."""
    assert recorded.shape == experts.shape
    differing = (np.sort(recorded.astype(np.int64), axis=-1) != experts).any(axis=(1, 2))
    assert differing.mean() <= ROW_TOLERANCE, f"{differing.sum()} of {len(differing)} routing rows differ"
