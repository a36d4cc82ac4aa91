"""vLLM's wire format, both ways: bodies of `/inference/v1/generate` and `/v1/completions` → checked requests, and a
`Generation` → the events that vLLM 0.30 streams.

Requests are rewritten into SGLang's words and checked by `protocol.py`. As in vLLM, sampling parameters that nobody
knows are ignored, an event holds what is new, and the last event of an aborted request is left out.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pybase64
from tokenizers import Tokenizer

from engines.embedded.protocol import GenerateCall, GenerateInput, ModelLimits, read_generate
from engines.embedded.scheduler import Generation
from gateway.contracts.errors import InvalidRequest
from gateway.contracts.experts import expert_dtype
from gateway.contracts.generation import LogprobKind

VLLM_VERSION = "0.30.0"
"""Whose protocol this is."""

MAX_LOGPROBS = 20
"""vLLM's, unless it is started with another limit."""

_SAMPLING = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "stop": "stop",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
    "skip_special_tokens": "skip_special_tokens",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "repetition_penalty": "repetition_penalty",
    "logit_bias": "logit_bias",
    "stream_interval": "stream_interval",
}
"""vLLM's names → SGLang's."""


def vllm_config(limits: ModelLimits, *, path: Path, kind: LogprobKind) -> dict[str, Any]:
    """The part of vLLM's configuration that clients read."""
    return {
        "model_config": {
            "model": str(path),
            "tokenizer": str(path),
            "max_model_len": limits.context_length,
            "max_logprobs": MAX_LOGPROBS,
            "enable_return_routed_experts": limits.captures_experts,
            "logprobs_mode": "raw_logprobs" if kind is LogprobKind.RAW else "processed_logprobs",
        },
        "device_config": {"device": "cpu"},
    }


def read_tokens_call(body: Any, limits: ModelLimits, tokenizer: Tokenizer | None) -> GenerateCall:
    """Check a body of `/inference/v1/generate`; raises InvalidRequest or ContextOverflow."""
    if not isinstance(body, dict) or not isinstance(body.get("sampling_params"), dict):
        raise InvalidRequest("token_ids and sampling_params are required")
    sampling = body["sampling_params"]
    request = {
        "rid": f"generate-tokens-{body.get('request_id') or uuid.uuid4().hex}",
        "input_ids": body.get("token_ids"),
        "stream": body.get("stream"),
        "return_routed_experts": True,
        "routed_experts_start_len": sampling.get("routed_experts_prompt_start") or 0,
    }
    return _checked(request, sampling, limits, tokenizer)


