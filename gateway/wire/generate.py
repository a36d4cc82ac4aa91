"""SGLang's /generate: bytes → raw prompts, and pieces of turns → its replies, whole or cumulative in a stream.

    {"text" | "input_ids": …, "sampling_params": {…}, "return_logprob": true, "stream": false}
    {"text": …, "output_ids": […], "meta_info": {"id", "finish_reason", "prompt_tokens", "output_token_logprobs", …}}

A list of prompts, or `n` samples, is answered by a list. Routing rows are raw little-endian int32 as SGLang sends them;
those that an earlier turn of the session recorded are not sent again: `routed_experts_start_len` says where they begin.
The likeliest tokens are in the last frame of a choice's stream only, where SGLang repeats all so far in every frame.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.contracts.errors import InvalidRequest, VerbatimError
from gateway.contracts.experts import RoutedExperts
from gateway.contracts.generation import Finish, FinishReason, JsonValue, TokenIds
from gateway.contracts.replies import ContentDelta, ReplyDelta
from gateway.contracts.versions import VersionSpan
from gateway.wire import sse
from gateway.wire.errors import error_body
from gateway.wire.fields import check_nesting, flag, inside, kind_of, optional, within
from gateway.wire.json_text import Base64, load_json_object
from gateway.wire.media import take_engine_media
from gateway.wire.openai import MAX_CHOICES, MAX_TOP_LOGPROBS
from gateway.wire.raw_prompts import is_batch, raw_prompts
from gateway.wire.reply import FinishedChoice, ReplyTokens
from gateway.wire.request import PROTECTED, RawPrompt, TurnRequest, Wanted, protected_names
from gateway.wire.sampling import DEFAULT_LENGTH, SAMPLING_EXTRA, TYPED_SAMPLING, UNKNOWN, sampling_fields

_READ = frozenset(
    (
        "audio_data", "image_data", "input_ids", "model", "return_logprob", "return_prompt_token_ids",
        "return_routed_experts", "return_text_in_logprobs", "rid", "routed_experts_start_len", "sampling_params",
        "stream", "text", "token_ids_logprob", "top_logprobs_num", "video_data",
    )
)  # fmt: skip

_KNOWN_SAMPLING = TYPED_SAMPLING | SAMPLING_EXTRA | {"n"}

_NOT_AT_THE_TOP = (_KNOWN_SAMPLING | PROTECTED) - _READ

_DEFAULT_MAX_NEW_TOKENS = 128
"""SGLang's."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What of a reply the client asked to see. rids: names it gave its prompts, () for none."""

    logprob_texts: bool
    prompt_ids: bool
    experts_start: int
    rids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SglangRequest:
    """One body: a turn request for each of its prompts. is_list: whether the reply is a list."""

    turns: tuple[TurnRequest, ...]
    is_list: bool
    shown: Shown


def parse_sglang_request(body: bytes) -> SglangRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    prompts, is_list = _prompts(fields)
    parameters = _parameters(fields.get("sampling_params"), len(prompts))
    numbers = {_num_choices(each) for each in parameters}
    if len(numbers) > 1:
        raise InvalidRequest("sampling_params: n must be the same for all prompts of a list")
    [num_choices] = numbers
    media, blobs = take_engine_media(fields, len(prompts))
    digest = hashlib.sha256(body).hexdigest()
    # Sampling fields stand in `sampling_params` here; beside it some engines would take them too.
    kept_back = [k for k, v in fields.items() if k in _NOT_AT_THE_TOP and v is not None]
    turns = tuple(
        TurnRequest(
            model=optional(fields, "model", str),
            messages=(),
            tools=(),
            calls_tools=False,
            template_arguments={},
            sampling=_sampling(each),
            num_choices=num_choices,
            stream=flag(fields, "stream"),
            wanted=_wanted(fields),
            passthrough={k: v for k, v in fields.items() if k not in _READ | _NOT_AT_THE_TOP},
            ignored_fields=tuple(sorted([*kept_back, *_ignored_sampling(each)])),
            digest=digest,
            num_bytes=len(body),
            prompt=replace(prompt, media=tuple(parts)),
            blobs=blobs,
        )
        for prompt, each, parts in zip(prompts, parameters, media, strict=True)
    )
    shown = Shown(
        logprob_texts=flag(fields, "return_text_in_logprobs"),
        prompt_ids=flag(fields, "return_prompt_token_ids"),
        experts_start=optional(fields, "routed_experts_start_len", int) or 0,
        rids=_rids(fields.get("rid"), len(prompts)),
    )
    return SglangRequest(turns, is_list or num_choices > 1, shown)


