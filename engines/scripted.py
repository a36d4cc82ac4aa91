"""ScriptedEngine: a deterministic engine in this process, for gateway development and tests without torch.

It promises what the `Engine` Protocol promises: streamed ids, a log-prob a token, the likeliest tokens, distinct
experts in every row, version spans, pausing and aborting. Log-probs and experts are functions of token id and position
only, so that a row is the same whether a token was sampled or prefilled. It does not compute anything: a plan says what
it samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from engines.media import refuse_media
from gateway.contracts.errors import EngineRejected, EngineUnavailable
from gateway.contracts.experts import ExpertIds, RoutedExperts, RoutingShape, narrow
from gateway.contracts.generation import (
    EngineIdentity,
    Finish,
    FinishReason,
    GenerateChunk,
    GenerateEnd,
    GenerateRequest,
    JsonValue,
    LogprobKind,
    MediaKind,
    TokenIds,
    TopLogprob,
)
from gateway.contracts.ports import PauseMode
from gateway.contracts.versions import VersionSpan, join_spans

_STOPPED = Finish(FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class ScriptedReply:
    """What one request samples.

    delay_seconds: before every chunk of `chunk_size` tokens. fail_after: the connection breaks after so many tokens.
    hides_experts: no routing rows come back although they were asked for. meta_info, reply_fields: extra fields.
    """

    token_ids: tuple[int, ...]
    finish: Finish = _STOPPED
    delay_seconds: float = 0.0
    chunk_size: int = 1
    fail_after: int | None = None
    hides_experts: bool = False
    meta_info: Mapping[str, JsonValue] = field(default_factory=dict)
    reply_fields: Mapping[str, JsonValue] = field(default_factory=dict)


ReplyPlan: TypeAlias = Sequence[ScriptedReply] | Callable[[GenerateRequest], ScriptedReply]
"""Replies in order of requests (the last one repeats), or a function of the request."""


class ScriptedEngine:
    """An `Engine` that samples what its plan says; `requests` keeps all that it was asked.

    `context_length` and `vocab_size` are enforced as a real engine would: a longer request is rejected, and an id
    outside the vocabulary breaks the connection (what SGLang does on CPU). media_tokens: how many tokens each image,
    recording or film takes in its prompts, 0 for a model that takes none.
    """

    def __init__(
        self,
        plan: ReplyPlan,
        *,
        engine_id: str = "scripted-0",
        routing: RoutingShape | None = None,
        policy_version: int = 0,
        vocab_size: int = 0,
        context_length: int = 0,
        model_path: str = "",
        media_tokens: int = 0,
    ) -> None:
        self._plan = plan
        self._engine_id = engine_id
        self._routing = routing
        self._policy_version = policy_version
        self._vocab_size = vocab_size
        self._context_length = context_length
        self._model_path = model_path
        self._media_tokens = media_tokens
        self._running = asyncio.Event()
        self._running.set()
        self._aborted: set[str] = set()
        self._live: set[str] = set()
        self._closed = False
        self.requests: list[GenerateRequest] = []

    @property
    def engine_id(self) -> str:
        """The name that records and routes use."""
        return self._engine_id

    @property
    def url(self) -> str:
        """Of no server: scripted engines live in this process."""
        return f"scripted://{self._engine_id}"

    @property
    def live_requests(self) -> frozenset[str]:
        """Ids of the requests that are being generated now."""
        return frozenset(self._live)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateEnd, None]:
        """Stream the planned reply; see `ports.Engine.generate`."""
        self._check(request)
        self.requests.append(request)
        reply = self._reply(request)
        self._live.add(request.request_id)
        spans: list[VersionSpan] = []
        sampled = 0
        try:
            budget = min(len(reply.token_ids), request.sampling.max_new_tokens)
            while sampled < budget:
                await asyncio.sleep(reply.delay_seconds)
                if request.request_id not in self._aborted:
                    await self._running.wait()
                if request.request_id in self._aborted:
                    break
                stop = min(sampled + reply.chunk_size, budget)
                if reply.fail_after is not None:
                    stop = min(stop, reply.fail_after)
                if self._closed or stop == sampled:
                    raise EngineUnavailable(f"{self._engine_id}: the connection broke after {sampled} tokens")
                token_ids = np.asarray(reply.token_ids[sampled:stop], dtype=np.int32)
                spans.append(VersionSpan(sampled, stop, self._policy_version))
                first = len(request.token_ids) + sampled
                sampled = stop
                logprobs = scripted_logprobs(token_ids, first=first)
                tops = scripted_top_logprobs(token_ids, logprobs, number=request.num_top_logprobs)
                yield GenerateChunk(token_ids, logprobs, tops)
            yield self._end(request, reply, sampled, spans)
        finally:
            self._live.discard(request.request_id)
            self._aborted.discard(request.request_id)

    async def identity(self) -> EngineIdentity:
        """Who it is; raises EngineUnavailable after `fail`."""
        if self._closed:
            raise EngineUnavailable(f"{self._engine_id} is down")
        return EngineIdentity(
            engine_id=self._engine_id,
            url=self.url,
            kind="scripted",
            model_path=self._model_path,
            served_model_name="scripted",
            weight_version=f"scripted-{self._policy_version}",
            policy_version=self._policy_version,
            logprob_kind=LogprobKind.TEMPERATURE_SCALED,
            captures_experts=self._routing is not None,
            routing=self._routing,
            context_length=self._context_length,
            vocab_size=self._vocab_size,
            fingerprints={},
            process=self._engine_id,
            version_spans=True,
            paused=not self._running.is_set(),
            pause_modes=tuple(mode.value for mode in PauseMode),
        )

    async def tokenize(self, texts: Sequence[str]) -> None:
        """Not to be asked: it has no tokenizer."""

    async def healthy(self) -> bool:
        """Whether it is up."""
        return not self._closed

    async def abort(self, request_id: str) -> None:
        """End one request with what it has."""
        if request_id in self._live:
            self._aborted.add(request_id)

    async def pause(self, mode: PauseMode) -> None:
        """Hold all requests; with ABORT the running ones end with what they have, and only new ones are held."""
        if mode is PauseMode.ABORT:
            self._aborted |= self._live
        self._running.clear()

    async def resume(self) -> None:
        """Let held requests go on."""
        self._running.set()

    async def aclose(self) -> None:
        """Nothing to close: the engine belongs to whoever made it."""

    def load_policy(self, policy_version: int) -> None:
        """Take new weights: tokens sampled from now on carry `policy_version`."""
        self._policy_version = policy_version

    def fail(self) -> None:
        """Go down: running requests break, health checks fail."""
        self._closed = True

    def recover(self) -> None:
        """Come up again."""
        self._closed = False

    def _check(self, request: GenerateRequest) -> None:
        refuse_media(request, tuple(MediaKind) if self._media_tokens else (), named="this engine")
        wanted = self._prompt_tokens(request) + request.sampling.max_new_tokens
        if self._closed:
            raise EngineUnavailable(f"{self._engine_id} is down")
        if self._context_length and wanted > self._context_length:
            raise EngineRejected(f"{wanted} tokens are longer than the maximum context length {self._context_length}")
        if self._vocab_size and int(request.token_ids.max()) >= self._vocab_size:
            raise EngineUnavailable(f"{self._engine_id} died of a token id outside its vocabulary")

    def _prompt_tokens(self, request: GenerateRequest) -> int:
        return len(request.token_ids) + len(request.media) * max(0, self._media_tokens - 1)

    def _reply(self, request: GenerateRequest) -> ScriptedReply:
        if callable(self._plan):
            return self._plan(request)
        return self._plan[min(len(self.requests), len(self._plan)) - 1]

    def _end(
        self, request: GenerateRequest, reply: ScriptedReply, sampled: int, spans: Sequence[VersionSpan]
    ) -> GenerateEnd:
        if request.request_id in self._aborted:
            finish = Finish(FinishReason.ABORT)
        elif sampled < len(reply.token_ids):
            finish = Finish(FinishReason.LENGTH)
        else:
            finish = reply.finish
        sequence = np.concatenate([request.token_ids, np.asarray(reply.token_ids[:sampled], dtype=np.int32)])
        start = request.routed_experts_start
        experts = None
        if start is not None and self._routing is not None and not reply.hides_experts:
            experts = RoutedExperts(scripted_experts(sequence[:-1], self._routing, start=start), start)
        return GenerateEnd(
            finish=finish,
            version_spans=join_spans(spans),
            routed_experts=experts,
            prompt_tokens=self._prompt_tokens(request),
            completion_tokens=sampled,
            cached_tokens=0,
            num_retractions=0,
            meta_info=reply.meta_info,
            reply_fields=reply.reply_fields,
        )


def scripted_logprobs(token_ids: TokenIds, *, first: int) -> npt.NDArray[np.float32]:
    """float32[n], between -2 and 0: a function of token id and absolute position (`first` is that of token 0)."""
    positions = np.arange(first, first + len(token_ids))
    return np.asarray(-((token_ids * 7 + positions * 3) % 97 + 1) / 50, dtype=np.float32)


def scripted_top_logprobs(
    token_ids: TokenIds, logprobs: npt.NDArray[np.float32], *, number: int
) -> tuple[tuple[TopLogprob, ...], ...]:
    """`number` likeliest tokens of each position, () for 0: the sampled one and those below it, each less likely by a
    half; as if the likeliest were always sampled."""
    if not number:
        return ()
    return tuple(
        tuple(TopLogprob(token_id - i, logprob - i / 2) for i in range(min(number, token_id + 1)))
        for token_id, logprob in zip(token_ids.tolist(), logprobs.tolist(), strict=True)
    )


def scripted_experts(inputs: TokenIds, routing: RoutingShape, *, start: int) -> ExpertIds:
    """Rows `[start, len(inputs))`: distinct experts per layer, a function of input token, position and layer."""
    positions = np.arange(start, len(inputs))
    rows = inputs[start:].astype(np.int64) * 5 + positions * 3
    layers = np.arange(routing.num_layers) * 7
    ranks = np.arange(routing.top_k)
    ids = (rows[:, None, None] + layers[None, :, None] + ranks[None, None, :]) % routing.num_experts
    return narrow(ids, routing)
