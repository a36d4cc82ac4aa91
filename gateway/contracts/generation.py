"""One model call on token ids: what the gateway asks of an engine and what streams back.

Produced by `gateway.sessions`, consumed by every class behind the `Engine` Protocol (`gateway.contracts.ports`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from gateway.contracts.dimensions import UNKNOWN_DIMENSIONS, ModelDimensions
from gateway.contracts.errors import InvalidRequest, LengthMismatch
from gateway.contracts.experts import RoutedExperts, RoutingShape
from gateway.contracts.frozen import frozen_dataclass
from gateway.contracts.versions import VersionSpan, check_spans

JsonValue: TypeAlias = Any
"""Any JSON value as `orjson.loads` gives it. Agents' and templates' JSON has no narrower honest type."""

TokenIds: TypeAlias = npt.NDArray[np.int32]
"""int32[T] token ids."""


class LogprobKind(StrEnum):
    """What a recorded log-prob is a log-prob of; engines differ, the trainer must know.

    RAW: the model's distribution. TEMPERATURE_SCALED: the same with logits divided by the temperature. KEPT_SET: the
    one that was sampled from, which is the scaled one renormalised over the tokens that top-k and then top-p kept.
    """

    TEMPERATURE_SCALED = "temperature_scaled"
    RAW = "raw"
    KEPT_SET = "kept_set"


class FinishReason(StrEnum):
    """Why an engine stopped sampling."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@frozen_dataclass(frozen=True, slots=True)
class Finish:
    """The end of one generation; `matched` is the stop token id or stop string that ended it, where one did."""

    reason: FinishReason
    matched: int | str | None = None


@frozen_dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample; names and defaults are SGLang's, units are tokens.

    `top_k` -1 means no limit. `stop` are strings, `stop_token_ids` ids on top of the engine's own end tokens.
    `extra` holds sampling fields that Verbatim does not interpret and the engine may (min_new_tokens, regex, …).
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    extra: Mapping[str, JsonValue] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidRequest(f"max_new_tokens: is {self.max_new_tokens}; ask for at least one token")
        if self.temperature < 0:
            raise InvalidRequest(f"temperature: is {self.temperature}; it must not be negative")
        if not 0 < self.top_p <= 1:
            raise InvalidRequest(f"top_p: is {self.top_p}; it must be in (0, 1]")
        if self.top_k < -1 or self.top_k == 0:
            raise InvalidRequest(f"top_k: is {self.top_k}; use -1 for no limit, or a positive number")
        if not 0 <= self.min_p <= 1:
            raise InvalidRequest(f"min_p: is {self.min_p}; it must be in [0, 1]")


def kind_under(kind: LogprobKind, sampling: SamplingParams) -> LogprobKind:
    """What the log-probs of one generation are of: with every token kept, a kept set's are the scaled ones (so that
    engines of both kinds serve one rollout). Greedy sampling filters nothing."""
    keeps_all = sampling.temperature == 0 or (sampling.top_p == 1 and sampling.top_k == -1 and sampling.min_p == 0)
    return LogprobKind.TEMPERATURE_SCALED if kind is LogprobKind.KEPT_SET and keeps_all else kind


class MediaKind(StrEnum):
    """What a part of a message is that has no text."""

    IMAGE = "image"
    AUDIO = "audio"
    VIDEO = "video"


@dataclass(frozen=True, slots=True)
class Media:
    """One image, recording or film of a prompt; `url` says where it is, or is itself a `data:` URL."""

    kind: MediaKind
    url: str


class TopLogprob(NamedTuple):
    """One of the likeliest tokens at a position."""

    token_id: int
    logprob: float


_GATHERED_TOKENS = 128
"""An engine that dies takes with it what it had not told, some seconds of sampling; one that says all tokens again with
every event, as SGLang does unless told otherwise, writes as much as the square of their number: 14 MB for a reply of
8,000, had it 64 an event."""


@dataclass(slots=True, eq=False, kw_only=True)
class Pace:
    """How soon whoever asked wants new tokens: each at once while `is_live`, else several together, to be woken less.

    Changed under way: somebody may begin to listen (`quicken`), or leave. on_live: who gathers tokens is told so then.
    first_at: when the first ones came that were kept back, in the time of the event loop (`time.monotonic`).
    live_interval: how many tokens an engine may tell together while somebody listens; None leaves that to the engine.
    """

    is_live: bool
    live_interval: int | None = None
    on_live: Callable[[], None] | None = None
    first_at: float | None = None

    def quicken(self) -> None:
        """From now on, and what was gathered."""
        self.is_live = True
        if self.on_live is not None:
            self.on_live()