@dataclass(slots=True)
class _Streamed:
    """What of one choice has been sent so far."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[JsonValue] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)


class SglangWriter:
    """SGLang's replies. label: policy version → the engines' name for it."""

    def __init__(self, request: SglangRequest, label: Callable[[int], str], turn_id: str, model: str) -> None:
        self._request = request
        self._wants_logprobs = request.turns[0].wanted.logprobs
        self._wants_top_logprobs = request.turns[0].wanted.num_top_logprobs > 0
        self._wants_experts = request.turns[0].wanted.routed_experts
        self._label = label
        self._turn_id = turn_id
        self._streamed: dict[int, _Streamed] = {}

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """One object, or a list of them."""
        bodies = [self._body(i, choice) for i, choice in enumerate(choices)]
        return bodies if self._request.is_list else bodies[0]

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """Nothing is sent before the first token."""
        self._streamed[index] = _Streamed(prompt_token_ids=prompt_token_ids.tolist())
        yield from ()

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """The choice up to its newest tokens, without the likeliest ones: `closing` tells those once, because a row a
        token in every frame would be as many rows as tokens squared."""
        if not len(tokens.token_ids):
            return
        so_far = self._streamed[index]
        so_far.text += "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        so_far.token_ids += tokens.token_ids.tolist()
        meta: dict[str, JsonValue] = {
            "id": self._id(index),
            "finish_reason": None,
            "prompt_tokens": len(so_far.prompt_token_ids),
            "completion_tokens": len(so_far.token_ids),
        }
        if self._wants_logprobs:
            so_far.logprobs += self._triples(tokens)
            meta |= _logprob_fields(so_far.logprobs)
        yield self._frame(index, {"text": so_far.text, "output_ids": so_far.token_ids, "meta_info": meta})

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """The whole choice."""
        body = self._body(index, choice)
        yield from sse.event_pieces(body | {"index": index} if self._request.is_list else body)

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """The stream's end."""
        yield sse.DONE

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """An error after the first token: a frame of its own, and no end."""
        yield sse.event(error_body(error))

    def _frame(self, index: int, body: dict[str, JsonValue]) -> bytes:
        return sse.event(body | {"index": index} if self._request.is_list else body)

    def _body(self, index: int, choice: FinishedChoice) -> dict[str, JsonValue]:
        body: dict[str, JsonValue] = {
            **choice.reply_fields,
            "text": choice.reply.content or "",
            "output_ids": choice.tokens.token_ids.tolist(),
            "meta_info": self._meta_info(index, choice),
        }
        if self._request.shown.prompt_ids:
            body["prompt_token_ids"] = choice.prompt_token_ids.tolist()
        return body

    def _meta_info(self, index: int, choice: FinishedChoice) -> dict[str, JsonValue]:
        num_tokens = len(choice.tokens.token_ids)
        meta: dict[str, JsonValue] = {
            **choice.meta_info,
            "id": self._id(index),
            "finish_reason": _finish_reason(choice.finish, num_tokens),
            "prompt_tokens": len(choice.prompt_token_ids),
            "completion_tokens": num_tokens,
            "cached_tokens": choice.usage.cached_tokens,
            **self._versions(choice.version_spans),
        }
        if self._wants_logprobs:
            meta |= _logprob_fields(self._triples(choice.tokens))
        if self._wants_top_logprobs:
            meta["output_top_logprobs"] = self._top_triples(choice.tokens)
        if self._wants_experts:
            meta |= _experts_fields(choice.experts, self._request.shown.experts_start)
        return meta

    def _versions(self, spans: Sequence[VersionSpan]) -> dict[str, JsonValue]:
        """I5: the newest version, and who sampled which tokens."""
        named = [{"version": self._label(s.policy_version), "start": s.start, "end": s.stop} for s in spans]
        return {"weight_version": named[-1]["version"], "weight_versions": named} if named else {}

    def _triples(self, tokens: ReplyTokens) -> list[JsonValue]:
        """[log-prob, id, text or null] of each token; a log-prob that is missing is null (I9)."""
        texts = tokens.texts if self._request.shown.logprob_texts else [None] * len(tokens.token_ids)
        return [
            [None if math.isnan(logprob) else logprob, token_id, text]
            for logprob, token_id, text in zip(tokens.logprobs.tolist(), tokens.token_ids.tolist(), texts, strict=True)
        ]

    def _top_triples(self, tokens: ReplyTokens) -> list[JsonValue]:
        """For each token the triples of the likeliest at its position; null where the engine gave none (I9)."""
        shows_text = self._request.shown.logprob_texts
        return [
            [[logprob, token_id, tokens.spell(token_id).text if shows_text else None] for token_id, logprob in tops]
            or None
            for tops in tokens.top_rows
        ]

    def _id(self, index: int) -> str:
        """The client's own name where it gave one."""
        num_choices = self._request.turns[0].num_choices
        prompt, sample = divmod(index, num_choices)
        name = self._request.shown.rids[prompt] if self._request.shown.rids else self._turn_id
        number = sample if self._request.shown.rids else index
        return f"{name}-{number}" if number else name


