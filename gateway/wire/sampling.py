"""How to sample, from the fields of a request: normalised names first, typed parameters then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gateway.contracts.errors import InvalidRequest
from gateway.contracts.generation import JsonValue, SamplingParams
from gateway.wire.fields import kind_of, number, optional
from gateway.wire.json_text import dump_json

SAMPLING_EXTRA = frozenset(
    (
        "allowed_token_ids", "bad_words", "custom_params", "ebnf", "ebnf_full_assistant", "frequency_penalty",
        "json_schema", "logit_bias", "min_new_tokens", "min_tokens", "no_stop_trim", "presence_penalty", "regex",
        "repetition_detection", "repetition_penalty", "spaces_between_special_tokens", "stop_regex", "stream_interval",
        "structural_tag", "structured_outputs", "thinking_token_budget", "vllm_xargs", "watermarking",
    )
)  # fmt: skip
"""Sampling fields that engines know and we do not interpret. vLLM's `include_stop_str_in_output` is none: it says what
an engine's text looks like, and the text is ours. Nor is SGLang's `watermark`, which stands beside them there."""

ALIASES: Mapping[str, str] = {
    "max_completion_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "sampling_seed": "seed",
}
"""Names that agents may use → the one name that sampling fields have from then on."""

TYPED_SAMPLING = frozenset(
    (
        "ignore_eos", "max_completion_tokens", "max_new_tokens", "max_tokens", "min_p", "sampling_seed", "seed", "stop",
        "stop_token_ids", "temperature", "top_k", "top_p",
    )
)  # fmt: skip
"""Sampling fields that we read ourselves."""

DEFAULT_LENGTH = "default_max_new_tokens"
"""Name of a dialect's own limit of a reply, for whom nobody sets another one."""

UNKNOWN = "unknown"
"""Name of the object of sampling fields that nobody here knows."""

_UNSAID: Mapping[str, JsonValue] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "stop": (),
    "stop_token_ids": (),
    "seed": None,
    "ignore_eos": False,
    UNKNOWN: {},
}
"""What sampling fields mean that a request does not have."""

_NUMBERS = ("frequency_penalty", "presence_penalty", "repetition_penalty")
_INTEGERS = ("min_new_tokens", "min_tokens")
_MAX_LOGIT_BIAS = 100
"""OpenAI's; beyond it a token is certain or impossible anyway."""

_LENGTHS = ("max_tokens", "max_completion_tokens", "max_new_tokens")
MAX_STOP_STRINGS = 16
"""In one request."""


def sampling_fields(fields: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """The sampling fields of a request or of a session's overrides, under their normalised names, nulls left out."""
    sampling: dict[str, JsonValue] = {}
    for name in ("temperature", "top_p", "min_p"):
        if name in fields and (value := number(fields, name)) is not None:
            sampling[name] = value
    for name in (*_LENGTHS, "top_k", "sampling_seed", "seed"):
        if name in fields and (integer := optional(fields, name, int)) is not None:
            if integer < 1 and name in _LENGTHS:
                raise InvalidRequest(f"{name}: expected at least 1, got {integer}")
            sampling[ALIASES.get(name, name)] = integer
    if fields.get("stop") is not None:
        sampling["stop"] = _stop_strings(fields["stop"])
    if fields.get("stop_token_ids") is not None:
        sampling["stop_token_ids"] = _stop_ids(fields["stop_token_ids"])
    if (ignores := optional(fields, "ignore_eos", bool)) is not None:
        sampling["ignore_eos"] = ignores
    if not SAMPLING_EXTRA.isdisjoint(fields):
        _check_extra(fields)
        for name in sorted(SAMPLING_EXTRA & fields.keys(), key=ALIASES.__contains__, reverse=True):  # aliases give way
            if fields[name] is not None:
                sampling[ALIASES.get(name, name)] = fields[name]
    return sampling | _constraint(fields.get("response_format"))


def sampling_params(
    sampling: Mapping[str, JsonValue], *, max_new_tokens: int, stops: Sequence[int] = ()
) -> SamplingParams:
    """Typed sampling of normalised fields, `unknown` ones among them as they came; raises InvalidRequest for an
    impossible value. stops: ids that end a reply besides, unless nothing may."""
    fields = {**_UNSAID, **sampling}
    stop_token_ids = (*fields["stop_token_ids"], *(() if fields["ignore_eos"] else stops))
    extra = {**fields[UNKNOWN]}
    if not SAMPLING_EXTRA.isdisjoint(sampling):
        extra |= {name: value for name, value in sampling.items() if name in SAMPLING_EXTRA}
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=fields["temperature"],
        top_p=fields["top_p"],
        top_k=fields["top_k"],
        min_p=fields["min_p"],
        stop=tuple(fields["stop"]),
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)) if stops else stop_token_ids,
        seed=fields["seed"],
        ignore_eos=fields["ignore_eos"],
        extra=extra,
    )


def _check_extra(fields: Mapping[str, JsonValue]) -> None:
    """Types only, of fields whose meaning is the engines': some of them fail as a whole on a wrong one."""
    for name in _NUMBERS:
        number(fields, name)
    for name in _INTEGERS:
        optional(fields, name, int)
    bias = fields.get("logit_bias")
    if not isinstance(bias, dict | None):
        raise InvalidRequest(f"logit_bias: expected an object, got {kind_of(bias)}")
    for token, value in (bias or {}).items():
        if not (token.isascii() and token.isdigit() and len(token) <= 10):
            raise InvalidRequest(f"logit_bias: expected token ids as keys, got {token[:40]!r}")
        if number({f"logit_bias.{token}": value}, f"logit_bias.{token}") is None or abs(value) > _MAX_LOGIT_BIAS:
            raise InvalidRequest(f"logit_bias.{token}: expected -{_MAX_LOGIT_BIAS} to {_MAX_LOGIT_BIAS}")


def _constraint(response_format: JsonValue) -> dict[str, JsonValue]:
    """`response_format` in the words of the engines' constrained decoding."""
    if response_format is None:
        return {}
    if not isinstance(response_format, dict):
        raise InvalidRequest(f"response_format: expected an object, got {kind_of(response_format)}")
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
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(f"stop: at most {MAX_STOP_STRINGS} strings, got {len(strings)}")
    return [text for text in strings if text]


def _stop_ids(stop_ids: JsonValue) -> list[int]:
    if not isinstance(stop_ids, list | tuple) or any(type(i) is not int or i < 0 for i in stop_ids):
        raise InvalidRequest("stop_token_ids: expected a list of token ids")
    return list(stop_ids)
