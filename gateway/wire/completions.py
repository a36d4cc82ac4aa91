"""OpenAI's completions: bytes → raw prompts, and pieces of turns → `text_completion` or its chunks.

Prompts are texts or ids, one or several, `n` choices of each. The fields of captured ids are vLLM's: `prompt_token_ids`
and `token_ids` in each choice. Log-probs are the legacy object; those of an echoed prompt are not known and therefore
null (I9). `logprobs: N` asks for the N likeliest tokens at each position besides the sampled one.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from gateway.contracts.errors import InvalidRequest, VerbatimError
from gateway.contracts.generation import FinishReason, JsonValue, TokenIds, TopLogprob
from gateway.contracts.replies import ContentDelta, ReplyDelta
from gateway.wire import sse
from gateway.wire.errors import error_body
from gateway.wire.fields import check_nesting, flag, inside, kind_of, optional, within
from gateway.wire.json_text import load_json_object
from gateway.wire.openai import MAX_CHOICES, MAX_TOP_LOGPROBS, experts_body
from gateway.wire.raw_prompts import raw_prompts
from gateway.wire.reply import FinishedChoice, ReplyTokens
from gateway.wire.request import PROTECTED, RawPrompt, TurnRequest, Wanted, protected_names
from gateway.wire.sampling import DEFAULT_LENGTH, SAMPLING_EXTRA, TYPED_SAMPLING, sampling_fields
from gateway.wire.token_texts import Spelling

_KNOWN = frozenset(
    (
        "add_special_tokens", "best_of", "echo", "logprobs", "model", "n", "prompt", "prompt_embeds", "response_format",
        "return_routed_experts", "return_token_ids", "stream", "stream_options", "suffix", "truncate_prompt_tokens",
    )
)  # fmt: skip

_NOT_PASSED = _KNOWN | TYPED_SAMPLING | SAMPLING_EXTRA | PROTECTED

_REFUSED: Mapping[str, str] = {
    "suffix": "text cannot be inserted before a suffix",
    "prompt_embeds": "a prompt is text or token ids",
    "truncate_prompt_tokens": "a prompt is sent whole",
}

_DEFAULT_MAX_TOKENS = 16
"""OpenAI's, of this endpoint."""


@dataclass(frozen=True, slots=True)
class CompletionsRequest:
    """One body: a turn request for each of its prompts, which differ in nothing else."""

    turns: tuple[TurnRequest, ...]
    echo: bool


def parse_completions_request(body: bytes) -> CompletionsRequest:
    """Read a request; raises InvalidRequest naming the field that is wrong."""
    fields = load_json_object(body)
    check_nesting(fields, body)
    for name, why in _REFUSED.items():
        if fields.get(name) not in (None, ""):
            raise InvalidRequest(f"{name}: is not served; {why}")
    adds_special_tokens = optional(fields, "add_special_tokens", bool) is not False
    if fields.get("prompt") is None:
        raise InvalidRequest("prompt: is missing")
    prompts = raw_prompts(fields["prompt"], "prompt", adds_special_tokens=adds_special_tokens)
    digest = hashlib.sha256(body).hexdigest()
    turns = tuple(
        TurnRequest(
            model=optional(fields, "model", str),
            messages=(),
            tools=(),
            calls_tools=False,
            template_arguments={},
            sampling={DEFAULT_LENGTH: _DEFAULT_MAX_TOKENS, **sampling_fields(fields)},
            num_choices=_num_choices(fields),
            stream=flag(fields, "stream"),
            wanted=_wanted(fields),
            passthrough={k: v for k, v in fields.items() if k not in _NOT_PASSED},
            ignored_fields=protected_names(fields),
            digest=digest,
            num_bytes=len(body),
            prompt=prompt,
        )
        for prompt in prompts
    )
    return CompletionsRequest(turns, echo=flag(fields, "echo"))


