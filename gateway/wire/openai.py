"""OpenAI's chat completions: bytes → ChatRequest, and pieces of a turn → `chat.completion` or its chunks.

What we know is typed; unknown top-level fields go on to the engine as they are (I8), and unknown keys inside messages
and tools stay in place. No field of a request can switch off or forge what is recorded (I7): fields that would, are
left out of what the engine gets and named in `ignored_fields`.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pybase64

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import JsonValue, SamplingParams, TokenIds
from gateway.wire.json_text import dump_json, load_json_object

_SAMPLING_EXTRA = frozenset(
    (
        "custom_params", "ebnf", "frequency_penalty", "json_schema", "logit_bias", "min_new_tokens", "min_tokens",
        "presence_penalty", "regex", "repetition_penalty", "stop_regex", "structural_tag",
    )
)  # fmt: skip
"""Sampling fields that engines know and we do not interpret."""

_KNOWN = frozenset(
    (
        "chat_template_kwargs", "documents", "ignore_eos", "logprobs", "max_completion_tokens", "max_tokens",
        "messages", "min_p", "model", "n", "parallel_tool_calls", "reasoning_effort", "response_format",
        "return_routed_experts", "return_token_ids", "seed", "stop", "stop_token_ids", "stream", "stream_options",
        "temperature", "tool_choice", "tools", "top_k", "top_logprobs", "top_p",
    )
)  # fmt: skip

_PROTECTED = frozenset(
    (
        "bootstrap_host", "bootstrap_port", "bootstrap_room", "input_embeds", "input_ids", "logprob_start_len",
        "lora_path", "max_new_tokens", "prompt_token_ids", "return_indexer_topk", "return_logprob",
        "return_prompt_token_ids", "return_text_in_logprobs", "rid", "routed_experts_start_len", "sampling_params",
        "sampling_seed", "session_id", "session_params", "skip_special_tokens", "text", "token_ids_logprob",
        "top_logprobs_num", "weight_version",
    )
)  # fmt: skip
"""Fields of the engines' own requests, which the gateway alone may set (I7)."""

_ALIASES = {"max_completion_tokens": "max_new_tokens", "max_tokens": "max_new_tokens"}
_MAX_STOP_STRINGS = 16
_MAX_CHOICES = 128
_MAX_NESTING = 200

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What of the captured arrays the client asked to see; what is recorded does not depend on it (I7)."""

    token_ids: bool
    routed_experts: bool
    logprobs: bool
    usage_chunk: bool


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One chat completion as asked.

    sampling: normalised names (`max_new_tokens`, `temperature`, …) → values, only those that the request has.
    template_arguments: `chat_template_kwargs`, `reasoning_effort` and `documents`. digest: sha256 hex of the body.
    """

    model: str | None
    messages: tuple[JsonValue, ...]
    tools: tuple[JsonValue, ...]
    calls_tools: bool
    template_arguments: Mapping[str, JsonValue]
    sampling: Mapping[str, JsonValue]
    num_choices: int
    stream: bool
    wanted: Wanted
    passthrough: Mapping[str, JsonValue]
    ignored_fields: tuple[str, ...]
    digest: str
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ReplyTokens:
    """Captured arrays of new tokens; `texts[i]` is what token i alone decodes to (needed for log-probs only)."""

    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one reply."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int

    def body(self) -> dict[str, JsonValue]:
        """As OpenAI spells it."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """One finished choice. `meta_info` holds the engine's own fields that we do not know (I8)."""

    message: Mapping[str, JsonValue]
    finish_reason: str
    tokens: ReplyTokens
    experts: RoutedExperts | None
    meta_info: Mapping[str, JsonValue]
    usage: Usage


def parse_chat_request(body: bytes) -> ChatRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    _check_nesting(fields)
    messages = _messages(fields)
    tools = _objects(fields, "tools")
    passthrough = {k: v for k, v in fields.items() if k not in _KNOWN | _SAMPLING_EXTRA | _PROTECTED}
    return ChatRequest(
        model=_optional(fields, "model", str),
        messages=messages,
        tools=tools,
        calls_tools=bool(tools) and fields.get("tool_choice") != "none",
        template_arguments=_template_arguments(fields),
        sampling=sampling_fields(fields),
        num_choices=_num_choices(fields),
        stream=_flag(fields, "stream"),
        wanted=_wanted(fields),
        passthrough=passthrough,
        ignored_fields=tuple(sorted(_PROTECTED & fields.keys())),
        digest=hashlib.sha256(body).hexdigest(),
        num_bytes=len(body),
    )