def _finish_reason(finish: Finish, num_tokens: int) -> dict[str, JsonValue]:
    if finish.reason is FinishReason.STOP:
        return {"type": "stop", "matched": finish.matched}
    if finish.reason is FinishReason.LENGTH:
        return {"type": "length", "length": num_tokens}
    return {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None}


def _logprob_fields(triples: list[JsonValue]) -> dict[str, JsonValue]:
    return {"output_token_logprobs": triples, "output_token_logprobs_length": len(triples)}


def _experts_fields(experts: RoutedExperts | None, start: int) -> dict[str, JsonValue]:
    """Rows from `start` on, as far as this turn computed them."""
    if experts is None:
        return {"routed_experts": None}
    first = min(max(start, experts.start), experts.stop)
    rows = Base64(experts.ids[first - experts.start :], "<i4")
    return {"routed_experts": rows, "routed_experts_start_len": first}


def _prompts(fields: Mapping[str, JsonValue]) -> tuple[tuple[RawPrompt, ...], bool]:
    text, ids = fields.get("text"), fields.get("input_ids")
    if (text is None) == (ids is None):
        raise InvalidRequest("text, input_ids: give exactly one of them")
    if text is None:
        if not isinstance(ids, list) or any(isinstance(item, str) for item in ids[:1]):
            raise InvalidRequest("input_ids: expected a list of token ids, or a list of such lists")
        return raw_prompts(ids, "input_ids", adds_special_tokens=True), is_batch(ids)
    if not isinstance(text, str) and not (isinstance(text, list) and all(isinstance(item, str) for item in text)):
        raise InvalidRequest(f"text: expected a text or a list of texts, got {kind_of(text)}")
    return raw_prompts(text, "text", adds_special_tokens=True), is_batch(text)


def _parameters(value: JsonValue, num_prompts: int) -> list[Mapping[str, JsonValue]]:
    """One set of sampling parameters a prompt."""
    values = value if isinstance(value, list) else [value or {}] * num_prompts
    if len(values) != num_prompts:
        raise InvalidRequest(f"sampling_params: {len(values)} for {num_prompts} prompts")
    for each in values:
        if not isinstance(each, dict):
            raise InvalidRequest(f"sampling_params: expected an object, got {kind_of(each)}")
    return values


def _sampling(parameters: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Typed where we know a field; what nobody here knows stays for the engine (I8)."""
    known = {k: v for k, v in parameters.items() if k in _KNOWN_SAMPLING}
    unknown = {k: v for k, v in parameters.items() if k not in _KNOWN_SAMPLING | PROTECTED}
    with inside("sampling_params"):
        return {DEFAULT_LENGTH: _DEFAULT_MAX_NEW_TOKENS, **sampling_fields(known), UNKNOWN: unknown}


def _ignored_sampling(parameters: Mapping[str, JsonValue]) -> list[str]:
    return [f"sampling_params.{name}" for name in protected_names(parameters)]


def _num_choices(parameters: Mapping[str, JsonValue]) -> int:
    asked = optional(parameters, "n", int)
    number = 1 if asked is None else asked
    if not 1 <= number <= MAX_CHOICES:
        raise InvalidRequest(f"sampling_params.n: expected 1 to {MAX_CHOICES}, got {number}")
    return number


def _wanted(fields: Mapping[str, JsonValue]) -> Wanted:
    """As in SGLang, the likeliest tokens come with log-probs only."""
    logprobs, num_top_logprobs = flag(fields, "return_logprob"), _num_top_logprobs(fields)
    if fields.get("token_ids_logprob") not in (None, []):
        raise InvalidRequest("token_ids_logprob: is not served; top_logprobs_num gives the likeliest tokens")
    return Wanted(
        token_ids=True,
        routed_experts=flag(fields, "return_routed_experts"),
        logprobs=logprobs,
        usage_chunk=False,
        num_top_logprobs=num_top_logprobs if logprobs else 0,
    )


def _num_top_logprobs(fields: Mapping[str, JsonValue]) -> int:
    """One number, or SGLang's list with the number of every prompt, which are all the same here."""
    asked = fields.get("top_logprobs_num")
    numbers = asked if isinstance(asked, list) else [asked]
    if any(type(number) is not type(numbers[0]) or number != numbers[0] for number in numbers):
        raise InvalidRequest("top_logprobs_num: must be the same for all prompts of a list")
    name = "top_logprobs_num"
    return within({name: numbers[0] if numbers else None}, name, 0, MAX_TOP_LOGPROBS) or 0


def _rids(value: JsonValue, num_prompts: int) -> tuple[str, ...]:
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in values):
        raise InvalidRequest("rid: expected a text, or a list of texts")
    if len(values) == 1 and num_prompts > 1:
        return tuple(f"{values[0]}_{i}" for i in range(num_prompts))
    if len(values) != num_prompts:
        raise InvalidRequest(f"rid: {len(values)} for {num_prompts} prompts")
    return tuple(values)