class WrittenIds:
    """Token ids int32[n] and their JSON, `[1,2,3]`; whoever keeps it may `forget` the text, then it is b"".

    A long prompt is sent again with every turn, and writing its numbers would be most of what that costs.
    """

    __slots__ = ("ids", "text")

    def __init__(self, ids: TokenIds, text: bytes) -> None:
        self.ids = ids
        self.text = text

    def forget(self) -> None:
        """It takes too much memory."""
        self.text = b""


@frozen_dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """Token ids in. `request_id` has a fixed length (SGLang aborts by prefix).

    `routed_experts_start`: absolute index of the first routing row wanted; None asks for no routing.
    `passthrough`: unknown top-level fields of the agent's request, for the engine (I8). `reasons_first`: a grammar
    among the sampling parameters holds behind the reasoning that the prompt has opened. `num_top_logprobs`: how many of
    the likeliest tokens are wanted at every position. `media`: of the whole prompt, in the order of its placeholders.
    `routing_key`: the same for all requests of a session, for a router in front of engines; "" has none.
    `cache_key`: requests share computed prefixes with those of the same key only; "" leaves that to the engine.
    `pace`: how soon new tokens are wanted, None: at once; what came counts as received in any case (I3).
    `written`: of `token_ids`, where it is at hand.
    """

    request_id: str
    token_ids: TokenIds
    sampling: SamplingParams
    routed_experts_start: int | None = None
    passthrough: Mapping[str, JsonValue] = field(default_factory=dict)
    reasons_first: bool = False
    num_top_logprobs: int = 0
    media: tuple[Media, ...] = ()
    routing_key: str = ""
    cache_key: str = ""
    pace: Pace | None = None
    written: WrittenIds | None = None

    @property
    def sent_ids(self) -> TokenIds | WrittenIds:
        """`token_ids` for the body of a request."""
        return self.token_ids if self.written is None else self.written

    @property
    def stream_interval(self) -> int | None:
        """How many tokens an engine is to gather before it tells of them; None leaves that to the engine.

        The first token is told at once, and so is what ends a reply, with all that is left.
        """
        if self.pace is None:
            return None
        return self.pace.live_interval if self.pace.is_live else _GATHERED_TOKENS


@frozen_dataclass(frozen=True, slots=True, eq=False)
class GenerateChunk:
    """New tokens since the last chunk: `token_ids` int32[n], `logprobs` float32[n] (NaN where the engine gave none).

    top_logprobs: for each new token the likeliest at its position, likeliest first; () where none were asked for.
    """

    token_ids: TokenIds
    logprobs: npt.NDArray[np.float32]
    top_logprobs: Sequence[Sequence[TopLogprob]] = ()


@frozen_dataclass(frozen=True, slots=True, eq=False)
class GenerateEnd:
    """The last item of a generation stream.

    version_spans: cover all output tokens of this request. routed_experts: rows [start, P+C-1), or None if not asked
    for or not given (I9: missing stays missing). `meta_info` and `reply_fields`: what we do not know of the engine's
    reply, of its meta_info object and of the reply itself (I8). `versions_certain`: False where the engine's weights
    changed meanwhile and it does not say at which token (I5).
    """

    finish: Finish
    version_spans: tuple[VersionSpan, ...]
    routed_experts: RoutedExperts | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_retractions: int
    meta_info: Mapping[str, JsonValue]
    reply_fields: Mapping[str, JsonValue] = field(default_factory=dict)
    versions_certain: bool = True

    def __post_init__(self) -> None:
        spans = self.version_spans
        if len(spans) != 1 or spans[0].start or spans[0].stop != self.completion_tokens:  # nearly always it is one
            check_spans(spans, self.completion_tokens)
        rows = self.routed_experts
        expected = self.prompt_tokens + self.completion_tokens - 1
        if rows is not None and rows.stop != expected:
            raise LengthMismatch(f"routing rows end at {rows.stop}, expected {expected} (prompt + completion - 1)")