def sampling_fields(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The sampling fields of a request or of a session's overrides, under their normalised names, nulls left out."""
    sampling: dict[str, JsonValue] = {}
    for name in ("temperature", "top_p", "min_p"):
        if (number := _number(fields, name)) is not None:
            sampling[name] = number
    for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "top_k", "seed"):
        if (integer := _optional(fields, name, int)) is not None:
            sampling[_ALIASES.get(name, name)] = integer
    if fields.get("stop") is not None:
        sampling["stop"] = _stop_strings(fields["stop"])
    if fields.get("stop_token_ids") is not None:
        sampling["stop_token_ids"] = _stop_ids(fields["stop_token_ids"])
    if _flag(fields, "ignore_eos"):
        sampling["ignore_eos"] = True
    for name in _SAMPLING_EXTRA & fields.keys():
        if fields[name] is not None:
            sampling[name] = fields[name]
    return sampling | _constraint(fields.get("response_format"))


def sampling_params(sampling: Mapping[str, JsonValue], *, max_new_tokens: int) -> SamplingParams:
    """Typed sampling of normalised fields; raises InvalidRequest for an impossible value."""
    extra = {name: value for name, value in sampling.items() if name in _SAMPLING_EXTRA}
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=sampling.get("temperature", 1.0),
        top_p=sampling.get("top_p", 1.0),
        top_k=sampling.get("top_k", -1),
        min_p=sampling.get("min_p", 0.0),
        stop=tuple(sampling.get("stop", ())),
        stop_token_ids=tuple(sampling.get("stop_token_ids", ())),
        seed=sampling.get("seed"),
        ignore_eos=sampling.get("ignore_eos", False),
        extra=extra,
    )


def completion_body(
    reply_id: str, model: str, prompt_token_ids: TokenIds, choices: Sequence[Choice], wanted: Wanted
) -> dict[str, JsonValue]:
    """The whole reply; captured arrays are in it only where asked for (I7)."""
    body: dict[str, JsonValue] = {
        "id": reply_id,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice_body(i, choice, wanted) for i, choice in enumerate(choices)],
        "usage": _joint_usage(choices).body(),
    }
    if wanted.token_ids:
        body["prompt_token_ids"] = prompt_token_ids.tolist()
    return body


class ChunkWriter:
    """Writes one choice as `chat.completion.chunk` values; the caller frames and sends them."""

    def __init__(self, reply_id: str, model: str, wanted: Wanted) -> None:
        self._head = {
            "id": reply_id,
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": model,
        }
        self._wanted = wanted

    def opening(self, prompt_token_ids: TokenIds) -> dict[str, JsonValue]:
        """The first chunk: the role, and the prompt's ids if asked for."""
        chunk = self._chunk({"role": "assistant", "content": ""})
        if self._wanted.token_ids:
            chunk["prompt_token_ids"] = prompt_token_ids.tolist()
        return chunk

    def progress(self, deltas: Sequence[Mapping[str, JsonValue]], tokens: ReplyTokens) -> list[dict[str, JsonValue]]:
        """Chunks for new text; the first carries the new tokens' arrays, alone if the text is held back yet."""
        captured = _captured(tokens, self._wanted)
        if not deltas and not captured:
            return []
        chunks = [self._chunk(delta) for delta in deltas or ({},)]
        chunks[0]["choices"][0] |= captured
        return chunks

    def closing(self, choice: Choice) -> list[dict[str, JsonValue]]:
        """The last chunks: finish reason, then usage where asked for."""
        last = self._chunk({}, finish_reason=choice.finish_reason)
        last["choices"][0] |= _closing_fields(choice, self._wanted)
        if not self._wanted.usage_chunk:
            return [last]
        return [last, self._head | {"choices": [], "usage": choice.usage.body()}]

    def _chunk(self, delta: Mapping[str, JsonValue], *, finish_reason: str | None = None) -> dict[str, JsonValue]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._head | {"choices": [choice]}


