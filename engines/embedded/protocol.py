"""SGLang's wire format, both ways: a `/generate` body → checked requests; a `Generation` → the reply's JSON.

Field names, shapes, messages and encodings are those of SGLang 0.5.23. One difference is deliberate: a token id outside
the vocabulary is refused (400), where SGLang's process dies.
"""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pybase64
from tokenizers import Tokenizer

from engines.embedded.sampler import NO_TOP_K, SamplingSettings
from engines.embedded.scheduler import Generation
from gateway.contracts.errors import ContextOverflow, InvalidRequest
from gateway.contracts.generation import TopLogprob

_SAMPLING_FIELDS = frozenset(
    (
        "max_new_tokens",
        "stop",
        "stop_token_ids",
        "stop_regex",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "frequency_penalty",
        "presence_penalty",
        "repetition_penalty",
        "min_new_tokens",
        "n",
        "json_schema",
        "regex",
        "ebnf",
        "structural_tag",
        "ignore_eos",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "no_stop_trim",
        "stream_interval",
        "logit_bias",
        "sampling_seed",
        "custom_params",
        "beam_width",
        "watermark",
        "choice",
    )
)
_NEUTRAL_VALUES: Mapping[str, tuple[Any, ...]] = {
    "stop_regex": (None, []),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "json_schema": (None,),
    "regex": (None,),
    "ebnf": (None,),
    "structural_tag": (None,),
    "logit_bias": (None, {}),
    "beam_width": (None, 0, 1),
    "watermark": (None, False),
    "choice": (None, []),
}
"""Sampling fields of SGLang that this engine does not implement, and the values that ask for nothing."""

_MEDIA_FIELDS = ("image_data", "video_data", "audio_data")


@dataclass(frozen=True, slots=True)
class GenerateInput:
    """One prompt of a `/generate` call. `logprob_start` -1 stands for "output tokens only". num_top_logprobs: of the
    likeliest tokens at each position whose log-prob is wanted. cache_key: of prefixes (`extra_key`)."""

    rid: str
    prompt: list[int]
    settings: SamplingSettings
    return_logprob: bool
    logprob_start: int
    routed_start: int | None
    num_top_logprobs: int = 0
    cache_key: str = ""


@dataclass(frozen=True, slots=True)
class GenerateCall:
    """A checked `/generate` body. `single`: one prompt with n = 1, answered by an object instead of a list."""

    inputs: tuple[GenerateInput, ...]
    single: bool
    stream: bool
    return_prompt_token_ids: bool


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What requests are checked against; `captures_experts`: routing was switched on and the model has any."""

    vocab_size: int
    context_length: int
    captures_experts: bool


def read_generate(body: Any, limits: ModelLimits, tokenizer: Tokenizer | None) -> GenerateCall:
    """Check a `/generate` body; raises InvalidRequest or ContextOverflow with SGLang's message."""
    if not isinstance(body, dict):
        raise InvalidRequest("the body must be a JSON object")
    for name in _MEDIA_FIELDS:
        if body.get(name):
            raise InvalidRequest(f"{name}: the embedded engine reads text only")
    prompts, batch = _prompts(body, tokenizer)
    parameters = body.get("sampling_params") or {}
    per_prompt = parameters if isinstance(parameters, list) else [parameters] * len(prompts)
    if len(per_prompt) != len(prompts) or not all(isinstance(entry, dict) for entry in per_prompt):
        raise InvalidRequest("sampling_params must be an object, or a list with one object for each prompt")
    copies = _integer(per_prompt[0], "n", 1, least=1)
    rids = _rids(body.get("rid"), len(prompts), copies)
    if body.get("token_ids_logprob"):
        raise InvalidRequest("the embedded engine does not implement token_ids_logprob")
    top_numbers = _top_numbers(body, len(prompts))
    cache_key = body.get("extra_key") or ""
    if not isinstance(cache_key, str):
        raise InvalidRequest("extra_key: the embedded engine takes one text for all prompts")
    inputs: list[GenerateInput] = []
    for prompt, entry, top_number in zip(prompts, per_prompt, top_numbers, strict=True):
        settings = _settings(entry, tokenizer)
        _check_prompt(prompt, entry.get("max_new_tokens"), limits)
        read = [_input(body, rids[len(inputs) + copy], prompt, settings, limits) for copy in range(copies)]
        inputs += [replace(each, num_top_logprobs=top_number, cache_key=cache_key) for each in read]
    return GenerateCall(
        inputs=tuple(inputs),
        single=not batch and copies == 1,
        stream=bool(body.get("stream")),
        return_prompt_token_ids=bool(body.get("return_prompt_token_ids")),
    )