class CompletionsWriter:
    """`text_completion`, whole or in chunks. decode: ids → text, for what is echoed."""

    def __init__(
        self, request: CompletionsRequest, decode: Callable[[Sequence[int]], str], turn_id: str, model: str
    ) -> None:
        self._request = request
        self._wanted = request.turns[0].wanted
        self._decode = decode
        self._head = {
            "id": f"cmpl-{turn_id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._offsets: dict[int, int] = {}

    def whole(self, choices: Sequence[FinishedChoice]) -> JsonValue:
        """The whole reply."""
        return {
            **choices[0].reply_fields,
            **self._head,
            "choices": [self._choice(i, choice) for i, choice in enumerate(choices)],
            "usage": self._usage(choices),
        }

    def opening(self, index: int, prompt_token_ids: TokenIds) -> Iterator[bytes]:
        """A chunk for the echoed prompt and its ids, where either was asked for."""
        echoed = self._echoed(index, prompt_token_ids)
        choice = self._piece(index, echoed.text, echoed.tokens)
        if self._wanted.token_ids:
            choice["prompt_token_ids"] = prompt_token_ids.tolist()
        if self._request.echo or self._wanted.token_ids:
            yield self._chunk(choice)

    def progress(self, index: int, deltas: Sequence[ReplyDelta], tokens: ReplyTokens) -> Iterator[bytes]:
        """A chunk for new text and the new tokens' arrays."""
        text = "".join(delta.text for delta in deltas if isinstance(delta, ContentDelta))
        choice = self._piece(index, text, tokens)
        if self._wanted.token_ids:
            choice["token_ids"] = tokens.token_ids.tolist()
        captured = len(tokens.token_ids) and (self._wanted.token_ids or self._wanted.logprobs)
        if text or captured:
            yield self._chunk(choice)

    def closing(self, index: int, choice: FinishedChoice) -> Iterator[bytes]:
        """The last chunk of a choice: its finish reason."""
        last = {"index": index, "text": "", "logprobs": None, **self._closing_fields(choice)}
        yield from sse.event_pieces({**choice.reply_fields, **self._head, "choices": [last]})

    def end(self, choices: Sequence[FinishedChoice]) -> Iterator[bytes]:
        """Usage where asked for, and the stream's end."""
        if self._wanted.usage_chunk:
            yield sse.event({**self._head, "choices": [], "usage": self._usage(choices)})
        yield sse.DONE

    def failure(self, error: VerbatimError) -> Iterator[bytes]:
        """An error after the first token: a frame of its own, and no end."""
        yield sse.event(error_body(error))

    def _choice(self, index: int, choice: FinishedChoice) -> dict[str, JsonValue]:
        echoed = self._echoed(index, choice.prompt_token_ids)
        text = echoed.text + (choice.reply.content or "")
        body = self._piece(index, text, echoed.followed_by(choice.tokens)) | self._closing_fields(choice)
        if self._wanted.token_ids:
            body["prompt_token_ids"] = choice.prompt_token_ids.tolist()
            body["token_ids"] = choice.tokens.token_ids.tolist()
        return body

    def _piece(self, index: int, text: str, tokens: ReplyTokens) -> dict[str, JsonValue]:
        """Part of a choice; offsets go on from the part before."""
        logprobs = None
        if self._wanted.logprobs and len(tokens.texts):
            offset = self._offsets.get(index, 0)
            logprobs = _logprobs(tokens, offset, shows_top=self._wanted.num_top_logprobs > 0)
            self._offsets[index] = offset + sum(map(len, tokens.texts))
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _closing_fields(self, choice: FinishedChoice) -> dict[str, JsonValue]:
        finished = choice.finish.reason is FinishReason.STOP
        fields: dict[str, JsonValue] = {"finish_reason": "stop" if finished else "length"}
        if self._wanted.routed_experts:
            fields["routed_experts"] = None if choice.experts is None else experts_body(choice.experts)
        if choice.meta_info:
            fields["meta_info"] = choice.meta_info
        return fields

    def _chunk(self, choice: Mapping[str, JsonValue]) -> bytes:
        return sse.event({**self._head, "choices": [choice]})

    def _echoed(self, index: int, prompt_token_ids: TokenIds) -> _Echo:
        if not self._request.echo:
            return _Echo("", _no_tokens())
        ids = prompt_token_ids.tolist()
        prompt = self._prompt_of(index)
        texts = [self._decode([token_id]) for token_id in ids] if self._wanted.logprobs else []
        unknown = np.full(len(ids), np.nan, dtype=np.float32)
        text = self._decode(ids) if prompt.text is None else prompt.text
        return _Echo(text, ReplyTokens(prompt_token_ids, unknown, texts))

    def _prompt_of(self, index: int) -> RawPrompt:
        turn = self._request.turns[index // self._request.turns[0].num_choices]
        if turn.prompt is None:
            raise InvalidRequest("prompt: is missing")
        return turn.prompt

    def _usage(self, choices: Sequence[FinishedChoice]) -> dict[str, JsonValue]:
        """A prompt counts once, however many choices it has."""
        prompts = choices[:: self._request.turns[0].num_choices]
        prompt_tokens = sum(choice.usage.prompt_tokens for choice in prompts)
        completion_tokens = sum(choice.usage.completion_tokens for choice in choices)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(choice.usage.cached_tokens for choice in prompts)},
            "completion_tokens_details": {"reasoning_tokens": sum(c.usage.reasoning_tokens for c in choices)},
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Echo:
    """A prompt as it is shown before its reply; nothing of it where no echo was asked for."""

    text: str
    tokens: ReplyTokens

    def followed_by(self, tokens: ReplyTokens) -> ReplyTokens:
        """The prompt's tokens, then those of the reply."""
        return ReplyTokens(
            np.concatenate([self.tokens.token_ids, tokens.token_ids]),
            np.concatenate([self.tokens.logprobs, tokens.logprobs]),
            [*self.tokens.texts, *tokens.texts],
            [*self.tokens.top_rows, *tokens.top_rows],
            tokens.spell,
        )


def _no_tokens() -> ReplyTokens:
    return ReplyTokens(np.zeros(0, dtype=np.int32), np.zeros(0, dtype=np.float32), [])


def _logprobs(tokens: ReplyTokens, offset: int, *, shows_top: bool) -> dict[str, JsonValue]:
    """The legacy object; `text_offset` counts characters of the tokens' own texts."""
    lengths = map(len, tokens.texts[:-1])
    logprobs = [None if math.isnan(logprob) else logprob for logprob in tokens.logprobs.tolist()]
    return {
        "tokens": list(tokens.texts),
        "token_logprobs": logprobs,
        "text_offset": list(accumulate(lengths, initial=offset)),
        "top_logprobs": _top_logprobs(tokens) if shows_top else None,
    }


def _top_logprobs(tokens: ReplyTokens) -> list[dict[str, float] | None]:
    """For each token the likeliest ones by name, then the sampled one if it is none of them, as OpenAI has it; null
    where nothing is known (an echoed prompt)."""
    return [
        _named(tops, TopLogprob(token_id, logprob), tokens.spell) if tops else None
        for tops, token_id, logprob in zip(
            tokens.top_rows, tokens.token_ids.tolist(), tokens.logprobs.tolist(), strict=True
        )
    ]


def _named(tops: Sequence[TopLogprob], sampled: TopLogprob, spell: Callable[[int], Spelling]) -> dict[str, float]:
    is_missing = math.isnan(sampled.logprob) or any(top.token_id == sampled.token_id for top in tops)
    named: dict[str, float] = {}
    for token_id, logprob in [*tops] if is_missing else [*tops, sampled]:
        name = _name(spell(token_id))
        named[f"token_id:{token_id}" if name in named else name] = logprob  # two tokens may read the same
    return named


def _name(spelled: Spelling) -> str:
    """A token's text; the bytes of one that is only a part of a character, or all such would have one name."""
    if spelled.raw is None or spelled.text.encode() == spelled.raw:
        return spelled.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled.raw)


def _wanted(fields: Mapping[str, JsonValue]) -> Wanted:
    options = fields.get("stream_options")
    if not isinstance(options, dict | None):
        raise InvalidRequest(f"stream_options: expected an object, got {kind_of(options)}")
    with inside("stream_options"):
        usage_chunk = flag(options or {}, "include_usage")
    num_logprobs = within(fields, "logprobs", 0, MAX_TOP_LOGPROBS)
    return Wanted(
        token_ids=flag(fields, "return_token_ids"),
        routed_experts=flag(fields, "return_routed_experts"),
        logprobs=num_logprobs is not None,
        usage_chunk=usage_chunk,
        num_top_logprobs=num_logprobs or 0,
    )


def _num_choices(fields: Mapping[str, JsonValue]) -> int:
    asked, best_of = optional(fields, "n", int), optional(fields, "best_of", int)
    number = 1 if asked is None else asked
    if not 1 <= number <= MAX_CHOICES:
        raise InvalidRequest(f"n: expected 1 to {MAX_CHOICES}, got {number}")
    if best_of is not None and best_of != number:
        raise InvalidRequest(f"best_of: every sample is a choice here; ask for n={best_of} and choose")
    return number