def content_delta(text: str) -> dict[str, JsonValue]:
    """More visible text."""
    return {"content": text}


def reasoning_delta(text: str) -> dict[str, JsonValue]:
    """More reasoning text."""
    return {"reasoning_content": text}


def tool_call_delta(index: int, call_id: str | None, name: str | None, arguments: str) -> dict[str, JsonValue]:
    """More of one tool call; id, type and name come with its first delta only."""
    call: dict[str, JsonValue] = {"index": index, "function": {"arguments": arguments}}
    if call_id is not None:
        call |= {"id": call_id, "type": "function"}
    if name is not None:
        call["function"] = {"name": name, "arguments": arguments}
    return {"tool_calls": [call]}


def experts_body(experts: RoutedExperts) -> dict[str, JsonValue]:
    """Routing rows as `{data, dtype, shape, start}`: `data` is base64 of the stored small integers in C order."""
    little_endian = experts.ids.astype(experts.ids.dtype.newbyteorder("<"), copy=False)
    return {
        "data": pybase64.b64encode(little_endian.tobytes()).decode("ascii"),
        "dtype": experts.ids.dtype.name,
        "shape": list(experts.ids.shape),
        "start": experts.start,
    }


def _choice_body(index: int, choice: Choice, wanted: Wanted) -> dict[str, JsonValue]:
    body: dict[str, JsonValue] = {
        "index": index,
        "message": choice.message,
        "logprobs": None,
        "finish_reason": choice.finish_reason,
    }
    return body | _captured(choice.tokens, wanted) | _closing_fields(choice, wanted)


def _captured(tokens: ReplyTokens, wanted: Wanted) -> dict[str, JsonValue]:
    fields: dict[str, JsonValue] = {}
    if not len(tokens.token_ids):
        return fields
    if wanted.token_ids:
        fields["token_ids"] = tokens.token_ids.tolist()
    if wanted.logprobs:
        fields["logprobs"] = {"content": _logprob_entries(tokens), "refusal": None}
    return fields


def _logprob_entries(tokens: ReplyTokens) -> list[JsonValue]:
    return [
        {
            "token": text,
            "logprob": None if math.isnan(logprob) else logprob,  # I9: missing stays missing
            "bytes": list(text.encode()),
            "top_logprobs": [],
        }
        for text, logprob in zip(tokens.texts, tokens.logprobs.tolist(), strict=True)
    ]


def _closing_fields(choice: Choice, wanted: Wanted) -> dict[str, JsonValue]:
    fields: dict[str, JsonValue] = {}
    if wanted.routed_experts:
        fields["routed_experts"] = None if choice.experts is None else experts_body(choice.experts)
    if choice.meta_info:
        fields["meta_info"] = choice.meta_info
    return fields


def _joint_usage(choices: Sequence[Choice]) -> Usage:
    return Usage(
        prompt_tokens=choices[0].usage.prompt_tokens,
        completion_tokens=sum(choice.usage.completion_tokens for choice in choices),
        cached_tokens=choices[0].usage.cached_tokens,
        reasoning_tokens=sum(choice.usage.reasoning_tokens for choice in choices),
    )


def _messages(fields: Mapping[str, JsonValue]) -> tuple[JsonValue, ...]:
    """Messages of any shape that a template might read (I6); what it cannot read, it refuses in its own words."""
    messages = _objects(fields, "messages")
    if not messages:
        raise InvalidRequest("messages: at least one message is needed")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{i}].role: expected a string, got {_kind(message.get('role'))}")
        if isinstance(message.get("content"), int | float):
            raise InvalidRequest(f"messages[{i}].content: expected text or parts, got {_kind(message['content'])}")
    return messages