def _prompts(body: Mapping[str, Any], tokenizer: Tokenizer | None) -> tuple[list[list[int]], bool]:
    ids, text = body.get("input_ids"), body.get("text")
    if ids is None and text is None:
        raise InvalidRequest("Either text, input_ids or input_embeds should be provided.")
    if ids is None:
        if tokenizer is None:
            raise InvalidRequest("this engine has no tokenizer: send input_ids instead of text")
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(entry, str) for entry in texts):
            raise InvalidRequest("text must be a string or a list of strings")
        return [tokenizer.encode(entry).ids for entry in texts], isinstance(text, list)
    if not isinstance(ids, list):
        raise InvalidRequest(f"input_ids must be list or null; got {type(ids).__name__}")
    if not ids:
        raise InvalidRequest("input_ids cannot be empty.")
    batch = isinstance(ids[0], list)
    prompts: list[list[int]] = ids if batch else [ids]
    for prompt in prompts:
        if not isinstance(prompt, list) or not prompt or not all(type(token) is int for token in prompt):
            raise InvalidRequest("input_ids must be a non-empty list of integers, or a list of such lists")
    return prompts, batch


def _top_numbers(body: Mapping[str, Any], num_prompts: int) -> list[int]:
    """`top_logprobs_num` of each prompt; without log-probs it asks for nothing."""
    asked = body.get("top_logprobs_num") if body.get("return_logprob") else None
    numbers = asked if isinstance(asked, list) else [asked] * num_prompts
    if len(numbers) != num_prompts:
        raise InvalidRequest("top_logprobs_num must be an integer, or a list with one integer for each prompt")
    return [_integer({"top_logprobs_num": number}, "top_logprobs_num", 0, least=0) for number in numbers]


def _rids(rid: Any, num_prompts: int, copies: int) -> list[str]:
    if isinstance(rid, list):
        if len(rid) != num_prompts or copies != 1 or len(set(rid)) != len(rid):
            raise InvalidRequest("rid must name each prompt once")
        return [str(entry) for entry in rid]
    if rid is not None and num_prompts * copies == 1:
        return [str(rid)]
    prefix = "" if rid is None else f"{rid}_"
    return [prefix + uuid.uuid4().hex for _ in range(num_prompts * copies)]