class Capability(StrEnum):
    """What a job may demand of an engine (`--require`).

    ROUTED_EXPERTS: it returns which experts computed each token. TOKEN_IDS: it takes ids and returns those it sampled.
    SCALED_LOGPROBS, RAW_LOGPROBS, KEPT_SET_LOGPROBS: of which distribution its log-probs are (a kept set's are scaled
    too). TOP_LOGPROBS: those of the likeliest tokens too. VERSION_SPANS: it says which weights sampled which token.
    PAUSE: it stops generating on demand. GRAMMAR: it holds sampling to a schema. IMAGES, AUDIO: it takes such parts of
    a prompt.
    """

    ROUTED_EXPERTS = "routed_experts"
    TOKEN_IDS = "token_ids"
    SCALED_LOGPROBS = "scaled_logprobs"
    RAW_LOGPROBS = "raw_logprobs"
    KEPT_SET_LOGPROBS = "kept_set_logprobs"
    TOP_LOGPROBS = "top_logprobs"
    VERSION_SPANS = "version_spans"
    PAUSE = "pause"
    GRAMMAR = "grammar"
    IMAGES = "images"
    AUDIO = "audio"


@dataclass(frozen=True, slots=True)
class EngineIdentity:
    """What an engine says it is, for `/admin/identity` and for refusing the wrong one.

    `routing`: None for a dense model, or where the shape cannot be learnt. `captures_experts`: started so that it can
    return routing. `context_length` and `vocab_size` 0 mean unknown. `fingerprints`: of "tokenizer" and "template" (see
    `gateway.contracts.fingerprints`), as the engine says them, else of its model folder where this machine has it.
    `token_exact`: False for an engine that speaks text only, whose ids are our own encoding of its text and not what it
    sampled: no token of it may be trained (I1).

    `dimensions`: of the engine's own model; never the gateway's. `told`: which of "tokenizer", "template" and
    "dimensions" the engine itself said (the rest is of its folder). `parsers`: names of the engine's own "tool_call"
    and "reasoning" parsers, which read nothing here. `process`: differs between two starts of the engine, "" unknown.
    `media`: parts of a prompt that it understands besides text. `pause_modes`: values of `ports.PauseMode`.
    `enabling`: a capability that it lacks → what to start it with.
    `one_version`: False for a router whose workers hold different weights now; its `policy_version` is the oldest.
    `paused`: whether it holds requests back now, whoever asked for it.
    """

    engine_id: str
    url: str
    kind: str
    model_path: str
    served_model_name: str
    weight_version: str
    policy_version: int
    logprob_kind: LogprobKind
    captures_experts: bool
    routing: RoutingShape | None
    context_length: int
    vocab_size: int
    fingerprints: Mapping[str, str]
    token_exact: bool = True
    dimensions: ModelDimensions = UNKNOWN_DIMENSIONS
    told: tuple[str, ...] = ()
    parsers: Mapping[str, str] = field(default_factory=dict)
    process: str = ""
    media: tuple[MediaKind, ...] = ()
    top_logprobs: bool = False
    version_spans: bool = False
    pause_modes: tuple[str, ...] = ()
    grammar: bool = False
    enabling: Mapping[Capability, str] = field(default_factory=dict)
    one_version: bool = True
    paused: bool = False

    def can(self, capability: Capability) -> bool:
        """Whether it has one capability."""
        match capability:
            case Capability.ROUTED_EXPERTS:
                return self.captures_experts
            case Capability.TOKEN_IDS:
                return self.token_exact
            case Capability.SCALED_LOGPROBS:
                return self.token_exact and self.logprob_kind is not LogprobKind.RAW
            case Capability.RAW_LOGPROBS:
                return self.token_exact and self.logprob_kind is LogprobKind.RAW
            case Capability.KEPT_SET_LOGPROBS:
                return self.token_exact and self.logprob_kind is LogprobKind.KEPT_SET
            case Capability.TOP_LOGPROBS:
                return self.top_logprobs
            case Capability.VERSION_SPANS:
                return self.version_spans
            case Capability.PAUSE:
                return bool(self.pause_modes)
            case Capability.GRAMMAR:
                return self.grammar
            case Capability.IMAGES:
                return MediaKind.IMAGE in self.media
            case Capability.AUDIO:
                return MediaKind.AUDIO in self.media