def read_completions_call(body: Any, limits: ModelLimits, tokenizer: Tokenizer | None) -> GenerateCall:
    """Check a body of `/v1/completions`, one prompt of text or ids; raises InvalidRequest or ContextOverflow."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    prompt = body.get("prompt")
    request = {
        "rid": f"cmpl-{body.get('request_id') or uuid.uuid4().hex}-0",
        "text" if isinstance(prompt, str) else "input_ids": prompt,
        "stream": body.get("stream"),
    }
    return _checked(request, {"max_tokens": 16} | body, limits, tokenizer)


def _checked(
    request: dict[str, Any], sampling: Mapping[str, Any], limits: ModelLimits, tokenizer: Tokenizer | None
) -> GenerateCall:
    if sampling.get("structured_outputs") is not None:
        raise InvalidRequest("the embedded engine does not implement structured_outputs")
    known = {ours: sampling[theirs] for theirs, ours in _SAMPLING.items() if sampling.get(theirs) is not None}
    if known.get("top_k") == 0:
        known["top_k"] = -1
    ids = request.get("input_ids")
    if "max_new_tokens" not in known and isinstance(ids, list):
        known["max_new_tokens"] = max(1, limits.context_length - len(ids))
    number = sampling.get("logprobs")
    if number is not None:
        if type(number) is not int or not 0 <= number <= MAX_LOGPROBS:
            raise InvalidRequest(f"Requested sample logprobs of {number}, which is not between 0 and {MAX_LOGPROBS}")
        request |= {"return_logprob": True, "top_logprobs_num": number}
    call = read_generate(request | {"sampling_params": known}, limits, tokenizer)
    return replace(call, inputs=tuple(map(_with_kept_set_logprobs, call.inputs)))


def _with_kept_set_logprobs(asked: GenerateInput) -> GenerateInput:
    """What `processed_logprobs` means in vLLM; with raw log-probs only the order of filters is left of it."""
    return replace(asked, settings=replace(asked.settings, kept_set_logprobs=True))


class TokensEvents:
    """Events of `/inference/v1/generate` for one request."""

    def __init__(self, generation: Generation, body: Mapping[str, Any], *, num_experts: int) -> None:
        self._generation = generation
        self._request_id = generation.rid
        self._wants_logprobs = body["sampling_params"].get("logprobs") is not None
        self._num_logprobs = int(body["sampling_params"].get("logprobs") or 0)
        self._wants_prompt = bool(body.get("return_token_ids"))
        self._num_experts = num_experts

    def event(self, text: str, fresh: slice, finish: str | None) -> dict[str, Any]:
        """With the output tokens of `fresh`; `text` is not shown here."""
        token_ids = _output(self._generation, fresh)
        logprobs: list[dict[str, Any]] = [
            {**entry, "top_logprobs": [_entry(*top) for top in list(row.items())[: max(self._num_logprobs, 1)]]}
            for entry, row in zip(
                map(_entry, token_ids, self._generation.logprobs[fresh]),
                _rows(self._generation, fresh),
                strict=True,
            )
        ]
        choice = {
            "index": 0,
            "logprobs": {"content": logprobs} if self._wants_logprobs else None,
            "finish_reason": finish,
            "token_ids": token_ids,
            "routed_experts": self._routed_experts() if finish else None,
            "sampling_mask": None,
        }
        event: dict[str, Any] = {"request_id": self._request_id, "choices": [choice], "usage": None}
        if self._wants_prompt and fresh.start == 0:
            event["prompt_token_ids"] = self._generation.token_ids[: self._generation.prompt_length]
        return event

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The event that counts, after all others."""
        return {"request_id": self._request_id, "choices": [], "usage": usage}

    def _routed_experts(self) -> str | None:
        rows = self._generation.routed_experts
        if rows is None:
            return None
        file = io.BytesIO()
        np.save(file, rows.astype(expert_dtype(self._num_experts)))
        return pybase64.b64encode(file.getvalue()).decode()


class CompletionsEvents:
    """Events of `/v1/completions` for one request."""

    def __init__(self, generation: Generation, body: Mapping[str, Any], *, model: str) -> None:
        self._generation = generation
        self._head = {
            "id": generation.rid.removesuffix("-0"),
            "object": "text_completion",
            "created": 0,
            "model": model,
        }
        self._wants_logprobs = body.get("logprobs") is not None
        self._wants_ids = bool(body.get("return_token_ids"))

    def event(self, text: str, fresh: slice, finish: str | None) -> dict[str, Any]:
        """With the output tokens of `fresh`, which read `text`."""
        generation = self._generation
        token_ids = _output(generation, fresh)
        ended = generation.finish or {}
        choice: dict[str, Any] = {
            "index": 0,
            "text": text,
            "logprobs": None,
            "finish_reason": finish,
            "stop_reason": ended.get("matched"),
        }
        if self._wants_logprobs:
            tokens = [f"token_id:{token}" for token in token_ids]
            rows = [{f"token_id:{token}": value for token, value in row.items()} for row in _rows(generation, fresh)]
            logprobs = generation.logprobs[fresh]
            choice["logprobs"] = {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": rows}
        if self._wants_ids:
            first = generation.token_ids[: generation.prompt_length] if fresh.start == 0 else None
            choice |= {"prompt_token_ids": first, "token_ids": token_ids}
        return self._head | {"choices": [choice]}

    def usage(self, usage: Mapping[str, int]) -> dict[str, Any]:
        """The event that counts, after all others."""
        return self._head | {"choices": [], "usage": usage}


def _entry(token: int, logprob: float) -> dict[str, Any]:
    return {"token": f"token_id:{token}", "logprob": logprob, "bytes": None}


def _rows(generation: Generation, fresh: slice) -> list[dict[int, float]]:
    """As vLLM keeps them: the sampled token first, then the likeliest, each once."""
    sampled = zip(_output(generation, fresh), generation.logprobs[fresh], strict=True)
    return [dict([one, *tops]) for one, tops in zip(sampled, generation.top_logprobs[fresh], strict=True)]


def _output(generation: Generation, fresh: slice) -> Sequence[int]:
    first = generation.prompt_length
    return generation.token_ids[first + fresh.start : first + fresh.stop]