def _check_prompt(prompt: Sequence[int], max_new_tokens: Any, limits: ModelLimits) -> None:
    count, context = len(prompt), limits.context_length
    if count >= context:
        raise ContextOverflow(
            f"The input ({count} tokens) is longer than the model's context length ({context} tokens)."
        )
    if max_new_tokens is not None and count + max_new_tokens > context:
        raise ContextOverflow(
            f"Requested token count exceeds the model's maximum context length of {context} tokens. You requested a "
            f"total of {count + max_new_tokens} tokens: {count} tokens from the input messages and {max_new_tokens} "
            "tokens for the completion. Please reduce the number of tokens in the input messages or the completion to "
            "fit within the limit."
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        outside = next(token for token in prompt if not 0 <= token < limits.vocab_size)
        raise InvalidRequest(f"Token id {outside} is out of vocabulary (0 to {limits.vocab_size - 1}).")


def _input(
    body: Mapping[str, Any], rid: str, prompt: list[int], settings: SamplingSettings, limits: ModelLimits
) -> GenerateInput:
    return_logprob = bool(body.get("return_logprob"))
    logprob_start = _integer(body, "logprob_start_len", -1, least=-1) if return_logprob else -1
    if logprob_start > len(prompt):
        raise InvalidRequest(
            f"req.logprob_start_len={logprob_start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={len(prompt)}. Please use a smaller logprob_start_len."
        )
    return GenerateInput(rid, prompt, settings, return_logprob, logprob_start, _routed_start(body, prompt, limits))


def _routed_start(body: Mapping[str, Any], prompt: Sequence[int], limits: ModelLimits) -> int | None:
    if not body.get("return_routed_experts") or not limits.captures_experts:
        return None
    start = body.get("routed_experts_start_len") or 0
    if type(start) is not int or start < 0:
        raise InvalidRequest(
            f"recv_req.routed_experts_start_len={start} is lower than 0. "
            "Please use a non-negative routed_experts_start_len."
        )
    if start > len(prompt):
        raise InvalidRequest(
            f"recv_req.routed_experts_start_len={start} is higher than the number of input tokens "
            f"len(req.origin_input_ids)={len(prompt)}. Please use a smaller routed_experts_start_len."
        )
    return start


def _settings(parameters: Mapping[str, Any], tokenizer: Tokenizer | None) -> SamplingSettings:
    for name, value in parameters.items():
        if name not in _SAMPLING_FIELDS:
            known = ", ".join(f"`{field}`" for field in sorted(_SAMPLING_FIELDS))
            raise InvalidRequest(f"unknown field `{name}`, expected one of {known}")
        if name in _NEUTRAL_VALUES and value not in _NEUTRAL_VALUES[name]:
            raise InvalidRequest(f"the embedded engine does not implement {name}")
    stop = parameters.get("stop") or ()
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if stops and tokenizer is None:
        raise InvalidRequest("this engine has no tokenizer: use stop_token_ids instead of stop")
    top_k = _integer(parameters, "top_k", -1, least=-1)
    if top_k == 0:
        raise InvalidRequest("top_k must be -1 (disable), or at least 1, got 0.")
    temperature = _number(parameters, "temperature", 1.0)
    if not temperature >= 0 or math.isinf(temperature):
        raise InvalidRequest(f"temperature must be a non-negative finite number, got {temperature:g}.")
    top_p, min_p = _number(parameters, "top_p", 1.0), _number(parameters, "min_p", 0.0)
    if not 0 < top_p <= 1:
        raise InvalidRequest(f"top_p must be in (0, 1], got {top_p:g}.")
    if not 0 <= min_p <= 1:
        raise InvalidRequest(f"min_p must be in [0, 1], got {min_p:g}.")
    seed, interval = parameters.get("sampling_seed"), parameters.get("stream_interval")
    return SamplingSettings(
        max_new_tokens=_integer(parameters, "max_new_tokens", 128, least=0),
        # SGLang's own threshold: below it division would overflow, and the likeliest token is all that is left.
        temperature=0.0 if temperature < 1e-6 else temperature,
        top_p=top_p,
        top_k=NO_TOP_K if top_k == -1 else top_k,
        min_p=min_p,
        stop=stops,
        stop_token_ids=frozenset(parameters.get("stop_token_ids") or ()),
        ignore_eos=bool(parameters.get("ignore_eos")),
        min_new_tokens=_integer(parameters, "min_new_tokens", 0, least=0),
        seed=None if seed is None else int(seed),
        skip_special_tokens=bool(parameters.get("skip_special_tokens", True)),
        stop_trim=not parameters.get("no_stop_trim"),
        stream_interval=None if interval is None else max(1, int(interval)),
    )


def _integer(values: Mapping[str, Any], name: str, default: int, *, least: int) -> int:
    value = values.get(name)
    if value is None:
        return default
    if type(value) is not int or value < least:
        raise InvalidRequest(f"{name} must be an integer of at least {least}, got {value}.")
    return value


def _number(values: Mapping[str, Any], name: str, default: float) -> float:
    value = values.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number, got {value!r}.")
    return float(value)


class Reply:
    """The JSON of one generation: cumulative, or with `incremental` only what is new since the last call."""

    def __init__(
        self, request: GenerateInput, generation: Generation, tokenizer: Tokenizer | None, *, incremental: bool
    ) -> None:
        self._request = request
        self._generation = generation
        self._tokenizer = tokenizer
        self._num_known = 0 if tokenizer is None else tokenizer.get_vocab_size()
        self._incremental = incremental
        self._sent_tokens = 0
        self._text = ""
        self._sent_text = 0
        self._created = time.monotonic()
        self._first = True

    def build(self, num_output: int) -> dict[str, Any]:
        """The reply with the first `num_output` tokens; complete if the generation has ended."""
        generation = self._generation
        finish = generation.finish
        output_ids = generation.token_ids[generation.prompt_length : generation.prompt_length + num_output]
        since = self._sent_tokens if self._incremental else 0
        reply: dict[str, Any] = {}
        if self._tokenizer is not None:
            text = self._decoded(self._tokenizer, output_ids)
            reply["text"] = text[self._sent_text :] if self._incremental else text
            self._sent_text = len(text)
        reply["output_ids"] = output_ids[since:]
        reply["meta_info"] = self._meta_info(output_ids, since, finish)
        self._sent_tokens = num_output
        self._first = False
        return reply

    def _decoded(self, tokenizer: Tokenizer, output_ids: list[int]) -> str:
        generation, finish = self._generation, self._generation.finish
        settings = generation.settings
        matched = finish.get("matched") if finish is not None else None
        trimmed = output_ids[:-1] if settings.stop_trim and isinstance(matched, int) else output_ids
        # Models often have more ids than their tokenizer knows; SGLang shows token 0 for those.
        known = [token if token < self._num_known else 0 for token in trimmed]
        text = tokenizer.decode(known, skip_special_tokens=settings.skip_special_tokens)
        if settings.stop_trim and isinstance(matched, str):
            text = text.partition(matched)[0]
        if finish is None and text.endswith("\N{REPLACEMENT CHARACTER}"):
            return self._text  # half a character: wait for the token that completes it
        self._text = text
        return text

    def _meta_info(self, output_ids: list[int], since: int, finish: dict[str, Any] | None) -> dict[str, Any]:
        generation, request = self._generation, self._request
        num_output = len(output_ids)
        meta: dict[str, Any] = {
            "id": generation.rid,
            "finish_reason": finish,
            "prompt_tokens": generation.prompt_length,
            "weight_version": generation.weight_version
            or (generation.version_starts[-1][0] if generation.version_starts else ""),
            "num_retractions": generation.num_retractions,
        }
        if request.return_logprob:
            logprobs = generation.logprobs[since:num_output]
            meta["input_token_logprobs"] = self._input_logprobs()
            meta["output_token_logprobs"] = [
                [logprob, token, None] for logprob, token in zip(logprobs, output_ids[since:], strict=True)
            ]
            meta["output_token_logprobs_length"] = num_output
        if request.num_top_logprobs:
            meta["input_top_logprobs"] = self._input_top_logprobs()
            meta["output_top_logprobs"] = [_triples(row) for row in generation.top_logprobs[since:num_output]]
        meta["reasoning_tokens"] = 0
        meta["completion_tokens"] = num_output
        meta["cached_tokens"] = generation.cached_tokens
        if finish is not None:
            meta["weight_versions"] = _version_spans(generation, num_output)
        cached = generation.cached_tokens
        meta["cached_tokens_details"] = {"device": cached, "host": 0} if cached else None
        if generation.routed_experts is not None and finish is not None:
            meta["routed_experts"] = pybase64.b64encode(generation.routed_experts.tobytes()).decode()
        meta["dp_rank"] = None
        if finish is not None:
            meta["e2e_latency"] = time.monotonic() - self._created
        if self._first:
            meta["response_sent_to_client_ts"] = time.time()
        return meta

    def _input_logprobs(self) -> list[list[Any]]:
        generation, start = self._generation, self._request.logprob_start
        if start < 0 or start >= generation.prompt_length:
            return []
        # The first wanted token has no log-prob here: its predecessor's logits were not computed.
        values: list[float | None] = [None, *generation.input_logprobs]
        tokens = generation.token_ids[start : generation.prompt_length]
        return [[value, token, None] for value, token in zip(values, tokens, strict=False)]

    def _input_top_logprobs(self) -> list[list[list[Any]] | None]:
        generation, start = self._generation, self._request.logprob_start
        if start < 0 or start >= generation.prompt_length:
            return []
        return [None, *(_triples(row) for row in generation.input_top_logprobs)]


def _triples(row: Sequence[TopLogprob]) -> list[list[Any]]:
    return [[logprob, token_id, None] for token_id, logprob in row]


def _version_spans(generation: Generation, num_output: int) -> list[dict[str, Any]]:
    if not generation.version_starts:
        return [{"version": generation.weight_version, "start": 0, "end": 0}]
    starts = generation.version_starts
    ends = [start for _, start in starts[1:]] + [num_output]
    return [
        {"version": version, "start": start, "end": end} for (version, start), end in zip(starts, ends, strict=True)
    ]