def _check_nesting(fields: Mapping[str, JsonValue]) -> None:
    """Raise InvalidRequest for a body nested so deep that what reads it would run out of stack somewhere later."""
    level: list[JsonValue] = [fields]
    for _ in range(_MAX_NESTING):
        children = [item.values() if isinstance(item, dict) else item for item in level]
        level = [value for values in children for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise InvalidRequest(f"the body is nested too deeply: at most {_MAX_NESTING} levels")


def _objects(fields: Mapping[str, JsonValue], name: str) -> tuple[JsonValue, ...]:
    values = fields.get(name)
    if values is None:
        return ()
    if not isinstance(values, list):
        raise InvalidRequest(f"{name}: expected a list, got {_kind(values)}")
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise InvalidRequest(f"{name}[{i}]: expected an object, got {_kind(value)}")
    return tuple(values)


def _template_arguments(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    arguments = fields.get("chat_template_kwargs")
    if not isinstance(arguments, dict | None):
        raise InvalidRequest(f"chat_template_kwargs: expected an object, got {_kind(arguments)}")
    named = {name: fields[name] for name in ("reasoning_effort", "documents") if fields.get(name) is not None}
    return named | (arguments or {})


def _wanted(fields: Mapping[str, JsonValue]) -> Wanted:
    options = fields.get("stream_options")
    if not isinstance(options, dict | None):
        raise InvalidRequest(f"stream_options: expected an object, got {_kind(options)}")
    token_ids = _flag(fields, "return_token_ids")
    refuses_logprobs = fields.get("logprobs") is False
    return Wanted(
        token_ids=token_ids,
        routed_experts=_flag(fields, "return_routed_experts"),
        logprobs=_flag(fields, "logprobs") or (token_ids and not refuses_logprobs),
        usage_chunk=_flag(options or {}, "include_usage"),
    )


def _num_choices(fields: Mapping[str, JsonValue]) -> int:
    number = _optional(fields, "n", int)
    number = 1 if number is None else number
    if not 1 <= number <= _MAX_CHOICES:
        raise InvalidRequest(f"n: expected 1 to {_MAX_CHOICES}, got {number}")
    return number


def _constraint(response_format: JsonValue) -> dict[str, JsonValue]:
    """`response_format` in the words of the engines' constrained decoding."""
    if response_format is None:
        return {}
    if not isinstance(response_format, dict):
        raise InvalidRequest(f"response_format: expected an object, got {_kind(response_format)}")
    kind = response_format.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": '{"type":"object"}'}
    if kind == "json_schema":
        described = response_format.get("json_schema")
        if not isinstance(described, dict) or "schema" not in described:
            raise InvalidRequest("response_format.json_schema.schema: is missing")
        return {"json_schema": dump_json(described["schema"]).decode()}
    raise InvalidRequest(f"response_format.type: {kind!r} is none of text, json_object, json_schema")


def _stop_strings(stop: JsonValue) -> list[str]:
    strings = [stop] if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(text, str) for text in strings):
        raise InvalidRequest("stop: expected a string or a list of strings")
    if len(strings) > _MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop: at most {_MAX_STOP_STRINGS} strings, got {len(strings)}")
    return [text for text in strings if text]


def _stop_ids(stop_ids: JsonValue) -> list[int]:
    if not isinstance(stop_ids, list | tuple) or any(type(i) is not int or i < 0 for i in stop_ids):
        raise InvalidRequest("stop_token_ids: expected a list of token ids")
    return list(stop_ids)


def _flag(fields: Mapping[str, JsonValue], name: str) -> bool:
    return bool(_optional(fields, name, bool))


def _number(fields: Mapping[str, JsonValue], name: str) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name}: expected a number, got {_kind(value)}")
    if abs(value) > 1e9:
        raise InvalidRequest(f"{name}: {value} is out of range")
    return float(value)


def _optional(fields: Mapping[str, JsonValue], name: str, kind: type[T]) -> T | None:
    value = fields.get(name)
    if value is None:
        return None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InvalidRequest(f"{name}: expected {_NAMES[kind]}, got {_kind(value)}")
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise InvalidRequest(f"{name}: {value} is out of range")
    return value


_NAMES: Mapping[type, str] = {str: "a string", int: "an integer", bool: "true or false"}


def _kind(value: JsonValue) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "null")
